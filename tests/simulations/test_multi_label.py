"""Rows with any number of classes, from the data to the delivered model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from typer.testing import CliRunner

import fedhead.solvers.closed_form
from fedhead.cli import app
from fedhead.client.app import make_app
from fedhead.client.local_site import LocalSite
from fedhead.client.release.ledger import Ledger, read_ledger
from fedhead.config import RunConfig
from fedhead.data import Samples, load_samples, samples_from_arrays
from fedhead.errors import FedheadError, UserError
from fedhead.model import TransferModel
from fedhead.protocol.actions import (
    CALIBRATE,
    DESCRIBE,
    EVALUATE,
    REPORT,
    RIVALS,
    STANDARDISE,
    STATISTICS,
    TRAIN,
)
from fedhead.protocol.messages import Manifest
from fedhead.simulations import RunResult, rank, simulate

ROWS = 600
ATTRIBUTES = ("even", "large", "looped")
UNGUARDED = {"min_class_count": 0, "min_rows": 0}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_attributed(rows: range = range(ROWS)) -> Samples:
    """Digits by three attributes, of which 1 and 3 have none."""
    whole = load_samples("digits")
    digits = whole.labels[rows]
    marks = np.stack([digits % 2 == 0, digits > 4, np.isin(digits, (0, 6, 8, 9))], 1)
    return samples_from_arrays([whole.read(row) for row in rows], marks, classes=ATTRIBUTES, spec=f"attributes {rows}")


@pytest.fixture(scope="module")
def attributed() -> Samples:
    return make_attributed()


def multi_label(**values: Any) -> RunConfig:
    return RunConfig(**{"multi_label": True, "rounds": 0, **values})


def folder_of(result: RunResult) -> Path:
    assert result.run_dir is not None
    return result.run_dir


def features_of(result: RunResult, samples: Samples) -> torch.Tensor:
    backbone = result.model.backbone
    rows = [backbone.preprocessing(samples.read(row)) for row in range(len(samples))]
    with torch.inference_mode():
        return backbone.features(torch.stack(rows)).double()


@pytest.mark.parametrize("partition", ["iid", "dirichlet:0.3", "shards:2", "quantity:0.5"])
def test_one_exchange_equals_ridge_on_all_rows_pooled(
    attributed: Samples, partition: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    penalties: list[float] = []
    choose = fedhead.solvers.closed_form.generalised_cross_validation

    def note(*arguments: Any) -> float:
        penalties.append(choose(*arguments))
        return penalties[-1]

    monkeypatch.setattr(fedhead.solvers.closed_form, "generalised_cross_validation", note)
    config = multi_label(holdout=0.0, simulation={"partition": partition, "sites": 7, **UNGUARDED})
    result = simulate(config, attributed)
    assert result.config.init == "ridge"
    features = features_of(result, attributed)
    pooled = Ridge(alpha=penalties[-1]).fit(features.numpy(), 2 * attributed.labels - 1)
    with torch.inference_mode():
        logits = result.model.head(features.float())
    np.testing.assert_allclose(logits.numpy(), pooled.predict(features.numpy()), atol=1e-4)


def test_a_test_set_and_the_report_say_how_many_rows_have_all_labels_right(attributed: Samples) -> None:
    test = make_attributed(range(900, 1100))
    result = simulate(multi_label(), attributed, 5, test_data=test)
    predicted = result.model.predict([test.read(row) for row in range(len(test))])
    truth = [tuple(np.array(ATTRIBUTES)[marks == 1].tolist()) for marks in test.labels]
    right = [one == other for one, other in zip(predicted, truth, strict=True)]
    assert result.test_accuracy == np.mean(right) > 0.9
    assert () in truth
    assert result.accuracy_held_out == result.history[0].score
    evaluation = json.loads((folder_of(result) / "evaluation.json").read_text())
    assert [one["name"] for one in evaluation["pooled"]["classes"]] == list(ATTRIBUTES)
    assert evaluation["pooled"]["accuracy"] == result.evaluation.accuracy.to_list()
    assert evaluation["pooled"]["auroc"][0] > 0.97
    advice = {one["recommendation"] for one in evaluation["diagnosis"]}
    assert advice <= {"join", "not enough rows to tell"}
    assert {one["finding"] for one in evaluation["diagnosis"]} <= {"alike", "unknown"}
    assert all(one["comparison"]["explained"]["pooled"] > 0.3 for one in evaluation["diagnosis"])
    assert [one["name"] for one in evaluation["coverage"]] == list(ATTRIBUTES)


def test_rounds_lower_the_loss_of_the_solved_head_and_keep_its_accuracy(attributed: Samples) -> None:
    config = multi_label(rounds=10, simulation={"partition": "iid", "sites": 5})
    result = simulate(config, attributed)
    first, last = result.history[0], result.history[-1]
    solved = simulate(config.changed({"rounds": 0}), attributed).history[0]
    assert first.loss is not None and last.loss is not None and solved.loss is not None
    assert last.loss < first.loss
    assert last.loss < solved.loss / 2
    assert result.accuracy_one_exchange is not None and result.accuracy_after_rounds is not None
    assert result.accuracy_after_rounds >= result.accuracy_one_exchange - 0.02 > 0.9
    assert result.outcome.kept_round == 10


@pytest.mark.parametrize(
    "changes",
    [
        {"init": "zeros", "local": {"lr": 1.0}},
        {"init": "random", "strategy": {"name": "FedAdam", "eta": 0.01}},
        {"head": "mlp:16", "local": {"optimizer": "adamw", "lr": 0.01}},
        {"strategy": {"name": "FedProx", "proximal_mu": 0.1}},
        {"strategy": {"name": "FedMedian"}},
    ],
    ids=str,
)
def test_heads_and_strategies_learn(attributed: Samples, changes: dict[str, Any]) -> None:
    result = simulate(multi_label(rounds=8, simulation={"partition": "iid", "sites": 4}, **changes), attributed)
    last = result.history[-1].train_loss
    assert last is not None
    assert last < 0.35
    assert result.evaluation.auroc.value is not None
    assert result.evaluation.auroc.value > 0.9


@pytest.mark.parametrize("changes", [{}, {"head": "mlp:8", "seed": 3}, {"strategy": {"name": "FedMedian"}}], ids=str)
def test_a_run_is_reproduced_bit_for_bit_from_what_it_wrote(attributed: Samples, changes: dict[str, Any]) -> None:
    first = simulate(multi_label(rounds=2, **changes), attributed, out="first")
    config = RunConfig.from_toml(folder_of(first) / "run.toml")
    assert config.task == "multi-label"
    second = simulate(config, attributed, out="again")
    for name in ("model.safetensors", "run.toml"):
        assert (folder_of(first) / name).read_bytes() == (folder_of(second) / name).read_bytes()
    assert TransferModel.load(folder_of(first)).task.name == "multi-label"


def test_classes_may_be_put_in_another_order(attributed: Samples) -> None:
    plain, turned = (
        simulate(multi_label(classes=classes, simulation={"partition": "iid"}), attributed, 3)
        for classes in (ATTRIBUTES, ATTRIBUTES[::-1])
    )
    torch.testing.assert_close(
        turned.model.head.state_dict()["bias"].flip(0), plain.model.head.state_dict()["bias"], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"multi_label": False}, "run it with --multi-label"),
        ({"init": "lda"}, "cannot start from 'lda' in the task 'multi-label', only from: ridge, zeros, random"),
        ({"init": "nearest-mean"}, "cannot start from 'nearest-mean' in the task 'multi-label'"),
        ({"head": "cosine"}, "'cosine' does not fit the task 'multi-label'"),
        ({"head": "mlp:4", "init": "ridge"}, "'mlp:4' cannot start from 'ridge'"),
        ({"simulation": {"test_data": "digits"}}, "names one class per row"),
        ({"classes": ["even", "odd"]}, "is of class 'large'"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_before_anything_is_run(
    attributed: Samples, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        simulate(multi_label(**changes), attributed, 3)
    assert not Path("runs").exists()


def test_single_label_data_is_refused() -> None:
    with pytest.raises(UserError, match="names one class per row"):
        simulate(multi_label(), "digits")


def test_a_site_with_data_of_the_other_kind_says_so(own_folder: Path) -> None:
    manifest = Manifest(
        run="run",
        backbone="bundled:glyphnet",
        layer="penultimate",
        backbone_digest="0" * 64,
        weights_digest="0" * 64,
        num_features=192,
        classes=ATTRIBUTES,
        task="multi-label",
        head="linear",
        holdout=0.2,
        seed=0,
        local=RunConfig().local,
    )
    with pytest.raises(FedheadError, match="names one class per row"):
        LocalSite("clinic", "digits").check_data(manifest)


def test_backbones_are_ranked_by_log_evidence(attributed: Samples) -> None:
    (ranked,) = rank(["bundled:glyphnet"], multi_label(init="zeros"), attributed, 3)
    assert ranked.h_score is None
    assert ranked.logme > 0
    assert ranked.accuracy is not None
    assert ranked.accuracy > 0.9


@pytest.fixture
def module(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data spec of the user's own function."""
    (own_folder / "attributed_digits.py").write_text(
        "import numpy as np\n"
        "from fedhead.data import load_samples\n"
        "whole = load_samples('digits')\n"
        "class Pairs:\n"
        f"    classes = {ATTRIBUTES}\n"
        f"    def __len__(self): return {ROWS}\n"
        "    def __getitem__(self, row):\n"
        "        digit = whole.labels[row]\n"
        "        has = digit % 2 == 0, digit > 4, digit in (0, 6, 8, 9)\n"
        "        return whole.read(row), [name for name, one in zip(self.classes, has) if one]\n"
    )
    monkeypatch.syspath_prepend(own_folder)
    return "python:attributed_digits:Pairs"


