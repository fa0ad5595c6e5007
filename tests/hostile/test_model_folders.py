"""A model folder from a stranger, whose adapters refer to pretrained weights by digest."""

import copy
from pathlib import Path

import pytest
import torch

from fedhead.backbones import load_backbone
from fedhead.backbones.split import split
from fedhead.backbones.tail_file import TAIL_FILE, save_tail
from fedhead.features.store import store_key
from fedhead.heads import make_delivered
from fedhead.model import MODEL_FILE, TransferModel
from fedhead.tuning import parse_tune

pytest.importorskip("peft")


def test_an_adapted_backbone_does_not_pass_for_the_pretrained_one(tmp_path: Path) -> None:
    """Its features would otherwise be cached as those of a backbone that sites accept."""
    base = load_backbone("bundled:glyphnet")
    tail = split(base, parse_tune("lora:2@last:1")).tail
    save_tail(tmp_path / TAIL_FILE, tail, {name: torch.randn_like(one) for name, one in tail.trainable().items()})
    claimed = copy.copy(base)
    claimed.__dict__.update(digest=base.digest, weights_digest="0" * 64)
    head = make_delivered("linear", base.num_features, 2)
    TransferModel(claimed, head, ["a", "b"]).save(tmp_path / MODEL_FILE)
    loaded = TransferModel.load(tmp_path).backbone
    assert not torch.equal(loaded.probe(), base.probe())
    assert loaded.digest != base.digest
    assert loaded.weights_digest != base.weights_digest
    assert store_key(loaded, "data", "float32") != store_key(base, "data", "float32")
