"""Runs that evaluate their head by subgroup, from sums of the sites."""

import csv
import json
import logging
from pathlib import Path

import numpy as np
import pytest

from fedhead.config import RunConfig
from fedhead.data import Samples, load_samples, samples_from_numbers
from fedhead.errors import UserError
from fedhead.server.report.card import CARD
from fedhead.simulations import RunResult, simulate

pytestmark = pytest.mark.usefixtures("one_thread")

OPEN = {"min_class_count": 0, "min_rows": 0}


def patients(rows: int = 600, *, named: bool = True) -> Samples:
    """Rows of two sexes and of none, of which the labels of one are noisy."""
    generator = np.random.default_rng(0)
    features = generator.normal(size=(rows, 3))
    sexes = generator.choice(["f", "m", ""], rows, p=[0.5, 0.4, 0.1])
    ill = (features[:, 0] > 0) ^ (generator.random(rows) < np.where(sexes == "m", 0.4, 0.05))
    return samples_from_numbers(
        features,
        labels=np.where(ill, "ill", "well").tolist(),
        columns=["a", "b", "c"],
        subgroups=[sex or None for sex in sexes] if named else None,
        spec="patients",
    )


def run(out: Path, *, sites: int = 3, simulation: dict[str, object] = OPEN, **settings: object) -> RunResult:
    settings = {"rounds": 0, "diagnose": False, **settings}
    table = {"sites": sites, "partition": "iid", **simulation}
    return simulate(RunConfig(backbone="identity", simulation=table, **settings), data=patients(), out=out)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return run(tmp_path_factory.mktemp("plain") / "run", sensitivity=0.9)


def test_the_noisy_subgroup_is_named_in_result_report_and_card(plain: RunResult) -> None:
    assert plain.config.subgroups == ("f", "m")
    assert plain.run_dir is not None
    result = json.loads((plain.run_dir / "result.json").read_text())
    worst, other = result["subgroups"]
    assert (worst["name"], other["name"]) == ("m", "f")
    assert worst["difference"][2] < 0
    assert result["worst_subgroup"].startswith("The worst group is 'm'")
    for one in (worst, other):
        assert one["sensitivity"] >= 0.9
        assert one["calibration_error"] is not None
    assert result["worst_subgroup"].partition(":")[0] in (plain.run_dir / CARD).read_text()
    assert "Is the model as good in each subgroup?" in (plain.run_dir / "report.html").read_text()


@pytest.mark.parametrize(
    ("sites", "settings"),
    [(1, {}), (7, {}), (3, {"privacy": {"secure_sum": True}}), (3, {"rounds": 1})],
    ids=["one site", "seven sites", "secure sum", "one round"],
)
def test_counts_are_those_of_all_rows_however_they_are_divided(
    sites: int, settings: dict[str, object], plain: RunResult, tmp_path: Path
) -> None:
    made = run(tmp_path / "run", sites=sites, **settings)
    rows = {one["name"]: one["rows"] for one in plain.outcome.subgroups["groups"]}
    assert {one["name"]: one["rows"] for one in made.outcome.subgroups["groups"]} == rows
    if not settings.get("rounds"):
        for one, two in zip(plain.outcome.subgroups["groups"], made.outcome.subgroups["groups"], strict=True):
            assert one["accuracy"] == pytest.approx(two["accuracy"], abs=0.03)
    assert "threshold" not in made.outcome.subgroups["groups"][0]
    assert "evaluate.subgroups" in made.outcome.traffic.to_dict()["actions"]


def test_small_subgroups_of_a_site_do_not_leave_it(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    everyone = run(tmp_path / "few", sites=1, simulation={"min_class_count": 5})
    rows = {one["name"]: one["rows"] for one in everyone.outcome.subgroups["groups"]}
    assert set(rows) == {"f", "m"}
    with caplog.at_level(logging.WARNING):
        none = run(tmp_path / "none", sites=30, simulation={"min_class_count": 5, "min_rows": 0})
    assert none.outcome.subgroups == {}
    assert "No subgroup was evaluated: at every site, each of 2 subgroups (f, m) has too few held-out" in caplog.text


def test_settings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="differential privacy"):
        RunConfig(subgroups=("f", "m"), privacy={"epsilon": 1.0})
    with pytest.raises(UserError, match="not 'regression'"):
        RunConfig(subgroups=("f", "m"), task="regression")
    with pytest.raises(UserError, match="named twice"):
        RunConfig(subgroups=("f", "f"))
    with pytest.raises(UserError, match="one line"):
        RunConfig(subgroups=("f\nm",))
    with pytest.raises(UserError, match="100 subgroups or fewer"):
        RunConfig(subgroups=tuple(map(str, range(101))))
    with pytest.raises(UserError, match="two classes"):
        RunConfig(sensitivity=0.9, classes=("a", "b", "c"))


def test_a_column_of_a_table_names_subgroups_and_stays_a_feature(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["age", "scanner", "ill"])
        writer.writerows([[row, row % 3 or "", "yes" if row % 2 else "no"] for row in range(30)])
    plain = load_samples(f"csv:{path}?label=ill")
    divided = load_samples(f"csv:{path}?label=ill&group_by=scanner")
    assert divided.subgroups is not None
    assert divided.subgroups[:4] == [None, "1", "2", None]
    assert plain.subgroups is None
    assert divided.columns == plain.columns
    # Features are extracted once, with and without subgroups.
    assert divided.fingerprint == plain.fingerprint
    with pytest.raises(UserError, match="no column 'sex'"):
        load_samples(f"csv:{path}?label=ill&group_by=sex")
    with pytest.raises(UserError, match="'ill' is to be predicted, so it cannot name subgroups"):
        load_samples(f"csv:{path}?label=ill&group_by=ill")


def test_a_column_of_subgroups_in_words_is_not_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("age,sex,ill\n" + "".join(f"{age},{'fm'[age % 2]},{'yn'[age % 3 % 2]}\n" for age in range(30)))
    assert [str(one) for one in load_samples(f"csv:{path}?label=ill&group_by=sex").left_out] == []
    assert "'sex'" in str(load_samples(f"csv:{path}?label=ill").left_out[0])


def test_files_of_features_name_subgroups(tmp_path: Path) -> None:
    path = tmp_path / "rows.npz"
    np.savez(path, features=np.eye(4), labels=["a", "b", "a", "b"], sex=["f", "m", "", "f"])
    samples = load_samples(f"features:{path}?group_by=sex")
    assert samples.subgroups == ["f", "m", None, "f"]
    assert samples.fingerprint == load_samples(f"features:{path}").fingerprint
    with pytest.raises(UserError, match=r"'labels' of .* is to be predicted"):
        load_samples(f"features:{path}?group_by=labels")
