"""The simulation that a Flower user would write: one `ClientApp`, `FedAvg.start`, Flower's Ray engine.

Here because client code must be in an importable module: code in `__main__` is pickled anew for every message.
"""

import logging
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn
from torch.nn import functional

from fedhead.client.minibatches import shuffled
from fedhead.simulations.benchmarks.problem import SEED, Head, Tables

FEATURES, LABELS, NAMES = "features.npy", "labels.npy", "names.npy"

app = ClientApp()


@cache
def load_site(folder: str, site: int) -> tuple[str, Tensor, Tensor]:
    """Return a site's name, features `[n, d]` and labels `[n]`, once per process."""
    features = np.load(Path(folder) / FEATURES, mmap_mode="r")[site]
    labels = np.load(Path(folder) / LABELS, mmap_mode="r")[site]
    name = str(np.load(Path(folder) / NAMES, mmap_mode="r")[site])
    return name, torch.from_numpy(np.array(features)), torch.from_numpy(np.array(labels))


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train a linear head for one epoch of minibatches."""
    config = message.content.config_records["config"]
    name, features, labels = load_site(str(config["folder"]), int(str(context.node_config["partition-id"])))
    model = nn.Linear(features.shape[1], int(str(config["classes"])))
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=float(str(config["lr"])))
    order = torch.from_numpy(shuffled(SEED, name, int(str(config["server-round"])), 0, len(labels)))
    total = 0.0
    for batch in torch.split(order, int(str(config["batch-size"]))):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(features[batch]), labels[batch])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total += loss.item() * len(batch)
    metrics = MetricRecord({"num-examples": len(labels), "train_loss": total / len(labels)})
    reply = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(reply, reply_to=message)


def run_on_ray(tables: Tables, folder: Path) -> tuple[Head, float]:
    """Run the problem; return the head, and the seconds without Ray's start and stop."""
    from flwr.simulation import run_simulation

    np.save(folder / FEATURES, tables.features.numpy())
    np.save(folder / LABELS, tables.labels.numpy())
    np.save(folder / NAMES, np.array(tables.names))
    problem = tables.problem
    classes = int(tables.labels.max()) + 1
    config = ConfigRecord(
        {"folder": str(folder), "classes": classes, "lr": problem.lr, "batch-size": problem.batch_size}
    )
    first = {
        "weight": np.zeros((classes, problem.features), np.float32),
        "bias": np.zeros(classes, np.float32),
    }
    made: list[tuple[dict[str, Tensor], float]] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        started = time.perf_counter()
        # All sites are to be there before the first round.
        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=problem.sites, min_available_nodes=problem.sites)
        result = strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord({name: Array(value) for name, value in first.items()}),
            train_config=config,
            num_rounds=problem.rounds,
        )
        made.append((dict(result.arrays.to_torch_state_dict()), time.perf_counter() - started))

    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        run_simulation(
            server, app, problem.sites, backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
        )
    finally:
        logger.setLevel(level)
    ((state, seconds),) = made
    return (state["weight"], state["bias"]), seconds
