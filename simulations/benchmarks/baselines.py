"""`baselines`: one exchange, beside rounds from zeros and each site alone, on rows that none of them has seen."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from fedhead.config import RunConfig, merge, parse_assignments
from fedhead.data import IntArray, KeyArray, Samples, held_out, load_samples, mix
from fedhead.errors import FedheadError, UserError
from fedhead.evaluation.metrics import Estimate
from fedhead.features.store import FeatureStore
from fedhead.heads import Head
from fedhead.simulations.benchmarks.measurement import Json, Measurement, app, timed
from fedhead.simulations.benchmarks.problem import SEED
from fedhead.simulations.plan import Inputs, Plan, make_plan
from fedhead.simulations.simulate import simulate
from fedhead.tasks import Task, make_task
from fedhead.tasks.dense import ItemPlaces
from fedhead.wording import number_interval

HELD_OUT = 0.2
"""Share of the rows that heads are evaluated on, without a test set and without folds."""
EXCHANGE = "one exchange"
ALONE = "one site alone, mean of the sites"

Outputs = Callable[[torch.Tensor], torch.Tensor]


def fold_of(keys: KeyArray, folds: int) -> IntArray:
    """Return `[n]`, the fold of each row, which rows of one content or group share."""
    folded: IntArray = (mix(keys ^ np.uint64(SEED + 1)) % np.uint64(folds)).astype(np.int64)
    return folded


@dataclass(frozen=True)
class Rows:
    """Rows with features, that heads are evaluated on.

    Attributes:
        task: of the run.
        store: their features.
        targets: of all rows of the store.
        places: how items become places; None if rows are items.
    """

    task: Task
    store: FeatureStore
    targets: np.ndarray[Any, Any]
    places: ItemPlaces | None

    @classmethod
    def of(cls, plan: Plan, samples: Samples) -> "Rows":
        """Extract the features of samples, or find them."""
        task = make_task(plan.config.task, plan.config.classes)
        store = FeatureStore.open(plan.backbone, samples)
        return cls(task, store, task.encode(samples), ItemPlaces.of(task, plan.backbone.geometry, samples))

    @torch.inference_mode()
    def evaluate(self, outputs: Outputs, rows: IntArray) -> Any:
        """Return the evaluation sums of a head, given its outputs for features, on some rows."""
        if self.places is not None:
            return self.places.evaluate(outputs, self.store.features, rows)
        found = outputs(self.store.features[torch.from_numpy(rows)])
        targets = torch.from_numpy(self.targets[rows])
        (sums,) = self.task.count(found, targets, np.zeros(len(rows), np.int64), 1, self.task.bins())
        return sums


def peers(rows: Rows, train: IntArray) -> Iterator[tuple[str, Callable[[], Outputs]]]:
    """Yield the name of each of scikit-learn's classifiers, and a function that fits it on all sites' rows."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features, labels = rows.store.features[torch.from_numpy(train)].numpy(), rows.targets[train]

    def fitted(model: Any) -> Outputs:
        model.fit(features, labels)
        return lambda some: torch.from_numpy(model.predict_proba(some.numpy())).clamp_min(1e-12).log()

    for strength in (0.01, 0.1, 1):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))
        yield f"scikit-learn's logistic regression, C {strength:g}", partial(fitted, model)
    trees = HistGradientBoostingClassifier(max_depth=3, learning_rate=0.05, random_state=SEED)
    yield "scikit-learn's gradient boosting", partial(fitted, trees)


def solved(config: RunConfig, samples: Samples, sites: Sequence[IntArray], changes: Mapping[str, Any]) -> Head:
    """Return the head of a run over sites with these rows; nothing is held out, so that all of them train."""
    with tempfile.TemporaryDirectory(prefix="fedhead-benchmark-") as folder:
        run = config.changed({"holdout": 0.0, "simulation": {"test_data": ""}, **changes})
        return simulate(run, samples, list(sites), out=Path(folder) / "run").outcome.head


