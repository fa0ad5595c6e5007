"""A coordinator of secure sums that picks requests by whether a site can answer them: it learns of the total alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec

from fedhead.client.settings import SecureKeys
from fedhead.flower import in_process_identity
from fedhead.protocol.actions import AGREE, EVALUATE, MAP, OPEN, STANDARDISE, STATISTICS, TRAIN, UNMASK
from fedhead.protocol.mapping import MapRequest
from fedhead.protocol.messages import Payload
from fedhead.secure import SecureSumError
from fedhead.secure.coordinator import SecureSum
from fedhead.secure.keys import SiteKeys, signed_roster
from fedhead.secure.messages import Opening, sealed_to_array, shares_from_arrays, signature_from_arrays
from fedhead.secure.replies import SUM, layout_of, purpose_of, with_session
from fedhead.secure.session import Context
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.heads import HeadSums
from fedhead.sums.sums import Arrays

from .test_rows import ABOUT_A_HEAD, FEATURES, ROWS, SCALE, Attack

NAMES = ("clinic", "unit", "ward")


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "home"))
    with in_process_identity(run_id=1):
        yield


class Consortium:
    """Three sites' real processes in a run under secure summation; `ward` has one row unlike all others."""

    def __init__(self, folder: Path) -> None:
        own = {name: SiteKeys.generate() for name in NAMES}
        members = {name: keys.member for name, keys in own.items()}
        self.roster = signed_roster(ec.generate_private_key(ec.SECP256R1()), members)
        self.sites = {}
        for name in NAMES:
            (folder / name).mkdir()
            attack = Attack(folder / name, SecureKeys(own[name], self.roster), name=name)
            if name == "ward":
                attack.rows = [([1e4, *values[1:]], label) for values, label in attack.rows]
                attack.write()
                attack.restart()
            attack.describe(secure_sum=True)
            self.sites[name] = attack
        self.manifest = next(iter(self.sites.values())).manifest

    def tell(self, action: str, payload: Payload) -> None:
        """Tell every site something that it must accept."""
        for site in self.sites.values():
            site.ask(action, payload)

    def total(self, action: str, payload: Payload, nothing: Arrays) -> Arrays:
        """Return a secure sum; every site answers every exchange, whatever its rows."""
        purpose = purpose_of(self.manifest, action, payload)
        session = SecureSum(Context.propose(self.roster, NAMES, layout_of(nothing), purpose), self.roster)
        context = session.context
        for name, site in self.sites.items():
            opened = site.ask(OPEN, Payload({"context": context.model_dump(mode="json")}))
            session.take_opening(name, Opening.from_arrays(opened.arrays, context))
        openings = session.openings()
        for name, site in self.sites.items():
            arrays = {**openings.to_arrays(), "sealed": sealed_to_array(session.sealed_for(name))}
            asked = with_session(payload, {"session": context.session, "opened": list(NAMES)}, arrays)
            session.take_vector(name, site.ask(action, asked).arrays[SUM])
        for name, site in self.sites.items():
            agreed = site.ask(AGREE, Payload({"session": context.session, "survivors": list(NAMES)}))
            session.take_agreement(name, signature_from_arrays(agreed.arrays))
        agreements = session.agreements()
        unmask = Payload({"session": context.session, "agreed": list(NAMES)}, agreements.to_arrays())
        for name, site in self.sites.items():
            session.take_shares(name, shares_from_arrays(NAMES, site.ask(UNMASK, unmask).arrays))
        return session.total()


@pytest.fixture
def consortium(tmp_path: Path) -> Consortium:
    return Consortium(tmp_path)


def unusable() -> Any:
    return pytest.raises(SecureSumError, match="The values of a site cannot be summed")


def test_a_head_that_overflows_at_one_site_fails_for_all_together(consortium: Consortium) -> None:
    nothing = HeadSums.unchanged({}).to_arrays()
    steep = {**ABOUT_A_HEAD, "weight": ABOUT_A_HEAD["weight"] + np.float32(1e36)}
    steep["weight"][1] = 0
    with unusable():
        consortium.total(EVALUATE, Payload({"server_round": 1}, steep), nothing)
    calm = consortium.total(EVALUATE, Payload({"server_round": 1}, ABOUT_A_HEAD), nothing)
    assert calm["metrics"].max() > 0
    assert [entry.action for entry in consortium.sites["ward"].entries() if entry.rows] == [EVALUATE] * 2


def test_a_standardisation_is_accepted_whatever_the_rows(consortium: Consortium) -> None:
    nothing = HeadSums.unchanged(ABOUT_A_HEAD).to_arrays()
    request = Payload({"server_round": 1}, ABOUT_A_HEAD)
    # At the other sites, features are about 1, and this is within their bounds.
    consortium.tell(STANDARDISE, Payload({}, {**SCALE, "scale": np.full(FEATURES, 0.1, np.float32)}))
    with unusable():
        consortium.total(TRAIN, request, nothing)
    consortium.tell(STANDARDISE, Payload({}, {**SCALE, "scale": np.full(FEATURES, 1e4, np.float32)}))
    assert consortium.total(TRAIN, request, nothing)["metrics"].max() > 0


def test_a_map_is_accepted_whatever_the_number_of_rows(consortium: Consortium) -> None:
    consortium.tell(MAP, MapRequest("unit", "relu:64").payload())
    with unusable():
        consortium.total(STATISTICS, Payload({"rows": "train"}), sums_over_nothing(64))
    consortium.tell(MAP, MapRequest("none").payload())
    total = consortium.total(STATISTICS, Payload({"rows": "train"}), sums_over_nothing(FEATURES))
    assert total["counts"].sum() > 60


@pytest.mark.parametrize("lost", [1, ROWS], ids=["a number", "a column"])
def test_rows_that_do_not_fit_the_backbone_make_no_site_refuse_alone(consortium: Consortium, lost: int) -> None:
    ward = consortium.sites["ward"]
    ward.rows = [
        ([values[0], "", *values[2:]] if number < lost else values, label)
        for number, (values, label) in enumerate(ward.rows)
    ]
    ward.write()
    ward.restart(strict_data=True)
    for site in consortium.sites.values():
        site.runs = 10
        site.describe(secure_sum=True)
    consortium.manifest = ward.manifest
    asked = Payload({"rows": "train"})
    consortium.tell(MAP, MapRequest("none").payload())
    if lost == 1:
        assert consortium.total(STATISTICS, asked, sums_over_nothing(FEATURES))["counts"].sum() > 60
    else:
        with unusable():
            consortium.total(STATISTICS, asked, sums_over_nothing(FEATURES))
    consortium.tell(STANDARDISE, Payload({}, SCALE))


def sums_over_nothing(width: int) -> Arrays:
    return FeatureStatistics.from_features(
        torch.zeros(0, width), torch.zeros(0, dtype=torch.long), 2, torch.zeros(width)
    ).to_arrays()
