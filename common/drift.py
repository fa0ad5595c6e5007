"""Drift at a site: how new rows compare with those that a model was measured on, in counts that add across sites."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch

from fedhead.backbones.digests import digest_tensors
from fedhead.data import Samples
from fedhead.data.inputs import Input
from fedhead.data.samples import require_kind
from fedhead.errors import FedheadError, UserError
from fedhead.evaluation.foreign import Foreign
from fedhead.evaluation.metrics import wilson_interval
from fedhead.features.store import FeatureStore, Progress
from fedhead.files import write_atomically
from fedhead.model import TransferModel
from fedhead.sums.foreign import DistanceSums
from fedhead.wording import counted, one_line

SIGNIFICANT = 0.01
"""Probability of reporting a change of distances if there is none."""

Counts = TypeVar("Counts")

_FORMAT = "fedhead-monitor-1"
_ROWS = 8192
_BATCH = 64


@dataclass(frozen=True, eq=False)
class DriftCounts:
    """Counts of new rows; all that `fedhead monitor` writes, and nothing about a single row.

    Attributes:
        model: the digest of the model's head.
        distances: rows by distance.
        foreign: rows beyond a limit of the model.
        predicted: rows by predicted class; empty for other tasks.
    """

    model: str
    distances: DistanceSums
    foreign: int
    predicted: Mapping[str, int]

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.distances.rows

    def __add__(self, other: Self) -> Self:
        if self.model != other.model or self.predicted.keys() != other.predicted.keys():
            raise UserError("These counts are of different models, so they do not add.")
        predicted = {name: count + other.predicted[name] for name, count in self.predicted.items()}
        return type(self)(self.model, self.distances + other.distances, self.foreign + other.foreign, predicted)

    def save(self, path: Path) -> None:
        """Write a JSON file.

        Raises:
            UserError: if it cannot be written.
        """
        write_atomically(
            path,
            json.dumps(
                {
                    "format": _FORMAT,
                    "model": self.model,
                    "rows": self.rows,
                    "foreign": self.foreign,
                    "predicted": dict(self.predicted),
                    "distances": self.distances.counts.tolist(),
                }
            )
            + "\n",
        )

    @classmethod
    def load(cls, path: Path) -> "DriftCounts":
        """Read a file of `save`, validating everything: it may come from another site.

        Raises:
            UserError: if it is missing or damaged.
        """

        def parse(values: Mapping[str, Any]) -> "DriftCounts":
            counts = cls(
                str(values["model"]),
                DistanceSums.from_lists(values["distances"]),
                _count(values["foreign"]),
                {str(name): _count(count) for name, count in dict(values["predicted"]).items()},
            )
            if counts.foreign > counts.rows or sum(counts.predicted.values()) not in (0, counts.rows):
                raise ValueError("they count different numbers of rows")
            return counts

        return read_counts(path, _FORMAT, parse)


def read_counts(path: Path, form: str, parse: Callable[[Mapping[str, Any]], Counts]) -> Counts:
    """Read a JSON file of counts, which may come from another site.

    Args:
        path: of the file.
        form: its format.
        parse: makes counts of its values, and validates them.

    Raises:
        UserError: if it is missing or damaged.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or values.get("format") != form:
            raise ValueError(f"its format is not {form}")
        return parse(values)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, OverflowError, AttributeError, RecursionError) as error:
        raise UserError(f"The counts in {path} are damaged: {one_line(str(error))}.") from None


@dataclass(frozen=True)
class Drift:
    """A comparison of new rows with the held-out rows of the model's run.

    Attributes:
        rows: new rows.
        rows_known: held-out rows of the run.
        foreign: the share of new rows beyond a limit.
        foreign_low: the lower limit of its 95 % interval.
        foreign_high: the upper limit.
        expected: the largest share to expect without drift.
        statistic: the largest difference between the shares of new and known rows within any distance (two-sample
            Kolmogorov-Smirnov), over both distances.
        p_value: the probability of such a difference without drift, corrected for two distances; conservative, as
            distances are counted in bins.
        drifted: whether the new rows differ.
    """

    rows: int
    rows_known: int
    foreign: float
    foreign_low: float
    foreign_high: float
    expected: float
    statistic: float
    p_value: float
    drifted: bool

    @property
    def sentence(self) -> str:
        """The finding in a sentence."""
        if not self.drifted:
            return "The rows are like those that the model was measured on, by their distances."
        return (
            "The rows differ from those that the model was measured on, so its accuracy and calibration may not hold: "
            "evaluate it on labelled rows of today."
        )


