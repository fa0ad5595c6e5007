"""One door for everything that leaves a site: `release` passes a reply through the site's steps."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedhead.protocol.messages import Manifest, Payload
from fedhead.protocol.private import PrivateRequest
from fedhead.protocol.steps import Basis, Masking, Part, Release, leave

if TYPE_CHECKING:
    from fedhead.client.site_data import OpenSite


def release(
    payload: Payload,
    site: "OpenSite",
    action: str,
    *,
    manifest: Manifest | None = None,
    parts: Sequence[Part] = (),
    sites: int = 1,
    masking: Masking | None = None,
    features: str = "",
    private: PrivateRequest | None = None,
    failed: bool = False,
) -> Payload:
    """Pass a reply through all steps of the site; the result must be sent unchanged.

    Args:
        payload: the reply.
        site: the answering site; of several simulated sites, which share their steps, any one.
        action: the message that it answers.
        manifest: of the run; None before the site has accepted one.
        parts: the rows that the reply rests on; empty for none.
        sites: the number of sites that the reply speaks for.
        masking: encodes and masks sums, if the request asks for it.
        features: the form of the map of features; empty for plain ones.
        private: the request that it answers, if it is one for noisy sums.
        failed: whether the sums could not be computed.

    Raises:
        FedheadError: if nothing may leave.
    """
    if not site.steps:
        return payload

    def basis() -> Basis:
        assert manifest is not None
        holding = site.open(manifest)
        guarded, share = holding.guarded, holding.share
        # Noise hides rows, so that no two releases are compared: whether they differ by few would tell of rows.
        keys = None if manifest.privacy else lambda: holding.keys_by_group
        return Basis(guarded.num_rows, guarded.counts, share, keys)

    of_rows = sites == 1 and bool(parts)
    about = Release(
        action, site.name, sites, manifest, parts, basis if of_rows else None, masking, features, private, failed
    )
    return leave(payload, about, site.steps)
