import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import fedhead.simulations.plan
from fedhead.config import RunConfig
from fedhead.data import Samples, load_samples, samples_from_arrays, samples_from_texts
from fedhead.errors import FedheadError, UserError
from fedhead.model import TransferModel
from fedhead.server.observer import EachRound
from fedhead.server.runs.history import Round
from fedhead.simulations import RunResult, simulate

ROWS = 300
UNGUARDED = {"min_class_count": 0, "min_rows": 0}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def some_digits(rows: npt.NDArray[np.int64], spec: str = "some digits") -> Samples:
    whole = load_samples("digits")
    images = [whole.read(int(row)) for row in rows]
    return samples_from_arrays(images, whole.labels[rows], classes=whole.classes, spec=spec)


@pytest.fixture(scope="module")
def digits() -> Samples:
    return some_digits(np.arange(ROWS))


@pytest.fixture(scope="module")
def default_run(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """What a stranger gets, in fewer rounds."""
    return simulate(RunConfig(rounds=8), out=tmp_path_factory.mktemp("default") / "run")


def save_digits(root: Path, rows: npt.NDArray[np.int64], classes: int = 10) -> None:
    """Write a sub-folder of images per class."""
    whole = load_samples("digits")
    for row in rows:
        if whole.labels[row] < classes:
            folder = root / f"digit-{whole.labels[row]}"
            folder.mkdir(parents=True, exist_ok=True)
            whole.read(int(row)).save(folder / f"{row}.png")


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def folder_of(result: RunResult) -> Path:
    assert result.run_dir is not None
    return result.run_dir


def run_folders() -> list[Path]:
    return list(Path("runs").iterdir()) if Path("runs").exists() else []


def test_the_defaults_learn_the_digits(default_run: RunResult) -> None:
    assert default_run.accuracy is not None
    assert default_run.accuracy >= 0.95
    by_site = [(sums.correct, sums.rows) for sums in default_run.sites.values()]
    assert default_run.accuracy == sum(right for right, _ in by_site) / sum(rows for _, rows in by_site)
    assert default_run.accuracy_worst_site == min(right / rows for right, rows in by_site)
    assert len(default_run.outcome.participants) == 10
    assert not default_run.outcome.refused
    assert not default_run.empty_sites


def test_what_travels_is_small_and_counted(default_run: RunResult) -> None:
    head_bytes = 10 * (192 + 1) * 4
    for line in default_run.history[1:-1]:
        assert 10 * head_bytes < line.bytes_up < 10 * head_bytes * 1.1
        assert 10 * head_bytes < line.bytes_down < 10 * head_bytes * 1.1
    backbone_bytes = default_run.outcome.full_model_bytes / (2 * 10 * 8) - head_bytes
    assert backbone_bytes == pytest.approx(default_run.model.backbone.num_bytes)


def test_the_run_folder_says_what_ran_and_what_came_out(default_run: RunResult) -> None:
    folder = folder_of(default_run)
    written = {path.name for path in folder.iterdir()}
    assert {"run.toml", "metrics.jsonl", "model.safetensors", "result.json"} <= written
    config = RunConfig.from_toml(folder / "run.toml")
    assert config == default_run.config
    assert config.classes == tuple("0123456789")
    assert config.init
    lines = lines_of(folder)
    assert [line["number"] for line in lines] == list(range(9))
    assert lines[-1]["score"] == default_run.history[-1].score
    result = json.loads((folder / "result.json").read_text())
    summary = default_run.summary()
    assert {key: result[key] for key in summary} == summary
    assert {"accuracy", "accuracy_worst_site", "rounds", "bytes_down", "bytes_up", "seconds", "run_dir"} <= set(summary)
    assert (folder / "evaluation.json").exists()


def test_the_delivered_model_is_the_one_that_was_measured(default_run: RunResult) -> None:
    whole = load_samples("digits")
    images = [whole.read(row) for row in range(0, len(whole), 20)]
    labels = [whole.classes[label] for label in whole.labels[::20]]
    loaded = TransferModel.load(folder_of(default_run))
    predicted = loaded.predict(images)
    assert predicted == default_run.model.predict(images)
    assert np.mean([one == other for one, other in zip(predicted, labels, strict=True)]) > 0.93


@pytest.mark.parametrize(
    "config",
    [
        RunConfig(rounds=2),
        RunConfig(rounds=2, head="mlp:8", seed=3, local={"optimizer": "adamw", "lr": 0.01}),
        RunConfig(
            rounds=3,
            init="zeros",
            strategy={"name": "FedAdam", "eta": 0.01, "fraction_train": 0.5},
            simulation={"partition": "shards:3", "sites": 7},
        ),
        RunConfig(rounds=2, head="cosine", strategy={"name": "FedMedian"}, simulation={"partition": "quantity:0.5"}),
    ],
)
def test_a_run_is_reproduced_bit_for_bit_from_what_it_wrote(config: RunConfig) -> None:
    # Names as long as each other, since sites are told them.
    first = simulate(config, out="first")
    torch.rand(3)  # the generators of others take no part in it
    np.random.random(3)  # noqa: NPY002
    second = simulate(RunConfig.from_toml(folder_of(first) / "run.toml"), out="again")
    assert second.extracted == 0
    for name in ("model.safetensors", "run.toml"):
        assert (folder_of(first) / name).read_bytes() == (folder_of(second) / name).read_bytes()
    timeless = [{**line, "seconds": 0} for line in lines_of(folder_of(first))]
    assert [{**line, "seconds": 0} for line in lines_of(folder_of(second))] == timeless


def test_another_seed_gives_another_head(digits: Samples) -> None:
    first, second = (simulate(RunConfig(init="zeros", rounds=1, seed=seed), digits, 3) for seed in (0, 1))
    assert not torch.equal(first.model.head.state_dict()["weight"], second.model.head.state_dict()["weight"])


def test_features_are_extracted_once_whoever_holds_the_rows() -> None:
    fresh = some_digits(np.arange(1000, 1080), spec="fresh")
    config = RunConfig(init="zeros", rounds=1, simulation=UNGUARDED)
    assert simulate(config, fresh, 4).extracted == 80
    for partition in ("iid", "shards:2", "dirichlet:1"):
        again = simulate(config.changed({"simulation": {"partition": partition}}), fresh, 5)
        assert (again.extracted, again.summary()["rows_extracted"]) == (0, 0)


@pytest.mark.parametrize("optimizer", [{"optimizer": "sgd"}, {"optimizer": "adamw", "lr": 0.01}])
@pytest.mark.parametrize(("head", "init"), [("linear", "zeros"), ("linear", "random"), ("mlp:16", ""), ("cosine", "")])
def test_every_head_trains_with_every_optimizer(
    digits: Samples, head: str, init: str, optimizer: dict[str, Any]
) -> None:
    config = RunConfig(head=head, init=init, rounds=10, local={**optimizer, "epochs": 2, "batch_size": 16})
    result = simulate(config.changed({"simulation": {"partition": "iid"}}), digits, 3)
    assert result.accuracy is not None
    assert result.accuracy > 0.8
    losses = [line.train_loss for line in result.history[1:]]
    assert losses[-1] is not None
    assert losses[0] is not None
    assert losses[-1] < losses[0]


def test_rows_of_the_same_bytes_but_another_shape_have_features_of_their_own(own_folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 4, 16), dtype=np.uint8)
    config = RunConfig(init="zeros", rounds=1, simulation=UNGUARDED)
    for images in (pixels, pixels.reshape(60, 8, 8), pixels.reshape(60, 16, 4)):
        assert simulate(config, samples_from_arrays(images, np.arange(60) % 2), 2).extracted == 60


