"""Settings of a run."""

from fedhead.config.changes import merge, parse_assignments
from fedhead.config.fields import (
    DENSE_LAYERS,
    GENERATION,
    GENERATION_COLUMNS,
    LONGEST_SUBGROUP,
    MOST_DECAY,
    MOST_EPSILON,
    MOST_LIFTED,
    MOST_SUBGROUPS,
    SUBGROUPED,
    Epsilon,
    NonNegative,
    Positive,
    Scalar,
    lifted_width,
    require_tunable,
)
from fedhead.config.run import RunConfig
from fedhead.config.tables import LocalConfig, PrivacyConfig, SimulationConfig, StrategyConfig, TuneConfig

__all__ = [
    "DENSE_LAYERS",
    "GENERATION",
    "GENERATION_COLUMNS",
    "LONGEST_SUBGROUP",
    "MOST_DECAY",
    "MOST_EPSILON",
    "MOST_LIFTED",
    "MOST_SUBGROUPS",
    "SUBGROUPED",
    "Epsilon",
    "LocalConfig",
    "NonNegative",
    "Positive",
    "PrivacyConfig",
    "RunConfig",
    "Scalar",
    "SimulationConfig",
    "StrategyConfig",
    "TuneConfig",
    "lifted_width",
    "merge",
    "parse_assignments",
    "require_tunable",
]
