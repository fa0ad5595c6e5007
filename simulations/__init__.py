"""Many sites on one machine."""

from fedhead.simulations.rank import RankedBackbone as RankedBackbone
from fedhead.simulations.rank import rank as rank
from fedhead.simulations.simulate import RunResult as RunResult
from fedhead.simulations.simulate import simulate as simulate
