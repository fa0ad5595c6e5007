"""Pooled L-BFGS against scikit-learn, and under any split of the rows."""

from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from sklearn.linear_model import LogisticRegression

from fedhead import FeatureStatistics, solve_head
from fedhead.client.gradients import sum_gradient
from fedhead.client.labelled_features import LabelledFeatures, SiteRows
from fedhead.config import RunConfig
from fedhead.errors import UserError
from fedhead.flower import in_process_identity
from fedhead.heads import LinearHead
from fedhead.server.pooled_lbfgs import GramPreconditioner, PooledLBFGS
from fedhead.server.strategies import build_strategy
from fedhead.server.strategy_state import restore, state_of
from fedhead.simulations import simulate
from fedhead.simulations.grid import InProcessGrid

CLASSES, WIDTH, ROWS = 4, 12, 300


@pytest.fixture(scope="module")
def data() -> LabelledFeatures:
    """Correlated features of overlapping classes, standardised."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (ROWS,), generator=generator)
    features = torch.randn(ROWS, WIDTH, generator=generator) @ torch.randn(WIDTH, WIDTH, generator=generator)
    features += torch.randn(CLASSES, WIDTH, generator=generator)[labels]
    features = (features - features.mean(0)) / features.std(0, correction=0)
    return LabelledFeatures(features, labels)


def statistics(data: LabelledFeatures) -> FeatureStatistics:
    return FeatureStatistics.from_features(data.features, data.labels, num_classes=CLASSES)


def preconditioned(data: LabelledFeatures, penalty: float = 1.0) -> PooledLBFGS:
    strategy = PooledLBFGS(penalty)
    scale = torch.ones(WIDTH, dtype=torch.float64)
    strategy.preconditioner = GramPreconditioner.from_statistics(statistics(data), scale, penalty)
    return strategy


def exchange(
    strategy: PooledLBFGS, head: ArrayRecord, data: LabelledFeatures, sites: list[SiteRows]
) -> tuple[ArrayRecord, float]:
    """Return the next head in float32, and the objective at `head` summed over rows."""
    form = LinearHead(WIDTH, CLASSES)
    parameters = {name: torch.from_numpy(head[name].numpy().copy()) for name in ("weight", "bias")}
    with in_process_identity(run_id=1):
        messages = list(strategy.configure_train(1, head, ConfigRecord(), InProcessGrid([])))
        assert messages == []
        replies, total = [], 0.0
        for site in sites:
            summed = sum_gradient(form, parameters, data, [site])
            total += summed.loss
            arrays = {"weight": summed.weight / summed.rows, "bias": summed.bias / summed.rows}
            metrics = MetricRecord({"train_loss": summed.loss / summed.rows, "num-examples": summed.rows})
            record = ArrayRecord({name: Array(value.numpy()) for name, value in arrays.items()})
            replies.append(Message(RecordDict({"arrays": record, "metrics": metrics}), 1, "train"))
        made, _ = strategy.aggregate_train(1, replies)
    assert made is not None
    rounded = ArrayRecord({name: Array(made[name].numpy().astype(np.float32)) for name in ("weight", "bias")})
    return rounded, total + strategy.penalty / 2 * float(parameters["weight"].double().square().sum())


def start(data: LabelledFeatures) -> ArrayRecord:
    head = solve_head(statistics(data), "lda")
    parts = {"weight": head.weight.detach().float().numpy(), "bias": head.bias.detach().float().numpy()}
    return ArrayRecord({name: Array(value) for name, value in parts.items()})


@pytest.mark.parametrize("penalty", [0.3, 1.0, 30.0])
def test_it_converges_to_the_logistic_regression_of_all_rows(data: LabelledFeatures, penalty: float) -> None:
    strategy, head, objective = preconditioned(data, penalty), start(data), []
    sites = [SiteRows("all", np.arange(ROWS))]
    for _ in range(25):
        head, value = exchange(strategy, head, data, sites)
        objective.append(value)
    model = LogisticRegression(C=1 / penalty, tol=1e-9, max_iter=5000).fit(data.features.double(), data.labels)
    weight = head["weight"].numpy()
    assert np.abs(weight - weight.mean(0) - model.coef_).max() < 1e-2
    losses = -model.predict_log_proba(data.features.double())[np.arange(ROWS), data.labels].sum()
    least = losses + penalty / 2 * float(np.square(model.coef_).sum())
    assert objective[-1] == pytest.approx(least, rel=3e-5)
    assert objective[5] - least < 0.03 * (objective[0] - least)


def test_any_split_gives_the_same_heads(data: LabelledFeatures) -> None:
    def heads(sites: list[SiteRows]) -> list[np.ndarray]:
        strategy, head, found = preconditioned(data), start(data), []
        for _ in range(6):
            head, _ = exchange(strategy, head, data, sites)
            found.append(head["weight"].numpy())
        return found

    pooled = heads([SiteRows("all", np.arange(ROWS))])
    order = np.random.default_rng(0).permutation(ROWS)
    for ends in ([7, 20, 250], [100], list(range(10, 300, 10))):
        sites = [SiteRows(str(number), part) for number, part in enumerate(np.split(order, ends))]
        for one, other in zip(heads(sites), pooled, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)


def test_a_saved_strategy_continues_with_the_same_heads(data: LabelledFeatures) -> None:
    sites = [SiteRows("all", np.arange(ROWS))]
    strategy, head = preconditioned(data), start(data)
    for _ in range(4):
        head, _ = exchange(strategy, head, data, sites)
    again = preconditioned(data)
    restore(again, *state_of(strategy))
    for _ in range(3):
        expected, _ = exchange(strategy, head, data, sites)
        head, _ = exchange(again, head, data, sites)
        assert np.array_equal(head["weight"].numpy(), expected["weight"].numpy())


def test_a_step_too_long_is_shortened_and_a_lost_site_clears_the_memory(data: LabelledFeatures) -> None:
    halves = [SiteRows("a", np.arange(150)), SiteRows("b", np.arange(150, 300))]
    strategy, head = preconditioned(data), start(data)
    head, before = exchange(strategy, head, data, halves)
    assert strategy.point is not None and strategy.direction is not None
    strategy.direction, strategy.length = 1000 * strategy.direction, 1.0
    far = (strategy.point + strategy.direction).astype(np.float32)
    weight, bias = far[: CLASSES * WIDTH].reshape(CLASSES, WIDTH), far[CLASSES * WIDTH :]
    lengths = []
    head = ArrayRecord({"weight": Array(weight), "bias": Array(bias)})
    for _ in range(12):
        head, value = exchange(strategy, head, data, halves)
        lengths.append(strategy.length)
        if strategy.length == 1.0:
            break
    assert lengths[0] <= 0.5
    assert value < before
    exchange(strategy, head, data, halves)
    assert strategy.steps
    exchange(strategy, head, data, halves[:1])
    assert not strategy.steps


def test_without_a_gram_matrix_the_loss_decreases_too(data: LabelledFeatures) -> None:
    strategy, head, objective = PooledLBFGS(), start(data), []
    for _ in range(20):
        head, value = exchange(strategy, head, data, [SiteRows("all", np.arange(ROWS))])
        objective.append(value)
    assert min(objective) < objective[0] - 1


@pytest.mark.parametrize("given", [{"penalty": -1.0}, {"penalty": float("inf")}, {"memory": 0}, {"further": 1}])
def test_wrong_parameters_are_refused(given: dict[str, float]) -> None:
    config = RunConfig.from_values({"strategy": {"name": "pooled-lbfgs", **given}})
    with pytest.raises(UserError, match="pooled-lbfgs"):
        build_strategy(config.strategy)


@pytest.mark.parametrize("given", [{"head": "cosine"}, {"head": "mlp:8"}, {"task": "regression"}])
def test_other_heads_and_targets_are_refused(given: dict[str, str]) -> None:
    with pytest.raises(UserError, match="ooled-lbfgs"):
        RunConfig.from_values({"strategy": {"name": "pooled-lbfgs"}, **given})


@pytest.fixture
def config() -> RunConfig:
    table = {"data": "digits", "min_class_count": 0, "min_rows": 0}
    values = {"strategy": {"name": "pooled-lbfgs"}, "rounds": 4, "diagnose": False, "simulation": table}
    return RunConfig.from_values(values)


def test_the_partition_of_a_simulation_does_not_change_the_head(config: RunConfig, tmp_path: Path) -> None:
    losses = []
    for sites, partition in ((1, "iid"), (7, "dirichlet:0.1")):
        changed = config.changed({"simulation": {"sites": sites, "partition": partition}})
        result = simulate(changed, out=tmp_path / f"run-{sites}")
        losses.append([line.loss for line in result.history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


def test_under_secure_summation_the_heads_are_the_same(config: RunConfig, tmp_path: Path) -> None:
    changed = config.changed({"rounds": 2, "simulation": {"sites": 4, "partition": "iid"}})
    plain = simulate(changed, out=tmp_path / "plain")
    secure = simulate(changed.changed({"privacy": {"secure_sum": True}}), out=tmp_path / "secure")
    losses = [[line.loss for line in result.history] for result in (plain, secure)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
