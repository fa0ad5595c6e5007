"""A backbone cut in two: a frozen trunk, whose output at the boundary is stored once, and a trainable tail.

trunk, tail = split(load_backbone("torchvision:resnet18"), parse_tune("last:2"))
values, mask = trunk.boundary(batch)
features = tail.run(tail.trainable(), values, mask)
"""

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedhead.backbones.adapters import add_adapters, for_sites, merged_weights
from fedhead.backbones.backbone import Backbone
from fedhead.backbones.pooling import pool
from fedhead.backbones.preprocessing import Batch
from fedhead.backbones.split_graph import GraphCuts
from fedhead.backbones.split_layers import Cuts, choose, depths_of, names_by_stage, of_method, weight_of
from fedhead.backbones.split_states import StateCuts
from fedhead.data.items import ITEMS
from fedhead.errors import UserError
from fedhead.tuning import NEXT_TOKEN, TuneSpec

TOLERANCE = 1e-5
"""Largest difference, relative to the largest feature, between the features of trunk and tail and of the whole."""

NO_BLOCKS = ("bundled:logmel", "bundled:pixels", "features", "identity", "vectors")


class Boundary(NamedTuple):
    """Activations at the boundary.

    Attributes:
        values: `[n, *shape]`, for texts `[n, length, d]`, as float32.
        mask: for texts `[n, length]`, 0 for padding; otherwise None.
    """

    values: Tensor
    mask: Tensor | None


class Pretrained(NamedTuple):
    """The backbone that a tail belongs to.

    Attributes:
        spec: `source:name`.
        layer: of its features.
        weights_digest: of its weights.
    """

    spec: str
    layer: str
    weights_digest: str


