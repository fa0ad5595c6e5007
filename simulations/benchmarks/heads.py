"""Accuracy of heads from one exchange or few, against scikit-learn on all rows pooled."""

import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from fedhead.backbones import Backbone
from fedhead.config import RunConfig
from fedhead.data import Samples
from fedhead.features.store import FeatureStore
from fedhead.simulations.benchmarks.measurement import Json, Measurement, app, timed
from fedhead.simulations.benchmarks.problem import SEED
from fedhead.simulations.benchmarks.time_to_accuracy import digits
from fedhead.simulations.plan import Inputs, make_plan
from fedhead.simulations.simulate import simulate
from fedhead.tasks import make_task

OURS: Mapping[str, Mapping[str, Any]] = {
    "lda": {},
    "lda-gcv on rows of unit length": {"basis": "auto"},
    "lda-gcv on landmarks:1024": {"lift": "landmarks:1024"},
    "ridge on relu:2048": {"lift": "relu:2048"},
    "lift = auto": {"lift": "auto"},
    "pooled-lbfgs, 5 exchanges": {"strategy": {"name": "pooled-lbfgs"}, "rounds": 5},
}
"""Settings of each of ours, beside those of all."""

Rows = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


def peers() -> Iterator[tuple[str, list[Callable[[], Any]]]]:
    """Yield the name of each peer, and its candidates."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import Normalizer, StandardScaler
    from sklearn.svm import SVC

    def with_scaler(scaler: type, make: Callable[[float], Any], strength: float) -> Callable[[], Any]:
        return lambda: make_pipeline(scaler(), make(strength))

    def logistic(strength: float) -> Any:
        return LogisticRegression(C=strength, max_iter=500)

    def machine(strength: float) -> Any:
        return SVC(C=strength)

    yield (
        "scikit-learn's logistic regression, pooled",
        [
            *(with_scaler(StandardScaler, logistic, one) for one in (0.001, 0.01, 0.1)),
            *(with_scaler(Normalizer, logistic, one) for one in (1, 10, 100)),
        ],
    )
    yield (
        "scikit-learn's support vector machine, pooled",
        [with_scaler(scaler, machine, one) for scaler, one in itertools.product((StandardScaler, Normalizer), (1, 10))],
    )


def best_of(candidates: list[Callable[[], Any]], train: Rows, test: Rows) -> float:
    """Return the test accuracy of the candidate that does best on every fifth training row, fitted on all of them."""
    features, labels = train
    out = np.arange(len(labels)) % 5 == 0
    scores = [make().fit(features[~out], labels[~out]).score(features[out], labels[out]) for make in candidates]
    return float(candidates[int(np.argmax(scores))]().fit(features, labels).score(*test))


def rows_of(backbone: Backbone, samples: Samples, classes: tuple[str, ...]) -> Rows:
    """Return features and labels of the readable rows."""
    store = FeatureStore.open(backbone, samples)
    rows = store.readable()
    return store.features.numpy()[rows], make_task("classification", classes).encode(samples)[rows]


def measure(config: RunConfig, train: Samples, test: Samples, only: tuple[str, ...], *, pooled: bool) -> Measurement:
    """Measure ours on simulated sites, and the peers on all rows."""
    seconds: dict[str, float] = {}
    accuracy: dict[str, float] = {}
    for name, settings in OURS.items():
        if only and not any(part in name for part in only):
            continue
        with tempfile.TemporaryDirectory(prefix="fedhead-benchmark-") as folder:
            work = partial(simulate, config.changed(dict(settings)), train, test_data=test, out=Path(folder) / "run")
            seconds[name], result = timed(work)
        accuracy[name] = 100 * float(result.test_accuracy or 0)
        for choice in result.outcome.choices:
            typer.echo(f"{name}: {choice['question']} {choice['taken']}. {choice['reason']}", err=True)
    if pooled:
        plan = make_plan(config, Inputs(train, test_data=test))
        parts = [rows_of(plan.backbone, samples, plan.config.classes) for samples in (train, test)]
        for name, candidates in peers():
            seconds[name], score = timed(partial(best_of, candidates, *parts))
            accuracy[name] = 100 * score
    setting = {
        "backbone": config.backbone,
        "data": train.spec,
        "rows": len(train),
        "sites": config.simulation.sites,
        "partition": config.simulation.partition,
    }
    return Measurement(f"Heads on {train.spec}", seconds, setting, accuracy, "test accuracy, %")


@app.command("heads")
def heads(
    data: Annotated[str, typer.Option(help="Data spec; by default the bundled digits.")] = "",
    test_data: Annotated[str, typer.Option(help="A pooled test set, as a data spec.")] = "",
    backbone: Annotated[str, typer.Option()] = "bundled:glyphnet",
    weights: Annotated[str, typer.Option()] = "default",
    sites: Annotated[int, typer.Option(min=1)] = 10,
    partition: Annotated[str, typer.Option()] = "dirichlet:0.3",
    only: Annotated[str, typer.Option(help="Parts of the names of ours to measure, separated by commas.")] = "",
    pooled: Annotated[bool, typer.Option(help="Fit scikit-learn on all rows, too.")] = True,
    as_json: Json = False,
) -> None:
    """Test accuracy of each head from one exchange or few, and of scikit-learn on all rows pooled."""
    from fedhead.data import load_samples

    train, test = (load_samples(data), load_samples(test_data)) if data and test_data else digits()
    torch.set_num_threads(1)
    config = RunConfig(
        backbone=backbone,
        weights=weights,
        rounds=0,
        seed=SEED,
        diagnose=False,
        simulation={"sites": sites, "partition": partition, "min_class_count": 0, "min_rows": 0, "device": "cpu"},
    )
    measure(config, train, test, tuple(filter(None, only.split(","))), pooled=pooled).show(as_json=as_json)
