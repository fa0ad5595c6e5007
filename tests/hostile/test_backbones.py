"""A coordinator that chooses the backbone: weights that no operator allowed, and files of any claimed size."""

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedhead.backbones import Backbone, load_backbone
from fedhead.backbones.catalogue import entry_of
from fedhead.backbones.weights import export_weights
from fedhead.client.agreement import Agreement
from fedhead.client.backbones import AcceptedBackbones
from fedhead.client.description_handlers import description_of
from fedhead.client.local_site import LocalSite
from fedhead.client.release.approval import Approvals
from fedhead.client.release.payloads import Payloads
from fedhead.client.settings import Kit
from fedhead.config import RunConfig
from fedhead.data import load_samples
from fedhead.errors import FedheadError, UserError
from fedhead.protocol.messages import Manifest, WeightsChunk
from fedhead.server.provision import backbones_of, provision


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def chosen() -> Backbone:
    """The package's network with weights of the coordinator's choice."""
    backbone = load_backbone("bundled:glyphnet")
    with torch.no_grad():
        next(iter(backbone.module.parameters())).mul_(1.01)
    return Backbone("bundled:glyphnet", backbone.module, backbone.preprocessing)


def manifest_of(backbone: Backbone, spec: str = "") -> Manifest:
    values: dict[str, Any] = {
        "run": "run",
        "backbone": spec or backbone.spec,
        "layer": backbone.layer,
        "backbone_digest": backbone.digest,
        "weights_digest": backbone.weights_digest,
        "num_features": backbone.num_features,
        "classes": load_samples("digits").classes,
        "head": "linear",
        "holdout": 0.2,
        "seed": 0,
        "local": RunConfig().local,
    }
    return Manifest(**values)


def site(*allow: str, max_bytes: int = 2**30) -> LocalSite:
    return LocalSite("here", "digits", "cpu", backbones=AcceptedBackbones(frozenset(allow), max_bytes))


def chunks(blob: bytes, size: int) -> list[WeightsChunk]:
    file = hashlib.sha256(blob).hexdigest()
    data = np.frombuffer(blob, np.uint8)
    return [WeightsChunk(file, len(blob), start, data[start : start + size]) for start in range(0, len(blob), size)]


def test_unknown_weights_are_refused_until_site_toml_has_the_entry(home: Path, chosen: Backbone) -> None:
    manifest = manifest_of(chosen)
    careful = site()
    with pytest.raises(FedheadError, match="does not know these weights of bundled:glyphnet") as refused:
        careful.has_weights(manifest)
    with pytest.raises(FedheadError, match="does not know"):
        careful.install(manifest, chunks(chosen.to_bytes(), 10**6)[0])
    assert not home.exists()
    line = re.search(r'\[backbones\] allow in its site\.toml: "(.*)"\.$', str(refused.value))
    assert line is not None
    allowing = site(line[1])
    assert not allowing.has_weights(manifest)
    for chunk in chunks(chosen.to_bytes(), 50_000):
        allowing.install(manifest, chunk)
    assert allowing.has_weights(manifest)
    # The file is on disk, and is no reason to trust it once the operator has removed the line.
    with pytest.raises(FedheadError, match="does not know"):
        site().has_weights(manifest)


