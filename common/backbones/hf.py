"""`hf:NAME`: models of texts, images and sounds from the Hugging Face hub, or from a folder, as frozen encoders.

`hf:NAME?max_length=128&revision=main` truncates texts to 128 tokens and selects the version `main`; `dense=no` omits
the layers that sentence-transformers applies after the pooling. `max_seconds=10` cuts clips, and `cut=no` pads them to
30 s for Whisper, as in its training. Only safetensors are read, and code from the hub is
never executed.
"""

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

import torch
from torch import Tensor, nn

from fedhead.backbones import hf_building as building
from fedhead.backbones.backbone import Backbone, backbone_sources, detecting, read_files
from fedhead.backbones.catalogue import Catalogue, Entry, catalogues, image_input
from fedhead.backbones.downloads import not_to_be_had
from fedhead.backbones.hf_audio import AudioEncoder, form_of, limit_of, max_seconds_of
from fedhead.backbones.hf_config import configure, first_line, model_class, quiet, without_pooler
from fedhead.backbones.hf_detectors import build, files_find_objects, finds_objects
from fedhead.backbones.hf_recipe import (
    Recipe,
    image_size,
    longest_text,
    optional_json,
    preprocessing_of,
    read_recipe,
    require_no_dense,
)
from fedhead.backbones.state_dict import assign_weights, read_weights
from fedhead.data.items import ITEMS
from fedhead.data.specs import to_path
from fedhead.errors import UserError
from fedhead.extras import require
from fedhead.registry import suggest
from fedhead.tuning import NEXT_TOKEN
from fedhead.wording import listed

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

WANTED = ("*.json", "*.safetensors", "*.txt", "*.model")


@dataclass(frozen=True)
class Settings:
    """Settings in a spec, after its name."""

    max_length: int | None = None
    max_seconds: float | None = None
    cut: str | None = None
    revision: str | None = None
    dense: str | None = None


@backbone_sources.register("hf")
def load(name: str, weights: str, layer: str, seed: int) -> Backbone:
    """Build a model from the hub's cache or a folder; only missing files are downloaded.

    Args:
        name: a name such as `sentence-transformers/all-MiniLM-L6-v2`, or a folder, optionally with settings after `?`.
        weights: `default`, the file of a saved backbone (which includes its tokenizer), other safetensors of the same
            architecture, or `random`.
        layer: `penultimate` for the last layer, or `hidden:K` for the hidden state after `K` blocks. Texts are pooled
            by the settings of a sentence-transformers folder, otherwise averaged; images by the model's own pooling.
            `next-token` gives a causal model's losses of the answers in conversations.
        seed: seeds random weights.

    Raises:
        UserError: for settings, a layer or a folder that do not exist, and for weights that are not safetensors or do
            not fit.
        FedheadError: if the model is not on this machine and cannot be downloaded.
    """
    require("transformers", "transformers", f"The backbone hf:{name}")
    if layer == NEXT_TOKEN:
        from fedhead.backbones.hf_causal import load_causal

        return load_causal(name, weights, seed)
    name, settings = parse_name(name)
    files = read_files(weights) if weights not in ("default", "random") else {}
    # A saved backbone replaces the folder, which may be on another machine.
    local = None if files else local_folder(name)
    spec = f"hf:{local or name}{query_of(settings)}"
    folder = None if files else local or snapshot(name, settings.revision)
    if finds_objects(folder) if folder else files_find_objects(files, weights):
        if settings != Settings(revision=settings.revision):
            raise UserError(f"{spec} finds objects in images: of the settings, only revision applies.")
        return build(spec, folder, files, weights, layer, seed)
    if folder is not None and settings.dense is None:
        require_no_dense(folder, spec)
    recipe = Recipe.from_files(files, weights) if folder is None else read_recipe(folder, spec)
    with quiet():
        config = configure(recipe.config, spec)
        hidden = _hidden(layer, config, spec)
        chosen = _choose(recipe, settings, config, spec)
        if weights == "default":
            assert folder is not None
            model = _pretrained(folder, config, spec)
        else:
            model = _random(config, seed, weights if files else "")
    # A model's own pooling applies to its last layer.
    pooled = chosen.pooling == "pooler" and hidden is None
    audio = form_of(config, spec) if recipe.audio is not None else None
    encoder = _Encoder(model, pooled, hidden) if audio is None else AudioEncoder(model, audio, pooled, hidden)
    if weights not in ("default", "random"):
        assign_weights(encoder, read_weights(weights), set(), spec, weights)
    return Backbone(
        spec,
        encoder,
        preprocessing_of(chosen, config),
        layer=layer,
        pooling="mean" if chosen.pooling == "pooler" else chosen.pooling,
        trained=weights != "random",
        files=recipe.to_files(),
    )


