import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedhead.backbones import Backbone, load_backbone
from fedhead.backbones.split import blocks_of, merged, split
from fedhead.data.conversations import Conversation
from fedhead.errors import UserError
from fedhead.tuning import NEXT_TOKEN, parse_tune

from .tiny_language_model import tiny_encoder_decoder, tiny_tokenizer

pytest.importorskip("transformers")

TALKS = [
    Conversation([("user", "Where is Rome?"), ("assistant", "In Italy.")]),
    Conversation([("system", "S"), ("user", "A"), ("assistant", "B"), ("user", "C"), ("assistant", "D, E")]),
    Conversation([("user", ""), ("assistant", "An answer that is longer than the others are.")]),
]
PROMPTS = ["Where is Rome?", "S\nA\nB\nC", ""]


@pytest.fixture(scope="module", params=["t5", "bart", "marian"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder_decoder(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    made = load_backbone(f"hf:{folder}", layer=NEXT_TOKEN)
    with torch.no_grad():
        # A new model hardly attends to anything.
        for parameter in made.module.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    return made


def own_losses(folder: Path, backbone: Backbone, prompt: str, answer: str) -> list[float]:
    """Return the loss of an answer by the library's own tokenizer and labels, its tokens, and 0."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    module: Any = backbone.module
    labels = tokenizer(answer, return_tensors="pt").input_ids
    asked = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        loss = module.causal(input_ids=asked.input_ids, attention_mask=asked.attention_mask, labels=labels).loss
    return [float(loss) * labels.shape[1], labels.shape[1], 0]


def test_losses_are_those_of_transformers_on_targets(folder: Path, backbone: Backbone) -> None:
    features = backbone.features_of(TALKS).tolist()
    for row, talk, prompt in zip(features, TALKS, PROMPTS, strict=True):
        assert row == pytest.approx(own_losses(folder, backbone, prompt, talk.turns[-1][1]), rel=1e-4)


def test_few_logits_at_a_time_give_the_same_losses(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = backbone.features_of(TALKS)
    monkeypatch.setattr("fedhead.backbones.hf_seq2seq.LOGITS", 1)
    torch.testing.assert_close(backbone.features_of(TALKS), whole, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("where", ["last:1", "all"])
def test_adapters_of_queries_and_values_train_and_merge(backbone: Backbone, where: str) -> None:
    pytest.importorskip("peft")
    trunk, tail = split(backbone, parse_tune(f"lora:2@{where}"))
    assert not tail.takes_sites
    names = {name.partition(".lora_")[0].rpartition(".")[2] for name in tail.trainable()}
    assert names in ({"q", "v"}, {"q_proj", "v_proj"})
    adapted = {name.partition(".lora_")[0] for name in tail.trainable()}
    # Self-attention and cross-attention of a decoder's block; besides, two blocks of self-attention in the encoder.
    assert len(adapted) == (4 if where == "last:1" else 12)
    values, mask = trunk.boundary(backbone.preprocessing.collate([backbone.preprocessing(talk) for talk in TALKS]))
    torch.testing.assert_close(tail(values.half().float(), mask), backbone.features_of(TALKS), rtol=1e-5, atol=1e-4)
    generator = torch.Generator().manual_seed(0)
    moved = {name: one + 0.1 * torch.randn(one.shape, generator=generator) for name, one in tail.trainable().items()}
    leaves = {name: value.requires_grad_() for name, value in moved.items()}
    outputs = tail.run(leaves, values, mask)
    slopes = torch.autograd.grad(outputs[:, 0].sum(), list(leaves.values()))
    assert all(float(slope.abs().max()) > 0 for slope in slopes)
    whole = merged(backbone, tail, {name: value.detach() for name, value in moved.items()})
    torch.testing.assert_close(whole.features_of(TALKS), outputs.detach(), rtol=1e-4, atol=1e-3)
    assert float((outputs.detach() - backbone.features_of(TALKS)).abs().max()) > 0.01


def test_a_saved_model_needs_nothing_else(backbone: Backbone, tmp_path: Path) -> None:
    path = tmp_path / "backbone.safetensors"
    backbone.save(path)
    again = Backbone.load(path)
    assert again.digest == backbone.digest
    assert torch.equal(again.probe(), backbone.probe())


def test_long_texts_are_cut_and_marked(folder: Path) -> None:
    short = load_backbone(f"hf:{folder}?max_length=20", layer=NEXT_TOKEN)
    ends = short.preprocessing(Conversation([("user", "x" * 50 + "end"), ("assistant", "y" * 50)]))
    assert int(ends[:, 1].sum()) == 20
    assert len(ends) == 40
    assert ends[:, 2].all()
    assert not short.preprocessing(TALKS[0])[:, 2].any()
    text: Any = short.preprocessing
    assert text.text_of(ends[:20, 0].tolist()).endswith("xend")


def test_blocks_are_named(backbone: Backbone) -> None:
    names = [one.name for one in blocks_of(backbone)]
    assert len(names) == 4
    assert all("encoder" in name for name in names[:2])
    assert all("decoder" in name for name in names[2:])


def test_models_without_a_start_or_a_readable_tokenizer_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    tiny_tokenizer("").save_pretrained(tmp_path)
    T5ForConditionalGeneration(
        T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    values = json.loads(config.read_text())
    for start in (None, -1, 300, "a", 1.5):
        config.write_text(json.dumps({**values, "decoder_start_token_id": start}))
        with pytest.raises(UserError, match=r"decoder_start_token_id|config.json"):
            load_backbone(f"hf:{tmp_path}", layer=NEXT_TOKEN)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *given, **settings: object())
    with pytest.raises(UserError, match="tokenizer in Python code"):
        load_backbone(f"hf:{folder}", layer=NEXT_TOKEN)
