"""A head evaluated in detail: what each site counts on its held-out rows, and whether probabilities come true."""

import random
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TypeVar

import numpy as np

from fedhead.calibration import BINS, Calibration, CalibrationSums, TemperatureSums
from fedhead.heads import Head, LinearHead
from fedhead.messages import (
    CALIBRATE,
    REPORT,
    Arrays,
    CalibrateRequest,
    HeadRequest,
    Manifest,
    MessageError,
    Payload,
    ReportRequest,
    payload_bytes,
    single_bytes,
)
from fedhead.metrics import EvaluationSums, ScoreBins
from fedhead.server.exchange import Exchange, Messenger
from fedhead.server.history import Calibrated
from fedhead.server.roster import Roster
from fedhead.statistics import FeatureStatistics

S = TypeVar("S", TemperatureSums, CalibrationSums)

MOST_SITES = 1000
"""Of more sites, so many drawn at random evaluate a head in detail and calibrate it."""


def some_sites(nodes: Mapping[str, int], seed: int) -> dict[str, int]:
    """Return the sites that evaluate in detail, by name: all of them, or `MOST_SITES` drawn at random."""
    if len(nodes) <= MOST_SITES:
        return dict(nodes)
    return {name: nodes[name] for name in sorted(random.Random(seed).sample(sorted(nodes), MOST_SITES))}


def evaluate_in_detail(
    messenger: Messenger,
    nodes: Mapping[str, int],
    roster: Roster,
    manifest: Manifest,
    request: HeadRequest,
    head: Head,
    stats: FeatureStatistics | None,
    exchange: Exchange,
) -> dict[str, EvaluationSums]:
    """Return what each site with held-out rows counts of a head, by name.

    Args:
        messenger: reaches the sites.
        nodes: who is asked.
        roster: the sites that take part.
        manifest: of the run.
        request: the head, as the sites train it.
        head: the same, for features as they are.
        stats: the sites' statistics, where there are any; they tell which scores to expect.
        exchange: takes the traffic.
    """
    num_classes = len(manifest.classes)
    bins = ScoreBins.default(num_classes)
    if isinstance(head, LinearHead) and stats is not None and stats.num_features == head.num_features:
        bins = score_bins(head, stats)
    reports = {}
    content = ReportRequest(request, bins).to_content()
    for name, answer in messenger.ask(nodes, REPORT, content, exchange):
        try:
            arrays = Payload.from_content(answer).arrays
            sums = EvaluationSums.from_arrays(arrays, num_classes, multi_label=manifest.multi_label)
            messenger.receive([name], REPORT, payload_bytes(answer), exchange)
            _check_rows(sums.rows, roster, (name,))
        except (MessageError, ValueError) as error:
            exchange.drop(name, str(error))
            continue
        if sums.rows:
            reports[name] = sums
    return dict(sorted(reports.items()))


def calibrate(
    messenger: Messenger,
    nodes: Mapping[str, int],
    roster: Roster,
    manifest: Manifest,
    request: HeadRequest,
    exchange: Exchange,
) -> Calibrated | None:
    """Choose a head's temperature on one half of the held-out rows, and judge it on the other; two exchanges.

    Args:
        messenger: reaches the sites.
        nodes: who is asked.
        roster: the sites that take part.
        manifest: of the run.
        request: the head.
        exchange: takes the traffic.

    Returns:
        None where one of the halves has no row.
    """
    classes, multi_label = len(manifest.classes), manifest.multi_label
    chosen = temperature_sums(messenger, nodes, roster, request, exchange)
    temperature = chosen.best()
    zeros = EvaluationSums.zeros(classes, multi_label=multi_label)
    judging = CalibrateRequest(request, temperature)
    read = partial(CalibrationSums.from_arrays, num_classes=classes, multi_label=multi_label)
    judged = CalibrationSums(zeros, zeros, np.zeros(BINS, np.int64))
    for sums in _ask_to_calibrate(messenger, nodes, roster, judging, read, exchange):
        judged += sums
    if not (chosen.rows and judged.rows):
        return None
    scores = () if multi_label else tuple(judged.scores.tolist())
    return Calibrated(Calibration(temperature, scores), chosen.rows, judged)


def temperature_sums(
    messenger: Messenger, nodes: Mapping[str, int], roster: Roster, request: HeadRequest, exchange: Exchange
) -> TemperatureSums:
    """Return what chooses a head's temperature, over one half of the held-out rows; one exchange.

    Args:
        messenger: reaches the sites.
        nodes: who is asked.
        roster: the sites that take part.
        request: the head.
        exchange: takes the traffic.
    """
    choosing = CalibrateRequest(request)
    answers = _ask_to_calibrate(messenger, nodes, roster, choosing, TemperatureSums.from_arrays, exchange)
    return sum(answers, TemperatureSums())


def _ask_to_calibrate(
    messenger: Messenger,
    nodes: Mapping[str, int],
    roster: Roster,
    request: CalibrateRequest,
    read: Callable[[Arrays], S],
    exchange: Exchange,
) -> Iterator[S]:
    """Yield the sums that can be used, each of a site or of several."""
    for names, answer in messenger.ask_together(nodes, CALIBRATE, request.to_content(), exchange):
        try:
            arrays = Payload.from_content(answer).arrays
            messenger.receive(names, CALIBRATE, single_bytes(answer), exchange)
            sums = read(arrays)
            _check_rows(sums.rows, roster, names)
        except (MessageError, ValueError) as error:
            for name in names:
                exchange.drop(name, str(error))
            continue
        yield sums


def _check_rows(rows: int, roster: Roster, names: tuple[str, ...]) -> None:
    most = sum(roster.rows[name] for name in names)
    if rows > most:
        raise ValueError(f"it evaluated {rows} rows, of {most} that it has")


def score_bins(head: LinearHead, stats: FeatureStatistics) -> ScoreBins:
    """Return bins that fit the logits which `head` gives to rows with these statistics."""
    weight, bias = head.weight.detach().double(), head.bias.detach().double()
    covariance = weight @ (stats.scatter() / stats.rows) @ weight.T
    mean = (weight @ stats.mean() + bias).numpy()
    return ScoreBins.from_moments(mean, covariance.numpy(), multi_label=stats.multi_label)
