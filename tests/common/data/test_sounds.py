import io
import json
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedhead.data import (
    Clip,
    UnreadableSampleError,
    load_samples,
    load_sites,
    read_clip,
    samples_from_clips,
    to_clip,
)
from fedhead.data.inputs import find_inputs
from fedhead.data.items import content_key
from fedhead.data.page import example
from fedhead.data.sounds import LONGEST
from fedhead.data.summary import Look
from fedhead.errors import UserError

soundfile = pytest.importorskip("soundfile")


def tone(hertz: float = 440.0, seconds: float = 0.3, rate: int = 8000) -> Any:
    return (0.4 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def write_sound(path: Path, samples: Any = None, rate: int = 8000, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(rate=rate) if samples is None else samples, rate, **options)
    return path


def write_folder(root: Path, suffix: str = ".wav") -> Path:
    for place, name in enumerate(("high", "low")):
        for number in range(3):
            write_sound(root / name / f"{number}{suffix}", tone(800 - 500 * place + number))
    return root


@pytest.mark.parametrize(("suffix", "tolerance"), [(".wav", 1e-4), (".flac", 1e-4), (".ogg", 0.1), (".mp3", 0.1)])
def test_each_format_is_read_to_its_precision(tmp_path: Path, suffix: str, tolerance: float) -> None:
    samples = tone(rate=44_100)
    clip = read_clip(write_sound(tmp_path / f"a{suffix}", samples, 44_100))
    assert (clip.rate, clip.samples.dtype) == (44_100, np.float32)
    assert abs(len(clip.samples) - len(samples)) <= (0 if tolerance < 0.01 else 2400)
    middle = slice(2000, 11000)
    assert np.abs(clip.samples[middle] - samples[middle]).max() < tolerance


def test_stereo_becomes_the_mean_of_its_channels(tmp_path: Path) -> None:
    left, right = tone(300, rate=44_100), tone(500, rate=44_100)
    clip = read_clip(write_sound(tmp_path / "a.wav", np.stack([left, right], 1), 44_100, subtype="FLOAT"))
    assert np.allclose(clip.samples, (left + right) / 2, atol=1e-7)
    assert content_key(clip) == content_key(to_clip(np.stack([left, right]), 44_100, "x"))


def _wav(content: bytes, frames: int | None = None) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(content)
    return file.getvalue()


def _encoded(form: str, samples: Any, rate: int = 8000, **options: Any) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=form, **options)
    return file.getvalue()


