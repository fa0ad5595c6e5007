import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy
from torch import Tensor
from torch.nn import functional

from fedhead.backbones import load_backbone
from fedhead.client.app import make_app
from fedhead.client.backbones import AcceptedBackbones
from fedhead.client.local_site import LocalSite
from fedhead.client.minibatches import shuffled
from fedhead.client.release.guard import Guard
from fedhead.config import RunConfig
from fedhead.data import Samples, held_out, load_samples, samples_from_arrays, sources
from fedhead.errors import FedheadError, UserError
from fedhead.protocol.actions import CALIBRATE, DESCRIBE, EVALUATE, INSTALL, REPORT, TRAIN
from fedhead.protocol.messages import PAYLOAD, RECORD, Payload
from fedhead.server.observer import EachRound
from fedhead.simulations import RunResult, simulate
from fedhead.sums.heads import METRICS

ROWS, BAD_ROWS = 180, 60
GOOD_SITES = [np.arange(0, 50), np.arange(50, 80), np.arange(80, ROWS)]
ALL_SITES = [*GOOD_SITES, np.arange(ROWS, ROWS + BAD_ROWS)]
GOOD_NAMES, BAD = ["site-0", "site-1", "site-2"], "site-3"
IN_ROUNDS = (TRAIN, EVALUATE, REPORT)
UNGUARDED = {"min_class_count": 0, "min_rows": 0}
CONFIG = RunConfig(init="zeros", rounds=3, simulation=UNGUARDED)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def some_digits(rows: npt.NDArray[np.int64]) -> Samples:
    whole = load_samples("digits")
    images = [whole.read(int(row)) for row in rows]
    return samples_from_arrays(images, whole.labels[rows], classes=whole.classes, spec="some digits")


@sources.register("rows-of-digits")
def rows_of_digits(argument: str) -> Samples:
    start, _, stop = argument.partition("-")
    return some_digits(np.arange(int(start), int(stop)))


@pytest.fixture(scope="module")
def digits() -> Samples:
    return some_digits(np.arange(ROWS + BAD_ROWS))


def app_of(name: str, rows: npt.NDArray[np.int64]) -> ClientApp:
    """Return the app of a site that holds adjoining rows."""
    data, accepted = f"rows-of-digits:{rows[0]}-{rows[-1] + 1}", AcceptedBackbones(frozenset({CONFIG.backbone}))
    site = LocalSite(name, data, device="cpu", guard=Guard.off(), backbones=accepted)
    return make_app(lambda context: site)


@pytest.fixture(scope="module")
def honest_app() -> ClientApp:
    """What the bad site would do if it were a good one."""
    return app_of(BAD, ALL_SITES[-1])


