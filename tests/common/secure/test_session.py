from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedhead.secure import SecureSumError
from fedhead.secure.keys import SiteKeys
from fedhead.secure.layout import Layout
from fedhead.secure.roster import Roster
from fedhead.secure.session import Context, Purpose, most_colluding, smallest_threshold

MakeRoster = Callable[..., tuple[Roster, dict[str, SiteKeys]]]


LAYOUT = Layout.of({"rows": np.array([0])}, 1)


def propose(roster: Roster, **changed: Any) -> Context:
    sites, threshold = changed.pop("sites", list(roster.sites)), changed.pop("threshold", None)
    about: dict[str, str] = {"run": "r1", "what": "query.statistics", "rows": "train", "subject": "0" * 64}
    return Context.propose(roster, sites, LAYOUT, Purpose(**{**about, **changed}), threshold)


def test_digest_depends_on_every_field(make_roster: MakeRoster) -> None:
    roster, _ = make_roster(4)
    context = propose(roster)
    changes: dict[str, Any] = {
        "session": "1" * 64,
        "run": "r2",
        "what": "train",
        "rows": "held_out",
        "subject": "1" * 64,
        "layout": Layout.of({"rows": np.array([0])}, 2),
        "sites": context.sites[:3],
        "threshold": 4,
        "roster": "1" * 64,
    }
    assert changes.keys() | {"version"} == Context.model_fields.keys()
    digests = {context.model_copy(update={name: value}).digest for name, value in changes.items()}
    assert len(digests | {context.digest}) == len(changes) + 1
    assert Context.model_validate_json(context.model_dump_json()).digest == context.digest


@settings(deadline=None, max_examples=50)
@given(st.integers(3, 1000), st.data())
def test_thresholds_leave_two_thirds_and_bound_collusion(count: int, data: st.DataObject) -> None:
    least = smallest_threshold(count)
    assert 3 * least > 2 * count
    assert least <= count
    threshold = data.draw(st.integers(least, count))
    colluding = most_colluding(count, threshold)
    # Honest sites that give the share of the seed, and others that give the share of the mask key, and colluders both.
    assert (count - colluding) + 2 * colluding < 2 * threshold
    assert colluding <= threshold - 2


def test_published_thresholds() -> None:
    assert [smallest_threshold(count) for count in (3, 4, 20, 200)] == [3, 3, 14, 134]
    assert most_colluding(20, 14) == 7


def test_contexts_are_refused_for_a_reason(make_roster: MakeRoster) -> None:
    roster, _ = make_roster(5)
    other, _ = make_roster(5)
    context = propose(roster)
    context.check(roster, min_sites=5, max_colluding=2)
    for policy, changed, reason in (
        ((other,), {}, "another roster"),
        ((roster,), {"sites": (*context.sites[:4], "site-999")}, "does not have the site site-999"),
        ((roster, 6), {}, "over 5 sites is refused: 6"),
        ((roster, 1), {"sites": context.sites[:2], "threshold": 2}, "over 2 sites is refused: 3"),
        ((roster,), {"threshold": 3}, "threshold 3 of 5"),
        ((roster,), {"threshold": 6}, "threshold 6 of 5"),
        ((roster, 3, 3), {}, "2 colluding sites; 3 are required"),
    ):
        with pytest.raises(SecureSumError, match=reason):
            context.model_copy(update=changed).check(*policy)
    with pytest.raises(SecureSumError, match="over 2 sites"):
        propose(roster, sites=list(roster.sites)[:2])


@pytest.mark.parametrize(
    "changed",
    [
        {"session": "x"},
        {"sites": ("b", "a")},
        {"sites": ("a", "a")},
        {"sites": ()},
        {"sites": ("a\0b",)},
        {"threshold": 3.0},
        {"threshold": True},
        {"threshold": 0},
        {"run": "two\nlines"},
        {"subject": ""},
        {"version": 2},
        {"more": 1},
    ],
)
def test_invalid_contexts_are_rejected(make_roster: MakeRoster, changed: dict[str, Any]) -> None:
    roster, _ = make_roster(3)
    with pytest.raises(ValidationError):
        Context(**{**propose(roster).model_dump(), **changed})


def test_purpose_depends_on_what_is_summed_and_its_topic_on_all_but_the_run(make_roster: MakeRoster) -> None:
    roster, _ = make_roster(4)
    first = propose(roster)
    assert propose(roster, sites=first.sites[:3], threshold=3).purpose == first.purpose
    changes = ({"run": "r2"}, {"what": "train"}, {"rows": "held_out"}, {"subject": "1" * 64})
    purposes = [propose(roster, **changed).purpose for changed in changes]
    assert len({first.purpose, *purposes}) == 5
    assert len({one.topic for one in (first.purpose, *purposes)}) == 4
    assert propose(roster, what="a", rows="bc").purpose.topic != propose(roster, what="ab", rows="c").purpose.topic


def test_a_new_member_is_not_part_of_an_old_roster(make_roster: MakeRoster) -> None:
    roster, _ = make_roster(3)
    grown = roster.model_copy(update={"sites": {**roster.sites, "invented": SiteKeys.generate().member}})
    with pytest.raises(SecureSumError, match="another roster"):
        propose(grown).check(roster)
