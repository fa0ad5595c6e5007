"""The model card: the report's account of a run's model, as Markdown for the Hugging Face hub.

The format: https://huggingface.co/docs/hub/model-cards
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedhead.data.items import ITEMS, Kind
from fedhead.files import write_atomically
from fedhead.model import BACKBONE_FILE, MODEL_FILE
from fedhead.server.report.about import about
from fedhead.server.report.layout import Figure, Section, Table
from fedhead.server.report.personal import ADAPTERS
from fedhead.server.report.privacy import solver_of
from fedhead.server.report.quality import calibration, quality
from fedhead.server.report.releases import releases
from fedhead.server.report.subgroups import subgroups
from fedhead.server.report.worth import worth
from fedhead.server.runs.record import RunRecord
from fedhead.wording import counted, listed, without_controls

CARD = "MODEL_CARD.md"

HUB_LICENCES = (
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "mpl-2.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "cc0-1.0"),
    *("cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "openrail"),
)
"""The hub's identifiers of backbones' licences."""

_HUB_METRIC = {"r2": "r_squared"}
_HUB_KINDS = {"table": "tabular"}
"""The hub's identifiers of metrics and of kinds of data."""

_ITEM = {"image": "image", "text": "text", "table": "row", "audio": "clip"}

_MOST_ROWS = 100
_MOST_CLASSES = 50

_MARKS = re.compile(r"([\\`*_\[\]<>|~$&])")
_UNPRINTABLE = re.compile("[\x7f-\xa0\u2028\u2029\ufeff\ufffe\uffff\ud800-\udfff]")


def write_card(run_dir: Path) -> Path | None:
    """Write the card of a run's model beside it and return its path; None while there is no model.

    Raises:
        UserError: if there is no run in the folder or the file cannot be written.
        FedheadError: if the folder's files are damaged or the disk is full.
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
    return without_controls("\n\n".join(part for part in parts if part) + "\n")


# Metadata for the hub.


def _metadata(record: RunRecord) -> dict[str, Any]:
    task = f"{_HUB_KINDS.get(_kind(record), _kind(record))}-{record.task.family}"
    spec = str(record.config.get("backbone", ""))
    licence = _licence(record).partition(",")[0].strip().lower()
    found: dict[str, Any] = {
        "library_name": "fedhead",
        "pipeline_tag": task,
        "tags": ["federated-learning", "transfer-learning", "fedhead", "flower"],
        "metrics": [_HUB_METRIC.get(record.task.score_name, record.task.score_name)],
    }
    if licence in HUB_LICENCES:
        found = {"license": licence, **found}
    if base := _on_the_hub(spec):
        found["base_model"] = base
    if results := _results(record, task):
        found["model-index"] = [{"name": record.name, "results": results}]
    return found


def _on_the_hub(spec: str) -> str:
    """Return the hub's name of a backbone; empty for backbones that are not on the hub or come from a folder."""
    source, _, name = spec.partition(":")
    name = name.partition("?")[0]
    if source == "timm":
        return f"timm/{name}"
    return name if source == "hf" and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists() else ""


def _results(record: RunRecord, task: str) -> list[dict[str, Any]]:
    results, title = [], record.task.score_title
    if record.pooled:
        metrics = [
            {"type": kind, "value": value, "name": name + _with_interval(record.pooled[figure])}
            for kind, figure, name in (
                (_HUB_METRIC.get(record.task.score_name, record.task.score_name), record.task.score_name, title),
                ("balanced_accuracy", "balanced_accuracy", "Balanced accuracy"),
                ("roc_auc", "auroc", "AUROC, mean over classes"),
            )
            if (value := (record.pooled.get(figure) or [None])[0]) is not None
        ]
        results.append(
            _result(
                task,
                f"held-out {record.task.row_name}s of {counted(record.num_evaluated, 'site')}",
                "held-out",
                metrics,
            )
        )
    if record.noisy:
        name = f"{title}, with noise for differential privacy" + _with_interval(record.noisy["accuracy"])
        metrics = [{"type": "accuracy", "value": record.noisy["accuracy"][0], "name": name}]
        results.append(
            _result(
                task, f"held-out {record.task.row_name}s of {counted(record.num_sites, 'site')}", "held-out", metrics
            )
        )
    tested = record.tested
    if tested is not None:
        kind = _HUB_METRIC.get(record.task.score_name, record.task.score_name)
        metrics = [{"type": kind, "value": tested, "name": title}]
        results.append(_result(task, "a pooled test set, separate from all sites", "test-set", metrics))
    return results


def _result(task: str, data: str, kind: str, metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"task": {"type": task}, "dataset": {"name": data, "type": kind}, "metrics": list(metrics)}


def _with_interval(figure: Sequence[float | None]) -> str:
    _, low, high = figure
    return "" if low is None or high is None else f" (95 % interval {low:.3f} to {high:.3f})"


