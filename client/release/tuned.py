"""Trained layers of a backbone in a reply."""

from fedhead.protocol.messages import Manifest, Payload


def tunes(manifest: Manifest) -> str:
    """Return the layers that a run tunes, with their objective if it is not the task's."""
    return manifest.tune if manifest.objective == "task" else f"{manifest.tune} by {manifest.objective}"


def tuned_parameters(payload: Payload) -> int:
    """Return the number of parameters of a tail and of its objective in a reply, or of changes to them."""
    from fedhead.heads.tail import OBJECTIVE, TAIL

    return sum(
        array.size
        for name, array in payload.arrays.items()
        if any(f".{part}" in f".{name}" for part in (TAIL, OBJECTIVE))
    )
