import numpy as np
import pytest

from fedhead.server.exchange import Exchange
from fedhead.sums.heads import EXAMPLES, HELD_OUT, LOSS_SUM, METRICS, TRAIN_LOSS


def metrics(examples: float = 0, train_loss: float = 0, held_out: float = 0, loss: float = 0) -> np.ndarray:
    row = np.zeros(len(METRICS))
    row[[EXAMPLES, TRAIN_LOSS, HELD_OUT, LOSS_SUM]] = examples, train_loss, held_out, loss
    return row


def test_losses_of_training_are_weighted_by_rows() -> None:
    exchange = Exchange(metrics={"a": metrics(30, 0.5, 10, 4.0), "b": metrics(10, 2.5, 5, 1.0), "c": metrics(0, 9.0)})
    sums = exchange.sums()
    assert sums[TRAIN_LOSS] / sums[EXAMPLES] == pytest.approx((30 * 0.5 + 10 * 2.5) / 40)
    assert (sums[HELD_OUT], sums[LOSS_SUM]) == (15, 5)
    assert (exchange.answered, exchange.trained) == (3, 2)


def test_no_answers_sum_to_zeros() -> None:
    assert not Exchange().sums().any()
    assert Exchange().answered == 0


def test_a_secure_sum_counts_its_sites() -> None:
    exchange = Exchange(metrics={"all sites": metrics(30)}, summed=["a", "b", "c"])
    assert (exchange.answered, exchange.trained) == (3, 3)


def test_including_another_exchange_adds_its_traffic_and_its_dropped_sites() -> None:
    exchange = Exchange(asked=2, bytes_down=10, bytes_up=1, dropped={"a": "it was slow"})
    other = Exchange(asked=3, bytes_down=5, bytes_up=2, dropped={"a": "it is gone", "b": "it lied"}, late={"a"})
    exchange.include(other)
    assert (exchange.asked, exchange.bytes_down, exchange.bytes_up) == (5, 15, 3)
    assert exchange.dropped == {"a": "it is gone", "b": "it lied"}
    assert exchange.late == {"a"}
    exchange.forgive(["a", "c"])
    assert exchange.dropped == {"b": "it lied"}
    assert not exchange.late


def test_reasons_are_one_line_each_and_the_first_three_are_said() -> None:
    exchange = Exchange()
    exchange.drop(["d", "b", "c", "a"], "a\nreply with\x1b[31m lines.")
    assert all(one.isprintable() for one in exchange.dropped.values())
    said = exchange.first_reasons()
    assert [f" {name}:" in said for name in "abcd"] == [True, True, True, False]
    assert said.endswith(".") and ".." not in said
