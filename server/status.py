"""How a run on a network goes, for a live table, and in the run folder for whoever looks from elsewhere."""

import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedhead.config import RunConfig
from fedhead.errors import FedheadError, UserError
from fedhead.files import write_atomically
from fedhead.server.history import Outcome, Round
from fedhead.server.observer import Observer, SiteState, Step
from fedhead.server.superlink import SuperLink

FILE = "status.json"
CHANGED_SECONDS, ALIVE_SECONDS = 1.0, 5.0
"""How often the file is written at the most, and at the least."""
SILENT_SECONDS = 30.0
"""A run on another machine that has not written for so long is not taken for alive."""


class RunStatus(Observer):
    """Knows how a run and its sites stand; writes it to the run folder from its start to its end.

    Args:
        link: what the sites connect to.
    """

    def __init__(self, link: SuperLink) -> None:
        self._link = link
        self._lock = threading.Lock()
        self._values: dict[str, Any] = {
            "state": "waiting",
            "message": "",
            "run": "",
            "rounds": 0,
            "step": "",
            "round": 0,
            "address": f"{link.host}:{link.port}",
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_started": _process_started(os.getpid()),
            "started": time.time(),
        }
        self._standing: dict[str, SiteState] = {}
        self._history: list[dict[str, Any]] = []
        self._folder: Path | None = None
        self._ended = threading.Event()
        self._writer = threading.Thread(target=self._write_regularly, name="status", daemon=True)

    def snapshot(self) -> dict[str, Any]:
        """Return everything as plain values."""
        with self._lock:
            sites = {name: self._site(name) for name in sorted({*self._link.sites, *self._standing})}
            return {**self._values, "updated": time.time(), "sites": sites, "history": list(self._history)}

    def _site(self, name: str) -> dict[str, Any]:
        connected = self._link.sites.get(name)
        standing = self._standing.get(name)
        values: dict[str, Any] = {"standing": "", "rows": None} if standing is None else asdict(standing)
        values["connected"] = connected is not None and connected.link.online
        values["seen"] = connected.last_seen if connected else values.get("seen", 0.0)
        values["address"] = connected.address if connected else ""
        return values

    def note(self, **values: Any) -> None:
        """Change some of the values."""
        with self._lock:
            self._values.update(values)

    def on_started(self, config: RunConfig, run_dir: Path | None) -> None:
        self.note(rounds=config.rounds, run=run_dir.name if run_dir else "", state="running", message="")
        if run_dir is not None:
            self._folder = run_dir
            metrics = run_dir / "metrics.jsonl"
            with self._lock:
                self._history = [json.loads(line) for line in metrics.read_text().splitlines() if line.endswith("}")]
            self._write()
            self._writer.start()

    def on_step(self, step: Step, server_round: int) -> None:
        self.note(step=step, round=server_round, state="running", message="")

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
        accuracy = outcome.history[outcome.kept_round].accuracy
        self._end(state="finished", message="", accuracy=accuracy, kept_round=outcome.kept_round)

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
        # The folder of a run that had not begun in earnest is gone by now.
        if self._folder is not None and self._folder.is_dir():
            self._write()

    def _write(self) -> None:
        assert self._folder is not None
        write_atomically(self._folder / FILE, json.dumps(self.snapshot(), indent=1) + "\n")

    def _write_regularly(self) -> None:
        written, last = 0.0, ""
        while not self._ended.wait(CHANGED_SECONDS):
            now = {key: value for key, value in self.snapshot().items() if key != "updated"}
            for site in now["sites"].values():
                del site["seen"]
            text = json.dumps(now)
            if text != last or time.monotonic() - written > ALIVE_SECONDS:
                try:
                    self._write()
                # A full disk ends the run where it writes what matters, not here.
                except FedheadError:
                    continue
                written, last = time.monotonic(), text


def read_status(run_dir: Path) -> dict[str, Any]:
    """Return how a run stands, from its folder; `state` is `dead` if its process ended without saying so.

    Raises:
        UserError: if the folder holds no status.
    """
    path = run_dir / FILE
    try:
        values: dict[str, Any] = json.loads(path.read_text())
        if values["state"] in ("running", "waiting"):
            values["message"] = _why_dead(values) or values["message"]
            values["state"] = "dead" if _why_dead(values) else values["state"]
    except OSError:
        raise UserError(f"{run_dir} holds no {FILE}: it is not the folder of a run by fedhead server.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a status that fedhead server wrote ({error}).") from None
    return values


def _why_dead(values: Mapping[str, Any]) -> str:
    pid = int(values["pid"])
    if values["host"] == socket.gethostname():
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
    """Return what tells a process from a later one with its id, where the system says."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
