"""Simulated sites: lists of row numbers that share one backbone and one store of features."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedhead.backbones import Backbone
from fedhead.backbones.weights import PACKAGED, weights_path
from fedhead.client.backbones import check_backbone
from fedhead.client.isolation import Features
from fedhead.client.labelled_features import LabelledFeatures
from fedhead.client.own_adapters import OwnAdapters
from fedhead.client.release.guard import Guard, people_of
from fedhead.client.release.masking import Asked
from fedhead.client.release.noise import Noise
from fedhead.client.release.secure_sessions import SecureSessions, packed
from fedhead.client.release.subgroups import Subgroups
from fedhead.client.release.training_limits import TrainingLimits
from fedhead.client.site_data import Holding, hold, refuse_if_withheld
from fedhead.client.tails import Tuning
from fedhead.config import RunConfig
from fedhead.data import BoolArray, IntArray, held_out
from fedhead.errors import FedheadError, UserError
from fedhead.features.store import FeatureStore
from fedhead.files import safe_name
from fedhead.heads import FeatureMap, Head
from fedhead.protocol.messages import Manifest, MessageError, WeightsChunk
from fedhead.protocol.steps import Masking, Step
from fedhead.secure.layout import Layout
from fedhead.tasks import Targets, Task
from fedhead.tasks.dense import ItemPlaces

_COUNTED_AT_ONCE = 50_000
"""Sites per batch when counting allowed rows."""


class SharedData:
    """What all simulated sites of a process share: one backbone, and one store of features.

    Args:
        backbone: of the run; None in a worker, whose sites are described elsewhere.
        store: the features of all rows.
        labels: `[N]` or `[N, C]`, of all rows.
        guard: every site's.
        task: of the run.
        steps: after the guard, the other release steps of every site.
        own_labels: `[N]` or `[N, C]`, the labels in the data, whatever the run's task; None for real targets.
        places: how items become the places that are learned from; None if rows are items.
        device: for training; by default the backbone's.
        tuning: the tail and its activations, in a tuned run.
        subgroups: of all rows; None if the data names none.
        adapters: the folder of adapters that stay at sites.

    Attributes:
        has_weights: whether every site has the backbone's weights before it is sent any.
    """

    def __init__(
        self,
        backbone: Backbone | None,
        store: FeatureStore,
        labels: Targets,
        guard: Guard,
        task: Task,
        steps: Sequence[Step] = (),
        own_labels: Targets | None = None,
        places: ItemPlaces | None = None,
        device: torch.device | None = None,
        tuning: Tuning | None = None,
        subgroups: Subgroups | None = None,
        adapters: Path | None = None,
    ) -> None:
        self.subgroups = subgroups
        self.adapters = adapters
        self.own_labels = own_labels
        self.people = people_of(store.keys, store.contents)
        self.backbone = backbone
        self.has_weights = backbone is not None and backbone.spec.startswith(PACKAGED) and backbone.trained
        self.labels = labels
        self.keys = store.keys
        self.guard = guard
        self.task = task
        self.steps: Sequence[Step] = (guard, Noise(), *steps)
        # A simulated site's minibatches are those of a real one.
        self.training = TrainingLimits.off(guard.min_class_count)
        if device is None:
            device = torch.device("cpu") if backbone is None else backbone.device
        self.data = LabelledFeatures.of(store.features, labels, task, device, places)
        self.tuning = tuning
        self._compared: Tensor | None = None
        self._held_out: dict[float, BoolArray] = {}
        self._files: set[str] = set()

    @cached_property
    def probe(self) -> Tensor:
        """The features of the probe.

        Raises:
            FedheadError: if there is no backbone here.
        """
        if self.backbone is None:
            raise FedheadError("A worker has no backbone.")
        return self.backbone.probe()

    def held_out(self, share: float) -> BoolArray:
        """Return which of all rows are held out, computed once for all sites."""
        if share not in self._held_out:
            self._held_out = {share: held_out(self.keys, share)}
        return self._held_out[share]

    def has_file(self, weights_digest: str) -> bool:
        """Return whether weights are in this machine's folder, where the coordinator of the same machine puts them."""
        if weights_digest not in self._files and weights_path(weights_digest).is_file():
            self._files.add(weights_digest)
        return weights_digest in self._files

    def check(self, manifest: Manifest, probe: Tensor) -> None:
        """Check the backbone against the coordinator's, for all sites once."""
        if probe is not self._compared and self.backbone is not None:
            check_backbone(self.backbone, self.probe, manifest, probe)
            self._compared = probe

    def count_allowed(self, sites: Sequence[IntArray], config: RunConfig) -> IntArray:
        """Return `[S]`, how many of its rows the guard leaves each site; 0 where it refuses the site as a whole."""
        out = self.held_out(config.holdout)
        allowed = [np.empty(0, dtype=np.int64)]
        for start in range(0, len(sites), _COUNTED_AT_ONCE):
            part = sites[start : start + _COUNTED_AT_ONCE]
            owners, rows = np.repeat(np.arange(len(part)), [len(own) for own in part]), np.concatenate(part)
            people = None if self.people is None else self.people[rows]
            counted = self.guard.count_allowed(owners, self.labels[rows], out[rows], len(part), self.task, people)
            allowed.append(counted)
        return np.concatenate(allowed)

    def require_two_classes(self, sites: Sequence[IntArray], config: RunConfig) -> None:
        """Check that the guards of all sites together leave training rows of more than one class.

        Args:
            sites: the rows of each site that its guard does not refuse as a whole.
            config: of the run.

        Raises:
            UserError: naming the only class that is left.
        """
        names = self.task.counted
        if len(names) < 2 or not sites:
            return
        owners, rows = np.repeat(np.arange(len(sites)), [len(own) for own in sites]), np.concatenate(sites)
        train = ~self.held_out(config.holdout)[rows]
        counts = self.task.count_rows(self.labels[rows[train]], owners[train], len(sites))
        left = [names[one] for one in np.flatnonzero((counts >= max(self.guard.min_class_count, 1)).any(0))]
        if len(left) == 1:
            raise UserError(
                f"Only the class {left[0]!r} is left to learn: the guards of all sites withhold the others, which have "
                f"fewer than {self.guard.min_class_count} training rows at each site. Lower --min-class-count, or take "
                "fewer sites or another partition."
            )


