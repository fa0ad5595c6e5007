"""Lines of the terminal's summary on optional results of a run."""

from typing import TYPE_CHECKING

from fedhead.wording import counted, listed, percent

if TYPE_CHECKING:
    from fedhead.server.runs.result import CompletedRun

_MOST_NAMES = 10


def extras(result: "CompletedRun") -> list[tuple[str, str]]:
    """Return pairs of a title and a text on each optional result of the run."""
    from fedhead.server.robust_pooling import HARMFUL
    from fedhead.server.runs.record import WORTH

    config, outcome = result.config, result.outcome
    lines = []
    if config.pooling == "robust":
        left_out = sorted(site for site, reason in outcome.refused.items() if reason.startswith(HARMFUL))
        said = f"left out {listed(left_out, _MOST_NAMES)}" if left_out else "no site's sums made the head worse"
        lines.append(("Robust pooling", said))
    if config.worth:
        made = result.run_dir is not None and (result.run_dir / WORTH).is_file()
        said = f"in the report; to print it: fedhead worth {result.run_dir}" if made else "not computed; see the log"
        lines.append(("Value of sites", said))
    if config.tune.on:
        tuning = [f"{one['taken']}. {one['reason']}" for one in outcome.choices if one["question"] == "Tuning"]
        kept = "the base model" if config.head == "none" else "the solved head"
        lines.append(("Tuning", tuning[0] if tuning else f"{kept}. No round was better than it"))
    if worst := outcome.subgroups.get("sentence"):
        lines.append(("Subgroups", worst))
    if config.foreign:
        lines.append(("Foreign inputs", _foreign(result)))
    return lines


def _foreign(result: "CompletedRun") -> str:
    test = result.outcome.foreign
    if test is None:
        return "no test was made; see the log"
    return (
        f"fedhead predict marks inputs unlike {counted(test.known.rows, 'held-out row')} of the sites, and at most "
        f"{percent(test.share)} of inputs like these"
    )