@detecting.register("hf")
def is_detector(name: str) -> bool:
    """Return whether a name may be a detector's; True if its folder is not on this machine."""
    folder = folder_here(name)
    return folder is None or finds_objects(folder)


def parse_name(name: str) -> tuple[str, Settings]:
    """Split `NAME?max_length=128&revision=main`.

    Raises:
        UserError: for an unknown setting or an invalid value.
    """
    name, _, query = name.partition("?")
    values = dict(parse_qsl(query, keep_blank_values=True))
    known = ["cut", "dense", "max_length", "max_seconds", "revision"]
    for key, value in values.items():
        if key not in known:
            raise UserError(f"hf:{name} has no setting {key!r}. {suggest(key, known)}")
        if key in ("cut", "dense") and value != "no":
            raise UserError(f"The setting {key} of hf:{name} can only be no, not {value!r}.")
        if key == "max_length" and not (value.isascii() and value.isdigit() and int(value) > 0):
            raise UserError(f"The max_length of hf:{name} is a number of tokens, as in max_length=128, not {value!r}.")
    if query and not values:
        raise UserError(f"Expected settings as in hf:{name}?max_length=128, not {query!r}.")
    length, seconds = values.get("max_length"), values.get("max_seconds")
    return name, Settings(
        int(length) if length else None,
        None if seconds is None else max_seconds_of(seconds, f"hf:{name}"),
        values.get("cut"),
        values.get("revision"),
        values.get("dense"),
    )


def query_of(settings: Settings) -> str:
    """Return settings as in a spec, after its name."""
    given = {key: value for key, value in sorted(asdict(settings).items()) if value is not None}
    return "?" + "&".join(f"{key}={_written(value)}" for key, value in given.items()) if given else ""


def _written(value: float | str) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def names() -> list[str]:
    """Return the models of transformers that are complete in the hub's cache on this machine."""
    require("huggingface_hub", "transformers", "The list of the hub's models")
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        cached = sorted(one.repo_id for one in scan_cache_dir(constants.HF_HUB_CACHE).repos if one.repo_type == "model")
    except CacheNotFound:
        return []
    return [name for name in cached if (folder := _cached(name, None)) and _optional_type(folder)]


def entry(name: str) -> Entry:
    """Return the known metadata of a folder, or of a name on the hub; nothing for a missing folder.

    Raises:
        UserError: for a setting that does not exist.
    """
    require("huggingface_hub", "transformers", f"The backbone hf:{name}")
    plain, settings = parse_name(name)
    if plain.endswith(".gguf"):
        file = to_path(plain)
        return Entry(f"hf:{name}", "", weights=file if file.is_file() else None)
    try:
        local = local_folder(plain)
    except UserError:
        return Entry(f"hf:{name}", "")
    folder = local or _cached(plain, settings.revision)
    config = optional_json(folder / "config.json") if folder else {}
    size = config.get("vision_config", config).get("image_size")
    takes = image_input(3, *image_size(size)) if size else ""
    return Entry(
        f"hf:{name}",
        takes,
        weights=next(iter(sorted(folder.glob("*.safetensors"))), None) if folder else None,
        origin=None if local else f"https://huggingface.co/{plain}",
    )


catalogues.register("hf")(Catalogue(names, entry))


def _optional_type(folder: Path) -> bool:
    """Return whether a folder belongs to transformers, and not to another library that uses the hub."""
    return "model_type" in optional_json(folder / "config.json")


class _Encoder(nn.Module):
    """A model that returns one of its hidden states, or its own vector from the last one.

    Args:
        model: the library's model.
        pooled: whether to return the model's own vector.
        hidden: the hidden state to return; None for the last one, after the model's final layers.
    """

    def __init__(self, model: "PreTrainedModel", pooled: bool, hidden: int | None) -> None:
        super().__init__()
        self.model = model
        self.pooled = pooled
        self.hidden = hidden

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        given = {"pixel_values": pixel_values, "input_ids": input_ids, "attention_mask": attention_mask}
        inputs = {name: tensor for name, tensor in given.items() if tensor is not None}
        output = self.model(**inputs, return_dict=True, output_hidden_states=self.hidden is not None)
        if self.pooled:
            vectors: Tensor = output.pooler_output
            return vectors.flatten(1)
        states: Tensor = output.last_hidden_state if self.hidden is None else output.hidden_states[self.hidden]
        return states

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.load_state_dict(*args, **kwargs)


# Settings of a spec.


