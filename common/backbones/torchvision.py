"""`torchvision:NAME`: any torchvision classification model or detector, without its last layer."""

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from fedhead.backbones.backbone import Backbone, backbone_sources, detecting
from fedhead.backbones.catalogue import Catalogue, Entry, catalogues, image_input
from fedhead.backbones.downloads import fetch_torch_file, torch_file
from fedhead.backbones.geometry import DENSE_SIZE, dense_layers
from fedhead.backbones.layers import Graph
from fedhead.backbones.preprocessing import ImagePreprocessing
from fedhead.backbones.proposals import PROPOSALS
from fedhead.backbones.state_dict import align, fill_weights, read_weights, without_unneeded
from fedhead.errors import UserError
from fedhead.registry import suggest

_OLD_DENSENET = re.compile(r"(.*denselayer\d+\.(?:norm|conv))\.([12]\.\w+)")


@backbone_sources.register("torchvision")
def load(name: str, weights: str, layer: str, seed: int) -> Backbone:
    """Build a torchvision model through torchvision's own registry, with its weights' preprocessing.

    Args:
        name: a model's name, for its default weights, or with an entry, as in `resnet50.IMAGENET1K_V1`.
        weights: see `load_backbone`.
        layer: a node of the model's graph, or a module, for its last node.
        seed: see `load_backbone`.

    Raises:
        UserError: for an unknown model or layer, and for weights of another architecture.
        FedheadError: if torchvision's weights are not on this machine and cannot be downloaded.
    """
    spec = f"torchvision:{name}"
    if is_detector(name):
        from fedhead.backbones.detectors import build

        path = str(fetch_torch_file(_entry(name)[1].url, spec)) if weights == "default" else weights
        return build(name, layer, None if weights == "random" else read_weights(path), seed, path)
    model_name, entry = _entry(name)
    path = str(fetch_torch_file(entry.url, spec)) if weights == "default" else weights
    model = _build(model_name, entry, seed)
    if weights == "random":
        module = Graph(model).cut(layer, spec)
    else:
        needed = Graph(model).cut(layer, spec).state_dict()
        given = align(_renamed(read_weights(path)), needed, path)
        fit = fill_weights(model, without_unneeded(given, model.state_dict(), needed))
        # Not earlier: loading an older file may modify the model.
        module = Graph(model).cut(layer, spec)
        fit.require(module.state_dict().keys(), spec, path)
    return Backbone(spec, module, preprocessing_of(entry.transforms()), layer=layer, trained=weights != "random")


def names() -> Sequence[str]:
    """Return the models, and with a dot their weights other than the default ones."""
    listed = []
    for model_name in _known():
        entries = torchvision.models.get_model_weights(model_name)
        others = [entry.name for entry in entries if entry is not entries.DEFAULT]
        listed += [model_name, *(f"{model_name}.{other}" for other in others)]
    return listed


def entry(name: str) -> Entry:
    """Return torchvision's metadata of a model and its weights."""
    _, found = _entry(name)
    path = torch_file(found.url)
    size = _detector_size(name) if is_detector(name) else found.transforms().crop_size[0]
    return Entry(
        spec=f"torchvision:{name}",
        input=image_input(3, size, size),
        parameters=found.meta["num_params"],
        licence=found.meta.get("license"),
        weights=path if path.is_file() else None,
        origin=found.url,
    )


def layers(name: str) -> Sequence[str]:
    """Return the nodes of a model's graph; of a detector its proposals."""
    model_name, found = _entry(name)
    if is_detector(name):
        return (PROPOSALS,)
    return Graph(_build(model_name, found, seed=0)).layers


def map_layers(name: str, strides: Sequence[int]) -> Sequence[str]:
    """Return a model's last module at each of some strides.

    Raises:
        UserError: for a detector.
    """
    model_name, found = _entry(name)
    if is_detector(name):
        raise UserError(
            f"torchvision:{name} is a detector, whose rows are proposals and not cells of maps: leave the layer out, "
            "or set it to 'proposals'."
        )
    return dense_layers(_build(model_name, found, seed=0), torch.zeros(1, 3, DENSE_SIZE, DENSE_SIZE), strides)


catalogues.register("torchvision")(Catalogue(names, entry, layers))


@detecting.register("torchvision")
def is_detector(name: str) -> bool:
    """Return whether a model finds objects: its rows are proposals."""
    return name.partition(".")[0] in torchvision.models.list_models(module=torchvision.models.detection)


def _detector_size(name: str) -> int:
    """Return the default size of a detector's images: that in its name, or torchvision's default."""
    found = re.search(r"ssd300|_320_|lite320", name)
    return int(re.sub(r"\D", "", found[0])) if found else 800


def _known() -> list[str]:
    found = (torchvision.models, torchvision.models.detection)
    return [name for module in found for name in torchvision.models.list_models(module=module)]


def _entry(name: str) -> tuple[str, Any]:
    """Return the model's name, and the entry of its weights.

    Raises:
        UserError: for a name that is neither a classification model nor a detector, or not an entry of the model.
    """
    model_name, _, entry_name = name.partition(".")
    known = _known()
    if model_name not in known:
        raise UserError(_what_it_is_instead(model_name, known))
    entries = torchvision.models.get_model_weights(model_name)
    if entry_name and entry_name not in entries.__members__:
        close = suggest(entry_name, list(entries.__members__))
        raise UserError(f"torchvision has no weights {entry_name!r} of {model_name}. {close}")
    return model_name, entries[entry_name or "DEFAULT"]


def _what_it_is_instead(name: str, known: list[str]) -> str:
    if name in torchvision.models.list_models(module=torchvision.models.quantization):
        instead = name.removeprefix("quantized_")
        return f"torchvision:{name} is quantized, which fedhead does not support; use torchvision:{instead}."
    if name in torchvision.models.list_models():
        task = torchvision.models.get_model_builder(name).__module__.split(".")[2]
        return f"torchvision:{name} is a model for {task}, but a backbone must be a classification model or a detector."
    return f"torchvision has no classification model or detector {name!r}. {suggest(name, known)}"


def _build(name: str, entry: Any, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = torchvision.models.get_model(name, weights=None, **_builder_options(name, entry))
    return model


def _builder_options(name: str, entry: Any) -> dict[str, Any]:
    """Return torchvision's own options for building a model for its weights."""
    if name in ("googlenet", "inception_v3"):
        return {"transform_input": True, "aux_logits": True, "init_weights": True}
    if name.startswith("vit_"):
        return {"image_size": entry.meta["min_size"][0]}
    parameters = inspect.signature(torchvision.models.get_model_builder(name)).parameters
    return {"init_weights": True} if "init_weights" in parameters else {}


def _renamed(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return weights under current names: torchvision's DenseNet files use older ones."""
    matches = {name: match for name in weights if (match := _OLD_DENSENET.fullmatch(name))}
    if not matches:
        return weights
    return {
        f"{matches[name][1]}{matches[name][2]}" if name in matches else name: tensor for name, tensor in weights.items()
    }


def preprocessing_of(transforms: Any) -> ImagePreprocessing:
    """Return torchvision's transforms as a value."""
    return ImagePreprocessing(
        channels=3,
        resize=int(transforms.resize_size[0]),
        crop=(int(transforms.crop_size[0]), int(transforms.crop_size[0])),
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        interpolation=str(transforms.interpolation.value),
    )
