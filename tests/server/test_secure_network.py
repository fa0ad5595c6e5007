"""Secure summation with real sites and masks, on a Grid that behaves like a network."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message, RecordDict

from fedhead.client.backbones import AcceptedBackbones
from fedhead.client.local_site import LocalSite
from fedhead.client.release.guard import Guard
from fedhead.client.release.ledger import Ledger
from fedhead.client.release.masking import SecureSum
from fedhead.client.release.secure_sessions import SecureSessions
from fedhead.config import RunConfig
from fedhead.data import Samples, load_samples, samples_from_arrays, sources
from fedhead.errors import FedheadError, UserError
from fedhead.flower import in_process_identity
from fedhead.protocol.actions import AGREE, OPEN, REPORT, STATISTICS, TRAIN, UNMASK
from fedhead.protocol.messages import Payload
from fedhead.secure.keys import SiteKeys, signed_roster
from fedhead.server.app import coordinate
from fedhead.server.observer import Observer
from fedhead.server.runs.history import Outcome
from fedhead.simulations import simulate

from .test_network import Network

ROWS, SITES = 300, 5
NAMES = [f"s{number}" for number in range(SITES)]
CLASSES = [str(digit) for digit in range(10)]
ACCEPTED = AcceptedBackbones(frozenset({"bundled:glyphnet"}))


def config(**changes: Any) -> RunConfig:
    return RunConfig(
        **{"classes": CLASSES, "rounds": 2, "round_deadline": 20, "privacy": {"secure_sum": True}, **changes}
    )


@pytest.fixture(scope="module", autouse=True)
def in_process(one_thread: None) -> Iterator[None]:
    with in_process_identity(run_id=1):
        yield


@sources.register("every-fifth-digit")
def every_fifth_digit(argument: str) -> Samples:
    whole = load_samples("digits")
    rows = range(int(argument), ROWS, SITES)
    return samples_from_arrays(
        [whole.read(row) for row in rows], whole.labels[list(rows)], classes=whole.classes, spec=f"fifth {argument}"
    )


class MaskedNetwork(Network):
    """Five sites with a roster, each keeping its sessions on disk."""

    def __init__(self, folder: Path) -> None:
        self.keys = {name: SiteKeys.generate() for name in NAMES}
        self.folder = folder
        self.roster = signed_roster(
            ec.generate_private_key(ec.SECP256R1()), {name: own.member for name, own in self.keys.items()}
        )
        super().__init__(NAMES, self.site)

    def site(self, name: str, row: int) -> LocalSite:
        sessions = SecureSessions(self.folder / f"{name}.sqlite", name, self.keys[name], self.roster)
        return LocalSite(
            name,
            f"every-fifth-digit:{row}",
            "cpu",
            guard=Guard.off(),
            ledger=Ledger(self.folder / f"{name}.jsonl", 0),
            backbones=ACCEPTED,
            summation=SecureSum(required=True, sessions=sessions),
        )


class Ended(Observer):
    def __init__(self) -> None:
        self.outcome: Outcome | None = None
        self.phases: list[str] = []

    def on_phase(self, phase: str) -> None:
        self.phases.append(phase)

    def on_finished(self, outcome: Outcome) -> None:
        self.outcome = outcome


def run(network: MaskedNetwork, settings: RunConfig, out: Path, resume: bool = False) -> tuple[Outcome, Ended]:
    ended = Ended()
    coordinate(settings, network, out, observers=[ended], members=network.roster, resume=resume)
    assert ended.outcome is not None
    return ended.outcome, ended


def simulated(**changes: Any) -> Outcome:
    rows = [np.arange(number, ROWS, SITES) for number in range(SITES)]
    table = {"min_class_count": 0, "min_rows": 0, **changes.pop("simulation", {})}
    whole = load_samples("digits")
    samples = samples_from_arrays([whole.read(row) for row in range(ROWS)], whole.labels[:ROWS], classes=whole.classes)
    return simulate(config(**changes, simulation=table), data=samples, sites=rows).outcome


def test_masked_sums_are_those_of_the_simulation(tmp_path: Path) -> None:
    outcome, ended = run(MaskedNetwork(tmp_path), config(), tmp_path / "run")
    expected = simulated()
    assert outcome.statistics is not None
    assert expected.statistics is not None
    own, other = outcome.statistics.to_tensors(), expected.statistics.to_tensors()
    assert own.keys() == other.keys()
    # Some processors round a row's features by how many rows are extracted with it; a wrong mask is off by far more.
    for name, tensor in own.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(outcome.head.weight, expected.head.weight, rtol=1e-4, atol=1e-5)
    assert [line.score for line in outcome.history] == pytest.approx([line.score for line in expected.history])
    assert [line.sites for line in outcome.history] == [0, SITES, SITES]
    assert ended.phases[:4] == ["open", "mask", "agree", "unmask"]
    assert len(ended.phases) % 4 == 0


def test_the_coordinator_sees_no_sums_of_a_site(tmp_path: Path) -> None:
    network = MaskedNetwork(tmp_path)
    seen: list[tuple[str, set[str], Mapping[str, Any]]] = []
    pull = network.pull_messages

    def watched(ids: Any) -> Iterator[Message]:
        for message in pull(ids):
            if not message.has_error():
                payload = Payload.from_content(message.content)
                seen.append((message.metadata.message_type, set(payload.arrays), payload.values))
            yield message

    network.pull_messages = watched  # type: ignore[method-assign]
    run(network, config(rounds=1), tmp_path / "run")
    for action, arrays, values in seen:
        if action in (STATISTICS, TRAIN, REPORT):
            assert arrays == {"sum"}
        assert values.get("rows", 0) == 0
    assert {action for action, _, _ in seen} >= {OPEN, AGREE, UNMASK, STATISTICS, TRAIN}


@pytest.mark.parametrize("lost_at", [OPEN, STATISTICS, AGREE, UNMASK])
def test_a_site_may_be_lost_after_each_exchange(lost_at: str, tmp_path: Path) -> None:
    network = MaskedNetwork(tmp_path)
    left: list[str] = []

    def change(name: str, message: Message) -> RecordDict | None:
        # From the second exchange on it is gone before it answers; at the first it never comes.
        if name == "s3" and message.metadata.message_type == lost_at:
            network.connected.discard(name)
            left.append(name)
        return None

    network.change = change
    outcome, _ = run(network, config(rounds=1, min_sites=3), tmp_path / "run")
    assert left
    whole = 60 * SITES
    held = outcome.statistics.rows if outcome.statistics is not None else 0
    if lost_at in (AGREE, UNMASK):
        assert held > 0.75 * whole
    else:
        assert 0.5 * whole < held < 0.75 * whole


class Returning(MaskedNetwork):
    """Three sites are lost before they agree to the first sum of an action, and return after a while."""

    def __init__(self, folder: Path, action: str) -> None:
        super().__init__(folder)
        self.action = action
        self.lost: set[str] = set()
        self.polls = 0
        self.change = self.lose

    def lose(self, name: str, message: Message) -> RecordDict | None:
        began = any(action == self.action for _, action in self.sent)
        if began and message.metadata.message_type == AGREE and len(self.lost) < 3:
            self.lost.add(name)
            self.connected.discard(name)
        return None

    def get_node_ids(self) -> Iterable[int]:
        self.polls += len(self.lost) == 3
        if self.polls > 4:
            self.connected |= set(NAMES)
        return super().get_node_ids()


@pytest.mark.parametrize("action", [STATISTICS, TRAIN])
def test_a_sum_that_too_few_sites_finish_is_done_again_once_they_are_back(action: str, tmp_path: Path) -> None:
    network = Returning(tmp_path, action)
    outcome, _ = run(network, config(rounds=1, min_sites=5), tmp_path / "run")
    assert len(network.lost) == 3
    first = next(place for place, (_, sent) in enumerate(network.sent) if sent == action)
    agreed = [place for place, (_, sent) in enumerate(network.sent) if sent == AGREE and place > first]
    unmasked = [place for place, (_, sent) in enumerate(network.sent) if sent == UNMASK and place > first]
    assert sum(place < unmasked[0] for place in agreed) == 2 * SITES
    assert outcome.history[1].sites == SITES
    assert [line.score for line in outcome.history] == [line.score for line in simulated(rounds=1).history]


def test_a_roster_is_needed_before_anything_is_asked(tmp_path: Path) -> None:
    network = MaskedNetwork(tmp_path)
    with pytest.raises(UserError, match=r"needs roster\.toml in the coordinator's kit"):
        coordinate(config(), network, tmp_path / "run")
    assert not network.sent


def test_sites_that_demand_masks_take_no_part_in_plain_runs(tmp_path: Path) -> None:
    network = MaskedNetwork(tmp_path)
    plain = config(privacy={"secure_sum": False}, round_deadline=0.2)
    with pytest.raises(FedheadError, match=r"sends sums only under secure summation"):
        coordinate(plain, network, tmp_path / "run")
    assert not any(action == STATISTICS for _, action in network.sent)


def test_clusters_are_found_from_masked_sums(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"task": "clusters", "clusters": 3, "rounds": 0, "classes": ()}
    network = MaskedNetwork(tmp_path)
    outcome, _ = run(network, config(**changes), tmp_path / "run")
    expected = simulated(**changes)
    assert outcome.clusters["rows"] == expected.clusters["rows"]
    assert sum(outcome.clusters["rows"]) == ROWS
    torch.testing.assert_close(outcome.head.weight, expected.head.weight, rtol=1e-4, atol=1e-5)
