"""`tuning`: rounds that train layers on stored activations, against running the frozen layers for every batch.

The usual loop is timed as plain PyTorch without any framework around it: one whole backbone, whose frozen part runs
without gradients, one site after another, no messages. Both times are processor seconds of one thread, so that other
programs on the machine change the ratio little. Reading and preprocessing of images is left out of both.
"""

import copy
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional

from fedhead.backbones import Backbone, load_backbone
from fedhead.backbones.adapters import add_adapters
from fedhead.backbones.pooling import pool
from fedhead.backbones.preprocessing import Batch
from fedhead.backbones.split import Tail, split
from fedhead.client.averaging import average_heads
from fedhead.client.labelled_features import SiteRows
from fedhead.client.minibatches import shuffled
from fedhead.client.tails import LabelledActivations
from fedhead.config import LocalConfig, RunConfig
from fedhead.data import Samples, load_samples, samples_from_arrays
from fedhead.errors import FedheadError, UserError
from fedhead.features.boundary import BoundaryStore, Kind
from fedhead.heads import LinearHead, TunedHead
from fedhead.heads.tail import TAIL
from fedhead.protocol.messages import local_settings
from fedhead.simulations.benchmarks.measurement import OURS, Json, Measurement, Repeats, app
from fedhead.simulations.benchmarks.problem import SEED
from fedhead.tasks.losses import CrossEntropy
from fedhead.tuning import parse_tune

CLASSES = 10
SIDE = 224
ROUND = 1
TOLERANCE = 1e-3
"""Largest difference of the parameters after steps of SGD on float32 activations, relative to their change."""
AFTER_ADAMW = 0.2
"""The same after steps of AdamW on activations as stored.

Its first steps have the size of the learning rate even where rounding decides a gradient's sign.
"""
CHECKED = 2
"""Sites of the check by SGD."""
USUAL = "usual loop"
FROZEN = "frozen part of the usual loop"

