"""Runs over sites that are lost, late or gone: the real coordinator and apps, on a Grid that behaves like a network."""

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Error, Message, RecordDict

import fedhead.server.coordinator
import fedhead.server.latecomers
from fedhead.backbones import Backbone, load_backbone
from fedhead.client.app import make_app
from fedhead.client.backbones import AcceptedBackbones
from fedhead.client.local_site import LocalSite
from fedhead.client.release.guard import Guard
from fedhead.config import RunConfig
from fedhead.data import Samples, load_samples, samples_from_arrays, sources
from fedhead.errors import FedheadError
from fedhead.flower import in_process_identity
from fedhead.model import TransferModel
from fedhead.protocol.actions import DESCRIBE, INSTALL, STANDARDISE, STATISTICS, TRAIN
from fedhead.protocol.messages import PROTOCOL, Description, MessageError, Payload, WeightsChunk
from fedhead.server.app import coordinate
from fedhead.server.messenger import UNREACHABLE
from fedhead.server.observer import EachRound, Observer, SiteState
from fedhead.server.runs.history import Outcome, Round
from fedhead.simulations.grid import InProcessGrid, node_id_of
from fedhead.simulations.simulate import simulate

ROWS = 240
CLASSES = [str(digit) for digit in range(10)]
CONFIG = RunConfig(classes=CLASSES, rounds=5, init="nearest-mean", diagnose=False, round_deadline=20)


@pytest.fixture(scope="module", autouse=True)
def in_process(one_thread: None) -> Iterator[None]:
    with in_process_identity(run_id=1):
        yield


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fedhead.server.attendance, "RETURN_SECONDS", 0.3)


@sources.register("every-third-digit")
def every_third_digit(argument: str) -> Samples:
    whole = load_samples("digits")
    rows = range(int(argument), ROWS, 3)
    return samples_from_arrays(
        [whole.read(row) for row in rows], whole.labels[list(rows)], classes=whole.classes, spec=f"third {argument}"
    )


ACCEPTED = AcceptedBackbones(frozenset({"bundled:glyphnet"}))
"""Any weights of the backbone, as an operator who lists its spec accepts them."""


def _third(name: str, row: int) -> LocalSite:
    return LocalSite(name, f"every-third-digit:{row}", "cpu", guard=Guard.off(), backbones=ACCEPTED)


class Network(InProcessGrid):
    """Three sites, each a real app of its own, which come and go as a test says.

    Attributes:
        connected: the names of those that are.
        silent: those that are connected and do not answer.
        sent: what was asked of whom.
    """

    in_process = False

    def __init__(
        self, names: Sequence[str] = ("a", "b", "c"), make: Callable[[str, int], LocalSite] | None = None
    ) -> None:
        made = make or _third
        self.sites = {name: made(name, row) for row, name in enumerate(names)}
        apps = {name: make_app(partial(self._site, name)) for name in names}
        super().__init__(list(self.sites.values()), apps)
        self.names = {node_id_of(name): name for name in names}
        self.connected = set(names)
        self.silent: set[str] = set()
        self.sent: list[tuple[str, str]] = []
        self.forgotten: list[str] = []
        self.change: Callable[[str, Message], RecordDict | None] = lambda name, message: None
        self._waiting: dict[str, Message] = {}

    def _site(self, name: str, context: Context) -> LocalSite:
        return self.sites[name]

    def together(self, node_ids: Sequence[int]) -> tuple[Mapping[int, Sequence[int]], Sequence[int]]:
        return {}, list(node_ids)

    def get_node_ids(self) -> Iterable[int]:
        return [node_id_of(name) for name in sorted(self.connected)]

    def site_name(self, node_id: int) -> str | None:
        return self.names.get(node_id)

    def forget(self, message_ids: Iterable[str]) -> None:
        self.forgotten += message_ids

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        given = list(messages)
        for message in given:
            name = self.names[message.metadata.dst_node_id]
            self.sent.append((name, message.metadata.message_type))
            changed = self.change(name, message)
            if changed is not None:
                message.content = changed
        ids = list(super().push_messages(given))
        self._waiting |= zip(ids, given, strict=True)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        for message_id in message_ids:
            message = self._waiting.get(message_id)
            if message is None:
                continue
            name = self.names[message.metadata.dst_node_id]
            if name not in self.connected:
                del self._waiting[message_id]
                yield Message(Error(UNREACHABLE, "it is not connected, last heard of 3 s ago"), reply_to=message)
            elif name not in self.silent:
                del self._waiting[message_id]
                yield from super().pull_messages([message_id])

    def asked(self, action: str) -> list[str]:
        return [name for name, each in self.sent if each == action]


