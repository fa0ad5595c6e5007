"""`npz:FILE`: NumPy archives with `images` and `labels`, MedMNIST's among them; rows are read one at a time.

| arrays | hold |
|---|---|
| `images` | `[n, H, W]`, `[n, H, W, C]` or `[n, C, H, W]` with 1, 3 or 4 channels, of any type for `to_image` |
| `texts` | `[n]` strings, instead of images |
| `features` | `[n, d]` numbers, instead of images; their names in `columns` |
| `clips`, `rate` | `[n, length]` samples, instead of images, and samples per second; `lengths` `[n]` cuts padding off |
| `labels` | `[n]` or `[n, 1]` numbers or names; or `[n, C]` of 0 and 1, multi-label |
| `targets` | `[n]` or `[n, K]` real targets, instead of labels; another array as in `?target=NAME` |
| `classes`, `groups`, `sites` | the names of the classes; for each row its group and its site |
| `train_images`, `train_labels`, ... | the same by split, as MedMNIST names them; or Keras' `x_train`, `y_train` |
"""

import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from fedhead.data.images import White, has_wide_integers, to_image, white_of
from fedhead.data.items import Clip, Columns, FloatArray, IntArray, Item, Kind, TableRow, UnreadableSampleError
from fedhead.data.labels import index_labels, names_of
from fedhead.data.npz_rows import Rows, load_array, open_rows
from fedhead.data.numbers import warn_of_constants
from fedhead.data.samples import Former, LeftOut, Samples, choose_split, sources
from fedhead.data.sounds import to_clip
from fedhead.data.specs import join_options, split_options, to_path
from fedhead.data.texts import plain_text
from fedhead.errors import UserError

CONTENT = ("images", "texts", "features", "clips", "x")
LABELS = {"images": "labels", "texts": "labels", "features": "labels", "clips": "labels", "x": "y"}
TARGETS = ("targets", "target")


@sources.register("npz")
def load_npz(argument: str) -> Samples:
    """A NumPy archive of images, texts, clips or numbers, with labels or targets; options `split` and `target`."""
    spec = f"npz:{argument}"
    given, options = split_options(argument, {"split", "target"}, spec)
    if not given:
        raise UserError("Expected a file, as in npz:bloodmnist.npz.")
    path = to_path(given).absolute()
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    members = _members(path)
    parts = _parts(path, set(members), options.get("target"))
    real = _holds_targets(next(iter(parts.values()))[1], options)
    rows, annotations = _open_parts(path, parts, real=real)
    white = _white(rows)
    lengths = [len(part) for part in annotations]
    if list(parts) == [""] and "split" in options:
        raise UserError(f"{path} has no splits to choose from; it has {', '.join(sorted(members))}.")
    splits = None
    if list(parts) != [""]:
        splits = [name for name, length in zip(parts, lengths, strict=True) for _ in range(length)]
    chosen = np.arange(sum(lengths)) if splits is None else choose_split(splits, options.get("split"), spec)
    groups = _named_rows(path, "groups", sum(lengths), chosen) if "groups" in members else None
    sites = _sites(path, sum(lengths), chosen) if "sites" in members else None
    together = np.concatenate(annotations)[chosen]
    classes, labels, targets = _annotated(path, together, "classes" in members, real, spec)
    content = next(iter(parts.values()))[0]
    columns = _columns(path, "columns" in members, rows) if content.endswith("features") else ()
    sound = _sound(path, members, sum(lengths)) if content.endswith("clips") else None
    archived = ArchivedRows(
        path, tuple(rows), np.cumsum([0, *lengths]), chosen, tuple(parts), Columns(columns), white, sound
    )
    kind: Kind = "text" if content.endswith("texts") else "table" if columns else "audio" if sound else "image"
    readers: dict[Kind, Callable[[int], Item]] = {
        "image": archived.read_image,
        "text": archived.read_text,
        "table": archived.read_numbers,
        "audio": archived.read_clip,
    }
    described = repr((sorted(members.items()), sorted(options.items())))
    before = sha256(described.encode(errors="surrogatepass")).hexdigest()
    read_otherwise = Former(before, fault=partial(str, "integers of this type are converted differently since"))
    used = {name for pair in parts.values() for name in pair} | {"classes", "groups", "sites", "columns"}
    used |= {"rate", "lengths"} if sound else set()
    return Samples(
        spec=f"npz:{join_options(str(path), options)}",
        classes=classes,
        labels=labels,
        read=readers[kind],
        name=archived.name,
        fingerprint=before if white is None else sha256(f"{described} {white}".encode()).hexdigest(),
        groups=groups,
        sites=sites,
        splits=None if splits is None else [splits[row] for row in chosen],
        kind=kind,
        targets=targets,
        target_names=_target_names(next(iter(parts.values()))[1], targets),
        columns=columns,
        former=None if white is None else read_otherwise,
        left_out=_unused_arrays(sorted(set(members) - used)),
    )


