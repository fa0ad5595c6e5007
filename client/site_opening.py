"""A local site, opened under the settings of its `site.toml`."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedhead.client.backbones import AcceptedBackbones, Agree, nobody_agrees
from fedhead.client.local_site import LocalSite
from fedhead.client.release.accounts import Accounts, accounts_path
from fedhead.client.release.ledger import Ledger, Note
from fedhead.client.release.masking import SecureSum
from fedhead.client.release.noise import Noise
from fedhead.client.release.required import keep_required
from fedhead.client.release.secure_sessions import Policy, SecureSessions, secure_sessions_path
from fedhead.client.settings import Kit, SecureKeys, SiteSettings
from fedhead.errors import FedheadError, UserError
from fedhead.protocol.actions import TRAIN
from fedhead.protocol.steps import Step

logger = logging.getLogger(__name__)


def site_of(
    settings: SiteSettings,
    ledger: Path,
    before: Sequence[Step] = (),
    agree: Agree = nobody_agrees,
    note: Note = lambda entry: None,
    receiver: str = "",
    keys: SecureKeys | None = None,
) -> LocalSite:
    """Open a site's data under its own settings.

    Args:
        settings: the site's own.
        ledger: the file that its releases are entered in.
        before: the steps between the guard and the ledger.
        agree: asks a person about unknown weights.
        note: is called with each entry of the ledger.
        keys: of the site for secure summation, with the roster; None if it takes no part in any.
        receiver: of weights; processes of a site with different ones do not write to one file. By default its name.

    Raises:
        UserError: if data or device are not available.
    """
    keep_required(ledger, settings.privacy.require)
    limits = settings.limits
    guard, training = limits.guard, limits.training
    if TRAIN not in settings.permit.actions:
        # Sums of a chosen tail's features show as much of rows as a trained one.
        training = replace(training, max_trainable=0)
    return LocalSite(
        settings.name,
        settings.data,
        settings.device,
        settings.strict_data,
        guard,
        Ledger(ledger, guard.min_class_count, note, settings.budget.releases_per_day),
        before,
        backbones=AcceptedBackbones(
            frozenset(settings.backbones.allow),
            limits.max_backbone_bytes,
            agree,
            settings.backbones.check_features,
        ),
        precision=settings.precision,
        activations=settings.activations,
        holdout=settings.holdout,
        training=training,
        summation=_summation(settings, keys),
        receiver=receiver,
        noise=Noise(
            Accounts(accounts_path(ledger), settings.privacy.epsilon, settings.privacy.delta, settings.holdout),
            own=settings.privacy.noise == "own",
            max_colluding=settings.privacy.max_colluding,
            unit=settings.privacy.unit,
            required=settings.privacy.require in ("dp", "both"),
        ),
    )


def _summation(settings: SiteSettings, keys: SecureKeys | None) -> SecureSum:
    """Return the step that masks sums.

    Raises:
        UserError: if the site requires masks, and has no keys for them.
        SecureSumError: if the roster is not signed by its authority.
    """
    required, sessions = settings.privacy.require in ("secure-sum", "both"), None
    if keys is not None:
        privacy = settings.privacy
        policy = Policy(privacy.min_sites, privacy.max_colluding, privacy.min_difference)
        path = secure_sessions_path(settings.name)
        sessions = SecureSessions(path, settings.name, keys.site, keys.roster, policy)
    elif required:
        raise UserError(
            "site.toml requires secure summation ([privacy] require), and the kit has no roster.toml "
            "beside it. Ask the consortium's authority for the signed roster."
        )
    return SecureSum(required=required, sessions=sessions)


def secure_keys_of(kit: Kit, settings: SiteSettings) -> SecureKeys | None:
    """Return the keys for secure summation; None if the site takes no part in it.

    Raises:
        FedheadError: if the site requires masks, and its roster is not the accepted one or a key cannot be read.
    """
    try:
        return kit.secure_keys()
    except FedheadError as error:
        if settings.privacy.require in ("secure-sum", "both"):
            raise
        logger.warning("This site takes no part in secure summation. %s", error)
        return None


def require_data(settings: SiteSettings) -> None:
    """Check that a site has data.

    Raises:
        UserError: if not.
    """
    if not settings.data:
        raise UserError('Name the data of this site: --data folder:PATH, or data = "folder:PATH" in site.toml.')
