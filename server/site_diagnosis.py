"""Ask sites how heads do on their held-out rows, and say how each stands to the pool."""

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from fedhead.diagnosis import HEADS, Comparison, SiteDiagnosis, compare, diagnose, heads_to_compare, shifts
from fedhead.messages import COMPARE, Manifest, MessageError, Payload, payload_bytes
from fedhead.server.exchange import Exchange, Messenger
from fedhead.server.site_sums import SiteSums
from fedhead.statistics import FeatureStatistics, projection_for


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
    manifest: Manifest,
    sums: SiteSums,
    pool: FeatureStatistics,
    exchange: Exchange,
) -> list[SiteDiagnosis]:
    """Diagnose every site, in the order of names; none, where their own statistics are not kept.

    Args:
        messenger: reaches the sites.
        nodes: the sites, by name.
        manifest: of the run.
        sums: keeps each site's statistics.
        pool: the sum of all of them.
        exchange: takes the traffic.
    """
    if sums.keep != "folder":
        return []
    sites = _Training(sums, sorted(nodes.keys() & set(sums.sites())))
    shifted = shifts(sites, pool)
    project = projection_for(manifest.num_features, manifest.seed)
    diagnoses = []
    for name, stats in sites.items():
        heads = heads_to_compare(stats, pool - stats)
        if project is not None:
            heads = {key: project.widen(head) for key, head in heads.items()}
        arrays = {
            "weight": torch.stack([heads[key].weight.detach() for key in HEADS]).float().numpy(),
            "bias": torch.stack([heads[key].bias.detach() for key in HEADS]).float().numpy(),
        }
        comparison: Comparison | None = None
        for _, answer in messenger.ask({name: nodes[name]}, COMPARE, Payload({}, arrays).to_content(), exchange):
            try:
                joint = Payload.from_content(answer).arrays["joint"]
                messenger.receive([name], COMPARE, payload_bytes(answer), exchange)
                comparison = compare(torch.from_numpy(np.array(joint)))
            except (MessageError, KeyError, ValueError, TypeError) as error:
                exchange.drop(name, str(error))
        diagnoses.append(diagnose(name, shifted[name], comparison, stats.counts, manifest.classes))
    return diagnoses
