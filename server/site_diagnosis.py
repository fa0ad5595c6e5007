"""Compares heads on the held-out rows of each site, and diagnoses how the site relates to the pool."""

from collections.abc import Iterator, Mapping

import torch

from fedhead.evaluation.comparison import HEADS, compare, heads_to_compare
from fedhead.evaluation.diagnosis import SiteDiagnosis, diagnose
from fedhead.evaluation.shift import shifts
from fedhead.protocol.actions import COMPARE
from fedhead.protocol.messages import Manifest, Payload
from fedhead.server.collect import Question, collect
from fedhead.server.exchange import Exchange
from fedhead.server.messenger import Messenger
from fedhead.server.site_sums import SiteSums
from fedhead.sums.comparison import ComparisonSums
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.projection import projection_for


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
    sums: SiteSums,
    pool: FeatureStatistics,
    num_features: int,
) -> tuple[list[SiteDiagnosis], Exchange]:
    """Diagnose every site, in the order of names; none, where their own statistics are not kept.

    Args:
        messenger: reaches the sites.
        nodes: the sites, by name.
        rows: the number of rows of each.
        manifest: of the run.
        sums: keeps each site's statistics.
        pool: the sum of all of them.
        num_features: the number of mapped features.

    Returns:
        The diagnoses, and the traffic that they took.
    """
    exchange = Exchange()
    if sums.keep != "folder":
        return [], exchange
    sites = _Training(sums, sorted(nodes.keys() & set(sums.sites())))
    shifted = shifts(sites, pool)
    project = projection_for(num_features, manifest.seed)
    diagnoses = []
    for name, stats in sites.items():
        heads = heads_to_compare(stats, pool - stats)
        if project is not None:
            heads = {key: project.widen(head) for key, head in heads.items()}
        arrays = {
            "weight": torch.stack([heads[key].weight.detach() for key in HEADS]).float().numpy(),
            "bias": torch.stack([heads[key].bias.detach() for key in HEADS]).float().numpy(),
        }
        question = Question(COMPARE, Payload({}, arrays).to_content(), ComparisonSums.zeros(), together=False)
        collected = collect(messenger, {name: nodes[name]}, question, rows)
        exchange.include(collected.exchange)
        comparison = compare(torch.from_numpy(collected.total.joint)) if collected.replies else None
        diagnoses.append(diagnose(name, shifted[name], comparison, stats.counts, manifest.classes))
    return diagnoses, exchange
