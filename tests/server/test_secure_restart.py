"""A coordinator that is killed during a secure run, and resumed."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from flwr.app import Message, RecordDict

from fedhead.flower import in_process_identity
from fedhead.protocol.actions import AGREE, OPEN, STATISTICS, TRAIN, UNMASK

from .test_secure_network import SITES, MaskedNetwork, config, run, simulated

AFTER = "after all unmasked"


@pytest.fixture(scope="module", autouse=True)
def in_process(one_thread: None) -> Iterator[None]:
    with in_process_identity(run_id=1):
        yield


class KilledError(Exception):
    """The coordinator's process ends."""


class Killing(MaskedNetwork):
    """Ends the coordinator at an exchange of the sum of an action, or once it has all replies of that sum.

    Args:
        folder: of the sites.
        action: of the sum.
        number: of such sums, from 1.
        at: the action of the exchange, or `AFTER`.
    """

    def __init__(self, folder: Path, action: str, number: int, at: str) -> None:
        super().__init__(folder)
        self.action = action
        self.left = number
        self.at = at
        self.unmasked = 0
        self.killed = False
        self.change = self.kill

    def kill(self, name: str, message: Message) -> RecordDict | None:
        asked = message.metadata.message_type
        if name == "s0" and asked == self.action and not self.killed:
            self.left -= 1
        if not self.killed and self.left <= 0 and asked == self.at:
            self.killed = True
            raise KilledError
        return None

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        for message in super().pull_messages(message_ids):
            yield message
            if self.at == AFTER and self.left <= 0 and message.metadata.message_type == UNMASK and not self.killed:
                self.unmasked += 1
                if self.unmasked == SITES:
                    self.killed = True
                    raise KilledError


@pytest.mark.slow
@pytest.mark.parametrize(
    ("action", "number", "at"),
    [
        (STATISTICS, 1, AFTER),
        (TRAIN, 2, TRAIN),
        (TRAIN, 2, AGREE),
        (TRAIN, 2, UNMASK),
        (TRAIN, 2, AFTER),
        (TRAIN, 1, OPEN),
    ],
)
def test_a_killed_coordinator_resumes_and_ends_as_if_it_had_not_been(
    action: str, number: int, at: str, tmp_path: Path
) -> None:
    network = Killing(tmp_path, action, number, at)
    with pytest.raises(KilledError):
        run(network, config(min_sites=SITES), tmp_path / "run")
    outcome, _ = run(network, config(min_sites=SITES), tmp_path / "run", resume=True)
    assert network.killed
    expected = simulated()
    assert [line.score for line in outcome.history] == pytest.approx([line.score for line in expected.history])
    assert [line.sites for line in outcome.history] == [0, SITES, SITES]
