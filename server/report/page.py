"""The report as one HTML page, rendered from a run folder."""

from functools import cache
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from fedhead.config import GENERATION
from fedhead.files import write_atomically
from fedhead.server.report.about import about
from fedhead.server.report.clusters import clusters
from fedhead.server.report.contributions import contributions
from fedhead.server.report.cost import PHASES, cost, seconds
from fedhead.server.report.fit import fit
from fedhead.server.report.layout import Section
from fedhead.server.report.personal import personal
from fedhead.server.report.privacy import solver_of
from fedhead.server.report.quality import interval, quality
from fedhead.server.report.releases import releases
from fedhead.server.report.scores import number_interval
from fedhead.server.report.subgroups import subgroups
from fedhead.server.report.worth import worth
from fedhead.server.runs.record import REPORT, RunRecord
from fedhead.wording import counted, duration, size, without_controls


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the report of a run folder, finished or not, and return its path.

    Args:
        run_dir: the folder.
        out: the file; by default `report.html` in the folder.

    Raises:
        UserError: if there is no run in the folder or the file cannot be written.
        FedheadError: if the folder's files are damaged or the disk is full.
    """
    page = render(RunRecord.read(run_dir))
    path = out or run_dir / REPORT
    write_atomically(path, page)
    return path


def render(record: RunRecord, *, live: bool = False) -> str:
    """Render the page.

    Args:
        record: the record of the run.
        live: whether the page is served and updates itself.
    """
    page = _template().render(
        title=f"fedhead: {record.name}",
        name=record.name,
        heading=_heading(record),
        status=record.status,
        status_words=record.status,
        subtitle=_subtitle(record),
        failure=record.journal.error,
        progress=_progress(record),
        tiles=_tiles(record),
        sections=sections(record),
        style=Markup(resource("style.css")),
        live=live,
    )
    return without_controls(page)


def sections(record: RunRecord) -> list[Section]:
    """Return the report's sections in order."""
    own, divided = personal(record), subgroups(record)
    return [
        *([found] if (found := clusters(record)) else [quality(record), worth(record)]),
        *([divided] if divided else []),
        *contributions(record),
        cost(record),
        fit(record),
        *([own] if own else []),
        releases(record),
        about(record),
    ]


@cache
def _template() -> Template:
    return Environment(autoescape=True, undefined=StrictUndefined).from_string(resource("page.html"))


def resource(name: str) -> str:
    """Return a static file of the page."""
    return (files(__package__) / name).read_text(encoding="utf-8")


def _heading(record: RunRecord) -> str:
    predicted = "A language model" if record.headless else record.outputs
    return f"{predicted}, {counted(record.num_sites, 'site')}, one backbone: {record.config.get('backbone', '')}"


def _subtitle(record: RunRecord) -> str:
    strategy = record.config.get("strategy", {}).get("name", "")
    rounds = counted(int(record.config.get("rounds", 0)), "round")
    parts = [f"{strategy}, {rounds}", record.name]
    if started := record.journal.started:
        parts.append(started)
    step = record.journal.step
    if record.status == "running" and step:
        phase = record.journal.phase
        parts.insert(0, PHASES.get(step, step) + (f" (secure sum: {phase})" if phase else ""))
    return " · ".join(parts)


def _progress(record: RunRecord) -> tuple[int, int] | None:
    rounds = int(record.config.get("rounds", 0))
    return (len(record.rounds), rounds + 1) if record.status == "running" else None


def _tiles(record: RunRecord) -> list[tuple[str, str, str]]:
    tiles: list[tuple[str, str, str]] = []
    title = record.task.score_title
    if record.tested is not None:
        tiles.append((f"{title}, test set", record.words(record.tested), "delivered model"))
    if record.pooled:
        score = record.pooled[record.task.score_name]
        worded = interval if record.task.score_name == "accuracy" else number_interval
        limits = worded(score).partition("(")[2].rstrip(")")
        name = title if title == "All labels correct" else f"{title}, held out"
        tiles.append((name, record.words(score[0]), f"95 %: {limits}" if limits else ""))
    elif record.noisy:
        limits = interval(record.noisy["accuracy"]).partition("(")[2].rstrip(")")
        tiles.append((f"{title}, with noise", record.words(record.noisy["accuracy"][0]), f"95 %: {limits}"))
    elif record.score is not None and record.tested is None:
        tiles.append((f"{title} so far", record.words(record.score), "latest head"))
    refused = record.count("refused")
    tiles.append(("Sites", f"{record.num_sites:,}", f"{refused} refused" if refused else ""))
    tiles.append(_rounds_tile(record))
    tiles.append(("To sites", size(record.bytes_down), "payload"))
    tiles.append(("From sites", size(record.bytes_up), "payload"))
    included = record.result is not None and bool(record.result.seconds)
    tiles.append(("Time", duration(seconds(record)), "features included" if included else ""))
    return tiles


def _rounds_tile(record: RunRecord) -> tuple[str, str, str]:
    rounds = int(record.config.get("rounds", 0))
    if record.status == "running" or record.kept_round < 0:
        done = max(len(record.rounds) - 1, 0)
        return ("Rounds", f"{done} of {rounds}", "")
    if record.kept_round == 0 and record.task.name == GENERATION:
        return ("Rounds", f"{rounds}", record.task.kept_words(0))
    if made := record.evaluation.get("privacy", {}).get("rounds"):
        return ("Rounds", f"{made}", "of noisy gradients")
    if record.kept_round == 0:
        solved = solver_of(record.evaluation.get("privacy"))
        kept = f"the head is {solved}" if solved else "the head solved from sums is kept"
        return ("Exchange", "one" if rounds == 0 else f"0 of {rounds}", kept)
    return ("Rounds", f"{rounds}", record.task.kept_words(record.kept_round))
