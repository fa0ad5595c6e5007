"""Fails loudly when a new Flower moves what fedhead relies on beyond its documentation."""

import inspect
from importlib.metadata import version

import flwr.serverapp.strategy
import pytest
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp.strategy import FedAvg
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords, sample_nodes

from fedhead.flower import in_process_identity, set_message_id


def test_flower_is_a_version_that_was_measured() -> None:
    assert version("flwr").rpartition(".")[0] in ("1.41", "1.42")


def test_messages_need_an_identity_and_get_one() -> None:
    with pytest.raises(RuntimeError, match="TaskIdentity"):
        Message(RecordDict(), 5, MessageType.TRAIN)
    with in_process_identity(run_id=7):
        message = Message(RecordDict(), 5, MessageType.TRAIN)
        set_message_id(message, "abc")
    assert (message.metadata.run_id, message.metadata.message_id) == (7, "abc")
    assert Message(RecordDict(), reply_to=message).metadata.reply_to_message_id == "abc"
    with pytest.raises(RuntimeError, match="TaskIdentity"):
        Message(RecordDict(), 5, MessageType.TRAIN)


def test_strategies_sample_by_the_attributes_that_the_coordinator_sets() -> None:
    strategy = FedAvg()
    for name in ("fraction_train", "min_train_nodes", "min_available_nodes", "arrayrecord_key", "weighted_by_key"):
        assert hasattr(strategy, name)
    assert strategy.train_metrics_aggr_fn is aggregate_metricrecords
    source = inspect.getsource(FedAvg.configure_train) + inspect.getsource(sample_nodes)
    assert "fraction_train" in source
    assert "random.sample" in source


def test_flowers_strategies_are_the_ones_we_know() -> None:
    from fedhead.server.strategies import NAMES

    others = {"FedXgbBagging", "FedXgbCyclic", "Result", "Strategy"}
    known = set(NAMES) | others
    assert {name for name in flwr.serverapp.strategy.__all__ if not name.startswith("DifferentialPrivacy")} == known
