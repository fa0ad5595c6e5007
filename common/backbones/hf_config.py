"""Configurations of transformers: reading them, the class that they belong to, and the library's messages."""

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fedhead.backbones.hf_audio import FORMS
from fedhead.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

DETECTORS = (
    *("conditional_detr", "d_fine", "deformable_detr", "detr"),
    *("rt_detr", "rt_detr_v2", "table-transformer", "yolos"),
)
"""Architectures that find objects by queries."""

UNREAD = ("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version")
"""Keys of a configuration that do not affect the module."""


def architecture(text: str) -> Mapping[str, Any]:
    """Parse a `config.json`, which may come from another machine.

    Raises:
        ValueError: if it does not contain named values.
    """
    config = json.loads(text)
    if not isinstance(config, dict):
        raise ValueError("its config.json does not contain named values")
    return config


def configure(values: Mapping[str, Any], spec: str, *, pairs: bool = False) -> "PreTrainedConfig":
    """Build a configuration of an architecture that is part of the library.

    Args:
        values: as in `config.json`.
        spec: the backbone, for messages.
        pairs: whether encoder-decoders of texts are taken.

    Raises:
        UserError: if there is no such architecture, or it is not taken.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        code = " Its folder contains code for it, which fedhead does not execute." if "auto_map" in values else ""
        raise UserError(f"{spec} has the architecture {model_type!r}, which transformers does not include.{code}")
    known = {key: value for key, value in values.items() if key not in UNREAD}
    try:
        config: PreTrainedConfig = CONFIG_MAPPING[model_type].from_dict(known)
    # Configurations validate themselves and may raise any error.
    except Exception as error:
        raise UserError(f"transformers cannot read the config.json of {spec}: {first_line(error)}") from None
    vision = getattr(config, "vision_config", None)
    if vision is not None and not isinstance(vision, dict):
        config = vision
    texts = getattr(config, "is_encoder_decoder", False) and config.model_type not in (*FORMS, *DETECTORS)
    if texts and not pairs:
        raise UserError(
            f"{spec} translates texts to texts ({model_type}): it takes the task 'generation', and for others use an "
            "encoder or a decoder alone."
        )
    config.use_cache = False
    return config


def model_class(config: "PreTrainedConfig", spec: str) -> Any:
    """Return the class for encoding without a task.

    Raises:
        UserError: if the architecture has none.
    """
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    try:
        cls = MODEL_MAPPING[type(config)]
    except KeyError:
        raise UserError(f"transformers has no plain encoder for {spec} ({config.model_type}).") from None
    return cls[0] if isinstance(cls, tuple) else cls


def without_pooler(cls: Any) -> dict[str, Any]:
    """Return the options for omitting a pooling layer trained for another task, which many checkpoints lack."""
    return {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(cls.__init__).parameters else {}


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the library's progress bars and reports off the terminal; problems are raised as fedhead's own errors."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error, as the end of a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") + "." if lines else f"{type(error).__name__}."
