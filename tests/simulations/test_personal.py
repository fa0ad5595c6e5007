"""Personal heads in runs: no site is worse off, in simulation and at real sites, which keep the head."""

import csv
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fedhead.cli.application import app
from fedhead.client.app import make_app
from fedhead.client.local_site import LocalSite
from fedhead.config import RunConfig
from fedhead.errors import UserError
from fedhead.flower import in_process_identity
from fedhead.model import TransferModel, site_model_path
from fedhead.protocol.actions import PERSONALISE
from fedhead.protocol.messages import Payload
from fedhead.server.app import coordinate
from fedhead.server.report.page import render
from fedhead.server.runs.record import RunRecord
from fedhead.simulations import simulate
from fedhead.simulations.grid import InProcessGrid

DIGITS = RunConfig.from_values({"rounds": 0, "personal": "closed", "simulation": {"partition": "dirichlet:0.05"}})


def made(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "evaluation.json").read_text())["personal"]
    return found


def nobody_is_worse(found: dict[str, Any]) -> None:
    assert len(found["sites"]) >= 3
    for one in found["sites"].values():
        assert one["gain"][1] >= 0
        assert one["gain_over_own"][1] >= 0
    right = found["pooled"]["right"]
    assert right["personal"] == sum(one["right"]["personal"] for one in found["sites"].values())


def test_no_site_of_skewed_digits_is_worse_than_joined_or_alone(tmp_path: Path) -> None:
    result = simulate(DIGITS, out=tmp_path / "run")
    nobody_is_worse(made(tmp_path / "run"))
    page = render(RunRecord.read(tmp_path / "run"))
    assert "Does a head of its own help a site?" in page
    assert "gain over shared" in page
    assert all("Its personal head, which it keeps" in one.reason for one in result.outcome.diagnoses)


@pytest.mark.parametrize("mode", ["head", "ditto"])
def test_trained_personal_heads_are_compared_too(tmp_path: Path, mode: str) -> None:
    changes = {"personal": mode, "rounds": 1, "diagnose": False, "simulation": {"sites": 4}}
    simulate(DIGITS.changed(changes), out=tmp_path / "run")
    nobody_is_worse(made(tmp_path / "run"))


def test_personal_heads_follow_a_lift_and_rounds_of_full_gradients(tmp_path: Path) -> None:
    changes = {"lift": "relu:96", "rounds": 2, "strategy": {"name": "pooled-lbfgs"}, "diagnose": False}
    result = simulate(DIGITS.changed({**changes, "simulation": {"sites": 4}}), out=tmp_path / "run")
    nobody_is_worse(made(tmp_path / "run"))
    assert result.history[-1].loss is not None


def test_secure_summation_shows_only_the_total(tmp_path: Path) -> None:
    changes = {"privacy": {"secure_sum": True}, "simulation": {"sites": 4, "partition": "iid"}}
    simulate(DIGITS.changed(changes), out=tmp_path / "run")
    found = made(tmp_path / "run")
    assert found["sites"] == {}
    assert found["pooled"]["rows"] > 300


