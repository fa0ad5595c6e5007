import json
from pathlib import Path

import numpy as np
import pytest

from fedhead.client.release.accounts import Accounts, read_charges, statements
from fedhead.errors import FedheadError
from fedhead.privacy.accountant import mu_for

KEYS = ["a" * 64, "b" * 64, "c" * 64]


def accounts(folder: Path, epsilon: float = 3.0, share: float = 0.2) -> Accounts:
    return Accounts(folder / "site.privacy", epsilon, 1e-5, share)


def spend(
    own: Accounts, mu: float, key: str, run: str = "r", account: str = "train", most: float = 9
) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    return own.release(run, "lda", account, mu, most, key, lambda: {"sums": np.random.default_rng().normal(size=3)})  # type: ignore[arg-type]


def test_an_equal_request_gets_the_stored_reply_and_costs_nothing(tmp_path: Path) -> None:
    first = spend(accounts(tmp_path), 0.5, KEYS[0])
    # Another process of the site.
    again = spend(accounts(tmp_path), 0.5, KEYS[0])
    np.testing.assert_array_equal(first["sums"], again["sums"])
    assert len(read_charges(tmp_path / "site.privacy")) == 1
    assert not np.array_equal(spend(accounts(tmp_path), 0.1, KEYS[1])["sums"], first["sums"])


def test_lifetime_budget_holds_over_runs_and_each_account_has_its_own(tmp_path: Path) -> None:
    own = accounts(tmp_path)
    spend(own, own.mu * 0.8, KEYS[0], "first")
    with pytest.raises(FedheadError, match="budget of this site's training rows is spent"):
        spend(own, own.mu * 0.7, KEYS[1], "second")
    spend(own, own.mu * 0.7, KEYS[2], "second", "held_out")
    # 0.8^2 + 0.6^2 = 1
    spend(own, own.mu * 0.6, KEYS[1], "second")
    assert [charge.run for charge in own.charges()] == ["first", "second", "second"]


def test_a_run_cannot_spend_more_than_its_manifest_states(tmp_path: Path) -> None:
    own = accounts(tmp_path)
    spend(own, 0.1, KEYS[0], most=0.12)
    with pytest.raises(FedheadError, match="its manifest states"):
        spend(own, 0.1, KEYS[1], most=0.12)


def test_a_run_beyond_the_rest_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    own = accounts(tmp_path)
    own.require("first", {"train": own.mu, "held_out": own.mu * 0.4})
    spend(own, own.mu * 0.8, KEYS[0], "first")
    # A run that goes on may spend what it planned.
    own.require("first", {"train": own.mu, "held_out": own.mu * 0.4})
    with pytest.raises(FedheadError, match="more privacy budget of this site's training rows than is left"):
        own.require("second", {"train": own.mu * 0.7, "held_out": 0})
    own.require("second", {"train": own.mu * 0.6, "held_out": own.mu})


def test_nothing_is_charged_for_sums_that_could_not_be_drawn(tmp_path: Path) -> None:
    own = accounts(tmp_path)

    def fail() -> dict[str, np.ndarray]:  # type: ignore[type-arg]
        raise ValueError("too large")

    with pytest.raises(ValueError, match="too large"):
        own.release("r", "lda", "train", 0.1, 9, KEYS[0], fail)
    assert own.charges() == []


def test_lost_replies_and_damaged_accounts_let_nothing_leave(tmp_path: Path) -> None:
    own = accounts(tmp_path)
    spend(own, 0.1, KEYS[0])
    (tmp_path / "site.replies" / f"{KEYS[0]}.safetensors").write_bytes(b"no")
    with pytest.raises(FedheadError, match="missing or damaged at the site"):
        spend(own, 0.1, KEYS[0])
    path = tmp_path / "site.privacy"
    line = json.loads(path.read_text())
    path.write_text(json.dumps({**line, "mu": -1}) + "\n")
    with pytest.raises(FedheadError, match=r"Line 1 of the privacy accounts .* is damaged"):
        spend(own, 0.1, KEYS[1])


