import re
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fedhead.errors import UserError
from fedhead.secure import SecureSumError
from fedhead.secure.keys import SiteKeys
from fedhead.secure.roster import Roster, fingerprint, sign, signing_text, verify

MakeRoster = Callable[..., tuple[Roster, dict[str, SiteKeys]]]


def test_roster_survives_its_file(make_roster: MakeRoster, tmp_path: Path) -> None:
    roster, _ = make_roster(3)
    roster.save(tmp_path / "roster.toml")
    again = Roster.read(tmp_path / "roster.toml")
    assert again == roster
    assert again.digest == roster.digest
    again.verify()


def test_digest_depends_on_every_key_and_not_on_order_or_signature(make_roster: MakeRoster) -> None:
    roster, _ = make_roster(3)
    turned = roster.model_copy(update={"sites": dict(reversed(roster.sites.items())), "signature": ""})
    assert turned.digest == roster.digest
    other = SiteKeys.generate().member
    for changed in (
        {"authority": other.signing},
        {"sites": {**roster.sites, "site-000": other}},
        {"sites": {**roster.sites, "site-003": other}},
        {"sites": {"site-001": roster.sites["site-000"], "site-000": roster.sites["site-001"]}},
    ):
        assert roster.model_copy(update=changed).digest != roster.digest


def test_changed_or_unsigned_rosters_do_not_verify(make_roster: MakeRoster) -> None:
    authority = ec.generate_private_key(ec.SECP256R1())
    roster, _ = make_roster(3, authority)
    with pytest.raises(SecureSumError, match="not signed"):
        roster.model_copy(update={"signature": ""}).verify()
    grown = roster.model_copy(update={"sites": {**roster.sites, "invented": SiteKeys.generate().member}})
    for wrong in (grown, roster.model_copy(update={"signature": "bm8="}), roster.model_copy(update={"signature": "?"})):
        with pytest.raises(SecureSumError, match="changed after"):
            wrong.verify()
    grown.signed(authority).verify()
    with pytest.raises(UserError, match="not the key of the roster's authority"):
        grown.signed(ec.generate_private_key(ec.SECP256R1()))


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        (r"authority = .*", ""),
        (r"authority = .*", 'authority = "x"'),
        (r"authority = .*", "authority = 3"),
        (r"\[sites.site-001\]", '[sites."../up"]'),
        (r"sealing = .*", 'sealing = "AAAA"'),
        (r"signing = .*", f'signing = "{"A" * 44}"'),
        (r"\[sites.site-001\]", "[sites.site-000]"),
        (r"^", "extra = 1\n"),
        (r"^", "= 1"),
        (r"^", "x" * 2_000_000),
    ],
)
def test_invalid_files_are_rejected(make_roster: MakeRoster, tmp_path: Path, pattern: str, replacement: str) -> None:
    path = tmp_path / "roster.toml"
    roster, _ = make_roster(2)
    roster.save(path)
    path.write_text(re.sub(pattern, replacement, path.read_text(), count=1))
    with pytest.raises(UserError, match="is no roster"):
        Roster.read(path)
    with pytest.raises(UserError, match="cannot be read"):
        Roster.read(tmp_path / "missing.toml")


def test_sites_with_the_same_key_are_rejected() -> None:
    one, other = SiteKeys.generate().member, SiteKeys.generate().member
    twice = other.model_copy(update={"sealing": one.sealing})
    with pytest.raises(ValueError, match="same key"):
        Roster(authority=SiteKeys.generate().member.signing, sites={"a": one, "b": twice})


def test_fingerprint_is_the_published_encoding() -> None:
    """The example of the proposal: 127.0.0.1 is lusab-babad, 63.84.220.193 is gutih-tugad."""
    digest = bytes([127, 0, 0, 1, 63, 84, 220, 193]).hex() + "0" * 48
    assert fingerprint(digest).startswith("lusab-babad-gutih-tugad-babab-babab-babab-babab")
    assert len(fingerprint(digest)) == 8 * 5 + 7


def test_signatures() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    public = signing_text(key.public_key())
    signature = sign(key, b"text")
    assert verify(public, signature, b"text")
    assert not verify(public, signature, b"other")
    assert not verify(public, signature + bytes(100), b"text")
    assert not verify(public, b"", b"text")
    assert not verify(public, bytes(64), b"text")
    assert not verify(public, b"\xff" * 64, b"text")
