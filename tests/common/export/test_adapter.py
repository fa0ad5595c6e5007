"""Adapters that PEFT loads and merges to the features of the run's model."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fedhead.backbones import load_backbone
from fedhead.backbones.split import merged, split
from fedhead.backbones.tail_file import TAIL_FILE, load_tail, save_tail
from fedhead.cli import app
from fedhead.errors import UserError
from fedhead.export.adapter import export_adapter
from fedhead.heads import make_head
from fedhead.model import BACKBONE_FILE, MODEL_FILE, TransferModel
from fedhead.tuning import parse_tune

from ..backbones.test_hf import TEXTS, saved_text_model

peft = pytest.importorskip("peft")


def tuned_run(folder: Path, spec: str, tune: str) -> TransferModel:
    """Write what a finished run has: model, tuned backbone, tuned parameters."""
    folder.mkdir()
    base = load_backbone(spec)
    tail = split(base, parse_tune(tune)).tail
    torch.manual_seed(0)
    trained = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in tail.trainable().items()}
    backbone = merged(base, tail, trained)
    head = make_head("linear", backbone.num_features, 2)
    model = TransferModel(backbone, head, ["a", "b"])
    model.save(folder / MODEL_FILE)
    backbone.save(folder / BACKBONE_FILE)
    save_tail(folder / TAIL_FILE, tail, trained)
    return model


@pytest.mark.parametrize("tune", ["lora:2", "lora:2:ffa@last:1"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_transformers_and_peft_load_and_merge_the_export(tmp_path: Path, name: str, tune: str) -> None:
    folder = saved_text_model(tmp_path / name, name)
    model = tuned_run(tmp_path / "run", f"hf:{folder}", tune)
    result = CliRunner().invoke(app, ["export", str(tmp_path / "run"), "--format", "peft", "--json"])
    assert result.exit_code == 0, result.output
    written = json.loads(result.stdout)
    assert written["largest_difference"] < 1e-5
    assert {path.name for path in Path(written["path"]).iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    transformers = pytest.importorskip("transformers")
    base = transformers.AutoModel.from_pretrained(folder)
    adapted = peft.PeftModel.from_pretrained(base, written["path"]).eval()
    batch = model.backbone.preprocessing.collate([model.backbone.preprocessing(text) for text in TEXTS])
    assert isinstance(batch, dict)
    with torch.no_grad():
        states = adapted(**batch).last_hidden_state
        merged_states = adapted.merge_and_unload()(**batch).last_hidden_state
        own = model.backbone.module(**batch)
    torch.testing.assert_close(states, own, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged_states, own, rtol=1e-5, atol=1e-5)


def test_convolutions_are_exported_too(tmp_path: Path) -> None:
    model = tuned_run(tmp_path / "run", "bundled:glyphnet", "lora:2@last:2")
    written = export_adapter(model, tmp_path / "run", tmp_path / "adapter")
    assert written.difference < 1e-5
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["target_modules"]) == (2, 4, ["features", "stage3.2"])
    with pytest.raises(UserError, match="not an empty folder"):
        export_adapter(model, tmp_path / "run", tmp_path / "adapter")


def test_runs_without_adapters_are_refused(tmp_path: Path) -> None:
    model = tuned_run(tmp_path / "run", "bundled:glyphnet", "last:2")
    with pytest.raises(UserError, match="tuned 'last:2', which has no adapters"):
        export_adapter(model, tmp_path / "run", tmp_path / "adapter")
    (tmp_path / "run" / TAIL_FILE).write_bytes(b"broken")
    with pytest.raises(UserError, match="cannot be read"):
        load_tail(tmp_path / "run" / TAIL_FILE)
    (tmp_path / "run" / TAIL_FILE).unlink()
    with pytest.raises(UserError, match="not tuned with LoRA"):
        export_adapter(model, tmp_path / "run", tmp_path / "adapter")
