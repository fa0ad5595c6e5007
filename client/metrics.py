"""A site's Prometheus metrics: its connection, answers, releases and extraction."""

import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from fedhead.client.local_site import LocalSite
from fedhead.client.release.ledger import Entry
from fedhead.protocol.actions import ACTIONS


class SiteMetrics(Collector):
    """Counts of a site's process. No label has a value that a coordinator chooses.

    Args:
        name: of the site.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._site: LocalSite | None = None
        self._connected = False
        self._lock = threading.Lock()
        self._answers: Counter[tuple[str, str]] = Counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._releases: Counter[str] = Counter()
        self._released_bytes: Counter[str] = Counter()

    def watch(self, site: LocalSite) -> None:
        """Take rows and extraction from a site's data."""
        self._site = site

    def connected(self, is_connected: bool) -> None:
        """Note whether the site is connected."""
        self._connected = is_connected

    def answered(self, action: str, seconds: float, *, refused: bool) -> None:
        """Count an answer to a message."""
        with self._lock:
            self._answers[_known(action), "refused" if refused else "done"] += 1
            self._seconds[_known(action)] += seconds

    def released(self, entry: Entry) -> None:
        """Count a release that is in the ledger."""
        with self._lock:
            self._releases[_known(entry.action)] += 1
            self._released_bytes[_known(entry.action)] += entry.bytes

    def collect(self) -> Iterable[Metric]:
        info = GaugeMetricFamily("fedhead_site_info", "Always 1; names the site.", labels=("site",))
        info.add_metric([self.name], 1)
        yield info
        yield GaugeMetricFamily("fedhead_connected", "1 while the coordinator answers.", value=float(self._connected))
        yield GaugeMetricFamily(
            "fedhead_rows", "Rows of the site's data.", value=self._site.num_rows if self._site else 0
        )
        with self._lock:
            answers, seconds = dict(self._answers), dict(self._seconds)
            releases, sizes = dict(self._releases), dict(self._released_bytes)
        answered = CounterMetricFamily("fedhead_answers", "Messages answered.", labels=("action", "outcome"))
        for (action, outcome), count in sorted(answers.items()):
            answered.add_metric([action, outcome], count)
        yield answered
        yield _by_action("fedhead_answer_seconds", "Seconds that answers took.", seconds)
        yield _by_action("fedhead_releases", "Releases in the ledger since the process began.", releases)
        yield _by_action("fedhead_released_bytes", "Bytes of these releases.", sizes)
        done, total = (self._site and self._site.extraction) or (0, 0)
        yield GaugeMetricFamily("fedhead_extracted_rows", "Rows extracted so far; 0 between extractions.", value=done)
        yield GaugeMetricFamily("fedhead_extraction_rows", "Rows to extract; 0 between extractions.", value=total)

    def describe(self) -> Iterable[Metric]:
        return []


def _known(action: str) -> str:
    return action if action in ACTIONS else "unknown"


def _by_action(name: str, meaning: str, values: Mapping[str, float]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, meaning, labels=("action",))
    for action, value in sorted(values.items()):
        family.add_metric([action], value)
    return family
