import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fedhead.backbones import Backbone, TextPreprocessing, load_backbone
from fedhead.backbones.weights import weights_path
from fedhead.data import UnreadableSampleError
from fedhead.errors import FedheadError, UserError
from fedhead.heads import make_head
from fedhead.model import TransferModel
from fedhead.sums.calibration import BINS, Calibration

CLASSES = ("ant", "bee", "cicada")
DESCRIBED = ("backbone", "layer", "backbone_digest", "weights_digest", "head", "head_digest", "classes")


pytestmark = pytest.mark.usefixtures("one_thread")


def model_of(head_spec: str = "linear", backbone: Backbone | None = None, seed: int = 0) -> TransferModel:
    backbone = backbone or load_backbone("bundled:glyphnet")
    head = make_head(head_spec, backbone.num_features, len(CLASSES))
    generator = torch.Generator().manual_seed(seed)
    head.randomise(generator)
    width = backbone.num_features
    head.fold(torch.randn(width, generator=generator), 0.5 + torch.rand(width, generator=generator))
    return TransferModel(backbone, head, CLASSES, head_spec)


def pictures(count: int = 5, *, colour: bool = False) -> list[Image.Image]:
    shape = (count, 20, 14, 3) if colour else (count, 20, 14)
    return [Image.fromarray(image) for image in np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)]


@pytest.mark.parametrize("backbone", ["bundled:glyphnet", "bundled:pixels"])
@pytest.mark.parametrize("head", ["linear", "mlp:4", "cosine"])
def test_saved_model_gives_equal_probabilities(tmp_path: Path, head: str, backbone: str) -> None:
    model = model_of(head, load_backbone(backbone))
    model.save(tmp_path / "deep" / "model.safetensors")
    loaded = TransferModel.load(tmp_path / "deep" / "model.safetensors")
    images = pictures(colour=True)
    assert torch.equal(loaded.probabilities(images), model.probabilities(images))
    assert (loaded.classes, loaded.head_spec) == (CLASSES, head)
    assert loaded.backbone.digest == model.backbone.digest
    assert repr(loaded) == repr(model) == f"TransferModel({backbone!r}, {head!r}, 3 classes)"


