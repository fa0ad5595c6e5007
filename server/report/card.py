"""The model card: what the report says of a run's model, in the Markdown that the Hugging Face hub reads.

The format: https://huggingface.co/docs/hub/model-cards
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedhead.files import write_atomically
from fedhead.model import BACKBONE_FILE, MODEL_FILE
from fedhead.server.report.about import about
from fedhead.server.report.layout import Figure, Section, Table
from fedhead.server.report.quality import calibration, quality
from fedhead.server.report.record import RunRecord
from fedhead.server.report.releases import releases
from fedhead.server.report.worth import worth
from fedhead.wording import counted, listed

CARD = "MODEL_CARD.md"

HUB_LICENCES = (
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "mpl-2.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "cc0-1.0"),
    *("cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "openrail"),
)
"""The hub's own names of licences that backbones have."""

_MOST_ROWS = 100
_MOST_CLASSES = 50

_MARKS = re.compile(r"([\\`*_\[\]<>|~$&])")
_UNPRINTABLE = re.compile("[\x7f-\xa0\u2028\u2029\ufeff\ufffe\uffff\ud800-\udfff]")


def write_card(run_dir: Path) -> Path | None:
    """Write the card of a run's model beside it, and return where it is; None while there is no model.

    Raises:
        UserError: if there is no run in the folder, or the file may not be written.
        FedheadError: if the folder's files are damaged, or the disk is full.
    """
    record = RunRecord.read(run_dir)
    if record.kept_round < 0 or not (run_dir / MODEL_FILE).is_file():
        return None
    path = run_dir / CARD
    write_atomically(path, render_card(record))
    return path


def render_card(record: RunRecord) -> str:
    """Return the card of a finished run's model."""
    parts = [
        _front_matter(_metadata(record)),
        f"# {_plain(_title(record))}",
        *_what(record),
        *_use_and_limits(record),
        *_how_to_use(record),
        *_data(record),
        *_evaluation(record),
        *_calibration(record),
        *_unlearned(record),
        *_protection(record),
        *_backbone(record),
        *_reproduction(record),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


# What the hub reads.


def _metadata(record: RunRecord) -> dict[str, Any]:
    task = f"{_kind(record)}-classification"
    spec = str(record.config.get("backbone", ""))
    licence = _licence(record).partition(",")[0].strip().lower()
    found: dict[str, Any] = {
        "library_name": "fedhead",
        "pipeline_tag": task,
        "tags": ["federated-learning", "transfer-learning", "fedhead", "flower"],
        "metrics": ["accuracy"],
    }
    if licence in HUB_LICENCES:
        found = {"license": licence, **found}
    if base := _on_the_hub(spec):
        found["base_model"] = base
    if results := _results(record, task):
        found["model-index"] = [{"name": record.name, "results": results}]
    return found


def _on_the_hub(spec: str) -> str:
    """Return the hub's name of a backbone; empty for one that it does not have, or that a folder holds."""
    source, _, name = spec.partition(":")
    name = name.partition("?")[0]
    if source == "timm":
        return f"timm/{name}"
    return name if source == "hf" and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists() else ""


def _results(record: RunRecord, task: str) -> list[dict[str, Any]]:
    results = []
    if record.pooled:
        metrics = [
            {"type": kind, "value": value, "name": name + _with_interval(record.pooled[figure])}
            for kind, figure, name in (
                ("accuracy", "accuracy", "All labels right" if record.multi_label else "Accuracy"),
                ("balanced_accuracy", "balanced_accuracy", "Balanced accuracy"),
                ("roc_auc", "auroc", "AUROC, mean over classes"),
            )
            if (value := (record.pooled.get(figure) or [None])[0]) is not None
        ]
        results.append(_result(task, f"held-out rows of {counted(len(record.sites), 'site')}", "held-out", metrics))
    tested = record.result.get("accuracy_test")
    if tested is not None:
        metrics = [{"type": "accuracy", "value": tested, "name": "Accuracy"}]
        results.append(_result(task, "a pooled test set that no site holds", "test-set", metrics))
    return results


def _result(task: str, data: str, kind: str, metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"task": {"type": task}, "dataset": {"name": data, "type": kind}, "metrics": list(metrics)}


def _with_interval(figure: Sequence[float | None]) -> str:
    _, low, high = figure
    return "" if low is None or high is None else f" (95 % interval {low:.3f} to {high:.3f})"


def _front_matter(values: Mapping[str, Any]) -> str:
    """Return YAML of plain values; every text is quoted, since a site's or a class's name may be anything."""
    return "\n".join(["---", *_yaml(values, ""), "---"])


def _yaml(value: Any, indent: str) -> list[str]:
    lines = []
    for key, one in value.items():
        if isinstance(one, Mapping):
            lines += [f"{indent}{key}:", *_yaml(one, indent + "  ")]
        elif isinstance(one, list):
            lines.append(f"{indent}{key}:")
            for item in one:
                below = _yaml(item, indent + "    ") if isinstance(item, Mapping) else [f"{indent}    {_scalar(item)}"]
                lines += [f"{indent}  - {below[0].lstrip()}", *below[1:]]
        else:
            lines.append(f"{indent}{key}: {_scalar(one)}")
    return lines


def _scalar(value: Any) -> str:
    """Return a text or number in JSON's quotes, which YAML reads, too, but for a few characters."""
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))


