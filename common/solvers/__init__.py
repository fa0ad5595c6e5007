"""Closed-form heads and scores from feature statistics alone."""

from fedhead.solvers.boxes import solve_boxes
from fedhead.solvers.closed_form import (
    ABSENT_MARGIN,
    negligible_eigenvalue,
    positive_spectrum,
    shrink_correlation,
    solve_head,
    solve_positive,
    solve_prototypes,
)
from fedhead.solvers.cross_validated import cross_validation_error, solve_cross_validated_lda
from fedhead.solvers.hazards import solve_hazards
from fedhead.solvers.shares import solve_share_lda

__all__ = [
    "ABSENT_MARGIN",
    "cross_validation_error",
    "negligible_eigenvalue",
    "positive_spectrum",
    "shrink_correlation",
    "solve_boxes",
    "solve_cross_validated_lda",
    "solve_hazards",
    "solve_head",
    "solve_positive",
    "solve_prototypes",
    "solve_share_lda",
]
