import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fedhead.backbones import Backbone, load_backbone
from fedhead.backbones.hf_causal import CausalRecipe
from fedhead.backbones.split import merged, split
from fedhead.data import load_samples
from fedhead.data.conversations import Conversation
from fedhead.errors import UserError
from fedhead.features.blocks import extract_blocks
from fedhead.features.extraction import CPU_TOKENS, TEXT_BATCH
from fedhead.tuning import NEXT_TOKEN, parse_tune

from .tiny_language_model import CHATML, tiny_language_model

pytest.importorskip("transformers")

TALKS = [
    Conversation([("user", "Where is Rome?"), ("assistant", "In Italy.")]),
    Conversation([("system", "S"), ("user", "A"), ("assistant", "B"), ("user", "C"), ("assistant", "D, E")]),
]


@pytest.fixture(scope="module", params=["llama", "qwen2", "gpt2"])
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder = tiny_language_model(tmp_path_factory.mktemp(request.param), request.param)
    return load_backbone(f"hf:{folder}", layer=NEXT_TOKEN)


def own_losses(backbone: Backbone, talk: Conversation) -> tuple[float, int]:
    """Return the loss that transformers computes of the answers, and their tokens."""
    prepared = backbone.preprocessing(talk)
    ids, learned = prepared[:, 0][None], prepared[:, 1][None] == 1
    module: Any = backbone.module
    labels = ids.where(learned, torch.tensor(-100))
    with torch.no_grad():
        loss = module.causal(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
    return float(loss) * int(learned.sum()), int(learned.sum())


def test_losses_are_those_of_transformers_on_answers_alone(backbone: Backbone) -> None:
    features = backbone.features_of(TALKS)
    for row, talk in zip(features.tolist(), TALKS, strict=True):
        loss, tokens = own_losses(backbone, talk)
        assert row == pytest.approx([loss, tokens, 0], rel=1e-4)
    # "D, E" and "B", each with the end of an answer and a line break.
    assert features[1, 1] == len("D, E") + len("B") + 2 * 2


@pytest.mark.parametrize("where", ["last:1", "all"])
def test_trunk_and_tail_give_the_same_losses_and_merging_keeps_them(backbone: Backbone, where: str) -> None:
    pytest.importorskip("peft")
    trunk, tail = split(backbone, parse_tune(f"lora:2@{where}"))
    batch = backbone.preprocessing.collate([backbone.preprocessing(talk) for talk in TALKS])
    values, mask = trunk.boundary(batch)
    torch.testing.assert_close(tail(values, mask), backbone.features_of(TALKS), rtol=1e-5, atol=1e-4)
    # Targets survive float16.
    assert torch.equal(tail(values.half().float(), mask)[:, 1:], backbone.features_of(TALKS)[:, 1:])
    assert not any("output" in name or "lm_head" in name for name in tail.trainable())
    generator = torch.Generator().manual_seed(0)
    moved = {name: one + 0.1 * torch.randn(one.shape, generator=generator) for name, one in tail.trainable().items()}
    whole = merged(backbone, tail, moved)
    expected = tail.run(moved, values, mask)
    torch.testing.assert_close(whole.features_of(TALKS), expected, rtol=1e-5, atol=1e-4)
    assert float((expected - backbone.features_of(TALKS)).abs().max()) > 0.01
    module: Any = whole.module
    assert own_losses(whole, TALKS[0])[0] == pytest.approx(float(expected[0, 0]), rel=1e-4)
    assert module.causal is not backbone.module.causal


def test_gradients_are_those_of_transformers(backbone: Backbone) -> None:
    pytest.importorskip("peft")
    trunk, tail = split(backbone, parse_tune("lora:2@last:1"))
    values, mask = trunk.boundary(backbone.preprocessing.collate([backbone.preprocessing(TALKS[1])]))
    leaves = {name: value.clone().requires_grad_() for name, value in tail.trainable().items()}
    slopes = torch.autograd.grad(tail.run(leaves, values, mask)[0, 0], list(leaves.values()))
    step = 1e-2
    name = next(one for one in leaves if "lora_B" in one)
    direction = slopes[list(leaves).index(name)]
    direction = direction / direction.norm()
    with torch.no_grad():
        ahead, behind = (
            float(tail.run({**leaves, name: leaves[name] + sign * step * direction}, values, mask)[0, 0])
            for sign in (1, -1)
        )
    expected = float((slopes[list(leaves).index(name)] * direction).sum())
    assert (ahead - behind) / (2 * step) == pytest.approx(expected, rel=0.02)


def test_a_saved_model_needs_nothing_else(backbone: Backbone, tmp_path: Path) -> None:
    path = tmp_path / "backbone.safetensors"
    backbone.save(path)
    again = Backbone.load(path)
    assert again.digest == backbone.digest
    assert torch.equal(again.probe(), backbone.probe())
    # Tied weights are written once.
    assert len(set(backbone.tensors())) == len(backbone.tensors())


def test_models_without_template_or_padding_are_taken(tmp_path: Path) -> None:
    folder = tiny_language_model(tmp_path / "plain", template="", pad_token=None)
    plain = load_backbone(f"hf:{folder}", layer=NEXT_TOKEN)
    prepared = plain.preprocessing(Conversation([("user", "ab"), ("assistant", "cd")]))
    # "ab", a line break, "cd", and the end of the text.
    assert prepared[:, 1].tolist() == [0, 0, 0, 1, 1, 1]
    assert prepared[-1, 0] == 0
    both = plain.features_of(TALKS)
    torch.testing.assert_close(both[:1], plain.features_of(TALKS[:1]), rtol=1e-5, atol=1e-4)


def test_long_conversations_are_cut_and_marked(tmp_path: Path) -> None:
    folder = tiny_language_model(tmp_path / "model")
    backbone = load_backbone(f"hf:{folder}?max_length=40", layer=NEXT_TOKEN)
    long = Conversation([("user", "x" * 300), ("assistant", "Yes.")])
    prepared = backbone.preprocessing(long)
    assert len(prepared) == 40
    assert backbone.features_of([long, TALKS[0]])[:, 2].tolist() == [1, 1]
    endless = backbone.preprocessing(Conversation([("user", "a"), ("assistant", "y" * 300)]))
    assert int(endless[:, 1].sum()) == 39
    for wrong in ("max_length=2", "max_length=9999"):
        with pytest.raises(UserError, match="takes 8 to 256 tokens"):
            load_backbone(f"hf:{folder}?{wrong}", layer=NEXT_TOKEN)


def test_batches_of_conversations_are_limited_by_their_tokens(backbone: Backbone, tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": "Where is Rome?" * (row % 3), "completion": "In Italy."}) for row in range(150)]
    (tmp_path / "talks.jsonl").write_text("\n".join(lines))
    samples = load_samples(f"jsonl:{tmp_path / 'talks.jsonl'}")
    talks = [samples.read(row) for row in range(len(samples))]
    done = [0]
    (block,) = extract_blocks(backbone, samples, [range(len(talks))], progress=done.append)
    sizes = [now - before for before, now in itertools.pairwise(done)]
    shortest = min(len(backbone.preprocessing(talk)) for talk in talks)
    assert max(sizes) <= min(TEXT_BATCH, CPU_TOKENS // shortest)
    torch.testing.assert_close(torch.from_numpy(block.features[:3]), backbone.features_of(talks[:3]))


def test_other_models_are_refused_in_a_sentence(tmp_path: Path) -> None:
    from transformers import BertConfig, BertLMHeadModel, BertModel

    from .tiny_language_model import tiny_tokenizer

    size: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=300, intermediate_size=32, **size)
    tiny_tokenizer().save_pretrained(tmp_path)
    BertLMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="both directions"):
        load_backbone(f"hf:{tmp_path}", layer=NEXT_TOKEN)
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no causal language model"):
        load_backbone(f"hf:{tmp_path}", layer=NEXT_TOKEN)
    shouting = CHATML.replace("message['content']", "message['content'] | upper")
    folder = tiny_language_model(tmp_path / "shouting", template=shouting)
    with pytest.raises(UserError, match="chat template"):
        load_backbone(f"hf:{folder}", layer=NEXT_TOKEN)
    with pytest.raises(UserError, match="There is no file"):
        load_backbone("hf:/nowhere/model.gguf", layer=NEXT_TOKEN)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_length": 0},
        {"max_length": math.inf},
        {"max_length": 10**6},
        {"leading": [1] * 600},
        {"stops": [-1]},
        {"chat": {"start": 3}},
        {"chat": {"other": ""}},
        {"more": 1},
        {"pad": "x"},
    ],
)
def test_descriptions_from_elsewhere_are_checked(backbone: Backbone, changes: dict[str, Any]) -> None:
    own = {**json.loads(backbone.files["generation.json"]), **changes}
    files = {**backbone.files, "generation.json": json.dumps(own)}
    with pytest.raises(UserError, match="valid description"):
        CausalRecipe.from_files(files, "file")
    with pytest.raises(UserError, match="named values"):
        CausalRecipe.from_files({**backbone.files, "config.json": "[]"}, "file")
