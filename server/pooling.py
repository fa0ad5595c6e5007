"""Sums of the sites' features, folded into one as they come."""

from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import torch
from flwr.app import RecordDict

from fedhead.errors import FedheadError
from fedhead.messages import (
    SITE_COUNTS,
    STANDARDISE,
    STATISTICS,
    Manifest,
    MessageError,
    Payload,
    StatisticsRequest,
    payload_bytes,
    single_bytes,
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
        for names, tensors in self._sums(request, exchange):
            try:
                counts = _site_counts(tensors, len(names), classes)
                stats = FeatureStatistics.from_tensors(tensors)
                alike = stats.multi_label == self._manifest.multi_label
                self._vouch(names, stats.rows, stats.num_classes == classes and alike)
                total += stats
            except ValueError as error:
                for name in names:
                    exchange.drop(name, str(error))
                continue
            used += 1
            if self._kept is not None:
                (name,) = names
                self._kept.save(name, request.rows, stats)
            if request.rows == "train":
                self.counts.update(zip(names, [stats.counts] if counts is None else counts, strict=True))
        return _at_least_one(total if used else None, exchange)

    def forget(self) -> None:
        """Forget the statistics that were summed, to sum them again of other sites."""
        self.counts.clear()
        if self._kept is not None:
            self._kept.clear()

    def moments(self, exchange: Exchange) -> FeatureMoments:
        """Return the sum of the sites' moments.

        Raises:
            FedheadError: if not one site's could be used.
        """
        origin = self._probe.mean(0)
        total: FeatureMoments | None = None
        for names, tensors in self._sums(StatisticsRequest(what="moments"), exchange):
            try:
                moments = FeatureMoments.from_tensors(tensors, origin)
                self._vouch(names, moments.rows, True)
                total = moments if total is None else total + moments
            except ValueError as error:
                for name in names:
                    exchange.drop(name, str(error))
        return _at_least_one(total, exchange)

    def tell(self, standardisation: tuple[torch.Tensor, torch.Tensor], exchange: Exchange) -> None:
        """Tell the sites the mean and scale `[d]` that heads are trained under."""
        content = standardise_content(standardisation)
        for names, answer in self._messenger.ask_together(self._roster.nodes, STANDARDISE, content, exchange):
            try:
                self._messenger.receive(names, STANDARDISE, payload_bytes(answer) * len(names), exchange)
            except MessageError as error:
                for name in names:
                    exchange.drop(name, str(error))

    def _sums(
        self, request: StatisticsRequest, exchange: Exchange
    ) -> Iterator[tuple[tuple[str, ...], dict[str, torch.Tensor]]]:
        """Yield sums and whose they are: of one site, where its own are kept."""
        content = Payload(request.model_dump()).to_content()
        nodes = self._roster.nodes
        if request.rows == "held_out":
            # Of a site that came late no training rows were summed, and so no others are.
            nodes = {name: node for name, node in nodes.items() if name in self.counts}
        answers: Iterator[tuple[tuple[str, ...], RecordDict]]
        if self._kept is not None and request.what == "gram":
            asked = self._messenger.ask(nodes, STATISTICS, content, exchange)
            answers = (((name,), answer) for name, answer in asked)
        else:
            answers = self._messenger.ask_together(nodes, STATISTICS, content, exchange)
        for names, answer in answers:
            try:
                arrays = Payload.from_content(answer).arrays
                self._messenger.receive(names, STATISTICS, single_bytes(answer), exchange)
            except MessageError as error:
                for name in names:
                    exchange.drop(name, str(error))
                continue
            yield names, {key: torch.from_numpy(np.array(array)) for key, array in arrays.items()}

    def _vouch(self, names: tuple[str, ...], rows: int, fits: bool) -> None:
        known = sum(self._roster.rows[name] for name in names)
        if rows > known:
            raise ValueError(f"it sums {rows} rows, of {known} that it has")
        if not fits:
            raise ValueError("its statistics are of other classes")


def _site_counts(tensors: dict[str, torch.Tensor], sites: int, classes: int) -> torch.Tensor | None:
    """Take what is told of each of several sites out of `tensors`.

    Raises:
        ValueError: if it is not of them.
    """
    counts = tensors.pop(SITE_COUNTS, None)
    if counts is not None and (counts.shape != (sites, classes) or counts.dtype != torch.int64):
        raise ValueError("it counts rows for other sites than its own")
    return counts


def _at_least_one(total: Sums | None, exchange: Exchange) -> Sums:
    if total is None:
        raise FedheadError(f"Not one site's statistics could be used.{exchange.first_reasons()}")
    return total


def standardise_content(standardisation: tuple[torch.Tensor, torch.Tensor]) -> RecordDict:
    """Return what tells a site the mean and scale `[d]` that heads are trained under."""
    mean, scale = (part.float().numpy() for part in standardisation)
    return Payload({}, {"mean": mean, "scale": scale}).to_content()
