"""The run's map of features at the coordinator: made, announced, and where asked for chosen by comparison."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedhead.config import MOST_LIFTED, RunConfig
from fedhead.errors import FedheadError
from fedhead.heads.feature_map import Basis, basis_for
from fedhead.protocol.actions import MAP
from fedhead.protocol.mapping import MapRequest, moments_of
from fedhead.protocol.messages import StatisticsRequest
from fedhead.server.exchange import Exchange
from fedhead.server.latecomers import Latecomers
from fedhead.server.messenger import Messenger
from fedhead.server.pooling import Pooling
from fedhead.server.roster import Roster
from fedhead.server.selection import Choice, Rival, choose_by_error, choose_map, compare_rivals
from fedhead.server.site_sums import SiteSums
from fedhead.server.starting_head import HeadForm
from fedhead.solvers import solve_head
from fedhead.solvers.closed_form import ridge_error
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.projection import projection_for
from fedhead.sums.sums import Arrays
from fedhead.tasks import Task

AUTO_LIFT = "landmarks:1024"
"""The lift that `lift = "auto"` compares with."""


@dataclass(frozen=True, eq=False)
class _Candidate:
    """Features that heads were solved on.

    Attributes:
        request: the map of features.
        lift: as in the settings.
        solver: of the head.
        stats: the pooled statistics.
        kept: where each site's own are.
    """

    request: MapRequest
    solver: str
    stats: FeatureStatistics
    kept: SiteSums | None


@dataclass
class FeatureMaps:
    """Has the sites map their features.

    Args:
        config: of the run.
        task: of the run.
        messenger: reaches the sites.
        roster: the sites that take part.
        latecomers: the sites that come later, which receive the map, too.
        pooling: sums features.
        form: of the run's heads.
        probe: the backbone's features `[PROBES, d]` of the probe.
        sums: where each site's statistics are kept, if anywhere.

    Attributes:
        current: the map, as the sites were told; None for plain features.
        settled: the settings that a comparison has decided, by name.
    """

    config: RunConfig
    task: Task
    messenger: Messenger
    roster: Roster
    latecomers: Latecomers
    pooling: Pooling
    form: HeadForm
    probe: Tensor
    sums: SiteSums | None
    current: MapRequest | None = None
    settled: dict[str, Any] = field(default_factory=dict)

    @property
    def basis(self) -> Basis | None:
        """The basis of the rows; None for plain features."""
        if self.config.basis in ("unit", "root"):
            return self.config.basis
        if self.config.basis == "auto" or self.config.lift != "none":
            return basis_for(self.probe)
        return None

    def announce(self, request: MapRequest) -> Exchange:
        """Have the sites map their features from now on; those that cannot take no part.

        Raises:
            FedheadError: if none can.
        """
        exchange = self._send(request)
        for site in sorted(exchange.late):
            self.roster.lose(site, exchange.dropped[site])
        self.roster.exclude(exchange.dropped)
        if shortage := self.roster.shortage(1):
            raise FedheadError(shortage)
        return exchange

    def prepare(self) -> Exchange:
        """Have the sites map their features as the run says; for landmarks, by moments that they sum first.

        Raises:
            FedheadError: if no site can.
        """
        if not (basis := self.basis):
            return Exchange()
        lift = self.config.lift
        if not lift.startswith("landmarks"):
            return self.announce(MapRequest(basis, lift))
        exchange = self.announce(MapRequest(basis))
        collected = self.pooling.statistics(StatisticsRequest(), into=None)
        exchange.include(collected.exchange)
        exchange.include(self.announce(MapRequest(basis, lift, _moments(collected.total))))
        return exchange

    def choose(self) -> tuple[FeatureStatistics, Choice, Exchange]:
        """Compare heads on plain features, in a basis and lifted, and have the sites use the best features.

        Classifiers are compared on held-out rows, and ridge regression by generalised cross-validation from sums.

        Returns:
            The statistics of the features that are taken, the comparison, and the traffic.

        Raises:
            FedheadError: if no site's statistics could be used.
        """
        exchange = Exchange()
        if self.current is not None:
            exchange.include(self.announce(MapRequest("none")))
        basis = self.basis or basis_for(self.probe)
        plain, solvers = self.task.solvers[0], [one for one in ("lda-gcv", "ridge") if one in self.task.solvers]
        candidates = [self._solve(MapRequest("none"), plain, "plain", exchange)]
        exchange.include(self.announce(MapRequest(basis)))
        candidates.append(self._solve(MapRequest(basis), solvers[0], "basis", exchange))
        left_out = self._add_lifted(candidates, basis, solvers, exchange)
        rivals = [self._rival(one) for one in candidates]
        if not self.task.pairs_losses:
            taken, choice = choose_by_error(rivals, [ridge_error(one.stats) for one in candidates], left_out)
            return self._take(candidates, taken, exchange), choice, exchange
        sums, asking = compare_rivals(self.messenger, self.roster.nodes, self.roster.rows, rivals)
        exchange.include(asking)
        taken, choice = choose_map(rivals, sums, left_out)
        return self._take(candidates, taken, exchange), choice, exchange

    def _add_lifted(
        self, candidates: list[_Candidate], basis: Basis, solvers: Sequence[str], exchange: Exchange
    ) -> str:
        """Append the lifted candidates; return why there are none, or an empty text."""
        if self.probe.shape[1] > MOST_LIFTED:
            return f"Lifts are left out: they take {MOST_LIFTED} features or fewer."
        try:
            request = MapRequest(basis, AUTO_LIFT, _moments(candidates[-1].stats))
            asking = self._send(request)
        except FedheadError as error:
            return f"Lifts are left out: {error}"
        exchange.add_traffic(asking)
        if asking.dropped:
            first = min(asking.dropped)
            return f"Lifts are left out: {len(asking.dropped)} sites cannot take part. {first}: {asking.dropped[first]}"
        for solver in solvers:
            if candidates[-1].request is request:
                last = candidates[-1]
                candidates.append(_Candidate(request, solver, last.stats, last.kept))
            else:
                candidates.append(self._solve(request, solver, "lift", exchange))
        return ""

    def _solve(self, request: MapRequest, solver: str, name: str, exchange: Exchange) -> _Candidate:
        kept = None
        if self.sums is not None:
            kept = self.sums.beside(name)
            kept.clear()
        collected = self.pooling.statistics(StatisticsRequest(), into=kept)
        exchange.include(collected.exchange)
        return _Candidate(request, solver, collected.total, kept)

    def _rival(self, one: _Candidate) -> Rival:
        lifted = one.request.lift != "none"
        where = one.request.lift if lifted else one.request.basis
        name = f"{one.solver} on plain features" if where == "none" else f"{one.solver} on {where}"
        return Rival(
            name,
            self._solved(one),
            "map" if lifted else "plain" if where == "none" else "basis",
            lifted=lifted,
            counts_errors=lifted and one.solver != "ridge",
        )

    def _solved(self, one: _Candidate) -> Arrays:
        head = solve_head(one.stats, one.solver)
        width = self.probe.shape[1]
        project = projection_for(width, self.config.seed) if one.request.lift == "none" else None
        weight, bias = (head if project is None else project.widen(head)).affine()
        return {"weight": weight.float().numpy(), "bias": bias.float().numpy()}

    def _take(self, candidates: list[_Candidate], taken: int, exchange: Exchange) -> FeatureStatistics:
        """Have the sites use the features of a candidate, and keep its sums alone."""
        one = candidates[taken]
        if one.request is not self.current:
            exchange.include(self.announce(one.request))
        if self.sums is not None and one.kept is not None:
            self.sums.replace(one.kept)
            for other in candidates:
                if other.kept is not None:
                    other.kept.clear()
        self.form.init = one.solver
        self.settled = {"basis": one.request.basis, "lift": one.request.lift, "init": one.solver}
        return one.stats

    def _send(self, request: MapRequest) -> Exchange:
        exchange = self.pooling.map(request)
        self.current = request
        self.latecomers.introduction = {MAP: request.payload().to_content()}
        self.form.mapping = self.pooling.mapping
        return exchange


def _moments(stats: FeatureStatistics) -> Arrays:
    scatter: torch.Tensor = stats.scatter()
    return moments_of(stats.mean(), scatter / stats.rows)
