"""Messages to sites and the sums of their replies, over a Grid whose sites answer as each test says."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid

from fedhead.errors import FedheadError
from fedhead.flower import in_process_identity, set_message_id
from fedhead.flower.grids import Run
from fedhead.protocol.messages import UNDESCRIBED, Payload
from fedhead.server.collect import Collected, Question, collect
from fedhead.server.exchange import Exchange
from fedhead.server.grid import SiteGrid
from fedhead.server.messenger import UNREACHABLE, Messenger, Reply
from fedhead.server.traffic import Traffic
from fedhead.sums.comparison import ComparisonSums

ACTION = "query.compare"
NODES = {"a": 1, "b": 2, "c": 3}
Site = Callable[[Message], Message | None]


@pytest.fixture(autouse=True)
def _identity():
    with in_process_identity(run_id=1):
        yield


class ScriptedGrid(Grid):
    """Flower's Grid over functions; one that returns None never answers."""

    def __init__(self, sites: Mapping[int, Site]) -> None:
        self.sites = sites
        self.pending: dict[str, Message] = {}
        self.sent = 0

    def set_run(self, run: Run) -> None: ...

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.sites)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            self.sent += 1
            set_message_id(message, str(self.sent))
            self.pending[str(self.sent)] = message
            ids.append(str(self.sent))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for message_id in message_ids:
            message = self.pending.get(message_id)
            reply = None if message is None else self.sites[message.metadata.dst_node_id](message)
            if reply is not None:
                del self.pending[message_id]
                replies.append(reply)
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError


class GroupingGrid(ScriptedGrid, SiteGrid):
    """A Grid whose site 100 answers for all others but site 1, and that knows sites by name."""

    in_process = True
    forgotten: Sequence[str] = ()

    def site_name(self, node_id: int) -> str | None:
        return {1: "a", 2: "b"}.get(node_id)

    def together(self, node_ids: Sequence[int]) -> tuple[Mapping[int, Sequence[int]], Sequence[int]]:
        return {100: [node for node in node_ids if node != 1]}, [node for node in node_ids if node == 1]


class ForgettingGrid(ScriptedGrid, SiteGrid):
    forgotten: Sequence[str] = ()

    def forget(self, message_ids: Iterable[str]) -> None:
        self.forgotten = list(message_ids)


def counts(rows: int) -> ComparisonSums:
    joint = np.zeros((2, 2, 2), np.int64)
    joint[1, 0, 1] = rows
    return ComparisonSums(joint)


def sends(payload: Payload) -> Site:
    return lambda message: Message(payload.to_content(), reply_to=message)


def fails(code: int, reason: str) -> Site:
    return lambda message: Message(Error(code, reason), reply_to=message)


def sums_of(rows: int, values: Mapping[str, int] | None = None) -> Site:
    return sends(Payload(values or {}, counts(rows).to_arrays()))


def ask(grid: Grid, rows: int = 10, deadline: float = 5.0) -> tuple[Collected[ComparisonSums], Messenger]:
    messenger = Messenger(grid, deadline)
    question = Question(ACTION, Payload({"what": "heads"}).to_content(), ComparisonSums.zeros())
    return collect(messenger, NODES, question, dict.fromkeys(NODES, rows)), messenger


def test_replies_are_added_and_their_traffic_is_counted() -> None:
    collected, messenger = ask(ScriptedGrid({1: sums_of(3), 2: sums_of(4), 3: sums_of(0)}))
    assert collected.total.rows == 7
    assert collected.replies == 3
    assert not collected.exchange.dropped
    assert collected.exchange.asked == 3
    assert collected.exchange.bytes_up == sum(messenger.traffic.up.values())
    assert collected.exchange.bytes_down == sum(messenger.traffic.down.values()) > 0
    assert messenger.traffic.answers[ACTION] == 3


@pytest.mark.parametrize(
    ("site", "words"),
    [
        (sums_of(11), "it sums 11 rows, of 10"),
        (sends(Payload({}, {"joint": np.full((2, 2, 2), -1, np.int64)})), "impossible"),
        (sends(Payload({}, {"joint": np.zeros((2, 2, 2))})), "float64"),
        (sends(Payload({}, {**counts(1).to_arrays(), "site_counts": np.zeros(1)})), "site_counts"),
        (lambda message: Message(RecordDict({"x": ConfigRecord({"y": b"z"})}), reply_to=message), "records"),
        (fails(2, "The guard says no."), "The guard says no"),
        (fails(2, ""), "failed without a reason"),
    ],
)
def test_a_reply_that_is_unusable_is_dropped_with_the_reason(site: Site, words: str) -> None:
    collected, _ = ask(ScriptedGrid({1: sums_of(3), 2: site, 3: sums_of(4)}))
    assert collected.total.rows == 7
    assert list(collected.exchange.dropped) == ["b"]
    assert words in collected.exchange.dropped["b"]
    assert not collected.exchange.late
    assert collected.exchange.first_reasons().startswith(" b: ")


