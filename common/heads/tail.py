"""A head on a tail: layers or adapters of the backbone that train together with the head."""

import hashlib
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from fedhead.heads.head import Head
from fedhead.heads.objectives import Objective

if TYPE_CHECKING:
    from fedhead.tasks.losses import Loss

HEAD: Literal["head."] = "head."
TAIL: Literal["tail."] = "tail."
OBJECTIVE: Literal["objective."] = "objective."
"""Prefixes of the names of parameters."""

ROWS_TOGETHER = 128
"""Rows of activations that are in memory at a time, while several sites train."""
ELEMENTS_TOGETHER = 512
"""Elements of sequences that are computed at once; more at a time were slower."""
LEAST_FILLED = 0.75
"""Length of a site's batch, as a share of that of the longest one computed with it."""

T = TypeVar("T")


class Tail(Protocol):
    """The part of a backbone above the boundary: a pure function of its parameters."""

    @property
    def depths(self) -> Mapping[str, int]:
        """The number of blocks above the one that each trained parameter is in."""

    @property
    def takes_sites(self) -> bool:
        """Whether `run` takes parameters `[S, ...]` of several sites, and their activations one after the other."""

    def trainable(self) -> dict[str, Tensor]:
        """Return the parameters that train, with the backbone's own values."""

    def run(self, parameters: Mapping[str, Tensor], values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return features `[n, d]` of boundary activations `[n, *shape]`, for sequences with their mask."""


class TunedHead(Head):
    """A head on the features of a tail; its inputs are boundary activations `[n, *shape]`.

    Sequences `[n, length, d + 1]` have their mask as the last column. It takes one site at a time, or several if the
    tail does: parameters then have a leading site dimension.

    Args:
        tail: on the device of the activations.
        head: on the tail's features.
        standardisation: mean and scale `[d]` of the features, which the head sees as `(x - mean) / scale`.
        sequences: whether the inputs are sequences.
        mixed: whether the tail trains in bfloat16.
        names: of the tail's parameters that train; all by default. Others keep the backbone's own values.
        decay: how much slower each block learns than the block above it.
    """

    inits = ()
    most_rows = 64
    curved = True

    def __init__(
        self,
        tail: Tail,
        head: Head,
        standardisation: tuple[Tensor, Tensor] | None = None,
        *,
        sequences: bool = False,
        mixed: bool = False,
        names: Collection[str] | None = None,
        decay: float = 1.0,
    ) -> None:
        super().__init__(head.num_features, head.num_classes)
        self.head = head
        self.sequences = sequences
        self.mixed = mixed
        # In tuples, so that the frozen parameters of a tail are not this head's.
        self._tail = (tail,)
        own = tail.trainable()
        self._values = {name: value for name, value in own.items() if names is None or name in names}
        # Given to the tail as well, so that no gradient is computed for them.
        self._fixed = {name: value for name, value in own.items() if name not in self._values}
        if decay != 1:
            self.rates = {f"{TAIL}{name}": decay ** -tail.depths[name] for name in self._values}
        self._standardisation = standardisation

    @property
    def tail(self) -> Tail:
        """The tail."""
        return self._tail[0]

    @property
    def tail_parameters(self) -> dict[str, Tensor]:
        """The tail's trained parameters, by their names in the backbone."""
        return dict(self._values)

    def together(self, rows: int) -> int:
        return max(1, ROWS_TOGETHER // max(rows, 1)) if self.tail.takes_sites else 1

    def outputs(self, parameters: Mapping[str, Tensor], features: Tensor) -> Tensor:
        own: dict[str, Tensor] = {f"{HEAD}{name}": value for name, value in self.head.named_parameters()}
        own |= {f"{TAIL}{name}": value for name, value in self._values.items()}
        sites = next((len(parameters[name]) for name, value in own.items() if parameters[name].ndim > value.ndim), 0)
        if sites == 1:
            parameters, features = {name: value.squeeze(0) for name, value in parameters.items()}, features.squeeze(0)
        rows = self.embed(parameters, features.flatten(0, 1) if sites > 1 else features)
        rows = rows.view(sites, -1, rows.shape[-1]) if sites > 1 else rows
        outputs = self.head.outputs(part_of(parameters, HEAD), rows)
        return outputs.unsqueeze(0) if sites == 1 else outputs

    def embed(self, parameters: Mapping[str, Tensor], activations: Tensor) -> Tensor:
        """Return the tail's features `[n, d]` as the head sees them, standardised."""
        rows = self.features(parameters, activations)
        if self._standardisation is None:
            return rows
        mean, scale = (part.to(rows) for part in self._standardisation)
        return (rows - mean) / scale

    def tail_values(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tail's parameters by their names in the backbone, also those that do not train."""
        return {**self._fixed, **part_of(parameters, TAIL)}

    def features(self, parameters: Mapping[str, Tensor], activations: Tensor) -> Tensor:
        """Return the tail's features `[n, d]`, float32, as they are without standardisation."""
        own = self.tail_values(parameters)
        if not self.sequences:
            return self.tail.run(own, activations).float()
        return self.tail.run(own, activations[..., :-1], activations[..., -1]).float()

    def gradients(
        self, parameters: Mapping[str, Tensor], features: Tensor, targets: Tensor, weights: Tensor, loss: "Loss"
    ) -> tuple[dict[str, Tensor], Tensor]:
        if len(weights) == 1:
            with self.precision(features):
                alone = loss.at(torch.zeros(1, dtype=torch.int64))
                return super().gradients(parameters, features, targets, weights, alone)
        gradients = {name: torch.empty_like(value) for name, value in parameters.items()}
        values = weights.new_empty(len(weights))
        with self.precision(features):
            for sites, length in self._groups(features):
                rows = features[sites, :, :length] if self.sequences else features[sites]
                some = {name: value[sites] for name, value in parameters.items()}
                made, values[sites] = super().gradients(some, rows, targets[sites], weights[sites], loss.at(sites))
                for name, value in made.items():
                    gradients[name][sites] = value
        return gradients, values

    def _groups(self, features: Tensor) -> list[tuple[Tensor, int]]:
        """Return the sites `[k]` that are computed at once, and the length of their sequences.

        Long batches fill a processor's caches by themselves, and those of other lengths would be padded.
        """
        count, rows = features.shape[:2]
        lengths = features.new_full((count,), features[0, 0, ..., 0].numel())
        if self.sequences:
            lengths = features[..., -1].sum(-1).amax(-1).clamp(min=1)
        order, groups = lengths.argsort(descending=True, stable=True), list[tuple[Tensor, int]]()
        ordered, start = lengths[order].tolist(), 0
        while start < count:
            longest = int(ordered[start])
            alike = sum(LEAST_FILLED * longest <= one for one in ordered[start:])
            stop = start + max(1, min(alike, ELEMENTS_TOGETHER // (longest * rows)))
            groups.append((order[start:stop], longest))
            start = stop
        return groups

    def precision(self, like: Tensor) -> AbstractContextManager[object]:
        """Return the context in which the tail trains."""
        return torch.autocast(like.device.type, torch.bfloat16) if self.mixed else nullcontext()

    def trainable(self) -> dict[str, Tensor]:
        head = {f"{HEAD}{name}": value for name, value in self.head.trainable().items()}
        return {**head, **{f"{TAIL}{name}": value.clone() for name, value in self._values.items()}}

    @torch.no_grad()
    def assign(self, parameters: Mapping[str, Tensor]) -> None:
        self.head.assign(part_of(parameters, HEAD))
        given = part_of(parameters, TAIL)
        if {name: value.shape for name, value in given.items()} != {n: v.shape for n, v in self._values.items()}:
            raise ValueError("These are parameters of another tail.")
        self._values = {name: given[name].to(value).clone() for name, value in self._values.items()}

    def forward(self, features: Tensor) -> Tensor:
        """Return outputs `[n, C]` of boundary activations, some rows at a time."""
        parameters = self.trainable()
        return torch.cat([self.outputs(parameters, part) for part in torch.split(features, self.most_rows)])

    def randomise(self, generator: torch.Generator) -> None:
        raise ValueError("A tail starts from the backbone's own parameters.")

    def fold(self, mean: Tensor, scale: Tensor) -> None:
        self.head.fold(mean, scale)

    def rescale(self, shift: Tensor, scale: Tensor) -> None:
        self.head.rescale(shift, scale)

    def absorb_temperature(self, temperature: float) -> None:
        self.head.absorb_temperature(temperature)


class ObjectiveHead(TunedHead):
    """A tail that trains by an objective of its own, with a head that follows its features.

    The head learns the task's loss on the tail's features, and no gradient of it reaches the tail, so that the rounds'
    held-out losses are those of the features.

    Args:
        objective: of the tail.
        tail: see `TunedHead`, as all others.
    """

    def __init__(self, objective: Objective, tail: Tail, head: Head, *args: Any, **settings: Any) -> None:
        super().__init__(tail, head, *args, **settings)
        self.objective = objective
        self._generator = torch.Generator()

    def trainable(self) -> dict[str, Tensor]:
        own = {f"{OBJECTIVE}{name}": value.clone() for name, value in self.objective.trainable().items()}
        return {**super().trainable(), **own}

    def features(self, parameters: Mapping[str, Tensor], activations: Tensor) -> Tensor:
        return super().features(parameters, activations[..., :-1] if self.objective.takes_tokens else activations)

    def seed_draws(self, stream: str) -> None:
        digest = hashlib.blake2b(f"draws {stream}".encode(), digest_size=8).digest()
        self.draw_from(torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1))

    def together(self, rows: int) -> int:
        return 1

    def draw_from(self, generator: torch.Generator) -> None:
        """Draw the random numbers of training from a generator on the CPU."""
        self._generator = generator

    def gradients(
        self, parameters: Mapping[str, Tensor], features: Tensor, targets: Tensor, weights: Tensor, loss: "Loss"
    ) -> tuple[dict[str, Tensor], Tensor]:
        with torch.enable_grad(), self.precision(features):
            leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
            own = {name: value.squeeze(0) for name, value in leaves.items()}
            judged = self.objective.judge(self, own, features.squeeze(0), targets.squeeze(0), self._generator)
            outputs = self.head.outputs(part_of(own, HEAD), judged.features).unsqueeze(0)
            followed = (loss.values(outputs, targets) * weights).sum()
            slopes = torch.autograd.grad(judged.loss + followed, list(leaves.values()), materialize_grads=True)
        return dict(zip(leaves, slopes, strict=True)), judged.loss.detach().reshape(1)


def part_of(parameters: Mapping[str, T], prefix: Literal["head.", "tail.", "objective."]) -> dict[str, T]:
    """Return the parameters with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}
