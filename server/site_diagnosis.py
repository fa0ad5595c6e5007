"""Compares heads on the held-out rows of each site, and diagnoses how the site relates to the pool."""

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch

from fedhead.evaluation.comparison import HEADS
from fedhead.evaluation.diagnosis import SiteDiagnosis
from fedhead.protocol.actions import COMPARE
from fedhead.protocol.messages import Manifest, Payload
from fedhead.server.collect import Question, collect
from fedhead.server.exchange import Exchange
from fedhead.server.messenger import Messenger
from fedhead.server.site_sums import SiteSums
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.projection import projection_for
from fedhead.sums.sums import Sums
from fedhead.tasks import Task

MOST_SUSPECTS = 8
"""Largest number of sites whose effect on the other sites is measured: each takes an exchange with all of them."""


class _Training(Mapping[str, FeatureStatistics]):
    """The training sums of sites by name, read when they are looked up, so that memory holds one at a time."""

    def __init__(self, sums: SiteSums, names: list[str]) -> None:
        self._sums = sums
        self._names = names

    def __getitem__(self, name: str) -> FeatureStatistics:
        stats = self._sums.load(name, "train")
        if stats is None:
            raise KeyError(name)
        return stats

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def diagnose_sites(
    messenger: Messenger,
    nodes: Mapping[str, int],
    rows: Mapping[str, int],
    manifest: Manifest,
    task: Task,
    sums: SiteSums,
    pool: FeatureStatistics,
    num_features: int,
) -> tuple[list[SiteDiagnosis], Exchange]:
    """Diagnose every site, in the order of names; none if the sites' own statistics are not kept.

    Args:
        messenger: reaches the sites.
        nodes: the sites, by name.
        rows: the number of rows of each.
        manifest: of the run.
        task: of the run.
        sums: keeps each site's statistics.
        pool: the sum of all of them.
        num_features: the number of mapped features.

    Returns:
        The diagnoses, and the traffic that they took.
    """
    exchange = Exchange()
    # A single site is the pool.
    if sums.keep != "folder" or len(nodes) < 2:
        return [], exchange
    sites = _Training(sums, sorted(nodes.keys() & set(sums.sites())))
    diagnostics = task.diagnostics(sites, pool)
    if diagnostics is None:
        return [], exchange
    project = projection_for(num_features, manifest.seed)

    def ask(stats: FeatureStatistics, asked: Collection[str], *, together: bool) -> Sums | None:
        heads = diagnostics.heads(stats)
        if project is not None:
            heads = {key: project.widen(head) for key, head in heads.items()}
        arrays = {
            "weight": torch.stack([heads[key].weight.detach() for key in HEADS]).float().numpy(),
            "bias": torch.stack([heads[key].bias.detach() for key in HEADS]).float().numpy(),
        }
        if diagnostics.scale is not None:
            arrays["scale"] = diagnostics.scale
        content = Payload({}, arrays).to_content()
        question = Question(COMPARE, content, diagnostics.nothing, together=together)
        collected = collect(messenger, {name: nodes[name] for name in asked}, question, rows)
        exchange.include(collected.exchange)
        return collected.total if collected.replies else None

    diagnoses = [diagnostics.diagnose(name, stats, ask(stats, [name], together=False)) for name, stats in sites.items()]
    for place in _suspects(diagnoses) if diagnostics.measures_harm else []:
        site = diagnoses[place].site
        others = [name for name in sites if name != site]
        if others and (elsewhere := ask(sites[site], others, together=True)) is not None:
            diagnoses[place] = diagnostics.with_harm(diagnoses[place], elsewhere)
    return diagnoses, exchange


def _suspects(diagnoses: Sequence[SiteDiagnosis]) -> list[int]:
    """Return the places of sites that may harm the others, the most different and largest first."""
    suspects = [place for place, one in enumerate(diagnoses) if one.finding != "alike"]
    suspects.sort(key=lambda place: (not diagnoses[place].unlike, -diagnoses[place].rows, diagnoses[place].site))
    return suspects[:MOST_SUSPECTS]
