"""The status of a run on a network, for a live table, and as a file in the run folder."""

import _thread
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedhead.config import RunConfig
from fedhead.errors import FedheadError, UserError
from fedhead.files import write_atomically
from fedhead.server.network.site_registry import ConnectedSite
from fedhead.server.network.superlink import SuperLink
from fedhead.server.observer import Observer, Phase, SiteState, Step
from fedhead.server.runs.history import Outcome, Round
from fedhead.server.runs.record import read_rounds
from fedhead.server.runs.status_record import StatusRecord
from fedhead.server.runs.summary import damaged
from fedhead.tasks import Task, make_task, tasks
from fedhead.threads import LastingThread

FILE = "status.json"
STOP_FILE = "stop"
"""File in a run folder that asks the run's coordinator to end."""
CHANGED_SECONDS, ALIVE_SECONDS = 1.0, 5.0
"""Shortest and longest interval between writes of the file; with many sites, slow writes lengthen both."""
LARGEST_SHARE = 0.02
"""Share of a processor that may be spent on the file."""
ALIVE = ("running", "waiting")
"""States of a run whose coordinator is up."""
LOOK_SECONDS = 0.2
SILENT_SECONDS = 30.0
"""A run on another machine that has not written for so long is not taken for alive."""


class RunStatus(Observer):
    """The state of a run and its sites, written to the run folder from the run's start to its end.

    Args:
        link: the link that sites connect to.
        outstanding: gives the sites that owe a reply, with the action that they were asked for.

    Attributes:
        stop_asked: whether the process is being ended as `stop_run` asked.
    """

    def __init__(self, link: SuperLink, outstanding: Callable[[], Mapping[str, tuple[str, float]]] = dict) -> None:
        self.stop_asked = False
        self._link = link
        self._outstanding = outstanding
        self._lock = threading.Lock()
        self._values: dict[str, Any] = {
            "state": "waiting",
            "message": "",
            "run": "",
            "rounds": 0,
            "step": "",
            "round": 0,
            "phase": "",
            "address": f"{link.host}:{link.port}",
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_started": _process_started(os.getpid()),
            "started": time.time(),
        }
        self._standing: dict[str, SiteState] = {}
        self._hides_rows = False
        self._task: Task | None = None
        self._history: list[dict[str, Any]] = []
        self._folder: Path | None = None
        self._ended = threading.Event()
        self._writer = LastingThread(self._write_regularly, "status")

    def snapshot(self) -> dict[str, Any]:
        """Return everything as plain values."""
        working = {name: action for name, (action, _) in self._outstanding().items()}
        with self._lock:
            linked = self._link.sites
            names = sorted({*linked, *self._standing})
            sites = {name: {**self._site(name, linked.get(name)), "working": working.get(name, "")} for name in names}
            return {**self._values, "updated": time.time(), "sites": sites, "history": list(self._history)}

    def _site(self, name: str, connected: ConnectedSite | None) -> dict[str, Any]:
        standing = self._standing.get(name)
        values: dict[str, Any] = {"standing": "", "rows": None} if standing is None else dict(vars(standing))
        if self._hides_rows:
            values["rows"] = None
        values["connected"] = connected is not None and connected.link.online
        values["seen"] = connected.last_seen if connected else values.get("seen", 0.0)
        values["address"] = connected.address if connected else ""
        values["extracted"] = list(connected.extracted) if connected and connected.extracted else None
        return values

    def note(self, **values: Any) -> None:
        """Change some of the values."""
        with self._lock:
            self._values.update(values)

    def on_started(self, config: RunConfig, run_dir: Path | None) -> None:
        name = tasks[config.task].score_name
        self._task = make_task(config.task, config.classes) if config.classes else None
        self._hides_rows = config.privacy.secure_sum or config.privacy.on
        self.note(
            rounds=config.rounds, run=run_dir.name if run_dir else "", score_name=name, state="running", message=""
        )
        if run_dir is not None:
            self._folder = run_dir
            # Of an earlier process, which ended before it saw the file.
            (run_dir / STOP_FILE).unlink(missing_ok=True)
            with self._lock:
                self._history = [asdict(line) for line in read_rounds(run_dir)]
            self._write(self.snapshot())
            self._writer.start()

    def on_step(self, step: Step, server_round: int) -> None:
        self.note(step=step, round=server_round, phase="", state="running", message="")

    def on_phase(self, phase: Phase) -> None:
        self.note(phase=phase, state="running", message="")

    def on_sites(self, sites: Mapping[str, SiteState]) -> None:
        with self._lock:
            self._standing = dict(sites)

    def on_waiting(self, reason: str) -> None:
        self.note(state="waiting", message=reason)

    def on_round(self, finished: Round) -> None:
        with self._lock:
            self._history = [line for line in self._history if line["number"] < finished.number]
            self._history.append({**asdict(finished), "dropped": dict(finished.dropped)})

    def on_finished(self, outcome: Outcome) -> None:
        score = outcome.history[outcome.kept_round].score
        if score is None and self._task is not None and outcome.sites:
            # Of some tasks the score is known from the evaluation at the end only.
            score = self._task.score_of(self._task.pooled(outcome.sites.values()))
        self._end(state="finished", message="", score=score, kept_round=outcome.kept_round)

    def on_failed(self, error: BaseException) -> None:
        said = str(error) or type(error).__name__
        if isinstance(error, FedheadError):
            self._end(state="failed", message=said)
        elif isinstance(error, Exception):
            self._end(state="failed", message=f"{type(error).__name__}: {said}")
        else:
            self._end(state="interrupted", message="The coordinator was stopped.")

    def _end(self, **values: Any) -> None:
        self.note(**values)
        self._ended.set()
        if self._writer.is_alive():
            self._writer.join()
        # A run that ended before its first step has no folder.
        if self._folder is not None and self._folder.is_dir():
            self._write(self.snapshot())

    def _write(self, values: Mapping[str, Any]) -> None:
        assert self._folder is not None
        write_atomically(self._folder / FILE, json.dumps(values) + "\n")

    def _stop_if_asked(self) -> None:
        """End the main thread as SIGTERM does if somebody asked for that in the run folder."""
        assert self._folder is not None
        with suppress(OSError):
            if not self.stop_asked and (self._folder / STOP_FILE).exists():
                (self._folder / STOP_FILE).unlink()
                self.stop_asked = True
                _thread.interrupt_main(signal.SIGTERM)

    def _write_regularly(self) -> None:
        written, last, due = 0.0, dict[str, Any](), 0.0
        while not self._ended.wait(CHANGED_SECONDS):
            self._stop_if_asked()
            if time.monotonic() < due:
                continue
            began = time.thread_time()
            values = self.snapshot()
            now = _without_times(values)
            if now != last or time.monotonic() - written > ALIVE_SECONDS:
                try:
                    self._write(values)
                # A full disk ends the run where it writes what matters, not here.
                except FedheadError:
                    continue
                written, last = time.monotonic(), now
            due = time.monotonic() + min((time.thread_time() - began) / LARGEST_SHARE, ALIVE_SECONDS)


