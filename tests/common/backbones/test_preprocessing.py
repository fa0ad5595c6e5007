import pytest
import torch
from PIL import Image

from fedhead.backbones import ImagePreprocessing, TextPreprocessing
from fedhead.backbones.preprocessing import PROBES
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
