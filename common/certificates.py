"""How long certificates are valid, and a warning before they expire."""

from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from fedhead.errors import UserError

WARN_DAYS = 30
"""From how many days before a certificate expires whoever uses it is warned."""


def valid_until(path: Path) -> datetime:
    """Return until when the certificate in a PEM file is valid.

    Raises:
        UserError: if the file cannot be read, or holds no certificate.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError:
        raise UserError(f"{path} holds no certificate in PEM form.") from None


def expiry_warning(path: Path, remedy: str, now: datetime | None = None) -> str:
    """Return a sentence if a certificate has expired or soon will, with what to do about it; else nothing.

    Args:
        path: a PEM file.
        remedy: a sentence.
        now: the time, by default this machine's.
    """
    until = valid_until(path)
    left = until - (now or datetime.now(UTC))
    if left.days >= WARN_DAYS:
        return ""
    day = f"{until:%Y-%m-%d}"
    said = f"expired on {day}" if left.total_seconds() < 0 else f"expires on {day}, in {left.days} days"
    return f"The certificate {path} {said}. {remedy}"
