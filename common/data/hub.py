"""`hf:NAME-OR-FOLDER`: data sets of Hugging Face's `datasets`, from a folder or from an earlier download."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedhead.data.conversion import files_named
from fedhead.data.files import stamp
from fedhead.data.samples import Former, Samples, sources
from fedhead.data.specs import join_options, split_options, to_path
from fedhead.data.table_columns import COLUMNS
from fedhead.data.tables import OPTIONS, samples_of_table
from fedhead.errors import UserError
from fedhead.extras import require


@sources.register("hf")
def load_hub(argument: str) -> Samples:
    """A data set by its name on the hub, or a folder: of `save_to_disk`, or of Parquet, CSV or image files.

    Columns with images, sounds, texts and class names are found by type; if there are several, the options of tables
    name them. `config` names one of several configurations. The hub is contacted only with `download=yes`.

    Raises:
        UserError: if it is missing or unreadable, has no suitable columns, or `datasets` is not installed.
    """
    spec = f"hf:{argument}"
    given, options = split_options(argument, {*OPTIONS, "config", "download"} - {"root"}, spec)
    if not given:
        raise UserError("Expected a name or a folder, as in hf:beans or hf:/data/beans.")
    require("datasets", "datasets", f"The data {spec!r}")
    config, download = options.pop("config", None), options.pop("download", "no").casefold()
    if download not in ("yes", "no"):
        raise UserError(f"The option download of {spec!r} must be yes or no, not {download!r}.")
    folder = to_path(given)
    if not folder.exists() and (folder.is_absolute() or given.startswith((".", "~"))):
        raise UserError(f"There is no folder {folder}.")
    name = str(folder.absolute()) if folder.exists() else given
    table = HubTable(name, _load(name, config, download == "yes", spec))
    if len(table) == 0:
        raise UserError(f"{spec} has no rows.")
    kept = {**({"config": config} if config else {}), **options}
    whole = f"hf:{join_options(name, kept)}"
    return samples_of_table(table, {**_typed_columns(table, options), **options}, whole)


class HubTable:
    """The splits of a data set, concatenated; a column `split` names them.

    Attributes:
        path: the name or the folder of the data set.
        parts: its splits.
        columns: the names of its columns.
        fingerprint: of the files with its rows.
        former: the fingerprint of the previous version.
    """

    def __init__(self, name: str, parts: Mapping[str, Any]) -> None:
        self.path = Path(name)
        self.parts = dict(parts)
        first = next(iter(self.parts.values()))
        self.columns = (*(column for column in first.column_names if column != "split"), "split")
        self._starts = np.cumsum([0, *map(len, self.parts.values())])
        files = {split: [Path(entry["filename"]) for entry in part.cache_files] for split, part in self.parts.items()}
        stamps = {path: stamp(path) for paths in files.values() for path in paths}

        def fingerprint(one: Callable[[Path], Any]) -> str:
            described = [
                [split, part.num_rows, part._fingerprint, [one(path) for path in files[split]]]
                for split, part in self.parts.items()
            ]
            return hashlib.sha256(repr(described).encode()).hexdigest()

        self.fingerprint = fingerprint(lambda path: (str(path), str(stamps[path])))
        before = fingerprint(lambda path: (str(path), stamps[path].size, stamps[path].modified))
        self.former = Former(before, max((one.changed for one in stamps.values()), default=0))

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def features(self) -> Mapping[str, Any]:
        """The types of its columns."""
        features: Mapping[str, Any] = next(iter(self.parts.values())).features
        return features

    def values(self, names: Sequence[str]) -> list[list[Any]]:
        return [self._column(name) for name in names]

    def _column(self, name: str) -> list[Any]:
        if name == "split":
            return [split for split, part in self.parts.items() for _ in range(len(part))]
        named = _namer(self.features[name])
        return [named(value) for part in self.parts.values() for value in part.with_format(None)[name]]

    def named_files(self, name: str) -> Mapping[int, str]:
        parts = [_undecoded(part, name) for part in self.parts.values()]
        if all(len(part) == 0 or _has_all_bytes(part, name) for part in parts):
            return {}
        return files_named(value for part in parts for value in part[name])

    def cells(self, name: str) -> Callable[[int], Any]:
        return HubCells(tuple(_undecoded(part, name) for part in self.parts.values()), name, self._starts).read

    def place(self, row: int) -> str:
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        return f"{self.path}, {list(self.parts)[part]} row {row - int(self._starts[part])}"


@dataclass(frozen=True)
class HubCells:
    """One column, read cell by cell."""

    parts: tuple[Any, ...]
    name: str
    starts: Any

    def read(self, row: int) -> Any:
        part = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.parts[part][row - int(self.starts[part])][self.name]


def _load(name: str, config: str | None, download: bool, spec: str) -> Mapping[str, Any]:
    import datasets

    folder = Path(name)
    try:
        with _quietly(datasets, download):
            if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
                loaded = datasets.load_from_disk(name)
            else:
                loaded = datasets.load_dataset(name, config)
    # `datasets` may raise any error for missing or inconsistent files.
    except Exception as error:
        if folder.exists():
            raise UserError(f"{name} cannot be read as a data set: {_first_line(error)}.") from None
        advice = (
            ""
            if download
            else f" It was not downloaded completely before. To download it from the hub: '{spec}"
            f"{'&' if '?' in spec else '?'}download=yes'; or give a folder that contains it."
        )
        raise UserError(f"The data set {name!r} cannot be loaded: {_first_line(error)}.{advice}") from None
    return loaded if isinstance(loaded, dict) else {str(loaded.split or "all"): loaded}


@contextmanager
def _quietly(datasets: Any, download: bool) -> Iterator[None]:
    """Keep `datasets` off the network unless a download is requested, and off the terminal."""
    offline, shown = datasets.config.HF_HUB_OFFLINE, datasets.is_progress_bar_enabled()
    level = datasets.logging.get_verbosity()
    datasets.config.HF_HUB_OFFLINE = offline or not download
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()


def _typed_columns(table: HubTable, options: Mapping[str, str]) -> dict[str, str]:
    """Return the columns found by type: one of images, sounds or texts, and one of class names."""
    import datasets

    found: dict[str, str] = {}
    images = [name for name, kind in table.features.items() if isinstance(kind, datasets.Image)]
    sounds = [name for name, kind in table.features.items() if isinstance(kind, datasets.Audio)]
    classes = [name for name, kind in table.features.items() if _class_label(kind) is not None]
    if not options.keys() & {"label", "target"} and len(classes) == 1:
        found["label"] = classes[0]
    if options.keys() & {"path", "image", "audio", "text", "features", "kind"}:
        return found
    label = options.get("label", found.get("label", "label"))
    texts = [name for name, kind in table.features.items() if getattr(kind, "dtype", "") in ("string", "large_string")]
    texts = [name for name in texts if name not in (label, *COLUMNS["label"], "group", "site", "split")]
    if len(images) == 1:
        found["image"] = images[0]
    elif not images and len(sounds) == 1:
        found["audio"] = sounds[0]
    elif not images and len(texts) == 1 and texts[0] not in COLUMNS["path"]:
        found["text"] = texts[0]
    return found


def _class_label(kind: Any) -> Any:
    """Return the type of the class numbers in a column, or in a column of lists; None for other columns."""
    import datasets

    inner = kind[0] if isinstance(kind, list) else getattr(kind, "feature", kind)
    return inner if isinstance(inner, datasets.ClassLabel) else None


def _namer(kind: Any) -> Callable[[Any], Any]:
    label = _class_label(kind)
    if label is None:
        return lambda value: value

    def named(value: Any) -> Any:
        if isinstance(value, list):
            return [label.names[one] for one in value]
        return None if value is None or value < 0 else label.names[value]

    return named


def _undecoded(part: Any, column: str) -> Any:
    """Return one column of a split, with images and sounds as file bytes, so that all are decoded in the same way."""
    import datasets

    part = part.with_format(None).select_columns([column])
    kind = part.features[column]
    for encoded in (datasets.Image, datasets.Audio):
        if isinstance(kind, encoded):
            return part.cast_column(column, encoded(decode=False))
    return part


def _has_all_bytes(part: Any, name: str) -> bool:
    """Return whether every image or sound of a column has its bytes, without reading them."""
    column = part.data.column(name)
    try:
        return bool(column.combine_chunks().field("bytes").null_count == 0)
    except (AttributeError, KeyError, TypeError):
        return False


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
