import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fedhead.tasks.losses import BinaryCrossEntropy, CrossEntropy, Loss, SquaredError

NUMBERS = torch.tensor([2, 0, 1, 2])
MARKS = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 1, 1], [1, 0, 0]])
VALUES = torch.tensor([[0.5, -1, 2], [3, 0, 0.25], [-2, 1, 1], [0, 0, -4]], dtype=torch.float64)

LOSSES: list[tuple[Loss, Tensor]] = [(CrossEntropy(), NUMBERS), (BinaryCrossEntropy(), MARKS), (SquaredError(), VALUES)]


def random_outputs(*shape: int) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("loss", "targets"), LOSSES, ids=["classes", "labels", "values"])
@pytest.mark.parametrize("stack", [(), (5,)])
def test_slopes_are_the_gradients_of_values(loss: Loss, targets: Tensor, stack: tuple[int, ...]) -> None:
    outputs = random_outputs(*stack, 4, 3).requires_grad_()
    targets = targets.expand(*stack, *targets.shape)
    values = loss.values(outputs, targets)
    (expected,) = torch.autograd.grad(values.sum(), outputs)
    same, slopes = loss.slopes(outputs.detach().mT.contiguous(), targets)
    torch.testing.assert_close(same, values.detach())
    torch.testing.assert_close(slopes, expected.mT)


def test_binary_cross_entropy_is_the_mean_over_classes() -> None:
    outputs = random_outputs(4, 3)
    expected = functional.binary_cross_entropy_with_logits(outputs, MARKS.double(), reduction="mean")
    torch.testing.assert_close(BinaryCrossEntropy().values(outputs, MARKS).mean(), expected)


def test_a_multi_label_row_is_correct_if_all_its_labels_are() -> None:
    outputs = MARKS.double() - 0.5
    assert BinaryCrossEntropy().score(outputs, MARKS).tolist() == [True] * 4
    outputs[0, 0], outputs[3, 0] = 0.1, -0.1
    assert BinaryCrossEntropy().score(outputs, MARKS).tolist() == [False, True, True, False]


def test_squared_error_and_its_score() -> None:
    outputs = random_outputs(4, 3)
    expected = functional.mse_loss(outputs, VALUES) / 2
    torch.testing.assert_close(SquaredError().values(outputs, VALUES).mean(), expected)
    torch.testing.assert_close(SquaredError().score(outputs, VALUES), SquaredError().values(0 * outputs, VALUES))
