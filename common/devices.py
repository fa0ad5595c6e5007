"""Where tensors live: CUDA, Apple's MPS or the CPU."""

import torch

from fedhead.errors import UserError


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
    # Each backend raises its own kind; all mean that the device is not to be had.
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"The device {name!r} is not to be had here ({reason}). Try 'auto' or 'cpu'.") from error
    return device
