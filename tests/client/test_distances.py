from typing import Any

import numpy as np
import pytest
import torch

from fedhead.client.distances import DistancesRequest, add_unit_rows, count_distances
from fedhead.client.labelled_features import LabelledFeatures
from fedhead.evaluation.foreign import MOST_FEATURES, Distances
from fedhead.heads.feature_map import unit_rows
from fedhead.protocol.messages import MessageError, Payload
from fedhead.sums.features import FeatureStatistics

pytestmark = pytest.mark.usefixtures("one_thread")


def data(rows: int = 3000, width: int = 5) -> LabelledFeatures:
    generator = torch.Generator().manual_seed(1)
    features = torch.rand(rows, width, generator=generator)
    return LabelledFeatures(features, torch.randint(3, (rows,), generator=generator))


def distances(known: LabelledFeatures) -> Distances:
    stats = FeatureStatistics.from_features(unit_rows(known.features.double(), "root"), known.labels, 3)
    return Distances.from_statistics(stats, "root")


def test_sums_are_those_of_unit_rows_under_any_split() -> None:
    known = data()
    whole, parts = FeatureStatistics.empty(5, 3), FeatureStatistics.empty(5, 3)
    add_unit_rows(whole, known, torch.arange(3000), "root")
    for part in torch.arange(3000).split([1, 2499, 500]):
        add_unit_rows(parts, known, part, "root")
    assert whole.is_close(parts)
    # Every row has length 1.
    assert float(whole.upper.diagonal().sum()) == pytest.approx(3000)
    counts = count_distances(distances(known), known, torch.arange(3000))
    assert counts.rows == 3000


@pytest.mark.parametrize(
    "values", [{}, {"form": "none"}, {"form": 1}, {"form": "root", "rows": "held_out"}, {"form": None}]
)
def test_requests_of_another_form_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(MessageError, match="invalid"):
        DistancesRequest.from_payload(Payload(values), 5, 3)


def test_a_request_rests_on_one_part_and_has_bounded_sums() -> None:
    arrays = dict(distances(data()).to_arrays())
    assert DistancesRequest.from_payload(Payload({"form": "root"}), 5, 3).part == "train"
    assert DistancesRequest.from_payload(Payload({"form": "root"}, arrays), 5, 3).part == "held_out"
    for wrong in (
        {**arrays, "whiten": arrays["whiten"][:, :4]},
        {**arrays, "means": arrays["means"].astype(np.float64)},
        {**arrays, "norms": np.full(3, np.nan, np.float32)},
        {**arrays, "more": np.zeros(1, np.float32)},
        {"whiten": arrays["whiten"]},
    ):
        with pytest.raises(MessageError):
            DistancesRequest.from_payload(Payload({"form": "root"}, wrong), 5, 3)
    with pytest.raises(MessageError, match="2048 features or less"):
        DistancesRequest.from_payload(Payload({"form": "unit"}), MOST_FEATURES + 1, 3)


def test_distances_that_overflow_are_refused_or_counted_in_the_last_bin() -> None:
    known = data()
    arrays = {name: np.full_like(array, 1e30) for name, array in distances(known).to_arrays().items()}
    request = DistancesRequest.from_payload(Payload({"form": "root"}, arrays), 5, 3)
    assert request.distances is not None
    counts = count_distances(request.distances, known, torch.arange(100))
    assert counts.rows == 100