# What people read.


def _title(record: RunRecord) -> str:
    return f"{record.name}: {counted(len(record.classes), 'class', 'classes')} on {record.config.get('backbone', '')}"


def _what(record: RunRecord) -> list[str]:
    config = record.config
    answers = "any number of" if record.multi_label else "one of"
    said = [
        f"A classifier of {_kind(record)}s, each of {answers} {counted(len(record.classes), 'class', 'classes')}: a "
        f"{config.get('head', '')} head on the frozen backbone {config.get('backbone', '')} (layer "
        f"{config.get('layer', '')}). The head was made by federated transfer learning with fedhead, from sums and "
        f"heads of {counted(record.num_sites, 'site')}; no {_kind(record)} left its site.",
        f"Classes: {listed(record.classes, _MOST_CLASSES)}.",
    ]
    if change := record.result.get("membership"):
        verb = "left" if change.get("action") == "leave" else "joined"
        said.append(
            f"Since the run, {change.get('site')} {verb} and the head was solved again. The figures below are those of "
            "the run, before that."
        )
    return ["## What it is", *map(_plain, said)]


def _use_and_limits(record: RunRecord) -> list[str]:
    kind = _kind(record)
    article = "an" if kind == "image" else "a"
    said = [
        f"For {kind}s like those that the sites hold. The figures below say how it does there; of a place that took no "
        "part they say nothing."
    ]
    if not record.multi_label:
        said.append(f"It knows no other class: {article} {kind} of something else is given one of these all the same.")
    said += [
        "Classes and sites with few rows have wide intervals; look at them before you rely on a figure.",
        "A probability is meant for data with the sites' shares of the classes.",
    ]
    return ["## Intended use and limits", _items(said)]


def _how_to_use(record: RunRecord) -> list[str]:
    files = (
        "'scans/**/*.png'" if _kind(record) == "image" else "letters/",
        "new.png" if _kind(record) == "image" else "letter.txt",
    )
    return [
        "## How to use it",
        "In the folder of this card, with fedhead installed:",
        _code("sh", f"fedhead predict . {files[1]} {files[0]} --all\nfedhead export . --format onnx"),
        _code(
            "python",
            f'from pathlib import Path\n\nfrom fedhead import TransferModel\n\nmodel = TransferModel.load(".")\n'
            f'print(model.predict([Path("{files[1]}")]))',
        ),
        f"`{MODEL_FILE}` holds the head, the classes, the temperature, and the backbone's digests. The backbone's "
        f"weights come from `{BACKBONE_FILE}` beside it, where that is there, or else from the machine. Loading runs "
        "no pickle and no code of these files.",
    ]


