"""`hf:NAME`: text and vision models of the Hugging Face hub, or of a folder in its format, as frozen encoders.

`hf:NAME?pooling=cls&max_length=128&revision=main` sets how the last layer becomes one vector, where texts are cut, and
which version is taken. Only safetensors are read, and no code of the hub's is ever run.
"""

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

import torch
from torch import Tensor, nn

from fedhead.backbones.backbone import Backbone, assign_weights, backbone_sources, read_files, read_weights
from fedhead.backbones.hf_recipe import (
    POOLINGS,
    PoolingName,
    Recipe,
    configure,
    first_line,
    longest_text,
    model_class,
    preprocessing_of,
    quiet,
    read_recipe,
)
from fedhead.errors import FedheadError, UserError
from fedhead.extras import require
from fedhead.registry import suggest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

WANTED = ("*.json", "*.safetensors", "*.txt", "*.model")


@dataclass(frozen=True)
class _Settings:
    """What a spec says after its name."""

    pooling: PoolingName | None = None
    max_length: int | None = None
    revision: str | None = None


@backbone_sources.register("hf")
def load(name: str, weights: str, layer: str, seed: int) -> Backbone:
    """Build a model of the hub's from its cache or a folder; the hub is asked only for what neither holds.

    Args:
        name: a name such as `sentence-transformers/all-MiniLM-L6-v2`, or a folder, perhaps with settings after `?`.
        weights: `default`, the file of a saved backbone (which holds its tokenizer too), other safetensors of the same
            architecture, or `random`.
        layer: `penultimate` for the last layer, or `hidden:K` for the hidden state after `K` blocks.
        seed: draws random weights.

    Raises:
        UserError: for settings, a layer or a folder that do not exist, and for weights that are no safetensors or do
            not fit.
        FedheadError: if the model is not here and cannot be downloaded.
    """
    require("transformers", "transformers", f"The backbone hf:{name}")
    name, settings = parse_name(name)
    files = read_files(weights) if weights not in ("default", "random") else {}
    # A saved backbone stands for the folder, which may be on another machine.
    folder = None if files else _local_folder(name)
    spec = f"hf:{folder or name}{_query(settings)}"
    if files:
        recipe = Recipe.from_files(files, weights)
    else:
        folder = folder or _snapshot(name, settings.revision)
        recipe = read_recipe(folder, spec)
    with quiet():
        config = configure(recipe.config, spec)
        hidden = _hidden(layer, config, spec)
        chosen = _choose(recipe, settings, hidden, config, spec)
        if weights == "default":
            assert folder is not None
            model = _pretrained(folder, config, chosen.pooling, spec)
        else:
            model = _random(config, chosen.pooling, seed)
    encoder = _Encoder(model, chosen.pooling, hidden)
    if weights not in ("default", "random"):
        assign_weights(encoder, read_weights(weights), set(), spec, weights)
    return Backbone(
        spec,
        encoder,
        preprocessing_of(chosen),
        layer=layer,
        trained=weights != "random",
        files=recipe.to_files(),
    )


def parse_name(name: str) -> tuple[str, _Settings]:
    """Split `NAME?pooling=cls&max_length=128&revision=main`.

    Raises:
        UserError: for a setting that does not exist or has no such value.
    """
    name, _, query = name.partition("?")
    values = dict(parse_qsl(query, keep_blank_values=True))
    known = ["max_length", "pooling", "revision"]
    for key, value in values.items():
        if key not in known:
            raise UserError(f"hf:{name} has no setting {key!r}. {suggest(key, known)}")
        if key == "pooling" and value not in POOLINGS:
            raise UserError(f"hf:{name} has no pooling {value!r}. {suggest(value, list(POOLINGS))}")
        if key == "max_length" and not (value.isascii() and value.isdigit() and int(value) > 0):
            raise UserError(f"The max_length of hf:{name} is a number of tokens, as in max_length=128, not {value!r}.")
    if query and not values:
        raise UserError(f"Expected settings as in hf:{name}?pooling=cls&max_length=128, not {query!r}.")
    pooling: Any = values.get("pooling")
    length = values.get("max_length")
    return name, _Settings(pooling, int(length) if length else None, values.get("revision"))


def _query(settings: _Settings) -> str:
    given = {key: value for key, value in sorted(asdict(settings).items()) if value is not None}
    return "?" + "&".join(f"{key}={value}" for key, value in given.items()) if given else ""


