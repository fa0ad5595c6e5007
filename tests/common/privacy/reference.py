"""Write `compositions.json`: epsilon of random Gaussian compositions by dp-accounting, which must be installed."""

import json
import random
from pathlib import Path

from dp_accounting.pld import privacy_loss_distribution


def main() -> None:
    random.seed(0)
    rows = []
    while len(rows) < 200:
        sigmas = [round(10 ** random.uniform(0.3, 1.7), 3) for _ in range(random.randint(1, 12))]
        if not 0.05 < sum(sigma**-2 for sigma in sigmas) ** 0.5 < 2.5:
            continue
        total = None
        for sigma in sigmas:
            one = privacy_loss_distribution.from_gaussian_mechanism(
                sigma, value_discretization_interval=2e-4, use_connect_dots=True
            )
            total = one if total is None else total.compose(one)
        delta = 10 ** random.uniform(-7, -3)
        epsilon = total.get_epsilon_for_delta(delta)
        rows.append({"sigmas": sigmas, "delta": delta, "epsilon": round(epsilon, 7)})
    text = ",\n".join(json.dumps(row) for row in rows)
    (Path(__file__).parent / "compositions.json").write_text(f"[\n{text}\n]\n")


if __name__ == "__main__":
    main()
