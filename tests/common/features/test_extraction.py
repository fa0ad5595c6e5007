import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedhead.backbones import Backbone, load_backbone
from fedhead.data import load_samples
from fedhead.features import blocks, extraction
from fedhead.features.extraction import (
    CPU_BATCH,
    CPU_TOKENS,
    TEXT_BATCH,
    arranged,
    batch_size_for,
    batches_of,
    delayed,
    fastest_batch,
    in_lanes,
    read_ahead,
    usable,
)


def with_moved_norms(backbone: Backbone) -> Backbone:
    """Give batch norms statistics other than 0 and 1, which folding would get right by leaving them out."""
    generator = torch.Generator().manual_seed(0)
    for module in backbone.module.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    return backbone


def images(backbone: Backbone, rows: int = 3) -> torch.Tensor:
    shape = backbone.preprocessing(backbone.preprocessing.probes()[0]).shape
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(1))


def relative_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize(
    "spec",
    [
        "bundled:pixels",
        "bundled:glyphnet",
        "torchvision:resnet18",
        "torchvision:squeezenet1_1",
        "torchvision:mobilenet_v2",
        "torchvision:shufflenet_v2_x0_5",
        pytest.param("torchvision:densenet121", marks=pytest.mark.slow),
        pytest.param("torchvision:vit_b_32", marks=pytest.mark.slow),
    ],
)
def test_arranged_backbone_has_equal_features_and_digests(spec: str) -> None:
    plain = with_moved_norms(load_backbone(spec, weights="random"))
    weights = {name: tensor.clone() for name, tensor in plain.tensors().items()}
    faster = arranged(plain, rows=1000)
    batch = images(plain)
    assert relative_difference(faster.features(batch), plain.features(batch)) < 1e-4
    assert (faster.digest, faster.weights_digest) == (plain.digest, plain.weights_digest)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in plain.tensors().items())


def test_norms_after_convolutions_are_folded_away() -> None:
    backbone = load_backbone("torchvision:resnet18", weights="random")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in arranged(backbone, 10).module.modules())


@given(items=st.lists(st.integers()), by=st.integers(0, 4))
def test_delayed_items_come_in_order_after_as_many_more_are_made(items: list[int], by: int) -> None:
    made = 0

    def making() -> Iterator[int]:
        nonlocal made
        for item in items:
            made += 1
            yield item

    taken = []
    for position, item in enumerate(delayed(making(), by)):
        taken.append(item)
        assert made == min(position + 1 + by, len(items))
    assert taken == items


