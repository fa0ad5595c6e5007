from collections.abc import Sequence

import numpy as np
import pytest

from fedhead.server.exchange import POOL
from fedhead.server.score_proof import choose_by_score
from fedhead.sums.segmentation import SegmentationSums
from fedhead.tasks.segmentation import Segmentation

TASK = Segmentation(("background", "cell"))


def sums(*hits: int) -> SegmentationSums:
    """Return the sums of an image for each number of hits among 100 pixels of cells."""
    total = SegmentationSums.zeros(2)
    for hit in hits:
        total = total + SegmentationSums.of_item(np.array([[900, 0], [100 - hit, hit]]), 0.1)
    return total


@pytest.mark.parametrize(
    ("gains", "proven"),
    [
        ((5, 6, 7, 5), True),
        ((12, -3, 9, -2), False),
        ((30, -25, 20, -20), False),
        ((-5, -6, -7, -5), False),
        ((0, 0, 0, 0), False),
    ],
)
def test_rounds_must_gain_more_than_the_sites_differ(gains: Sequence[int], proven: bool) -> None:
    before = {f"site-{place}": sums(50, 60) for place in range(4)}
    after = {f"site-{place}": sums(50 + gain, 60 + gain) for place, gain in enumerate(gains)}
    taken, choice = choose_by_score(TASK, before, after, 3)
    assert taken is proven
    assert choice.taken == ("round 3" if proven else "round 0")
    assert "paired standard error over sites" in choice.reason
    assert choice.rows == 8


@pytest.mark.parametrize(("hits", "proven"), [((80, 82, 81, 79), True), ((52, 62, 41, 71), False)])
def test_a_pool_alone_needs_more_than_the_error_of_both_scores(hits: Sequence[int], proven: bool) -> None:
    taken, choice = choose_by_score(TASK, {POOL: sums(50, 60, 40, 70)}, {POOL: sums(*hits)}, 1)
    assert taken is proven
    assert "two independent scores" in choice.reason


def test_nothing_is_proven_without_held_out_items() -> None:
    taken, choice = choose_by_score(TASK, {}, {}, 1)
    assert not taken
    assert choice.rows == 0
    taken, choice = choose_by_score(TASK, {"north": sums(50)}, {"north": sums(90)}, 1)
    assert not taken
    assert "has no standard error" in choice.reason
