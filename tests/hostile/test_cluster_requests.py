"""A coordinator that asks a site about clusters of its own choice."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedhead.data import held_out, samples_from_numbers
from fedhead.protocol.actions import CLUSTER, STATISTICS
from fedhead.protocol.clusters import ClusterRequest
from fedhead.protocol.messages import MessageError, Payload
from fedhead.solvers.clusters import Clusterings, Directions
from fedhead.sums.features import FeatureStatistics

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


def sums_of(attack: Attack, rows: str, **changes: Any) -> FeatureStatistics:
    """Return the sums that a new run gets."""
    attack.describe(**changes)
    arrays = attack.ask(STATISTICS, Payload({"rows": rows})).arrays
    return FeatureStatistics.from_tensors({name: torch.from_numpy(array.copy()) for name, array in arrays.items()})


@pytest.mark.parametrize("clusters_first", [False, True])
@pytest.mark.parametrize("dogs", [(20, 3), (3, 4), (3, 9)])
def test_sums_of_all_rows_less_those_of_classes_are_not_of_few_rows(
    tmp_path: Path, clusters_first: bool, dogs: tuple[int, int]
) -> None:
    """A run of classes leaves few rows of a class out of sums, and so does a run without classes, in any order."""
    attack = Attack(tmp_path, limits={"plain_clusters": True})
    generator = np.random.default_rng(3)
    attack.rows = rows_of(generator, "cat", 20, 9) + rows_of(generator, "dog", *dogs)
    attack.write()
    attack.restart()
    runs: list[dict[str, Any]] = [{}, CLUSTERS]
    ordered = reversed(runs) if clusters_first else runs
    found = [[sums_of(attack, part, **run) for part in ("train", "held_out")] for run in ordered]
    of_classes, of_all = reversed(found) if clusters_first else found
    assert all(int(sums.counts[0]) >= 9 for sums in of_classes)
    for one, every in zip(of_classes, of_all, strict=True):
        left = int(every.counts.sum() - one.counts.sum())
        assert left == 0 or abs(left) >= 5
        assert left or torch.allclose(every.sums.sum(0), one.sums.sum(0))


def rows_of(generator: np.random.Generator, label: str, train: int, out: int) -> list[tuple[list[float], str]]:
    """Return so many training and held-out rows of a class, as a site divides them."""
    wanted = {False: train, True: out}
    rows: list[tuple[list[float], str]] = []
    while any(wanted.values()):
        values = generator.normal(size=3).round(4).tolist()
        samples = samples_from_numbers(np.array([values]), labels=[label], classes=[label])
        held = bool(held_out(np.array([samples.key(0, samples.read(0))], np.uint64), 0.2)[0])
        if wanted[held]:
            wanted[held] -= 1
            rows.append((values, label))
    return rows


def test_a_cluster_of_one_patient_gives_its_rows_to_another(tmp_path: Path) -> None:
    attack = Attack(tmp_path, limits={"plain_clusters": True, "min_rows": 0})
    generator = np.random.default_rng(0)
    lines = ["x0,x1,x2,label,patient"]
    for number in range(60):
        # The first 20 rows are one patient's, and far from all others.
        one = number < 20
        values = [-9.0, 0.1 * number, 0.0] if one else [9.0, *generator.normal(size=2)]
        lines.append(f"{','.join(map(str, values))},cat,{'p' if one else f'q{number}'}")
    attack.table.write_text("\n".join([*lines, ""]))
    attack.restart(data=f"csv:{attack.table}?label=label&group=patient")
    attack.describe(**CLUSTERS)
    counts = attack.ask(CLUSTER, request(2)).arrays["counts"]
    assert sorted(counts.tolist())[0] == 0
    assert counts.sum() > 20
