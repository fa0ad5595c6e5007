"""The choice between adapters and the base model, where a site may lie."""

import numpy as np
import pytest

from fedhead.server.best_checkpoint import BestCheckpoint
from fedhead.server.exchange import Exchange
from fedhead.server.generation_run import choose_adapters
from fedhead.server.screening import impossible_answers
from fedhead.server.selection import Rival
from fedhead.server.tuning import Cost
from fedhead.sums.heads import HELD_OUT, LOSS_SUM, METRICS, SCORE
from fedhead.sums.rivals import RivalSums

RIVALS = [Rival("the base model", {}, "tail"), Rival("round 1", {}, "tail")]


def losses(rows: int, gain: float, seed: int) -> RivalSums:
    """Return sums of conversations whose mean loss of a token falls by `gain`, give or take 0.3."""
    generator = np.random.default_rng(seed)
    before = generator.uniform(2, 4, rows)
    after = before - gain + generator.normal(0, 0.3, rows)
    return RivalSums.from_losses(np.stack([before, after]), np.zeros((2, rows), np.bool_))


def chosen(sites: dict[str, RivalSums]) -> tuple[bool, str]:
    total = RivalSums.zeros(2)
    for own in sites.values():
        total += own
    proven, choice = choose_adapters(RIVALS, total, 1, Cost(0.0, 0.0), sites)
    return proven, choice.reason


def test_a_single_site_cannot_have_adapters_kept() -> None:
    honest = {name: losses(40, 0.0, seed) for seed, name in enumerate("abc")}
    liar = losses(40, 1.5, 9)
    assert liar.paired.gain(1, 0)[0] > 1
    pooled = sum(honest.values(), liar)
    gain, error = pooled.paired.gain(1, 0)
    assert gain > 2 * error
    proven, reason = chosen({**honest, "liar": liar})
    assert not proven
    assert "Without liar the other sites' conversations do not prove it" in reason


def test_adapters_that_help_everywhere_are_kept() -> None:
    proven, reason = chosen({name: losses(40, 0.3, seed) for seed, name in enumerate("abcd")})
    assert proven
    assert "Without" not in reason


@pytest.mark.parametrize("names", ["a", "ab"])
def test_fewer_sites_are_judged_together(names: str) -> None:
    assert chosen({name: losses(60, 0.3, seed) for seed, name in enumerate(names)})[0]
    assert not chosen({name: losses(60, -0.3, seed) for seed, name in enumerate(names)})[0]


def test_sites_without_held_out_conversations_judge_nothing() -> None:
    assert chosen({"a": losses(60, 0.3, 0), "b": RivalSums.zeros(2), "c": RivalSums.zeros(2)})[0]


def test_answers_longer_than_the_model_takes_are_impossible() -> None:
    honest = {"a": (10.0, 200.0, 800.0), "b": (0.0, 0.0, 0.0), "c": (3.0, 3.0, 150.0)}
    assert impossible_answers(honest, 50) == {}
    found = impossible_answers(
        {**honest, "many": (10.0, 501.0, 1.0), "none": (10.0, 0.0, 0.0), "loud": (10.0, 20.0, 1001.0)}, 50
    )
    assert found.keys() == {"many", "none", "loud"}
    assert "501 tokens of answers in 10 conversations of at most 50" in found["many"]
    assert "above 50 for a token" in found["loud"]


def test_a_site_weighs_by_its_conversations_when_the_best_round_is_chosen() -> None:
    def evaluated(loss_of_honest: float, loss_of_wordy: float) -> Exchange:
        table = {}
        for site, tokens, loss in (("honest", 200.0, loss_of_honest), ("wordy", 5000.0, loss_of_wordy)):
            row = np.zeros(len(METRICS))
            row[[HELD_OUT, SCORE, LOSS_SUM]] = 10, tokens, tokens * loss
            table[site] = row
        return Exchange(metrics=table)

    best = BestCheckpoint()
    before, after = evaluated(3.0, 3.0), evaluated(2.5, 3.1)
    best.add(1, {}, before, by="token_loss")
    best.add(2, {}, after, by="token_loss")
    found = best.choose(after)
    assert found is not None
    # Weighed by tokens it would be the first.
    assert found.number == 2
    assert after.sums()[LOSS_SUM] > before.sums()[LOSS_SUM]
