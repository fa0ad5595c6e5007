import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedhead.config import RunConfig
from fedhead.server.observer import SiteState
from fedhead.server.runs.history import Round
from fedhead.server.runs.log import RunLog


def fields(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [vars(record)["fields"] for record in caplog.records]


def test_start_rounds_waits_and_end_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    log = RunLog()
    log.on_started(RunConfig(rounds=3, min_sites=2, round_deadline=600), Path("runs/xray"))
    log.on_step("statistics", 0)
    for number in range(300):
        log.on_waiting(f"{number} of 300 sites can take part.")
    log.on_sites({"a": SiteState("ready"), "b": SiteState("lacking")})
    log.on_sites({"a": SiteState("ready"), "b": SiteState("ready")})
    log.on_round(Round(1, 2, 0.5, 1000, 2000, loss=0.25, score=0.9, dropped={"b": "no reply"}))
    outcome: Any = SimpleNamespace(history=[Round(0, 2, 0.5, 1, 2, score=0.9)], kept_round=0)
    log.on_finished(outcome)
    messages = [record.getMessage() for record in caplog.records]
    assert "2 sites or more" in messages[0]
    assert "10 min" in messages[0]
    assert [message for message in messages if message.startswith("Waiting")] == [
        "Waiting: 0 of 300 sites can take part."
    ]
    assert messages[3:5] == ["a takes part; 1 site in all.", "b takes part; 2 sites in all."]
    assert messages[5] == (
        "Round 1 of 3: accuracy 90.0 %, loss 0.2500, 2 sites, 500 ms, 1 kB down, 2 kB up. Left out: b."
    )
    assert messages[6].startswith("Run xray is finished: the head of round 0 is kept, accuracy 90.0 %")
    events = fields(caplog)
    assert [event["event"] for event in events] == ["start", "step", "waiting", "sites", "sites", "round", "finish"]
    assert {event["run"] for event in events} == {"xray"}
    assert (events[5]["score"], events[5]["dropped"]) == (0.9, {"b": "no reply"})


def test_only_interruptions_are_logged_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    RunLog().on_failed(ValueError("the command logs this"))
    RunLog().on_failed(KeyboardInterrupt())
    assert [event["event"] for event in fields(caplog)] == ["stop"]