class Script(Observer):
    """Does something when a round is finished or the run waits, and writes down what it was told."""

    def __init__(
        self, rounds: Mapping[int, Callable[[], object]], waiting: Callable[[], object] = lambda: None
    ) -> None:
        self.rounds = dict(rounds)
        self.waiting = waiting
        self.waited: list[str] = []
        self.sites: list[dict[str, SiteState]] = []

    def on_round(self, finished: Round) -> None:
        self.rounds.pop(finished.number, lambda: None)()

    def on_waiting(self, reason: str) -> None:
        self.waited.append(reason)
        self.waiting()

    def on_sites(self, sites: Mapping[str, SiteState]) -> None:
        self.sites.append(dict(sites))


def run(
    network: Network, out: str = "run", *, observers: Sequence[Observer] = (), resume: bool = False, **changes: Any
) -> Outcome:
    return coordinate(CONFIG.changed(changes), network, out, resume=resume, observers=observers).outcome


def lines(out: str = "run") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def head(out: str) -> dict[str, torch.Tensor]:
    return dict(TransferModel.load(out).head.state_dict())


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("strategy", ["FedAvg", "pooled-lbfgs"])
def test_the_network_gives_what_the_simulation_gives(strategy: str) -> None:
    outcome = run(Network(), strategy={"name": strategy})
    whole = load_samples("digits")
    rows = [np.arange(row, ROWS, 3) for row in range(3)]
    digits = samples_from_arrays([whole.read(row) for row in range(ROWS)], whole.labels[:ROWS], classes=whole.classes)
    changes = {"strategy": {"name": strategy}, "simulation": {"min_class_count": 0, "min_rows": 0}}
    simulated = simulate(CONFIG.changed(changes), digits, rows)
    assert [line.loss for line in outcome.history] == pytest.approx([line.loss for line in simulated.history], rel=1e-5)
    result = json.loads(Path("run/result.json").read_text())
    assert list(result) == list(simulated.summary())
    own = {name for name, value in result.items() if value is None} - {"accuracy_test"}
    not_asked_for = {"accuracy_solved", "kept", "trainable_parameters", "worst_subgroup"}
    assert own == {name for name in result if name.startswith(("seconds", "rows_"))} | {"sites_empty"} | not_asked_for
    assert result["accuracy_worst_site"] == pytest.approx(simulated.accuracy_worst_site)


# Sites that are lost, come late or return.


def test_a_lost_site_is_named_and_skipped() -> None:
    network = Network()
    script = Script({1: lambda: network.connected.discard("b")})
    outcome = run(network, observers=[script])
    assert [line["sites"] for line in lines()] == [0, 3, 3, 2, 2, 2]
    assert outcome.participants == ["a", "b", "c"]
    assert script.sites[-1]["b"].standing == "lost"
    assert "not connected" in script.sites[-1]["b"].reason


