from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhead.client.attempts import KEPT, MOST_DEATHS, Attempts

ONE, OTHER = "1" * 64, "2" * 64


def dies_at(path: Path, message: str) -> None:
    assert Attempts(path).begin(message)


def test_a_message_is_answered_until_two_processes_died_of_it(tmp_path: Path) -> None:
    path = tmp_path / "attempts.json"
    for _ in range(MOST_DEATHS):
        dies_at(path, ONE)
    for _ in range(3):
        attempts = Attempts(path)
        assert not attempts.begin(ONE)
        assert attempts.begin(OTHER)
        attempts.end()


def test_an_answer_forgets_the_death_before_it(tmp_path: Path) -> None:
    path = tmp_path / "attempts.json"
    dies_at(path, ONE)
    attempts = Attempts(path)
    assert attempts.begin(ONE)
    attempts.end()
    dies_at(path, ONE)
    assert Attempts(path).begin(ONE)


def test_a_stop_is_no_death_and_forgives_none(tmp_path: Path) -> None:
    path = tmp_path / "attempts.json"
    dies_at(path, ONE)
    for _ in range(3):
        attempts = Attempts(path)
        assert attempts.begin(ONE)
        attempts.end(answered=False)
    dies_at(path, ONE)
    assert not Attempts(path).begin(ONE)


def test_only_the_latest_deaths_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "attempts.json"
    for number in range(KEPT + 10):
        dies_at(path, f"{number:064x}")
    Attempts(path)
    assert path.stat().st_size < 100 * KEPT
    for _ in range(MOST_DEATHS - 1):
        dies_at(path, f"{KEPT + 9:064x}")
    assert not Attempts(path).begin(f"{KEPT + 9:064x}")


@pytest.mark.parametrize(
    "damaged", [b"", b"{", b"[" * 100_000, b'{"current": "../x"}', b'{"deaths": {"a": 1}}', b"\xff"]
)
def test_a_damaged_journal_counts_as_empty(tmp_path: Path, damaged: bytes) -> None:
    path = tmp_path / "attempts.json"
    path.write_bytes(damaged)
    assert Attempts(path).begin(ONE)
    assert Attempts(path).begin(ONE)
    assert not Attempts(path).begin(ONE)


@given(st.binary(max_size=200))
def test_any_journal_can_be_opened(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("journal") / "attempts.json"
    path.write_bytes(content)
    assert Attempts(path).begin(ONE)
