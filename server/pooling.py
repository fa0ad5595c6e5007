"""Sums of the sites' features, folded into one as they come."""

from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import torch

from fedhead.errors import FedheadError
from fedhead.messages import (
    STANDARDISE,
    STATISTICS,
    Manifest,
    MessageError,
    Payload,
    StatisticsRequest,
    payload_bytes,
)
from fedhead.moments import FeatureMoments
from fedhead.server.exchange import Exchange, Messenger
from fedhead.server.roster import Roster
from fedhead.server.site_sums import SiteSums
from fedhead.statistics import FeatureStatistics, origin_of

Sums = TypeVar("Sums", FeatureStatistics, FeatureMoments)


class Pooling:
    """Asks the sites for sums, and adds them.

    Args:
        messenger: reaches the sites.
        manifest: of the run.
        roster: the sites that take part.
        probe: the features `[PROBES, d]` of the probe, which sums are about the mean of.
        sums: where each site's statistics are kept, if anywhere.

    Attributes:
        counts: each site's training rows by class, `[C]`, once statistics were summed.
    """

    def __init__(
        self, messenger: Messenger, manifest: Manifest, roster: Roster, probe: torch.Tensor, sums: SiteSums | None
    ) -> None:
        self.counts: dict[str, torch.Tensor] = {}
        self._messenger = messenger
        self._manifest = manifest
        self._roster = roster
        self._probe = probe
        self._kept = sums

    def statistics(self, request: StatisticsRequest, exchange: Exchange) -> FeatureStatistics:
        """Return the sum of the sites' statistics, and keep each site's own.

        Raises:
            FedheadError: if not one site's could be used.
        """
        used = 0
        origin = origin_of(self._probe, self._manifest.seed)
        classes = len(self._manifest.classes)
        total = FeatureStatistics.empty(len(origin), classes, origin, multi_label=self._manifest.multi_label)
        for name, tensors in self._sums(request, exchange):
            try:
                stats = FeatureStatistics.from_tensors(tensors)
                alike = stats.multi_label == self._manifest.multi_label
                self._vouch(name, stats.rows, stats.num_classes == classes and alike)
                total += stats
            except ValueError as error:
                exchange.drop(name, str(error))
                continue
            used += 1
            if self._kept is not None:
                self._kept.save(name, request.rows, stats)
            if request.rows == "train":
                self.counts[name] = stats.counts
        return _at_least_one(total if used else None, exchange)

    def moments(self, exchange: Exchange) -> FeatureMoments:
        """Return the sum of the sites' moments.

        Raises:
            FedheadError: if not one site's could be used.
        """
        origin = self._probe.mean(0)
        total: FeatureMoments | None = None
        for name, tensors in self._sums(StatisticsRequest(what="moments"), exchange):
            try:
                moments = FeatureMoments.from_tensors(tensors, origin)
                self._vouch(name, moments.rows, True)
                total = moments if total is None else total + moments
            except ValueError as error:
                exchange.drop(name, str(error))
        return _at_least_one(total, exchange)

    def tell(self, standardisation: tuple[torch.Tensor, torch.Tensor], exchange: Exchange) -> None:
        """Tell the sites the mean and scale `[d]` that heads are trained under."""
        mean, scale = (part.float().numpy() for part in standardisation)
        content = Payload({}, {"mean": mean, "scale": scale}).to_content()
        for name, answer in self._messenger.ask(self._roster.nodes, STANDARDISE, content, exchange):
            try:
                exchange.bytes_up += payload_bytes(answer)
            except MessageError as error:
                exchange.drop(name, str(error))

    def _sums(self, request: StatisticsRequest, exchange: Exchange) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        content = Payload(request.model_dump()).to_content()
        for name, answer in self._messenger.ask(self._roster.nodes, STATISTICS, content, exchange):
            try:
                arrays = Payload.from_content(answer).arrays
                exchange.bytes_up += payload_bytes(answer)
            except MessageError as error:
                exchange.drop(name, str(error))
                continue
            yield name, {key: torch.from_numpy(np.array(array)) for key, array in arrays.items()}

    def _vouch(self, name: str, rows: int, fits: bool) -> None:
        if rows > self._roster.rows[name]:
            raise ValueError(f"it sums {rows} rows, of {self._roster.rows[name]} that it has")
        if not fits:
            raise ValueError("its statistics are of other classes")


def _at_least_one(total: Sums | None, exchange: Exchange) -> Sums:
    if total is None:
        raise FedheadError(f"Not one site's statistics could be used.{exchange.first_reasons()}")
    return total
