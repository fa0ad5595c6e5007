"""Texts from outside, through the doors that they come in by: none reaches a terminal, log or page with controls."""

import logging
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from fedhead.cli.application import output
from fedhead.config import RunConfig
from fedhead.data import samples_from_arrays
from fedhead.protocol.actions import DESCRIBE, STATISTICS
from fedhead.protocol.messages import Description, Payload
from fedhead.simulations import RunResult, simulate
from fedhead.wording import MOST_CHARACTERS, without_controls

pytestmark = pytest.mark.usefixtures("one_thread")

HOSTILE = "\x1b[2J\x1b]0;harmless\x07\x9b31m\u202egnp.exe\r\n2026-01-01 All is well.\udc9b2J " * 10_000
"""750 kB that would clear a terminal, change its title, turn lines around and forge one of a log."""


class Refusing(ClientApp):
    """A site that answers one action with a hostile text: as an error, or as its own refusal."""

    def __init__(self, action: str, *, in_words: bool = False) -> None:
        super().__init__()
        self.action, self.in_words = action, in_words

    def __call__(self, message: Message, context: Context) -> Message:
        asked = message.metadata.message_type
        if asked == DESCRIBE and (self.in_words or self.action != DESCRIBE):
            refusal = HOSTILE if self.action == DESCRIBE else ""
            described = Description.model_construct(site="site-2", rows=20, has_weights=True, refusal=refusal)
            return Message(Payload(described.model_dump()).to_content(), reply_to=message)
        if asked == self.action:
            return Message(Error(2, HOSTILE), reply_to=message)
        return Message(Payload().to_content(), reply_to=message)


def is_clean(text: str) -> bool:
    return without_controls(text) == text and "\x1b" not in text


@pytest.mark.parametrize("bad", [Refusing(DESCRIBE), Refusing(DESCRIBE, in_words=True), Refusing(STATISTICS)])
def test_refusals_of_a_hostile_site_are_short_and_clean(
    bad: Refusing, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = RunConfig(rounds=1, min_sites=1, simulation={"min_rows": 0, "min_class_count": 0})
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    samples = samples_from_arrays(images, ["a", "b"] * 30)
    sizes = {}
    for apps in ({}, {"site-2": bad}):
        out = tmp_path / str(len(apps))
        with caplog.at_level(logging.INFO):
            result = simulate(config, samples, 3, out=out, apps=apps)
        sizes[len(apps)] = sum(path.stat().st_size for path in out.rglob("*.*") if path.suffix != ".safetensors")
        texts = [path for path in out.rglob("*.*") if path.suffix in (".html", ".md", ".json", ".jsonl", ".toml")]
        assert len(texts) > 5
        for path in texts:
            assert is_clean(path.read_text()), path.name
    assert any("harmless" in reason for reason in _reasons(result))
    assert all(len(reason) <= MOST_CHARACTERS and is_clean(reason) for reason in _reasons(result))
    assert sizes[1] < sizes[0] + 20_000
    assert all(is_clean(record.getMessage()) and len(record.getMessage()) < 2000 for record in caplog.records)


def _reasons(result: RunResult) -> list[str]:
    dropped = [reason for line in result.history for reason in line.dropped.values()]
    return [*result.outcome.refused.values(), *dropped]


def test_a_terminal_shows_controls_as_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    output().print("a name\x1b[2J\x9b\u202e")
    assert capsys.readouterr().out == "a name\\x1b[2J\\x9b\\u202e\n"
