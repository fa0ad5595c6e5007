"""Flower strategies by name, and the screen that drops bad replies before a strategy sees them."""

import gc
import hashlib
import inspect
import logging
import random
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import add

import flwr.serverapp.strategy
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    Bulyan,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedProx,
    FedYogi,
    Krum,
    MultiKrum,
    Strategy,
)

from fedhead.config import StrategyConfig
from fedhead.errors import FedheadError, UserError
from fedhead.flower.grids import NodeInfo, Run
from fedhead.flower.strategies import AggregationError, InconsistentMessageReplies, aggregate_metricrecords
from fedhead.protocol.heads import HeadReply
from fedhead.protocol.messages import (
    MessageError,
    Payload,
)
from fedhead.registry import suggest
from fedhead.server.pooled_lbfgs import NAME, PooledLBFGS
from fedhead.server.strategy_state import AnyArray
from fedhead.sums.heads import EXAMPLES, HELD_OUT, TRAIN_LOSS, HeadSums
from fedhead.sums.sums import Arrays

NAMES = (
    "Bulyan",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedMedian",
    "FedProx",
    "FedTrimmedAvg",
    "FedYogi",
    "Krum",
    "MultiKrum",
    "QFedAvg",
)
"""Flower's strategies that average or select heads."""

LARGEST_MADE = 1e30
"""Bar on the parameters of an aggregated head; beyond it, every site's outputs overflow in float32."""


class UnusableHeadError(FedheadError):
    """A strategy made a head that cannot be sent."""


def build_strategy(config: StrategyConfig) -> Strategy:
    """Build a Flower strategy from its Flower name and its parameters.

    Raises:
        UserError: for an unknown name, an unknown or missing parameter, or a value that does not fit.
    """
    if config.name not in (*NAMES, NAME):
        raise UserError(f"There is no strategy {config.name!r}. {suggest(config.name, [*NAMES, NAME])}")
    made: type[Strategy] = PooledLBFGS if config.name == NAME else getattr(flwr.serverapp.strategy, config.name)
    parameters = inspect.signature(made).parameters
    types = typing.get_type_hints(made.__init__)
    scalars = {name: types[name] for name in parameters if types[name] in (int, float, str)}
    for name, value in config.parameters.items():
        if name not in scalars:
            raise UserError(f"{config.name} has no parameter {name!r}. {suggest(name, list(scalars))}")
        expected = scalars[name]
        if not (isinstance(value, expected) or (expected is float and isinstance(value, int))):
            raise UserError(f"{config.name} needs {expected.__name__} as {name}, not {value!r}.")
    missing = [n for n, p in parameters.items() if p.default is p.empty and n not in config.parameters]
    if missing:
        raise UserError(f"{config.name} needs the parameter {missing[0]!r}, as in --set strategy.{missing[0]}=0.1.")
    try:
        # Flower's constructors log their parameters, which the run's own output has already.
        with _quiet_flower():
            return made(**config.parameters)
    except (ValueError, TypeError) as error:
        raise UserError(f"{config.name} refuses its parameters: {error}") from None


def required_sites(strategy: Strategy) -> int:
    """Return the quorum of the strategy's rule (Blanchard 2017; El Mhamdi 2018)."""
    if isinstance(strategy, Bulyan):
        return 4 * strategy.num_malicious_nodes + 3
    if isinstance(strategy, Krum | MultiKrum):
        return 2 * strategy.num_malicious_nodes + 3
    return 1


def averages(strategy: Strategy) -> bool:
    """Return whether the strategy uses only the weighted mean of the replies, so that one mean may replace them."""
    means = (FedAvg, FedProx, FedAvgM, FedAdam, FedAdagrad, FedYogi)
    if type(strategy) is PooledLBFGS:
        return True
    # A subclass may look at single replies, and so may a metrics function of the user's.
    return type(strategy) in means and getattr(strategy, "train_metrics_aggr_fn", None) is aggregate_metricrecords


class Cohort(Grid):
    """A Grid on which only this round's sites exist, so that a strategy can sample no others."""

    def __init__(self, grid: Grid, node_ids: Sequence[int]) -> None:
        self._grid = grid
        self._node_ids = list(node_ids)

    def get_node_ids(self) -> Iterable[int]:
        return self._node_ids

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [node for node in self._grid.get_nodes() if node.node_id in self._node_ids]

    def set_run(self, run: Run) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self._grid.send_and_receive(messages, timeout=timeout)


class KeptArray(Array):
    """A Flower array that keeps its values, so that the same process need not parse its bytes."""

    def __init__(self, values: AnyArray) -> None:
        self._values = np.ascontiguousarray(values)
        super().__init__(self._values)
        self._made = self.data

    def numpy(self) -> AnyArray:
        """Return a copy of the values, or parse the bytes if somebody replaced them."""
        return self._values.copy() if self.data is self._made else super().numpy()


def kept_record(arrays: Arrays) -> ArrayRecord:
    """Return a record of kept arrays; Flower's own constructor copies their bytes into plain ones."""
    record = ArrayRecord()
    for name, values in arrays.items():
        record[name] = KeptArray(values)
    return record