def test_equal_models_give_equal_files(tmp_path: Path) -> None:
    model_of().save(tmp_path / "one")
    model_of().save(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_model_from_a_run_folder(tmp_path: Path) -> None:
    model = model_of()
    model.save(tmp_path / "model.safetensors")
    for path in (tmp_path, str(tmp_path)):
        assert TransferModel.load(path).predict(pictures()) == model.predict(pictures())


def test_paths_images_arrays_and_tensors_give_equal_predictions(tmp_path: Path) -> None:
    model = model_of()
    images = pictures()
    paths = [tmp_path / f"{number}.png" for number in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    arrays = [np.asarray(image) for image in images]
    expected = model.probabilities(images)
    for same in (
        paths,
        [str(path) for path in paths],
        arrays,
        np.stack(arrays),
        [array / np.float32(255) for array in arrays],
        [torch.from_numpy(array.copy())[None] for array in arrays],
        iter(images),
    ):
        torch.testing.assert_close(model.probabilities(same), expected)
    assert model.predict(images) == [CLASSES[index] for index in expected.argmax(-1).tolist()]


def test_probabilities_are_independent_of_the_batch() -> None:
    model = model_of("mlp:4")
    images = pictures(7)
    whole = model.probabilities(images)
    assert whole.shape == (7, 3)
    assert not whole.requires_grad
    torch.testing.assert_close(whole.sum(1), torch.ones(7))
    torch.testing.assert_close(model.probabilities(images, batch_size=2), whole)
    assert model.probabilities([]).shape == (0, 3)
    assert model.predict([]) == []


def test_images_are_read_a_batch_at_a_time() -> None:
    taken = 0

    def stream() -> Iterator[Image.Image]:
        nonlocal taken
        for image in pictures(6):
            taken += 1
            yield image
        raise UnreadableSampleError("the seventh")

    backbone = load_backbone("bundled:glyphnet")
    model = model_of(backbone=backbone)
    seen: list[int] = []
    real = backbone.features

    def features(batch: torch.Tensor) -> torch.Tensor:
        seen.append(taken)
        return real(batch)

    backbone.features = features  # type: ignore[method-assign]
    with pytest.raises(UnreadableSampleError, match="the seventh"):
        model.probabilities(stream(), batch_size=2)
    assert seen == [2, 4, 6]


def test_error_names_unreadable_image(tmp_path: Path) -> None:
    model = model_of()
    (tmp_path / "scan.png").write_bytes(b"not an image")
    with pytest.raises(FedheadError, match=r"scan\.png cannot be read as an image"):
        model.predict([*pictures(2), tmp_path / "scan.png"])
    with pytest.raises(FedheadError, match=r"gone\.png cannot be read"):
        model.predict([str(tmp_path / "gone.png")])
    with pytest.raises(FedheadError, match=r"shape \[2, 2, 2, 2\]"):
        model.predict([np.zeros((2, 2, 2, 2), np.uint8)])


def test_head_of_wrong_size_is_rejected() -> None:
    backbone = load_backbone("bundled:glyphnet")
    with pytest.raises(UserError, match="takes 7 features, but bundled:glyphnet produces 192"):
        TransferModel(backbone, make_head("linear", 7, 3), CLASSES)
    with pytest.raises(UserError, match="2 outputs for 3 class names"):
        TransferModel(backbone, make_head("linear", 192, 2), CLASSES)


def test_missing_backbone_can_be_passed_or_installed(
    tmp_path: Path, own_home: Path, install_weights: Callable[[bytes, str], Path]
) -> None:
    backbone = load_backbone("bundled:glyphnet", weights="random", seed=77)
    model = model_of(backbone=backbone)
    path = tmp_path / "model.safetensors"
    model.save(path)
    with pytest.raises(FedheadError) as caught:
        TransferModel.load(path)
    assert not isinstance(caught.value, UserError)
    assert str(weights_path(backbone.weights_digest)) in str(caught.value)
    assert "--weights" in str(caught.value)
    expected = model.probabilities(pictures())
    assert torch.equal(TransferModel.load(path, backbone).probabilities(pictures()), expected)
    installed = install_weights(backbone.to_bytes(), backbone.weights_digest)
    assert own_home in installed.parents
    try:
        assert torch.equal(TransferModel.load(path).probabilities(pictures()), expected)
    finally:
        installed.unlink()


def test_another_backbone_is_rejected(tmp_path: Path) -> None:
    model_of().save(tmp_path / "model.safetensors")
    for other in (load_backbone("bundled:glyphnet", weights="random"), load_backbone("bundled:pixels")):
        with pytest.raises(UserError, match="needs another backbone"):
            TransferModel.load(tmp_path / "model.safetensors", other)


def described(path: Path) -> dict[str, Any]:
    with safe_open(str(path), framework="pt") as file:
        values: dict[str, Any] = json.loads(file.metadata()["model"])
    return values


def rewritten(path: Path, values: Any) -> None:
    save_file(load_file(path), path, {"model": values if isinstance(values, str) else json.dumps(values)})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    model_of().save(path)
    return path


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "cut head", "flipped weight", "text", "folder"])
def test_damaged_model_is_rejected(saved: Path, damage: str) -> None:
    content = saved.read_bytes()
    if damage == "missing":
        saved.unlink()
    elif damage == "folder":
        saved.unlink()
        saved.mkdir()
    else:
        flipped = content[:-3] + bytes([content[-3] ^ 0x40]) + content[-2:]
        changed = {
            "empty": b"",
            "cut": content[: len(content) // 2],
            "cut head": content[:20],
            "flipped weight": flipped,
            "text": b"# my model\n",
        }
        saved.write_bytes(changed[damage])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        TransferModel.load(saved)


def test_other_files_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(3, 192)}, path)
    with pytest.raises(UserError, match=r"other\.safetensors"):
        TransferModel.load(path)
    load_backbone("bundled:glyphnet").save(path)
    with pytest.raises(UserError, match=r"other\.safetensors"):
        TransferModel.load(path)


def test_empty_folder_has_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        TransferModel.load(tmp_path)


@pytest.mark.parametrize("values", ["", "{", "[]", "null", "3", '"model"', "{}"])
def test_invalid_description_is_rejected(saved: Path, values: str) -> None:
    rewritten(saved, values)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        TransferModel.load(saved)


@pytest.mark.parametrize("key", DESCRIBED)
@pytest.mark.parametrize("value", [None, 3, "nonsense", []])
def test_every_part_of_a_description_is_checked(saved: Path, key: str, value: Any) -> None:
    values = described(saved)
    assert key in values
    rewritten(saved, {name: part for name, part in values.items() if name != key})
    with pytest.raises(FedheadError):
        TransferModel.load(saved)
    rewritten(saved, {**values, key: value})
    with pytest.raises(FedheadError):
        TransferModel.load(saved)


def test_error_names_newer_format(saved: Path) -> None:
    rewritten(saved, {**described(saved), "format": "fedhead-model-99"})
    with pytest.raises(UserError, match="format: Input should be 'fedhead-model-1'"):
        TransferModel.load(saved)


