from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedProx, FedYogi, Strategy
from hypothesis import given
from hypothesis import strategies as st

from fedhead.client.app import make_app
from fedhead.client.local_site import LocalSite
from fedhead.client.release.guard import Guard
from fedhead.client.sum_handlers import doublings
from fedhead.config import RunConfig
from fedhead.data import Samples, load_samples, samples_from_arrays, sources
from fedhead.protocol.actions import EVALUATE, TRAIN
from fedhead.server.strategies import NAMES
from fedhead.simulations import RunResult, simulate

ROWS = 240
# Unequal on purpose: sites of such different sizes are trained, and answered for, in more than one chunk.
BOUNDS = [0, 4, 12, 40, 60, 140, ROWS]
UNGUARDED = {"min_class_count": 0, "min_rows": 0}
SITES = [np.arange(start, stop) for start, stop in pairwise(BOUNDS)]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def digits() -> Samples:
    return some_digits(np.arange(ROWS))


def some_digits(rows: np.ndarray[Any, np.dtype[np.int64]]) -> Samples:
    whole = load_samples("digits")
    images = [whole.read(int(row)) for row in rows]
    return samples_from_arrays(images, whole.labels[rows], classes=whole.classes, spec="some digits")


@sources.register("digits-of-a-site")
def digits_of_a_site(argument: str) -> Samples:
    return some_digits(SITES[int(argument)])


def head_of(result: RunResult) -> dict[str, torch.Tensor]:
    return dict(result.model.head.state_dict())


def assert_equal_runs(one: RunResult, other: RunResult, tolerance: float = 1e-6) -> None:
    first, second = head_of(one), head_of(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=tolerance, atol=tolerance)
    assert one.outcome.kept_round == other.outcome.kept_round
    assert one.accuracy_by_site == other.accuracy_by_site
    assert [(line.sites, line.score) for line in one.history] == [(line.sites, line.score) for line in other.history]
    for line, like in zip(one.history, other.history, strict=True):
        assert (line.loss or 0.0) == pytest.approx(like.loss or 0.0, rel=10 * tolerance)
        assert (line.train_loss or 0.0) == pytest.approx(like.train_loss or 0.0, rel=10 * tolerance)


class LooksAtEveryFedAvg(FedAvg):
    pass


class LooksAtEveryFedProx(FedProx):
    pass


class LooksAtEveryFedAvgM(FedAvgM):
    pass


class LooksAtEveryFedAdam(FedAdam):
    pass


class LooksAtEveryFedAdagrad(FedAdagrad):
    pass


class LooksAtEveryFedYogi(FedYogi):
    pass


@pytest.mark.parametrize(
    ("merging", "single", "parameters"),
    [
        (FedAvg, LooksAtEveryFedAvg, {}),
        (FedProx, LooksAtEveryFedProx, {"proximal_mu": 0.1}),
        (FedAvgM, LooksAtEveryFedAvgM, {"server_momentum": 0.5}),
        (FedAdam, LooksAtEveryFedAdam, {"eta": 0.05}),
        (FedAdagrad, LooksAtEveryFedAdagrad, {"eta": 0.05}),
        (FedYogi, LooksAtEveryFedYogi, {"eta": 0.05}),
    ],
)
def test_merged_replies_give_what_single_ones_give(
    digits: Samples, merging: type[Strategy], single: type[Strategy], parameters: dict[str, float]
) -> None:
    config = RunConfig(init="zeros", rounds=3, simulation=UNGUARDED)
    merged = simulate(config, digits, SITES, strategy=merging(**parameters))
    each = simulate(config, digits, SITES, strategy=single(**parameters))
    assert_equal_runs(merged, each)
    for line, like in zip(merged.history, each.history, strict=True):
        assert line.bytes_down == pytest.approx(like.bytes_down, rel=0.01)
        assert line.bytes_up == pytest.approx(like.bytes_up, rel=0.01)


class Recording(ClientApp):
    """Any app, with a list of what it was asked for."""

    def __init__(self, app: ClientApp) -> None:
        super().__init__()
        self.app = app
        self.actions: list[str] = []

    def __call__(self, message: Message, context: Context) -> Message:
        self.actions.append(message.metadata.message_type)
        return self.app(message, context)


@pytest.mark.parametrize(("init", "strategy"), [("zeros", "FedAvg"), ("zeros", "FedMedian"), ("", "FedAvg")])
def test_apps_one_by_one_give_what_the_grid_trains_together(digits: Samples, init: str, strategy: str) -> None:
    config = RunConfig(init=init, rounds=3, strategy={"name": strategy}, simulation=UNGUARDED)
    alone = {}
    for number in (0, 3, 5):
        site = LocalSite(f"site-{number}", f"digits-of-a-site:{number}", device="cpu", guard=Guard.off())
        alone[site.name] = Recording(make_app(lambda context, site=site: site))  # type: ignore[misc]
    together = simulate(config, digits, SITES)
    mixed = simulate(config, digits, SITES, apps=alone)
    assert mixed.outcome.refused == {}
    assert all(not line.dropped for line in mixed.history)
    # Features extracted in other batches differ by rounding.
    assert_equal_runs(together, mixed, tolerance=1e-4)
    for app in alone.values():
        counts = Counter(app.actions)
        assert (counts[TRAIN], counts[EVALUATE]) == (3, 1)


