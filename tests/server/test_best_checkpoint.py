import random

import numpy as np

from fedhead.server.best_checkpoint import BestCheckpoint, Candidate
from fedhead.server.exchange import Exchange


def test_dropped_heads_could_not_have_been_the_best() -> None:
    """Against keeping all heads, while any sites are lost at any time."""
    generator = random.Random(0)
    for _ in range(200):
        sites = [f"site-{number}" for number in range(generator.randint(1, 4))]
        best, kept = BestCheckpoint(), []
        for number in range(12):
            metrics = {site: np.array([1.0, 0.0, 5.0, float(generator.randint(0, 3)), 0.0]) for site in sites}
            exchange = Exchange(metrics=metrics)
            kept.append((number, metrics))
            best.add(number, {}, exchange)
            if len(sites) > 1 and generator.random() < 0.1:
                sites.remove(generator.choice(sites))
        common = sorted(kept[-1][1])
        totals = {number: sum(metrics[site][3] for site in common) for number, metrics in kept}
        chosen = best.choose(exchange)
        assert chosen is not None
        assert totals[chosen.number] == min(totals.values())
        assert len(best.candidates) <= len(kept)


def test_heads_evaluated_at_few_common_sites_are_not_compared() -> None:
    row = np.array([1.0, 0.0, 5.0, 1.0, 0.0])
    best = BestCheckpoint()
    best.add(0, {}, Exchange(metrics={"a": row, "b": row}))
    last = Exchange(metrics={"b": row, "c": row, "d": row})
    best.add(1, {}, last)
    assert best.choose(last) is None
    nobody = BestCheckpoint()
    nobody.add(0, {}, Exchange())
    assert nobody.choose(Exchange()) is None
    assert BestCheckpoint(["a"], [Candidate(3, {}, np.ones(1))]).choose(Exchange(metrics={"a": row})) is not None


def test_an_equal_head_does_not_replace_the_earlier_one() -> None:
    row = np.array([1.0, 0.0, 5.0, 1.0, 0.0])
    best, exchange = BestCheckpoint(), Exchange(metrics={"a": row, "b": 2 * row})
    for number in range(3):
        best.add(number, {}, exchange)
    chosen = best.choose(exchange)
    assert chosen is not None
    assert [one.number for one in best.candidates] == [chosen.number] == [0]