class Baselines:
    """Evaluation sums of each head, added over folds.

    Args:
        plan: of the run.
        rounds: the numbers of rounds from zeros.
        pooled: whether scikit-learn is fitted, too.
        only: parts of the names to measure; all if there are none.
    """

    def __init__(self, plan: Plan, rounds: Sequence[int], *, pooled: bool, only: Sequence[str] = ()) -> None:
        self.plan = plan
        self.rounds = rounds
        self.pooled = pooled
        self.only = only
        self.sums: dict[str, Any] = {}
        self.alone: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.tested = 0

    def add(self, train: Rows, kept: IntArray, test: Rows, tested: IntArray) -> None:
        """Train on some rows, and evaluate on others.

        Args:
            train: the sites' rows.
            kept: those that train.
            test: the other rows.
            tested: those that heads are evaluated on.
        """
        config, samples = self.plan.config, self.plan.samples
        self.tested += len(tested)
        assigned = self.plan.assign(train.store.readable())
        sites = {name: own for name, rows in assigned.items() if len(own := np.intersect1d(rows, kept))}
        versions: dict[str, Mapping[str, Any]] = {EXCHANGE: {"rounds": 0}}
        for number in self.rounds:
            name = f"{config.strategy.name} from zeros, {number} round{'s' if number > 1 else ''}"
            versions[name] = {"init": "zeros", "rounds": number}
        for name, changes in versions.items():
            self._count(self.sums, name, test, tested, partial(solved, config, samples, list(sites.values()), changes))
        for name, rows in sites.items():
            work = partial(solved, config, samples, [rows], {"rounds": 0, "min_sites": 1})
            try:
                self._count(self.alone, name, test, tested, work, ALONE)
            except FedheadError as error:
                typer.echo(f"{name} alone has no head: {error}", err=True)
        if self.pooled:
            for name, fit in peers(train, kept):
                self._count(self.sums, name, test, tested, fit)

    def _count(
        self,
        totals: dict[str, Any],
        name: str,
        test: Rows,
        tested: IntArray,
        make: Callable[[], Outputs],
        row: str = "",
    ) -> None:
        """Make a head, and add its evaluation sums on some rows to those of its name, and its seconds to a row."""
        if self.only and not any(part in (row or name) for part in self.only):
            return
        seconds, outputs = timed(make)
        sums = test.evaluate(outputs, tested)
        totals[name] = totals[name] + sums if name in totals else sums
        said = number_interval(test.task.report(sums).score, 3)
        typer.echo(f"{f'{name} alone' if row else name}: {test.task.score_name} {said} of {sums.rows}", err=True)
        self.seconds[row or name] = self.seconds.get(row or name, 0.0) + seconds

    def measurement(self, setting: Mapping[str, Any]) -> Measurement:
        """Return the scores, and of two classes the AUROC, with 95 % intervals."""
        task = make_task(self.plan.config.task, self.plan.config.classes)
        figures = {name: _figures(task, sums) for name, sums in self.sums.items()}
        alone = {name: _figures(task, sums) for name, sums in self.alone.items()}
        columns = {
            name: {key: number_interval(value, 3) for key, value in one.items()} for name, one in figures.items()
        }
        if alone:
            columns[ALONE] = {key: _range([one[key] for one in alone.values()]) for key in next(iter(alone.values()))}
        runs = {
            name: {key: value.to_list() for key, value in one.items()} for name, one in {**figures, **alone}.items()
        }
        title = f"{EXCHANGE.capitalize()} and baselines on {setting['data']}"
        return Measurement(title, self.seconds, {**setting, "runs": runs}, {}, columns=columns)


def _figures(task: Task, sums: Any) -> dict[str, Estimate]:
    report = task.report(sums)
    figures = {task.score_name: report.score}
    auroc = getattr(report, "auroc", None)
    return {**figures, "auroc": auroc} if len(task.columns) == 2 and auroc is not None else figures


def _range(values: Sequence[Estimate]) -> str:
    """Return the mean of the sites' values, and the lowest and the highest."""
    known = [one.value for one in values if one.value is not None]
    return f"{np.mean(known):.3f} (sites {min(known):.3f} to {max(known):.3f})" if known else "-"


@app.command("baselines")
def baselines(
    data: Annotated[str, typer.Option(help="Data spec.")],
    test_data: Annotated[
        str, typer.Option(help="A pooled test set, as a data spec; by default the rows that runs hold out.")
    ] = "",
    folds: Annotated[int, typer.Option(help="Folds of a cross-validation, in place of a test set.", min=0)] = 0,
    task: Annotated[str, typer.Option()] = "classification",
    backbone: Annotated[str, typer.Option()] = "bundled:glyphnet",
    weights: Annotated[str, typer.Option()] = "default",
    sites: Annotated[int, typer.Option(min=1)] = 10,
    partition: Annotated[str, typer.Option(help="As in fedhead simulate; 'folder' for the sites of the data.")] = "iid",
    number: Annotated[str, typer.Option("--rounds", help="Numbers of rounds from zeros; empty for none.")] = "1,10",
    only: Annotated[str, typer.Option(help="Parts of the names to measure, separated by commas.")] = "",
    pooled: Annotated[bool, typer.Option("--pooled", help="Fit scikit-learn on all rows, too.")] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Any other setting.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Score of the head from one exchange, of rounds from zeros and of each site alone, on the same unseen rows."""
    torch.set_num_threads(1)
    asked = {
        "task": task,
        "backbone": backbone,
        "weights": weights,
        "seed": SEED,
        "diagnose": False,
        "simulation": {"sites": sites, "partition": partition, "device": "cpu", "data": data, "test_data": test_data},
    }
    plan = make_plan(RunConfig(**merge(asked, parse_assignments(set_ or []))), Inputs())
    if test_data and folds:
        raise UserError("Give a test set or folds, not both.")
    if pooled and plan.config.task != "classification":
        raise UserError(f"--pooled fits classifiers, not the task {plan.config.task!r}: leave it out.")
    found = Baselines(
        plan,
        [int(one) for one in number.split(",") if one],
        pooled=pooled,
        only=[one for one in only.split(",") if one],
    )
    train = Rows.of(plan, plan.samples)
    readable = train.store.readable()
    if test_data:
        test = Rows.of(plan, load_samples(test_data))
        found.add(train, readable, test, test.store.readable())
    else:
        keys = train.store.keys[readable]
        tests = [fold_of(keys, folds) == one for one in range(folds)] if folds else [held_out(keys, HELD_OUT)]
        for chosen in tests:
            found.add(train, readable[~chosen], train, readable[chosen])
    setting = {
        "backbone": backbone,
        "data": data,
        "rows": len(readable),
        "tested": found.tested,
        "folds": folds,
        "sites": len(plan.assign(readable)),
        "partition": partition,
    }
    found.measurement(setting).show(as_json=as_json)
