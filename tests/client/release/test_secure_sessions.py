"""Secure sums of sites that keep their sessions on disk, and a coordinator, in one process; every message is bytes."""

import sqlite3
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from safetensors.numpy import load, save

from fedhead.client.release.secure_sessions import MOST_OPEN, Policy, SecureSessions
from fedhead.errors import FedheadError, UserError
from fedhead.secure import SecureSumError, fixed_point
from fedhead.secure.coordinator import SecureSum
from fedhead.secure.keys import SiteKeys, signed_roster
from fedhead.secure.layout import Layout
from fedhead.secure.masks import public_key
from fedhead.secure.messages import (
    Agreements,
    Opening,
    sealed_to_array,
    shares_from_arrays,
    signature_from_arrays,
)
from fedhead.secure.roster import Roster
from fedhead.secure.session import Context, Purpose
from fedhead.secure.shamir import share
from fedhead.secure.site import SiteState, open_session

Values = Mapping[str, npt.NDArray[Any]]

PURPOSE = Purpose("run", "query.statistics", "train", "0" * 64)


def over_the_wire(arrays: Values) -> dict[str, npt.NDArray[Any]]:
    return load(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))


def values_of(number: int) -> Values:
    random = np.random.default_rng(number)
    return {
        "counts": random.integers(0, 1000, 3),
        "sums": random.normal(size=(3, 5)) * 10.0 ** random.integers(-12, 12, 5),
        "upper": random.normal(size=15),
    }


class Federation:
    """Sites with a roster, and the sums that they take part in."""

    def __init__(self, folder: Path, count: int, policy: Policy | None = None) -> None:
        self.folder = folder
        self.policy = policy
        self.authority = ec.generate_private_key(ec.SECP256R1())
        self.keys = {f"site-{number:03}": SiteKeys.generate() for number in range(count)}
        self.roster = signed_roster(self.authority, {name: own.member for name, own in self.keys.items()})
        self.values = {name: values_of(number) for number, name in enumerate(self.keys)}
        self.layout = Layout.of(next(iter(self.values.values())), 2)

    def site(self, name: str, roster: Roster | None = None) -> SecureSessions:
        """The site as a process that has just started: nothing but its disk tells it of earlier exchanges."""
        path = self.folder / f"{name}.sqlite"
        return SecureSessions(path, name, self.keys[name], roster or self.roster, self.policy)

    def propose(self, purpose: Purpose = PURPOSE, sites: Collection[str] = (), threshold: int | None = None) -> Context:
        return Context.propose(self.roster, sites or list(self.keys), self.layout, purpose, threshold)

    def begin(self, purpose: Purpose = PURPOSE, sites: Collection[str] = ()) -> SecureSum:
        return SecureSum(self.propose(purpose, sites), self.roster)

    def open(self, session: SecureSum, names: Collection[str]) -> None:
        for name in names:
            arrays = over_the_wire(self.site(name).open(session.context, session.context.purpose))
            session.take_opening(name, Opening.from_arrays(arrays, session.context))

    def mask(self, session: SecureSum, name: str) -> npt.NDArray[Any]:
        openings = session.openings()
        sealed = sealed_to_array(session.sealed_for(name))
        arrays = over_the_wire({**openings.to_arrays(), "sealed": sealed})
        context = session.context
        reply = self.site(name).mask(
            context.session, context.purpose, tuple(openings.keys), arrays, lambda: self.values[name]
        )
        return over_the_wire(reply)["masked"]

    def agree(self, session: SecureSum, name: str, survivors: tuple[str, ...] = ()) -> bytes:
        reply = self.site(name).agree(session.context.session, survivors or session.survivors())
        return signature_from_arrays(over_the_wire(reply))

    def unmask(self, session: SecureSum, name: str) -> dict[str, bytes]:
        agreements = session.agreements()
        arrays = over_the_wire(agreements.to_arrays())
        reply = self.site(name).unmask(session.context.session, tuple(agreements.signatures), arrays)
        return shares_from_arrays(tuple(session.openings().keys), over_the_wire(reply))

    def run(self, session: SecureSum, lost: Mapping[str, Collection[str]] | None = None) -> None:
        """Run all exchanges; `lost` has the sites that are lost before each."""
        gone: set[str] = set()
        for exchange in ("open", "mask", "agree", "unmask"):
            gone |= set((lost or {}).get(exchange, ()))
            present = [name for name in session.context.sites if name not in gone]
            if exchange == "open":
                self.open(session, present)
            for name in present:
                if exchange == "mask":
                    session.take_vector(name, self.mask(session, name))
                elif exchange == "agree":
                    session.take_agreement(name, self.agree(session, name))
                elif exchange == "unmask":
                    session.take_shares(name, self.unmask(session, name))

    def plain(self, names: Collection[str], terms: int) -> npt.NDArray[Any]:
        total = np.zeros((2, self.layout.size), np.uint64)
        for name in names:
            fixed_point.add(total, self.layout.pack(self.values[name], terms))
        return total


