"""Packages that only some features need."""

import importlib
from typing import Any

from fedhead.errors import UserError


def require(module: str, extra: str, purpose: str) -> Any:
    """Import a module of an optional package.

    Args:
        module: its name.
        extra: of fedhead, that installs it.
        purpose: the feature that needs it, as the start of a sentence.

    Raises:
        UserError: if it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in module
        reason = "which is not installed" if absent else f"which cannot be imported ({error})"
        package = module.partition(".")[0]
        raise UserError(f"{purpose} needs {package}, {reason}: pip install 'fedhead[{extra}]'.") from None
