"""Parts of Flower's strategies that it does not document."""

from flwr.serverapp.exception import AggregationError, InconsistentMessageReplies
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords

__all__ = ["AggregationError", "InconsistentMessageReplies", "aggregate_metricrecords"]
