"""Replies with heads: one of each site, or one merged of several."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedhead.client.answers import Answer
from fedhead.client.site_data import Site
from fedhead.data import BoolArray
from fedhead.protocol.heads import HeadReply
from fedhead.protocol.messages import Manifest, Payload
from fedhead.protocol.steps import Part
from fedhead.sums.heads import EXAMPLES, TRAIN_LOSS, FloatArray, HeadSums, mean_metrics
from fedhead.sums.sums import Arrays


def answered_alone(
    sites: Sequence[Site],
    manifest: Manifest,
    base: Arrays,
    table: FloatArray,
    trained: Iterable[tuple[int, Arrays, int, float]],
    merged: bool,
) -> Iterator[Answer]:
    """Yield the replies to a round in which sites train one after the other.

    Args:
        sites: that train.
        manifest: of the run.
        base: the head that reached them.
        table: `[S, width]`, the metrics of its evaluation, which is modified.
        trained: of each site its position, head, number of rows and training loss.
        merged: whether to give one reply for all of them.
    """
    parts: tuple[Part, ...] = ("train", "held_out")
    together = HeadSums({name: np.zeros_like(value) for name, value in base.items()})
    usable: BoolArray = np.array([_finite(row) for row in table], np.bool_)
    for position, heads, rows, loss in trained:
        table[position, [EXAMPLES, TRAIN_LOSS]] = rows, loss
        sums = HeadSums(heads, table[position])
        if not merged:
            yield Answer([position], Payload({}, sums.to_arrays()), manifest, parts)
        elif usable[position] and np.isfinite(table[position]).all() and all(map(_finite, heads.values())):
            together = together + HeadSums(heads, table[position, : len(together.metrics)])
        else:
            usable[position] = False
    if merged:
        mean = {name: together.heads[name].astype(value.dtype) for name, value in base.items()}
        yield Answer(range(len(sites)), merged_reply(sites, table, usable, mean), manifest, parts)


def evaluated(sites: Sequence[Site], manifest: Manifest, metrics: FloatArray, merged: bool) -> Iterator[Answer]:
    """Yield the replies to an evaluation with these metrics `[S, width]`."""
    if merged:
        finite: BoolArray = np.isfinite(metrics.sum(1))
        yield Answer(range(len(sites)), merged_reply(sites, metrics, finite, {}), manifest, ("held_out",))
        return
    for position, row in enumerate(metrics):
        yield Answer([position], Payload({}, HeadSums({}, row).to_arrays()), manifest, ("held_out",))


def merged_reply(sites: Sequence[Site], metrics: FloatArray, usable: BoolArray, arrays: Arrays) -> Payload:
    """Return one reply of several sites, without those whose results are not usable."""
    reason = "its head or its metrics hold values that are not finite"
    return HeadReply(
        HeadSums(arrays, mean_metrics(metrics[usable])),
        metrics[usable],
        tuple(site.name for site, use in zip(sites, usable.tolist(), strict=True) if use),
        {site.name: reason for site, use in zip(sites, usable.tolist(), strict=True) if not use},
    ).payload()


def _finite(array: npt.NDArray[Any]) -> bool:
    return bool(np.isfinite(array).all())
