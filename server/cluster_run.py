"""The coordinator of runs without labels: clusters, their number, and a head that predicts them, from sums alone."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fedhead.errors import FedheadError, UserError
from fedhead.protocol.actions import CLUSTER
from fedhead.protocol.clusters import ClusterRequest, Rows, Stage
from fedhead.protocol.messages import SITE_COUNTS, StatisticsRequest
from fedhead.server.collect import Question
from fedhead.server.coordinator import Coordinator
from fedhead.server.exchange import Exchange
from fedhead.server.runs.history import Outcome, Round
from fedhead.server.selection import Choice
from fedhead.server.starting_head import HeadForm
from fedhead.solvers.clusters import (
    RESTARTS,
    Clusterings,
    Directions,
    Mixtures,
    best_starts,
    by_size,
    directions_of,
    knee,
    sizes_to_try,
)
from fedhead.sums.clusters import ClusterSums, LikelihoodSums
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.sums import Arrays
from fedhead.tasks import make_task
from fedhead.tasks.clusters import cluster_names

logger = logging.getLogger(__name__)

TRIAL_STEPS = 6
"""Steps of all random starts; then the best of each size goes on alone."""

STEPS = 30
"""Largest number of further steps."""

MOST_CLUSTERS = 20
"""Largest number of clusters that is tried unless the run names a number."""

_SETTLED = 1e-9


class ClusterCoordinator(Coordinator):
    """Runs a configuration of the task `clusters` on a Grid; see `Coordinator`."""

    def run(self) -> Outcome:
        """Run to the end. A run that failed starts again.

        Raises:
            FedheadError: if too few sites can take part, or no reply of an exchange can be used.
        """
        self.pooling.forget()
        self._exchange = self.roster.gather()
        self._exchange.add_traffic(self.attendance.await_sites(0))
        self._include(self.maps.prepare())
        self.observer.on_step("statistics", 0)
        pooled = self.pooling.statistics(StatisticsRequest(), into=None)
        self._include(pooled.exchange)
        directions, variances = directions_of(pooled.total)
        found, sums = self._cluster(directions, variances)
        self.observer.on_step("evaluate", 0)
        mixtures = Mixtures.of(found, sums)
        held_out = self._likelihoods(directions, mixtures)
        number = self._choose(found, held_out)
        counts, _ = sums.parts()[number]
        kept = by_size(counts)
        if len(kept) < 2:
            raise FedheadError("All rows are in one cluster: the sites' guards merge smaller ones.")
        if self.config.clusters and len(kept) < self.config.clusters:
            logger.warning(
                "The run asked for %d clusters, but only %d have rows: there are too few different rows, or the sites' "
                "guards merge smaller clusters.",
                self.config.clusters,
                len(kept),
            )
        chosen = Clusterings((len(kept),), found.chosen([number]).centres[kept])
        self.observer.on_step("finish", 0)
        self.pooling.forget()
        stats = self._statistics(directions, chosen, "train")
        everything = stats
        if held_out is not None and self.deliver:
            everything = stats + self._statistics(directions, chosen, "held_out")
        return self._outcome(stats, everything, self._described(found, held_out, everything))

    def _cluster(self, directions: Directions, variances: torch.Tensor) -> tuple[Clusterings, ClusterSums]:
        """Return the best clustering of each size, and its sums."""
        wanted = self.config.clusters
        sizes = [wanted] if wanted else sizes_to_try(MOST_CLUSTERS)
        starts = [size for size in sizes for _ in range(RESTARTS)]
        found = Clusterings.random(starts, variances, self.config.seed)
        for step in range(TRIAL_STEPS + STEPS):
            sums = self._sums(directions, found)
            if not sums.rows:
                raise FedheadError("No site's clusters could be used.")
            if step == TRIAL_STEPS - 1:
                best = best_starts(sums)
                parts = sums.parts()
                counts, totals = zip(*(parts[one] for one in best), strict=True)
                found = found.chosen(best)
                sums = ClusterSums(found.sizes, np.concatenate(counts), np.concatenate(totals))
            moved = found.moved(sums)
            settled = bool(np.abs(moved.centres - found.centres).max() < _SETTLED)
            if settled and step >= TRIAL_STEPS:
                break
            found = moved
        # The sums belong to the centres of the step before; those of the last centres decide their shares.
        return found, self._sums(directions, found)

    def _sums(self, directions: Directions, found: Clusterings) -> ClusterSums:
        asked = self._request("sums", "train", directions, found)
        question = Question(CLUSTER, asked.to_content(), ClusterSums.empty(found.sizes, directions.width))
        collected = self.pooling.summed(question)
        self._include(collected.exchange)
        return collected.total

    def _request(
        self,
        stage: Stage,
        rows: Rows,
        directions: Directions,
        found: Clusterings,
        mixtures: Mixtures | None = None,
    ) -> ClusterRequest:
        return ClusterRequest(stage, rows, directions, found, mixtures, self.pooling.map_digest)

    def _likelihoods(self, directions: Directions, mixtures: Mixtures) -> LikelihoodSums | None:
        """Return the likelihoods of held-out rows; None if there are none."""
        asked = self._request("likelihood", "held_out", directions, mixtures.clusterings, mixtures)
        nothing = LikelihoodSums.empty(len(mixtures.clusterings.sizes))
        try:
            collected = self.pooling.summed(Question(CLUSTER, asked.to_content(), nothing))
        except FedheadError as problem:
            logger.warning("Held-out rows do not compare the clusterings: %s", problem)
            return None
        self._include(collected.exchange)
        return collected.total if collected.total.rows else None

    def _choose(self, found: Clusterings, held_out: LikelihoodSums | None) -> int:
        """Return the number of the clustering to deliver.

        Raises:
            UserError: if nothing is held out to compare them.
        """
        if len(found.sizes) == 1:
            return 0
        if held_out is None:
            raise UserError(
                "Without held-out rows the number of clusters cannot be chosen: set clusters (--clusters), or holdout."
            )
        means = held_out.totals / held_out.rows
        size = knee(found.sizes, means.tolist())
        number = found.sizes.index(size)
        reason = (
            f"Mean log-likelihood {means[number]:.2f} on {held_out.rows} held-out rows, {means[0]:.2f} with "
            f"{found.sizes[0]} and {means[-1]:.2f} with {found.sizes[-1]}; beyond {size} it grows more slowly."
        )
        rivals = [{"name": str(one), "loss": -float(mean)} for one, mean in zip(found.sizes, means, strict=True)]
        choice = Choice("Number of clusters", str(size), reason, held_out.rows, rivals)
        self.choices = [choice.to_dict()]
        choice.log()
        return number

    def _statistics(self, directions: Directions, chosen: Clusterings, rows: Rows) -> FeatureStatistics:
        """Return feature statistics with clusters as classes, and keep each site's, if the run keeps them."""
        (size,) = chosen.sizes
        asked = self._request("statistics", rows, directions, chosen)
        origin = self.pooling.origin()
        nothing = FeatureStatistics.empty(len(origin), size, origin)
        secure, sums = self.messenger.summation is not None, self.sums

        def note(sites: tuple[str, ...], stats: FeatureStatistics, beside: Arrays) -> None:
            if secure:
                return
            by_site = np.array(beside[SITE_COUNTS]) if len(sites) > 1 else stats.counts.numpy()[None]
            if by_site.shape != (len(sites), size) or by_site.dtype != np.int64:
                raise ValueError("it counts rows for other sites than its own")
            if sums is not None:
                sums.save(sites[0], rows, stats)
            if rows == "train":
                self.pooling.counts.update(zip(sites, torch.from_numpy(by_site), strict=True))

        question = Question(CLUSTER, asked.to_content(), nothing, together=sums is None, beside=(SITE_COUNTS,))
        collected = self.pooling.summed(question, note, known=rows == "held_out" and not secure)
        self._include(collected.exchange)
        return collected.total

    def _include(self, exchange: Exchange) -> None:
        """Count an exchange, and go on without the sites that were late or dropped."""
        self.attendance.skip_late(exchange)
        self.roster.exclude(exchange.dropped)
        self._exchange.include(exchange)

    def _described(
        self, found: Clusterings, held_out: LikelihoodSums | None, stats: FeatureStatistics
    ) -> dict[str, Any]:
        by_site = [counts for counts in self.pooling.counts.values() if len(counts)]
        values: dict[str, Any] = {
            "rows": stats.counts.tolist(),
            "sites": [int(sum(int(counts[number]) > 0 for counts in by_site)) for number in range(stats.num_classes)]
            if by_site
            else [],
        }
        if held_out is not None:
            means = held_out.totals / held_out.rows
            spread = np.sqrt(np.maximum(held_out.squares / held_out.rows - means**2, 0) / held_out.rows)
            values["held_out"] = held_out.rows
            values["likelihoods"] = [
                {"clusters": size, "mean": mean, "error": error}
                for size, mean, error in zip(found.sizes, means.tolist(), spread.tolist(), strict=True)
            ]
        return values

    def _outcome(self, stats: FeatureStatistics, everything: FeatureStatistics, described: dict[str, Any]) -> Outcome:
        names = cluster_names(stats.num_classes)
        config = self.config.changed({"classes": list(names)})
        form = HeadForm(config, self.backbone.num_features, make_task(config.task, names), self.pooling.mapping)
        head = form.deliver(everything).float()
        loss = self._loss(described, stats.num_classes)
        only = Round(
            number=0,
            sites=len(self.roster.nodes),
            seconds=self.version(0, {}, Exchange()).seconds,
            bytes_down=self._exchange.bytes_down,
            bytes_up=self._exchange.bytes_up,
            loss=loss,
            dropped=dict(sorted(self._exchange.dropped.items())),
        )
        self.observer.on_round(only)
        secure = self.messenger.summation is not None
        return Outcome(
            head=head,
            kept_round=0,
            all_rows=everything is not stats,
            history=[only],
            participants=sorted(self.roster.nodes),
            sites={},
            calibrated=None,
            diagnoses=[],
            coverage=[] if secure else make_task(config.task, names).coverage(self.pooling.counts),
            refused=dict(sorted(self.roster.refused.items())),
            full_model_bytes=0,
            statistics=stats,
            traffic=self.messenger.traffic,
            choices=self.choices,
            settled={"classes": list(names)},
            clusters=described,
        )

    def _loss(self, described: dict[str, Any], clusters: int) -> float | None:
        found: Sequence[dict[str, Any]] = described.get("likelihoods", ())
        return next((-one["mean"] for one in found if one["clusters"] == clusters), None)
