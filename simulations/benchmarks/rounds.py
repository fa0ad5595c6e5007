"""`rounds`: FedAvg over many small sites, ours through `simulate()` against the others."""

import tempfile
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional

from fedhead.simulations.benchmarks.measurement import OURS, Json, Measurement, Repeats, app, missing, timed
from fedhead.simulations.benchmarks.problem import CLASSES, Head, Problem, Tables, own_home


def batched_product(tables: Tables) -> Head:
    """Train all sites' heads in one batched product a step, and nothing else."""
    problem = tables.problem
    sites, rows, width = tables.features.shape
    weight, bias = torch.zeros(CLASSES, width), torch.zeros(CLASSES)
    features, labels = tables.features.reshape(-1, width), tables.labels.reshape(-1)
    starts = torch.arange(sites)[:, None] * rows
    with torch.no_grad():
        for number in range(1, problem.rounds + 1):
            order = torch.from_numpy(np.stack([tables.order(site, number) for site in range(sites)])) + starts
            weights, biases = weight.repeat(sites, 1, 1), bias.repeat(sites, 1)
            for batch in torch.split(order, problem.batch_size, dim=1):
                x = features[batch.reshape(-1)].view(sites, -1, width)
                y = labels[batch.reshape(-1)].view(sites, 1, -1)
                slopes = torch.baddbmm(biases[..., None], weights, x.mT).softmax(1)
                slopes.scatter_add_(1, y, torch.full_like(slopes[:, :1], -1.0))
                slopes *= problem.lr / batch.shape[1]
                torch.baddbmm(weights, slopes, x, alpha=-1, out=weights)
                biases -= slopes.sum(2)
            weight, bias = weights.mean(0), biases.mean(0)
    return weight, bias


def plain_loop(tables: Tables) -> Head:
    """Train one site after the other with `torch.optim`, in one process without messages."""
    problem = tables.problem
    head = {"weight": torch.zeros(CLASSES, problem.features), "bias": torch.zeros(CLASSES)}
    for number in range(1, problem.rounds + 1):
        total = {name: torch.zeros_like(value) for name, value in head.items()}
        for site in range(problem.sites):
            model = nn.Linear(problem.features, CLASSES)
            model.load_state_dict(head)
            optimizer = torch.optim.SGD(model.parameters(), lr=problem.lr)
            for batch in torch.split(torch.from_numpy(tables.order(site, number)), problem.batch_size):
                optimizer.zero_grad()
                logits = model(tables.features[site, batch])
                loss = functional.cross_entropy(logits, tables.labels[site, batch])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            for name, value in model.state_dict().items():
                total[name] += value
        head = {name: value / problem.sites for name, value in total.items()}
    return head["weight"], head["bias"]


class PflHead(nn.Linear):
    """The head as pfl wants a model: with `loss` and `metrics`."""

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross entropy."""
        return functional.cross_entropy(self(features), labels)

    def metrics(self, features: Tensor, labels: Tensor) -> dict[str, Any]:
        """Report nothing."""
        return {}


def with_pfl(tables: Tables) -> Head:
    """Train with Apple's pfl, its simulated backend and its federated averaging."""
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.model.pytorch import PyTorchModel

    problem = tables.problem
    model = PflHead(problem.features, CLASSES)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    seen: Counter[int] = Counter()

    def make_dataset(site: int) -> Any:
        seen[site] += 1
        order = torch.from_numpy(tables.order(site, seen[site]))
        return Dataset((tables.features[site, order], tables.labels[site, order]), user_id=site)

    data = FederatedDataset(make_dataset, get_user_sampler("minimize_reuse", list(range(problem.sites))))
    FederatedAveraging().run(
        backend=SimulatedBackend(training_data=data, val_data=data),
        model=PyTorchModel(
            model,
            local_optimizer_create=torch.optim.SGD,
            central_optimizer=torch.optim.SGD(model.parameters(), 1.0),
        ),
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=problem.rounds,
            evaluation_frequency=problem.rounds + 1,
            train_cohort_size=problem.sites,
            val_cohort_size=None,
        ),
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=problem.lr, local_batch_size=problem.batch_size
        ),
        callbacks=[],
        send_metrics_to_platform=False,
    )
    return model.weight.detach(), model.bias.detach()


def measure(problem: Problem, repeats: int, *, ray: bool, peers: bool) -> Measurement:
    """Measure `problem` with everything that is installed, and check that all heads are one.

    Args:
        problem: the data and the settings.
        repeats: how often the quick ones are timed.
        ray: whether Flower's Ray engine is to take part.
        peers: whether pfl and the plain loop are to.
    """
    seconds: dict[str, float] = {}
    left_out: dict[str, str] = {}
    setting = {
        "sites": problem.sites,
        "rows": problem.rows,
        "features": problem.features,
        "classes": CLASSES,
        "rounds": problem.rounds,
        "batch_size": problem.batch_size,
    }
    with own_home() as home:
        samples = problem.samples()
        tables = problem.tables(samples)
        numbers = iter(range(repeats))
        seconds[OURS], result = timed(lambda: problem.simulate(samples, home / f"run-{next(numbers)}"), repeats)
        seconds["batched product"], head = timed(lambda: batched_product(tables), repeats)
        tables.check("The batched product", head, result)
        if peers:
            seconds["PyTorch loop"], head = timed(lambda: plain_loop(tables))
            tables.check("The PyTorch loop", head, result)
            if missing("pfl", "dp_accounting"):
                left_out["pfl"] = "pip install pfl"
            else:
                seconds["pfl"], head = timed(lambda: with_pfl(tables))
                tables.check("pfl", head, result)
        if not ray:
            left_out["flower-ray"] = "not asked for"
        elif missing("ray"):
            left_out["flower-ray"] = "pip install 'fedhead[ray]'"
        else:
            from fedhead.simulations.benchmarks.flower_recipe import run_on_ray

            with tempfile.TemporaryDirectory() as folder:
                seconds["flower-ray"], (head, started) = timed(lambda: run_on_ray(tables, Path(folder)))
            tables.check("Flower's Ray engine", head, result)
            seconds["flower-ray, without its start"] = started
    title = f"{problem.sites} sites x {problem.rows} rows, {problem.rounds} rounds of FedAvg"
    return Measurement.against_ours(title, seconds, setting, left_out)


@app.command()
def rounds(
    sites: Annotated[int, typer.Option(min=1)] = 100,
    rows: Annotated[int, typer.Option(help="Rows of each site.", min=1)] = 50,
    features: Annotated[int, typer.Option(min=8)] = 512,
    number: Annotated[int, typer.Option("--rounds", min=1)] = 20,
    repeats: Repeats = 3,
    ray: Annotated[bool, typer.Option(help="Run Flower's Ray engine too.")] = True,
    peers: Annotated[bool, typer.Option(help="Run pfl and a PyTorch loop too.")] = True,
    as_json: Json = False,
) -> None:
    """FedAvg rounds: ours through simulate() against Flower's Ray engine, pfl, a PyTorch loop, a batched product."""
    problem = Problem(sites=sites, rows=rows, features=features, rounds=number)
    measure(problem, repeats, ray=ray, peers=peers).show(as_json=as_json)
