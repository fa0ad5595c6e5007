"""Replies as files to look at: the bytes that leave, and beside them a summary that a person can read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedhead.client.release.ledger import entry_of
from fedhead.files import disk_errors, safe_name, write_atomically
from fedhead.protocol.actions import ACTIONS
from fedhead.protocol.messages import Payload
from fedhead.protocol.steps import Release, Step

SHOWN = 32
"""Numbers of an array that a summary lists; of longer arrays it has the extremes and the mean."""


class Payloads(Step):
    """Writes each reply to a folder before it leaves: `NUMBER-ACTION.safetensors`, and `.json` with the summary.

    Args:
        folder: it is made with the first reply, readable by its owner only.
    """

    per_site = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.written: list[Path] = []
        self._latest = b""

    def leave(self, payload: Payload, release: Release) -> Payload:
        self.write(payload, release)
        return payload

    def write(self, payload: Payload, release: Release) -> Path:
        """Write a reply, unless it is the one just written; return the path of its summary.

        Raises:
            UserError: if it may not be written there.
            FedheadError: if the disk is full.
        """
        if self.written and payload.blob == self._latest:
            return self.written[-1]
        with disk_errors(self.folder):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        number = max((int(path.name[:6]) for path in self.folder.glob("[0-9]" * 6 + "-*.json")), default=0) + 1
        path = self.folder / f"{number:06}-{safe_name(release.action.replace('.', '-'))}.json"
        write_atomically(path.with_suffix(".safetensors"), payload.blob)
        write_atomically(path, json.dumps(summary(payload, release), indent=1) + "\n")
        self.written.append(path)
        self._latest = payload.blob
        return path


def summary(payload: Payload, release: Release) -> dict[str, Any]:
    """Return a reply's content, rows and run as text; control characters are escaped as in JSON."""
    entry, manifest = entry_of(payload, release), release.manifest
    action = ACTIONS.get(release.action)
    about = {} if manifest is None else {"backbone": manifest.backbone, "weights": manifest.weights_digest}
    return {
        "action": release.action,
        "content": "" if action is None else action.tells,
        **json.loads(entry.model_dump_json(include={"when", "run", "site", "rows", "classes", "bytes", "digest"})),
        **about,
        "values": dict(payload.values),
        "arrays": _arrays(payload.arrays),
    }


def _arrays(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, dict[str, Any]]:
    return {name: _array(array) for name, array in arrays.items()}


def _array(array: npt.NDArray[Any]) -> dict[str, Any]:
    about: dict[str, Any] = {"type": str(array.dtype), "shape": list(array.shape)}
    if array.size <= SHOWN:
        return about | {"numbers": array.tolist()}
    numbers = array.astype(np.float64)
    return about | {"least": numbers.min(), "greatest": numbers.max(), "mean": numbers.mean()}
