"""Many sites on one machine."""

from fedhead.membership import add_class as add_class
from fedhead.membership import join as join
from fedhead.membership import leave as leave
from fedhead.server.runs.membership import MembershipChange as MembershipChange
from fedhead.simulations.rank import RankedBackbone as RankedBackbone
from fedhead.simulations.rank import rank as rank
from fedhead.simulations.result import RunResult as RunResult
from fedhead.simulations.simulate import simulate as simulate
from fedhead.simulations.study import Study as Study
from fedhead.simulations.study import study as study
