"""Masked language modelling, against the models of transformers with their own heads."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from fedhead.backbones import Backbone, load_backbone
from fedhead.backbones.masked_language import MaskedLanguage, Vocabulary, masked
from fedhead.backbones.objectives import cut
from fedhead.errors import UserError
from fedhead.tuning import parse_tune

transformers = pytest.importorskip("transformers")

WORDS = ("where", "is", "my", "card", "how", "long", "does", "a", "transfer", "take", "and", "what", "yet")
SIZE = {"vocab_size": 40, "max_position_embeddings": 48}
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}


def save_tokenizer(folder: Path, *, mask: bool = True) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(["[MASK]"] if mask else []), *WORDS]
    tokenizer = Tokenizer(models.WordLevel({name: at for at, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    named = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    if mask:
        named["mask_token"] = "[MASK]"
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=40, **named).save_pretrained(
        folder
    )


def save_model(folder: Path, name: str, *, with_head: bool = True, mask: bool = True) -> Any:
    configs: dict[str, Any] = {
        "bert": lambda: transformers.BertConfig(**SIZE, **SMALL),
        "roberta": lambda: transformers.RobertaConfig(**SIZE, **SMALL, pad_token_id=0),
        "distilbert": lambda: transformers.DistilBertConfig(
            **SIZE, dim=16, hidden_dim=24, n_layers=3, n_heads=2, pad_token_id=0
        ),
    }
    torch.manual_seed(1)
    config = configs[name]()
    model = transformers.AutoModelForMaskedLM.from_config(config).eval()
    with torch.no_grad():
        for one in model.parameters():
            one.add_(0.05 * torch.randn(one.shape))
    saved = model if with_head else model.base_model
    saved.save_pretrained(folder)
    save_tokenizer(folder, mask=mask)
    return model


def objective_of(backbone: Backbone, layers: str = "last:2") -> MaskedLanguage:
    made = cut(backbone, parse_tune(layers), "mlm", pretrained=True).objective
    assert isinstance(made, MaskedLanguage)
    return made


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_scores_of_words_are_those_of_the_pretrained_head(tmp_path: Path, name: str) -> None:
    model = save_model(tmp_path, name)
    backbone = load_backbone(f"hf:{tmp_path}")
    made = cut(backbone, parse_tune("last:2"), "mlm", pretrained=True)
    assert isinstance(made.objective, MaskedLanguage)
    batch = backbone.batch_of(["where is my card", "how long does a transfer take and what", "yet"])
    assert isinstance(batch, dict)
    states = made.split.tail.states({}, *made.split.trunk.boundary(batch))
    own = {f"objective.{key}": value for key, value in made.objective.trainable().items()}
    with torch.no_grad():
        expected = model(**batch).logits
        found = made.objective.scores(own, states)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)


def test_an_encoder_without_a_head_starts_from_its_word_embeddings(tmp_path: Path) -> None:
    model = save_model(tmp_path, "bert", with_head=False)
    objective = objective_of(load_backbone(f"hf:{tmp_path}"))
    own = objective.trainable()
    assert torch.equal(own["dense.weight"], torch.eye(16))
    states = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    expected = functional.layer_norm(functional.gelu(states), (16,), eps=1e-12) @ model.get_input_embeddings().weight.T
    found = objective.scores({f"objective.{key}": value for key, value in own.items()}, states)
    torch.testing.assert_close(found, expected.detach())


def test_random_weights_leave_the_pretrained_head_out(tmp_path: Path) -> None:
    save_model(tmp_path, "bert")
    objective = objective_of(load_backbone(f"hf:{tmp_path}", weights="random"))
    assert torch.equal(objective.trainable()["dense.weight"], torch.eye(16))


def test_a_site_looks_into_no_folder_for_a_head(tmp_path: Path) -> None:
    save_model(tmp_path, "bert")
    backbone = load_backbone(f"hf:{tmp_path}")
    objective = cut(backbone, parse_tune("last:2"), "mlm").objective
    assert objective is not None
    assert torch.equal(objective.trainable()["dense.weight"], torch.eye(16))


def test_tokens_are_altered_as_in_bert() -> None:
    vocabulary = Vocabulary(1000, 4, torch.tensor([0, 1, 2, 3, 4]), 0)
    ids = torch.randint(5, 1000, (400, 50), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, 49] = 2, 3
    mask = torch.ones_like(ids)
    mask[:, 40:] = 0
    altered, chosen = masked(ids, mask, vocabulary, torch.Generator().manual_seed(1))
    assert not bool(chosen[:, 0].any() | chosen[:, 40:].any())
    assert torch.equal(altered[~chosen], ids[~chosen])
    assert float(chosen[:, 1:40].float().mean()) == pytest.approx(0.15, abs=0.01)
    fates = altered[chosen]
    assert float((fates == 4).float().mean()) == pytest.approx(0.8, abs=0.03)
    assert float((fates == ids[chosen]).float().mean()) == pytest.approx(0.1, abs=0.03)


def test_models_without_masked_words_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path, "bert", mask=False)
    with pytest.raises(UserError, match="no mask token"):
        cut(load_backbone(f"hf:{tmp_path}"), parse_tune("last:1"), "mlm")
    with pytest.raises(UserError, match="masks the words of texts"):
        cut(load_backbone("bundled:glyphnet"), parse_tune("last:1"), "mlm")
