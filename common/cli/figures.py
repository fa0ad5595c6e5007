"""Tables of a model's figures on the terminal."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from fedhead.wording import interval, number_interval


def figure_table(report: Any, title: str = "") -> Table:
    """Return a table of a task's report: a line for each class, or for each real target.

    Args:
        report: an `EvaluationReport` or a `RegressionReport`.
        title: the subject of the figures.
    """
    if hasattr(report, "concordance"):
        table = _table(f"{title}Kaplan-Meier with 95 % intervals", "until", ("survival", "predicted"))
        for edge, point, predicted in zip(report.edges, report.curve, report.predicted, strict=True):
            shown = "" if point is None else f"{point[0]:.3f} ({point[1]:.3f} to {point[2]:.3f})"
            table.add_row(f"{edge:g}", shown, "" if predicted is None else f"{predicted:.3f}")
        return table
    if hasattr(report, "perplexity"):
        table = _table(f"{title}95 % intervals in brackets", "answers", ("conversations", "tokens", "perplexity"))
        table.add_row("all", str(report.rows), str(report.tokens), number_interval(report.perplexity, 3))
        return table
    if hasattr(report, "boxes"):
        table = _table(f"{title}95 % intervals in brackets", "class", ("images", "boxes", "AP50", "AP"))
        for one in report.boxes:
            averages = number_interval(one.ap50, 3), number_interval(one.ap, 3)
            table.add_row(one.name, str(one.items), str(one.boxes), *averages)
        return table
    if hasattr(report, "areas"):
        table = _table(f"{title}95 % intervals in brackets", "class", ("images", "IoU", "Dice"))
        for one in report.areas:
            table.add_row(one.name, str(one.items), number_interval(one.iou, 3), number_interval(one.dice, 3))
        return table
    if hasattr(report, "types"):
        table = _table(f"{title}% with 95 % intervals", "entity", ("number", "precision", "recall", "F1"))
        for one in report.types:
            table.add_row(one.name, str(one.entities), *map(interval, (one.precision, one.recall, one.f1)))
        return table
    targets = getattr(report, "targets", None)
    if targets is not None:
        columns = ("rows", "R2", "MAE", "RMSE", "bias")
        table = _table(f"{title}95 % intervals in brackets", "target", columns)
        for one in targets:
            figures = (number_interval(one.r2, 3), *map(number_interval, (one.mae, one.rmse, one.bias)))
            table.add_row(one.name, str(one.rows), *figures)
        return table
    table = _table(f"{title}% with 95 % intervals", "class", ("rows", "sensitivity", "specificity", "AUROC"))
    for one in report.classes:
        table.add_row(one.name, str(one.rows), *map(interval, (one.sensitivity, one.specificity, one.auroc)))
    return table


def figure_lines(report: Any) -> list[tuple[str, str]]:
    """Return a report's figures over all classes or targets, by name."""
    if hasattr(report, "concordance"):
        ratio = "" if report.expected is None else f", {report.expected:.2f} times as many expected"
        return [
            ("Concordance", f"{number_interval(report.concordance, 3)} on {report.rows} rows"),
            ("Events", f"{report.events}{ratio}"),
        ]
    if hasattr(report, "perplexity"):
        short = f"; {report.cut} were longer than the model takes" if report.cut else ""
        return [("Perplexity", f"{number_interval(report.perplexity, 3)} on {report.rows} conversations{short}")]
    if hasattr(report, "boxes"):
        return [
            ("AP50", f"{number_interval(report.ap50, 3)} on {report.rows} images"),
            ("AP", number_interval(report.ap, 3)),
        ]
    if hasattr(report, "areas"):
        return [
            ("Mean IoU", f"{number_interval(report.miou, 3)} on {report.rows} images"),
            ("Mean Dice", number_interval(report.dice, 3)),
        ]
    if hasattr(report, "types"):
        overall = report.overall
        return [
            ("Entity F1", f"{number_interval(overall.f1, 3)} on {overall.entities} entities in {report.rows} words"),
            ("Precision", number_interval(overall.precision, 3)),
            ("Recall", number_interval(overall.recall, 3)),
        ]
    if hasattr(report, "targets"):
        return [("R2", f"{number_interval(report.r2, 3)} on {report.rows} rows")]
    lines = [
        ("Accuracy", f"{interval(report.accuracy)} on {report.rows} rows"),
        ("Balanced", interval(report.balanced_accuracy)),
    ]
    if hasattr(report, "quadratic_kappa"):
        lines.append(("Kappa", f"{number_interval(report.quadratic_kappa, 3)}, with quadratic weights"))
        lines.append(("Distance", f"{number_interval(report.mae, 3)} levels on average"))
    return lines


def _table(title: str, subject: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(subject)
    for column in columns:
        table.add_column(column, justify="right")
    return table
