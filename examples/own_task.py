"""Define a task of your own: count things in images, here dots, from one exchange of sums."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fedhead import RunConfig
from fedhead.data import Samples, samples_from_arrays
from fedhead.errors import UserError
from fedhead.simulations import simulate
from fedhead.tasks import Targets, tasks
from fedhead.tasks.regression import Regression


@tasks.register("counting")
class Counting(Regression):
    """Numbers of things in a row: the head is a regression's, and predictions are whole numbers from 0."""

    name = "counting"
    misfit = "Its targets are not counts; the site's own log has the details."

    def encode(self, samples: Samples) -> Targets:
        """Return the targets.

        Raises:
            UserError: if one is no count.
        """
        targets = super().encode(samples)
        wrong = ((targets < 0) | (targets != np.rint(targets))).any(1)
        if wrong.any():
            row = int(np.argmax(wrong))
            raise UserError(f"{samples.name(row)} has {targets[row].tolist()}; expected whole numbers of 0 or more.")
        return targets

    def decide(self, answers: Tensor) -> list[Any]:
        """Return the nearest possible count of each row."""
        return super().decide(answers.round().clamp(min=0).long())

    def cells(
        self, decision: Any, answers: Sequence[float], region: Any, *, every: bool = False, regions: bool = False
    ) -> list[str]:
        """Return the decision instead of the estimate, without an interval."""
        counts = decision if isinstance(decision, tuple) else (decision,)
        return (
            [str(count) for count in counts]
            if answers and not regions
            else super().cells(decision, answers, region, every=every, regions=regions)
        )


def dots(rows: int, seed: int) -> Samples:
    """Draw images with 0 to 9 dots, and count them."""
    generator = np.random.default_rng(seed)
    images = np.zeros((rows, 32, 32), np.uint8)
    counts = generator.integers(0, 10, rows)
    for image, count in zip(images, counts, strict=True):
        for cell in generator.choice(64, count, replace=False):
            top, left = 4 * (cell // 8), 4 * (cell % 8)
            image[top + 1 : top + 3, left + 1 : left + 3] = 255
    return samples_from_arrays(images, targets=counts, spec="dots")


def main() -> None:
    """Solve the head over five sites, and count the dots of new images."""
    config = RunConfig(
        task="counting", backbone="bundled:pixels", rounds=0, diagnose=False, simulation={"partition": "iid"}
    )
    result = simulate(config, dots(800, seed=0), 5)
    new = dots(100, seed=1)
    predicted = result.model.predict([new.read(row) for row in range(100)])
    right = np.mean(np.array(predicted) == new.targets[:, 0])
    print(f"R2 {result.score_held_out:.2f} on held-out rows; {right:.0%} of counts are exact")


if __name__ == "__main__":
    main()
