"""The handlers of all actions, for any number of sites at a time.

A real site is a list of one. Simulated sites share one `LabelledFeatures` and are answered together: by one reply that
is their sum where the coordinator wants no more, else by a reply each.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

from flwr.app import Context
from pydantic import ValidationError

from fedhead.client.adaptation import adapt
from fedhead.client.agreement import agreement, map_form
from fedhead.client.answers import Answer, Handler
from fedhead.client.clusters import clusters
from fedhead.client.description_handlers import describe, install
from fedhead.client.head_handlers import calibrate, compare, gradient, report, subgroups
from fedhead.client.map_handlers import map_features, standardise
from fedhead.client.personal import personalise
from fedhead.client.personal_tails import evaluate, train
from fedhead.client.private_sums import private
from fedhead.client.refusals import sayable
from fedhead.client.release.masking import Asked, masking_of
from fedhead.client.release.step import release
from fedhead.client.rivals import rivals
from fedhead.client.secure_handlers import agree, open_session, unmask
from fedhead.client.site_data import Site
from fedhead.client.sum_handlers import distances, statistics
from fedhead.config import GENERATION
from fedhead.errors import FedheadError, UserError
from fedhead.protocol.actions import (
    ACTIONS,
    ADAPT,
    AGREE,
    CALIBRATE,
    CLUSTER,
    COMPARE,
    DESCRIBE,
    DISTANCES,
    EVALUATE,
    GRADIENT,
    INSTALL,
    MAP,
    OPEN,
    PERSONALISE,
    PRIVATE,
    REPORT,
    RIVALS,
    STANDARDISE,
    STATISTICS,
    SUBGROUPS,
    TRAIN,
    UNMASK,
)
from fedhead.protocol.messages import Manifest, MessageError, Payload
from fedhead.protocol.steps import Masking, Part
from fedhead.secure.replies import SECURE, without_session
from fedhead.sums.sums import Arrays
from fedhead.tuning import NEXT_TOKEN

logger = logging.getLogger(__name__)


def answer(
    action: str, sites: Sequence[Site], payload: Payload, context: Context, *, merged: bool = False
) -> Iterator[tuple[Sequence[int], Payload]]:
    """Answer one message to `sites`, and pass every reply through their release steps.

    Args:
        action: the requested action.
        sites: they share their steps, their limits and one `LabelledFeatures`; or one site.
        payload: the message.
        context: the run's state at these sites.
        merged: whether one reply is to speak for all of them.

    Yields:
        The positions in `sites` that a reply speaks for, and the reply.

    Raises:
        FedheadError: if the message cannot be answered; a sentence that may leave the site.
        UserError: if the site's own data or settings forbid it; not for others' eyes.
    """
    manifest = _admitted(action, sites, payload, context) if action in ABOUT_ROWS else None
    about = manifest if len(sites) == 1 else None
    payload, maskings = _maskings(action, sites, payload, context)
    made = HANDLERS[action](sites, payload, context, merged)
    if maskings and (unfit := agreement(context).unfit):
        made = _refusing(unfit)
    while True:
        try:
            one = next(made, None)
        # These are about the request's form, whatever the rows.
        except (MessageError, ValidationError):
            raise
        except Exception as error:
            if about is None:
                raise
            left = _release_failure(error, sites[0], action, about, maskings[0] if maskings else None)
            if left is None:
                raise
            yield [0], left
            return
        if one is None:
            return
        speaker, count = sites[one.positions[0]], len(one.positions)
        left = release(
            one.payload,
            speaker,
            action,
            manifest=one.manifest,
            parts=one.parts,
            sites=count,
            masking=maskings[one.positions[0]] if maskings else None,
            features=map_form(context) if one.parts else "",
            private=one.private,
        )
        yield one.positions, left


def _admitted(action: str, sites: Sequence[Site], payload: Payload, context: Context) -> Manifest:
    """Return the run's manifest, if its task and all sites answer an action about rows.

    Raises:
        MessageError: if the task does not.
        FedheadError: if a site does not.
    """
    agreed = agreement(context)
    manifest = agreed.manifest
    answered = ABOUT_PLACES if agreed.task.dense else ABOUT_ROWS
    if manifest.layer == NEXT_TOKEN or manifest.task == GENERATION:
        answered = ABOUT_CONVERSATIONS
    if action not in answered:
        raise MessageError(f"it asks for {action}, which the task {manifest.task!r} does not answer")
    _admit(action, sites, manifest, masked=SECURE in payload.values)
    return manifest


def _refusing(reason: str) -> Iterator[Answer]:
    raise FedheadError(reason)
    yield


def _admit(action: str, sites: Sequence[Site], manifest: Manifest, *, masked: bool) -> None:
    """Check with the release steps of all sites that they answer a request about rows.

    The manifest may have been accepted under other settings of the site, before it was restarted.

    Raises:
        FedheadError: if a site does not answer it.
    """
    for steps in {id(steps): steps for steps in (site.steps for site in sites)}.values():
        for step in steps:
            step.admit(action, manifest, masked=masked)


def _maskings(
    action: str, sites: Sequence[Site], payload: Payload, context: Context
) -> tuple[Payload, Sequence[Masking]]:
    """Return a request without its session, and how each site masks its reply; nothing if there is no session.

    Raises:
        FedheadError: if a site does not take part in the session.
    """
    if SECURE not in payload.values:
        return payload, ()
    if not ACTIONS[action].sums:
        raise MessageError(f"it asks for a secure sum of {action}, whose replies do not add")
    request, session = without_session(payload)
    asked = Asked(action, request, session, agreement(context).manifest)
    return request, [masking_of(site, asked) for site in sites]


def _release_failure(
    error: Exception, site: Site, action: str, manifest: Manifest, masking: Masking | None
) -> Payload | None:
    """Pass a failure through the release steps, as a reply is: whether a request fails can depend on a single row.

    Returns:
        The reply in place of masked sums, which nobody can tell from others; None if the failure itself is the reply.

    Raises:
        FedheadError: if nothing may leave, not even that the request failed.
    """
    parts: tuple[Part, ...] = ("train", "held_out")
    try:
        site.open(manifest)
    except Exception:
        if masking is None:
            logger.debug("It failed before a row was used.", exc_info=True)
            return None
        parts = ()
    reason = type(error).__name__
    if isinstance(error, FedheadError) and not isinstance(error, UserError):
        reason = sayable(error)
    payload = Payload({"failure": reason})
    if masking is None:
        release(payload, site, action, manifest=manifest, parts=parts)
        return None
    left = release(payload, site, action, manifest=manifest, parts=parts, masking=masking, failed=True)
    if not left.arrays:
        return None
    logger.error("%s cannot be answered, so the secure sum of all sites will not be usable.", action, exc_info=error)
    return left


def _exchange(reply: Callable[[Site, Payload, Manifest], Arrays]) -> Handler:
    """Return the handler of an exchange of a secure sum in which no sums leave."""

    def handle(sites: Sequence[Site], payload: Payload, context: Context, merged: bool) -> Iterator[Answer]:
        manifest = agreement(context).manifest
        for position, site in enumerate(sites):
            yield Answer([position], Payload({}, reply(site, payload, manifest)), manifest)

    return handle


HANDLERS: Mapping[str, Handler] = {
    DESCRIBE: describe,
    INSTALL: install,
    MAP: map_features,
    STATISTICS: statistics,
    STANDARDISE: standardise,
    PRIVATE: private,
    TRAIN: train,
    GRADIENT: gradient,
    EVALUATE: evaluate,
    REPORT: report,
    CALIBRATE: calibrate,
    SUBGROUPS: subgroups,
    COMPARE: compare,
    RIVALS: rivals,
    PERSONALISE: personalise,
    ADAPT: adapt,
    DISTANCES: distances,
    CLUSTER: clusters,
    OPEN: _exchange(open_session),
    AGREE: _exchange(agree),
    UNMASK: _exchange(unmask),
}
"""The handler of each action of `fedhead.protocol.actions`."""

ABOUT_ROWS = frozenset(HANDLERS) - {DESCRIBE, INSTALL, OPEN, AGREE, UNMASK}
"""The actions whose handlers compute on rows."""

ABOUT_PLACES = frozenset({STANDARDISE, STATISTICS, TRAIN, EVALUATE, REPORT})
"""Those that are defined if rows are places of items."""

ABOUT_CONVERSATIONS = frozenset({TRAIN, EVALUATE, REPORT, RIVALS})
"""Those that are defined of language models."""
