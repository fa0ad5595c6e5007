"""Peak memory of one exchange of a segmentation, by the number of images, each count in a process of its own."""

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from fedhead.simulations.benchmarks.measurement import Json, app

SIDE = 128
_SMALL = 10


def _draw(folder: Path, count: int) -> str:
    """Write images with bright squares and their masks; return the data spec."""
    generator = np.random.default_rng(0)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for number in range(count):
        mask = np.zeros((SIDE, SIDE), np.uint8)
        top, left = generator.integers(0, SIDE // 2, 2)
        mask[top : top + SIDE // 3, left : left + SIDE // 3] = 255
        pixels = (generator.integers(0, 60, (SIDE, SIDE, 3)) + (mask[..., None] > 0) * 150).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
    return f"masks:{folder / 'images'}?masks={folder / 'masks'}"


def peak_megabytes(count: int, folder: Path) -> float:
    """Return the peak memory of this process in MB, after it has run one exchange over `count` images."""
    from fedhead.config import RunConfig
    from fedhead.simulations.simulate import simulate

    config = RunConfig(
        task="segmentation",
        backbone="torchvision:mobilenet_v2",
        weights="random",
        layer=f"maps@{SIDE}",
        simulation={"data": _draw(folder / "data", count), "sites": 2, "partition": "iid", "min_rows": 0},
    )
    simulate(config, out=folder / "run")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


@app.command()
def memory(
    counts: Annotated[str, typer.Option(help="Numbers of images.")] = "100,1000",
    as_json: Json = False,
) -> None:
    """Peak memory of a segmentation in one exchange, by the number of images."""
    found = {}
    for count in [_SMALL, *map(int, counts.split(","))]:
        with tempfile.TemporaryDirectory() as folder:
            code = (
                "from pathlib import Path; from fedhead.simulations.benchmarks.memory import peak_megabytes; "
                f"print(peak_megabytes({count}, Path({folder!r})))"
            )
            ended = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
            found[count] = float(ended.stdout.splitlines()[-1])
    if as_json:
        typer.echo(json.dumps({"megabytes": found}))
        return
    for count, size in found.items():
        typer.echo(f"{count:>6} images: {size:.0f} MB")
