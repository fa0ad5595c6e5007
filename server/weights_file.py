"""The backbone's weights on their way to sites that lack them: a file, sent in chunks."""

from functools import cached_property
from pathlib import Path

import numpy as np
from flwr.app import RecordDict

from fedhead.backbones import Backbone
from fedhead.backbones.weights import export_weights
from fedhead.files import digest_file
from fedhead.messages import WeightsChunk

CHUNK_BYTES = 4 * 2**20


class WeightsFile:
    """A file of weights, of which one chunk is in memory at a time.

    Args:
        backbone: whose weights are sent.
        chunk_bytes: how much is sent at a time; None for all of it.
    """

    def __init__(self, backbone: Backbone, chunk_bytes: int | None) -> None:
        self._backbone = backbone
        self._chunk_bytes = chunk_bytes

    @cached_property
    def path(self) -> Path:
        """Where it is; it is written when it is first asked for."""
        return export_weights(self._backbone)

    @cached_property
    def size(self) -> int:
        """How many bytes it has."""
        return self.path.stat().st_size

    @cached_property
    def digest(self) -> str:
        """Its SHA-256."""
        return digest_file(self.path)

    @property
    def in_chunks(self) -> bool:
        """Whether a site is asked first how much of it is there."""
        return self._chunk_bytes is not None

    def question(self) -> RecordDict:
        """Return what asks a site how much it has."""
        return WeightsChunk(self.digest, self.size, 0, np.empty(0, np.uint8)).to_content()

    def chunk(self, offset: int) -> RecordDict:
        """Return the chunk that begins at `offset`."""
        with self.path.open("rb") as file:
            file.seek(offset)
            data = np.frombuffer(file.read(self._chunk_bytes or self.size), np.uint8)
        return WeightsChunk(self.digest, self.size, offset, data).to_content()
