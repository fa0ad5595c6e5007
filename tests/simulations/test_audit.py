"""The one-run audit of the stated epsilon."""

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from fedhead.backbones import Backbone
from fedhead.config import RunConfig
from fedhead.data import IntArray
from fedhead.errors import UserError
from fedhead.privacy.mechanism import Mechanism
from fedhead.simulations import audit as audit_module
from fedhead.simulations import simulate
from fedhead.simulations.audit import CONFIDENCE, Audit, audit_private
from fedhead.simulations.sites import SharedData
from fedhead.sums.sums import Arrays

pytestmark = pytest.mark.usefixtures("one_thread")


def published_p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Steinke et al. (2023), appendix D."""
    each = 1 / (1 + math.exp(-epsilon))
    beta = stats.binom.sf(right - 1, guesses, each)
    alpha = total = 0.0
    for fewer in range(1, right + 1):
        total += stats.binom.pmf(right - fewer, guesses, each)
        alpha = max(alpha, total / fewer)
    return float(min(beta + alpha * delta * 2 * canaries, 1.0))


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0, 4.0, 30.0])
@pytest.mark.parametrize(("guesses", "right"), [(200, 200), (200, 151), (200, 90), (10, 10), (10, 0)])
def test_chances_are_those_of_the_published_code(epsilon: float, guesses: int, right: int) -> None:
    found = Audit(1000, guesses, right, 1.0, 1e-5).chance(epsilon)
    assert found == pytest.approx(published_p_value(1000, guesses, right, epsilon, 1e-5), rel=1e-6, abs=1e-12)


def test_the_measured_epsilon_is_the_largest_that_is_refuted() -> None:
    audit = Audit(1000, 200, 170, 8.0, 1e-5)
    assert 0.5 < audit.measured < math.log(170 / 30)
    assert audit.chance(audit.measured) <= 1 - CONFIDENCE < audit.chance(audit.measured + 1e-4)
    assert Audit(1000, 200, 101, 8.0, 1e-5).measured == 0


def test_the_bound_holds_for_randomised_response() -> None:
    rng = np.random.default_rng(0)
    epsilon = 1.0
    right = rng.binomial(200, 1 / (1 + math.exp(-epsilon)), size=400)
    bounds = {one: Audit(200, 200, one, epsilon, 1e-5).measured for one in set(right.tolist())}
    measured = [bounds[one] for one in right.tolist()]
    assert np.mean(np.array(measured) > epsilon) < 0.08
    assert np.mean(measured) > 0.5


def test_audits_are_of_private_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="set epsilon"):
        simulate(RunConfig(rounds=0), attack="audit", out=tmp_path / "run")


@pytest.mark.parametrize(("unit", "rounds", "epsilon"), [("row", 0, 4.0), ("group", 0, 4.0), ("row", 12, 2.0)])
def test_the_stated_epsilon_is_not_exceeded(unit: str, rounds: int, epsilon: float, tmp_path: Path) -> None:
    config = RunConfig.from_values({"rounds": rounds, "privacy": {"epsilon": epsilon, "unit": unit}})
    result = simulate(config, attack="audit", out=tmp_path / "run")
    assert result.outcome.privacy.get("rounds", 0) == rounds
    found = result.outcome.attack
    # So many canaries are found that the audit is no idle one.
    assert found["right"] > 0.6 * found["guesses"]
    assert 0 < found["measured"] < epsilon
    assert "canaries guessed" in (tmp_path / "run" / "report.html").read_text()


def test_too_little_noise_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def a_tenth(mechanism: Mechanism, sums: Arrays) -> Arrays:
        return {name: array + (noisy - array) / 10 for name, array, noisy in _noised(mechanism, sums)}

    def _noised(mechanism: Mechanism, sums: Arrays) -> list[tuple[str, np.ndarray, np.ndarray]]:  # type: ignore[type-arg]
        return [(name, sums[name], noisy) for name, noisy in mechanism.add_noise(sums).items()]

    def careless(config: RunConfig, backbone: Backbone, shared: SharedData, rows: IntArray) -> Audit:
        return audit_private(config, backbone, shared, rows, a_tenth)

    monkeypatch.setattr(audit_module, "audit_private", careless)
    config = RunConfig.from_values({"privacy": {"epsilon": 1.0}})
    # Single audits vary by 0.13 around 1.34.
    found = [simulate(config, attack="audit", out=tmp_path / f"run-{n}").outcome.attack["measured"] for n in range(8)]
    assert np.mean(found) > 1.0
