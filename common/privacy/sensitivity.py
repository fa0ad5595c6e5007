"""How far one row, or one group of rows, can move stacked sums.

Rows `z` have norm at most `B`. The stacked sums are the counts of each class, the sums of each class's rows and
`svec(sum z z^T)`, where `svec` lists a symmetric matrix with its off-diagonal entries times `sqrt(2)`, so that its
Euclidean norm is the matrix's Frobenius norm and `|svec(z z^T)| = |z|^2`. The rows of a group of `k` count `1/k` each:
the group then moves the sums no further than a row does, since they are convex in it.
"""

import math
from typing import Literal

import torch
from torch import Tensor

Neighbours = Literal["add-remove", "replace"]
"""Data sets are neighbours if one has one row or group more than the other, or another one in its place."""


def squared_mu(
    counts: float, sums: float, gram: float, bound: float = 1.0, neighbours: Neighbours = "add-remove"
) -> float:
    """Return `mu^2` of a release of the stacked sums with independent Gaussian noise.

    Adding a row moves them by `n + a + g` with `n = 1 / counts^2`, `a = B^2 / sums^2` and `g = B^4 / gram^2`. Replacing
    a row by one of another class moves them by at most `2 (n + a + g)`; by one of the same class, at angle `t`, by
    `2 a (1 - cos t) + 2 g (1 - cos^2 t)`, which is largest at `cos t = -a / (2 g)`, or at -1.

    Args:
        counts: the noise's standard deviation on counts.
        sums: on class sums.
        gram: on every entry of `svec`.
        bound: `B`.
        neighbours: which data sets are neighbours.
    """
    n, a, g = counts**-2, bound**2 / sums**2, bound**4 / gram**2
    if neighbours == "add-remove":
        return n + a + g
    same_class = 4 * a if a >= 2 * g else 2 * a + 2 * g + a * a / (2 * g)
    return max(2 * (n + a + g), same_class)


def svec(matrix: Tensor) -> Tensor:
    """Return the upper triangle `[d (d + 1) / 2]` of a symmetric `[d, d]`, off-diagonal entries times `sqrt(2)`."""
    row, column = torch.triu_indices(*matrix.shape, device=matrix.device)
    packed: Tensor = matrix[row, column]
    return torch.where(row == column, packed, packed * math.sqrt(2))


def unsvec(packed: Tensor, size: int) -> Tensor:
    """Undo `svec`."""
    row, column = torch.triu_indices(size, size, device=packed.device)
    matrix = packed.new_zeros(size, size)
    matrix[row, column] = torch.where(row == column, packed, packed / math.sqrt(2))
    return matrix + matrix.triu(1).T


def unit_rows(features: Tensor) -> Tensor:
    """Return rows `[n, d]` divided by their norms, float64; rows of norm 0 stay."""
    rows = features.to(torch.float64)
    lengths = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / torch.where(lengths > 0, lengths, 1.0)


def group_weights(groups: Tensor) -> Tensor:
    """Return `[n]`, float64, the weight `1/k` of each row in a group of `k`.

    Args:
        groups: `[n]`, a number for each row's group.
    """
    _, inverse, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
    weights: Tensor = 1 / sizes.to(torch.float64)[inverse]
    return weights
