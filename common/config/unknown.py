"""The sentence on a setting that does not exist."""

from typing import Any

from pydantic import BaseModel

from fedhead.registry import suggest


def unknown_setting(detail: Any, whole: type[BaseModel]) -> str:
    """Return a sentence on an unknown key, with close names; empty if the error is another one.

    Args:
        detail: of a validation error.
        whole: the model of all settings, whose tables are fields.
    """
    if detail["type"] != "extra_forbidden":
        return ""
    *tables, key = detail["loc"]
    known = whole
    for name in tables:
        below = known.model_fields[name].annotation
        assert isinstance(below, type)
        known = below
    where = ".".join(map(str, detail["loc"]))
    return f"There is no setting {where!r}. {suggest(str(key), list(known.model_fields))}"