def test_a_users_function_is_reproduced_too(own_folder: Path) -> None:
    (own_folder / "mydigits.py").write_text(
        "import numpy as np\nfrom fedhead.data import load_digits, samples_from_arrays\n"
        "def load():\n    whole = load_digits('')\n"
        "    images = [whole.read(row) for row in range(100)]\n"
        "    return samples_from_arrays(images, whole.labels[:100], classes=whole.classes)\n"
    )
    config = RunConfig(rounds=1, simulation={"data": "python:mydigits:load", "sites": 2, **UNGUARDED})
    first = simulate(config)
    assert first.config.simulation.data == "python:mydigits:load"
    again = simulate(RunConfig.from_toml(folder_of(first) / "run.toml"))
    assert (folder_of(again) / "model.safetensors").read_bytes() == (
        folder_of(first) / "model.safetensors"
    ).read_bytes()


# Who holds what.


def test_a_user_says_which_rows_each_site_holds(digits: Samples) -> None:
    rows: list[Any] = [np.arange(0, 100), list(range(150, 290)), []]
    result = simulate(RunConfig(rounds=1, holdout=0.0), digits, rows)
    assert list(result.outcome.participants) == ["site-0", "site-1"]
    assert result.empty_sites == ("site-2",)
    assert result.config.simulation.sites == 3


