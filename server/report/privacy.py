"""Plain words on the differential privacy of a run, for the report, the card and the terminal."""

import math
from collections.abc import Mapping
from typing import Any

from fedhead.privacy.stages import LEAST_ROUNDS
from fedhead.server.report import charts
from fedhead.server.report.layout import DASH, Figure, Table
from fedhead.wording import counted


def promise(privacy: Mapping[str, Any]) -> list[str]:
    """Return sentences on the promises of a private run, and on their limits.

    Args:
        privacy: the part `privacy` of `evaluation.json`.
    """
    unit, epsilon, delta = str(privacy["unit"]), float(privacy["epsilon"]), float(privacy["delta"])
    accounts: Mapping[str, Mapping[str, float]] = privacy["accounts"]
    spent = " and ".join(f"{name} epsilon {one['epsilon']:.2f} (mu {one['mu']:.3f})" for name, one in accounts.items())
    one = "one row" if unit == "row" else "all rows of one group at a site (a patient, a writer)"
    who = (
        "the sum of all sites' replies, and the model"
        if privacy["noise"] == "shared"
        else "every reply of a site, and the model"
    )
    shared = privacy["noise"] == "shared" and privacy.get("secure_sum")
    covered = (
        f" Each site added its part of the noise before its sums were masked: {privacy['parties']} parts are the "
        f"stated noise, and so many are in every sum even if {counted(int(privacy['max_colluding']), 'site')} colluded "
        "and left theirs out."
        if shared
        else ""
    )
    certainty = 100 / (1 + math.exp(-epsilon))
    return [
        f"Differential privacy was on: epsilon {epsilon:g}, delta {delta:g}. It covers {who}.{covered}",
        f"Adding or removing {one} changes the probability of any result by a factor of at most "
        f"{math.exp(epsilon):.2f}, except with probability {delta:g}. Someone who finds a row's presence as likely "
        f"as its absence is then at most {certainty:.0f} % certain of it.",
        f"Spent by this run: {spent}. No row is in both accounts.",
        "Not protected: the number and names of the sites, the classes, the settings, the sizes of messages, and "
        "whether a site's data can be read at all. One person's rows at several sites, or in several groups, add up.",
        "Not protected: the model against a site that sends false sums.",
    ]


def solver_of(privacy: Mapping[str, Any] | None) -> str:
    """Return how a private run's head was solved, in words; empty if it was not."""
    solvers = {"lda": "discriminant analysis", "nearest-mean": "nearest class means"}
    if not privacy:
        return ""
    made = f"{counted(int(privacy.get('rounds', 0)), 'round')} of noisy gradients"
    if privacy["solver"] == "gradients":
        return made
    near = ", near the classes' names," if privacy.get("names") else ""
    more = f" and {made}" if privacy.get("rounds") else ""
    return f"{solvers[str(privacy['solver'])]}{near} on noisy sums{more}"


def outcome(privacy: Mapping[str, Any]) -> list[str]:
    """Return sentences on the head and its noisy evaluation."""
    solved = solver_of(privacy)
    said = [f"{solved[0].upper()}{solved[1:]}, chosen by public figures."]
    asked = int(privacy.get("asked_rounds", 0))
    if asked and not privacy["rounds"]:
        why = (
            f"{counted(asked, 'round')} would not come near the best head, and {LEAST_ROUNDS} are the least"
            if asked < LEAST_ROUNDS
            else "with so little noise, a head solved from sums is as good at once"
        )
        said.append(
            f"No rounds were made: {why}, so sums received the rounds' share of the budget. This was decided by "
            "the noisy number of rows, the classes, the features, epsilon and the number of rounds."
        )
    if evaluation := privacy.get("evaluation"):
        said.append(noisy_accuracy(evaluation))
    return said


def noisy_accuracy(evaluation: Mapping[str, Any]) -> str:
    """Return a sentence on the accuracy of a private run's head."""
    accuracy, low, high = (f"{100 * share:.1f}" for share in evaluation["accuracy"])
    return (
        f"Accuracy is {accuracy} % ({low}{DASH}{high}) on about {max(round(evaluation['rows']), 0):,} held-out rows, "
        "measured with noise; the 95 % interval covers sampling and noise."
    )


def confusion(privacy: Mapping[str, Any], classes: list[str]) -> Table:
    """Return the noisy confusion counts as a table."""
    cells = privacy["evaluation"]["confusion"]
    rows = [[name, *map(str, row)] for name, row in zip(classes, cells, strict=True)]
    return Table(["true class", *classes], rows)


def attack_sentences(attack: Mapping[str, Any]) -> list[str]:
    """Return the outcome of an attack or an audit in plain words."""
    if "measured" in attack:
        return [
            f"An audit with {attack['canaries']:,} canaries guessed {attack['right']} of {attack['guesses']} right. "
            f"With {100 * attack['confidence']:g} % confidence, epsilon is at least {attack['measured']:.2f}; "
            f"{attack['stated']:g} is stated."
        ]
    said = [
        f"A membership attack (likelihood ratio, {attack['trials']:,} trials) on heads of this kind has area "
        f"{attack['area']:.3f} under its ROC; 0.5 is guessing."
    ]
    for one in attack["at"]:
        limit = "" if one["bound"] is None else f"; epsilon and delta allow at most {100 * one['bound']:.2f} %"
        said.append(f"At {100 * one['false']:g} % false alarms it detects {100 * one['true']:.2f} % of rows{limit}.")
    return said


def attack_figure(attack: Mapping[str, Any]) -> Figure:
    """Return the ROC of a membership attack, beside the bound of epsilon and delta if there is one."""
    lines = [("attack", [(0.0, 0.0), *map(tuple, attack["roc"]), (1.0, 1.0)])]
    if attack["bound"]:
        lines.append(("largest that the budget allows", [(0.0, 0.0), *map(tuple, attack["bound"]), (1.0, 1.0)]))
    rows = [
        [
            f"{100 * one['false']:g} %",
            f"{100 * one['true']:.2f} %",
            "" if one["bound"] is None else f"{100 * one['bound']:.2f} %",
        ]
        for one in attack["at"]
    ]
    table = Table(["false alarms", "detected", "allowed at most"], rows)
    caption = "Rows of the training data that the attack detects, by the share of other rows that it takes for them."
    return Figure("Membership attack", charts.curves(lines, []), table, caption)