def test_the_package_and_the_libraries_caches_need_no_list(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = site()
    assert own.has_weights(manifest_of(load_backbone("bundled:glyphnet")))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    fetched = load_backbone("torchvision:squeezenet1_1", weights="random", seed=4)
    manifest = manifest_of(fetched)
    with pytest.raises(FedheadError, match="does not know"):
        own.has_weights(manifest)
    entry = entry_of(fetched.spec)
    assert entry is not None and entry.origin is not None
    path = tmp_path / "torch" / "hub" / "checkpoints" / entry.origin.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    torch.save(dict(fetched.module.state_dict()), path)
    assert own.has_weights(manifest)


def test_a_digest_allows_no_function(chosen: Backbone) -> None:
    manifest = manifest_of(chosen, "python:os:abort")
    with pytest.raises(FedheadError, match="runs no code"):
        site(f"sha256:{chosen.weights_digest}").has_weights(manifest)


@pytest.mark.parametrize("place", ["here", "nowhere"])
def test_no_answer_says_whether_a_folder_exists(chosen: Backbone, tmp_path: Path, place: str) -> None:
    (tmp_path / "here").mkdir()
    for folder in (tmp_path / place, Path("..") / place, Path("~") / place):
        with pytest.raises(FedheadError, match="looks into none that a coordinator names"):
            site().has_weights(manifest_of(chosen, f"hf:{folder}"))


def test_a_claimed_size_is_capped_before_anything_is_written(home: Path, chosen: Backbone) -> None:
    manifest, digest = manifest_of(chosen), f"sha256:{chosen.weights_digest}"
    byte = np.zeros(1, np.uint8)
    with pytest.raises(FedheadError, match=r"takes 1\.07 GB at most"):
        site(digest).install(manifest, WeightsChunk("0" * 64, 2**30 + 1, 0, byte))
    assert not home.exists()
    with pytest.raises(FedheadError, match="has no room") as full:
        site(digest, max_bytes=2**53).install(manifest, WeightsChunk("0" * 64, 2**52, 0, byte))
    assert str(home) not in str(full.value)
    assert not list(home.glob("weights/*"))


def test_unfinished_files_do_not_pile_up(home: Path, chosen: Backbone) -> None:
    manifest, data = manifest_of(chosen), np.zeros(1000, np.uint8)
    receiving = site(f"sha256:{chosen.weights_digest}")
    for number in range(5):
        assert receiving.install(manifest, WeightsChunk(f"{number:064x}", 5000, 0, data)) == 1000
    assert receiving.install(manifest, WeightsChunk(f"{4:064x}", 4000, 0, data)) == 1000
    (unfinished,) = home.glob("weights/*")
    # Another claim about the same file continues none of it, and nothing is written beyond a claim.
    assert receiving.install(manifest, WeightsChunk(f"{4:064x}", 4000, 1000, np.zeros(3001, np.uint8))) == 1000
    assert unfinished.stat().st_size == 1000


def test_kits_allow_the_backbone_of_a_run(tmp_path: Path, chosen: Backbone) -> None:
    chosen.save(tmp_path / "chosen.safetensors")
    config = RunConfig(weights=str(tmp_path / "chosen.safetensors"))
    provision(tmp_path / "kit", "127.0.0.1:9092", ["a"], backbones=backbones_of(config))
    settings = Kit(tmp_path / "kit" / "a").settings({})
    assert settings.backbones.allow == (f"sha256:{chosen.weights_digest}",)
    assert "bundled:glyphnet, layer penultimate" in (tmp_path / "kit" / "a" / "site.toml").read_text()
    further = Kit(tmp_path / "kit" / "a").settings({"backbones": {"allow": ["vectors:words.txt"]}})
    assert further.backbones.allow == (*settings.backbones.allow, "vectors:words.txt")
    assert backbones_of(RunConfig()) == backbones_of(RunConfig(backbone="identity")) == {}
    assert list(backbones_of(RunConfig(backbone="python:no:such"))) == ["python:no:such"]


@pytest.mark.parametrize("wrong", ["sha256:abc", "sha256:" + "A" * 64, "resnet18", "torchvision:"])
def test_a_list_of_other_things_is_a_sentence(tmp_path: Path, wrong: str) -> None:
    provision(tmp_path / "kit", "127.0.0.1:9092", ["a"])
    with pytest.raises(UserError, match=r"neither weights, as sha256: and 64 hexadecimal digits, nor"):
        Kit(tmp_path / "kit" / "a").settings({"backbones": {"allow": [wrong]}})


def test_listed_weights_that_spell_out_rows_give_no_sums(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vocabulary = [f"word{number}" for number in range(200)]
    vectors = tmp_path / "vectors.txt"
    hot = np.eye(len(vocabulary), dtype=int)
    vectors.write_text(
        "\n".join(f"{word} {' '.join(map(str, row))}" for word, row in zip(vocabulary, hot, strict=True))
    )
    generator = np.random.default_rng(0)
    notes = [f"{' '.join(generator.choice(vocabulary, 6))},{'ab'[row % 2]}" for row in range(60)]
    (tmp_path / "notes.csv").write_text("\n".join(["text,label", *notes]))
    chosen = load_backbone(f"vectors:{vectors}")
    manifest = manifest_of(chosen).model_copy(update={"kind": "text", "classes": ("a", "b")})

    def open_site(check_features: bool) -> LocalSite:
        accepted = AcceptedBackbones(frozenset({chosen.spec}), check_features=check_features)
        opened = LocalSite("here", f"csv:{tmp_path / 'notes.csv'}", "cpu", backbones=accepted)
        for chunk in chunks(chosen.to_bytes(), 10**6):
            opened.install(manifest, chunk)
        return opened

    with pytest.raises(FedheadError, match="would show single rows of the site; its own log says how"):
        open_site(check_features=True).open(manifest)
    assert re.search(r"carry \d+ % of the features \(bar: 40 %\).*check_features = false", caplog.text)
    assert open_site(check_features=False).open(manifest).guarded.num_rows == 60


def test_agreement_to_known_weights_lets_no_others_in(home: Path, tmp_path: Path, chosen: Backbone) -> None:
    shown: list[str] = []

    def ask(text: str) -> bool:
        shown.append(text)
        return len(shown) == 1

    known = hashlib.sha256(b"weights that a library publishes").hexdigest()
    approvals = Approvals(tmp_path / "approvals.json", "one", ask, Payloads(tmp_path / "to-approve"))
    careful = LocalSite("here", "digits", "cpu", backbones=AcceptedBackbones(agree=approvals.agree))
    manifest = manifest_of(chosen)
    # The digest of the backbone is a claim, which nothing can check before the weights are here.
    assert not careful.has_weights(manifest.model_copy(update={"weights_digest": known}))
    assert known in shown[0]
    with pytest.raises(FedheadError, match="does not know"):
        careful.has_weights(manifest)
    assert len(shown) == 2


def test_a_backbone_at_hand_takes_no_other_name(home: Path) -> None:
    """The name decides which rules apply, and is in the ledger."""
    opened, pixels = site(), load_backbone("bundled:pixels")
    manifest = manifest_of(pixels)
    opened.check(manifest, pixels.probe())
    other = manifest_of(load_backbone("bundled:glyphnet"))
    for changes in ({"backbone": other.backbone}, {"layer": "hidden:0"}, {"weights_digest": other.weights_digest}):
        with pytest.raises(FedheadError, match="spec, layer or weights of another"):
            opened.check(manifest.model_copy(update=changes), pixels.probe())
        with pytest.raises(FedheadError, match="spec, layer or weights of another"):
            opened.open(manifest.model_copy(update=changes))
    # Not described first, as when the weights came for another run.
    with pytest.raises(FedheadError, match="fed or built differently here"):
        site().open(other.model_copy(update={"backbone_digest": manifest.backbone_digest}))


def test_weights_under_the_spec_of_others_do_not_show_where_they_are(home: Path) -> None:
    """A list has weights by their digest, and the coordinator chooses the spec."""
    chosen = load_backbone("torchvision:squeezenet1_1", weights="random", seed=4)
    export_weights(chosen)
    listed = AcceptedBackbones(frozenset({f"sha256:{chosen.weights_digest}"}))
    site = LocalSite("here", "digits", "cpu", backbones=listed)
    agreed = Agreement(manifest_of(chosen, "torchvision:alexnet"), chosen.probe(), None)
    assert description_of(site, agreed).refusal == "The site cannot do it; its own log says why."
