"""Maps of features in front of a head: rows of unit length, and public non-linear lifts of them.

A map is known to all: it depends on settings, the run's seed and, for landmarks, on pooled moments of the features.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedhead.config import MOST_LIFTED, lifted_width
from fedhead.errors import UserError
from fedhead.heads.head import Head, make_head

if TYPE_CHECKING:
    from fedhead.tasks.losses import Loss

Basis = Literal["none", "unit", "root"]
LiftName = Literal["", "landmarks", "relu"]

BASES: tuple[Basis, ...] = ("none", "unit", "root")
_JITTER = 1e-6
_LEAST_SPREAD = 1e-3
_GRID = 2.0**20
_STREAMS: Mapping[str, int] = {"landmarks": 2**40, "relu": 2**40 + 1}


@dataclass(frozen=True)
class MapForm:
    """The form of a feature map, written as `BASIS` or `BASIS+LIFT:WIDTH`, such as `unit` or `root+landmarks:1024`.

    Attributes:
        basis: `unit` divides each row by its length; `root` does so after a signed square root.
        lift: `landmarks`, `relu` or none.
        width: of the lifted features; 0 without a lift.
    """

    basis: Basis = "none"
    lift: LiftName = ""
    width: int = 0

    def __str__(self) -> str:
        return f"{self.basis}+{self.lift}:{self.width}" if self.lift else self.basis

    def __bool__(self) -> bool:
        return self.basis != "none" or bool(self.lift)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Undo `str`.

        Raises:
            UserError: if it is no form.
        """
        basis, plus, lift = text.partition("+")
        if basis not in BASES or (plus and basis == "none"):
            raise UserError(f"A map of features starts with 'unit' or 'root', not {basis!r}.")
        name, width = parse_lift(lift if plus else "none")
        return cls(basis, name, width)

    def num_features(self, plain: int) -> int:
        """Return the number of mapped features, given that of the plain ones."""
        return self.width if self.lift else plain


def parse_lift(text: str) -> tuple[LiftName, int]:
    """Read `none`, `landmarks:WIDTH` or `relu:WIDTH`.

    Raises:
        UserError: if it is none of these.
    """
    if text == "none":
        return "", 0
    width = lifted_width(text)
    if width is None:
        raise UserError(
            f"A lift is 'none', 'landmarks:WIDTH' or 'relu:WIDTH' with a width from 1 to {MOST_LIFTED}, as in "
            f"'landmarks:1024', not {text!r}."
        )
    return ("landmarks" if text.startswith("landmarks") else "relu"), width


