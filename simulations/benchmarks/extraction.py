"""Raw images or texts to features on disk: the feature store against the loop that one would write by hand."""

import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor

from fedhead.backbones import Backbone, load_backbone
from fedhead.data import Samples, load_samples
from fedhead.data.items import ITEMS
from fedhead.devices import Precision, pick_device
from fedhead.features.extraction import arranged, batch_size_for, usable
from fedhead.features.store import FeatureStore
from fedhead.simulations.benchmarks.measurement import OURS, Json, Measurement, Repeats, app, timed

PLAIN_BATCH = 64
CLOSE = 1e-4
HALF = f"{OURS}, mixed precision"
EAGER = "plain eager loop"


def measure(backbone: Backbone, samples: Samples, repeats: int) -> Measurement:
    """Time the extraction of `samples`, alternating the ways of doing it, and check that features agree.

    Mixed precision is left out where it is not usable.

    Raises:
        RuntimeError: if features differ by more than 1e-4 of the largest.
    """
    seconds: dict[str, float] = {}
    rows = range(len(samples))
    backbone.probe()
    mixed = usable("mixed", backbone) == "mixed"
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(repeats):
            ways = {
                OURS: partial(with_store, backbone, samples, Path(folder) / str(repeat)),
                EAGER: partial(plain_loop, backbone, samples),
            }
            if mixed:
                ways[HALF] = partial(with_store, backbone, samples, Path(folder) / f"{repeat}-mixed", "mixed")
            made: dict[str, Tensor] = {}
            for name, way in ways.items():
                taken, made[name] = timed(way)
                seconds[name] = min(taken, seconds.get(name, float("inf")))
            difference = (made[OURS] - made[EAGER]).abs().max() / made[EAGER].abs().max()
            if not difference < CLOSE:
                raise RuntimeError(f"Features differ by {difference:.1e} of the largest; expected at most {CLOSE}.")
            for name, model, batch_size in (
                ("plain forward pass alone", backbone, PLAIN_BATCH),
                ("our forward pass alone", arranged(backbone, len(samples)), batch_size_for(backbone)),
            ):
                batch = backbone.preprocessing.collate(
                    [backbone.preprocessing(samples.read(row)) for row in rows[:batch_size]]
                )
                taken, _ = timed(partial(model.features, batch))
                seconds[name] = min(taken * len(rows) / len(rows[:batch_size]), seconds.get(name, float("inf")))
    setting = {"backbone": backbone.spec, "rows": len(samples), "data": samples.spec, "repeats": repeats}
    if mixed:
        setting["mixed"] = f"{(made[HALF] - made[EAGER]).norm() / made[EAGER].norm():.1e} of the features' norm"
    title = f"{len(samples)} {ITEMS[backbone.kind]} through {backbone.spec}"
    left_out = {} if mixed else {HALF: "this device has no products in half precision, or they are too coarse."}
    return Measurement.against_ours(title, seconds, setting, left_out)


def with_store(backbone: Backbone, samples: Samples, root: Path, precision: Precision = "float32") -> Tensor:
    """Extract into a new store: `[n, d]`."""
    return FeatureStore.open(backbone, samples, root=root, precision=precision).features


def plain_loop(backbone: Backbone, samples: Samples) -> Tensor:
    """Read, preprocess and run batches of 64, one after another: `[n, d]`."""
    made = []
    for start in range(0, len(samples), PLAIN_BATCH):
        items = [samples.read(row) for row in range(start, min(start + PLAIN_BATCH, len(samples)))]
        batch = backbone.preprocessing.collate([backbone.preprocessing(item) for item in items])
        made.append(backbone.features(batch).cpu())
    return torch.cat(made)


def write_photographs(folder: Path, rows: int) -> None:
    """Write JPEG files of the size that cameras' pictures are shared in, smooth with some noise."""
    generator = np.random.default_rng(0)
    (folder / "one").mkdir(parents=True)
    for row in range(rows):
        coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = (smooth + generator.integers(-8, 9, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / "one" / f"{row:05}.jpg", quality=90)


def write_texts(file: Path, rows: int) -> None:
    """Write a CSV file of texts of 4 to 60 words, most of them short."""
    generator = np.random.default_rng(0)
    words = [f"word{number}" for number in range(100)]
    lengths = np.clip(generator.geometric(1 / 12, rows) + 3, 4, 60)
    texts = (" ".join(generator.choice(words, length)) for length in lengths)
    file.write_text("text,label\n" + "".join(f"{text},{row % 2}\n" for row, text in enumerate(texts)), encoding="utf-8")


@app.command()
def extraction(
    backbone: Annotated[str, typer.Option(help="source:name.")] = "torchvision:resnet18",
    weights: Annotated[str, typer.Option(help="'random' does as well as any, for time.")] = "random",
    data: Annotated[
        str, typer.Option(help="A data spec; by default 500 x 375 JPEG files or short texts made for this.")
    ] = "",
    rows: Annotated[int, typer.Option(help="How many files or texts are made.", min=1)] = 512,
    device: Annotated[str, typer.Option()] = "auto",
    repeats: Repeats = 3,
    as_json: Json = False,
) -> None:
    """Features of files: the store against a plain eager loop and the forward pass alone."""
    model = load_backbone(backbone, weights=weights).to(pick_device(device))
    with tempfile.TemporaryDirectory() as folder:
        if not data and model.kind == "text":
            write_texts(Path(folder) / "texts.csv", rows)
            data = f"csv:{folder}/texts.csv?text=text&label=label"
        elif not data:
            write_photographs(Path(folder), rows)
        samples = load_samples(data or f"folder:{folder}")
        measure(model, samples, repeats).show(as_json=as_json)
