"""A coordinator that writes what it likes into a manifest."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from pydantic import ValidationError

from fedhead.backbones.weights import weights_path
from fedhead.client.backbones import AcceptedBackbones
from fedhead.client.connection import Connection
from fedhead.client.local_site import LocalSite
from fedhead.client.settings import SiteSettings
from fedhead.client.site import SiteProcess
from fedhead.config import RunConfig
from fedhead.data import load_samples
from fedhead.errors import UserError
from fedhead.flower import in_process_identity
from fedhead.protocol.actions import DESCRIBE
from fedhead.protocol.messages import Description, Manifest, Payload

VALUES: dict[str, Any] = {
    "run": "run",
    "backbone": "bundled:glyphnet",
    "layer": "penultimate",
    "backbone_digest": "0" * 64,
    "weights_digest": "0" * 64,
    "num_features": 192,
    "classes": ("cat", "dog"),
    "head": "linear",
    "holdout": 0.2,
    "seed": 0,
    "local": RunConfig().local,
}


@pytest.mark.parametrize(
    "wrong",
    [
        {"weights_digest": "../../../tmp/" + "0" * 51},
        {"weights_digest": "0" * 64 + "\n"},
        {"backbone_digest": "A" * 64},
        {"holdout": 2.0},
        {"holdout": float("nan")},
        {"classes": ("cat", "cat")},
        {"num_features": 10**9},
        {"num_features": -1},
        {"seed": 10**400},
        {"run": "\x1b[2J\x1b[Hharmless"},
        {"run": "left\u202eright"},
        {"run": "x" * 10**6},
        {"backbone": "bundled:glyphnet\n"},
    ],
)
def test_values_out_of_range_make_no_manifest(wrong: dict[str, Any]) -> None:
    Manifest(**VALUES)
    with pytest.raises(ValidationError):
        Manifest(**{**VALUES, **wrong})


def described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backbones: tuple[str, ...]) -> Description:
    """A site's answer to a manifest whose backbone is a function that leaves a file when it is called."""
    (tmp_path / "harmful.py").write_text("def function():\n    open('called', 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "home"))
    settings = SiteSettings(name="here", coordinator="127.0.0.1:9092", data="digits", backbones={"allow": backbones})
    site = LocalSite(
        settings.name, settings.data, "cpu", backbones=AcceptedBackbones(frozenset(settings.backbones.allow))
    )
    process = SiteProcess(settings, site, Connection.__new__(Connection), tmp_path / "site")
    classes = load_samples("digits").classes
    manifest = Manifest(**{**VALUES, "backbone": "python:harmful:function", "classes": classes})
    # Weights that the coordinator sent before: the function is called to be filled with them.
    sent = weights_path(manifest.weights_digest)
    sent.parent.mkdir(parents=True)
    sent.write_bytes(b"")
    asked = Payload(manifest.model_dump(), {"probe": np.zeros((1, 192), np.float32)})
    with in_process_identity(run_id=1):
        reply = process.answer(Message(asked.to_content(), 5, DESCRIBE))
    if reply.has_error():
        return Description(site="here", refusal=str(reply.error.reason))
    return Description.from_content(reply.content)


def test_a_function_that_a_coordinator_names_is_not_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = described(tmp_path, monkeypatch, ())
    assert "runs no code that a coordinator names" in answer.refusal
    assert "[backbones] allow" in answer.refusal
    assert not (tmp_path / "called").exists()


def test_a_function_that_the_site_allows_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = described(tmp_path, monkeypatch, ("python:harmful:function",))
    assert "runs no code" not in answer.refusal
    assert (tmp_path / "called").exists()


def test_an_unknown_setting_of_backbones_is_named() -> None:
    with pytest.raises(UserError, match=r"no setting 'backbones\.alow'"):
        SiteSettings.from_values(
            {"name": "here", "coordinator": "127.0.0.1:1", "backbones": {"alow": []}}, "the command line"
        )
