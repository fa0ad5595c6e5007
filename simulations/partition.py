"""Partitions of a data set's rows among simulated sites, by name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedhead.data import IntArray
from fedhead.errors import UserError
from fedhead.registry import Registry


@dataclass(frozen=True)
class Question:
    """What a partition is asked to divide.

    Attributes:
        labels: `[n]`, the stratum of each row to divide: its class, or as the task has it.
        sites: how many sites there are.
        owners: `[n]` the site that the data itself names for each row, or None.
        generator: seeded by the run.
    """

    labels: IntArray
    sites: int
    owners: Sequence[str] | None
    generator: np.random.Generator


Partition = Callable[[str, Question], dict[str, IntArray]]
"""From an argument and a question to the rows `[n_s]` of each site; but for `sample`, each row at one site at most."""

partitions: Registry[Partition] = Registry("partition")


def divide(
    spec: str, labels: IntArray, sites: int, seed: int, owners: Sequence[str] | None = None
) -> dict[str, IntArray]:
    """Divide rows among sites as `spec` says; sites may be left with none.

    Args:
        spec: `iid`, `dirichlet:ALPHA`, `shards:K`, `quantity:ALPHA`, `sample:ROWS` or `folder`.
        labels: `[n]`, the stratum of each row, by which some partitions skew sites; see `Task.strata`.
        sites: how many.
        seed: same seed, same division.
        owners: the site of each row, where the data says so.

    Raises:
        UserError: for an unknown name, an argument that does not fit, or more sites than rows.
    """
    name, _, argument = spec.partition(":")
    partition = partitions[name]
    if name not in ("folder", "sample") and sites > len(labels):
        raise UserError(f"{sites} sites cannot share {len(labels)} rows; take at most {len(labels)} sites.")
    return partition(argument, Question(labels, sites, owners, np.random.default_rng([seed, 0x5175])))


def check_rows(rows: Sequence[npt.ArrayLike], total: int, shared: bool = False) -> dict[str, IntArray]:
    """Check a user's own list of row numbers per site, and name the sites.

    Args:
        rows: of each site.
        total: how many rows there are.
        shared: whether sites may have rows in common.

    Raises:
        UserError: if a number is no row, occurs twice at a site, or at two sites that must not share it.
    """
    sites = {name: _row_numbers(name, part) for name, part in zip(site_names(len(rows)), rows, strict=True)}
    together = np.concatenate([np.empty(0, dtype=np.int64), *sites.values()])
    if len(together) and not (together.min() >= 0 and together.max() < total):
        raise UserError(f"The sites' rows go from {together.min()} to {together.max()}, but there are {total} rows.")
    if shared:
        for name, own in sites.items():
            if len(own) > 1 and not (np.diff(np.sort(own)) > 0).all():
                raise UserError(f"The rows of {name} name a row twice.")
    elif len(np.unique(together)) < len(together):
        values, counts = np.unique(together, return_counts=True)
        raise UserError(
            f"Row {values[counts > 1][0]} is given to more than one site. If sites are to have rows in common, say "
            "shared_rows=True."
        )
    return sites


def _row_numbers(name: str, part: npt.ArrayLike) -> IntArray:
    numbers = np.asarray(part).ravel()
    if len(numbers) and numbers.dtype.kind not in "iu":
        raise UserError(f"The rows of {name} must be row numbers, not of type {numbers.dtype}.")
    return numbers.astype(np.int64)


def site_names(count: int) -> list[str]:
    """Return `site-0` and so on, padded so that names sort as numbers do."""
    width = len(str(max(count - 1, 0)))
    return [f"site-{number:0{width}d}" for number in range(count)]


@partitions.register("iid")
def iid(argument: str, question: Question) -> dict[str, IntArray]:
    """Deal rows out evenly, at random."""
    if argument:
        raise UserError(f"The partition 'iid' takes no argument, but was given {argument!r}.")
    rows = question.generator.permutation(len(question.labels))
    return _named(np.array_split(rows, question.sites))


@partitions.register("dirichlet")
def dirichlet(argument: str, question: Question) -> dict[str, IntArray]:
    """Divide each class by shares drawn from Dirichlet(ALPHA) (Hsu, Qi & Brown, 2019); smaller is more skewed."""
    alpha = _positive("dirichlet", argument)
    parts: list[list[IntArray]] = [[] for _ in range(question.sites)]
    for label in np.unique(question.labels):
        rows = question.generator.permutation(np.flatnonzero(question.labels == label))
        for part, piece in zip(parts, _split(rows, _shares(alpha, question)), strict=True):
            part.append(piece)
    return _named([np.concatenate(part) for part in parts])


@partitions.register("quantity")
def quantity(argument: str, question: Question) -> dict[str, IntArray]:
    """Give sites unequal numbers of rows, by shares drawn from Dirichlet(ALPHA), of all classes alike."""
    alpha = _positive("quantity", argument)
    rows = question.generator.permutation(len(question.labels))
    return _named(_split(rows, _shares(alpha, question)))


@partitions.register("shards")
def shards(argument: str, question: Question) -> dict[str, IntArray]:
    """Give each site K shards of one class each (McMahan et al., 2017): K classes a site, or fewer."""
    if not argument.isdecimal() or int(argument) == 0:
        raise UserError(f"The partition 'shards' needs the classes per site, as in 'shards:2', not {argument!r}.")
    per_site = int(argument)
    wanted = per_site * question.sites
    if wanted > len(question.labels):
        raise UserError(f"{question.sites} sites with {per_site} shards each need {wanted} rows or more.")
    classes, counts = np.unique(question.labels, return_counts=True)
    # As many shards a class as its share of the rows, one at the least, until there are enough.
    pieces = np.maximum(1, np.floor(counts / counts.sum() * wanted).astype(int))
    while pieces.sum() < wanted:
        pieces[np.argmax(counts / pieces)] += 1
    cut = [
        piece
        for label, number in zip(classes, pieces, strict=True)
        for piece in np.array_split(question.generator.permutation(np.flatnonzero(question.labels == label)), number)
    ]
    order = question.generator.permutation(len(cut))
    return _named([np.concatenate([cut[i] for i in order[site :: question.sites]]) for site in range(question.sites)])


@partitions.register("sample")
def sample(argument: str, question: Question) -> dict[str, IntArray]:
    """Give each site so many rows at random, which other sites may have too: any number of sites on one data set."""
    total = len(question.labels)
    if not argument.isdecimal() or not 0 < int(argument) <= total:
        raise UserError(
            f"The partition 'sample' needs the rows per site, 1 to {total}, as in 'sample:20', not {argument!r}."
        )
    subsets = _subsets(question.generator, question.sites, int(argument), total)
    return dict(zip(site_names(question.sites), subsets, strict=True))


def _subsets(generator: np.random.Generator, count: int, size: int, total: int) -> IntArray:
    """Return `[count, size]`, in each row a uniformly random subset of `range(total)`, sorted."""
    if 2 * size > total:
        return np.stack([np.sort(generator.permutation(total)[:size]) for _ in range(count)])
    drawn = np.sort(generator.integers(total, size=(count, size)))
    open_rows = np.arange(count)
    while len(open_rows):
        # What is drawn again, until all differ, does not depend on which rows they are: all subsets are as likely.
        again = drawn[open_rows]
        twice = np.zeros(again.shape, dtype=np.bool_)
        twice[:, 1:] = again[:, 1:] == again[:, :-1]
        more = twice.any(1)
        open_rows, again, twice = open_rows[more], again[more], twice[more]
        again[twice] = generator.integers(total, size=int(twice.sum()))
        drawn[open_rows] = np.sort(again)
    return drawn


@partitions.register("folder")
def folder(argument: str, question: Question) -> dict[str, IntArray]:
    """Take the sites that the data names: each sub-folder of `folder:PATH` or value of a table's `site` is one."""
    if argument:
        raise UserError(f"The partition 'folder' takes no argument, but was given {argument!r}.")
    if question.owners is None:
        raise UserError(
            "The partition 'folder' takes the sites from the data, which names none. Expected folder:PATH with a "
            "sub-folder per site, or a table with a column 'site'."
        )
    owners = np.asarray(question.owners)
    return {str(name): np.flatnonzero(owners == name) for name in np.unique(owners)}


def _positive(name: str, argument: str) -> float:
    try:
        value = float(argument)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UserError(f"The partition {name!r} needs a positive number, as in '{name}:0.3', not {argument!r}.")
    return value


def _shares(alpha: float, question: Question) -> npt.NDArray[np.float64]:
    shares = question.generator.dirichlet(np.full(question.sites, alpha))
    # For tiny ALPHA the gamma draws behind it may all underflow; the limit gives everything to one site.
    if not np.isfinite(shares).all():
        shares = np.eye(question.sites)[question.generator.integers(question.sites)]
    return shares


def _split(rows: IntArray, shares: npt.NDArray[np.float64]) -> list[IntArray]:
    return np.split(rows, np.rint(np.cumsum(shares)[:-1] * len(rows)).astype(int))


def _named(parts: Sequence[IntArray]) -> dict[str, IntArray]:
    return {name: np.sort(part) for name, part in zip(site_names(len(parts)), parts, strict=True)}
