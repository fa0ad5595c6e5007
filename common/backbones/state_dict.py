"""State dicts: weights from files of many forms, and their match with the names of a module."""

import argparse
import logging
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedhead.errors import UserError
from fedhead.wording import listed

logger = logging.getLogger(__name__)

DEPTH = 4
"""Depth to which nested dictionaries in a checkpoint are searched for tensors."""

PREFERRED = ("teacher.", "encoder_q.", "base_encoder.", "online_", "state_dict.", "model.")
"""Parts of a prefix, in order of preference, for files with several copies of a network: DINO evaluates the teacher,
MoCo the query encoder, BYOL the online network, and others keep a moving average beside the weights."""

WRAPPERS = ("state_dict.", "model_state_dict.", "model.", "module.", "_orig_mod.")
"""Prefixes that frameworks add to every name: checkpoints, data parallelism, torch.compile."""


def read_weights(path: str) -> dict[str, Tensor]:
    """Read a safetensors file or a state dict, without executing any of its content.

    Returns:
        The tensors by name; for nested dictionaries, the keys joined with dots.

    Raises:
        UserError: if it is missing, damaged, or without named tensors.
    """
    if not Path(path).is_file():
        raise UserError(
            f"There is no weights file {path!r}. Expected 'default', 'random' or the path of a "
            "safetensors or state-dict file."
        )
    try:
        return load_file(path)
    except SafetensorError as not_safetensors:
        if path.endswith(".safetensors"):
            raise UserError(f"The weights {path} cannot be read: {not_safetensors}.") from None
    try:
        # Command-line settings in many checkpoints; they are plain values and execute nothing.
        with torch.serialization.safe_globals([argparse.Namespace, defaultdict]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise UserError(
            f"The weights {path} are neither safetensors nor a plain state dict: they contain Python objects, which "
            "could execute code and are not loaded (perhaps a whole saved model), or no weights at all. Save the "
            "model's state_dict()."
        ) from error
    # torch.load may raise any error on damaged input.
    except Exception as error:
        raise UserError(
            f"The weights {path} are neither safetensors nor a plain state dict, or the file is truncated: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
        ) from error
    named = dict(_flat(state, "", DEPTH)) if isinstance(state, Mapping) else {}
    if not named and not (isinstance(state, Mapping) and not state):
        raise UserError(f"The weights {path} contain no named tensors; save the model's state_dict().")
    if isinstance(state, OrderedDict) and len(named) == len(state):
        # Modules read the versions of their parts from it.
        named = _like(state, named)
    return named


def _like(state: Any, named: dict[str, Tensor]) -> dict[str, Tensor]:
    ordered = OrderedDict(named)
    if hasattr(state, "_metadata"):
        ordered._metadata = state._metadata  # type: ignore[attr-defined]
    return ordered


def _flat(values: Mapping[Any, Any], prefix: str, depth: int) -> Any:
    for key, value in values.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping) and depth:
            yield from _flat(value, f"{prefix}{key}.", depth - 1)


def align(weights: Mapping[str, Tensor], needed: Mapping[str, Tensor], path: str) -> Mapping[str, Tensor]:
    """Return weights without a prefix of the names that a module needs, if there is one; log the removed prefix.

    Args:
        weights: the weights of a file.
        needed: the module's own weights, by name.
        path: the file, for messages.

    Returns:
        The original weights, if they fit or no prefix makes them fit.

    Raises:
        UserError: if several prefixes fit and none of them is preferred.
    """
    needed = {name: tensor for name, tensor in needed.items() if not name.endswith("num_batches_tracked")}
    if not needed or _fits(weights, needed, ""):
        return weights
    fitting = [prefix for prefix in _prefixes(weights, needed) if _fits(weights, needed, prefix)]
    if not fitting:
        return weights
    prefix = _choose(fitting, path)
    stripped = {name[len(prefix) :]: tensor for name, tensor in weights.items() if name.startswith(prefix)}
    others = [name for name in weights if not name.startswith(prefix)]
    left = ""
    if others:
        shown = ", ".join(others[:3]) + (" ..." if len(others) > 3 else "")
        left = f"; {len(others)} tensors without it are ignored ({shown})"
    logger.warning("%s: the prefix %r of its names is removed%s.", path, prefix, left)
    return stripped


def _prefixes(weights: Mapping[str, Tensor], needed: Mapping[str, Tensor]) -> list[str]:
    """Return the prefixes of a long name, which is unlikely to be the end of another one."""
    name = max(needed, key=lambda one: (one.count("."), len(one)))
    return sorted(key.removesuffix(name) for key in weights if key.endswith(f".{name}"))


def _fits(weights: Mapping[str, Tensor], needed: Mapping[str, Tensor], prefix: str) -> bool:
    return all(
        (found := weights.get(f"{prefix}{name}")) is not None and found.shape == tensor.shape
        for name, tensor in needed.items()
    )


def _choose(fitting: Sequence[str], path: str) -> str:
    for part in ("", *PREFERRED):
        chosen = [prefix for prefix in fitting if part in prefix]
        if len(chosen) == 1:
            return chosen[0]
    raise UserError(
        f"The weights {path} contain several copies of the network: {', '.join(map(repr, fitting[:5]))}; save one of "
        "them as a separate file."
    )


