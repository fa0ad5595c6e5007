"""`tuning-accuracy`: the solved head, and layers or adapters of the backbone that train from it on."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from fedhead.config import RunConfig
from fedhead.data import Samples, load_samples
from fedhead.errors import UserError
from fedhead.evaluation.metrics import wilson_interval
from fedhead.simulations.benchmarks.measurement import Json, Measurement, app
from fedhead.simulations.benchmarks.pictures import cut_out, negative, spectrograms, spread
from fedhead.simulations.benchmarks.problem import SEED
from fedhead.simulations.benchmarks.time_to_accuracy import digits
from fedhead.simulations.result import RunResult
from fedhead.simulations.simulate import simulate
from fedhead.tuning import OBJECTIVES

SOLVED = "head"
PROGRESSIVE = "progressive"
CHOICES = (SOLVED, "last:1", "last:2", "last:4", "bitfit", "lora:8", PROGRESSIVE)
"""What trains, as in the setting `tune.layers`; the head alone is solved, and not trained."""


def tuned_by(name: str, config: RunConfig) -> dict[str, Any]:
    """Return the changes to the settings for a choice, such as `last:2` or `supcon:last:2` with its objective.

    The layers of `progressive` are the last four, one by one.
    """
    if name == SOLVED:
        return {"rounds": 0}
    if name != PROGRESSIVE:
        first, _, rest = name.partition(":")
        return {"tune": {"layers": rest, "objective": first} if first in OBJECTIVES else {"layers": name}}
    starts = {1 + config.rounds * stage // 4: f"last:{stage + 1}" for stage in range(4)}
    return {"tune": {"schedule": starts, "decay": 2.6}}


def figures_of(result: RunResult, tested: int) -> dict[str, Any]:
    """Return the figures of a run: accuracies on the test set with the 95 % interval, the kept head, and its cost."""
    accuracy = float(result.test_accuracy or 0)
    right = np.array([round(accuracy * tested)])
    low, high = wilson_interval(right, np.array([tested]))
    last = result.score_after_rounds
    return {
        "accuracy": accuracy,
        "interval": [float(low[0]), float(high[0])],
        "accuracy_last_round": last,
        "kept": result.record.kept or "solved",
        "kept_round": result.outcome.kept_round,
        "trainable_parameters": result.record.trainable_parameters or 0,
        "bytes_up_a_site": round(result.bytes_up / max(len(result.outcome.participants), 1)),
        "reason": str(result.outcome.choices[-1]["reason"]) if result.outcome.choices else "",
    }


def shown(figures: dict[str, Any]) -> dict[str, str]:
    """Return the columns of the table."""
    low, high = (100 * end for end in figures["interval"])
    last = figures["accuracy_last_round"]
    return {
        "95 %": f"{low:.1f} to {high:.1f}",
        "last round": "" if last is None else f"{100 * last:.1f}",
        "delivered": figures["kept"],
        "MB up": f"{figures['bytes_up_a_site'] / 1e6:.2f}",
    }


def measure(config: RunConfig, train: Samples, test: Samples, choices: Sequence[str] = CHOICES) -> Measurement:
    """Run each choice on the same simulated sites, all delivered by the same rule."""
    seconds: dict[str, float] = {}
    figures: dict[str, dict[str, Any]] = {}
    for name in choices:
        with tempfile.TemporaryDirectory(prefix="fedhead-benchmark-") as folder:
            run, out = config.changed(tuned_by(name, config)), Path(folder) / "run"
            result = simulate(run, train, test_data=test, out=out)
        # Extraction is left out: runs that are cut at the same layer share it.
        seconds[name] = result.seconds["rounds"]
        figures[name] = figures_of(result, len(test))
        typer.echo(f"{name}: {100 * figures[name]['accuracy']:.1f} %. {figures[name]['reason']}", err=True)
    setting = {
        "backbone": config.backbone,
        "data": train.spec,
        "rows": len(train),
        "tested": len(test),
        "sites": config.simulation.sites,
        "partition": config.simulation.partition,
        "rounds": config.rounds,
        "runs": figures,
    }
    accuracy = {name: 100 * one["accuracy"] for name, one in figures.items()}
    columns = {name: shown(one) for name, one in figures.items()}
    title = f"Tuning on {train.spec}"
    return Measurement(title, seconds, setting, accuracy, "test accuracy, %", columns=columns)


@app.command("tuning-accuracy")
def tuning_accuracy(
    data: Annotated[str, typer.Option(help="Data spec; by default the bundled digits.")] = "",
    test_data: Annotated[str, typer.Option(help="A pooled test set, as a data spec.")] = "",
    backbone: Annotated[str, typer.Option()] = "bundled:glyphnet",
    weights: Annotated[str, typer.Option()] = "default",
    only: Annotated[str, typer.Option(help="What to tune, as in last:2,supcon:last:2.")] = ",".join(CHOICES),
    sites: Annotated[int, typer.Option(min=1)] = 10,
    partition: Annotated[str, typer.Option()] = "dirichlet:0.3",
    number: Annotated[int, typer.Option("--rounds", min=1)] = 10,
    rows: Annotated[int, typer.Option(help="Training rows, spread evenly over the data; 0 for all.", min=0)] = 0,
    negatives: Annotated[bool, typer.Option("--negative", help="Make grey negatives of all images.")] = False,
    sounds: Annotated[bool, typer.Option("--spectrograms", help="Make pictures of all sounds.")] = False,
    objects: Annotated[bool, typer.Option("--cut-out", help="Cut annotated objects out of all images.")] = False,
    seed: Annotated[int, typer.Option(help="Of the partition.", min=0)] = SEED,
    as_json: Json = False,
) -> None:
    """Test accuracy of the solved head and of tuned layers, what held-out rows kept, and its cost."""
    if bool(data) != bool(test_data):
        raise UserError("Give both --data and --test-data, or neither for the bundled digits.")
    train, test = (load_samples(data), load_samples(test_data)) if data else digits()
    if objects:
        train, test = cut_out(train), cut_out(test)
    train = spread(train, rows)
    for asked, seen in ((negatives, negative), (sounds, spectrograms)):
        if asked:
            train, test = seen(train), seen(test)
    torch.set_num_threads(1)
    config = RunConfig(
        backbone=backbone,
        weights=weights,
        rounds=number,
        seed=seed,
        diagnose=False,
        simulation={"sites": sites, "partition": partition, "min_class_count": 0, "min_rows": 0, "device": "cpu"},
    )
    measure(config, train, test, only.split(",")).show(as_json=as_json)
