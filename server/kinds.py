"""The coordinator of each kind of run."""

from fedhead.config import RunConfig
from fedhead.server.cluster_run import ClusterCoordinator
from fedhead.server.coordinator import Coordinator
from fedhead.server.head_run import HeadCoordinator
from fedhead.server.private_run import PrivateCoordinator


def coordinator_for(config: RunConfig) -> type[Coordinator]:
    """Return the coordinator that runs a configuration."""
    if config.task == "clusters":
        return ClusterCoordinator
    return PrivateCoordinator if config.privacy.on else HeadCoordinator
