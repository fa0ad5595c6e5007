"""`fedhead simulate`: many sites on this machine."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fedhead.cli import options
from fedhead.cli.application import app, in_sentences, output, progress_bars
from fedhead.cli.observers import watching
from fedhead.cli.study import run_study
from fedhead.wording import by_reason, interval, listed, percent, size

if TYPE_CHECKING:
    from fedhead.server.history import Round
    from fedhead.simulations.simulate import RunResult

MOST_LINES = 26
MOST_DIAGNOSES = 8
MOST_NAMES = 8


@app.command(
    epilog="Example: [bold]fedhead simulate run.toml --sites 20 --partition dirichlet:0.1 --set local.lr=0.05[/bold]"
)
@in_sentences
def simulate(
    config: Annotated[Path | None, typer.Argument(help="A TOML file; flags lie over it.", show_default=False)] = None,
    backbone: Annotated[
        str | None, typer.Option(help="source:name, as in torchvision:resnet18.", rich_help_panel=options.RUN)
    ] = None,
    weights: options.Weights = None,
    layer: options.Layer = None,
    head: options.Head = None,
    init: options.Init = None,
    classes: options.Classes = None,
    classes_from: options.ClassesFrom = None,
    multi_label: options.MultiLabel = None,
    rounds: options.Rounds = None,
    diagnose: options.Diagnose = None,
    keep_sums: options.KeepSums = None,
    with_backbone: options.WithBackbone = None,
    holdout: options.Holdout = None,
    min_sites: options.MinSites = None,
    round_deadline: options.RoundDeadline = None,
    seed: options.Seed = None,
    data: options.Data = None,
    test_data: options.TestData = None,
    sites: options.Sites = None,
    partition: options.Partition = None,
    engine: options.Engine = None,
    cluster: options.Cluster = None,
    device: options.Device = None,
    precision: options.Precision = None,
    strict_data: options.StrictData = None,
    min_class_count: options.MinClassCount = None,
    min_rows: options.MinRows = None,
    set_: options.Assignments = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="Run under so many seeds, and print means.", rich_help_panel=options.STUDY)
    ] = 1,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE,VALUE",
            help="Run with each value, as in partition=iid,dirichlet:0.3; may be given again.",
            rich_help_panel=options.STUDY,
        ),
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(help="Write a line for each run to this file.", rich_help_panel=options.STUDY)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The run folder; by default a new one under runs/.", rich_help_panel=options.OUTPUT),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="A backbone to compare with, as in bundled:pixels.", rich_help_panel=options.OUTPUT),
    ] = None,
    resume: options.Resume = None,
    dashboard: options.Dashboard = "",
    dashboard_anywhere: options.DashboardAnywhere = False,
    track: options.Track = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Run many sites on this machine: a frozen backbone, private rows, shared heads."""
    from fedhead import simulations
    from fedhead.server.observer import EachRound

    path, out = options.run_to_resume(resume, config, out)
    run = options.run_config(
        path,
        set_,
        {
            "backbone": backbone,
            "weights": weights,
            "layer": layer,
            "head": head,
            "init": init,
            "classes": options.names(classes),
            "classes_from": classes_from,
            "multi_label": multi_label,
            "rounds": rounds,
            "keep_sums": keep_sums,
            "with_backbone": with_backbone,
            "diagnose": diagnose,
            "holdout": holdout,
            "min_sites": min_sites,
            "round_deadline": round_deadline,
            "seed": seed,
        },
        {
            "data": data,
            "test_data": test_data,
            "sites": sites,
            "partition": partition,
            "engine": engine,
            "cluster": cluster,
            "device": device,
            "precision": precision,
            "strict_data": strict_data,
            "min_class_count": min_class_count,
            "min_rows": min_rows,
        },
    )
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
        console.print(_class_table(result))
    summary = result.summary()
    share = summary["bytes_full_model"] / max(summary["bytes_down"] + summary["bytes_up"], 1)
    tested = ""
    if result.test_accuracy is not None:
        tested = f"{percent(result.test_accuracy)} on the test set; "
    sites = result.sites
    if sites:
        by_site = result.accuracy_by_site
        worst = min(by_site, key=lambda name: by_site[name])
        tested += (
            f"{percent(result.accuracy_held_out)} on {result.evaluation.rows} held-out rows of {len(sites)} sites "
            f"(mean of sites {percent(result.accuracy_mean_site)}, worst {worst} {percent(by_site[worst])})"
        )
    lines = Table.grid(padding=(0, 2))
    lines.add_row(
        "All labels right" if result.config.multi_label else "Accuracy",
        tested or "unknown: nothing is held out, and there is no test set",
    )
    lines.add_row("Head", _origin_of_head(result))
    traffic = f"{size(summary['bytes_down'])} down, {size(summary['bytes_up'])} up"
    if summary["bytes_full_model"]:
        traffic += f"; the whole model each round would have taken {size(summary['bytes_full_model'])}"
        traffic += f", {share:.0f} times as much" if share > 1 else ""
    lines.add_row("Traffic", traffic)
    lines.add_row(
        "Time",
        f"{summary['seconds']:.1f} s: features {summary['seconds_extraction']:.1f} s "
        f"({summary['rows_extracted']} rows extracted), rounds {summary['seconds_rounds']:.1f} s",
    )
    if summary["rows_skipped"]:
        lines.add_row("Skipped", f"{summary['rows_skipped']} unreadable rows")
    if summary["rows_withheld"]:
        lines.add_row(
            "Withheld",
            f"{summary['rows_withheld']} rows of {len(result.withheld)} sites, in classes or sites with too few "
            "(--min-class-count, --min-rows)",
        )
    _add_diagnosis(lines, result)
    if result.empty_sites:
        lines.add_row("No rows", f"{len(result.empty_sites)} sites: {', '.join(result.empty_sites)}")
    for reason, refused in by_reason(result.outcome.refused).items():
        lines.add_row("Refused", f"{listed(refused, MOST_NAMES)}: {reason}")
    lines.add_row("Run folder", str(result.run_dir))
    console.print(lines, highlight=False)


