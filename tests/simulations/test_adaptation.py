"""Adaptation to rows without labels: proven in a run on the sites' labelled rows, used at a site by a command."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fedhead.cli.application import app
from fedhead.client.app import make_app
from fedhead.client.local_site import LocalSite
from fedhead.config import RunConfig
from fedhead.data import load_samples
from fedhead.errors import UserError
from fedhead.flower import in_process_identity
from fedhead.model import TransferModel
from fedhead.protocol.actions import ADAPT
from fedhead.protocol.messages import Payload
from fedhead.server.adaptation import choose_adaptation
from fedhead.server.app import coordinate
from fedhead.simulations import simulate
from fedhead.simulations.grid import InProcessGrid
from fedhead.solvers.adaptation import METHODS
from fedhead.sums.rivals import RivalSums

ADAPTED: dict[str, Any] = {"backbone": "identity", "rounds": 0, "adapt": True, "diagnose": False}


def write_rows(path: Path, offsets: dict[str, float], rows: int = 150, *, labelled: bool = True) -> Path:
    """Write rows of sites, whose numbers are moved by an offset each."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["x", "y", "z", "site", *(["label"] if labelled else []), "truth"])
        for site, offset in offsets.items():
            generator = np.random.default_rng([*site.encode()])
            for number in range(rows):
                label = number % 3
                values = generator.normal(size=3) + offset * np.array([1, -1, 0.5]) + 3 * np.eye(3)[label]
                named = [f"c{label}"] if labelled else []
                writer.writerow([*values.round(4), site, *named, f"c{label}"])
    return path


@pytest.fixture
def moved(tmp_path: Path) -> Path:
    """A finished run over sites with offsets."""
    path = write_rows(tmp_path / "sites.csv", {"a": 0.0, "b": 2.5, "c": -2.0, "d": 1.0})
    spec = f"csv:{path}?label=label&features=x,y,z"
    simulate(
        RunConfig.from_values({**ADAPTED, "simulation": {"data": spec, "partition": "folder"}}), out=tmp_path / "run"
    )
    return tmp_path / "run"


def the_choice(run: Path) -> dict[str, Any]:
    choices = json.loads((run / "evaluation.json").read_text())["choices"]
    (found,) = [one for one in choices if one["question"] == "Rows without labels"]
    return dict(found)


