"""Adaptation of a finished run's model to rows without labels, at the site that has them; nothing leaves it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedhead.backbones.identity import flags_of
from fedhead.data import Samples, require_kind
from fedhead.drift import head_digest
from fedhead.errors import FedheadError, UserError
from fedhead.features.store import FeatureStore, Progress
from fedhead.files import write_atomically
from fedhead.heads import LinearHead, behind, delivered_spec
from fedhead.heads.feature_map import MappedHead
from fedhead.model import TransferModel
from fedhead.solvers.adaptation import METHODS, PLAIN, Solver, SolverName, adapted_heads
from fedhead.sums.calibration import Calibration
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.projection import projection_for
from fedhead.wording import counted, listed

_ROWS = 8192


class _About(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str = "fedhead-adaptation-1"
    head_digest: str
    method: str
    solver: SolverName
    temperatures: Mapping[str, float]
    seed: int


@dataclass(frozen=True, eq=False)
class Adaptation:
    """All that adapts a run's model to rows without labels.

    Attributes:
        pooled: sums over the labelled rows that the model was solved from.
        method: the proven one of `METHODS`; `PLAIN` if none is.
        solver: of the model's head.
        temperatures: of each method.
        seed: of the run.
    """

    pooled: FeatureStatistics
    method: str
    solver: str
    temperatures: Mapping[str, float]
    seed: int

    def of_sums(self, delivered: FeatureStatistics | None) -> Self:
        """Return the adaptation of a model that was solved again, perhaps with held-out rows."""
        return self if delivered is None else replace(self, pooled=delivered)

    def save(self, path: Path, digest: str) -> None:
        """Write a safetensors file that belongs to the model with a head of this digest."""
        about = _About.model_validate(
            {
                "head_digest": digest,
                "method": self.method,
                "solver": self.solver,
                "temperatures": self.temperatures,
                "seed": self.seed,
            }
        )
        write_atomically(path, save(self.pooled.to_tensors(), {"adaptation": about.model_dump_json()}))

    @classmethod
    def load(cls, path: Path, digest: str) -> Self:
        """Read the file of a model.

        Raises:
            UserError: if it is missing, damaged or of another model.
        """
        if not path.is_file():
            raise UserError(
                f"There is no {path}, so this model cannot be adapted: run it with --set adapt=true, and "
                "keep its files together."
            )
        try:
            with safe_open(str(path), framework="pt") as file:
                about = _About.model_validate_json((file.metadata() or {}).get("adaptation", ""))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if about.format != "fedhead-adaptation-1" or about.method not in METHODS:
                raise ValueError(f"it has the format {about.format!r} and the method {about.method!r}")
            known = {PLAIN, about.method} <= about.temperatures.keys() <= set(METHODS)
            if not known or not all(0 < one < 1e6 for one in about.temperatures.values()):
                raise ValueError("its temperatures are not those of the methods")
            pooled = FeatureStatistics.from_tensors(tensors)
        except (OSError, SafetensorError, ValidationError, ValueError) as error:
            raise UserError(f"{path} is damaged, or none that this version reads: {error}.") from None
        if about.head_digest != digest:
            raise UserError(f"{path} belongs to another model than the one beside it.")
        return cls(pooled, about.method, about.solver, about.temperatures, about.seed)


def adaptation_file(model: Path) -> Path:
    """Return the path of the adaptation that belongs to a model's file."""
    return model.with_name(f"{model.stem}.adaptation.safetensors")


@dataclass(frozen=True, eq=False)
class AdaptedModel:
    """A model adapted to rows without labels.

    Attributes:
        model: the adapted model.
        method: how.
        rows: the number of rows.
        before: the share of rows that the model predicted as each class before.
        after: the same after adaptation.
    """

    model: TransferModel
    method: str
    rows: int
    before: Mapping[str, float]
    after: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return all but the model as JSON types."""
        return {"method": self.method, "rows": self.rows, "before": dict(self.before), "after": dict(self.after)}


def adapt_model(
    model: TransferModel,
    adaptation: Adaptation,
    samples: Samples,
    method: str = "",
    *,
    min_rows: int = 20,
    strict: bool = False,
    progress: Progress = lambda done, total: None,
) -> AdaptedModel | None:
    """Adapt a model to rows; their labels are not read.

    Args:
        model: of a run with `adapt`.
        adaptation: from the same run.
        samples: the rows.
        method: one of `METHODS`, instead of the proven one.
        min_rows: the least number of rows.
        strict: whether to stop at unreadable rows.
        progress: called with the number of rows done and of all.

    Returns:
        The adapted model; None if no method is proven and none was given.

    Raises:
        UserError: if the data is of another kind, or there is no such method.
        FedheadError: if there are too few rows.
    """
    if method and method not in METHODS[1:]:
        raise UserError(f"There is no method {method!r}; expected {listed(METHODS[1:], len(METHODS))}.")
    chosen = method or adaptation.method
    if chosen == PLAIN:
        return None
    if chosen not in adaptation.temperatures:
        raise UserError(f"The run that made this model did not compare {chosen!r}; run it again for that.")
    require_kind(model.backbone.spec, model.backbone.kind, samples.kind)
    store = FeatureStore.open(model.backbone, samples, strict=strict, progress=progress)
    rows = torch.from_numpy(store.readable())
    if len(rows) < max(min_rows, 1):
        raise FedheadError(
            f"Nothing is adapted: the data has {counted(len(rows), 'row')}, and the limit is {min_rows}."
        )
    mapping = model.head.mapping if isinstance(model.head, MappedHead) else None
    plain = store.features[rows].cpu().double()
    mapped = plain if mapping is None else torch.cat([mapping(block) for block in torch.split(plain, _ROWS)])
    solver = Solver(adaptation.solver, flags_of(model.backbone.spec) if mapping is None else ())  # type: ignore[arg-type]
    found = _heads(adaptation, mapped, solver, (PLAIN, chosen))
    weight, bias = found[chosen].affine()
    head = behind(mapping, LinearHead.from_weights(weight.float(), bias.float()))
    made = TransferModel(
        model.backbone,
        head,
        model.classes,
        delivered_spec(head, "linear"),
        task=model.task.name,
        calibration=Calibration(adaptation.temperatures[chosen]),
        unlearned=model.unlearned,
    )
    before, after = (_shares(found[name](mapped).argmax(1), model.classes) for name in (PLAIN, chosen))
    return AdaptedModel(made, chosen, len(rows), before, after)


def load_adaptation(model: TransferModel, path: Path) -> Adaptation:
    """Read the adaptation beside a model's file.

    Raises:
        UserError: if there is none that fits the model.
    """
    found = Adaptation.load(adaptation_file(path), head_digest(model))
    if found.pooled.num_classes != len(model.classes):
        raise UserError(f"{adaptation_file(path)} has sums of {found.pooled.num_classes} classes, not the model's.")
    return found


def _heads(
    adaptation: Adaptation, features: torch.Tensor, solver: Solver, methods: tuple[str, ...]
) -> dict[str, LinearHead]:
    """Return the heads of some methods, for mapped features `[n, D]` like these."""
    project = projection_for(features.shape[1], adaptation.seed)
    summed = features if project is None else project(features)
    heads = adapted_heads(adaptation.pooled, summed, solver, adaptation.temperatures[PLAIN])
    return {name: heads[name] if project is None else project.widen(heads[name]) for name in methods}


def _shares(predicted: torch.Tensor, classes: tuple[str, ...]) -> dict[str, float]:
    counts = predicted.bincount(minlength=len(classes)).double() / max(len(predicted), 1)
    return dict(zip(classes, counts.tolist(), strict=True))
