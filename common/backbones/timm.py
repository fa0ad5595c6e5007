"""`timm:NAME`: any timm model, without its classifier."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedhead.backbones.backbone import Backbone, backbone_sources
from fedhead.backbones.catalogue import Catalogue, Entry, catalogues, image_input
from fedhead.backbones.downloads import fetch_hub_file, fetch_torch_file, hub_file, torch_file
from fedhead.backbones.layers import PENULTIMATE, Stopped, module_layers
from fedhead.backbones.preprocessing import ImagePreprocessing
from fedhead.backbones.state_dict import WeightsFit, align, fill_weights, read_weights, unwrapped
from fedhead.errors import UserError
from fedhead.extras import require
from fedhead.registry import suggest

HUB_FILES = ("model.safetensors", "pytorch_model.bin")


@backbone_sources.register("timm")
def load(name: str, weights: str, layer: str, seed: int) -> Backbone:
    """Build a timm model with the preprocessing of its weights.

    Args:
        name: a model's name, for its default weights, or with a tag, as in `xception41.tf_in1k`.
        weights: see `load_backbone`; a file from timm, from the paper's authors if timm reads it, or from
            `Backbone.save`.
        layer: `penultimate` for the classifier's input with the model's own pooling, or the name of a module.
        seed: see `load_backbone`.

    Raises:
        UserError: if timm is not installed, for an unknown model or layer, and for weights of another architecture.
        FedheadError: if the weights are not on this machine and cannot be downloaded.
    """
    spec = f"timm:{name}"
    config = pretrained_config(name)
    path = str(_fetch(config, spec)) if weights == "default" else weights
    model = build(name, seed)
    preprocessing = preprocessing_of(library().data.resolve_model_data_config(model), spec)
    module: nn.Module = model
    if layer != PENULTIMATE:
        example = torch.zeros(1, preprocessing.channels, *preprocessing.size)
        module = Stopped(model, layer, spec, example)
    if weights != "random":
        given = align(read_weights(path), module.state_dict(), path)
        _fill(name, model, given, config).require(module.state_dict().keys(), spec, path)
    return Backbone(spec, module, preprocessing, layer=layer, trained=weights != "random")


def names() -> Sequence[str]:
    """Return the models; those with weights, with the tag of each set of weights."""
    models = library().models
    tagged = models.list_pretrained()
    trained = {name.partition(".")[0] for name in tagged}
    return sorted([*tagged, *(name for name in models.list_models() if name not in trained)])


def entry(name: str) -> Entry:
    """Return timm's metadata of a model and its weights."""
    config = pretrained_config(name)
    return Entry(
        spec=f"timm:{name}",
        input=image_input(*config.input_size),
        licence=config.license,
        weights=cached_weights(config),
        origin=f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else config.url or None,
    )


def layers(name: str) -> Sequence[str]:
    """Return the modules inside a model."""
    _ = pretrained_config(name)
    return [PENULTIMATE, *module_layers(build(name, seed=0))]


catalogues.register("timm")(Catalogue(names, entry, layers))


def library() -> Any:
    """Return timm.

    Raises:
        UserError: if it is not installed.
    """
    return require("timm", "timm", "A backbone timm:NAME")


def pretrained_config(name: str) -> Any:
    """Return timm's configuration of a model's weights.

    Raises:
        UserError: if there is no such model or tag.
    """
    models = library().models
    model_name, tag = models.split_model_name_tag(name)
    if not models.is_model(model_name):
        raise UserError(f"timm has no model {model_name!r}. {suggest(model_name, models.list_models())}")
    tags = [known for known in models.get_arch_pretrained_cfgs(model_name) if known.partition(".")[2]]
    if tag and name not in tags:
        raise UserError(f"timm has no weights {tag!r} of {model_name}. {suggest(name, tags)}")
    return models.get_pretrained_cfg(name)


def build(name: str, seed: int) -> nn.Module:
    """Return timm's model without its classifier, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = library().create_model(name, num_classes=0)
    return model.eval()


def preprocessing_of(config: Mapping[str, Any], spec: str) -> ImagePreprocessing:
    """Return timm's evaluation transforms as a value.

    Args:
        config: timm's data configuration.
        spec: the backbone, for messages.

    Raises:
        UserError: for the few models with padded images or other channels.
    """
    channels, height, width = config["input_size"]
    scaled = (math.floor(height / config["crop_pct"]), math.floor(width / config["crop_pct"]))
    squashed = config["crop_mode"] == "squash"
    if channels not in (1, 3) or config["crop_mode"] == "border" or (not squashed and height != width):
        raise UserError(
            f"{spec} takes {channels} channels of {height} x {width}, fitted by {config['crop_mode']!r}; fedhead "
            "supports one channel or three, cropped from the centre or squashed."
        )
    return ImagePreprocessing(
        channels=channels,
        resize=scaled if squashed else scaled[0],
        crop=(height, width),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
    )


def cached_weights(config: Any) -> Path | None:
    """Return the weights in the hub's cache or torch's on this machine; None if missing."""
    if config.hf_hub_id and (found := hub_file(config.hf_hub_id, _hub_names(config))):
        return found
    path = torch_file(config.url) if config.url else None
    return path if path is not None and path.is_file() else None


def _fetch(config: Any, spec: str) -> Path:
    if found := cached_weights(config):
        return found
    if config.hf_hub_id:
        return fetch_hub_file(config.hf_hub_id, _hub_names(config), spec)
    if config.url:
        return fetch_torch_file(config.url, spec)
    raise UserError(f"timm has no weights of {spec}. Pass a file with --weights FILE, or use random weights.")


def _hub_names(config: Any) -> tuple[str, ...]:
    return (config.hf_hub_filename,) if config.hf_hub_filename else HUB_FILES


def _fill(name: str, model: nn.Module, weights: Mapping[str, Tensor], config: Any) -> WeightsFit:
    """Copy weights into a model, with timm's own conversion if they do not fit directly."""
    fit = fill_weights(model, _without_classifier(weights, config))
    if fit.missing or fit.unknown or fit.reshaped:
        weights = unwrapped(weights)
        try:
            converted = library().create_model(name, pretrained=True, pretrained_cfg_overlay={"state_dict": weights})
        # Whatever the error, these weights do not belong to the model.
        except Exception:
            return fit
        return fill_weights(model, _without_classifier(converted.state_dict(), config))
    return fit


def _without_classifier(weights: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    named = config.classifier or ()
    classifiers = tuple(f"{one}." for one in ((named,) if isinstance(named, str) else named))
    return {name: tensor for name, tensor in weights.items() if not name.startswith(classifiers)}
