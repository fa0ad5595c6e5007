"""Files of adapters that stay at a site."""

from pathlib import Path

import numpy as np
import pytest

from fedhead.client.own_adapters import RUNS_KEPT, OwnAdapters
from fedhead.errors import FedheadError

FORM = {"tail.lora_B": np.zeros((2, 1), np.float32)}


def at(value: float) -> dict[str, np.ndarray]:
    return {"tail.lora_B": np.full((2, 1), value, np.float32)}


def test_a_round_starts_from_the_latest_one_before(tmp_path: Path) -> None:
    own = OwnAdapters(tmp_path / "site")
    assert own.before("run", 5, FORM) == {}
    for number in (1, 2, 4):
        own.keep("run", number, at(number))
    assert own.before("run", 5, FORM)["tail.lora_B"][0] == 4
    assert own.before("run", 4, FORM)["tail.lora_B"][0] == 2
    assert own.before("another", 5, FORM) == {}
    # A round that is done again starts where it started before, and replaces what came of it.
    own.keep("run", 4, at(40))
    assert own.before("run", 4, FORM)["tail.lora_B"][0] == 2
    assert own.before("run", 5, FORM)["tail.lora_B"][0] == 40


def test_rounds_after_the_one_that_is_done_again_are_forgotten(tmp_path: Path) -> None:
    own = OwnAdapters(tmp_path)
    for number in (1, 2, 3):
        own.keep("run", number, at(number))
    own.keep("run", 2, at(20))
    assert own.before("run", 10, FORM)["tail.lora_B"][0] == 20


def test_files_are_bounded_and_names_of_runs_are_no_paths(tmp_path: Path) -> None:
    own = OwnAdapters(tmp_path / "site")
    for run in ("../../escape", "/etc/passwd", "", "a" * 5000, *map(str, range(20))):
        for number in range(1, 6):
            own.keep(run, number, at(number))
    assert list(tmp_path.iterdir()) == [tmp_path / "site"]
    runs = list((tmp_path / "site").iterdir())
    assert len(runs) == RUNS_KEPT
    assert {len(list(run.iterdir())) for run in runs} == {2}


@pytest.mark.parametrize("content", [b"", b"no tensors", None])
def test_damaged_files_are_said_without_their_names(tmp_path: Path, content: bytes | None) -> None:
    own = OwnAdapters(tmp_path)
    own.keep("run", 1, at(1) if content is not None else {"tail.lora_B": np.ones((3, 1), np.float32)})
    (path,) = tmp_path.rglob("*.safetensors")
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FedheadError, match="are damaged") as raised:
        own.before("run", 2, FORM)
    assert str(tmp_path) not in str(raised.value)
