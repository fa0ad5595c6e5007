"""The protection that a site requires, kept beside its ledger for commands on its machine that read no `site.toml`."""

from pathlib import Path

from fedhead.errors import UserError
from fedhead.files import disk_errors, write_atomically

_WORDS = {
    "secure-sum": "secure summation",
    "dp": "differential privacy",
    "both": "secure summation and differential privacy",
}


def keep_required(ledger: Path, require: str) -> None:
    """Keep a site's `[privacy] require`.

    Args:
        ledger: the site's.
        require: as in `site.toml`.
    """
    path = _path(ledger)
    with disk_errors(path):
        if require == "none":
            path.unlink(missing_ok=True)
        else:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(path, require)


def refuse_plain_sums(site: str, ledger: Path) -> None:
    """Check that a site lets sums leave without protection.

    Args:
        site: its name.
        ledger: its.

    Raises:
        UserError: if its client required one when it last started.
    """
    path = _path(ledger)
    try:
        require = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    raise UserError(
        f"The site.toml of {site} requires {_WORDS.get(require, 'protection')} ([privacy] require), and this command "
        'would send its sums without. Have the site take part in a new run, or set require = "none" and start fedhead '
        "client once."
    )


def _path(ledger: Path) -> Path:
    return ledger.with_suffix(".required")
