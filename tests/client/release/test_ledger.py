import errno
import hashlib
import json
import multiprocessing
import os
import signal
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save
from typer.testing import CliRunner

from fedhead.cli import app
from fedhead.client.release.guard import Guard
from fedhead.client.release.ledger import Entry, Ledger, entry_of, ledger_path, read_ledger
from fedhead.client.release.row_sets import TRAINING_ROWS, Keys, keys_of
from fedhead.config import LocalConfig
from fedhead.errors import FedheadError, UserError
from fedhead.protocol.messages import Manifest, Payload
from fedhead.protocol.steps import Release
from fedhead.tasks import make_task


def entry(
    payload: bytes = b"sums",
    run: str = "7",
    site: str = "ward",
    action: str = "query.statistics",
    rows: int = 40,
    classes: Mapping[str, int] | None = None,
) -> Entry:
    return Entry(
        when=datetime.now(UTC),
        run=run,
        site=site,
        action=action,
        rows=rows,
        classes={"cat": 40} if classes is None else dict(classes),
        bytes=len(payload),
        digest=hashlib.sha256(payload).hexdigest(),
    )


def sums_of(*keys: int, name: str = "training rows of class 'cat'") -> Keys:
    return {name: np.array(keys, dtype=np.uint64)}


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger" / "ward.jsonl", min_class_count=3)


def record(ledger: Ledger, payload: bytes = b"sums", run: str = "7", sums: Keys | None = None) -> Entry:
    return ledger.record(entry(payload, run), sums)


def test_a_release_is_in_the_ledger_when_recording_returns(ledger: Ledger) -> None:
    before = datetime.now(UTC)
    made = ledger.record(entry(b"weights", "12", "Ward 3\nüñ", "train", 30, {"cat": 20, "dög": 10}))
    assert read_ledger(ledger.path) == [made]
    assert before <= made.when <= datetime.now(UTC)
    assert made.when.utcoffset() == timedelta(0)
    (line,) = ledger.path.read_text(encoding="utf-8").splitlines()
    assert {"when", "run", "action", "rows", "classes", "bytes", "digest"} <= json.loads(line).keys()


def test_entries_are_flushed_to_the_disk(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []
    sync = os.fsync

    def watched(handle: int) -> None:
        flushed.append((os.fstat(handle).st_ino, os.fstat(handle).st_size))
        sync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    for _ in range(2):
        record(ledger)
        assert (ledger.path.stat().st_ino, ledger.path.stat().st_size) in flushed


def test_only_the_owner_may_read_what_is_kept(ledger: Ledger) -> None:
    before = os.umask(0)
    try:
        made = record(ledger, sums=sums_of(1, 2, 3))
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in ledger.path.parent.rglob("*")}
    assert modes == {ledger.path: 0o600, ledger.row_sets.folder: 0o700, ledger.row_sets.folder / made.row_set: 0o600}
    assert stat.S_IMODE(ledger.path.parent.stat().st_mode) == 0o700
    ledger.path.chmod(0o644)
    record(ledger)
    assert stat.S_IMODE(ledger.path.stat().st_mode) == 0o600


def test_a_line_cut_anywhere_is_passed_over_and_cut_off_by_the_next(ledger: Ledger) -> None:
    first, _ = record(ledger, b"first"), record(ledger, b"second")
    content = ledger.path.read_bytes()
    start = content.index(b"\n") + 1
    for end in range(start, len(content), 7):
        ledger.path.write_bytes(content[:end])
        assert read_ledger(ledger.path) == [first]
        third = record(ledger, b"third")
        assert read_ledger(ledger.path) == [first, third]
    ledger.path.write_bytes(b"\0" * 200_000)
    assert read_ledger(ledger.path) == []
    last = record(ledger)
    assert read_ledger(ledger.path) == [last]


def test_a_damaged_line_within_is_named_and_no_more_sums_leave(ledger: Ledger) -> None:
    for _ in range(3):
        record(ledger, sums=sums_of(1, 2, 3))
    lines = ledger.path.read_bytes().splitlines(keepends=True)
    ledger.path.write_bytes(lines[0] + lines[1][5:] + lines[2])
    with pytest.raises(FedheadError, match="Line 2 of the ledger"):
        read_ledger(ledger.path)
    with pytest.raises(FedheadError, match="Line 2 of the ledger"):
        record(ledger, sums=sums_of(1, 2, 3))
    assert len(ledger.path.read_bytes().splitlines()) == 3


def test_a_missing_ledger_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing left this site"):
        read_ledger(tmp_path / "none.jsonl")


