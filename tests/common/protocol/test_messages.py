from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedhead.protocol.heads import CalibrateRequest, HeadReply, HeadRequest
from fedhead.protocol.messages import (
    MOST_STEPS,
    PAYLOAD,
    RECORD,
    Description,
    MessageError,
    Payload,
    payload_bytes,
)
from fedhead.sums.heads import METRICS, HeadSums, mean_metrics
from fedhead.wording import MOST_CHARACTERS

HEAD = {"weight": np.zeros((3, 4), np.float32), "bias": np.zeros(3, np.float32)}
LIKE = HeadSums(HEAD)
GOOD_METRICS = np.array([[10.0, 0.5, 4.0, 2.5, 3.0]])


def reply(**changes: object) -> RecordDict:
    arrays = {"weight": np.ones((3, 4), np.float32), "bias": np.ones(3, np.float32), "metrics": GOOD_METRICS}
    return Payload({}, {name: value for name, value in {**arrays, **changes}.items() if value is not None}).to_content()  # type: ignore[misc]


def test_values_and_arrays_round_trip() -> None:
    sent = Payload({"a": [1, "ü", None]}, {"x": np.arange(6.0).reshape(2, 3), "empty": np.zeros((0, 2), np.int64)})
    received = Payload.from_content(sent.to_content())
    assert received.values == sent.values
    assert received.arrays.keys() == sent.arrays.keys()
    for name, array in sent.arrays.items():
        assert np.array_equal(received.arrays[name], array)
        assert received.arrays[name].dtype == array.dtype


def test_head_round_trip() -> None:
    request = HeadRequest(HEAD, server_round=3, proximal_mu=0.1, everyone=True)
    received = HeadRequest.from_payload(Payload.from_content(request.to_content()), HEAD)
    assert (received.server_round, received.proximal_mu, received.everyone) == (3, 0.1, True)
    answer = HeadReply.from_payload(Payload.from_content(reply()), LIKE)
    assert np.array_equal(answer.metrics, GOOD_METRICS)
    assert answer.payload().blob == Payload.from_content(reply()).blob


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (reply(weight=None), "contains the arrays"),
        (reply(extra=np.zeros(1)), "contains the arrays"),
        (reply(weight=np.ones((4, 3), np.float32)), r"float32\[4, 3\] instead of float32\[3, 4\]"),
        (reply(weight=np.ones((3, 4))), "float64"),
        (reply(weight=np.full((3, 4), np.nan, np.float32)), "not finite"),
        (reply(bias=np.array([0, np.inf, 0], np.float32)), "not finite"),
        (reply(metrics=None), "metrics are"),
        (reply(metrics=np.zeros((1, 2))), "metrics are"),
        (reply(metrics=np.zeros((2, len(METRICS)))), "metrics are"),
        (reply(metrics=GOOD_METRICS.astype(np.float32)), "metrics are"),
        (reply(metrics=GOOD_METRICS * np.nan), "not finite"),
        (reply(metrics=-GOOD_METRICS), "negative"),
        (reply(metrics=np.array([[9.5, 0.5, 4.0, 2.5, 3.0]])), "not whole"),
        (reply(metrics=np.array([[10.0, 0.5, 4.0, 2.5, 5.0]])), "more correct rows"),
        (RecordDict(), "has the records"),
        (RecordDict({"other": ConfigRecord({PAYLOAD: b""})}), "has the records"),
        (RecordDict({RECORD: ConfigRecord({"x": b""})}), "has the keys"),
        (RecordDict({RECORD: ConfigRecord({PAYLOAD: "text"})}), "not bytes"),
        (RecordDict({RECORD: ConfigRecord({PAYLOAD: b"short"})}), "cannot be read"),
        (RecordDict({RECORD: ArrayRecord({PAYLOAD: Array(np.zeros(1))})}), "has the keys"),
    ],
)
def test_invalid_replies_are_rejected(content: RecordDict, words: str) -> None:
    with pytest.raises(MessageError, match=words):
        HeadReply.from_payload(Payload.from_content(content), LIKE)


def test_only_an_in_process_grid_may_merge_replies() -> None:
    table = np.repeat(GOOD_METRICS, 2, axis=0)
    sums = HeadSums(HEAD, mean_metrics(table))
    merged = HeadReply(sums, table, ("a", "b"), {"c": "why"}).payload()
    assert merged.values["num_bytes"] == 3 * payload_bytes(reply())
    with pytest.raises(MessageError, match="metrics are"):
        HeadReply.from_payload(merged, LIKE)
    answer = HeadReply.from_payload(merged, LIKE, merged=True)
    assert (answer.sites, answer.dropped, answer.sums.examples) == (("a", "b"), {"c": "why"}, 20)
    assert np.array_equal(answer.metrics, table)
    assert np.array_equal(answer.sums.metrics, sums.metrics)


@pytest.mark.parametrize("values", [{}, {"site": ""}, {"site": "a", "rows": -1}])
def test_invalid_descriptions_are_rejected(values: dict[str, object]) -> None:
    with pytest.raises(MessageError):
        Description.from_content(Payload(values).to_content())


def test_described_release_steps_are_validated_and_capped() -> None:
    sent = Description(site="a", steps=("One.", "Two."))
    assert Description.from_content(Payload(sent.wire()).to_content()) == sent
    assert "steps" not in Description(site="a").wire()
    (long,) = Description(site="a", steps=("word " * 1000,)).steps
    assert len(long) <= MOST_CHARACTERS
    for wrong in (["One."] * (MOST_STEPS + 1), [1], "One.", [["One."]], {"a": "One."}):
        with pytest.raises(MessageError, match="steps"):
            Description.from_content(Payload({"site": "a", "steps": wrong}).to_content())


def test_merged_description_of_several_sites() -> None:
    one, two = (Description(site=name, rows=3, has_weights=True) for name in ("a", "b"))
    both: dict[str, Any] = {"sites": [one.model_dump(), two.model_dump()], "num_bytes": 7}
    assert Description.several_from_values(both, 2) == [one, two]
    alone = one.model_dump()
    assert Description.several_from_values(alone, 1) == [one]
    wrong: list[tuple[dict[str, Any], int]] = [({"sites": [each]}, 1) for each in ({"rows": 1}, 5, "a", None, [])]
    for values, count in ((both, 1), (both, 3), (alone, 2), *wrong):
        with pytest.raises(MessageError):
            Description.several_from_values(values, count)


@pytest.mark.parametrize(
    "wrong",
    [
        {"server_round": -1},
        {"server_round": 2**70},
        {"server_round": "1"},
        {"server_round": None},
        {"proximal_mu": -1e308},
        {"proximal_mu": float("nan")},
        {"proximal_mu": 2**70},
        {"proximal_mu": "0.1"},
        {"proximal_mu": True},
        {"everyone": 1},
        {"temperature": 1.0},
        {"more": 0},
    ],
)
def test_values_out_of_range_beside_a_head_are_rejected(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    payload = Payload({"server_round": 1, **wrong}, HEAD)
    with pytest.raises(MessageError, match=rf"its values are invalid \({name}\)"):
        HeadRequest.from_payload(payload, HEAD)


@pytest.mark.parametrize("temperature", [None, -1.0, 10**40, float("inf"), "1"])
def test_a_temperature_out_of_range_is_rejected(temperature: Any) -> None:
    payload = Payload({"server_round": 0, "temperature": temperature}, HEAD)
    with pytest.raises(MessageError, match=r"its values are invalid \(temperature\)"):
        CalibrateRequest.from_payload(payload, HEAD)
