"""A run with one real site in one process: the site's replies become files, and nothing leaves the machine."""

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from fedhead.backbones.catalogue import entry_of
from fedhead.backbones.weights import PACKAGED
from fedhead.client.app import discreet, make_app
from fedhead.client.release.ledger import Ledger, ledger_path
from fedhead.client.release.payloads import Payloads
from fedhead.client.settings import SiteSettings
from fedhead.client.site_opening import site_of
from fedhead.config import RunConfig
from fedhead.errors import UserError
from fedhead.files import require_new_folder
from fedhead.flower import in_process_identity
from fedhead.server.app import coordinate
from fedhead.simulations.grid import InProcessGrid


def dry_run(settings: SiteSettings, config: RunConfig, folder: Path) -> list[Path]:
    """Run `config` with this site alone, under its own settings; write each of its replies to `folder`.

    Nothing enters the site's ledger, since nothing leaves. The site's rows are those that a run would use.

    Args:
        settings: the site's own.
        config: the coordinator's run.
        folder: new or empty.

    Returns:
        The summaries, in the order of the replies.

    Raises:
        UserError: if the folder holds something, or the run's weights are not on this machine.
        FedheadError: if the site refuses the run, or the run fails.
    """
    require_new_folder(folder, "name another one with --payloads.")
    _require_weights(config)
    payloads = Payloads(folder)
    with tempfile.TemporaryDirectory(prefix="fedhead-dry-run-") as temporary, in_process_identity(run_id=1):
        unmasked = settings.model_copy(update={"privacy": settings.privacy.model_copy(update={"require": "none"})})
        site = site_of(unmasked, Path(temporary) / "ledger.jsonl", (payloads,))
        site.keeps_heads = False
        with suppress(FileNotFoundError):
            # The rows that a run would use depend on those that were released before.
            shutil.copyfile(Ledger(ledger_path(settings.name)).atoms, site.atoms.path)
        grid = InProcessGrid([site], {site.name: make_app(lambda context: site, [discreet])})
        # The files show each reply before it is masked, so no masks are needed.
        alone = {"min_sites": 1, "privacy": {"secure_sum": False}}
        coordinate(config.changed(alone), grid, Path(temporary) / "run")
    return payloads.written


def _require_weights(config: RunConfig) -> None:
    """Check that loading the backbone takes no download: a dry run connects to nothing.

    Raises:
        UserError: if it does.
    """
    if config.weights != "default" or config.backbone.startswith((*PACKAGED, "identity", "features")):
        return
    entry = entry_of(config.backbone)
    if entry is not None and entry.weights is None:
        raise UserError(
            f"The weights of {config.backbone} are not on this machine, and a dry run downloads nothing. Bring them "
            "with fedhead backbones fetch, or name a file as weights in the run."
        )
