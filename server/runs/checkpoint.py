"""The checkpoint, which resumes a run after its process was killed at any moment."""

import hashlib
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.serverapp.strategy import Strategy
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from fedhead.backbones import Backbone
from fedhead.config import PrivacyConfig, RunConfig
from fedhead.errors import UserError
from fedhead.files import disk_errors, write_atomically
from fedhead.protocol.mapping import MapRequest
from fedhead.server.best_checkpoint import BestCheckpoint, Candidate
from fedhead.server.exchange import Exchange
from fedhead.server.rounds import Version
from fedhead.server.runs.folder import RunFolder
from fedhead.server.runs.history import Round
from fedhead.server.strategy_state import restore, state_of
from fedhead.server.traffic import Traffic
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.heads import METRICS
from fedhead.sums.sums import Arrays

FORMAT = "fedhead-checkpoint-1"
RELEASES = "releases.safetensors"
"""The file of the noisy totals of a private run."""

SECONDS = 1.0
"""At most so often is a run in one process written: its rounds take less than flushing a file to the disk."""

SHARE = 0.05
"""At most this share of the time of such a run goes into writing it."""

OPERATIONAL = ("min_sites", "round_deadline", "with_backbone")
"""Settings that change no result, so that a run may be resumed with others."""


@dataclass
class Progress:
    """The state of a run once it has a head, and after each of its rounds.

    Attributes:
        current: the newest head.
        stats: the pooled statistics, where the first head was solved of them.
        standardisation: mean and scale `[d]` that heads are trained under.
        target_standardisation: the same of real targets, `[C]`.
        mapping: the map of features, in the form that sites receive.
        settled: the settings that a comparison of maps has decided.
        choices: the comparisons so far.
        excluded: sites whose sums could not be used, with the reason.
        sites: those that take part.
        counts: each site's training rows by class.
        best: the heads that may still be the best.
        full_model_bytes: see `fedhead.server.runs.history.Outcome`.
        traffic: the same.
        history: the finished lines.
    """

    current: Version
    stats: FeatureStatistics | None
    standardisation: tuple[Tensor, Tensor] | None
    excluded: Mapping[str, str]
    counts: Mapping[str, Tensor]
    target_standardisation: tuple[Tensor, Tensor] | None = None
    mapping: MapRequest | None = None
    settled: dict[str, Any] = field(default_factory=dict)
    choices: list[Mapping[str, Any]] = field(default_factory=list)
    sites: Sequence[str] = ()
    best: BestCheckpoint = field(default_factory=BestCheckpoint)
    full_model_bytes: int = 0
    traffic: Traffic = field(default_factory=Traffic)
    history: list[Round] = field(default_factory=list)


