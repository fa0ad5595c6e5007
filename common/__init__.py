"""fedhead: federated transfer learning on Flower. Ship the backbone once, share only the heads."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedhead.errors import FedheadError as FedheadError
    from fedhead.errors import UserError as UserError
    from fedhead.heads import Head as Head
    from fedhead.heads import make_head as make_head

__version__ = "0.1.0"

_EXPORTS = {
    "FedheadError": "errors",
    "Head": "heads",
    "UserError": "errors",
    "make_head": "heads",
}

__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> Any:
    """Import what is asked for, when it is asked for, so that a light module does not bring torch."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
