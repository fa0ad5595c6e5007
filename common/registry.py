"""One mechanism for everything that is chosen by name."""

import difflib
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

from fedhead.errors import UserError

T = TypeVar("T")


def suggest(name: str, known: list[str]) -> str:
    """Return a sentence that suggests names close to `name`, or lists all known ones."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(map(repr, close))}?"
    return f"Known: {', '.join(known)}." if len(known) <= 20 else f"There are {len(known)} known names."


class Registry(Generic[T]):
    """Entries by name; a decorator adds one.

    Example:
        >>> heads: Registry[type] = Registry("head")
        >>> @heads.register("linear")
        ... class Linear: ...
        >>> heads["linear"] is Linear
        True
    """

    def __init__(self, kind: str, modules: Mapping[str, str] | None = None) -> None:
        """Start empty.

        Args:
            kind: the name of an entry's kind, for messages.
            modules: names whose entry is made by importing a module, done when they are first asked for.
        """
        self.kind = kind
        self._entries: dict[str, T] = {}
        self._modules = dict(modules or {})

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers its object under `name`.

        Raises:
            ValueError: if `name` is taken.
        """

        def enter(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"The {self.kind} {name!r} is registered already.")
            self._entries[name] = entry
            return entry

        return enter

    def __getitem__(self, name: str) -> T:
        """Return the entry.

        Raises:
            UserError: if there is none, with the close names.
        """
        if name not in self._entries and name in self._modules:
            importlib.import_module(self._modules[name])
        try:
            return self._entries[name]
        except KeyError:
            raise UserError(f"There is no {self.kind} {name!r}. {suggest(name, list(self))}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries.keys() | self._modules.keys()))
