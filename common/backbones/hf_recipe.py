"""Recipe of a hub model: everything besides its weights, read from its folder without executing code."""

import copy
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from PIL import Image

from fedhead.backbones.hf_audio import (
    FORMS,
    INPUTS,
    audio_arguments,
    audio_preprocessing,
    checked_audio,
    form_of,
    own_vector,
)
from fedhead.backbones.hf_config import UNREAD, architecture, configure, first_line, model_class, quiet, without_pooler
from fedhead.backbones.preprocessing import ImagePreprocessing, Preprocessing, TextPreprocessing
from fedhead.data import Kind
from fedhead.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

PoolingName = Literal["mean", "cls", "last", "pooler"]

MAX_LENGTH = 512
"""Default limit of tokens per text, unless the model, its folder or the spec has another one."""

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "*.bpe.model")
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "xlm-roberta-xl", "data2vec-text")
"""Architectures that number positions from one after the padding id."""

_SENTENCE_POOLINGS: dict[str, PoolingName] = {
    "mean": "mean",
    "mean_tokens": "mean",
    "cls": "cls",
    "cls_token": "cls",
    "lasttoken": "last",
}

_SENTENCE_MODULES = ("Transformer", "Pooling", "Normalize", "Dropout")
"""Modules of sentence-transformers that are applied, or that have no effect on heads."""

_PROCESSING_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Recipe:
    """Everything besides the weights for building a hub model and its inputs; it is sent with the weights.

    Attributes:
        config: the architecture, as in `config.json`.
        pooling: of the last layer; `pooler` is the model's own.
        tokenizer: as in `tokenizer.json`; empty for vision models.
        max_length: the limit of tokens per text.
        pad: the padding id.
        empty: the id for a text without tokens.
        image: the arguments of `ImagePreprocessing`; None for other models.
        audio: the arguments of `audio_preprocessing`; None for other models.
    """

    config: Mapping[str, Any]
    pooling: PoolingName
    tokenizer: str = ""
    max_length: int = MAX_LENGTH
    pad: int = 0
    empty: int = 0
    image: Mapping[str, Any] | None = None
    audio: Mapping[str, Any] | None = None

    @property
    def kind(self) -> Kind:
        return "audio" if self.audio is not None else "text" if self.image is None else "image"

    def to_files(self) -> dict[str, str]:
        """Return texts for `from_files`."""
        features = {key: value for key, value in asdict(self).items() if key not in ("config", "tokenizer")}
        # Files are part of a backbone's digest, so those of other kinds must not change.
        if self.audio is None:
            del features["audio"]
        files = {"config.json": self.config, "features.json": features}
        written = {name: json.dumps(values, sort_keys=True) for name, values in files.items()}
        return {**written, "tokenizer.json": self.tokenizer} if self.tokenizer else written

    @classmethod
    def from_files(cls, files: Mapping[str, str], path: str) -> Self:
        """Undo `to_files`.

        Raises:
            UserError: if the files are invalid.
        """
        try:
            features = json.loads(files["features.json"])
            image = features.pop("image")
            if image is not None:
                image = {key: tuple(value) if isinstance(value, list) else value for key, value in image.items()}
            if "audio" in features:
                features["audio"] = checked_audio(features["audio"])
            config = architecture(files["config.json"])
            return cls(config=config, tokenizer=files.get("tokenizer.json", ""), image=image, **features)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} has no valid description of its model and inputs: {error}.") from None


def read_recipe(folder: Path, spec: str) -> Recipe:
    """Read everything besides the weights from a folder in the library's format."""
    values = _json(folder / "config.json", spec)
    with quiet():
        config = configure(values, spec)
        cls = model_class(config, spec)
        if config.model_type in FORMS:
            values = {key: value for key, value in config.to_dict().items() if key not in UNREAD}
            pooling: PoolingName = "pooler" if own_vector(config) else "mean"
            return Recipe(values, pooling, audio=audio_arguments(folder, config, spec))
        # The used part, such as the vision tower of an image-text model.
        kept = {key: value for key, value in config.to_dict().items() if key not in UNREAD}
        if getattr(cls, "main_input_name", "input_ids") == "pixel_values":
            image = _image_arguments(folder, config, spec)
            return Recipe(kept, _vision_pooling(config, spec), image=image)
        if getattr(cls, "main_input_name", "input_ids") in INPUTS:
            form_of(config, spec)
        return _text_recipe(folder, kept, config, spec)


