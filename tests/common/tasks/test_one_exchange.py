"""Heads of every task from one exchange of sums, under any split of the rows."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhead.heads import LinearHead
from fedhead.solvers import solve_head
from fedhead.sums.features import FeatureStatistics
from fedhead.tasks import Targets, Task, make_task

TASKS = {
    "classification": ("a", "b", "c"),
    "multi-label": ("a", "b", "c"),
    "ordinal": ("low", "middle", "high"),
    "regression": ("a", "b"),
    "survival": ("1", "2", "5"),
    "tagging": ("person",),
}


def targets_of(task: Task, hidden: np.ndarray, generator: np.random.Generator) -> Targets:
    """Return targets that depend on a hidden value of each row."""
    if task.name in ("classification", "ordinal"):
        return np.digitize(hidden, [-0.5, 0.5])
    if task.name == "tagging":
        tags = np.digitize(hidden, [-0.5, 0.5])
        return np.stack([tags, np.arange(len(hidden)) // 7, np.arange(len(hidden)) % 7], 1)
    if task.name == "multi-label":
        return (hidden[:, None] + generator.normal(size=(len(hidden), 3)) > 0).astype(np.int64)
    if task.name == "regression":
        return np.stack([hidden, generator.normal(size=len(hidden)) + hidden], 1)
    edges = np.array([1.0, 2, 5])
    times, followed = generator.exponential(3 * np.exp(-hidden)), generator.uniform(1, 8, len(hidden))
    risk = np.minimum(times, followed)[:, None] >= edges
    place = np.searchsorted(edges, times)
    event = (place[:, None] == np.arange(3)) & (times <= followed)[:, None]
    return np.hstack([event, risk | event]).astype(np.int64)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(TASKS)),
    seed=st.integers(0, 10_000),
    sites=st.integers(1, 8),
    scale=st.sampled_from([1.0, 1e-3, 1e4]),
)
def test_sums_of_any_split_give_the_head_of_all_rows(name: str, seed: int, sites: int, scale: float) -> None:
    task, generator = make_task(name, TASKS[name]), np.random.default_rng(seed)
    features = generator.normal(size=(160, 6)) * scale + 3 * scale
    rows = torch.from_numpy(features)
    targets = torch.from_numpy(targets_of(task, features[:, 0] / scale - 3, generator))
    owners = generator.integers(0, sites, 160)
    whole, parts = task.statistics(6), task.statistics(6)
    whole.update(rows, targets)
    for one in generator.permutation(sites):
        site = task.statistics(6)
        site.update(rows[owners == one], targets[owners == one])
        parts += FeatureStatistics.from_tensors(site.to_tensors())
    for solver in (init for init in task.inits(LinearHead) if init not in ("zeros", "random")):
        expected, found = (solve_head(stats, solver)(rows).detach() for stats in (whole, parts))
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))
