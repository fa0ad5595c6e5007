"""Undocumented parts of Flower; no other module may rely on these.

Written for flwr 1.41 and 1.42. `tests/common/flower/` fails loudly if another version moves anything used here, or if a
module outside this package reaches past Flower's documented modules.

- `identity`: the process-wide identity that messages need.
- `messages`: ids, bytes and parts of messages.
- `signing`: the signatures by which a request proves who sent it.
- `fleet_client`: a site's end of the Fleet API.
- `fleet_api`: the requests that the Fleet API knows, and their handlers.
- `inline`: objects in the same request as their message.
- `site_link`: a coordinator's end, one for each site.
- `grids`, `strategies`: names that Grids and strategies need.
"""

import os

# No process at a data site calls anyone but its coordinator.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from fedhead.flower.identity import in_process_identity, keep_identity
from fedhead.flower.messages import content_from_bytes, content_to_bytes, set_message_id

__all__ = [
    "content_from_bytes",
    "content_to_bytes",
    "in_process_identity",
    "keep_identity",
    "set_message_id",
]