def test_model_with_wrong_shapes_is_rejected(saved: Path) -> None:
    values = described(saved)
    rewritten(saved, {**values, "classes": [*CLASSES, "dragonfly"]})
    with pytest.raises(UserError, match="damaged"):
        TransferModel.load(saved)
    rewritten(saved, {**values, "head": "mlp:4"})
    with pytest.raises(UserError, match="damaged"):
        TransferModel.load(saved)


def test_error_for_unwritable_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        model_of().save(tmp_path / "file" / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_multi_label_predictions_are_classes_above_one_half(tmp_path: Path) -> None:
    single = model_of()
    model = TransferModel(single.backbone, single.head, CLASSES, task="multi-label")
    model.save(tmp_path / "model.safetensors")
    loaded = TransferModel.load(tmp_path)
    assert loaded.task.name == "multi-label"
    assert single.task.name == "classification"
    images = pictures(20, colour=True)
    with torch.inference_mode():
        logits = model.head(model.backbone.features(torch.stack(list(map(model.backbone.preprocessing, images)))))
    torch.testing.assert_close(loaded.probabilities(images), logits.sigmoid())
    predicted = loaded.predict(images)
    assert predicted == [
        tuple(name for name, logit in zip(CLASSES, row, strict=True) if logit > 0) for row in logits.tolist()
    ]
    assert len({len(names) for names in predicted}) > 1


def text_model() -> TransferModel:
    class Lengths(nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return attention_mask.sum(1, keepdim=True).float()

    backbone = Backbone("lengths:1", Lengths(), TextPreprocessing(lambda text: list(text.encode()), "bytes"))
    head = make_head("linear", 1, 2)
    head.load_state_dict({"weight": torch.tensor([[0.0], [1.0]]), "bias": torch.tensor([0.0, -4.5])})
    return TransferModel(backbone, head, ("short", "long"))


def test_texts_are_strings_and_text_files_are_paths(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("Dear Sir")
    assert text_model().predict(["Hi", "Hello", tmp_path / "letter.txt"], batch_size=2) == ["short", "long", "long"]
    with pytest.raises(UnreadableSampleError, match="item 0 is of type Image, not a text"):
        text_model().predict(pictures(1))
    with pytest.raises(UnreadableSampleError, match=r"none\.txt cannot be read"):
        text_model().predict([tmp_path / "none.txt"])


def calibrated(scores: tuple[int, ...] = (), unlearned: tuple[str, ...] = ()) -> TransferModel:
    plain = model_of()
    return TransferModel(plain.backbone, plain.head, CLASSES, calibration=Calibration(2.5, scores), unlearned=unlearned)


def test_temperature_divides_logits_and_is_saved(tmp_path: Path) -> None:
    model, images = calibrated((0,) * (BINS - 1) + (9,), unlearned=("bee",)), pictures()
    with torch.inference_mode():
        logits = model.head(model.backbone.features_of(images))
        logits[:, 1] = -torch.inf
    assert torch.allclose(model.probabilities(images), (logits / 2.5).softmax(-1))
    model.save(tmp_path / "model.safetensors")
    loaded = TransferModel.load(tmp_path / "model.safetensors")
    assert (loaded.calibration, loaded.unlearned) == (model.calibration, ("bee",))
    assert torch.equal(loaded.probabilities(images), model.probabilities(images))


def test_unlearned_class_is_never_predicted() -> None:
    images = pictures(20)
    everywhere = {name for name in model_of().predict(images) if isinstance(name, str)}
    assert everywhere
    for name in everywhere:
        model = calibrated((1,) * BINS, unlearned=(name,))
        probabilities = model.probabilities(images)
        assert name not in model.predict(images)
        assert torch.allclose(probabilities.sum(1), torch.ones(20))
        assert not any(name in classes for classes in model.sets(probabilities, 0.999))


def test_sets_are_sorted_by_probability() -> None:
    scores = [0] * BINS
    scores[BINS // 2] = 99
    model = calibrated(tuple(scores))
    probabilities = torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.2, 0.7], [0.5, 0.5, 0.0]])
    assert model.sets(probabilities, 0.9) == [("bee",), ("cicada",), ("ant", "bee")]
    everything = [("bee", "cicada", "ant"), ("cicada", "bee", "ant"), ("ant", "bee", "cicada")]
    assert model.sets(probabilities, 0.999) == everything


@pytest.mark.parametrize("coverage", [0.0, 1.0, 90.0])
def test_sets_need_a_coverage_and_a_calibrated_model(coverage: float) -> None:
    with pytest.raises(UserError, match="between 0 and 1"):
        calibrated((1,) * BINS).sets(torch.ones(1, 3) / 3, coverage)
    with pytest.raises(UserError, match="held-out rows"):
        model_of().sets(torch.ones(1, 3) / 3, 0.9)
