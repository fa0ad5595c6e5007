"""`scaling`: how the time of a round grows with sites, their rows, and features."""

import gc
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import typer

from fedhead.simulations.benchmarks.measurement import Json, Measurement, Repeats, app
from fedhead.simulations.benchmarks.problem import CLASSES, Problem, own_home

SITES = (10, 100, 1_000, 10_000)
ROWS = (10, 50, 200, 500, 2_000)
FEATURES = (64, 256, 512, 1_024, 2_048)


def round_seconds(problem: Problem, repeats: int) -> float:
    """Return the least seconds of a round but the first, of a run through `simulate()`."""
    with own_home() as home:
        samples = problem.samples()
        seconds = []
        for number in range(repeats):
            result = problem.simulate(samples, home / f"run-{number}")
            seconds += [line.seconds for line in result.history[2:]]
    gc.collect()
    return min(seconds)


def growth(sizes: list[int], seconds: list[float]) -> float:
    """Return the exponent `p` of `seconds ~ sizes ** p`, fitted by least squares in logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def measure(base: Problem, sweeps: dict[str, tuple[int, ...]], repeats: int) -> Measurement:
    """Time rounds of `base` with one size after the other swept; sizes are named as in `Problem`."""
    seconds: dict[str, float] = {}
    exponents: dict[str, float] = {}
    for name, sizes in sweeps.items():
        taken = []
        for size in sizes:
            changes: dict[str, Any] = {name: size}
            taken.append(round_seconds(replace(base, **changes), repeats))
            seconds[f"{size} {name}"] = taken[-1]
        exponents[f"growth with {name}"] = growth(list(sizes), taken)
    setting = {
        "sites": base.sites,
        "rows": base.rows,
        "features": base.features,
        "classes": CLASSES,
        "batch_size": base.batch_size,
        "peak_memory_GiB": _peak_memory(),
    }
    return Measurement("One round of FedAvg, all sites in it", seconds, setting, exponents, units="exponent")


def _peak_memory() -> float:
    # Windows has no such module.
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


@app.command()
def scaling(
    most_sites: Annotated[int, typer.Option(help="Leave larger numbers of sites out.")] = max(SITES),
    repeats: Repeats = 1,
    as_json: Json = False,
) -> None:
    """Growth of a round with sites (10 to 10,000), rows (10 to 2,000) and features (64 to 2,048)."""
    sweeps = {
        "sites": tuple(size for size in SITES if size <= most_sites),
        "rows": ROWS,
        "features": FEATURES,
    }
    # Enough rounds for one of them to be undisturbed.
    measure(Problem(sites=20, rounds=6), sweeps, repeats).show(as_json=as_json)
