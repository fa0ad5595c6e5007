"""`time-to-accuracy`: from raw images to an accuracy, ours and the usual recipe.

The usual recipe freezes a pretrained network, and then runs it anyway, for every batch of every round. It is timed
here without any framework around it: one loop in one process, no messages, which is less than any framework takes.
"""

import time
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional

from fedhead.backbones import Backbone, load_backbone
from fedhead.client.minibatches import shuffled
from fedhead.config import RunConfig
from fedhead.data import Samples, load_samples, relabel, samples_from_arrays
from fedhead.errors import FedheadError
from fedhead.simulations.benchmarks.measurement import OURS, Json, Measurement, app, timed
from fedhead.simulations.benchmarks.problem import SEED, own_home
from fedhead.simulations.partition import divide
from fedhead.simulations.simulate import simulate

BATCH = 32
RECIPE = "frozen network in every round"


def usual_recipe(
    backbone: Backbone, train: Samples, test: Samples, config: RunConfig, target: float | None
) -> tuple[float, list[float]]:
    """Run the usual recipe; return its seconds without testing, and the test accuracy after each round.

    Args:
        backbone: the frozen network.
        train: the sites' photographs.
        test: the pooled test set.
        config: sites, partition, rounds and local training.
        target: the accuracy to stop at; None for all rounds.
    """
    table, local = config.simulation, config.local
    parts = divide(table.partition, train.labels, table.sites, config.seed)
    truth = torch.from_numpy(relabel(test, train.classes))
    labels = torch.from_numpy(train.labels)
    # Testing is not timed, so it may use features that are taken once.
    tested = torch.cat([_forward(backbone, test, part) for part in np.array_split(np.arange(len(test)), 20)])
    head = nn.Linear(backbone.num_features, len(train.classes))
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    seconds, accuracies = 0.0, []
    for number in range(1, config.rounds + 1):
        started = time.perf_counter()
        total = {name: torch.zeros_like(value) for name, value in head.state_dict().items()}
        for name, rows in parts.items():
            own = nn.Linear(head.in_features, head.out_features)
            own.load_state_dict(head.state_dict())
            optimizer = torch.optim.SGD(own.parameters(), lr=local.lr)
            order = rows[shuffled(config.seed, name, number, 0, len(rows))]
            for start in range(0, len(order), BATCH):
                batch = order[start : start + BATCH]
                features = _forward(backbone, train, batch)
                optimizer.zero_grad()
                loss = functional.cross_entropy(own(features), labels[torch.from_numpy(batch)])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            for key, value in own.state_dict().items():
                total[key] += value * (len(rows) / len(labels))
        head.load_state_dict(total)
        seconds += time.perf_counter() - started
        with torch.inference_mode():
            accuracies.append(float((head(tested).argmax(1) == truth).float().mean()))
        if target is not None and accuracies[-1] >= target:
            break
    return seconds, accuracies


def _forward(backbone: Backbone, samples: Samples, rows: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Tensor:
    inputs = [backbone.preprocessing(samples.read(int(row))) for row in rows]
    return backbone.features(backbone.preprocessing.collate(inputs)).clone()


def measure(
    backbone: str, weights: str, train: Samples, test: Samples, config: RunConfig, target: float | None
) -> Measurement:
    """Time both from raw images to `target`, or to the recipe's accuracy after all rounds.

    Raises:
        FedheadError: if ours does not get there.
    """
    network = load_backbone(backbone, weights=weights)
    recipe_seconds, accuracies = usual_recipe(network, train, test, config, target)
    reached = max(accuracies) if target is None else target
    with own_home() as home:
        ours = config.changed({"backbone": backbone, "weights": weights, "rounds": 0})
        seconds, result = timed(lambda: simulate(ours, train, test_data=test, out=home / "run"))
    if result.test_accuracy is None or result.test_accuracy < reached:
        raise FedheadError(f"One exchange gives {result.test_accuracy}, which is less than {reached}.")
    setting = {
        "backbone": backbone,
        "data": train.spec,
        "rows": len(train),
        "sites": config.simulation.sites,
        "partition": config.simulation.partition,
        "target": round(reached, 4),
        "accuracy": {OURS: result.test_accuracy, RECIPE: accuracies[-1]},
        "recipe_rounds": len(accuracies),
        "recipe_reached_target": max(accuracies) >= reached,
    }
    title = f"From {len(train)} raw images to {100 * reached:.1f} %"
    return Measurement.against_ours(title, {OURS: seconds, RECIPE: recipe_seconds}, setting)


def digits() -> tuple[Samples, Samples]:
    """Return scikit-learn's digits, every fifth one to test on."""
    whole = load_samples("digits")
    rows = np.arange(len(whole))
    parts = []
    for name, chosen in (("training", rows[rows % 5 > 0]), ("test", rows[rows % 5 == 0])):
        images = [whole.read(int(row)) for row in chosen]
        parts.append(samples_from_arrays(images, whole.labels[chosen], classes=whole.classes, spec=f"digits ({name})"))
    return parts[0], parts[1]


@app.command("time-to-accuracy")
def time_to_accuracy(
    data: Annotated[str, typer.Option(help="Raw images, as a data spec; by default the bundled digits.")] = "",
    test_data: Annotated[str, typer.Option(help="A pooled test set, as a data spec.")] = "",
    backbone: Annotated[str, typer.Option()] = "bundled:glyphnet",
    weights: Annotated[str, typer.Option()] = "default",
    sites: Annotated[int, typer.Option(min=1)] = 20,
    partition: Annotated[str, typer.Option()] = "dirichlet:0.3",
    number: Annotated[int, typer.Option("--rounds", min=1)] = 10,
    lr: Annotated[float, typer.Option(help="Of the recipe's SGD on raw features.")] = 0.1,
    target: Annotated[
        float | None, typer.Option(help="Accuracy to stop at, in 0..1; by default the recipe's final one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Raw images to an accuracy: ours against running the frozen network for every batch of every round."""
    train, test = (load_samples(data), load_samples(test_data)) if data and test_data else digits()
    config = RunConfig(
        rounds=number,
        holdout=0.0,
        seed=SEED,
        diagnose=False,
        keep_sums="none",
        local={"lr": lr, "batch_size": BATCH},
        simulation={"sites": sites, "partition": partition, "min_class_count": 0, "min_rows": 0, "device": "cpu"},
    )
    measure(backbone, weights, train, test, config, target).show(as_json=as_json)
