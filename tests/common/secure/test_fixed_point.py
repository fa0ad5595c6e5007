from fractions import Fraction
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhead.secure import SecureSumError, UnsummableError
from fedhead.secure import fixed_point as ring
from fedhead.secure.layout import Layout

SIDES = st.sampled_from([1, 2])


def exact(elements: np.ndarray) -> list[Fraction]:
    """The rational numbers that elements stand for, in Python's integers."""
    limbs = len(elements)
    bits = 64 * limbs
    raw = [sum(int(elements[limb, at]) << 64 * limb for limb in range(limbs)) for at in range(elements.shape[1])]
    signed = [value - (1 << bits) if value >> (bits - 1) else value for value in raw]
    return [Fraction(value, 1 << ring.FRACTION_BITS[limbs]) for value in signed]


def values(limbs: int, terms: int) -> st.SearchStrategy[list[float]]:
    bound = ring.largest(limbs, terms)
    number = st.floats(-bound, bound, exclude_min=True, exclude_max=True).filter(lambda x: abs(x) < bound * (1 - 1e-9))
    return st.lists(number | st.floats(-2, 2) | st.floats(-1e-15, 1e-15), min_size=5, max_size=5)


@settings(deadline=None, max_examples=40)
@given(st.data(), SIDES, st.integers(1, 6))
def test_sum_equals_exact_sum_of_rounded_values_in_any_order(data: st.DataObject, limbs: int, terms: int) -> None:
    rows = [data.draw(values(limbs, terms)) for _ in range(terms)]
    step = Fraction(1, 1 << ring.FRACTION_BITS[limbs])
    expected = [sum((round(Fraction(x) / step) for x in column), 0) * step for column in zip(*rows, strict=True)]
    encoded = [ring.encode(np.array(row), limbs, terms) for row in rows]
    for order in (encoded, encoded[::-1]):
        total = np.zeros((limbs, 5), np.uint64)
        for term in order:
            ring.add(total, term)
        assert exact(total) == expected
        np.testing.assert_allclose(ring.decode(total), [float(x) for x in expected], rtol=4e-16, atol=0)
    for term in encoded:
        ring.subtract(total, term)
    assert not total.any()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-(2.0**61), 2.0**61), min_size=1, max_size=20), SIDES)
def test_round_trip(numbers: list[float], limbs: int) -> None:
    array = np.array(numbers) if limbs == 2 else np.array(numbers) / 2.0**32
    elements = ring.encode(array, limbs, 2)
    np.testing.assert_allclose(ring.decode(elements), array, rtol=0, atol=2.0 ** -(ring.FRACTION_BITS[limbs] + 1))
    large = np.abs(array) >= 2.0 ** (52 - ring.FRACTION_BITS[limbs])
    assert (ring.decode(elements)[large] == array[large]).all()


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(-(2**61), 2**61), min_size=1, max_size=9), st.lists(st.integers(0, 2**61), max_size=9), SIDES
)
def test_integers_are_summed_exactly(first: list[int], second: list[int], limbs: int) -> None:
    second = (second + first)[: len(first)]
    total = ring.encode_integers(np.array(first), limbs, 2)
    ring.add(total, ring.encode_integers(np.array(second, np.int64), limbs, 2))
    assert ring.decode_integers(total).tolist() == [a + b for a, b in zip(first, second, strict=True)]


@pytest.mark.parametrize("limbs", [1, 2])
@pytest.mark.parametrize("terms", [1, 3, 200])
@pytest.mark.parametrize("sign", [1, -1])
def test_values_at_bound_are_refused(limbs: int, terms: int, sign: int) -> None:
    bound = ring.largest(limbs, terms)
    with pytest.raises(SecureSumError, match="too large"):
        ring.encode(np.array([0.0, sign * bound]), limbs, terms)
    below = ring.encode(np.array([sign * np.nextafter(bound, 0)]), limbs, terms)
    assert np.sign(ring.decode(below)[0]) == sign
    counts = (2**63 - 1) // terms + 1
    with pytest.raises(SecureSumError, match="too large"):
        ring.encode_integers(
            np.array([counts if sign > 0 else -counts], dtype=np.uint64 if sign > 0 else None), limbs, terms
        )
    for wrong in (np.nan, sign * np.inf):
        with pytest.raises(SecureSumError, match="not finite"):
            ring.encode(np.array([1.0, wrong]), limbs, terms)