def _front_matter(values: Mapping[str, Any]) -> str:
    """Return YAML of plain values; every text is quoted, since names of sites and classes may contain anything."""
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
    """Return a text or number as JSON, which YAML also reads, except for a few characters."""
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))


# Text for readers.


def _title(record: RunRecord) -> str:
    if record.headless:
        return f"{record.name}: {record.config.get('backbone', '')}"
    columns = record.outputs
    return f"{record.name}: {columns} on {record.config.get('backbone', '')}"


def _what(record: RunRecord) -> list[str]:
    config = record.config
    made = "trained by federated transfer learning with fedhead, from sums and heads of"
    if solved := solver_of(record.evaluation.get("privacy")):
        made = f"solved with fedhead by {solved}, of"
    frozen, trained = "frozen ", "The head was"
    if record.tuned:
        frozen, trained = "", f"The head and the layers {record.tuned!r} of the backbone were"
    if record.headless:
        adapters = f"with adapters {record.tuned!r} added to its weights" if record.tuned else "without adapters"
        said = [
            f"{_does(record)}: {config.get('backbone', '')} {adapters}, trained on the answers in conversations by "
            f"federated learning with fedhead at {counted(record.num_sites, 'site')}; no conversation left its site."
        ]
        return ["## What it is", *map(_plain, said)]
    said = [
        f"{_does(record)}: a {config.get('head', '')} head on the {frozen}backbone {config.get('backbone', '')} (layer "
        f"{config.get('layer', '')}). {trained} {made} {counted(record.num_sites, 'site')}; no "
        f"{_ITEM[_kind(record)]} left its site.",
        f"{record.task.output_names[1].capitalize()}: {listed(record.task.shown(record.classes), _MOST_CLASSES)}.",
    ]
    if (record.evaluation.get("personal") or {}).get("mode") == "adapters":
        said.append(ADAPTERS)
    if change := record.result and record.result.membership:
        verb = "left" if change.get("action") == "leave" else "joined"
        said.append(
            f"Since the run, {change.get('site')} {verb} and the head was recomputed. The figures below are from "
            "the run, before that change."
        )
    return ["## What it is", *map(_plain, said)]


def _does(record: RunRecord) -> str:
    if record.task.name == "survival":
        return f"A survival model with {record.outputs} on {ITEMS[_kind(record)]}"
    if record.headless:
        return "A language model that answers"
    if record.task.name == "tagging":
        return f"A tagger of the words of texts, with {record.outputs}"
    if record.real:
        return f"A regression of {counted(len(record.classes), 'target')} on {ITEMS[_kind(record)]}"
    if record.task.dense:
        return f"A {record.task.name} of {ITEMS[_kind(record)]} with {record.outputs}"
    answers = "one of" if record.one_class else "any number of"
    return (
        f"A classifier of {ITEMS[_kind(record)]}, each of {answers} {counted(len(record.classes), 'class', 'classes')}"
    )


def _use_and_limits(record: RunRecord) -> list[str]:
    kind = _kind(record)
    article, item = "an" if kind == "image" else "a", _ITEM[kind]
    said = [f"For {ITEMS[kind]} similar to those at the sites. The figures below describe these sites only."]
    if record.one_class:
        said.append(f"It knows no other class: it also assigns one of these to {article} {item} of any other kind.")
    if record.headless:
        said += [
            "Its answers can be wrong, and repeat what the sites' conversations contain. Perplexity measures how well "
            "it predicts their answers, and neither truth nor harm.",
            "Adapters of several rounds can reproduce parts of single conversations; nothing prevents that here.",
        ]
        return ["## Intended use and limits", _items(said)]
    if record.task.name == "survival":
        said += [
            "Sites with few events have wide intervals; check them before relying on a figure.",
            "It assumes that rows were lost to follow-up for reasons unrelated to their risk, and that one effect of "
            "the features holds at all times; it predicts nothing beyond its last time.",
        ]
        return ["## Intended use and limits", _items(said)]
    if record.real:
        said += [
            "Sites with few rows have wide intervals; check them before relying on a figure.",
            "A linear head extrapolates: its values are unreliable outside the range of the sites' rows.",
        ]
        return ["## Intended use and limits", _items(said)]
    if record.task.dense:
        said += [
            "Classes and sites with few items have wide intervals; check them before relying on a figure.",
            f"It was solved on {ITEMS[kind]} at one resolution: objects much smaller or larger than at the sites may "
            "be missed.",
        ]
        return ["## Intended use and limits", _items(said)]
    said += [
        "Classes and sites with few rows have wide intervals; check them before relying on a figure.",
        "Probabilities assume the class frequencies of the sites' data.",
    ]
    return ["## Intended use and limits", _items(said)]