class Checkpoint:
    """The folder `checkpoint` of a run folder.

    `statistics.safetensors` is written once, `heads-N.safetensors` holds candidates that came since the write before,
    and `state.safetensors` all else. The state alone says what counts: other files are written before it, and
    removed after it once it does not name them, so that whatever is killed leaves the state before or the new one.

    Args:
        folder: of the run.
        config: of the run.
        backbone: of the run.
        strategy: whose memory is saved and restored.
        every_round: whether each round is written, as on a network; else at most every `SECONDS`.

    Attributes:
        run: by which sites know the run; the same when it is resumed.
        data: a digest of all features and targets, where the coordinator's process holds them; else empty.
        releases: of a private run, the noisy totals so far and values about them, by name.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: RunConfig,
        backbone: Backbone,
        strategy: Strategy,
        *,
        every_round: bool,
    ) -> None:
        self.run = new_run()
        self._folder = folder
        self._path = folder.path / "checkpoint"
        self._strategy = strategy
        self._every_round = every_round
        self._identity = {
            "config": config_digest(config),
            "strategy": type(strategy).__name__,
            "backbone": backbone.digest,
        }
        self.data = ""
        self.releases: dict[str, tuple[Mapping[str, Any], Arrays]] = {}
        self._heads: dict[int, str] = {}
        self._statistics_written = False
        self._next = 0.0

    def load(self) -> Progress | None:
        """Return the saved progress, restore the strategy's state, and remove later lines from the metrics.

        Returns:
            None, with an empty run folder, if the run was ended before its first head was complete.

        Raises:
            UserError: if the checkpoint is damaged, or of another configuration, strategy or backbone.
        """
        if not (self._path / "state.safetensors").is_file():
            self._load_releases()
            self._folder.sums.clear()
            self._folder.rewind(0)
            return None
        values, arrays = _read(self._path / "state.safetensors")
        self._require_same(values["identity"])
        self.run = values["run"]
        try:
            progress = self._progress(values, arrays)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"The checkpoint {self._path} is damaged ({error}); start the run again.") from error
        restore(
            self._strategy,
            values["strategy"],
            {name.removeprefix("strategy."): array for name, array in arrays.items() if name.startswith("strategy.")},
        )
        self._sweep()
        return progress

    def record(self, progress: Progress) -> None:
        """Write the state of the run, if it is due.

        Raises:
            UserError: if it may not be written.
            FedheadError: if the disk is full.
        """
        started = time.monotonic()
        if started < self._next and not self._every_round:
            return
        if progress.stats is not None and not self._statistics_written:
            progress.stats.save(self._path / "statistics.safetensors")
            # What was pooled so far must be on the disk as well, where single sites' sums are not kept.
            self._folder.sums.finish()
        self._statistics_written = True
        self._write_heads(progress.best.candidates, progress.current.number)
        self._folder.flush_metrics()
        values, arrays = self._state(progress)
        write_atomically(self._path / "state.safetensors", _pack(values, arrays))
        self._sweep()
        ended = time.monotonic()
        self._next = ended + max(SECONDS, (ended - started) / SHARE)

    def record_release(self, name: str, values: Mapping[str, Any], arrays: Arrays) -> None:
        """Write a noisy total of a private run: its sites' budgets do not allow another one.

        Args:
            name: of the release; the run is resumed under its id once one was written.
            values: JSON types.
            arrays: the total.

        Raises:
            UserError: if it may not be written.
            FedheadError: if the disk is full.
        """
        self.releases[name] = (values, arrays)
        about = {one: dict(known) for one, (known, _) in self.releases.items()}
        packed = {f"{one}/{key}": array for one, (_, total) in self.releases.items() for key, array in total.items()}
        write_atomically(
            self._path / RELEASES, _pack({"identity": self._identity, "run": self.run, "releases": about}, packed)
        )

    def _load_releases(self) -> None:
        """Read the noisy totals of a private run, if there are any, and continue under its id.

        Raises:
            UserError: if the file is damaged, or of another configuration, strategy or backbone.
        """
        if not (self._path / RELEASES).is_file():
            return
        values, arrays = _read(self._path / RELEASES)
        self._require_same(values["identity"])
        self.run = values["run"]
        for name, known in values["releases"].items():
            prefix = f"{name}/"
            total = {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
            self.releases[name] = (known, total)

    @property
    def hint(self) -> str:
        """Return advice for a failed run."""
        return f"What is complete is saved: go on with --resume {self._folder.path}."

    def remove(self) -> None:
        """Remove the folder of a run that is finished."""
        with disk_errors(self._path):
            if self._path.is_dir():
                for file in self._path.iterdir():
                    file.unlink()
                self._path.rmdir()

    def _require_same(self, identity: Mapping[str, str]) -> None:
        """Raise unless the run is the one that was saved.

        Raises:
            UserError: naming the differences.
        """
        told = {
            "config": "another configuration; resume it with its own run.toml as it was written",
            "strategy": "another strategy; give the one that it was started with",
            "backbone": "another backbone: other weights, or built or fed differently by these versions of its "
            "packages; give the weights and the versions that it was started with",
        }
        for name, sentence in told.items():
            if identity.get(name) != self._identity[name]:
                raise UserError(f"The run in {self._folder.path} was started with {sentence}.")
        if identity.get("data") and self.data and identity["data"] != self.data:
            raise UserError(
                f"The run in {self._folder.path} was started with other data: rows came, went or changed since, or can "
                "be read now that could not. Restore the data as it was, or start a new run."
            )

    def _write_heads(self, candidates: Sequence[Candidate], number: int) -> None:
        live = {candidate.number for candidate in candidates}
        self._heads = {head: file for head, file in self._heads.items() if head in live}
        new = [candidate for candidate in candidates if candidate.number not in self._heads]
        if new:
            name = f"heads-{number}.safetensors"
            arrays = {f"{one.number}.{key}": value for one in new for key, value in one.arrays.items()}
            write_atomically(self._path / name, _pack({}, arrays))
            self._heads |= {candidate.number: name for candidate in new}

    def _sweep(self) -> None:
        """Remove the files that the state does not name."""
        named = {"state.safetensors", "statistics.safetensors", *self._heads.values()}
        with disk_errors(self._path):
            for file in self._path.iterdir():
                if file.name not in named:
                    file.unlink()

    def _state(self, progress: Progress) -> tuple[dict[str, Any], dict[str, Any]]:
        strategy, remembered = state_of(self._strategy)
        current, best = progress.current, progress.best
        made_by = current.made_by
        answered = sorted(made_by.metrics)
        values = {
            "identity": {**self._identity, "data": self.data},
            "run": self.run,
            "history": len(progress.history),
            "number": current.number,
            # Strategies sum over a head's arrays in their order, which safetensors does not keep.
            "names": list(current.arrays),
            "seconds": current.seconds,
            "dropped": made_by.dropped,
            "joined": made_by.joined,
            "bytes": [made_by.bytes_down, made_by.bytes_up],
            "answered": answered,
            "summed": list(made_by.summed),
            "excluded": dict(progress.excluded),
            "sites": list(progress.sites),
            "counts": list(progress.counts),
            "statistics": progress.stats is not None,
            "full_model_bytes": progress.full_model_bytes,
            "traffic": progress.traffic.to_dict(),
            "strategy": strategy,
            "common": best.sites,
            "settled": progress.settled,
            "choices": [dict(one) for one in progress.choices],
            "candidates": [[one.number, self._heads[one.number]] for one in best.candidates],
        }
        arrays = {
            "metrics": np.array([made_by.metrics[name] for name in answered]).reshape(len(answered), -1)
            if answered
            else np.zeros((0, len(METRICS))),
            **{f"head.{name}": value for name, value in current.arrays.items()},
            **{f"strategy.{name}": value for name, value in remembered.items()},
            **{f"counts.{row}": value.numpy() for row, value in enumerate(progress.counts.values())},
            **{f"losses.{one.number}": one.losses for one in best.candidates},
        }
        if progress.mapping is not None:
            values["map"] = progress.mapping.values
            arrays |= {f"map.{name}": value for name, value in progress.mapping.arrays.items()}
        if progress.standardisation is not None:
            arrays |= zip(("mean", "scale"), (part.numpy() for part in progress.standardisation), strict=True)
        if progress.target_standardisation is not None:
            parts = (part.numpy() for part in progress.target_standardisation)
            arrays |= zip(("target_mean", "target_scale"), parts, strict=True)
        return values, arrays

    def _progress(self, values: Mapping[str, Any], arrays: Arrays) -> Progress:
        made_by = Exchange(
            metrics=dict(zip(values["answered"], arrays["metrics"], strict=True)),
            dropped=values["dropped"],
            joined=values["joined"],
            bytes_down=values["bytes"][0],
            bytes_up=values["bytes"][1],
            summed=tuple(values.get("summed", ())),
        )
        self._heads = dict(values["candidates"])
        files = {file: _read(self._path / file)[1] for file in sorted(set(self._heads.values()))}
        candidates = [
            Candidate(
                number,
                {name: files[file][f"{number}.{name}"] for name in values["names"]},
                arrays[f"losses.{number}"],
            )
            for number, file in self._heads.items()
        ]
        head = {name: arrays[f"head.{name}"] for name in values["names"]}
        stats = None
        if values["statistics"]:
            stats = FeatureStatistics.load(self._path / "statistics.safetensors")
            self._statistics_written = True
        return Progress(
            current=Version(values["number"], head, made_by, values["seconds"]),
            best=BestCheckpoint(None if values["common"] is None else tuple(values["common"]), candidates),
            excluded=values["excluded"],
            sites=values["sites"],
            counts={name: torch.from_numpy(arrays[f"counts.{row}"]) for row, name in enumerate(values["counts"])},
            stats=stats,
            standardisation=_pair(arrays, "mean", "scale"),
            target_standardisation=_pair(arrays, "target_mean", "target_scale"),
            mapping=_map_in(values, arrays),
            settled=values.get("settled", {}),
            choices=values.get("choices", []),
            full_model_bytes=values["full_model_bytes"],
            traffic=Traffic.from_dict(values["traffic"]),
            history=self._folder.rewind(values["history"]),
        )


def _map_in(values: Mapping[str, Any], arrays: Arrays) -> MapRequest | None:
    if "map" not in values:
        return None
    moments = {name.removeprefix("map."): array for name, array in arrays.items() if name.startswith("map.")}
    return MapRequest(**values["map"], arrays=moments)


def _pair(arrays: Arrays, *names: str) -> tuple[Tensor, Tensor] | None:
    if names[0] not in arrays:
        return None
    first, second = (torch.from_numpy(arrays[name]) for name in names)
    return first, second


def new_run() -> str:
    """Return a new identifier of a run."""
    return uuid.uuid4().hex


def config_digest(config: RunConfig) -> str:
    """Return the SHA-256 of the settings that decide a run's result."""
    values = config.model_dump(mode="json", exclude=set(OPERATIONAL))
    # Runs of earlier versions had no such table.
    if config.privacy == PrivacyConfig():
        del values["privacy"]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def require_same_run(config: RunConfig, saved: RunConfig, path: Path) -> None:
    """Raise unless two configurations give the same result.

    Raises:
        UserError: naming the settings that differ.
    """
    if config_digest(config) == config_digest(saved):
        return
    asked, before = config.model_dump(mode="json"), saved.model_dump(mode="json")
    changed = [name for name in asked if asked[name] != before[name] and name not in OPERATIONAL]
    raise UserError(
        f"A run is resumed as it was started, and {', '.join(changed)} would change for {path}; leave the settings out "
        "(its run.toml has them), or start a new run."
    )


def _pack(values: Mapping[str, Any], arrays: Arrays) -> bytes:
    """Return a safetensors file of values and arrays, with a digest over both."""
    text = json.dumps(values)
    packed = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return save(packed, {"format": FORMAT, "values": text, "sha256": _digest(text, packed)})


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Undo `_pack`.

    Raises:
        UserError: if it is missing, damaged or of another format.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"The checkpoint {path} cannot be read ({error}); start the run again.") from None
    if metadata.get("format") != FORMAT:
        raise UserError(
            f"{path} is no checkpoint that this version of fedhead reads; resume with the one that wrote it."
        )
    if metadata.get("sha256") != _digest(metadata["values"], arrays):
        raise UserError(f"The checkpoint {path} is damaged: its digest differs. Start the run again.")
    values: dict[str, Any] = json.loads(metadata["values"])
    return values, arrays


def _digest(text: str, arrays: Arrays) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"\0{name}\0{array.dtype.str}\0{list(arrays[name].shape)}\0".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
