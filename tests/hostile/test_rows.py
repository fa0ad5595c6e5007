"""A coordinator that asks on purpose for releases whose difference is a row."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message

from fedhead.backbones import Backbone, load_backbone
from fedhead.client.connection import Connection
from fedhead.client.release.accounts import accounts_path, read_charges
from fedhead.client.release.ledger import Entry, ledger_path, read_ledger
from fedhead.client.settings import SecureKeys, SiteSettings
from fedhead.client.site import SiteProcess
from fedhead.client.site_opening import site_of
from fedhead.config import LocalConfig, RunConfig
from fedhead.flower import in_process_identity
from fedhead.heads.head import MOST_PARAMETERS
from fedhead.protocol.actions import (
    ACTIONS,
    DESCRIBE,
    EVALUATE,
    GRADIENT,
    MAP,
    PRIVATE,
    REPORT,
    STANDARDISE,
    STATISTICS,
    SUBGROUPS,
    TRAIN,
)
from fedhead.protocol.heads import HeadRequest, ReportRequest
from fedhead.protocol.mapping import MapRequest
from fedhead.protocol.messages import (
    Manifest,
    Payload,
)
from fedhead.protocol.private import PrivacyTerms, PrivateRequest
from fedhead.secure.keys import SiteKeys, signed_roster
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.score_bins import ScoreBins
from fedhead.sums.sums import Arrays

CLASSES = ("cat", "dog")
ROWS = 40
FEATURES = 3


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "home"))
    with in_process_identity(run_id=1):
        yield


class Attack:
    """A site's real process with a table of numbers, and a coordinator that asks it whatever it likes."""

    def __init__(self, folder: Path, keys: SecureKeys | None = None, name: str = "ward", **settings: Any) -> None:
        self.folder = folder
        self.keys = keys
        self.table = folder / "rows.csv"
        generator = np.random.default_rng(0)
        self.rows = [(generator.normal(size=FEATURES).round(4).tolist(), CLASSES[number % 2]) for number in range(ROWS)]
        self.write()
        spec = "identity:" + ",".join(f"x{number}" for number in range(FEATURES))
        self.backbone: Backbone = load_backbone(spec)
        self.settings = SiteSettings(
            name=name, coordinator="127.0.0.1:9092", data=f"csv:{self.table}?label=label", device="cpu", **settings
        )
        self.runs = 0
        self.restart()

    def write(self) -> None:
        head = ",".join([*(f"x{number}" for number in range(FEATURES)), "label"])
        lines = [",".join([*map(str, values), label]) for values, label in self.rows]
        self.table.write_text("\n".join([head, *lines, ""]))

    def restart(self, **changes: Any) -> None:
        """Restart the site's process, with other settings if there are changes."""
        self.settings = SiteSettings(**{**self.settings.model_dump(), **changes})
        site = site_of(self.settings, ledger_path(self.settings.name), keys=self.keys)
        self.process = SiteProcess(self.settings, site, Connection.__new__(Connection), self.folder / "site")

    def ask(self, action: str, payload: Payload) -> Payload:
        reply = self.process.answer(Message(payload.to_content(), 5, action))
        assert not reply.has_error(), reply.error.reason
        return Payload.from_content(reply.content)

    def describe(self, **changes: Any) -> Payload:
        """Begin a run of a new name."""
        self.runs += 1
        values = {
            "run": f"run {self.runs}",
            "backbone": self.backbone.spec,
            "kind": "table",
            "layer": self.backbone.layer,
            "backbone_digest": self.backbone.digest,
            "weights_digest": self.backbone.weights_digest,
            "num_features": FEATURES,
            "classes": CLASSES,
            "head": "linear",
            "holdout": 0.2,
            "seed": 0,
            "local": RunConfig().local,
        }
        self.manifest = manifest = Manifest(**{**values, **changes})
        probe = self.backbone.probe().numpy().astype(np.float32)
        told = self.ask(DESCRIBE, Payload(manifest.model_dump(), {"probe": probe}))
        assert not told.values["refusal"], told.values["refusal"]
        return told

    def entries(self) -> list[Entry]:
        return read_ledger(ledger_path(self.settings.name))

    def trained(self, local: dict[str, Any], **values: Any) -> Arrays:
        """Return the head that one round of a new run makes of zeros, on features as they are."""
        self.describe(local=LocalConfig(**local))
        zeros, ones = np.zeros(FEATURES, np.float32), np.ones(FEATURES, np.float32)
        self.ask(STANDARDISE, Payload({}, {"mean": zeros, "scale": ones}))
        classes = len(CLASSES)
        head = {"weight": np.zeros((classes, FEATURES), np.float32), "bias": np.zeros(classes, np.float32)}
        arrays = dict(self.ask(TRAIN, Payload({"server_round": 1, **values}, head)).arrays)
        del arrays["metrics"]
        return arrays

    def sums(self, rows: str = "train", **changes: Any) -> FeatureStatistics:
        """Return the sums that a new run gets."""
        self.describe(**changes)
        arrays = self.ask(STATISTICS, Payload({"rows": rows})).arrays
        return FeatureStatistics.from_tensors({name: torch.from_numpy(array.copy()) for name, array in arrays.items()})


