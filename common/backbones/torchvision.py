"""`torchvision:NAME`: any of torchvision's classification models, cut where its classifier begins."""

import inspect
from typing import Any
from urllib.error import URLError

import torch
import torchvision
from torch import fx, nn
from torchvision.models.feature_extraction import NodePathTracer, create_feature_extractor

from fedhead.backbones.backbone import Backbone, assign_weights, backbone_sources, read_weights
from fedhead.backbones.preprocessing import ImagePreprocessing
from fedhead.errors import FedheadError, UserError
from fedhead.registry import suggest


@backbone_sources.register("torchvision")
def load(name: str, weights: str, layer: str, seed: int) -> Backbone:
    """Build a torchvision model through torchvision's own registry, with its weights' preprocessing.

    Raises:
        UserError: for an unknown model or layer, and for weights of another architecture.
        FedheadError: if torchvision's weights are not here and cannot be downloaded.
    """
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise UserError(f"torchvision has no classification model {name!r}. {suggest(name, known)}")
    spec = f"torchvision:{name}"
    default = torchvision.models.get_model_weights(name).DEFAULT
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = torchvision.models.get_model(name, weights=None, **_builder_options(name)).eval()
    extractor = create_feature_extractor(model, {_node(model, layer, spec): "features"}, suppress_diff_warning=True)
    if weights != "random":
        state = _download(default, name) if weights == "default" else read_weights(weights)
        assign_weights(extractor, state, set(model.state_dict()), spec, weights)
    return Backbone(
        spec,
        _Features(extractor),
        _preprocessing(default.transforms()),
        layer=layer,
        trained=weights != "random",
    )


class _Features(nn.Module):
    """The one output of a feature extractor, its weights under their original names."""

    def __init__(self, extractor: nn.Module) -> None:
        super().__init__()
        self.extractor = extractor

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.extractor(batch)["features"]
        return features

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.extractor.state_dict(*args, **kwargs)


def _builder_options(name: str) -> dict[str, Any]:
    """Return what torchvision itself sets when it builds a model for its weights."""
    parameters = inspect.signature(torchvision.models.get_model_builder(name)).parameters
    if name in ("googlenet", "inception_v3"):
        return {"transform_input": True, "aux_logits": True, "init_weights": True}
    return {"init_weights": True} if "init_weights" in parameters else {}


def _node(model: nn.Module, layer: str, spec: str) -> str:
    """Return the name of the graph node whose output is `layer`: for `penultimate`, the classifier's input."""
    tracer = NodePathTracer()
    graph = tracer.trace(model)
    names = {node: str(name) for node, name in tracer.node_to_qualname.items()}
    if layer != "penultimate":
        if layer not in names.values():
            raise UserError(f"{spec} has no layer {layer!r}. {suggest(layer, list(names.values()))}")
        return layer
    modules = dict(model.named_modules())
    classifier = next(
        node
        for node in reversed(graph.nodes)
        if node.op == "call_module" and isinstance(modules[str(node.target)], nn.Linear | nn.Conv2d)
    )
    entry = classifier.args[0]
    assert isinstance(entry, fx.Node)
    return names[entry]


def _download(default: Any, name: str) -> dict[str, torch.Tensor]:
    try:
        state: dict[str, torch.Tensor] = default.get_state_dict(progress=False, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        raise FedheadError(
            f"The weights of torchvision:{name} are not on this machine and could not be downloaded from "
            f"{default.url} ({error}). Bring the file and name it with --weights FILE, put it into "
            f"{torch.hub.get_dir()}/checkpoints, or choose a bundled backbone."
        ) from error
    return state


def _preprocessing(transforms: Any) -> ImagePreprocessing:
    return ImagePreprocessing(
        channels=3,
        resize=int(transforms.resize_size[0]),
        crop=(int(transforms.crop_size[0]), int(transforms.crop_size[0])),
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        interpolation=str(transforms.interpolation.value),
    )
