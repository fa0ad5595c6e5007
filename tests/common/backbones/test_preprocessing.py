import pytest
import torch
from PIL import Image

from fedhead.backbones import ImagePreprocessing, TextPreprocessing
from fedhead.backbones.preprocessing import PROBES, masked_mean
from fedhead.errors import UserError

LETTERS = TextPreprocessing(lambda text: list(text.encode()), "letters", pad=7)
GREY = ImagePreprocessing(1, (4, 4), None, (0.5,), (0.5,))


def test_texts_are_padded_to_the_longest_and_the_mask_says_where() -> None:
    batch = LETTERS.collate([LETTERS("abc"), LETTERS(""), LETTERS("d")])
    assert isinstance(batch, dict)
    assert batch["input_ids"].tolist() == [[97, 98, 99], [7, 7, 7], [100, 7, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 0], [1, 0, 0]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    nothing = LETTERS.collate([LETTERS("")])
    assert isinstance(nothing, dict)
    assert nothing["input_ids"].tolist() == [[7]]


def test_the_masked_mean_reads_no_padding() -> None:
    sequences = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]])
    sequences[mask == 0] = torch.inf
    sequences[1] = 5
    assert torch.allclose(masked_mean(sequences[1:], mask[1:]), torch.zeros(1, 3))
    finite = sequences.where(mask.unsqueeze(-1) == 1, torch.tensor(9.0))
    assert torch.allclose(masked_mean(finite, mask)[0], sequences[0, :2].mean(0))


def test_an_item_of_the_other_kind_is_refused() -> None:
    with pytest.raises(UserError, match="takes texts"):
        LETTERS(Image.new("L", (4, 4)))
    with pytest.raises(UserError, match="takes images"):
        GREY("a text")


@pytest.mark.parametrize("preprocessing", [LETTERS, GREY])
def test_probes_are_fixed_and_of_the_kind(preprocessing: TextPreprocessing | ImagePreprocessing) -> None:
    probes = preprocessing.probes()
    assert len(probes) == PROBES
    assert list(probes) == list(preprocessing.probes())
    inputs = [preprocessing(item) for item in probes]
    assert preprocessing.kind == "image" or len(inputs[0]) != len(inputs[1])
