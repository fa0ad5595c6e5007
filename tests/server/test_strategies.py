import random

import numpy as np
import pytest
from flwr.app import Array, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedMedian

from fedhead.config import StrategyConfig
from fedhead.errors import UserError
from fedhead.flower import set_message_id
from fedhead.flower.identity import in_process_identity
from fedhead.protocol.actions import TRAIN
from fedhead.protocol.heads import HeadReply
from fedhead.server.strategies import (
    NAMES,
    KeptArray,
    aggregate_round,
    averages,
    build_strategy,
    kept_record,
    required_sites,
    sample_sites,
)
from fedhead.sums.heads import HeadSums


@pytest.mark.parametrize("name", NAMES)
def test_every_strategy_is_built_by_its_flower_name(name: str) -> None:
    parameters = {"client_learning_rate": 0.1} if name == "QFedAvg" else {}
    strategy = build_strategy(StrategyConfig(name=name, fraction_train=0.5, **parameters))
    assert type(strategy).__name__ == name
    assert strategy.fraction_train == 0.5  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"name": "FedAdm"}, "Did you mean 'FedAdam'"),
        ({"name": "FedXgbBagging"}, "no strategy"),
        ({"name": "FedAdam", "etta": 0.1}, "Did you mean 'eta'"),
        ({"name": "FedAdam", "eta": "large"}, "needs float as eta, not 'large'"),
        ({"name": "FedAvg", "min_train_nodes": 0.5}, "needs int as min_train_nodes"),
        ({"name": "FedAvg", "train_metrics_aggr_fn": "f"}, "no parameter"),
        ({"name": "FedTrimmedAvg", "beta": 0.7}, "FedTrimmedAvg refuses its parameters"),
        ({"name": "QFedAvg"}, "needs the parameter 'client_learning_rate'"),
    ],
)
def test_a_strategy_that_cannot_be_built_is_a_sentence(config: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_strategy(StrategyConfig.model_validate(config))


def test_only_strategies_that_see_nothing_but_the_mean_get_a_mean() -> None:
    parameters = {"QFedAvg": {"client_learning_rate": 0.1}}
    means = {name for name in NAMES if averages(build_strategy(StrategyConfig(name=name, **parameters.get(name, {}))))}
    assert means == {"FedAvg", "FedProx", "FedAvgM", "FedAdam", "FedAdagrad", "FedYogi"}

    class Own(FedAvg):
        pass

    assert not averages(Own())
    assert not averages(FedAvg(train_metrics_aggr_fn=lambda records, key: MetricRecord()))


def test_robust_strategies_say_how_many_sites_they_need() -> None:
    assert required_sites(build_strategy(StrategyConfig(name="Bulyan", num_malicious_nodes=2))) == 11
    assert required_sites(build_strategy(StrategyConfig(name="Krum", num_malicious_nodes=2))) == 7
    assert required_sites(FedAvg()) == 1


def test_sites_are_sampled_by_name_and_the_global_generator_is_left_alone() -> None:
    names = [f"s{number}" for number in range(20)]
    strategy = FedAvg(fraction_train=0.25)
    random.seed(0)
    state = random.getstate()
    first = sample_sites(strategy, names, 0, 1)
    assert first == sample_sites(strategy, names[::-1], 0, 1)
    assert len(first) == 5
    assert any(sample_sites(strategy, names, 0, number) != first for number in range(2, 9))
    assert random.getstate() == state
    assert len(sample_sites(FedAvg(fraction_train=0.01, min_train_nodes=3), names, 0, 1)) == 3
    assert sample_sites(FedAvg(), ["only"], 0, 1) == ["only"]


class Counting(FedMedian):
    received = 0

    def aggregate_train(self, server_round, replies):  # type: ignore[no-untyped-def]
        replies = list(replies)
        self.received = len(replies)
        return super().aggregate_train(server_round, replies)


def replies_of(heads: np.ndarray, rows: list[int]) -> list[tuple[Message, HeadReply]]:  # type: ignore[type-arg]
    made = []
    for number, (head, count) in enumerate(zip(heads, rows, strict=True)):
        message = Message(RecordDict(), number + 2, TRAIN)
        set_message_id(message, str(number))
        sums = HeadSums({"bias": head}, np.array([count, 0.5, 4.0, 2.0, 3.0]))
        made.append((message, HeadReply(sums, sums.metrics[None])))
    return made


def test_an_averaging_strategy_gets_the_exact_mean_and_a_robust_one_every_reply() -> None:
    heads = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    rows, expected = [1, 20, 300, 4, 50, 6, 7000], {"bias": np.zeros(5, np.float32)}
    median = Counting()
    with in_process_identity(1):
        replies = replies_of(heads, rows)
        averaged = aggregate_round(FedAvg(), 1, replies, expected)
        chosen = aggregate_round(median, 1, replies, expected)
    assert averaged is not None
    assert chosen is not None
    exact = np.average(heads.astype(np.float64), axis=0, weights=rows).astype(np.float32)
    assert np.array_equal(averaged["bias"], exact)
    assert averaged["bias"].dtype == np.float32
    assert median.received == 7
    assert np.array_equal(chosen["bias"], np.median(heads, axis=0))


def test_kept_arrays_give_copies_of_their_values_until_these_are_replaced() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    kept = kept_record({"weight": values.T})["weight"]
    assert isinstance(kept, KeptArray)
    kept.numpy()[:] = 7
    np.testing.assert_array_equal(kept.numpy(), values.T)
    np.testing.assert_array_equal(Array(kept.dtype, kept.shape, kept.stype, kept.data).numpy(), values.T)
    kept.data = Array(np.zeros((3, 2), np.float32)).data
    np.testing.assert_array_equal(kept.numpy(), np.zeros((3, 2)))
