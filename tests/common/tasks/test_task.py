from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedhead.config import LocalConfig
from fedhead.data import Samples
from fedhead.errors import UserError
from fedhead.heads import CosineHead, LinearHead, MLPHead
from fedhead.sums.calibration import Calibration
from fedhead.tasks import Task, make_task, tasks

NAMES = ("a", "b", "c")
TARGETS = {
    "classification": np.array([0, 1, 1, 2, 0, 1]),
    "multi-label": np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 1], [1, 1, 0], [1, 0, 0]]),
    "regression": np.array([[0.5, 2, 3], [1, -1, 7], [2, 0, 1], [3, 5, 5], [4, 4, 4], [9, 8, 0]], dtype=np.float64),
}


def samples(**values: object) -> Samples:
    labels = np.array([0, 1, 1, 2, 0, 1])
    plain = Samples("memory", NAMES, labels, read=str, name=lambda row: f"row {row}", fingerprint="")
    return replace(plain, **values)


def real(targets: object, names: tuple[str, ...] = NAMES) -> Samples:
    return samples(classes=(), labels=np.zeros(6, np.int64), targets=np.asarray(targets), target_names=names)


SAMPLES: dict[str, Samples] = {
    "classification": samples(),
    "multi-label": samples(labels=TARGETS["multi-label"]),
    "regression": real(TARGETS["regression"]),
}


@pytest.fixture(params=sorted(TARGETS))
def task(request: pytest.FixtureRequest) -> Task:
    return make_task(request.param, NAMES)


def test_every_task_is_tested_here() -> None:
    assert set(tasks) >= set(TARGETS)


def test_labelled_data_becomes_targets(task: Task) -> None:
    assert type(task).columns_of(SAMPLES[task.name]) == NAMES
    np.testing.assert_array_equal(task.encode(SAMPLES[task.name]), TARGETS[task.name])


@pytest.mark.parametrize(("asked", "given"), [(a, b) for a in TARGETS for b in TARGETS if a != b])
def test_data_of_another_task_is_rejected(asked: str, given: str) -> None:
    with pytest.raises(UserError, match="This run"):
        tasks[asked].require(SAMPLES[given])


def test_columns_follow_the_runs_order() -> None:
    wanted = make_task("regression", ("c", "a")).encode(SAMPLES["regression"])
    np.testing.assert_array_equal(wanted, TARGETS["regression"][:, [2, 0]])
    with pytest.raises(UserError, match=r"predicts 'ab'.*Did you mean 'b' or 'a'"):
        make_task("regression", ("ab",)).encode(SAMPLES["regression"])


def test_error_names_target_without_number() -> None:
    targets = TARGETS["regression"].copy()
    targets[2, 1] = np.nan
    with pytest.raises(UserError, match="row 2 has no finite number in 'b'"):
        make_task("regression", NAMES).encode(real(targets))


def test_groups_match_the_sums(task: Task) -> None:
    targets = TARGETS[task.name]
    positions, groups = task.memberships(targets)
    found = {task.groups[group]: sorted(positions[groups == group].tolist()) for group in np.unique(groups)}
    expected = {
        "classification": {"of class 'a'": [0, 4], "of class 'b'": [1, 2, 5], "of class 'c'": [3]},
        "multi-label": {
            "of class 'a'": [0, 1, 4, 5],
            "of class 'b'": [1, 3, 4],
            "of class 'c'": [3],
            "not of class 'a'": [2, 3],
            "not of class 'b'": [0, 2, 5],
            "not of class 'c'": [0, 1, 2, 4, 5],
        },
        "regression": {"of all": [0, 1, 2, 3, 4, 5]},
    }
    assert found == expected[task.name]


def test_rows_are_counted_by_site(task: Task) -> None:
    owners = np.array([0, 0, 2, 2, 2, 2])
    counts = task.count_rows(TARGETS[task.name], owners, 3)
    expected = {
        "classification": [[1, 1, 0], [0, 0, 0], [1, 2, 1]],
        "multi-label": [[2, 1, 0], [0, 0, 0], [2, 2, 1]],
        "regression": [[2], [0], [4]],
    }
    assert counts.tolist() == expected[task.name]
    assert task.count_rows(TARGETS[task.name]).tolist() == [np.sum(expected[task.name], 0).tolist()]


def test_multi_label_stratum_is_the_rarest_class() -> None:
    labels = np.array([[1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 0, 0], [0, 1, 1], [0, 1, 1]])
    assert make_task("multi-label", NAMES).strata(labels).tolist() == [0, 0, 0, -1, 2, 2]
    assert make_task("classification", NAMES).strata(np.array([2, 0])).tolist() == [2, 0]


def test_real_targets_are_stratified_by_quantiles() -> None:
    values = np.random.default_rng(0).normal(size=(1000, 2))
    strata = make_task("regression", ("a", "b")).strata(values)
    assert np.bincount(strata).tolist() == [100] * 10
    assert (np.diff(values[np.argsort(strata, kind="stable"), 0].reshape(10, 100).min(1)) > 0).all()


