import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedhead.config import RunConfig
from fedhead.data import TableRow, load_samples
from fedhead.errors import UserError
from fedhead.prediction import evaluate_model
from fedhead.simulations import simulate

pytestmark = pytest.mark.usefixtures("one_thread")

BAGS = 60


def patches() -> dict[str, np.ndarray]:
    """Three patches of each bag; classes differ in the mean."""
    generator = np.random.default_rng(0)
    owners = np.repeat(np.arange(BAGS), 3)
    labels = np.array(["low", "high"])[owners % 2]
    features = generator.normal(size=(len(owners), 6)) + 3 * (owners % 2)[:, None]
    order = generator.permutation(len(owners))
    slides = np.array([f"slide {one}" for one in owners])
    return {"features": features[order].astype(np.float32), "labels": labels[order], "bags": slides[order]}


def save(folder: Path, kind: str, arrays: dict[str, np.ndarray]) -> str:
    path = folder / f"embeddings.{kind}"
    if kind == "npz":
        np.savez(path, **arrays)  # type: ignore[arg-type]
    elif kind == "h5":
        h5py = pytest.importorskip("h5py", reason="h5py is not installed")
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file[name] = array.astype(object) if array.dtype.kind == "U" else array
    else:
        columns = {"features": list(arrays["features"]), "label": arrays["labels"], "bag": arrays["bags"]}
        pq.write_table(pa.table({name: pa.array(list(column)) for name, column in columns.items()}), path)
    return f"features:{path}"


@pytest.mark.parametrize("kind", ["npz", "parquet", "h5"])
def test_bags_become_their_mean(tmp_path: Path, kind: str) -> None:
    arrays = patches()
    samples = load_samples(save(tmp_path, kind, arrays))
    assert (len(samples), samples.kind, samples.classes) == (BAGS, "table", ("high", "low"))
    first = arrays["bags"] == arrays["bags"][0]
    item = samples.read(0)
    assert isinstance(item, TableRow)
    np.testing.assert_allclose(item.values, arrays["features"][first].astype(np.float64).mean(0))
    assert samples.classes[samples.labels[0]] == arrays["labels"][0]
    assert load_samples(samples.spec).fingerprint == samples.fingerprint


def test_one_spec_is_data_and_backbone(tmp_path: Path) -> None:
    spec = save(tmp_path, "npz", patches())
    result = simulate(RunConfig(rounds=0, simulation={"data": spec, "sites": 2}), out=tmp_path / "run")
    assert result.config.backbone == "features:6"
    assert result.score_held_out is not None and result.score_held_out > 0.9
    assert evaluate_model(result.model, load_samples(spec)).report.score.value > 0.9
    named = RunConfig(backbone="features:6:uni", rounds=0, simulation={"data": spec, "sites": 2})
    assert simulate(named, out=tmp_path / "named").model.backbone.digest != result.model.backbone.digest


def test_wrong_files_are_explained(tmp_path: Path) -> None:
    arrays = patches()
    with pytest.raises(UserError, match="expected a file with a suffix of"):
        load_samples("features:a.csv")
    with pytest.raises(UserError, match="There is no file"):
        load_samples("features:a.npz")
    faults: dict[str, tuple[dict[str, np.ndarray], str]] = {
        "other labels in a bag": ({"labels": np.arange(3 * BAGS) % 2}, "other labels than the first row of its bag"),
        "lengths": ({"labels": arrays["labels"][:-1]}, "180 rows of features but 179 labels"),
        "widths": ({"features": arrays["features"][:, 0]}, r"expected \[n, d\] numbers"),
        "not finite": ({"features": np.where(arrays["features"] > 3, np.nan, 1)}, "is not finite"),
        "targets": ({"targets": np.ones(3 * BAGS)}, "has labels and targets"),
    }
    for changes, words in faults.values():
        with pytest.raises(UserError, match=words):
            load_samples(save(tmp_path, "npz", {**arrays, **changes}))
    with pytest.raises(UserError, match="no 'slide'; it has"):
        load_samples(save(tmp_path, "npz", arrays) + "?bag=slide")
    with pytest.raises(UserError, match="neither 'labels' nor 'targets'"):
        load_samples(save(tmp_path, "npz", {"features": arrays["features"]}))
    (tmp_path / "embeddings.npz").write_bytes(b"no archive")
    with pytest.raises(UserError, match="cannot be read"):
        load_samples(f"features:{tmp_path / 'embeddings.npz'}")


def test_data_sets_that_read_other_files_are_refused(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    path, other = tmp_path / "given.h5", tmp_path / "other.h5"
    values, labels = np.ones((30, 3)), np.arange(30) % 2
    with h5py.File(other, "w") as file:
        file["private"] = values
    (tmp_path / "private.bin").write_bytes(bytes(90))
    layout = h5py.VirtualLayout((30, 3), "f8")
    layout[:] = h5py.VirtualSource(str(other), "private", (30, 3))
    faults = {
        "is a link": lambda file: file.__setitem__("features", h5py.ExternalLink(str(other), "private")),
        "are stored in other files": lambda file: file.create_virtual_dataset("features", layout),
        "features of .* are stored in other files": lambda file: file.create_dataset(
            "features", (30, 3), "u1", external=[(str(tmp_path / "private.bin"), 0, 90)]
        ),
        "states .* bytes": lambda file: file.create_dataset("features", (10**9, 10**4), "f8", chunks=(1000, 1000)),
    }
    for words, write in faults.items():
        with h5py.File(path, "w") as file:
            file["labels"] = labels
            write(file)
        with pytest.raises(UserError, match=words):
            load_samples(f"features:{path}")


def test_a_small_archive_cannot_state_arrays_beyond_memory(tmp_path: Path) -> None:
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (10000000000, 10000), }"
    header += b" " * (117 - len(header)) + b"\n"
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive:
        archive.writestr("features.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(UserError, match="states 800000000000000 bytes"):
        load_samples(f"features:{tmp_path / 'huge.npz'}")