def test_of_many_sites_some_evaluate_in_detail(digits: Samples) -> None:
    config = RunConfig(init="zeros", rounds=1, simulation={"partition": "sample:10", "sites": 1100, **UNGUARDED})
    result = simulate(config, digits)
    assert len(result.outcome.participants) == 1100
    # A few hold nothing out.
    assert 700 < len(result.sites) < 1000
    journal = json.loads((folder_of(result) / "journal.json").read_text())
    assert (journal["standing"], len(journal["sites"])) == ({"ready": 1100}, 1000)
    assert "1,100 sites" in (folder_of(result) / "report.html").read_text()


def test_folders_are_sites(own_folder: Path) -> None:
    save_digits(own_folder / "data" / "clinic", np.arange(0, 90))
    save_digits(own_folder / "data" / "hospital", np.arange(90, 200), classes=4)
    config = RunConfig(rounds=2, simulation={"data": "folder:data", "partition": "folder"})
    result = simulate(config)
    assert list(result.outcome.participants) == ["clinic", "hospital"]
    assert result.config.classes == tuple(f"digit-{label}" for label in range(10))
    assert set(result.sites) <= {"clinic", "hospital"}
    again = simulate(RunConfig.from_toml(folder_of(result) / "run.toml"))
    assert (folder_of(again) / "model.safetensors").read_bytes() == (
        folder_of(result) / "model.safetensors"
    ).read_bytes()


def test_sites_that_a_partition_leaves_empty_are_reported(digits: Samples, caplog: pytest.LogCaptureFixture) -> None:
    config = RunConfig(rounds=2, simulation={"sites": 15, "partition": "dirichlet:0.01", **UNGUARDED})
    result = simulate(config, digits)
    assert len(result.empty_sites) >= 5
    assert len(result.empty_sites) + len(result.outcome.participants) == 15
    assert not set(result.empty_sites) & set(result.outcome.participants)
    assert result.summary()["sites_empty"] == list(result.empty_sites)
    assert f"{len(result.empty_sites)} sites have no rows" in caplog.text


def test_a_test_set_is_what_accuracy_means_where_there_is_one(digits: Samples) -> None:
    test = some_digits(np.arange(900, 1000), spec="a test set")
    result = simulate(RunConfig(rounds=2), digits, 3, test_data=test)
    images = [test.read(row) for row in range(len(test))]
    predicted = result.model.predict(images)
    correct = sum(name == test.classes[label] for name, label in zip(predicted, test.labels, strict=True))
    assert result.accuracy == result.test_accuracy == pytest.approx(correct / 100)
    assert result.summary()["accuracy"] == result.test_accuracy
    assert result.accuracy_held_out is not None
    assert all(line.test_score is not None for line in result.history)
    assert not simulate(RunConfig(rounds=2), digits, 3).summary()["accuracy_test"]


