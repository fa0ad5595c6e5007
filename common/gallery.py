"""A gallery: examples of each class that a model predicts for a site's rows, for the eyes of that site only."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import torch

from fedhead.data import IntArray, Samples, UnreadableSampleError
from fedhead.data.items import FloatArray
from fedhead.data.page import STYLE, example
from fedhead.data.samples import require_kind
from fedhead.errors import UserError
from fedhead.features.store import FeatureStore, Progress
from fedhead.files import write_atomically
from fedhead.model import TransferModel
from fedhead.wording import counted, without_controls

_ROWS = 8192


@dataclass(frozen=True)
class Shown:
    """The rows of one class.

    Attributes:
        name: of the class.
        rows: the number of rows that the model assigns to it.
        examples: some of them, the surest first: the number of the row, and its name.
    """

    name: str
    rows: int
    examples: Sequence[tuple[int, str]]


def gallery(
    model: TransferModel,
    samples: Samples,
    examples: int = 12,
    *,
    strict: bool = False,
    progress: Progress = lambda done, total: None,
) -> list[Shown]:
    """Assign rows to the model's classes, and choose examples: evenly spaced from the surest to the least sure.

    Args:
        model: of clusters, or any classifier of one class per row.
        samples: the rows; labels are not read.
        examples: the number for each class.
        strict: whether to stop at unreadable rows.
        progress: called with the number of rows done and of all.

    Raises:
        UserError: if the model does not predict one class per row, or the data is of another kind.
    """
    if not model.task.kind.exclusive:
        raise UserError("Only models that predict one class for each row have a gallery.")
    require_kind(model.backbone.spec, model.backbone.kind, samples.kind)
    store = FeatureStore.open(model.backbone, samples, strict=strict, progress=progress)
    rows = store.readable()
    found, margins = _assigned(model, store, rows)
    shown = []
    for number, name in enumerate(model.classes):
        members = np.flatnonzero(found == number)
        order = members[np.argsort(-margins[members], kind="stable")]
        chosen = order[np.unique(np.linspace(0, max(len(order) - 1, 0), min(examples, len(order))).astype(int))]
        shown.append(Shown(name, len(members), [(row, samples.name(row)) for row in rows[chosen].tolist()]))
    return shown


@torch.inference_mode()
def _assigned(model: TransferModel, store: FeatureStore, rows: IntArray) -> tuple[IntArray, FloatArray]:
    """Return the class of each row, and by how much its output exceeds the second largest."""
    head = model.head.to("cpu")
    classes, margins = [], []
    for block in torch.split(torch.from_numpy(rows), _ROWS):
        outputs = head(store.features[block].cpu().float()).double()
        outputs = outputs.masked_fill(model.unlearned_mask, -float("inf"))
        best = outputs.topk(2, dim=1)
        classes.append(best.indices[:, 0].numpy())
        margins.append((best.values[:, 0] - best.values[:, 1]).numpy())
    return np.concatenate(classes), np.concatenate(margins)


def write_gallery(path: Path, samples: Samples, shown: Sequence[Shown]) -> None:
    """Write a self-contained HTML page with thumbnails, or the beginnings of texts.

    Raises:
        UserError: if it cannot be written.
    """
    parts = []
    for one in shown:
        figures = []
        for row, name in one.examples:
            try:
                content = example(samples.read(row))
            except UnreadableSampleError:
                continue
            figures.append(f'<figure title="{escape(name)}">{content}</figure>')
        kind = "thumbs" if samples.kind == "image" else "texts"
        parts.append(
            f"<h2>{escape(one.name)}: {escape(counted(one.rows, 'row'))}</h2><div class={kind}>{''.join(figures)}</div>"
        )
    write_atomically(
        path,
        without_controls(
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(samples.spec)}</title>'
            f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
            f"<h1>{escape(samples.spec)}</h1><p>The rows of each class as a model assigns them, from the surest to the "
            f"least sure. This page shows rows of this site; keep it here.</p>{''.join(parts)}</body></html>\n"
        ),
    )
