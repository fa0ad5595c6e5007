import threading

import pytest

from fedhead import threads
from fedhead.threads import LastingThread


def test_failed_work_starts_again_until_it_is_done(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(threads, "PAUSE_SECONDS", 0.0)
    results = iter([OSError("no file"), OSError("no file"), KeyError("x"), None])
    done = threading.Event()

    def work() -> None:
        result = next(results)
        if result is not None:
            raise result
        done.set()

    thread = LastingThread(work, "worker")
    thread.start()
    thread.join(60)
    assert done.is_set()
    assert [record.getMessage().count("no file") for record in caplog.records] == [1, 0]


def test_work_that_keeps_failing_ends_when_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = threading.Event()

    def work() -> None:
        tried.set()
        raise OSError

    monkeypatch.setattr(threads, "PAUSE_SECONDS", 60.0)
    thread = LastingThread(work, "worker")
    thread.start()
    assert tried.wait(60)
    thread.end()
    thread.join(60)
    assert not thread.is_alive()
