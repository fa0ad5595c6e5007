"""Objectives of tails, against their papers' formulas written plainly."""

import math

import pytest
import torch

from fedhead.heads.objectives import ViewAgreement, predict, supervised_contrast, view_disagreement
from fedhead.heads.views import view_of


def contrast_in_words(rows: torch.Tensor, labels: torch.Tensor, temperature: float) -> float:
    """`L_out` of Khosla et al. (2020), equation 2, row by row, over rows that share their class with another one."""
    unit = [row / row.norm() for row in rows]
    losses = []
    for i, anchor in enumerate(unit):
        others = [k for k in range(len(unit)) if k != i]
        positives = [k for k in others if labels[k] == labels[i]]
        if not positives:
            continue
        total = sum(math.exp(float(anchor @ unit[k]) / temperature) for k in others)
        logs = [math.log(math.exp(float(anchor @ unit[k]) / temperature) / total) for k in positives]
        losses.append(-sum(logs) / len(positives))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_supervised_contrast_is_that_of_its_paper(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0, 1, 0, 3, 1, 1, 0, 2, 4])  # 3 and 4 occur once
    found = supervised_contrast(rows, labels, temperature)
    assert float(found) == pytest.approx(contrast_in_words(rows, labels, temperature), rel=1e-9)
    assert float(supervised_contrast(3 * rows, labels, temperature)) == pytest.approx(float(found))


@pytest.mark.parametrize("labels", [[0], [0, 1, 2]])
def test_rows_without_another_of_their_class_have_no_gradient(labels: list[int]) -> None:
    rows = torch.randn(len(labels), 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = supervised_contrast(rows, torch.tensor(labels))
    loss.backward()
    assert float(loss.detach()) == 0
    assert rows.grad is not None
    assert torch.equal(rows.grad, torch.zeros_like(rows))


def test_training_by_contrast_draws_the_rows_of_a_class_together() -> None:
    rows = torch.randn(20, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
    labels = torch.arange(20) % 4
    optimizer = torch.optim.Adam([rows], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        supervised_contrast(rows, labels).backward()
        optimizer.step()
    unit = torch.nn.functional.normalize(rows.detach(), dim=-1)
    alike = labels[:, None] == labels
    cosines = unit @ unit.mT
    assert cosines[alike].min() > cosines[~alike].max()


def test_only_predictions_have_a_gradient_in_the_agreement_of_views() -> None:
    generator = torch.Generator().manual_seed(3)
    first, second = (torch.randn(6, 8, generator=generator, requires_grad=True) for _ in range(2))
    one, other = first * 2 + 1, second.square()
    view_disagreement(first, second, one, other).backward()
    expected = [value.detach().requires_grad_() for value in (first, second)]
    fixed = [value.detach() for value in (first, second)]
    cosines = [
        torch.nn.functional.cosine_similarity(expected[0] * 2 + 1, fixed[1]),
        torch.nn.functional.cosine_similarity(expected[1].square(), fixed[0]),
    ]
    (1 - torch.cat(cosines).mean()).backward()
    for found, wanted in zip((first, second), expected, strict=True):
        assert found.grad is not None
        torch.testing.assert_close(found.grad, wanted.grad)


def test_the_predictor_is_a_bottleneck_with_a_batch_norm() -> None:
    own = ViewAgreement(12).trainable()
    rows = torch.randn(7, 12, generator=torch.Generator().manual_seed(0))
    plain = torch.nn.Sequential(
        torch.nn.Linear(12, 3, bias=False), torch.nn.BatchNorm1d(3), torch.nn.ReLU(), torch.nn.Linear(3, 12)
    )
    named = {"0.weight": "first.weight", "3.weight": "second.weight", "3.bias": "second.bias"}
    plain.load_state_dict({name: own[f"predictor.{one}"] for name, one in named.items()}, strict=False)
    found = predict({f"objective.{name}": value for name, value in own.items()}, rows)
    torch.testing.assert_close(found, plain(rows))


def test_views_of_maps_differ_and_keep_their_scale() -> None:
    maps = torch.randn(40, 6, 8, 8, generator=torch.Generator().manual_seed(0)) + 3
    generator = torch.Generator().manual_seed(1)
    one, other = view_of(maps, generator), view_of(maps, generator)
    assert one.shape == maps.shape
    assert not torch.equal(one, other)
    assert float(one.mean()) == pytest.approx(float(maps.mean()), rel=0.1)
    again = view_of(maps, torch.Generator().manual_seed(1))
    assert torch.equal(again, one)


def test_views_of_constant_maps_are_constant_but_for_noise_and_dropped_channels() -> None:
    maps = torch.full((10, 4, 5, 7), 2.0)
    seen = view_of(maps, torch.Generator().manual_seed(1))
    values = seen.amax((2, 3))
    torch.testing.assert_close(values, seen.amin((2, 3)))
    kept = values != 0
    torch.testing.assert_close(values[kept], torch.full_like(values[kept], 2 / 0.9))
    assert 0 < int(kept.sum()) < kept.numel()


def test_views_of_texts_lack_tokens_but_never_the_first_or_padding() -> None:
    values = torch.randn(30, 9, 5, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(9) < torch.arange(30)[:, None] % 9 + 1).float()
    seen = view_of(torch.cat([values, mask[..., None]], -1), torch.Generator().manual_seed(1), sequences=True)
    assert torch.equal(seen[:, 0, -1], torch.ones(30))
    assert bool((seen[..., -1] <= mask).all())
    assert 0 < float((mask - seen[..., -1]).sum()) < 0.3 * float(mask.sum())
