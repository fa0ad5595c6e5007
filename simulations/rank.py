"""`rank(backbones)`: which backbone fits a task, from one exchange each, without training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy.typing as npt

from fedhead.config import RunConfig
from fedhead.data import Samples
from fedhead.errors import UserError
from fedhead.features import Progress
from fedhead.scoring import transferability
from fedhead.simulations.simulate import make_plan, run_plan


@dataclass(frozen=True)
class RankedBackbone:
    """How one backbone fits the sites' task.

    Attributes:
        backbone: its spec.
        logme: log evidence per row and class (You et al., 2021); larger fits better.
        h_score: between-class scatter in units of the total (Bao et al., 2019); larger fits better. None
            for multi-label rows.
        accuracy: of the solved head, on the pooled held-out rows; None without any.
        accuracy_test: the same on the pooled test set, where there is one.
        num_features: `d`.
        bytes_per_site: payload down and up, the weights included where a site lacks them.
        seconds_extraction: what features took in this call; little where they were there.
        rows_extracted: how many rows that was for.
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


def rank(
    backbones: Sequence[str],
    config: RunConfig | None = None,
    data: str | Samples | None = None,
    sites: int | Sequence[npt.ArrayLike] | None = None,
    *,
    test_data: str | Samples | None = None,
    on_backbone: Callable[[str], Progress] = lambda spec: lambda done, total: None,
) -> list[RankedBackbone]:
    """Score backbones by the sites' summed statistics, the best by LogME first.

    Args:
        backbones: specs, each perhaps with a weights file, as in `torchvision:resnet18=resnet18.pth`.
        config: of the run that the backbones are for; its rounds are not run.
        data: see `simulate`.
        sites: see `simulate`.
        test_data: see `simulate`.
        on_backbone: called as each one starts; what it returns is told of extraction.

    Raises:
        UserError: if one of them, or the data, does not exist or fit; before anything is extracted.
        FedheadError: if a run fails.
    """
    if not backbones:
        raise UserError("Name one backbone or more to rank, as in: fedhead rank bundled:glyphnet bundled:pixels.")
    plans = []
    for named in backbones:
        spec, _, weights = named.partition("=")
        changes = {"backbone": spec, "weights": weights or "default", "rounds": 0, "head": "linear"}
        plan_config = (config or RunConfig()).changed(changes)
        if plan_config.init in ("zeros", "random"):
            plan_config = plan_config.changed({"init": ""})
        plans.append(make_plan(plan_config, data, sites, test_data=test_data))
    ranked = []
    for plan in plans:
        result = run_plan(plan, deliver=False, on_extraction=on_backbone(plan.backbone.spec))
        assert result.outcome.statistics is not None
        scores = transferability(result.outcome.statistics)
        ranked.append(
            RankedBackbone(
                backbone=plan.backbone.spec,
                logme=scores["logme"],
                h_score=scores.get("h_score"),
                accuracy=result.accuracy_held_out,
                accuracy_test=result.test_accuracy,
                num_features=plan.backbone.num_features,
                bytes_per_site=(result.bytes_down + result.bytes_up) // len(result.outcome.participants),
                seconds_extraction=result.seconds["extraction"],
                rows_extracted=result.extracted,
            )
        )
    return sorted(ranked, key=lambda one: (-one.logme, -(one.h_score or 0.0)))
