import stat
from pathlib import Path

import click
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from typer.testing import CliRunner

from fedhead.certificates import read_sealing_key, site_request
from fedhead.cli import app
from fedhead.client.accepted_roster import accepted, changes, pinned_roster
from fedhead.client.key import make_key
from fedhead.client.settings import Kit
from fedhead.errors import UserError
from fedhead.secure import SecureSumError
from fedhead.secure.keys import SiteKeys
from fedhead.secure.roster import Roster
from fedhead.server.provision import add_sites, provision, revoke
from fedhead.server.rosters import authority_key, requested_members, sign_roster
from fedhead.server.site_requests import sign_requests


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    return result.exit_code, " ".join(click.unstyle(result.output).split())


@pytest.fixture
def requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The requests of three sites that made their own keys."""
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "home"))
    names = ("north", "south", "west")
    for name in names:
        make_key(name, tmp_path / name)
    return [tmp_path / name / "request.pem" for name in names]


def test_sites_sign_their_sealing_keys_and_authority_signs_sites(tmp_path: Path, requests: list[Path]) -> None:
    key = authority_key(tmp_path / "roster.key", make=True)
    assert stat.S_IMODE((tmp_path / "roster.key").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "north" / "sealing.key").stat().st_mode) == 0o600
    roster = sign_roster(tmp_path / "roster.toml", key, requested_members(requests))
    roster.verify()
    assert list(roster.sites) == ["north", "south", "west"]
    fewer = sign_roster(tmp_path / "roster.toml", authority_key(tmp_path / "roster.key"), {}, ["south"])
    assert fewer == Roster.read(tmp_path / "roster.toml")
    assert changes(roster, fewer) == ["it removes south"]
    make_key("south", tmp_path / "again")
    again = sign_roster(tmp_path / "roster.toml", key, requested_members([tmp_path / "again" / "request.pem"]))
    assert changes(fewer, again) == ["it adds south"]
    assert changes(roster, again) == ["it has other keys of south"]


def test_mistakes_of_an_authority_are_refused(tmp_path: Path, requests: list[Path]) -> None:
    path, key = tmp_path / "roster.toml", authority_key(tmp_path / "roster.key", make=True)
    members = requested_members(requests)
    sign_roster(path, key, members)
    before = path.read_bytes()
    old = tmp_path / "old.pem"
    old.write_bytes(site_request("east", ec.generate_private_key(ec.SECP256R1())))
    assert read_sealing_key(old) is None
    short = tmp_path / "short.pem"
    short.write_bytes(site_request("east", ec.generate_private_key(ec.SECP256R1()), b"short"))
    (tmp_path / "p384.key").write_text("none")
    (tmp_path / "p384.key").chmod(0o600)
    for call, reason in (
        (lambda: requested_members([old]), "no key for secure sums"),
        (lambda: requested_members([short]), "is not 32 bytes"),
        (lambda: requested_members([requests[0], requests[0]]), "Two requests are of the site 'north'"),
        (lambda: sign_roster(path, key, {}, ["east"]), "does not have the site 'east'; it has north, south, west"),
        (lambda: sign_roster(path, key, {"east": members["north"]}), "two sites have the same key"),
        (lambda: sign_roster(path, key, {}, list(members)), "make no roster"),
        (lambda: sign_roster(path, ec.generate_private_key(ec.SECP256R1()), members), "another authority"),
        (lambda: authority_key(tmp_path / "missing.key"), "cannot be read"),
        (lambda: authority_key(tmp_path / "p384.key"), "not a private key on the curve P-256"),
    ):
        with pytest.raises(UserError, match=reason):
            call()
    assert path.read_bytes() == before


def test_provisioned_kits_have_one_signed_roster(tmp_path: Path, requests: list[Path]) -> None:
    out = tmp_path / "kit"
    provision(out, "coord.example.org:9092", ["a", "b"])
    first = Roster.read(out / "coordinator" / "roster.toml")
    first.verify()
    for name in ("a", "b"):
        keys = Kit(out / name).secure_keys()
        assert keys is not None
        assert keys.roster == first
        assert first.sites[name] == keys.site.member
    add_sites(out, ["c"])
    sign_requests(out, requests[:1])
    revoke(out, ["b"])
    last = Roster.read(out / "coordinator" / "roster.toml")
    last.verify()
    assert list(last.sites) == ["a", "c", "north"]
    assert {name: Roster.read(out / name / "roster.toml") for name in last.sites} == dict.fromkeys(last.sites, last)


def test_roster_of_another_authority_is_left_alone(tmp_path: Path, requests: list[Path]) -> None:
    out = tmp_path / "kit"
    provision(out, "coord.example.org:9092", ["a"])
    path = out / "coordinator" / "roster.toml"
    path.unlink()
    sign_roster(path, authority_key(tmp_path / "own.key", make=True), requested_members(requests))
    before = path.read_bytes()
    add_sites(out, ["b"])
    assert path.read_bytes() == before


def test_first_roster_of_a_kit_is_accepted_and_a_changed_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "home"))
    out = tmp_path / "kit"
    provision(out, "coord.example.org:9092", ["a", "b", "c"])
    assert pinned_roster(out / "a", "a") == accepted(out / "a", "a")
    add_sites(out, ["d"])
    with pytest.raises(UserError, match=r"is not the accepted one: it adds d\. .*--accept"):
        pinned_roster(out / "a", "a")
    words = Roster.read(out / "a" / "roster.toml").fingerprint
    status, said = run("roster", "verify", str(out / "a"))
    assert (status, words in said, "has not accepted it (it adds d)" in said) == (0, True, True), said
    wrong = "-".join(reversed(words.split("-")))
    status, said = run("roster", "verify", str(out / "a"), "--accept", wrong)
    assert (status, "not the words" in said) == (2, True), said
    assert run("roster", "verify", str(out / "a"), "--accept", words.upper().replace("-", " "))[0] == 0
    roster = pinned_roster(out / "a", "a")
    assert roster is not None
    assert list(roster.sites) == ["a", "b", "c", "d"]
    status, said = run("roster", "verify", str(out / "a"))
    assert (status, "has accepted it" in said) == (0, True), said
    (out / "a" / "roster.toml").unlink()
    assert pinned_roster(out / "a", "a") is None


def test_forged_rosters_are_never_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "home"))
    out = tmp_path / "kit"
    provision(out, "coord.example.org:9092", ["a", "b", "c"])
    path = out / "a" / "roster.toml"
    roster = Roster.read(path)
    forged = roster.model_copy(update={"sites": {**roster.sites, "invented": SiteKeys.generate().member}})
    forged.save(path)
    with pytest.raises(SecureSumError, match="changed after"):
        pinned_roster(out / "a", "a")
    status, said = run("roster", "verify", str(out / "a"), "--accept", forged.fingerprint)
    assert (status, accepted(out / "a", "a")) == (1, None), said
    status, said = run("roster", "show", str(path))
    assert (status, "was changed after its authority signed it" in said, "invented" in said) == (0, True, True), said


def test_a_site_with_its_own_key_accepts_the_first_roster_explicitly(
    tmp_path: Path, requests: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, said = run("roster", "sign", *(str(path.relative_to(tmp_path)) for path in requests))
    roster = Roster.read(tmp_path / "roster.toml")
    assert (status, roster.fingerprint in said) == (0, True), said
    out = tmp_path / "kit"
    provision(out, "coord.example.org:9092", ["a"])
    sign_requests(out, requests)
    with pytest.raises(UserError, match=r"has no key\.pem, because the site made its key itself\. Put the files"):
        Kit(out / "north")
    for name in ("site.toml", "ca.pem"):
        (tmp_path / "north" / name).write_bytes((out / "north" / name).read_bytes())
    roster.save(tmp_path / "north" / "roster.toml")
    with pytest.raises(UserError, match="was not accepted yet"):
        Kit(tmp_path / "north").secure_keys()
    assert run("roster", "verify", "north", "--accept", roster.fingerprint)[0] == 0
    keys = Kit(tmp_path / "north").secure_keys()
    assert keys is not None
    assert roster.sites["north"] == keys.site.member
    roster.save(tmp_path / "north" / "roster.toml")
    without = sign_roster(tmp_path / "roster.toml", authority_key(tmp_path / "roster.key"), {}, ["north"])
    without.save(tmp_path / "north" / "roster.toml")
    status, said = run("roster", "verify", "north")
    assert (status, "does not have the site north with the keys" in said) == (1, True), said


def test_a_roster_too_small_for_a_secure_sum_is_warned_of(
    tmp_path: Path, requests: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for given, warned in ((map(str, requests), len(requests) < 3), (("--remove", "north"), True)):
        status, said = run("roster", "sign", *given)
        assert (status, "a secure sum needs 3" in said) == (0, warned), said


def test_wrong_rosters_name_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "roster.toml"
    path.write_text("[sites]\n")
    with pytest.raises(UserError, match="is no roster: missing or wrong are authority"):
        Roster.read(path)


def test_wrong_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "roster.toml").write_text("x")
    for arguments in (
        ("roster", "sign"),
        ("roster", "sign", "missing.pem"),
        ("roster", "sign", "--remove", "a"),
        ("roster", "show", "roster.toml"),
        ("roster", "verify", "missing.toml"),
        ("roster", "verify", "."),
    ):
        status, said = run(*arguments)
        assert (status, "Traceback" in said) == (2, False), (arguments, said)
    assert not (tmp_path / "roster.key").exists()
