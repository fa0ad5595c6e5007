"""How far one row, or one group of rows, can move stacked sums.

Rows `z` have norm at most `B`. The stacked sums are the counts of each class, the sums of each class's rows and
`svec(sum z z^T)`, where `svec` lists a symmetric matrix with its off-diagonal entries times `sqrt(2)`, so that its
Euclidean norm is the matrix's Frobenius norm and `|svec(z z^T)| = |z|^2`. The rows of a group of `k` count `1/k` each:
the group then moves the sums no further than a row does, since they are convex in it. Adding or removing either moves
counts by 1, sums by `B` and `svec` by `B^2`, at most.
"""

import math

import torch
from torch import Tensor


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