class FeatureMap(nn.Module):
    """A map of features `[..., d]` to `[..., D]`.

    With `s = x`, or `s = sign(x) sqrt|x|` for the basis `root`, `u = s / |s|` (RootSIFT; Arandjelovic & Zisserman, CVPR
    2012). Landmarks `l_j` give `exp((u . l_j - 1) / v)`, a Gaussian kernel of unit rows, as in Nystroem's method
    (Williams & Seeger, NIPS 2000); `relu` gives `max(u . p_j, 0)` for random directions `p_j` (an extreme learning
    machine; Huang et al., 2006).

    Args:
        form: of the map.
        num_features: `d`.

    Attributes:
        directions: `[D, d]`, the landmarks or the random directions; `[0, d]` without a lift.
        spread: `[1]`, `v`.
    """

    directions: Tensor
    spread: Tensor

    def __init__(self, form: MapForm, num_features: int) -> None:
        super().__init__()
        self.form = form
        self.plain = num_features
        self.register_buffer("directions", torch.zeros(form.width, num_features, dtype=torch.float64))
        self.register_buffer("spread", torch.ones(1, dtype=torch.float64))
        self._casts: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    @classmethod
    def relu(cls, basis: Basis, num_features: int, width: int, seed: int) -> Self:
        """Return the random rectified features of a seed."""
        made = cls(MapForm(basis, "relu", width), num_features)
        made.directions.copy_(normal_deviates("relu", seed, width, num_features))
        return made

    @classmethod
    def landmarks(cls, basis: Basis, mean: Tensor, covariance: Tensor, width: int, seed: int) -> Self:
        """Return the features of `width` landmarks drawn around the unit rows' mean.

        `l_j = normalise(m + L g_j)` with normal deviates `g_j`, `L` the Cholesky factor of `S + 1e-6 (v / d) I` and
        `v = tr S`.

        Args:
            basis: of the rows.
            mean: `[d]`, `m`.
            covariance: `[d, d]`, `S`.
            width: the number of landmarks.
            seed: of the deviates.

        Raises:
            ValueError: if no unit rows have these moments, or they hardly vary.
        """
        mean, covariance = mean.double(), covariance.double()
        spread = float(covariance.trace())
        length = float(mean.square().sum())
        if not length + spread <= 1 + 1e-6 or not spread >= _LEAST_SPREAD:
            raise ValueError("rows of unit length that vary cannot have this mean and covariance")
        made = cls(MapForm(basis, "landmarks", width), len(mean))
        shifted = covariance.clone()
        shifted.diagonal().add_(_JITTER * spread / len(mean))
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if bool(failed):
            raise ValueError("the covariance has a negative eigenvalue")
        drawn = normal_deviates("landmarks", seed, width, len(mean)) @ factor.T
        # In float32, as a model keeps them, so that sites that join later map features as the others did.
        made.directions.copy_(functional.normalize(mean + drawn, dim=1).float())
        made.spread.copy_(torch.tensor(spread).float())
        return made

    @property
    def width(self) -> int:
        """`D`."""
        return self.form.num_features(self.plain)

    def forward(self, features: Tensor) -> Tensor:
        rows = unit_rows(features, self.form.basis)
        if not self.form.lift:
            return rows
        directions, spread = self._cast(rows)
        products: Tensor = rows @ directions.T
        return products.relu() if self.form.lift == "relu" else ((products - 1) / spread).exp()

    def _cast(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if self.directions.dtype == like.dtype and self.directions.device == like.device:
            return self.directions, self.spread
        key = (like.dtype, like.device)
        if key not in self._casts:
            self._casts[key] = (self.directions.to(like), self.spread.to(like))
        return self._casts[key]


def unit_rows(features: Tensor, basis: Basis) -> Tensor:
    """Return the rows `[..., d]` in a basis; rows of zeros remain zeros."""
    if basis == "none":
        return features
    if basis == "root":
        features = features.sign() * features.abs().sqrt()
    return functional.normalize(features, dim=-1, eps=torch.finfo(features.dtype).tiny)


def basis_for(probe: Tensor) -> Basis:
    """Return the basis that fits features like `probe` `[n, d]`: `root` if none is negative, as after a ReLU."""
    return "root" if bool((probe >= 0).all()) else "unit"


def normal_deviates(stream: str, seed: int, rows: int, columns: int) -> Tensor:
    """Return `[rows, columns]` normal deviates, float64, the same on every machine.

    They are quantiles of the raw words of a counter-based generator, rounded to `2^-20`, so that the last bits of a
    machine's own quantile function do not matter.
    """
    words = numpy.random.Philox(key=[seed, _STREAMS[stream]]).random_raw(rows * columns)
    uniform = ((words >> numpy.uint64(11)).astype(numpy.float64) + 0.5) * 2.0**-53
    deviates: Tensor = torch.special.ndtri(torch.from_numpy(uniform))
    return (deviates.mul_(_GRID).round_() / _GRID).reshape(rows, columns)


class MappedHead(Head):
    """A head behind a map of features, as it is delivered.

    Args:
        mapping: of the features.
        head: on the mapped features.
    """

    inits = ()

    def __init__(self, mapping: FeatureMap, head: Head) -> None:
        super().__init__(mapping.plain, head.num_classes)
        self.mapping = mapping
        self.head = head

    def outputs(self, parameters: Mapping[str, Tensor], features: Tensor) -> Tensor:
        own = {name.removeprefix("head."): value for name, value in parameters.items()}
        return self.head.outputs(own, self.mapping(features))

    def gradients(
        self, parameters: Mapping[str, Tensor], features: Tensor, targets: Tensor, weights: Tensor, loss: "Loss"
    ) -> tuple[dict[str, Tensor], Tensor]:
        own = {name.removeprefix("head."): value for name, value in parameters.items()}
        slopes, values = self.head.gradients(own, self.mapping(features), targets, weights, loss)
        return {f"head.{name}": slope for name, slope in slopes.items()}, values

    def randomise(self, generator: torch.Generator) -> None:
        self.head.randomise(generator)

    def fold(self, mean: Tensor, scale: Tensor) -> None:
        raise ValueError("A head behind a map of features cannot take standardised features.")

    def rescale(self, shift: Tensor, scale: Tensor) -> None:
        self.head.rescale(shift, scale)

    def absorb_temperature(self, temperature: float) -> None:
        self.head.absorb_temperature(temperature)


def behind(mapping: FeatureMap | None, head: Head) -> Head:
    """Return the head on plain features that equals `head` on mapped ones."""
    if mapping is None:
        return head
    like = next(head.parameters())
    own = FeatureMap(mapping.form, mapping.plain)
    own.load_state_dict(mapping.state_dict())
    return MappedHead(own.to(like.device, like.dtype), head)


def unmapped(head: Head) -> Head:
    """Return the head on mapped features, of one that `behind` returned."""
    return head.head if isinstance(head, MappedHead) else head


def delivered_spec(head: Head, spec: str) -> str:
    """Return the spec for `make_delivered`, given the spec of the head itself."""
    return f"{head.mapping.form}/{spec}" if isinstance(head, MappedHead) else spec


def make_delivered(spec: str, num_features: int, num_classes: int) -> Head:
    """Build a delivered head: `HEAD`, or `MAP/HEAD`, as in `root+landmarks:1024/linear`.

    Raises:
        UserError: for an unknown map or head.
    """
    form, slash, inner = spec.rpartition("/")
    if not slash:
        return make_head(spec, num_features, num_classes)
    mapping = FeatureMap(MapForm.parse(form), num_features).float()
    return MappedHead(mapping, make_head(inner, mapping.width, num_classes))