def _open_parts(
    path: Path, parts: Mapping[str, tuple[str, str]], *, real: bool
) -> tuple[list[Rows], list[npt.NDArray[Any]]]:
    """Open the rows of each part, and read its labels or real targets.

    Raises:
        UserError: if they do not fit each other.
    """
    rows = [open_rows(path, content) for content, _ in parts.values()]
    annotations = [(_targets if real else _labels)(path, named) for _, named in parts.values()]
    for (content, named), stored, part in zip(parts.values(), rows, annotations, strict=True):
        if stored.shape[0] != len(part):
            raise UserError(f"{path} has {stored.shape[0]} rows in {content!r} but {len(part)} in {named!r}.")
    if len({part.shape[1:] for part in annotations}) > 1:
        raise UserError(f"{path} mixes kinds of labels: {', '.join(named for _, named in parts.values())}.")
    return rows, annotations


def _named_rows(path: Path, array: str, rows: int, chosen: IntArray) -> list[str | None]:
    """Return the name that an array holds for each chosen row."""
    values = load_array(path, array)
    if values.shape != (rows,):
        raise UserError(f"{path} has {array!r} of shape {list(values.shape)}; expected [{rows}].")
    return names_of(values[chosen].tolist())


def _sites(path: Path, rows: int, chosen: IntArray) -> list[str]:
    sites = _named_rows(path, "sites", rows, chosen)
    if None in sites:
        raise UserError(f"{path} has no site for row {sites.index(None)}, although 'sites' has one for other rows.")
    return [str(site) for site in sites]


def _unused_arrays(names: list[str]) -> tuple[LeftOut, ...]:
    things = "arrays" if len(names) > 1 else "array"
    reason = "no known purpose"
    return (LeftOut(len(names), things, reason, tuple(names[:5]), warned=False),) if names else ()


def _white(arrays: Sequence[Rows]) -> White | None:
    """Return the value of white in all integers whose type does not determine it; None for other types."""
    wide = [array for array in arrays if len(array.shape) > 2 and has_wide_integers(array.dtype)]
    if not wide:
        return None
    bright = any(white_of(array.read(row)) > 255 for array in wide for row in range(array.shape[0]))
    return 65535 if bright else 255