def test_two_sites_get_no_pooled_sums(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = simulate(DIGITS.changed({"simulation": {"sites": 2, "partition": "iid"}}), out=tmp_path / "run")
    assert result.outcome.personal is None
    assert PERSONALISE not in json.loads((tmp_path / "run" / "evaluation.json").read_text())["traffic"]["actions"]
    assert "could subtract its own" in caplog.text


@pytest.mark.parametrize("changes", [{"task": "regression"}, {"init": "zeros"}])
def test_what_has_no_personal_heads_is_refused(changes: dict[str, str]) -> None:
    with pytest.raises(UserError, match="ersonal"):
        RunConfig.from_values({"personal": "closed", **changes})


@pytest.fixture
def heart(assets: Path, tmp_path: Path) -> Path:
    """Four hospitals' patients, with missing numbers filled in by medians and marked."""
    with (assets / "heart" / "heart_disease_uci.csv").open() as file:
        rows = list(csv.DictReader(file))
    numbers = ["Age", "trestbps", "chol", "thalch", "oldpeak", "ca"]
    kinds = ["sex", "cp", "fbs", "restecg", "exang", "slope", "thal"]
    medians = {name: statistics.median(float(row[name]) for row in rows if row[name]) for name in numbers}
    values = {name: sorted({row[name] for row in rows if row[name]}) for name in kinds}
    lines = [
        {
            **{name: row[name] or medians[name] for name in numbers},
            **{f"{name}_missing": int(not row[name]) for name in numbers},
            **{f"{name}_{n}": int(row[name] == value) for name in kinds for n, value in enumerate(values[name])},
            "label": row["HeartDisease"],
            "site": row["dataset"],
        }
        for row in rows
    ]
    path = tmp_path / "heart.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    return path


def test_no_hospital_is_worse_than_joined_or_alone(heart: Path, tmp_path: Path) -> None:
    table = {"data": f"csv:{heart}?label=label&site=site", "partition": "folder"}
    values = {"backbone": "identity", "rounds": 0, "personal": "closed", "simulation": table}
    simulate(RunConfig.from_values(values), out=tmp_path / "run")
    nobody_is_worse(made(tmp_path / "run"))


def write_site(path: Path, number: int) -> None:
    generator = np.random.default_rng(number)
    rows = [(generator.normal(size=2) + np.array([3.0 * (k % 2), number]), "ab"[k % 2]) for k in range(80)]
    path.write_text("x,y,label\n" + "".join(f"{one[0]},{one[1]},{label}\n" for one, label in rows))


def test_real_sites_keep_their_heads_and_predict_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "home"))
    sites = {}
    for number, name in enumerate(("a", "b", "c")):
        write_site(tmp_path / f"{name}.csv", number)
        sites[name] = LocalSite(name, f"csv:{tmp_path / name}.csv?label=label", "cpu")
    config = RunConfig(backbone="identity:x,y", classes=("a", "b"), rounds=0, personal="closed")
    with in_process_identity(run_id=1):
        apps = {name: make_app(lambda context, site=site: site) for name, site in sites.items()}
        grid = InProcessGrid(list(sites.values()), apps)
        outcome = coordinate(config, grid, tmp_path / "run").outcome
    assert outcome.personal is not None
    assert sorted(outcome.personal.sites) == ["a", "b", "c"]
    assert outcome.personal.pooled is not None
    assert outcome.personal.pooled.right["personal"] / outcome.personal.pooled.rows > 0.8
    for name in sites:
        assert TransferModel.load(site_model_path(name)).classes == ("a", "b")
    asked = ["predict", "--site-model", "b", str(tmp_path / "b.csv")]
    answered = CliRunner().invoke(app, asked)
    assert answered.exit_code == 0, answered.output
    assert len(answered.output.strip().splitlines()) == 81
    refused = CliRunner().invoke(app, ["predict", "--site-model", "nobody", str(tmp_path / "b.csv")])
    assert refused.exit_code == 2
    assert "No personal head of 'nobody'" in refused.output


@pytest.mark.parametrize("wrong", ["mode", "sums", "few", "nan", "missing"])
def test_wrong_requests_are_refused_in_words(tmp_path: Path, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Sites of these names have ledgers of other tests in the shared home.
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "home"))
    seen: dict[str, Payload] = {}
    write_site(tmp_path / "a.csv", 0)
    site = LocalSite("a", f"csv:{tmp_path / 'a.csv'}?label=label", "cpu")
    site.keeps_heads = False
    real = make_app(lambda context: site)

    def recording(message: Any, context: Any) -> Any:
        payload = Payload.from_content(message.content)
        if message.metadata.message_type == PERSONALISE:
            message.content = changed(payload, wrong).to_content()
        seen[message.metadata.message_type] = payload
        return real(message, context)

    config = RunConfig(backbone="identity:x,y", classes=("a", "b"), rounds=0, personal="closed", diagnose=False)
    others = {}
    for number, name in enumerate(("b", "c"), start=1):
        write_site(tmp_path / f"{name}.csv", number)
        others[name] = LocalSite(name, f"csv:{tmp_path / name}.csv?label=label", "cpu")
        others[name].keeps_heads = False
    with in_process_identity(run_id=1):
        apps: dict[str, Any] = {name: make_app(lambda context, own=own: own) for name, own in others.items()}
        grid = InProcessGrid([site, *others.values()], {"a": recording, **apps})
        outcome = coordinate(config, grid, tmp_path / "run").outcome
    assert PERSONALISE in seen
    assert outcome.personal is not None
    assert sorted(outcome.personal.sites) == ["b", "c"]


def changed(payload: Payload, wrong: str) -> Payload:
    values, arrays = dict(payload.values), dict(payload.arrays)
    if wrong == "mode":
        values["mode"] = "whatever"
    elif wrong == "sums":
        arrays["pool.sums"] = arrays["pool.sums"][:1]
    elif wrong == "few":
        arrays = {name: value * 0 if name.startswith("pool.") else value for name, value in arrays.items()}
    elif wrong == "nan":
        arrays["pool.sums"] = arrays["pool.sums"] * np.nan
    else:
        arrays = {name: value for name, value in arrays.items() if not name.startswith("pool.")}
    return Payload(values, arrays)
