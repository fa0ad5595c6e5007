import errno
import hashlib
import json
import multiprocessing
import os
import signal
import stat
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from fedhead.client.guard import (
    Entry,
    Guard,
    GuardedRows,
    Ledger,
    Sums,
    ledger_path,
    read_ledger,
    release,
    released_sums,
)
from fedhead.data import BoolArray, IntArray
from fedhead.errors import FedheadError, UserError
from fedhead.messages import PAYLOAD, RECORD, MessageError, Payload, payload_bytes

CLASSES = ("cat", "dog", "emu")
SiteData = tuple[IntArray, IntArray, BoolArray]


@st.composite
def site_data(draw: st.DrawFn, multi_label: bool | None = None) -> SiteData:
    """Row numbers, labels of either form, and which rows are held out."""
    count = draw(st.integers(0, 40))
    rows = np.array(draw(st.permutations(range(100, 100 + count))), dtype=np.int64)
    held_out = np.array(draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=np.bool_)
    if draw(st.booleans()) if multi_label is None else multi_label:
        # Mostly zeros or mostly ones, so that removing rows for one class makes another rare.
        flips = draw(st.lists(st.integers(0, 7), min_size=count, max_size=count))
        bits = np.array([[flip >> c & 1 for c in range(3)] for flip in flips], dtype=np.int64).reshape(count, 3)
        return rows, bits, held_out
    labels = draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    return rows, np.array(labels, dtype=np.int64), held_out


limits = st.integers(0, 9)
totals = st.integers(0, 30)


def allowed(guard: Guard, data: SiteData) -> GuardedRows:
    return guard.allowed_rows(*data, CLASSES)


def kept(data: SiteData, left: GuardedRows) -> SiteData:
    mask = np.isin(data[0], np.concatenate([left.train, left.held_out]))
    return data[0][mask], data[1][mask], data[2][mask]


def rows_of(left: GuardedRows) -> set[int]:
    return set(left.train.tolist()) | set(left.held_out.tolist())


def site_of(**counts: tuple[int, int]) -> SiteData:
    """A site with so many training and held-out rows of each class."""
    labels = [CLASSES.index(name) for name, (train, out) in counts.items() for _ in range(train + out)]
    held_out = [row >= train for train, out in counts.values() for row in range(train + out)]
    return np.arange(len(labels)), np.array(labels, dtype=np.int64), np.array(held_out, dtype=np.bool_)


@given(limits, totals, st.booleans(), st.data())
def test_many_sites_are_counted_as_each_is(least: int, rows: int, multi_label: bool, data: st.DataObject) -> None:
    guard = Guard(least, rows)
    sites = data.draw(st.lists(site_data(multi_label), min_size=1, max_size=4))
    owners = np.repeat(np.arange(len(sites)), [len(site[0]) for site in sites])
    counted = guard.count_allowed(
        owners, np.concatenate([site[1] for site in sites]), np.concatenate([site[2] for site in sites]), len(sites)
    )
    assert counted.tolist() == [allowed(guard, site).num_rows for site in sites]


def test_rows_of_rare_classes_stay_and_are_counted() -> None:
    data = site_of(cat=(30, 8), dog=(3, 0), emu=(5, 0))
    left = allowed(Guard(), data)
    assert (len(left.train), len(left.held_out)) == (35, 8)
    assert left.counts == {"cat": 38, "emu": 5}
    assert left.withheld == {"dog": 3}
    assert left.refusal == ""
    assert left.num_rows == 43


def test_held_out_rows_do_not_make_up_for_missing_training_rows() -> None:
    left = allowed(Guard(min_rows=0), site_of(cat=(4, 5), dog=(20, 4), emu=(4, 4)))
    assert left.counts == {"dog": 24}
    assert left.withheld == {"cat": 9, "emu": 8}
    assert len(left.train) == 20
    assert len(left.held_out) == 4


def test_held_out_rows_are_summed_only_where_they_are_enough() -> None:
    rows, labels, held_out = site_of(cat=(9, 5), dog=(20, 4))
    left = Guard(min_rows=0).allowed_rows(rows, labels, held_out, CLASSES)
    assert len(left.held_out) == 9
    summable = Guard(min_rows=0).summable(left.held_out, labels[left.held_out])
    assert labels[summable].tolist() == [0] * 5
    assert Guard.off().summable(left.held_out, labels[left.held_out]).tolist() == left.held_out.tolist()


def test_a_site_with_few_rows_left_is_withheld_whole_in_words_that_tell_no_count() -> None:
    data = site_of(cat=(13, 0), dog=(6, 0), emu=(4, 0))
    left = allowed(Guard(), data)
    assert left.num_rows == 0
    assert left.withheld == {"cat": 13, "dog": 6, "emu": 4}
    assert "20" in left.refusal
    assert "--min-rows" in left.refusal
    assert not {"13", "6", "4", "19", "23"} & set(left.refusal.replace(",", " ").split())
    assert allowed(Guard(min_rows=19), data).num_rows == 19


