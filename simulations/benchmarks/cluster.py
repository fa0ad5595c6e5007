"""`cluster`: rounds on Ray's nodes against one process, the price of a worker, and a node that is lost in a round."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import Annotated, Any

import numpy as np
import torch
import typer

from fedhead.data import Samples
from fedhead.errors import FedheadError
from fedhead.server.observer import EachRound
from fedhead.server.runs.history import Round
from fedhead.simulations.benchmarks.measurement import Json, Measurement, app
from fedhead.simulations.benchmarks.problem import Problem, own_home
from fedhead.simulations.cluster import call_nobody, require_ray
from fedhead.simulations.result import RunResult
from fedhead.simulations.simulate import simulate

MANY = 100
"""Workers of the cluster that the arithmetic is about."""

SMALL = {"rows": 10, "features": 8, "rounds": 20}
"""A problem whose rounds cost nearly nothing but their messages."""


class LostNode:
    """Removes a node of a cluster in the middle of a round.

    Args:
        cluster: the cluster.
        after: the round whose successor is disturbed, by half the time it took itself.
    """

    def __init__(self, cluster: Any, after: int = 1) -> None:
        self._cluster, self._after = cluster, after
        self.observer = EachRound(self._finished)

    def _finished(self, finished: Round) -> None:
        if finished.number == self._after:
            node = next(iter(self._cluster.worker_nodes))
            timer = Timer(finished.seconds / 2, self._cluster.remove_node, (node,), {"allow_graceful": False})
            timer.daemon = True
            timer.start()


@contextmanager
def loopback(nodes: int) -> Iterator[Any]:
    """Start a Ray cluster of nodes with one core each on this machine."""
    import ray
    from ray.cluster_utils import Cluster

    call_nobody()
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for _ in range(nodes - 1):
            made.add_node(num_cpus=1)
        ray.init(address=made.address, log_to_driver=False, logging_level=logging.ERROR)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()  # type: ignore[no-untyped-call]


def run(
    problem: Problem, samples: Samples, out: Path, engine: str, blocks: int, lost: LostNode | None = None
) -> RunResult:
    """Run `problem` in this process or on the cluster that it is connected to."""
    config = problem.config(simulation={"engine": engine, "blocks": blocks})
    return simulate(config, samples, problem.sites, out=out, observers=[lost.observer] if lost else [])


def round_seconds(result: RunResult) -> float:
    """Return the least seconds of a round but the first."""
    return min(line.seconds for line in result.history[2:])


def require_equal(what: str, result: RunResult, expected: RunResult) -> None:
    """Check that two runs made the same head, in every bit, from sums that agree to 1e-12.

    Raises:
        FedheadError: if not.
    """
    for name, value in expected.model.head.state_dict().items():
        if not torch.equal(result.model.head.state_dict()[name], value):
            raise FedheadError(f"{what} made another head than one process.")
    losses, others = ([line.train_loss or 0.0 for line in one.history] for one in (result, expected))
    if not np.allclose(losses, others, rtol=1e-12, atol=0):
        raise FedheadError(f"{what} summed other losses than one process.")


def measure(problem: Problem, nodes: tuple[int, ...], blocks: int) -> Measurement:
    """Measure rounds of `problem` on clusters of the given sizes, and the cost of a worker in each.

    Raises:
        FedheadError: if a cluster makes anything else than one process, or a lost node changes anything.
    """
    small = Problem(sites=8 * max(nodes), lr=problem.lr, **SMALL)
    seconds: dict[str, float] = {}
    figures: dict[str, float] = {}
    began = time.perf_counter()
    # As many as a worker has.
    torch.set_num_threads(1)
    with own_home() as home:
        data, little = problem.samples(), small.samples()
        expected = run(problem, data, home / "process", "process", blocks)
        seconds["one process"] = round_seconds(expected)
        for count in nodes:
            alone = run(small, little, home / f"small-process-{count}", "process", count)
            with loopback(count) as cluster:
                made = run(problem, data, home / f"ray-{count}", "ray", blocks)
                require_equal(f"A cluster of {count} nodes", made, expected)
                seconds[f"{count} nodes"] = round_seconds(made)
                spread = run(small, little, home / f"small-ray-{count}", "ray", count)
                require_equal(f"A cluster of {count} nodes", spread, alone)
                overhead = (round_seconds(spread) - round_seconds(alone)) / count
                figures[f"milliseconds a worker and round, {count} nodes"] = 1000 * overhead
                if count == max(nodes):
                    lost = run(problem, data, home / "lost", "ray", blocks, LostNode(cluster))
                    require_equal("A cluster that lost a node", lost, expected)
        figures[f"seconds a round on {MANY} workers, by arithmetic"] = seconds["one process"] / MANY + MANY * overhead
    setting = {
        "sites": problem.sites,
        "rows": problem.rows,
        "features": problem.features,
        "blocks": blocks,
        "heads": "equal in every bit to one process, with a node lost in a round too",
        "arithmetic": f"a round of one process over {MANY}, and the overhead of {MANY} workers; not measured",
        "total_seconds": round(time.perf_counter() - began, 1),
    }
    title = f"One round of {problem.sites} sites x {problem.rows} rows"
    return Measurement(title, seconds, setting, figures, units="figure")


@app.command()
def cluster(
    sites: Annotated[int, typer.Option(min=8)] = 20_000,
    rows: Annotated[int, typer.Option(help="Rows of each site.", min=1)] = 20,
    features: Annotated[int, typer.Option(min=8)] = 64,
    number: Annotated[int, typer.Option("--rounds", min=3)] = 4,
    nodes: Annotated[list[int] | None, typer.Option(help="Nodes on this machine; repeatable.", min=2)] = None,
    blocks: Annotated[int, typer.Option(help="Blocks of sites.", min=1)] = 16,
    as_json: Json = False,
) -> None:
    """Rounds on Ray nodes on this machine against one process, with a node that is lost in a round."""
    require_ray("ray")
    problem = Problem(sites=sites, rows=rows, features=features, rounds=number)
    measure(problem, tuple(sorted(nodes or [2, 4])), blocks).show(as_json=as_json)
