import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedhead.sums.calibration import losses_of
from fedhead.sums.paired import MOST_LOSS, PairedLosses
from fedhead.sums.rivals import RivalSums
from fedhead.sums.targets import CLASSES

TEMPERATURES = np.array([1.0, 0.7, 2.0])


def rows_of(seed: int, count: int) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, 4, (count,), generator=generator)
    noise = [torch.randn(count, 4, generator=generator) * scale for scale in (1, 3, 40)]
    return [one + torch.nn.functional.one_hot(targets, 4) * 2 for one in noise], targets


def summed(logits: list[Tensor], targets: Tensor) -> RivalSums:
    right = np.stack([(one.argmax(1) == targets).numpy() for one in logits])
    return RivalSums.from_logits(logits, targets, right, TEMPERATURES)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(0, 2), min_size=2, max_size=40))
def test_sums_of_sites_are_those_of_all_rows(seed: int, owners: list[int]) -> None:
    logits, targets = rows_of(seed, len(owners))
    sites = [torch.tensor(owners) == site for site in range(3)]
    total = RivalSums.zeros(3)
    for own in sites:
        total += summed([one[own] for one in logits], targets[own])
    expected = summed(logits, targets).to_arrays()
    for name, array in total.to_arrays().items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-11, atol=1e-11)
    again = RivalSums.from_arrays(total.to_arrays(), RivalSums.zeros(3))
    assert again.rows == len(owners)


def test_a_gain_is_that_of_paired_rows() -> None:
    logits, targets = rows_of(3, 200)
    losses = [
        losses_of(one.double() / float(at), targets, CLASSES).clamp(max=MOST_LOSS).numpy()
        for one, at in zip(logits, TEMPERATURES, strict=True)
    ]
    difference = losses[1] - losses[0]
    mean, error = summed(logits, targets).paired.gain(0, 1)
    assert mean == pytest.approx(difference.mean())
    assert error == pytest.approx(difference.std(ddof=1) / 200**0.5)
    assert summed(logits, targets).paired.gain(1, 0)[0] == pytest.approx(-mean)
    assert RivalSums.zeros(3).paired.gain(0, 1) == (0.0, np.inf)


def test_a_gain_in_correct_rows_is_that_of_paired_rows() -> None:
    logits, targets = rows_of(3, 200)
    correct = [(one.argmax(1) == targets).double().numpy() for one in logits]
    difference = correct[0] - correct[2]
    mean, error = summed(logits, targets).more_right(0, 2)
    assert mean == pytest.approx(difference.mean())
    assert error == pytest.approx(difference.std(ddof=1) / 200**0.5, rel=1e-6)
    assert summed(logits, targets).more_right(1, 1) == (0.0, 0.0)
    assert RivalSums.zeros(3).more_right(0, 1) == (0.0, np.inf)


def test_correct_rows_that_contradict_each_other_are_refused() -> None:
    arrays = dict(summed(*rows_of(1, 50)).to_arrays())
    for both in ([[40, 20], [20, 40]], [[30, 31], [31, 40]], [[30, 25], [24, 30]]):
        changed = arrays["both"].copy()
        changed[:2, :2] = both
        with pytest.raises(ValueError, match=r"rows|symmetric"):
            RivalSums.from_arrays({**arrays, "both": changed}, RivalSums.zeros(3))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rows", -1),
        ("both", 300),
        ("both", -1),
        ("losses", np.nan),
        ("losses", 1e12),
        ("losses", -1.0),
        ("curves", 1e12),
        ("products", 0.0),
        ("products", 1e12),
    ],
)
def test_what_no_rows_can_have_is_refused(name: str, value: float) -> None:
    arrays = {key: array.copy() for key, array in summed(*rows_of(1, 50)).to_arrays().items()}
    arrays[name][..., 0] = value
    with pytest.raises(ValueError, match=name if name not in ("rows", "both") else "rows"):
        RivalSums.from_arrays(arrays, RivalSums.zeros(3))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 60), st.floats(1e-3, 1e3))
def test_sums_of_any_losses_are_accepted(seed: int, rows: int, scale: float) -> None:
    losses = np.random.default_rng(seed).exponential(scale, (3, rows))
    losses[1] = losses[0]
    sums = PairedLosses.of(losses)
    assert PairedLosses.from_arrays(sums.to_arrays(), PairedLosses.zeros(3)).rows == rows


def test_a_gain_cannot_be_claimed_as_certain() -> None:
    rows = 100
    certain = PairedLosses(rows, np.array([MOST_LOSS * rows, 0.0]), np.full((2, 2), MOST_LOSS**2 * rows))
    assert certain.gain(1, 0) == (MOST_LOSS, 0.0)
    with pytest.raises(ValueError, match="too large for the losses"):
        PairedLosses.from_arrays(certain.to_arrays(), PairedLosses.zeros(2))
    # A mean difference of 1, with a mean squared difference of 0.8.
    moderate = PairedLosses(rows, np.array([2.0, 1.0]) * rows, np.array([[5.0, 3.1], [3.1, 2.0]]) * rows)
    with pytest.raises(ValueError, match="differences"):
        PairedLosses.from_arrays(moderate.to_arrays(), PairedLosses.zeros(2))
    uneven = PairedLosses.of(np.random.default_rng(0).exponential(1, (2, rows))).to_arrays()
    uneven["products"][0, 1] *= 0.9
    with pytest.raises(ValueError, match="symmetric"):
        PairedLosses.from_arrays(uneven, PairedLosses.zeros(2))


@pytest.mark.parametrize("rows", [2**50 + 1, 5 * 10**18, 2**63 - 1])
@pytest.mark.parametrize("shared", [0, 1])
def test_counts_that_overflow_a_sum_are_refused(rows: int, shared: int) -> None:
    like = RivalSums.zeros(2)
    both = np.array([[rows, shared * rows], [shared * rows, rows]], np.int64)
    lie = {**like.to_arrays(), "rows": np.array([rows], np.int64), "both": both}
    with pytest.raises(ValueError, match="impossible number of rows"):
        RivalSums.from_arrays(lie, like)
