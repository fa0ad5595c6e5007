"""A run's messages to a site, kept in Flower's `Context`: manifest, probe, map of features and standardisation."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import ConfigRecord, Context

from fedhead.config import GENERATION
from fedhead.errors import FedheadError
from fedhead.protocol.actions import MAP, STANDARDISE
from fedhead.protocol.mapping import MapRequest
from fedhead.protocol.messages import RECORD, UNDESCRIBED, Manifest, MessageError, Payload, check_arrays
from fedhead.sums.sums import Arrays
from fedhead.tuning import NEXT_TOKEN, parse_tune

if TYPE_CHECKING:
    from torch import Tensor

    from fedhead.heads import FeatureMap, Head
    from fedhead.protocol.rivals import Level
    from fedhead.tasks import Task


MOST_PROBES = 1024
"""Rows of a probe that a site takes."""

MOST_CELLS = 2**28
"""Pairs of true and predicted classes that a site counts in one reply."""


@dataclass(frozen=True)
class Agreement:
    """What a site knows of a run; it answers nothing without.

    Attributes:
        manifest: of the run.
        probe: the coordinator's features `[PROBES, d]` of the probe; their mean is the origin of all sums.
        standardisation: mean and scale `[d]` that heads are trained under, once they are known.
        target_standardisation: the same of real targets, `[C]`.
        mapping: of the features, before all sums and heads; None for plain ones.
        map_digest: of the request for the map; empty for plain features.
        own_origin: `[D]`, of all sums, if it does not follow from the probe.
        shares: `[C]`, each class's share of all sites' training rows, in tuned runs that adjust by them.
        unfit: why the site's rules allow no sums under the map or the standardisation; empty if they do. It is known
            here alone.
    """

    manifest: Manifest
    probe: "Tensor"
    standardisation: "tuple[Tensor, Tensor] | None"
    target_standardisation: "tuple[Tensor, Tensor] | None" = None
    mapping: "FeatureMap | None" = None
    map_digest: str = ""
    own_origin: "Tensor | None" = None
    unfit: str = ""
    shares: "Tensor | None" = None

    @property
    def num_features(self) -> int:
        """The number of mapped features."""
        return self.manifest.num_features if self.mapping is None else self.mapping.width

    @property
    def curved(self) -> bool:
        """Whether versions are compared by their losses at a grid of temperatures."""
        return bool(self.manifest.tune) and self.task.scales_outputs

    def check_cells(self, parts: int = 1) -> None:
        """Check that counts of true by predicted classes, in some parts, fit the memory of a site.

        Raises:
            MessageError: if not.
        """
        columns = len(self.task.columns)
        if self.task.kind.exclusive and parts * columns**2 > MOST_CELLS:
            raise MessageError(
                f"it asks for counts of {columns:,} true by predicted classes, {parts} times; a site counts at most "
                f"{MOST_CELLS:,} pairs"
            )

    def at(self, level: "Level") -> "Agreement":
        """Return what is known of the run on its mapped features, or on simpler ones without standardisation."""
        from fedhead.heads import FeatureMap, MapForm

        if level in ("map", "tail"):
            return self
        mapping = None
        if level == "basis" and self.mapping is not None:
            mapping = FeatureMap(MapForm(self.mapping.form.basis), self.mapping.plain)
        return replace(self, mapping=mapping, standardisation=None, target_standardisation=None)

    @cached_property
    def origin(self) -> "Tensor":
        """The origin `[D]` of all sums of the features."""
        from fedhead.sums.projection import origin_of

        return origin_of(self.probe, self.manifest.seed, self.mapping) if self.own_origin is None else self.own_origin

    @cached_property
    def task(self) -> "Task":
        """What the run predicts."""
        from fedhead.tasks import make_task

        return make_task(self.manifest.task, self.manifest.classes)


def agreement(context: Context) -> Agreement:
    """Return the run's agreement with this site.

    Raises:
        FedheadError: if the coordinator has not described the run, or this process has lost it.
    """
    record = context.state.get(RECORD)
    if not isinstance(record, ConfigRecord):
        raise FedheadError(f"{UNDESCRIBED}; the coordinator must describe it again.")
    manifest = _manifest(str(record["manifest"]))
    standardisation = None
    if "mean" in record:
        standardisation = (_tensor(record, "mean"), _tensor(record, "scale"))
    targets = (_tensor(record, "target_mean"), _tensor(record, "target_scale")) if "target_mean" in record else None
    probe = _tensor(record, "probe").reshape(-1, manifest.num_features)
    return Agreement(
        manifest,
        probe,
        standardisation,
        targets,
        _kept_map(record, manifest),
        str(record.get("map.digest", "")),
        unfit=" ".join(str(record[name]) for name in _UNFIT.values() if name in record),
        shares=_tensor(record, "shares") if "shares" in record else None,
    )


@lru_cache(maxsize=8)
def _manifest(text: str) -> Manifest:
    """Read a kept manifest; every message of a run needs it."""
    return Manifest.model_validate_json(text)


def proposed(manifest: Manifest, payload: Payload) -> Agreement:
    """Return the agreement that a manifest and the probe's features propose; nothing is kept yet.

    Raises:
        MessageError: if the features are not finite float32 `[n, num_features]`, or a language model's run has a head,
            other targets than its answers, or no adapters.
    """
    import torch

    language = (manifest.task == GENERATION, manifest.layer == NEXT_TOKEN, manifest.head == "none")
    if any(language) and not (all(language) and manifest.tune and parse_tune(manifest.tune).method == "lora"):
        raise MessageError(
            f"A language model's run has the task {GENERATION!r}, the layer {NEXT_TOKEN!r}, no head, and adapters to "
            "tune, as in 'lora:8'."
        )
    if manifest.objective != "task" and (manifest.task == GENERATION or not manifest.tune):
        raise MessageError(f"It has the objective {manifest.objective!r}, but tunes no layers below a head.")
    usual = ("classification", "task")
    if manifest.tune and parse_tune(manifest.tune).personal and (manifest.task, manifest.objective) != usual:
        raise MessageError(
            f"Adapters that stay at sites train on the task 'classification', not {manifest.task!r} with the objective "
            f"{manifest.objective!r}."
        )
    if manifest.objective == "supcon" and manifest.task != "classification":
        raise MessageError(
            f"Its objective 'supcon' needs one class of each row, which {manifest.task!r} does not have."
        )
    probe = payload.arrays.get("probe", np.empty(0))
    rows = len(probe) if probe.ndim == 2 and 0 < len(probe) <= MOST_PROBES else 1
    if probe.shape != (rows, manifest.num_features):
        raise MessageError(f"'probe' is {list(probe.shape)} instead of {[rows, manifest.num_features]}")
    check_arrays(payload.arrays, {"probe": np.zeros_like(probe, np.float32)})
    return Agreement(manifest, torch.from_numpy(probe.astype("<f4")), None)


def keep(agreed: Agreement, context: Context) -> None:
    """Keep the agreement that a run proposed, once the site has accepted it."""
    probe = agreed.probe.numpy().astype("<f4").tobytes()
    context.state[RECORD] = ConfigRecord({"manifest": agreed.manifest.model_dump_json(), "probe": probe})


def forget(context: Context) -> None:
    """Forget the agreement with a run that this site takes no part in."""
    context.state.pop(RECORD, None)


_UNFIT: Mapping[str, str] = {MAP: "unfit.map", STANDARDISE: "unfit.scale"}


def keep_unfit(action: str, reason: str, context: Context) -> None:
    """Keep why a map or a standardisation allows no sums, where a refusal would disclose the site's rows."""
    record = context.state[RECORD]
    assert isinstance(record, ConfigRecord)
    record[_UNFIT[action]] = reason


