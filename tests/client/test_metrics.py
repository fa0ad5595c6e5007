from datetime import UTC, datetime

from prometheus_client import CollectorRegistry

from fedhead.client.local_site import LocalSite
from fedhead.client.metrics import SiteMetrics
from fedhead.client.release.guard import Guard
from fedhead.client.release.ledger import Entry
from fedhead.protocol.actions import STATISTICS, TRAIN


def entry(action: str, size: int) -> Entry:
    return Entry(when=datetime.now(UTC), run="r", site="s", action=action, rows=9, classes={}, bytes=size, digest="")


def test_a_sites_answers_releases_and_rows_are_metrics() -> None:
    counts = SiteMetrics("ward")
    metrics = CollectorRegistry()
    metrics.register(counts)
    assert metrics.get_sample_value("fedhead_rows") == 0
    site = LocalSite("ward", "digits", "cpu", guard=Guard.off())
    counts.watch(site)
    counts.connected(True)
    counts.answered(TRAIN, 0.5, refused=False)
    counts.answered(TRAIN, 0.25, refused=False)
    for number in range(100):
        counts.answered(f"chosen-by-the-coordinator-{number}", 0.0, refused=True)
    counts.released(entry(STATISTICS, 100))
    site.extraction = (10, 1797)
    value = metrics.get_sample_value
    assert (value("fedhead_connected"), value("fedhead_rows")) == (1, 1797)
    assert value("fedhead_site_info", {"site": "ward"}) == 1
    assert value("fedhead_answers_total", {"action": TRAIN, "outcome": "done"}) == 2
    assert value("fedhead_answer_seconds_total", {"action": TRAIN}) == 0.75
    assert value("fedhead_answers_total", {"action": "unknown", "outcome": "refused"}) == 100
    assert value("fedhead_releases_total", {"action": STATISTICS}) == 1
    assert value("fedhead_released_bytes_total", {"action": STATISTICS}) == 100
    assert (value("fedhead_extracted_rows"), value("fedhead_extraction_rows")) == (10, 1797)
