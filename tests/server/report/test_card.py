import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fedhead.cli import app
from fedhead.config import RunConfig
from fedhead.data import load_samples, samples_from_arrays
from fedhead.server.report.card import render_card, write_card
from fedhead.server.runs.record import RunRecord
from fedhead.simulations import simulate

yaml = pytest.importorskip("yaml")

SECTIONS = [
    "What it is",
    "Intended use and limits",
    "How to use it",
    "Training data",
    "Evaluation",
    "Calibration",
    "Unlearned classes",
    "Data that left the sites, and its protection",
    "Backbone",
    "Reproduction",
]


def run_with(classes: Sequence[str], out: Path, **settings: Any) -> Path:
    """Run on a few digits, whose classes are named as told; only the first three have rows."""
    digits = load_samples("digits")
    rows = np.flatnonzero(digits.labels < 3)[:240]
    data = samples_from_arrays([digits.read(row) for row in rows], digits.labels[rows], classes=classes)
    simulate(RunConfig(rounds=1, **settings), data, 2, out=out)
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_with(["nought", "one", "two", "three"], tmp_path_factory.mktemp("runs") / "digits")


def front_matter(card: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))
    return values


def test_every_run_writes_a_card_consistent_with_its_report(run: Path) -> None:
    card = (run / "MODEL_CARD.md").read_text()
    assert re.findall(r"^## (.*)$", card, re.MULTILINE) == SECTIONS
    evaluation = json.loads((run / "evaluation.json").read_text())
    journal = json.loads((run / "journal.json").read_text())
    assert "Release steps: The guard withholds classes with fewer than" in card
    value, low, high = evaluation["pooled"]["accuracy"]
    assert f"Accuracy is {100 * value:.1f} % ({100 * low:.1f}\N{EN DASH}{100 * high:.1f}) on" in card
    for when in ("before", "after"):
        assert f"{100 * evaluation['calibration'][when]['reliability']['error']:.1f} %" in card
    assert "No site had rows of: three. They are never predicted." in card
    for digest in ("digest", "weights_digest"):
        assert journal["backbone"][digest] in card
    assert "Neither secure summation nor noise was on" in card
    assert (run / "run.toml").read_text().strip() in card
    trained = sum(one["rows"] for one in evaluation["coverage"])
    assert f"They trained on {trained} rows." in card


def test_front_matter_follows_the_hubs_format(run: Path) -> None:
    values = front_matter((run / "MODEL_CARD.md").read_text())
    assert values["license"] == "apache-2.0"
    assert (values["library_name"], values["pipeline_tag"]) == ("fedhead", "image-classification")
    accuracy = json.loads((run / "evaluation.json").read_text())["pooled"]["accuracy"][0]
    assert values["model-index"][0]["results"][0]["metrics"][0]["value"] == accuracy


def test_hub_library_reads_the_card(run: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard.load(run / "MODEL_CARD.md")
    assert isinstance(card.data, hub.ModelCardData)
    assert (card.data.license, card.data.model_name) == ("apache-2.0", "digits")
    metrics = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert metrics["accuracy"] == json.loads((run / "result.json").read_text())["accuracy"]
    assert metrics.keys() == {"accuracy", "balanced_accuracy", "roc_auc"}
    assert front_matter(str(card)) == front_matter((run / "MODEL_CARD.md").read_text())


def test_hostile_names_are_harmless(tmp_path: Path) -> None:
    hostile = [
        "a: [b]\n---\n# c",
        '"|x|`y`<script>alert(1)</script>',
        "{{ 7*7 }}\x7f\u2028\u0085 **d** ```",
        "$e$ é 🌷",
    ]
    card = (run_with(hostile, tmp_path / 'run: "it\'s" # 1') / "MODEL_CARD.md").read_text()
    assert front_matter(card)["model-index"][0]["name"] == 'run: "it\'s" # 1'
    prose, _, code = card.partition("## Reproduction")
    assert re.findall(r"^## (.*)$", prose, re.MULTILINE) == SECTIONS[:-1]
    assert re.findall(r"^---$", prose, re.MULTILINE) == ["---", "---"]
    assert not re.search(r"(?<!\\)<script", prose)
    rows = [line for line in prose.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in rows} <= {3, 4, 6}
    fence = re.findall(r"^(`{3,})toml$", code, re.MULTILINE)[0]
    assert len(fence) > 3
    assert code.count(f"\n{fence}\n") == 1


@pytest.mark.parametrize("name", ["\ud800", "\x7f\x80\u2029\ufeff\ufffe\uffff", "yes", "1e3", "~", "é🌷", "a\tb\n"])
def test_any_text_round_trips_through_the_front_matter(name: str, run: Path) -> None:
    record = RunRecord(**{**vars(RunRecord.read(run)), "name": name})
    card = render_card(record)
    read = yaml.load(card.split("\n---\n")[0].removeprefix("---\n"), yaml.SafeLoader)
    assert read["model-index"][0]["name"] == name


@pytest.mark.parametrize(
    ("spec", "licence", "base", "told"),
    [
        ("timm:resnet18.a1_in1k", "apache-2.0", "timm/resnet18.a1_in1k", "apache-2.0"),
        (
            "hf:sentence-transformers/all-MiniLM-L6-v2?max_length=64",
            "unknown",
            "sentence-transformers/all-MiniLM-L6-v2",
            None,
        ),
        ("hf:/models/minilm", "unknown", None, None),
        ("torchvision:vgg16", "code BSD-3-Clause; the weights' terms follow the data", None, None),
    ],
)
def test_licence_and_base_model(spec: str, licence: str, base: str | None, told: str | None, run: Path) -> None:
    record = RunRecord.read(run)
    backbone = record.journal.backbone.model_copy(update={"licence": licence})
    journal = record.journal.model_copy(update={"backbone": backbone})
    changed = RunRecord(**{**vars(record), "config": {**record.config, "backbone": spec}, "journal": journal})
    values = front_matter(render_card(changed))
    assert (values.get("base_model"), values.get("license")) == (base, told)


def test_card_of_a_run_without_held_out_rows(tmp_path: Path) -> None:
    card = (run_with(["a", "b", "c"], tmp_path / "run", holdout=0.0) / "MODEL_CARD.md").read_text()
    assert "model-index" not in front_matter(card)
    assert "Unknown: no rows are held out" in card
    assert "Unknown: no rows were held out for calibration." in card


def test_no_card_without_a_model(run: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(run, half)
    for name in ("MODEL_CARD.md", "result.json"):
        (half / name).unlink()
    assert write_card(half) is None
    assert not (half / "MODEL_CARD.md").exists()


def test_card_after_a_site_leaves_and_in_an_export(run: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(run, changed)
    told = CliRunner().invoke(app, ["leave", str(changed), "--site", "site-0"])
    assert told.exit_code == 0, told.output
    card = (changed / "MODEL_CARD.md").read_text()
    assert "Since the run, site-0 left and the head was recomputed." in card
    exported = CliRunner().invoke(
        app, ["export", str(changed), "--format", "fedhead", "--out", str(tmp_path / "taken")]
    )
    assert exported.exit_code == 0, exported.output
    assert (tmp_path / "taken" / "MODEL_CARD.md").read_text() == card
