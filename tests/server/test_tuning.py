"""The figures of a tuned run's choice."""

from dataclasses import replace

import numpy as np
import pytest

from fedhead.server.exchange import Exchange
from fedhead.server.rounds import Version
from fedhead.server.runs.history import Round
from fedhead.server.tuning import Cost, gain_of_tuning
from fedhead.sums.rivals import RivalSums


def test_the_cost_of_tuning_includes_the_last_round_and_not_the_first_head() -> None:
    finished = [
        Round(number=0, sites=2, seconds=600.0, bytes_down=8_000_000, bytes_up=8_000_000),
        Round(number=1, sites=2, seconds=60.0, bytes_down=1_000_000, bytes_up=2_000_000),
    ]
    last = Version(2, {}, Exchange(bytes_down=3_000_000, bytes_up=4_000_000), 30.0)
    assert Cost.of(finished, last, 2) == Cost(megabytes=5.0, minutes=1.5)
    assert str(Cost.of(finished, last, 2)) == "5 MB of each site and 90.0 s"
    assert Cost.of(finished[:1], Version(0, {}, Exchange(), 1.0), 2) == Cost(0.0, 0.0)


@pytest.mark.parametrize(
    ("both", "said"),
    [
        ([[80, 75], [75, 80]], "changed the score by 0.0 points (-6.2 to +6.2), for 5 MB of each site and 30.0 s."),
        ([[80, 80], [80, 90]], "by +10.0 points (+4.1 to +15.9), for"),
        ([[80, 79], [79, 90]], ": +2.00 points per megabyte and site, and +20.00 points per minute."),
    ],
)
def test_the_gain_of_tuning_is_told_per_megabyte_if_there_is_one(both: list[list[int]], said: str) -> None:
    none = RivalSums.zeros(2)
    sums = replace(none, paired=replace(none.paired, rows=100), both=np.array(both))
    assert said in gain_of_tuning(sums, 1, Cost(5.0, 0.5))
