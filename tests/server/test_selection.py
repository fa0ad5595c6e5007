"""Heads that are chosen by comparison on held-out rows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedhead.config import RunConfig
from fedhead.data import Samples, load_samples, samples_from_arrays
from fedhead.errors import UserError
from fedhead.membership import join, leave
from fedhead.model import TransferModel
from fedhead.server.selection import BAR, Rival, choose_map, choose_round, choose_tuned, errors_to_gain
from fedhead.simulations import simulate
from fedhead.solvers.closed_form import ridge_error
from fedhead.sums.calibration import TEMPERATURES
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.paired import PairedLosses
from fedhead.sums.rivals import RivalSums
from fedhead.sums.targets import VALUES

OFF = {"min_class_count": 0, "min_rows": 0}
ROWS = 400
SITES = [np.arange(start, ROWS, 4) for start in range(4)]

RIVALS = [
    Rival("lda on plain features", {}, "plain"),
    Rival("lda-gcv on unit", {}, "basis"),
    Rival("lda-gcv on landmarks", {}, lifted=True, counts_errors=True),
    Rival("ridge on landmarks", {}, lifted=True),
]


def sums_of(losses: list[float], errors: list[int], rows: int = 100) -> RivalSums:
    """Sums over rows with constant losses."""
    each = np.array(losses)
    curves = np.repeat(each[:, None] * rows, len(TEMPERATURES), axis=1)
    paired = PairedLosses(rows, each * rows, np.outer(each, each) * rows)
    return RivalSums(paired, curves, np.diag(rows - np.array(errors)))


@pytest.mark.parametrize(
    ("losses", "errors", "taken"),
    [
        ([0.40, 0.35, 0.30, 0.33], [20, 20, 20, 20], 2),
        ([0.40, 0.35, 0.34, 0.345], [20, 20, 20, 20], 2),
        # Within 2 % of the best without a lift.
        ([0.40, 0.35, 0.346, 0.345], [20, 20, 20, 20], 1),
        ([0.34, 0.35, 0.346, 0.345], [20, 20, 20, 20], 0),
        # A lifted discriminant with few errors is not trusted; ridge is.
        ([0.40, 0.35, 0.10, 0.33], [20, 20, 9, 9], 3),
        ([0.40, 0.35, 0.10, 0.35], [20, 20, 9, 9], 1),
    ],
)
def test_a_lift_must_be_clearly_better(losses: list[float], errors: list[int], taken: int) -> None:
    chosen, choice = choose_map(RIVALS, sums_of(losses, errors))
    assert chosen == taken
    assert choice.taken == RIVALS[taken].name
    assert f"{losses[taken]:.4f}" in choice.reason
    assert json.loads(json.dumps(choice.to_dict()))["rivals"][taken]["loss"] == pytest.approx(losses[taken])


def test_nothing_is_taken_without_held_out_rows() -> None:
    assert choose_map(RIVALS, RivalSums.zeros(4))[0] == 0
    assert choose_round(RIVALS[:2], RivalSums.zeros(2))[0] == 0


def test_rounds_must_be_better_by_two_standard_errors() -> None:
    generator = np.random.default_rng(0)
    solved = generator.uniform(0, 1, 400)
    # The standard error of the difference is 0.01.
    for gain, taken in ((0.1, 1), (0.025, 1), (0.015, 0), (0.002, 0), (-0.1, 0)):
        noise = generator.normal(0, 0.2, 400)
        trained = solved - gain + noise - noise.mean()
        paired = PairedLosses.of(np.stack([solved, trained]))
        sums = RivalSums(paired, np.zeros((2, len(TEMPERATURES))), np.full((2, 2), 300))
        assert choose_round(RIVALS[:2], sums)[0] == taken


TUNED = [
    Rival("solved", {}),
    Rival("last, solved", {}, "tail"),
    Rival("best, solved", {}, "tail"),
    Rival("best, trained", {}, "tail", trained=True),
]


def tuned_sums(gains: list[float], right: list[int], seed: int = 0, rows: int = 200) -> RivalSums:
    """Losses whose differences from the first head's have a standard error of about 0.0141, with these means."""
    generator = np.random.default_rng(seed)
    solved = generator.uniform(0.5, 1.5, rows)
    losses = [solved]
    for gain in gains:
        noise = generator.normal(0, 0.2, rows)
        losses.append(solved - gain + noise - noise.mean())
    return RivalSums(PairedLosses.of(np.stack(losses)), np.zeros((4, len(TEMPERATURES))), np.diag(right))


@pytest.mark.parametrize(
    ("gains", "right", "taken"),
    [
        ([0.035, 0.0, 0.0], [150, 150, 150, 150], 1),
        # Less than two standard errors, or more errors.
        ([0.02, 0.0, 0.0], [150, 160, 150, 150], 0),
        ([0.2, 0.0, 0.0], [150, 149, 150, 150], 0),
        # The best of ten rounds needs more than the last.
        ([-0.2, 0.035, 0.0], [150, 150, 150, 150], 0),
        ([-0.2, 0.05, 0.0], [150, 150, 150, 150], 2),
        # A trained head must be better than all others, not only than the solved one.
        ([0.02, 0.0, 0.05], [150, 150, 150, 160], 0),
        ([0.0, 0.0, 0.1], [150, 150, 150, 160], 3),
        ([0.04, 0.0, 0.2], [150, 150, 150, 160], 3),
    ],
)
def test_a_tuned_model_must_be_proven_better(gains: list[float], right: list[int], taken: int) -> None:
    selected = errors_to_gain(10)
    chosen, choice = choose_tuned(TUNED, [0, BAR, selected, selected], tuned_sums(gains, right))
    assert chosen == taken
    assert choice.taken == TUNED[taken].name
    assert ("not proven" in choice.reason) == (taken == 0)


