"""A coordinator that plays with adapters that stay at a site."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from fedhead.backbones import load_backbone
from fedhead.backbones.objectives import cut
from fedhead.backbones.split import split
from fedhead.client.connection import Connection
from fedhead.client.release.ledger import ledger_path
from fedhead.client.settings import SiteSettings
from fedhead.client.site import SiteProcess
from fedhead.client.site_opening import site_of
from fedhead.config import RunConfig
from fedhead.data import load_samples
from fedhead.errors import FedheadError
from fedhead.flower import in_process_identity
from fedhead.model import TransferModel, find_site_model
from fedhead.protocol.actions import DESCRIBE, EVALUATE, PERSONALISE, RIVALS, TRAIN
from fedhead.protocol.messages import Manifest, Payload
from fedhead.sums.sums import Arrays
from fedhead.tuning import parse_tune

pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = 60
TUNE = "lora:2:sa@last:1"


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "home"))
    with in_process_identity(run_id=1):
        yield


class Attack:
    """A site's real process with pictures, and a coordinator of a run whose second matrices stay at sites."""

    def __init__(self, folder: Path) -> None:
        generator = np.random.default_rng(0)
        images = generator.integers(0, 256, (ROWS, 8, 8), dtype=np.uint8)
        np.savez(folder / "pictures.npz", images=images, labels=np.arange(ROWS) % 2)
        spec = f"npz:{folder / 'pictures.npz'}"
        given = SiteSettings(name="ward", coordinator="127.0.0.1:9092", data=spec, device="cpu")
        self.process = SiteProcess(
            given, site_of(given, ledger_path("ward")), Connection.__new__(Connection), folder / "site"
        )
        self.backbone = load_backbone("bundled:glyphnet")
        self.classes = load_samples(spec).classes
        self.home = folder / "home"

    def describe(self, **values: Any) -> str:
        manifest = Manifest(
            **{
                "run": "run",
                "backbone": self.backbone.spec,
                "layer": self.backbone.layer,
                "backbone_digest": self.backbone.digest,
                "weights_digest": self.backbone.weights_digest,
                "num_features": self.backbone.num_features,
                "classes": self.classes,
                "head": "linear",
                "holdout": 0.2,
                "seed": 0,
                "local": RunConfig().local,
                "tune": TUNE,
                **values,
            }
        )
        probe = self.backbone.probe().numpy().astype(np.float32)
        told = self.ask(DESCRIBE, {}, {}, payload=Payload(manifest.wire(), {"probe": probe}))
        if told.has_error():
            return told.error.reason
        return str(Payload.from_content(told.content).values["refusal"])

    def ask(self, action: str, values: dict[str, Any], arrays: Arrays, payload: Payload | None = None) -> Message:
        return self.process.answer(Message((payload or Payload(values, arrays)).to_content(), 5, action))

    def head(self) -> Arrays:
        return {
            "head.weight": np.zeros((2, self.backbone.num_features), np.float32),
            "head.bias": np.zeros(2, np.float32),
        }

    def shared(self, tune: str = TUNE) -> Arrays:
        tail = split(self.backbone, parse_tune(tune)).tail
        return {**self.head(), **{f"tail.{name}": value.numpy() for name, value in tail.shared().items()}}

    def whole(self) -> Arrays:
        tail = split(self.backbone, parse_tune(TUNE)).tail
        return {**self.head(), **{f"tail.{name}": value.numpy() for name, value in tail.trainable().items()}}

    def personalise(self, mode: str, tail: Arrays | None = None) -> Message:
        head = {name.removeprefix("head."): value for name, value in self.head().items()}
        return self.ask(PERSONALISE, {"server_round": 1, "mode": mode}, {**head, **(tail or {})})

    @property
    def files(self) -> list[Path]:
        return sorted((self.home / "site-adapters").rglob("*.safetensors"))


def arrays_of(message: Message) -> Arrays:
    assert not message.has_error(), message.error.reason
    return Payload.from_content(message.content).arrays


