import json
import logging
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.logging import RichHandler

import fedhead.logs
from fedhead.errors import UserError
from fedhead.logs import OLD_FILES, configure_logging, log_failure, with_fields

logger = logging.getLogger("fedhead.somewhere")


@pytest.fixture(autouse=True)
def own_root() -> Iterator[None]:
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    root.handlers = []
    yield
    for handler in root.handlers:
        handler.close()
    root.level, root.handlers = level, handlers


def test_json_lines_hold_the_message_and_its_fields_and_cannot_be_forged(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json")
    logger.info("Round %d.", 3, extra=with_fields(round=3, message="forged", level="forged"))
    hostile = 'a\nb\x1b[2J"}\n{"message": "forged'
    logger.warning("%s", hostile)
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (first["message"], first["level"], first["round"]) == ("Round 3.", "info", 3)
    assert (second["message"], second["logger"]) == (hostile, "fedhead.somewhere")


def test_text_lines_hold_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    logger.warning("%s", "a\nb\x1b[2J\x9b\x7f")
    try:
        raise ValueError("c\x1b[31m")
    except ValueError:
        logger.exception("Broken.")
    first, *rest = capsys.readouterr().err.splitlines()
    assert first.endswith(r"Warning: a b\x1b[2J\x9b\x7f")
    assert rest[-1] == r"ValueError: c\x1b[31m"


def test_a_file_is_private_and_rotated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedhead.logs, "MAX_FILE_BYTES", 1000)
    file = tmp_path / "logs" / "site.log"
    configure_logging("json", file)
    for number in range(200):
        logger.info("Line %d.", number)
    files = sorted(file.parent.iterdir())
    assert [path.name for path in files] == ["site.log", *(f"site.log.{number + 1}" for number in range(OLD_FILES))]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert all(path.stat().st_size <= 1000 for path in files)
    assert json.loads(file.read_text().splitlines()[-1])["message"] == "Line 199."


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        configure_logging("text", tmp_path)


def test_a_failure_is_shown_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not log_failure(logger, "No logging yet.")
    file = tmp_path / "a.log"
    configure_logging("text", file, terminal=RichHandler())
    assert not log_failure(logger, "The disk is full.")
    assert "Error: The disk is full." in file.read_text()
    configure_logging("text")
    assert log_failure(logger, "The disk is full.")
    said = capsys.readouterr()
    assert (said.out + said.err).count("The disk is full.") == 1
