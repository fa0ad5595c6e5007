"""Names of files, and sentences about disks."""

import errno
import os
import re
from pathlib import Path

import pytest

from fedhead.errors import FedheadError, UserError
from fedhead.files import disk_errors, new_folder, safe_name


@pytest.mark.parametrize("name", ["con", "CON", "nul", "com1", "lpt9", "Aux.", "prn"])
def test_no_file_is_called_like_a_device(name: str) -> None:
    assert not re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", safe_name(name))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_file_that_cannot_grow_is_a_sentence(number: int, tmp_path: Path) -> None:
    with pytest.raises(FedheadError, match="What was complete is kept"), disk_errors(tmp_path):
        raise OSError(number, os.strerror(number))


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with new_folder(tmp_path / "deep" / "made", "choose another.") as folder:
        (folder / "file").write_text("content")
        assert not (tmp_path / "deep" / "made").exists()
    assert (tmp_path / "deep" / "made" / "file").read_text() == "content"
    with pytest.raises(KeyError), new_folder(tmp_path / "deep" / "other", "choose another.") as folder:
        (folder / "file").write_text("content")
        raise KeyError
    assert [one.name for one in (tmp_path / "deep").iterdir()] == ["made"]


def test_a_new_folder_replaces_nothing_but_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for taken in (tmp_path, tmp_path / "file"):
        with (
            pytest.raises(UserError, match="not an empty folder; choose another"),
            new_folder(taken, "choose another."),
        ):
            pytest.fail("it was begun")
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty", "choose another.") as folder:
        (folder / "file").touch()
    assert (tmp_path / "empty" / "file").exists()