@pytest.mark.parametrize(
    ("name", "linear", "cosine"),
    [
        ("classification", ("lda", "lda-gcv", "ridge", "nearest-mean", "zeros", "random"), ("nearest-mean", "random")),
        ("multi-label", ("ridge", "zeros", "random"), ()),
        ("regression", ("ridge", "zeros", "random"), ()),
    ],
)
def test_a_task_names_the_inits_of_each_head(name: str, linear: tuple[str, ...], cosine: tuple[str, ...]) -> None:
    task = make_task(name, NAMES)
    assert task.inits(LinearHead) == linear
    assert task.inits(CosineHead) == cosine
    assert task.inits(MLPHead) == ("random",)


def test_invalid_columns_are_rejected() -> None:
    for name in ("classification", "multi-label"):
        with pytest.raises(UserError, match="two classes or more"):
            make_task(name, ("a",))
    assert make_task("regression", ("a",)).columns == ("a",)
    with pytest.raises(UserError, match="at least one output"):
        make_task("regression", ())
    with pytest.raises(UserError, match=r"no task 'regresion'\. Did you mean 'regression'"):
        make_task("regresion", NAMES)


def test_sums_of_sites_equal_sums_of_all(task: Task) -> None:
    outputs = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets, owners = torch.from_numpy(TARGETS[task.name]), np.array([1, 0, 1, 3, 3, 0])
    bins = task.bins()
    (whole,) = task.count(outputs, targets, np.zeros(6, np.int64), 1, bins)
    sites = list(task.count(outputs, targets, owners, 4, bins))
    assert [one.rows for one in sites] == [2, 2, 0, 2]
    received = [type(one).from_arrays(one.to_arrays(), task.no_rows(bins)) for one in sites]
    together = task.report(task.pooled(received)).to_dict()
    assert together.keys() == task.report(whole).to_dict().keys()
    assert task.report(task.pooled(received)).score.value == pytest.approx(task.report(whole).score.value)
    assert task.report(task.pooled([])).rows == 0
    with pytest.raises(ValueError):
        type(sites[0]).from_arrays({**sites[0].to_arrays(), "more": np.zeros(1)}, task.no_rows(bins))


def test_calibration_uses_both_halves_of_held_out_rows(task: Task) -> None:
    outputs = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets, bins = torch.from_numpy(TARGETS[task.name]), task.bins()
    chosen = task.choosing(outputs, targets, bins) + task.choosing(None, None, bins)
    temperature = task.temperature(chosen)
    judged = task.judging(None, None, temperature, bins) + task.judging(outputs, targets, temperature, bins)
    for sums, like in (
        (chosen, task.choosing(None, None, bins)),
        (judged, task.judging(None, None, temperature, bins)),
    ):
        assert type(sums).from_arrays(sums.to_arrays(), like).rows == 6
    found = task.calibrated(chosen, judged)
    assert found.calibration.temperature == temperature
    assert (found.to_dict()["rows_chosen_on"], found.to_dict()["rows_judged_on"]) == (6, 6)


DECISIONS: dict[str, list[object]] = {
    "classification": ["b", "a"],
    "multi-label": [("b",), ("a", "b")],
    "regression": [(-1.0, 3.0, 0.0), (2.0, 1.0, -2.0)],
}


def test_answers_and_decisions_from_outputs(task: Task) -> None:
    outputs, unlearned = torch.tensor([[-1.0, 3, 9], [2, 1, 9]]), torch.tensor([False, False, True])
    if task.name == "regression":
        outputs[:, 2] = torch.tensor([0.0, -2.0])
    answers = task.answers(outputs, 2.0, unlearned)
    assert task.decide(answers) == DECISIONS[task.name]
    if task.name == "classification":
        torch.testing.assert_close(answers.sum(1), torch.ones(2))


def test_decision_for_one_target_is_a_number() -> None:
    assert make_task("regression", ("a",)).decide(torch.tensor([[1.5], [2.0]])) == [1.5, 2.0]


REFUSALS: list[tuple[str, Callable[[Task], object], str]] = [
    ("classification", lambda task: task.regions(torch.ones(1, 3), Calibration(), 0.9), "held-out rows"),
    ("multi-label", lambda task: task.regions(torch.ones(1, 3), Calibration(), 0.9), "multi-label"),
    ("regression", lambda task: task.regions(torch.ones(1, 3), Calibration(), 0.9), "held-out rows"),
    (
        "regression",
        lambda task: task.regions(torch.ones(1, 1), Calibration(residuals=((1,),), spread=(1.0,)), 1.5),
        "between 0 and 1",
    ),
]


@pytest.mark.parametrize(("name", "ask", "words"), REFUSALS)
def test_impossible_regions_are_rejected(name: str, ask: Callable[[Task], object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        ask(make_task(name, NAMES))


def test_learning_rate_shrinks_with_feature_width() -> None:
    task, settings = make_task("regression", ("a",)), LocalConfig(lr=0.1)
    assert task.local(settings, LinearHead(10, 1)).lr == 0.1
    assert task.local(settings, LinearHead(200, 1)).lr == pytest.approx(0.01)
    assert task.local(settings, MLPHead(200, 1)).lr == 0.1
    adamw = LocalConfig(optimizer="adamw", lr=0.1)
    assert task.local(adamw, LinearHead(200, 1)) == adamw
    assert make_task("classification", NAMES).local(settings, LinearHead(200, 3)) == settings
