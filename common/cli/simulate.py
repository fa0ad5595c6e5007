"""`fedhead simulate`: many sites on this machine."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fedhead.cli import options
from fedhead.cli.application import app, in_sentences, output, progress_bars
from fedhead.cli.extras import extras
from fedhead.cli.figures import figure_table
from fedhead.cli.observers import watching
from fedhead.cli.settings import SettingsCommand, with_settings
from fedhead.cli.study import run_study
from fedhead.errors import UserError
from fedhead.wording import by_reason, counted, listed, percent, score_words, size

if TYPE_CHECKING:
    from fedhead.server.runs.history import Round
    from fedhead.simulations.result import RunResult

MOST_LINES = 26
MOST_DIAGNOSES = 8
MOST_NAMES = 8


_Seeds = Annotated[
    int, typer.Option(min=1, help="Number of seeds to run under; prints means.", rich_help_panel=options.STUDY)
]
_Sweep = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE,VALUE",
        help="Setting and values to compare, as in partition=iid,dirichlet:0.3; repeatable.",
        rich_help_panel=options.STUDY,
    ),
]
_Csv = Annotated[
    Path | None, typer.Option(help="CSV file to write, with a line for each run.", rich_help_panel=options.STUDY)
]
_Baseline = Annotated[
    str | None,
    typer.Option(help="Backbone to compare with, as in bundled:pixels.", rich_help_panel=options.OUTPUT),
]
_Attack = Annotated[
    str | None,
    typer.Option(
        metavar="[membership|audit]",
        help="Attack to try on heads like the run's, or an audit of a private run's epsilon, for the report.",
        rich_help_panel=options.OUTPUT,
    ),
]


@app.command(
    cls=SettingsCommand,
    epilog="Example: [bold]fedhead simulate run.toml --sites 20 --partition dirichlet:0.1 --set local.lr=0.05[/bold]",
)
@in_sentences
@with_settings(simulation=None)
def simulate(
    settings: dict[str, Any],
    config: options.ConfigFile = None,
    set_: options.Assignments = None,
    seeds: _Seeds = 1,
    sweep: _Sweep = None,
    csv: _Csv = None,
    out: options.RunFolder = None,
    baseline: _Baseline = None,
    attack: _Attack = None,
    resume: options.Resume = None,
    dashboard: options.Dashboard = "",
    dashboard_anywhere: options.DashboardAnywhere = False,
    track: options.Track = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Simulate many sites on this machine: a frozen backbone, private rows, shared heads."""
    from fedhead import simulations
    from fedhead.server.observer import EachRound

    if attack not in (None, "membership", "audit"):
        raise UserError(f"There is no attack {attack!r}, only 'membership' and 'audit'.")
    path, out = options.run_to_resume(resume, config, out)
    run = options.run_config(path, set_, settings)
    if seeds > 1 or sweep or csv:
        run_study(run, seeds, sweep or [], out, csv, as_json=as_json)
        return
    watched = watching(dashboard, anywhere=dashboard_anywhere, track=track)
    with watched as observers, progress_bars() as progress:
        extraction = progress.add_task("Features", total=None)
        training = progress.add_task("Rounds", total=run.rounds)
        result = simulations.simulate(
            run,
            out=out,
            resume=resume is not None,
            baseline=baseline,
            attack=cast(Literal["", "membership", "audit"], attack or ""),
            on_extraction=lambda done, total: progress.update(extraction, completed=done, total=total),
            observers=[EachRound(lambda finished: progress.update(training, completed=finished.number)), *observers],
        )
    if as_json:
        typer.echo(json.dumps(result.summary()))
    else:
        _print_result(result, output())


def _print_result(result: "RunResult", console: Console) -> None:
    console.print(_history_table(result))
    if 0 < len(result.config.classes) <= MOST_LINES and result.sites:
        console.print(figure_table(result.evaluation, f"Held-out {result.task.row_name}s: "))
    lines = Table.grid(padding=(0, 2))
    if rows := result.outcome.clusters.get("rows"):
        lines.add_row("Clusters", f"{len(rows)}, of {', '.join(map(str, rows))} rows; name them: fedhead cluster name")
    else:
        score = _score(result) or "unknown: nothing is held out, and there is no test set"
        lines.add_row(result.task.score_title, score)
    _add_head(lines, result)
    if result.outcome.attack:
        from fedhead.server.report.privacy import attack_sentences

        lines.add_row("Attack", "\n".join(attack_sentences(result.outcome.attack)))
    _add_cost(lines, result)
    _add_diagnosis(lines, result)
    for question, answer in extras(result):
        lines.add_row(question, answer)
    if (made := result.outcome.personal) is not None and made.pooled is not None:
        shares = {name: percent(right / made.pooled.rows) for name, right in made.pooled.right.items()}
        lines.add_row("Own heads", ", ".join(f"{name} {share}" for name, share in shares.items()))
    if result.empty_sites:
        lines.add_row("No rows", f"{counted(len(result.empty_sites), 'site')}: {', '.join(result.empty_sites)}")
    for reason, refused in by_reason(result.outcome.refused).items():
        lines.add_row("Refused", f"{listed(refused, MOST_NAMES)}: {reason}")
    lines.add_row("Run folder", str(result.run_dir))
    console.print(lines, highlight=False)


