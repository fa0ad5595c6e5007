"""The form of conversations for a language model: the texts around their turns, and token ids with their targets."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from fedhead.data.conversations import Role, Turn

Render = Callable[[Sequence[Turn], bool], str]
"""Renders turns with a chat template; True adds the beginning of an answer."""

_TRIALS: tuple[tuple[Role, ...], ...] = (
    ("user", "assistant"),
    ("system", "user", "assistant"),
    ("user", "assistant", "user", "assistant", "user", "assistant"),
)


@dataclass(frozen=True)
class ChatForm:
    """The texts around the turns of a conversation, so that no template has to be executed.

    Attributes:
        start: before the first text of the user, without one of the system.
        system: before the text of the system; None if it is put before the first text of the user.
        after_system: between it and the first text of the user.
        answer: between a text of the user and an answer, unless it is the last one.
        last_answer: before the last answer.
        prompt: before an answer that is to be generated.
        following: between an answer and the next text of the user.
        end: after the last answer.
    """

    start: str = ""
    system: str | None = None
    after_system: str = ""
    answer: str = "\n"
    last_answer: str = "\n"
    prompt: str = "\n"
    following: str = "\n"
    end: str = ""

    @classmethod
    def of(cls, render: Render) -> Self:
        """Return the form of a chat template.

        Raises:
            ValueError: if the template does more than put texts around the turns, whose outer spaces it may remove.
        """
        start, answer, following, last_answer, end = _around(render, ("user", "assistant", "user", "assistant"))
        first = _around(render, ("user", "assistant"))
        prompt = _around(render, ("user",), generating=True)
        try:
            system: str | None
            system, after_system, *_ = _around(render, ("system", "user", "assistant"))
        # Some templates raise an error for a text of the system.
        except Exception:
            system, after_system = None, ""
        found = cls(start, system, after_system, answer, first[1], prompt[1], following, end)
        if last_answer != first[1]:
            raise ValueError("an answer looks different in longer conversations")
        for roles in _TRIALS:
            turns = [(role, f"{role} says\nthis {place}.") for place, role in enumerate(roles)]
            if found.system is None and roles[0] == "system":
                continue
            if "".join(text for text, _ in found.parts(turns)) != render(turns, False):
                raise ValueError("it does more than put texts around the turns")
        return found

    def parts(self, turns: Sequence[Turn]) -> list[tuple[str, bool]]:
        """Return the texts of a conversation in order, each with whether it is an answer to learn.

        A conversation that ends with a text of the user gets the beginning of an answer.
        """
        rest = list(turns)
        text = self.start
        if rest and rest[0][0] == "system":
            own = rest.pop(0)[1].strip()
            text = f"{self.start}{own}\n\n" if self.system is None else f"{self.system}{own}{self.after_system}"
        stop = self.end if self.following.startswith(self.end) else ""
        found: list[tuple[str, bool]] = []
        for place, (role, said) in enumerate(rest):
            last = place + 2 >= len(rest)
            if role == "user":
                before = self.prompt if place + 1 == len(rest) else self.last_answer if last else self.answer
                found.append((f"{text}{said.strip()}{before}", False))
            else:
                found.append((said.strip() + (self.end if place + 1 == len(rest) else stop), True))
                text = self.following.removeprefix(stop)
        return found


def _around(render: Render, roles: Sequence[Role], *, generating: bool = False) -> list[str]:
    """Return the texts before, between and after turns.

    Raises:
        ValueError: if a turn does not occur once, in order.
    """
    turns = [(role, f"Turn{place}Of{role}") for place, role in enumerate(roles)]
    rest, found = render(turns, generating), []
    for _, said in turns:
        before, mark, rest = rest.partition(said)
        if not mark or said in rest:
            raise ValueError("it repeats or leaves out turns")
        found.append(before)
    return [*found, rest]


@dataclass(frozen=True)
class Encoded:
    """Token ids of a conversation.

    Attributes:
        ids: of all tokens.
        learned: whether each belongs to an answer.
        cut: whether tokens were left out, because there were more than the model takes.
    """

    ids: Sequence[int]
    learned: Sequence[bool]
    cut: bool


def encode(parts: Sequence[tuple[str, bool]], ids_of: Callable[[str], Sequence[int]], first: int, most: int) -> Encoded:
    """Encode the parts of a conversation; of too many tokens the first ones are left out.

    The beginning of the last answer is always kept, with a token before it.

    Args:
        parts: texts, and whether each is an answer.
        ids_of: returns the ids of a text, without special ones around it.
        first: the id before an answer that nothing else precedes.
        most: the limit of tokens, 2 or more.
    """
    ids: list[int] = []
    learned: list[bool] = []
    begins = 0
    for text, answer in parts:
        made = list(ids_of(text))
        if answer:
            if not ids:
                ids, learned = [first], [False]
            begins = len(ids)
        ids += made
        learned += [answer] * len(made)
    if not ids:
        ids, learned = [first], [False]
    start = max(len(ids) - most, 0)
    if any(learned):
        start = min(start, begins - 1)
    return Encoded(ids[start : start + most], learned[start : start + most], len(ids) > most)
