"""The file of the backbone's weights, sent in chunks to sites that lack them."""

from functools import cached_property
from pathlib import Path

import numpy as np
from flwr.app import RecordDict

from fedhead.backbones import Backbone
from fedhead.backbones.weights import export_weights
from fedhead.files import digest_file
from fedhead.protocol.messages import WeightsChunk

CHUNK_BYTES = 4 * 2**20


class WeightsFile:
    """A file of weights that is read chunk by chunk.

    Args:
        backbone: the backbone.
        chunk_bytes: bytes per chunk; None sends the whole file.
    """

    def __init__(self, backbone: Backbone, chunk_bytes: int | None) -> None:
        self._backbone = backbone
        self._chunk_bytes = chunk_bytes

    @cached_property
    def path(self) -> Path:
        """Path of the file, which is written on first use."""
        return export_weights(self._backbone)

    @cached_property
    def size(self) -> int:
        """Size in bytes."""
        return self.path.stat().st_size

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file."""
        return digest_file(self.path)

    @property
    def in_chunks(self) -> bool:
        """Whether a site is asked for its progress first."""
        return self._chunk_bytes is not None

    def advances(self, offset: int, received: int) -> bool:
        """Return whether a site can have so many bytes, in order, after the chunk at `offset`."""
        return min(offset + (self._chunk_bytes or self.size), self.size) <= received <= self.size

    def question(self) -> RecordDict:
        """Return the message that asks a site how many bytes it has."""
        return WeightsChunk(self.digest, self.size, 0, np.empty(0, np.uint8)).to_content()

    def chunk(self, offset: int) -> RecordDict:
        """Return the chunk that begins at `offset`."""
        with self.path.open("rb") as file:
            file.seek(offset)
            data = np.frombuffer(file.read(self._chunk_bytes or self.size), np.uint8)
        return WeightsChunk(self.digest, self.size, offset, data).to_content()
