"""Any message within runs of clusters, of a language model, and of secure sums: a site stays up and keeps its rules."""

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import pytest
from flwr.app import Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhead.client.app import make_app
from fedhead.client.backbones import AcceptedBackbones
from fedhead.client.local_site import LocalSite
from fedhead.client.release.guard import Guard
from fedhead.client.release.training_limits import TrainingLimits
from fedhead.config import RunConfig
from fedhead.flower import in_process_identity
from fedhead.protocol.actions import AGREE, CLUSTER, DESCRIBE, EVALUATE, OPEN, RIVALS, STATISTICS, TRAIN, UNMASK
from fedhead.protocol.messages import Payload
from fedhead.secure.coordinator import SecureSum
from fedhead.secure.messages import Opening, sealed_to_array, shares_from_arrays, signature_from_arrays
from fedhead.secure.replies import SUM, layout_of, purpose_of, with_session
from fedhead.secure.session import Context
from fedhead.simulations import simulate
from fedhead.sums.heads import HeadSums
from fedhead.sums.sums import Arrays
from fedhead.wording import without_controls

from ..common.backbones.tiny_language_model import tiny_language_model
from .test_fuzz_messages import CHANGES, CONFIG, FEW, MANY, ROWS, SITES, Change, Machine, Recorder, rows_of_digits
from .test_masked_refusals import NAMES, Consortium, sums_over_nothing
from .test_rows import ABOUT_A_HEAD, FEATURES, Attack

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = st.lists(st.tuples(st.integers(0, 10**6), CHANGES | st.just(Payload.to_content)), min_size=1, max_size=8)
"""Messages of an honest run, by place, with a change to each; some are as they were."""

Steps = Sequence[tuple[int, Change]]


