"""Peak memory of one exchange of a segmentation, by the number of images, each count in a process of its own.

Memory is what processes hold themselves; pages of mapped files of features, which the system takes back, are left out.
"""

import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from fedhead.simulations.benchmarks.measurement import Json, app

SIDE = 128
SECONDS = 0.02
"""Time between two samples."""

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


def _own_megabytes() -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) / 1000


class _Peak(threading.Thread):
    """Samples the memory of this process until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.megabytes = 0.0
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(SECONDS):
            self.megabytes = max(self.megabytes, _own_megabytes())


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
    peak = _Peak()
    peak.start()
    simulate(config, out=folder / "run")
    peak.ended.set()
    peak.join()
    return peak.megabytes


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
