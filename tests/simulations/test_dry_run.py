import json
import socket
from pathlib import Path

import click
import pytest
from click.testing import Result
from safetensors.numpy import load_file
from typer.testing import CliRunner

from fedhead.cli import app
from fedhead.client.release.ledger import ledger_path
from fedhead.protocol.actions import STATISTICS, TRAIN

RUN = 'classes = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]\nrounds = 1\n'


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder and home of its own, and a network that nobody may use."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "home"))

    def refused(*arguments: object) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refused)


def client(*arguments: str) -> tuple[int, str]:
    site = ("client", "--insecure", "--site", "ward", "--data", "digits", "--device", "cpu")
    result: Result = CliRunner().invoke(app, [*site, *arguments])
    return result.exit_code, " ".join(click.unstyle(result.output).split())


def test_a_dry_run_writes_what_a_run_would_get_and_sends_nothing(tmp_path: Path) -> None:
    Path("run.toml").write_text(RUN)
    status, said = client("--dry-run", "run.toml", "--payloads", "replies")
    assert status == 0, said
    assert "Nothing was sent" in said
    summaries = [json.loads(path.read_text()) for path in sorted(Path("replies").glob("*.json"))]
    actions = [about["action"] for about in summaries]
    assert {STATISTICS, TRAIN} <= set(actions)
    trained = actions.index(TRAIN)
    arrays = load_file(sorted(Path("replies").glob("*.safetensors"))[trained])
    assert list(arrays["weight"].shape) == summaries[trained]["arrays"]["weight"]["shape"] == [10, 192]
    assert not ledger_path("ward").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "replies", "run.toml"]


@pytest.mark.parametrize(
    ("run", "words", "status"),
    [
        ('backbone = "torchvision:resnet18"\n' + RUN, "a dry run downloads nothing", 2),
        ('weights = "random"\n' + RUN, "does not know these weights of bundled:glyphnet", 1),
        ("rounds = 1\n", "needs classes", 2),
    ],
)
def test_what_a_site_would_refuse_it_refuses(
    run: str, words: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    Path("run.toml").write_text(run)
    ended, said = client("--dry-run", "run.toml")
    assert (ended, words in said) == (status, True), said
    Path("dry-run").mkdir(exist_ok=True)
    (Path("dry-run") / "file").touch()
    assert "not an empty folder" in client("--dry-run", "run.toml")[1]