def test_a_real_site_gives_what_a_simulated_one_does(module: str, own_folder: Path) -> None:
    ledger = Ledger(own_folder / "ledger.jsonl")
    site = LocalSite("site-0", module, device="cpu", ledger=ledger)
    config = multi_label(rounds=2)
    simulated = simulate(config, module, [range(ROWS)], out="simulated")
    real = simulate(config, module, [range(ROWS)], apps={"site-0": make_app(lambda context: site)}, out="real")
    assert (folder_of(real) / "model.safetensors").read_bytes() == (
        folder_of(simulated) / "model.safetensors"
    ).read_bytes()
    evaluations = [json.loads((folder_of(result) / "evaluation.json").read_text()) for result in (real, simulated)]
    # Only a real site describes its release steps.
    described = [evaluation["traffic"]["actions"].pop(DESCRIBE) for evaluation in evaluations]
    assert described[0][2] >= described[1][2]
    for evaluation in evaluations:
        del evaluation["traffic"]["sites"]
    assert evaluations[0] == evaluations[1]
    entries = read_ledger(ledger.path)
    resting_on_rows = [entry for entry in entries if entry.rows]
    # A single site is not compared with itself.
    assert {entry.action for entry in resting_on_rows} == {STATISTICS, TRAIN, EVALUATE, CALIBRATE, REPORT, RIVALS}
    assert {entry.action for entry in entries if not entry.rows} == {DESCRIBE, STANDARDISE}
    assert set(resting_on_rows[0].classes) == set(ATTRIBUTES)


def test_the_command_line_runs_and_ranks_multi_label_data(module: str) -> None:
    run = CliRunner().invoke(app, ["simulate", "--data", module, "--multi-label", "--sites", "3", "--rounds", "1"])
    assert run.exit_code == 0, run.stderr
    assert "All labels correct" in run.stdout
    assert "looped" in run.stdout
    refused = CliRunner().invoke(app, ["simulate", "--multi-label"])
    assert refused.exit_code == 2
    assert "names one class per row" in " ".join(refused.stderr.split())
    ranked = CliRunner().invoke(app, ["rank", "bundled:glyphnet", "--data", module, "--multi-label", "--sites", "3"])
    assert ranked.exit_code == 0, ranked.stderr
    assert ranked.stdout.splitlines()[-2].split()[2] == "-"
