from dataclasses import dataclass
from typing import ClassVar

import pytest

from fedhead.client.release.guard import Guard
from fedhead.errors import FedheadError
from fedhead.protocol.messages import Payload
from fedhead.protocol.steps import Basis, Release, Step, leave


@dataclass(frozen=True)
class Scaled(Step):
    """Multiplies a value, and adds to it."""

    factor: float
    offset: float = 0.0

    def leave(self, payload: Payload, release: Release) -> Payload:
        return Payload({"x": payload.values["x"] * self.factor + self.offset})


class Alone(Step):
    per_site: ClassVar[bool] = True


def test_steps_run_in_order() -> None:
    steps = (Scaled(2.0), Scaled(1.0, offset=3.0))
    about = Release("train", "here")
    left = leave(Payload({"x": 5.0}), about, steps)
    assert left.values == {"x": 13.0}


def test_a_step_of_single_sites_takes_no_merged_reply() -> None:
    payload = Payload()
    assert leave(payload, Release("train", "here"), (Alone(),)) is payload
    with pytest.raises(ValueError, match="Alone needs single replies, not one for 3 sites"):
        leave(payload, Release("train", "here", sites=3), (Alone(),))


@pytest.mark.parametrize(("rows", "classes"), [(19, {"cat": 19}), (30, {"cat": 26, "dog": 4})])
def test_the_guard_stops_replies_about_few_rows_whoever_computed_them(rows: int, classes: dict[str, int]) -> None:
    about = Release("train", "here", parts=("train",), basis=lambda: Basis(rows, classes))
    with pytest.raises(FedheadError, match="so few rows"):
        leave(Payload(), about, (Guard(),))
    assert leave(Payload(), about, (Guard.off(),)) == Payload()