def test_training_the_head_alone_leaves_the_sites_own_adapters_as_they_are(tmp_path: Path) -> None:
    attack = Attack(tmp_path)
    assert not attack.describe()
    arrays_of(attack.ask(TRAIN, {"server_round": 1}, attack.shared()))
    before = {path: path.read_bytes() for path in attack.files}
    assert before
    for number in (1, 2, 3, 4):
        attack.ask(TRAIN, {"server_round": number}, attack.head())
    assert {path: path.read_bytes() for path in attack.files} == before
    arrays_of(attack.ask(EVALUATE, {"server_round": 5}, attack.shared()))


def test_second_matrices_neither_come_nor_go(tmp_path: Path) -> None:
    attack = Attack(tmp_path)
    assert not attack.describe()
    assert attack.ask(TRAIN, {"server_round": 1}, attack.whole()).has_error()
    assert attack.ask(EVALUATE, {"server_round": 1}, attack.whole()).has_error()
    assert attack.ask(RIVALS, {"levels": ["tail"], "temperatures": [1.0]}, attack.whole()).has_error()
    assert attack.personalise("adapters", attack.whole()).has_error()
    assert not attack.files
    for reply in (
        attack.ask(TRAIN, {"server_round": 1}, attack.shared()),
        attack.ask(EVALUATE, {"server_round": 1}, attack.shared()),
        attack.personalise("adapters", attack.shared()),
    ):
        assert not any("lora_B" in name for name in arrays_of(reply))


def test_another_run_of_the_same_name_does_not_start_from_the_adapters_of_the_first(tmp_path: Path) -> None:
    attack = Attack(tmp_path)
    assert not attack.describe()
    arrays_of(attack.ask(TRAIN, {"server_round": 1}, attack.shared()))
    other = "lora:3:sa@last:1"
    assert not attack.describe(tune=other)
    arrays_of(attack.ask(TRAIN, {"server_round": 2}, attack.shared(other)))
    assert not attack.describe(tune="lora:2@last:1")
    after = arrays_of(attack.ask(TRAIN, {"server_round": 2}, attack.whole()))
    assert any("lora_B" in name for name in after)
    assert len(attack.files) == 2


def test_a_personal_model_outlives_a_failure_to_write_its_successor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = Attack(tmp_path)
    assert not attack.describe()
    arrays_of(attack.personalise("head"))
    first = find_site_model("ward")
    assert first is not None

    def fails(*_: Any) -> None:
        raise FedheadError("The disk is full.")

    with monkeypatch.context() as patch:
        patch.setattr(TransferModel, "save", fails)
        assert attack.personalise("adapters", attack.shared()).has_error()
    assert find_site_model("ward") == first
    TransferModel.load(first)
    arrays_of(attack.personalise("adapters", attack.shared()))
    second = find_site_model("ward")
    assert second is not None and second != first and not first.exists()
    TransferModel.load(second)
    arrays_of(attack.personalise("head"))
    assert find_site_model("ward") == first and not second.exists()


@pytest.mark.parametrize("values", [{"objective": "simsiam"}, {"objective": "supcon"}, {"task": "multi-label"}])
def test_adapters_stay_at_sites_in_classification_alone(tmp_path: Path, values: dict[str, Any]) -> None:
    attack = Attack(tmp_path)
    assert "train on the task 'classification'" in attack.describe(**values)
    assert attack.ask(TRAIN, {"server_round": 1}, attack.shared()).has_error()
    assert not attack.files


def test_parameters_of_an_objective_come_with_layers(tmp_path: Path) -> None:
    attack = Attack(tmp_path)
    tune = "lora:2@last:1"
    assert not attack.describe(objective="simsiam", tune=tune)
    made = cut(attack.backbone, parse_tune(tune), "simsiam").objective
    assert made is not None
    own = {f"objective.{name}": value.numpy() for name, value in made.trainable().items()}
    alone = attack.ask(TRAIN, {"server_round": 1}, {**attack.head(), **own})
    assert "it contains the arrays" in alone.error.reason
    arrays_of(attack.ask(TRAIN, {"server_round": 1}, {**attack.shared(tune), **own}))
