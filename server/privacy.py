"""Settings that secure summation excludes: the sites' single replies are unknown, and only their sum is used."""

import logging
from typing import Any

from flwr.serverapp.strategy import Strategy

from fedhead.config import RunConfig
from fedhead.errors import UserError
from fedhead.secure.session import MIN_SITES
from fedhead.server.strategies import averages
from fedhead.wording import listed

logger = logging.getLogger(__name__)


def least_sites(max_colluding: int) -> int:
    """Return the least number of sites of a secure sum: two others than those that collude, and three in all.

    Of two sites, each learns the other's sums by subtracting its own from the total.
    """
    return max(MIN_SITES, max_colluding + 2)


def private_settings(config: RunConfig, strategy: Strategy) -> RunConfig:
    """Return the run with the settings that secure summation requires, unchanged without it.

    Raises:
        UserError: for settings that need single replies and were asked for.
    """
    if not config.privacy.secure_sum:
        return config
    if not averages(strategy):
        raise UserError(
            f"Secure summation shows the coordinator only the weighted mean of all heads, and "
            f"{type(strategy).__name__} needs each site's: choose FedAvg, FedProx, FedAvgM, FedAdam, FedAdagrad, "
            "FedYogi or pooled-lbfgs, or leave secure_sum off."
        )
    asked = [
        f"{name} = {_toml(value)}"
        for name, value in (("keep_sums", config.keep_sums), ("diagnose", config.diagnose), ("worth", config.worth))
        if name in config.model_fields_set and value not in ("total", False)
    ]
    if asked:
        raise UserError(
            f"Secure summation hides each site's sums, so nothing can be kept or said of a single site: remove "
            f"{listed(asked, len(asked))}, or leave secure_sum off."
        )
    logger.warning(
        "Secure summation is on: the coordinator learns sums over all sites only. The run keeps no site's sums, so "
        "sites cannot join or leave it later; the report has no figures of single sites and no diagnosis."
    )
    least = max(config.min_sites, least_sites(config.privacy.max_colluding))
    return config.changed({"keep_sums": "total", "diagnose": False, "min_sites": least})


def require_enough_sites(config: RunConfig, sites: int, strategy: Strategy) -> None:
    """Check that every exchange of a run with a known number of sites sums over enough of them.

    Raises:
        UserError: if secure summation is on and a round would have too few sites.
    """
    if not config.privacy.secure_sum:
        return
    share = float(getattr(strategy, "fraction_train", 1.0))
    trained = max(int(sites * share), int(getattr(strategy, "min_train_nodes", 0)))
    least = least_sites(config.privacy.max_colluding)
    if min(sites, trained) < least:
        against = f" to hold against {config.privacy.max_colluding} that collude" if least > MIN_SITES else ""
        raise UserError(
            f"Secure summation needs {least} sites or more in every exchange{against}, and a round of this run has "
            f"{min(sites, trained)}: add sites, or leave secure_sum off."
        )


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)