def test_statements_show_what_is_spent_and_left(tmp_path: Path) -> None:
    own = accounts(tmp_path)
    assert statements(own.charges()) == []
    spend(own, mu_for(1.0, 1e-5), KEYS[0])
    train, held_out = statements(own.charges())
    assert (train.name, train.releases, held_out.releases) == ("training rows", 1, 0)
    assert train.spent == pytest.approx(1.0)
    assert held_out.left == pytest.approx(3.0)
    square = own.mu**2 - mu_for(1.0, 1e-5) ** 2
    assert mu_for(train.left, 1e-5) == pytest.approx(square**0.5)


@pytest.mark.parametrize("kept", [None, 0, 1], ids=["no file", "an empty file", "a truncated file"])
def test_lost_charges_do_not_begin_the_budget_anew(kept: int | None, tmp_path: Path) -> None:
    own = accounts(tmp_path)
    spend(own, own.mu * 0.6, KEYS[0])
    spend(own, own.mu * 0.8, KEYS[1])
    lines = own.path.read_text().splitlines(keepends=True)
    if kept is None:
        own.path.unlink()
    else:
        own.path.write_text("".join(lines[:kept]))
    for read in (own.charges, lambda: own.require("r", {"train": 0.1}), lambda: spend(own, 0.1, KEYS[2])):
        with pytest.raises(FedheadError, match=r"are missing or lack charges: .* has \d noisy repl.* not charge"):
            read()


def test_after_another_share_is_held_out_charges_count_for_both_accounts(tmp_path: Path) -> None:
    spend(accounts(tmp_path), accounts(tmp_path).mu * 0.8, KEYS[0], "first", "held_out")
    own = accounts(tmp_path, share=0.3)
    with pytest.raises(FedheadError, match="more privacy budget of this site's training rows than is left"):
        own.require("second", {"train": own.mu * 0.7})
    with pytest.raises(FedheadError, match="budget of this site's training rows is spent"):
        spend(own, own.mu * 0.7, KEYS[1], "second")
    own.require("second", {"train": own.mu * 0.6})
    spend(own, own.mu * 0.6, KEYS[1], "second")
    train, held_out = statements(own.charges())
    assert (train.releases, held_out.releases) == (2, 1)
    assert train.left == pytest.approx(0, abs=1e-6)
    # Charges that do not say the share count for both as well.
    lines = [json.loads(line) for line in own.path.read_text().splitlines()]
    own.path.write_text("".join(json.dumps({k: v for k, v in line.items() if k != "share"}) + "\n" for line in lines))
    with pytest.raises(FedheadError, match="budget of this site's held-out rows is spent"):
        spend(accounts(tmp_path), 0.1, KEYS[2], "third", "held_out")


def test_a_process_that_is_killed_before_its_first_charge_can_spend_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = accounts(tmp_path)

    def killed(**values: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fedhead.client.release.accounts.Charge", killed)
        with pytest.raises(KeyboardInterrupt):
            spend(own, 0.1, KEYS[0])
    assert list((tmp_path / "site.replies").iterdir())
    spend(own, 0.1, KEYS[0])
    assert len(own.charges()) == 1


def test_a_process_that_is_killed_after_a_charge_answers_with_the_charged_reply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = accounts(tmp_path)

    def killed(self: Accounts, key: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Accounts, "_settle", killed)
        with pytest.raises(KeyboardInterrupt):
            spend(own, 0.1, KEYS[0])
    first = spend(own, 0.1, KEYS[0])
    np.testing.assert_array_equal(spend(own, 0.1, KEYS[0])["sums"], first["sums"])
    assert len(own.charges()) == 1
    own.path.write_text("")
    with pytest.raises(FedheadError, match="lack charges"):
        own.charges()
