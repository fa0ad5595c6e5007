"""Runs without labels: any split finds the same clusters; people name them and get a classifier."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fedhead.cli import app
from fedhead.config import RunConfig
from fedhead.data import load_samples
from fedhead.errors import UserError
from fedhead.heads import unmapped
from fedhead.model import TransferModel
from fedhead.server.runs.clusters import name_clusters, parse_names, read_names
from fedhead.simulations import simulate

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = 240
OFF = {"min_class_count": 0, "min_rows": 0}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three groups of rows of numbers, with the group as the label."""
    generator = np.random.default_rng(0)
    centres = np.array([[5, 0, 0, 1], [0, 5, 1, 0], [0, 1, 5, 5]])
    groups = np.arange(ROWS) % 3
    rows = centres[groups] + generator.normal(size=(ROWS, 4))
    path = tmp_path_factory.mktemp("table") / "rows.csv"
    lines = [
        ",".join([*(f"{value:.6f}" for value in row), "abc"[group]]) for row, group in zip(rows, groups, strict=True)
    ]
    path.write_text("a,b,c,d,label\n" + "\n".join(lines) + "\n")
    return f"csv:{path}"


@pytest.fixture(scope="module")
def finished(table: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("clusters") / "run"
    config = RunConfig(task="clusters", backbone="identity", simulation={"sites": 3, "partition": "iid"})
    simulate(config, data=f"{table}?labels=no", out=out)
    return out


@given(owners=st.lists(st.integers(0, 3), min_size=ROWS, max_size=ROWS))
@settings(
    max_examples=4,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=(Phase.explicit, Phase.generate),
)
def test_any_split_finds_the_same_clusters(
    owners: list[int], table: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    owned = [np.flatnonzero(np.array(owners) == site) for site in range(4)]
    folders = tmp_path_factory.mktemp("splits")
    pooled = simulate(_config(), data=table, sites=[np.arange(ROWS)], out=folders / "one")
    split = simulate(_config(), data=table, sites=[rows for rows in owned if len(rows)], out=folders / "many")
    assert pooled.outcome.clusters["rows"] == split.outcome.clusters["rows"]
    for one, other in zip(pooled.outcome.clusters["likelihoods"], split.outcome.clusters["likelihoods"], strict=True):
        assert one == pytest.approx(other, abs=1e-8)
    torch.testing.assert_close(pooled.outcome.head.weight, split.outcome.head.weight, rtol=1e-5, atol=1e-6)


def _config(**changes: object) -> RunConfig:
    return RunConfig(task="clusters", backbone="identity", simulation=OFF, **changes)  # type: ignore[arg-type]


def test_clusters_are_named_and_classify(finished: Path, table: str, tmp_path: Path) -> None:
    record = json.loads((finished / "evaluation.json").read_text())["clusters"]
    assert sum(record["rows"]) == ROWS
    assert len(record["rows"]) >= 3
    assert record["sites"] == [3] * len(record["rows"])
    model = TransferModel.load(finished)
    assert model.classes == tuple(f"cluster {number}" for number in range(len(record["rows"])))
    samples = load_samples(table)
    predicted = model.predict([samples.read(row) for row in range(ROWS)])
    names = {}
    for number, name in enumerate(model.classes):
        members = [samples.classes[samples.labels[row]] for row in range(ROWS) if predicted[row] == name]
        names[number] = max(set(members), key=members.count)
    solved = name_clusters(finished, tmp_path / "named", names)
    assert sum(solved.rows.values()) == ROWS
    named = TransferModel.load(tmp_path / "named")
    assert named.task.name == "classification"
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path / "named"), "--data", table, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["accuracy"][0] > 0.95


def test_the_site_sees_examples_of_each_cluster(finished: Path, table: str, tmp_path: Path) -> None:
    page = tmp_path / "clusters.html"
    command = ["cluster", "show", str(finished), "--data", f"{table}?labels=no", "--examples", "4"]
    result = CliRunner().invoke(app, [*command, "--html", str(page), "--json"])
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert sum(one["rows"] for one in shown) == ROWS
    assert all(len(one["examples"]) == 4 for one in shown)
    assert page.read_text().count("<figure") == 4 * len(shown)
    assert CliRunner().invoke(app, command).exit_code == 0


def test_names_must_fit(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="have no names"):
        name_clusters(finished, tmp_path / "x", {0: "a"})
    with pytest.raises(UserError, match="There is no cluster 99"):
        name_clusters(finished, tmp_path / "x", {99: "a"}, "b")
    with pytest.raises(UserError, match="two names"):
        name_clusters(finished, tmp_path / "x", {}, "b")
    with pytest.raises(UserError, match="Expected NUMBER=NAME"):
        parse_names(["rose"])
    with pytest.raises(UserError, match="named twice"):
        parse_names(["0=a", "0=b"])
    labels = tmp_path / "labels.csv"
    labels.write_text("cluster,name\n0,a\n1,\n")
    with pytest.raises(UserError, match="line 3"):
        read_names(labels)
    labels.write_text("cluster,name\n0,a\n")
    result = CliRunner().invoke(
        app, ["cluster", "name", str(finished), "--labels", str(labels), "--rest", "b", "--out", str(tmp_path / "two")]
    )
    assert result.exit_code == 0, result.output
    assert TransferModel.load(tmp_path / "two").classes == ("a", "b")


def test_unnamed_clusters_are_not_compared_with_labels(finished: Path, table: str) -> None:
    result = CliRunner().invoke(app, ["evaluate", str(finished), "--data", table])
    assert result.exit_code == 2
    assert "fedhead cluster name" in result.output


def test_no_site_sends_a_small_cluster(table: str, tmp_path: Path) -> None:
    sites = [np.arange(start, start + 24) for start in range(0, ROWS, 24)]
    config = RunConfig(
        task="clusters", backbone="identity", clusters=8, simulation={"min_class_count": 5, "min_rows": 5}
    )
    simulate(config, data=table, sites=sites, out=tmp_path / "run")
    from fedhead.sums.features import FeatureStatistics

    files = list((tmp_path / "run" / "sums").glob("*.train.safetensors"))
    assert len(files) == 10
    for file in files:
        counts = FeatureStatistics.load(file).counts
        assert not ((counts > 0) & (counts < 5)).any()


def test_rows_of_unit_length_and_a_given_number(table: str, tmp_path: Path) -> None:
    result = simulate(_config(basis="unit", clusters=3), data=table, sites=4, out=tmp_path / "run")
    assert len(result.config.classes) == 3
    assert unmapped(result.outcome.head) is not result.outcome.head
    assert not result.outcome.choices


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lift": "landmarks:8"}, "takes no lift"),
        ({"foreign": True}, "takes no foreign"),
        ({"rounds": 3}, "set rounds to 0"),
        ({"clusters": 1}, "2 or more"),
        ({"personal": "closed"}, "Personal heads are for"),
        ({"privacy": {"epsilon": 1.0}}, "needs the task 'classification'"),
        ({"task": "classification", "clusters": 3}, "for task 'clusters'"),
    ],
)
def test_settings_without_a_meaning_are_refused(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        RunConfig(**{"task": "clusters", **changes})  # type: ignore[arg-type]


def test_fewer_clusters_than_asked_for_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "few.csv"
    path.write_text("a,b\n1,1\n1,2\n5,1\n5,2\n9,9\n")
    off = {**OFF, "sites": 1, "partition": "iid"}
    config = RunConfig(task="clusters", clusters=10, holdout=0, backbone="identity", simulation=off)
    result = simulate(config, data=f"csv:{path}?labels=no", out=tmp_path / "run")
    assert f"asked for 10 clusters, but only {len(result.model.classes)} have rows" in caplog.text
