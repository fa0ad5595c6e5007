import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedhead.client.release.approval import Approvals, read_approvals, revoke
from fedhead.client.release.payloads import Payloads
from fedhead.config import RunConfig
from fedhead.errors import FedheadError, UserError
from fedhead.protocol.actions import ACTIONS, TRAIN
from fedhead.protocol.messages import Manifest, Payload
from fedhead.protocol.steps import Basis, Release

PAYLOAD = Payload({"note": "none"}, {"sums": np.arange(3.0)})
MANIFEST = Manifest(
    run="5eed",
    backbone="bundled:glyphnet",
    layer="penultimate",
    backbone_digest="1" * 64,
    weights_digest="2" * 64,
    num_features=3,
    classes=("ill", "well"),
    head="linear",
    holdout=0.2,
    seed=0,
    local=RunConfig().local,
)


class Person:
    def __init__(self, *answers: bool) -> None:
        self.answers = list(answers)
        self.shown: list[str] = []

    def __call__(self, shown: str) -> bool:
        self.shown.append(shown)
        return self.answers.pop(0)


def release(action: str = "train", **changes: Any) -> Release:
    classes = {"ill\x1b[2J": 40, "well": 80}
    return Release(action, "here", 1, MANIFEST.model_copy(update=changes), ("train",), lambda: Basis(120, classes))


def approvals(folder: Path, ask: Person | None, coordinator: str = "one") -> Approvals:
    written = Payloads(folder / "to-approve")
    about = {"data": "csv:scans.csv", "address": "coord.example.org:9092"}
    path = folder / "approvals.json"
    return Approvals(path, coordinator, ask, written, **about, origin=lambda manifest: "part of fedhead")


def test_a_person_sees_run_backbone_rows_and_the_payload(tmp_path: Path) -> None:
    person = Person(True)
    assert approvals(tmp_path, person).leave(PAYLOAD, release()) is PAYLOAD
    (shown,) = person.shown
    for part in ("5eed", f"{ACTIONS[TRAIN].asks} (train)", "bundled:glyphnet, layer penultimate", "part of fedhead"):
        assert part in shown
    for part in ("sha256:" + "2" * 64, "120 of csv:scans.csv", "well 80", "coord.example.org:9092"):
        assert part in shown
    assert "\x1b" not in shown
    (summary,) = (tmp_path / "to-approve").glob("*.json")
    assert str(summary) in shown
    assert summary.with_suffix(".safetensors").read_bytes() == PAYLOAD.blob
    assert json.loads(summary.read_text())["arrays"]["sums"]["numbers"] == [0, 1, 2]


def test_a_person_sees_how_much_of_the_backbone_leaves(tmp_path: Path) -> None:
    person = Person(True)
    weights = np.zeros((20, 100), np.float32)
    trained = Payload({}, {"head.bias": np.zeros(2, np.float32), "tail.layer4.weight": weights})
    approvals(tmp_path, person).leave(trained, release(tune="last:2"))
    (shown,) = person.shown
    assert "last:2, which shows more of rows than a head alone" in shown
    assert "2,000 trained parameters of the backbone" in shown
    masked = Payload({}, {"update.tail.layer4.weight": weights})
    approvals(tmp_path, None).leave(masked, release(tune="last:2"))


def test_agreement_to_a_head_covers_no_layers(tmp_path: Path) -> None:
    approvals(tmp_path, Person(True)).leave(PAYLOAD, release())
    for tune in ("last:1", "lora:8"):
        with pytest.raises(FedheadError, match="approved"):
            approvals(tmp_path, None).leave(PAYLOAD, release(tune=tune))
    approvals(tmp_path, None).leave(PAYLOAD, release())


def test_agreement_to_layers_covers_no_other_objective_of_theirs(tmp_path: Path) -> None:
    approvals(tmp_path, Person(True)).leave(PAYLOAD, release(tune="last:1"))
    person = Person(True)
    trained = Payload({}, {"tail.a": np.zeros(30, np.float32), "objective.predictor.a": np.zeros(12, np.float32)})
    approvals(tmp_path, person).leave(trained, release(tune="last:1", objective="simsiam"))
    (shown,) = person.shown
    assert "last:1 by simsiam, which shows more" in shown
    assert "42 trained parameters of the backbone" in shown


