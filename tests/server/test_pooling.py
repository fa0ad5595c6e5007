"""Sums of sites' features, over a Grid whose sites answer as each test says."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Message

from fedhead.backbones import Backbone, load_backbone
from fedhead.config import RunConfig
from fedhead.errors import FedheadError
from fedhead.flower import in_process_identity
from fedhead.protocol.messages import Description, Manifest, Payload, StatisticsRequest
from fedhead.server.messenger import Messenger
from fedhead.server.observer import Observer
from fedhead.server.pooling import Pooling
from fedhead.server.roster import Roster
from fedhead.server.site_sums import SiteSums
from fedhead.server.weights_file import WeightsFile
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.moments import FeatureMoments
from fedhead.tasks import make_task

from .test_collect import ScriptedGrid

CLASSES = ("cat", "dog")
ROWS = {"a": 20, "b": 30}


@pytest.fixture(autouse=True)
def _identity():
    with in_process_identity(run_id=1):
        yield


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("bundled:pixels")


@pytest.fixture(scope="module")
def rows(backbone: Backbone) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: (
            torch.randn(count, backbone.num_features, generator=generator),
            torch.randint(2, (count,), generator=generator),
        )
        for name, count in ROWS.items()
    }


Answer = Callable[[str, StatisticsRequest], dict[str, np.ndarray]]


def pooling_of(backbone: Backbone, answer: Answer, kept: SiteSums | None = None) -> Pooling:
    """Return the pooling over two sites, whose statistics `answer` makes."""

    def site(name: str) -> Callable[[Message], Message]:
        def reply(message: Message) -> Message:
            request = StatisticsRequest(**Payload.from_content(message.content).values)
            return Message(Payload({}, answer(name, request)).to_content(), reply_to=message)

        return reply

    grid = ScriptedGrid({number: site(name) for number, name in enumerate(ROWS, start=1)})
    manifest = Manifest.of("0" * 32, RunConfig(), backbone, CLASSES)
    messenger, probe = Messenger(grid, 5.0), backbone.probe()
    roster = Roster(messenger, manifest, WeightsFile(backbone, None), probe, Observer())
    for number, name in enumerate(ROWS, start=1):
        described = Description(site=name, rows=ROWS[name], has_weights=True)
        assert roster.judge(described, number) == "fit"
        roster.admit(described, number)
    return Pooling(messenger, manifest, roster, probe, kept, make_task("classification", CLASSES))


def test_the_sum_is_of_all_sites_and_each_sites_own_is_kept(
    backbone: Backbone, rows: dict[str, tuple[torch.Tensor, torch.Tensor]], tmp_path: Path
) -> None:
    def answer(name: str, request: StatisticsRequest) -> dict[str, np.ndarray]:
        features, labels = rows[name]
        return FeatureStatistics.from_features(features, labels, 2, pooling.origin()).to_arrays()

    kept = SiteSums(tmp_path / "sums")
    pooling = pooling_of(backbone, answer, kept)
    collected = pooling.statistics(StatisticsRequest())
    features = torch.cat([rows["a"][0], rows["b"][0]])
    labels = torch.cat([rows["a"][1], rows["b"][1]])
    assert collected.total.is_close(FeatureStatistics.from_features(features, labels, 2, pooling.origin()))
    assert collected.sites == ["a", "b"]
    assert {name: int(counts.sum()) for name, counts in pooling.counts.items()} == ROWS
    own = sum(
        [kept.read(name, "train") for name in ROWS], FeatureStatistics.empty(features.shape[1], 2, pooling.origin())
    )
    assert own.is_close(collected.total)
    pooling.remove(["b"])
    assert list(pooling.counts) == ["a"]
    assert set(kept.sites()) == {"a"}
    # Held-out rows are asked only of sites whose training rows were summed.
    assert pooling.statistics(StatisticsRequest(rows="held_out")).sites == ["a"]
    pooling.forget()
    assert not pooling.counts
    assert not set(kept.sites())


def test_moments_of_all_sites_add(backbone: Backbone, rows: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    def answer(name: str, request: StatisticsRequest) -> dict[str, np.ndarray]:
        assert request.what == "moments"
        return FeatureMoments.empty(backbone.probe().mean(0)).updated(rows[name][0]).to_arrays()

    total = pooling_of(backbone, answer).moments().total
    features = torch.cat([rows["a"][0], rows["b"][0]]).double()
    torch.testing.assert_close(total.mean(), features.mean(0))
    torch.testing.assert_close(total.scale(), features.std(0, correction=0))


def test_sums_over_more_rows_than_a_site_has_or_about_another_origin_are_dropped(
    backbone: Backbone, rows: dict[str, tuple[torch.Tensor, torch.Tensor]]
) -> None:
    def answer(name: str, request: StatisticsRequest) -> dict[str, np.ndarray]:
        features, labels = rows[name]
        if name == "a":
            features, labels = features.repeat(2, 1), labels.repeat(2)
        origin = pooling.origin() + (name == "b")
        return FeatureStatistics.from_features(features, labels, 2, origin).to_arrays()

    pooling = pooling_of(backbone, answer)
    with pytest.raises(FedheadError, match="origin"):
        pooling.statistics(StatisticsRequest())
    assert not pooling.counts