def _score(result: "RunResult") -> str:
    """Return the scores on the test set and on held-out rows, in words; empty if there are none."""
    name, said = result.task.score_name, ""
    if result.test_score is not None:
        said = f"{score_words(result.test_score, name)} on the test set; "
    if result.sites:
        said += (
            f"{score_words(result.score_held_out, name)} on "
            f"{counted(result.evaluation.rows, f'held-out {result.task.row_name}')} from "
            f"{counted(result.outcome.num_evaluated, 'site')}"
        )
        if by_site := result.score_by_site:
            worst = (max if result.task.lower_is_better else min)(by_site, key=lambda site: by_site[site])
            mean = score_words(result.score_mean_site, name)
            said += f" (mean of sites {mean}, worst {worst} {score_words(by_site[worst], name)})"
    if result.outcome.privacy:
        from fedhead.server.report.privacy import noisy_accuracy

        if evaluation := result.outcome.privacy.get("evaluation"):
            # The row's title is its first word.
            said += noisy_accuracy(evaluation).removeprefix("Accuracy is ")
        said = said.rstrip("; ")
    return said


def _add_head(lines: Table, result: "RunResult") -> None:
    """Add the head's origin, the choices that led to it, and the promise of a differentially private run."""
    from fedhead.server.report.privacy import outcome, promise

    privacy = result.outcome.privacy
    if result.config.head != "none":
        lines.add_row("Head", outcome(privacy)[0] if privacy else _origin_of_head(result))
    others = [one for one in result.outcome.choices if one["question"] != "Tuning"]  # `extras` has it
    for choice in others:
        lines.add_row(choice["question"], f"{choice['taken']}. {choice['reason']}")
    if privacy:
        lines.add_row("Privacy", "\n".join(promise(privacy)[:3]))


def _add_cost(lines: Table, result: "RunResult") -> None:
    """Add traffic and time, and the rows that were left out."""
    summary, row = result.summary(), result.task.row_name
    traffic = f"{size(summary['bytes_down'])} down, {size(summary['bytes_up'])} up"
    if summary["bytes_full_model"]:
        share = summary["bytes_full_model"] / max(summary["bytes_down"] + summary["bytes_up"], 1)
        traffic += f"; sending the whole model each round would have taken {size(summary['bytes_full_model'])}"
        traffic += f", {share:.{0 if share >= 10 else 1}f} times as much" if share > 1 else ""
    lines.add_row("Traffic", traffic)
    lines.add_row(
        "Time",
        f"{summary['seconds']:.1f} s: features {summary['seconds_extraction']:.1f} s "
        f"({counted(summary['rows_extracted'], row)} extracted), rounds {summary['seconds_rounds']:.1f} s",
    )
    if summary["rows_skipped"]:
        lines.add_row("Skipped", counted(summary["rows_skipped"], f"unreadable {row}"))
    if summary["rows_withheld"]:
        lines.add_row(
            "Withheld",
            f"{counted(summary['rows_withheld'], row)} from {counted(len(result.withheld), 'site')}, in classes or "
            "sites with too few (--min-class-count, --min-rows)",
        )


def _add_diagnosis(lines: Table, result: "RunResult") -> None:
    """Add a line for each site that should not simply join, and for classes that depend on one site."""
    diagnoses = result.outcome.diagnoses
    joining = sum(one.recommendation == "join" for one in diagnoses)
    if len(diagnoses) > 1:
        lines.add_row("Diagnosis", f"{joining} of {counted(len(diagnoses), 'site')} gain by joining")
    others = [one for one in diagnoses if one.recommendation not in ("join", "not enough rows to tell")]
    undecided = [one.site for one in diagnoses if one.recommendation == "not enough rows to tell"]
    for one in others[:MOST_DIAGNOSES]:
        lines.add_row("", one.sentence)
    if undecided:
        lines.add_row("", f"too few rows to tell: {listed(undecided, MOST_NAMES)}")
    for covered in result.outcome.coverage:
        if covered.rests_on_one_site:
            lines.add_row("", covered.sentence)


def _origin_of_head(result: "RunResult") -> str:
    outcome = result.outcome
    if outcome.all_rows and outcome.kept_round:
        return f"{result.config.init}, solved again on the features of round {outcome.kept_round}, of all rows"
    if outcome.all_rows:
        return f"{result.config.init}, from one exchange, solved again on all rows, including held-out ones"
    if outcome.kept_round == 0:
        return f"{result.config.init}, without any round"
    kept = "" if outcome.kept_round == len(outcome.history) - 1 else ", with the lowest held-out loss"
    return f"from round {outcome.kept_round}{kept}"


def _history_table(result: "RunResult") -> Table:
    kind = "Private run" if result.config.privacy.on else result.config.strategy.name
    table = Table(
        title=f"{kind} on {counted(len(result.outcome.participants), 'site')}",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    history, name = result.history, result.task.score_name
    name = "R2" if name == "r2" else name
    has_test = any(finished.test_score is not None for finished in history)
    # Some scores, such as concordance, are known from the evaluation at the end only.
    has_score = any(finished.score is not None for finished in history)
    scores = (name,) if has_score else ()
    for column in ("round", "sites", "loss", *scores, *(("test",) if has_test else ()), "down", "up", "seconds"):
        table.add_column(column, justify="right")
    step = -(-len(history) // MOST_LINES)
    for finished in history:
        if finished.number % step and finished is not history[-1]:
            continue
        table.add_row(
            *_cells(finished, has_score, has_test, result.task.score_name),
            style="bold" if finished.number == result.outcome.kept_round else None,
        )
    return table


def _cells(finished: "Round", has_score: bool, has_test: bool, name: str) -> list[str]:
    return [
        str(finished.number),
        f"{finished.sites}" + (f" (-{len(finished.dropped)})" if finished.dropped else "") if finished.number else "",
        "" if finished.loss is None else f"{finished.loss:.4f}",
        *([score_words(finished.score, name)] if has_score else []),
        *([score_words(finished.test_score, name)] if has_test else []),
        size(finished.bytes_down),
        size(finished.bytes_up),
        f"{finished.seconds:.2f}",
    ]
