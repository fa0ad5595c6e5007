"""Which sites hold which classes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fedhead.wording import counted

DOMINANCE = 0.9
"""Share of a class's rows above which the class depends on one site."""


@dataclass(frozen=True)
class ClassCoverage:
    """The sites that hold a class.

    Attributes:
        name: the name of the class.
        rows: its number of rows at all sites.
        sites: the number of sites that hold some of them.
        largest_site: the site that holds the most; empty if there are no rows.
        share: that site's share of the rows.
    """

    name: str
    rows: int
    sites: int
    largest_site: str
    share: float

    @property
    def rests_on_one_site(self) -> bool:
        """Whether one site holds more than `DOMINANCE` of the rows, so that the class is lost if the site leaves."""
        return self.rows > 0 and self.share > DOMINANCE

    @property
    def sentence(self) -> str:
        """A sentence on the sites that hold the class."""
        if not self.rows:
            return f"No site has rows of class {self.name!r}: no head can learn it."
        held = f"Class {self.name!r} has {counted(self.rows, 'row')} at {counted(self.sites, 'site')}"
        if not self.rests_on_one_site:
            return f"{held}."
        part = "all of them" if self.sites == 1 else f"{100 * self.share:.0f} % of them"
        return f"{held}, {part} at {self.largest_site}: the class depends on that site."

    def to_dict(self) -> dict[str, Any]:
        """Return all fields and properties as JSON types."""
        return {**asdict(self), "rests_on_one_site": self.rests_on_one_site, "sentence": self.sentence}


def coverage(counts_by_site: Mapping[str, Tensor], classes: Sequence[str]) -> list[ClassCoverage]:
    """Summarise which sites hold each class.

    Args:
        counts_by_site: rows of each class `[C]`, by site.
        classes: `C` names.
    """
    names = sorted(counts_by_site)
    counts = torch.stack([counts_by_site[name] for name in names]) if names else torch.zeros(1, len(classes))
    covered = []
    for column, name in zip(counts.T.tolist(), classes, strict=True):
        rows, most = int(sum(column)), max(column)
        covered.append(
            ClassCoverage(
                name=name,
                rows=rows,
                sites=sum(count > 0 for count in column),
                largest_site=names[column.index(most)] if rows else "",
                share=most / rows if rows else 0.0,
            )
        )
    return covered
