"""A file of a backbone's tuned parameters, without its pretrained weights."""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fedhead.backbones.adapters import ADAPTER, lora_config
from fedhead.backbones.backbone import Backbone
from fedhead.backbones.digests import digest_tensors
from fedhead.backbones.split import Tail, merged, split
from fedhead.errors import UserError
from fedhead.files import write_atomically
from fedhead.tuning import TuneSpec, parse_tune

TAIL_FILE = "tail.safetensors"
FORMAT = "fedhead-tail-1"
PEFT_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class TailFile:
    """Tuned parameters, with the backbone and the layers they belong to.

    Attributes:
        spec: the backbone, `source:name`.
        layer: of the backbone.
        weights_digest: of its pretrained weights.
        tune: the layers and parameters that trained.
        tensors: by their names in the backbone; with LoRA both matrices of each adapter, also a frozen one.
    """

    spec: str
    layer: str
    weights_digest: str
    tune: TuneSpec
    tensors: Mapping[str, Tensor]


def save_tail(path: Path, tail: Tail, parameters: Mapping[str, Tensor]) -> None:
    """Write tuned parameters atomically.

    Args:
        path: the file.
        tail: of the pretrained backbone.
        parameters: as from `Tail.trainable`.

    Raises:
        ValueError: if the parameters are not those of the tail.
    """
    loaded = copy.deepcopy(tail)
    loaded.load(parameters)
    tensors = loaded.adapters() or loaded.trainable()
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    about = {"format": FORMAT, **tail.pretrained._asdict(), "tune": str(tail.tune)}
    write_atomically(path, save(tensors, {**about, "digest": digest_tensors(tensors)}))


def load_tail(path: Path) -> TailFile:
    """Read a file written by `save_tail`.

    Raises:
        UserError: if it is missing, damaged or another kind of file.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            said = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"The tuned parameters {path} cannot be read: {error}.") from None
    if said.get("format") != FORMAT or not {"spec", "layer", "weights_digest", "tune"} <= said.keys():
        raise UserError(f"{path} does not contain tuned parameters of a run.")
    # Files of earlier versions have no digest.
    if said.get("digest", digest := digest_tensors(tensors)) != digest:
        raise UserError(f"The tuned parameters {path} are damaged: they do not match their digest.")
    return TailFile(said["spec"], said["layer"], said["weights_digest"], parse_tune(said["tune"]), tensors)


def with_adapters(base: Backbone, tail: TailFile) -> Backbone:
    """Return the backbone with the adapters of a file added to its weights.

    Args:
        base: the pretrained backbone of the file; it is not modified.
        tail: the adapters.

    Raises:
        UserError: if they are not of this backbone.
    """
    made = split(base, tail.tune, check=False).tail
    own = made.adapters()
    if {name: one.shape for name, one in own.items()} != {name: one.shape for name, one in tail.tensors.items()}:
        raise UserError(f"The tuned parameters are not adapters of {base.spec}.")
    for name, value in own.items():
        value.copy_(tail.tensors[name])
    return merged(base, made, made.trainable())


def peft_files(tail: TailFile, prefix: str = "", task_type: str = "FEATURE_EXTRACTION") -> dict[str, bytes]:
    """Return the two files of an adapter from which PEFT loads it, by name.

    Args:
        tail: the adapters.
        prefix: of the names of layers in the model that PEFT adapts.
        task_type: PEFT's type of the task.

    Raises:
        UserError: if the run trained no adapters, or PEFT is not installed.
    """
    if tail.tune.method != "lora":
        raise UserError(
            f"The run tuned {str(tail.tune)!r}, which has no adapters for PEFT; export the whole model, for example "
            "with --format fedhead."
        )
    config = lora_config(tail.tune.rank, {name.partition(".lora_")[0] for name in tail.tensors})
    source, _, name = tail.spec.partition(":")
    if source == "hf":
        config.base_model_name_or_path, config.task_type = name.partition("?")[0], task_type
    config.inference_mode = True
    said = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    tensors = {f"{_PREFIX}{prefix}{name.replace(f'.{ADAPTER}.', '.')}": tensor for name, tensor in tail.tensors.items()}
    return {
        "adapter_config.json": json.dumps(said, indent=2, sort_keys=True, default=str).encode(),
        PEFT_WEIGHTS: save(tensors, {"format": "pt"}),
    }
