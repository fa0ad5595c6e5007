import pytest
import torch
from PIL import Image

from fedhead.backbones import ImagePreprocessing, TextPreprocessing
from fedhead.backbones.preprocessing import PROBES
from fedhead.errors import UserError

LETTERS = TextPreprocessing(lambda text: list(text.encode()), "letters", pad=7)
GREY = ImagePreprocessing(1, (4, 4), None, (0.5,), (0.5,))


def test_texts_are_padded_with_a_mask() -> None:
    batch = LETTERS.collate([LETTERS("abc"), LETTERS(""), LETTERS("d")])
    assert isinstance(batch, dict)
    assert batch["input_ids"].tolist() == [[97, 98, 99], [7, 7, 7], [100, 7, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 0], [1, 0, 0]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    nothing = LETTERS.collate([LETTERS("")])
    assert isinstance(nothing, dict)
    assert nothing["input_ids"].tolist() == [[7]]


def test_item_of_another_kind_is_rejected() -> None:
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


def test_long_strip_is_cropped_before_enlarging() -> None:
    strip = Image.linear_gradient("L").resize((1, 40_000), Image.Resampling.BILINEAR).convert("RGB")
    made = ImagePreprocessing(3, 256, (224, 224), (0.5,) * 3, (0.5,) * 3)(strip)
    assert made.shape == (3, 224, 224)
    assert made.abs().max() < 0.02
    sideways = ImagePreprocessing(3, 256, (224, 224), (0.5,) * 3, (0.5,) * 3)(
        strip.transpose(Image.Transpose.ROTATE_90)
    )
    torch.testing.assert_close(sideways.abs().max(), made.abs().max(), atol=1e-2, rtol=0)
