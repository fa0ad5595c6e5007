import gzip
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedhead.backbones import load_backbone
from fedhead.backbones.vectors import read_vectors
from fedhead.backbones.weights import find_backbone
from fedhead.errors import UserError

GLOVE = "the 1 0 0.5\ncat 0 1 -1e-1\n. . . 9 9 9\nUS 4 4 4\nus 5 5 5\nwell 2 2 2\n? 0 0 1\nthe 7 7 7\n"


@pytest.fixture
def glove(tmp_path: Path) -> Path:
    path = tmp_path / "glove.txt"
    path.write_text(GLOVE)
    return path


def test_text_equals_mean_of_its_known_words(glove: Path) -> None:
    backbone = load_backbone(f"vectors:{glove}")
    assert (backbone.kind, backbone.num_features) == ("text", 3)
    texts = ["The cat?", "the unheard-of cat", "US and us", "well-cat", "nothing known", ""]
    expected = [
        [1 / 3, 1 / 3, 1.4 / 3],
        [0.5, 0.5, 0.2],
        [4.5, 4.5, 4.5],
        [1.0, 1.5, 0.95],
        [0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0],
    ]
    torch.testing.assert_close(backbone.features_of(texts), torch.tensor(expected))
    alone = torch.cat([backbone.features_of([text]) for text in texts])
    torch.testing.assert_close(alone, torch.tensor(expected))


@pytest.mark.parametrize("form", ["glove", "word2vec", "gzip", "windows"])
def test_every_form_of_the_file_gives_equal_vectors(glove: Path, form: str) -> None:
    path = glove.with_name(f"vectors.{'gz' if form == 'gzip' else 'txt'}")
    text = {"word2vec": f"8 3\n{GLOVE}", "windows": GLOVE.replace("\n", " \r\n")}.get(form, GLOVE)
    path.write_bytes(gzip.compress(text.encode()) if form == "gzip" else text.encode())
    words, table = read_vectors(path)
    assert words == ["the", "cat", ". . .", "US", "us", "well", "?"]
    assert torch.equal(table, read_vectors(glove)[1])
    assert table[:3].tolist() == [[1, 0, 0.5], [0, 1, pytest.approx(-0.1)], [9, 9, 9]]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "contains no word vectors"),
        (b"2 3\n", "contains no word vectors"),
        (b"the 1 2 3\ncat 1 2\n", "Line 2 of .* is not a word with 3 numbers"),
        (b"the 1 2 3\ncat 1 2 x\n", "Line 2 of"),
        (b"the 1 2 3\ncat 1 nan 2\n", "Line 2 of"),
        (b"the 1 2 3\n 1 2 3\n", "Line 2 of"),
        (b"the 1 2 3\n\ncat 1 2 3\n", "Line 2 of"),
        (b"1 4\nthe 1 2 3\n", "Line 2 of .* with 4 numbers"),
        (b"the\n", "Line 1 of"),
        (b"the 1 2 3\nM\xfcller 1 2 3\n", "Line 2 of .* is not in UTF-8"),
    ],
)
def test_error_names_line_of_a_broken_file(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "vectors.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        load_backbone(f"vectors:{path}")


def test_errors_for_damaged_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "vectors.gz"
    path.write_bytes(gzip.compress(GLOVE.encode() * 50)[:-30])
    with pytest.raises(UserError, match="cannot be read after line"):
        load_backbone(f"vectors:{path}")
    path.write_text(GLOVE)
    with pytest.raises(UserError, match="cannot be read after line 0"):
        load_backbone(f"vectors:{path}")
    with pytest.raises(UserError, match="There is no file"):
        load_backbone(f"vectors:{tmp_path / 'none.txt'}")
    with pytest.raises(UserError, match="only the layer"):
        load_backbone(f"vectors:{path}", layer="hidden:1")
    with pytest.raises(UserError, match="are useless"):
        load_backbone(f"vectors:{path}", weights="random")


def test_site_without_the_file_receives_words_and_vectors(
    glove: Path, install_weights: Callable[[bytes, str], Path]
) -> None:
    backbone = load_backbone(f"vectors:{glove}")
    glove.unlink()
    assert find_backbone(backbone.spec, "penultimate", backbone.weights_digest) is None
    install_weights(backbone.to_bytes(), backbone.weights_digest)
    found = find_backbone(backbone.spec, "penultimate", backbone.weights_digest)
    assert found is not None
    assert found.digest == backbone.digest
    assert torch.equal(found.features_of(["the cat"]), backbone.features_of(["the cat"]))


def test_digest_covers_the_words(glove: Path) -> None:
    before = load_backbone(f"vectors:{glove}")
    glove.write_text(GLOVE.replace("cat", "dog"))
    after = load_backbone(f"vectors:{glove}")
    assert before.weights_digest != after.weights_digest
    assert before.digest != after.digest


def test_other_weights_are_rejected(glove: Path, tmp_path: Path) -> None:
    load_backbone("bundled:glyphnet").save(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="not a saved backbone of word vectors"):
        load_backbone(f"vectors:{glove}", weights=str(tmp_path / "other.safetensors"))
