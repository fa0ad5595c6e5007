from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from prometheus_client import CollectorRegistry

from fedhead.config import RunConfig
from fedhead.flower.fleet_client import FleetClient
from fedhead.server.metrics import RunMetrics
from fedhead.server.network.requests import extracted_rows
from fedhead.server.network.superlink import SuperLink
from fedhead.server.observer import SiteState
from fedhead.server.runs.history import Round
from fedhead.server.status import RunStatus


def registry(snapshot: Mapping[str, Any] | None) -> CollectorRegistry:
    made = CollectorRegistry()
    made.register(RunMetrics(lambda: snapshot))
    return made


def test_a_runs_state_rounds_and_sites_are_metrics(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    extracted: list[tuple[int, int] | None] = [(40, 100)]
    with SuperLink("127.0.0.1", 0) as link:
        key = ec.generate_private_key(ec.SECP256R1())
        site = FleetClient(f"127.0.0.1:{link.port}", key, None, 0, "ward", lambda: extracted[0])
        node = site.activate(20.0)
        status = RunStatus(link, lambda: {"ward": ("query.statistics", 3.0)})
        status.on_started(RunConfig(rounds=3), tmp_path)
        status.on_sites({"ward": SiteState("ready", rows=100), "gone": SiteState("lost", reason="no answer")})
        status.on_step("train", 2)
        for number in range(2):
            dropped = {"gone": "no answer"}
            status.on_round(Round(number, 1, 0.5, 10, 20, loss=0.25, score=0.75, dropped=dropped))
        metrics = registry(status.snapshot())
        assert status.snapshot()["sites"]["ward"]["extracted"] == [40, 100]
        extracted[0] = None
        site.heartbeat(node, 20.0)
        assert status.snapshot()["sites"]["ward"]["extracted"] is None
        site.close()
        status.on_failed(KeyboardInterrupt())

    def value(name: str, **labels: str) -> float | None:
        return metrics.get_sample_value(name, labels)

    run = {"run": tmp_path.name}
    assert (value("fedhead_run_state", **run, state="running"), value("fedhead_run_state", **run, state="failed")) == (
        1,
        0,
    )
    assert (value("fedhead_round"), value("fedhead_rounds")) == (2, 3)
    assert (value("fedhead_score", score="accuracy"), value("fedhead_loss")) == (0.75, 0.25)
    assert (value("fedhead_payload_bytes_total", direction="down"), value("fedhead_rounds_seconds_total")) == (20, 1.0)
    assert value("fedhead_replies_dropped_total", site="gone") == 2
    sites = ("known", "connected", "working", "ready", "lost", "refused")
    assert [value("fedhead_sites", state=state) for state in sites] == [2, 1, 1, 1, 1, 0]
    assert [value("fedhead_site_connected", site=name) for name in ("ward", "gone")] == [1, 0]
    assert value("fedhead_site_extracted_rows", site="ward") == 40
    assert value("fedhead_site_extraction_rows", site="ward") == 100


def test_without_a_run_there_are_no_metrics() -> None:
    assert list(registry(None).collect()) == []


def test_only_plausible_progress_is_believed() -> None:
    def said(header: bytes) -> tuple[int, int] | None:
        return extracted_rows({b"x-fedhead-extracted": header})

    assert said(b"0/0") == (0, 0)
    assert said(b"999999999999/999999999999") == (10**12 - 1, 10**12 - 1)
    for header in (b"", b"2/1", b"-1/1", b"1/2/3", b"1e3/2", b"1" * 13 + b"/1", b"1/2\n", b"\xd9\xa1/2"):
        assert said(header) is None
