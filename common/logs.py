"""The one place that configures logging: lines of text or JSON on stderr, in a file with rotation, or both."""

import json
import logging
import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import IO, Any, Literal, cast

from fedhead.files import disk_errors
from fedhead.wording import one_line

Format = Literal["text", "json"]

MAX_FILE_BYTES = 10_000_000
OLD_FILES = 5
"""Full log files that are kept beside the one that is written, as FILE.1 and so on."""
_FIELDS = "fields"
_SHOWN = "shown"
_CHATTY = ("alembic", "flwr", "httpx", "uvicorn")
_MOST_CHARACTERS = 10_000
"""Of one line."""


def with_fields(**values: Any) -> dict[str, Mapping[str, Any]]:
    """Return the `extra` of a log call that adds `values` to the record's JSON object."""
    return {_FIELDS: values}


def log_failure(logger: logging.Logger, sentence: str) -> bool:
    """Log the failure that ends a command; return whether it was written to stderr."""
    root = logging.getLogger()
    lines = [handler for handler in root.handlers if isinstance(handler.formatter, _Text | _Json)]
    if lines:
        logger.error("%s", sentence, extra={_SHOWN: True})
    return any(not isinstance(handler, logging.FileHandler) for handler in lines)


def configure_logging(
    style: Format = "text", file: Path | None = None, *, terminal: logging.Handler | None = None
) -> None:
    """Send records of INFO and above to stderr as lines, and to a file.

    Args:
        style: of the lines.
        file: a file to append to. At 10 MB it is renamed to FILE.1, up to FILE.5. Only its owner can read it.
        terminal: shows warnings instead of lines on stderr, for a command that draws on a terminal.

    Raises:
        UserError: if the file cannot be written.
    """
    formatter = _Json() if style == "json" else _Text()
    handlers: list[logging.Handler] = []
    if terminal is None:
        handlers.append(logging.StreamHandler(sys.stderr))
    if file is not None:
        with disk_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            handlers.append(_PrivateFile(file, maxBytes=MAX_FILE_BYTES, backupCount=OLD_FILES, errors="replace"))
    for handler in handlers:
        handler.setFormatter(formatter)
    if terminal is not None:
        terminal.setLevel(logging.WARNING)
        terminal.addFilter(lambda record: not getattr(record, _SHOWN, False))
        handlers.append(terminal)
    logging.basicConfig(level=logging.INFO, handlers=handlers, force=True)
    for chatty in _CHATTY:
        logging.getLogger(chatty).setLevel(logging.WARNING)


class _Text(logging.Formatter):
    """One line for each record: time, severity from warnings on, message; a traceback follows on further lines."""

    def __init__(self) -> None:
        super().__init__(datefmt="%Y-%m-%d %H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        severity = f"{record.levelname.capitalize()}: " if record.levelno >= logging.WARNING else ""
        line = f"{self.formatTime(record, self.datefmt)} {severity}{one_line(record.getMessage(), _MOST_CHARACTERS)}"
        return line + "".join(f"\n{one_line(each, _MOST_CHARACTERS)}" for each in _traceback(self, record).splitlines())


class _Json(logging.Formatter):
    """One JSON object for each record: `time` (UTC), `level`, `logger`, `message`, further fields, `traceback`."""

    def format(self, record: logging.LogRecord) -> str:
        values: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        values = {**getattr(record, _FIELDS, {}), **values}
        if traceback := _traceback(self, record):
            values["traceback"] = traceback
        return json.dumps(values, default=str)


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    return formatter.formatException(record.exc_info) if record.exc_info else ""


class _PrivateFile(RotatingFileHandler):
    """A rotating file with mode 0600: a site's log may name files, and these may be called after people."""

    def _open(self) -> IO[str]:  # type: ignore[override]
        def private(path: str, flags: int) -> int:
            return os.open(path, flags, 0o600)

        return cast("IO[str]", open(self.baseFilename, "a", encoding="utf-8", errors=self.errors, opener=private))
