"""Standardisation of features, agreed with the sites before heads are trained."""

from fedhead.protocol.actions import STANDARDISE
from fedhead.server.exchange import Exchange
from fedhead.server.latecomers import Latecomers
from fedhead.server.observer import Observer
from fedhead.server.pooling import Pooling, standardise_content
from fedhead.server.starting_head import HeadForm
from fedhead.sums.features import FeatureStatistics


class Standardising:
    """Agrees with the sites on the mean and scale under which heads are trained.

    Args:
        form: of the run's head, which keeps them.
        pooling: asks the sites for sums.
        latecomers: informs sites that come later.
        observer: notified of the step.
    """

    def __init__(self, form: HeadForm, pooling: Pooling, latecomers: Latecomers, observer: Observer) -> None:
        self._form = form
        self._pooling = pooling
        self._latecomers = latecomers
        self._observer = observer

    def agree(self, stats: FeatureStatistics | None) -> Exchange:
        """Compute mean and scale from statistics, or from moments that the sites are asked for, and announce them."""
        self._observer.on_step("standardise", 0)
        exchange = Exchange()
        if stats is not None and stats.num_features == self._form.num_features:
            self._form.standardise(stats)
        else:
            collected = self._pooling.moments()
            exchange.include(collected.exchange)
            self._form.standardise(collected.total)
        exchange.include(self._tell())
        return exchange

    def announce(self, number: int) -> Exchange:
        """Send the sites mean and scale before round `number`, and later to sites that join."""
        self._observer.on_step("standardise", number)
        return self._tell()

    def _tell(self) -> Exchange:
        assert self._form.standardisation is not None
        content = standardise_content(self._form.standardisation, self._form.target_standardisation, self._form.shares)
        self._latecomers.introduction[STANDARDISE] = content
        return self._pooling.announce(content)
