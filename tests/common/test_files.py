"""Names of files, and sentences about disks."""

import errno
import os
import re
from pathlib import Path

import pytest

from fedhead.errors import FedheadError
from fedhead.files import disk_errors, safe_name


@pytest.mark.parametrize("name", ["con", "CON", "nul", "com1", "lpt9", "Aux.", "prn"])
def test_no_file_is_called_like_a_device(name: str) -> None:
    assert not re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", safe_name(name))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_file_that_cannot_grow_is_a_sentence(number: int, tmp_path: Path) -> None:
    with pytest.raises(FedheadError, match="What was complete is kept"), disk_errors(tmp_path):
        raise OSError(number, os.strerror(number))