def sample_sites(strategy: Strategy, names: Sequence[str], seed: int, server_round: int) -> list[str]:
    """Draw a round's sites by name, in the number given by the strategy's `fraction_train` and `min_train_nodes`.

    A strategy without these gets all sites, and samples by itself.
    """
    fraction = getattr(strategy, "fraction_train", 1.0)
    size = max(int(len(names) * fraction), getattr(strategy, "min_train_nodes", 0))
    if size >= len(names):
        return sorted(names)
    digest = hashlib.sha256(f"sites {seed} {server_round}".encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))
    return sorted(np.array(sorted(names))[generator.permutation(len(names))[:size]].tolist())


def configure_round(
    strategy: Strategy, server_round: int, head: Arrays, grid: Grid, node_ids: Sequence[int]
) -> list[Message]:
    """Have the strategy make this round's messages, for `node_ids` only."""
    arrays = kept_record(head)
    with _taking_all(strategy), _quiet_flower():
        return list(strategy.configure_train(server_round, arrays, ConfigRecord(), Cohort(grid, node_ids)))


def aggregate_round(
    strategy: Strategy, server_round: int, replies: Sequence[tuple[Message, HeadReply]], expected: Arrays
) -> Arrays | None:
    """Have the strategy aggregate screened replies, ordered by site name, into a new head.

    A strategy that averages receives the sum of all replies as one reply, the same in simulation and on a network.

    Args:
        strategy: one of Flower's, or the user's own.
        server_round: from 1.
        replies: replies with the messages that they answer.
        expected: arrays with the head's names, shapes and dtype.

    Returns:
        The head, or None if the strategy made none.

    Raises:
        UnusableHeadError: if the strategy makes a head of another form, or of values that overflow.
        FedheadError: if the strategy fails.
    """
    key = getattr(strategy, "arrayrecord_key", "arrays")
    weight = getattr(strategy, "weighted_by_key", "num-examples")
    results = [(instruction, reply.sums) for instruction, reply in replies]
    if averages(strategy):
        results = [(replies[0][0], reduce(add, (sums for _, sums in results)))]
    dtypes = {name: head.dtype for name, head in replies[0][1].sums.heads.items()}
    messages = []
    for instruction, sums in results:
        metrics = MetricRecord({weight: sums.examples, "train_loss": float(sums.metrics[TRAIN_LOSS])})
        heads = kept_record({name: sums.heads[name].astype(dtypes[name], copy=False) for name in expected})
        messages.append(Message(RecordDict({key: heads, "metrics": metrics}), reply_to=instruction))
    try:
        with _quiet_flower(), _quick_collections():
            made, _ = strategy.aggregate_train(server_round, messages)
    except (AggregationError, InconsistentMessageReplies, ValueError, ArithmeticError) as error:
        raise FedheadError(f"{type(strategy).__name__} failed in round {server_round}: {error}") from error
    if made is None:
        return None
    aggregated = {name: made[name].numpy().astype(like.dtype) for name, like in expected.items() if name in made}
    for name, like in expected.items():
        if (
            name not in aggregated
            or aggregated[name].shape != like.shape
            or not (np.abs(aggregated[name]) <= LARGEST_MADE).all()
        ):
            raise UnusableHeadError(
                f"{type(strategy).__name__} made no usable {name!r} in round {server_round}: it is missing, of another "
                f"shape, not finite, or beyond {LARGEST_MADE:g}. A smaller learning rate may help."
            )
    return aggregated


def screen(payload: Payload, like: HeadSums, rows: Mapping[str, int], site: str, *, merged: bool) -> HeadReply:
    """Read and check a site's reply to `TRAIN` or `EVALUATE`.

    Args:
        payload: the reply.
        like: results with a head of the expected form, without one if none is expected.
        rows: the number of rows that each site claims to have.
        site: the name of the site.
        merged: whether the reply may speak for several sites.

    Raises:
        MessageError: for other keys, shapes, dtypes, values that are not finite, or more rows than the site has.
    """
    reply = HeadReply.from_payload(payload, like, merged=merged)
    names = reply.sites or (site,)
    claimed = reply.metrics[:, EXAMPLES] + reply.metrics[:, HELD_OUT]
    known = np.array([rows.get(name, 0) for name in names[: len(claimed)]])
    for at in np.flatnonzero(claimed > known):
        row = reply.metrics[at]
        raise MessageError(
            f"it claims {row[EXAMPLES]:.0f} training rows and {row[HELD_OUT]:.0f} held out, of {known[at]} "
            f"that {names[at]} has"
        )
    return reply


@contextmanager
def _taking_all(strategy: Strategy) -> Iterator[None]:
    """Make the strategy use every node it is shown, and preserve the global random state."""
    everything = {"fraction_train": 1.0, "min_train_nodes": 0, "min_available_nodes": 0}
    own = {name: getattr(strategy, name) for name in everything if hasattr(strategy, name)}
    state = random.getstate()
    for name in own:
        setattr(strategy, name, everything[name])
    try:
        yield
    finally:
        random.setstate(state)
        for name, value in own.items():
            setattr(strategy, name, value)


@contextmanager
def _quick_collections() -> Iterator[None]:
    """Exclude existing objects from garbage collection.

    Flower collects garbage after every record that it reads into arrays, which takes a third of a second with torch
    loaded.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _quiet_flower() -> Iterator[None]:
    # Changing the level would clear the caches of all loggers twice per round.
    logger = logging.getLogger("flwr")
    logger.addFilter(_is_error)
    try:
        yield
    finally:
        logger.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
