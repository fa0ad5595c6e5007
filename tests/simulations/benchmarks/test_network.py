import json
from pathlib import Path

import pytest

from fedhead.simulations.benchmarks import crowd
from fedhead.simulations.benchmarks.network import with_light_sites, with_processes
from fedhead.simulations.benchmarks.problem import Problem, own_home
from fedhead.simulations.benchmarks.processes import watchable
from fedhead.simulations.benchmarks.shipping import shipping


def rounds_of(home: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (home / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_every_site_takes_part_in_every_round() -> None:
    with own_home() as home:
        busy, seconds = with_light_sites(Problem(sites=12, rows=20, features=64, rounds=3), home / "light", 0.5)
        rounds = rounds_of(home / "light")
        assert [(one["number"], one["sites"]) for one in rounds[1:]] == [(1, 12), (2, 12), (3, 12)]
        assert seconds == pytest.approx(sorted(one["seconds"] for one in rounds[1:])[1], abs=1e-3)
        assert 0 <= busy < 1
        seconds, idle = with_processes(Problem(sites=2, rows=20, features=64, rounds=3), home / "processes", 0.5)
        rounds = rounds_of(home / "processes")
        assert [(one["number"], one["sites"]) for one in rounds[1:]] == [(1, 2), (2, 2), (3, 2)]
        assert seconds == pytest.approx(sorted(one["seconds"] for one in rounds[1:])[1], abs=1e-3)
        assert 0 <= idle < 1


@pytest.mark.slow
@pytest.mark.skipif(not watchable(), reason="this system does not show what processes take")
def test_weights_are_sent_once_and_memory_stays_below_three_times_their_size() -> None:
    with own_home() as home:
        figures = list(shipping(Problem(sites=2, rows=20), home / "shipping").values())
    first, second, coordinator, client, *_ = figures
    assert 1 <= first < 1.01
    assert second == 0
    assert coordinator < 3
    assert 1 < client < 3


@pytest.mark.slow
@pytest.mark.skipif(not watchable(), reason="this system does not show what processes take")
def test_a_share_of_a_crowd_is_in_every_round() -> None:
    measured = crowd.measure(Problem(sites=6, rows=20, features=8, rounds=4), 0.5)
    assert measured.setting["in a round"] == 3
    assert measured.ratio["rounds"] == 4
    median, slowest = measured.seconds.values()
    assert 0 < median <= slowest
