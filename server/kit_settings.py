"""The settings that new kits of sites and of the coordinator come with."""

from collections.abc import Mapping

import tomli_w

from fedhead.protocol.actions import ACTIONS


def site_settings(name: str, address: str, backbones: Mapping[str, str]) -> str:
    """Return the text of a new site's `site.toml`, which allows `backbones`, each with its comment."""
    actions = "".join(f"    {quoted(action.name) + ',':24} # {action.asks}\n" for action in ACTIONS.values())
    allow = "".join(f"    # {quoted(comment)[1:-1]}\n    {quoted(one)},\n" for one, comment in backbones.items())
    return _SITE.format(name=quoted(name), address=quoted(address), actions=actions, allow=allow and f"\n{allow}")


def quoted(text: str) -> str:
    """Return a text as a value of TOML."""
    return tomli_w.dumps({"v": text}).removeprefix("v = ").strip()


COORDINATOR_SETTINGS = """\
# The coordinator's kit, for fedhead server --kit THIS-FOLDER.

# What sites connect to; it is in the certificate, and in every site's kit.
address = {address}
# What the coordinator listens on, on its own machine.
listen = "{listen}"
"""

_SITE = """\
# The kit of one site, for fedhead client --kit THIS-FOLDER. This site alone decides these settings: nothing that the
# coordinator sends can change them.

name = {name}
# The coordinator, which shows a certificate signed by ca.pem. This site shows key.pem, which must stay secret.
coordinator = {address}

# The rows: folder:PATH, python:MODULE:FUNCTION or another data spec; fedhead client --data replaces it.
data = ""
# auto, cpu, cuda or mps.
device = "auto"
# Of the backbone's products: float32, or mixed, which is faster on GPUs and on CPUs that multiply bfloat16.
precision = "float32"
# Of runs that tune layers: auto, store activations below them on the disk, or recompute them for each batch.
activations = "auto"
# Whether an unreadable row stops the site instead of being skipped.
strict_data = false
# Share of the rows that are held out for evaluation; a run cannot choose it.
holdout = 0.2

[limits]
# Classes with fewer training rows, and the site as a whole with fewer rows, are withheld from everything.
min_class_count = 5
min_rows = 20
# No larger file of weights is taken from the coordinator, in bytes.
max_backbone_bytes = 4294967296

[budget]
# Replies about its rows that the site gives on one day (UTC).
releases_per_day = 5000

[privacy]
# "secure-sum": sums and heads leave only under masks that hide them from the coordinator, in sums over min_sites sites
# or more, safe even if max_colluding other sites collude with the coordinator. It needs the consortium's roster.toml.
require = "none"
min_sites = 3
max_colluding = 1
# Differential privacy: require = "dp", or "both", takes part in runs with calibrated noise only. epsilon is the budget
# of this site's rows for their lifetime; 0 refuses such runs. unit = "group" protects patients instead of rows.
epsilon = 0.0
delta = 1e-5
unit = "row"
# "shared": the sites of a secure sum may share the noise. "own": only runs in which each site adds all of it.
noise = "shared"

[permit]
# What the coordinator may ask of this site. Without a line, the site refuses that and says so.
actions = [
{actions}]

[backbones]
# The site accepts the backbones of the package, and those whose weights are in its own caches of torch, timm or
# Hugging Face. It accepts others by the digest of their weights, "sha256:HEX", or with any weights by their spec.
allow = [{allow}]
"""