@pytest.fixture(scope="module")
def without_it(digits: Samples, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return simulate(CONFIG, digits, GOOD_SITES, out=tmp_path_factory.mktemp("without"))


def head_of(result: RunResult) -> dict[str, Tensor]:
    return dict(result.model.head.state_dict())


def assert_same_head(one: RunResult, other: RunResult) -> None:
    first, second = head_of(one), head_of(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert one.outcome.kept_round == other.outcome.kept_round


def reasons(result: RunResult, site: str = BAD) -> list[str]:
    """Return why a site was left out, wherever the run says so."""
    refused = result.outcome.refused
    dropped = [line.dropped[site] for line in result.history if site in line.dropped]
    return [*([refused[site]] if site in refused else []), *dropped]


# What a bad site does with the reply that an honest one would have sent.

Change = Callable[[RecordDict], RecordDict]


class BadSite(ClientApp):
    """An honest app whose replies to some actions are changed."""

    def __init__(self, honest: ClientApp, change: Change, actions: Sequence[str] = (), spared: Sequence[str] = ()):
        super().__init__()
        self.honest = honest
        self.change = change
        self.actions = actions
        self.spared = spared
        self.changed = 0

    def __call__(self, message: Message, context: Context) -> Message:
        reply = self.honest(message, context)
        action = message.metadata.message_type
        if action in self.spared or (self.actions and action not in self.actions):
            return reply
        self.changed += 1
        return Message(self.change(reply.content), reply_to=message)


def on_arrays(change: Callable[[dict[str, npt.NDArray[Any]]], Mapping[str, npt.NDArray[Any]]]) -> Change:
    def changed(content: RecordDict) -> RecordDict:
        payload = Payload.from_content(content)
        return Payload(payload.values, change(dict(payload.arrays))).to_content()

    return changed


def on_metrics(**values: float) -> Change:
    def change(arrays: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        if "metrics" in arrays:
            arrays["metrics"] = arrays["metrics"].copy()
            for name, value in values.items():
                arrays["metrics"][0, METRICS.index(name)] = value
        return arrays

    return on_arrays(change)


def filled(value: float) -> Change:
    return on_arrays(
        lambda arrays: {
            name: np.full_like(array, value) if array.dtype.kind == "f" else array for name, array in arrays.items()
        }
    )


def fails(content: RecordDict) -> RecordDict:
    raise RuntimeError("the disk of this site is gone")


EVERYWHERE: dict[str, Change] = {
    "NaN": filled(np.nan),
    "infinite": filled(np.inf),
    "one NaN": on_arrays(
        lambda arrays: {
            name: np.where(np.arange(array.size).reshape(array.shape) == 0, np.nan, array).astype(array.dtype)
            if array.dtype.kind == "f"
            else array
            for name, array in arrays.items()
        }
    ),
    "wrong shapes": on_arrays(lambda arrays: {name: array[..., :-1] for name, array in arrays.items()}),
    "no rank": on_arrays(lambda arrays: {name: array.ravel()[0] for name, array in arrays.items()}),
    "empty": on_arrays(lambda arrays: {name: array[:0] for name, array in arrays.items()}),
    "other keys": on_arrays(lambda arrays: {f"{name}s": array for name, array in arrays.items()}),
    "a key more": on_arrays(lambda arrays: {**arrays, "more": np.zeros(3, np.float32)}),
    "a key less": on_arrays(lambda arrays: dict(sorted(arrays.items())[1:])),
    "nothing": on_arrays(lambda arrays: {}),
    "another dtype": on_arrays(lambda arrays: {name: array.astype(np.float16) for name, array in arrays.items()}),
    "text instead": on_arrays(
        lambda arrays: {name: np.frombuffer(b"hello", np.uint8).copy() for name in arrays},
    ),
    "raises": fails,
    "garbage": lambda content: RecordDict({RECORD: ConfigRecord({PAYLOAD: random.Random(0).randbytes(500)})}),
    "a huge header": lambda content: RecordDict({RECORD: ConfigRecord({PAYLOAD: b"\xff" * 64})}),
    "a number as payload": lambda content: RecordDict({RECORD: ConfigRecord({PAYLOAD: 3})}),
    "another record": lambda content: RecordDict({"arrays": ArrayRecord(), "metrics": MetricRecord()}),
    "no record": lambda content: RecordDict(),
    "a list of values": lambda content: Payload([1], {}).to_content(),  # type: ignore[arg-type]
}

LIES_ABOUT_ROWS: dict[str, Change] = {
    "more rows than it has": on_metrics(examples=BAD_ROWS + 1),
    "a billion rows": on_metrics(examples=1e9),
}

IN_TRAINING: dict[str, Change] = {
    **EVERYWHERE,
    "fewer rows than none": on_metrics(examples=-10),
    "half a row": on_metrics(examples=10.5),
    "NaN rows": on_metrics(examples=np.nan),
    "an infinite loss": on_metrics(train_loss=np.inf),
    "more right than there are": on_metrics(score=BAD_ROWS),
    "more held out than it has": on_metrics(held_out=1e9, score=1e9, loss_sum=0.0),
    "held out and trained on": on_metrics(held_out=BAD_ROWS, score=BAD_ROWS, loss_sum=0.0),
    "metrics for two": on_arrays(lambda arrays: {**arrays, "metrics": np.zeros((2, len(METRICS)))}),
}


@pytest.mark.parametrize("what", EVERYWHERE)
def test_a_site_bad_from_its_first_reply_changes_nothing(
    digits: Samples, honest_app: ClientApp, without_it: RunResult, what: str
) -> None:
    bad = BadSite(honest_app, EVERYWHERE[what], spared=(DESCRIBE, INSTALL))
    result = simulate(CONFIG, digits, ALL_SITES, apps={BAD: bad})
    assert bad.changed
    assert_same_head(result, without_it)
    assert reasons(result)
    assert all(reasons(result))
    assert result.accuracy_by_site == without_it.accuracy_by_site
    assert [line.score for line in result.history] == [line.score for line in without_it.history]


@pytest.fixture(scope="module")
def failing_in_training(digits: Samples, honest_app: ClientApp, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    bad = BadSite(honest_app, fails, actions=IN_ROUNDS)
    return simulate(CONFIG, digits, ALL_SITES, apps={BAD: bad}, out=tmp_path_factory.mktemp("failing"))


@pytest.mark.parametrize("what", IN_TRAINING)
def test_a_bad_reply_in_training_is_no_other_than_none(
    digits: Samples, honest_app: ClientApp, failing_in_training: RunResult, what: str
) -> None:
    bad = BadSite(honest_app, IN_TRAINING[what], actions=IN_ROUNDS)
    result = simulate(CONFIG, digits, ALL_SITES, apps={BAD: bad})
    assert_same_head(result, failing_in_training)
    assert all(line.dropped[BAD] for line in result.history[1:])
    # A lie about rows that are trained on shows where there are any: not when the last head is evaluated.
    compared = slice(0, None if what in EVERYWHERE else -1)
    for line, like in zip(result.history[compared], failing_in_training.history[compared], strict=True):
        assert (line.sites, line.score, line.loss) == (like.sites, like.score, like.loss)
    if what in EVERYWHERE:
        assert set(result.sites) == set(GOOD_NAMES)


@pytest.mark.parametrize("what", LIES_ABOUT_ROWS)
def test_a_weight_that_is_not_there_does_not_count(
    digits: Samples, honest_app: ClientApp, failing_in_training: RunResult, what: str
) -> None:
    bad = BadSite(honest_app, LIES_ABOUT_ROWS[what], actions=(TRAIN,))
    result = simulate(CONFIG, digits, ALL_SITES, apps={BAD: bad})
    assert_same_head(result, failing_in_training)
    assert all("training rows" in line.dropped[BAD] for line in result.history[1:])
    assert [line.sites for line in result.history[1:]] == [3, 3, 3]


def test_a_reply_that_speaks_for_another_site_changes_nothing(
    digits: Samples, honest_app: ClientApp, failing_in_training: RunResult
) -> None:
    def claims(content: RecordDict) -> RecordDict:
        payload = Payload.from_content(content)
        arrays = {name: np.ones_like(array) for name, array in payload.arrays.items()}
        arrays["metrics"] = np.array([[20.0, 0.1, 5.0, 0.1, 5.0]])
        return Payload({"sites": ["site-0"], "dropped": {"site-2": "gone"}, "num_bytes": 1}, arrays).to_content()

    bad = BadSite(honest_app, claims, actions=IN_ROUNDS)
    result = simulate(CONFIG, digits, ALL_SITES, apps={BAD: bad})
    assert_same_head(result, failing_in_training)
    assert result.accuracy_by_site == failing_in_training.accuracy_by_site
    assert all(set(line.dropped) == {BAD} for line in result.history[1:])


def test_a_site_that_takes_anothers_name_is_refused(
    digits: Samples, honest_app: ClientApp, without_it: RunResult
) -> None:
    def claims(content: RecordDict) -> RecordDict:
        values = dict(Payload.from_content(content).values)
        return Payload({**values, "site": "site-1"}).to_content()

    bad = BadSite(honest_app, claims, actions=(DESCRIBE, INSTALL))
    result = simulate(CONFIG, digits, ALL_SITES, apps={BAD: bad})
    assert any("site-1" in reason for reason in result.outcome.refused.values())
    # Which of the two is the true one cannot be told, so both or one may be left out, but never another site.
    assert {"site-0", "site-2"} <= set(result.outcome.participants)
    assert BAD not in result.outcome.participants


def described(**values: Any) -> Change:
    def changed(content: RecordDict) -> RecordDict:
        return Payload({**Payload.from_content(content).values, **values}).to_content()

    return changed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (fails, "disk of this site is gone"),
        (EVERYWHERE["garbage"], ""),
        (EVERYWHERE["no record"], ""),
        (described(rows=-3), "rows"),
        (described(rows="many"), "rows"),
        (described(site=""), "its site name is empty"),
        (described(refusal="This site is closed."), "This site is closed."),
        (described(has_weights=False), "still has none"),
    ],
)
def test_a_site_that_cannot_be_described_takes_no_part(
    digits: Samples, honest_app: ClientApp, without_it: RunResult, change: Change, words: str
) -> None:
    bad = BadSite(honest_app, change, actions=(DESCRIBE, INSTALL))
    result = simulate(CONFIG, digits, ALL_SITES, apps={BAD: bad})
    assert_same_head(result, without_it)
    (reason,) = result.outcome.refused.values()
    assert words in reason
    assert reason
    assert list(result.outcome.participants) == GOOD_NAMES


@pytest.mark.parametrize("init", ["zeros", ""])
@pytest.mark.parametrize("action", ["query.statistics", "query.standardise"])
@pytest.mark.parametrize("what", ["raises", "garbage", "NaN", "wrong shapes", "no record"])
def test_a_site_bad_in_one_exchange_alone_cannot_end_the_run(
    digits: Samples, honest_app: ClientApp, action: str, what: str, init: str
) -> None:
    bad = BadSite(honest_app, EVERYWHERE[what], actions=(action,))
    result = simulate(RunConfig(init=init, rounds=2, simulation=UNGUARDED), digits, ALL_SITES, apps={BAD: bad})
    assert len(result.history) == 3
    assert set(GOOD_NAMES) <= set(result.outcome.participants)


def test_a_site_cannot_count_rows_for_others(digits: Samples, honest_app: ClientApp, tmp_path: Path) -> None:
    def claims(content: RecordDict) -> RecordDict:
        payload = Payload.from_content(content)
        counts = {"site_counts": np.full((3, 10), 7, dtype=np.int64)}
        return Payload({**payload.values, "num_bytes": "all"}, {**payload.arrays, **counts}).to_content()

    bad = BadSite(honest_app, claims, actions=("query.statistics",))
    config = RunConfig(rounds=1, keep_sums="total", simulation=UNGUARDED)
    result = simulate(config, digits, ALL_SITES, apps={BAD: bad}, out=tmp_path / "run")
    assert "site_counts" in result.outcome.refused[BAD]
    assert list(result.outcome.participants) == GOOD_NAMES


def test_a_site_that_missed_the_standardisation_does_not_train(digits: Samples, honest_app: ClientApp) -> None:
    class Deaf(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            if message.metadata.message_type == "query.standardise":
                raise RuntimeError("it did not hear")
            return honest_app(message, context)

    deaf = simulate(CONFIG, digits, ALL_SITES, apps={BAD: Deaf()})
    silent = simulate(
        CONFIG,
        digits,
        ALL_SITES,
        apps={BAD: BadSite(honest_app, fails, actions=("query.standardise", *IN_ROUNDS))},
    )
    assert_same_head(deaf, silent)
    assert reasons(deaf)
    assert BAD not in deaf.sites


def test_a_bad_site_whose_name_comes_first_turns_nobody_away(digits: Samples) -> None:
    # Statistics are folded in the order of names: the first one's origin must not decide about the others.
    honest = app_of("site-0", ALL_SITES[0])

    def moved(arrays: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        return {name: array + 1 if name == "origin" else array for name, array in arrays.items()}

    bad = BadSite(honest, on_arrays(moved), actions=("query.statistics",))
    result = simulate(RunConfig(rounds=0, simulation=UNGUARDED), digits, ALL_SITES, apps={"site-0": bad})
    dropped = {name for line in result.history for name in line.dropped} | set(result.outcome.refused)
    assert dropped <= {"site-0"}


@pytest.mark.parametrize("what", ["raises", "garbage", "NaN", "wrong shapes", "no record"])
def test_a_site_that_cannot_calibrate_the_first_head_trains_all_the_same(
    digits: Samples, honest_app: ClientApp, what: str
) -> None:
    bad = BadSite(honest_app, EVERYWHERE[what], actions=(CALIBRATE,))
    result = simulate(RunConfig(rounds=2, simulation=UNGUARDED), digits, ALL_SITES, apps={BAD: bad})
    assert [BAD in line.dropped for line in result.history] == [True, False, False]
    assert [line.sites for line in result.history[1:]] == [len(ALL_SITES)] * 2
    first = result.history[0]
    alone = simulate(RunConfig(rounds=0, simulation=UNGUARDED), digits, ALL_SITES)
    assert first.loss is not None and alone.history[0].loss is not None
    assert first.score == alone.history[0].score


def test_a_site_that_fails_in_one_round_is_back_in_the_next(digits: Samples, honest_app: ClientApp) -> None:
    class Sometimes(ClientApp):
        trained = 0

        def __call__(self, message: Message, context: Context) -> Message:
            if message.metadata.message_type == TRAIN:
                self.trained += 1
                if self.trained == 2:
                    raise ConnectionError("no line")
            return honest_app(message, context)

    result = simulate(CONFIG, digits, ALL_SITES, apps={BAD: Sometimes()})
    assert [dict(line.dropped) for line in result.history] == [{}, {}, {BAD: "no line"}, {}]
    assert [line.sites for line in result.history[1:]] == [4, 3, 4]
    assert BAD in result.sites


def test_an_error_reply_of_flowers_is_a_reason(digits: Samples, honest_app: ClientApp, without_it: RunResult) -> None:
    class Erring(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            if message.metadata.message_type in (DESCRIBE, INSTALL):
                return honest_app(message, context)
            return Message(Error(3, "the node is unreachable"), reply_to=message)

    result = simulate(CONFIG, digits, ALL_SITES, apps={BAD: Erring()})
    assert_same_head(result, without_it)
    assert any("unreachable" in reason for reason in reasons(result))


@pytest.mark.parametrize("strategy", ["FedAvg", "FedMedian"])
def test_a_head_of_no_rows_does_not_count(digits: Samples, honest_app: ClientApp, strategy: str) -> None:
    config = RunConfig(init="zeros", rounds=1, strategy={"name": strategy}, simulation=UNGUARDED)
    lazy = BadSite(honest_app, on_metrics(examples=0), actions=(TRAIN,))
    failing = BadSite(honest_app, fails, actions=(TRAIN,))
    results = [simulate(config, digits, ALL_SITES, apps={BAD: bad}) for bad in (lazy, failing)]
    assert_same_head(*results)
    assert [result.history[1].sites for result in results] == [3, 3]


@pytest.mark.parametrize("strategy", ["FedMedian", "Krum", "QFedAvg"])
def test_strategies_that_see_every_reply_see_no_bad_one(digits: Samples, honest_app: ClientApp, strategy: str) -> None:
    parameters: dict[str, float] = {"client_learning_rate": 0.1} if strategy == "QFedAvg" else {}
    config = RunConfig(init="zeros", rounds=2, strategy={"name": strategy, **parameters}, simulation=UNGUARDED)
    good = simulate(config, digits, GOOD_SITES)
    bad = BadSite(honest_app, EVERYWHERE["NaN"], spared=(DESCRIBE, INSTALL))
    assert_same_head(simulate(config, digits, ALL_SITES, apps={BAD: bad}), good)


def test_a_run_of_bad_sites_alone_fails_and_says_why(digits: Samples, honest_app: ClientApp) -> None:
    apps = {
        name: BadSite(app_of(name, rows), fails, spared=(DESCRIBE, INSTALL))
        for name, rows in zip(GOOD_NAMES, GOOD_SITES, strict=True)
    }
    with pytest.raises(FedheadError, match="site-0: the disk of this site is gone") as caught:
        simulate(CONFIG, digits, GOOD_SITES, apps=apps)
    assert not isinstance(caught.value, UserError)
    with pytest.raises(FedheadError, match="0 of 3 sites can take part"):
        simulate(CONFIG, digits, GOOD_SITES, apps={name: BadSite(honest_app, fails) for name in GOOD_NAMES})


# Strategies.


class PlainMean(Strategy):
    """A user's own: the mean of the heads, whatever their rows; remembers what it saw."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self.made: list[ArrayRecord] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        content = RecordDict({"arrays": arrays, "config": config})
        return [Message(content, node, MessageType.TRAIN) for node in grid.get_node_ids()]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        contents = [reply.content for reply in replies]
        self.seen.append([int(content["metrics"]["num-examples"]) for content in contents])  # type: ignore[arg-type]
        heads = [next(iter(content.array_records.values())).to_torch_state_dict() for content in contents]
        mean = {name: torch.stack([head[name] for head in heads]).mean(0) for name in heads[0]}
        self.made.append(ArrayRecord(mean))
        return self.made[-1], None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        raise AssertionError("the coordinator evaluates by itself")

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        raise AssertionError("the coordinator evaluates by itself")

    def summary(self) -> None:
        pass


def test_a_strategy_of_the_users_own_sees_each_site_in_order(digits: Samples) -> None:
    strategy = PlainMean()
    config = RunConfig(init="zeros", rounds=2, holdout=0.0, simulation=UNGUARDED)
    result = simulate(config, digits, GOOD_SITES, strategy=strategy)
    assert strategy.seen == [[len(rows) for rows in GOOD_SITES]] * 2
    assert [line.sites for line in result.history] == [0, 3, 3]
    reordered = simulate(config, digits, GOOD_SITES, strategy=PlainMean())
    assert_same_head(result, reordered)
    averaged = simulate(config, digits, GOOD_SITES)
    assert not torch.allclose(head_of(result)["weight"], head_of(averaged)["weight"], atol=1e-5)


class MakesNothing(PlainMean):
    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[None, None]:
        return None, None


class MakesNaN(PlainMean):
    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        made, _ = super().aggregate_train(server_round, replies)
        assert made is not None
        return ArrayRecord({name: array * float("nan") for name, array in made.to_torch_state_dict().items()}), None


def test_a_strategy_that_makes_no_head_keeps_the_one_before(digits: Samples) -> None:
    result = simulate(CONFIG, digits, GOOD_SITES, strategy=MakesNothing())
    assert len(result.history) == CONFIG.rounds + 1
    assert not any(bool(value.any()) for value in head_of(result).values())


def test_a_strategy_that_makes_nonsense_ends_the_run_in_a_sentence(digits: Samples) -> None:
    with pytest.raises(FedheadError, match="MakesNaN made no usable"):
        simulate(CONFIG, digits, GOOD_SITES, strategy=MakesNaN())


def test_a_fraction_of_the_sites_trains_and_all_are_scored(digits: Samples) -> None:
    sites = np.array_split(np.arange(ROWS), 10)
    asked: list[set[str]] = []

    class Counting(ClientApp):
        def __init__(self, name: str, rows: npt.NDArray[np.int64]) -> None:
            super().__init__()
            self.name = name
            self.app = app_of(name, rows)

        def __call__(self, message: Message, context: Context) -> Message:
            if message.metadata.message_type == TRAIN:
                asked[-1].add(self.name)
            return self.app(message, context)

    config = RunConfig(init="zeros", rounds=4, strategy={"name": "FedAvg", "fraction_train": 0.3}, simulation=UNGUARDED)
    apps = {f"site-{number}": Counting(f"site-{number}", rows) for number, rows in enumerate(sites)}
    asked.append(set())
    result = simulate(config, digits, sites, apps=apps, observers=[EachRound(lambda finished: asked.append(set()))])
    cohorts = [names for names in asked if names]
    assert [len(names) for names in cohorts] == [3] * 4
    assert len(set(map(frozenset, cohorts))) > 1
    assert [line.sites for line in result.history] == [0, 3, 3, 3, 3]
    assert len(result.sites) > 3
    assert list(result.outcome.participants) == sorted(apps)
    random.seed(3)  # nobody else's generator decides who is sampled
    again = simulate(config, digits, sites)
    for name, value in head_of(again).items():
        torch.testing.assert_close(value, head_of(result)[name], rtol=1e-4, atol=1e-4)


# The whole of it, against an independent loop.


def fedavg_by_hand(digits: Samples, config: RunConfig) -> list[tuple[Tensor, Tensor]]:
    """Return weight and bias for raw features after each round of FedAvg on standardised ones, in plain PyTorch."""
    backbone = load_backbone(config.backbone)
    images = [digits.read(row) for row in range(len(digits))]
    features = backbone.features(torch.stack([backbone.preprocessing(image) for image in images])).clone()
    labels = torch.from_numpy(digits.labels)
    keys = np.array([digits.key(row, image) for row, image in enumerate(images)], dtype=np.uint64)
    out = held_out(keys, config.holdout)
    train = [rows[~out[rows]] for rows in GOOD_SITES]
    pooled = features[np.concatenate(train)].double()
    mean, scale = pooled.mean(0).float(), pooled.std(0, correction=0).float()
    assert scale.min() > 0
    inputs = (features - mean) / scale
    weight, bias = torch.zeros(10, features.shape[1]), torch.zeros(10)
    made = []
    for number in range(1, config.rounds + 1):
        weights, biases = [], []
        for name, rows in zip(GOOD_NAMES, train, strict=True):
            w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
            optimizer = torch.optim.SGD([w, b], lr=config.local.lr, momentum=config.local.momentum)
            for epoch in range(config.local.epochs):
                order = rows[shuffled(config.seed, name, number, epoch, len(rows))]
                for batch in torch.split(torch.from_numpy(order), config.local.batch_size):
                    optimizer.zero_grad()
                    functional.cross_entropy(inputs[batch] @ w.T + b, labels[batch]).backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
            weights.append(w.detach())
            biases.append(b.detach())
        share = torch.tensor([len(rows) for rows in train]) / len(pooled)
        weight = torch.einsum("s,scd->cd", share, torch.stack(weights))
        bias = share @ torch.stack(biases)
        made.append((weight / scale, bias - (weight / scale) @ mean))
    return made


@pytest.mark.parametrize("holdout", [0.0, 0.2])
def test_fedavg_is_what_a_plain_loop_makes(digits: Samples, holdout: float) -> None:
    config = RunConfig(
        init="zeros",
        rounds=3,
        holdout=holdout,
        seed=4,
        local={"epochs": 2, "batch_size": 16, "momentum": 0.5},
        simulation=UNGUARDED,
    )
    result = simulate(config, some_digits(np.arange(ROWS)), GOOD_SITES)
    weight, bias = fedavg_by_hand(digits, config)[result.outcome.kept_round - 1]
    assert result.outcome.kept_round == 3 or holdout
    torch.testing.assert_close(head_of(result)["weight"], weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head_of(result)["bias"], bias, rtol=1e-4, atol=1e-5)


def test_flowers_own_fedavg_aggregates_to_the_same_head(digits: Samples) -> None:
    class AsItIs(FedAvg):
        """Of another type, so that it is handed every reply."""

    config = RunConfig(init="zeros", rounds=2, holdout=0.0, simulation=UNGUARDED)
    merged = simulate(config, digits, GOOD_SITES)
    single = simulate(config, digits, GOOD_SITES, strategy=AsItIs(fraction_evaluate=0.0))
    for name, value in head_of(merged).items():
        torch.testing.assert_close(value, head_of(single)[name], rtol=1e-6, atol=1e-6)
