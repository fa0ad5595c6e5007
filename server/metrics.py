"""The coordinator's Prometheus metrics, from the status of its run."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

STATES = ("waiting", "running", "finished", "failed", "interrupted")
Snapshot = Callable[[], Mapping[str, Any] | None]


class RunMetrics(Collector):
    """Metrics of the run that a coordinator executes.

    Args:
        snapshot: gives `RunStatus.snapshot()` of that run; None while there is none.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterable[Metric]:
        if (values := self._snapshot()) is None:
            return
        yield from _of_run(values)
        yield from _of_rounds(values)
        yield from _of_sites(values["sites"])

    def describe(self) -> Iterable[Metric]:
        return []


def _of_run(values: Mapping[str, Any]) -> Iterable[Metric]:
    state = GaugeMetricFamily("fedhead_run_state", "1 for the state of the run.", labels=("run", "state"))
    for name in STATES:
        state.add_metric([values["run"], name], float(values["state"] == name))
    yield state
    yield _gauge("fedhead_run_started_timestamp_seconds", "Time at which the run began here.", values["started"])
    yield _gauge("fedhead_round", "Round that is in progress; 0 before the first.", values["round"])
    yield _gauge("fedhead_rounds", "Rounds that the run is to have.", values["rounds"])


def _of_rounds(values: Mapping[str, Any]) -> Iterable[Metric]:
    history = values["history"]
    if history:
        last = history[-1]
        if last.get("score") is not None:
            score = GaugeMetricFamily("fedhead_score", "Held-out score of the last evaluated head.", labels=("score",))
            score.add_metric([str(values.get("score_name", "score"))], last["score"])
            yield score
        if last.get("loss") is not None:
            yield _gauge("fedhead_loss", "Held-out loss of the last evaluated head.", last["loss"])
        yield _gauge("fedhead_round_duration_seconds", "Duration of the last complete round.", last["seconds"])
    seconds = CounterMetricFamily("fedhead_rounds_seconds", "Seconds that complete rounds took.")
    seconds.add_metric([], sum(line["seconds"] for line in history))
    yield seconds
    payload = CounterMetricFamily("fedhead_payload_bytes", "Payload of complete rounds.", labels=("direction",))
    for direction in ("down", "up"):
        payload.add_metric([direction], sum(line.get(f"bytes_{direction}", 0) for line in history))
    yield payload
    dropped = CounterMetricFamily("fedhead_replies_dropped", "Replies left out of complete rounds.", labels=("site",))
    counts: dict[str, int] = {}
    for line in history:
        for name in line.get("dropped", {}):
            counts[name] = counts.get(name, 0) + 1
    for name, count in sorted(counts.items()):
        dropped.add_metric([name], count)
    yield dropped


def _of_sites(sites: Mapping[str, Mapping[str, Any]]) -> Iterable[Metric]:
    counted = GaugeMetricFamily("fedhead_sites", "Sites in each state.", labels=("state",))
    each = sites.values()
    counted.add_metric(["known"], len(sites))
    counted.add_metric(["connected"], sum(bool(site["connected"]) for site in each))
    counted.add_metric(["working"], sum(bool(site["working"]) for site in each))
    for standing in ("ready", "lacking", "lost", "refused"):
        counted.add_metric([standing], sum(site["standing"] == standing for site in each))
    yield counted
    connected = GaugeMetricFamily("fedhead_site_connected", "1 if the site is connected.", labels=("site",))
    seen = GaugeMetricFamily("fedhead_site_last_seen_timestamp_seconds", "Last request of the site.", labels=("site",))
    rows = GaugeMetricFamily("fedhead_site_extraction_rows", "Rows whose features a site extracts.", labels=("site",))
    done = GaugeMetricFamily("fedhead_site_extracted_rows", "Rows extracted of these so far.", labels=("site",))
    for name, site in sites.items():
        connected.add_metric([name], float(bool(site["connected"])))
        if site["seen"]:
            seen.add_metric([name], site["seen"])
        if site["extracted"]:
            done.add_metric([name], site["extracted"][0])
            rows.add_metric([name], site["extracted"][1])
    yield from (connected, seen, done, rows)


def _gauge(name: str, meaning: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, meaning, value=value)
