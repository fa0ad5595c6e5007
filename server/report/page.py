"""The report as one HTML page: what a run folder says, laid out."""

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from fedhead.files import write_atomically
from fedhead.server.report.about import about
from fedhead.server.report.cost import PHASES, cost, seconds
from fedhead.server.report.fit import fit
from fedhead.server.report.layout import Section
from fedhead.server.report.quality import interval, quality
from fedhead.server.report.record import REPORT, RunRecord
from fedhead.server.report.releases import releases
from fedhead.server.report.worth import worth
from fedhead.wording import counted, duration, percent, size


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the report of a run folder, finished or not, and return where it is.

    Args:
        run_dir: the folder.
        out: the file; by default `report.html` in the folder.

    Raises:
        UserError: if there is no run in the folder, or the file may not be written.
        FedheadError: if the folder's files are damaged, or the disk is full.
    """
    page = render(RunRecord.read(run_dir))
    path = out or run_dir / REPORT
    write_atomically(path, page)
    return path


def render(record: RunRecord, *, live: bool = False) -> str:
    """Return the page.

    Args:
        record: what is known of the run.
        live: whether the page is served and keeps itself up to date.
    """
    return _template().render(
        title=f"fedhead: {record.name}",
        name=record.name,
        heading=_heading(record),
        status=record.status,
        status_words=record.status,
        subtitle=_subtitle(record),
        failure=record.journal.get("error", ""),
        progress=_progress(record),
        tiles=_tiles(record),
        sections=sections(record),
        style=Markup(resource("style.css")),
        live=live,
    )


def sections(record: RunRecord) -> list[Section]:
    """Return the report's answers in order."""
    return [
        quality(record),
        worth(record),
        cost(record),
        fit(record),
        releases(record),
        about(record),
    ]


@cache
def _template() -> Template:
    return Environment(autoescape=True, undefined=StrictUndefined).from_string(resource("page.html"))


def resource(name: str) -> str:
    """Return a file of the page."""
    return (files(__package__) / name).read_text(encoding="utf-8")


def _heading(record: RunRecord) -> str:
    classes = counted(len(record.classes), "class", "classes")
    return f"{classes}, {counted(record.num_sites, 'site')}, one backbone: {record.config.get('backbone', '')}"


def _subtitle(record: RunRecord) -> str:
    strategy = record.config.get("strategy", {}).get("name", "")
    rounds = counted(int(record.config.get("rounds", 0)), "round")
    parts = [f"{strategy}, {rounds}", record.name]
    if started := record.journal.get("started"):
        parts.append(str(started))
    step = str(record.journal.get("step", ""))
    if record.status == "running" and step:
        parts.insert(0, PHASES.get(step, step))
    return " · ".join(parts)


def _progress(record: RunRecord) -> tuple[int, int] | None:
    rounds = int(record.config.get("rounds", 0))
    return (len(record.rounds), rounds + 1) if record.status == "running" else None


def _tiles(record: RunRecord) -> list[tuple[str, str, str]]:
    tiles: list[tuple[str, str, str]] = []
    tested: Any = record.result.get("accuracy_test")
    if tested is not None:
        tiles.append(("Accuracy, test set", percent(tested), "delivered model"))
    if record.pooled:
        accuracy = record.pooled["accuracy"]
        name = "All labels right" if record.multi_label else "Accuracy, held out"
        tiles.append((name, percent(accuracy[0]), "95 %: " + interval(accuracy).partition("(")[2].rstrip(")")))
    elif record.accuracy is not None and tested is None:
        tiles.append(("Accuracy so far", percent(record.accuracy), "of the latest head"))
    refused = record.count("refused")
    tiles.append(("Sites", f"{record.num_sites:,}", f"{refused} refused" if refused else ""))
    tiles.append(_rounds_tile(record))
    tiles.append(("To sites", size(record.bytes_down), "payload"))
    tiles.append(("From sites", size(record.bytes_up), "payload"))
    tiles.append(("Time", duration(seconds(record)), "features included" if record.result.get("seconds") else ""))
    return tiles


def _rounds_tile(record: RunRecord) -> tuple[str, str, str]:
    rounds = int(record.config.get("rounds", 0))
    if record.status == "running" or record.kept_round < 0:
        done = max(len(record.rounds) - 1, 0)
        return ("Rounds", f"{done} of {rounds}", "")
    if record.kept_round == 0:
        return ("Exchange", "one" if rounds == 0 else f"0 of {rounds}", "the head solved from sums is kept")
    return ("Rounds", f"{rounds}", f"head of round {record.kept_round} is kept")
