"""Random sign projection of wide features to `MAX_WIDTH`, applied before computing statistics."""

from collections.abc import Iterator

import numpy
import torch
from torch import Tensor

from fedhead.heads import FeatureMap, LinearHead

MAX_WIDTH = 4096
"""Default width limit; wider features are projected before computing statistics."""


class RandomProjection:
    """Projection `x P` of wide features `[n, D]` to `[n, d]` by random signs (Achlioptas, JCSS 2003).

    The entries of `P` `[D, d]` are `1/sqrt(d)` or its negative with equal probability, so inner products are preserved
    up to a relative deviation of about `sqrt(2/d)`. `P` depends only on its shape and the seed and is the same in
    every process, on every machine. It is generated in blocks of rows and never held as a whole.

    Args:
        wide: `D`.
        narrow: `d`.
        seed: at least 0.
    """

    _ROWS = 1024

    def __init__(self, wide: int, narrow: int, seed: int) -> None:
        if not 0 < narrow < wide:
            raise ValueError(f"Cannot project {wide} features to {narrow}.")
        self.wide = wide
        self.narrow = narrow
        self.seed = seed

    def __call__(self, features: Tensor) -> Tensor:
        """Return the projection `[n, d]`, float64, of features `[n, D]`.

        Raises:
            ValueError: if the width differs.
        """
        if features.ndim != 2 or features.shape[1] != self.wide:
            raise ValueError(f"Features must be [n, {self.wide}], not {list(features.shape)}.")
        narrow = torch.zeros(len(features), self.narrow, dtype=torch.float64, device=features.device)
        for rows, signs in self._blocks():
            narrow.addmm_(features[:, rows].to(torch.float64), signs.to(features.device))
        return narrow.mul_(self.narrow**-0.5)

    @torch.no_grad()
    def widen(self, head: LinearHead) -> LinearHead:
        """Return the head on wide features that equals `head` on their projection: weight `W P^T`.

        Raises:
            ValueError: if the head does not take `d` features.
        """
        if head.num_features != self.narrow:
            raise ValueError(f"The head takes {head.num_features} features, not {self.narrow}.")
        weight = head.weight.to(torch.float64) * self.narrow**-0.5
        wide = torch.cat([weight @ signs.T.to(weight.device) for _, signs in self._blocks()], dim=1)
        return LinearHead.from_weights(wide.to(head.weight.dtype), head.bias)

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for number, start in enumerate(range(0, self.wide, self._ROWS)):
            rows = min(self._ROWS, self.wide - start)
            values = rows * self.narrow
            # The raw words of a counter-based generator are stable across NumPy versions; its normal deviates are not.
            words = numpy.random.Philox(key=[self.seed, number]).random_raw(-(-values // 64))
            bits = numpy.unpackbits(words.astype("<u8").view(numpy.uint8), count=values)
            signs = torch.from_numpy(bits).to(torch.float64).mul_(2).sub_(1)
            yield slice(start, start + rows), signs.reshape(rows, self.narrow)


def projection_for(num_features: int, seed: int, limit: int = MAX_WIDTH) -> RandomProjection | None:
    """Return the projection to `limit` features if there are more, else None."""
    return RandomProjection(num_features, limit, seed) if num_features > limit else None


def origin_of(probe: Tensor, seed: int, mapping: FeatureMap | None = None) -> Tensor:
    """Return the origin of a run's statistics: the mean of its probe's features `[PROBES, d]`, mapped if there is one.

    For projected features it is zeros: a projected origin might differ in its last bits between machines, and sums
    about different origins cannot be added. For the same reason a mapped one is rounded to two or three digits.
    """
    mean = probe.mean(0) if mapping is None else mapping(probe.double()).mean(0).bfloat16().double()
    project = projection_for(len(mean), seed)
    return mean if project is None else torch.zeros(project.narrow)
