import fcntl
import json
import os
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import Result
from torch import nn
from typer.testing import CliRunner

import fedhead.client.sum_handlers
import fedhead.server.runs.delivered
import fedhead.server.runs.finished
import fedhead.server.runs.folder
import fedhead.server.runs.summary
import fedhead.server.site_sums
import fedhead.server.starting_head
import fedhead.sums.packing
import fedhead.sums.projection
from fedhead.backbones import Backbone, ImagePreprocessing, backbone_sources
from fedhead.cli import app
from fedhead.client.release.guard import MIN_CLASS_COUNT, MIN_ROWS
from fedhead.client.release.ledger import ledger_path, read_ledger
from fedhead.client.settings import SiteSettings
from fedhead.client.site_opening import site_of
from fedhead.config import RunConfig
from fedhead.data import Samples, load_samples, samples_from_arrays
from fedhead.errors import FedheadError, UserError
from fedhead.heads import Head
from fedhead.membership import add_class, join, leave
from fedhead.model import TransferModel
from fedhead.server.exact_sum import ExactSum
from fedhead.server.runs.checkpoint import Checkpoint
from fedhead.server.runs.execute import RunParts
from fedhead.server.runs.folder import RunFolder
from fedhead.server.runs.membership import MembershipChange
from fedhead.server.site_sums import SiteSums
from fedhead.server.starting_head import HeadForm
from fedhead.simulations import RunResult, simulate
from fedhead.simulations.plan import Inputs, make_plan
from fedhead.simulations.simulate import run_plan
from fedhead.solvers import solve_head
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.projection import RandomProjection
from fedhead.tasks import make_task

ROWS = 400
FEATURES = 64
OFF = {"min_class_count": 0, "min_rows": 0}
CONFIG = RunConfig(backbone="tiny:grey", rounds=0, simulation=OFF)
SITES = [np.arange(start, ROWS, 4) for start in range(4)]
KEEPS = ["folder", "none"]


@backbone_sources.register("tiny")
def load_tiny(name: str, weights: str, layer: str, seed: int) -> Backbone:
    """The pixels of 8 x 8 grey levels: the same to the last bit however rows are batched."""
    return Backbone("tiny:grey", nn.Flatten(), ImagePreprocessing(1, (8, 8), None, (0.5,), (0.5,)), layer=layer)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TERMINAL_WIDTH", "140")
    return tmp_path


@cache
def all_digits() -> Samples:
    return load_samples("digits")


def some_digits(rows: Any, classes: Sequence[int] = range(10), spec: str = "some digits") -> Samples:
    """Return rows of the digits, those of `classes` only."""
    whole = all_digits()
    chosen = [int(row) for row in rows if whole.labels[row] in classes]
    names = [str(whole.labels[row]) for row in chosen]
    return samples_from_arrays([whole.read(row) for row in chosen], names, spec=spec)


def save_digits(root: Path, rows: Any, classes: Sequence[int] = range(10)) -> None:
    whole = all_digits()
    for row in rows:
        if whole.labels[row] in classes:
            folder = root / str(whole.labels[row])
            folder.mkdir(parents=True, exist_ok=True)
            whole.read(int(row)).save(folder / f"{row}.png")


@pytest.fixture(scope="module")
def digits() -> Samples:
    return some_digits(np.arange(ROWS))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, digits: Samples) -> Path:
    """A run of four sites, not to be changed."""
    return folder_of(simulate(CONFIG, digits, list(SITES), out=tmp_path_factory.mktemp("finished") / "run"))


@pytest.fixture(params=KEEPS)
def run(request: pytest.FixtureRequest, finished: Path) -> Path:
    """A copy of it that may be changed, with each site's sums or only the pool's."""
    return copy_of(finished, request.param)


def copy_of(finished: Path, keep: str = "folder", name: str = "run") -> Path:
    copy = Path(shutil.copytree(finished, name))
    if keep == "none":
        pool_only(copy)
    return copy


def pool_only(run_dir: Path) -> None:
    """Make a run folder what `keep_sums = "none"` would have made it."""
    kept, pooled = SiteSums(run_dir / "sums"), SiteSums(run_dir / "pooled", "none")
    for site, parts in kept.records().items():
        for part in parts:
            stats = kept.load(site, part)
            assert stats is not None
            pooled.save(site, part, stats)
    pooled.finish()
    shutil.rmtree(run_dir / "sums")
    (run_dir / "pooled").rename(run_dir / "sums")
    config = RunConfig.from_toml(run_dir / "run.toml").changed({"keep_sums": "none"})
    (run_dir / "run.toml").write_text(config.to_toml())


