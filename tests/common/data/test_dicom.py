import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut

from fedhead.data import UnreadableSampleError, load_samples, read_image
from fedhead.errors import UserError

VALUES = np.arange(-1000, 1048, 32, dtype=np.int16).reshape(8, 8)


def dicom(path: Path, values: npt.NDArray[Any] = VALUES, **elements: Any) -> Path:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = elements.pop("syntax", pydicom.uid.ExplicitVRLittleEndian)
    meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid(entropy_srcs=["a"])
    file = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    colour = values.ndim == 3
    file.update(
        {
            "Rows": values.shape[0],
            "Columns": values.shape[1],
            "BitsAllocated": values.dtype.itemsize * 8,
            "BitsStored": values.dtype.itemsize * 8,
            "HighBit": values.dtype.itemsize * 8 - 1,
            "PixelRepresentation": int(values.dtype.kind == "i"),
            "SamplesPerPixel": 3 if colour else 1,
            "PhotometricInterpretation": "RGB" if colour else "MONOCHROME2",
            "PatientID": "ann",
            "SOPClassUID": meta.MediaStorageSOPClassUID,
            "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        }
    )
    if colour:
        file.PlanarConfiguration = 0
    for name, value in elements.items():
        setattr(file, name, value)
    file.PixelData = values.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    file.save_as(path, enforce_file_format=True)
    return path


def shown(path: Path) -> npt.NDArray[np.int64]:
    return np.asarray(read_image(path)).astype(np.int64)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning:pydicom")
@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(("centre", "width"), [(40, 400), (-600, 1500), (0, 2)])
def test_rescale_and_window_equal_pydicom(tmp_path: Path, function: str, centre: int, width: int) -> None:
    path = dicom(
        tmp_path / "x.dcm",
        RescaleSlope=2,
        RescaleIntercept=-24,
        WindowCenter=[centre, 7],
        WindowWidth=[width, 9],
        VOILUTFunction=function,
    )
    dataset = pydicom.dcmread(path)
    reference = apply_voi_lut(apply_modality_lut(VALUES, dataset), dataset)
    low, high = -(2**15) * 2 - 24, (2**15 - 1) * 2 - 24
    assert np.abs(shown(path) - (reference - low) / (high - low) * 255).max() <= 0.5 + 1e-6


def test_lookup_table_takes_precedence_over_window(tmp_path: Path) -> None:
    table = pydicom.Dataset()
    table.LUTDescriptor = [256, 0, 16]
    table.add_new(0x00283006, "OW", (65535 - np.arange(256, dtype=np.uint16) * 257).tobytes())
    values = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    path = dicom(tmp_path / "x.dcm", values, VOILUTSequence=[table], WindowCenter=40, WindowWidth=2)
    assert np.array_equal(shown(path), 255 - values)


def test_monochrome1_is_inverted(tmp_path: Path) -> None:
    window = {"WindowCenter": 40, "WindowWidth": 400}
    plain = shown(dicom(tmp_path / "a.dcm", **window))
    turned = shown(dicom(tmp_path / "b.dcm", PhotometricInterpretation="MONOCHROME1", **window))
    assert np.array_equal(turned, 255 - plain)


def test_full_range_without_a_window(tmp_path: Path) -> None:
    expected = np.rint((VALUES - VALUES.min()) / (VALUES.max() - VALUES.min()) * 255)
    assert np.array_equal(shown(dicom(tmp_path / "x.dcm")), expected)
    assert not shown(dicom(tmp_path / "y.dcm", np.full((4, 4), 7, np.int16))).any()


def test_colours_and_palettes(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
    assert np.array_equal(shown(dicom(tmp_path / "x.dcm", colours)), colours)
    elements = {
        f"{colour}PaletteColorLookupTable{part}": value
        for index, colour in enumerate(("Red", "Green", "Blue"))
        for part, value in (
            ("Descriptor", [4, 0, 16]),
            ("Data", np.eye(4, dtype=np.uint16)[index].__mul__(65535).astype(np.uint16).tobytes()),
        )
    }
    values = np.array([[0, 1], [2, 3]], np.uint8)
    path = dicom(tmp_path / "p.dcm", values, PhotometricInterpretation="PALETTE COLOR", **elements)
    assert shown(path).tolist() == [[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [0, 0, 0]]]


def test_first_of_several_frames_is_used(tmp_path: Path) -> None:
    path = dicom(tmp_path / "x.dcm", np.concatenate([VALUES, VALUES[::-1]]), Rows=8, NumberOfFrames=2)
    assert np.array_equal(shown(path), shown(dicom(tmp_path / "y.dcm")))


def test_run_length_encoding_needs_no_decoder(tmp_path: Path) -> None:
    path = dicom(tmp_path / "x.dcm")
    dataset = pydicom.dcmread(path)
    dataset.compress(pydicom.uid.RLELossless)
    dataset.save_as(tmp_path / "rle.dcm")
    assert np.array_equal(shown(tmp_path / "rle.dcm"), shown(path))


def test_error_for_compression_without_decoder(tmp_path: Path) -> None:
    path = dicom(tmp_path / "x.dcm")
    dataset = pydicom.dcmread(path)
    dataset.PixelData = pydicom.encaps.encapsulate([b"\xff\x4f\xff\x51" + b"\0" * 20])
    dataset["PixelData"].VR = "OB"
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEG2000Lossless
    dataset.save_as(path)
    with pytest.raises(UnreadableSampleError, match=r"x\.dcm is compressed as JPEG 2000 .*pip install pylibjpeg"):
        read_image(path)


def test_damaged_files_and_files_without_pixels_are_named(tmp_path: Path) -> None:
    path = dicom(tmp_path / "x.dcm")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UnreadableSampleError, match=r"x\.dcm cannot be read as DICOM"):
        read_image(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UnreadableSampleError, match=r"x\.dcm"):
        read_image(path)
    dataset = pydicom.dcmread(dicom(path))
    del dataset.PixelData
    dataset.save_as(path)
    with pytest.raises(UnreadableSampleError, match="without pixels"):
        read_image(path)


def test_patients_are_groups_by_default(tmp_path: Path) -> None:
    for number, patient in enumerate(["ann", "bob", "ann", ""]):
        dicom(
            tmp_path / "scans" / "ct" / f"{number}.dcm",
            VALUES + number,
            PatientID=patient,
            WindowCenter=0,
            WindowWidth=999,
        )
    samples = load_samples(f"folder:{tmp_path / 'scans'}")
    keys = [samples.key(row, samples.read(row)) for row in range(4)]
    assert keys[0] == keys[2]
    assert len(set(keys)) == 3
    table = "path,label,group\n" + "".join(f"scans/ct/{n}.dcm,ct,{'xxyy'[n]}\n" for n in range(4))
    (tmp_path / "t.csv").write_text(table)
    grouped = load_samples(f"csv:{tmp_path / 't.csv'}")
    keys = [grouped.key(row, grouped.read(row)) for row in range(4)]
    assert keys[0] == keys[1] != keys[2] == keys[3]


def test_files_are_recognised_by_content(tmp_path: Path) -> None:
    assert np.array_equal(shown(dicom(tmp_path / "IM0001")), shown(dicom(tmp_path / "x.dcm")))


def test_error_names_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = dicom(tmp_path / "x.dcm")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(UserError, match=r"DICOM files needs .*pip install 'fedhead\[medical\]'") as raised:
        read_image(path)
    # A site may pass it on to the coordinator, and a file's name may be a person's.
    assert "x.dcm" not in str(raised.value)
