from typing import cast

import pytest
import torch
from torch import Tensor, nn

from fedhead.errors import UserError
from fedhead.heads import CosineHead, Head, LinearHead, MLPHead, heads, make_head
from fedhead.tasks.losses import CrossEntropy

SPECS = ("linear", "mlp:5", "cosine", "unit")


def random_head(spec: str, seed: int = 0, features: int = 7, classes: int = 3) -> Head:
    generator = torch.Generator().manual_seed(seed)
    head = make_head(spec, features, classes).double()
    head.randomise(generator)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return head


def random_rows(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def stack(each: list[Head]) -> dict[str, Tensor]:
    return {name: torch.stack([head.trainable()[name] for head in each]) for name in each[0].trainable()}


def test_every_registered_head_is_tested_here() -> None:
    # A model without a head has no parameters to test.
    assert {spec.partition(":")[0] for spec in SPECS} == set(heads) - {"none"}


@pytest.mark.parametrize("spec", SPECS)
def test_stacked_logits_equal_one_by_one(spec: str) -> None:
    each = [random_head(spec, seed) for seed in range(4)]
    rows = random_rows(4, 6, 7)
    logits = each[0].outputs(stack(each), rows)
    assert logits.shape == (4, 6, 3)
    for i, head in enumerate(each):
        torch.testing.assert_close(logits[i], head(rows[i]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("spec", SPECS)
def test_gradients_are_those_of_the_weighted_cross_entropy(spec: str, stacked: bool) -> None:
    each = [random_head(spec, seed) for seed in range(4 if stacked else 1)]
    rows, weights = random_rows(4, 6, 7), random_rows(4, 6).abs()
    labels = torch.randint(0, 3, (4, 6), generator=torch.Generator().manual_seed(1))
    if stacked:
        gradients, values = each[0].gradients(stack(each), rows, labels, weights, CrossEntropy())
    else:
        gradients, values = each[0].gradients(each[0].trainable(), rows[0], labels[0], weights[0], CrossEntropy())
        gradients, values = {name: value.unsqueeze(0) for name, value in gradients.items()}, values.unsqueeze(0)
    for i, head in enumerate(each):
        value = (nn.functional.cross_entropy(head(rows[i]), labels[i], reduction="none") * weights[i]).sum()
        value.backward()  # type: ignore[no-untyped-call]
        assert float(values[i]) == pytest.approx(value.item())
        for name, parameter in head.named_parameters():
            torch.testing.assert_close(gradients[name][i], cast(Tensor, parameter.grad))
    assert not values.requires_grad
    assert not any(value.requires_grad for value in gradients.values())


@pytest.mark.parametrize("spec", SPECS)
def test_folded_head_equals_head_on_standardised_features(spec: str) -> None:
    rows = random_rows(6, 7)
    means, scales = random_rows(2, 7), random_rows(2, 7).abs() + 0.5
    head = random_head(spec)
    once = (rows - means[0]) / scales[0]
    expected = head(once).detach()
    head.fold(means[0], scales[0])
    torch.testing.assert_close(head(rows), expected, rtol=1e-10, atol=1e-10)

    # The head now takes raw rows; give it rows that are themselves a standardisation of others.
    rawer = rows * scales[1] + means[1]
    head.fold(means[1], scales[1])
    torch.testing.assert_close(head(rawer), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("spec", SPECS)
def test_trainable_and_assign_round_trip(spec: str) -> None:
    head, other = random_head(spec, 0), random_head(spec, 1)
    copied = other.trainable()
    head.assign(copied)
    rows = random_rows(6, 7)
    assert torch.equal(head(rows), other(rows))
    for value in copied.values():
        assert not value.requires_grad
        value.zero_()
    assert torch.equal(head(rows), other(rows))


def test_failed_assign_changes_nothing() -> None:
    head = random_head("linear")
    before = head.trainable()
    zeros = {name: torch.zeros_like(value) for name, value in before.items()}
    for wrong, words in (
        ({"weight": zeros["weight"]}, "bias"),
        ({**zeros, "extra": zeros["bias"]}, "extra"),
        ({**zeros, "bias": torch.zeros(4)}, r"'bias' has shape \[4\], not \[3\]"),
        ({**zeros, "bias": torch.zeros(1)}, "bias"),
        ({**zeros, "weight": zeros["weight"].T}, "weight"),
    ):
        with pytest.raises(ValueError, match=words):
            head.assign(wrong)
    assert all(torch.equal(value, before[name]) for name, value in head.trainable().items())


def test_make_head_by_spec() -> None:
    assert isinstance(make_head("linear", 7, 3), LinearHead)
    assert isinstance(make_head("cosine", 7, 3), CosineHead)
    mlp = make_head("mlp:5", 7, 3)
    assert isinstance(mlp, MLPHead)
    assert mlp.hidden_weight.shape == (5, 7)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("liner", "Did you mean 'linear'"),
        ("", "Known: cosine, linear, mlp"),
        ("mlp:", "'mlp:256'"),
        ("mlp", "'mlp:256'"),
        ("mlp:0", "'mlp:256'"),
        ("mlp:-4", "'mlp:256'"),
        ("mlp:4.5", "'mlp:256'"),
        ("linear:3", "takes no argument.*'3'"),
        ("cosine:3", "takes no argument.*'3'"),
    ],
)
def test_make_head_errors(spec: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_head(spec, 7, 3)


@pytest.mark.parametrize("spec", SPECS)
def test_random_parameters_depend_on_the_generator(spec: str) -> None:
    first, again, other = (make_head(spec, 7, 3) for _ in range(3))
    for head, seed in ((first, 0), (again, 0), (other, 1)):
        head.randomise(torch.Generator().manual_seed(seed))
    rows = random_rows(6, 7).float()
    assert torch.equal(first(rows), again(rows))
    assert not torch.equal(first(rows), other(rows))


def test_a_linear_head_wraps_weights_in_their_dtype() -> None:
    weight, bias = random_rows(3, 7), random_rows(3)
    head = LinearHead.from_weights(weight, bias)
    rows = random_rows(6, 7)
    torch.testing.assert_close(head(rows), rows @ weight.T + bias)
