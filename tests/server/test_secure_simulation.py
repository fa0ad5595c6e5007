"""Secure summation in simulation: the same heads as plain runs, from sums whose order does not matter."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import FedAvg
from hypothesis import given
from hypothesis import strategies as st

from fedhead.client.release.masking import SecureSum
from fedhead.config import LocalConfig, RunConfig
from fedhead.errors import FedheadError, UserError
from fedhead.protocol.actions import CLUSTER, DESCRIBE, DISTANCES, STATISTICS, TRAIN
from fedhead.protocol.messages import Manifest, Payload, StatisticsRequest
from fedhead.protocol.steps import Masking, Release
from fedhead.secure.fixed_point import add
from fedhead.secure.replies import additive, layout_of, purpose_of, restored, with_session, without_session
from fedhead.secure.session import Purpose
from fedhead.server.report.card import render_card
from fedhead.server.report.page import render
from fedhead.server.runs.record import RunRecord
from fedhead.simulations import simulate
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.heads import HeadSums

SECURE = {"privacy": {"secure_sum": True}}


def statistics(rows: int, seed: int) -> FeatureStatistics:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, 4, generator=generator) * 3 + 1
    labels = torch.randint(3, (rows,), generator=generator)
    return FeatureStatistics.from_features(features, labels, 3, torch.ones(4))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_any_order_of_sites_gives_the_same_bits_and_the_sum(rows: list[int], random: Any) -> None:
    sites = [statistics(count, seed) for seed, count in enumerate(rows)]
    layout = layout_of(sites[0].to_arrays())
    vectors = [layout.pack(additive(site.to_arrays()), len(sites)) for site in sites]

    def total(order: list[int]) -> dict[str, Any]:
        summed = vectors[order[0]].copy()
        for place in order[1:]:
            add(summed, vectors[place])
        return restored(layout.unpack(summed), sites[0].to_arrays())

    order = list(range(len(sites)))
    first = total(order)
    random.shuffle(order)
    for name, array in total(order).items():
        assert array.tobytes() == first[name].tobytes()
    summed = FeatureStatistics.from_arrays(first, sites[0])
    expected = sites[0].copy()
    for other in sites[1:]:
        expected += other
    assert summed.is_close(expected, 1e-13)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    folder = tmp_path_factory.mktemp("runs")
    config: dict[str, Any] = {"rounds": 2, "simulation": {"sites": 5}}
    return {
        name: simulate(RunConfig(**config, **more), out=folder / name)
        for name, more in (("plain", {"keep_sums": "total", "diagnose": False}), ("secure", SECURE))
    }


def test_the_head_is_that_of_the_plain_run(runs: Mapping[str, Any]) -> None:
    plain, secure = runs["plain"], runs["secure"]
    first, second = plain.outcome.statistics, secure.outcome.statistics
    assert second.is_close(first, 1e-12)
    torch.testing.assert_close(secure.outcome.head.weight, plain.outcome.head.weight, rtol=1e-5, atol=1e-6)
    for one, two in zip(plain.history, secure.history, strict=True):
        assert two.loss == pytest.approx(one.loss, rel=1e-5)
        assert two.score == one.score
        assert two.sites == one.sites
    assert secure.accuracy == plain.accuracy

    assert secure.outcome.calibrated.calibration.temperature == pytest.approx(
        plain.outcome.calibrated.calibration.temperature, rel=1e-6
    )


def test_nothing_of_a_single_site_is_kept(runs: Mapping[str, Any]) -> None:
    secure = runs["secure"]
    assert secure.score_by_site == {}
    assert secure.outcome.coverage == []
    record = RunRecord.read(secure.run_dir)
    assert record.sites == {}
    assert record.evaluation["diagnosis"] == []
    assert not any((secure.run_dir / "sums").glob("*"))


def test_report_and_card_say_what_was_protected_and_what_was_not(runs: Mapping[str, Any]) -> None:
    for name, said in (("secure", "cannot be identified"), ("plain", "Neither secure summation nor noise was on")):
        record = RunRecord.read(runs[name].run_dir)
        assert said in render(record)
        assert said in render_card(record).replace("\\", "")
    assert "from 5 sites" in render(RunRecord.read(runs["secure"].run_dir))


def test_sums_of_simulated_sites_do_not_depend_on_which_rows_are_together() -> None:
    # Statistics of disjoint sites add to those of their union, up to the last of 64 fraction bits of each value.
    results = [
        simulate(RunConfig(rounds=0, simulation={"sites": sites, "partition": "iid", "min_class_count": 0}, **SECURE))
        for sites in (3, 7)
    ]
    first, second = (one.outcome.statistics for one in results)
    assert first.is_close(second, 1e-12)
    weights = [one.outcome.head.weight for one in results]
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["FedProx", "FedAvgM", "FedAdam", "FedAdagrad", "FedYogi"])
def test_averaging_strategies_train_as_in_plain_runs(name: str) -> None:
    strategy: dict[str, Any] = {"name": name} | ({"proximal_mu": 0.1} if name == "FedProx" else {})
    config = {"rounds": 2, "init": "zeros", "strategy": strategy, "simulation": {"sites": 3}}
    plain = simulate(RunConfig(**config, keep_sums="total", diagnose=False))
    secure = simulate(RunConfig(**config, **SECURE))
    torch.testing.assert_close(secure.outcome.head.weight, plain.outcome.head.weight, rtol=1e-4, atol=1e-5)


REFUSED = [
    ({"strategy": {"name": "Krum", "num_malicious_nodes": 1}}, "needs each site's"),
    ({"strategy": {"name": "FedMedian"}}, "needs each site's"),
    ({"strategy": {"name": "FedTrimmedAvg"}}, "needs each site's"),
    ({"strategy": {"name": "QFedAvg", "client_learning_rate": 0.1}}, "needs each site's"),
    ({"keep_sums": "folder"}, "remove keep_sums"),
    ({"keep_sums": "none"}, "remove keep_sums"),
    ({"diagnose": True}, "remove diagnose = true"),
    ({"worth": True}, "remove worth = true"),
    ({"simulation": {"sites": 2}}, "needs 3 sites or more"),
    ({"strategy": {"name": "FedAvg", "fraction_train": 0.2}}, "needs 3 sites or more"),
]


@pytest.mark.parametrize(("settings", "said"), REFUSED)
def test_settings_that_need_single_replies_are_refused_before_the_run(
    settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        simulate(RunConfig(**settings, **SECURE), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_own_strategies_and_apps_are_refused() -> None:
    class Own(FedAvg):
        pass

    with pytest.raises(UserError, match="Own needs each site's"):
        simulate(RunConfig(**SECURE), strategy=Own())
    with pytest.raises(UserError, match="Apps of sites' own"):
        simulate(RunConfig(**SECURE), apps={"site-0": None})  # type: ignore[dict-item]


def test_a_site_that_demands_masks_sends_nothing_in_the_clear() -> None:
    step = SecureSum(required=True)
    sums = Payload({}, {"x": np.ones(2)})
    with pytest.raises(FedheadError, match=r"set secure_sum = true under \[privacy\] in run.toml"):
        step.leave(sums, Release(STATISTICS, "here"))
    assert SecureSum().leave(sums, Release(STATISTICS, "here")) is sums
    description = Payload({"rows": 3})
    assert step.leave(description, Release(DESCRIBE, "here")) is description
    left = step.leave(sums, Release(TRAIN, "here", masking=Masking(lambda arrays: np.zeros((2, 2), np.uint64), 3)))
    assert set(left.arrays) == {"sum"}
    assert not left.values


def manifest(**changes: Any) -> Manifest:
    told: dict[str, Any] = {
        "run": "r",
        "backbone": "b",
        "layer": "l",
        "backbone_digest": "0" * 64,
        "classes": ("x", "y"),
    }
    told |= {"weights_digest": "0" * 64, "num_features": 3, "head": "linear", "holdout": 0.2, "seed": 0}
    return Manifest(**{**told, "local": LocalConfig(), **changes})


def test_the_purpose_of_a_request_does_not_depend_on_the_round() -> None:
    arrays = {"weight": np.ones((2, 3), np.float32)}

    def purpose(values: dict[str, Any], arrays: Mapping[str, Any] = arrays, **changes: Any) -> Purpose:
        return purpose_of(manifest(**changes), TRAIN, Payload(values, arrays))

    first = purpose({"server_round": 1, "everyone": True, "proximal_mu": None})
    assert (first.run, first.what, first.rows) == ("r", TRAIN, "train")
    assert first == purpose({"server_round": 2, "everyone": False, "proximal_mu": None}, seed=1)
    assert first == purpose({"proximal_mu": 0.1})
    assert first != purpose({"proximal_mu": None}, {"weight": np.zeros((2, 3), np.float32)})
    assert first != purpose({"proximal_mu": None}, backbone_digest="1" * 64)
    assert first.topic == purpose({"proximal_mu": None}, run="other").topic
    plain = Payload(StatisticsRequest(rows="held_out").model_dump())
    assert purpose_of(manifest(), STATISTICS, plain).rows == "held_out"
    moments = Payload(StatisticsRequest(what="moments", rows="held_out").model_dump())
    assert purpose_of(manifest(), STATISTICS, plain) == purpose_of(manifest(classes=("b", "a")), STATISTICS, moments)
    lifted = Payload(StatisticsRequest(rows="held_out", map="2" * 64).model_dump())
    assert purpose_of(manifest(), STATISTICS, plain) == purpose_of(manifest(), STATISTICS, lifted)
    request, session = without_session(with_session(plain, {"terms": 3}, {"keys": np.zeros(2, np.uint8)}))
    assert (request.values, dict(session.values), list(session.arrays)) == (plain.values, {"terms": 3}, ["keys"])


def test_all_sums_of_features_have_one_topic() -> None:
    plain = purpose_of(manifest(), STATISTICS, Payload(StatisticsRequest().model_dump()))
    lifted = purpose_of(manifest(seed=1), STATISTICS, Payload(StatisticsRequest(map="2" * 64).model_dump()))
    unit = purpose_of(manifest(classes=("a", "b", "c")), DISTANCES, Payload({"form": "unit"}))
    assert (unit.rows, unit.subject) == ("train", plain.subject)
    assert plain.topic == lifted.topic == unit.topic
    centres = np.array([[1.0, 0.0], [-1.0, 0.0]])
    by_cluster = [
        purpose_of(
            manifest(task="clusters", classes=("all rows",)),
            CLUSTER,
            Payload({"stage": stage, "rows": "train", "sizes": [2]}, {"centres": moved}),
        )
        for stage in ("sums", "statistics")
        for moved in (centres, centres * (1 + 1e-7))
    ]
    assert {one.topic for one in by_cluster} == {plain.topic}
    counts = purpose_of(manifest(), DISTANCES, Payload({"form": "unit"}, {"mean": np.zeros(3)}))
    assert counts.rows == "held_out"
    held_out = purpose_of(manifest(), STATISTICS, Payload(StatisticsRequest(rows="held_out").model_dump()))
    other = purpose_of(manifest(backbone_digest="1" * 64), STATISTICS, Payload(StatisticsRequest().model_dump()))
    assert len({plain.topic, counts.topic, held_out.topic, other.topic}) == 4


def test_the_manifest_names_secure_summation_only_where_it_is_on() -> None:
    # Sites of earlier releases reject keys that they do not know.
    assert "secure_sum" not in manifest().wire()
    assert manifest(secure_sum=True).wire()["secure_sum"] is True
    assert Manifest(**manifest(secure_sum=True).wire()).secure_sum


HEAD = {"weight": np.zeros((2, 3), np.float32)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metrics": np.array([1.0, 1.0, 0.0, 1.0, 0.0])}, "losses or scores without rows"),
        ({"metrics": np.array([0.5, 1.0, 0.0, 0.0, 0.0])}, "not whole"),
        ({"metrics": np.array([1.0, -1.0, 0.0, 0.0, 0.0])}, "negative"),
        ({"metrics": np.zeros(5), "update.weight": np.ones((2, 3))}, "without training rows"),
        ({"update.weight": np.full((2, 3), 1e16)}, "beyond"),
        ({"update.weight": np.ones((3, 3))}, "instead of"),
        ({"update.bias": np.ones(3)}, "contains the arrays"),
    ],
)
def test_impossible_updates_are_rejected(changes: dict[str, Any], said: str) -> None:
    nothing = HeadSums.unchanged(HEAD)
    made = {"weight": np.ones((2, 3), np.float32)}
    good = HeadSums(made, np.array([4.0, 0.5, 2.0, 1.0, 1.0]), base=HEAD).to_arrays()
    read = HeadSums.from_arrays(good, nothing)
    assert read.metrics.tolist() == [4.0, 0.5, 2.0, 1.0, 1.0]
    twice = HeadSums.from_arrays({name: 2 * array for name, array in good.items()}, nothing)
    for one in (read, twice, read + read):
        np.testing.assert_array_equal(one.heads["weight"], made["weight"])
    assert (read + read).to_arrays()["update.weight"].tolist() == twice.to_arrays()["update.weight"].tolist()
    with pytest.raises(ValueError, match=said):
        HeadSums.from_arrays({**good, **changes}, nothing)