def count_drift(
    model: TransferModel,
    samples: Samples,
    *,
    min_rows: int = 20,
    strict: bool = False,
    progress: Progress = lambda done, total: None,
) -> DriftCounts:
    """Count a site's new rows; labels are not needed.

    Args:
        model: with a test of foreign inputs.
        samples: the rows; features are kept, as for a run.
        min_rows: with fewer rows, nothing is counted.
        strict: whether to stop at unreadable rows.
        progress: called with the number of rows done and of all.

    Raises:
        UserError: if the model has no test for foreign inputs, or the data is of another kind.
        FedheadError: if there are too few rows.
    """
    required(model)
    require_kind(model.backbone.spec, model.backbone.kind, samples.kind)
    store = FeatureStore.open(model.backbone, samples, strict=strict, progress=progress)
    rows = torch.from_numpy(store.readable())
    _require_rows(len(rows), min_rows)
    return _counted(model, (store.features[block].cpu() for block in torch.split(rows, _ROWS)))


def count_inputs(
    model: TransferModel,
    inputs: Sequence[Input],
    *,
    min_rows: int = 20,
    strict: bool = False,
    progress: Progress = lambda done, total: None,
) -> DriftCounts:
    """Count files without labels, such as those given to `fedhead predict`; their features are not kept.

    Args:
        model: with a test of foreign inputs.
        inputs: unreadable ones are skipped, unless `strict`.
        min_rows: see `count_drift`.
        strict: see `count_drift`.
        progress: see `count_drift`.

    Raises:
        UserError: if the model has no test for foreign inputs.
        FedheadError: if there are too few rows, or with `strict`, if one cannot be read.
    """
    required(model)
    blocks: list[torch.Tensor] = []
    for start in range(0, len(inputs), _BATCH):
        items = []
        for one in inputs[start : start + _BATCH]:
            try:
                items.append(one.read())
            except FedheadError:
                if strict:
                    raise
        if items:
            blocks.append(model.backbone.features_of(items).cpu())
        progress(min(start + _BATCH, len(inputs)), len(inputs))
    _require_rows(sum(map(len, blocks)), min_rows)
    return _counted(model, blocks)


def _require_rows(rows: int, min_rows: int) -> None:
    if rows < max(min_rows, 1):
        raise FedheadError(f"Nothing is counted: the data has {counted(rows, 'row')}, and the limit is {min_rows}.")


@torch.inference_mode()
def _counted(model: TransferModel, blocks: Iterable[torch.Tensor]) -> DriftCounts:
    foreign = required(model)
    distances, strange = DistanceSums(), 0
    predicted = dict.fromkeys(model.classes if model.task.kind.exclusive else (), 0)
    head = model.head.to("cpu")
    for features in blocks:
        strange += sum(foreign.is_foreign(features))
        found = foreign.distances(features.double()).nan_to_num(nan=math.inf)
        distances += DistanceSums.from_distances(found)
        if predicted:
            for name in model.task.decide(model.answers_of(head(features))):
                predicted[name] += 1
    return DriftCounts(head_digest(model), distances, strange, predicted)


def compare_drift(model: TransferModel, counts: Iterable[DriftCounts]) -> Drift:
    """Compare the added counts of any number of sites with the model's held-out rows.

    Raises:
        UserError: if the counts are of another model, or there are none.
    """
    foreign, own = required(model), head_digest(model)
    first, *others = list(counts)
    total = first
    for one in others:
        total = total + one
    if total.model != own:
        raise UserError("These counts are of another model than the given one.")
    if not total.rows:
        raise UserError("These counts have no rows.")
    known = foreign.known
    shares = [(sums.counts.cumsum(1) / sums.rows) for sums in (total.distances, known)]
    statistic = float(abs(shares[0] - shares[1]).max())
    chance = min(1.0, 2 * kolmogorov(statistic, total.rows, known.rows))
    low, high = wilson_interval(np.array([total.foreign]), np.array([total.rows]))
    return Drift(
        rows=total.rows,
        rows_known=known.rows,
        foreign=total.foreign / total.rows,
        foreign_low=float(low[0]),
        foreign_high=float(high[0]),
        expected=foreign.share,
        statistic=statistic,
        p_value=chance,
        drifted=bool(low[0] > foreign.share) or chance < SIGNIFICANT,
    )


def kolmogorov(statistic: float, first: int, second: int) -> float:
    """Return the asymptotic p-value of the two-sample Kolmogorov-Smirnov test.

    Args:
        statistic: the largest difference of the two empirical distribution functions.
        first: the number of rows of one sample.
        second: of the other.
    """
    size = math.sqrt(first * second / (first + second)) * statistic
    if size < 0.2:
        return 1.0
    terms = [(1.0 if k % 2 else -1.0) * math.exp(-2 * (k * size) ** 2) for k in range(1, 101)]
    return min(1.0, max(0.0, 2 * math.fsum(terms)))


def required(model: TransferModel) -> Foreign:
    """Return a model's test for foreign inputs.

    Raises:
        UserError: if it has none.
    """
    if model.foreign is None:
        raise UserError("This model has no test for foreign inputs; start the run with foreign = true (--foreign).")
    return model.foreign


def head_digest(model: TransferModel) -> str:
    """Return the digest of a model's head, as in its file."""
    return digest_tensors({name: value.detach().cpu().contiguous() for name, value in model.head.state_dict().items()})


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 2**48:
        raise ValueError("a count is not a whole number of 0 or more")
    return value
