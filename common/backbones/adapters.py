"""Low-rank adapters by PEFT on a tail's linear layers and convolutions."""

import re
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedhead.errors import UserError
from fedhead.extras import require

ADAPTER = "default"
"""PEFT's name of the adapter, a part of its parameters' names."""

ALPHA = 2
"""The scale `alpha` in units of the rank."""


def lora_config(rank: int, targets: Collection[str] | str) -> Any:
    """Return PEFT's configuration of adapters of a rank, with alpha twice the rank.

    Args:
        rank: of the product of the two matrices.
        targets: the names of the layers, or a pattern for the whole name.

    Raises:
        UserError: if PEFT is not installed.
    """
    peft = require("peft", "adapters", "Tuning with LoRA")
    layers = targets if isinstance(targets, str) else sorted(targets)
    return peft.LoraConfig(r=rank, lora_alpha=ALPHA * rank, target_modules=layers, lora_dropout=0.0, bias="none")


def layers_to_adapt(module: nn.Module, weights: Collection[str]) -> list[str]:
    """Return the names of the linear layers and ungrouped convolutions whose weights are among those named.

    Layers inside `nn.MultiheadAttention` are left out, since it reads their weights without calling them.
    """
    attention = tuple(
        f"{name}." for name, inside in module.named_modules() if isinstance(inside, nn.MultiheadAttention)
    )
    return [
        name
        for name, inside in module.named_modules()
        if f"{name}.weight" in weights and _is_adaptable(inside) and not (attention and name.startswith(attention))
    ]


def _is_adaptable(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return module.groups == 1
    # transformers' linear layer with a transposed weight, as in GPT-2.
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def add_adapters(module: nn.Module, targets: Collection[str], rank: int, *, frozen_first: bool, seed: int) -> None:
    """Add adapters to layers in place: their own weights train, all others are frozen.

    Args:
        module: the tail.
        targets: the names of the layers.
        rank: of the adapters.
        frozen_first: whether the first matrix keeps its initial values.
        seed: seeds the initial values; the second matrix starts at zero.

    Raises:
        UserError: if PEFT is not installed, or does not support a layer.
    """
    config = lora_config(rank, "|".join(re.escape(name) for name in sorted(targets)))
    peft = require("peft", "adapters", "Tuning with LoRA")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        try:
            peft.inject_adapter_in_model(config, module, adapter_name=ADAPTER)
        # PEFT rejects layers in various ways.
        except (ValueError, TypeError, NotImplementedError) as error:
            raise UserError(f"PEFT cannot adapt these layers with rank {rank}: {error}") from None
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("lora_B" in name or ("lora_A" in name and not frozen_first))


class SiteAdapter(nn.Module):
    """A linear layer with PEFT's adapter, at several sites at once: the frozen product is one over all their rows.

    Its matrices may have a leading site dimension, `[S, r, i]` and `[S, o, r]`; inputs `[S * n, ..., i]` are then those
    of one site after the other.

    Args:
        layer: PEFT's.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.base_layer, self.lora_A, self.lora_B = layer.base_layer, layer.lora_A, layer.lora_B
        self.scale = layer.scaling[ADAPTER]

    def forward(self, inputs: Tensor) -> Tensor:
        first, second = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        sites = max(len(one) if one.ndim > 2 else 1 for one in (first, second))
        plain: Tensor = self.base_layer(inputs)
        low = inputs.reshape(sites, -1, inputs.shape[-1]) @ first.mT
        return plain.add((low @ second.mT).view_as(plain), alpha=self.scale)


def for_sites(module: nn.Module) -> bool:
    """Replace PEFT's layers by `SiteAdapter`s in place; return whether all are linear, so that this is possible."""
    adapted = {name: one for name, one in module.named_modules() if hasattr(one, "lora_A")}
    if not all(isinstance(layer.lora_A[ADAPTER], nn.Linear) for layer in adapted.values()):
        return False
    for name, layer in adapted.items():
        parent, _, own = name.rpartition(".")
        setattr(module.get_submodule(parent), own, SiteAdapter(layer))
    return bool(adapted)


def merged_weights(module: nn.Module) -> Mapping[str, Tensor]:
    """Return the weights of the adapted layers with their adapters added, by the layers' own names."""
    merged = {}
    for name, inside in module.named_modules():
        if hasattr(inside, "get_delta_weight") and hasattr(inside, "base_layer"):
            base: Any = inside.base_layer
            delta: Any = inside.get_delta_weight
            merged[f"{name}.weight"] = (base.weight + delta(ADAPTER)).detach()
    return merged