def difference(first: FeatureStatistics, second: FeatureStatistics) -> int:
    """Return by how many rows the sums differ, as far as the counts of classes say."""
    return int((first.counts - second.counts).abs().sum())


def same(first: FeatureStatistics, second: FeatureStatistics) -> bool:
    return torch.equal(first.counts, second.counts) and torch.equal(first.sums, second.sums)


def test_neither_share_nor_seed_of_a_run_move_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    attack = Attack(tmp_path)
    first = attack.sums()
    for number in range(20):
        assert same(attack.sums(holdout=0.2 + 0.01 * number, seed=number), first)
    assert "The site decides" in caplog.text
    assert same(attack.sums(holdout=0.0), first)


def both_parts(attack: Attack) -> torch.Tensor:
    """Return the sums of training and held-out rows together, `[C, d]`."""
    return attack.sums().sums + attack.sums("held_out").sums


def test_training_and_held_out_rows_together_lay_no_added_row_bare(tmp_path: Path) -> None:
    attack = Attack(tmp_path, limits={"min_class_count": 3})
    before = both_parts(attack)
    for number in range(2):
        attack.rows.append(([100.0 + number, 0.0, 0.0], "cat"))
        attack.write()
        assert torch.equal(both_parts(attack), before)
        attack.restart()
        assert torch.equal(both_parts(attack), before)
    assert attack.process._site.num_rows == ROWS + 2


