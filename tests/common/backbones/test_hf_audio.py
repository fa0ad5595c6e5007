"""Features of sounds equal those of transformers' own extractor and model, for random models of a few weights."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedhead.backbones import Backbone, load_backbone
from fedhead.backbones.hf_recipe import Recipe
from fedhead.data import Clip
from fedhead.errors import UserError

transformers = pytest.importorskip("transformers")

RATE = 16_000
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CONVOLUTIONS = {"conv_dim": (8,) * 3, "conv_stride": (5, 4, 4), "conv_kernel": (10, 8, 4)}
POSITIONS = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
WAVEFORM = {**SMALL, **CONVOLUTIONS, **POSITIONS}
TOLERANCE = 1e-5


def clips() -> list[Clip]:
    random = np.random.default_rng(0)
    lengths = (0.7, 0.31, 0.7, 1.3)
    return [Clip(random.standard_normal(int(one * RATE)).astype(np.float32) / 9, RATE) for one in lengths]


def save(folder: Path, model: Any, extractor: Any) -> Path:
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return folder


def whisper(positions: int) -> Any:
    torch.manual_seed(0)
    return transformers.WhisperModel(
        transformers.WhisperConfig(
            d_model=16,
            encoder_layers=2,
            encoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_layers=1,
            decoder_attention_heads=2,
            decoder_ffn_dim=24,
            max_source_positions=positions,
            vocab_size=9,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
    ).eval()


def librarys_whisper(model: Any, clip: Clip, seconds: int) -> Tensor:
    """Return the mean over a clip's positions by a Whisper whose inputs are all `seconds` long."""
    shorter = whisper(50 * seconds).encoder
    state = dict(model.encoder.state_dict())
    state["embed_positions.weight"] = state["embed_positions.weight"][: 50 * seconds]
    shorter.load_state_dict(state)
    extractor = transformers.WhisperFeatureExtractor(chunk_length=seconds)
    features = extractor(clip.samples, sampling_rate=RATE, return_tensors="pt")["input_features"]
    states = shorter(features).last_hidden_state
    positions = math.ceil(math.ceil(len(clip.samples) / 160) / 2)
    mean: Tensor = states[0, :positions].mean(0)
    return mean


@torch.no_grad()
def test_whisper_takes_as_many_positions_as_whole_seconds(tmp_path: Path) -> None:
    model = whisper(200)
    folder = save(tmp_path, model, transformers.WhisperFeatureExtractor(chunk_length=4))
    several = [*clips(), Clip(np.tile(clips()[0].samples, 3), RATE)]
    features = load_backbone(f"hf:{folder}").features_of(several)
    expected = [librarys_whisper(model, clip, max(2, math.ceil(clip.seconds))) for clip in several]
    assert (features - torch.stack(expected)).abs().max() < TOLERANCE
    uncut = load_backbone(f"hf:{folder}?cut=no").features_of(several)
    assert (uncut - torch.stack([librarys_whisper(model, clip, 4) for clip in several])).abs().max() < TOLERANCE
    assert (uncut - features).abs().max() > 1e-3


def waveform_model(name: str) -> Any:
    torch.manual_seed(0)
    models = {
        "group": lambda: transformers.Wav2Vec2Model(
            transformers.Wav2Vec2Config(**WAVEFORM, feat_extract_norm="group", num_feat_extract_layers=3)
        ),
        "layer": lambda: transformers.Wav2Vec2Model(
            transformers.Wav2Vec2Config(**WAVEFORM, feat_extract_norm="layer", do_stable_layer_norm=True)
        ),
        "hubert": lambda: transformers.HubertModel(transformers.HubertConfig(**WAVEFORM)),
        "wavlm": lambda: transformers.WavLMModel(transformers.WavLMConfig(**WAVEFORM)),
    }
    return models[name]().eval()


@pytest.mark.parametrize("name", ["group", "layer", "hubert", "wavlm"])
@torch.no_grad()
def test_models_of_waveforms_equal_the_librarys(tmp_path: Path, name: str) -> None:
    model = waveform_model(name)
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=name != "hubert")
    backbone = load_backbone(f"hf:{save(tmp_path, model, extractor)}")
    expected = []
    for clip in clips():
        values = extractor(clip.samples, sampling_rate=RATE, return_tensors="pt")["input_values"]
        expected.append(model(values).last_hidden_state.mean(1)[0])
    assert (backbone.features_of(clips()) - torch.stack(expected)).abs().max() < TOLERANCE


