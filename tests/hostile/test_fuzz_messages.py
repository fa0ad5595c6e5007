"""Any message, in both directions: a site stays up and keeps its rules, and a coordinator drops it with a reason."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fedhead.backbones import load_backbone
from fedhead.client.app import make_app
from fedhead.client.backbones import AcceptedBackbones
from fedhead.client.connection import Connection
from fedhead.client.local_site import LocalSite
from fedhead.client.release.guard import Guard
from fedhead.client.release.ledger import Ledger, ledger_path, read_ledger
from fedhead.client.settings import SiteSettings
from fedhead.client.site import SiteProcess
from fedhead.config import RunConfig
from fedhead.data import Samples, load_samples, samples_from_arrays, sources
from fedhead.flower import in_process_identity
from fedhead.protocol.actions import ACTIONS, CALIBRATE, DESCRIBE, EVALUATE, REPORT, STATISTICS, TRAIN
from fedhead.protocol.heads import HeadReply
from fedhead.protocol.messages import (
    PAYLOAD,
    RECORD,
    Description,
    Manifest,
    MessageError,
    Payload,
)
from fedhead.protocol.private import PrivateRequest
from fedhead.server.network.grid import NetworkGrid
from fedhead.server.network.superlink import SuperLink
from fedhead.simulations import simulate
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.heads import HeadSums
from fedhead.sums.projection import origin_of
from fedhead.sums.score_bins import ScoreBins
from fedhead.tasks import make_task
from fedhead.wording import MOST_CHARACTERS, without_controls

pytestmark = pytest.mark.usefixtures("one_thread")

FEW = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    # A case is a few lines as it is, and takes long to run.
    phases=(Phase.explicit, Phase.generate),
)
MANY = settings(FEW, max_examples=800)

ROWS, SITES = 60, 3
COMMAND = [sys.executable, "-c", "from fedhead.cli import main; main()"]


@sources.register("fuzzed-rows")
def rows_of_digits(argument: str) -> Samples:
    """Some rows of the digits, as `START-STOP`."""
    start, _, stop = argument.partition("-")
    whole = load_samples("digits")
    rows = np.arange(int(start), int(stop))
    images = [whole.read(int(row)) for row in rows]
    return samples_from_arrays(images, whole.labels[rows], classes=whole.classes, spec="some digits")


CONFIG = RunConfig(rounds=1, min_sites=1, simulation={"min_class_count": 0, "min_rows": 0})


class Recorder(ClientApp):
    """Passes messages on, and keeps them with their replies."""

    def __init__(self, inner: ClientApp) -> None:
        super().__init__()
        self.inner = inner
        self.seen: list[tuple[str, Payload]] = []
        self.replied: dict[str, Payload] = {}

    def __call__(self, message: Message, context: Context) -> Message:
        reply = self.inner(message, context)
        self.seen.append((message.metadata.message_type, Payload.from_content(message.content)))
        if not reply.has_error():
            self.replied.setdefault(message.metadata.message_type, Payload.from_content(reply.content))
        return reply


@pytest.fixture(scope="module")
def rows() -> Samples:
    return rows_of_digits(f"0-{ROWS}")


@pytest.fixture(scope="module")
def honest() -> ClientApp:
    site = LocalSite("site-2", "fuzzed-rows:40-60", "cpu", guard=Guard.off())
    return make_app(lambda context: site)


@pytest.fixture(scope="module")
def recorder(rows: Samples, honest: ClientApp, tmp_path_factory: pytest.TempPathFactory) -> Recorder:
    """The messages of an honest run."""
    made = Recorder(honest)
    simulate(CONFIG, rows, SITES, out=tmp_path_factory.mktemp("honest") / "run", apps={"site-2": made})
    return made


FURTHER: list[dict[str, Any]] = [
    {"adapt": True, "foreign": True, "rounds": 0},
    {"personal": "closed", "rounds": 0},
    {"strategy": {"name": "pooled-lbfgs"}, "rounds": 1},
    {"lift": "relu:300", "rounds": 0},
    {"tune": {"layers": "features"}, "rounds": 1},
]
"""Settings of runs with other actions."""


@pytest.fixture(scope="module")
def others(rows: Samples, honest: ClientApp, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Payload]:
    """The messages of honest runs with other settings."""
    found: dict[str, Payload] = {}
    for changes in FURTHER:
        made = Recorder(honest)
        simulate(
            CONFIG.changed(changes), rows, SITES, out=tmp_path_factory.mktemp("other") / "r", apps={"site-2": made}
        )
        found |= {action: payload for action, payload in made.seen if action not in found}
    return found


@pytest.fixture(scope="module")
def asked(recorder: Recorder, others: dict[str, Payload]) -> dict[str, Payload]:
    """A message of every action, as an honest coordinator sends it."""
    found = others | dict(recorder.seen)
    manifest = found[DESCRIBE]
    found.setdefault("query.install", Payload({"file": "0" * 64, "size": 10, "offset": 0}, {"data": np.zeros(4, "u1")}))
    found.setdefault("query.private", Payload(PrivateRequest("centre", 0.5).values()))
    for action in ACTIONS:
        found.setdefault(action, Payload({}, {"weight": np.zeros((10, 192), np.float32)}))
    assert manifest.values["num_features"] == load_backbone("bundled:glyphnet").num_features
    return found


# What a liar writes.

NUMBERS = st.one_of(
    st.sampled_from([0, -1, 1, 2**31, 2**63, 10**19, 10**400, -(10**400), 0.5, -0.0, 1e308, math.nan, math.inf, True]),
    st.integers(),
    st.floats(),
)
TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["", "../../etc/passwd", "/", "\x1b[2J", "\u202e", "\udcff", "x" * 100_000, "0" * 64, "python:os:abort", "%s{}"]
    ),
)
JSON = st.recursive(
    st.one_of(st.none(), NUMBERS, TEXTS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)


def cast(array: np.ndarray[Any, Any], dtype: Any) -> np.ndarray[Any, Any]:
    with np.errstate(all="ignore"):
        return array.astype(dtype)


DTYPES = st.sampled_from(["f4", "f8", "f2", "i8", "i4", "u1", "bool"])
ARRAYS = st.builds(
    lambda shape, dtype, value: cast(np.full(shape, value), dtype),
    st.lists(st.integers(0, 5), max_size=4),
    DTYPES,
    st.sampled_from([0.0, 1.0, -1.0, 1e30, math.nan, math.inf]),
)

Change = Callable[[Payload], RecordDict]


def _nested(payload: Payload) -> RecordDict:
    """Values so deep that a reader by recursion gives up."""
    header = json.dumps({"__metadata__": {"values": '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"}}).encode()
    return blob(len(header).to_bytes(8, "little") + header)


def _huge(payload: Payload) -> RecordDict:
    """An array whose claimed size no memory holds."""
    header = json.dumps(
        {"weight": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 4]}, "__metadata__": {"values": "{}"}}
    ).encode()
    return blob(len(header).to_bytes(8, "little") + header + bytes(4))


def _claims(payload: Payload) -> RecordDict:
    """A reply that claims more bytes than there are numbers for."""
    return Payload({**payload.values, "num_bytes": 10**400}, payload.arrays).to_content()


def _changed_value(key: int, value: Any) -> Change:
    def change(payload: Payload) -> RecordDict:
        values = dict(payload.values)
        names = [*values, "further"]
        values[names[key % len(names)]] = value
        return as_json(values, payload)

    return change


def _changed_array(key: int, array: np.ndarray[Any, Any]) -> Change:
    def change(payload: Payload) -> RecordDict:
        arrays = dict(payload.arrays)
        names = [*arrays, "further"]
        arrays[names[key % len(names)]] = array
        return Payload(payload.values, arrays).to_content()

    return change


def _filled(key: int, value: float) -> Change:
    def change(payload: Payload) -> RecordDict:
        arrays = {name: np.array(array) for name, array in payload.arrays.items()}
        if arrays:
            chosen = arrays[sorted(arrays)[key % len(arrays)]]
            with np.errstate(all="ignore"):
                chosen.reshape(-1)[key % max(chosen.size, 1) : key % max(chosen.size, 1) + 1] = np.array(value).astype(
                    chosen.dtype
                )
        return Payload(payload.values, arrays).to_content()

    return change


def _bytes(at: int, put: bytes, drop: int) -> Change:
    def change(payload: Payload) -> RecordDict:
        whole = payload.blob
        place = at % (len(whole) + 1)
        return blob(whole[:place] + put + whole[place + drop :])

    return change


def as_json(values: Any, payload: Payload) -> RecordDict:
    """Pack values that JSON can or cannot hold."""
    try:
        return Payload(values, payload.arrays).to_content()
    except (ValueError, TypeError, UnicodeError):
        return Payload({}, payload.arrays).to_content()


def blob(content: bytes) -> RecordDict:
    return RecordDict({RECORD: ConfigRecord({PAYLOAD: content})})


CHANGES: st.SearchStrategy[Change] = st.one_of(
    st.builds(_changed_value, st.integers(0, 20), JSON),
    st.builds(_changed_array, st.integers(0, 20), ARRAYS),
    st.builds(_filled, st.integers(0, 10**6), st.floats()),
    st.builds(_bytes, st.integers(0, 10**6), st.binary(max_size=8), st.integers(0, 16)),
    st.builds(lambda values: lambda payload: as_json(values, payload), JSON),
    st.builds(lambda content: lambda payload: blob(content), st.binary(max_size=60)),
    st.sampled_from(
        [
            _nested,
            _huge,
            _claims,
            lambda payload: RecordDict(),
            lambda payload: RecordDict({RECORD: MetricRecord({"a": 1.0})}),
            lambda payload: RecordDict({RECORD: ArrayRecord({"a": Array(np.zeros(3, np.float32))})}),
            lambda payload: RecordDict({RECORD: ConfigRecord({PAYLOAD: "text"})}),
            lambda payload: RecordDict({RECORD: ConfigRecord({PAYLOAD: b"", "further": b""})}),
            lambda payload: RecordDict({"x" * 10**6: ConfigRecord({PAYLOAD: b""})}),
        ]
    ),
)
MESSAGES = st.lists(st.tuples(st.sampled_from([*ACTIONS]), CHANGES), min_size=1, max_size=8)
UNKNOWN_ACTIONS = st.sampled_from(["query", "query.further", "evaluate.x", "train.again"])


# From a coordinator to a site.


class Machine:
    """A site's process, in this one: its home, and everything beside it that must not change."""

    def __init__(
        self, root: Path, name: str = "here", data: str = "fuzzed-rows:0-60", backbones: Collection[str] = ()
    ) -> None:
        self.root = root
        self.home = root / "home"
        self.name = name
        settings_of_site = SiteSettings(name=name, coordinator="127.0.0.1:9092", data=data)
        ledger, accepted = Ledger(ledger_path(name), 0), AcceptedBackbones(frozenset(backbones))
        site = LocalSite(name, data, "cpu", guard=Guard(0, 0), ledger=ledger, backbones=accepted)
        self.process = SiteProcess(
            settings_of_site, site, Connection.__new__(Connection), self.home / "sites" / name, None
        )
        self.outside = self.files_outside()

    def files_outside(self) -> dict[str, int]:
        """Files of the machine that are not in the home, with their sizes."""
        return {
            str(path.relative_to(self.root)): path.stat().st_size
            for path in self.root.rglob("*")
            if not path.is_relative_to(self.home) and path.is_file()
        }

    def entered(self) -> int:
        path = ledger_path(self.name)
        return len(read_ledger(path)) if path.exists() else 0

    def send(self, action: str, content: RecordDict, run: int) -> None:
        """Send a message, and check what an operator relies on."""
        before = self.entered()
        message = Message(content, 5, "query")
        message.metadata.__dict__.update(_run_id=run, _message_type=action)
        reply = self.process.answer(message)
        if reply.has_error():
            reason = str(reply.error.reason)
            assert reason
            assert len(reason) < 2000, reason[:300]
            assert without_controls(reason) == reason
        else:
            assert self.entered() == before + 1, action
        assert self.files_outside() == self.outside


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    root = tmp_path_factory.mktemp("machine")
    (root / "work").mkdir()
    with pytest.MonkeyPatch.context() as patch, in_process_identity(run_id=1):
        patch.setenv("FEDHEAD_HOME", str(root / "home"))
        patch.chdir(root / "work")
        yield Machine(root)


