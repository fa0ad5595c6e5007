import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import pytest
import torch
from flwr.app import Message
from flwr.supercore.run import Run

from fedhead.backbones import Backbone, load_backbone
from fedhead.config import RunConfig
from fedhead.flower import in_process_identity
from fedhead.protocol.messages import Description, Manifest, Payload, WeightsChunk
from fedhead.server.exchange import Exchange
from fedhead.server.grid import SiteGrid
from fedhead.server.installing import Installation
from fedhead.server.latecomers import Latecomers
from fedhead.server.messenger import Messenger
from fedhead.server.observer import Observer, SiteState
from fedhead.server.roster import Roster
from fedhead.server.weights_file import WeightsFile


class Registry(SiteGrid):
    """A Grid that knows the registered names of some nodes and delivers nothing."""

    def __init__(self, names: Mapping[int, str]) -> None:
        self.names = names

    def site_name(self, node_id: int) -> str | None:
        return self.names.get(node_id)

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(self, *args: object, **options: object) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return self.names

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError


class Watch(Observer):
    def __init__(self) -> None:
        self.seen: list[Mapping[str, SiteState]] = []

    def on_sites(self, sites: Mapping[str, SiteState]) -> None:
        self.seen.append(sites)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("bundled:pixels")


@pytest.fixture
def watch() -> Watch:
    return Watch()


@pytest.fixture
def roster(backbone: Backbone, watch: Watch) -> Roster:
    manifest = Manifest.of("0" * 32, RunConfig(), backbone, ("cat", "dog"))
    messenger = Messenger(Registry({1: "a", 2: "b"}), 1.0)
    return Roster(messenger, manifest, WeightsFile(backbone, 10), torch.zeros(1, 4), watch)


def described(site: str, **values: object) -> Description:
    return Description.model_validate({"site": site, "rows": 7, "has_weights": True, **values})


def admit(roster: Roster, sites: Sequence[tuple[str, int]]) -> None:
    for site, node in sites:
        assert roster.judge(described(site), node) == "fit"
        roster.admit(described(site), node)


def test_admitted_sites_take_part_and_the_observer_sees_each_change_once(roster: Roster, watch: Watch) -> None:
    admit(roster, [("a", 1), ("b", 2)])
    roster.tell()
    roster.tell()
    assert roster.nodes == {"a": 1, "b": 2}
    assert roster.rows == {"a": 7, "b": 7}
    (seen,) = watch.seen
    assert {name: (state.standing, state.rows) for name, state in seen.items()} == dict.fromkeys("ab", ("ready", 7))


def test_the_observer_sees_the_release_steps_that_sites_describe(roster: Roster, watch: Watch) -> None:
    roster.admit(described("a", steps=("The guard withholds small classes.", "A\x1b[2Jledger.")), 1)
    roster.admit(described("b"), 2)
    roster.tell()
    assert [watch.seen[-1][site].steps for site in "ab"] == [
        ("The guard withholds small classes.", "A\\x1b[2Jledger."),
        (),
    ]


@pytest.mark.parametrize(
    ("site", "node", "words"),
    [
        ("b", 1, "calls itself 'b' and is registered as 'a'"),
        ("c", 9, "C cannot."),
        ("free", 10, "takes part already"),
    ],
)
def test_impostors_and_refusing_sites_are_refused(site: str, node: int, words: str, roster: Roster) -> None:
    admit(roster, [("b", 2), ("free", 9)])
    refusal = "C cannot." if site == "c" else ""
    assert roster.judge(described(site, refusal=refusal), node) == "refused"
    (refused,) = [reason for reason in roster.refused.values() if words in reason]
    assert refused
    assert roster.nodes == {"b": 2, "free": 9}


def test_the_log_has_each_reason_once(roster: Roster, caplog: pytest.LogCaptureFixture) -> None:
    for site, reason in (
        ("north", "too few rows"),
        ("south", "too few rows"),
        ("north", "too few rows"),
        ("west", "no"),
    ):
        roster.refuse(site, reason)
    assert caplog.messages == [
        "north takes no part: too few rows",
        "south takes no part, for the same reason as north.",
        "west takes no part: no",
    ]


def test_a_site_that_takes_no_bytes_of_the_weights_is_refused(roster: Roster) -> None:
    assert roster.judge(described("a", has_weights=False, received=0), 1) == "lacking"
    assert roster.judge(described("a", has_weights=False, received=10), 1, sent=0) == "lacking"
    assert roster.judge(described("a", has_weights=False, received=10), 1, sent=10) == "refused"
    assert roster.judge(described("a", has_weights=False, received=1), 1, sent=0) == "refused"
    assert roster.judge(described("a", has_weights=False, received=10**12), 1, sent=0) == "refused"
    assert "still has none" in roster.refused["a"]
    assert roster.judge(described("a"), 1) == "fit"
    assert not roster.refused


def test_lost_sites_may_return_and_excluded_sites_may_not(roster: Roster) -> None:
    admit(roster, [("a", 1), ("b", 2)])
    roster.lose("a", "it did not answer.")
    roster.exclude({"b": "Its sums are not finite.", "stranger": "Unknown."})
    assert not roster.nodes
    assert roster.turned_away == {2}
    assert roster.judge(described("a"), 1) == "fit"
    assert roster.judge(described("b"), 2) == "refused"
    assert roster.refused == {"b": "Its sums are not finite."}