def test_a_new_site_without_labels_gets_a_better_model(moved: Path, tmp_path: Path) -> None:
    assert the_choice(moved)["taken"] in ("mean", "moments", "mean+soft labels")
    new = write_rows(tmp_path / "new.csv", {"e": 4.0}, labelled=False)
    out = tmp_path / "adapted"
    spec = f"csv:{new}?labels=no&features=x,y,z"
    done = CliRunner().invoke(app, ["adapt", str(moved), "--data", spec, "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["rows"] == 150
    assert max(told["after"].values()) < 0.5 < max(told["before"].values())
    with new.open() as file:
        truth = [row["truth"] for row in csv.DictReader(file)]
    samples = load_samples(spec)
    items = [samples.read(row) for row in range(len(samples))]
    right = {
        name: np.mean([one == other for one, other in zip(model.predict(items), truth, strict=True)])
        for name, model in (("before", TransferModel.load(moved)), ("after", TransferModel.load(out)))
    }
    assert right["after"] > max(0.85, right["before"] + 0.1)


def test_without_proof_the_model_is_left_as_it_is(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "sites.csv", {"a": 0.0, "b": 0.0, "c": 0.0}, 900)
    spec = f"csv:{path}?label=label&features=x,y,z"
    simulate(
        RunConfig.from_values({**ADAPTED, "simulation": {"data": spec, "partition": "folder"}}), out=tmp_path / "run"
    )
    assert the_choice(tmp_path / "run")["taken"] == "plain"
    asked = ["adapt", str(tmp_path / "run"), "--data", f"{spec}", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0
    assert "no adaptation was proven better" in " ".join(done.output.split())
    assert not (tmp_path / "out").exists()
    assert CliRunner().invoke(app, [*asked, "--method", "moments"]).exit_code == 0
    assert TransferModel.load(tmp_path / "out").classes == ("c0", "c1", "c2")


def test_mistakes_are_sentences(moved: Path, tmp_path: Path) -> None:
    spec = f"csv:{tmp_path / 'sites.csv'}?labels=no&features=x,y,z"
    for more, said in (
        (["--data", spec, "--out", str(moved)], "exists already"),
        (["--data", spec, "--out", str(tmp_path / "o"), "--method", "magic"], "no method 'magic'"),
        (["--data", "digits", "--out", str(tmp_path / "o")], "takes rows of numbers"),
    ):
        done = CliRunner().invoke(app, ["adapt", str(moved), *more])
        assert done.exit_code == 2, done.output
        assert said in " ".join(done.output.split())
    beside = moved / "model.adaptation.safetensors"
    beside.write_bytes(beside.read_bytes()[:-9])
    done = CliRunner().invoke(app, ["adapt", str(moved), "--data", spec, "--out", str(tmp_path / "o")])
    assert done.exit_code == 2
    assert "is damaged" in " ".join(done.output.split())
    beside.unlink()
    done = CliRunner().invoke(app, ["adapt", str(moved), "--data", spec, "--out", str(tmp_path / "o")])
    assert done.exit_code == 2
    assert "cannot be adapted" in " ".join(done.output.split())


def test_two_sites_are_not_asked(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "sites.csv", {"a": 0.0, "b": 1.0})
    values = {**ADAPTED, "simulation": {"data": f"csv:{path}?label=label&features=x,y,z", "partition": "folder"}}
    result = simulate(RunConfig.from_values(values), out=tmp_path / "run")
    assert result.outcome.adaptation is None
    assert not (tmp_path / "run" / "model.adaptation.safetensors").exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rounds": 3}, "set rounds to 0"),
        ({"task": "multi-label"}, "task 'classification'"),
        ({"init": "zeros"}, "solved 'linear' head"),
        ({"privacy": {"epsilon": 1.0}}, "needs exact sums"),
    ],
)
def test_settings_that_do_not_fit_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        RunConfig.from_values({"adapt": True, "rounds": 0, **wrong})


@pytest.mark.parametrize("wrong", ["solver", "temperatures", "few", "nan", "missing"])
def test_wrong_requests_are_refused_at_real_sites(tmp_path: Path, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "home"))
    sites = {}
    for number, name in enumerate("abcd"):
        path = write_rows(tmp_path / f"{name}.csv", {name: float(number)})
        sites[name] = LocalSite(name, f"csv:{path}?label=label&features=x,y,z", "cpu")
    real = make_app(lambda context: sites["a"])

    def recording(message: Any, context: Any) -> Any:
        if message.metadata.message_type == ADAPT:
            message.content = changed(Payload.from_content(message.content), wrong).to_content()
        return real(message, context)

    rest = {name: make_app(lambda context, own=own: own) for name, own in sites.items() if name != "a"}
    values = {**ADAPTED, "backbone": "identity:x,y,z", "classes": ["c0", "c1", "c2"]}
    with in_process_identity(run_id=1):
        grid = InProcessGrid(list(sites.values()), {"a": recording, **rest})
        outcome = coordinate(RunConfig.from_values(values), grid, tmp_path / "run").outcome
    assert outcome.adaptation is not None
    (compared,) = [one for one in outcome.choices if one["question"] == "Rows without labels"]
    assert 0 < compared["rows"] <= 3 * 150 * 0.35


def changed(payload: Payload, wrong: str) -> Payload:
    values, arrays = dict(payload.values), dict(payload.arrays)
    if wrong == "solver":
        values["solver"] = "whatever"
    elif wrong == "temperatures":
        values["temperatures"] = [1.0, -1.0]
    elif wrong == "few":
        arrays = {name: array if name == "origin" else array * 0 for name, array in arrays.items()}
    elif wrong == "nan":
        arrays["total"] = arrays["total"] * np.nan
    else:
        del arrays["total"]
    return Payload(values, arrays)


def test_an_adaptation_is_taken_only_beyond_two_standard_errors() -> None:
    generator = np.random.default_rng(0)
    plain = torch.tensor(generator.normal(size=(400, 2)))
    targets = torch.tensor(generator.integers(0, 2, 400))
    better = plain + 0.3 * torch.eye(2)[targets]
    worse = plain - 0.3 * torch.eye(2)[targets]
    for changed_one, taken in ((better, "mean"), (worse, "plain")):
        logits = [changed_one if name == "mean" else plain for name in METHODS]
        sums = RivalSums.from_logits(logits, targets, np.zeros((len(METHODS), 400), np.bool_), np.ones(len(METHODS)))
        assert choose_adaptation(sums).taken == taken
    assert choose_adaptation(RivalSums.zeros(len(METHODS))).taken == "plain"
