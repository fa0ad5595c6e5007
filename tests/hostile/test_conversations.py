"""A coordinator that asks a site for more of its conversations than a language model's run needs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fedhead.backbones import Backbone, load_backbone
from fedhead.backbones.hf_causal_recipe import CausalRecipe
from fedhead.backbones.split import split
from fedhead.client.connection import Connection
from fedhead.client.local_site import LocalSite
from fedhead.client.release.ledger import ledger_path
from fedhead.client.settings import SiteSettings
from fedhead.client.site import SiteProcess
from fedhead.client.site_opening import site_of
from fedhead.config import GENERATION_COLUMNS, LocalConfig
from fedhead.errors import UserError
from fedhead.flower import in_process_identity
from fedhead.protocol.actions import CLUSTER, DESCRIBE, DISTANCES, EVALUATE, GRADIENT, RIVALS, STATISTICS, TRAIN
from fedhead.protocol.messages import Manifest, Payload
from fedhead.protocol.rivals import RivalsRequest
from fedhead.tuning import NEXT_TOKEN, parse_tune

from ..common.backbones.tiny_language_model import tiny_language_model

pytest.importorskip("peft")
pytest.importorskip("transformers")

TUNE = "lora:2@last:1"


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "home"))
    with in_process_identity(run_id=1):
        yield


class Attack:
    """A site's real process with conversations, and a coordinator that describes a run of its choice."""

    def __init__(self, folder: Path, rows: int = 60, long: int = 0, **changes: Any) -> None:
        model = tiny_language_model(folder / "model")
        lines = [
            json.dumps({"prompt": f"Who is {one}?", "completion": f"It is {one}." + 200 * " word" * (one < long)})
            for one in range(rows)
        ]
        (folder / "talks.jsonl").write_text("\n".join(lines))
        self.backbone: Backbone = load_backbone(f"hf:{model}", layer=NEXT_TOKEN)
        given = SiteSettings(
            name="desk",
            coordinator="127.0.0.1:9092",
            data=f"jsonl:{folder / 'talks.jsonl'}",
            device="cpu",
            backbones={"allow": [self.backbone.spec]},
        )
        site: LocalSite = site_of(given, ledger_path("desk"))
        self.process = SiteProcess(given, site, Connection.__new__(Connection), folder / "site")
        tail = split(self.backbone, parse_tune(TUNE)).tail
        self.own = {f"tail.{name}": value.numpy() for name, value in tail.trainable().items()}
        values: dict[str, Any] = {
            "run": "run",
            "backbone": self.backbone.spec,
            "kind": "text",
            "layer": NEXT_TOKEN,
            "backbone_digest": self.backbone.digest,
            "weights_digest": self.backbone.weights_digest,
            "num_features": 3,
            "classes": GENERATION_COLUMNS,
            "task": "generation",
            "head": "none",
            "holdout": 0.2,
            "seed": 0,
            "local": LocalConfig(lr=1e-3),
            "tune": TUNE,
        }
        manifest = Manifest(**{**values, **changes})
        probe = self.backbone.probe().numpy().astype(np.float32)
        told = self.ask(DESCRIBE, Payload(manifest.wire(), {"probe": probe}))
        self.refusal = Payload.from_content(told.content).values["refusal"]

    def ask(self, action: str, payload: Payload) -> Message:
        return self.process.answer(Message(payload.to_content(), 5, action))

    def answer(self, action: str, payload: Payload) -> str:
        """Return the reason of an error; empty for an answer."""
        told = self.ask(action, payload)
        return told.error.reason if told.has_error() else ""


def test_only_requests_about_adapters_are_answered(tmp_path: Path) -> None:
    attack = Attack(tmp_path)
    assert not attack.refusal
    for action in (STATISTICS, GRADIENT, DISTANCES, CLUSTER):
        assert "does not answer" in attack.answer(action, Payload({}))
    assert not attack.answer(EVALUATE, Payload({"server_round": 0}, attack.own))
    assert not attack.answer(TRAIN, Payload({"server_round": 1}, attack.own))