def test_a_site_of_rare_classes_only_is_withheld_even_without_a_least_number_of_rows() -> None:
    assert allowed(Guard(min_rows=0), site_of(cat=(4, 4), dog=(1, 0))).refusal


def test_removing_rows_of_one_label_may_make_another_rare() -> None:
    labels = np.array([[1, 0, 0]] * 20 + [[0, 1, 0]] * 4 + [[0, 1, 1]] * 4)
    data = (np.arange(28), labels, np.zeros(28, dtype=np.bool_))
    assert allowed(Guard(), data).withheld == {"dog": 8, "emu": 4}
    assert allowed(Guard(min_class_count=4), data).num_rows == 28


def test_rows_that_lack_a_label_nearly_all_have_stay() -> None:
    labels = np.array([[1, 1, 0]] * 20 + [[1, 0, 0]] * 20 + [[0, 1, 0]] * 4)
    left = allowed(Guard(), (np.arange(44), labels, np.zeros(44, dtype=np.bool_)))
    assert left.train.tolist() == list(range(40))
    assert left.withheld == {"dog": 4}


@settings(deadline=None, max_examples=60)
@given(site_data(), limits, totals)
def test_no_class_is_left_with_fewer_training_rows_than_the_least_number(
    data: SiteData, class_count: int, min_rows: int
) -> None:
    left = allowed(Guard(class_count, min_rows), data)
    _, labels, held_out = kept(data, left)
    groups = np.eye(3, dtype=np.int64)[labels] if labels.ndim == 1 else np.hstack([labels, 1 - labels])
    present = groups.sum(axis=0) > 0
    assert (groups[~held_out].sum(axis=0)[present] >= class_count).all()
    assert left.num_rows == 0 or left.num_rows >= min_rows
    assert bool(left.refusal) == (left.num_rows == 0 and (len(data[0]) > 0 or min_rows > 0))


@settings(deadline=None, max_examples=60)
@given(site_data(), limits, totals)
def test_every_row_is_either_left_or_withheld_in_its_own_part_and_order(
    data: SiteData, class_count: int, min_rows: int
) -> None:
    labels = data[1]
    left = allowed(Guard(class_count, min_rows), data)
    still = kept(data, left)
    assert left.train.tolist() == still[0][~still[2]].tolist()
    assert left.held_out.tolist() == still[0][still[2]].tolist()
    per_class = np.eye(3, dtype=np.int64)[labels] if labels.ndim == 1 else labels
    total = {name: left.counts.get(name, 0) + left.withheld.get(name, 0) for name in CLASSES}
    assert list(total.values()) == per_class.sum(axis=0).tolist()
    assert 0 not in [*left.counts.values(), *left.withheld.values()]


@settings(deadline=None, max_examples=60)
@given(site_data(), limits, totals)
def test_the_guard_removes_nothing_more_the_second_time(data: SiteData, class_count: int, min_rows: int) -> None:
    guard = Guard(class_count, min_rows)
    once = allowed(guard, data)
    again = allowed(guard, kept(data, once))
    assert rows_of(again) == rows_of(once)
    assert again.counts == once.counts
    assert again.withheld == {}


@settings(deadline=None, max_examples=60)
@given(site_data(), limits, limits, totals, totals)
def test_a_stricter_guard_leaves_no_row_that_a_laxer_one_removes(
    data: SiteData, class_count: int, more: int, min_rows: int, more_rows: int
) -> None:
    lax = allowed(Guard(class_count, min_rows), data)
    strict = allowed(Guard(class_count + more, min_rows + more_rows), data)
    assert rows_of(strict) <= rows_of(lax)


@settings(deadline=None, max_examples=60)
@given(site_data(), st.data(), limits, totals)
def test_a_site_with_more_rows_loses_none_that_were_allowed(
    data: SiteData, draw: st.DataObject, class_count: int, min_rows: int
) -> None:
    count = len(data[0])
    some = np.array(draw.draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=np.bool_)
    guard = Guard(class_count, min_rows)
    assert rows_of(allowed(guard, (data[0][some], data[1][some], data[2][some]))) <= rows_of(allowed(guard, data))


@settings(deadline=None, max_examples=60)
@given(site_data())
def test_a_guard_that_is_off_removes_nothing(data: SiteData) -> None:
    left = allowed(Guard.off(), data)
    assert left.num_rows == len(data[0])
    assert left.withheld == {}
    assert left.refusal == ""


@pytest.mark.parametrize("values", [{"min_class_count": -1}, {"min_rows": -5}])
def test_a_negative_limit_is_refused(values: dict[str, int]) -> None:
    with pytest.raises(UserError, match=next(iter(values))):
        Guard(**values)


def sums_of(*keys: int, name: str = "training rows of class 'cat'") -> Sums:
    return {name: np.array(keys, dtype=np.uint64)}


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger" / "ward.jsonl", min_class_count=3)


