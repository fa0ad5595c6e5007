"""A coordinator that asks a site about clusters of its own choice."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fedhead.protocol.actions import CLUSTER, STATISTICS
from fedhead.protocol.clusters import ClusterRequest
from fedhead.protocol.messages import MessageError, Payload
from fedhead.solvers.clusters import Clusterings, Directions

from .test_rows import Attack, own_home

__all__ = ["own_home"]

CLUSTERS = {"classes": ("all rows",), "task": "clusters"}


def request(*sizes: int, features: int = 3) -> Payload:
    """Return a request for sums by cluster, with the same centres in each clustering."""
    directions = Directions(torch.zeros(features, dtype=torch.float64), torch.eye(features, dtype=torch.float64))
    angles = np.concatenate([np.linspace(0, np.pi, size) for size in sizes])
    centres = np.stack([np.cos(angles), np.sin(angles), *[np.zeros_like(angles)] * (features - 2)], axis=1)
    return Payload.from_content(ClusterRequest("sums", "train", directions, Clusterings(sizes, centres)).to_content())


def test_a_clustering_has_no_more_clusters_than_a_run_may_ask_for() -> None:
    assert ClusterRequest.from_payload(request(200, 2), 3).clusterings.sizes == (200, 2)
    with pytest.raises(MessageError, match="sizes"):
        ClusterRequest.from_payload(request(2, 201), 3)
    with pytest.raises(MessageError, match="4200 centres"):
        ClusterRequest.from_payload(request(*[200] * 21), 3)


def test_a_site_sums_by_chosen_clusters_only_under_secure_summation_or_where_its_operator_says_so(
    tmp_path: Path,
) -> None:
    attack = Attack(tmp_path)
    with pytest.raises(AssertionError, match=r"only under secure summation .* plain_clusters = true"):
        attack.describe(**CLUSTERS)
    attack.restart(limits={"plain_clusters": True})
    attack.describe(**CLUSTERS)
    assert attack.ask(CLUSTER, request(2)).arrays["counts"].sum() > 0
    # The run goes on, but the site has changed its mind.
    attack.restart(limits={"plain_clusters": False})
    for action, payload in ((CLUSTER, request(2)), (STATISTICS, Payload({"rows": "train"}))):
        with pytest.raises(AssertionError, match="only under secure summation"):
            attack.ask(action, payload)
