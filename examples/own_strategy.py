"""Use a Flower strategy of your own: here FedAvg with a step of half the size."""

from collections.abc import Iterable

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedhead import RunConfig
from fedhead.simulations import simulate


class CautiousFedAvg(FedAvg):
    """Moves the head only a part of the way to the mean of the sites' heads."""

    def __init__(self, step: float) -> None:
        super().__init__()
        self.step = step
        self.current = ArrayRecord()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Remember the head that is sent."""
        self.current = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return a head between the one that was sent and the mean of the replies."""
        mean, metrics = super().aggregate_train(server_round, replies)
        if mean is None:
            return None, metrics
        moved = {}
        for name, array in mean.items():
            before, after = self.current[name].numpy(), array.numpy()
            moved[name] = Array(np.asarray(before + self.step * (after - before), dtype=after.dtype))
        return ArrayRecord(moved), metrics


def main() -> None:
    """Start from zeros, so that the strategy has something to do."""
    result = simulate(RunConfig(init="zeros", rounds=10), data="digits", sites=10, strategy=CautiousFedAvg(0.5))
    print(", ".join(f"{finished.score:.1%}" for finished in result.history))


if __name__ == "__main__":
    main()