def test_adapters_of_another_form_are_refused(tmp_path: Path) -> None:
    attack = Attack(tmp_path)
    name = next(iter(attack.own))
    for arrays in (
        {},
        {name: attack.own[name]},
        {**attack.own, name: attack.own[name][:1]},
        {**attack.own, name: np.full_like(attack.own[name], np.nan)},
        {**attack.own, "tail.embed_tokens.weight": np.zeros((3, 3), np.float32)},
    ):
        reason = attack.answer(TRAIN, Payload({"server_round": 1}, arrays))
        assert "contains" in reason or "instead of" in reason
    assert not attack.answer(TRAIN, Payload({"server_round": 1}, attack.own))
    lone = RivalsRequest([{}, {}], ["map", "map"], np.ones(2)).payload()
    assert "does not have" in attack.answer(RIVALS, lone)


def test_few_conversations_take_no_part(tmp_path: Path) -> None:
    assert "20" in Attack(tmp_path, rows=12).refusal


@pytest.mark.parametrize(
    "changes",
    [{"head": "linear"}, {"tune": ""}, {"tune": "last:1"}, {"task": "classification", "classes": ("a", "b", "c")}],
)
def test_runs_of_another_form_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    attack = Attack(tmp_path, **changes)
    assert "language model" in attack.refusal
    assert "describe" in attack.answer(TRAIN, Payload({"server_round": 1}, attack.own))


def test_a_long_conversation_does_not_keep_its_site_out(tmp_path: Path) -> None:
    attack = Attack(tmp_path, long=1)
    assert not attack.refusal
    assert not attack.answer(EVALUATE, Payload({"server_round": 0}, attack.own))


def test_templates_are_never_received(tmp_path: Path) -> None:
    files = dict(load_backbone(f"hf:{tiny_language_model(tmp_path / 'model')}", layer=NEXT_TOKEN).files)
    assert "{%" not in "".join(text for name, text in files.items() if name != "tokenizer.json")
    said = json.loads(files["generation.json"])
    for chat in (
        {**said["chat"], "chat_template": "{{ 7 * 7 }}"},
        {**said["chat"], "start": {"template": "{{ 7 * 7 }}"}},
    ):
        with pytest.raises(UserError, match="no valid description"):
            CausalRecipe.from_files({**files, "generation.json": json.dumps({**said, "chat": chat})}, "received")
    with pytest.raises(UserError, match="no valid description"):
        CausalRecipe.from_files({**files, "generation.json": "[" * 100_000}, "received")
    # A text that looks like a template is put around turns as it is.
    plain = {**said, "chat": {**said["chat"], "start": "{{ 7 * 7 }}"}}
    recipe = CausalRecipe.from_files({**files, "generation.json": json.dumps(plain)}, "received")
    assert recipe.chat.parts([("user", "Hi")])[0][0].startswith("{{ 7 * 7 }}")


@pytest.mark.parametrize(
    "change",
    [{"vocab_size": 10**8}, {"intermediate_size": 10**8}, {"num_hidden_layers": 10**6}, {"head_dim": "many"}],
)
def test_a_file_does_not_claim_a_larger_model_than_it_holds(tmp_path: Path, change: dict[str, Any]) -> None:
    backbone = load_backbone(f"hf:{tiny_language_model(tmp_path / 'model')}", layer=NEXT_TOKEN)
    path = tmp_path / "saved.safetensors"
    backbone.save(path)
    with safe_open(path, "pt") as file:
        about = file.metadata()
    files = json.loads(about["files"])
    files["config.json"] = json.dumps({**json.loads(files["config.json"]), **change})
    save_file(load_file(path), path, {**about, "files": json.dumps(files)})
    with pytest.raises(UserError, match=r"states|transformers cannot"):
        Backbone.load(path)
