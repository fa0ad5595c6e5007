"""The rows of a site, by identities that no coordinator can change."""

import hashlib
from dataclasses import dataclass
from typing import Self

import numpy as np

from fedhead.client.release.guard import people_of
from fedhead.data import IntArray, KeyArray, Samples, mix
from fedhead.data.labels import name_of

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Population:
    """The rows of a site that can be read, by identities that no coordinator can change.

    Attributes:
        ids: `[n]`, of group, content and target; equal rows are numbered, so that all differ.
        contents: `[n]`, of content alone.
        keys: `[n]`, what rows are held out by.
        strata: `[n]`, of the class of each row; 0 where a row has any number of classes, or real targets.
        people: `[n]`, see `people_of`.
        subgroups: `[n]`, of the subgroup of each row, such as its sex; 0 for none. None if the data names none.
    """

    ids: KeyArray
    contents: KeyArray
    keys: KeyArray
    strata: KeyArray
    people: IntArray | None = None
    subgroups: KeyArray | None = None

    @classmethod
    def of(cls, samples: Samples, rows: IntArray, keys: KeyArray, contents: KeyArray) -> Self:
        """Identify some rows.

        Args:
            samples: the site's data; its own names of classes count, not those of a run.
            rows: `[n]`, row numbers.
            keys: `[N]`, the identities of all rows for holding out.
            contents: `[N]`, of all rows, their contents.
        """
        targets = _target_keys(samples)[rows]
        ids = mix(mix(mix(keys[rows]) ^ contents[rows]) + targets)
        order = ids.argsort(kind="stable")
        _, starts, counts = np.unique(ids[order], return_index=True, return_counts=True)
        occurrence = np.empty(len(rows), dtype=np.uint64)
        occurrence[order] = np.arange(len(rows)) - np.repeat(starts, counts)
        by_class = samples.targets is None and not samples.multi_label
        ids = mix(ids + occurrence * _GOLDEN)
        people = people_of(keys[rows], contents[rows])
        subgroups = _subgroup_keys(samples)
        return cls(
            ids,
            contents[rows],
            keys[rows],
            targets if by_class else np.zeros_like(targets),
            people,
            None if subgroups is None else subgroups[rows],
        )

    def people_at(self, rows: IntArray) -> IntArray | None:
        """Return the people of some rows, by their positions."""
        return None if self.people is None else self.people[rows]


def _target_keys(samples: Samples) -> KeyArray:
    """Return `[N]`, the identity of each row's classes or real targets, independent of their order."""
    if samples.targets is None:
        names = np.array([_text_key(name_of(name)) for name in samples.classes], dtype=np.uint64)
        return mix(samples.labels.astype(np.uint64) @ names) if samples.multi_label else names[samples.labels]
    hashed = np.zeros(len(samples), dtype=np.uint64)
    for column in np.argsort(samples.target_names).tolist():
        # Adding 0 turns -0 into 0.
        values = np.ascontiguousarray(samples.targets[:, column], dtype="<f8") + 0.0
        hashed = mix(mix(hashed + _text_key(samples.target_names[column])) ^ values.view(np.uint64))
    return hashed


def _subgroup_keys(samples: Samples) -> KeyArray | None:
    """Return `[N]`, the identity of each row's subgroup; None if the data names none."""
    if samples.subgroups is None:
        return None
    keys = {name: _text_key(f"subgroup {name}") for name in samples.subgroups if name is not None}
    return np.array([keys.get(name or "", np.uint64(0)) for name in samples.subgroups], dtype=np.uint64)


def _text_key(text: str) -> np.uint64:
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))
