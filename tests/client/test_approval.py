from datetime import UTC, datetime
from pathlib import Path

import pytest

from fedhead.client.approval import Approvals
from fedhead.client.guard import Entry, Ledger, read_ledger
from fedhead.errors import FedheadError

ENTRY = Entry(
    when=datetime.now(UTC),
    run="5eed",
    site="here",
    action="train",
    rows=120,
    classes={"ill": 40, "well": 80},
    bytes=512,
    digest="ab" * 32,
)


class Person:
    def __init__(self, agrees: bool) -> None:
        self.agrees = agrees
        self.shown: list[str] = []

    def __call__(self, shown: str) -> bool:
        self.shown.append(shown)
        return self.agrees


def test_a_person_sees_the_entry_and_is_asked_once_for_each_kind_and_coordinator(tmp_path: Path) -> None:
    person = Person(agrees=True)
    path = tmp_path / "approvals.json"
    Approvals(path, "one", person)(ENTRY)
    for part in ("train", "5eed", "120", "ill 40, well 80", "512", "ab" * 32):
        assert part in person.shown[0]
    Approvals(path, "one", person)(ENTRY)
    Approvals(path, "one", None)(ENTRY)
    assert len(person.shown) == 1
    Approvals(path, "one", person)(ENTRY.model_copy(update={"action": "evaluate"}))
    Approvals(path, "another", person)(ENTRY)
    assert len(person.shown) == 3


def test_a_person_who_declines_is_asked_again(tmp_path: Path) -> None:
    person = Person(agrees=False)
    approvals = Approvals(tmp_path / "approvals.json", "one", person)
    for _ in range(2):
        with pytest.raises(FedheadError, match="operator of here did not approve train"):
            approvals(ENTRY)
    assert len(person.shown) == 2


def test_without_anyone_to_ask_nothing_new_leaves(tmp_path: Path) -> None:
    with pytest.raises(FedheadError, match="without a terminal"):
        Approvals(tmp_path / "approvals.json", "one", None)(ENTRY)
    assert not list(tmp_path.iterdir())


def test_damaged_approvals_approve_nothing(tmp_path: Path) -> None:
    path = tmp_path / "approvals.json"
    path.write_text('{"one": {"tra')
    with pytest.raises(FedheadError, match="cannot be read"):
        Approvals(path, "one", Person(agrees=True))(ENTRY)


def test_what_is_not_approved_is_not_in_the_ledger(tmp_path: Path) -> None:
    person = Person(agrees=False)
    ledger = Ledger(tmp_path / "here.jsonl", approve=Approvals(tmp_path / "approvals.json", "one", person))

    def release() -> None:
        ledger.record(b"payload", run="5eed", site="here", action="train", rows=7, classes={"ill": 7})

    with pytest.raises(FedheadError, match="did not approve"):
        release()
    assert read_ledger(ledger.path) == []
    person.agrees = True
    release()
    assert [entry.rows for entry in read_ledger(ledger.path)] == [7]