def test_the_test_set_may_be_a_folder_with_other_subsets_of_the_classes(own_folder: Path, digits: Samples) -> None:
    save_digits(own_folder / "test", np.arange(900, 960), classes=3)
    names = [f"digit-{label}" for label in range(10)]
    data = samples_from_arrays([digits.read(row) for row in range(ROWS)], digits.labels, classes=names)
    result = simulate(RunConfig(rounds=2, simulation={"test_data": "folder:test"}), data, 3)
    assert result.test_accuracy is not None
    assert result.test_accuracy > 0.5
    assert result.config.simulation.test_data == f"folder:{own_folder / 'test'}"


def test_without_held_out_rows_nothing_is_claimed(digits: Samples) -> None:
    result = simulate(RunConfig(init="zeros", rounds=2, holdout=0.0), digits, 3)
    assert result.outcome.kept_round == 2
    assert (result.accuracy, result.accuracy_worst_site, result.accuracy_mean_site) == (None, None, None)
    assert result.sites == {}
    assert all(line.loss is None for line in result.history)
    assert json.loads(json.dumps(result.summary()))["accuracy"] is None
    scored = simulate(
        RunConfig(init="zeros", rounds=2, holdout=0.0), digits, 3, test_data=some_digits(np.arange(900, 950))
    )
    assert scored.accuracy == scored.test_accuracy != None  # noqa: E711


@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_rounds_start_from_a_head_as_sure_of_itself_as_held_out_rows_justify(head: str) -> None:
    config = RunConfig(head=head, rounds=0)
    solved = simulate(config)
    # Steps so large that no round betters the head that they start from, which is then delivered as it was solved.
    started = simulate(config.changed({"rounds": 1, "local": {"lr": 1e4}}))
    before, after = solved.history[0], started.history[0]
    assert before.loss is not None and after.loss is not None
    assert after.loss < before.loss
    assert after.score == before.score
    assert started.outcome.kept_round == 0
    for name, value in solved.model.head.state_dict().items():
        torch.testing.assert_close(started.model.head.state_dict()[name], value)
    # Whether sites standardise or not, what they evaluate is what is delivered.
    assert started.model.calibration.temperature == pytest.approx(solved.model.calibration.temperature, rel=1e-3)
    assert started.evaluation.accuracy == solved.evaluation.accuracy


def test_no_rounds_deliver_the_head_that_a_run_starts_from(digits: Samples) -> None:
    result = simulate(RunConfig(init="zeros", rounds=0), digits, 3)
    assert [line.number for line in result.history] == [0]
    assert not any(bool(value.any()) for value in result.model.head.state_dict().values())


def test_random_weights_are_announced(digits: Samples, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        result = simulate(RunConfig(weights="random", rounds=1), digits, 3)
    assert "random, as asked for" in caplog.text
    assert result.summary()["sites_refused"] == {}


def test_progress_is_told(digits: Samples) -> None:
    extraction: list[tuple[int, int]] = []
    rounds: list[Round] = []
    result = simulate(
        RunConfig(init="zeros", rounds=2),
        some_digits(np.arange(1100, 1200), spec="progress"),
        3,
        test_data=some_digits(np.arange(1200, 1300), spec="progress test"),
        on_extraction=lambda done, total: extraction.append((done, total)),
        observers=[EachRound(rounds.append)],
    )
    assert rounds == list(result.history)
    assert [done for done, _ in extraction] == sorted(done for done, _ in extraction)
    assert {total for _, total in extraction} == {200}
    assert extraction[-1] == (200, 200)
    assert len(extraction) > 3


# What cannot be run.


def refuse(words: str, *args: Any, **options: Any) -> None:
    before = run_folders()
    with pytest.raises(UserError, match=words):
        simulate(*args, **options)
    assert run_folders() == before


def test_one_class_is_refused() -> None:
    images = np.zeros((20, 8, 8), np.uint8)
    refuse("two classes", RunConfig(rounds=1), samples_from_arrays(images, ["cat"] * 20), 2)


def test_more_sites_than_rows_are_refused(digits: Samples) -> None:
    refuse(f"{ROWS + 1} sites cannot share {ROWS} rows", RunConfig(), digits, ROWS + 1)


def test_no_sites_are_refused(digits: Samples) -> None:
    refuse(r"simulation\.sites", RunConfig(), digits, 0)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([[0, 1], [1, 2]], "Row 1 is given to more than one site"),
        ([[0, ROWS]], f"there are {ROWS} rows"),
        ([[-1, 3]], "from -1"),
        ([[0, 1], [2.5]], "rows of site-1 must be row numbers, not of type float64"),
        ([[True, False]], "not of type bool"),
        ([["first"]], "not of type <U5"),
    ],
)
def test_rows_that_are_not_there_are_refused(digits: Samples, rows: list[list[Any]], words: str) -> None:
    refuse(words, RunConfig(rounds=1), digits, rows)


