"""Encoder-decoders: adapters of attention learn translations, and are generated from, evaluated and exported."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fedhead.backbones import load_backbone
from fedhead.cli import app
from fedhead.config import RunConfig
from fedhead.errors import UserError
from fedhead.generation import generate
from fedhead.model import TransferModel
from fedhead.simulations import simulate
from fedhead.simulations.result import RunResult
from fedhead.tuning import NEXT_TOKEN

from ..common.backbones.tiny_language_model import tiny_encoder_decoder

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=["t5", pytest.param("marian", marks=pytest.mark.slow)])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of two blocks each, and 90 numbers with their digits reversed."""
    folder = tmp_path_factory.mktemp("pairs")
    tiny_encoder_decoder(folder / "model", request.param)
    numbers = np.random.default_rng(0).integers(10, 99, 90)
    lines = [json.dumps({"prompt": f"turn {one}", "completion": str(one)[::-1]}) for one in numbers]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def tuned(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    table = {"data": f"jsonl:{folder / 'pairs.jsonl'}", "sites": 3, "min_class_count": 0, "min_rows": 0}
    config = RunConfig(
        task="generation",
        backbone=f"hf:{folder / 'model'}",
        tune={"layers": "lora:4@all", "lr": 0.05, "batch_size": 8},
        rounds=2,
        with_backbone=True,
        simulation=table,
    )
    return simulate(config, out=tmp_path_factory.mktemp("tuned") / "run")


def test_adapters_are_proven_and_delivered(tuned: RunResult) -> None:
    figures = tuned.summary()
    assert figures["kept"] == "tuned"
    assert figures["perplexity_held_out"] < figures["perplexity_solved"]
    assert tuned.run_dir is not None
    again = TransferModel.load(tuned.run_dir)
    torch.testing.assert_close(again.backbone.probe(), tuned.model.backbone.probe())


def test_answers_are_those_of_transformers(tuned: RunResult, folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    whole: Any = tuned.model.backbone.module
    asked = tokenizer("turn 42", return_tensors="pt")
    for beams in (1, 3):
        made = whole.causal.generate(
            input_ids=asked.input_ids,
            attention_mask=asked.attention_mask,
            num_beams=beams,
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        expected = tokenizer.decode(made[0], skip_special_tokens=True).strip()
        assert list(generate(tuned.model, "turn 42", max_tokens=6, beams=beams)) == [expected]
    for wrong in ({"beams": 0}, {"beams": 1000}, {"beams": 2, "temperature": 1.0}):
        with pytest.raises(UserError, match="beams"):
            next(generate(tuned.model, "turn 42", **wrong))


def test_commands_generate_and_evaluate(tuned: RunResult, folder: Path) -> None:
    run = str(tuned.run_dir)
    made = CliRunner().invoke(app, ["generate", run, "turn 42", "--max-tokens", "4", "--beams", "2", "--json"])
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["prompt"] == "turn 42"
    data = f"jsonl:{folder / 'pairs.jsonl'}"
    judged = CliRunner().invoke(app, ["evaluate", run, "--data", data, "--json"])
    assert judged.exit_code == 0, judged.output
    assert json.loads(judged.stdout)["score_name"] == "perplexity"


def test_adapters_are_loaded_by_peft(tuned: RunResult, tmp_path: Path) -> None:
    from peft import AutoPeftModelForSeq2SeqLM

    done = CliRunner().invoke(
        app, ["export", str(tuned.run_dir), "--format", "peft", "--out", str(tmp_path / "adapter")]
    )
    assert done.exit_code == 0, done.output
    loaded = AutoPeftModelForSeq2SeqLM.from_pretrained(str(tmp_path / "adapter"))
    whole: Any = tuned.model.backbone.module
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = whole.causal(input_ids=ids, decoder_input_ids=ids).logits
        torch.testing.assert_close(loaded(input_ids=ids, decoder_input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_other_tasks_say_what_takes_such_a_model(folder: Path) -> None:
    assert load_backbone(f"hf:{folder / 'model'}", layer=NEXT_TOKEN).layer == NEXT_TOKEN
    with pytest.raises(UserError, match="takes the task 'generation'"):
        load_backbone(f"hf:{folder / 'model'}")
