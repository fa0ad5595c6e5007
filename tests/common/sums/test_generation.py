import math

import numpy as np
import pytest
import torch

from fedhead.evaluation.generation import generation_report
from fedhead.sums.generation import GenerationSums, generation_sums
from fedhead.tasks import make_task
from fedhead.tasks.losses import AnswerLoss


def outputs(rows: int = 40, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 30, (rows,), generator=generator)
    losses = tokens * (2 + torch.rand(rows, generator=generator))
    return torch.stack([losses, tokens.float(), (tokens > 28).float()], dim=1).double()


def test_sums_of_sites_add_up_to_perplexity() -> None:
    given = outputs()
    parts = list(generation_sums(given, np.arange(40) % 3, 3))
    pooled = parts[0] + parts[1] + parts[2]
    (whole,) = generation_sums(given, np.zeros(40, np.int64), 1)
    assert pooled.tokens == whole.tokens == int(given[:, 1].sum())
    report = generation_report(pooled)
    expected = math.exp(float(given[:, 0].sum() / given[:, 1].sum()))
    assert report.perplexity.value == pytest.approx(expected)
    assert report.cut == int(given[:, 2].sum())
    again = GenerationSums.from_arrays(pooled.to_arrays(), GenerationSums.zeros())
    assert again.to_arrays()["sums"] == pytest.approx(pooled.to_arrays()["sums"])


def test_intervals_hold_the_true_perplexity() -> None:
    held = 0
    for seed in range(200):
        (sums,) = generation_sums(outputs(40, seed), np.zeros(40, np.int64), 1)
        low, high = generation_report(sums).perplexity.low, generation_report(sums).perplexity.high
        assert low is not None
        assert high is not None
        held += low <= math.exp(2.5) <= high
    assert 180 <= held <= 199


def test_a_version_that_diverged_is_bad_and_finite() -> None:
    given = torch.tensor([[math.nan, 4.0, 0.0], [math.inf, 2.0, 0.0]])
    (sums,) = generation_sums(given, np.zeros(2, np.int64), 1)
    assert sums.loss_sum == 50 * 6
    assert AnswerLoss().values(given, given).tolist() == [200, 100]
    GenerationSums.from_arrays(sums.to_arrays(), sums)


@pytest.mark.parametrize(
    ("counts", "values"),
    [
        ([-1, 0, 0], [0.0, 0.0, 0.0, 0.0]),
        ([5, 4, 0], [4.0, 4.0, 4.0, 4.0]),
        ([2, 4, 3], [4.0, 9.0, 9.0, 9.0]),
        ([2, 4, 0], [1e9, 1e18, 9.0, 9.0]),
        ([2, 4, 0], [4.0, 1.0, 9.0, 3.0]),
        ([2, 4, 0], [4.0, 9.0, 1.0, 3.0]),
        ([2, 4, 0], [4.0, 9.0, 9.0, 90.0]),
        ([2, 4, 0], [math.nan, 9.0, 9.0, 9.0]),
    ],
)
def test_impossible_sums_are_refused(counts: list[int], values: list[float]) -> None:
    arrays = {"counts": np.array(counts, np.int64), "sums": np.array(values)}
    with pytest.raises(ValueError, match=r"impossible|contradict|finite"):
        GenerationSums.from_arrays(arrays, GenerationSums.zeros())


def test_paired_losses_weigh_conversations_and_not_tokens() -> None:
    task = make_task("generation", ("loss", "tokens", "cut"))
    assert task.losses(torch.tensor([[6.0, 3.0, 0.0], [1.0, 1.0, 0.0]]), torch.zeros(2)).tolist() == [2.0, 1.0]
    assert task.score(10.0, 20.0, 3.0) == pytest.approx(math.exp(2.0))
    assert task.mean_loss(10.0, 20.0, 3.0) == 2.0
