"""`features:FILE`: embeddings of a pipeline of one's own, as data and backbone in one spec (npz, parquet, h5).

The file has `features` `[n, d]`, `labels` or `targets`, and perhaps `bags`, `groups`, `sites` and `classes`: arrays of
an archive or data sets of HDF5, or in Parquet the columns `features` (a list of numbers in each row), `label` or
`target`, `bag`, `group` and `site`. Rows of one bag, such as the patches of a slide, become one row: their mean.
Options name other arrays or columns: `features:uni.h5?features=embedding&label=diagnosis&bag=slide`; `group_by=sex`
names that of subgroups, by which a run divides its metrics.
"""

import hashlib
import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from fedhead.data.arrays import samples_from_numbers
from fedhead.data.files import stamp
from fedhead.data.items import FloatArray, IntArray
from fedhead.data.labels import names_of
from fedhead.data.samples import Samples, sources
from fedhead.data.specs import join_options, split_options, to_path
from fedhead.errors import UserError
from fedhead.extras import require
from fedhead.wording import quoted

MOST_BYTES = 2**36
"""Size that the arrays of a file may have in memory; a small file can state any."""

SUFFIXES = (".npz", ".parquet", ".h5", ".hdf5")

_SINGULAR = {
    "labels": "label",
    "targets": "target",
    "bags": "bag",
    "groups": "group",
    "sites": "site",
    "subgroups": "group_by",
}
_DAMAGE: tuple[type[Exception], ...] = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    KeyError,
    MemoryError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
_WHOLE_BAG = ("labels", "targets", "groups", "sites", "subgroups")


@sources.register("features")
def load_features(argument: str) -> Samples:
    """Embeddings in a NumPy archive, a Parquet or an HDF5 file (extra `h5`), with labels or targets; bags by mean."""
    spec = f"features:{argument}"
    given, options = split_options(argument, {"features", *_SINGULAR.values()}, spec)
    path = to_path(given).absolute()
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{spec} names {path.name!r}; expected a file with a suffix of {', '.join(SUFFIXES)}.")
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    if options.get("group_by") in (options.get("label", "labels"), options.get("target", "targets")):
        raise UserError(
            f"The array {options['group_by']!r} of {path} is to be predicted, so it cannot name subgroups as well. "
            "Name another one as in ?group_by=sex."
        )
    wanted = {array: options[option] for array, option in _SINGULAR.items() if option in options}
    arrays = _read(path, {"features": options.get("features", "features"), **wanted})
    samples = _samples(path, arrays, f"features:{join_options(str(path), options)}")
    # Subgroups change no feature, and the stamp changes with their values.
    deciding = sorted((name, value) for name, value in options.items() if name != "group_by")
    described = repr((samples.fingerprint, str(stamp(path)), deciding))
    return replace(samples, fingerprint=hashlib.sha256(described.encode(errors="surrogatepass")).hexdigest())


def _samples(path: Path, arrays: Mapping[str, npt.NDArray[Any]], spec: str) -> Samples:
    if "features" not in arrays:
        raise UserError(f"{path} has no array 'features'; name another one as in ?features=embedding.")
    features = _table(arrays["features"], path)
    if "labels" in arrays and "targets" in arrays:
        raise UserError(f"{path} has labels and targets; name one of them, as in ?target=age, and remove the other.")
    for name, array in arrays.items():
        if array.ndim == 0:
            raise UserError(f"The {name} of {path} are a single value; expected one for each row.")
    annotations = {name: arrays[name] for name in _WHOLE_BAG if name in arrays}
    if not {"labels", "targets"} & annotations.keys():
        raise UserError(f"{path} has neither 'labels' nor 'targets'; name another array as in ?label=diagnosis.")
    for name, array in {**annotations, **({"bags": arrays["bags"]} if "bags" in arrays else {})}.items():
        if len(array) != len(features):
            raise UserError(f"{path} has {len(features)} rows of features but {len(array)} {name}.")
    if "bags" in arrays:
        features, annotations = _pooled(features, annotations, arrays["bags"], path)
    classes = [str(name) for name in arrays["classes"].tolist()] if "classes" in arrays else None
    return samples_from_numbers(
        features,
        annotations.get("labels"),
        classes=classes,
        groups=annotations.get("groups"),
        sites=annotations.get("sites"),
        targets=annotations.get("targets"),
        subgroups=annotations.get("subgroups"),
        spec=spec,
    )


def _table(features: npt.NDArray[Any], path: Path) -> FloatArray:
    if features.dtype == object and len(features):
        if not all(row is None or isinstance(row, np.ndarray | list) for row in features):
            raise UserError(f"The features of {path} are no lists; expected a list of numbers in each row.")
        widths = {len(row) for row in features if row is not None}
        if len(widths) != 1 or any(row is None for row in features):
            raise UserError(f"The features of {path} have the widths {sorted(widths)[:5]}; expected one in every row.")
        try:
            features = np.stack(list(features))
        except ValueError:
            raise UserError(f"The features of {path} are ragged; expected a list of numbers in each row.") from None
    if not len(features):
        raise UserError(f"The features of {path} have no rows.")
    if features.ndim != 2 or 0 in features.shape or features.dtype.kind not in "biuf":
        raise UserError(f"The features of {path} have shape {list(features.shape)}; expected [n, d] numbers.")
    table = features.astype(np.float64)
    if not np.isfinite(table).all():
        raise UserError(f"Row {int(np.argmin(np.isfinite(table).all(1)))} of the features of {path} is not finite.")
    return table