@pytest.fixture(scope="module", autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("machine")
    (root / "work").mkdir()
    with pytest.MonkeyPatch.context() as patch, in_process_identity(run_id=1):
        patch.setenv("FEDHEAD_HOME", str(root / "home"))
        patch.chdir(root / "work")
        yield root


class Talk:
    """A site's process, and the messages of an honest run that it can take part in."""

    def __init__(self, machine: Machine, seen: Sequence[tuple[str, Payload]]) -> None:
        self.machine = machine
        self.seen = list(seen)

    def hold(self, steps: Steps) -> None:
        self.machine.send(DESCRIBE, dict(self.seen)[DESCRIBE].to_content(), 1)
        for place, change in steps:
            action, payload = self.seen[place % len(self.seen)]
            self.machine.send(action, change(payload), 1)


def open_site(name: str, data: str, allowed: Collection[str] = ()) -> LocalSite:
    """Return a site that answers whatever its rules permit at all."""
    accepted = AcceptedBackbones(frozenset(allowed))
    return LocalSite(name, data, "cpu", guard=Guard(0, 0), training=TrainingLimits(0), backbones=accepted)


@pytest.fixture(scope="module")
def clusters(own_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Talk:
    site = open_site("site-2", "fuzzed-rows:40-60")
    recorder = Recorder(make_app(lambda context: site))
    config = CONFIG.changed({"task": "clusters", "rounds": 0, "simulation": {"partition": "iid"}})
    folder = tmp_path_factory.mktemp("clusters")
    simulate(config, rows_of_digits(f"0-{ROWS}"), SITES, out=folder / "run", apps={"site-2": recorder})
    stages = {payload.values["stage"] for action, payload in recorder.seen if action == CLUSTER}
    assert stages == {"sums", "likelihood", "statistics"}
    return Talk(Machine(own_home, "group"), recorder.seen)


@pytest.fixture(scope="module")
def conversations(own_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Talk:
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("language")
    model = tiny_language_model(folder / "model")
    lines = [json.dumps({"prompt": f"Who is {one}?", "completion": f"It is {one}."}) for one in range(ROWS)]
    (folder / "talks.jsonl").write_text("\n".join(lines))
    data, spec = f"jsonl:{folder / 'talks.jsonl'}", f"hf:{model}"
    site = open_site("site-2", data, [spec])
    recorder = Recorder(make_app(lambda context: site))
    config = RunConfig(
        task="generation",
        backbone=spec,
        rounds=1,
        min_sites=1,
        tune={"layers": "lora:2@last:1"},
        simulation={"min_class_count": 0, "min_rows": 0, "partition": "iid"},
    )
    simulate(config, data, SITES, out=folder / "run", apps={"site-2": recorder})
    assert {TRAIN, EVALUATE, RIVALS} <= {action for action, _ in recorder.seen}
    return Talk(Machine(own_home, "desk", data, [spec]), recorder.seen)


@FEW
@given(steps=STEPS)
def test_any_message_of_a_run_of_clusters_leaves_a_site_up(clusters: Talk, steps: Steps) -> None:
    clusters.hold(steps)


@FEW
@given(steps=STEPS)
def test_any_message_of_a_language_models_run_leaves_a_site_up(conversations: Talk, steps: Steps) -> None:
    conversations.hold(steps)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@MANY
@given(steps=STEPS)
def test_very_many_messages_of_a_run_of_clusters_leave_a_site_up(clusters: Talk, steps: Steps) -> None:
    clusters.hold(steps)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@MANY
@given(steps=STEPS)
def test_very_many_messages_of_a_language_models_run_leave_a_site_up(conversations: Talk, steps: Steps) -> None:
    conversations.hold(steps)


# Secure sums.

EXCHANGES = (OPEN, "mask", AGREE, UNMASK)

Send = Callable[[str, Payload], Payload | None]
"""Asks the fuzzed site; None if it refused."""


def secure_sum(consortium: Consortium, action: str, payload: Payload, nothing: Arrays, send: Send) -> Arrays | None:
    """Make a secure sum in which one site is asked by `send`; None once it refuses."""
    session = SecureSum(
        Context.propose(consortium.roster, NAMES, layout_of(nothing), purpose_of(consortium.manifest, action, payload)),
        consortium.roster,
    )
    context = session.context

    def asked(name: str, what: str, content: Payload) -> Payload | None:
        return send(what, content) if name == "ward" else consortium.sites[name].ask(what, content)

    # The fuzzed site is asked last, when the others' parts of the exchange are there.
    for name in NAMES:
        if (opened := asked(name, OPEN, Payload({"context": context.model_dump(mode="json")}))) is None:
            return None
        session.take_opening(name, Opening.from_arrays(opened.arrays, context))
    openings = session.openings()
    for name in NAMES:
        arrays = {**openings.to_arrays(), "sealed": sealed_to_array(session.sealed_for(name))}
        request = with_session(payload, {"session": context.session, "opened": list(NAMES)}, arrays)
        if (masked := asked(name, action, request)) is None:
            return None
        session.take_vector(name, masked.arrays[SUM])
    for name in NAMES:
        request = Payload({"session": context.session, "survivors": list(NAMES)})
        if (agreed := asked(name, AGREE, request)) is None:
            return None
        session.take_agreement(name, signature_from_arrays(agreed.arrays))
    agreements = session.agreements()
    unmask = Payload({"session": context.session, "agreed": list(NAMES)}, agreements.to_arrays())
    for name in NAMES:
        if (shares := asked(name, UNMASK, unmask)) is None:
            return None
        session.take_shares(name, shares_from_arrays(NAMES, shares.arrays))
    return session.total()


class Fuzzed:
    """Asks a site as an honest coordinator does, but in one exchange says other things first."""

    def __init__(self, site: Attack, exchange: str, changes: Sequence[Change]) -> None:
        self.site = site
        self.exchange = exchange
        self.changes = changes

    def __call__(self, action: str, payload: Payload) -> Payload | None:
        exchange = action if action in EXCHANGES else "mask"
        changes = self.changes if exchange == self.exchange else ()
        replies = [self.answer(action, change(payload)) for change in (*changes, Payload.to_content)]
        # A changed context can begin another session; each session has one answer to all other exchanges.
        assert exchange == OPEN or sum(reply is not None for reply in replies) <= 1
        return replies[-1]

    def answer(self, action: str, content: RecordDict) -> Payload | None:
        before = len(self.site.entries())
        reply = self.site.process.answer(Message(content, 5, action))
        if not reply.has_error():
            assert len(self.site.entries()) == before + 1
            return Payload.from_content(reply.content)
        reason = str(reply.error.reason)
        assert reason
        assert len(reason) < 2000
        assert without_controls(reason) == reason
        return None


SUMS: dict[str, tuple[Payload, Arrays]] = {
    STATISTICS: (Payload({"rows": "train"}), sums_over_nothing(FEATURES)),
    EVALUATE: (Payload({"server_round": 1}, ABOUT_A_HEAD), HeadSums.unchanged({}).to_arrays()),
    TRAIN: (Payload({"server_round": 1}, ABOUT_A_HEAD), HeadSums.unchanged(ABOUT_A_HEAD).to_arrays()),
}


@pytest.fixture(scope="module")
def consortium(own_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    return Consortium(tmp_path_factory.mktemp("consortium"))


FUZZED = {
    "action": st.sampled_from([*SUMS]),
    "exchange": st.sampled_from(EXCHANGES),
    "changes": st.lists(CHANGES, min_size=1, max_size=4),
}


def on_secure_sum(consortium: Consortium, action: str, exchange: str, changes: Sequence[Change]) -> None:
    payload, nothing = SUMS[action]
    ward = consortium.sites["ward"]
    secure_sum(consortium, action, payload, nothing, Fuzzed(ward, exchange, changes))
    # The site is as it was: another sum succeeds.
    total = secure_sum(consortium, STATISTICS, *SUMS[STATISTICS], Fuzzed(ward, "", ()))
    assert total is not None
    assert total["counts"].sum() > ROWS


@settings(FEW, max_examples=20)
@given(**FUZZED)
def test_any_message_of_a_secure_sum_leaves_a_site_up(
    consortium: Consortium, action: str, exchange: str, changes: Sequence[Change]
) -> None:
    on_secure_sum(consortium, action, exchange, changes)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(MANY, max_examples=400)
@given(**FUZZED)
def test_very_many_messages_of_secure_sums_leave_a_site_up(
    consortium: Consortium, action: str, exchange: str, changes: Sequence[Change]
) -> None:
    on_secure_sum(consortium, action, exchange, changes)
