"""Data specs: `source:PATH?name=value&name=value`, split into parts and joined."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from urllib.parse import unquote

from fedhead.errors import UserError
from fedhead.registry import suggest
from fedhead.wording import printable

SCREENED = {"%": "%25", "&": "%26", "?": "%3F"}
"""Separators in a spec, with their codes inside a part."""


def without_labels(options: Mapping[str, str], spec: str) -> bool:
    """Return whether the option `labels` says that the data has none.

    Raises:
        UserError: if it is neither yes nor no.
    """
    if (given := options.get("labels", "yes")) not in ("yes", "no"):
        raise UserError(f"The option labels of {spec!r} is yes or no (in tables also some), not {given!r}.")
    return given == "no"


def split_options(argument: str, known: Collection[str], spec: str) -> tuple[str, dict[str, str]]:
    """Split `PATH?name=value&name=value` into the path and the options.

    The whole argument is the path if it exists. Otherwise a question mark in a path is written `%3F`; in an option any
    character may be written as `%` and two hexadecimal digits.

    Args:
        argument: the argument of a data spec.
        known: the options of the source; empty for any.
        spec: the whole spec, for messages.

    Raises:
        UserError: for an option that lacks a value, is repeated, or is unknown.
    """
    before, _, query = argument.partition("?")
    if query and exists(argument):
        return argument, {}
    options: dict[str, str] = {}
    for part in query.split("&") if query else ():
        name, equals, value = part.partition("=")
        if not equals or not name or not value:
            raise UserError(
                f"{spec} has the option {part!r}; expected name=value, as in ?split=train&label=category. Write a "
                "question mark in a path as %3F."
            )
        if known and name not in known:
            raise UserError(
                f"{spec} has an unknown option {name!r}. {suggest(name, sorted(known))} Write a question mark in a "
                "path as %3F."
            )
        if name in options:
            raise UserError(f"{spec} repeats the option {name!r}.")
        options[name] = unquote(value, errors="surrogateescape")
    return decode_path(before), options


def join_options(path: str, options: Mapping[str, str]) -> str:
    """Return an argument that `split_options` splits into the same path and options; valid UTF-8."""
    query = "&".join(f"{name}={_screened(value)}" for name, value in options.items())
    path = "".join(map(_as_percent, re.sub(f"%(?={_CODES})", "%25", path).replace("?", "%3F")))
    return f"{path}?{query}" if query else path


def decode_path(path: str) -> str:
    """Return a path with `%3F` decoded to a question mark, `%25` to a percent sign, and codes of bytes beyond ASCII.

    An existing path is unchanged. Other percent signs are literal.
    """
    if "%" not in path or exists(path):
        return path
    return re.sub(
        f"(?:%{_CODES})+",
        lambda found: bytes.fromhex(found[0].replace("%", "")).decode(errors="surrogateescape"),
        path,
    )


_CODES = "(?:25|3[fF]|[89a-fA-F][0-9a-fA-F])"
"""Two digits for a percent sign, a question mark, or a byte beyond ASCII."""


def _as_percent(character: str) -> str:
    """Return a byte of a name that is not UTF-8 as its code, and any other character unchanged."""
    if "\udc80" <= character <= "\udcff":
        return f"%{ord(character) - 0xDC00:02X}"
    return printable(character)


def to_path(given: str) -> Path:
    """Return a user's path with `~` expanded.

    Raises:
        UserError: if the path is invalid.
    """
    try:
        path = Path(given).expanduser()
        path.exists()
    except (OSError, ValueError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        shown = given if len(given) <= 200 else f"{given[:200]}..."
        raise UserError(f"{shown!r} is not the path of a file or folder: {reason.rstrip('.')}.") from None
    return path


def exists(path: str) -> bool:
    """Return whether a path exists; False for invalid paths, such as one with a null character."""
    try:
        return Path(path).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


def local_path(spec: str) -> Path | None:
    """Return the existing file or folder in a data spec, resolved; None otherwise."""
    argument = spec.partition(":")[2]
    before = argument.partition("?")[0]
    for given in (argument, before, decode_path(before)):
        if given and exists(given):
            return Path(given).expanduser().resolve()
    return None


def _screened(value: str) -> str:
    return "".join(SCREENED.get(character) or _as_percent(character) for character in value)
