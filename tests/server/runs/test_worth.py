import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedhead.cli import app
from fedhead.cli.extras import extras
from fedhead.config import RunConfig
from fedhead.errors import FedheadError, UserError
from fedhead.membership import leave
from fedhead.server.report import write_report
from fedhead.simulations import simulate

pytestmark = pytest.mark.usefixtures("one_thread")

OFF = {"min_class_count": 0, "min_rows": 0}
CONFIG = RunConfig(init="nearest-mean", rounds=1, worth=True, simulation={**OFF, "sites": 3})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    result = simulate(CONFIG, out=folder)
    # A trained head is delivered, so held-out rows are summed for their value alone.
    assert result.outcome.kept_round == 1
    return folder


def test_a_run_computes_what_its_sites_brought_and_reports_it(finished: Path) -> None:
    found = json.loads((finished / "worth.json").read_text())
    assert [one["site"] for one in found["sites"]] == ["site-0", "site-1", "site-2"]
    assert sum(one["shapley"] for one in found["sites"]) == pytest.approx(found["value"])
    assert found["value"] > 0.7
    assert found["permutations"] == 0
    page = (write_report(finished)).read_text()
    assert "What did each site bring?" in page
    assert "exact, over all 8 coalitions" in page


def test_the_command_computes_the_same_again(finished: Path) -> None:
    before = json.loads((finished / "worth.json").read_text())
    result = CliRunner().invoke(app, ["worth", str(finished), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == before
    sampled = CliRunner().invoke(app, ["worth", str(finished), "--permutations", "40"])
    assert sampled.exit_code == 0, sampled.output
    assert "40 sampled orders" in " ".join(sampled.output.split())
    assert "40 random orders" in (finished / "report.html").read_text()


def test_a_site_that_leaves_makes_the_values_outdated(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    leave(run, "site-2")
    assert not (run / "worth.json").exists()
    assert "They were not computed" in write_report(run).read_text()


def test_a_damaged_file_of_values_can_be_made_again(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "worth.json").write_text("{")
    with pytest.raises(FedheadError, match=f"Delete it, and make it again: fedhead worth {folder}"):
        write_report(folder)
    (folder / "worth.json").unlink()
    assert CliRunner().invoke(app, ["worth", str(folder)]).exit_code == 0
    assert (folder / "worth.json").is_file()


def test_the_terminal_says_where_values_are(tmp_path: Path) -> None:
    result = simulate(CONFIG.changed({"rounds": 0}), out=tmp_path / "run")
    assert extras(result) == [("Value of sites", f"in the report; to print it: fedhead worth {tmp_path / 'run'}")]
    (tmp_path / "run" / "worth.json").unlink()
    assert extras(result) == [("Value of sites", "not computed; see the log")]


def test_totals_do_not_show_what_one_site_brought(tmp_path: Path) -> None:
    simulate(RunConfig(rounds=0, keep_sums="none", simulation={**OFF, "sites": 3}), out=tmp_path / "run")
    result = CliRunner().invoke(app, ["worth", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert "keeps only the total" in " ".join(result.output.split())


def test_a_trained_head_without_held_out_sums_says_what_to_do(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    lines = (run / "sums" / "sites.jsonl").read_text().splitlines()
    kept = [line for line in lines if '"part":"held_out"' not in line]
    (run / "sums" / "sites.jsonl").write_text("".join(f"{line}\n" for line in kept))
    result = CliRunner().invoke(app, ["worth", str(run)])
    assert result.exit_code == 2
    assert "delivers the head of round 1" in " ".join(result.output.split())


def test_worth_needs_the_sums_of_each_site() -> None:
    with pytest.raises(UserError, match="needs keep_sums = 'folder'"):
        RunConfig(worth=True, keep_sums="total")
