"""`privacy`: the test accuracy of differentially private heads by epsilon, beside the head without noise."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fedhead.config import RunConfig
from fedhead.data import Samples, load_samples
from fedhead.simulations.benchmarks.measurement import Json, app, machine
from fedhead.simulations.benchmarks.problem import SEED, own_home
from fedhead.simulations.benchmarks.time_to_accuracy import digits
from fedhead.simulations.simulate import simulate


def accuracies(
    config: RunConfig, train: Samples, rows: int, test: Samples, epsilons: Sequence[float], repeats: int
) -> Mapping[str, list[float]]:
    """Return the test accuracy of each repetition, by epsilon; `none` for the exact head.

    Nothing is held out or evaluated, so that all rows train, and nothing is chosen by the test set. The rows are drawn
    at random and divided evenly over the sites, which decides nothing: sums add.
    """
    drawn = np.random.default_rng(SEED).permutation(len(train))[:rows]
    sites = np.array_split(drawn, config.simulation.sites)
    found: dict[str, list[float]] = {}
    with own_home() as home:
        for number, epsilon in enumerate([0.0, *epsilons]):
            own = config.changed({"holdout": 0.0, "privacy": {"epsilon": epsilon, "evaluate": 0.0}})
            scores = []
            for repetition in range(repeats if epsilon else 1):
                result = simulate(own, train, sites, test_data=test, out=home / f"run-{number}-{repetition}")
                assert result.test_accuracy is not None
                scores.append(result.test_accuracy)
            found[f"{epsilon:g}" if epsilon else "none"] = scores
    return found


@app.command("privacy")
def privacy(
    data: Annotated[str, typer.Option(help="Training data, as a data spec; by default four fifths of digits.")] = "",
    test_data: Annotated[str, typer.Option(help="A pooled test set, as a data spec.")] = "",
    backbone: Annotated[str, typer.Option()] = "bundled:glyphnet",
    weights: Annotated[str, typer.Option()] = "default",
    rows: Annotated[int, typer.Option(help="Rows to train on, drawn at random; 0 for all.")] = 0,
    sites: Annotated[int, typer.Option(min=1)] = 20,
    noise: Annotated[str, typer.Option(help="'shared' or 'own'.")] = "shared",
    repeats: Annotated[int, typer.Option(min=1, help="Runs with fresh noise for each epsilon.")] = 5,
    epsilons: Annotated[str, typer.Option(help="Values of epsilon.")] = "0.5,1,3,8",
    as_json: Json = False,
) -> None:
    """Test accuracy of differentially private heads by epsilon; mean and range over fresh noise."""
    train, test = (load_samples(data), load_samples(test_data)) if data and test_data else digits()
    config = RunConfig(
        backbone=backbone,
        weights=weights,
        rounds=0,
        diagnose=False,
        keep_sums="total",
        privacy={"noise": noise},
        simulation={"sites": sites, "min_class_count": 0, "min_rows": 0, "device": "cpu"},
    )
    count = min(rows or len(train), len(train))
    found = accuracies(config, train, count, test, [float(one) for one in epsilons.split(",")], repeats)
    setting = {"data": train.spec, "rows": count, "classes": len(train.classes), "noise": noise, **machine()}
    if as_json:
        typer.echo(json.dumps({"accuracy": found, "setting": setting}))
        return
    console = Console(markup=False, emoji=False, highlight=False)
    table = Table(
        title=f"Test accuracy of private heads, {count} rows",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for column in ("epsilon", "mean", "least", "largest", "runs"):
        table.add_column(column, justify="right")
    for name, scores in found.items():
        figures = (f"{100 * value:.1f} %" for value in (np.mean(scores), min(scores), max(scores)))
        table.add_row(name, *figures, str(len(scores)))
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in setting.items()))
