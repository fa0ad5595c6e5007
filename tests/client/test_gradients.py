"""Full gradients against automatic differentiation, summed over any split."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from fedhead.client.gradients import BLOCK_ROWS, sum_gradient
from fedhead.client.labelled_features import LabelledFeatures, SiteRows
from fedhead.heads import LinearHead
from fedhead.tasks.losses import BinaryCrossEntropy

CLASSES, WIDTH = 3, 5


def drawn(rows: int, seed: int = 0, *, labels: bool = False) -> LabelledFeatures:
    generator = torch.Generator().manual_seed(seed)
    features = 3 + 2 * torch.randn(rows, WIDTH, generator=generator)
    scaling = torch.full((WIDTH,), 3.0, dtype=torch.float64), torch.full((WIDTH,), 2.0, dtype=torch.float64)
    if labels:
        targets = torch.randint(2, (rows, CLASSES), generator=generator)
        return LabelledFeatures(features, targets, scaling, BinaryCrossEntropy())
    return LabelledFeatures(features, torch.randint(CLASSES, (rows,), generator=generator), scaling)


def head(seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(CLASSES, WIDTH, generator=generator),
        "bias": torch.randn(CLASSES, generator=generator),
    }


def test_it_equals_automatic_differentiation() -> None:
    for labels in (False, True):
        data = drawn(BLOCK_ROWS + 100, labels=labels)
        leaves = {name: value.double().requires_grad_() for name, value in head().items()}
        outputs = ((data.features.double() - 3) / 2) @ leaves["weight"].T + leaves["bias"]
        if labels:
            loss = functional.binary_cross_entropy_with_logits(outputs, data.labels.double(), reduction="sum") / CLASSES
        else:
            loss = functional.cross_entropy(outputs, data.labels, reduction="sum")
        loss.backward()
        summed = sum_gradient(LinearHead(WIDTH, CLASSES), head(), data, [SiteRows("all", np.arange(BLOCK_ROWS + 100))])
        torch.testing.assert_close(summed.weight, leaves["weight"].grad, rtol=1e-11, atol=1e-10)
        torch.testing.assert_close(summed.bias, leaves["bias"].grad, rtol=1e-11, atol=1e-10)
        assert abs(summed.loss - float(loss.detach())) < 1e-9 * summed.loss


@settings(max_examples=25, deadline=None)
@given(owners=st.lists(st.integers(0, 4), min_size=2, max_size=60), seed=st.integers(0, 5))
def test_the_sum_over_any_split_is_the_same(owners: list[int], seed: int) -> None:
    data, form = drawn(len(owners), seed), LinearHead(WIDTH, CLASSES)
    whole = sum_gradient(form, head(), data, [SiteRows("all", np.arange(len(owners)))])
    sites = [SiteRows(str(owner), np.flatnonzero(np.array(owners) == owner)) for owner in range(5)]
    parts = [sum_gradient(form, head(), data, [site]) for site in sites]
    assert sum(part.rows for part in parts) == whole.rows
    torch.testing.assert_close(sum(part.weight for part in parts), whole.weight, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(sum(part.bias for part in parts), whole.bias, rtol=1e-12, atol=1e-11)


def test_the_largest_share_is_that_of_the_row_that_stands_out() -> None:
    data = LabelledFeatures(torch.tensor([[-1.0], [-1.0], [-1.0], [1.0]]), torch.tensor([0, 0, 0, 0]))
    form = LinearHead(1, 2)
    calm = {"weight": torch.zeros(2, 1), "bias": torch.zeros(2)}
    assert sum_gradient(form, calm, data, [SiteRows("a", np.arange(4))]).largest == 0.25
    steep = {"weight": torch.tensor([[-50.0], [50.0]]), "bias": torch.zeros(2)}
    assert sum_gradient(form, steep, data, [SiteRows("a", np.arange(4))]).largest > 0.999999
    assert sum_gradient(form, steep, data, [SiteRows("a", np.arange(3))]).rows == 3
