"""The model file of a run folder, read and written without its backbone."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedhead.backbones.digests import digest_tensors
from fedhead.errors import UserError
from fedhead.files import write_atomically
from fedhead.heads import FeatureMap, Head, MappedHead, make_delivered


class DeliveredModel:
    """A delivered model without its backbone, so that a site can leave on a machine that has no backbone.

    Args:
        path: of the file.

    Raises:
        UserError: if it is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                self.described: dict[str, Any] = json.loads((file.metadata() or {})["model"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self.classes: tuple[str, ...] = tuple(self.described["classes"])
            name = "mapping.directions" if "mapping.directions" in tensors else None
            self.num_features = next(
                value.shape[1] for key, value in tensors.items() if key == (name or key) and value.ndim == 2
            )
            self.head = make_delivered(self.described["head"], self.num_features, len(self.classes))
            self.head.load_state_dict(tensors)
            whole = digest_tensors(tensors) == self.described["head_digest"]
        except FileNotFoundError:
            raise UserError(f"There is no {path}: the run did not finish.") from None
        except (OSError, SafetensorError, ValueError, KeyError, StopIteration, TypeError, RuntimeError) as error:
            raise UserError(f"The model {path} is damaged, or none that this version reads: {error}.") from None
        if not whole:
            raise UserError(f"The model {path} is damaged: its weights are not those that were saved.")

    @property
    def mapping(self) -> FeatureMap | None:
        """The map of features in front of the head."""
        return self.head.mapping if isinstance(self.head, MappedHead) else None

    def replace(self, head: Head, classes: Sequence[str]) -> None:
        """Write the same model with another head, in the precision that models have."""
        self.write(self.path, head, classes, {})

    def write(self, path: Path, head: Head, classes: Sequence[str], changes: Mapping[str, Any]) -> None:
        """Write a model of the same backbone to another file.

        Args:
            path: of the file.
            head: its head.
            classes: the names of the head's outputs.
            changes: of the description, by key.
        """
        tensors = {name: value.detach().float().contiguous() for name, value in head.state_dict().items()}
        described = {**self.described, **changes, "classes": list(classes), "head_digest": digest_tensors(tensors)}
        write_atomically(path, save(tensors, {"model": json.dumps(described)}))
