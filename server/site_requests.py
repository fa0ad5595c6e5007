"""Kits without a private key, in answer to the requests of sites that made their own."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from fedhead.certificates import read_request, read_sealing_key
from fedhead.errors import UserError
from fedhead.server.kit import COORDINATOR, CoordinatorKit
from fedhead.server.provision import check_new_names, register, update_rosters
from fedhead.server.rosters import member_of


def sign_requests(out: Path, requests: Sequence[Path], backbones: Mapping[str, str] | None = None) -> dict[str, bytes]:
    """Register the keys of sites' requests, make each site a kit without its key, and return the keys by name.

    Args:
        out: the folder of kits.
        requests: files by `fedhead site init`.
        backbones: that the kits allow, each with its comment; see `backbones_of`.

    Raises:
        UserError: if a request is malformed, or its name or key is registered or revoked. Nothing is changed then.
    """
    kit = CoordinatorKit.read(out / COORDINATOR)
    read = [(path, *read_request(path)) for path in requests]
    check_new_names([name for _, name, _ in read], kit.sites)
    known = {key: name for name, key in kit.sites.items()}
    for path, name, key in read:
        if key in kit.revoked:
            raise UserError(f"The key in {path} was revoked from {kit.revoked[key]!r}; the site has to make a new one.")
        if key in known:
            raise UserError(f"The key in {path} is that of {known[key]!r}; each site needs its own.")
        known[key] = name
    keys = {name: key for _, name, key in read}
    register(out, kit, keys, backbones)
    sealing = {name: read_sealing_key(path) for path, name, _ in read}
    update_rosters(out, {name: member_of(keys[name], own) for name, own in sealing.items() if own is not None})
    return keys