def write_lines(path: Path, name: str, count: int) -> None:
    ledger = Ledger(path)
    for number in range(count):
        ledger.record(entry(f"{name} {number}".encode() * 500, name, "s", "train", number, {}))


def started(path: Path, name: str, count: int) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=write_lines, args=(path, name, count))
    process.start()
    return process


def test_two_processes_lose_and_tear_no_line(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    truncate = os.ftruncate

    def late(handle: int, length: int) -> None:
        time.sleep(0.0003)
        truncate(handle, length)

    # Time for the other process to write in between, if it could.
    monkeypatch.setattr(os, "ftruncate", late)
    processes = [started(ledger.path, name, 200) for name in ("a", "b")]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    entries = read_ledger(ledger.path)
    assert len(ledger.path.read_bytes().splitlines()) == 400
    for name in ("a", "b"):
        assert [entry.rows for entry in entries if entry.run == name] == list(range(200))


def test_a_process_killed_at_any_moment_leaves_a_ledger_that_goes_on(ledger: Ledger) -> None:
    for kill in range(3):
        before = len(read_ledger(ledger.path)) if ledger.path.exists() else 0
        process = started(ledger.path, str(kill), 100_000)
        deadline = time.monotonic() + 30
        while not ledger.path.exists() or len(read_ledger(ledger.path)) < before + 5:
            assert time.monotonic() < deadline
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert [entry.rows for entry in read_ledger(ledger.path)[before:]] == list(
            range(len(read_ledger(ledger.path)) - before)
        )
    last = record(ledger)
    assert read_ledger(ledger.path)[-1] == last


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Let so many more bytes be written, then none."""
    write = os.write

    def fill(room: int) -> None:
        left = [room]

        def limited(handle: int, data: bytes) -> int:
            if not left[0]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written = write(handle, data[: left[0]])
            left[0] -= written
            return written

        monkeypatch.setattr(os, "write", limited)

    yield fill
    monkeypatch.undo()


@pytest.mark.parametrize("room", [0, 1, 100])
def test_nothing_leaves_when_the_disk_is_full(ledger: Ledger, full_disk: Callable[[int], None], room: int) -> None:
    first = record(ledger)
    before = ledger.path.read_bytes()
    full_disk(room)
    with pytest.raises(FedheadError, match="The disk is full"):
        ledger.leave(Payload({"a": 1}), Release("train", "ward"))
    assert ledger.path.read_bytes() == before
    full_disk(10**6)
    assert read_ledger(ledger.path) == [first]
    second = record(ledger)
    assert read_ledger(ledger.path) == [first, second]


def test_nothing_leaves_when_the_entry_cannot_be_flushed(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    record(ledger)
    before = ledger.path.read_bytes()

    def failing(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(FedheadError, match="The disk is full"):
        record(ledger)
    with pytest.raises(FedheadError, match="The disk is full"):
        record(ledger, sums=sums_of(1, 2, 3))
    assert ledger.path.read_bytes() == before


def test_nothing_leaves_where_the_ledger_may_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        record(Ledger(tmp_path / "file" / "ward.jsonl"))


def test_the_same_rows_may_be_released_again_and_are_kept_once(ledger: Ledger) -> None:
    first = record(ledger, sums=sums_of(5, 1, 3, 3, 2**64 - 1))
    again = record(ledger, sums=sums_of(3, 2**64 - 1, 5, 3, 1))
    assert again.row_set == first.row_set
    assert [path.name for path in ledger.row_sets.folder.iterdir()] == [first.row_set]


@pytest.mark.parametrize(
    ("keys", "differing"),
    [
        ((1, 2, 3, 4, 5, 6), 1),
        ((1, 2, 3, 4), 1),
        ((1, 2, 3), 2),
        ((1, 2, 3, 4, 6), 2),
        ((1, 2, 3, 4, 5, 5), 1),
        ((1, 2, 3, 4, 5, 6, 7), 2),
    ],
)
def test_a_release_that_differs_by_a_few_rows_is_refused(ledger: Ledger, keys: tuple[int, ...], differing: int) -> None:
    first = record(ledger, sums=sums_of(1, 2, 3, 4, 5))
    with pytest.raises(FedheadError, match=rf"{differing} of the training rows of class 'cat' differ .*to run 7 at 20"):
        record(ledger, sums=sums_of(*keys))
    assert read_ledger(ledger.path) == [first]
    assert [path.name for path in ledger.row_sets.folder.iterdir()] == [first.row_set]


@pytest.mark.parametrize("keys", [(1, 2, 3, 4, 5, 6, 7, 8), (1, 2), (1, 2, 3, 6, 7), (), (6, 7, 8)])
def test_a_release_that_differs_by_enough_rows_is_not_refused(ledger: Ledger, keys: tuple[int, ...]) -> None:
    record(ledger, sums=sums_of(1, 2, 3, 4, 5))
    record(ledger, sums=sums_of(*keys))
    assert len(read_ledger(ledger.path)) == 2


def test_every_earlier_release_is_compared_not_only_the_last(ledger: Ledger) -> None:
    record(ledger, sums=sums_of(1, 2, 3, 4, 5))
    record(ledger, sums=sums_of(1, 2, 3, 4, 5, 6, 7, 8))
    with pytest.raises(FedheadError, match="differ"):
        record(ledger, sums=sums_of(1, 2, 3, 4, 5, 8))


def test_many_changed_rows_of_one_class_do_not_hide_one_of_another(ledger: Ledger) -> None:
    record(ledger, sums={**sums_of(1, 2, 3), **sums_of(11, 12, 13, name="training rows of class 'dog'")})
    many = sums_of(1, 2, 3, 4, 5, 6, 7, 8)
    with pytest.raises(FedheadError, match="1 of the training rows of class 'dog'"):
        record(ledger, sums={**many, **sums_of(11, 12, 13, 14, name="training rows of class 'dog'")})
    record(ledger, sums={**many, **sums_of(11, 12, 13, name="training rows of class 'dog'")})


def test_releases_of_all_runs_are_compared_also_after_a_restart(ledger: Ledger) -> None:
    record(ledger, sums=sums_of(1, 2, 3))
    for again in (ledger, Ledger(ledger.path, 3)):
        with pytest.raises(FedheadError, match="1 of the training rows of class 'cat' differ"):
            record(again, sums=sums_of(1, 2, 3, 4), run="8")
    record(ledger)
    assert len(read_ledger(ledger.path)) == 2


def both(train: tuple[int, ...], held_out: tuple[int, ...]) -> Keys:
    return {**sums_of(*train), **sums_of(*held_out, name="held-out rows of class 'cat'")}


def test_training_and_held_out_rows_are_compared_apart_and_together(ledger: Ledger) -> None:
    record(ledger, sums=both((1, 2, 3, 4), (11, 12, 13)))
    with pytest.raises(FedheadError, match="1 of the held-out rows of class 'cat'"):
        record(ledger, sums=both((1, 2, 3, 4), (11, 12, 13, 14)))
    # Three rows move between the parts, and one is new.
    with pytest.raises(FedheadError, match="1 of the rows of class 'cat'"):
        record(ledger, sums=both((1, 2, 3, 4, 11, 12, 13, 5), ()))
    record(ledger, sums=both((1, 2, 3, 4, 5, 6, 7), (11, 12, 13)))


def test_few_held_out_rows_come_and_go_as_a_whole(ledger: Ledger) -> None:
    record(ledger, sums=both((1, 2, 3, 4), (11, 12)))
    record(ledger, sums=both((1, 2, 3, 4), ()))
    with pytest.raises(FedheadError, match="1 of the held-out rows"):
        record(ledger, sums=both((1, 2, 3, 4), (11,)))


def test_sums_of_one_part_in_an_older_ledger_are_compared_with_that_part(ledger: Ledger) -> None:
    made = record(ledger, sums=sums_of(1, 2, 3))
    older = made.model_dump(mode="json", exclude={"whole", "share", "seed", "backbone", "layer", "weights"})
    ledger.path.write_text(json.dumps(older) + "\n")
    again = Ledger(ledger.path, 3)
    assert read_ledger(ledger.path)[0] == made.model_copy(update={"whole": False})
    record(again, sums=both((1, 2, 3), (11, 12, 13)), run="8")
    with pytest.raises(FedheadError, match="1 of the training rows"):
        record(again, sums=both((1, 2), (11, 12, 13)), run="8")


def test_a_day_has_a_budget_of_releases_about_rows(tmp_path: Path) -> None:
    path = tmp_path / "ward.jsonl"
    for _ in range(3):
        Ledger(path, 3, budget=3).record(entry(), sums_of(1, 2, 3))
    for ledger in (Ledger(path, 3, budget=3), Ledger(path, 3, budget=2)):
        with pytest.raises(FedheadError, match="3 releases about its rows today"):
            ledger.record(entry(), sums_of(1, 2, 3))
        ledger.record(entry(rows=0))
    assert len(read_ledger(path)) == 5
    tomorrow = entry().model_copy(update={"when": datetime.now(UTC) + timedelta(days=1)})
    Ledger(path, 3, budget=3).record(tomorrow, sums_of(1, 2, 3))


def test_with_the_guard_off_any_difference_may_leave(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ward.jsonl", Guard.off().min_class_count)
    record(ledger, sums=sums_of(1, 2, 3))
    record(ledger, sums=sums_of(1, 2, 3, 4))


def test_a_class_of_few_rows_that_goes_is_a_difference_too(ledger: Ledger) -> None:
    record(ledger, sums={**sums_of(1, 2, 3), **sums_of(11, 12, name="training rows of class 'dog'")})
    with pytest.raises(FedheadError, match="2 of the training rows of class 'dog'"):
        record(ledger, sums=sums_of(1, 2, 3))


@pytest.mark.parametrize("damage", [b"", b"short", save(dict(sums_of(21, 22, 23, 24))), None])
def test_rows_that_are_lost_let_only_the_same_rows_leave_again(ledger: Ledger, damage: bytes | None) -> None:
    path = ledger.row_sets.folder / record(ledger, sums=sums_of(1, 2, 3, 4)).row_set
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage)
    with pytest.raises(FedheadError, match="missing or damaged"):
        record(ledger, sums=sums_of(11, 12, 13, 14))
    record(ledger, sums=sums_of(1, 2, 3, 4))
    if damage is None:
        record(ledger, sums=sums_of(11, 12, 13, 14))


def test_the_keys_of_a_site_are_named_by_class_and_part() -> None:
    labels = np.repeat([0, 1], [5, 6])
    keys = np.arange(100, 111, dtype=np.uint64)
    task = make_task("classification", ("cat", "dog", "emu"))
    sums = keys_of(TRAINING_ROWS, np.arange(11), keys, labels, task)
    assert {name: values.tolist() for name, values in sums.items()} == {
        "training rows of class 'cat'": list(range(100, 105)),
        "training rows of class 'dog'": list(range(105, 111)),
    }


def test_a_reply_is_returned_as_it_was_and_its_payload_is_what_is_recorded(ledger: Ledger) -> None:
    payload = Payload({"a": 1}, {"x": np.ones(3)})
    assert ledger.leave(payload, Release("train", "ward")) is payload
    (made,) = read_ledger(ledger.path)
    assert made.digest == hashlib.sha256(payload.blob).hexdigest()
    assert made.bytes == len(payload.blob)
    assert (made.site, made.action, made.rows) == ("ward", "train", 0)
    assert made == entry_of(payload, Release("train", "ward")).model_copy(update={"when": made.when})


def test_the_trained_parameters_of_a_backbone_are_counted(
    ledger: Ledger,
) -> None:
    run = Manifest(
        run="5eed",
        backbone="bundled:glyphnet",
        layer="penultimate",
        backbone_digest="1" * 64,
        weights_digest="2" * 64,
        num_features=3,
        classes=("ill", "well"),
        head="linear",
        holdout=0.2,
        seed=0,
        local=LocalConfig(),
        tune="last:1",
        objective="simsiam",
    )
    arrays = {"head.bias": np.zeros(5), "tail.layer4.weight": np.zeros((3, 4)), "objective.predictor.a": np.zeros(7)}
    ledger.leave(Payload({}, arrays), Release("train", "ward", manifest=run))
    ledger.leave(Payload({}, {"head.bias": np.zeros(5)}), Release("train", "ward", manifest=run))
    layers, head = read_ledger(ledger.path)
    assert (layers.tuned, layers.tuned_parameters) == ("last:1 by simsiam", 19)
    assert (head.tuned, head.tuned_parameters) == ("", 0)
    shown = CliRunner().invoke(app, ["ledger", str(ledger.path)], env={"COLUMNS": "400"}).output
    assert "19 parameters of last:1 by simsiam" in shown
    assert "more of rows than a head alone" in shown


@pytest.mark.parametrize(
    "site", ["Berlin", "../../etc/passwd", "a/b", "..", "", "ü" * 300, "\udcff", "con.", "x" * 64, "a\0b", "-"]
)
def test_any_site_name_gives_a_file_of_its_own_in_the_ledger_folder(site: str, own_home: Path) -> None:
    path = ledger_path(site)
    assert path.parent == own_home / "ledger"
    assert path.name.isascii()
    assert len(path.name) < 100
    assert not path.name.startswith(".")
    assert len({ledger_path(name).name.lower() for name in (site, site + "-", site.lower() + ".", "berlin")}) == 4


def test_a_plain_site_name_is_the_name_of_its_ledger(own_home: Path) -> None:
    assert ledger_path("ward-3") == own_home / "ledger" / "ward-3.jsonl"
