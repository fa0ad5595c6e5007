import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from fedhead.config import RunConfig
from fedhead.errors import FedheadError
from fedhead.server.report.examples import examples
from fedhead.server.runs.examples import EXAMPLES, MOST_EXAMPLES, Example, read_examples, write_examples
from fedhead.server.runs.record import JournalRecord, RunRecord


def picture() -> str:
    content = io.BytesIO()
    Image.new("RGB", (4, 4)).save(content, "jpeg")
    return base64.b64encode(content.getvalue()).decode()


def example(**changes: object) -> Example:
    values = {"name": "1.png", "site": "<b>north</b>", "score": 0.5, "truth": picture(), "prediction": picture()}
    return Example.model_validate({**values, **changes})


def test_examples_are_read_as_written(tmp_path: Path) -> None:
    write_examples(tmp_path, [example()])
    assert read_examples(tmp_path) == (example(),)
    write_examples(tmp_path, [])
    assert read_examples(tmp_path) == ()
    assert not (tmp_path / EXAMPLES).exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"truth": '"><script>alert(1)</script>'},
        {"prediction": base64.b64encode(b"<svg onload='alert(1)'>").decode()},
        {"score": "high"},
        {"more": 1},
    ],
)
def test_damaged_examples_are_refused(tmp_path: Path, wrong: dict[str, object]) -> None:
    (tmp_path / EXAMPLES).write_text(json.dumps([{**example().model_dump(), **wrong}]))
    with pytest.raises(FedheadError, match=r"examples\.json is damaged"):
        read_examples(tmp_path)


def test_too_many_examples_are_refused(tmp_path: Path) -> None:
    (tmp_path / EXAMPLES).write_text(json.dumps([example().model_dump()] * (MOST_EXAMPLES + 1)))
    with pytest.raises(FedheadError, match="is damaged"):
        read_examples(tmp_path)


@pytest.mark.parametrize(("simulated", "shown"), [(True, 1), (False, 0), (None, 0)])
def test_only_reports_of_simulations_show_images(simulated: bool | None, shown: int) -> None:
    config = RunConfig(task="segmentation", backbone="torchvision:mobilenet_v2").model_dump()
    journal = JournalRecord(simulated=simulated)
    record = RunRecord(name="run", config=config, toml="", journal=journal, examples=(example(),))
    figures = examples(record)
    assert len(figures) == shown
    for one in figures:
        assert one.chart.count("<img") == 2
        assert "<b>" not in one.chart