class Trunk(Backbone):
    """The frozen part below the boundary; `layer` names the cut, which its digest covers."""

    def __init__(self, whole: Backbone, module: nn.Module, layer: str) -> None:
        super().__init__(whole.spec, module, whole.preprocessing, layer=layer, trained=whole.trained, files=whole.files)
        # The weights to transport are those of the whole backbone.
        self.__dict__["weights_digest"] = whole.weights_digest

    @torch.no_grad()
    def boundary(self, batch: Batch) -> Boundary:
        """Return the activations of a preprocessed batch, on the backbone's device."""
        values, mask = self._run(batch)
        assert isinstance(values, Tensor)
        return Boundary(values.to(torch.float32), mask)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over spec, weights, the cut and preprocessing: the key of stored activations."""
        described = {
            "spec": self.spec,
            "weights": self.weights_digest,
            "boundary": self.layer,
            "preprocessing": self.preprocessing.describe(),
        }
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


class Tail(nn.Module):
    """The part above the boundary, pooling included: a pure function of its parameters.

    It stays in eval mode: batch norms use their stored statistics, and nothing is dropped.

    Args:
        module: takes the activations, and for texts their mask.
        prefix: of the parameters' names in `module`, in front of their names in the backbone.
        whole: the backbone.
        tune: the layers and parameters that train.

    Attributes:
        depths: the number of blocks above the one that each trained parameter is in, by name.
        stages: the names of the parameters that train in each stage of a schedule.
    """

    def __init__(self, module: nn.Module, prefix: str, whole: Backbone, tune: TuneSpec) -> None:
        super().__init__()
        self.module = module
        self.prefix = f"module.{prefix}"
        self.pooling = whole.pooling
        self.pretrained = Pretrained(whole.spec, whole.layer, whole.weights_digest)
        self.tune = tune
        self.depths: Mapping[str, int] = {}
        self.stages: Sequence[Sequence[str]] = ()
        # A tuple hides its parameters from this module.
        self._many: tuple[Tail, ...] = ()
        self.eval()

    @property
    def takes_sites(self) -> bool:
        """Whether `run` takes parameters `[S, ...]` of several sites."""
        return bool(self._many)

    def _apply(self, fn: Any, recurse: bool = True) -> "Tail":
        """Move the form for several sites along, which shares the parameters and has buffers of its own."""
        moved: Tail = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for many in self._many:
            many._apply(fn, recurse)
        return moved

    def forward(self, values: Tensor, mask: Tensor | None = None, pooled: bool = True) -> Tensor:
        output: Tensor = self.module(values) if mask is None else self.module(values, mask)
        return pool(output, self.pooling, mask).to(torch.float32) if pooled else output

    def train(self, mode: bool = True) -> "Tail":
        """Do nothing: a tail stays in eval mode."""
        return super().train(False)

    def trainable(self) -> dict[str, Tensor]:
        """Return the parameters that train, detached, by their names in the backbone, in the order of the names."""
        named = {
            name.removeprefix(self.prefix): parameter.detach()
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
        }
        return {name: named[name] for name in sorted(named)}

    def shared(self) -> dict[str, Tensor]:
        """Return those of `trainable` that travel: all but the adapters' second matrices where these stay at sites."""
        stays = ".lora_B." if self.tune.personal else None
        return {name: value for name, value in self.trainable().items() if stays is None or stays not in name}

    def adapters(self) -> dict[str, Tensor]:
        """Return both matrices of each adapter, detached, also a frozen one; none without LoRA."""
        return {
            name.removeprefix(self.prefix): parameter.detach()
            for name, parameter in self.named_parameters()
            if ".lora_" in name
        }

    def load(self, parameters: Mapping[str, Tensor]) -> None:
        """Set the parameters that train.

        Raises:
            ValueError: for other names or shapes.
        """
        own = {name.removeprefix(self.prefix): one for name, one in self.named_parameters() if one.requires_grad}
        if parameters.keys() != own.keys() or any(parameters[name].shape != one.shape for name, one in own.items()):
            raise ValueError("The parameters are not those of this tail.")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(parameters[name])

    def run(self, parameters: Mapping[str, Tensor], values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return features `[n, d]` with these parameters in place of the tail's own.

        Args:
            parameters: by name, as from `trainable`; others keep their values. A tail that takes sites takes them as
                `[S, ...]`, too.
            values: `[n, *shape]`; of several sites `[S * n, *shape]`, one after the other.
            mask: for texts `[n, length]`, or `[S * n, length]`.
        """
        return self._called(parameters, values, mask, pooled=True)

    def states(self, parameters: Mapping[str, Tensor], values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the output before pooling, as of texts `[n, length, d]`; see `run`."""
        return self._called(parameters, values, mask, pooled=False)

    def _called(self, parameters: Mapping[str, Tensor], values: Tensor, mask: Tensor | None, *, pooled: bool) -> Tensor:
        named = {f"{self.prefix}{name}": tensor for name, tensor in parameters.items()}
        several = any(tensor.ndim > self.get_parameter(name).ndim for name, tensor in named.items())
        module = self._many[0] if several else self
        output: Tensor = functional_call(module, named, (values, mask), {"pooled": pooled})
        return output

    @torch.no_grad()
    def join_sites(self, values: Tensor, mask: Tensor | None) -> None:
        """Let `run` take several sites' adapters, if all adapt linear layers and a comparison gives equal features.

        Args:
            values: `[n, *shape]`, activations to compare features on.
            mask: for texts `[n, length]`.
        """
        tensors = [*self.parameters(), *self.buffers()]
        many = copy.deepcopy(self, {id(tensor): tensor for tensor in tensors})
        module: Any = many.module
        if not getattr(module, "joins_sites", True) or not for_sites(module):
            return
        # Adapters assign rows to sites by position, so no row may hold texts of two sites.
        module.packs = False
        generator = torch.Generator().manual_seed(0)
        sites = [
            {n: one + 0.1 * torch.randn(one.shape, generator=generator).to(one) for n, one in self.trainable().items()}
            for _ in range(2)
        ]
        # Each site gets other rows, so that the comparison detects layers that mix them.
        own, masks = [values, values.flip(0)], None if mask is None else [mask, mask.flip(0)]
        apart = torch.cat(
            [self.run(sites[at], own[at], None if masks is None else masks[at]) for at in range(len(sites))]
        )
        self._many = (many,)
        stacked = {name: torch.stack([one[name] for one in sites]) for name in sites[0]}
        together = self.run(stacked, torch.cat(own), None if masks is None else torch.cat(masks))
        if not bool((together - apart).abs().max() <= TOLERANCE * apart.abs().max()):
            self._many = ()


class Split(NamedTuple):
    """A backbone's two parts."""

    trunk: Trunk
    tail: Tail


def split(
    backbone: Backbone, tune: TuneSpec, *, stages: Sequence[TuneSpec] = (), seed: int = 0, check: bool = True
) -> Split:
    """Cut a backbone before the first layer that trains.

    Args:
        backbone: the whole; its weights are shared by the trunk and copied where they train.
        tune: the layers and parameters that train.
        stages: what trains in each stage of a schedule, of which `tune` is the last.
        seed: seeds the initial adapters of LoRA; the same at every site.
        check: whether to compare trunk and tail with the whole on the probes.

    Raises:
        UserError: if the backbone cannot be cut, or has no such layers or parameters.
    """
    if tune.method == "head":
        raise UserError("The head alone trains on features: there is nothing to cut.")
    cuts = cuts_of(backbone)
    place, names = choose(cuts, tune, backbone.spec)
    names = of_method(cuts.module, names, tune, backbone.spec)
    below, above, prefix = cuts.cut(place)
    trunk = Trunk(backbone, _separate(below, set()), f"before {place}")
    owned = set() if tune.method == "lora" else {f"{prefix}{name}" for name in names}
    tail = Tail(_separate(above, owned), prefix, backbone, tune)
    if tune.method == "lora":
        layers = [f"{prefix}{name.removesuffix('.weight')}" for name in names]
        add_adapters(tail.module, layers, tune.rank, frozen_first=tune.variant == "ffa", seed=seed)
    trained = list(tail.trainable())
    depths = depths_of(cuts, names)
    tail.depths = {name: depths[weight_of(name)] for name in trained}
    tail.stages = names_by_stage(cuts, stages, trained, backbone.spec)
    if check:
        _require_equal(backbone, trunk, tail)
    if tune.method == "lora":
        tail.join_sites(*trunk.boundary(backbone.probe_batch()))
    return Split(trunk, tail)


@dataclass(frozen=True)
class Block:
    """A block of a backbone.

    Attributes:
        name: of its layer.
        parameters: the number of parameters of it and the layers up to the next block.
        boundary: the shape of the activations before it, of one row; None for the length of a text.
    """

    name: str
    parameters: int
    boundary: tuple[int | None, ...]


def blocks_of(backbone: Backbone) -> list[Block]:
    """Return the blocks of a backbone, in the order in which they run; `last:K` are the last K.

    Raises:
        UserError: if the backbone cannot be cut.
    """
    cuts = cuts_of(backbone)
    sizes = [
        sum(parameter.numel() for parameter in cuts.parameters_of(block).values()) for block in range(len(cuts.blocks))
    ]
    own = [here - later for here, later in zip(sizes, [*sizes[1:], 0], strict=True)]
    return [Block(*one) for one in zip(cuts.blocks, own, cuts.shapes(), strict=True)]


def merged(backbone: Backbone, tail: Tail, parameters: Mapping[str, Tensor]) -> Backbone:
    """Return the whole backbone with tuned parameters: a copy with its own digests, adapters added to the weights.

    Args:
        backbone: the one that was cut; it is not modified.
        tail: its tail; it is not modified.
        parameters: as from `Tail.trainable`.

    Raises:
        ValueError: if the parameters are not those of the tail.
    """
    loaded = copy.deepcopy(tail)
    loaded.load(parameters)
    tuned = merged_weights(loaded.module) if tail.tune.method == "lora" else loaded.trainable()
    prefix = tail.prefix.removeprefix("module.")
    whole = copy.copy(backbone)
    for name in ("digest", "weights_digest", "num_features"):
        whole.__dict__.pop(name, None)
    whole.module = copy.deepcopy(backbone.module)
    whole.trained = True
    own = dict(whole.module.named_parameters())
    for name, tensor in tuned.items():
        own[f"{prefix}{name.removeprefix(prefix)}"].copy_(tensor)
    return whole


def cuts_of(backbone: Backbone) -> Cuts:
    """Return the places at which a backbone can be cut.

    Raises:
        UserError: if there are none, with the reason.
    """
    if backbone.spec.partition(":")[0] in NO_BLOCKS or backbone.spec in NO_BLOCKS or not backbone.num_parameters:
        raise UserError(f"{backbone.spec} has no layers that could train.")
    if backbone.kind == "audio":
        raise UserError(f"{backbone.spec} takes sounds, whose backbones cannot be tuned yet; train the head alone.")
    if backbone.layer == NEXT_TOKEN:
        from fedhead.backbones.hf_seq2seq import NextTargets
        from fedhead.backbones.split_causal import CausalCuts
        from fedhead.backbones.split_seq2seq import PairCuts

        if isinstance(backbone.module, NextTargets):
            return PairCuts(backbone.module, backbone.spec)
        whole: Any = backbone.module
        return CausalCuts(whole, backbone.spec)
    if backbone.spec.startswith("hf:"):
        return StateCuts(backbone.module, backbone.spec)
    example = backbone.probe_batch()
    if not isinstance(example, Tensor):
        raise UserError(f"{backbone.spec} takes {ITEMS[backbone.kind]}; of these, only models hf:NAME can be tuned.")
    return GraphCuts(backbone.module, example.to(backbone.device), backbone.spec)


def _separate(module: nn.Module, names: set[str]) -> nn.Module:
    """Return a copy that owns the named parameters, which train, and shares all other tensors."""
    shared = [tensor for name, tensor in module.named_parameters() if name not in names]
    copied = copy.deepcopy(module, {id(tensor): tensor for tensor in [*shared, *module.buffers()]})
    for name, parameter in copied.named_parameters():
        if name in names:
            parameter.requires_grad_(True)
    return copied.eval()


def _require_equal(backbone: Backbone, trunk: Trunk, tail: Tail) -> None:
    batch = backbone.probe_batch()
    whole = backbone.features(batch)
    with torch.no_grad():
        parts = tail(*trunk.boundary(batch))
    worst = float((parts - whole).abs().max() / whole.abs().max().clamp_min(1e-12))
    if not worst <= TOLERANCE:
        raise UserError(
            f"{backbone.spec} cannot be cut {trunk.layer}: trunk and tail give other features than the whole "
            f"(by {worst:.1e}). Choose another layer, or train the head alone."
        )