def test_tuning_without_effect_is_rarely_kept() -> None:
    bars = [0, BAR, *[errors_to_gain(10)] * 2]
    generator = np.random.default_rng(1)
    kept = 0
    for seed in range(400):
        # Means of differences that are zero but for the rows that were drawn.
        gains = list(generator.normal(0, 0.2 / 200**0.5, 3))
        right = [150, *(150 + generator.integers(-5, 6, 3))]
        kept += choose_tuned(TUNED, bars, tuned_sums(gains, right, seed))[0] > 0
    assert kept <= 0.04 * 400


def test_the_bar_rises_with_the_number_of_versions() -> None:
    assert errors_to_gain(1) == pytest.approx(2)
    assert [round(errors_to_gain(number), 1) for number in (5, 10, 20)] == [2.6, 2.8, 3.1]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def digits(rows: Any) -> Samples:
    whole = load_samples("digits")
    chosen = [int(row) for row in rows]
    return samples_from_arrays([whole.read(row) for row in chosen], [str(whole.labels[row]) for row in chosen])


@pytest.mark.usefixtures("one_thread")
def test_a_run_takes_the_best_features_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedhead.server.maps.AUTO_LIFT", "landmarks:96")
    samples = digits(range(ROWS))
    result = simulate(RunConfig(rounds=0, lift="auto", simulation=OFF), samples, list(SITES), out="run")
    (choice,) = result.outcome.choices
    names = [one["name"] for one in choice["rivals"]]
    assert names[0] == "lda on plain features"
    assert {"lda-gcv on landmarks:96", "ridge on landmarks:96"} < set(names)
    losses = {one["name"]: one["loss"] for one in choice["rivals"]}
    linear = min(losses[name] for name in names[:2])
    assert losses[choice["taken"]] <= linear
    # What was measured of the taken head is what the run reports of it.
    assert result.history[0].score == pytest.approx(
        next(one["score"] for one in choice["rivals"] if one["name"] == choice["taken"])
    )
    saved = RunConfig.from_toml(Path("run/run.toml"))
    assert (saved.lift, saved.init) == (result.config.lift, result.config.init)
    assert saved.lift != "auto"
    assert json.loads(Path("run/result.json").read_text())["choices"] == [choice]
    assert not [path.name for path in Path("run").iterdir() if path.name.startswith("sums.")]
    # Sites leave and join on the features that were taken.
    leave("run", "site-2")
    join("run", "site-2", digits(SITES[2]), **OFF)
    items = [samples.read(row) for row in range(30)]
    again = TransferModel.load("run", result.model.backbone)
    torch.testing.assert_close(again.answers(items), result.model.answers(items), atol=1e-3, rtol=1e-3)


@pytest.mark.usefixtures("one_thread")
def test_lifts_are_left_out_if_a_site_has_too_few_rows() -> None:
    guard = {"min_class_count": 0, "min_rows": 20}
    # 1,024 of 192 features ask for 107 rows, and each site has 100.
    result = simulate(RunConfig(rounds=0, lift="auto", simulation=guard), digits(range(ROWS)), list(SITES), out="run")
    (choice,) = result.outcome.choices
    assert "Lifts are left out: 4 sites cannot take part." in choice["reason"]
    assert [one["name"].rpartition(" on ")[2] for one in choice["rivals"]] == ["plain features", "unit"]
    assert len(result.outcome.participants) == 4


def test_a_lift_is_chosen_for_linear_classifiers_only() -> None:
    with pytest.raises(UserError, match="linear classifiers and ridge regression only"):
        simulate(RunConfig(rounds=0, lift="auto", head="cosine"), digits(range(60)), 2)


def test_a_lift_of_a_regression_is_chosen_by_cross_validation_from_sums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    numbers = generator.normal(size=(600, 3))
    values = {"curved": np.sin(3 * numbers[:, 0]) * numbers[:, 1], "straight": numbers @ [1.0, -2.0, 0.5]}
    taken = {}
    for name, exact in values.items():
        targets = exact + 0.1 * generator.normal(size=600)
        table = np.column_stack([numbers, targets])
        np.savetxt(f"{name}.csv", table, "%.9g", ",", header="x,y,z,value", comments="")
        table_settings = {"data": f"csv:{name}.csv?target=value", "sites": 3, "partition": "iid", "min_rows": 0}
        settings = {"task": "regression", "backbone": "identity", "rounds": 0, "lift": "auto"}
        result = simulate(RunConfig.from_values({**settings, "simulation": table_settings}), out=name)
        (choice,) = result.outcome.choices
        taken[name] = choice["taken"]
        assert "generalised cross-validation" in choice["reason"]
        assert result.score_held_out > (0.3 if name == "curved" else 0.95)
    assert taken == {"curved": "ridge on landmarks:1024", "straight": "ridge on plain features"}


def test_the_error_of_cross_validation_follows_from_sums() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(80, 5, generator=generator, dtype=torch.float64)
    targets = (rows @ torch.randn(5, 1, generator=generator, dtype=torch.float64)).sin() + 0.1 * rows[:, :1]
    stats = FeatureStatistics.from_features(rows, targets, 1, kind=VALUES)
    centred, about = rows - rows.mean(0), targets - targets.mean(0)
    errors = []
    for penalty in np.logspace(-8, 2, 101) * float(torch.linalg.eigvalsh(centred.T @ centred).max()):
        hat = centred @ torch.linalg.solve(centred.T @ centred + penalty * torch.eye(5, dtype=torch.float64), centred.T)
        left = 80 - 1 - float(hat.trace())
        errors.append(float((about - hat @ about).square().sum()) / left**2 * 79**2 / float(about.square().sum()))
    assert ridge_error(stats) == pytest.approx(min(errors), rel=1e-9)
