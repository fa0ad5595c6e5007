import socket
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from fedhead.cli import app
from fedhead.config import RunConfig
from fedhead.errors import UserError
from fedhead.server.observer import Observer
from fedhead.server.report.live import LivePage
from fedhead.server.runs.history import Round
from fedhead.simulations import simulate


def get(url: str, **headers: str) -> httpx.Response:
    return httpx.get(url, headers=headers, trust_env=False)


class Watcher(Observer):
    """Looks at the live page between rounds, as the run goes on."""

    def __init__(self, browser: Any, url: str) -> None:
        self.browser = browser
        self.url = url
        self.seen: list[str] = []

    def on_round(self, finished: Round) -> None:
        if finished.number == 0:
            self.browser.open(self.url)
            self.browser.evaluate("document.querySelector('details').open = true")
        shown = f"{finished.number} of 3"
        self.browser.until(f"document.querySelector('.tiles').textContent.includes('{shown}')")
        self.seen.append(self.browser.evaluate("document.querySelector('main').dataset.status"))
        assert self.browser.evaluate("document.querySelector('details').open")


def test_browser_follows_a_run_to_its_end(browser: Any, tmp_path: Path) -> None:
    with LivePage("127.0.0.1:0") as page:
        watcher = Watcher(browser, page.url)
        simulate(RunConfig(rounds=3), sites=3, out=tmp_path / "run", observers=[page, watcher])
    assert watcher.seen == ["running"] * 4
    browser.until("document.querySelector('main').dataset.status === 'finished'")
    assert browser.evaluate("document.querySelectorAll('svg').length") >= 10
    assert browser.complaints == []
    assert {url.split("?")[0] for url in browser.requests} <= {page.url, f"{page.url}live.js", f"{page.url}state"}
    report = (tmp_path / "run" / "report.html").read_text()
    words = "document.querySelector('#quality .answer').textContent"
    assert f'<p class="answer">{browser.evaluate(words)}</p>' in report


def test_server_stops_with_the_run() -> None:
    with LivePage("127.0.0.1:0") as page:
        answer = get(page.url)
        assert answer.status_code == 200
        assert "The run has not finished" in answer.text
        assert get(f"{page.url}state").json() == {"version": 0, "ended": False}
    with pytest.raises(httpx.ConnectError):
        get(page.url)


def test_other_names_and_paths_are_rejected() -> None:
    with LivePage("127.0.0.1:0") as page:
        for path in ("", "state", "live.js"):
            assert get(page.url + path, Host="evil.example").status_code == 421
            assert get(page.url + path, Host=f"localhost:{page.port}").status_code == 200
        assert get(page.url + "../run.toml").status_code == 404
        assert httpx.post(page.url, trust_env=False).status_code == 405


@pytest.mark.parametrize("address", ["0.0.0.0:0", "192.0.2.1:80", "[::]:0", "example.org:80"])
def test_other_machines_need_an_option(address: str) -> None:
    with pytest.raises(UserError, match="--dashboard-anywhere"):
        LivePage(address)


def test_option_allows_every_host_name() -> None:
    with LivePage("0.0.0.0:0", anywhere=True) as page:
        assert get(page.url, Host="coordinator.example").status_code == 200


def test_error_for_port_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        told = CliRunner().invoke(app, ["simulate", "--dashboard", address, "--rounds", "0"])
    assert told.exit_code == 2
    assert "cannot be served" in told.stderr
    assert not Path("runs").exists()
