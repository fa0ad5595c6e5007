"""A coordinator that chooses the tail of a backbone so that sums of its features spell out rows."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message

from fedhead.backbones import load_backbone
from fedhead.backbones.split import split
from fedhead.client.connection import Connection
from fedhead.client.release.ledger import ledger_path
from fedhead.client.settings import ACTIONS, SiteSettings
from fedhead.client.site import SiteProcess
from fedhead.client.site_opening import site_of
from fedhead.config import RunConfig
from fedhead.data import load_samples
from fedhead.flower import in_process_identity
from fedhead.protocol.actions import DESCRIBE, RIVALS, STATISTICS, TRAIN
from fedhead.protocol.messages import Manifest, Payload
from fedhead.sums.sums import Arrays
from fedhead.tuning import parse_tune

ROWS = 60
TUNE = "stage3+features"


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "home"))
    with in_process_identity(run_id=1):
        yield


class Attack:
    """A site's real process with pictures, and a coordinator that tunes the package's own network."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        generator = np.random.default_rng(0)
        images = generator.integers(0, 256, (ROWS, 8, 8), dtype=np.uint8)
        np.savez(folder / "pictures.npz", images=images, labels=np.arange(ROWS) % 2)
        self.spec = f"npz:{folder / 'pictures.npz'}"
        given = SiteSettings(name="ward", coordinator="127.0.0.1:9092", data=self.spec, device="cpu", **settings)
        self.process = SiteProcess(
            given, site_of(given, ledger_path("ward")), Connection.__new__(Connection), folder / "site"
        )
        backbone = load_backbone("bundled:glyphnet")
        self.stage = backbone.module.get_submodule("stage3")
        self.trunk, self.tail = split(backbone, parse_tune(TUNE))
        manifest = Manifest(
            run="run",
            backbone=backbone.spec,
            layer=backbone.layer,
            backbone_digest=backbone.digest,
            weights_digest=backbone.weights_digest,
            num_features=backbone.num_features,
            classes=load_samples(self.spec).classes,
            head="linear",
            holdout=0.2,
            seed=0,
            local=RunConfig().local,
            tune=TUNE,
        )
        told = self.ask(DESCRIBE, Payload(manifest.wire(), {"probe": backbone.probe().numpy().astype(np.float32)}))
        assert not told.has_error(), told.error.reason
        self.refusal = Payload.from_content(told.content).values["refusal"]

    def ask(self, action: str, payload: Payload) -> Message:
        return self.process.answer(Message(payload.to_content(), 5, action))

    def own(self) -> Arrays:
        """Return the backbone's own tail."""
        return {f"tail.{name}": value.numpy() for name, value in self.tail.trainable().items()}

    def trap(self) -> Arrays:
        """Return a tail whose features are thresholds, each above all rows but one."""
        samples = load_samples(self.spec)
        preprocessing = self.trunk.preprocessing
        batch = preprocessing.collate([preprocessing(samples.read(row)) for row in range(ROWS)])
        values, _ = self.trunk.boundary(batch)
        named = {name: value.clone() for name, value in self.tail.trainable().items()}
        first, _, second, _ = copy.deepcopy(self.stage)
        with torch.no_grad():
            second.bias.zero_()
            highest = second(first(values).relu()).amax((2, 3)).sort(0, descending=True).values
        named["stage3.2.bias"] = -(highest[0] + highest[1]) / 2
        picks = torch.zeros_like(named["features.weight"])
        picks[:128] = torch.eye(128).repeat_interleave(picks.shape[1] // 128, 1)
        named |= {"features.weight": picks, "features.bias": torch.zeros_like(named["features.bias"])}
        return {f"tail.{name}": value.numpy() for name, value in named.items()}


def test_sums_of_a_tail_that_singles_rows_out_do_not_leave(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    attack = Attack(tmp_path)
    assert not attack.refusal
    trapped = attack.ask(STATISTICS, Payload({}, attack.trap()))
    assert trapped.has_error()
    assert "would show single rows" in trapped.error.reason
    assert "carry 100 % of the features" in caplog.text
    honest = attack.ask(STATISTICS, Payload({}, attack.own()))
    assert not honest.has_error(), honest.error.reason


def test_a_site_that_trains_nothing_takes_no_part_in_a_tuned_run(tmp_path: Path) -> None:
    attack = Attack(tmp_path, permit={"actions": sorted(set(ACTIONS) - {TRAIN})})
    assert "max_trainable" in attack.refusal
    for action, values, arrays in (
        (STATISTICS, {}, {}),
        (STATISTICS, {}, attack.own()),
        (RIVALS, {"levels": ["tail"], "temperatures": [1.0]}, attack.own()),
    ):
        refused = attack.ask(action, Payload(values, arrays))
        assert refused.has_error()
        assert "no manifest of the run" in refused.error.reason
