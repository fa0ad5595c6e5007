"""Coordinators: the parts that a run of any kind is made of."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedhead.backbones import Backbone
from fedhead.backbones.objectives import Cut
from fedhead.config import GENERATION, RunConfig
from fedhead.heads import Head
from fedhead.protocol.heads import HeadRequest
from fedhead.protocol.messages import Manifest
from fedhead.secure.roster import Roster as MemberRoster
from fedhead.server.attendance import Attendance
from fedhead.server.evaluation import DetailedEvaluation, some_sites
from fedhead.server.exchange import Exchange
from fedhead.server.latecomers import Latecomers
from fedhead.server.maps import FeatureMaps
from fedhead.server.masked_sum import MaskedSum
from fedhead.server.messenger import Messenger
from fedhead.server.observer import Observer
from fedhead.server.pooling import Pooling
from fedhead.server.robust_pooling import require_robust_pooling
from fedhead.server.roster import Roster
from fedhead.server.rounds import Rounds, Version
from fedhead.server.runs.checkpoint import Checkpoint, new_run
from fedhead.server.runs.history import Outcome, Round
from fedhead.server.secure_sum import RingSum, Summation
from fedhead.server.site_sums import SiteSums
from fedhead.server.standardising import Standardising
from fedhead.server.starting_head import HeadForm
from fedhead.server.strategies import required_sites
from fedhead.server.strategy_state import state_of
from fedhead.server.tuned_form import AdapterForm, TunedForm
from fedhead.server.weights_file import CHUNK_BYTES, WeightsFile
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.heads import EXAMPLES, HELD_OUT, LOSS_SUM, SCORE, TRAIN_LOSS
from fedhead.sums.score_bins import ScoreBins
from fedhead.sums.sums import Arrays
from fedhead.tasks import make_task


class Coordinator(ABC):
    """Runs one configuration on a Grid.

    Args:
        config: the run; its `simulation` table is not read.
        grid: reaches the sites.
        backbone: the backbone that every site needs.
        classes: the names of the head's outputs.
        strategy: Flower's, or the user's own.
        observer: notified of steps, sites and rounds; the caller notifies it of start and end.
        sums: the store of each site's statistics; sites are diagnosed only with one.
        test: returns the score of a head on a pooled test set.
        checkpoint: saves and resumes the run.
        deliver: whether a solved head is solved again from all rows for use.
        members: the signed keys of real sites under secure summation; None if all sites are simulated.
        made: the backbone of a tuned run, if it is cut already.

    Raises:
        UserError: if head, init or classes do not fit each other.
    """

    def __init__(
        self,
        config: RunConfig,
        grid: Grid,
        backbone: Backbone,
        classes: Sequence[str],
        strategy: Strategy,
        *,
        observer: Observer | None = None,
        sums: SiteSums | None = None,
        test: Callable[[Head], float | None] | None = None,
        checkpoint: Checkpoint | None = None,
        deliver: bool = True,
        members: MemberRoster | None = None,
        made: Cut | None = None,
    ) -> None:
        self.config = config
        self.backbone = backbone
        self.observer = observer or Observer()
        self.sums = sums
        self.test = test
        self.checkpoint = checkpoint
        self.deliver = deliver
        fresh = state_of(strategy)
        self.saved = checkpoint.load() if checkpoint is not None else None
        self.task = make_task(config.task, classes)
        self.form: HeadForm = (
            (AdapterForm if config.task == GENERATION else TunedForm)(config, backbone, self.task, made)
            if config.tune.on
            else HeadForm(config, backbone.num_features, self.task)
        )
        if config.pooling == "robust":
            require_robust_pooling(self.task, self.form, sums)
        run = checkpoint.run if checkpoint is not None else new_run()
        self.manifest = Manifest.of(run, config, backbone, classes)
        self.messenger = Messenger(grid, config.round_deadline)
        if config.privacy.secure_sum:
            self.messenger.summation = self._secure_sum(members)
        # Taken once: sites sum about the mean of the very features that they are sent.
        self.probe = probe = backbone.probe()
        self.choices: list[Mapping[str, Any]] = []
        weights = WeightsFile(backbone, None if self.messenger.in_process else CHUNK_BYTES)
        self.roster = Roster(self.messenger, self.manifest, weights, probe, self.observer)
        self.latecomers = Latecomers(self.messenger, self.roster)
        self.attendance = Attendance(
            self.messenger,
            self.roster,
            self.latecomers,
            self.observer,
            max(required_sites(strategy), config.min_sites),
            config.round_deadline,
            checkpoint.hint if checkpoint is not None else "",
        )
        self.pooling = Pooling(self.messenger, self.manifest, self.roster, probe, sums, self.task, config.wire)
        self.pooling.wait = self.attendance.wait_to_sum_again
        self.standardising = Standardising(self.form, self.pooling, self.latecomers, self.observer)
        parts = (self.messenger, self.roster, self.latecomers, self.pooling)
        self.maps = FeatureMaps(config, self.task, *parts, self.form, probe, sums)
        self.rounds = Rounds(strategy, self.messenger, self.manifest, self.roster, self.task, self.form, fresh)
        self._marked = time.perf_counter()

    def _secure_sum(self, members: MemberRoster | None) -> Summation:
        if members is None:
            return RingSum(self.messenger)
        least, colluding = self.config.min_sites, self.config.privacy.max_colluding
        return MaskedSum(self.messenger, members, self.manifest, self.observer, least, colluding)

    @abstractmethod
    def run(self) -> Outcome:
        """Run to the end, from the start or from where the checkpoint says.

        Raises:
            FedheadError: if too few sites can take part, or no reply of an exchange can be used.
        """

    def evaluation(self, request: HeadRequest, bins: ScoreBins) -> DetailedEvaluation:
        """Return the detailed evaluation of a head, at a thousand sites drawn at random where there are more."""
        asked = some_sites(self.roster.nodes, self.config.seed)
        return DetailedEvaluation(self.messenger, asked, self.roster.rows, self.task, request, bins)

    def calibrates_start(self, stats: FeatureStatistics | None) -> bool:
        """Return whether the first head is calibrated: a solved one, with rounds to come and held-out rows."""
        calibrated = self.config.rounds > 0 and self.config.holdout > 0
        return stats is not None and self.task.scales_outputs and calibrated

    def version(self, number: int, arrays: Arrays, made_by: Exchange) -> Version:
        """Return a head as a version that took the time since the one before."""
        now = time.perf_counter()
        seconds, self._marked = now - self._marked, now
        return Version(number, arrays, made_by, seconds)

    def finished_round(self, version: Version, evaluation: Exchange) -> Round:
        """Return the figures of a version, now that it is evaluated, and notify the observer."""
        sums = evaluation.sums()
        trained = version.made_by.sums()
        held_out = sums[HELD_OUT]
        measured = self.form.as_solved(version.number, version.arrays)
        finished = Round(
            number=version.number,
            sites=version.made_by.trained,
            seconds=version.seconds,
            bytes_down=version.made_by.bytes_down,
            bytes_up=version.made_by.bytes_up,
            train_loss=float(trained[TRAIN_LOSS] / trained[EXAMPLES]) if trained[EXAMPLES] else None,
            loss=self.task.mean_loss(float(sums[SCORE]), float(sums[LOSS_SUM]), float(held_out)) if held_out else None,
            score=self.task.score(float(sums[SCORE]), float(sums[LOSS_SUM]), float(held_out)) if held_out else None,
            test_score=self.test(self.form.leave(measured)) if self.test else None,
            dropped=dict(sorted(version.made_by.dropped.items())),
            joined=tuple(version.made_by.joined),
        )
        self.observer.on_round(finished)
        return finished
