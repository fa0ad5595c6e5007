"""Noise that the sites of a secure sum share: real sites and masks, on a Grid that behaves like a network."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedhead.client.agreement import Agreement
from fedhead.client.local_site import LocalSite
from fedhead.client.private_sums import private_sums
from fedhead.client.release.accounts import Accounts, read_charges
from fedhead.client.release.noise import Noise
from fedhead.config import RunConfig
from fedhead.data import load_samples, samples_from_arrays
from fedhead.errors import FedheadError, UserError
from fedhead.flower import in_process_identity
from fedhead.privacy.accountant import epsilon_for, mu_for
from fedhead.privacy.mechanism import Mechanism
from fedhead.privacy.stages import mechanism
from fedhead.protocol.actions import PRIVATE, UNMASK
from fedhead.protocol.messages import Manifest, Payload
from fedhead.protocol.private import NoisyReply, PrivateRequest, terms_of
from fedhead.protocol.steps import Masking, Release
from fedhead.secure.session import most_colluding, threshold_for
from fedhead.server import private_run
from fedhead.server.app import prepare
from fedhead.server.runs.history import Outcome
from fedhead.simulations import simulate, sites

from .test_secure_network import CLASSES, NAMES, ROWS, SITES, MaskedNetwork, run

EPSILON = 8.0


def private(**changes: Any) -> RunConfig:
    """A private run of five sites under secure summation."""
    table = {"secure_sum": True, "epsilon": EPSILON, **changes.pop("privacy", {})}
    settings = {"classes": CLASSES, "round_deadline": 20, "min_sites": SITES, "rounds": 0, "privacy": table}
    return RunConfig(**{**settings, **changes})


@pytest.fixture(scope="module", autouse=True)
def in_process(one_thread: None) -> Iterator[None]:
    with in_process_identity(run_id=1):
        yield


class NoisyNetwork(MaskedNetwork):
    """Five sites that require masks and noise, and share the noise."""

    def __init__(self, folder: Path, entropy: Any = None, **noise: Any) -> None:
        self.noise = {"unit": "row", "max_colluding": 1, "required": True, **noise}
        self.entropy = entropy or np.random.default_rng(3).bytes
        super().__init__(folder)

    def site(self, name: str, row: int) -> LocalSite:
        made = super().site(name, row)
        accounts = Accounts(self.folder / f"{name}.privacy", 60.0, 1e-5, 0.2)
        made.noise = Noise(accounts, entropy=self.entropy, **self.noise)
        made.steps = [made.noise if isinstance(step, Noise) else step for step in made.steps]
        return made


def simulated(entropy: Any, monkeypatch: pytest.MonkeyPatch, config: RunConfig) -> Outcome:
    monkeypatch.setattr(sites, "Noise", partial(Noise, entropy=entropy))
    whole = load_samples("digits")
    samples = samples_from_arrays([whole.read(row) for row in range(ROWS)], whole.labels[:ROWS], classes=whole.classes)
    rows = [np.arange(number, ROWS, SITES) for number in range(SITES)]
    return simulate(config.changed({"min_sites": 1}), data=samples, sites=rows).outcome


@pytest.mark.parametrize("rounds", [0, 10])
def test_real_sites_and_the_simulation_share_the_same_noise(
    rounds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = private(rounds=rounds)
    outcome, _ = run(NoisyNetwork(tmp_path, np.random.default_rng(7).bytes), config, tmp_path / "run")
    expected = simulated(np.random.default_rng(7).bytes, monkeypatch, config)
    for name, tensor in outcome.head.state_dict().items():
        other = expected.head.state_dict()[name]
        # Features that are extracted in other batches differ in their last bits; other noise would be of order 1.
        assert float((tensor - other).norm()) <= 1e-4 * float(other.norm())
    for key in ("parties", "accounts", "solver"):
        assert outcome.privacy[key] == expected.privacy[key]
    assert outcome.privacy.get("rounds", 0) == expected.privacy.get("rounds", 0) == rounds
    assert outcome.privacy["parties"] == 3


class Watched:
    """Keeps the exact sums beside the noisy total of every release."""

    def __init__(self, network: NoisyNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
        self.deviations: dict[str, tuple[float, float]] = {}
        collect = private_run.collect

        def watched(messenger: Any, nodes: Any, question: Any, rows: Any) -> Any:
            collected = collect(messenger, nodes, question, rows)
            payload = Payload.from_content(question.content)
            request = PrivateRequest.from_payload(payload, 10, 192)
            made = request.mechanism(10, 192)
            exact = NoisyReply.zeros(made)
            for name in collected.sites:
                site = network.sites[name]
                agreed = self.agreement(site)
                exact += NoisyReply(private_sums([site.open(agreed.manifest)], agreed, request))
            for array in ("sums", "confusion"):
                if array in made.arrays:
                    noise = (collected.total.arrays[array] - exact.arrays[array]) / made.sigma(array)
                    self.deviations[array] = (float(noise.std()), math.sqrt(len(collected.sites) / request.parties))
            return collected

        monkeypatch.setattr(private_run, "collect", watched)
        self.config = private()

    def agreement(self, site: LocalSite) -> Agreement:
        backbone = next(iter(site._backbones.values()))
        return Agreement(Manifest.of("run", self.config, backbone, CLASSES), backbone.probe(), None)


@pytest.mark.parametrize("lost_at", ["", PRIVATE, UNMASK])
def test_the_total_has_the_noise_of_its_survivors(
    lost_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = NoisyNetwork(tmp_path)
    watched = Watched(network, monkeypatch)
    asked: list[str] = []

    def change(name: str, message: Message) -> RecordDict | None:
        if name == "s3" and message.metadata.message_type == lost_at and not asked:
            asked.append(name)
            network.connected.discard(name)
        return None

    def back() -> Iterable[int]:
        if len(asked) == 1:
            asked.append("back")
            network.connected.add("s3")
        return NoisyNetwork.get_node_ids(network)

    network.change = change
    network.get_node_ids = back  # type: ignore[method-assign]
    outcome, _ = run(network, private(), tmp_path / "run")
    assert bool(asked) == bool(lost_at)
    measured, stated = watched.deviations["sums"]
    assert measured == pytest.approx(stated, rel=0.08)
    assert 1 <= stated <= math.sqrt(SITES / 3)
    assert outcome.privacy["accounts"]["training rows"]["epsilon"] == pytest.approx(EPSILON)
    for name in NAMES:
        charges = read_charges(tmp_path / f"{name}.privacy")
        spent = math.sqrt(sum(charge.mu**2 for charge in charges if charge.account == "train"))
        assert spent <= mu_for(EPSILON, 1e-5) * (1 + 1e-9)


@given(st.integers(3, 300), st.integers(0, 40), st.floats(0.05, 10), st.integers(1, 400))
def test_the_least_survivors_without_colluders_still_have_the_stated_noise(
    count: int, colluding: int, mu: float, size: int
) -> None:
    threshold = threshold_for(count, colluding)
    if threshold > count:
        return
    assert most_colluding(count, threshold) >= colluding
    parties = threshold - colluding
    assert parties >= 2
    made = Mechanism.split(mu, {"sums": (1.0, (size,), 1.0)})
    lattice = made.arrays["sums"].lattice
    honest = (threshold - colluding) * math.ceil(lattice.deviation * math.sqrt(1 / parties)) ** 2
    reached = lattice.sensitivity(1.0, size) / (lattice.unit * math.sqrt(honest))
    assert reached <= made.mu * (1 + 1e-12)
    assert epsilon_for(reached, 1e-5) <= epsilon_for(mu, 1e-5) * (1 + 1e-9)


def release_of(config: RunConfig, masking: Masking | None, request: PrivateRequest) -> Release:
    manifest = Manifest(
        run="r",
        backbone="b",
        layer="l",
        backbone_digest="0" * 64,
        weights_digest="0" * 64,
        num_features=4,
        classes=("a", "b"),
        head="unit",
        holdout=0.2,
        seed=0,
        local=config.local,
        privacy=terms_of(config.privacy),
        secure_sum=config.privacy.secure_sum,
    )
    return Release(PRIVATE, "s", manifest=manifest, parts=("train",), masking=masking, private=request)


def masking(threshold: int) -> Masking:
    return Masking(lambda arrays: np.zeros((2, 1), np.uint64), threshold)


@pytest.fixture
def noise(tmp_path: Path) -> Noise:
    return Noise(Accounts(tmp_path / "s.privacy", 10.0, 1e-5, 0.2), max_colluding=1)


REQUEST = PrivateRequest("centre", 0.3, {}, parties=3)
ZEROS = Payload({}, NoisyReply.zeros(mechanism("centre", 0.3, 2, 4)).arrays)


@pytest.mark.parametrize(
    ("threshold", "changes"), [(3, {}), (4, {"max_colluding": 2}), (None, {}), (9, {"parties": 9})]
)
def test_too_little_noise_never_leaves(
    threshold: int | None, changes: dict[str, int], noise: Noise, tmp_path: Path
) -> None:
    config = private(privacy={"max_colluding": changes.get("max_colluding", 1)})
    asked = replace(REQUEST, parties=changes.get("parties", 3))
    with pytest.raises(FedheadError, match=r"add up|only under secure summation"):
        noise.leave(ZEROS, release_of(config, masking(threshold) if threshold else None, asked))
    assert read_charges(tmp_path / "s.privacy") == []


def test_a_repeated_request_gets_the_same_noise_in_another_session(noise: Noise, tmp_path: Path) -> None:
    first = noise.leave(ZEROS, release_of(private(), masking(4), REQUEST))
    again = noise.leave(ZEROS, release_of(private(), masking(5), REQUEST))
    for name, array in first.arrays.items():
        np.testing.assert_array_equal(array, again.arrays[name])
    assert len(read_charges(tmp_path / "s.privacy")) == 1
    # The stored noise is a third of the variance, which is too little for a sum over two.
    other = noise.leave(ZEROS, release_of(private(), masking(4), replace(REQUEST, parties=2)))
    assert not np.array_equal(other.arrays["total"], first.arrays["total"])
    assert len(read_charges(tmp_path / "s.privacy")) == 2


@pytest.mark.parametrize(
    ("own", "config", "said"),
    [
        ({"own": True}, private(), "adds all noise by itself"),
        ({"max_colluding": 2}, private(), "set max_colluding = 2"),
        ({}, private(privacy={"secure_sum": False}), "only secure summation allows"),
    ],
)
def test_sites_refuse_shared_noise_that_their_settings_forbid(
    own: dict[str, Any], config: RunConfig, said: str, noise: Noise
) -> None:
    manifest = release_of(config, None, REQUEST).manifest
    assert manifest is not None
    with pytest.raises(FedheadError, match=said):
        replace(noise, **own).check(manifest)


def test_a_coordinator_refuses_shared_noise_without_masks() -> None:
    with pytest.raises(UserError, match="under secure summation only"):
        prepare(private(privacy={"secure_sum": False}))


def test_own_noise_under_masks_takes_part_at_sites_that_demand_it(tmp_path: Path) -> None:
    outcome, _ = run(NoisyNetwork(tmp_path, own=True), private(privacy={"noise": "own"}), tmp_path / "run")
    assert outcome.privacy["parties"] == 1


class KilledError(Exception):
    """The coordinator's process ends."""


def test_a_restarted_coordinator_repeats_no_release(tmp_path: Path) -> None:
    network = NoisyNetwork(tmp_path)
    asked = 0

    def change(name: str, message: Message) -> RecordDict | None:
        nonlocal asked
        if name == "s0" and message.metadata.message_type == PRIVATE:
            asked += 1
            if asked == 2:
                raise KilledError
        return None

    network.change = change
    with pytest.raises(KilledError):
        run(network, private(), tmp_path / "run")
    outcome, _ = run(network, private(), tmp_path / "run", resume=True)
    # The centre, the sums that were interrupted and asked again, the calibration, and the evaluation.
    assert asked == 5
    for name in NAMES:
        stages = [charge.stage for charge in read_charges(tmp_path / f"{name}.privacy")]
        assert len(stages) == len(set(stages))
        assert {stages[0], stages[-1]} == {"centre", "evaluation"}
    assert outcome.privacy["parties"] == 3
