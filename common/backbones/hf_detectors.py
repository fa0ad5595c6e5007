"""Detectors of transformers, such as DETR, YOLOS and RT-DETR, without their classifier: rows are queries."""

import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedhead.backbones import hf_building as building
from fedhead.backbones.backbone import Backbone
from fedhead.backbones.hf_config import DETECTORS, UNREAD, configure, first_line, quiet
from fedhead.backbones.hf_recipe import Recipe, image_size, optional_json, processor_of, to_preprocessing
from fedhead.backbones.preprocessing import ImagePreprocessing
from fedhead.backbones.proposals import PROPOSALS, Proposer, split_proposals
from fedhead.backbones.state_dict import assign_weights, read_weights
from fedhead.errors import UserError
from fedhead.wording import listed

CHOOSING = ("d_fine", "rt_detr", "rt_detr_v2")
"""Architectures whose queries are the best of many places of an image; other runtimes order these differently."""

SIZE = 640
"""Default height and width of images, where neither the processor nor the model has a size."""


def finds_objects(folder: Path) -> bool:
    """Return whether a folder of transformers holds a detector."""
    return optional_json(folder / "config.json").get("model_type") in DETECTORS


def files_find_objects(files: Mapping[str, str], path: str) -> bool:
    """Return whether the files of a saved backbone are a detector's."""
    return Recipe.from_files(files, path).config.get("model_type") in DETECTORS


def build(spec: str, folder: Path | None, files: Mapping[str, str], weights: str, layer: str, seed: int) -> Backbone:
    """Build a detector without its classifier.

    Args:
        spec: `hf:NAME`.
        folder: in the library's format; None with `files`.
        files: of a saved backbone.
        weights: see `hf.load`.
        layer: `proposals`, optionally with their number and the height and width of images.
        seed: of random weights.

    Raises:
        UserError: for another layer, more proposals than queries, and weights that do not fit.
    """
    asked = split_proposals(PROPOSALS if layer == "penultimate" else layer)
    if asked is None:
        raise UserError(
            f"{spec} is a detector, whose rows are proposals: its only layer is 'proposals', not {layer!r}."
        )
    recipe = Recipe.from_files(files, weights) if files or folder is None else _read(folder, spec)
    if recipe.image is None:
        raise UserError(f"{weights} has no valid description of its model and inputs: it prepares no images.")
    with quiet():
        config = configure(recipe.config, spec)
        if folder is not None and weights == "default":
            model = _pretrained(folder, config, spec)
        else:
            model = building.build(_class_of(config), config, seed, weights if files else "", spec).eval()
    queries = int(getattr(config, "num_queries", 0) or config.num_detection_tokens)
    if asked.number is not None and asked.number > queries:
        raise UserError(f"{spec} has {queries} queries, so it gives no {asked.number} proposals.")
    proposer = Queries(model, asked.number or queries)
    if weights not in ("default", "random"):
        assign_weights(proposer, read_weights(weights), set(), spec, weights)
    prepared = ImagePreprocessing(**recipe.image)
    side = asked.side or prepared.size[0]
    return Backbone(
        spec,
        proposer,
        replace(prepared, resize=(side, side)),
        layer=f"{PROPOSALS}:{proposer.count}@{side}",
        pooling=PROPOSALS,
        trained=weights != "random",
        files=recipe.to_files(),
    )


class Queries(Proposer):
    """A detector whose rows are its queries: the boxes that it gives, and the hidden states behind them.

    The layers for boxes are frozen too. If fewer proposals than queries are kept, they are those with the highest
    score of a class.

    Args:
        model: the library's model.
        count: the number of proposals of an image.
    """

    def __init__(self, model: Any, count: int) -> None:
        super().__init__()
        self.model = model
        self.count = count
        if model.config.model_type in CHOOSING:
            self.not_exported = f"the family {model.config.model_type!r} chooses its queries by the content of an image"

    def forward(self, images: Tensor) -> Tensor:
        output = self.model(pixel_values=images, return_dict=True)
        middle, half = output.pred_boxes[..., :2], output.pred_boxes[..., 2:] / 2
        corners = torch.cat([middle - half, middle + half], 2).clamp(0, 1)
        rows = torch.cat([corners, self._states(output)], 2)
        if self.count < rows.shape[1]:
            scores = output.logits[..., : self.model.config.num_labels].amax(2)
            if output.logits.shape[2] > self.model.config.num_labels:
                scores = output.logits.softmax(2)[..., :-1].amax(2)
            best = scores.topk(self.count, 1).indices
            rows = rows.gather(1, best[..., None].expand(-1, -1, rows.shape[2]))
        return rows

    def steady(self, images: Tensor) -> Tensor:
        """Return the mean over all queries."""
        return self._states(self.model(pixel_values=images, return_dict=True)).mean(1)

    def _states(self, output: Any) -> Tensor:
        # YOLOS returns the states of the image's patches before those of its queries.
        states: Tensor = output.last_hidden_state[:, -output.logits.shape[1] :]
        return states

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.load_state_dict(*args, **kwargs)


def _read(folder: Path, spec: str) -> Recipe:
    values = optional_json(folder / "config.json")
    with quiet():
        config = configure(values, spec)
        said = processor_of(folder, spec).to_dict()
    own = said.get("size") or {}
    height, width = own.get("height"), own.get("width")
    if height is None or height != width:
        height, width = image_size(getattr(config, "image_size", SIZE))
    side = height if height == width else SIZE
    made = to_preprocessing({**said, "do_resize": True, "size": {"height": side, "width": side}}, 3)
    if made is None:
        raise UserError(f"{spec} prepares images in a way that fedhead does not support.")
    kept = {key: value for key, value in config.to_dict().items() if key not in UNREAD}
    return Recipe(kept, "mean", image=asdict(replace(made, crop=None)))


def _class_of(config: Any) -> Any:
    from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING

    return MODEL_FOR_OBJECT_DETECTION_MAPPING[type(config)]


def _pretrained(folder: Path, config: Any, spec: str) -> Any:
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{spec} has no weights as safetensors: {folder} contains no *.safetensors.")
    given = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True, "dtype": torch.float32}
    try:
        model, found = _class_of(config).from_pretrained(folder, config=config, **given)
    # Damaged files and wrong shapes raise many kinds of errors.
    except Exception as error:
        raise UserError(f"The weights of {spec} in {folder} cannot be read: {first_line(error)}") from None
    counters = re.compile(r".*num_batches_tracked")
    if missing := sorted(name for name in found["missing_keys"] if not counters.fullmatch(name)):
        raise UserError(f"The weights of {spec} in {folder} lack {listed(missing, 4)}.")
    return model.eval()
