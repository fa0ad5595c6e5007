import json
import stat
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from fedhead.client.release.payloads import Payloads
from fedhead.protocol.messages import Payload
from fedhead.protocol.steps import Basis, Release

ABOUT = Release("query.statistics", "here", basis=lambda: Basis(30, {"a\x1b": 30}))


def test_a_reply_and_its_summary_are_written_once_for_their_owner(tmp_path: Path) -> None:
    step = Payloads(tmp_path / "replies")
    many = np.arange(100, dtype=np.float32)
    payload = Payload({"text": "\x1b[2J"}, {"many": many, "few": np.ones((2, 2))})
    assert step.leave(payload, ABOUT) is payload
    step.leave(payload, ABOUT)
    (summary,) = step.written
    assert summary.name == "000001-query-statistics.json"
    np.testing.assert_array_equal(load_file(summary.with_suffix(".safetensors"))["many"], many)
    assert "\x1b" not in summary.read_text()
    about = json.loads(summary.read_text())
    assert (about["rows"], about["bytes"], about["site"]) == (30, len(payload.blob), "here")
    assert about["arrays"]["many"] == {"type": "float32", "shape": [100], "least": 0, "greatest": 99, "mean": 49.5}
    assert about["arrays"]["few"]["numbers"] == [[1, 1], [1, 1]]
    assert about["values"] == {"text": "\x1b[2J"}
    assert stat.S_IMODE(step.folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in step.folder.iterdir()} == {0o600}


def test_a_restarted_site_overwrites_nothing(tmp_path: Path) -> None:
    for text in ("first", "second"):
        Payloads(tmp_path).leave(Payload({"text": text}), ABOUT)
    texts = [json.loads(path.read_text())["values"]["text"] for path in sorted(tmp_path.glob("*.json"))]
    assert texts == ["first", "second"]
