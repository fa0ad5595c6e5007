"""The part of a task that turns outputs of a head into predictions, and writes them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from fedhead.data import Item
from fedhead.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from fedhead.sums.calibration import Calibration


class Predictions(ABC):
    """The predictions of a task: decisions, answers for each column, and regions with a stated coverage."""

    name: ClassVar[str]

    @abstractmethod
    def answers(self, outputs: "Tensor", temperature: float, unlearned: "Tensor") -> "Tensor":
        """Convert outputs `[n, C]` to answers `[n, C]`, with torch operations only, since exports trace it.

        Args:
            outputs: of the head.
            temperature: the divisor of outputs, if the task scales them.
            unlearned: `[C]`, bool, the columns without rows at any site.
        """

    def parts(self, item: Item) -> Sequence[Item]:
        """Return the rows of an item, if the task divides items."""
        return (item,)

    def joined(self, item: Item, answers: "Tensor") -> Any:
        """Return the prediction for an item, given the answers `[n, C]` for its parts, if the task divides items.

        Raises:
            UserError: if the task does not.
        """
        raise UserError(f"The task {self.name!r} predicts whole items.")

    def as_html(self, decision: Any) -> str:
        """Return a prediction as a paragraph of HTML.

        Raises:
            UserError: if the task has no such form.
        """
        raise UserError(f"Predictions of the task {self.name!r} are written as CSV or JSON lines, not as HTML.")

    @abstractmethod
    def decide(self, answers: "Tensor") -> list[Any]:
        """Return the prediction of each row: a class, several, or numbers."""

    @abstractmethod
    def regions(self, answers: "Tensor", calibration: "Calibration", coverage: float) -> list[Any]:
        """Return a region per row that contains its target with probability `coverage`: classes, or intervals.

        Raises:
            UserError: if the task has none, the coverage is not between 0 and 1 or the model is not calibrated.
        """

    @abstractmethod
    def covers(self, region: Any, target: Any) -> bool:
        """Return whether a region contains a row's target, given as a number or a list."""

    @abstractmethod
    def size(self, region: Any) -> float:
        """Return the size of a region: the number of classes, or the mean width of intervals."""

    @abstractmethod
    def say_regions(self, held: str, stated: str, size: float) -> tuple[str, str]:
        """Return a heading and a sentence on the coverage of regions of this mean size."""

    @property
    @abstractmethod
    def description(self) -> str:
        """Description of the model, such as "a classifier of one of 5 classes"."""

    @abstractmethod
    def header(self, *, every: bool = False, regions: bool = False) -> list[str]:
        """Return the column names of a table of predictions.

        Args:
            every: whether to include the answers of all columns, not only the prediction.
            regions: whether to include regions.
        """

    @abstractmethod
    def cells(
        self, decision: Any, answers: Sequence[float], region: Any, *, every: bool = False, regions: bool = False
    ) -> list[str]:
        """Return one prediction's cells in the order of `header`; empty cells for no answers."""

    @abstractmethod
    def record(
        self, decision: Any, answers: Sequence[float], region: Any, *, every: bool = False, regions: bool = False
    ) -> dict[str, Any]:
        """Return one prediction as JSON types."""
