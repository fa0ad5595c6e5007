import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from fedhead.data import UnreadableSampleError, load_samples
from fedhead.data.conversations import CONVERSATION, Conversation, from_messages
from fedhead.data.items import Word, content_key
from fedhead.errors import UserError


def written(folder: Path, *records: Any) -> str:
    path = folder / "conversations.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return f"jsonl:{path}"


def test_pairs_and_messages_are_read(tmp_path: Path) -> None:
    samples = load_samples(
        written(tmp_path, {"prompt": "Hi?", "completion": "Yes."}, {"prompt": "", "completion": "A"})
    )
    assert (len(samples), samples.kind, samples.annotated) == (2, "text", CONVERSATION)
    first = samples.read(0)
    assert isinstance(first, Conversation)
    assert first.turns == (("user", "Hi?"), ("assistant", "Yes."))
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    whole = [*messages, {"role": "assistant", "content": "A"}]
    read = load_samples(written(tmp_path, {"messages": whole, "group": "g"})).read(0)
    assert isinstance(read, Conversation)
    assert [role for role, _ in read.turns] == ["system", "user", "assistant"]


def test_equal_conversations_have_equal_keys_and_others_do_not(tmp_path: Path) -> None:
    same, other = {"prompt": "a", "completion": "b"}, {"prompt": "ab", "completion": "b"}
    samples = load_samples(written(tmp_path, same, same, other))
    keys = [samples.key(row, samples.read(row)) for row in range(3)]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "a"}, "line 2 has no completion"),
        ({"prompt": "a", "completion": " "}, "line 2 has no completion"),
        ({"prompt": "a", "completion": 3}, "completion of type int"),
        ({"prompt": ["a"], "completion": "b"}, "prompt of type list"),
    ],
)
def test_a_record_without_a_completion_is_named(tmp_path: Path, record: Any, reason: str) -> None:
    samples = load_samples(written(tmp_path, {"prompt": "a", "completion": "b"}, record))
    with pytest.raises(UnreadableSampleError, match=reason):
        samples.read(1)


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        ([], "no list of messages"),
        (["user"], "does not end with an answer"),
        (["user", "user"], "one of the assistant is expected"),
        (["assistant"], "one of the user is expected"),
        (["user", "system", "assistant"], "after at most one message of the system"),
        (["tool"], "needs a role"),
    ],
)
def test_other_orders_of_messages_are_refused(roles: list[str], reason: str) -> None:
    with pytest.raises(UnreadableSampleError, match=reason):
        from_messages([{"role": role, "content": "x"} for role in roles], "row 1")


def test_mistakes_in_files_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no column 'completion'"):
        load_samples(written(tmp_path, {"prompt": "a", "text": "b"}))
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\nnot json\n')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        load_samples(f"jsonl:{path}")
    texts = load_samples(
        written(tmp_path, {"prompt": "a", "completion": "b", "label": "x"}) + "?text=prompt&label=label"
    )
    assert texts.annotated == ""
    assert texts.classes == ("x",)


@pytest.mark.parametrize("text", [Conversation([("user", "a"), ("assistant", "b")]), Word(("two", "words"), 1)])
def test_copies_and_pickles_are_the_same_item(text: str) -> None:
    for again in (pickle.loads(pickle.dumps(text)), copy.deepcopy(text)):
        assert (type(again), str(again), content_key(again)) == (type(text), str(text), content_key(text))
