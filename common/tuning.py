"""Specs of fine-tuning beyond the head: which parameters of a backbone train, and from which block on."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from fedhead.errors import UserError

Method = Literal["head", "full", "bitfit", "norm", "lora"]
Variant = Literal["", "ffa", "sa"]
ObjectiveName = Literal["task", "supcon", "simsiam", "mlm"]
"""Objective of a tail: the task's loss, or another one; see `fedhead.backbones.objectives`."""
ActivationsFrom = Literal["auto", "store", "recompute"]
"""Whether activations below tuned layers are stored; see `fedhead.features.activations`."""
OBJECTIVES: tuple[ObjectiveName, ...] = get_args(ObjectiveName)

DEFAULT_WHERE = "last:4"
"""The layers of `lora`, `bitfit` and `norm` without another choice; all of them in models with fewer blocks."""

NEXT_TOKEN = "next-token"
"""Layer of language models that gives the losses of answers."""

MOST_RANK = 1024
MOST_LENGTH = 500
EXAMPLES = "'head', 'last:2', 'lora:8', 'bitfit', 'norm', 'lora:8@last:2', or the name of a layer, as in 'layer4'"


@dataclass(frozen=True)
class TuneSpec:
    """The parameters that train.

    Attributes:
        method: `head` for the head alone; `full` for all parameters of the layers; `bitfit` for their biases (Ben Zaken
            et al., 2022), `norm` for the scale and shift of their normalisation (Frankle et al., 2021), `lora` for
            low-rank adapters (Hu et al., 2022).
        where: the layers: `last:K` for the last K blocks, `all` for all blocks, or names and patterns of layers, joined
            by `+`. Empty for `head`.
        rank: of the adapters; 0 without.
        variant: `ffa` freezes the adapters' first matrix at its initial values (Sun et al., 2024);
            `sa` keeps their second one at each site (Guo et al., 2024).
        chosen: whether `where` was given, so that too many blocks are an error.
    """

    method: Method
    where: str = ""
    rank: int = 0
    variant: Variant = ""
    chosen: bool = True

    def __str__(self) -> str:
        if self.method in ("head", "full"):
            return self.where or "head"
        name = f"lora:{self.rank}" + (f":{self.variant}" if self.variant else "") if self.rank else self.method
        return f"{name}@{self.where}" if self.chosen else name

    @property
    def personal(self) -> bool:
        """Whether a part of the parameters stays at each site."""
        return self.variant == "sa"

    @property
    def blocks(self) -> int | None:
        """K of `last:K`; None for other layers."""
        found = re.fullmatch(r"last:(\d+)", self.where)
        return int(found[1]) if found else None

    @property
    def patterns(self) -> tuple[str, ...]:
        """The names and patterns of layers; none for `last:K` and `all`."""
        return () if self.blocks is not None or self.where in ("", "all") else tuple(self.where.split("+"))


def parse_tune(text: str) -> TuneSpec:
    """Parse a spec such as `last:2`, `lora:8`, `bitfit@last:1` or `layer4`.

    Raises:
        UserError: if it is malformed; the message says what was expected.
    """
    if len(text) > MOST_LENGTH or not text.isprintable():
        raise UserError(f"A choice of what to tune has at most {MOST_LENGTH} printable characters.")
    method, at, where = text.partition("@")
    if at:
        where = _where(where, text)
    chosen = bool(at)
    name, _, rest = method.partition(":")
    if text == "head":
        return TuneSpec("head")
    if name == "lora":
        rank, variant = _lora(rest, text)
        return TuneSpec("lora", where or DEFAULT_WHERE, rank, variant, chosen)
    if method in ("bitfit", "norm"):
        return TuneSpec("bitfit" if method == "bitfit" else "norm", where or DEFAULT_WHERE, chosen=chosen)
    if at or name == "head":
        raise UserError(f"The choice of what to tune is {text!r}; expected {EXAMPLES}.")
    return TuneSpec("full", _where(method, text))


@dataclass(frozen=True)
class Schedule:
    """Progressive unfreezing (Howard & Ruder, 2018): the layers that train from each round on.

    Attributes:
        starts: the first round of each stage, ascending from 1.
        specs: the parameters that train in each.
    """

    starts: tuple[int, ...]
    specs: tuple[TuneSpec, ...]

    def stage(self, number: int) -> int:
        """Return the position of the stage of a round, from 1 on."""
        return sum(start <= number for start in self.starts) - 1

    def begins(self, number: int) -> bool:
        """Return whether a stage other than the first begins in a round."""
        return number in self.starts[1:]


def parse_schedule(stages: Mapping[int, str]) -> Schedule:
    """Parse the stages by their first rounds; the last one trains the most.

    Raises:
        UserError: if one is malformed, or the first does not begin in round 1.
    """
    starts = tuple(sorted(stages))
    if starts[:1] != (1,):
        raise UserError(f'A schedule begins in round 1, as in {{ 1 = "head" }}, not in round {min(starts, default=0)}.')
    specs = tuple(parse_tune(stages[start]) for start in starts)
    methods = {(spec.method, spec.rank, spec.variant) for spec in specs if spec.rank}
    if len(methods) > 1 or (methods and any(not spec.rank for spec in specs if spec.method != "head")):
        raise UserError("All stages of a schedule with LoRA have adapters of one rank and form; only 'head' has none.")
    if specs[-1].method == "head" or "head" in (spec.method for spec in specs[1:]):
        raise UserError(
            'The head alone trains first in a schedule, and layers of the backbone last, as in { 1 = "head", '
            '5 = "last:1" }.'
        )
    return Schedule(starts, specs)


def _lora(text: str, whole: str) -> tuple[int, Variant]:
    found = re.fullmatch(r"(\d{1,5})(?::(ffa|sa))?", text, re.ASCII)
    rank = int(found[1]) if found else 0
    if found is None or not 0 < rank <= MOST_RANK:
        raise UserError(
            f"The rank of LoRA is 1 to {MOST_RANK}, optionally with 'ffa' or 'sa', as in 'lora:8' or 'lora:8:ffa', "
            f"not {whole!r}."
        )
    return rank, "ffa" if found[2] == "ffa" else "sa" if found[2] else ""


def _where(text: str, whole: str) -> str:
    name, colon, number = text.partition(":")
    if name == "last":
        if not (number.isascii() and number.isdigit() and int(number[:9]) > 0 and len(number) < 10):
            raise UserError(f"The last blocks are counted from 1, as in 'last:2', not {whole!r}.")
        return f"last:{int(number)}"
    if colon or not all(part.strip() for part in text.split("+")):
        raise UserError(f"The choice of what to tune is {whole!r}; expected {EXAMPLES}.")
    return text
