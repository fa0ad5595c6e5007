import io
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import Result
from typer.testing import CliRunner

from fedhead.cli import app
from fedhead.cli.client import _ask
from fedhead.client.settings import SiteSettings
from fedhead.client.site_locks import only_process
from fedhead.server.provision import provision


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "home"))
    root = logging.getLogger()
    before = (root.level, root.handlers[:])
    yield
    root.level, root.handlers = before[0], before[1]


def client(*arguments: str) -> tuple[int, str]:
    result: Result = CliRunner().invoke(app, ["client", *arguments])
    return result.exit_code, " ".join(click.unstyle(result.stderr).split())


LOCAL = ("--insecure", "--site", "here")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "needs --kit FOLDER, or on one machine --insecure"),
        (("--kit", "kit/here", "--insecure"), "one of the two"),
        (("--kit", "nowhere"), "There is no kit nowhere"),
        (("--kit", "kit/here", "--site", "there", "--data", "digits"), "leave --site away"),
        (("--kit", "kit/here"), "Name the data of this site"),
        (("--kit", "kit/coordinator", "--data", "digits"), "A kit holds site.toml, ca.pem and key.pem"),
        (("--insecure", "--data", "digits"), "--site NAME"),
        ((*LOCAL, "--data", "digits", "--coordinator", "coord.example.org:9092"), "goes to this machine alone"),
        ((*LOCAL, "--data", "digits", "--coordinator", "127.0.0.1"), "is not HOST:PORT"),
        (("--insecure", "--site", "Ward 3", "--data", "digits"), "a site cannot be called 'Ward 3'"),
        ((*LOCAL, "--data", "folder:nowhere"), "There is no folder nowhere"),
        ((*LOCAL, "--data", "folder:empty"), "empty is empty; expected a sub-folder per class"),
        ((*LOCAL, "--data", "digits", "--device", "abacus"), "The device 'abacus' is not available"),
        ((*LOCAL, "--data", "digits", "--min-rows", "-1"), "'limits.min_rows'"),
        ((*LOCAL, "--data", "digits", "--health", "nonsense"), "The health service cannot listen on 'nonsense'"),
    ],
)
def test_a_mistake_is_told_before_anything_is_sent(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    provision(tmp_path / "kit", "127.0.0.1:9092", ["here"])
    (tmp_path / "empty").mkdir()
    status, said = client(*arguments)
    assert status == 2, said
    assert words in said


@pytest.mark.parametrize(("answer", "agreed"), [("y\n", True), ("n\n", False), ("\n", False), ("", False)])
def test_no_answer_is_no(monkeypatch: pytest.MonkeyPatch, answer: str, agreed: bool) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
    assert _ask("action   train") is agreed


def test_a_second_client_on_the_same_data_is_refused() -> None:
    settings = SiteSettings(name="there", coordinator="127.0.0.1:9092", data="digits")
    with only_process(settings, "another"):
        status, said = client(*LOCAL, "--data", "digits")
    assert status == 2
    assert f"Another fedhead client is up for the data digits on this machine: there, process {os.getpid()};" in said


def test_a_home_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    status, said = client(*LOCAL, "--data", "digits")
    assert status == 2
    assert "cannot be written" in said