def test_an_honest_run_after_one_added_row_gives_the_same_sums(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    attack = Attack(tmp_path)
    first, entry = attack.sums(), attack.entries()[-1]
    attack.rows.append(([9.0, 9.0, 9.0], "dog"))
    attack.write()
    assert same(attack.sums(), first)
    assert attack.entries()[-1].row_set == entry.row_set
    assert "withholds 1 rows until more come, 5 or more of a class at a time: {'dog': 1}" in caplog.text
    attack.rows += [([number / 7, 1.0, -number / 3], "dog") for number in range(40)]
    attack.write()
    assert difference(attack.sums(), first) >= 5


@pytest.mark.parametrize("restart", [False, True])
def test_a_row_that_is_removed_takes_others_along(tmp_path: Path, restart: bool) -> None:
    attack = Attack(tmp_path)
    first = attack.sums()
    removed = attack.rows.pop(0)
    attack.write()
    if restart:
        attack.restart()
    assert difference(attack.sums(), first) in (0, *range(5, 10))
    attack.rows.insert(0, removed)
    attack.write()
    assert same(attack.sums(), first)


def test_rows_that_are_relabelled_leave_both_sums_with_others(tmp_path: Path) -> None:
    attack = Attack(tmp_path)
    releases = [attack.sums()]
    for number in range(3):
        values, label = attack.rows[number]
        attack.rows[number] = (values, "dog" if label == "cat" else "cat")
        attack.write()
        releases.append(attack.sums())
        for earlier in releases[:-1]:
            changed = (earlier.counts - releases[-1].counts).abs()
            assert ((changed == 0) | (changed >= 5)).all()
            unchanged = changed == 0
            assert torch.equal(earlier.sums[unchanged], releases[-1].sums[unchanged])


def test_a_head_trained_on_changed_rows_is_the_head_of_the_same_rows(tmp_path: Path) -> None:
    attack = Attack(tmp_path)
    full_batch = {"batch_size": 1000, "lr": 0.01}
    first = attack.trained(full_batch)
    attack.rows.append(([50.0, -50.0, 50.0], "cat"))
    attack.write()
    again = attack.trained(full_batch)
    for name, value in first.items():
        np.testing.assert_array_equal(again[name], value)
    assert len({entry.row_set for entry in attack.entries() if entry.rows}) == 1


def test_releases_about_rows_are_in_the_ledger_with_what_they_rest_on(tmp_path: Path) -> None:
    attack = Attack(tmp_path)
    attack.sums(seed=3)
    attack.trained({"lr": 0.01})
    summed, trained = [entry for entry in attack.entries() if entry.rows]
    assert (summed.seed, summed.share, summed.backbone) == (3, 0.2, attack.backbone.spec)
    assert (summed.layer, summed.weights) == (attack.backbone.layer, attack.backbone.weights_digest)
    assert summed.row_set == trained.row_set != ""
    assert trained.action == TRAIN


def test_a_budget_is_spent_across_runs_and_restarts(tmp_path: Path) -> None:
    attack = Attack(tmp_path, budget={"releases_per_day": 3})
    for _ in range(3):
        attack.sums()
        attack.restart()
    with pytest.raises(AssertionError, match="3 releases about its rows today"):
        attack.sums()


@pytest.mark.parametrize(
    ("local", "reason"),
    [
        ({"batch_size": 1}, "minibatches of 5 rows or more, not 1"),
        ({"lr": 1e6}, "lr of at most 10, not 1e[+]06"),
        ({"epochs": 100_000}, "epochs of at most 1000"),
        ({"weight_decay": 1e9}, "weight_decay of at most 1000"),
        ({"proximal_mu": 1e9}, "proximal_mu of at most 1000"),
    ],
)
def test_a_site_does_not_train_as_no_honest_run_does(tmp_path: Path, local: dict[str, Any], reason: str) -> None:
    attack = Attack(tmp_path)
    with pytest.raises(AssertionError, match=reason):
        attack.describe(local=LocalConfig(**local))


def test_a_strategy_cannot_exceed_the_limits_of_training_either(tmp_path: Path) -> None:
    attack = Attack(tmp_path)
    with pytest.raises(AssertionError, match="proximal_mu of at most 1000"):
        attack.trained({}, proximal_mu=1e8)
    assert not [entry for entry in attack.entries() if entry.rows]


def test_an_operator_can_raise_the_limits_of_training(tmp_path: Path) -> None:
    Attack(tmp_path, limits={"max_lr": 1e7}).describe(local=LocalConfig(lr=1e6))


def test_a_standardisation_cannot_stand_in_for_a_learning_rate(tmp_path: Path) -> None:
    attack = Attack(tmp_path)
    attack.describe()
    zeros = np.zeros(FEATURES, np.float32)
    for scale in (1e-5, 0.0):
        with pytest.raises(AssertionError, match="too large after standardisation"):
            attack.ask(STANDARDISE, Payload({}, {"mean": zeros, "scale": np.full_like(zeros, scale)}))
        with pytest.raises(AssertionError, match="describe it again"):
            attack.ask(STATISTICS, Payload())
        attack.describe()
    attack.ask(STANDARDISE, Payload({}, {"mean": zeros, "scale": np.full_like(zeros, 0.1)}))


def overflows(attack: Attack, weight: float) -> str:
    """Ask for a report that fails if the first feature of a held-out row times `weight` overflows; return why."""
    head = {"weight": np.zeros((2, FEATURES), np.float32), "bias": np.zeros(2, np.float32)}
    head["weight"][0, 0] = weight
    request = ReportRequest(HeadRequest(head, 1), ScoreBins.default(2))
    reply = attack.process.answer(Message(request.to_content(), 5, REPORT))
    return reply.error.reason if reply.has_error() else ""


def test_a_gradient_that_is_one_row_does_not_leave_and_is_counted(tmp_path: Path) -> None:
    attack = Attack(tmp_path, limits={"max_share": 0.5})
    # The first feature is the class, but for one training row that looks like the other class.
    attack.rows = [([2.0 * (label == "cat") - 1, *values[1:]], label) for values, label in attack.rows]
    attack.rows[1] = ([1.0, 5.0, -7.0], "dog")
    attack.write()
    attack.restart()
    attack.describe()
    values = {"server_round": 1, "proximal_mu": None, "everyone": False}
    steep = {"weight": np.zeros((2, FEATURES), np.float32), "bias": np.zeros(2, np.float32)}
    steep["weight"][0, 0] = 1e3
    reply = attack.process.answer(Message(Payload(values, steep).to_content(), 5, GRADIENT))
    assert reply.has_error()
    assert "no gradient in which one row makes up more than 0.5" in reply.error.reason
    assert [entry.rows > 0 for entry in attack.entries() if entry.action == GRADIENT] == [True]
    steep["weight"][0, 0] = 0.1
    arrays = attack.ask(GRADIENT, Payload(values, steep)).arrays
    assert arrays["weight"].shape == (2, FEATURES)


def test_an_operator_can_forbid_gradients(tmp_path: Path) -> None:
    attack = Attack(tmp_path, permit={"actions": ["query.describe", "query.statistics", "train"]})
    attack.describe()
    calm = {"weight": np.zeros((2, FEATURES), np.float32), "bias": np.zeros(2, np.float32)}
    with pytest.raises(AssertionError, match=r"train\.gradient"):
        attack.ask(GRADIENT, Payload({"server_round": 1}, calm))


def test_requests_that_fail_are_in_the_ledger_and_spend_the_budget(tmp_path: Path) -> None:
    attack = Attack(tmp_path, budget={"releases_per_day": 3})
    attack.describe()
    assert not overflows(attack, 1.0)
    for _ in range(2):
        assert "ValueError" in overflows(attack, 3e38)
    assert [entry.action for entry in attack.entries() if entry.rows] == [REPORT] * 3
    # Whether a row is beyond the threshold cannot be told from refusals for another reason.
    assert overflows(attack, 1.0) == overflows(attack, 3e38) != ""
    assert "3 releases about its rows today" in overflows(attack, 3e38)
    assert len([entry for entry in attack.entries() if entry.rows]) == 3


def test_a_refused_standardisation_spends_the_budget(tmp_path: Path) -> None:
    attack = Attack(tmp_path)
    attack.describe()
    small = {"mean": np.zeros(FEATURES, np.float32), "scale": np.full(FEATURES, 1e-5, np.float32)}
    with pytest.raises(AssertionError, match="too large after standardisation"):
        attack.ask(STANDARDISE, Payload({}, small))
    assert [entry.action for entry in attack.entries() if entry.rows] == [STANDARDISE]


def test_requests_of_another_form_rest_on_no_rows(tmp_path: Path) -> None:
    attack = Attack(tmp_path)
    attack.describe()
    with pytest.raises(AssertionError, match="'bias'"):
        attack.ask(TRAIN, Payload({"server_round": 1}, {"weight": np.zeros((2, FEATURES), np.float32)}))
    assert not [entry for entry in attack.entries() if entry.rows]


def test_no_refusal_names_a_folder_of_the_site(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    attack = Attack(tmp_path)
    attack.sums()
    (kept,) = ledger_path("ward").with_suffix(".rows").iterdir()
    kept.write_bytes(b"damaged")
    attack.rows += [([number / 7, 1.0, -number / 3], "dog") for number in range(40)]
    attack.write()
    attack.describe()
    reply = attack.process.answer(Message(Payload().to_content(), 5, STATISTICS))
    assert reply.error.reason == "The site cannot do it; its own log says why."
    assert str(kept) in caplog.text


def test_a_short_message_makes_no_large_head(tmp_path: Path) -> None:
    attack = Attack(tmp_path)
    attack.describe(head=f"mlp:{MOST_PARAMETERS}", local=LocalConfig())
    with pytest.raises(AssertionError, match="cannot do it"):
        attack.ask(TRAIN, Payload({"server_round": 1}))


def test_counts_of_many_classes_are_refused_before_they_need_memory(tmp_path: Path) -> None:
    attack = Attack(tmp_path)
    for action, others, values, arrays in (
        (REPORT, 20_000, {}, {"bins.centre": np.zeros(20_000), "bins.spread": np.ones(20_000)}),
        (SUBGROUPS, 3000, {"temperature": 1.0, "names": [str(number) for number in range(100)]}, {}),
    ):
        classes = (*CLASSES, *(f"class {number}" for number in range(2, others)))
        attack.describe(classes=classes)
        head = {"weight": np.zeros((others, FEATURES), np.float32), "bias": np.zeros(others, np.float32)}
        with pytest.raises(AssertionError, match="true by predicted classes"):
            attack.ask(action, Payload({"server_round": 1, **values}, {**head, **arrays}))
    assert not [entry for entry in attack.entries() if entry.rows]


def test_the_ledger_knows_a_class_by_any_spelling(tmp_path: Path) -> None:
    attack = Attack(tmp_path)
    attack.rows = [(values, str(CLASSES.index(label))) for values, label in attack.rows]
    attack.write()
    attack.restart()
    for classes in (("0", "1"), ("0.0", "1."), ("0.00", "1.0")):
        attack.sums(classes=classes)
    assert len({entry.row_set for entry in attack.entries() if entry.rows}) == 1


ABOUT_A_HEAD = {"weight": np.zeros((2, FEATURES), np.float32), "bias": np.zeros(2, np.float32)}
SCALE = {"mean": np.zeros(FEATURES, np.float32), "scale": np.ones(FEATURES, np.float32)}
REQUESTS = [
    (STATISTICS, Payload({"rows": "train"})),
    (STANDARDISE, Payload({}, SCALE)),
    (MAP, MapRequest("unit", "relu:8").payload()),
    (TRAIN, Payload({"server_round": 1}, ABOUT_A_HEAD)),
    (EVALUATE, Payload({"server_round": 1}, ABOUT_A_HEAD)),
]


def refusals(attack: Attack) -> set[str]:
    """Return how the site refuses each request about rows."""
    replies = [attack.process.answer(Message(asked.to_content(), 5, action)) for action, asked in REQUESTS]
    assert all(reply.has_error() for reply in replies)
    return {reply.error.reason for reply in replies}


@pytest.fixture
def keys() -> SecureKeys:
    names = ("ward", "unit", "clinic")
    own = {name: SiteKeys.generate() for name in names}
    members = {name: one.member for name, one in own.items()}
    return SecureKeys(own["ward"], signed_roster(ec.generate_private_key(ec.SECP256R1()), members))


@pytest.mark.parametrize(
    ("require", "reason"),
    [("dp", "differentially private runs only"), ("secure-sum", "sends sums only under secure summation")],
)
def test_a_run_described_under_other_settings_gets_nothing(
    tmp_path: Path, keys: SecureKeys, require: str, reason: str
) -> None:
    attack = Attack(tmp_path, keys)
    attack.sums()
    attack.restart(privacy={"require": require, "epsilon": 3.0})
    (said,) = refusals(attack)
    assert reason in said


def test_a_run_under_secure_summation_gets_no_plain_sums(tmp_path: Path, keys: SecureKeys) -> None:
    attack = Attack(tmp_path, keys)
    attack.describe(secure_sum=True)
    for action, asked in REQUESTS:
        if ACTIONS[action].sums:
            with pytest.raises(AssertionError, match="belongs to no secure sum"):
                attack.ask(action, asked)
    assert not [entry for entry in attack.entries() if entry.rows]
    attack.ask(STANDARDISE, Payload({}, SCALE))


@pytest.mark.parametrize(("missing", "told"), [(4, False), (12, True)])
def test_a_flag_that_few_rows_have_does_not_sum_them_alone(tmp_path: Path, missing: int, told: bool) -> None:
    attack = Attack(tmp_path)
    for values, _ in attack.rows[:missing]:
        values[0] = ""
    attack.write()
    attack.restart()
    attack.backbone = load_backbone("identity:x0?,x1,x2")
    sums = attack.sums(num_features=FEATURES + 1)
    assert sums.rows
    assert bool(sums.sums[:, FEATURES].any()) == told


LEVELS = ("I", "II")


@pytest.mark.parametrize("strict_data", [False, True])
def test_whether_rows_fit_the_asked_columns_is_no_question_to_a_private_site(tmp_path: Path, strict_data: bool) -> None:
    attack = Attack(tmp_path, privacy={"epsilon": 3.0, "require": "dp"}, strict_data=strict_data)
    lines = attack.table.read_text().splitlines()
    levels = ["stage", *(LEVELS[number % 2] for number in range(ROWS))]
    # One row has a level of its own, and another one lacks a number.
    levels[18] = "HIV"
    lines[9] = ",".join([*lines[9].split(",")[:-2], "", lines[9].split(",")[-1]])
    attack.table.write_text("".join(f"{level},{line}\n" for level, line in zip(levels, lines, strict=True)))
    attack.restart(data=f"csv:{attack.table}?label=label&categories=stage")
    known = "x0,stage=I,stage=II"
    for columns in ("x0", "x2", known, f"{known},stage=HIV", f"{known},stage=TB", "x0,stage=TB", "x0,stage=HIV"):
        attack.backbone = load_backbone(f"identity:{columns}")
        terms = PrivacyTerms(epsilon=0.1, delta=1e-5, unit="row", noise="own", evaluate=0.0).model_dump()
        attack.describe(num_features=attack.backbone.num_features, privacy=terms)
        asked = PrivateRequest("centre", 1e-3)
        attack.ask(PRIVATE, Payload(asked.values(), asked.arrays))
    assert len(read_charges(accounts_path(ledger_path(attack.settings.name)))) == 7


def test_a_private_run_of_another_task_is_refused(tmp_path: Path) -> None:
    attack = Attack(tmp_path, privacy={"epsilon": 3.0})
    terms = PrivacyTerms(epsilon=1.0, delta=1e-5, unit="row", noise="own", evaluate=0.1).model_dump()
    attack.describe(privacy=terms)
    for task in ("regression", "ordinal"):
        with pytest.raises(AssertionError, match=f"are for classification .* of the task {task}"):
            attack.describe(privacy=terms, task=task)