def _data(record: RunRecord) -> list[str]:
    rows = sum(one["rows"] for one in record.evaluation.get("coverage", ()))
    known = f" They trained on {counted(rows, 'row')}." if rows else ""
    said = f"The private rows of {counted(record.num_sites, 'site')}, which stay there.{known}"
    classes = [
        [one["name"], str(one["rows"]), str(one["sites"])] for one in record.evaluation.get("coverage", ()) if rows
    ]
    parts = ["## Training data", _plain(said)]
    return [*parts, _table(Table(["class", "training rows", "sites"], classes))] if classes else parts


def _evaluation(record: RunRecord) -> list[str]:
    section = quality(record)
    parts = ["## Evaluation", _plain(section.answer)]
    parts.append(_items([said for said in section.sentences if said not in calibration(record)]))
    parts += [_table(_of(section, column)) for column in ("class", "site") if _of(section, column).rows]
    return [*parts, "### Against each site's own head", _plain(worth(record).answer)]


def _of(section: Section, column: str) -> Table:
    """Return the numbers by class, or by site, of a section's figures."""
    found: list[Figure] = [figure for figure in section.figures if figure.table.columns[0] == column]
    return found[0].table if found else Table([column], [])


def _calibration(record: RunRecord) -> list[str]:
    said = calibration(record) or ["Unknown: no rows were held out to choose a temperature on."]
    return ["## Calibration", *map(_plain, said)]


def _unlearned(record: RunRecord) -> list[str]:
    names = record.evaluation.get("unlearned", ())
    said = "None: every class had rows at some site."
    if names:
        said = f"No site had rows of: {listed(names, _MOST_CLASSES)}. They are never predicted."
    return ["## Classes that were not learned", _plain(said)]


def _protection(record: RunRecord) -> list[str]:
    section = releases(record)
    return ["## What left the sites, and what protected it", _plain(section.answer), _items(section.sentences)]


def _backbone(record: RunRecord) -> list[str]:
    wanted = ("Backbone", "Layer", "Weights digest", "Backbone digest", "Preprocessing")
    facts = [(name, value) for name, value in about(record).facts if name.startswith(wanted)]
    return ["## Backbone", _table(Table(["", ""], [list(fact) for fact in facts], words=(0, 1)))]


def _reproduction(record: RunRecord) -> list[str]:
    command = "fedhead simulate run.toml" if record.journal.get("simulated") else "fedhead server run.toml --kit KIT"
    versions = ", ".join(f"{name} {version}" for name, version in record.journal.get("versions", {}).items())
    return [
        "## Reproduction",
        f"With {_plain(versions)}, and the same rows at the same sites:" if versions else "",
        _code("sh", command),
        _code("toml", record.toml.strip()),
    ]


def _kind(record: RunRecord) -> str:
    return str(record.journal.get("backbone", {}).get("kind", "image"))


def _licence(record: RunRecord) -> str:
    return str(record.journal.get("backbone", {}).get("licence", ""))


def _plain(text: str) -> str:
    """Return a text in one line, with nothing in it that Markdown or HTML would take for its own."""
    return _MARKS.sub(r"\\\1", " ".join(text.split()))


def _items(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {_plain(sentence)}" for sentence in sentences)


def _code(language: str, text: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _table(table: Table) -> str:
    lines = [table.columns, ["---" if place in table.words else "---:" for place in range(len(table.columns))]]
    lines += [[_plain(cell) for cell in row] for row in table.rows[:_MOST_ROWS]]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    hidden = len(table.rows) - _MOST_ROWS
    return f"{text}\n\n{hidden:,} more are in `evaluation.json`." if hidden > 0 else text