@torch.no_grad()
def test_ast_equals_the_librarys_own_vector(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.ASTModel(transformers.ASTConfig(**SMALL, max_length=64, num_mel_bins=32)).eval()
    extractor = transformers.ASTFeatureExtractor(max_length=64, num_mel_bins=32)
    backbone = load_backbone(f"hf:{save(tmp_path, model, extractor)}")
    short = clips()[:3]
    values = [extractor(clip.samples, sampling_rate=RATE, return_tensors="pt")["input_values"] for clip in short]
    expected = torch.cat([model(one).pooler_output for one in values])
    assert backbone.preprocessing.describe()["max_seconds"] == 0.64
    assert (backbone.features_of(short[1:2]) - expected[1:2]).abs().max() < TOLERANCE
    by_states = load_backbone(f"hf:{tmp_path}", layer="hidden:2")
    states = model(values[1], output_hidden_states=True).hidden_states[2].mean(1)
    assert (by_states.features_of(short[1:2]) - states).abs().max() < TOLERANCE


@torch.no_grad()
def test_hidden_states_and_poolings_of_whisper(tmp_path: Path) -> None:
    model = whisper(50)
    folder = save(tmp_path, model, transformers.WhisperFeatureExtractor(chunk_length=1))
    clip = clips()[0]
    values = transformers.WhisperFeatureExtractor(chunk_length=1)(clip.samples, sampling_rate=RATE, return_tensors="pt")
    states = model.encoder(values["input_features"], output_hidden_states=True).hidden_states[1][0, :35]
    first = load_backbone(f"hf:{folder}", layer="hidden:1").features_of([clip])[0]
    assert (first - states.mean(0)).abs().max() < TOLERANCE
    largest = load_backbone(f"hf:{folder}", layer="hidden:1:max").features_of([clip])[0]
    assert (largest - states.amax(0)).abs().max() < TOLERANCE


def test_a_saved_encoder_brings_its_extractor(tmp_path: Path) -> None:
    save(tmp_path / "model", whisper(50), transformers.WhisperFeatureExtractor(chunk_length=1))
    backbone = load_backbone(f"hf:{tmp_path / 'model'}?max_seconds=0.5")
    backbone.save(tmp_path / "backbone.safetensors")
    loaded = Backbone.load(tmp_path / "backbone.safetensors")
    assert loaded.digest == backbone.digest
    assert torch.equal(loaded.features_of(clips()), backbone.features_of(clips()))
    assert backbone.digest != load_backbone(f"hf:{tmp_path / 'model'}").digest
    assert not any("decoder" in name for name in backbone.tensors())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"settings": {"sampling_rate": 10**9}}, "its sampling_rate is 1000000000; expected 4000 to 96000"),
        ({"settings": {"sampling_rate": True}}, "its sampling_rate is True"),
        ({"settings": {"dither": 1.0}}, "adds noise"),
        ({"settings": {"hop_length": 4096, "sampling_rate": 4000}}, "longer than a second of 4000 samples"),
        ({"settings": {"hop_length": 0}}, "its hop_length is 0"),
        ({"settings": {"chunk_length": 600, "sampling_rate": 96000}}, "more than 9600000 samples"),
        ({"settings": {"padding_value": math.nan}}, "its padding_value is nan"),
        ({"settings": {"padding_side": "left"}}, "its padding_side is left"),
        ({"settings": {"return_attention_mask": 1}}, "expected true or false"),
        ({"settings": {"mel_filters": [1.0]}}, "unknown setting 'mel_filters'"),
        ({"settings": {"std": 1.0}}, "unknown setting 'std'"),
        ({"extractor": "ASTFeatureExtractor", "settings": {"std": 0.0}}, "its std is 0.0; expected 0.001 to 10000"),
        ({"extractor": "ASTFeatureExtractor", "settings": {"mean": math.inf}}, "its mean is inf"),
        ({"settings": []}, "is not supported"),
        ({"extractor": "AutoModel"}, "'AutoModel' is not supported"),
    ],
)
def test_files_of_a_coordinator_are_bounded(change: dict[str, Any], reason: str) -> None:
    audio = {"extractor": "WhisperFeatureExtractor", "settings": {}, "max_seconds": 10**9} | change
    features = {"pooling": "mean", "max_length": 9, "pad": 0, "empty": 0, "image": None, "audio": audio}
    with pytest.raises(UserError, match=reason):
        Recipe.from_files({"features.json": json.dumps(features), "config.json": "{}"}, "file")
    features["audio"] = {"extractor": "WhisperFeatureExtractor", "settings": {}, "max_seconds": 10**9}
    read = Recipe.from_files({"features.json": json.dumps(features), "config.json": "{}"}, "file")
    assert read.audio == {"extractor": "WhisperFeatureExtractor", "settings": {}}


def test_settings_and_models_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "whisper", whisper(50), transformers.WhisperFeatureExtractor(chunk_length=1))
    save(tmp_path / "wave", waveform_model("hubert"), transformers.Wav2Vec2FeatureExtractor())
    transformers.WhisperFeatureExtractor().save_pretrained(tmp_path / "wave2")
    for name, reason in (
        ("whisper?max_seconds=2", "takes clips of at most 1 s, not 2"),
        ("whisper?max_seconds=x", "is a number from 0.1 to 600"),
        ("whisper?max_length=9", "takes clips, so max_length does not apply"),
        ("whisper?cut=yes", "cut of .* can only be no"),
        ("wave?cut=no", "is not a Whisper"),
    ):
        with pytest.raises(UserError, match=reason):
            load_backbone(f"hf:{tmp_path / name}")
    (tmp_path / "wave" / "preprocessor_config.json").write_bytes(
        (tmp_path / "wave2" / "preprocessor_config.json").read_bytes()
    )
    with pytest.raises(UserError, match="fedhead supports Wav2Vec2FeatureExtractor"):
        load_backbone(f"hf:{tmp_path / 'wave'}")
    (tmp_path / "wave" / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"feature extractor of .* cannot be read"):
        load_backbone(f"hf:{tmp_path / 'wave'}")