def test_a_site_lost_while_it_trains_is_not_waited_for() -> None:
    network = Network()

    def vanish(name: str, message: Message) -> None:
        if name == "b" and network.asked(TRAIN).count("b") == 3:
            network.connected.discard("b")

    network.change = vanish
    began = time.monotonic()
    run(network)
    assert [line["sites"] for line in lines()] == [0, 3, 3, 2, 2, 2]
    assert "last heard of" in lines()[3]["dropped"]["b"]
    assert time.monotonic() - began < CONFIG.round_deadline


def test_a_late_site_joins_at_the_next_round_and_changes_no_statistics() -> None:
    network, other = Network(), Network()
    for one in (network, other):
        one.connected = {"a", "b"}
    other_outcome = run(other, "other")
    script = Script({1: lambda: network.connected.add("c")})
    outcome = run(network, observers=[script])
    joined = [line["joined"] for line in lines()]
    assert [name for names in joined for name in names] == ["c"]
    first = next(number for number, names in enumerate(joined) if names)
    assert 2 <= first <= 5
    assert [line["sites"] for line in lines()] == [0, *[2] * (first - 1), *[3] * (6 - first)]
    assert script.sites[-1]["c"].joined == first
    assert "c" not in network.asked(STATISTICS)
    assert network.asked(STANDARDISE).count("c") == 1
    assert outcome.statistics is not None
    assert other_outcome.statistics is not None
    assert torch.equal(outcome.statistics.upper, other_outcome.statistics.upper)
    assert "c" in outcome.participants


def test_a_site_returns_after_it_was_lost_and_forgot_the_run() -> None:
    network = Network()

    def back() -> None:
        network.connected.add("b")
        network._contexts[node_id_of("b")].state = RecordDict()

    run(network, observers=[Script({1: lambda: network.connected.discard("b"), 2: back})], rounds=8)
    sites = [line["sites"] for line in lines()]
    assert sites[:4] == [0, 3, 3, 2]
    assert sites[-1] == 3
    assert [name for line in lines() for name in line["joined"]] == ["b"]


def test_a_site_that_forgot_the_run_without_being_lost_is_told_again() -> None:
    network = Network()

    def forget() -> None:
        network._contexts[node_id_of("b")].state = RecordDict()

    run(network, observers=[Script({1: forget})], rounds=8)
    assert any("no manifest" in line["dropped"].get("b", "") for line in lines())
    assert lines()[-1]["sites"] == 3


def test_a_silent_site_costs_one_deadline() -> None:
    network = Network()
    began = time.monotonic()
    run(network, observers=[Script({1: lambda: network.silent.add("b")})], round_deadline=1.0)
    assert 1.0 < time.monotonic() - began < 15
    assert [line["sites"] for line in lines()] == [0, 3, 3, 2, 2, 2]
    assert "no reply within 1 s" in lines()[3]["dropped"]["b"]
    assert network.forgotten


# Quorum.


def test_below_quorum_a_run_waits_until_sites_return() -> None:
    network = Network()

    def all_back() -> None:
        network.connected |= {"b", "c"}

    script = Script({1: lambda: network.connected.difference_update("bc")}, all_back)
    undisturbed = run(Network(), "undisturbed", min_sites=3)
    outcome = run(network, observers=[script], min_sites=3)
    assert "1 of 3 sites can take part (a), and the run needs 3 or more." in script.waited[0]
    assert [line["sites"] for line in lines()] == [0, 3, 3, 3, 3, 3]
    assert same(head("run"), head("undisturbed"))
    assert outcome.kept_round == undisturbed.kept_round


def test_below_quorum_a_run_ends_by_its_deadline_with_everything_saved() -> None:
    network = Network()
    script = Script({1: lambda: network.connected.difference_update("bc")})
    with pytest.raises(FedheadError, match=r"needs 2 or more\. b: .*within 1 s.*--resume") as failure:
        run(network, observers=[script], min_sites=2, round_deadline=1.0)
    assert failure.value.exit_status == 1
    assert len(lines()) == 2
    assert len(script.waited) == 1
    network.connected |= {"b", "c"}
    undisturbed = run(Network(), "undisturbed")
    resumed = run(network, resume=True, min_sites=2)
    assert same(head("run"), head("undisturbed"))
    assert resumed.kept_round == undisturbed.kept_round
    assert not Path("run/checkpoint").exists()


