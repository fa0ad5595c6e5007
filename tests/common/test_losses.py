import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fedhead.losses import BinaryCrossEntropy, CrossEntropy, loss_for

NUMBERS = torch.tensor([2, 0, 1, 2])
MARKS = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 1, 1], [1, 0, 0]])


def random_logits(*shape: int) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_labels_with_a_dimension_of_classes_have_the_binary_loss() -> None:
    assert isinstance(loss_for(random_logits(4, 3), NUMBERS), CrossEntropy)
    assert isinstance(loss_for(random_logits(4, 3), MARKS), BinaryCrossEntropy)
    assert isinstance(loss_for(random_logits(2, 4, 3), NUMBERS.expand(2, 4)), CrossEntropy)
    assert isinstance(loss_for(random_logits(2, 4, 3), MARKS.expand(2, 4, 3)), BinaryCrossEntropy)


@pytest.mark.parametrize("labels", [NUMBERS, MARKS], ids=["single-label", "multi-label"])
@pytest.mark.parametrize("stack", [(), (5,)])
def test_slopes_are_those_of_the_values(labels: Tensor, stack: tuple[int, ...]) -> None:
    logits = random_logits(*stack, 4, 3).requires_grad_()
    labels = labels.expand(*stack, *labels.shape)
    loss = loss_for(logits, labels)
    values = loss.values(logits, labels)
    (expected,) = torch.autograd.grad(values.sum(), logits)
    same, slopes = loss.slopes(logits.detach().mT.contiguous(), labels)
    torch.testing.assert_close(same, values.detach())
    torch.testing.assert_close(slopes, expected.mT)


def test_the_binary_loss_is_the_mean_over_classes() -> None:
    logits = random_logits(4, 3)
    expected = functional.binary_cross_entropy_with_logits(logits, MARKS.double(), reduction="mean")
    torch.testing.assert_close(loss_for(logits, MARKS).values(logits, MARKS).mean(), expected)


def test_a_multi_label_row_is_right_if_all_its_labels_are() -> None:
    logits = MARKS.double() - 0.5
    assert loss_for(logits, MARKS).correct(logits, MARKS).tolist() == [True] * 4
    logits[0, 0], logits[3, 0] = 0.1, -0.1
    assert loss_for(logits, MARKS).correct(logits, MARKS).tolist() == [False, True, True, False]