MakeFederation = Callable[..., Federation]


@pytest.fixture
def federation(tmp_path: Path) -> MakeFederation:
    return lambda count, policy=None: Federation(tmp_path, count, policy)


def test_sum_over_all_sites_is_the_plain_sum(federation: MakeFederation) -> None:
    sites = federation(3)
    session = sites.begin()
    sites.run(session)
    assert (session.unmasked() == sites.plain(sites.keys, 3)).all()
    arrays = session.total()
    assert arrays["counts"].tolist() == sum(own["counts"] for own in sites.values.values()).tolist()
    exact = sum(own["sums"] for own in sites.values.values())
    np.testing.assert_allclose(arrays["sums"], exact, rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize("exchange", ["open", "mask", "agree", "unmask"])
def test_sites_lost_before_one_exchange(federation: MakeFederation, exchange: str) -> None:
    sites = federation(7)
    session = sites.begin()
    lost = ["site-000", "site-004"]
    sites.run(session, {exchange: lost})
    summed = [name for name in sites.keys if name not in lost or exchange in ("agree", "unmask")]
    assert session.survivors() == tuple(summed)
    assert (session.unmasked() == sites.plain(summed, 7)).all()


def test_twenty_sites_lose_some_before_every_exchange(federation: MakeFederation) -> None:
    sites = federation(20)
    session = sites.begin()
    sites.run(
        session, {"open": ["site-001"], "mask": ["site-007", "site-008"], "agree": ["site-019"], "unmask": ["site-002"]}
    )
    summed = [name for name in sites.keys if name not in ("site-001", "site-007", "site-008")]
    assert (session.unmasked() == sites.plain(summed, 20)).all()


@pytest.mark.slow
def test_two_hundred_sites_lose_twenty_before_masking_and_ten_after(federation: MakeFederation) -> None:
    sites = federation(200)
    session = sites.begin()
    names = list(sites.keys)
    assert session.context.threshold == 134
    sites.run(session, {"mask": names[:20], "agree": names[50:60]})
    assert (session.unmasked() == sites.plain(names[20:], 200)).all()


@pytest.mark.parametrize("exchange", ["open", "mask", "agree", "unmask"])
def test_sum_is_given_up_below_threshold(federation: MakeFederation, exchange: str) -> None:
    sites = federation(4)
    session = sites.begin()
    with pytest.raises(Exception, match=r"given up: 2 of 4 sites .* threshold is 3"):
        sites.run(session, {exchange: ["site-000", "site-001"]})
        session.total()


def test_masked_values_do_not_show_the_values(federation: MakeFederation) -> None:
    """Masked vectors of all-zero values are as random as any: half of all bits are set, in every limb."""
    sites = federation(3)
    sites.layout = Layout.of({"x": np.zeros(2000)}, 2)
    sites.values = {name: {"x": np.zeros(2000)} for name in sites.keys}
    session = sites.begin()
    sites.open(session, sites.keys)
    vectors = [sites.mask(session, name) for name in sites.keys]
    for vector in vectors:
        for limb in vector:
            share = np.unpackbits(limb.view(np.uint8)).mean()
            assert abs(share - 0.5) < 0.01


def test_late_vector_stays_masked(federation: MakeFederation) -> None:
    sites = federation(4)
    session = sites.begin()
    sites.open(session, sites.keys)
    late, *others = sites.keys
    vector = sites.mask(session, late)
    for name in others:
        session.take_vector(name, sites.mask(session, name))
    assert session.survivors() == tuple(others)
    with pytest.raises(Exception, match="late"):
        session.take_vector(late, vector)
    for name in others:
        session.take_agreement(name, sites.agree(session, name))
    for name in others:
        session.take_shares(name, sites.unmask(session, name))
    assert (session.unmasked() == sites.plain(others, 4)).all()


def masked_all(sites: Federation, session: SecureSum) -> None:
    sites.open(session, sites.keys)
    for name in sites.keys:
        session.take_vector(name, sites.mask(session, name))


def agreed_all(sites: Federation, session: SecureSum) -> None:
    masked_all(sites, session)
    for name in session.survivors():
        session.take_agreement(name, sites.agree(session, name))


def refused(reason: str) -> Any:
    return pytest.raises(SecureSumError, match=reason)


def changed(context: Context, **fields: Any) -> Context:
    return context.model_copy(update=fields)


class TestOpening:
    """Contexts that a hostile coordinator proposes to one site."""

    def test_invented_sites(self, federation: MakeFederation) -> None:
        sites = federation(3)
        context = sites.propose()
        invented = changed(context, sites=(*context.sites, "site-x", "site-y", "site-z"), threshold=5)
        with refused("roster does not have the site site-x"):
            sites.site("site-000").open(invented, PURPOSE)

    def test_another_roster(self, federation: MakeFederation) -> None:
        sites = federation(3)
        own = {name: SiteKeys.generate().member for name in sites.keys}
        forged = signed_roster(ec.generate_private_key(ec.SECP256R1()), own)
        context = Context.propose(forged, list(own), sites.layout, PURPOSE)
        with refused("another roster than the one pinned"):
            sites.site("site-000").open(context, PURPOSE)
        with refused("another key signed it"):
            sites.site("site-000", forged.model_copy(update={"authority": sites.roster.authority}))

    def test_roster_with_another_key_of_this_site(self, federation: MakeFederation) -> None:
        sites = federation(3)
        sites.keys["site-000"] = SiteKeys.generate()
        with refused("other keys of the site site-000 than it uses"):
            sites.site("site-000").open(sites.propose(), PURPOSE)

    def test_too_few_sites_and_low_thresholds(self, federation: MakeFederation) -> None:
        sites = federation(6, Policy(min_sites=5, max_colluding=2))
        context = sites.propose()
        site = sites.site("site-000")
        for wrong, reason in (
            (changed(context, sites=context.sites[:4], threshold=4), "over 4 sites is refused: 5"),
            (changed(context, sites=context.sites[:1], threshold=1), "over 1 sites is refused: 5"),
            (changed(context, threshold=4), "threshold 4 of 6"),
            (changed(context, threshold=7), "threshold 7 of 6"),
        ):
            with refused(reason):
                site.open(wrong, PURPOSE)
        with refused("does not have the site site-000"):
            site.open(changed(context, sites=context.sites[1:], threshold=4), PURPOSE)
        stricter = SecureSessions(site.path, site.site, site.keys, site.roster, Policy(max_colluding=4))
        with refused("protects against 3 colluding sites; 4 are required"):
            stricter.open(context, PURPOSE)
        site.open(context, PURPOSE)

    def test_another_purpose_than_the_request(self, federation: MakeFederation) -> None:
        sites = federation(3)
        session = sites.begin()
        for field in ("run", "what", "rows", "subject"):
            with refused("something else than the request"):
                sites.site("site-000").open(session.context, replace(PURPOSE, **{field: "1" * 64}))
        sites.open(session, sites.keys)
        openings, sealed = session.openings(), sealed_to_array(session.sealed_for("site-000"))
        with refused("something else than the request"):
            sites.site("site-000").mask(
                session.context.session,
                replace(PURPOSE, subject="1" * 64),
                tuple(openings.keys),
                {**openings.to_arrays(), "sealed": sealed},
                lambda: sites.values["site-000"],
            )

    def test_reused_session(self, federation: MakeFederation) -> None:
        sites = federation(3)
        first = sites.propose()
        site = sites.site("site-000")
        site.open(first, PURPOSE)
        for again in (first, changed(sites.propose(), session=first.session)):
            with refused("id was used before"):
                sites.site("site-000").open(again, PURPOSE)
        # Also after the session was given up for newer ones.
        for _ in range(MOST_OPEN):
            site.open(sites.propose(), PURPOSE)
        with refused("id was used before"):
            site.open(first, PURPOSE)
        with refused("given it up for newer ones"):
            site.agree(first.session, first.sites)


class TestMasking:
    """Openings that a hostile coordinator forwards to one site."""

    def forwarded(self, sites: Federation, session: SecureSum, name: str = "site-000") -> dict[str, npt.NDArray[Any]]:
        arrays = {**session.openings().to_arrays(), "sealed": sealed_to_array(session.sealed_for(name))}
        return {key: array.copy() for key, array in arrays.items()}

    def ask(self, sites: Federation, session: SecureSum, names: tuple[str, ...], arrays: Values) -> None:
        def never() -> Values:
            raise AssertionError("values are computed for a session that must be refused")

        sites.site("site-000").mask(session.context.session, PURPOSE, names, arrays, never)

    def test_replaced_mask_key(self, federation: MakeFederation) -> None:
        """The coordinator puts a mask key of its own in the place of another site's, and of this site's."""
        sites = federation(4)
        session = sites.begin()
        sites.open(session, sites.keys)
        names = tuple(sites.keys)
        own = np.frombuffer(public_key(bytes(range(32))), np.uint8)
        for at in (0, 2):
            for part in range(4):
                arrays = self.forwarded(sites, session)
                arrays["keys"][at, part] = own
                with refused("is not signed by it"):
                    self.ask(sites, session, names, arrays)

    def test_this_site_opened_by_an_earlier_opening(self, federation: MakeFederation) -> None:
        """Its own genuine signature over other keys is of no use: it is about another session."""
        sites = federation(4)
        earlier, session = sites.begin(), sites.begin()
        for one in (earlier, session):
            sites.open(one, sites.keys)
        arrays = self.forwarded(sites, session)
        for key in ("keys", "signatures"):
            arrays[key][0] = earlier.openings().to_arrays()[key][0]
        with refused("site-000 is not signed by it"):
            self.ask(sites, session, tuple(sites.keys), arrays)

    def test_a_member_signs_its_keys_twice(self, federation: MakeFederation) -> None:
        """A colluding site makes two openings of one session; each alone is valid, and this site's must be its own."""
        sites = federation(4)
        context = sites.propose()
        session = SecureSum(context, sites.roster)
        sites.open(session, sites.keys)
        openings = session.openings()
        _, twin = open_session(context, "site-000", sites.keys["site-000"], sites.roster)
        arrays = self.forwarded(sites, session)
        arrays["keys"][0], arrays["signatures"][0] = twin.to_arrays()["keys"], twin.to_arrays()["signature"]
        with refused("do not have the keys of site-000 as it made them"):
            self.ask(sites, session, tuple(openings.keys), arrays)

    def test_same_key_of_two_sites(self, federation: MakeFederation) -> None:
        """A colluding site repeats another one's mask key, so that their masks towards a third are equal."""
        sites = federation(4)
        session = sites.begin()
        sites.open(session, sites.keys)
        keys = session.openings().keys
        for stolen in (
            {"mask": keys["site-001"].mask},
            {"ephemeral": keys["site-001"].mask},
            {"commitment": keys["site-002"].commitment},
        ):
            copied = replace(keys["site-003"], **stolen)
            arrays = self.forwarded(sites, session)
            arrays["keys"][3] = copied.to_array()
            signature = sites.keys["site-003"].sign(copied.text(session.context.digest, "site-003"))
            arrays["signatures"][3] = np.frombuffer(signature, np.uint8)
            with refused("same key"):
                self.ask(sites, session, tuple(sites.keys), arrays)

    def test_too_few_or_other_openings(self, federation: MakeFederation) -> None:
        sites = federation(7)
        session = sites.begin()
        sites.open(session, sites.keys)
        names, arrays = tuple(sites.keys), self.forwarded(sites, session)
        few = {key: array[:4] for key, array in arrays.items()}
        with refused("4 of 7 sites opened, and its threshold is 5"):
            self.ask(sites, session, names[:4], few)
        with refused("do not have the keys of site-000"):
            self.ask(sites, session, names[1:], {key: array[1:] for key, array in arrays.items()})
        for wrong in (names[::-1], (*names[:6], names[0]), (*names[:6], "site-x")):
            with refused("repeated, unsorted or not in its context"):
                self.ask(sites, session, wrong, arrays)
        with refused("lacks the sealed shares"):
            self.ask(sites, session, names, {key: array for key, array in arrays.items() if key != "sealed"})
        for key in arrays:
            with refused("is invalid"):
                self.ask(sites, session, names, {**arrays, key: arrays[key][:6]})
        with refused("knows no such secure sum"):
            sites.site("site-000").agree("f" * 64, names)

    def test_changed_or_swapped_shares(self, federation: MakeFederation) -> None:
        sites = federation(4)
        session = sites.begin()
        sites.open(session, sites.keys)
        names = tuple(sites.keys)
        arrays = self.forwarded(sites, session)
        with refused("shares that site-000 sealed for site-000 were changed"):
            self.ask(sites, session, names, self.forwarded(sites, session, "site-001"))
        arrays["sealed"][2, 5] ^= 1
        site, id_ = sites.site("site-000"), session.context.session
        reply = site.mask(id_, PURPOSE, names, arrays, lambda: sites.values["site-000"])
        session.take_vector("site-000", reply["masked"])
        for name in names[1:]:
            session.take_vector(name, sites.mask(session, name))
        for name in names:
            session.take_agreement(name, sites.agree(session, name))
        for name in names:
            session.take_shares(name, sites.unmask(session, name))
        assert session.faults == [("site-002", "site-000")]
        assert (session.unmasked() == sites.plain(names, 4)).all()

    def test_masking_twice(self, federation: MakeFederation) -> None:
        """Two masked vectors under the same masks would differ by the difference of the values."""
        sites = federation(3)
        session = sites.begin()
        sites.open(session, sites.keys)
        sites.mask(session, "site-000")
        with refused("each exchange once"):
            sites.mask(session, "site-000")

    @pytest.mark.parametrize("value", [2.0**63 / 3, -(2.0**63), np.inf, np.nan])
    def test_value_beyond_its_bound(
        self, federation: MakeFederation, value: float, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The total of all sites is not usable. A refusal would compare this site's value with the bound."""
        sites = federation(3)
        session = sites.begin()
        sites.values["site-000"] = {**values_of(0), "upper": np.full(15, value)}
        sites.run(session)
        with refused("values of a site cannot be summed") as error:
            session.total()
        assert "site-000" not in str(error.value)
        assert "too large" in caplog.text or "not finite" in caplog.text
        # Random elements hide the other values, too.
        assert (session.unmasked() != sites.plain(["site-001", "site-002"], 3)).mean() > 0.99


class TestAgreeing:
    def test_two_sets_of_survivors(self, federation: MakeFederation) -> None:
        """The coordinator tells half of the sites that one has survived, and the others that it has not."""
        sites = federation(7)
        session = sites.begin()
        masked_all(sites, session)
        names = session.survivors()
        others = names[:-1]
        for name in names[:4]:
            session.take_agreement(name, sites.agree(session, name))
        told = {name: sites.agree(session, name, others) for name in names[4:-1]}
        for name, signature in told.items():
            with refused("is not signed by it"):
                session.take_agreement(name, signature)
        # Signatures of both sets together reach the threshold, but no site takes those over the other set for its own.
        mixed = {**session._signatures, **told}
        assert len(mixed) >= session.context.threshold
        arrays = over_the_wire(Agreements({name: mixed[name] for name in sorted(mixed)}).to_arrays())
        for name in (names[0], names[4]):
            with refused("did not agree to the survivors"):
                sites.site(name).unmask(session.context.session, tuple(sorted(mixed)), arrays)

    def test_invalid_survivors(self, federation: MakeFederation) -> None:
        sites = federation(7)
        session = sites.begin()
        sites.open(session, [name for name in sites.keys if name != "site-006"])
        for name in session.openings().keys:
            session.take_vector(name, sites.mask(session, name))
        names = session.survivors()
        for wrong, reason in (
            (names[1:], "sum lacks site-000"),
            (names[:4], "4 of 7 sites survived"),
            ((*names, "site-006"), "site-006 is said to have survived"),
            ((*names, "site-x"), "repeated, unsorted or not in"),
            ((*names[:5], names[4]), "repeated, unsorted or not in"),
        ):
            with refused(reason):
                sites.agree(session, "site-000", wrong)
        sites.agree(session, "site-000")

    def test_agreeing_twice(self, federation: MakeFederation) -> None:
        sites = federation(4)
        session = sites.begin()
        masked_all(sites, session)
        sites.agree(session, "site-000")
        for survivors in (session.survivors(), session.survivors()[:3]):
            with refused("each exchange once"):
                sites.agree(session, "site-000", survivors)

    def test_agreeing_before_masking(self, federation: MakeFederation) -> None:
        sites = federation(3)
        session = sites.begin()
        sites.open(session, sites.keys)
        with refused("has opened; it answers each exchange once, in order"):
            sites.agree(session, "site-000", tuple(sites.keys))


class TestUnmasking:
    def test_unmasking_twice(self, federation: MakeFederation) -> None:
        """Asked again, perhaps with other signatures, a site could give the second share of another site."""
        sites = federation(4)
        session = sites.begin()
        agreed_all(sites, session)
        sites.unmask(session, "site-000")
        with refused("has ended this secure sum"):
            sites.unmask(session, "site-000")

    def test_never_both_shares_of_a_site(self, federation: MakeFederation) -> None:
        sites = federation(4)
        session = sites.begin()
        sites.open(session, sites.keys)
        lost, *others = sites.keys
        for name in others:
            session.take_vector(name, sites.mask(session, name))
        for name in others:
            session.take_agreement(name, sites.agree(session, name))
        secrets = SiteState.model_validate_json(stored(sites.site("site-001"), session.context.session)).shares
        shares = sites.unmask(session, "site-001")
        assert shares == {name: pair[name == lost] for name, pair in secrets.items()}
        assert stored(sites.site("site-001"), session.context.session) == ""

    def test_too_few_or_foreign_signatures(self, federation: MakeFederation) -> None:
        sites = federation(4)
        session = sites.begin()
        agreed_all(sites, session)
        signatures = session.agreements().signatures
        site, id_ = sites.site("site-000"), session.context.session
        with refused("2 of 4 sites agreed, and its threshold is 3"):
            few = {name: signatures[name] for name in list(signatures)[:2]}
            site.unmask(id_, tuple(few), Agreements(few).to_arrays())
        with refused("site-001 did not agree"):
            swapped = {**signatures, "site-001": signatures["site-002"]}
            site.unmask(id_, tuple(swapped), Agreements(swapped).to_arrays())
        with refused("repeated, unsorted"):
            names = ("site-000", "site-000", "site-000")
            site.unmask(id_, names, {"signatures": np.zeros((3, 64), np.uint8)})
        # What was refused has changed nothing.
        assert len(sites.unmask(session, "site-000")) == 4

    def test_unmasking_before_agreeing(self, federation: MakeFederation) -> None:
        sites = federation(3)
        session = sites.begin()
        agreed_all(sites, session)
        other = sites.begin()
        masked_all(sites, other)
        arrays = session.agreements().to_arrays()
        with refused("has masked; it answers each exchange once, in order"):
            sites.site("site-000").unmask(other.context.session, tuple(sites.keys), arrays)


class TestDifferencing:
    """Sums over two sets of survivors, from which the coordinator would subtract one site's values."""

    def sum_over(self, sites: Federation, names: Collection[str], purpose: Purpose = PURPOSE) -> SecureSum:
        session = sites.begin(purpose)
        sites.run(session, {"mask": [name for name in sites.keys if name not in names]})
        return session

    def test_round_done_again_with_other_survivors(self, federation: MakeFederation) -> None:
        sites = federation(4)
        names = list(sites.keys)
        self.sum_over(sites, names)
        again = sites.begin()
        with refused("over other sites before, in the same run"):
            sites.run(again, {"mask": names[:1]})
        with refused("0 of 4 sites agreed"):
            again.agreements()

    def test_round_done_again_with_the_same_survivors(self, federation: MakeFederation) -> None:
        sites = federation(4)
        first, second = (self.sum_over(sites, list(sites.keys)[1:]) for _ in range(2))
        assert (first.unmasked() == second.unmasked()).all()

    def test_both_rounds_agreed_before_either_is_unmasked(self, federation: MakeFederation) -> None:
        sites = federation(4)
        names = list(sites.keys)
        whole, part = sites.begin(), sites.begin()
        for session, present in ((whole, names), (part, names[1:])):
            sites.open(session, names)
            for name in present:
                session.take_vector(name, sites.mask(session, name))
            for name in present:
                session.take_agreement(name, sites.agree(session, name))
        for name in names:
            whole.take_shares(name, sites.unmask(whole, name))
        whole.total()
        for name in names[1:]:
            with refused("in the same run"):
                sites.unmask(part, name)

    def test_another_name_for_the_run(self, federation: MakeFederation) -> None:
        sites = federation(10)
        names = list(sites.keys)
        self.sum_over(sites, names)
        with refused("in the run run over sites that differ by 2; 3 or more must differ"):
            self.sum_over(sites, names[2:], replace(PURPOSE, run="other"))
        self.sum_over(sites, names[3:], replace(PURPOSE, run="third"))

    def test_rows_may_be_summed_again_for_another_subject(self, federation: MakeFederation) -> None:
        sites = federation(4)
        names = list(sites.keys)
        self.sum_over(sites, names)
        self.sum_over(sites, names[1:], replace(PURPOSE, subject="1" * 64))

    def test_a_site_may_consent_to_differences(self, federation: MakeFederation) -> None:
        sites = federation(4, Policy(min_difference=1))
        names = list(sites.keys)
        self.sum_over(sites, names)
        self.sum_over(sites, names[1:], replace(PURPOSE, run="other"))


class TestHostileSites:
    """Sites that lie to the coordinator."""

    def test_openings(self, federation: MakeFederation) -> None:
        sites = federation(4)
        session = sites.begin()
        states = {}
        for name in sites.keys:
            states[name] = open_session(session.context, name, sites.keys[name], sites.roster)[1]
        good, other = states["site-000"], states["site-001"]
        for wrong, reason in (
            (replace(good, signature=other.signature), "is not signed by it"),
            (replace(good, sealed=other.sealed), "another digest"),
            (replace(good, commitments=other.commitments), "another digest"),
            (other, "is not signed by it"),
        ):
            with refused(reason):
                session.take_opening("site-000", wrong)
        session.take_opening("site-000", good)
        with refused("repeated"):
            session.take_opening("site-000", good)
        with refused("unexpected"):
            session.take_opening("site-x", good)
        copied = replace(other.keys, mask=good.keys.mask)
        signature = sites.keys["site-001"].sign(copied.text(session.context.digest, "site-001"))
        with refused("key of another site"):
            session.take_opening("site-001", replace(other, keys=copied, signature=signature))

    @pytest.mark.parametrize("part", ["ephemeral", "mask"])
    def test_keys_of_low_order(self, federation: MakeFederation, part: str) -> None:
        """They would make every other site refuse all openings, and none of them would name the site at fault."""
        sites = federation(4)
        session = sites.begin()
        *others, liar = sites.keys
        sites.open(session, others)
        own = open_session(session.context, liar, sites.keys[liar], sites.roster)[1]
        keys = replace(own.keys, **{part: bytes(32)})
        signature = sites.keys[liar].sign(keys.text(session.context.digest, liar))
        with refused(f"{liar} has a key that is no valid X25519 key"):
            session.take_opening(liar, replace(own, keys=keys, signature=signature))
        for name in others:
            session.take_vector(name, sites.mask(session, name))
        assert session.survivors() == tuple(others)

    def test_vectors(self, federation: MakeFederation) -> None:
        sites = federation(3)
        session = sites.begin()
        masked_all(sites, session)
        size = sites.layout.size
        with refused("repeated"):
            session.take_vector("site-000", np.zeros((2, size), np.uint64))
        other = sites.begin()
        sites.open(other, sites.keys)
        other.openings()
        for wrong in (
            np.zeros((2, size + 1), np.uint64),
            np.zeros((1, size), np.uint64),
            np.zeros((2, size), np.int64),
        ):
            with refused("instead of"):
                other.take_vector("site-000", wrong)

    @pytest.mark.parametrize("kind", ["seed", "mask key"])
    def test_wrong_share_is_left_out(self, federation: MakeFederation, kind: str) -> None:
        """One holder lies about every share; the others suffice, and the report names the holder with each maker."""
        sites = federation(7)
        session = sites.begin()
        lost = ["site-006"] if kind == "mask key" else []
        sites.open(session, sites.keys)
        names = [name for name in sites.keys if name not in lost]
        for name in names:
            session.take_vector(name, sites.mask(session, name))
        for name in names:
            session.take_agreement(name, sites.agree(session, name))
        for name in names:
            shares = sites.unmask(session, name)
            if name == "site-000":
                about = lost or names
                shares |= {other: bytes(33) for other in about}
            session.take_shares(name, shares)
        assert set(session.faults) == {(other, "site-000") for other in (lost or names)}
        assert (session.unmasked() == sites.plain(names, 7)).all()

    def test_too_many_wrong_shares(self, federation: MakeFederation) -> None:
        sites = federation(4)
        session = sites.begin()
        agreed_all(sites, session)
        for name in sites.keys:
            shares = sites.unmask(session, name)
            if name in ("site-000", "site-001"):
                shares["site-003"] = bytes(33)
            session.take_shares(name, shares)
        with refused(
            "only 2 sites have a valid share of a secret of site-003. Faulty is site-003 or site-000, site-003 or"
        ):
            session.total()
        other = sites.begin(replace(PURPOSE, run="other"))
        agreed_all(sites, other)
        with refused("no element of the field"):
            other.take_shares("site-000", {**sites.unmask(other, "site-000"), "site-001": b"\xff" * 33})

    @pytest.mark.parametrize("kind", ["seed", "mask key"])
    def test_a_site_shares_other_secrets_than_it_uses(
        self, federation: MakeFederation, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It commits to the shares of a false secret: they fit its commitments, and not its keys."""
        sites = federation(4)
        session = sites.begin()
        sites.open(session, list(sites.keys)[:3])
        split = iter([SiteKeys.generate().sealing, None] if kind == "seed" else [None, SiteKeys.generate().sealing])

        def false(secret: bytes, threshold: int, count: int) -> list[bytes]:
            return share(next(split) or secret, threshold, count)

        with monkeypatch.context() as patch:
            patch.setattr("fedhead.secure.site.share", false)
            sites.open(session, ["site-003"])
        lost = ["site-003"] if kind == "mask key" else []
        names = [name for name in sites.keys if name not in lost]
        for name in names:
            session.take_vector(name, sites.mask(session, name))
        for name in names:
            session.take_agreement(name, sites.agree(session, name))
        for name in names:
            session.take_shares(name, sites.unmask(session, name))
        with refused("site-003 shared other secrets than it used"):
            session.total()

    def test_poisoned_sum_of_counts(self, federation: MakeFederation) -> None:
        """A site that masks a fraction in place of a count is noticed in the sum, and cannot be named."""
        sites = federation(3)
        session = sites.begin()
        sites.open(session, sites.keys)
        for name in sites.keys:
            vector = sites.mask(session, name)
            if name == "site-001":
                vector[0, 0] += np.uint64(1)
            session.take_vector(name, vector)
        for name in sites.keys:
            session.take_agreement(name, sites.agree(session, name))
        for name in sites.keys:
            session.take_shares(name, sites.unmask(session, name))
        with refused("is no integer"):
            session.total()


class TestMemory:
    """What a site keeps on its disk. Every exchange of these tests is answered by a process that has just started."""

    def test_secrets_are_gone_after_unmasking(self, federation: MakeFederation) -> None:
        sites = federation(3)
        session = sites.begin()
        agreed_all(sites, session)
        site = sites.site("site-000")
        secret = SiteState.model_validate_json(stored(site, session.context.session)).model_dump(mode="json")["seed"]
        assert secret.encode() in site.path.read_bytes()
        for name in sites.keys:
            sites.unmask(session, name)
        assert secret.encode() not in site.path.read_bytes()

    def test_only_the_owner_can_read_it(self, federation: MakeFederation) -> None:
        sites = federation(3)
        site = sites.site("site-000")
        site.open(sites.propose(), PURPOSE)
        assert site.path.stat().st_mode & 0o077 == 0

    def test_damaged_memory_is_never_replaced(self, federation: MakeFederation) -> None:
        sites = federation(3)
        session = sites.begin()
        sites.open(session, sites.keys)
        site = sites.site("site-000")
        whole = site.path.read_bytes()
        site.path.write_bytes(b"something else" * 500)
        with pytest.raises(FedheadError, match="Restore it from a backup"):
            site.open(sites.propose(), PURPOSE)
        site.path.write_bytes(whole)
        with closing(sqlite3.connect(site.path)) as database:
            database.execute("UPDATE sessions SET state = '{}'")
            database.commit()
        with pytest.raises(FedheadError, match="is damaged"):
            site.agree(session.context.session, tuple(sites.keys))
        site.path.unlink()
        site.path.mkdir()
        with pytest.raises(UserError, match=r"cannot be used|may not be written"):
            site.open(sites.propose(), PURPOSE)

    def test_two_processes_of_a_site_answer_once(self, federation: MakeFederation) -> None:
        sites = federation(3)
        session = sites.begin()
        masked_all(sites, session)

        def agree(_: int) -> bool:
            try:
                sites.agree(session, "site-000")
            except SecureSumError:
                return False
            return True

        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(agree, range(8))) == 1


def stored(site: SecureSessions, session: str) -> str:
    with closing(sqlite3.connect(site.path)) as database:
        (state,) = database.execute("SELECT state FROM sessions WHERE id = ?", (session,)).fetchone()
    return state or ""
