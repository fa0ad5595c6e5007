"""Payload by site and by action, over all exchanges of a run."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self


@dataclass
class Traffic:
    """Payload by site and by action, over all exchanges of a run.

    Attributes:
        down: bytes sent to each site.
        up: bytes that each site sent.
        action_down: bytes sent for each action.
        action_up: bytes of the replies to it.
        answers: how many replies came.
    """

    down: Counter[str] = field(default_factory=Counter)
    up: Counter[str] = field(default_factory=Counter)
    action_down: Counter[str] = field(default_factory=Counter)
    action_up: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)

    def sent(self, sites: Sequence[str], action: str, count: int) -> None:
        """Note a message of `count` bytes to each of some sites."""
        for site in sites:
            self.down[site] += count
        self.action_down[action] += count * len(sites)

    def received(self, sites: Sequence[str], action: str, count: int) -> None:
        """Note the replies of sites, of `count` bytes in all."""
        for site in sites:
            self.up[site] += count // len(sites)
        self.action_up[action] += count
        self.answers[action] += len(sites)

    def rename(self, node: str, site: str) -> None:
        """Count the payload of a node as that of the site that it turned out to be."""
        if node != site:
            self.down[site] += self.down.pop(node, 0)
            self.up[site] += self.up.pop(node, 0)

    def to_dict(self) -> dict[str, dict[str, list[int]]]:
        """Return bytes down and up of each site, and answers, bytes down and bytes up of each action."""
        return {
            "sites": {site: [self.down[site], self.up[site]] for site in sorted(self.down.keys() | self.up.keys())},
            "actions": {
                action: [self.answers[action], count, self.action_up[action]]
                for action, count in self.action_down.items()
            },
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Mapping[str, Sequence[int]]]) -> Self:
        """Undo `to_dict`."""
        sites, actions = values["sites"], values["actions"]
        return cls(
            down=Counter({site: down for site, (down, _) in sites.items()}),
            up=Counter({site: up for site, (_, up) in sites.items()}),
            action_down=Counter({action: down for action, (_, down, _) in actions.items()}),
            action_up=Counter({action: up for action, (_, _, up) in actions.items()}),
            answers=Counter({action: answers for action, (answers, _, _) in actions.items()}),
        )
