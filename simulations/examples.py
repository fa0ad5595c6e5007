"""Held-out images of a simulated run with the truth beside the prediction, for its report."""

import base64
import io

import numpy as np
import torch
from PIL import Image

from fedhead.backbones import Backbone
from fedhead.config import RunConfig
from fedhead.data import IntArray, Samples, UnreadableSampleError, held_out
from fedhead.features.store import FeatureStore
from fedhead.heads import Head
from fedhead.server.runs.examples import MOST_BYTES, Example
from fedhead.server.runs.history import Outcome
from fedhead.server.starting_head import HeadForm
from fedhead.tasks import make_task
from fedhead.tasks.dense import ItemPlaces

SIDE = 320
"""Longer side of a drawn image in pixels."""

JUDGED = 64
"""Held-out images among which examples are chosen by their score."""


def examples(
    config: RunConfig,
    outcome: Outcome,
    backbone: Backbone,
    samples: Samples,
    store: FeatureStore,
    held: dict[str, IntArray],
) -> tuple[Example, ...]:
    """Return `config.simulation.examples` held-out images, evenly from the lowest score to the highest.

    Args:
        config: of the finished run.
        outcome: of the run.
        backbone: of the run.
        samples: the data.
        store: its features.
        held: the rows of each site.
    """
    task = make_task(config.task, config.classes)
    places = ItemPlaces.of(task, backbone.geometry, samples)
    if not config.simulation.examples or places is None:
        return ()
    head = _judged_head(config, outcome, backbone)
    owners = {row: site for site, rows in held.items() if site in outcome.participants for row in rows.tolist()}
    rows = np.array(sorted(owners), np.int64)
    rows = rows[held_out(store.keys[rows], config.holdout)]
    rows = rows[np.unique(np.linspace(0, max(len(rows) - 1, 0), min(JUDGED, len(rows))).astype(int))]
    scored = []
    for row in rows.tolist():
        score = task.score_of(places.evaluate(head, store.features, np.array([row])))
        if score is not None:
            scored.append((score, row))
    scored.sort()
    chosen = np.unique(
        np.linspace(0, max(len(scored) - 1, 0), min(config.simulation.examples, len(scored))).astype(int)
    )
    made: list[Example] = []
    for place in chosen.tolist():
        score, row = scored[place]
        try:
            pictures = _drawn(places, head, samples, store, row)
        except UnreadableSampleError:
            continue
        one = Example(name=samples.name(row), site=owners[row], score=score, truth=pictures[0], prediction=pictures[1])
        if sum(map(len, made)) + len(one) <= MOST_BYTES:
            made.append(one)
    return tuple(made)


def _judged_head(config: RunConfig, outcome: Outcome, backbone: Backbone) -> Head:
    """Return the head that held-out images judged: a delivered one may be solved from all rows."""
    if not outcome.all_rows or outcome.statistics is None:
        return outcome.head
    task = make_task(config.task, config.classes)
    return HeadForm(config, backbone.num_features, task).deliver(outcome.statistics).float()


@torch.inference_mode()
def _drawn(places: ItemPlaces, head: Head, samples: Samples, store: FeatureStore, row: int) -> tuple[str, str]:
    """Return the truth and the prediction, drawn on an image, as JPEG in base64."""
    image = samples.read(row)
    assert isinstance(image, Image.Image)
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    features = store.features[torch.tensor([row])].cpu().float()
    outputs, found = head(places.geometry.places(features))[0], places.geometry.proposals(features)
    own = None if found is None else found[0]
    decoded = places.task.decode(outputs, places.geometry, (small.height, small.width), own)
    drawn = places.task.drawn_truth(places.annotation(row), small), places.task.drawn(decoded, small)
    return _encoded(drawn[0]), _encoded(drawn[1])


def _encoded(image: Image.Image) -> str:
    content = io.BytesIO()
    image.convert("RGB").save(content, "jpeg", quality=80)
    return base64.b64encode(content.getvalue()).decode()