def folder_of(result: RunResult) -> Path:
    assert result.run_dir is not None
    return result.run_dir


def sums_of(run_dir: Path) -> FeatureStatistics:
    model = TransferModel.load(run_dir)
    first, *others = RunFolder(run_dir).sums.pools(len(model.classes)).values()
    return sum(others, start=first)


def solved(run_dir: Path) -> Head:
    """Solve the statistics head of a run folder in float64."""
    config = RunConfig.from_toml(run_dir / "run.toml")
    return HeadForm(config, FEATURES, make_task(config.task, config.classes)).solve(sums_of(run_dir))


def same_heads(one: Head, other: Head, tolerance: float = 1e-8) -> bool:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    return all(
        float((first[name].double() - second[name].double()).abs().max())
        <= tolerance * float(second[name].abs().max().clamp_min(1e-12))
        for name in first
    )


def history_of(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "membership.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def without(site: int) -> list[Any]:
    return [[] if number == site else rows for number, rows in enumerate(SITES)]


def resend(site: int) -> Samples:
    return some_digits(SITES[site])


def take_out(run_dir: Path, site: int) -> MembershipChange:
    data = resend(site) if RunFolder(run_dir).sums.keep == "none" else None
    return leave(run_dir, f"site-{site}", data=data, **OFF)


# Exactness.


@pytest.mark.parametrize("init", ["lda", "ridge", "nearest-mean", "cosine"])
@pytest.mark.parametrize("keep", KEEPS)
def test_leaving_gives_the_run_without_the_site(digits: Samples, init: str, keep: str) -> None:
    config = CONFIG.changed({"init": "nearest-mean", "head": "cosine"} if init == "cosine" else {"init": init})
    whole = folder_of(simulate(config, digits, list(SITES)))
    if keep == "none":
        pool_only(whole)
    never = folder_of(simulate(config, digits, without(2)))
    change = take_out(whole, 2)
    assert change.all_rows
    assert change.sites == ("site-0", "site-1", "site-3")
    assert (change.rows_before, change.rows_after, change.rows) == (ROWS, ROWS - 100, 100)
    assert same_heads(change.head, solved(never))
    assert same_heads(TransferModel.load(whole).head, TransferModel.load(never).head, 1e-6)
    assert change.statistics.is_close(sums_of(never))


def test_joining_gives_the_run_with_all_sites(digits: Samples, finished: Path) -> None:
    for keep in KEEPS:
        partial = folder_of(simulate(CONFIG, digits, without(3)))
        if keep == "none":
            pool_only(partial)
        change = join(partial, "site-3", some_digits(SITES[3]), **OFF)
        assert same_heads(change.head, solved(finished))
        assert same_heads(TransferModel.load(partial).head, TransferModel.load(finished).head, 1e-6)
        assert sums_of(partial).is_close(sums_of(finished))
        assert change.accuracy_before is not None


def test_wide_features_are_projected_alike(digits: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    users = (fedhead.server.starting_head, fedhead.server.runs.finished)
    for module in (fedhead.sums.projection, fedhead.client.sum_handlers, *users):
        monkeypatch.setattr(module, "projection_for", lambda wide, seed: RandomProjection(wide, 16, seed))
    whole, partial = (folder_of(simulate(CONFIG, digits, sites)) for sites in (list(SITES), without(3)))
    change = join(partial, "site-3", some_digits(SITES[3]), **OFF)
    assert change.statistics.num_features == 16
    assert same_heads(change.head, solved(whole))
    assert same_heads(TransferModel.load(partial).head, TransferModel.load(whole).head, 1e-6)
    assert change.accuracy is not None


def test_rows_of_several_classes_join_and_leave() -> None:
    def attributed(rows: Any) -> Samples:
        labels = all_digits().labels[rows]
        marks = np.stack([labels % 2 == 0, labels > 4, labels == 8], 1)
        return samples_from_arrays(
            [all_digits().read(int(row)) for row in rows], marks, classes=("even", "large", "eight"), spec="attributed"
        )

    config, samples = CONFIG.changed({"multi_label": True}), attributed(np.arange(ROWS))
    whole, never = (folder_of(simulate(config, samples, sites)) for sites in (list(SITES), without(2)))
    assert same_heads(leave(whole, "site-2").head, solved(never))
    change = join(whole, "site-2", attributed(SITES[2]), **OFF)
    assert change.accuracy is not None
    assert TransferModel.load(whole).task.name == "multi-label"
    refuse(whole, "multi-label", join, "new", resend(0), **OFF)
    refuse(never, "rows of 'tall', which", join, "new", attributed_as_tall(), **OFF)
    added = add_class(never, "tall", "new", attributed_as_tall(), **OFF)
    assert added.statistics.counts.tolist()[-1] > 0
    single = folder_of(simulate(CONFIG, some_digits(np.arange(ROWS)), list(SITES)))
    refuse(single, "one class per row", join, "new", attributed(SITES[2]), **OFF)


def attributed_as_tall() -> Samples:
    labels = all_digits().labels[:60]
    marks = np.stack([labels % 2 == 0, labels == 1], 1)
    return samples_from_arrays(
        [all_digits().read(row) for row in range(60)], marks, classes=("even", "tall"), spec="tall"
    )


def test_joining_and_leaving_again_and_again_is_nothing(run: Path) -> None:
    before, sums, files = solved(run), sums_of(run), sorted(path.name for path in (run / "sums").iterdir())
    for _ in range(4):
        guest = some_digits(np.arange(600, 700), spec="guest")
        join(run, "guest", guest, **OFF)
        assert not same_heads(solved(run), before)
        leave(run, "guest", data=None if RunFolder(run).sums.keep == "folder" else guest, **OFF)
        assert same_heads(solved(run), before)
    assert sums_of(run).is_close(sums, 1e-14)
    if RunFolder(run).sums.keep == "folder":
        assert torch.equal(sums_of(run).upper, sums.upper)
        assert sorted(path.name for path in (run / "sums").iterdir()) == files
    assert len(history_of(run)) == 8


def test_a_class_that_comes_later_might_have_been_there_from_the_start() -> None:
    old, new = [0, 1, 2], [1, 3, 4]
    first, second = some_digits(np.arange(300), old), some_digits(np.arange(300, 500), new)
    halves = [np.arange(0, len(first), 2), np.arange(1, len(first), 2)]
    both = samples_from_arrays(
        [*map(first.read, range(len(first))), *map(second.read, range(len(second)))],
        [*(first.classes[label] for label in first.labels), *(second.classes[label] for label in second.labels)],
        spec="both",
    )
    config = CONFIG.changed({"classes": ["0", "1", "2", "3", "4"]})
    always = folder_of(simulate(config, both, [*halves, len(first) + np.arange(len(second))]))
    for keep in KEEPS:
        later = folder_of(simulate(CONFIG, first, halves))
        if keep == "none":
            pool_only(later)
        change = add_class(later, ["3", "4"], "site-2", second, **OFF)
        assert change.classes_added == ("3", "4")
        assert same_heads(change.head, solved(always))
        model = TransferModel.load(later)
        assert model.classes == RunConfig.from_toml(later / "run.toml").classes == ("0", "1", "2", "3", "4")
        assert same_heads(model.head, TransferModel.load(always).head, 1e-6)
        assert "3" in model.predict([second.read(row) for row in range(len(second))])
        # A site whose sums know fewer classes leaves; where it sends them again, as it did then.
        alone = folder_of(simulate(config, both, [[], halves[1], len(first) + np.arange(len(second))]))
        again = some_digits(np.arange(300), old)
        again = samples_from_arrays(
            [again.read(row) for row in halves[0]], [again.classes[again.labels[row]] for row in halves[0]]
        )
        change = leave(later, "site-0", data=None if keep == "folder" else again, **OFF)
        assert same_heads(change.head, solved(alone))
        assert change.classes == ("0", "1", "2", "3", "4")


def test_what_large_values_leave_behind_in_a_subtraction_does_not_become_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    rest = torch.randn(300, 40, generator=generator, dtype=torch.float64)
    rest[:, :20] = torch.logspace(-4, -2, 20)  # constant but at the site that leaves
    large = 100 * torch.randn(400, 40, generator=generator, dtype=torch.float64)
    labels = torch.arange(400) % 3
    parts = [FeatureStatistics.from_features(rows, labels[: len(rows)], 3) for rows in (large, rest)]
    never = solve_head(parts[1])
    assert not torch.equal((parts[0] + parts[1] - parts[0]).upper.triu(), parts[1].upper.triu())
    pool = ExactSum(parts[0].copy())
    pool.add(parts[1])
    pool.subtract(parts[0])
    assert same_heads(solve_head(pool.value), never)
    assert torch.equal(pool.value.upper.triu(), parts[1].upper.triu())
    pool.subtract(parts[1])
    assert (pool.value.rows, float(pool.value.upper.abs().max())) == (0, 0.0)


# What is told.


def test_accuracy_is_that_of_the_head_that_saw_no_held_out_row(digits: Samples) -> None:
    whole = simulate(CONFIG, digits, list(SITES))
    partial = simulate(CONFIG, digits, without(3))
    change = join(folder_of(partial), "site-3", some_digits(SITES[3]), **OFF)
    expected = whole.sites["site-3"]
    assert change.rows_held_out == expected.rows
    assert change.accuracy == pytest.approx(expected.correct / expected.rows)
    assert any("other sites is unknown" in note for note in change.notes)


def test_a_run_without_held_out_rows_tells_no_accuracy(digits: Samples) -> None:
    folder = folder_of(simulate(CONFIG.changed({"holdout": 0.0}), digits, without(3)))
    change = join(folder, "site-3", some_digits(SITES[3]), **OFF)
    assert (change.accuracy, change.accuracy_before, change.rows_held_out, change.all_rows) == (None, None, 0, True)
    assert any("accuracy is unknown" in note for note in change.notes)


def test_gradient_rounds_are_said_not_to_be_unlearned(digits: Samples) -> None:
    config = CONFIG.changed({"rounds": 3, "local": {"lr": 0.05}, "init": "nearest-mean"})
    result = simulate(config, digits, list(SITES))
    assert result.outcome.kept_round > 0
    folder = folder_of(result)
    joined = join(folder, "guest", some_digits(np.arange(600, 700)), **OFF)
    assert any(f"was of round {result.outcome.kept_round}" in note for note in joined.notes)
    change = leave(folder, "guest")
    assert any("not unlearned" in note and "statistics head (nearest-mean)" in note for note in change.notes)
    assert same_heads(TransferModel.load(folder).head, solved(folder), 1e-6)
    assert not any("was of round" in note for note in join(folder, "new", some_digits(SITES[0]), **OFF).notes)


def test_the_run_folder_keeps_a_history(run: Path) -> None:
    join(run, "guest", some_digits(np.arange(600, 700)), min_class_count=0, min_rows=0)
    take_out(run, 1)
    lines = history_of(run)
    assert [(line["action"], line["site"], line["sites"]) for line in lines] == [
        ("join", "guest", 5),
        ("leave", "site-1", 4),
    ]
    assert [(line["rows_before"], line["rows_after"]) for line in lines] == [(400, 500), (500, 400)]
    assert set(lines[0]["digests"]) == {"train", "held_out"}
    result = json.loads((run / "result.json").read_text())
    assert result["membership"] == lines[-1]
    assert result["accuracy_held_out"] is not None
    assert RunFolder(run).sums.sites() == ["guest", "site-0", "site-2", "site-3"]


def test_none_but_the_owner_reads_sums(run: Path) -> None:
    join(run, "guest", some_digits(np.arange(600, 700)), **OFF)
    take_out(run, 1)
    paths = list((run / "sums").iterdir())
    assert len(paths) == (9 if RunFolder(run).sums.keep == "folder" else 3)
    assert {path.stat().st_mode & 0o777 for path in paths} == {0o600}
    assert (run / "sums").stat().st_mode & 0o777 == 0o700


def test_the_pool_alone_holds_no_sites_sums(finished: Path) -> None:
    run = copy_of(finished, "none")
    names = sorted(path.name.split(".")[0] for path in (run / "sums").iterdir())
    assert names == ["pool", "pool", "sites"]
    assert RunFolder(run).sums.load("site-0", "train") is None
    assert RunFolder(run).sums.sites() == [f"site-{number}" for number in range(4)]


def test_a_run_pools_what_its_sites_send(digits: Samples, finished: Path) -> None:
    plan = make_plan(CONFIG.changed({"diagnose": False}), Inputs(digits, list(SITES)))
    sums = SiteSums(Path("sums"), "none")
    folder = RunFolder.create("pooled", plan.name)
    checkpoint = Checkpoint(folder, plan.config, plan.backbone, plan.strategy, every_round=False)
    run_plan(plan, parts=RunParts(folder.path, folder, sums, checkpoint))
    with pytest.raises(UserError, match="the run did not finish"):
        SiteSums(Path("sums")).origin()
    sums.finish()
    kept = SiteSums(finished / "sums")
    again = SiteSums(Path("sums"))
    assert again.keep == "none"
    assert again.records() == kept.records()
    for part, pool in again.pools(10).items():
        assert pool.is_close(kept.pools(10)[part])


# Guard and ledger.


def test_the_guard_and_the_ledger_are_the_sites_own(finished: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = copy_of(finished)
    guest = some_digits([*range(600, 700), *range(700, 712)], [0, 1, 2, 3, 4], spec="guarded")
    thin = some_digits(range(400, 480), [7])
    few = samples_from_arrays(
        [*map(guest.read, range(len(guest))), *map(thin.read, range(3))],
        [*(guest.classes[label] for label in guest.labels), *["7"] * 3],
        spec="guarded",
    )
    change = join(run, "careful", few)
    assert change.withheld == 3
    assert change.rows <= len(few) - 3
    assert "withheld" not in json.dumps(history_of(run))
    assert change.summary()["rows_withheld"] == 3
    entries = read_ledger(ledger_path("careful"))
    assert [entry.run for entry in entries] == ["run", "run"]
    assert entries[0].classes.keys() == {"0", "1", "2", "3", "4"}
    leave(run, "careful")
    fewer = samples_from_arrays(
        [few.read(row) for row in range(1, len(few))], [few.classes[label] for label in few.labels[1:]], spec="fewer"
    )
    again = join(run, "careful", fewer)
    assert 5 <= change.rows - again.rows < 10
    leave(run, "careful")
    ledger_path("careful").with_suffix(".atoms").unlink()
    with pytest.raises(FedheadError, match="differ by too few"):
        join(run, "careful", fewer)
    assert "disclose the changed rows" in caplog.text
    assert RunFolder(run).sums.sites() == [f"site-{number}" for number in range(4)]


def test_a_site_that_is_withheld_as_a_whole_is_refused(run: Path) -> None:
    refuse(run, "guard lets nothing leave", join, "small", some_digits(np.arange(600, 610)))
    refuse(run, "None of|No rows of class 'new'", add_class, "new", "small", some_digits(np.arange(600, 700)), **OFF)


# Sums that are sent again.


def test_a_site_that_requires_protection_sends_no_plain_sums(run: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.csv"
    data.write_text("x,label\n1,0\n")
    settings = {"name": "ward", "coordinator": "127.0.0.1:1", "data": f"csv:{data}?label=label", "device": "cpu"}
    site_of(SiteSettings(**settings, privacy={"require": "dp", "epsilon": 1.0}), ledger_path("ward"))
    with pytest.raises(UserError, match=r"site.toml of ward requires differential privacy \(\[privacy\] require\)"):
        join(run, "ward", "digits", **OFF)
    site_of(SiteSettings(**settings), ledger_path("ward"))
    join(run, "ward", "digits", **OFF)


def test_only_the_sums_that_are_in_can_be_taken_out(finished: Path) -> None:
    run = copy_of(finished, "none")
    kept = SiteSums(finished / "sums")
    for part in ("train", "held_out"):
        for site in (1, 2):
            stats = kept.load(f"site-{site}", part)  # type: ignore[arg-type]
            assert stats is not None
            stats.save(f"{site}.{part}")
    refuse(run, "must send its own again: --sums FILE", leave, "site-1")
    refuse(run, "not both", leave, "site-1", data=resend(1), sums=["1.train"])
    refuse(run, "There are no feature statistics at nowhere", leave, "site-1", sums=["nowhere"])
    refuse(run, "2.train, of .* rows, are not those that 'site-1' sent", leave, "site-1", sums=["1.train", "2.train"])
    refuse(run, "The sums of the held-out rows of 'site-1' are missing", leave, "site-1", sums=["1.train"])
    refuse(run, "do not give the sums that 'site-1' sent", leave, "site-1", data=resend(2), **OFF)
    refuse(run, "do not give the sums that 'site-1' sent", leave, "site-1", data=some_digits(SITES[1][1:]), **OFF)
    refuse(run, "of class 'x', which this run does not know", leave, "site-1", data=of_class("x"), **OFF)
    change = leave(run, "site-1", sums=["1.held_out", Path("1.train")])
    other = copy_of(finished, name="other")
    assert same_heads(change.head, leave(other, "site-1").head)
    refuse(other, "needs neither its sums nor its data", leave, "site-2", sums=["2.train"])
    refuse(other, "needs neither its sums nor its data", leave, "site-2", data=resend(2))


def test_damage_is_told(finished: Path) -> None:
    run = copy_of(finished, "none")
    (pool,) = (run / "sums").glob("pool.train.*")
    whole = pool.read_bytes()
    pool.write_bytes(whole[:-8] + b"\x01" * 8)
    refuse(run, "pool.*damaged", join, "guest", resend(0), **OFF)
    pool.write_bytes(whole[:100])
    refuse(run, "pool.*cannot be read", join, "guest", resend(0), **OFF)
    index = run / "sums" / "sites.jsonl"
    index.write_text(index.read_text() + "{}\n")
    refuse(run, "sites.jsonl is damaged", join, "guest", resend(0), **OFF)
    other = copy_of(finished, name="other")
    (other / "sums" / "site-1.train.safetensors").unlink()
    refuse(other, "no feature statistics at other/sums/site-1.train", leave, "site-2")
    third = copy_of(finished, name="third")
    (third / "model.safetensors").write_bytes(b"no model")
    refuse(third, "model.safetensors is damaged", leave, "site-2")
    fourth = copy_of(finished, name="fourth")
    (fourth / "result.json").write_text("[")
    refuse(fourth, "result.json is damaged", leave, "site-2")


# What cannot be done.


def of_class(name: str) -> Samples:
    images = [all_digits().read(row) for row in range(40)]
    return samples_from_arrays(images, [name] * 40, spec="strange")


def refuse(run_dir: Path, words: str, function: Any, *args: Any, **options: Any) -> None:
    """Check that a change is refused as the user's mistake, and that nothing has changed."""
    before = contents(run_dir)
    if function is add_class:
        name, *args = args  # type: ignore[assignment]
        with pytest.raises(UserError, match=words):
            add_class(run_dir, name, *args, **options)
    else:
        with pytest.raises(UserError, match=words):
            function(run_dir, *args, **options)
    assert contents(run_dir) == before


def contents(run_dir: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(run_dir.rglob("*")) if path.is_file()}


def test_a_folder_that_is_none_or_of_no_finished_run_is_refused(finished: Path) -> None:
    Path("file").write_text("")
    Path("empty").mkdir()
    for name, words in (
        ("nowhere", "no run folder nowhere"),
        ("file", "is not a run folder"),
        ("empty", "no run.toml"),
    ):
        with pytest.raises(UserError, match=words):
            leave(name, "site-1")
    run = copy_of(finished)
    (run / "result.json").unlink()
    refuse(run, "not finished", leave, "site-1")


def test_names_are_known_or_refused_with_those_that_are(run: Path) -> None:
    refuse(run, "no site 'site-9' in run. In it are 'site-0', 'site-1', 'site-2', 'site-3'", leave, "site-9")
    refuse(run, "'site-1' is in run already.*fedhead leave run --site site-1", join, "site-1", resend(1), **OFF)
    refuse(run, "'site-1' is in run already", add_class, "x", "site-1", of_class("x"), **OFF)
    refuse(run, "needs a name", join, " ", resend(1))
    take_out(run, 1)
    refuse(run, "'site-1' in run. It left at 20", leave, "site-1")


def test_classes_are_known_or_added_on_purpose(run: Path) -> None:
    refuse(run, "rows of 'x y', which this run does not know.*add-class run --name 'x y'", join, "new", of_class("x y"))
    refuse(run, "rows of 'x', which", add_class, "y", "new", of_class("x"), **OFF)
    refuse(run, "'3' is known to run already", add_class, "3", "new", resend(1))
    for names in ([], [""], ["x", "x"]):
        refuse(run, "Name each class to add", add_class, names, "new", of_class("x"))


def test_a_run_that_was_not_solved_from_sums_is_refused(digits: Samples) -> None:
    zeros = folder_of(simulate(CONFIG.changed({"init": "zeros", "rounds": 1}), digits, list(SITES)))
    refuse(zeros, "started from 'zeros'.*--init lda", leave, "site-1")
    cosine = folder_of(simulate(CONFIG.changed({"init": "random", "rounds": 1, "head": "cosine"}), digits, list(SITES)))
    refuse(cosine, "started from 'random'.*--init nearest-mean", leave, "site-1")
    mlp = folder_of(simulate(CONFIG.changed({"head": "mlp:4", "rounds": 1}), digits, list(SITES)))
    refuse(mlp, "'mlp:4'.*only runs with a linear or a cosine head", join, "new", resend(0))


def test_a_run_folder_without_sums_is_refused(finished: Path) -> None:
    run = copy_of(finished)
    shutil.rmtree(run / "sums")
    refuse(run, "holds no sums of its sites", leave, "site-1")


def test_a_head_needs_two_classes_and_a_run_a_site() -> None:
    samples = some_digits(np.arange(200), [0, 1, 2])
    rows = [np.flatnonzero(samples.labels == 0), np.flatnonzero(samples.labels > 0)]
    run = folder_of(simulate(CONFIG, samples, rows))
    refuse(run, "Without 'site-1' all rows are of '0'", leave, "site-1")
    leave(run, "site-0")
    refuse(run, "'site-1' is the only site", leave, "site-1")


def test_sums_of_another_run_are_refused(finished: Path) -> None:
    run = copy_of(finished)
    for path in (run / "sums").glob("*.safetensors"):
        FeatureStatistics.from_features(torch.randn(30, 5), torch.arange(30) % 10, 10).save(path)
    refuse(run, "of 5 features, and the head of run is solved from those of 64", join, "new", resend(0), **OFF)
    refuse(run, "of 5 features, and the head of run is solved from those of 64", leave, "site-1")
    for path in (run / "sums").glob("*.safetensors"):
        FeatureStatistics.from_features(torch.randn(30, 64), torch.arange(30) % 11, 11).save(path)
    refuse(run, "Sums of 11 classes are none of this run's, which has 10", leave, "site-1")


def test_a_backbone_that_is_not_here_is_a_sentence(
    finished: Path, monkeypatch: pytest.MonkeyPatch, own_folder: Path
) -> None:
    run = copy_of(finished)
    monkeypatch.setenv("FEDHEAD_HOME", str(own_folder / "another machine"))
    with pytest.raises(FedheadError, match=r"weights of tiny:grey are not on this machine.*--weights FILE"):
        join(run, "new", resend(0), **OFF)
    leave(run, "site-1")  # no backbone is needed to be forgotten
    join(run, "new", resend(0), weights="mine.safetensors", **OFF)


def test_weights_of_another_backbone_are_refused(digits: Samples) -> None:
    run = folder_of(simulate(RunConfig(rounds=0, simulation=OFF), digits, list(SITES)))
    refuse(run, "weights random are not those that", join, "new", resend(0), weights="random", **OFF)
    assert join(run, "new", some_digits(np.arange(500, 600)), **OFF).accuracy is not None


def test_two_changes_at_once_take_turns(finished: Path) -> None:
    run = copy_of(finished)
    handle = os.open(run, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(FedheadError, match="being changed by another process"):
        leave(run, "site-1")
    os.close(handle)
    leave(run, "site-1")


# Killed at any moment.


class KilledError(BaseException):
    pass


def killing(monkeypatch: pytest.MonkeyPatch, number: int, after: bool) -> list[Path]:
    """Kill the process before or after the write of this number; return what was written, in order."""
    writers = (
        fedhead.server.site_sums,
        fedhead.server.runs.folder,
        fedhead.server.runs.delivered,
        fedhead.server.runs.finished,
        fedhead.server.runs.summary,
        fedhead.sums.packing,
    )
    written: list[Path] = []

    def write(path: Path, content: bytes | str) -> None:
        if len(written) == number and not after:
            raise KilledError
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        path.chmod(0o600)
        written.append(path)
        if len(written) == number + 1 and after:
            raise KilledError

    for module in writers:
        monkeypatch.setattr(module, "write_atomically", write)
    return written


def change_of(action: str, run_dir: Path) -> MembershipChange:
    if action == "join":
        return join(run_dir, "guest", some_digits(np.arange(600, 660)), **OFF)
    if action == "add-class":
        return add_class(run_dir, "x", "guest", of_class("x"), **OFF)
    return take_out(run_dir, 1)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("action", ["join", "leave", "add-class"])
def test_a_killed_change_leaves_the_old_state_or_the_new(
    run: Path, action: str, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = copy_of(run, name="done")
    change_of(action, done)
    before, wanted = sums_of(run), sums_of(done)
    old_head, new_head = TransferModel.load(run).head, TransferModel.load(done).head
    number, seen_new = 0, False
    while True:
        folder = copy_of(run, name=f"killed-{number}")
        with monkeypatch.context() as patch:
            written = killing(patch, number, after)
            try:
                change_of(action, folder)
                break
            except KilledError:
                pass
        model = TransferModel.load(folder)
        assert any(
            len(model.classes) == head.num_classes and same_heads(model.head, head, 1e-6)
            for head in (old_head, new_head)
        )
        RunConfig.from_toml(folder / "run.toml")
        is_new = RunFolder(folder).sums.sites() == RunFolder(done).sums.sites()
        # Once it has happened it does not unhappen.
        assert is_new >= seen_new
        seen_new = is_new
        expected = wanted if is_new else before
        total = sum(part.rows for part in RunFolder(folder).sums.pools(wanted.num_classes).values())
        assert total == expected.rows
        # Whatever comes next finds one state, and the model that belongs to it.
        next_change = join(folder, "later", some_digits(np.arange(700, 760)), **OFF)
        assert next_change.rows_before == expected.rows
        assert len(history_of(folder)) == 1 + is_new
        assert same_heads(TransferModel.load(folder).head, solved(folder), 1e-6)
        assert not list((folder / "sums").glob(".*"))
        if is_new and action == "leave":
            assert not list((folder / "sums").glob("site-1.*"))
        if is_new and action == "add-class":
            assert RunConfig.from_toml(folder / "run.toml").classes[-1] == "x"
        number += 1
    assert seen_new
    assert len(written) == number


def test_an_interrupted_change_is_completed_and_told(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = copy_of(finished)
    with monkeypatch.context() as patch:
        killing(patch, 0, after=True)
        with pytest.raises(KilledError):
            leave(run, "site-1")
    assert same_heads(TransferModel.load(run).head, TransferModel.load(finished).head)
    with pytest.raises(UserError, match="no site 'site-1' in run\\. It left at"):
        leave(run, "site-1")
    assert same_heads(TransferModel.load(run).head, solved(run), 1e-6)
    assert [line["site"] for line in history_of(run)] == ["site-1"]


# The command.


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def stderr_of(result: Result) -> str:
    return " ".join(click.unstyle(result.stderr).split())


GUARD_OFF = ("--min-class-count", "0", "--min-rows", "0")


def test_the_commands_tell_what_became_of_the_run(finished: Path) -> None:
    copy_of(finished)
    save_digits(Path("guest"), range(600, 700))
    joined = command("join", "run", "--site", "guest", "--data", "folder:guest", *GUARD_OFF)
    assert joined.exit_code == 0, (stderr_of(joined), joined.exception)
    for words in (
        "guest joined with 100 rows",
        "now has 5 sites",
        "400 before, 500 now",
        "10 before, 10 now",
        "held-out",
    ):
        assert words in joined.stdout, joined.stdout
    left = command("leave", "run", "--site", "guest")
    assert left.exit_code == 0, stderr_of(left)
    assert "guest left with 100 rows" in left.stdout
    assert "is unknown here" in left.stdout


def test_the_commands_print_one_json_value(finished: Path) -> None:
    run = copy_of(finished)
    save_digits(Path("new"), range(600, 800), [3, 4])
    Path("new/3").rename("new/three")
    arguments = ("--site", "n", "--data", "folder:new", "--json", *GUARD_OFF)
    added = command("add-class", "run", "--name", "three", *arguments)
    assert added.exit_code == 0, stderr_of(added)
    values = json.loads(added.stdout)
    assert values["classes"][-1] == "three"
    assert values["classes_added"] == ["three"]
    assert values["run_dir"] == str(run)
    assert len(values["sites"]) == 5
    assert values["accuracy_before"] is None
    assert values["accuracy"] > 0.5
    left = json.loads(command("leave", "run", "--site", "n", "--json").stdout)
    assert (left["rows_after"], left["accuracy"]) == (ROWS, None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["leave", "nowhere", "--site", "a"], "There is no run folder nowhere"),
        (["leave", "run", "--site", "a"], "There is no site 'a' in run"),
        (["join", "run", "--site", "site-1", "--data", "digits"], "is in run already"),
        (["join", "run", "--site", "a", "--data", "folder:nowhere"], "There is no folder nowhere"),
        (["join", "run", "--site", "a", "--data", "digitts"], "Did you mean 'digits'"),
        (["join", "run", "--site", "a", "--data", "digits", "--min-rows", "-1"], "must be 0 (off) or more"),
        (["join", "run", "--site", "a", "--data", "digits", "--min-rows", "5000"], "guard lets nothing leave"),
        (["join", "run", "--site", "a", "--data", "digits", "--device", "abacus"], "device 'abacus'"),
        (["add-class", "run", "--name", "0", "--site", "a", "--data", "digits"], "'0' is known to run already"),
        (["leave", "run", "--site", "site-1", "--sums", "nowhere"], "needs neither its sums nor its data"),
    ],
)
def test_mistakes_are_sentences_with_exit_status_2(finished: Path, arguments: list[str], words: str) -> None:
    run = copy_of(finished)
    before = contents(run)
    result = command(*arguments)
    assert result.exit_code == 2, (result.exit_code, stderr_of(result), result.exception)
    assert result.stdout == ""
    assert words in stderr_of(result)
    assert "Traceback" not in result.stderr
    assert contents(run) == before


def test_the_commands_know_the_guards_defaults() -> None:
    text = click.unstyle(command("join", "--help").stdout)
    assert f"[default: {MIN_CLASS_COUNT}]" in text
    assert f"[default: {MIN_ROWS}]" in text


def test_the_help_of_each_command_groups_its_flags() -> None:
    for name in ("join", "leave", "add-class"):
        text = click.unstyle(command(name, "--help").stdout)
        for words in ("─ The run ─", "─ The site ─", "─ Output ─", f"Example: fedhead {name}", "--min-class-count"):
            assert words in text, (name, words)
