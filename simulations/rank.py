"""`rank(backbones)`: which backbone fits a task, from one exchange each, without training."""

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy.typing as npt

from fedhead.backbones import Backbone
from fedhead.backbones.split import blocks_of, split
from fedhead.config import RunConfig
from fedhead.data import Samples
from fedhead.errors import UserError
from fedhead.features.activations import time_recomputing
from fedhead.features.store import Progress
from fedhead.simulations.plan import Inputs, Plan, make_plan
from fedhead.simulations.result import RunResult
from fedhead.simulations.simulate import run_plan
from fedhead.solvers import cross_validation_error
from fedhead.solvers.scoring import transferability
from fedhead.tuning import parse_tune

logger = logging.getLogger(__name__)

MOST_CUTS = 4
"""Cuts of a backbone that are shown."""
STORED_BYTES = 2
"""Bytes of a stored activation, float16."""


@dataclass(frozen=True)
class TuningCost:
    """The cost of tuning the last blocks of a backbone.

    Attributes:
        tune: the blocks, as in `tune.layers`.
        parameters: the number of their parameters.
        bytes_per_round: from a site, in one round.
        bytes_per_row: of stored activations of one row, or of one token of a text.
        bytes_stored: of all rows at all sites; None for texts, whose lengths differ.
        seconds_per_row: processor seconds of the frozen layers for a row, which activations that are not stored cost in
            every pass; measured on two small inputs, preprocessing included.
    """

    tune: str
    parameters: int
    bytes_per_round: int
    bytes_per_row: int
    bytes_stored: int | None
    seconds_per_row: float


@dataclass(frozen=True)
class RankedBackbone:
    """The fit of one backbone to the sites' task.

    Attributes:
        backbone: its spec.
        logme: log evidence per row and class (You et al., 2021); larger fits better.
        h_score: between-class scatter in units of the total (Bao et al., 2019); larger fits better. None
            unless every row has one class.
        accuracy: the score of the solved head (of a regression R2) on the pooled held-out rows; None without any.
        accuracy_test: the same on the pooled test set, if there is one.
        num_features: `d`.
        bytes_per_site: payload down and up, the weights included where a site lacks them.
        seconds_extraction: the time for extracting features in this call; little if they were cached.
        rows_extracted: the number of rows whose features were extracted.
        score_name: the name of the score, such as `accuracy`.
        layer: the layer of the features.
        error: generalised cross-validation error of their ridge regression on the classes, from sums alone; smaller
            fits better, and 1 is chance. None unless every row has one class.
        cuts: the cost of tuning its last blocks, if it was asked for and the backbone can be cut.
    """

    backbone: str
    logme: float
    h_score: float | None
    accuracy: float | None
    accuracy_test: float | None
    num_features: int
    bytes_per_site: int
    seconds_extraction: float
    rows_extracted: int
    score_name: str = "accuracy"
    layer: str = "penultimate"
    error: float | None = None
    cuts: tuple[TuningCost, ...] = ()


def rank(
    backbones: Sequence[str],
    config: RunConfig | None = None,
    data: str | Samples | None = None,
    sites: int | Sequence[npt.ArrayLike] | None = None,
    *,
    test_data: str | Samples | None = None,
    layers: Sequence[str] = (),
    tune: bool = False,
    on_backbone: Callable[[str], Progress] = lambda spec: lambda done, total: None,
) -> list[RankedBackbone]:
    """Score backbones by the sites' summed statistics, the best by LogME first; layers, by cross-validation error.

    Args:
        backbones: specs, each perhaps with a weights file, as in `torchvision:resnet18=resnet18.pth`.
        config: of the run that the backbones are for; its rounds are not run.
        data: see `simulate`.
        sites: see `simulate`.
        test_data: see `simulate`.
        layers: of every backbone, or several joined by `+`; by default that of `config`.
        tune: whether to compute the cost of tuning their last blocks.
        on_backbone: called as each one starts; returns a callback for the progress of extraction.

    Raises:
        UserError: if one of them, or the data, does not exist or fit; before anything is extracted.
        FedheadError: if a run fails.
    """
    if not backbones:
        raise UserError("Name one backbone or more to rank, as in: fedhead rank bundled:glyphnet bundled:pixels.")
    given = config or RunConfig()
    inputs = Inputs(data, sites, test_data)
    chosen = itertools.product(backbones, layers or [given.layer])
    # Mistakes are found before anything is extracted.
    plans = [make_plan(_config_for(named, layer, given), inputs) for named, layer in chosen]
    ranked = [
        _ranked(plan, run_plan(plan, deliver=False, on_extraction=on_backbone(plan.backbone.spec)), tune=tune)
        for plan in plans
    ]
    if layers and all(one.error is not None for one in ranked):
        return sorted(ranked, key=lambda one: (one.error, -one.logme))
    return sorted(ranked, key=lambda one: (-one.logme, -(one.h_score or 0.0)))


def _config_for(named: str, layer: str, given: RunConfig) -> RunConfig:
    """Return the run that solves a head on one layer of a backbone, given as `SPEC` or `SPEC=WEIGHTS`."""
    spec, _, weights = named.partition("=")
    changes = {"backbone": spec, "weights": weights or "default", "layer": layer, "rounds": 0, "head": "linear"}
    config = given.changed(changes)
    return config.changed({"init": ""}) if config.init in ("zeros", "random") else config


def _ranked(plan: Plan, result: RunResult, *, tune: bool) -> RankedBackbone:
    stats = result.outcome.statistics
    assert stats is not None
    scores = transferability(stats)
    return RankedBackbone(
        backbone=plan.backbone.spec,
        logme=scores["logme"],
        h_score=scores.get("h_score"),
        accuracy=result.accuracy_held_out,
        accuracy_test=result.test_accuracy,
        num_features=plan.backbone.num_features,
        bytes_per_site=(result.bytes_down + result.bytes_up) // len(result.outcome.participants),
        seconds_extraction=result.seconds["extraction"],
        rows_extracted=result.extracted,
        score_name=result.task.score_name,
        layer=plan.backbone.layer,
        error=cross_validation_error(stats) if stats.kind.exclusive else None,
        cuts=tuning_costs(plan.backbone, len(plan.samples)) if tune else (),
    )


def tuning_costs(backbone: Backbone, rows: int) -> tuple[TuningCost, ...]:
    """Return the cost of tuning the last block, the last two and so on; none of a backbone that cannot be cut.

    Args:
        backbone: the whole.
        rows: at all sites.
    """
    try:
        blocks = blocks_of(backbone)
    except UserError as error:
        logger.warning("%s", error)
        return ()
    found = []
    for count in range(1, min(MOST_CUTS, len(blocks)) + 1):
        shape = blocks[-count].boundary
        parameters = sum(block.parameters for block in blocks[-count:])
        of_row = STORED_BYTES * math.prod(side or 1 for side in shape)
        stored = None if None in shape else of_row * rows
        trunk = split(backbone, parse_tune(f"last:{count}"), check=False).trunk
        seconds = time_recomputing(trunk)
        found.append(TuningCost(f"last:{count}", parameters, 4 * parameters, of_row, stored, seconds))
    return tuple(found)
