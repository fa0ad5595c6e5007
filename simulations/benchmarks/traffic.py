"""`traffic`: the bytes that travel for each site, ours and of the usual ways."""

from typing import Annotated

import typer

from fedhead.config import RunConfig
from fedhead.simulations.benchmarks.measurement import OURS, Json, Measurement, app, timed
from fedhead.simulations.benchmarks.problem import own_home
from fedhead.simulations.result import RunResult
from fedhead.simulations.simulate import simulate


def measure(config: RunConfig) -> Measurement:
    """Count the bytes of `config` with one exchange of statistics, with rounds from zeros, and of whole models."""
    with own_home() as home:
        ours = config.changed({"rounds": 0, "init": "lda"})
        seconds, one_exchange = timed(lambda: simulate(ours, out=home / "one-exchange"))
        heads = simulate(config.changed({"init": "zeros"}), out=home / "heads")
    per_site = {
        OURS: _per_site(one_exchange),
        "head-only FedAvg": _per_site(heads),
        "full-model FedAvg": heads.outcome.full_model_bytes / len(heads.outcome.participants),
    }
    setting = {
        "backbone": config.backbone,
        "data": config.simulation.data,
        "sites": len(heads.outcome.participants),
        "rounds": config.rounds,
        "bytes_per_site": {name: round(value) for name, value in per_site.items()},
        "accuracy": {OURS: one_exchange.accuracy, "head-only FedAvg": heads.accuracy_after_rounds},
    }
    ratio = {name: value / per_site[OURS] for name, value in per_site.items() if name != OURS}
    return Measurement("Bytes to and from each site", {OURS: seconds}, setting, ratio)


def _per_site(result: RunResult) -> float:
    return (result.bytes_down + result.bytes_up) / len(result.outcome.participants)


@app.command()
def traffic(
    backbone: Annotated[str, typer.Option()] = "bundled:glyphnet",
    weights: Annotated[str, typer.Option()] = "default",
    data: Annotated[str, typer.Option()] = "digits",
    sites: Annotated[int, typer.Option(min=1)] = 10,
    number: Annotated[int, typer.Option("--rounds", min=1)] = 20,
    as_json: Json = False,
) -> None:
    """Bytes for each site: one exchange of sums, head-only FedAvg, full-model FedAvg; the backbone where it is sent."""
    config = RunConfig(
        backbone=backbone,
        weights=weights,
        rounds=number,
        diagnose=False,
        keep_sums="none",
        simulation={"data": data, "sites": sites, "min_class_count": 0, "min_rows": 0},
    )
    measure(config).show(as_json=as_json)
