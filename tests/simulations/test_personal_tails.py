"""Adapters whose second matrices stay at the sites: a family of personal models."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from fedhead.cli import app
from fedhead.client import personal_tails
from fedhead.client.app import make_app
from fedhead.client.local_site import LocalSite
from fedhead.client.release.guard import Guard
from fedhead.config import RunConfig
from fedhead.errors import UserError
from fedhead.heads.tail import TAIL
from fedhead.model import TransferModel, find_site_model
from fedhead.server.observer import Observer
from fedhead.server.runs.history import Round
from fedhead.server.tuned_form import TunedForm
from fedhead.simulations import simulate
from fedhead.simulations.result import RunResult
from fedhead.sums.sums import Arrays

pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("one_thread")

SITES, ROWS = 3, 900
TUNE = {"layers": "lora:4:sa@last:2", "lr": 8e-3, "epochs": 2, "batch_size": 16}


class Digits:
    """Digits that two of three sites name otherwise, as a file for all and one for each site."""

    def __init__(self, folder: Path) -> None:
        digits = load_digits()
        images = np.repeat((255 - digits.images[:ROWS] / 16 * 255).astype(np.uint8)[..., None], 3, -1)
        labels = digits.target[:ROWS].copy()
        self.rows = [np.arange(site, ROWS, SITES) for site in range(SITES)]
        for site, own in enumerate(self.rows[1:]):
            labels[own] = (labels[own] + [1, 5][site]) % 10
        self.images, self.labels = images, labels
        self.data = f"npz:{folder / 'all.npz'}"
        np.savez(folder / "all.npz", images=images, labels=labels)
        for site, own in enumerate(self.rows):
            np.savez(folder / f"{site}.npz", images=images[own], labels=labels[own])
        self.folder = folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    return Digits(tmp_path_factory.mktemp("digits"))


def config(**values: Any) -> RunConfig:
    tune = {**TUNE, **values.pop("tune", {})}
    table = {"min_class_count": 0, "min_rows": 0, **values.pop("simulation", {})}
    return RunConfig(backbone="bundled:glyphnet", tune=tune, simulation=table, **{"rounds": 3, **values})


@pytest.fixture(scope="module")
def family(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return simulate(config(), digits.data, digits.rows, out=tmp_path_factory.mktemp("family") / "run")


class _KillAfter(Observer):
    def on_round(self, finished: Round) -> None:
        if finished.number == 1:
            raise KeyboardInterrupt


def test_first_matrices_are_averaged_and_second_ones_stay(
    digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds: dict[int, dict[str, tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], int]]] = defaultdict(dict)
    plain = personal_tails.train_in_chunks

    def noting(head: Any, incoming: Any, data: Any, sites: Any, *args: Any, **settings: Any) -> Iterator[Any]:
        for positions, made in plain(head, incoming, data, sites, *args, **settings):
            after = {name: value[0].clone() for name, value in made.parameters.items()}
            before = {name: value.clone() for name, value in incoming.items()}
            rounds[settings["round_number"]][sites[0].name] = (before, after, int(made.rows[0]))
            yield positions, made

    monkeypatch.setattr(personal_tails, "train_in_chunks", noting)
    result = simulate(config(rounds=2), digits.data, digits.rows, out=tmp_path / "run")
    assert sorted(rounds) == [1, 2] and all(len(one) == SITES for one in rounds.values())
    first, second = rounds[1], rounds[2]
    names = first["site-0"][0]
    stay = {name for name in names if ".lora_B." in name}
    assert stay and stay < names.keys()
    total = sum(rows for _, _, rows in first.values())
    for site, (before, _, _) in second.items():
        for name, value in before.items():
            if name in stay:
                assert torch.equal(value, first[site][1][name])
                assert not torch.equal(value, second[f"site-{(int(site[-1]) + 1) % SITES}"][0][name])
            else:
                mean = sum(after[name] * (rows / total) for _, after, rows in first.values())
                torch.testing.assert_close(value, mean, rtol=1e-5, atol=1e-6)
        assert all(not first[site][0][name].any() for name in stay)
    kept = load_file(next((tmp_path / "run" / "site-adapters" / "site-1").rglob("2.safetensors")))
    assert kept.keys() == stay
    assert all(np.array_equal(value, second["site-1"][1][name]) for name, value in kept.items())
    sent = sum(names[name].numel() for name in names.keys() - stay)
    assert 4 * sent < result.history[1].bytes_up / SITES < 4 * sent + 2000


def test_the_result_is_a_family_of_models_and_the_solved_head(family: RunResult) -> None:
    summary = family.summary()
    assert (summary["kept"], summary["kept_round"]) == ("personal", 0)
    assert summary["accuracy_solved"] == summary["accuracy"]
    made = family.outcome.personal
    assert made is not None and made.mode == "adapters" and made.pooled is not None
    assert made.pooled.right["personal"] > made.pooled.right["shared"]
    assert set(made.sites) == {"site-0", "site-1", "site-2"}
    assert family.run_dir is not None
    loaded = TransferModel.load(family.run_dir)
    assert loaded.backbone.digest == family.model.backbone.digest
    assert not list(family.run_dir.glob("tail*"))
    report, card = ((family.run_dir / name).read_text() for name in ("report.html", "MODEL_CARD.md"))
    assert "a family of personal models" in report
    assert "never left" in card and "solved head" in card


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_family(digits: Digits, family: RunResult, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        simulate(config(), digits.data, digits.rows, out=tmp_path / "run", observers=[_KillAfter()])
    resumed = simulate(None, digits.data, digits.rows, out=tmp_path / "run", resume=True)
    assert [one.loss for one in resumed.history] == [one.loss for one in family.history]
    assert resumed.outcome.personal == family.outcome.personal


def test_unproven_adapters_leave_the_solved_head_alone(digits: Digits, tmp_path: Path) -> None:
    result = simulate(config(rounds=1, tune={"lr": 1e-9}), digits.data, digits.rows, out=tmp_path / "run")
    assert result.summary()["kept"] == "solved"
    assert result.outcome.personal is None


def test_real_sites_make_the_same_family_and_keep_their_models(
    digits: Digits, family: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "home"))
    sites = [
        LocalSite(f"site-{site}", f"npz:{digits.folder / str(site)}.npz", "cpu", guard=Guard(0, 0))
        for site in range(SITES)
    ]
    apps = {site.name: make_app(lambda context, site=site: site) for site in sites}
    real = simulate(config(), digits.data, digits.rows, apps=apps, out=tmp_path / "real")
    np.testing.assert_allclose([one.loss for one in real.history], [one.loss for one in family.history], rtol=1e-2)
    assert real.summary()["kept"] == "personal"
    assert not (tmp_path / "real" / "site-adapters").exists()
    right = {}
    for site, own in enumerate(digits.rows):
        path = find_site_model(f"site-{site}")
        assert path is not None
        predicted = TransferModel.load(path).predict([Image.fromarray(one) for one in digits.images[own]])
        right[site] = np.mean(np.array(predicted) == digits.labels[own].astype(str))
        shared = real.model.predict([Image.fromarray(one) for one in digits.images[own]])
        assert right[site] > np.mean(np.array(shared) == digits.labels[own].astype(str))
    Image.fromarray(digits.images[0]).save(tmp_path / "one.png")
    done = CliRunner().invoke(app, ["predict", "--site-model", "site-0", str(tmp_path / "one.png"), "--json"])
    assert done.exit_code == 0, done.output


def test_no_site_trains_on_a_part_of_the_shared_adapters(
    digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_one(form: TunedForm, number: int, parameters: Arrays) -> Arrays:
        first = next(name for name in parameters if name.startswith(TAIL))
        return {name: value for name, value in parameters.items() if name != first}

    monkeypatch.setattr(TunedForm, "trained_in", without_one)
    result = simulate(config(rounds=1), digits.data, digits.rows, out=tmp_path / "run")
    assert result.summary()["kept"] == "solved"
    assert not list((tmp_path / "run").rglob("site-adapters/**/*.safetensors"))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"tune": {"layers": "lora:4:sb"}}, "'ffa' or 'sa'"),
        ({"tune": {"objective": "supcon"}}, "train on the task"),
        ({"tune": {"layers": "", "schedule": {1: "head", 2: "lora:4:sa"}}}, "leave schedule out"),
        ({"task": "multi-label"}, "for task 'classification'"),
        ({"personal": "closed"}, "leave it or tune out"),
    ],
)
def test_impossible_families_are_refused(digits: Digits, tmp_path: Path, values: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        simulate(config(**values), digits.data, digits.rows, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
