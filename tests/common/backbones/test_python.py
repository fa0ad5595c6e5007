import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fedhead.backbones import Backbone, load_backbone
from fedhead.errors import UserError

SOURCE = """
import torch
from torch import nn
from fedhead.backbones import Backbone, ImagePreprocessing

GREY = ImagePreprocessing(1, (8, 8), None, (0.5,), (0.5,))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3)
        self.unused = nn.Linear(2, 2)
        self.gru = nn.GRU(4, 3, batch_first=True)
        self.scale = nn.Parameter(torch.ones(3))
        self.tail = nn.Linear(3, 5)

    def forward(self, x):
        if x.mean() > 100:  # what no tracer can follow
            x = x / 100
        x = self.stem(x).flatten(2).transpose(1, 2)
        x, state = self.gru(x)
        return self.tail(x[:, -1] * self.scale)

def pair(): return Net(), GREY
def ready(): return Backbone("mine:net", Net(), GREY, pooling="max")
def bare(): return Net()
def number(): return 3
def fails(): raise KeyError("weights.pt")
def misfit(): return Net(), ImagePreprocessing.imagenet(32)
class Tells(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Says()
    def forward(self, x): return self.inner(x)["out"]
class Says(nn.Module):
    def forward(self, x): return {"out": x.flatten(1)}
def says(): return Tells(), GREY
"""


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine.py").write_text(SOURCE)
    sys.modules.pop("mine", None)
    return tmp_path


def test_backbone_from_module_and_preprocessing(own_folder: Path) -> None:
    backbone = load_backbone("python:mine:pair")
    assert (backbone.num_features, backbone.spec, backbone.trained) == (5, "python:mine:pair", True)
    image = Image.new("L", (20, 30), 100)
    assert torch.equal(backbone.features_of([image]), backbone.features_of([image]))
    assert load_backbone("python:mine:pair").digest == backbone.digest
    assert load_backbone("python:mine:pair", seed=1).digest != backbone.digest
    backbone.save(own_folder / "b.safetensors")
    assert Backbone.load(own_folder / "b.safetensors").digest == backbone.digest


def test_user_backbone_keeps_its_pooling() -> None:
    backbone = load_backbone("python:mine:ready")
    assert (backbone.spec, backbone.pooling) == ("python:mine:ready", "max")


def test_a_layer_of_a_module_that_cannot_be_traced() -> None:
    stem = load_backbone("python:mine:pair", layer="stem")
    assert stem.num_features == 4
    assert list(stem.tensors()) == ["stem.bias", "stem.weight"]
    gru = load_backbone("python:mine:pair", layer="gru:last")
    assert gru.num_features == 3
    assert {name.partition(".")[0] for name in gru.tensors()} == {"stem", "gru"}


def test_weights_come_from_a_file() -> None:
    state = {name: torch.full_like(tensor, 0.5) for name, tensor in load_backbone("python:mine:pair").tensors().items()}
    save_file(state, "w.safetensors")
    backbone = load_backbone("python:mine:pair", weights="w.safetensors", seed=3)
    assert all((tensor == 0.5).all() for tensor in backbone.tensors().values())
    save_file({"other": torch.zeros(1)}, "w.safetensors")
    with pytest.raises(UserError, match="unknown: other"):
        load_backbone("python:mine:pair", weights="w.safetensors")


@pytest.mark.parametrize(
    ("name", "layer", "words"),
    [
        ("mine", "penultimate", "Expected python:MODULE:FUNCTION"),
        ("nowhere:f", "penultimate", "cannot be imported"),
        ("mine:nothing", "penultimate", "no function 'nothing'"),
        ("mine:bare", "penultimate", "a module without its preprocessing; expected a Backbone or"),
        ("mine:number", "penultimate", "returned int"),
        ("mine:fails", "penultimate", "failed: KeyError: 'weights.pt'"),
        ("mine:misfit", "penultimate", "fails on the output of its preprocessing: RuntimeError"),
        ("mine:pair", "steem", "Did you mean 'stem'"),
        ("mine:pair", "unused", "not reached by an input"),
        ("mine:says", "inner", "returns a dict, not a tensor"),
    ],
)
def test_other_results_are_rejected(name: str, layer: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_backbone(f"python:{name}", layer=layer)
    with pytest.raises(UserError, match="use 'default'"):
        load_backbone(f"python:{name}", weights="random")


@pytest.mark.slow
def test_run_needs_only_the_module_file(own_folder: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "from fedhead.cli import main; main()",
        "simulate",
        "--backbone",
        "python:mine:pair",
    ]
    ended = subprocess.run(
        [*command, "--sites", "2", "--rounds", "0", "--json"], capture_output=True, text=True, check=False, timeout=200
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["accuracy"] > 0.12
