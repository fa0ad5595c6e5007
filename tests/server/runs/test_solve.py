import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fedhead.cli import app
from fedhead.config import RunConfig
from fedhead.errors import UserError
from fedhead.model import TransferModel
from fedhead.server.runs.solve import SubProblem, merged_names, priors_of, solve, split_names
from fedhead.server.site_sums import SiteSums
from fedhead.simulations import simulate
from fedhead.solvers import solve_head

pytestmark = pytest.mark.usefixtures("one_thread")

OFF = {"min_class_count": 0, "min_rows": 0}
CONFIG = RunConfig(rounds=0, simulation={**OFF, "sites": 4})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that does not change: questions only read it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    simulate(CONFIG, out=folder)
    return folder


@pytest.fixture(scope="module")
def pooled_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pooled") / "run"
    simulate(CONFIG.changed({"keep_sums": "none"}), out=folder)
    return folder


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["solve", *map(str, arguments)])
    return result.exit_code, result.output


def test_without_a_site_the_head_is_that_of_a_run_without_it(finished: Path, tmp_path: Path) -> None:
    code, printed = run(finished, "--without", "site-3", "--out", tmp_path / "without", "--json")
    assert code == 0, printed
    solved = json.loads(printed)
    assert solved["sites"] == 3
    model = TransferModel.load(tmp_path / "without")
    sums = SiteSums(finished / "sums")
    parts = [sums.load(site, part) for site in sums.sites() if site != "site-3" for part in ("train", "held_out")]
    first, *others = [one for one in parts if one is not None]
    expected = solve_head(sum(others, start=first.copy()), "lda")
    assert torch.allclose(model.head.weight, expected.weight.float(), rtol=1e-5, atol=1e-7)  # type: ignore[union-attr]
    assert solved["temperature"] == TransferModel.load(finished).calibration.temperature
    assert model.calibration.temperature == solved["temperature"]
    with pytest.raises(UserError, match="held-out rows"):
        model.sets(torch.full((1, 10), 0.1), 0.9)


def test_merged_classes_and_other_priors(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    merges = ("0+2+4+6+8=even", "1+3+5+7+9=odd")
    solved = solve(finished, out, SubProblem(merge=merges, priors="odd=0.9,even=0.1"))
    assert solved.classes == ("even", "odd")
    assert sum(solved.rows.values()) == 1797
    assert solved.priors == pytest.approx({"even": 0.1, "odd": 0.9})
    same = solve(finished, tmp_path / "same", SubProblem(merge=merges))
    heads = [TransferModel.load(one.out).head for one in (solved, same)]
    difference = heads[0].bias - heads[1].bias  # type: ignore[operator]
    own = np.log([same.rows["even"], same.rows["odd"]]) - np.log(1797)
    assert difference.tolist() == pytest.approx((np.log([0.1, 0.9]) - own).tolist(), abs=1e-5)
    assert torch.equal(heads[0].weight, heads[1].weight)  # type: ignore[arg-type]


def test_some_classes_predict_only_those(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "some"
    solve(finished, out, SubProblem(classes="7,1", init="ridge"))
    model = TransferModel.load(out)
    assert model.classes == ("7", "1")
    assert model.calibration.temperature == 1
    exported = CliRunner().invoke(app, ["export", str(out), "--format", "state-dict", "--out", str(tmp_path / "m.st")])
    assert exported.exit_code == 0, exported.output
    evaluated = CliRunner().invoke(app, ["evaluate", str(finished), "--data", "digits", "--json"])
    assert evaluated.exit_code == 0


def test_the_total_answers_all_questions_but_those_about_sites(pooled_only: Path, tmp_path: Path) -> None:
    solve(pooled_only, tmp_path / "merged", SubProblem(merge=("1+7=tall",)))
    assert TransferModel.load(tmp_path / "merged").classes == ("0", "tall", "2", "3", "4", "5", "6", "8", "9")
    code, printed = run(pooled_only, "--without", "site-3", "--out", tmp_path / "without")
    assert code == 2
    assert "keeps only the total" in " ".join(printed.split())
    assert not (tmp_path / "without").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--without", "site-9"], "There is no site 'site-9'"),
        ([word for number in range(4) for word in ("--without", f"site-{number}")], "no site of"),
        (["--classes", "1"], "two classes or more"),
        (["--classes", "1,1"], "names a class twice"),
        (["--classes", "1,eleven"], "There is no class 'eleven'"),
        (["--merge", "1+2"], "Expected CLASS+CLASS=NAME"),
        (["--merge", "1+2=3"], "'3' is a class of the run already"),
        (["--merge", "1+2=a", "--merge", "2+3=b"], "names '2' twice"),
        (["--merge", "0+1+2+3+4+5+6+7+8+9=digit"], "two classes or more"),
        (["--init", "zeros"], "not solved from sums"),
        (["--init", "ldaa"], "cannot start from 'ldaa'"),
        (["--init", "ridge", "--priors", "uniform"], "Priors belong to"),
        (["--priors", "0=1"], "gives no number for"),
        (["--priors", "flat"], "--priors takes"),
        (["--priors", "0=nan"], "must be a positive number"),
    ],
)
def test_questions_that_cannot_be_answered(finished: Path, tmp_path: Path, arguments: list[str], sentence: str) -> None:
    code, printed = run(finished, *arguments, "--out", tmp_path / "out")
    assert code == 2, printed
    assert sentence in " ".join(printed.split())
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_not_written_over(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("of the user")
    code, printed = run(finished, "--out", tmp_path)
    assert code == 2
    assert "not an empty folder" in " ".join(printed.split())
    assert (tmp_path / "mine").read_text() == "of the user"


def test_names_may_hold_the_separators() -> None:
    assert split_names("A+,B-,A+,B", ",", ["A+", "B-", "A+,B"]) == ["A+", "B-", "A+,B"]
    assert split_names("A++B", "+", ["A+", "B"]) == ["A+", "B"]
    names, groups = merged_names(["a", "b", "c"], ["a+c=b", "b=d"])
    assert (names, groups) == (["b", "d"], [[0, 2], [1]])
    counts = torch.tensor([1, 1])
    assert priors_of("a,b=0.5,c=1", ["a,b", "c"], counts).tolist() == [0.5, 1]
