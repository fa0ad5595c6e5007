"""fedhead: federated transfer learning on Flower. Ship the backbone once, share only the heads."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedhead.backbones import Backbone as Backbone
    from fedhead.backbones import load_backbone as load_backbone
    from fedhead.config import RunConfig as RunConfig
    from fedhead.errors import FedheadError as FedheadError
    from fedhead.errors import UserError as UserError
    from fedhead.heads import Head as Head
    from fedhead.heads import make_head as make_head
    from fedhead.model import TransferModel as TransferModel
    from fedhead.solvers import solve_head as solve_head
    from fedhead.solvers.scoring import transferability as transferability
    from fedhead.sums.features import FeatureStatistics as FeatureStatistics

__version__ = "0.1.0"

_EXPORTS = {
    "Backbone": "backbones",
    "FeatureStatistics": "sums.features",
    "FedheadError": "errors",
    "Head": "heads",
    "RunConfig": "config",
    "TransferModel": "model",
    "UserError": "errors",
    "load_backbone": "backbones",
    "make_head": "heads",
    "solve_head": "solvers",
    "transferability": "solvers.scoring",
}

__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that light modules do not import torch."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    # A submodule of the same name would hide it from then on.
    globals()[name] = value
    return value