def record(ledger: Ledger, payload: bytes = b"sums", run: str = "7", sums: Sums | None = None) -> Entry:
    return ledger.record(
        payload, run=run, site="ward", action="query.statistics", rows=40, classes={"cat": 40}, sums=sums
    )


def test_a_release_is_in_the_ledger_when_recording_returns(ledger: Ledger) -> None:
    before = datetime.now(UTC)
    entry = ledger.record(
        b"weights", run="12", site="Ward 3\nüñ", action="train", rows=30, classes={"cat": 20, "dög": 10}
    )
    assert read_ledger(ledger.path) == [entry]
    assert before <= entry.when <= datetime.now(UTC)
    assert entry.when.utcoffset() == timedelta(0)
    assert entry.digest == hashlib.sha256(b"weights").hexdigest()
    assert (entry.run, entry.site, entry.action, entry.rows) == ("12", "Ward 3\nüñ", "train", 30)
    assert entry.classes == {"cat": 20, "dög": 10}
    assert entry.bytes == 7
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
        entry = record(ledger, sums=sums_of(1, 2, 3))
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in ledger.path.parent.rglob("*")}
    assert modes == {ledger.path: 0o600, ledger.row_sets: 0o700, ledger.row_sets / entry.row_set: 0o600}
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
        ledger.record(f"{name} {number}".encode() * 500, run=name, site="s", action="train", rows=number, classes={})


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
        release(Payload({"a": 1}).to_content(), ledger=ledger, run="7", site="ward", action="train")
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
    assert [path.name for path in ledger.row_sets.iterdir()] == [first.row_set]


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
    assert [path.name for path in ledger.row_sets.iterdir()] == [first.row_set]


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


def test_other_runs_other_sites_and_other_releases_are_not_compared(ledger: Ledger) -> None:
    record(ledger, sums=sums_of(1, 2, 3))
    record(ledger, sums=sums_of(1, 2, 3, 4), run="8")
    ledger.record(b"", run="7", site="other", action="s", rows=4, classes={}, sums=sums_of(1, 2, 3, 4, 5))
    record(ledger)
    assert len(read_ledger(ledger.path)) == 4


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
    path = ledger.row_sets / record(ledger, sums=sums_of(1, 2, 3, 4)).row_set
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage)
    with pytest.raises(FedheadError, match="missing or damaged"):
        record(ledger, sums=sums_of(11, 12, 13, 14))
    record(ledger, sums=sums_of(1, 2, 3, 4))
    if damage is None:
        record(ledger, sums=sums_of(11, 12, 13, 14))


def test_the_sums_of_a_site_are_named_by_class_and_part() -> None:
    rows, labels, held_out = site_of(cat=(5, 5), dog=(6, 1))
    keys = np.arange(100, 117, dtype=np.uint64)
    sums = released_sums("training rows", rows[~held_out], keys, labels, CLASSES)
    assert {name: values.tolist() for name, values in sums.items()} == {
        "training rows of class 'cat'": list(range(100, 105)),
        "training rows of class 'dog'": list(range(110, 116)),
    }


@settings(deadline=None, max_examples=60)
@given(site_data())
def test_of_the_sums_of_a_guarded_site_none_rests_on_few_rows(data: SiteData) -> None:
    labels = np.zeros((140, *data[1].shape[1:]), dtype=np.int64)
    labels[data[0]] = data[1]
    keys = np.arange(140, dtype=np.uint64)
    guard = Guard(4, 0)
    left = allowed(guard, data)
    summable = guard.summable(left.held_out, labels[left.held_out])
    for kind, rows in (("training rows", left.train), ("held-out rows", summable)):
        sums = released_sums(kind, rows, keys, labels, CLASSES)
        assert all(len(values) >= 4 for values in sums.values())
        assert {int(key) for values in sums.values() for key in values} == set(rows.tolist())


def test_a_reply_is_returned_as_it_was_and_its_payload_is_what_is_recorded(ledger: Ledger) -> None:
    content = Payload({"a": 1}, {"x": np.ones(3)}).to_content()
    assert release(content, ledger=ledger, run="7", site="ward", action="train", rows=3, classes={"cat": 3}) is content
    (entry,) = read_ledger(ledger.path)
    blob = content.config_records[RECORD][PAYLOAD]
    assert isinstance(blob, bytes)
    assert entry.digest == hashlib.sha256(blob).hexdigest()
    assert entry.bytes == payload_bytes(content)


def test_a_reply_with_anything_beside_its_payload_is_not_sent(ledger: Ledger) -> None:
    content = Payload({"a": 1}).to_content()
    content["more"] = ConfigRecord({"secret": b"x"})
    with pytest.raises(MessageError):
        release(content, ledger=ledger, run="7", site="ward", action="train")
    assert not ledger.path.exists()


def test_a_site_without_a_ledger_writes_none() -> None:
    content = RecordDict()
    assert release(content, ledger=None, run="7", site="ward", action="train") is content


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
