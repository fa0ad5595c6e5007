"""Differentially private runs, simulated and at a real site."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from rich.console import Console

from fedhead.cli.simulate import _print_result
from fedhead.client.agreement import agreement
from fedhead.client.app import make_app
from fedhead.client.handlers import ABOUT_ROWS
from fedhead.client.private_sums import private_sums
from fedhead.client.release.accounts import accounts_path, read_charges
from fedhead.client.release.ledger import read_ledger
from fedhead.client.settings import SiteSettings
from fedhead.client.site_opening import site_of
from fedhead.config import RunConfig
from fedhead.data import held_out, load_samples
from fedhead.errors import FedheadError, UserError
from fedhead.flower import in_process_identity
from fedhead.membership import join
from fedhead.model import TransferModel
from fedhead.privacy.accountant import compose, epsilon_for, mu_for
from fedhead.privacy.noise import Lattice
from fedhead.protocol.actions import DESCRIBE, EVALUATE, MAP, PRIVATE, STANDARDISE, STATISTICS
from fedhead.protocol.mapping import MapRequest
from fedhead.protocol.messages import Description, Payload
from fedhead.protocol.private import PrivateRequest
from fedhead.server.private_run import evaluation_of
from fedhead.server.report.fit import fit
from fedhead.server.runs.record import RunRecord
from fedhead.server.runs.solve import SubProblem, solve
from fedhead.simulations import RunResult, simulate

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = 300
SITE = "site-0"


def private(epsilon: float = 8.0, **changes: Any) -> RunConfig:
    """Return a run that solves a head from sums."""
    return RunConfig.from_values({"rounds": 0, "privacy": {"epsilon": epsilon, **changes}})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return simulate(private(), out=tmp_path_factory.mktemp("run") / "out")


def test_a_private_head_is_nearly_as_good_as_the_exact_one(run: RunResult) -> None:
    assert run.accuracy is not None
    assert run.accuracy > 0.93
    accuracy, low, high = run.outcome.privacy["evaluation"]["accuracy"]
    assert 0 <= low <= accuracy <= high <= 1
    assert run.history[0].score == accuracy


@pytest.mark.parametrize("epsilon", [3.0, 8.0])
@pytest.mark.parametrize("asked", [0, 20])
def test_private_heads_are_calibrated(asked: int, epsilon: float, tmp_path: Path) -> None:
    result = simulate(private(epsilon).changed({"rounds": asked}), out=tmp_path / "out")
    samples = load_samples("digits")
    backbone = result.model.backbone
    with torch.inference_mode():
        features = backbone.features(torch.stack([backbone.preprocessing(samples.read(row)) for row in range(600)]))
        logits = result.model.head(features).double()
        labels = torch.from_numpy(samples.labels[:600]).long()
        losses = [float(torch.nn.functional.cross_entropy(logits / one, labels)) for one in np.logspace(-2, 2, 41)]
    assert float(torch.nn.functional.cross_entropy(logits, labels)) < min(losses) + 0.3


def test_accounts_are_stated_exactly(run: RunResult) -> None:
    accounts: Mapping[str, Mapping[str, float]] = run.outcome.privacy["accounts"]
    assert accounts["training rows"]["epsilon"] == pytest.approx(8.0)
    mu = mu_for(8.0, 1e-5) * 0.2**0.5
    assert accounts["held-out rows"]["epsilon"] == pytest.approx(epsilon_for(mu, 1e-5))


def test_the_model_carries_its_normalisation(run: RunResult) -> None:
    assert run.run_dir is not None
    model = TransferModel.load(run.run_dir)
    assert model.head_spec == "unit"
    rows = torch.randn(5, model.backbone.num_features)
    torch.testing.assert_close(model.head(rows), run.model.head(rows))


def test_report_and_card_say_what_is_protected_and_what_is_not(run: RunResult) -> None:
    assert run.run_dir is not None
    for name in ("report.html", "MODEL_CARD.md"):
        text = (run.run_dir / name).read_text().replace("&#39;", "'")
        for said in ("epsilon 8, delta 1e-05", "Not protected: the number and names", "Adding or removing one row"):
            assert said in text, (name, said)
        assert "Neither secure summation nor noise was on" not in text
        assert "discriminant analysis on noisy sums" in text
        assert "measured with noise" in text
        for wrong in ("no site had held-out rows", "every class had rows at some site", "starting from zeros"):
            assert wrong not in text, (name, wrong)
    kept = json.loads((run.run_dir / "evaluation.json").read_text())["privacy"]
    assert np.array(kept["evaluation"]["confusion"]).shape == (10, 10)


def test_sites_of_a_private_run_show_no_number_of_rows(run: RunResult) -> None:
    assert run.run_dir is not None
    section = fit(RunRecord.read(run.run_dir))
    ((_, table),) = section.tables
    assert {row[2] for row in table.rows} == {"\N{EN DASH}"}
    assert "Differential privacy hides each site's sums" in section.answer


def test_a_private_run_cannot_be_solved_again(run: RunResult, tmp_path: Path) -> None:
    assert run.run_dir is not None
    for again in (lambda: solve(run.run_dir, tmp_path / "out", SubProblem()), lambda: join(run.run_dir, "s", "digits")):
        with pytest.raises(UserError, match="is of a differentially private run"):
            again()


def test_the_terminal_says_accuracy_once(run: RunResult) -> None:
    console = Console(record=True, width=300, file=io.StringIO())
    _print_result(run, console)
    (line,) = [line for line in console.export_text().splitlines() if line.startswith("Accuracy")]
    assert line.count("ccuracy") == 1
    assert "measured with noise" in line


def test_nothing_exact_about_rows_is_in_the_run_folder(run: RunResult) -> None:
    assert run.run_dir is not None
    assert not (run.run_dir / "sums").exists() or not list((run.run_dir / "sums").iterdir())
    journal = json.loads((run.run_dir / "journal.json").read_text())
    assert {site["rows"] for site in journal["sites"].values()} <= {0, None}
    evaluation = json.loads((run.run_dir / "evaluation.json").read_text())
    assert evaluation["sites"] == {}
    assert evaluation["coverage"] == []


def test_own_noise_is_more_noise(tmp_path: Path, run: RunResult) -> None:
    own = simulate(private(noise="own"), out=tmp_path / "own")
    sigmas = [one.outcome.privacy["evaluation"]["sigma"]["outcomes"] for one in (run, own)]
    assert sigmas[1] == pytest.approx(sigmas[0] * 10**0.5, rel=1e-6)


def test_noise_is_fresh_in_every_run(tmp_path: Path, run: RunResult) -> None:
    again = simulate(private(), out=tmp_path / "again")
    assert not torch.equal(again.model.head.trainable()["weight"], run.model.head.trainable()["weight"])


def test_secure_summation_adds_the_same_noise(tmp_path: Path) -> None:
    result = simulate(private(secure_sum=True), out=tmp_path / "both")
    assert result.accuracy is not None
    assert result.accuracy > 0.9
    assert result.run_dir is not None
    text = (result.run_dir / "MODEL_CARD.md").read_text()
    assert "Secure summation was simulated" in text
    assert "Differential privacy was on" in text


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A run by rounds, as private runs are by default."""
    config = RunConfig.from_values({"privacy": {"epsilon": 1.0}})
    return simulate(config, out=tmp_path_factory.mktemp("rounds") / "out")


