"""The figures of a tuned run's choice."""

from fedhead.server.exchange import Exchange
from fedhead.server.rounds import Version
from fedhead.server.runs.history import Round
from fedhead.server.tuning import Cost


def test_the_cost_of_tuning_includes_the_last_round_and_not_the_first_head() -> None:
    finished = [
        Round(number=0, sites=2, seconds=600.0, bytes_down=8_000_000, bytes_up=8_000_000),
        Round(number=1, sites=2, seconds=60.0, bytes_down=1_000_000, bytes_up=2_000_000),
    ]
    last = Version(2, {}, Exchange(bytes_down=3_000_000, bytes_up=4_000_000), 30.0)
    assert Cost.of(finished, last, 2) == Cost(megabytes=5.0, minutes=1.5)
    assert Cost.of(finished[:1], Version(0, {}, Exchange(), 1.0), 2) == Cost(0.0, 0.0)