def test_rows_that_sites_share_count_at_each_of_them(digits: Samples) -> None:
    generator = np.random.default_rng(0)
    sites = [np.sort(generator.choice(120, 40, replace=False)) for _ in range(9)]
    config = RunConfig(rounds=2, simulation=UNGUARDED, diagnose=False)
    each = simulate(config, digits, sites, shared_rows=True, strategy=LooksAtEveryFedAvg())
    assert_equal_runs(simulate(config.changed({"keep_sums": "total"}), digits, sites, shared_rows=True), each)


@given(st.lists(st.integers(0, 20), max_size=60))
def test_doubling_sums_rows_as_often_as_they_are_held(held: list[int]) -> None:
    times = np.zeros(21, np.int64)
    for rows in doublings(np.array(held, dtype=np.int64)):
        times *= 2
        times[rows.numpy()] += 1
    assert times.tolist() == np.bincount(np.array(held, dtype=np.int64), minlength=21).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_every_strategy_runs(digits: Samples, name: str) -> None:
    parameters: dict[str, float] = {"QFedAvg": {"client_learning_rate": 0.1}, "FedAdam": {"eta": 0.01}}.get(name, {})
    config = RunConfig(init="zeros", rounds=2, strategy={"name": name, **parameters}, simulation=UNGUARDED)
    sites = np.array_split(np.random.default_rng(0).permutation(ROWS), 5)
    result = simulate(config, digits, sites)
    assert [line.number for line in result.history] == [0, 1, 2]
    assert [line.sites for line in result.history[1:]] == [5, 5]
    assert all(not line.dropped for line in result.history)
    assert all(bool(torch.isfinite(value).all()) for value in head_of(result).values())
    assert result.history[-1].score is not None
    assert result.history[-1].score > 0.3


@pytest.mark.parametrize("head", ["linear", "mlp:10"])
def test_strategies_that_go_by_position_meet_each_parameter_in_its_place(digits: Samples, head: str) -> None:
    # Ten hidden units and ten classes: two vectors of one shape, that nothing but their order tells apart.
    init = "zeros" if head == "linear" else "random"
    plain, neutral = (
        simulate(RunConfig(head=head, init=init, rounds=3, simulation=UNGUARDED), digits, SITES, strategy=strategy)
        for strategy in (FedAvg(), FedAvgM(server_momentum=1e-9))
    )
    assert_equal_runs(plain, neutral, tolerance=1e-5)


def test_fedprox_sets_the_proximal_term(digits: Samples) -> None:
    def run(strategy: dict[str, Any], mu: float = 0.0) -> RunResult:
        local = {"epochs": 3, "proximal_mu": mu}
        config = RunConfig(init="zeros", rounds=2, holdout=0.0, strategy=strategy, local=local, simulation=UNGUARDED)
        return simulate(config, digits, SITES)

    plain = run({"name": "FedAvg"})
    by_hand = run({"name": "FedAvg"}, mu=1.0)
    by_strategy = run({"name": "FedProx", "proximal_mu": 1.0})
    over_hand = run({"name": "FedProx", "proximal_mu": 1.0}, mu=5.0)
    assert_equal_runs(by_strategy, by_hand)
    assert_equal_runs(over_hand, by_hand)
    assert not torch.allclose(head_of(by_strategy)["weight"], head_of(plain)["weight"], atol=1e-4)


@pytest.mark.parametrize("strategy", ["FedAvg", "FedMedian"])
def test_a_site_whose_rows_are_all_held_out_scores_and_does_not_train(digits: Samples, strategy: str) -> None:
    config = RunConfig(init="zeros", rounds=1, holdout=0.5, strategy={"name": strategy}, simulation=UNGUARDED)
    # Of sites with a single row, some hold it out and others have nothing else to train on.
    single: list[Any] = [[row] for row in range(8)]
    rest = [np.arange(8, 100), np.arange(100, ROWS)]
    result = simulate(config, digits, [*single, *rest])
    scored = {int(name[-1]) for name in result.sites}
    assert {8, 9} < scored < set(range(10))
    assert result.history[1].sites == 10 - len(scored - {8, 9})
    training = [rows if number not in scored else [] for number, rows in enumerate(single)]
    without = simulate(config, digits, [*training, *rest])
    for name, value in head_of(result).items():
        torch.testing.assert_close(value, head_of(without)[name], rtol=1e-6, atol=1e-6)