def _text_recipe(folder: Path, kept: Mapping[str, Any], config: "PreTrainedConfig", spec: str) -> Recipe:
    from transformers import AutoTokenizer

    if not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        raise UserError(f"{spec} has no tokenizer: {folder} contains none of {', '.join(TOKENIZER_FILES)}.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True, trust_remote_code=False)
        backend = tokenizer.backend_tokenizer
    # Tokenizers come from many libraries and versions.
    except Exception as error:
        raise UserError(
            f"The tokenizer of {spec} cannot be read ({first_line(error)}). fedhead supports tokenizers that "
            "transformers converts to a tokenizer.json."
        ) from None
    backend.no_padding()
    backend.no_truncation()
    longest = longest_text(tokenizer.model_max_length, config)
    said = optional_json(folder / "sentence_bert_config.json").get("max_seq_length")
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, 0)
    pad = next(one for one in (tokenizer.pad_token_id, getattr(config, "pad_token_id", None), 0) if one is not None)
    return Recipe(
        config=kept,
        pooling=_sentence_pooling(folder),
        tokenizer=backend.to_str(),
        max_length=min(longest, int(said)) if said else min(longest, MAX_LENGTH),
        pad=int(pad),
        empty=next(int(one) for one in special if one is not None),
    )


def longest_text(tokenizer_says: int, config: "PreTrainedConfig") -> int:
    """Return the model's limit of tokens."""
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 10**9
    if config.model_type in _OFFSET_POSITIONS:
        positions -= (config.pad_token_id or 0) + 1
    return int(min(tokenizer_says, positions))


def _sentence_pooling(folder: Path) -> PoolingName:
    """Return the pooling from a folder of sentence-transformers, otherwise the mean.

    The mean is also the default for decoders: their last position is trained to predict the next token, not to
    represent the text.
    """
    said = optional_json(folder / "1_Pooling" / "config.json")
    marked = [key.removeprefix("pooling_mode_") for key, value in said.items() if value is True]
    named = str(said.get("pooling_mode") or next((key for key in marked if key in _SENTENCE_POOLINGS), "mean"))
    if named not in _SENTENCE_POOLINGS:
        logger.warning("%s uses the unsupported pooling %r; the mean is used instead.", folder, named)
    return _SENTENCE_POOLINGS.get(named, "mean")


def require_no_dense(folder: Path, spec: str) -> None:
    """Check that a folder of sentence-transformers has no layers after its pooling.

    Raises:
        UserError: naming the layers that `encode` of sentence-transformers would apply but fedhead would not.
    """
    path = folder / "modules.json"
    try:
        modules = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        types = [str(one["type"]).rpartition(".")[2] for one in modules]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    others = [one for one in types if one not in _SENTENCE_MODULES]
    if others:
        raise UserError(
            f"{spec} has the modules {', '.join(types)}: sentence-transformers also applies {' and '.join(others)}, "
            f"but fedhead does not. To use the features before them: {spec}{'&' if '?' in spec else '?'}dense=no."
        )


def _vision_pooling(config: "PreTrainedConfig", spec: str) -> PoolingName:
    """Return the pooling of a vision model: its class token, the mean, or its own.

    Determined by a random model of one block, on noise.
    """
    shallow = copy.deepcopy(config)
    if getattr(shallow, "num_hidden_layers", None):
        shallow.num_hidden_layers = 1
    cls = model_class(config, spec)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = cls(shallow, **without_pooler(cls)).eval()
        output = model(
            torch.rand(1, getattr(config, "num_channels", 3), *image_size(getattr(config, "image_size", 224)))
        )
    states, own = output.last_hidden_state, getattr(output, "pooler_output", None)
    if own is None:
        return "cls" if any("cls_token" in name for name in model.state_dict()) else "mean"
    if states.ndim == 3 and own.shape == states[:, 0].shape:
        if torch.allclose(own, states[:, 0]):
            return "cls"
        if torch.allclose(own, states.mean(1), atol=1e-6):
            return "mean"
    return "pooler"


