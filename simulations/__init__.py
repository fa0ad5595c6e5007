"""Many sites on one machine."""

from fedhead.simulations.simulate import RunResult as RunResult
from fedhead.simulations.simulate import simulate as simulate