@pytest.mark.parametrize("site", [fails(UNREACHABLE, "it is not connected"), fails(2, f"{UNDESCRIBED}: tell it.")])
def test_a_site_that_is_gone_or_has_forgotten_the_run_is_late(site: Site) -> None:
    collected, _ = ask(ScriptedGrid({1: sums_of(3), 2: site, 3: sums_of(4)}))
    assert collected.exchange.late == {"b"} == collected.exchange.dropped.keys()


def test_a_site_that_does_not_answer_is_late_and_its_message_is_forgotten() -> None:
    grid = ForgettingGrid({1: sums_of(3), 2: lambda message: None, 3: sums_of(4)})
    collected, _ = ask(grid, deadline=0.1)
    assert collected.total.rows == 7
    assert collected.exchange.late == {"b"}
    assert "no reply within" in collected.exchange.dropped["b"]
    assert list(grid.forgotten) == ["2"]


def test_no_usable_reply_is_an_error_with_reasons() -> None:
    collected, _ = ask(ScriptedGrid(dict.fromkeys((1, 2, 3), fails(2, "No."))))
    with pytest.raises(FedheadError, match=r"Not one site's statistics could be used\. a: No\. b: No\. c: No\."):
        collected.require_one()


def test_one_reply_speaks_for_several_sites_of_this_process() -> None:
    grid = GroupingGrid({1: sums_of(3), 100: sums_of(20, {"num_bytes": 2000})})
    seen: list[tuple[tuple[str, ...], int]] = []
    messenger = Messenger(grid, 5.0)
    question = Question(ACTION, Payload().to_content(), ComparisonSums.zeros())
    collected = collect(
        messenger,
        NODES,
        question,
        dict.fromkeys(NODES, 10),
        lambda sites, sums, beside: seen.append((sites, sums.rows)),
    )
    assert sorted(seen) == [(("a",), 3), (("b", "c"), 20)]
    assert collected.total.rows == 23
    assert collected.exchange.asked == 3
    assert messenger.traffic.up["b"] == messenger.traffic.up["c"] == 1000
    assert messenger.registered_name(1) == "a"
    assert messenger.registered_name(9) is None


def test_a_site_cannot_say_how_long_its_reply_is() -> None:
    collected, _ = ask(ScriptedGrid({1: sums_of(3, {"num_bytes": 10**12}), 2: sums_of(3), 3: sums_of(3)}))
    assert collected.exchange.bytes_up < 5000


def test_a_posted_message_is_answered_while_others_are_waited_for() -> None:
    messenger, answers = Messenger(ScriptedGrid({1: sums_of(1), 2: sums_of(2)}), 5.0), []
    count = messenger.post("b", 2, ACTION, Payload().to_content(), answers.append)
    assert count == messenger.traffic.down["b"] > 0
    exchange = messenger.ask({"a": 1}, ACTION, Payload().to_content(), lambda reply: None)
    assert len(answers) == 1
    assert exchange.asked == 1
    messenger.poll()
    assert len(answers) == 1


def test_every_reader_may_drop_a_reply() -> None:
    def read(reply: Reply) -> None:
        raise ValueError(f"{reply.sites[0]} is not wanted")

    exchange = Messenger(ScriptedGrid({1: sums_of(1)}), 5.0).ask({"a": 1}, ACTION, Payload().to_content(), read)
    assert exchange.dropped == {"a": "a is not wanted"}


def test_exchanges_add_up() -> None:
    first = Exchange(dropped={"a": "late"}, late={"a"}, asked=2, bytes_down=3, bytes_up=4)
    first.include(Exchange(dropped={"b": "wrong"}, asked=5, bytes_down=6, bytes_up=7))
    assert (first.asked, first.bytes_down, first.bytes_up) == (7, 9, 11)
    assert first.dropped == {"a": "late", "b": "wrong"}
    assert first.late == {"a"}


def test_traffic_of_a_node_becomes_that_of_its_site_and_survives_json() -> None:
    traffic = Traffic()
    traffic.sent(["17"], ACTION, 100)
    traffic.received(["17"], ACTION, 40)
    traffic.rename("17", "a")
    assert traffic.to_dict() == {"sites": {"a": [100, 40]}, "actions": {ACTION: [1, 100, 40]}}
    assert Traffic.from_dict(traffic.to_dict()) == traffic
