"""Runs whose layers learn masked words."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedhead.backbones import load_backbone
from fedhead.backbones.masked_language import MaskedLanguage, masked
from fedhead.backbones.objectives import cut
from fedhead.client.app import make_app
from fedhead.client.backbones import AcceptedBackbones
from fedhead.client.labelled_features import SiteRows
from fedhead.client.local_site import LocalSite
from fedhead.client.minibatches import shuffled
from fedhead.client.release.guard import Guard
from fedhead.client.tails import LabelledActivations, Tuning
from fedhead.client.training import train_heads
from fedhead.config import LocalConfig, RunConfig
from fedhead.data import load_samples
from fedhead.errors import UserError
from fedhead.features.tokens import TokenStore
from fedhead.heads import LinearHead, ObjectiveHead
from fedhead.model import TransferModel
from fedhead.simulations import simulate
from fedhead.tasks.losses import CrossEntropy
from fedhead.tuning import parse_tune

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

SEED, ROUND = 4, 2
SGD = LocalConfig(epochs=2, batch_size=8, lr=0.05, momentum=0.9)
CITIES = ("oslo", "rome", "lima", "cairo")
GOODS = ("fish", "oil", "wool", "rice")
UNGUARDED = {"min_class_count": 0, "min_rows": 0}


def save_model(folder: Path) -> None:
    """Write a tiny random BERT without dropout, with its tokenizer and a head for masked words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ships", "from", "to", "today", *CITIES, *GOODS]
    tokenizer = Tokenizer(models.WordLevel({name: at for at, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=20, **{f"{name}_token": one for name, one in special.items()}
    ).save_pretrained(folder)
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=len(names),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=24,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    transformers.BertForMaskedLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def cargo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and texts in which each city ships its own goods; the label is the pair."""
    folder = tmp_path_factory.mktemp("cargo")
    save_model(folder / "model")
    generator = np.random.default_rng(0)
    with (folder / "cargo.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(160):
            kind, other = generator.integers(4, size=2).tolist()
            more = ["today"] * int(generator.integers(3))
            words = [GOODS[kind], "ships", "from", CITIES[kind], "to", CITIES[other], *more]
            writer.writerow([" ".join(words), GOODS[kind]])
    return folder


def config(cargo: Path, **values: Any) -> RunConfig:
    tune = {"layers": "last:2", "objective": "mlm", "lr": 1e-3, **values.pop("tune", {})}
    table = {"data": f"csv:{cargo / 'cargo.csv'}", "sites": 2, **UNGUARDED}
    defaults = {"backbone": f"hf:{cargo / 'model'}", "tune": tune, "rounds": 2, "simulation": table}
    return RunConfig(**{**defaults, **values})


def test_masked_words_at_one_site_are_learned_as_by_transformers(cargo: Path, tmp_path: Path) -> None:
    """Plain training of `BertForMaskedLM`, all but the last two layers and its own head frozen."""
    backbone, samples = load_backbone(f"hf:{cargo / 'model'}"), load_samples(f"csv:{cargo / 'cargo.csv'}")
    made = cut(backbone, parse_tune("last:2"), "mlm", pretrained=True)
    assert isinstance(made.objective, MaskedLanguage)
    tuning = Tuning.open(made, samples, np.arange(len(samples)))
    assert isinstance(tuning.store, TokenStore)
    classes = torch.arange(len(samples)) % 4
    head = ObjectiveHead(made.objective, tuning.tail, LinearHead(backbone.num_features, 4), sequences=True)
    data = LabelledActivations(torch.zeros(len(samples), 1), classes, loss=CrossEntropy(), store=tuning.store)
    site, incoming = SiteRows("a", np.arange(3, 40)), head.trainable()
    generator = torch.Generator().manual_seed(7)
    head.seed_draws = lambda stream: head.draw_from(generator)  # type: ignore[method-assign]
    trained = train_heads(head, incoming, data, [site], SGD, seed=SEED, round_number=ROUND)

    model = transformers.BertForMaskedLM.from_pretrained(cargo / "model").eval().requires_grad_(False)
    named = dict(model.named_parameters())
    transform = "cls.predictions.transform"
    theirs = {
        **{f"tail.{name}": named[f"bert.{name}"] for name in tuning.tail.trainable()},
        "objective.dense.weight": named[f"{transform}.dense.weight"],
        "objective.dense.bias": named[f"{transform}.dense.bias"],
        "objective.norm.weight": named[f"{transform}.LayerNorm.weight"],
        "objective.norm.bias": named[f"{transform}.LayerNorm.bias"],
        "objective.bias": named["cls.predictions.bias"],
    }
    for value in theirs.values():
        value.requires_grad_()
    optimizer = torch.optim.SGD(list(theirs.values()), lr=SGD.lr, momentum=SGD.momentum)
    generator = torch.Generator().manual_seed(7)
    for epoch in range(SGD.epochs):
        order = site.rows[shuffled(SEED, site.name, ROUND, epoch, len(site.rows))]
        for start in range(0, len(order), SGD.batch_size):
            rows = order[start : start + SGD.batch_size]
            batch = backbone.batch_of([samples.read(int(row)) for row in rows])
            assert isinstance(batch, dict)
            ids, mask = batch["input_ids"], batch["attention_mask"]
            altered, chosen = masked(ids, mask, made.objective.vocabulary, generator)
            labels: Tensor = torch.where(chosen, ids, -100)
            loss = model(input_ids=altered, attention_mask=mask, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for name, value in theirs.items():
        # Softmax ignores the biases of keys, whose gradients are rounding alone.
        moved = (value.detach() - incoming[name]).norm()
        assert moved > 1e-6 or name.endswith("key.bias")
        assert (trained.parameters[name][0] - value.detach()).norm() < 1e-3 * moved + 1e-7, name


def test_words_are_learned_better_in_rounds(cargo: Path, tmp_path: Path) -> None:
    result = simulate(config(cargo, rounds=4), out=tmp_path / "run")
    losses = [one.train_loss for one in result.history[1:]]
    assert None not in losses
    assert losses[-1] < losses[0]
    assert TransferModel.load(tmp_path / "run").backbone.digest == result.model.backbone.digest
    reported = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert "objective" not in json.dumps(reported["choices"])


def test_real_sites_learn_the_same_words(cargo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "home"))
    header, *lines = (cargo / "cargo.csv").read_text(encoding="utf-8").splitlines()
    rows, apps = [range(60), range(60, 160)], {}
    for number, own in enumerate(rows):
        path = tmp_path / f"{number}.csv"
        path.write_text("\n".join([header, *(lines[row] for row in own)]) + "\n", encoding="utf-8")
        accepted = AcceptedBackbones(allow=frozenset({f"hf:{cargo / 'model'}"}))
        site = LocalSite(f"site-{number}", f"csv:{path}", "cpu", guard=Guard(0, 0), backbones=accepted)
        apps[site.name] = make_app(lambda context, site=site: site)
    run = config(cargo)
    simulated = simulate(run, f"csv:{cargo / 'cargo.csv'}", rows, out=tmp_path / "simulated")
    real = simulate(run, f"csv:{cargo / 'cargo.csv'}", rows, apps=apps, out=tmp_path / "real")
    for one, other in zip(real.history[1:], simulated.history[1:], strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-3)
        assert one.train_loss == pytest.approx(other.train_loss, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"tune": {"layers": "lora:4@last:2"}}, {"tune": {"precision": "mixed"}}])
def test_adapters_and_bfloat16_learn_words_too(cargo: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    if "lora" in str(changes):
        pytest.importorskip("peft")
    result = simulate(config(cargo, **changes), out=tmp_path / "run")
    assert result.history[2].train_loss != result.history[1].train_loss


def test_an_encoder_of_pictures_learns_no_words() -> None:
    with pytest.raises(UserError, match="masks words for a text encoder"):
        RunConfig(tune={"layers": "last:1", "objective": "mlm"})
