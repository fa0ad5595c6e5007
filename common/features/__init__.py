"""Features: run backbones over data once and cache the results."""

from fedhead.features.store import FeatureStore as FeatureStore
from fedhead.features.store import Progress as Progress
