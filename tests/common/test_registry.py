from pathlib import Path

import pytest

from fedhead.errors import UserError
from fedhead.registry import Registry, suggest


@pytest.fixture
def fruits() -> Registry[int]:
    registry: Registry[int] = Registry("fruit")
    registry.register("pear")(2)
    registry.register("apple")(1)
    return registry


def test_entries_are_found_and_listed_by_name(fruits: Registry[int]) -> None:
    assert fruits["apple"] == 1
    assert list(fruits) == ["apple", "pear"]
    assert "pear" in fruits
    assert "fig" not in fruits


def test_the_decorator_returns_what_it_enters(fruits: Registry[int]) -> None:
    assert fruits.register("fig")(3) == 3


def test_a_taken_name_is_refused_and_kept(fruits: Registry[int]) -> None:
    with pytest.raises(ValueError, match="The fruit 'apple' is registered already"):
        fruits.register("apple")(5)
    assert fruits["apple"] == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("appel", "There is no fruit 'appel'. Did you mean 'apple'?"),
        ("zzz", "There is no fruit 'zzz'. Known: apple, pear."),
    ],
)
def test_an_unknown_name_is_answered_with_the_close_ones(fruits: Registry[int], name: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        fruits[name]
    assert str(caught.value) == words


def test_many_names_are_counted_rather_than_listed() -> None:
    assert suggest("zzz", [f"name-{i}" for i in range(21)]) == "There are 21 known names."


def test_a_named_module_is_imported_when_its_entry_is_first_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fedhead_test_plums.py").write_text("import builtins\nbuiltins.plums.register('plum')(7)\n")
    monkeypatch.syspath_prepend(tmp_path)
    plums: Registry[int] = Registry("plum", {"plum": "fedhead_test_plums"})
    monkeypatch.setattr("builtins.plums", plums, raising=False)
    assert list(plums) == ["plum"]
    assert plums["plum"] == 7