def unwrapped(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights without the prefixes that frameworks add to every name, and without other tensors."""
    named = dict(weights)
    while prefix := next((one for one in WRAPPERS if any(name.startswith(one) for name in named)), None):
        named = {name.removeprefix(prefix): tensor for name, tensor in named.items() if name.startswith(prefix)}
    return named


def without_unneeded(
    weights: Mapping[str, Tensor], whole: Mapping[str, Tensor], needed: Collection[str]
) -> Mapping[str, Tensor]:
    """Return weights without those of removed parts that differ from the model's own, such as other classifiers.

    Args:
        weights: the weights of a file.
        whole: the weights of the whole model, by name.
        needed: the names up to the selected layer.
    """
    cut = {_highest_part(name, needed) for name in whole if name not in needed}
    kept = {
        name: tensor
        for name, tensor in weights.items()
        if (name in whole and whole[name].shape == tensor.shape) or not _is_inside(name, cut)
    }
    return _like(weights, kept)


def _highest_part(name: str, needed: Collection[str]) -> str:
    """Return the largest part of a model that contains a weight and no needed one."""
    parts = name.split(".")
    for length in range(1, len(parts)):
        part = ".".join(parts[:length])
        if not any(other.startswith(f"{part}.") for other in needed):
            return part
    return name


def _is_inside(name: str, parts: Collection[str]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def hint_of_prefix(weights: Mapping[str, Tensor], needed: Mapping[str, Tensor]) -> str:
    """Return a sentence on the prefix whose removal would make most names fit; empty if there is none."""
    best, count = "", 0
    for prefix in set(_prefixes(weights, needed) if needed else ()):
        fitting = sum(f"{prefix}{name}" in weights for name in needed)
        if fitting > count:
            best, count = prefix, fitting
    if 2 * count <= len(needed):
        return ""
    missing = [name for name in needed if f"{best}{name}" not in weights]
    reshaped = [name for name in needed if name not in missing and weights[f"{best}{name}"].shape != needed[name].shape]
    wrong = f" (missing: {', '.join(missing[:3])})" if missing else ""
    wrong += f" (of another shape: {', '.join(reshaped[:3])})" if reshaped else ""
    return f" Without the prefix {best!r}, {count} of {len(needed)} names would fit{wrong}."


def require_finite(tensors: Mapping[str, Tensor], parameters: Collection[str], spec: str, path: str) -> None:
    """Check that weights are finite, since diverged training may yield NaN or infinity.

    Args:
        tensors: by name.
        parameters: the names of parameters, which may not be infinite; buffers may, as masks.
        spec: the backbone, for messages.
        path: the file, or `default`.

    Raises:
        UserError: naming the weights with NaN or infinity.
    """
    wrong = [
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point()
        and not tensor.is_meta
        and bool((tensor.isnan() if name not in parameters else ~tensor.isfinite()).any())
    ]
    if wrong:
        raise UserError(
            f"The weights of {spec} ({path}) are not all finite numbers: NaN or infinity in "
            f"{listed(wrong, 3)}. Their training diverged, or the file is damaged; use other weights."
        )


@dataclass(frozen=True)
class WeightsFit:
    """The match between a file's weights and a module.

    Attributes:
        missing: names that only the module has, except batch counters.
        unknown: names that only the file has.
        reshaped: differences in shape, in words.
        hint: a sentence on how more of them would fit.
    """

    missing: frozenset[str]
    unknown: frozenset[str]
    reshaped: tuple[str, ...]
    hint: str = ""

    def require(self, needed: Collection[str], spec: str, path: str) -> None:
        """Check that all needed weights are present and no others.

        Args:
            needed: the names of the module that must be present.
            spec: the backbone, for messages.
            path: the file, for messages.

        Raises:
            UserError: naming the keys that are missing, unknown or of another shape.
        """
        wrong = (
            ("missing", sorted(self.missing.intersection(needed))),
            ("unknown", sorted(self.unknown)),
            ("of another shape", self.reshaped),
        )
        if any(names for _, names in wrong):
            parts = [f"{words}: {listed(names, 4)}" for words, names in wrong if names]
            raise UserError(f"The weights {path} are not those of {spec}; {'; '.join(parts)}.{self.hint}")


def fill_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> WeightsFit:
    """Copy `weights` into `module`, which may rename those of its older versions during loading."""
    own = {name: tensor for name, tensor in module.state_dict().items() if not name.endswith("num_batches_tracked")}
    given = OrderedDict((name, weights[name]) for name in weights if not name.endswith("num_batches_tracked"))
    # A safetensors file has no module versions; some modules reject that.
    metadata = getattr(weights, "_metadata", {"": getattr(module.state_dict(), "_metadata", {}).get("", {})})
    given._metadata = metadata  # type: ignore[attr-defined]
    try:
        result = module.load_state_dict(given, strict=False)
    except RuntimeError:
        shapes = [(name, list(given[name].shape), list(own[name].shape)) for name in sorted(own.keys() & given.keys())]
        reshaped = tuple(f"{name} is {theirs}, not {ours}" for name, theirs, ours in shapes if theirs != ours)
        if not reshaped:
            raise
        missing, unknown = frozenset(own.keys() - given.keys()), frozenset(given.keys() - own.keys())
        return WeightsFit(missing, unknown, reshaped, hint_of_prefix(weights, own))
    missing = frozenset(name for name in result.missing_keys if not name.endswith("num_batches_tracked"))
    hint = hint_of_prefix(weights, own) if missing else ""
    return WeightsFit(missing, frozenset(result.unexpected_keys), (), hint)


def assign_weights(module: nn.Module, weights: Mapping[str, Tensor], ignored: set[str], spec: str, path: str) -> None:
    """Copy `weights` into `module`, requiring every key, after removing a common prefix.

    Args:
        module: the module to fill.
        weights: by name; must include all of the module's except batch counters.
        ignored: names that `weights` may have although the module does not (a removed classifier).
        spec: the backbone, for messages.
        path: the file, for messages.

    Raises:
        UserError: naming the keys that are missing, unexpected or of another shape.
    """
    weights = align(weights, module.state_dict(), path)
    fit = fill_weights(module, {name: tensor for name, tensor in weights.items() if name not in ignored})
    fit.require(module.state_dict().keys(), spec, path)