class _Encoder(nn.Module):
    """A model whose hidden states become one vector a row, or a sequence that is averaged.

    Args:
        model: of the library's.
        pooling: what makes one vector of the sequence.
        hidden: which hidden state; None for the last, as the model itself finishes it.
    """

    def __init__(self, model: "PreTrainedModel", pooling: PoolingName, hidden: int | None) -> None:
        super().__init__()
        self.model = model
        self.pooling = pooling
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
        if self.pooling == "pooler":
            pooled: Tensor = output.pooler_output
            return pooled.flatten(1)
        states: Tensor = output.last_hidden_state if self.hidden is None else output.hidden_states[self.hidden]
        if states.ndim != 3 or self.pooling == "mean":
            return states
        if self.pooling == "cls":
            return states[:, 0]
        if attention_mask is None:
            return states[:, -1]
        ends = attention_mask.sum(1).clamp_min(1) - 1
        return states[torch.arange(len(states), device=states.device), ends]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.load_state_dict(*args, **kwargs)


# What a spec chooses.


def _choose(recipe: Recipe, settings: _Settings, hidden: int | None, config: "PreTrainedConfig", spec: str) -> Recipe:
    """Return the recipe with the spec's settings over the folder's."""
    if settings.max_length is not None:
        if recipe.kind == "image":
            raise UserError(f"{spec} takes images, which have no max_length.")
        longest = longest_text(10**9, config)
        if settings.max_length > longest:
            raise UserError(f"{spec} takes {longest} tokens at most, not {settings.max_length}.")
    pooling = settings.pooling or recipe.pooling
    if hidden is not None and pooling == "pooler":
        if settings.pooling is not None:
            raise UserError(
                f"{spec} has its pooling 'pooler' after the last layer; with layer 'hidden:{hidden}' take another."
            )
        pooling = "mean"
    return replace(recipe, pooling=pooling, max_length=settings.max_length or recipe.max_length)


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


def _options(cls: Any, pooling: PoolingName) -> dict[str, Any]:
    """Leave out a pooling layer that is not used, and that many checkpoints lack."""
    import inspect

    takes = "add_pooling_layer" in inspect.signature(cls.__init__).parameters
    return {"add_pooling_layer": pooling == "pooler"} if takes else {}


def _pretrained(folder: Path, config: "PreTrainedConfig", pooling: PoolingName, spec: str) -> "PreTrainedModel":
    cls = model_class(config, spec)
    _require_safetensors(folder, spec)
    try:
        model, found = cls.from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            dtype=torch.float32,
            **_options(cls, pooling),
        )
    # Damaged files, and shapes that do not fit, come as many kinds of errors.
    except Exception as error:
        raise UserError(f"The weights of {spec} in {folder} cannot be read: {first_line(error)}") from None
    if missing := sorted(found["missing_keys"]):
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise UserError(f"The weights of {spec} in {folder} lack {', '.join(missing[:4])}{more}.")
    loaded: PreTrainedModel = model
    return loaded


def _random(config: "PreTrainedConfig", pooling: PoolingName, seed: int) -> "PreTrainedModel":
    cls = model_class(config, config.model_type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = cls(config, **_options(cls, pooling))
    return model


def _require_safetensors(folder: Path, spec: str) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if pickles:
        raise UserError(
            f"{spec} has its weights only as {pickles[0]}, a format that can run code when it is read; fedhead reads "
            'safetensors. Convert it once, where you trust the file: python -c "from transformers import AutoModel; '
            f"AutoModel.from_pretrained('{folder}').save_pretrained('{folder}')\""
        )
    raise UserError(f"{spec} has no weights: {folder} holds no *.safetensors.")


# Where a model is.


def _local_folder(name: str) -> Path | None:
    """Return the folder that a name stands for; None for a name on the hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise UserError(f"There is no folder {path}.")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(
            f"{name!r} is neither a folder nor a name on the hub, as in hf:distilbert/distilbert-base-cased."
        )
    return None


def _snapshot(name: str, revision: str | None) -> Path:
    """Return the hub's files of a model, from the cache where they are whole."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    options = {"revision": revision, "allow_patterns": list(WANTED), "ignore_patterns": ["onnx/*", "openvino/*"]}
    try:
        folder = Path(snapshot_download(name, local_files_only=True, **options))
        if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
            return folder
    except (LocalEntryNotFoundError, FileNotFoundError):
        pass
    try:
        return Path(snapshot_download(name, **options))
    except RepositoryNotFoundError:
        raise UserError(f"The hub has no model {name!r}, or shows it only to those who are signed in.") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise FedheadError(
            f"The model hf:{name} is not in the cache on this machine and could not be downloaded "
            f"({first_line(error)}). Bring its folder and name it, as in hf:./{name.rpartition('/')[2]}, or a saved "
            "backbone with --weights FILE."
        ) from error