def test_agreement_is_for_one_kind_run_backbone_and_coordinator_and_survives_a_restart(tmp_path: Path) -> None:
    approvals(tmp_path, Person(True)).leave(PAYLOAD, release())
    nobody = approvals(tmp_path, None)
    nobody.leave(Payload({"another": 1}), release())
    nobody.leave(PAYLOAD, Release("query.describe", "here"))
    changes = ({"run": "0ther"}, {"backbone_digest": "3" * 64}, {"weights_digest": "3" * 64}, {"layer": "hidden:0"})
    for other in (release("evaluate"), *(release(**change) for change in changes)):
        with pytest.raises(FedheadError, match="without a terminal"):
            nobody.leave(PAYLOAD, other)
    with pytest.raises(FedheadError, match="without a terminal"):
        approvals(tmp_path, None, "another").leave(PAYLOAD, release())


def test_a_person_who_declines_is_asked_again(tmp_path: Path) -> None:
    person = Person(False, False)
    for _ in range(2):
        with pytest.raises(FedheadError, match="operator of here did not approve train"):
            approvals(tmp_path, person).leave(PAYLOAD, release())
    assert len(person.shown) == 2
    assert not (tmp_path / "approvals.json").exists()


def test_revoked_agreement_is_asked_for_again_by_a_running_site(tmp_path: Path) -> None:
    person = Person(True, True, False)
    running, path = approvals(tmp_path, person), tmp_path / "approvals.json"
    running.leave(PAYLOAD, release())
    running.leave(PAYLOAD, release("evaluate"))
    assert [one.action for one in read_approvals(path)] == ["train", "evaluate"]
    with pytest.raises(UserError, match="no approval 3; there are 2"):
        revoke(path, [3])
    assert [one.action for one in revoke(path, [1])] == ["train"]
    running.leave(PAYLOAD, release("evaluate"))
    with pytest.raises(FedheadError, match="did not approve"):
        running.leave(PAYLOAD, release())


def test_revoking_while_a_person_is_asked_is_not_undone(tmp_path: Path) -> None:
    path = tmp_path / "approvals.json"
    approvals(tmp_path, Person(True)).leave(PAYLOAD, release())

    class Slow(Person):
        def __call__(self, shown: str) -> bool:
            revoke(path, [1])
            return super().__call__(shown)

    approvals(tmp_path, Slow(True)).leave(PAYLOAD, release("evaluate"))
    assert [one.action for one in read_approvals(path)] == ["evaluate"]


def test_unknown_weights_are_agreed_to_by_run(tmp_path: Path) -> None:
    person = Person(False, True, True)
    asked = approvals(tmp_path, person)
    assert not asked.agree(MANIFEST)
    assert asked.agree(MANIFEST)
    assert "unknown to this site" in person.shown[0]
    assert approvals(tmp_path, None).agree(MANIFEST)
    assert not approvals(tmp_path, None).agree(MANIFEST.model_copy(update={"run": "another"}))
    asked.leave(PAYLOAD, release())
    assert "agreed to by a person here" in person.shown[2]


@pytest.mark.parametrize("content", ['{"agreed": [{"run"', '{"agreed": 3}', "[]", '{"agreed": [{}]}'])
def test_damaged_approvals_approve_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "approvals.json").write_text(content)
    with pytest.raises(FedheadError, match="cannot be read, so nothing leaves") as refused:
        approvals(tmp_path, Person(True)).leave(PAYLOAD, release())
    assert str(tmp_path) not in str(refused.value)


def test_approvals_that_knew_no_run_are_void(tmp_path: Path) -> None:
    (tmp_path / "approvals.json").write_text('{"one": {"train": "2026-01-01T00:00:00+00:00"}}')
    with pytest.raises(FedheadError, match="without a terminal"):
        approvals(tmp_path, None).leave(PAYLOAD, release())


def test_no_agreement_is_lost_if_several_clients_add_theirs_at_once(tmp_path: Path) -> None:
    def agree(number: int) -> bool:
        return approvals(tmp_path, Person(True), str(number)).agree(MANIFEST)

    with ThreadPoolExecutor(8) as clients:
        assert all(clients.map(agree, range(40)))
    assert {one.coordinator for one in read_approvals(tmp_path / "approvals.json")} == set(map(str, range(40)))
