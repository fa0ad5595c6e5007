"""Handlers of the exchanges of a secure sum in which no sums leave a site: open, agree and unmask."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from fedhead.client.site_data import Site
from fedhead.protocol.actions import ACTIONS
from fedhead.protocol.fields import Digest, wrong_fields
from fedhead.protocol.messages import Manifest, MessageError, Payload
from fedhead.secure.replies import SiteNames
from fedhead.secure.session import Context
from fedhead.sums.sums import Arrays

M = TypeVar("M", bound=BaseModel)


class _Open(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    context: Context


class _Agree(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    session: Digest
    survivors: SiteNames


class _Unmask(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    session: Digest
    agreed: SiteNames


def open_session(site: Site, payload: Payload, manifest: Manifest) -> Arrays:
    """Make a site's keys for a session, and seal shares of the secrets behind its masks."""
    context = _read(_Open, payload).context
    if context.run != manifest.run:
        raise MessageError("it opens a secure sum of another run")
    action = ACTIONS.get(context.what)
    if action is None or not action.sums:
        raise MessageError("it opens a secure sum of replies that do not add")
    return site.sessions.open(context, context.purpose)


def agree(site: Site, payload: Payload, manifest: Manifest) -> Arrays:
    """Sign the sites whose masked sums the coordinator has."""
    asked = _read(_Agree, payload)
    return site.sessions.agree(asked.session, asked.survivors)


def unmask(site: Site, payload: Payload, manifest: Manifest) -> Arrays:
    """Return a share of one secret of each site that opened."""
    asked = _read(_Unmask, payload)
    return site.sessions.unmask(asked.session, asked.agreed, payload.arrays)


def _read(kind: type[M], payload: Payload) -> M:
    """Validate the values of a message.

    Raises:
        MessageError: with the names of invalid values.
    """
    values: Mapping[str, Any] = payload.values
    try:
        return kind(**values)
    except (ValidationError, TypeError) as error:
        wrong = wrong_fields(error) if isinstance(error, ValidationError) else "its keys"
        raise MessageError(f"its values are invalid ({wrong})") from None