class SimulatedSite:
    """A site that is a list of row numbers; like a new machine, it lacks every backbone the package does not carry.

    It has no ledger, because nothing leaves this process.

    Args:
        name: of the site.
        rows: `[n]`, its rows of the shared data.
        shared: the same for all sites.
        allowed: how many of the rows the guard leaves, if that was counted.
    """

    def __init__(self, name: str, rows: IntArray, shared: SharedData, allowed: int = 0) -> None:
        self.name = name
        self.num_rows = len(rows)
        self.num_allowed = allowed
        self._rows = rows
        self._shared = shared
        self._has_weights = shared.has_weights
        self._holding: Holding | None = None

    @property
    def steps(self) -> Sequence[Step]:
        return self._shared.steps

    @property
    def training(self) -> TrainingLimits:
        return self._shared.training

    def has_weights(self, manifest: Manifest) -> bool:
        return self._has_weights

    def install(self, manifest: Manifest, chunk: WeightsChunk) -> int | None:
        received = chunk.offset + len(chunk.data)
        if received < chunk.size:
            return received
        # The coordinator of this machine has written the file that a site would keep.
        if not self._shared.has_file(manifest.weights_digest):
            raise FedheadError(f"The weights that were sent to {self.name} are not there.")
        self._has_weights = True
        return None

    def tuning(self, manifest: Manifest) -> Tuning:
        if self._shared.tuning is None:
            raise FedheadError("This site has no activations: its run was opened without tuning.")
        return self._shared.tuning

    @property
    def own_adapters(self) -> OwnAdapters:
        if self._shared.adapters is None:
            raise FedheadError("This site has no folder for adapters of its own: its run was opened without one.")
        return OwnAdapters(self._shared.adapters / safe_name(self.name))

    @property
    def sessions(self) -> SecureSessions:
        raise FedheadError("Simulated sites send sums without masks.")

    def masking(self, asked: Asked) -> Masking:
        """Encode sums in the ring of secure summation, without masks: nothing leaves this process."""
        values = asked.session.values
        terms = values.get("terms")
        if not isinstance(terms, int) or terms < 1:
            raise MessageError("it does not say over how many sites its secure sum is")
        layout = Layout.model_validate(values.get("layout"))
        return Masking(lambda arrays: packed(arrays, layout, terms), terms)

    def check_data(self, manifest: Manifest) -> None:
        """Check nothing: `make_plan` has looked at all sites' data."""

    def check(self, manifest: Manifest, probe: Tensor) -> None:
        self._shared.check(manifest, probe)
        if not self.num_allowed:
            refuse_if_withheld(self.open(manifest).guarded)

    def check_map(self, manifest: Manifest, mapping: FeatureMap | None) -> None:
        if mapping is not None:
            rows = self.open(manifest).guarded.num_rows
            self._shared.guard.require_rows_for(mapping.width, mapping.plain, rows)

    def check_tail(self, manifest: Manifest, features: Features) -> None:
        """Check nothing: the coordinator is this process."""

    def keep_head(
        self,
        manifest: Manifest,
        head: Head,
        temperature: float,
        about: str,
        tail: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Keep nothing: a simulated site has no machine of its own."""

    def open(self, manifest: Manifest) -> Holding:
        if self._holding is None:
            shared = self._shared
            out = shared.held_out(manifest.holdout)[self._rows]
            self._holding = hold(
                self.name,
                self._rows,
                out,
                shared.data,
                shared.labels,
                shared.keys,
                shared.task,
                shared.guard,
                people=shared.people,
                labels=shared.own_labels,
                subgroups=shared.subgroups,
            )
        return self._holding
