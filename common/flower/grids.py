"""Types in the signature of `flwr.serverapp.Grid` that Flower does not document."""

from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.run import Run

__all__ = ["NodeInfo", "Run"]