@pytest.mark.parametrize("rows", [[], [[]], [[], []]])
def test_sites_without_any_rows_are_a_sentence(digits: Samples, rows: list[list[int]]) -> None:
    with pytest.raises(FedheadError):
        simulate(RunConfig(rounds=1), digits, rows)
    assert run_folders() == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"backbone": "bundled:glyphnett"}, "Did you mean 'glyphnet'"),
        ({"backbone": "bundeld:glyphnet"}, "Did you mean 'bundled'"),
        ({"backbone": "torchvision:resnet19"}, "Did you mean 'resnet1"),
        ({"backbone": "glyphnet"}, "source:name"),
        ({"backbone": "bundled:glyphnet", "layer": "stage1"}, "only the layer 'penultimate'"),
        ({"weights": "nowhere.safetensors"}, "no weights file 'nowhere.safetensors'"),
        ({"head": "lineer"}, "Did you mean 'linear'"),
        ({"head": "mlp:-4"}, "hidden units"),
        ({"init": "zeroes"}, "cannot start from 'zeroes'"),
        ({"head": "mlp:4", "init": "zeros"}, "cannot start from 'zeros'"),
        ({"strategy": {"name": "FedAvgg"}}, "Did you mean 'FedAvg"),
        ({"classes": ["0", "1", "2"]}, "is of class '3'"),
        ({"classes_from": "nowhere"}, "no data source 'nowhere'"),
        ({"simulation": {"partition": "dirichlett:1"}}, "Did you mean 'dirichlet'"),
        ({"simulation": {"device": "abacus"}}, "device 'abacus'"),
        ({"simulation": {"test_data": "folder:nowhere"}}, "no folder nowhere"),
        ({"simulation": {"partition": "folder"}}, "takes the sites from the data, which names none"),
    ],
)
def test_what_does_not_exist_is_refused_before_anything_is_run(
    digits: Samples, changes: dict[str, Any], words: str
) -> None:
    refuse(words, RunConfig(rounds=1).changed(changes), digits, None)


def test_a_test_set_of_other_classes_is_refused_by_file(own_folder: Path, digits: Samples) -> None:
    save_digits(own_folder / "test", np.arange(900, 910))
    words = r"In the test data, .*test/digit-\d/\d+\.png is of class 'digit-\d'.* No site has rows of that class"
    refuse(words, RunConfig(), digits, test_data="folder:test")


def test_a_test_set_of_classes_that_no_site_has_is_told_of(digits: Samples, caplog: pytest.LogCaptureFixture) -> None:
    seen = [row for row in range(300) if digits.labels[row] < 8]
    images = [digits.read(row) for row in range(300)]
    names = [digits.classes[label] for label in digits.labels[:300]]
    data = samples_from_arrays([images[row] for row in seen], [names[row] for row in seen])
    config = RunConfig(classes=list("0123456789"), rounds=0, simulation={"sites": 2, "partition": "iid"})
    simulate(config, data, test_data=samples_from_arrays(images, names))
    assert "classes that no site has any of, and no head can know: 8, 9." in caplog.text