def image_size(size: int | Sequence[int]) -> tuple[int, int]:
    """Return height and width from a configuration's image size."""
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _image_arguments(folder: Path, config: "PreTrainedConfig", spec: str) -> dict[str, Any]:
    """Return the image processor of a folder as the arguments of `ImagePreprocessing`."""
    processor = processor_of(folder, spec)
    said = processor.to_dict()
    made = to_preprocessing(said, getattr(config, "num_channels", 3))
    images = [Image.fromarray(_noise(height, width)) for height, width in ((301, 260), (90, 121))]
    for image in images if made else ():
        theirs = torch.as_tensor(np.asarray(processor(image, return_tensors="np")["pixel_values"][0]))
        assert made is not None
        own = made(image)
        if own.shape != theirs.shape or float((own - theirs).abs().max()) > _PROCESSING_TOLERANCE:
            made = None
            break
    if made is None:
        raise UserError(
            f"{spec} prepares images with {type(processor).__name__}, which does more than resize, crop the centre and "
            "normalise; fedhead does not support that."
        )
    return asdict(made)


def processor_of(folder: Path, spec: str) -> Any:
    """Return the image processor of a folder.

    Raises:
        UserError: if there is none, or it cannot be read.
    """
    from transformers import AutoImageProcessor

    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        raise UserError(f"{spec} does not define its image preprocessing: {folder} has no preprocessor_config.json.")
    try:
        return AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"The image processor of {spec} cannot be read: {first_line(error)}") from None


def to_preprocessing(said: Mapping[str, Any], channels: int) -> ImagePreprocessing | None:
    """Return the same steps as a value; None for unsupported settings."""
    size = said.get("size") or {}
    if not said.get("do_resize") or channels not in (1, 3):
        return None
    if "height" in size and "width" in size:
        resize: int | tuple[int, int] = (size["height"], size["width"])
    elif "shortest_edge" in size and "longest_edge" not in size:
        resize = int(size["shortest_edge"])
    else:
        return None
    crop = said.get("crop_size") if said.get("do_center_crop") else None
    # The library rescales by its own factor instead of dividing by 255, before mean and deviation.
    factor = 255 * float(said.get("rescale_factor", 1 / 255)) if said.get("do_rescale", True) else 255.0
    mean = said.get("image_mean") if said.get("do_normalize") else None
    std = said.get("image_std") if said.get("do_normalize") else None
    return ImagePreprocessing(
        channels=1 if channels == 1 else 3,
        resize=resize,
        crop=(int(crop["height"]), int(crop["width"])) if crop else None,
        mean=tuple(value / factor for value in mean or [0.0] * channels),
        std=tuple(value / factor for value in std or [1.0] * channels),
        interpolation=Image.Resampling(said.get("resample", 2)).name.lower(),
        rounding="down",
    )


def _noise(height: int, width: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def preprocessing_of(recipe: Recipe, config: "PreTrainedConfig") -> Preprocessing:
    """Build the preprocessing; the tokenizer truncates at the recipe's length."""
    if recipe.audio is not None:
        return audio_preprocessing(recipe.audio, config)
    if recipe.image is not None:
        return ImagePreprocessing(**recipe.image)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(recipe.tokenizer)
    tokenizer.no_padding()
    tokenizer.enable_truncation(recipe.max_length)
    what = f"{recipe.tokenizer} {recipe.max_length} {recipe.empty}"
    return TextPreprocessing(
        encode=_encoding(tokenizer, recipe.empty),
        digest=hashlib.sha256(what.encode()).hexdigest(),
        pad=recipe.pad,
        max_length=recipe.max_length,
        empty=recipe.empty,
        locate=_locating(tokenizer, recipe.empty),
    )


def _locating(tokenizer: Any, empty: int) -> Callable[[str], tuple[Sequence[int], Sequence[tuple[int, int]]]]:
    @functools.lru_cache(maxsize=256)
    def located(text: str) -> tuple[Sequence[int], Sequence[tuple[int, int]]]:
        found = tokenizer.encode(text)
        return (found.ids, found.offsets) if found.ids else ([empty], [(0, 0)])

    # The words of one text are asked for one after the other.
    return lambda text: located(str(text).encode("utf-8", "replace").decode())


def _encoding(tokenizer: Any, empty: int) -> Callable[[str], Sequence[int]]:
    def encode(text: str) -> Sequence[int]:
        # Half of a surrogate pair, as in damaged JSON, is not a valid character for a tokenizer.
        ids: list[int] = tokenizer.encode(text.encode("utf-8", "replace").decode()).ids
        return ids or [empty]

    return encode


def _json(path: Path, spec: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{spec} is not a model of transformers: {path.parent} has no {path.name}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} does not contain named values.")
    return values


def optional_json(path: Path) -> dict[str, Any]:
    """Return the values of a JSON file; none if it does not exist.

    Raises:
        UserError: if it is damaged.
    """
    return _json(path, str(path.parent)) if path.is_file() else {}
