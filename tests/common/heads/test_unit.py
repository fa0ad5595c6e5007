import torch

from fedhead.heads import UnitHead, make_head


def test_outputs_are_linear_in_rows_normalised_twice() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias, origin, shift, rows = (
        torch.randn(*shape, generator=generator) for shape in ((3, 5), (3,), (5,), (5,), (7, 5))
    )
    head = UnitHead.from_parts(weight, bias, origin, shift)
    once = (rows - origin) / (rows - origin).norm(dim=1, keepdim=True)
    twice = (once - shift) / (once - shift).norm(dim=1, keepdim=True)
    torch.testing.assert_close(head(rows), twice @ weight.T + bias)
    torch.testing.assert_close(head(origin[None]), (-shift / shift.norm())[None] @ weight.T + bias)


def test_folding_a_standardisation_keeps_the_outputs() -> None:
    generator = torch.Generator().manual_seed(1)
    head = make_head("unit", 5, 3).double()
    head.randomise(generator)
    rows = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    mean, scale = torch.randn(5, generator=generator, dtype=torch.float64), torch.rand(5, dtype=torch.float64) + 0.5
    expected = head((rows - mean) / scale)
    head.fold(mean, scale)
    torch.testing.assert_close(head(rows), expected)


def test_sites_are_batched() -> None:
    head = make_head("unit", 4, 2)
    parameters = {"weight": torch.randn(3, 2, 4), "bias": torch.randn(3, 2)}
    rows = torch.randn(3, 6, 4)
    outputs = head.outputs(parameters, rows)
    for site in range(3):
        alone = {name: value[site] for name, value in parameters.items()}
        torch.testing.assert_close(outputs[site], head.outputs(alone, rows[site]))