def _add_diagnosis(lines: Table, result: "RunResult") -> None:
    """Tell what each site should do where that is not simply to join, and which classes rest on one site."""
    diagnoses = result.outcome.diagnoses
    joining = sum(one.recommendation == "join" for one in diagnoses)
    if diagnoses:
        lines.add_row("Diagnosis", f"{joining} of {len(diagnoses)} sites gain by joining")
    others = [one for one in diagnoses if one.recommendation not in ("join", "not enough rows to tell")]
    undecided = [one.site for one in diagnoses if one.recommendation == "not enough rows to tell"]
    for one in others[:MOST_DIAGNOSES]:
        lines.add_row("", one.sentence)
    if undecided:
        lines.add_row("", f"not enough rows to tell: {listed(undecided, MOST_NAMES)}")
    for covered in result.outcome.coverage:
        if covered.rests_on_one_site:
            lines.add_row("", covered.sentence)


def _origin_of_head(result: "RunResult") -> str:
    outcome = result.outcome
    if outcome.all_rows:
        return f"{result.config.init}, of one exchange, solved again of all rows, held-out ones included"
    if outcome.kept_round == 0:
        return f"{result.config.init}, before any round"
    kept = "" if outcome.kept_round == len(outcome.history) - 1 else ", the best by held-out loss"
    return f"of round {outcome.kept_round}{kept}"


def _history_table(result: "RunResult") -> Table:
    table = Table(
        title=f"{result.config.strategy.name} on {len(result.outcome.participants)} sites",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    history = result.history
    has_test = result.test_accuracy is not None
    for column in ("round", "sites", "loss", "accuracy", *(("test",) if has_test else ()), "down", "up", "seconds"):
        table.add_column(column, justify="right")
    step = -(-len(history) // MOST_LINES)
    for finished in history:
        if finished.number % step and finished is not history[-1]:
            continue
        table.add_row(
            *_cells(finished, has_test), style="bold" if finished.number == result.outcome.kept_round else None
        )
    return table


def _class_table(result: "RunResult") -> Table:
    table = Table(title="Held-out rows: % with 95 % intervals", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("class")
    for column in ("rows", "sensitivity", "specificity", "AUROC"):
        table.add_column(column, justify="right")
    for one in result.evaluation.classes:
        table.add_row(
            one.name, str(one.rows), interval(one.sensitivity), interval(one.specificity), interval(one.auroc)
        )
    return table


def _cells(finished: "Round", has_test: bool) -> list[str]:
    return [
        str(finished.number),
        f"{finished.sites}" + (f" (-{len(finished.dropped)})" if finished.dropped else "") if finished.number else "",
        "" if finished.loss is None else f"{finished.loss:.4f}",
        percent(finished.accuracy),
        *([percent(finished.test_accuracy)] if has_test else []),
        size(finished.bytes_down),
        size(finished.bytes_up),
        f"{finished.seconds:.2f}",
    ]
