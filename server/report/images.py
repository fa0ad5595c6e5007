"""Figures of tasks about places of images: a score pooled, by class and by site."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedhead.server.report import charts
from fedhead.server.report.layout import Figure, Table
from fedhead.server.report.scores import number_interval, score_by_site, worst_first, worst_site
from fedhead.server.runs.record import RunRecord, Values
from fedhead.wording import counted


@dataclass(frozen=True)
class ImageScore:
    """Names of a task's score in its reports, and for readers.

    Attributes:
        score: of all classes, in a report.
        title: of the same, for readers, in the middle of a sentence.
        classes: the reports of classes, in a report.
        own: the score, in the report of a class.
        own_title: of the same, for readers.
    """

    score: str
    title: str
    classes: str
    own: str
    own_title: str

    def worst(self, record: RunRecord) -> list[str]:
        """Return sentences on the worst class and, of several, the worst site."""
        said = []
        known = [one for one in record.pooled[self.classes] if one[self.own][0] is not None]
        if known:
            worst = min(known, key=lambda one: one[self.own][0])
            said.append(f"Worst class: {worst['name']}, with {self.own_title} {number_interval(worst[self.own])}.")
        if sum(one[self.score][0] is not None for one in record.sites.values()) > 1:
            said += worst_site(
                record,
                self.score,
                lambda one: f"{number_interval(one[self.score])} on {counted(one['rows'], 'image')}",
                units="images",
            )
        return said

    def by_class(
        self, record: RunRecord, columns: Sequence[str], cells: Callable[[Values], Sequence[str]]
    ) -> list[Figure]:
        """Return the figure of classes, if any has the score.

        Args:
            record: of the run.
            columns: of the table, after the class and its number of images.
            cells: returns those of a class.
        """
        found = record.pooled[self.classes]
        known = [(one["name"], one[self.own], one["items"]) for one in found if one[self.own][0] is not None]
        lines = [charts.Interval(name, value, low, high, items) for name, (value, low, high), items in known]
        if not lines:
            return []
        table = Table(["class", "images", *columns], [[one["name"], str(one["items"]), *cells(one)] for one in found])
        caption = "Dots with 95 % intervals; the dashed line is the mean."
        mean = record.pooled[self.score][0]
        drawn = charts.forest(lines, f"{self.own_title} on held-out images", mean, wording=lambda one: f"{one:.2f}")
        return [Figure(f"{self.own_title} by class", drawn, table, caption)]

    def by_site(self, record: RunRecord, second: str, second_title: str) -> list[Figure]:
        """Return the figure of sites, if there are any, with a second score of all classes in its table."""
        sites = worst_first(record, self.score)
        if not sites:
            return []
        table = Table(
            ["site", "images", self.title, second_title, *(one["name"] for one in record.pooled[self.classes])],
            [
                [
                    name,
                    str(one["rows"]),
                    number_interval(one[self.score]),
                    number_interval(one[second]),
                    *(number_interval(own[self.own]) for own in one[self.classes]),
                ]
                for name, one in sites
            ],
            note=f"In the columns of classes: {self.own_title}.",
        )
        caption = "Dots with 95 % intervals; the dashed line is the pooled one."
        return [score_by_site(record, sites, self.score, self.title, table, caption)]
