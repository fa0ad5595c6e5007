import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedhead.messages import (
    METRICS,
    PAYLOAD,
    RECORD,
    Description,
    HeadReply,
    HeadRequest,
    MessageError,
    Payload,
    payload_bytes,
    single_bytes,
)

HEAD = {"weight": np.zeros((3, 4), np.float32), "bias": np.zeros(3, np.float32)}
GOOD_METRICS = np.array([[10.0, 0.5, 4.0, 2.5, 3.0]])


def reply(**changes: object) -> RecordDict:
    arrays = {"weight": np.ones((3, 4), np.float32), "bias": np.ones(3, np.float32), "metrics": GOOD_METRICS}
    return Payload({}, {name: value for name, value in {**arrays, **changes}.items() if value is not None}).to_content()  # type: ignore[misc]


def test_values_and_arrays_arrive_as_they_were_sent() -> None:
    sent = Payload({"a": [1, "ü", None]}, {"x": np.arange(6.0).reshape(2, 3), "empty": np.zeros((0, 2), np.int64)})
    received = Payload.from_content(sent.to_content())
    assert received.values == sent.values
    assert received.arrays.keys() == sent.arrays.keys()
    for name, array in sent.arrays.items():
        assert np.array_equal(received.arrays[name], array)
        assert received.arrays[name].dtype == array.dtype


def test_a_head_travels_both_ways() -> None:
    request = HeadRequest(HEAD, server_round=3, proximal_mu=0.1, everyone=True)
    received = HeadRequest.from_content(request.to_content(), HEAD)
    assert (received.server_round, received.proximal_mu, received.everyone) == (3, 0.1, True)
    answer = HeadReply.from_content(reply(), HEAD)
    assert np.array_equal(answer.metrics, GOOD_METRICS)
    assert answer.num_bytes == payload_bytes(reply()) == HeadReply(GOOD_METRICS, HEAD).single_bytes()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (reply(weight=None), "holds the arrays"),
        (reply(extra=np.zeros(1)), "holds the arrays"),
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
        (reply(metrics=np.array([[10.0, 0.5, 4.0, 2.5, 5.0]])), "more rows are correct"),
        (RecordDict(), "has the records"),
        (RecordDict({"other": ConfigRecord({PAYLOAD: b""})}), "has the records"),
        (RecordDict({RECORD: ConfigRecord({"x": b""})}), "has the keys"),
        (RecordDict({RECORD: ConfigRecord({PAYLOAD: "text"})}), "not bytes"),
        (RecordDict({RECORD: ConfigRecord({PAYLOAD: b"short"})}), "cannot be read"),
        (RecordDict({RECORD: ArrayRecord({PAYLOAD: Array(np.zeros(1))})}), "has the keys"),
    ],
)
def test_a_reply_of_another_form_is_refused_with_the_reason(content: RecordDict, words: str) -> None:
    with pytest.raises(MessageError, match=words):
        HeadReply.from_content(content, HEAD)


def test_only_a_grid_in_this_process_may_speak_for_several_sites() -> None:
    merged = HeadReply(np.repeat(GOOD_METRICS, 2, axis=0), HEAD, ("a", "b"), {"c": "why"}, 99).to_content()
    with pytest.raises(MessageError, match="metrics are"):
        HeadReply.from_content(merged, HEAD)
    answer = HeadReply.from_content(merged, HEAD, merged=True)
    assert (answer.sites, answer.dropped, answer.num_bytes) == (("a", "b"), {"c": "why"}, 99)


@pytest.mark.parametrize("values", [{}, {"site": ""}, {"site": "a", "rows": -1}])
def test_a_description_must_describe(values: dict[str, object]) -> None:
    with pytest.raises(MessageError):
        Description.from_content(Payload(values).to_content())


def test_one_answer_may_describe_several_sites_and_no_others() -> None:
    one, two = (Description(site=name, rows=3, has_weights=True) for name in ("a", "b"))
    both = Payload({"sites": [one.model_dump(), two.model_dump()], "num_bytes": 7}).to_content()
    assert Description.several_from_content(both, 2) == [one, two]
    assert single_bytes(both) == 7
    alone = Payload(one.model_dump()).to_content()
    assert Description.several_from_content(alone, 1) == [one]
    for told in ({}, {"num_bytes": "many"}, {"num_bytes": -1}):
        plain = Payload(told).to_content()
        assert single_bytes(plain) == payload_bytes(plain)
    for content, count in ((both, 1), (both, 3), (alone, 2), (Payload({"sites": [{"rows": 1}]}).to_content(), 1)):
        with pytest.raises(MessageError):
            Description.several_from_content(content, count)
