"""Locks between processes; and Windows, emulated as far as POSIX allows: its lock of a byte, no folders to open."""

import json
import os
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

import pytest

from fedhead.client.release.ledger import Entry, Ledger, read_ledger
from fedhead.errors import FedheadError, UserError
from fedhead.files import locked, locked_folder, require_private, sync_folder, write_atomically
from fedhead.locks import LOCKED_BYTE, lock
from fedhead.server.status import FILE, read_status


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulate Windows' lock of a byte, which lasts until its descriptor is closed, and what `os` lacks there."""
    held: dict[tuple[int, int, int], int] = {}

    def locking(handle: int, mode: int, count: int) -> None:
        about = os.fstat(handle)
        key = (about.st_dev, about.st_ino, os.lseek(handle, 0, os.SEEK_CUR))
        holder = held.get(key)
        if holder not in (None, handle):
            try:
                if os.fstat(holder).st_ino == about.st_ino:
                    raise PermissionError(13, "Permission denied")
            except OSError as error:
                if isinstance(error, PermissionError):
                    raise
        held[key] = handle

    fake = ModuleType("msvcrt")
    fake.locking, fake.LK_NBLCK = locking, 2  # type: ignore[attr-defined]
    really_open = os.open

    def without_folders(path: str | Path, flags: int, mode: int = 0o777) -> int:
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied", str(path))
        return really_open(path, flags, mode)

    monkeypatch.setitem(sys.modules, "msvcrt", fake)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    for name in ("O_DIRECTORY", "fchmod", "pread"):
        monkeypatch.delattr(os, name)
    monkeypatch.setattr(os, "open", without_folders)
    monkeypatch.setattr(sys, "platform", "win32")


@pytest.fixture(params=["posix", "windows"])
def system(request: pytest.FixtureRequest) -> str:
    if request.param == "windows":
        request.getfixturevalue("windows")
    return str(request.param)


def test_a_lock_lasts_until_its_file_is_closed(system: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    first, second = (os.open(path, os.O_RDWR | os.O_CREAT) for _ in range(2))
    os.write(first, b"who")
    lock(first)
    with pytest.raises(BlockingIOError):
        lock(second, wait=False)
    assert os.read(second, 10) == b"who"
    assert path.stat().st_size < LOCKED_BYTE
    os.close(first)
    lock(second, wait=False)
    os.close(second)


def test_a_folder_is_changed_by_one_process(system: str, tmp_path: Path) -> None:
    with locked_folder(tmp_path), pytest.raises(FedheadError, match="being changed"), locked_folder(tmp_path):
        pass
    with locked_folder(tmp_path):
        pass
    (tmp_path / "file").touch()
    for wrong, words in ((tmp_path / "file", "Not a directory"), (tmp_path / "none", "No such file")):
        with pytest.raises(UserError, match=words), locked_folder(wrong):
            pass


def test_another_process_sees_the_lock(tmp_path: Path) -> None:
    code = "import os, sys; from fedhead.locks import lock; lock(os.open(sys.argv[1], os.O_RDWR), wait=False)"
    with locked(tmp_path / "file"):
        ended = subprocess.run([sys.executable, "-c", code, tmp_path / "file"], capture_output=True, text=True)
    assert "BlockingIOError" in ended.stderr


def test_files_ledger_and_status_work_without_posix(
    windows: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomically(tmp_path / "key.pem", "x")
    (tmp_path / "key.pem").chmod(0o666)
    require_private(tmp_path / "key.pem")
    sync_folder(tmp_path)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for number in range(3):
        entry = Entry(
            when=datetime.now(UTC), run=f"{number}", site="s", action="train", rows=9, classes={}, bytes=1, digest=""
        )
        ledger.record(entry)
    assert [entry.run for entry in read_ledger(ledger.path)] == ["0", "1", "2"]
    # There, signal 0 would end the process.
    monkeypatch.delattr(os, "kill")
    process = {"host": socket.gethostname(), "pid": 1, "process_started": ""}
    values = {"state": "running", "message": "", **process, "started": 0, "updated": 0}
    (tmp_path / FILE).write_text(json.dumps(values))
    assert read_status(tmp_path)["state"] == "dead"
