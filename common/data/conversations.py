"""Conversations: rows of a table that hold the turns of a user and an assistant, to learn the assistant's answers."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from fedhead.data.items import IntArray, UnreadableSampleError
from fedhead.data.table_columns import Table
from fedhead.errors import UserError

Role = Literal["system", "user", "assistant"]
Turn = tuple[Role, str]

CONVERSATION = "conversation"
"""The content of a table whose rows are conversations."""


class Conversation(str):
    """The turns of a conversation; as a `str`, they are written as JSON.

    Args:
        turns: role and text of each: optionally one of the system, then of user and assistant alternately.
    """

    __slots__ = ("turns",)

    turns: tuple[Turn, ...]

    def __new__(cls, turns: Sequence[Turn]) -> Self:
        made = super().__new__(cls, json.dumps(list(turns), ensure_ascii=False))
        made.turns = tuple(turns)
        return made

    def __getnewargs__(self) -> tuple[tuple[Turn, ...]]:  # type: ignore[override]
        return (self.turns,)


def holds_conversations(columns: Sequence[str], options: Mapping[str, str], path: object) -> bool:
    """Return whether the rows of a table are conversations: by the columns messages, or prompt and completion.

    Raises:
        UserError: if there is only one of prompt and completion, and no option names another content.
    """
    if {"path", "image", "audio", "text", "label", "target", "features", "kind", "time"} & options.keys():
        return False
    if "messages" in columns or {"prompt", "completion"} <= set(columns):
        return True
    for one, other in (("prompt", "completion"), ("completion", "prompt")):
        if one in columns:
            raise UserError(
                f"{path} has a column {one!r} and no column {other!r}: conversations need both, or messages. To read "
                f"the {one}s as texts with labels, name the column as in ?text={one}."
            )
    return False


@dataclass(frozen=True)
class ConversationRows:
    """Conversations in a table.

    Attributes:
        table: with a column `messages`, or `prompt` and `completion`.
        cells: return the values of these columns.
        rows: `[n]`, row numbers in the table.
    """

    table: Table
    cells: Sequence[Callable[[int], Any]]
    rows: IntArray

    @classmethod
    def of(cls, table: Table, rows: IntArray) -> Self:
        """Return the conversations of some rows."""
        names = ("messages",) if "messages" in table.columns else ("prompt", "completion")
        return cls(table, [table.cells(name) for name in names], rows)

    def read(self, row: int) -> Conversation:
        number = int(self.rows[row])
        values = [cell(number) for cell in self.cells]
        name = self.table.place(number)
        return from_messages(values[0], name) if len(values) == 1 else from_pair(values[0], values[1], name)


@dataclass(frozen=True)
class IndexedConversations:
    """Conversations by position.

    Attributes:
        values: the conversations.
        spec: the name of the data in messages.
    """

    values: Sequence[Conversation]
    spec: str

    def read(self, row: int) -> Conversation:
        messages = [{"role": role, "content": said} for role, said in self.values[row].turns]
        return from_messages(messages, f"{self.spec}[{row}]")


def from_pair(prompt: Any, completion: Any, name: str) -> Conversation:
    """Return a prompt and its completion as a conversation.

    Args:
        prompt: a text, possibly empty.
        completion: a text.
        name: of the row, for messages.

    Raises:
        UnreadableSampleError: if one is missing or not a text, or the completion is empty.
    """
    prompt, completion = ("" if one is None else one for one in (prompt, completion))
    for what, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, str):
            raise UnreadableSampleError(f"{name} has a {what} of type {type(value).__name__}, not a text.")
    if not completion.strip():
        raise UnreadableSampleError(f"{name} has no completion.")
    return Conversation([("user", prompt), ("assistant", completion)])


def from_messages(messages: Any, name: str) -> Conversation:
    """Return messages, each with a role and a content, as a conversation that ends with an answer.

    Raises:
        UnreadableSampleError: if they are of another form.
    """
    if not isinstance(messages, list) or not messages:
        raise UnreadableSampleError(f"{name} has no list of messages.")
    turns: list[Turn] = []
    for place, message in enumerate(messages, 1):
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise UnreadableSampleError(
                f"{name}: message {place} needs a role (system, user or assistant) and a content that is a text."
            )
        expected = "assistant" if turns and turns[-1][0] == "user" else "user"
        if role != expected and not (role == "system" and not turns):
            raise UnreadableSampleError(
                f"{name}: message {place} is of the {role}, where one of the {expected} is expected; user and "
                "assistant take turns, after at most one message of the system."
            )
        if role == "assistant" and not content.strip():
            raise UnreadableSampleError(f"{name}: message {place} is an empty answer.")
        turns.append((role, content))
    if turns[-1][0] != "assistant":
        raise UnreadableSampleError(f"{name} does not end with an answer of the assistant.")
    return Conversation(turns)
