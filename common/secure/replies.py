"""Replies as secure sums: the layout of each, the subject of a request, and the way back to the arrays of `Sums`."""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from fedhead.protocol.actions import CLUSTER, DISTANCES, GRADIENT, STATISTICS, TRAIN
from fedhead.protocol.messages import Manifest, MessageError, Payload
from fedhead.secure.layout import Layout
from fedhead.secure.roster import MOST_SITES, SiteName
from fedhead.secure.session import Purpose
from fedhead.sums.sums import Arrays

SECURE = "secure"
"""Key of the values of a request that asks for a masked reply."""

SiteNames = Annotated[tuple[SiteName, ...], Field(min_length=1, max_length=MOST_SITES)]
"""Names of sites in a message."""

SUM = "sum"
"""Name of the array with a masked vector."""

_CONSTANT = frozenset({"origin", "multi_label"})
"""Arrays of sums that are equal at all sites; they are not summed."""

_NOT_OF_THE_SUBJECT = frozenset({"server_round", "everyone", "proximal_mu", SECURE})
"""Values of a request that can vary while the same rows and head decide the reply."""


def with_session(payload: Payload, values: Mapping[str, Any], arrays: Arrays | None = None) -> Payload:
    """Return a request for a masked reply.

    Args:
        payload: the plain request.
        values: the session, as the sites of the Grid understand it.
        arrays: of the session.
    """
    beside = {f"{SECURE}.{name}": array for name, array in (arrays or {}).items()}
    return Payload({**payload.values, SECURE: dict(values)}, {**payload.arrays, **beside})


def without_session(payload: Payload) -> tuple[Payload, Payload]:
    """Undo `with_session`; return the plain request, and the session's values and arrays.

    Raises:
        MessageError: if the session has no values by name.
    """
    values = dict(payload.values)
    session = values.pop(SECURE)
    if not isinstance(session, dict):
        raise MessageError("its session of secure summation has another form")
    prefix = f"{SECURE}."
    own = {name.removeprefix(prefix): array for name, array in payload.arrays.items() if name.startswith(prefix)}
    rest = {name: array for name, array in payload.arrays.items() if not name.startswith(prefix)}
    return Payload(values, rest), Payload(session, own)


def additive(arrays: Arrays) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of `Sums` that add across sites."""
    return {name: array for name, array in arrays.items() if name not in _CONSTANT}


def layout_of(arrays: Arrays) -> Layout:
    """Return the layout in which arrays are summed: 128 bits each, or 64 if most are counts.

    Statistics and heads need the 64 fraction bits, and are most of the traffic of a run; detailed counts are longer
    than the few real numbers beside them, for which 32 fraction bits are enough.
    """
    summed = additive(arrays)
    counts = sum(array.size for array in summed.values() if array.dtype.kind != "f")
    reals = sum(array.size for array in summed.values() if array.dtype.kind == "f")
    limbs: Literal[1, 2] = 1 if counts > reals else 2
    return Layout.of(summed, limbs)


def restored(total: Mapping[str, npt.NDArray[Any]], like: Arrays) -> dict[str, npt.NDArray[Any]]:
    """Return summed arrays in the form in which `Sums` read them.

    Args:
        total: the sums, int64 or float64 arrays by name.
        like: the arrays of the expected `Sums` over no rows.

    Raises:
        ValueError: if a count is negative.
    """
    found: dict[str, npt.NDArray[Any]] = {}
    for name, array in like.items():
        if name in _CONSTANT:
            found[name] = array
        elif array.dtype.kind == "u":
            if (total[name] < 0).any():
                raise ValueError(f"{name!r} contains a negative count")
            widest = np.min_scalar_type(int(total[name].max(initial=0)))
            found[name] = total[name].astype(np.promote_types(array.dtype, widest))
        else:
            found[name] = total[name].astype(array.dtype)
    return found


def purpose_of(manifest: Manifest, action: str, request: Payload) -> Purpose:
    """Return the values that the reply to a request is about."""
    return Purpose(manifest.run, action, _rows_of(action, request), _subject_of(manifest, action, request))


def _rows_of(action: str, payload: Payload) -> str:
    """Return the rows that the reply to a request rests on, as contexts name them."""
    if action in (STATISTICS, CLUSTER):
        return str(payload.values.get("rows", "train"))
    return "train" if action in (TRAIN, GRADIENT) or _is_of_features(action, payload) else "held_out"


def _is_of_features(action: str, payload: Payload) -> bool:
    """Return whether a request is for sums of features, rather than about a head or about distances."""
    if action == CLUSTER:
        # The total over all clusters is that of the plain statistics, whatever the centres are.
        return payload.values.get("stage") in ("sums", "statistics")
    return action == STATISTICS or (action == DISTANCES and not payload.arrays)


def _subject_of(manifest: Manifest, action: str, payload: Payload) -> str:
    """Return the digest of everything that decides the values of a reply, apart from the rows.

    The number of a round is no part of it, because it only seeds the minibatches; nor are settings of the run that a
    coordinator could change a little, such as the learning rate or the proximal term, to be answered again. Sums of
    features are about the backbone alone: moments are part of the Gram matrix, classes in another order give the same
    sums in another order, and sums of mapped features have the same counts.
    """
    if _is_of_features(action, payload):
        return hashlib.sha256(manifest.backbone_digest.encode()).hexdigest()
    about = [manifest.backbone_digest, list(manifest.classes), manifest.task]
    values = {name: value for name, value in payload.values.items() if name not in _NOT_OF_THE_SUBJECT}
    digest = hashlib.sha256(json.dumps([action, about, values], sort_keys=True).encode())
    for name, array in sorted(payload.arrays.items()):
        digest.update(f"\0{name}\0{array.dtype.str}\0{list(array.shape)}\0".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