def _without_times(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a snapshot without the times that change in every one."""
    sites = {name: {**site, "seen": 0.0} for name, site in values["sites"].items()}
    return {**values, "updated": 0.0, "sites": sites}


def read_status(run_dir: Path) -> dict[str, Any]:
    """Return the state of a run, from its folder; `state` is `dead` if its process was killed.

    Raises:
        UserError: if the folder holds no status.
    """
    path = run_dir / FILE
    try:
        values = StatusRecord.model_validate(json.loads(path.read_text(encoding="utf-8"))).model_dump()
        if values["state"] in ALIVE and (why := _why_dead(values)):
            # Killed after the last thing that it had to write.
            finished = (run_dir / "result.json").is_file()
            values["state"], values["message"] = ("finished", "") if finished else ("dead", why)
    except OSError:
        raise UserError(f"{run_dir} holds no {FILE}: it is not the folder of a run by fedhead server.") from None
    except ValueError as error:
        raise UserError(f"{damaged(path, error)} It is not a status that fedhead server wrote.") from None
    return values


def stop_run(run_dir: Path, seconds: float) -> dict[str, Any]:
    """Ask a run's coordinator to end, wait for its end, and return the run's status.

    A file in the run folder asks, so that this works from another container or machine that shares the folder.

    Args:
        run_dir: the run folder.
        seconds: how long to wait.

    Raises:
        UserError: if the folder holds no status, or cannot be written.
        FedheadError: if the coordinator does not end in time; it may do so later.
    """
    values = read_status(run_dir)
    if values["state"] not in ALIVE:
        return values
    write_atomically(run_dir / STOP_FILE, "")
    stop = time.monotonic() + seconds
    while (values := read_status(run_dir))["state"] in ALIVE:
        if time.monotonic() > stop:
            raise FedheadError(
                f"The coordinator of {run_dir} (process {values['pid']} on {values['host']}) has not ended within "
                f"{seconds:.0f} s. It ends when it next looks into the folder."
            )
        time.sleep(LOOK_SECONDS)
    (run_dir / STOP_FILE).unlink(missing_ok=True)
    return values


def _why_dead(values: Mapping[str, Any]) -> str:
    pid = int(values["pid"])
    # Windows would end a process that is asked for its signal 0.
    if values["host"] == socket.gethostname() and sys.platform != "win32":
        if _process_started(pid) == values["process_started"] and _exists(pid):
            return ""
        return (
            f"The coordinator's process ({pid}) ended without a word: it was killed, or its machine went down. "
            "fedhead server --resume goes on from the last completed round."
        )
    silent = time.time() - float(values["updated"])
    if silent < SILENT_SECONDS:
        return ""
    return (
        f"The coordinator on {values['host']} has not written for {silent:.0f} s: it has ended, or cannot write here."
    )


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _process_started(pid: int) -> str:
    """Return the start of a process, which distinguishes it from a later one with its id; empty if unknown."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