BROKEN: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty.wav": (lambda: b"", "is empty; expected a sound"),
    "silent.wav": (lambda: _wav(b""), "has a length of 0"),
    "text.wav": (lambda: b"these are not sounds at all, but words" * 9, "cannot be read as a sound"),
    "header.wav": (lambda: b"RIFF\x00\x00\x00\x00WAVE", "is truncated: it has no samples"),
    "cut.wav": (lambda: _wav(bytes(4000))[:3000], "is truncated: 1044 bytes of 4000 are missing"),
    "cut.flac": (lambda: _encoded("FLAC", tone())[:1500], "cannot be read as a sound"),
    "cut.ogg": (lambda: _encoded("OGG", tone(seconds=9))[:5000], "is truncated: its last page is missing"),
    "cut.mp3": (lambda: _encoded("MP3", tone(seconds=9, rate=16000), 16000)[:9000], "is truncated"),
    "nan.wav": (lambda: _encoded("WAV", np.full(900, np.nan, np.float32), subtype="FLOAT"), "not finite"),
    "measured.wav": (lambda: _encoded("MAT5", tone()), "in the format MAT5; expected WAV"),
    "slow.wav": (lambda: _encoded("WAV", tone(), 300), "a sampling rate of 300 Hz"),
    "hour.flac": (lambda: _encoded("FLAC", np.zeros(3_600_000, np.int16), 1000), "lasts 3,600 s or more"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_bad_files_are_unreadable_with_the_reason(tmp_path: Path, name: str) -> None:
    make, reason = BROKEN[name]
    (tmp_path / name).write_bytes(make())
    with pytest.raises(UnreadableSampleError, match=reason) as raised:
        read_clip(tmp_path / name)
    assert str(tmp_path / name) in str(raised.value)
    assert raised.value.lasting


def test_a_missing_file_may_appear_later(tmp_path: Path) -> None:
    with pytest.raises(UnreadableSampleError, match="no such file") as raised:
        read_clip(tmp_path / "gone.wav")
    assert not raised.value.lasting


def test_a_header_that_claims_an_hour_is_refused_before_reading(tmp_path: Path) -> None:
    header = bytearray(_wav(bytes(2000)))
    header[40:44] = (2**32 - 1).to_bytes(4, "little")
    (tmp_path / "pipe.wav").write_bytes(bytes(header))
    assert len(read_clip(tmp_path / "pipe.wav").samples) == 1000


def test_arrays_follow_the_rules_of_files() -> None:
    samples = tone()
    whole = (samples * 32768).astype(np.int16)
    assert np.array_equal(to_clip(whole, 8000, "x").samples, whole.astype(np.float32) / 32768)
    assert to_clip(np.full(9, 128, np.uint8), 8000, "x").samples.tolist() == [0.0] * 9
    for value, rate, reason in (
        (samples, None, "sampling rate of None"),
        (samples, 8000.5, "sampling rate of 8000.5"),
        (samples, float("nan"), "sampling rate of nan"),
        (np.zeros(0), 8000, "length of 0"),
        (np.zeros((3, 4, 5)), 8000, "shape"),
        (np.zeros((900, 900)), 8000, "shape"),
        (np.zeros(9, np.int64), 8000, "type int64"),
        (["a"], 8000, "expected the samples"),
        (np.array([np.inf, 0]), 8000, "not finite"),
        (np.array([1e30, 0]), 8000, "samples up to 1e"),
        (np.zeros(LONGEST * 1000 + 1), 1000, "Cut it into clips"),
    ):
        with pytest.raises(UnreadableSampleError, match=reason):
            to_clip(value, rate, "x")


def test_folders_hold_a_class_of_sounds_each(tmp_path: Path) -> None:
    samples = load_samples(f"folder:{write_folder(tmp_path)}")
    assert (samples.kind, samples.classes, samples.labels.tolist()) == ("audio", ("high", "low"), [0, 0, 0, 1, 1, 1])
    clip = samples.read(3)
    assert isinstance(clip, Clip)
    assert np.abs(clip.samples - tone(300)).max() < 1e-4
    write_folder(tmp_path / "sites" / "north")
    write_folder(tmp_path / "sites" / "south", ".flac")
    by_site = load_sites(f"folder:{tmp_path / 'sites'}")
    assert by_site.sites == ("north",) * 6 + ("south",) * 6


def test_images_beside_sounds_are_refused_unless_the_kind_is_chosen(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "high" / "notes.txt").write_text("a note")
    assert load_samples(f"folder:{tmp_path}").left_out[0].count == 1
    (tmp_path / "high" / "0.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"have 1 images and 6 clips; expected one kind"):
        load_samples(f"folder:{tmp_path}")
    assert len(load_samples(f"folder:{tmp_path}?kind=audio")) == 6
    assert load_samples(f"folder:{tmp_path}?kind=text").kind == "text"
    with pytest.raises(UserError, match="kind"):
        load_samples(f"folder:{tmp_path}?kind=sound")


def test_tables_name_sounds_with_speakers_as_groups(tmp_path: Path) -> None:
    write_folder(tmp_path)
    lines = ["path,label,group,site", "high/0.wav,high,anna,a", "low/1.wav,low,ben,b", "low/2.wav,low,ben,b"]
    (tmp_path / "all.csv").write_text("\n".join(lines))
    samples = load_samples(f"csv:{tmp_path / 'all.csv'}")
    assert (samples.kind, samples.groups, samples.sites) == ("audio", ["anna", "ben", "ben"], ["a", "b", "b"])
    first, second = (samples.keys(row, samples.read(row)) for row in (1, 2))
    assert first[0] == second[0]
    assert first[1] != second[1]
    (tmp_path / "all.jsonl").write_text(
        "\n".join(json.dumps({"audio": f"low/{n}.wav", "label": n % 2}) for n in (0, 1))
    )
    assert load_samples(f"jsonl:{tmp_path / 'all.jsonl'}").kind == "audio"
    (tmp_path / "mixed.csv").write_text("path,label\nhigh/0.wav,a\nb.png,b\n")
    with pytest.raises(UserError, match=r"names 1 sounds, such as high/0.wav, and 1 images, such as b.png"):
        load_samples(f"csv:{tmp_path / 'mixed.csv'}")


def test_parquet_holds_encoded_sounds(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    content = _encoded("FLAC", tone())
    table = pyarrow.table({"audio": [{"bytes": content, "path": None}] * 2, "label": ["a", "b"]})
    parquet.write_table(table, tmp_path / "all.parquet")
    samples = load_samples(f"parquet:{tmp_path / 'all.parquet'}")
    clip = samples.read(1)
    assert isinstance(clip, Clip)
    assert (samples.kind, clip.rate) == ("audio", 8000)


def test_archives_hold_clips_with_a_rate(tmp_path: Path) -> None:
    clips = np.stack([tone(300), tone(500)])
    np.savez(tmp_path / "a.npz", clips=clips, rate=8000, lengths=np.array([2400, 1000]), labels=np.array(["x", "y"]))
    samples = load_samples(f"npz:{tmp_path / 'a.npz'}")
    read = [samples.read(row) for row in (0, 1)]
    assert all(isinstance(one, Clip) for one in read)
    assert [len(one.samples) for one in read if isinstance(one, Clip)] == [2400, 1000]
    assert (samples.kind, samples.left_out) == ("audio", ())
    np.savez(tmp_path / "b.npz", clips=clips, labels=np.array(["x", "y"]))
    with pytest.raises(UserError, match="no array 'rate'"):
        load_samples(f"npz:{tmp_path / 'b.npz'}")


def test_clips_in_memory_need_a_rate_and_differ_by_content() -> None:
    clips = [tone(300), tone(500, seconds=0.2), {"array": tone(700), "sampling_rate": 16_000}]
    samples = samples_from_clips(clips, ["a", "b", "b"], rate=8000)
    assert [one.rate for row in range(3) if isinstance(one := samples.read(row), Clip)] == [8000, 8000, 16_000]
    assert samples.fingerprint != samples_from_clips([tone(301), *clips[1:]], ["a", "b", "b"], rate=8000).fingerprint
    with pytest.raises(UserError, match="has no sampling rate"):
        samples_from_clips(clips, ["a", "b", "b"])
    damaged = samples_from_clips([np.full(9, np.nan), tone()], ["a", "b"], rate=8000)
    with pytest.raises(UnreadableSampleError, match="not finite"):
        damaged.read(0)


def test_a_summary_says_how_long_clips_are(tmp_path: Path) -> None:
    samples = load_samples(f"folder:{write_folder(tmp_path)}")
    look = Look(samples)
    for row in range(len(samples)):
        look.show(row, samples.read(row))
    summary = look.summary()
    assert summary.seconds is not None
    assert (summary.seconds.greatest, summary.rates) == (0.3, {8000: 6})
    assert summary.to_dict()["seconds"]["median"] == 0.3


def test_an_example_is_a_short_sound_that_a_browser_plays() -> None:
    import base64

    html = example(Clip(tone(seconds=20, rate=48_000), 48_000))
    content = base64.b64decode(html.partition("base64,")[2].partition('"')[0])
    with wave.open(io.BytesIO(content)) as sound:
        assert (sound.getframerate(), sound.getnframes(), sound.getnchannels()) == (16_000, 80_000, 1)


def test_inputs_of_predictions_are_files_and_folders_of_sounds(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "high" / "0.txt").write_text("a note")
    inputs = find_inputs([str(tmp_path), str(tmp_path / "low" / "1.wav")], "audio")
    assert len(inputs) == 7
    assert isinstance(inputs[0].read(), Clip)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"contains no clips; expected files with a suffix of \.flac"):
        find_inputs([str(tmp_path / "none")], "audio")