def test_a_round_that_too_few_answered_is_done_again() -> None:
    network = Network()

    def lose_two_once(name: str, message: Message) -> None:
        if message.metadata.message_type == TRAIN and network.asked(TRAIN).count(name) == 3 and name != "a":
            network.connected.discard(name)

    network.change = lose_two_once
    script = Script({}, lambda: network.connected.update("bc"))
    run(network, observers=[script], min_sites=3)
    run(Network(), "undisturbed", min_sites=3)
    assert "of 3 sites answered in round 3" in script.waited[0]
    assert [line["sites"] for line in lines()] == [0, 3, 3, 3, 3, 3]
    assert same(head("run"), head("undisturbed"))


def test_statistics_wait_for_a_quorum_too() -> None:
    network = Network()
    network.connected = {"a"}
    script = Script({}, lambda: network.connected.update("bc"))
    run(network, observers=[script], min_sites=3)
    run(Network(), "undisturbed", min_sites=3)
    assert len(set(network.asked(STATISTICS))) == 3
    assert [line["joined"] for line in lines()] == [[]] * 6
    assert same(head("run"), head("undisturbed"))


def test_nobody_at_all() -> None:
    network = Network()
    network.connected = set()
    with pytest.raises(FedheadError, match="No site is connected, and the run needs 1 or more"):
        run(network, round_deadline=0.3)


# Resumed.


class Killed(BaseException):
    """Stands for the end of the coordinator's process."""


@pytest.mark.parametrize("number", [0, 1, 3, 5])
def test_a_coordinator_killed_in_a_round_goes_on_with_the_same_sites(number: int) -> None:
    def kill(finished: Round) -> None:
        if finished.number == number:
            raise Killed

    undisturbed = run(Network(), "undisturbed", strategy={"name": "FedAdam"})
    with pytest.raises(Killed):
        run(Network(), observers=[EachRound(kill)], strategy={"name": "FedAdam"})
    network = Network()  # nobody knows of the run any more
    resumed = run(network, resume=True, strategy={"name": "FedAdam"})
    assert same(head("run"), head("undisturbed"))
    assert resumed.kept_round == undisturbed.kept_round
    assert [line["joined"] for line in lines()] == [[]] * 6
    assert len(network.asked(STATISTICS)) <= 3  # of held-out rows, at the end; those of training rows were saved


def test_a_resumed_run_waits_for_the_sites_that_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedhead.server.attendance, "RETURN_SECONDS", 30.0)

    def kill() -> None:
        raise Killed

    run(Network(), "undisturbed")
    with pytest.raises(Killed):
        run(Network(), observers=[Script({2: kill})])
    network = Network()
    network.connected = {"a"}
    later = threading.Timer(0.5, lambda: network.connected.update("bc"))
    later.start()
    run(network, resume=True)
    later.join()
    assert same(head("run"), head("undisturbed"))


def test_a_resumed_run_names_who_is_new() -> None:
    def kill() -> None:
        raise Killed

    first = Network()
    first.connected = {"a", "b"}
    with pytest.raises(Killed):
        run(first, observers=[Script({2: kill})])
    run(Network(), resume=True)
    assert [line["joined"] for line in lines()] == [[], [], [], ["c"], [], []]
    assert [line["sites"] for line in lines()] == [0, 2, 2, 3, 3, 3]


# Weights.