def test_rounding_up_to_bound_among_very_many_sites_is_refused() -> None:
    terms = 2**20
    with pytest.raises(SecureSumError, match="too large"):
        ring.encode(np.array([2.0**11 - 2.0**-40]), 1, terms)


def test_fractional_sum_of_counts_is_rejected() -> None:
    with pytest.raises(SecureSumError, match="no integer"):
        ring.decode_integers(ring.encode(np.array([1.5]), 2, 3))


ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    "counts": np.array([3, 0, 250], np.uint8),
    "head.weight": np.array([[0.5, -1.25], [1e3, 2.0**-20]], np.float32),
    "loss_sum": np.array(-3.75),
    "none": np.empty((0, 4)),
    "rows": np.array([2**40], np.int64),
}


@pytest.mark.parametrize("limbs", [1, 2])
def test_layout_round_trip(limbs: Literal[1, 2]) -> None:
    layout = Layout.of(ARRAYS, limbs)
    assert Layout.model_validate_json(layout.model_dump_json()) == layout
    vector = layout.pack(ARRAYS, 3)
    assert vector.shape == (limbs, layout.size) == (limbs, 10)
    total = vector.copy()
    ring.add(total, vector)
    arrays = layout.unpack(total)
    assert arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == (np.float64 if array.dtype.kind == "f" else np.int64)
        np.testing.assert_array_equal(arrays[name], 2 * array.astype(arrays[name].dtype))


@pytest.mark.parametrize(
    "changed",
    [
        {"loss_sum": np.array([1.0])},
        {"loss_sum": np.array(1)},
        {"counts": np.array([1.0, 2.0, 3.0])},
        {"other": np.array(1.0)},
    ],
)
def test_arrays_of_another_form_are_rejected(changed: dict[str, Any]) -> None:
    with pytest.raises(SecureSumError, match="layout"):
        Layout.of(ARRAYS, 2).pack({**ARRAYS, **changed}, 3)
    with pytest.raises(SecureSumError, match="layout"):
        Layout.of(ARRAYS, 2).pack({"counts": ARRAYS["counts"]}, 3)


def test_invalid_layouts_are_rejected() -> None:
    good = Layout.of(ARRAYS, 2).model_dump()
    for wrong in (
        {**good, "limbs": 3},
        {**good, "limbs": 2.0},
        {**good, "entries": good["entries"][::-1]},
        {**good, "entries": good["entries"][:1] * 2},
        {**good, "entries": ()},
        {**good, "entries": ({"name": "x", "shape": (2**20, 2**20), "kind": "real"},)},
        {**good, "entries": ({"name": "x", "shape": (-1,), "kind": "real"},)},
        {**good, "entries": ({"name": "x\n", "shape": (1,), "kind": "real"},)},
    ):
        with pytest.raises(ValueError):
            Layout(**wrong)
    for vector in (np.zeros((2, 9), np.uint64), np.zeros((1, 10), np.uint64), np.zeros((2, 10))):
        with pytest.raises(SecureSumError, match="instead of"):
            Layout.of(ARRAYS, 2).unpack(vector)
    with pytest.raises(ValueError, match="cannot be summed"):
        Layout.of({"x": np.array(["text"])}, 1)


@pytest.mark.parametrize("limbs", [1, 2])
def test_one_site_without_sums_makes_the_total_unusable(limbs: Literal[1, 2]) -> None:
    layout = Layout.of(ARRAYS, limbs)
    total = layout.pack(ARRAYS, 3)
    ring.add(total, layout.unsummable())
    with pytest.raises(UnsummableError, match="values of a site cannot be summed"):
        layout.unpack(total)
    first, second = layout.unsummable(), layout.unsummable()
    assert (first != second).all()