def _choose(recipe: Recipe, settings: Settings, config: "PreTrainedConfig", spec: str) -> Recipe:
    """Return the recipe with the spec's settings in place of the folder's."""
    for_sounds = settings.max_seconds is not None or settings.cut is not None
    if recipe.audio is None and for_sounds:
        raise UserError(f"{spec} takes {ITEMS[recipe.kind]}, so max_seconds and cut do not apply.")
    if recipe.audio is not None and for_sounds:
        limit = limit_of(recipe.audio, config)
        if settings.max_seconds is not None and settings.max_seconds > limit:
            raise UserError(f"{spec} takes clips of at most {limit:g} s, not {settings.max_seconds:g}.")
        if settings.cut and config.model_type != "whisper":
            raise UserError(f"{spec} is not a Whisper, so cut does not apply.")
        recipe = replace(recipe, audio={**recipe.audio, "max_seconds": settings.max_seconds, "cut": not settings.cut})
    if settings.max_length is None:
        return recipe
    if recipe.kind != "text":
        raise UserError(f"{spec} takes {ITEMS[recipe.kind]}, so max_length does not apply.")
    longest = longest_text(10**9, config)
    if settings.max_length > longest:
        raise UserError(f"{spec} takes at most {longest} tokens, not {settings.max_length}.")
    return replace(recipe, max_length=settings.max_length)


def _hidden(layer: str, config: "PreTrainedConfig", spec: str) -> int | None:
    if layer == "penultimate":
        return None
    blocks = getattr(config, "num_hidden_layers", None)
    found = re.fullmatch(r"hidden:(\d+)", layer)
    if found is None or blocks is None or int(found[1]) > blocks:
        last = f"'hidden:0' (the embeddings) to 'hidden:{blocks}'" if blocks else "no others"
        raise UserError(f"{spec} has no layer {layer!r}; it has 'penultimate', and {last}.")
    return int(found[1])


# Weights.


def _pretrained(folder: Path, config: "PreTrainedConfig", spec: str) -> "PreTrainedModel":
    cls = model_class(config, spec)
    require_safetensors(folder, spec)
    try:
        model, found = cls.from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            dtype=torch.float32,
            **without_pooler(cls),
        )
    # Damaged files and wrong shapes raise many kinds of errors.
    except Exception as error:
        raise UserError(f"The weights of {spec} in {folder} cannot be read: {first_line(error)}") from None
    # Of Whisper only the encoder is used.
    whole = config.model_type != "whisper"
    if missing := sorted(name for name in found["missing_keys"] if whole or name.startswith("encoder.")):
        raise UserError(f"The weights of {spec} in {folder} lack {listed(missing, 4)}.")
    loaded: PreTrainedModel = model if whole else model.encoder
    return loaded


def _random(config: "PreTrainedConfig", seed: int, source: str) -> "PreTrainedModel":
    cls = model_class(config, config.model_type)
    model: PreTrainedModel = building.build(cls, config, seed, source, config.model_type, **without_pooler(cls))
    return model.encoder if config.model_type == "whisper" else model


def require_safetensors(folder: Path, spec: str) -> None:
    """Check that a folder has weights that contain no code.

    Raises:
        UserError: if not.
    """
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if pickles:
        raise UserError(
            f"{spec} has its weights only as {pickles[0]}, a format that can execute code when loaded; fedhead reads "
            'safetensors. If you trust the file, convert it once: python -c "from transformers import AutoModel; '
            f"AutoModel.from_pretrained('{folder}').save_pretrained('{folder}')\""
        )
    raise UserError(f"{spec} has no weights: {folder} contains no *.safetensors.")


# Locations of models.


def local_folder(name: str) -> Path | None:
    """Return the folder for a name; None for a name on the hub."""
    path = to_path(name)
    if path.is_dir():
        return path.resolve()
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise UserError(f"There is no folder {path}.")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(
            f"{name!r} is neither a folder nor a name on the hub, as in hf:distilbert/distilbert-base-cased."
        )
    return None


def folder_here(name: str) -> Path | None:
    """Return the folder with a model's files if it is on this machine, for a name with settings."""
    plain, settings = parse_name(name)
    try:
        return local_folder(plain) or _cached(plain, settings.revision)
    except UserError:
        return None


def snapshot(name: str, revision: str | None) -> Path:
    """Return the hub's files of a model, from the cache if complete."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    if folder := _cached(name, revision):
        return folder
    try:
        return Path(snapshot_download(name, **_files_of_interest(revision)))
    except RepositoryNotFoundError:
        raise UserError(f"The hub has no model {name!r}, or it requires signing in.") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        url, cache = f"https://huggingface.co/{name}", f"the hub's cache {constants.HF_HUB_CACHE}"
        raise not_to_be_had(f"hf:{name}", url, cache, error) from error


def _cached(name: str, revision: str | None) -> Path | None:
    """Return the files of a model in the hub's cache; None if they are incomplete."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, local_files_only=True, **_files_of_interest(revision)))
    except (LocalEntryNotFoundError, FileNotFoundError):
        return None
    return folder if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")) else None


def _files_of_interest(revision: str | None) -> dict[str, Any]:
    return {"revision": revision, "allow_patterns": list(WANTED), "ignore_patterns": ["onnx/*", "openvino/*"]}