def _members(path: Path) -> dict[str, tuple[int, int]]:
    """Return each array's checksum and size by name."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {
                member.filename.removesuffix(".npy"): (member.CRC, member.file_size)
                for member in archive.infolist()
                if member.filename.endswith(".npy")
            }
    except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
        raise UserError(f"{path} is not a NumPy archive or is damaged: {error}.") from None


def _holds_targets(array: str, options: dict[str, str]) -> bool:
    return "target" in options or array.endswith(TARGETS)


def _annotated(
    path: Path, together: npt.NDArray[Any], named: bool, real: bool, spec: str
) -> tuple[tuple[str, ...], IntArray, FloatArray | None]:
    """Return class names and labels, or the targets."""
    if real:
        return (), np.zeros(len(together), dtype=np.int64), together
    classes = [str(name) for name in load_array(path, "classes").tolist()] if named else None
    return *index_labels(together if together.ndim == 1 else list(together), classes, spec), None


def _target_names(array: str, targets: FloatArray | None) -> tuple[str, ...]:
    if targets is None:
        return ()
    if targets.shape[1] == 1:
        return (array,)
    return tuple(f"{array}[{position}]" for position in range(targets.shape[1]))


def _columns(path: Path, named: bool, rows: list[Rows]) -> tuple[str, ...]:
    """Return the names of the numbers in each row: from the array `columns`, or else their positions."""
    widths = {one.shape[1] for one in rows}
    if len(widths) > 1:
        raise UserError(f"{path} has features of different widths in its splits: {sorted(widths)}.")
    width = widths.pop()
    if not named:
        return tuple(f"x{position}" for position in range(width))
    columns = tuple(str(name) for name in load_array(path, "columns").tolist())
    if len(columns) != width or len(set(columns)) != width:
        raise UserError(f"{path} names {len(set(columns))} different columns for {width} numbers per row.")
    return columns


@dataclass(frozen=True)
class Sound:
    """The arrays that describe clips.

    Attributes:
        rate: samples per second.
        lengths: `[all rows]`, the number of samples of each clip; None for the array's own length.
    """

    rate: int
    lengths: IntArray | None


def _sound(path: Path, members: Collection[str], rows: int) -> Sound:
    if "rate" not in members:
        raise UserError(f"{path} has clips but no array 'rate'; add one number, the samples per second.")
    rate = load_array(path, "rate").reshape(-1)
    if len(rate) != 1 or rate.dtype.kind not in "iuf" or not float(rate[0]).is_integer():
        raise UserError(f"The array 'rate' of {path} is not one whole number, the samples per second.")
    if "lengths" not in members:
        return Sound(int(rate[0]), None)
    lengths = load_array(path, "lengths")
    if lengths.shape != (rows,) or lengths.dtype.kind not in "iu" or (lengths < 0).any():
        raise UserError(f"{path} has 'lengths' of shape {list(lengths.shape)}; expected [{rows}] numbers of samples.")
    return Sound(int(rate[0]), lengths.astype(np.int64))


@dataclass(frozen=True)
class ArchivedRows:
    """Rows of the arrays of an archive, concatenated.

    Attributes:
        path: the path of the archive.
        arrays: the rows' content, by split.
        starts: the first row of each array, and the total number of rows.
        chosen: `[n]`, the selected rows.
        splits: the arrays' names.
        columns: the names of the numbers in each row, for rows of numbers.
        white: the value of white in integers whose type does not determine it.
        sound: the rate and lengths of clips.
    """

    path: Path
    arrays: tuple[Rows, ...]
    starts: IntArray
    chosen: IntArray
    splits: tuple[str, ...]
    columns: Columns
    white: White | None
    sound: Sound | None = None

    def _find(self, row: int) -> tuple[int, int]:
        number = int(self.chosen[row])
        array = int(np.searchsorted(self.starts, number, side="right")) - 1
        return array, number - int(self.starts[array])

    def read_image(self, row: int) -> Image.Image:
        array, number = self._find(row)
        return to_image(self.arrays[array].read(number), self.name(row), self.white)

    def read_text(self, row: int) -> str:
        array, number = self._find(row)
        return plain_text(str(self.arrays[array].read(number)), self.name(row))

    def read_numbers(self, row: int) -> Item:
        array, number = self._find(row)
        values = np.asarray(self.arrays[array].read(number), dtype=np.float64)
        if not np.isfinite(values).all():
            name = self.columns.names[int(np.argmin(np.isfinite(values)))]
            raise UnreadableSampleError(f"{self.name(row)} has no finite number in the column {name!r}.")
        return TableRow(self.columns, values)

    def read_clip(self, row: int) -> Clip:
        assert self.sound is not None
        array, number = self._find(row)
        samples = self.arrays[array].read(number)
        if self.sound.lengths is not None:
            samples = samples[: self.sound.lengths[int(self.chosen[row])]]
        return to_clip(samples, self.sound.rate, self.name(row))

    def name(self, row: int) -> str:
        array, number = self._find(row)
        return f"{self.path}, {self.splits[array]} row {number}".replace("  ", " ")


def _parts(path: Path, arrays: set[str], target: str | None) -> dict[str, tuple[str, str]]:
    """Return the arrays of content and of labels or targets by split; without splits, one split with an empty name."""
    for content in CONTENT:
        annotations = (target,) if target else (LABELS[content], *TARGETS)
        for named in annotations:
            if arrays.issuperset((content, named)):
                return {"": (content, named)}
            found = {}
            for split in ("train", "val", "valid", "validation", "test"):
                for pair in ((f"{split}_{content}", f"{split}_{named}"), (f"{content}_{split}", f"{named}_{split}")):
                    if arrays.issuperset(pair):
                        found[split] = pair
            if found:
                return found
    wanted = f"{target!r}, as in the option target" if target else "'labels' (or 'targets')"
    raise UserError(
        f"{path} has no arrays 'images' (or 'texts', 'features' or 'clips') and {wanted}, nor 'train_images' and "
        f"'train_labels'; it has {', '.join(map(repr, sorted(arrays))) or 'none'}."
    )


def _targets(path: Path, name: str) -> FloatArray:
    """Return real targets `[n, K]`."""
    targets = load_array(path, name)
    if targets.ndim not in (1, 2) or targets.dtype.kind not in "biuf" or 0 in targets.shape[1:]:
        raise UserError(
            f"The targets {name!r} of {path} are {targets.dtype} of shape {list(targets.shape)}; expected [n] or "
            "[n, targets] numbers."
        )
    if len(targets) == 0:
        raise UserError(f"npz:{path} has no rows.")
    targets = targets.reshape(len(targets), -1).astype(np.float64)
    if not np.isfinite(targets).all():
        row = int(np.argmin(np.isfinite(targets).all(1)))
        raise UserError(f"Row {row} of the targets {name!r} of {path} is not a finite number; remove or correct it.")
    warn_of_constants(targets, [name] * targets.shape[1], f"npz:{path}")
    return targets


def _labels(path: Path, name: str) -> npt.NDArray[Any]:
    labels = load_array(path, name)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dtype.kind == "f":
        if not np.isfinite(labels).all():
            raise UserError(f"The labels {name!r} of {path} are not all finite numbers.")
        if (labels != np.rint(labels)).any():
            raise UserError(f"The labels {name!r} of {path} are not whole numbers; expected class numbers or names.")
        labels = labels.astype(np.int64)
    if labels.ndim not in (1, 2) or labels.dtype.kind not in "biuU":
        raise UserError(
            f"The labels {name!r} of {path} are {labels.dtype} of shape {list(labels.shape)}; expected [n] numbers or "
            "names, or [n, classes] of 0 and 1."
        )
    return labels
