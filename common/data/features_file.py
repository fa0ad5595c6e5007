"""`features:FILE`: embeddings of a pipeline of one's own, as data and backbone in one spec (npz, parquet, h5).

The file has `features` `[n, d]`, `labels` or `targets`, and perhaps `bags`, `groups`, `sites` and `classes`: arrays of
an archive or data sets of HDF5, or in Parquet the columns `features` (a list of numbers in each row), `label` or
`target`, `bag`, `group` and `site`. Rows of one bag, such as the patches of a slide, become one row: their mean.
Options name other arrays or columns: `features:uni.h5?features=embedding&label=diagnosis&bag=slide`.
"""

import hashlib
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

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

SUFFIXES = (".npz", ".parquet", ".h5", ".hdf5")

_SINGULAR = {"labels": "label", "targets": "target", "bags": "bag", "groups": "group", "sites": "site"}
_WHOLE_BAG = ("labels", "targets", "groups", "sites")


@sources.register("features")
def load_features(argument: str) -> Samples:
    """Embeddings in a NumPy archive, a Parquet or an HDF5 file (extra `h5`), with labels or targets; bags by mean."""
    spec = f"features:{argument}"
    given, options = split_options(argument, {"features", "label", "target", "bag", "group", "site"}, spec)
    path = to_path(given).absolute()
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{spec} names {path.name!r}; expected a file with a suffix of {', '.join(SUFFIXES)}.")
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    wanted = {array: options[option] for array, option in _SINGULAR.items() if option in options}
    arrays = _read(path, {"features": options.get("features", "features"), **wanted})
    samples = _samples(path, arrays, f"features:{join_options(str(path), options)}")
    described = repr((samples.fingerprint, str(stamp(path)), sorted(options.items())))
    return replace(samples, fingerprint=hashlib.sha256(described.encode(errors="surrogatepass")).hexdigest())


def _samples(path: Path, arrays: Mapping[str, npt.NDArray[Any]], spec: str) -> Samples:
    if "features" not in arrays:
        raise UserError(f"{path} has no array 'features'; name another one as in ?features=embedding.")
    features = _table(arrays["features"], path)
    if "labels" in arrays and "targets" in arrays:
        raise UserError(f"{path} has labels and targets; name one of them, as in ?target=age, and remove the other.")
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
        spec=spec,
    )


def _table(features: npt.NDArray[Any], path: Path) -> FloatArray:
    if features.dtype == object and len(features):
        widths = {len(row) for row in features if row is not None}
        if len(widths) != 1 or any(row is None for row in features):
            raise UserError(f"The features of {path} have the widths {sorted(widths)[:5]}; expected one in every row.")
        features = np.stack(list(features))
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
        differs = array != array[first[owners]]
        if (differs if differs.ndim == 1 else differs.any(1)).any():
            row = int(np.argmax(differs if differs.ndim == 1 else differs.any(1)))
            raise UserError(f"Row {row} of {path} has other {name} than the first row of its bag {names[row]!r}.")
    return sums / counts[:, None], {name: array[first] for name, array in annotations.items()}


def _read(path: Path, wanted: Mapping[str, str]) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of a file under their usual names, given their names in the file."""
    readers = {".npz": _read_npz, ".parquet": _read_parquet}
    return readers.get(path.suffix.lower(), _read_h5)(path, wanted)


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
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {array: archive[name] for array, name in _find(archive.files, wanted, path).items()}
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be read: {str(error).rstrip('.')}.") from None


def _read_parquet(path: Path, wanted: Mapping[str, str]) -> dict[str, npt.NDArray[Any]]:
    require("pyarrow", "parquet", f"Reading {path}")
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            found = _find(file.schema_arrow.names, wanted, path)
            table = file.read(columns=list(dict.fromkeys(found.values())))
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is not a Parquet file or is damaged: {str(error).partition(chr(10))[0]}") from None
    return {array: table[name].to_numpy(zero_copy_only=False) for array, name in found.items()}


def _read_h5(path: Path, wanted: Mapping[str, str]) -> dict[str, npt.NDArray[Any]]:
    h5py = require("h5py", "h5", f"Reading {path}")
    try:
        with h5py.File(path, "r") as file:
            held = [name for name in file if isinstance(file[name], h5py.Dataset)]
            found = _find(held, wanted, path)
            return {
                array: file[name].asstr()[:] if h5py.check_string_dtype(file[name].dtype) else file[name][:]
                for array, name in found.items()
            }
    except OSError as error:
        raise UserError(f"{path} is not an HDF5 file or is damaged: {error}.") from None