def _how_to_use(record: RunRecord) -> list[str]:
    kind = _kind(record)
    if record.headless:
        commands = 'fedhead generate . "Where is my card?"\nfedhead evaluate . --data jsonl:conversations.jsonl'
        peft = "\nfedhead export . --format peft" if record.tuned else ""
        return ["## How to use it", "In this folder, with fedhead installed:", _code("sh", commands + peft)]
    every, one = {
        "image": ("'scans/**/*.png'", "new.png"),
        "text": ("letters/", "letter.txt"),
        "audio": ("recordings/", "new.wav"),
    }.get(kind, ("new.csv", ""))
    item = f'Path("{one}")' if one else "{name: 0.0 for name in model.backbone.preprocessing.columns}"
    return [
        "## How to use it",
        "In this folder, with fedhead installed:",
        _code("sh", f"fedhead predict . {f'{one} {every}'.strip()} --all\nfedhead export . --format onnx"),
        _code(
            "python",
            f'from pathlib import Path\n\nfrom fedhead import TransferModel\n\nmodel = TransferModel.load(".")\n'
            f"print(model.predict([{item}]))",
        ),
        f"`{MODEL_FILE}` contains the head, the classes, the temperature, and the backbone's digests. The backbone's "
        f"weights are read from `{BACKBONE_FILE}` beside it if present, or else from this machine. Loading executes "
        "no pickle and no code from these files.",
    ]


def _data(record: RunRecord) -> list[str]:
    rows = sum(one["rows"] for one in record.evaluation.get("coverage", ()))
    known = f" They trained on {counted(rows, 'row')}." if rows else ""
    said = f"The private rows of {counted(record.num_sites, 'site')}, which never left the sites.{known}"
    classes = [
        [one["name"], str(one["rows"]), str(one["sites"])] for one in record.evaluation.get("coverage", ()) if rows
    ]
    parts = ["## Training data", _plain(said)]
    return [*parts, _table(Table(["class", "training rows", "sites"], classes))] if classes else parts


def _evaluation(record: RunRecord) -> list[str]:
    section = quality(record)
    parts = ["## Evaluation", _plain(section.answer)]
    parts.append(_items([said for said in section.sentences if said not in calibration(record)]))
    columns = ("class", "target", "site")
    parts += [_table(_of(section, column)) for column in columns if _of(section, column).rows]
    if divided := subgroups(record):
        parts += ["### By subgroup", _plain(divided.answer), _table(divided.tables[0][1])]
    return [*parts, "### Against each site's own head", _plain(worth(record).answer)]


def _of(section: Section, column: str) -> Table:
    """Return the table by class, or by site, from a section's figures."""
    found: list[Figure] = [figure for figure in section.figures if figure.table.columns[0] == column]
    return found[0].table if found else Table([column], [])


def _calibration(record: RunRecord) -> list[str]:
    said = calibration(record) or ["Unknown: no rows were held out for calibration."]
    return ["## Calibration", *map(_plain, said)]


def _unlearned(record: RunRecord) -> list[str]:
    if record.real or record.headless or record.task.name == "survival":
        return []
    names = record.evaluation.get("unlearned", ())
    if record.private:
        return [
            "## Unlearned classes",
            "Unknown: under differential privacy, sites do not disclose whether a class has rows.",
        ]
    said = "None: every class had rows at some site."
    if names:
        said = f"No site had rows of: {listed(names, _MOST_CLASSES)}. They are never predicted."
    return ["## Unlearned classes", _plain(said)]


def _protection(record: RunRecord) -> list[str]:
    section = releases(record)
    return ["## Data that left the sites, and its protection", _plain(section.answer), _items(section.sentences)]


def _backbone(record: RunRecord) -> list[str]:
    wanted = ("Backbone", "Layer", "Weights digest", "Backbone digest", "Preprocessing")
    facts = [(name, value) for name, value in about(record).facts if name.startswith(wanted)]
    if record.tuned:
        by = f" by {record.objective}" if record.objective else ""
        facts.append(("Tuned", f"{record.tuned}{by}; the digests are those of the pretrained backbone"))
    return ["## Backbone", _table(Table(["", ""], [list(fact) for fact in facts], words=(0, 1)))]


def _reproduction(record: RunRecord) -> list[str]:
    command = "fedhead simulate run.toml" if record.journal.simulated else "fedhead server run.toml --kit KIT"
    versions = ", ".join(f"{name} {version}" for name, version in record.journal.versions.items())
    return [
        "## Reproduction",
        f"With {_plain(versions)} and the same rows at the same sites:" if versions else "",
        _code("sh", command),
        _code("toml", record.toml.strip()),
    ]


def _kind(record: RunRecord) -> Kind:
    return record.journal.backbone.kind


def _licence(record: RunRecord) -> str:
    return record.journal.backbone.licence


def _plain(text: str) -> str:
    """Return a text as one line, with Markdown and HTML escaped."""
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
