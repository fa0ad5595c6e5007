import pytest

from fedhead.errors import UserError
from fedhead.tuning import TuneSpec, parse_schedule, parse_tune


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("head", TuneSpec("head")),
        ("last:2", TuneSpec("full", "last:2")),
        ("layer4", TuneSpec("full", "layer4")),
        ("blocks.1?+norm", TuneSpec("full", "blocks.1?+norm")),
        ("bitfit", TuneSpec("bitfit", "last:4", chosen=False)),
        ("norm@all", TuneSpec("norm", "all")),
        ("lora:8", TuneSpec("lora", "last:4", 8, chosen=False)),
        ("lora:16:ffa@last:2", TuneSpec("lora", "last:2", 16, "ffa")),
    ],
)
def test_specs_are_parsed_and_written_back(text: str, spec: TuneSpec) -> None:
    assert parse_tune(text) == spec
    assert str(spec) == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected 'head', 'last:2'"),
        ("last:0", "counted from 1"),
        ("last:-1", "counted from 1"),
        ("last:²", "counted from 1"),
        ("last:", "counted from 1"),
        ("lora", "LoRA is 1 to 1024"),
        ("lora:0", "LoRA is 1 to 1024"),
        ("lora:9999", "LoRA is 1 to 1024"),
        ("lora:8:dora", "optionally with 'ffa'"),
        ("lora:8@", "expected 'head'"),
        ("head@last:2", "expected 'head'"),
        ("layer4@last:2", "expected 'head'"),
        ("layer4+", "expected 'head'"),
        ("last:1\n", "printable"),
        ("x" * 501, "at most 500"),
    ],
)
def test_malformed_specs_are_rejected(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_tune(text)


def test_a_stage_follows_from_the_round() -> None:
    schedule = parse_schedule({10: "last:2", 1: "head", 5: "last:1"})
    assert [schedule.stage(number) for number in (1, 4, 5, 9, 10, 99)] == [0, 0, 1, 1, 2, 2]
    assert [number for number in range(12) if schedule.begins(number)] == [5, 10]


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ({2: "head", 3: "last:1"}, "begins in round 1"),
        ({1: "last:1", 2: "head", 3: "last:2"}, "The head alone trains first"),
        ({1: "head"}, "layers of the backbone last"),
        ({1: "last:1", 2: "lora:8"}, "one rank"),
        ({1: "lora:4@last:1", 2: "lora:8"}, "one rank"),
        ({1: "lats:1"}, "expected"),
    ],
)
def test_malformed_schedules_are_rejected(stages: dict[int, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_schedule(stages)