def test_rounds_spend_their_share_and_are_reported(rounds: RunResult) -> None:
    assert rounds.outcome.privacy["rounds"] == 20
    assert rounds.outcome.privacy["solver"] == "gradients"
    assert rounds.outcome.privacy["accounts"]["training rows"]["epsilon"] == pytest.approx(1.0)
    assert rounds.run_dir is not None
    for name in ("report.html", "MODEL_CARD.md"):
        assert "20 rounds of noisy gradients" in (rounds.run_dir / name).read_text()
    assert TransferModel.load(rounds.run_dir).head_spec == "unit"


def test_few_rounds_are_left_out(tmp_path: Path) -> None:
    result = simulate(private(1.0).changed({"rounds": 9}), out=tmp_path / "rounds")
    assert result.outcome.privacy["rounds"] == 0
    text = (tmp_path / "rounds" / "report.html").read_text()
    assert "No rounds were made: 9 rounds would not come near the best head, and 10 are the least" in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"head": "mlp:8"}, "needs a linear head"),
        ({"task": "multi-label"}, "needs the task 'classification'"),
        ({"privacy": {"epsilon": -1}}, "epsilon"),
        ({"privacy": {"epsilon": 1, "delta": 0}}, "delta"),
    ],
)
def test_runs_that_cannot_be_private_are_rejected(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        RunConfig.from_values({"privacy": {"epsilon": 1.0}, **changes})


def test_intervals_cover_sampling_and_noise() -> None:
    rng = np.random.default_rng(0)
    lattice = Lattice.of(4.0)
    covered = 0
    for _ in range(150):
        right = rng.binomial(300, 0.9)
        sums = {
            "outcomes": lattice.add(np.array([300.0 - right, right]), entropy=rng.bytes),
            "loss": np.array([30.0]),
            "confusion": np.zeros((2, 2)),
            "reliability": np.zeros((2, 10)),
        }
        _, low, high = evaluation_of(sums, {"outcomes": 4.0})["accuracy"]
        covered += low <= 0.9 <= high
    assert covered / 150 > 0.9


# A real site.


class Asker(ClientApp):
    """A site's app that a test can ask further; it keeps the messages of a run and their replies."""

    def __init__(self, site: Any) -> None:
        self.site = site
        self.own = make_app(lambda context: site)
        self.contents: list[tuple[str, RecordDict, Message]] = []
        self.context: Context | None = None

    def __call__(self, message: Message, context: Context) -> Message:
        self.context = context
        reply = self.own(message, context)
        self.contents.append((message.metadata.message_type, message.content, reply))
        return reply

    def ask(self, action: str, content: RecordDict) -> Message:
        assert self.context is not None
        with in_process_identity(run_id=1):
            return self.own(Message(content, 5, action), self.context)

    def refusal(self, action: str, content: RecordDict) -> str:
        """Return the sentence by which the site refuses to answer."""
        with pytest.raises(FedheadError) as refused:
            self.ask(action, content)
        return str(refused.value)


def real_site(folder: Path, **privacy: Any) -> Asker:
    settings = SiteSettings.from_values(
        {"name": SITE, "coordinator": "127.0.0.1:1", "data": "digits", "device": "cpu", "privacy": privacy}, "a test"
    )
    return Asker(site_of(settings, folder / "site.jsonl"))


@pytest.fixture
def asked(tmp_path: Path) -> Asker:
    asker = real_site(tmp_path, epsilon=10.0)
    simulate(private(noise="own"), "digits", [range(ROWS)], apps={SITE: asker}, out=tmp_path / "run")
    return asker


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Asker:
    """A site after a run, for questions that it refuses."""
    folder = tmp_path_factory.mktemp("idle")
    asker = real_site(folder, epsilon=10.0)
    simulate(private(noise="own"), "digits", [range(ROWS)], apps={SITE: asker}, out=folder / "run")
    return asker


def test_a_real_site_charges_its_accounts_and_tells_no_rows(asked: Asker, tmp_path: Path) -> None:
    charges = read_charges(accounts_path(tmp_path / "site.jsonl"))
    assert [(charge.stage, charge.account) for charge in charges] == [
        ("centre", "train"),
        ("lda", "train"),
        ("calibration", "train"),
        ("evaluation", "held_out"),
    ]
    mu = compose(charge.mu for charge in charges if charge.account == "train")
    assert 0.99 * mu_for(8.0, 1e-5) < mu <= mu_for(8.0, 1e-5)
    described = [reply for action, _, reply in asked.contents if action == DESCRIBE]
    assert Description.from_content(described[0].content).rows == 0
    assert {entry.action for entry in read_ledger(tmp_path / "site.jsonl")} == {DESCRIBE, PRIVATE}


def test_a_real_site_charges_its_account_for_every_round(tmp_path: Path) -> None:
    asker = real_site(tmp_path, epsilon=10.0)
    config = private(1.0, noise="own", evaluate=0.0).changed({"rounds": 12})
    result = simulate(config, "digits", [range(ROWS)], apps={SITE: asker}, out=tmp_path / "run")
    charges = read_charges(accounts_path(tmp_path / "site.jsonl"))
    assert [charge.stage for charge in charges] == ["centre"] + 12 * ["gradient"]
    assert len({charge.key for charge in charges}) == 13
    mu = compose(charge.mu for charge in charges)
    assert 0.99 * mu_for(1.0, 1e-5) < mu <= mu_for(1.0, 1e-5)
    assert result.outcome.privacy["rounds"] == 12
    # A round done again costs nothing, and gives nothing new; another head would, and the run has nothing left.
    (action, content, reply) = asker.contents[-1]
    again = Payload.from_content(asker.ask(action, content).content).arrays["gradient"]
    np.testing.assert_array_equal(again, Payload.from_content(reply.content).arrays["gradient"])
    payload = Payload.from_content(content)
    other = {**payload.arrays, "bias": payload.arrays["bias"] + np.float32(1)}
    assert "has spent the privacy budget" in asker.refusal(PRIVATE, Payload(payload.values, other).to_content())
    assert len(read_charges(accounts_path(tmp_path / "site.jsonl"))) == 13


def test_a_repeated_request_gets_the_same_noise(asked: Asker, tmp_path: Path) -> None:
    for action, content, reply in asked.contents:
        if action == PRIVATE:
            again = Payload.from_content(asked.ask(PRIVATE, content).content)
            for name, array in Payload.from_content(reply.content).arrays.items():
                np.testing.assert_array_equal(again.arrays[name], array)
    assert len(read_charges(accounts_path(tmp_path / "site.jsonl"))) == 4


def test_noise_is_on_the_lattice_and_of_the_stated_size(asked: Asker) -> None:
    (content, reply) = next(
        (content, reply)
        for action, content, reply in asked.contents
        if action == PRIVATE and Payload.from_content(content).values["stage"] == "lda"
    )
    request = PrivateRequest.from_payload(Payload.from_content(content), 10, 192)
    made = request.mechanism(10, 192)
    released = Payload.from_content(reply.content).arrays
    assert asked.context is not None
    agreed = agreement(asked.context)
    exact = private_sums([asked.site.open(agreed.manifest)], agreed, request)
    for name, form in made.arrays.items():
        unit = form.lattice.unit
        assert np.array_equal(np.rint(released[name] / unit) * unit, released[name])
        noise = (released[name] - exact[name]) / made.sigma(name)
        assert abs(noise.mean()) < 6 / noise.size**0.5
        assert noise.std() == pytest.approx(1, rel=max(0.03, 3 / noise.size**0.5))


def test_a_hostile_coordinator_gets_nothing_exact_and_nothing_beyond_the_budget(asked: Asker, tmp_path: Path) -> None:
    exact = Payload({"what": "gram", "rows": "train"}).to_content()
    head = {"weight": np.zeros((10, 192), np.float32), "bias": np.zeros(10, np.float32)}
    about_a_head = Payload({"server_round": 1}, head).to_content()
    for action, content in ((STATISTICS, exact), (EVALUATE, about_a_head)):
        assert "differentially private" in asked.refusal(action, content)
    assert asked.context is not None
    before = dict(asked.context.state)
    for action in ABOUT_ROWS - {PRIVATE}:
        assert "requests for noisy sums only" in asked.refusal(action, about_a_head)
    # Whether a standardisation or a map is accepted would tell of rows, and nothing of it is kept.
    scaled = {"mean": np.zeros(192, np.float32), "scale": np.full(192, 1e-5, np.float32)}
    assert "requests for noisy sums only" in asked.refusal(STANDARDISE, Payload({}, scaled).to_content())
    assert "requests for noisy sums only" in asked.refusal(MAP, MapRequest("unit", "relu:4096").payload().to_content())
    assert dict(asked.context.state) == before
    more = asked.refusal(PRIVATE, PrivateRequest("centre", 1.0).to_content())
    assert more == "The run has spent the privacy budget that its manifest states."
    # Asking for less noise by claiming that many sites share it changes nothing.
    first = next(content for action, content, _ in asked.contents if action == PRIVATE)
    payload = Payload.from_content(first)
    shared = asked.ask(PRIVATE, Payload({**payload.values, "parties": 10_000}, payload.arrays).to_content())
    charged = read_charges(accounts_path(tmp_path / "site.jsonl"))
    assert len(charged) == 4
    assert shared.has_content()


@pytest.mark.parametrize(
    "values",
    [
        {"stage": "centre", "mu": 1e9},
        {"stage": "centre", "mu": -1.0},
        {"stage": "centre", "mu": float("nan")},
        {"stage": "centre", "mu": "1"},
        {"stage": "centre", "mu": 1e-12},
        {"stage": "centre", "mu": 0.1, "parties": 0},
        {"stage": "centre", "mu": 0.1, "parties": 10**12},
        {"stage": "centre", "mu": 0.1, "more": 1},
        {"stage": "exact", "mu": 0.1},
        {"stage": "lda", "mu": 0.1},
        {},
    ],
)
def test_invalid_requests_are_rejected(values: dict[str, Any], idle: Asker) -> None:
    assert len(idle.refusal(PRIVATE, Payload(values).to_content())) < 300


def test_arrays_of_a_request_are_checked(idle: Asker) -> None:
    shift, weight, bias = np.zeros(192, np.float32), np.zeros((10, 192), np.float32), np.zeros(10, np.float32)
    good = {"shift": shift, "weight": weight, "bias": bias}
    for wrong in (
        {**good, "shift": shift[:5]},
        {**good, "bias": bias.astype(np.float64)},
        {**good, "weight": np.full_like(weight, np.nan)},
        {**good, "weight": np.full_like(weight, 1e9)},
        {"shift": shift},
    ):
        content = Payload({"stage": "evaluation", "mu": 0.1}, wrong).to_content()
        said = idle.refusal(PRIVATE, content)
        assert said.startswith("'") or "contains the arrays" in said


@pytest.mark.parametrize(
    ("privacy", "config", "said"),
    [
        ({}, private(noise="own"), "has no privacy budget"),
        ({"epsilon": 10.0}, private(noise="shared"), "only secure summation allows"),
        ({"epsilon": 1.0}, private(noise="own"), "more privacy budget of this site's training rows than is left"),
        ({"epsilon": 10.0, "unit": "group"}, private(noise="own"), "protects groups of rows"),
        ({"epsilon": 10.0, "require": "dp"}, RunConfig(rounds=0), "differentially private runs only"),
    ],
)
def test_a_site_refuses_terms_that_its_settings_forbid(
    privacy: dict[str, Any], config: RunConfig, said: str, tmp_path: Path
) -> None:
    asker = real_site(tmp_path, **privacy)
    with pytest.raises(FedheadError, match=said):
        simulate(config, "digits", [range(ROWS)], apps={SITE: asker}, out=tmp_path / "run")
    assert read_charges(accounts_path(tmp_path / "site.jsonl")) == []


def test_groups_are_protected_as_wholes(tmp_path: Path) -> None:
    # Without groups, rows of equal content form one.
    asker = real_site(tmp_path, epsilon=10.0, unit="group")
    config = private(noise="own", unit="group")
    simulate(config, "digits", [range(ROWS)], apps={SITE: asker}, out=tmp_path / "run")
    first = Payload.from_content(next(reply for action, _, reply in asker.contents if action == PRIVATE).content)
    assert abs(float(first.arrays["count"][0]) - 1446) < 40


def test_rows_are_held_out_as_without_privacy(asked: Asker) -> None:
    holding = next(iter(asked.site._holdings.values()))
    keys = holding.keys
    assert set(holding.held_out.rows) == set(np.flatnonzero(held_out(keys, 0.2)))
    assert len(holding.train.rows) + len(holding.held_out.rows) == 1797