Parameters = Mapping[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """One round of tail training at simulated sites.

    Attributes:
        backbone: the whole.
        tune: what trains, as in `tune.layers`.
        samples: images with labels.
        sites: their rows.
        local: optimiser and batches.
    """

    backbone: Backbone
    tune: str
    samples: Samples
    sites: Sequence[SiteRows]
    local: LocalConfig

    def head(self, tail: Tail) -> TunedHead:
        """Return the head that the round starts from, on the tail."""
        head = LinearHead(self.backbone.num_features, len(self.samples.classes))
        head.randomise(torch.Generator().manual_seed(SEED))
        return TunedHead(tail, head, sequences=self.backbone.kind == "text")

    def batch(self, rows: np.ndarray[Any, Any]) -> Batch:
        """Read and preprocess rows."""
        made = [self.backbone.preprocessing(self.samples.read(int(row))) for row in rows]
        return self.backbone.preprocessing.collate(made)


class Stored:
    """A tail with the activations before it, of all rows of a data set."""

    def __init__(self, backbone: Backbone, tune: str, samples: Samples, root: Path, number: Kind | None = None) -> None:
        self.trunk, self.tail = split(backbone, parse_tune(tune))
        started = time.process_time()
        self.store = BoundaryStore.open(
            self.trunk, self.tail, samples, np.arange(len(samples)), root=root, number=number
        )
        self.seconds = time.process_time() - started

    def round(self, problem: Problem) -> Parameters:
        """Train at all sites as a run does, and return the mean."""
        labels = torch.from_numpy(problem.samples.labels)
        data = LabelledActivations(torch.zeros(len(labels), 1), labels, loss=CrossEntropy(), store=self.store)
        head = problem.head(self.tail)
        averaged, _ = average_heads(
            head, head.trainable(), data, problem.sites, problem.local, seed=SEED, round_number=ROUND
        )
        return averaged.parameters

    def frozen(self, problem: Problem) -> float:
        """Return the processor seconds that the usual loop spends in the frozen part: the most that storing saves."""
        seconds = 0.0
        for site in problem.sites:
            for start in range(0, len(site.rows), problem.local.batch_size):
                batch = problem.batch(site.rows[start : start + problem.local.batch_size])
                started = time.process_time()
                self.trunk.boundary(batch)
                seconds += time.process_time() - started
        return seconds


class Whole:
    """The unfrozen model of the usual loop: the whole backbone, in which the tail's parameters train."""

    def __init__(self, problem: Problem, tail: Tail) -> None:
        module = copy.deepcopy(problem.backbone.module).eval().requires_grad_(False)
        # A tail of a model of transformers lies inside the backbone's module.
        prefix = tail.prefix.removeprefix("module.")
        if tail.tune.method == "lora":
            layers = {f"{prefix}{name.partition('.lora_')[0]}" for name in tail.adapters()}
            add_adapters(module, layers, tail.tune.rank, frozen_first=tail.tune.variant == "ffa", seed=SEED)
        self.module, self.pooling = module, problem.backbone.pooling
        named = dict(module.named_parameters())
        self.unfrozen = {name: named[f"{prefix}{name}"].requires_grad_() for name in tail.trainable()}
        self.head = nn.Linear(problem.backbone.num_features, len(problem.samples.classes))

    def trained(self) -> dict[str, Tensor]:
        """Return the parameters that train, by the names of ours."""
        head = {f"head.{name}": value for name, value in self.head.named_parameters()}
        return {**head, **{f"{TAIL}{name}": value for name, value in self.unfrozen.items()}}

    def loss(self, batch: Batch, labels: Tensor) -> Tensor:
        """Return the mean cross entropy."""
        mask = None if isinstance(batch, Tensor) else batch["attention_mask"]
        output = self.module(batch) if isinstance(batch, Tensor) else self.module(**batch)
        return functional.cross_entropy(self.head(pool(output, self.pooling, mask)), labels)


def usual_loop(problem: Problem, tail: Tail) -> tuple[float, Parameters]:
    """Train one site after the other with `torch.optim`; return processor seconds, and the mean of all sites."""
    model = Whole(problem, tail)
    trained, incoming = model.trained(), problem.head(tail).trainable()
    total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in incoming.items()}
    labels = torch.from_numpy(problem.samples.labels)
    seconds, rows = 0.0, sum(len(site.rows) for site in problem.sites)
    for site in problem.sites:
        order = torch.from_numpy(shuffled(SEED, site.name, ROUND, 0, len(site.rows)))
        started = time.process_time()
        with torch.no_grad():
            for name, value in trained.items():
                value.copy_(incoming[name])
        every, decay = trained.values(), problem.local.weight_decay
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(every, lr=problem.local.lr, weight_decay=decay)
        if problem.local.optimizer == "sgd":
            optimizer = torch.optim.SGD(every, lr=problem.local.lr, weight_decay=decay)
        seconds += time.process_time() - started
        for places in torch.split(order, problem.local.batch_size):
            chosen = site.rows[places.numpy()]
            batch = problem.batch(chosen)
            started = time.process_time()
            optimizer.zero_grad()
            model.loss(batch, labels[torch.from_numpy(chosen)]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            seconds += time.process_time() - started
        started = time.process_time()
        for name, value in trained.items():
            total[name] += value.detach().double() * (len(site.rows) / rows)
        seconds += time.process_time() - started
    return seconds, {name: value.float() for name, value in total.items()}


def difference(ours: Parameters, other: Parameters, incoming: Parameters, most: float) -> float:
    """Return the distance of `ours` from `other`, relative to the distance of `other` from `incoming`.

    Raises:
        FedheadError: if it is more than `most`, or parameters have other names or shapes.
    """
    shapes = [{name: value.shape for name, value in some.items()} for some in (ours, other, incoming)]
    if not shapes[0] == shapes[1] == shapes[2]:
        raise FedheadError("The parameters that are compared have other names or shapes.")
    apart, moved = (
        torch.cat([(one[name] - other[name]).flatten() for name in other]).norm() for one in (ours, incoming)
    )
    found = float(apart / moved)
    if not found <= most:
        raise FedheadError(f"The parameters differ by {found:.1e} of their change; expected at most {most}.")
    return found


def processor_seconds(work: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Return the least processor seconds of `work`, and its last result."""
    least, made = float("inf"), None
    for _ in range(repeats):
        started = time.process_time()
        made = work()
        least = min(least, time.process_time() - started)
    return least, made


def measure(
    backbone: Backbone,
    samples: Samples,
    sizes: Sequence[int],
    rows: int,
    batch_size: int,
    choices: Sequence[str],
    repeats: int,
) -> Measurement:
    """Time one round at each number of sites, and check that both ways give the same parameters.

    Args:
        backbone: the whole.
        samples: at least `rows` for each of the most sites.
        sizes: numbers of sites.
        rows: of each site.
        batch_size: rows per step.
        choices: what trains.
        repeats: how often ours is timed.

    Raises:
        FedheadError: if the parameters differ.
    """
    seconds: dict[str, float] = {}
    ratio: dict[str, float] = {}
    differences: dict[str, float] = {}
    for tune in choices:
        run = RunConfig(tune={"layers": tune, "batch_size": batch_size})
        everyone = [SiteRows(f"site-{site}", np.arange(site * rows, (site + 1) * rows)) for site in range(max(sizes))]
        problem = Problem(backbone, tune, samples, everyone, local_settings(run, backbone))
        with tempfile.TemporaryDirectory(prefix="fedhead-benchmark-") as folder:
            stored = Stored(backbone, tune, samples, Path(folder))
            differences[f"{tune}, SGD"] = check(replace(problem, sites=everyone[:CHECKED]), Path(folder))
            for count in sizes:
                name, some = f"{tune}, {count} sites", replace(problem, sites=everyone[:count])
                ours, made = processor_seconds(partial(stored.round, some), repeats)
                usual, other = usual_loop(some, stored.tail)
                incoming = problem.head(stored.tail).trainable()
                differences[name] = difference(made, other, incoming, AFTER_ADAMW)
                seconds |= {f"{name}: {OURS}": ours, f"{name}: {USUAL}": usual}
                ratio[f"{name}: {USUAL}"] = usual / ours
                frozen = stored.frozen(some)
                seconds[f"{name}: {FROZEN}"] = frozen
                ratio[f"{name}: {USUAL} without its frozen part"] = (usual - frozen) / ours
            seconds[f"{tune}: storing activations, once"] = stored.seconds
    setting = {
        "backbone": backbone.spec,
        "data": samples.spec,
        "rows": rows,
        "batch_size": batch_size,
        "difference": {name: float(f"{value:.2g}") for name, value in differences.items()},
    }
    return Measurement("One round of tail training (processor seconds)", seconds, setting, ratio)


def check(problem: Problem, root: Path) -> float:
    """Return the difference of ours from the usual loop after steps of SGD, on float32 activations.

    Raises:
        FedheadError: if it is more than rounding.
    """
    rows = 1 + max(int(site.rows.max()) for site in problem.sites)
    few = replace(problem.samples, labels=problem.samples.labels[:rows], fingerprint=f"first {rows} pictures")
    exact = replace(problem, samples=few, local=problem.local.model_copy(update={"optimizer": "sgd"}))
    stored = Stored(problem.backbone, problem.tune, few, root, "float32")
    _, other = usual_loop(exact, stored.tail)
    return difference(stored.round(exact), other, problem.head(stored.tail).trainable(), TOLERANCE)


def pictures(rows: int) -> Samples:
    """Return smooth coloured pictures of random classes."""
    generator = np.random.default_rng(SEED)
    coarse = torch.from_numpy(generator.random((rows, 3, 7, 7), dtype=np.float32))
    images = [
        functional.interpolate(one[None], (SIDE, SIDE), mode="bicubic")[0].permute(1, 2, 0).clamp(0, 1) * 255
        for one in coarse
    ]
    arrays = np.stack([image.numpy().astype(np.uint8) for image in images])
    labels = generator.integers(0, CLASSES, rows)
    return samples_from_arrays(arrays, labels, classes=[str(one) for one in range(CLASSES)], spec="generated pictures")


@app.command("tuning")
def tuning(
    backbone: Annotated[str, typer.Option()] = "torchvision:squeezenet1_1",
    data: Annotated[str, typer.Option(help="A data spec; generated pictures by default.")] = "",
    weights: Annotated[str, typer.Option(help="'random' does as well as any, for time.")] = "random",
    only: Annotated[str, typer.Option(help="What to tune, separated by commas.")] = "last:1,lora:8",
    sites: Annotated[str, typer.Option(help="Numbers of sites, separated by commas.")] = "10,100",
    rows: Annotated[int, typer.Option(help="Rows of each site.", min=1)] = 16,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    repeats: Repeats = 1,
    as_json: Json = False,
) -> None:
    """A round of tail training on stored activations, against running the frozen layers for every batch."""
    if not all(one.isdecimal() and int(one) for one in sites.split(",")):
        raise UserError(f"The numbers of sites are separated by commas, as in '10,100', not {sites!r}.")
    torch.set_num_threads(1)
    sizes = sorted({int(one) for one in sites.split(",")})
    most = sizes[-1] * rows
    model = load_backbone(backbone, weights="default" if backbone.startswith("hf:") else weights)
    samples = load_samples(data) if data else pictures(most)
    if len(samples) < most:
        raise UserError(f"{sizes[-1]} sites of {rows} rows are {most} rows, and {data} has {len(samples)}.")
    measure(model, samples, sizes, rows, batch_size, only.split(","), repeats).show(as_json=as_json)
