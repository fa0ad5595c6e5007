import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhead.client.release.guard import Guard, GuardedRows, people_of
from fedhead.data import BoolArray, IntArray
from fedhead.errors import UserError
from fedhead.tasks import Task, make_task

CLASSES = ("cat", "dog", "emu")
SiteData = tuple[IntArray, IntArray, BoolArray]


def task_of(labels: IntArray) -> Task:
    return make_task("multi-label" if labels.ndim == 2 else "classification", CLASSES)


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
    return guard.allowed_rows(*data, task_of(data[1]))


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
        owners,
        np.concatenate([site[1] for site in sites]),
        np.concatenate([site[2] for site in sites]),
        len(sites),
        make_task("multi-label" if multi_label else "classification", CLASSES),
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
    left = Guard(min_rows=0).allowed_rows(rows, labels, held_out, task_of(labels))
    assert len(left.held_out) == 9
    own = labels[left.held_out]
    summable = Guard(min_rows=0).summable(left.held_out, own, task_of(labels), labels=own)
    assert labels[summable].tolist() == [0] * 5
    assert (
        Guard.off().summable(left.held_out, labels[left.held_out], task_of(labels)).tolist() == left.held_out.tolist()
    )


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


def patients(counts: list[int]) -> IntArray:
    """Return the patient of each row, for so many rows of each."""
    return np.repeat(np.arange(len(counts)), counts)


def test_a_class_with_rows_of_few_patients_is_withheld() -> None:
    # 12 rows of 4 patients, and 6 of 6.
    people = patients([9, 1, 1, 1, *[1] * 6])
    labels = np.repeat([0, 1], [12, 6])
    rows, out = np.arange(18), np.zeros(18, np.bool_)
    guard = Guard(5, 0)
    assert guard.allowed_rows(rows, labels, out, task_of(labels)).counts == {"cat": 12, "dog": 6}
    assert guard.allowed_rows(rows, labels, out, task_of(labels), people).counts == {"dog": 6}
    counted = guard.count_allowed(np.zeros(18, np.int64), labels, out, 1, task_of(labels), people)
    assert counted.tolist() == [6]
    assert labels[guard.summable(rows, labels, task_of(labels), people, labels)].tolist() == [1] * 6


@given(site_data(), limits, st.data())
def test_every_class_that_is_left_has_enough_people(data: SiteData, least: int, draw: st.DataObject) -> None:
    rows, labels, out = data
    owned = draw.draw(st.lists(st.integers(0, 9), min_size=len(rows), max_size=len(rows)))
    people = np.array(owned, np.int64)
    left = Guard(least, 0).allowed_rows(rows, labels, out, task_of(labels), people)
    place = {row: at for at, row in enumerate(rows.tolist())}
    chosen = [place[row] for row in left.train.tolist()]
    positions, groups = task_of(labels).memberships(labels[chosen])
    for group in np.unique(groups):
        assert len(set(people[chosen][positions[groups == group]])) >= least
    plain = allowed(Guard(least, 0), data)
    assert rows_of(left) <= rows_of(plain)
    alone = Guard(least, 0).allowed_rows(rows, labels, out, task_of(labels), np.arange(len(rows)))
    assert rows_of(alone) == rows_of(plain)


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(0, 9))
def test_rows_left_out_of_sums_without_labels_are_none_or_enough(bins: list[int], least: int) -> None:
    cells = np.array(bins, np.int64)
    summable = Guard(least, 0).summable(np.arange(len(cells)), cells, make_task("classification", CLASSES))
    left = len(cells) - len(summable)
    assert not 0 < left < min(least, len(cells))
    counts = np.bincount(cells[summable], minlength=3)
    assert ((counts == 0) | (counts >= least)).all()


def test_people_are_groups_and_rows_without_one() -> None:
    keys = np.array([7, 7, 3, 4, 9, 9], np.uint64)
    contents = np.array([1, 2, 3, 4, 5, 5], np.uint64)
    people = people_of(keys, contents)
    assert people is not None
    assert people[0] == people[1]
    assert people[4] == people[5]
    assert len(np.unique(people)) == 4
    # Without groups, copies of one row are rows of their own.
    assert people_of(contents, contents) is None
