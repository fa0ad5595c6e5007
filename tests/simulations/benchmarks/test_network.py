from pathlib import Path

import pytest

from fedhead.simulations.benchmarks.network import with_light_sites, with_processes
from fedhead.simulations.benchmarks.problem import Problem, own_home


@pytest.mark.slow
def test_every_site_takes_part_in_every_round() -> None:
    with own_home() as home:
        busy, seconds = with_light_sites(Problem(sites=12, rows=20, features=64, rounds=3), Path(home) / "light", 0.5)
        assert 0 <= busy < 1
        assert seconds > 0
        assert with_processes(Problem(sites=2, rows=20, features=64, rounds=3), Path(home) / "processes") > 0
