"""Token ids of texts beside their stored activations."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedhead.backbones.split import Trunk
from fedhead.data import IntArray, Samples
from fedhead.errors import FedheadError
from fedhead.features.boundary import BoundaryStore


@dataclass(frozen=True)
class TokenStore:
    """Activations of texts with their token ids, in memory.

    Attributes:
        store: the activations.
        ids: `[elements]`, as in the store.
    """

    store: BoundaryStore
    ids: npt.NDArray[np.int32]
    sequences: ClassVar[bool] = True

    @classmethod
    def open(cls, store: BoundaryStore, trunk: Trunk, samples: Samples) -> "TokenStore":
        """Tokenize the texts whose activations are stored.

        Raises:
            FedheadError: if the texts have changed since.
        """
        lengths = np.diff(store.starts)
        made = [trunk.preprocessing(samples.read(row)).numpy() for row in np.flatnonzero(lengths).tolist()]
        if [len(one) for one in made] != lengths[lengths > 0].tolist():
            raise FedheadError("The texts have changed since their activations were stored; start the run again.")
        return cls(store, np.concatenate([np.empty(0, np.int32), *(one.astype(np.int32) for one in made)]))

    @property
    def device(self) -> torch.device:
        """Where `take` returns activations."""
        return self.store.device

    def take(self, rows: IntArray) -> Tensor:
        """Return the activations `[n, length, d + 2]` of rows `[n]`: values, the mask, and ids, which float32 holds."""
        padded = self.store.take(rows)
        ids = np.zeros(padded.shape[:2], np.float32)
        starts, stops = self.store.starts[rows], self.store.starts[rows + 1]
        for row, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
            ids[row, : stop - start] = self.ids[start:stop]
        return torch.cat([padded, torch.from_numpy(ids).to(padded)[..., None]], dim=-1)