def _pooled(
    features: FloatArray, annotations: Mapping[str, npt.NDArray[Any]], bags: npt.NDArray[Any], path: Path
) -> tuple[FloatArray, dict[str, npt.NDArray[Any]]]:
    """Return the mean of each bag, in the order of the bags' first rows, and its annotations.

    Raises:
        UserError: if a row has no bag, or the rows of a bag have different annotations.
    """
    names = names_of(bags.tolist())
    if None in names:
        raise UserError(f"Row {names.index(None)} of {path} has no bag, although other rows do.")
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    owners: IntArray = np.array([places[name] for name in names], dtype=np.int64)
    _, first, counts = np.unique(owners, return_index=True, return_counts=True)
    sums = np.zeros((len(places), features.shape[1]))
    np.add.at(sums, owners, features)
    for name, array in annotations.items():
        if array.dtype == object and any(isinstance(value, np.ndarray | list) for value in array):
            raise UserError(f"The {name} of {path} are lists; rows of bags need a single value each.")
        differs = array != array[first[owners]]
        if (differs if differs.ndim == 1 else differs.any(1)).any():
            row = int(np.argmax(differs if differs.ndim == 1 else differs.any(1)))
            raise UserError(f"Row {row} of {path} has other {name} than the first row of its bag {names[row]!r}.")
    return sums / counts[:, None], {name: array[first] for name, array in annotations.items()}


def _read(path: Path, wanted: Mapping[str, str]) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of a file under their usual names, given their names in the file."""
    readers = {".npz": _read_npz, ".parquet": _read_parquet}
    try:
        return readers.get(path.suffix.lower(), _read_h5)(path, wanted)
    except UserError:
        raise
    except _DAMAGE + _arrow_errors() as error:
        # A KeyError's own text is in quotes, and Arrow's may have many lines.
        said = str(error.args[0] if isinstance(error, KeyError) and error.args else error).partition("\n")[0]
        raise UserError(f"{path} cannot be read: {said.rstrip('.') or type(error).__name__}.") from None


def _arrow_errors() -> tuple[type[Exception], ...]:
    try:
        import pyarrow
    except ImportError:
        return ()
    return (pyarrow.ArrowException,)


def _require_size(size: int, path: Path) -> None:
    if size > MOST_BYTES:
        raise UserError(f"{path} states {size} bytes of arrays; a file may have {MOST_BYTES} at most.")


def _find(held: Sequence[str], wanted: Mapping[str, str], path: Path) -> dict[str, str]:
    """Return the name in the file of each known array that it has."""
    for name in wanted.values():
        if name not in held and name != "features":
            raise UserError(f"{path} has no {name!r}; it has {quoted(list(held))}.")
    found = dict(wanted)
    if "labels" in wanted or "targets" in wanted:
        usual: Sequence[str] = ("bags", "groups", "sites", "classes")
    else:
        usual = ("labels", "targets", "bags", "groups", "sites", "classes")
    for array in usual:
        present = next((one for one in (array, _SINGULAR.get(array, array)) if one in held), None)
        if array not in found and present is not None:
            found[array] = present
    return {array: name for array, name in found.items() if name in held}


def _read_npz(path: Path, wanted: Mapping[str, str]) -> dict[str, npt.NDArray[Any]]:
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} cannot be read: it is not a NumPy archive, or is damaged.")
    with np.load(path, allow_pickle=False) as archive:
        found = _find(archive.files, wanted, path)
        members = set(archive.zip.namelist())
        size = 0
        for name in found.values():
            with archive.zip.open(name if name in members else f"{name}.npy") as file:
                size += _stated_size(file)
        _require_size(size, path)
        return {array: archive[name] for array, name in found.items()}


def _stated_size(file: IO[bytes]) -> int:
    """Return the size in bytes that the header of an array in NumPy's format states."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return math.prod(shape) * dtype.itemsize


def _read_parquet(path: Path, wanted: Mapping[str, str]) -> dict[str, npt.NDArray[Any]]:
    require("pyarrow", "parquet", f"Reading {path}")
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        found = _find(names, wanted, path)
        for name in found.values():
            if names.count(name) > 1:
                raise UserError(f"{path} has {names.count(name)} columns {name!r}; expected one.")
        groups = (file.metadata.row_group(number) for number in range(file.metadata.num_row_groups))
        _require_size(sum(group.total_byte_size for group in groups), path)
        table = file.read(columns=list(dict.fromkeys(found.values())))
    return {array: table[name].to_numpy(zero_copy_only=False) for array, name in found.items()}


def _read_h5(path: Path, wanted: Mapping[str, str]) -> dict[str, npt.NDArray[Any]]:
    """Read data sets that are in this file: links, external storage and virtual data sets read other files."""
    h5py = require("h5py", "h5", f"Reading {path}")
    with h5py.File(path, "r") as file:
        hard = [name for name in file if isinstance(file.get(name, getlink=True), h5py.HardLink)]
        for name in wanted.values():
            if name in file and not isinstance(file.get(name.split("/")[0], getlink=True), h5py.HardLink):
                raise UserError(f"{name!r} in {path} is a link; expected a data set in the file itself.")
        found = _find([name for name in hard if isinstance(file[name], h5py.Dataset)], wanted, path)
        held = {array: file[name] for array, name in found.items()}
        for array, data in held.items():
            if data.external is not None or data.is_virtual:
                raise UserError(
                    f"The {array} of {path} are stored in other files; expected a data set in the file itself."
                )
            if data.shape is None or data.shape == ():
                raise UserError(f"The {array} of {path} are empty or a single value; expected one for each row.")
        _require_size(sum(math.prod(data.shape) * data.dtype.itemsize for data in held.values()), path)
        return {
            array: data.asstr()[:] if h5py.check_string_dtype(data.dtype) else data[:] for array, data in held.items()
        }