def test_unreadable_files_are_skipped_and_counted_or_refused(own_folder: Path) -> None:
    save_digits(own_folder / "data", np.arange(100))
    broken = own_folder / "data" / "digit-3" / "0broken.png"
    broken.write_bytes(b"not an image")
    config = RunConfig(init="zeros", rounds=1, simulation={"data": "folder:data", "sites": 3})
    result = simulate(config)
    assert len(result.skipped) == result.summary()["rows_skipped"] == 1
    assert str(broken.relative_to(own_folder)) in next(iter(result.skipped.values()))
    strict = config.changed({"simulation": {"strict_data": True}})
    refuse("0broken.png", strict)


def test_a_run_that_fails_before_its_first_round_leaves_no_folder(digits: Samples, own_folder: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(RunConfig(), digits, 3, on_extraction=interrupt)
    with pytest.raises(KeyboardInterrupt):
        simulate(RunConfig(), digits, 3, on_extraction=interrupt, out="here")
    assert run_folders() == []
    assert not Path("here").exists() or not list(Path("here").iterdir())


def test_a_run_that_fails_later_keeps_what_it_has(digits: Samples) -> None:
    def interrupt(finished: Round) -> None:
        if finished.number == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(RunConfig(init="zeros", rounds=5), digits, 3, observers=[EachRound(interrupt)])
    (folder,) = run_folders()
    assert [line["number"] for line in lines_of(folder)] == [0, 1]
    assert {path.name for path in folder.iterdir()} == {
        "run.toml", "metrics.jsonl", "checkpoint", "journal.json", "report.html"
    }  # fmt: skip
    RunConfig.from_toml(folder / "run.toml")


def test_a_folder_in_use_is_refused_and_left_alone(digits: Samples) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("important")
    refuse("mine exists and is not an empty folder", RunConfig(rounds=1), digits, 3, out="mine")
    assert Path("mine/thesis.txt").read_text() == "important"
    assert len(list(Path("mine").iterdir())) == 1
    refuse("not an empty folder", RunConfig(rounds=1), digits, 3, out="mine/thesis.txt")


def test_an_empty_folder_may_be_given(digits: Samples) -> None:
    Path("empty").mkdir()
    assert simulate(RunConfig(init="zeros", rounds=0), digits, 3, out="empty").run_dir == Path("empty").resolve()


def test_texts_and_a_backbone_of_images_do_not_go_together(digits: Samples) -> None:
    texts = samples_from_texts(["to be", "or not", "to be"] * 20, ["a", "b", "a"] * 20)
    refuse("takes images, but the data contains texts", RunConfig(), texts, 3)
    refuse("takes images, but the data contains texts", RunConfig(), digits, 3, test_data=texts)


@pytest.mark.parametrize("out", ["file/run", "/sys/fedhead", "x" * 300, "/proc/nowhere/run"])
def test_a_folder_that_cannot_be_written_is_a_sentence(digits: Samples, out: str) -> None:
    Path("file").write_text("")
    refuse("cannot be written", RunConfig(rounds=1), digits, 3, out=out)


def test_two_runs_at_once_get_folders_of_their_own(digits: Samples) -> None:
    folders = {simulate(RunConfig(init="zeros", rounds=0), digits, 3).run_dir for _ in range(3)}
    assert len(folders) == 3


@pytest.mark.slow
def test_glyphnet_beats_pixels_where_labels_are_few() -> None:
    whole = load_samples("digits")
    order = np.random.default_rng(0).permutation(len(whole))
    test = some_digits(np.sort(order[1000:]), spec="test")
    for per_class, least in ((5, 0.72), (20, 0.86), (100, 0.94)):
        chosen = np.sort(
            np.concatenate([order[:1000][whole.labels[order[:1000]] == label][:per_class] for label in range(10)])
        )
        train = some_digits(chosen, spec=f"{per_class} per class")
        accuracies = {}
        for backbone in ("bundled:glyphnet", "bundled:pixels"):
            config = RunConfig(backbone=backbone, init="zeros", rounds=15, simulation={"partition": "iid", **UNGUARDED})
            accuracies[backbone] = simulate(config, train, 5, test_data=test).test_accuracy
        glyphnet, pixels = accuracies.values()
        assert glyphnet is not None
        assert pixels is not None
        assert glyphnet > max(pixels, least), (per_class, accuracies)


def test_the_model_is_calibrated_alike_under_any_partition(digits: Samples) -> None:
    runs = [
        simulate(
            RunConfig(rounds=0, simulation={"min_class_count": 0, "min_rows": 0, "partition": partition}),
            data=digits,
            sites=sites,
        )
        for partition, sites in (("iid", 1), ("iid", 7), ("dirichlet:0.1", 5))
    ]
    first, *others = (run.outcome.calibrated for run in runs)
    assert first is not None
    held_out = runs[0].evaluation.rows
    assert first.rows + first.figures["rows_judged_on"] == held_out
    assert runs[0].model.calibration.temperature == first.calibration.temperature
    for other in others:
        assert other is not None
        assert other.calibration.temperature == pytest.approx(first.calibration.temperature, rel=1e-4)
        assert (other.rows, sum(other.calibration.scores)) == (first.rows, sum(first.calibration.scores))


def test_a_class_that_nobody_holds_is_named_and_never_predicted(digits: Samples) -> None:
    classes = [*digits.classes, "ten"]
    result = simulate(RunConfig(rounds=2, classes=classes), data=digits, sites=3)
    assert result.model.unlearned == ("ten",)
    written = json.loads((result.run_dir / "evaluation.json").read_text())
    assert written["unlearned"] == ["ten"]
    assert TransferModel.load(result.run_dir).unlearned == ("ten",)
    probabilities = result.model.probabilities([digits.read(row) for row in range(50)])
    assert (probabilities[:, -1] == 0).all()


def test_sums_by_site_that_would_fill_the_disk_are_pooled_at_once(
    digits: Samples, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = RunConfig(rounds=1, simulation=UNGUARDED)
    kept = simulate(config, digits, 4)
    monkeypatch.setattr(fedhead.simulations.plan, "SUMS_BYTES", 1000)
    pooled = simulate(config, digits, 4)
    assert "Sites cannot join or leave" in caplog.text
    assert pooled.config.keep_sums == "total"
    assert not (folder_of(pooled) / "sums").exists()
    assert pooled.outcome.diagnoses == []
    assert kept.outcome.statistics is not None
    assert pooled.outcome.statistics is not None
    torch.testing.assert_close(pooled.outcome.statistics.gram(), kept.outcome.statistics.gram(), rtol=1e-10, atol=1e-8)
    assert torch.equal(pooled.outcome.statistics.counts, kept.outcome.statistics.counts)
    assert pooled.outcome.coverage == kept.outcome.coverage
    assert pooled.accuracy == kept.accuracy
    assert pooled.bytes_up < kept.bytes_up
    asked_for = simulate(config.changed({"keep_sums": "folder"}), digits, 4)
    assert (folder_of(asked_for) / "sums").exists()


def test_one_class_after_the_guards_is_said_before_the_run(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    samples = samples_from_arrays(images, ["common"] * 54 + ["rare"] * 6)
    config = RunConfig(rounds=0, simulation={"partition": "iid", "min_rows": 0})
    with pytest.raises(UserError, match="Only the class 'common' is left to learn: the guards of all sites withhold"):
        simulate(config, samples, 3, out=tmp_path / "run")
    simulate(config.changed({"simulation": {"min_class_count": 1}}), samples, 3, out=tmp_path / "other")


def test_a_site_that_is_refused_once_it_has_the_weights_says_why(digits: Samples) -> None:
    rows = [range(len(digits) - 10), range(len(digits) - 10, len(digits))]
    result = simulate(RunConfig(weights="random", rounds=0), digits, rows)
    assert list(result.outcome.refused) == ["site-1"]
    assert "guard lets nothing leave" in result.outcome.refused["site-1"]
