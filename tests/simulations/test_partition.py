import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhead.errors import UserError
from fedhead.simulations.partition import check_rows, divide, site_names

SPECS = ["iid", "dirichlet:0.001", "dirichlet:0.3", "dirichlet:100", "shards:1", "shards:3", "quantity:0.5"]


@given(st.sampled_from(SPECS), st.integers(1, 12), st.integers(40, 200), st.integers(1, 6), st.integers(0, 99))
def test_every_row_is_at_exactly_one_site_and_the_seed_decides_which(
    spec: str, sites: int, rows: int, classes: int, seed: int
) -> None:
    labels = np.random.default_rng(seed).integers(0, classes, rows)
    parts = divide(spec, labels, sites, seed)
    assert list(parts) == site_names(sites)
    assert np.array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(rows))
    again = divide(spec, labels, sites, seed)
    assert all(np.array_equal(parts[name], again[name]) for name in parts)


def test_another_seed_divides_otherwise() -> None:
    labels = np.arange(100) % 5
    first, second = (divide("dirichlet:0.3", labels, 4, seed) for seed in (0, 1))
    assert any(not np.array_equal(first[name], second[name]) for name in first)


def test_iid_sites_are_alike_and_quantities_are_not() -> None:
    labels = np.arange(1000) % 4
    assert {len(rows) for rows in divide("iid", labels, 8, 0).values()} == {125}
    sizes = [len(rows) for rows in divide("quantity:0.3", labels, 8, 0).values()]
    assert max(sizes) > 5 * min(sizes)


def test_a_smaller_alpha_is_more_skewed() -> None:
    labels = np.arange(5000) % 10

    def largest_share(alpha: str) -> float:
        parts = [
            np.bincount(labels[rows], minlength=10) for rows in divide(f"dirichlet:{alpha}", labels, 10, 0).values()
        ]
        return float(np.mean([part.max() / part.sum() for part in parts if part.sum()]))

    assert largest_share("100") < 0.2 < largest_share("0.3") < largest_share("0.001")


def test_shards_give_so_many_classes_a_site() -> None:
    labels = np.arange(1200) % 6
    for rows in divide("shards:2", labels, 6, 0).values():
        assert len(np.unique(labels[rows])) <= 2
        assert len(rows) == 200


def test_folders_are_sites() -> None:
    parts = divide("folder", np.zeros(3, np.int64), 10, 0, ["b", "a", "b"])
    assert {name: rows.tolist() for name, rows in parts.items()} == {"a": [1], "b": [0, 2]}


@pytest.mark.parametrize(
    ("spec", "sites", "words"),
    [
        ("iid", 11, "11 sites cannot share 10 rows"),
        ("iid:3", 2, "takes no argument"),
        ("dirichlet", 2, "positive number"),
        ("dirichlet:-1", 2, "positive number"),
        ("dirichlet:nan", 2, "positive number"),
        ("dirichlet:inf", 2, "positive number"),
        ("quantity:x", 2, "positive number"),
        ("shards:0", 2, "classes per site"),
        ("shards:9", 2, "need 18 rows"),
        ("sample", 2, "rows per site, 1 to 10"),
        ("sample:0", 2, "rows per site"),
        ("sample:11", 2, "rows per site"),
        ("folder", 2, "takes the sites from the data, which names none"),
        ("dirichlett:1", 2, "Did you mean 'dirichlet'"),
    ],
)
def test_what_cannot_be_divided_is_a_sentence(spec: str, sites: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        divide(spec, np.arange(10) % 2, sites, 0)


@given(st.integers(1, 60), st.integers(1, 30), st.data())
def test_sampled_sites_may_share_rows_and_each_has_its_own_once(sites: int, rows: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, rows))
    parts = divide(f"sample:{size}", np.zeros(rows, np.int64), sites, 0)
    assert list(parts) == site_names(sites)
    for own in parts.values():
        assert len(own) == size
        assert (np.diff(own) > 0).all()
        assert 0 <= own.min() <= own.max() < rows


@pytest.mark.parametrize("size", [3, 7])
def test_every_row_is_sampled_as_often(size: int) -> None:
    sites = 20_000
    held = np.concatenate(list(divide(f"sample:{size}", np.zeros(10, np.int64), sites, 0).values()))
    expected = sites * size / 10
    deviation = np.sqrt(expected * (1 - size / 10))
    assert (abs(np.bincount(held, minlength=10) - expected) < 5 * deviation).all()


def test_own_rows_are_checked() -> None:
    assert {name: rows.tolist() for name, rows in check_rows([[3, 1], []], 4).items()} == {
        "site-0": [3, 1],
        "site-1": [],
    }
    with pytest.raises(UserError, match="Row 1 is given to more than one site"):
        check_rows([[0, 1], [1]], 4)
    assert list(check_rows([[0, 1], [1]], 4, shared=True)["site-1"]) == [1]
    with pytest.raises(UserError, match="site-1 name a row twice"):
        check_rows([[0, 1], [1, 0, 1]], 4, shared=True)
    with pytest.raises(UserError, match="from 0 to 4, but there are 4 rows"):
        check_rows([[0, 4]], 4)
