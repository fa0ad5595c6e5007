import os
import time
from pathlib import Path

import pytest

from fedhead.config import RunConfig
from fedhead.errors import FedheadError, UserError
from fedhead.server.queue import RunQueue


def put(folder: Path, name: str, text: str = "rounds = 1\n") -> Path:
    path = folder / name
    path.write_text(text)
    earlier = time.time() - 60
    os.utime(path, (earlier, earlier))
    return path


class Runs:
    """Writes down what is run; fails as a test says."""

    def __init__(self, failures: dict[str, BaseException] | None = None) -> None:
        self.failures = failures or {}
        self.ran: list[tuple[str, int, bool]] = []

    def __call__(self, config: RunConfig, out: Path, resume: bool) -> None:
        self.ran.append((out.name, config.rounds, resume))
        out.mkdir(exist_ok=True)
        (out / "run.toml").touch()
        if (failure := self.failures.pop(out.name, None)) is not None:
            raise failure
        (out / "result.json").touch()


def contents(folder: Path) -> dict[str, list[str]]:
    return {where: sorted(path.name for path in (folder / where).iterdir()) for where in ("done", "failed")}


def test_files_are_run_by_name_and_moved_with_the_reason(tmp_path: Path) -> None:
    queue = RunQueue(tmp_path / "queue")
    put(queue.folder, "b.toml", "rounds = 2\n")
    put(queue.folder, "a.toml")
    put(queue.folder, "c.toml", "rounds = = 2\n")
    put(queue.folder, "d.toml")
    put(queue.folder, ".hidden.toml")
    put(queue.folder, "notes.txt")
    runs = Runs({"a": FedheadError("Too few sites."), "d": ZeroDivisionError("by zero")})
    queue.serve(RunConfig.from_toml, runs, ends=True)
    assert runs.ran == [("a", 1, False), ("b", 2, False), ("d", 1, False)]
    assert contents(queue.folder) == {
        "done": ["b.toml"],
        "failed": ["a.toml", "a.txt", "c.toml", "c.txt", "d.toml", "d.txt"],
    }
    assert (queue.folder / "failed" / "a.txt").read_text() == "Too few sites.\n"
    assert "is not valid TOML" in (queue.folder / "failed" / "c.txt").read_text()
    assert "ZeroDivisionError: by zero" in (queue.folder / "failed" / "d.txt").read_text()
    assert (queue.folder / ".hidden.toml").exists()


def test_an_ended_process_and_a_failed_run_are_resumed(tmp_path: Path) -> None:
    queue = RunQueue(tmp_path / "queue", tmp_path / "runs")
    put(queue.folder, "a.toml")
    runs = Runs({"a": SystemExit(143)})
    with pytest.raises(SystemExit):
        queue.serve(RunConfig.from_toml, runs, ends=True)
    assert (queue.folder / "a.toml").exists()
    runs.failures["a"] = FedheadError("The quorum was lost.")
    queue.serve(RunConfig.from_toml, runs, ends=True)
    (queue.folder / "failed" / "a.toml").rename(queue.folder / "a.toml")
    queue.serve(RunConfig.from_toml, runs, ends=True)
    assert runs.ran == [("a", 1, False), ("a", 1, True), ("a", 1, True)]
    assert contents(queue.folder)["done"] == ["a.toml"]
    assert (tmp_path / "runs" / "a" / "result.json").exists()


def test_a_name_that_was_run_is_refused_and_nothing_is_overwritten(tmp_path: Path) -> None:
    queue = RunQueue(tmp_path / "queue")
    runs = Runs()
    for _ in range(3):
        put(queue.folder, "a.toml")
        queue.serve(RunConfig.from_toml, runs, ends=True)
    assert len(runs.ran) == 1
    assert contents(queue.folder) == {"done": ["a.toml"], "failed": ["a-2.toml", "a-2.txt", "a.toml", "a.txt"]}


def test_a_run_that_had_finished_before_its_process_was_killed_is_done(tmp_path: Path) -> None:
    queue = RunQueue(tmp_path / "queue")
    put(queue.folder, "a.toml")

    class Killed(Runs):
        def __call__(self, config: RunConfig, out: Path, resume: bool) -> None:
            super().__call__(config, out, resume)
            raise SystemExit(137)

    with pytest.raises(SystemExit):
        queue.serve(RunConfig.from_toml, Killed(), ends=True)
    runs = Runs()
    RunQueue(queue.folder).serve(RunConfig.from_toml, runs, ends=True)
    assert not runs.ran
    assert contents(queue.folder) == {"done": ["a.toml"], "failed": []}
    # The same name and content, put there again, is another run.
    put(queue.folder, "a.toml")
    queue.serve(RunConfig.from_toml, runs, ends=True)
    assert contents(queue.folder)["failed"] == ["a.toml", "a.txt"]


def test_another_file_of_the_name_of_a_finished_run_is_not_taken_for_it(tmp_path: Path) -> None:
    queue = RunQueue(tmp_path / "queue")
    put(queue.folder, "a.toml")
    with pytest.raises(SystemExit):
        queue.serve(RunConfig.from_toml, Runs({"a": SystemExit(143)}), ends=True)
    (queue.runs / "a" / "result.json").touch()
    put(queue.folder, "a.toml", "rounds = 2\n")
    queue.serve(RunConfig.from_toml, Runs(), ends=True)
    assert contents(queue.folder) == {"done": [], "failed": ["a.toml", "a.txt"]}


def test_a_file_that_is_being_written_is_left_for_later(tmp_path: Path) -> None:
    queue = RunQueue(tmp_path / "queue")
    (queue.folder / "a.toml").write_text("rounds = 1\n")
    assert queue.next() is None
    put(queue.folder, "a.toml")
    assert queue.next() == queue.folder / "a.toml"


def test_a_link_to_nothing_does_not_keep_others_waiting(tmp_path: Path) -> None:
    queue = RunQueue(tmp_path / "queue")
    (queue.folder / "a.toml").symlink_to(tmp_path / "nothing")
    assert queue.next() is None
    file = put(queue.folder, "b.toml")
    assert queue.next() == file


def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        RunQueue(tmp_path / "file" / "queue")
