"""The coordinator of each kind of run."""

from fedhead.config import GENERATION, RunConfig
from fedhead.server.cluster_run import ClusterCoordinator
from fedhead.server.coordinator import Coordinator
from fedhead.server.generation_run import GenerationCoordinator
from fedhead.server.head_run import HeadCoordinator
from fedhead.server.private_run import PrivateCoordinator


def coordinator_for(config: RunConfig) -> type[Coordinator]:
    """Return the coordinator that runs a configuration."""
    if config.task == "clusters":
        return ClusterCoordinator
    if config.task == GENERATION:
        return GenerationCoordinator
    return PrivateCoordinator if config.privacy.on else HeadCoordinator
