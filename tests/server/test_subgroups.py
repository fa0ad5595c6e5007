"""Evaluation by subgroup at real sites, plain and masked, and requests and replies that break its rules."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from fedhead.client.local_site import LocalSite
from fedhead.client.release.guard import Guard
from fedhead.client.release.ledger import Ledger, read_ledger
from fedhead.client.release.masking import SecureSum
from fedhead.client.release.secure_sessions import SecureSessions
from fedhead.data import Samples, load_samples, samples_from_arrays, sources
from fedhead.flower import in_process_identity
from fedhead.protocol.actions import SUBGROUPS
from fedhead.protocol.messages import Payload
from fedhead.server.app import coordinate
from fedhead.server.runs.history import Outcome
from fedhead.simulations import simulate
from fedhead.sums.evaluation import EvaluationSums
from fedhead.sums.subgroups import SubgroupSums

from .test_network import Network
from .test_secure_network import ACCEPTED, NAMES, ROWS, SITES, Ended, MaskedNetwork, config

SETTINGS: dict[str, Any] = {"rounds": 0, "diagnose": False, "subgroups": ("left", "right", "elsewhere")}


@pytest.fixture(scope="module", autouse=True)
def in_process(one_thread: None) -> Iterator[None]:
    with in_process_identity(run_id=1):
        yield


def some_digits(rows: list[int], spec: str = "divided") -> Samples:
    """Digits by the hand that wrote them, except for one site's, whose data names none."""
    whole = load_samples("digits")
    hands = [("left", "right", None)[row // SITES % 3] if row % SITES != 4 else None for row in rows]
    named = None if all(hand is None for hand in hands) else hands
    images = [whole.read(row) for row in rows]
    return samples_from_arrays(images, whole.labels[rows], classes=whole.classes, subgroups=named, spec=spec)


@sources.register("divided-digits")
def divided_digits(argument: str) -> Samples:
    return some_digits(list(range(int(argument), ROWS, SITES)), f"divided {argument}")


class Divided(MaskedNetwork):
    """Five sites of which four name subgroups; they mask their sums if `masked`."""

    def __init__(self, folder: Path, *, masked: bool, guard: Guard) -> None:
        self.masked, self.guard = masked, guard
        super().__init__(folder)

    def site(self, name: str, row: int) -> LocalSite:
        sessions = SecureSessions(self.folder / f"{name}.sqlite", name, self.keys[name], self.roster)
        return LocalSite(
            name,
            f"divided-digits:{row}",
            "cpu",
            guard=self.guard,
            ledger=Ledger(self.folder / f"{name}.jsonl", self.guard.min_class_count),
            backbones=ACCEPTED,
            summation=SecureSum(required=True, sessions=sessions) if self.masked else None,
        )


def run(network: Network, out: Path, **changes: Any) -> Outcome:
    ended = Ended()
    masked = isinstance(network, Divided) and network.masked
    settings = config(**{**SETTINGS, "privacy": {"secure_sum": masked}, **changes})
    members = network.roster if isinstance(network, Divided) and masked else None
    coordinate(settings, network, out, observers=[ended], members=members)
    assert ended.outcome is not None
    return ended.outcome


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> int:
    """Return the rows that honest sites count."""
    folder = tmp_path_factory.mktemp("honest")
    outcome = run(Divided(folder, masked=False, guard=Guard.off()), folder / "run")
    return sum(one["rows"] for one in outcome.subgroups["groups"])


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_real_sites_count_what_a_simulation_counts(masked: bool, tmp_path: Path) -> None:
    found = run(Divided(tmp_path, masked=masked, guard=Guard.off()), tmp_path / "run").subgroups
    table = {"min_class_count": 0, "min_rows": 0}
    rows = [np.arange(number, ROWS, SITES) for number in range(SITES)]
    expected = simulate(
        config(**{**SETTINGS, "privacy": {}}, simulation=table), data=some_digits(list(range(ROWS))), sites=rows
    ).outcome.subgroups
    assert found["without"] == ["elsewhere"]
    assert [one["name"] for one in found["groups"]] == [one["name"] for one in expected["groups"]]
    for own, other in zip(found["groups"], expected["groups"], strict=True):
        assert own["rows"] == other["rows"]
        assert own["accuracy"] == pytest.approx(other["accuracy"], abs=1e-6)
        assert own["calibration_error"] == pytest.approx(other["calibration_error"], abs=0.02)


def test_a_guarded_site_counts_no_few_rows_and_enters_the_release(tmp_path: Path) -> None:
    replies: list[SubgroupSums] = []
    network = Divided(tmp_path, masked=False, guard=Guard(3, 0))
    pull = network.pull_messages

    def watched(ids: Any) -> Iterator[Message]:
        for message in pull(ids):
            if message.metadata.message_type == SUBGROUPS and not message.has_error():
                like = SubgroupSums([EvaluationSums.zeros(10)] * 3)
                replies.append(SubgroupSums.from_arrays(Payload.from_content(message.content).arrays, like))
            yield message

    network.pull_messages = watched  # type: ignore[method-assign]
    run(network, tmp_path / "run")
    assert len(replies) == SITES
    for sums in replies:
        for part in sums.parts:
            assert part.rows == 0 or part.rows >= 3
    for name in NAMES:
        assert SUBGROUPS in {entry.action for entry in read_ledger(tmp_path / f"{name}.jsonl")}


@pytest.mark.parametrize(
    "values",
    [
        {"names": []},
        {"names": ["left", "left"]},
        {"names": ["le\x1bft"]},
        {"names": ["x" * 201]},
        {"names": [str(number) for number in range(101)]},
        {"names": "left"},
        {"names": [1]},
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": 1e-308},
        {"columns": ["sex"]},
    ],
    ids=str,
)
def test_bad_requests_are_refused_and_end_nothing(values: dict[str, Any], counted: int, tmp_path: Path) -> None:
    network = Divided(tmp_path, masked=False, guard=Guard.off())

    def change(name: str, message: Message) -> RecordDict | None:
        if message.metadata.message_type != SUBGROUPS or name != "s0":
            return None
        payload = Payload.from_content(message.content)
        return Payload({**payload.values, **values}, payload.arrays).to_content()

    network.change = change
    outcome = run(network, tmp_path / "run")
    assert 0 < sum(one["rows"] for one in outcome.subgroups["groups"]) < counted


@pytest.mark.parametrize(
    "break_it",
    [
        lambda arrays: {**arrays, "confusion": arrays["confusion"][:2]},
        lambda arrays: {**arrays, "confusion": arrays["confusion"] + np.uint8(1)},
        lambda arrays: {**arrays, "loss_sum": np.full((3, 1), np.nan)},
        lambda arrays: {**arrays, "scores": arrays["scores"].astype(np.float64)},
        lambda arrays: {**arrays, "more": np.zeros((3, 1))},
        lambda arrays: {name: array for name, array in arrays.items() if name != "reliability"},
        lambda arrays: {**arrays, "confusion": np.uint8(0)},
    ],
)
def test_bad_sums_are_rejected(break_it: Any) -> None:
    rows, generator = 30, np.random.default_rng(0)
    parts = [
        EvaluationSums.from_logits(generator.normal(size=(rows, 4)), generator.integers(0, 4, rows)) for _ in range(3)
    ]
    like = SubgroupSums([EvaluationSums.zeros(4)] * 3)
    arrays = SubgroupSums(parts).to_arrays()
    assert SubgroupSums.from_arrays(arrays, like).rows == 3 * rows
    with pytest.raises(ValueError, match=r"."):
        SubgroupSums.from_arrays(break_it({name: np.array(array) for name, array in arrays.items()}), like)


def test_sums_of_sites_add() -> None:
    generator = np.random.default_rng(1)
    logits, labels = generator.normal(size=(40, 3)), generator.integers(0, 3, 40)
    halves = [
        SubgroupSums([EvaluationSums.from_logits(logits[part][: 5 * n], labels[part][: 5 * n]) for n in (1, 2, 4)])
        for part in (slice(0, 20), slice(20, 40))
    ]
    total = halves[0] + halves[1]
    assert [part.rows for part in total.parts] == [10, 20, 40]
    np.testing.assert_array_equal(total.parts[2].confusion, EvaluationSums.from_logits(logits, labels).confusion)
    with pytest.raises(ValueError, match="3 and 1"):
        _ = total + SubgroupSums(total.parts[:1])