def test_a_shortage_names_the_missing_sites_and_why(roster: Roster) -> None:
    assert "No site is connected" in roster.shortage(1)
    admit(roster, [("a", 1), ("b", 2)])
    assert roster.shortage(2) == ""
    roster.lose("b", "it did not answer.")
    shortage = roster.shortage(2)
    assert "1 of 2 sites can take part (a)" in shortage
    assert "b: it did not answer." in shortage


class Hesitant(Registry):
    """A site that takes a few bytes of the weights and leaves."""

    def __init__(self, received: int) -> None:
        super().__init__({1: "a"})
        self.received = received
        self.connected = True
        self.sent: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        return [1] if self.connected else []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        pushed = {f"message {number}": message for number, message in enumerate(messages, len(self.sent))}
        self.sent |= pushed
        return list(pushed)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        description = Description(site="a", rows=7, received=self.received).model_dump()
        for message_id in list(message_ids):
            reply = Message(Payload(description).to_content(), reply_to=self.sent[message_id])
            reply.metadata.__dict__["_reply_to_message_id"] = message_id
            yield reply


@pytest.mark.parametrize("received", [5, 2**40])
def test_a_site_that_comes_and_goes_makes_progress_once(roster: Roster, received: int) -> None:
    grid = Hesitant(received)
    messenger = Messenger(grid, 1.0)
    latecomers = Latecomers(messenger, roster)
    counted = []
    with in_process_identity(run_id=1):
        for _ in range(3):
            grid.connected = True
            latecomers.welcome(1)
            messenger.poll()
            latecomers.welcome(1)
            messenger.poll()
            grid.connected = False
            latecomers.welcome(1)
            counted.append(latecomers.received)
    assert counted == [min(received, roster.weights.size)] * 3


class Paces(Hesitant):
    """Two sites that take the weights chunk by chunk; the second answers only while `slow_answers` says so."""

    def __init__(self, size: int, slow_answers: Callable[["Paces"], bool]) -> None:
        super().__init__(0)
        self.names = {1: "a", 2: "b"}
        self.has = {1: 0, 2: 0}
        self.size = size
        self.slow_answers = slow_answers
        self.answered: set[str] = set()
        self.forgotten: set[str] = set()

    def wait(self, seconds: float) -> None:
        time.sleep(0.001)

    def forget(self, message_ids: Iterable[str]) -> None:
        self.forgotten |= set(message_ids)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for message_id in set(message_ids) - self.answered:
            question = self.sent[message_id]
            node = question.metadata.dst_node_id
            if node == 2 and not self.slow_answers(self):
                continue
            self.answered.add(message_id)
            chunk = WeightsChunk.from_payload(Payload.from_content(question.content))
            self.has[node] += len(chunk.data)
            done = self.has[node] == self.size
            answer = described(self.names[node], has_weights=done, received=self.has[node])
            reply = Message(Payload(answer.model_dump()).to_content(), reply_to=question)
            reply.metadata.__dict__["_reply_to_message_id"] = message_id
            yield reply


def install(roster: Roster, grid: Paces, deadline: float) -> Exchange:
    messenger = Messenger(grid, deadline)
    with in_process_identity(run_id=1):
        return Installation(messenger, roster, {"a": 1, "b": 2}).run()


def test_a_site_receives_the_weights_at_its_own_pace(roster: Roster) -> None:
    size = roster.weights.size
    grid = Paces(size, lambda grid: grid.has[1] == size)
    exchange = install(roster, grid, 60.0)
    assert roster.nodes == {"a": 1, "b": 2}
    assert not exchange.dropped
    assert exchange.bytes_down > 2 * size


def test_a_silent_site_keeps_others_waiting_for_one_deadline(roster: Roster) -> None:
    grid = Paces(roster.weights.size, lambda grid: False)
    exchange = install(roster, grid, 0.3)
    assert roster.nodes == {"a": 1}
    assert set(exchange.dropped) == exchange.late == {"b"}
    assert grid.forgotten == set(grid.sent) - grid.answered


def test_a_site_that_confirms_each_chunk_late_does_not_hold_up_a_run(roster: Roster) -> None:
    size = roster.weights.size
    started = time.monotonic()
    grid = Paces(size, lambda grid: time.monotonic() - started > 0.25 * (grid.has[2] / 10 + 1))
    exchange = install(roster, grid, 0.5)
    assert size > 100
    assert roster.nodes == {"a": 1}
    assert exchange.late == {"b"}


def test_payload_counts_under_the_registered_name(roster: Roster) -> None:
    messenger = roster._messenger
    messenger.traffic.sent(("1",), "describe", 7)
    messenger.traffic.sent(("b",), "install", 5)
    messenger.traffic.rename("1", roster.name_of(1, "b"))
    messenger.traffic.rename("b", "b")
    assert dict(messenger.traffic.down) == {"a": 7, "b": 5}