@pytest.mark.parametrize("queued", [1, 5])
def test_features_do_not_depend_on_the_batches_in_a_queue(queued: int, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, digits = load_backbone("bundled:pixels"), load_samples("digits")
    rows = [list(range(40)), list(range(100, 130)), [7]]
    expected = list(blocks.extract_blocks(backbone, digits, rows, batch_size=8))
    monkeypatch.setattr(blocks, "queued_by", lambda backbone: queued)
    made = list(blocks.extract_blocks(backbone, digits, rows, batch_size=8))
    for one, other in zip(made, expected, strict=True):
        assert one.rows == other.rows
        assert (one.features == other.features).all()
        assert (one.keys == other.keys).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("spec", ["bundled:glyphnet", "torchvision:resnet18"])
def test_features_of_a_gpu_are_those_of_the_processor(spec: str) -> None:
    backbone, digits = (
        load_backbone(spec, weights="random" if "torchvision" in spec else "default"),
        load_samples("digits"),
    )
    rows = [list(range(100)), list(range(200, 230))]
    expected = list(blocks.extract_blocks(backbone, digits, rows))
    made = list(blocks.extract_blocks(backbone.to(torch.device("cuda")), digits, rows))
    for one, other in zip(made, expected, strict=True):
        assert relative_difference(torch.from_numpy(one.features), torch.from_numpy(other.features)) < 1e-3


def test_untraceable_module_is_unchanged() -> None:
    class Untraceable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.inner(batch)
            return output if output.sum() > 0 else -output

    glyphnet = load_backbone("bundled:glyphnet")
    plain = with_moved_norms(Backbone("test:untraceable", Untraceable(), glyphnet.preprocessing))
    batch = images(plain)
    assert relative_difference(arranged(plain, 10).features(batch), plain.features(batch)) < 1e-4


@pytest.mark.slow
def test_compiled_features_and_short_last_batch() -> None:
    plain = with_moved_norms(load_backbone("bundled:glyphnet"))
    faster = arranged(plain, 10, compiled=True)
    for rows in (8, 8, 3):
        batch = images(plain, rows)
        features = faster.features(batch)
        assert features.shape == (rows, plain.num_features)
        assert relative_difference(features, plain.features(batch)) < 1e-4


def test_fallback_without_compiler(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def compile_nothing(module: nn.Module, **options: object) -> object:
        def fail(batch: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no C++ compiler")

        return fail

    monkeypatch.setattr(torch, "compile", compile_nothing)
    plain = load_backbone("bundled:glyphnet")
    faster = arranged(plain, 10, compiled=True)
    batch = images(plain)
    for _ in range(2):
        assert relative_difference(faster.features(batch), plain.features(batch)) < 1e-4
    assert caplog.text.count("no C++ compiler") == 1


def test_batch_size_is_fixed_on_cpu() -> None:
    assert batch_size_for(load_backbone("bundled:glyphnet")) == CPU_BATCH


@given(st.lists(st.integers(0, 3000), max_size=200))
def test_batches_of_texts_hold_each_once_and_are_limited_by_tokens(lengths: list[int]) -> None:
    texts = SimpleNamespace(kind="text", device=torch.device("cpu"))
    batches = batches_of(texts, lengths, CPU_BATCH)  # type: ignore[arg-type]
    assert sorted(position for batch in batches for position in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) <= TEXT_BATCH
        assert len(batch) == 1 or len(batch) * max(lengths[position] for position in batch) <= CPU_TOKENS


def test_batches_of_images_keep_their_order() -> None:
    glyphnet = load_backbone("bundled:glyphnet")
    assert batches_of(glyphnet, [1] * 5, 2) == [[0, 1], [2, 3], [4]]


def test_modules_of_unknown_sources_are_not_shared_by_threads() -> None:
    glyphnet = load_backbone("bundled:glyphnet")
    own = Backbone("python:own:make", glyphnet.module, glyphnet.preprocessing)
    threads: set[str] = set()

    def work(batch: int) -> int:
        threads.add(threading.current_thread().name)
        return batch * batch

    assert list(in_lanes(own, work, range(9))) == [batch * batch for batch in range(9)]
    assert threads == {threading.current_thread().name}


@pytest.mark.parametrize(
    ("halves", "tolerance", "expected", "said"),
    [
        (True, 0.02, "mixed", ""),
        (True, 0.0, "float32", "changes the features of bundled:glyphnet by"),
        (False, 0.02, "float32", "no products in half precision"),
    ],
)
def test_mixed_precision_must_be_fast_and_close(
    halves: bool,
    tolerance: float,
    expected: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(extraction, "multiplies_halves", lambda device: halves)
    monkeypatch.setattr(extraction, "MIXED_TOLERANCE", tolerance)
    assert usable("mixed", load_backbone("bundled:glyphnet")) == expected
    assert said in caplog.text
    assert bool(caplog.text) == bool(said)


@pytest.mark.parametrize(
    ("memory", "saturated", "expected"), [(1024, 256, 256), (128, 1024, 128), (1024, 1024, 1024), (32, 64, 1)]
)
def test_batch_grows_while_it_gains_and_fits(memory: int, saturated: int, expected: int) -> None:
    def seconds(rows: int) -> float:
        if rows > memory:
            raise torch.OutOfMemoryError
        return max(rows, saturated) / 1000

    assert fastest_batch(seconds, (64, 128, 256, 512, 1024)) == expected


def test_read_ahead_is_ordered_and_bounded() -> None:
    furthest = 0
    lock = threading.Lock()

    def read(row: int) -> int:
        nonlocal furthest
        time.sleep(0.002 if row % 3 else 0.006)
        with lock:
            furthest = max(furthest, row)
        return row * row

    for row, value in enumerate(read_ahead(read, range(40), ahead=5)):
        assert value == row * row
        with lock:
            assert furthest <= row + 5
    assert furthest == 39


def test_failure_is_raised_at_its_own_row() -> None:
    def read(row: int) -> int:
        if row == 3:
            raise OSError("row 3")
        return row

    rows = read_ahead(read, range(10), ahead=8)
    assert [next(rows) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="row 3"):
        next(rows)


def test_closing_early_stops_threads_and_reading() -> None:
    read: list[int] = []
    rows = read_ahead(lambda row: read.append(row), range(10_000), ahead=4)
    next(rows)
    readers = [thread for thread in threading.enumerate() if thread.name == "read-ahead"]
    rows.close()
    for reader in readers:
        reader.join(10)
        assert not reader.is_alive()
    assert readers
    assert len(read) <= 5


def test_hanging_read_does_not_delay_closing() -> None:
    go_on, hangs = threading.Event(), threading.Event()

    def read(row: int) -> int:
        if row == 1:
            hangs.set()
            go_on.wait(60)
        return row

    rows = read_ahead(read, range(10), ahead=4)
    assert next(rows) == 0
    assert hangs.wait(10)
    rows.close()
    assert not go_on.is_set()
    go_on.set()