def keep_map(request: MapRequest, context: Context) -> None:
    """Keep a map of features that the site has accepted; a standardisation of other features is forgotten."""
    record = context.state[RECORD]
    assert isinstance(record, ConfigRecord)
    for name in ("mean", "scale", "target_mean", "target_scale", "map.mean", "map.covariance", *_UNFIT.values()):
        record.pop(name, None)
    record["map"], record["map.digest"] = json.dumps(request.values), request.digest
    for name, array in request.arrays.items():
        record[f"map.{name}"] = array.tobytes()


def map_form(context: Context) -> str:
    """Return the form of the run's map of features; empty for plain ones."""
    record = context.state.get(RECORD)
    if not isinstance(record, ConfigRecord) or "map" not in record:
        return ""
    values = json.loads(str(record["map"]))
    return values["basis"] if values["lift"] == "none" else f"{values['basis']}+{values['lift']}"


def _kept_map(record: ConfigRecord, manifest: Manifest) -> "FeatureMap | None":
    if "map" not in record:
        return None
    arrays = {}
    for name in ("mean", "covariance"):
        if isinstance(blob := record.get(f"map.{name}"), bytes):
            arrays[name] = np.frombuffer(blob, "<f8")
    request = MapRequest.from_values(json.loads(str(record["map"])), arrays, manifest.num_features)
    return request.build(manifest.num_features, manifest.seed)


def keep_standardisation(payload: Payload, context: Context) -> None:
    """Keep the mean and scale that heads are trained under.

    Raises:
        MessageError: if they are not of the manifest's form.
    """
    agreed = agreement(context)
    sizes = {"mean": agreed.num_features, "scale": agreed.num_features}
    if agreed.manifest.tune and agreed.manifest.adjust:
        sizes["shares"] = len(agreed.task.columns)
    if agreed.task.standardises_targets:
        sizes |= {"target_mean": len(agreed.task.columns), "target_scale": len(agreed.task.columns)}
    check_arrays(payload.arrays, {name: np.zeros(size, np.float32) for name, size in sizes.items()})
    if "shares" in sizes and not bool((payload.arrays["shares"] > 0).all()):
        raise MessageError("a class's share of all rows is not positive")
    record = context.state[RECORD]
    assert isinstance(record, ConfigRecord)
    record.pop(_UNFIT[STANDARDISE], None)
    for name, array in payload.arrays.items():
        record[name] = array.tobytes()


def _tensor(record: ConfigRecord, name: str) -> "Tensor":
    import torch

    blob = record[name]
    assert isinstance(blob, bytes)
    return torch.frombuffer(bytearray(blob), dtype=torch.float32)


def head_of(agreed: Agreement) -> "Head":
    """Build the run's head, for mapped features."""
    from fedhead.heads import make_head

    return make_head(agreed.manifest.head, agreed.num_features, len(agreed.manifest.classes))


def empty_head(agreed: Agreement) -> Arrays:
    """Return arrays of the names, shapes and dtype that the run's head has; they cannot be written to."""
    forms = _forms(agreed.manifest.head, agreed.num_features, len(agreed.manifest.classes))
    return {name: np.broadcast_to(np.zeros((), dtype), shape) for name, shape, dtype in forms}


@lru_cache(maxsize=8)
def _forms(spec: str, num_features: int, num_classes: int) -> list[tuple[str, tuple[int, ...], np.dtype[Any]]]:
    from fedhead.heads import make_head

    parameters = make_head(spec, num_features, num_classes).trainable()
    return [(name, tuple(value.shape), value.numpy().dtype) for name, value in parameters.items()]