class Apart(Network):
    """A network whose sites are machines of their own: each has its own folder for weights."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        for message_id in message_ids:
            name = self.names[self._waiting[message_id].metadata.dst_node_id] if message_id in self._waiting else ""
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("FEDHEAD_HOME", str(Path(f"home-{name}").resolve()))
                replies = list(super().pull_messages([message_id]))
            yield from replies


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Weights that no site has, sent in chunks of 4,000 bytes from a coordinator with a folder of its own."""
    monkeypatch.setattr(fedhead.server.coordinator, "CHUNK_BYTES", 4000)
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "home"))
    backbone = load_backbone("bundled:glyphnet")
    with torch.no_grad():
        next(iter(backbone.module.parameters())).mul_(1.01)
    Backbone("bundled:glyphnet", backbone.module, backbone.preprocessing).save("other.safetensors")
    return {"weights": str(tmp_path / "other.safetensors"), "rounds": 1}


def file_sent(name: str) -> tuple[Path, bytes]:
    (kept,) = Path(f"home-{name}/weights").iterdir()
    return kept, kept.read_bytes()


def test_weights_go_once_to_each_site_in_chunks(weights: dict[str, Any]) -> None:
    network = Apart()
    run(network, **weights)
    (exported,) = Path("home/weights").iterdir()
    chunks = -(-exported.stat().st_size // 4000)
    assert chunks > 10
    for name in "abc":
        assert network.asked(INSTALL).count(name) == 1 + chunks
        assert file_sent(name)[1] == exported.read_bytes()
    down = lines()[0]["bytes_down"]
    assert 3 * exported.stat().st_size < down < 3 * exported.stat().st_size * 1.2
    again = Apart()  # every process is a new one
    run(again, "again", **weights)
    assert again.asked(INSTALL) == []
    assert lines("again")[0]["bytes_down"] < exported.stat().st_size


def test_weights_go_on_where_they_were_interrupted(weights: dict[str, Any]) -> None:
    network = Apart()

    def lose(name: str, message: Message) -> None:
        if message.metadata.message_type == INSTALL and network.asked(INSTALL).count(name) == 8:
            network.connected.discard(name)

    network.change = lose
    with pytest.raises(FedheadError, match="0 of 3 sites"):
        run(network, round_deadline=0.5, **weights)
    assert [path.suffix for path in Path("home-a/weights").iterdir()] == [".part"]
    (exported,) = Path("home/weights").iterdir()
    chunks = -(-exported.stat().st_size // 4000)
    again = Apart()
    run(again, resume=True, **weights)
    assert again.asked(INSTALL).count("a") == 1 + chunks - 6
    assert file_sent("a")[1] == exported.read_bytes()


def test_a_late_site_is_given_the_weights_while_others_train(
    weights: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fedhead.server.coordinator, "CHUNK_BYTES", 40_000)
    network = Apart()
    network.connected = {"a", "b"}
    outcome = run(network, observers=[Script({1: lambda: network.connected.add("c")})], **{**weights, "rounds": 60})
    assert "c" in outcome.participants
    (joined,) = [line["number"] for line in lines() if line["joined"]]
    assert joined < 60
    (exported,) = Path("home/weights").iterdir()
    assert file_sent("c")[1] == exported.read_bytes()


def test_weights_go_to_a_few_sites_at_a_time_however_long_that_takes(
    weights: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fedhead.server.latecomers, "INSTALLING", 1)
    monkeypatch.setattr(fedhead.server.coordinator, "CHUNK_BYTES", 50_000)
    network = Apart()
    network.connected = set()
    script = Script({}, lambda: network.connected.update("abc"))
    outcome = run(network, observers=[script], min_sites=3, round_deadline=2.0, **weights)
    assert outcome.participants == ["a", "b", "c"]
    receivers = [name for name, action in network.sent if action == INSTALL]
    assert sorted(name for name, _ in groupby(receivers)) == ["a", "b", "c"]
    assert "No site is connected" in script.waited[0]
    assert any("2 of them still need the weights" in reason for reason in script.waited)


def test_tampered_weights_are_refused_and_not_kept(weights: dict[str, Any]) -> None:
    network = Apart()

    def tamper(name: str, message: Message) -> RecordDict | None:
        if message.metadata.message_type != INSTALL or name != "b" or network.asked(INSTALL).count("b") != 5:
            return None
        chunk = WeightsChunk.from_payload(Payload.from_content(message.content))
        data = chunk.data.copy()
        data[7] ^= 1
        return WeightsChunk(chunk.file, chunk.size, chunk.offset, data).to_content()

    network.change = tamper
    outcome = run(network, **weights)
    assert outcome.participants == ["a", "c"]
    assert "changed in transit" in outcome.refused["b"]
    assert list(Path("home-b/weights").iterdir()) == []


# What cannot take part.


def test_another_name_than_the_registered_one_is_refused() -> None:
    network = Network()
    network.sites["b"].name = "mallory"
    outcome = run(network, rounds=1)
    assert outcome.participants == ["a", "c"]
    assert "registered as 'b'" in outcome.refused["b"]


def test_a_site_that_takes_anothers_name_harms_itself_alone() -> None:
    network = Network()
    network.sites["b"].name = "a"
    outcome = run(network, rounds=1)
    assert outcome.participants == ["a", "c"]
    assert "registered as 'b'" in outcome.refused["b"]


def spoken_by(protocol: int) -> Callable[[str, Message], RecordDict | None]:
    def change(name: str, message: Message) -> RecordDict | None:
        if name != "b" or message.metadata.message_type != DESCRIBE:
            return None
        payload = Payload.from_content(message.content)
        return Payload({**payload.values, "protocol": protocol, "from_the_future": 1}, payload.arrays).to_content()

    return change


def test_another_protocol_is_refused_in_words() -> None:
    network = Network()
    network.change = spoken_by(PROTOCOL + 1)
    outcome = run(network, rounds=1)
    assert outcome.participants == ["a", "c"]
    assert f"speaks protocol {PROTOCOL} and the coordinator {PROTOCOL + 1}" in outcome.refused["b"]


def test_a_site_ignores_nothing_and_a_coordinator_what_a_later_release_adds() -> None:
    network = Network()
    network.change = spoken_by(PROTOCOL)
    outcome = run(network, rounds=1)
    assert outcome.participants == ["a", "c"]  # it does not know what it is asked for
    assert "from_the_future" in outcome.refused["b"]
    told = {"protocol": PROTOCOL, "site": "a", "rows": 3, "has_weights": True, "from_the_future": [1]}
    assert Description.from_content(Payload(told).to_content()).site == "a"


def test_a_site_of_another_protocol_is_told_apart_by_the_coordinator() -> None:
    told = {"protocol": PROTOCOL + 1, "place": "a"}
    with pytest.raises(MessageError, match=f"speaks protocol {PROTOCOL + 1}.*speaks {PROTOCOL}"):
        Description.from_content(Payload(told).to_content())


def test_clusters_at_real_sites_are_those_of_the_simulation() -> None:
    config = CONFIG.changed({"task": "clusters", "clusters": 4, "init": "", "rounds": 0, "classes": []})
    network = Network()
    ended = coordinate(config, network, "run")
    assert ended.model.classes == tuple(f"cluster {number}" for number in range(4))
    rows = [np.arange(number, ROWS, 3) for number in range(3)]
    whole = load_samples("digits")
    samples = samples_from_arrays([whole.read(row) for row in range(ROWS)], whole.labels[:ROWS], classes=whole.classes)
    expected = simulate(config.changed({"simulation": {"min_class_count": 0, "min_rows": 0}}), samples, rows)
    assert ended.outcome.clusters["rows"] == expected.outcome.clusters["rows"]
    assert ended.outcome.clusters["likelihoods"][0] == pytest.approx(expected.outcome.clusters["likelihoods"][0])
    torch.testing.assert_close(ended.outcome.head.weight, expected.outcome.head.weight, rtol=1e-5, atol=1e-6)