def on_site(machine: Machine, asked: dict[str, Payload], messages: list[tuple[str, Change]], described: bool) -> None:
    run = 1
    if described:
        # In the state of a run that goes on, messages get further.
        for action in (DESCRIBE, "query.standardise"):
            machine.send(action, asked[action].to_content(), run)
    for action, change in messages:
        machine.send(action, change(asked[action]), run)


@FEW
@given(messages=MESSAGES, described=st.booleans())
def test_any_message_leaves_a_site_up(
    machine: Machine, asked: dict[str, Payload], messages: list[tuple[str, Change]], described: bool
) -> None:
    on_site(machine, asked, messages, described)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@MANY
@given(messages=MESSAGES, described=st.booleans())
def test_very_many_messages_leave_a_site_up(
    machine: Machine, asked: dict[str, Payload], messages: list[tuple[str, Change]], described: bool
) -> None:
    on_site(machine, asked, messages, described)


class Client:
    """A real client's process, connected to a SuperLink of this process."""

    def __init__(self, root: Path, link: SuperLink, process: subprocess.Popen[bytes]) -> None:
        self.root = root
        self.link = link
        self.process = process
        self.grid = NetworkGrid(link)
        self.answered = 0

    def send(self, action: str, content: RecordDict) -> Message:
        """Return the reply to a message."""
        stop = time.monotonic() + 120
        while not (nodes := list(self.grid.get_node_ids())):
            assert time.monotonic() < stop, (self.root / "log").read_text()[-2000:]
            time.sleep(0.1)
        (message_id,) = self.grid.push_messages([Message(content, nodes[0], action)])
        while not (replies := list(self.grid.pull_messages([message_id]))):
            assert time.monotonic() < stop, (action, (self.root / "log").read_text()[-2000:])
            self.grid.wait(0.5)
        self.answered += not replies[0].has_error()
        return replies[0]

    def check(self) -> None:
        """Check that the process is up, wrote nothing outside its home, and released nothing without an entry."""
        assert self.process.poll() is None
        assert {path.name for path in self.root.iterdir()} == {"home", "work", "log"}
        assert not list((self.root / "work").iterdir())
        (ledger,) = (self.root / "home").rglob("*.jsonl")
        assert len(read_ledger(ledger)) >= self.answered


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    root = tmp_path_factory.mktemp("client")
    (root / "work").mkdir()
    with ExitStack() as stack:
        stack.enter_context(in_process_identity(run_id=1))
        link = stack.enter_context(SuperLink("127.0.0.1", 0))
        log = stack.enter_context((root / "log").open("wb"))
        flags = ["--site", "here", "--data", "digits", "--min-class-count", "0", "--min-rows", "0", "--device", "cpu"]
        process = subprocess.Popen(
            [*COMMAND, "client", "--insecure", "--coordinator", f"127.0.0.1:{link.port}", *flags],
            env={**os.environ, "FEDHEAD_HOME": str(root / "home"), "OMP_NUM_THREADS": "1"},
            cwd=root / "work",
            stdout=log,
            stderr=log,
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        yield Client(root, link, process)


@pytest.mark.slow
@pytest.mark.timeout(900)
@settings(FEW, max_examples=20)
@given(messages=MESSAGES)
def test_any_message_leaves_a_real_client_up(
    client: Client, asked: dict[str, Payload], messages: list[tuple[str, Change]]
) -> None:
    for action in (DESCRIBE, STATISTICS):
        reply = client.send(action, asked[action].to_content())
        assert not reply.has_error(), reply.error
    for action, change in messages:
        client.send(action, change(asked[action]))
    client.check()


@given(action=UNKNOWN_ACTIONS)
@FEW
def test_an_unknown_action_is_refused(machine: Machine, asked: dict[str, Payload], action: str) -> None:
    machine.send(action, asked[DESCRIBE].to_content(), 1)


# From a site to a coordinator.


class Lying(ClientApp):
    """An honest site, but for some of its replies."""

    def __init__(self, inner: ClientApp, action: str, change: Change) -> None:
        super().__init__()
        self.inner, self.action, self.change = inner, action, change

    def __call__(self, message: Message, context: Context) -> Message:
        reply = self.inner(message, context)
        if message.metadata.message_type != self.action or reply.has_error():
            return reply
        return Message(self.change(Payload.from_content(reply.content)), reply_to=message)


class Failing(Lying):
    """An honest site that answers an action with any error."""

    def __init__(self, inner: ClientApp, action: str, code: int, reason: str) -> None:
        super().__init__(inner, action, lambda payload: payload.to_content())
        self.error = Error(code, reason)

    def __call__(self, message: Message, context: Context) -> Message:
        if message.metadata.message_type == self.action:
            return Message(self.error, reply_to=message)
        return self.inner(message, context)


def readers(recorder: Recorder) -> dict[str, Callable[[RecordDict], object]]:
    """What the coordinator reads each action's replies with; a `ValueError` or `MessageError` drops the reply."""
    manifest = Manifest(**dict(recorder.seen)[DESCRIBE].values)
    task = make_task(manifest.task, manifest.classes)
    asked = dict(recorder.seen)
    head = {"weight": np.zeros((10, 192), np.float32), "bias": np.zeros(10, np.float32)}
    bins = ScoreBins(asked[REPORT].arrays["bins.centre"], asked[REPORT].arrays["bins.spread"])
    nothing, counted = task.choosing(None, None, bins), task.no_rows(bins)
    origin = origin_of(torch.from_numpy(np.array(asked[DESCRIBE].arrays["probe"])), manifest.seed)
    statistics = task.statistics(len(origin), origin)

    def of_arrays(read: Callable[[Any], object]) -> Callable[[RecordDict], object]:
        return lambda content: read(Payload.from_content(content).arrays)

    return {
        DESCRIBE: lambda content: Description.several_from_values(Payload.from_content(content).values, 1),
        STATISTICS: of_arrays(lambda arrays: FeatureStatistics.from_arrays(arrays, statistics)),
        TRAIN: lambda content: HeadReply.from_payload(Payload.from_content(content), HeadSums(head)),
        EVALUATE: lambda content: HeadReply.from_payload(Payload.from_content(content), HeadSums()),
        REPORT: of_arrays(lambda arrays: type(counted).from_arrays(arrays, counted)),
        CALIBRATE: of_arrays(lambda arrays: type(nothing).from_arrays(arrays, nothing)),
    }


def read(recorder: Recorder, action: str, change: Change) -> None:
    reader = readers(recorder)[action]
    reader(recorder.replied[action].to_content())
    content = change(recorder.replied[action])
    try:
        reader(content)
    except (MessageError, ValueError) as error:
        assert str(error)


READ = st.sampled_from([DESCRIBE, STATISTICS, TRAIN, EVALUATE, REPORT, CALIBRATE])


@settings(FEW, max_examples=300)
@given(action=READ, change=CHANGES)
def test_any_reply_is_read_or_dropped(recorder: Recorder, action: str, change: Change) -> None:
    read(recorder, action, change)


@pytest.mark.slow
@settings(MANY, max_examples=10_000)
@given(action=READ, change=CHANGES)
def test_very_many_replies_are_read_or_dropped(recorder: Recorder, action: str, change: Change) -> None:
    read(recorder, action, change)


def on_coordinator(rows: Samples, app: ClientApp, out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    result = simulate(CONFIG, rows, SITES, out=out, apps={"site-2": app})
    dropped = [reason for line in result.history for reason in line.dropped.values()]
    for reason in [*result.outcome.refused.values(), *dropped]:
        assert reason
        assert len(reason) <= MOST_CHARACTERS
        assert without_controls(reason) == reason
    assert {"site-0", "site-1"} <= set(result.outcome.participants)
    assert all(bool(value.isfinite().all()) for value in result.model.head.state_dict().values())
    assert (out / "report.html").stat().st_size < 2_000_000


@settings(FEW, max_examples=6)
@given(action=st.sampled_from([*ACTIONS]), change=CHANGES)
def test_any_reply_leaves_a_run_going(
    rows: Samples, honest: ClientApp, tmp_path_factory: pytest.TempPathFactory, action: str, change: Change
) -> None:
    on_coordinator(rows, Lying(honest, action, change), tmp_path_factory.getbasetemp() / "fuzzed")


@pytest.mark.slow
@settings(MANY, max_examples=80)
@given(action=st.sampled_from([*ACTIONS]), change=CHANGES)
def test_very_many_replies_leave_a_run_going(
    rows: Samples, honest: ClientApp, tmp_path_factory: pytest.TempPathFactory, action: str, change: Change
) -> None:
    on_coordinator(rows, Lying(honest, action, change), tmp_path_factory.getbasetemp() / "fuzzed")


@pytest.mark.parametrize("action", [DESCRIBE, STATISTICS])
@pytest.mark.parametrize("change", [_nested, _huge, _claims])
def test_what_no_reader_can_hold_leaves_a_run_going(
    rows: Samples, honest: ClientApp, tmp_path: Path, action: str, change: Change
) -> None:
    on_coordinator(rows, Lying(honest, action, change), tmp_path / "fuzzed")


@settings(FEW, max_examples=3)
@given(action=st.sampled_from([*ACTIONS]), code=st.integers(0, 2**20), reason=TEXTS)
def test_any_error_is_a_reason(
    rows: Samples, honest: ClientApp, tmp_path_factory: pytest.TempPathFactory, action: str, code: int, reason: str
) -> None:
    on_coordinator(rows, Failing(honest, action, code, reason), tmp_path_factory.getbasetemp() / "failing")
