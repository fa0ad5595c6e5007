from pathlib import Path

import pytest

from fedhead.features.checkpoints import META, Blocks, Meta, intact_meta, is_whole, read_meta, truncate, write_meta


def fill(folder: Path, blocks: int) -> Meta:
    folder.mkdir()
    meta: Meta = {"done": 0, "checksums": []}
    with Blocks(folder, ("values.bin", "keys.bin", "more.bin"), meta) as files:
        for number in range(1, blocks + 1):
            files.append((b"v" * number, b"k", b"m"), 10 * number)
    return meta


def test_each_block_is_on_the_disk_with_its_checksum_before_the_next(tmp_path: Path) -> None:
    meta = fill(tmp_path / "partial", 3)
    assert (tmp_path / "partial" / "values.bin").read_bytes() == b"v" * 6
    assert (tmp_path / "partial" / "keys.bin").read_bytes() == b"kkk"
    assert read_meta(tmp_path / "partial") == meta
    assert meta["done"] == 30
    assert len(set(meta["checksums"])) == 3


def test_an_error_between_blocks_leaves_those_before(tmp_path: Path) -> None:
    (tmp_path / "partial").mkdir()
    meta: Meta = {"done": 0, "checksums": []}
    with pytest.raises(KeyError), Blocks(tmp_path / "partial", ("values.bin", "keys.bin"), meta) as files:
        files.append((b"v", b"k"), 1)
        raise KeyError
    assert read_meta(tmp_path / "partial")["done"] == 1


def test_only_damaged_folders_are_removed(tmp_path: Path) -> None:
    assert not is_whole(tmp_path / "none", lambda meta: True, "features")
    fill(tmp_path / "whole", 1)
    assert is_whole(tmp_path / "whole", lambda meta: meta["done"] == 10, "features")
    assert not is_whole(tmp_path / "whole", lambda meta: meta["done"] == 11, "features")
    assert not (tmp_path / "whole").exists()


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"done": 1}'])
def test_a_state_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / META).write_text(text)
    assert intact_meta(tmp_path, lambda meta: bool(meta["checksums"])) is None


def test_files_are_cut_off_or_made(tmp_path: Path) -> None:
    (tmp_path / "values.bin").write_bytes(b"12345")
    truncate(tmp_path, {"values.bin": 2, "keys.bin": 0})
    assert (tmp_path / "values.bin").read_bytes() == b"12"
    assert (tmp_path / "keys.bin").read_bytes() == b""
    write_meta(tmp_path, {"done": 1})
    assert read_meta(tmp_path) == {"done": 1}
