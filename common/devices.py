"""Where tensors live, CUDA, Apple's MPS or the CPU, and how exactly they are multiplied there."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from fedhead.errors import UserError

Precision = Literal["float32", "mixed"]
"""Whether products are of float32 throughout, or of half precision where torch holds that to be safe."""


BFLOAT16 = ("amx_bf16", "avx512_bf16", "bf16", "arm_bf16")
"""Names of the capabilities of processors that multiply bfloat16."""


def half_type(device: torch.device) -> torch.dtype:
    """Return the type of half precision on a device."""
    return torch.bfloat16 if device.type == "cpu" else torch.float16


def multiplies_halves(device: torch.device) -> bool:
    """Return whether a device has products in half precision; a CPU without them emulates them slowly."""
    if device.type != "cpu":
        return True
    there = torch.cpu.get_capabilities()
    return any(there.get(name, False) for name in BFLOAT16)


@contextmanager
def multiplying(precision: Precision, device: torch.device) -> Iterator[None]:
    """Multiply so within the context: float32 without TensorFloat-32, which is good for three digits only."""
    if precision == "mixed":
        with torch.autocast(device.type, dtype=half_type(device)):
            yield
    elif device.type == "cuda":
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    else:
        yield


def pick_device(name: str) -> torch.device:
    """Return the device called `name`; `auto` is the best one present.

    Raises:
        UserError: if `name` is no device of this machine.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    # Each backend raises its own kind; all mean that the device is not available.
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"The device {name!r} is not available on this machine ({reason}). Try 'auto' or 'cpu'."
        ) from error
    return device
