import json
import sys
from pathlib import Path

import click
import pytest
import torch
import torchvision
from click.testing import Result
from typer.testing import CliRunner

from fedhead.backbones import load_backbone
from fedhead.cli import app


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERMINAL_WIDTH", "100")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path


def backbones(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["backbones", *arguments])


def read(*arguments: str) -> object:
    result = backbones(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def refused(*arguments: str, status: int = 2) -> str:
    result = backbones(*arguments)
    assert result.exit_code == status, (result.exit_code, result.stderr)
    assert result.stdout == ""
    assert "unexpected" not in result.stderr
    return " ".join(click.unstyle(result.stderr).split())


def keep_in_torchs_cache(name: str) -> dict[str, torch.Tensor]:
    """Put random weights where torchvision keeps a model's."""
    torch.manual_seed(6)
    state: dict[str, torch.Tensor] = torchvision.models.get_model(name, weights=None).state_dict()
    file = torchvision.models.get_model_weights(name).DEFAULT.url.rpartition("/")[2]
    folder = Path("torch/hub/checkpoints")
    folder.mkdir(parents=True)
    torch.save(state, folder / file)
    return state


def test_without_a_pattern_the_sources_are_listed() -> None:
    counts = {row["source"]: row["backbones"] for row in read()}  # type: ignore[attr-defined]
    assert counts["bundled"] == 3
    assert counts["torchvision"] >= 80
    assert counts["timm"] > 1000
    assert counts["python"] is None
    text = backbones().stdout
    assert "python:MODULE:FUNCTION" in text
    assert "fedhead backbones 'timm:*'" in text


def test_wildcards_find_xception() -> None:
    result = backbones("timm:*xception*")
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines() if "xception41.tf_in1k" in line]
    assert lines == [["timm:xception41.tf_in1k", "299", "x", "299", "apache-2.0", "to", "fetch"]]
    found = read("timm:*xception*")
    assert isinstance(found, list)
    assert all("xception" in entry["spec"] for entry in found)
    assert read("list", "timm:*xception*") == found


def test_show_describes_and_lists_layers() -> None:
    shown = read("show", "torchvision:resnet18", "--layers")
    assert isinstance(shown, dict)
    assert (shown["num_features"], shown["num_parameters"], shown["input"]) == (512, 11186112, "224 x 224")
    assert (shown["weights"], shown["kind"], shown["layer"]) == ([], "image", "penultimate")
    assert {"conv1", "layer3.0.add", "flatten"} < set(shown["layers"])
    assert shown["blocks"][-1] == {"name": "layer4.1", "parameters": 4720640, "boundary": [512, 7, 7]}
    text = " ".join(backbones("show", "torchvision:vgg16").stdout.split())
    assert "Features 4096, of layer penultimate" in text
    assert "Parameters 134,260,544 (537 MB)" in text
    assert "not here; to fetch from https://download.pytorch.org" in text


def test_show_lists_blocks_for_tuning_or_says_why_there_are_none() -> None:
    lines = [line.split() for line in backbones("show", "bundled:glyphnet", "--layers").stdout.splitlines()]
    assert ["last:2", "stage3.2", "147,584", "128", "x", "4", "x", "4"] in lines
    assert "bundled:pixels has no layers that could train." in backbones("show", "bundled:pixels", "--layers").stdout


def test_show_says_where_weights_are() -> None:
    keep_in_torchs_cache("squeezenet1_1")
    shown = read("show", "torchvision:squeezenet1_1")
    assert isinstance(shown, dict)
    assert shown["weights"][0].startswith(str(Path("torch").resolve()))
    assert "here" in backbones("torchvision:squeezenet1_1").stdout


def test_what_is_fetched_is_what_an_offline_site_uses() -> None:
    state = keep_in_torchs_cache("squeezenet1_1")
    result = backbones("fetch", "torchvision:squeezenet1_1", "--out", "s.safetensors")
    assert result.exit_code == 0, result.stderr
    assert "--backbone torchvision:squeezenet1_1 --weights s.safetensors" in result.stdout
    Path("torch").rename("elsewhere")
    backbone = load_backbone("torchvision:squeezenet1_1", weights="s.safetensors")
    assert all(torch.equal(tensor, state[name]) for name, tensor in backbone.tensors().items())
    assert "s.safetensors exists" in refused("fetch", "torchvision:squeezenet1_1", "--out", "s.safetensors")


def test_fetching_into_a_folder_that_cannot_be_written_is_a_sentence() -> None:
    Path("file").write_text("")
    assert "cannot be written" in refused("fetch", "bundled:glyphnet", "--out", "file/below.safetensors")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing-like-it"], "No backbone's name fits 'nothing-like-it'"),
        (["show", "torchvision:resnet19"], "Did you mean 'resnet1"),
        (["show", "torchvison:resnet18"], "Did you mean 'torchvision'"),
        (["show", "resnet18"], "source:name"),
        (["show", "torchvision:resnet18", "--layer", "layer9"], "no layer 'layer9'"),
        (["fetch", "torchvision:resnet18"], "Missing option '--out'"),
    ],
)
def test_what_does_not_exist_is_a_sentence(arguments: list[str], words: str) -> None:
    assert words in refused(*arguments)


def test_without_a_network_fetching_says_the_three_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    text = refused("fetch", "torchvision:mobilenet_v2", "--out", "m.safetensors", status=1)
    assert "--weights FILE" in text
    assert not Path("m.safetensors").exists()


def test_error_names_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "pip install 'fedhead[timm]'" in refused("timm:*xception*")
    assert "pip install 'fedhead[timm]'" in backbones().stdout
    assert "torchvision:resnet18" in backbones("resnet18").stdout
