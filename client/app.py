"""The Flower `ClientApp` of a site. Light to import; torch comes with the first message."""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from pydantic import ValidationError

from fedhead.client.refusals import SAID_IN_LOG, sayable
from fedhead.errors import FedheadError, UserError
from fedhead.protocol.actions import ACTIONS
from fedhead.protocol.fields import wrong_fields
from fedhead.protocol.messages import Payload

if TYPE_CHECKING:
    from fedhead.client.site_data import Site

logger = logging.getLogger(__name__)

SiteOf = Callable[[Context], "Site"]
Handler = Callable[[Message, Context], Message]
Mod = Callable[[Message, Context, Handler], Message]


def discreet(message: Message, context: Context, call_next: Handler) -> Message:
    """Replace unexpected errors with safe messages; a Flower mod.

    Other messages may name a file of the site's, whose name may be a person's; only its own log has them.

    Raises:
        FedheadError: with a message that may leave.
    """
    try:
        return call_next(message, context)
    except UserError as error:
        logger.error("%s", error)
        raise FedheadError(SAID_IN_LOG) from None
    except FedheadError as error:
        raise FedheadError(sayable(error)) from None
    except ValidationError as error:
        raise FedheadError(f"The site does not know, or decides by itself: {wrong_fields(error)}.") from None
    except Exception as error:
        logger.exception("An unexpected failure.")
        raise FedheadError(f"The site failed ({type(error).__name__}); its own log says why.") from None


def make_app(site_of: SiteOf, mods: Sequence[Mod] = ()) -> ClientApp:
    """Build the app of the site that a context belongs to, with Flower mods around its handlers."""
    app = ClientApp(mods=list(mods))

    def answer_one(message: Message, context: Context) -> Message:
        from fedhead.client.handlers import answer

        action, payload = message.metadata.message_type, Payload.from_content(message.content)
        ((_, reply),) = answer(action, [site_of(context)], payload, context)
        return Message(reply.to_content(), reply_to=message)

    for action in ACTIONS:
        category, _, name = action.partition(".")
        register = getattr(app, category)
        (register(name) if name else register())(answer_one)
    return app


@cache
def _local_site(
    name: str,
    data: str,
    device: str,
    strict_data: bool,
    min_class_count: int,
    min_rows: int,
    backbones: str,
    holdout: float,
) -> "Site":
    from fedhead.client.backbones import AcceptedBackbones
    from fedhead.client.local_site import LocalSite
    from fedhead.client.release.guard import Guard

    guard = Guard(min_class_count, min_rows, plain_clusters=False)
    accepted = AcceptedBackbones(frozenset(backbones.split()))
    return LocalSite(name, data, device, strict_data, guard, backbones=accepted, holdout=holdout)


def local_site(context: Context) -> "Site":
    """Return the site that a SuperNode's `--node-config` names.

    It has `site` and `data`, and perhaps `device`, `strict-data`, `min-class-count`, `min-rows`, `holdout`, and
    `backbones`: the entries of `[backbones] allow` in a `site.toml`, separated by spaces.

    Raises:
        FedheadError: if `site` or `data` is missing.
    """
    config = context.node_config
    for key in ("site", "data"):
        if key not in config:
            raise FedheadError(f'The node config lacks {key!r}; expected --node-config \'site="NAME" data="SPEC"\'.')
    return _local_site(
        str(config["site"]),
        str(config["data"]),
        str(config.get("device", "auto")),
        bool(config.get("strict-data", False)),
        int(config.get("min-class-count", 5)),
        int(config.get("min-rows", 20)),
        str(config.get("backbones", "")),
        float(config.get("holdout", 0.2)),
    )


app = make_app(local_site, [discreet])
