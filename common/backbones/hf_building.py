"""Models of transformers built from a configuration, which may come from another machine with its weights."""

import math
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from fedhead.backbones.hf_config import first_line
from fedhead.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MOST_PARTS = 1000
"""Most layers, stages or experts that a configuration may name."""

BESIDE_FILE = 4
"""Most numbers of a model for each number in its file, which may lack the half that is not used."""

SPARE = 2**27
"""Further numbers, such as the masks that some models keep."""

_PARTS = ("layer", "depth", "stage", "block", "expert")


def build(cls: Any, config: "PreTrainedConfig", seed: int, source: str, spec: str, **settings: Any) -> Any:
    """Build a model with random values, which is no larger than the file that states its configuration.

    Args:
        cls: the library's class.
        config: of the model.
        seed: of the values.
        source: the file of a saved backbone with configuration and weights; empty for a configuration of this machine.
        spec: the backbone, for messages.
        settings: further arguments of the class.

    Raises:
        UserError: if the configuration states more than the file holds.
    """
    if source:
        if large := next(_many_parts(config.to_dict()), ""):
            raise UserError(f"The configuration of {spec} in {source} states {large}; at most {MOST_PARTS} are taken.")
        try:
            with torch.device("meta"):
                form = cls(config, **settings)
        # Configurations validate themselves and may raise any error.
        except Exception as error:
            raise UserError(f"transformers cannot build {spec} as {source} states: {first_line(error)}") from None
        stated = sum(one.numel() for one in chain(form.parameters(), form.buffers()))
        if stated > BESIDE_FILE * _numbers(source) + SPARE:
            raise UserError(f"The configuration of {spec} in {source} states more numbers than the file holds.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls(config, **settings)


def _many_parts(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield the settings that name too many parts."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _many_parts({str(key): one for key, one in value.items()})
        elif any(part in str(name) for part in _PARTS):
            numbers = value if isinstance(value, list | tuple) else [value]
            if any(isinstance(one, int) and one > MOST_PARTS for one in numbers) or len(numbers) > MOST_PARTS:
                yield str(name)


def _numbers(path: str) -> int:
    with safe_open(path, "pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
