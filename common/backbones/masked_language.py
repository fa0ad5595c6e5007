"""Masked language modelling of a tail of a text encoder (BERT; Devlin et al., 2019)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional

from fedhead.backbones.backbone import Backbone
from fedhead.backbones.preprocessing import TextPreprocessing
from fedhead.backbones.split import Split
from fedhead.errors import UserError
from fedhead.heads.objectives import Judged, Objective

if TYPE_CHECKING:
    from fedhead.heads.tail import TunedHead

CHOSEN = 0.15
"""Share of a text's tokens that are predicted."""
MASKED, REPLACED = 0.8, 0.1
"""Shares of these that become the mask token, or any other token; the rest stay as they are."""

_MASK_TOKENS = ("[MASK]", "<mask>")

_PRETRAINED = (
    ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions"),
    ("lm_head.dense", "lm_head.layer_norm", "lm_head"),
    ("vocab_transform", "vocab_layer_norm", "vocab_projector"),
)
"""Names of the parts of a pretrained head in BERT, in RoBERTa and MPNet, and in DistilBERT."""


class Vocabulary(NamedTuple):
    """The tokens of a tokenizer that masking needs.

    Attributes:
        size: of the word embeddings.
        mask: the id of the mask token.
        special: `[k]`, the ids that are never predicted.
        pad: the id of padding.
    """

    size: int
    mask: int
    special: Tensor
    pad: int


class MaskedLanguage(Objective):
    """Masked words are predicted from the others, without labels.

    The whole encoder runs on the altered texts, the frozen layers without gradients. Words are predicted by a dense
    layer with GELU and layer norm, and the encoder's own word embeddings, which stay as they are. The dense layer
    starts as in the encoder's weights if these hold a pretrained head, else as the identity.

    Args:
        parts: a cut text encoder.
        words: `[V, d]`, its word embeddings.
        vocabulary: of its tokenizer.
        epsilon: of its layer norms.
        pretrained: the parameters of a pretrained head, if any.
    """

    takes_tokens = True

    def __init__(
        self, parts: Split, words: Tensor, vocabulary: Vocabulary, epsilon: float, pretrained: Mapping[str, Tensor]
    ) -> None:
        self._trunk, self._tail = parts
        self._words = words
        self.vocabulary = vocabulary
        self._epsilon = epsilon
        width = words.shape[1]
        self._own = {
            "dense.weight": torch.eye(width),
            "dense.bias": torch.zeros(width),
            "norm.weight": torch.ones(width),
            "norm.bias": torch.zeros(width),
            "bias": torch.zeros(len(words)),
        }
        self._own |= {name: value for name, value in pretrained.items() if value.shape == self._own[name].shape}

    def trainable(self) -> dict[str, Tensor]:
        return dict(self._own)

    def judge(
        self,
        head: "TunedHead",
        parameters: Mapping[str, Tensor],
        activations: Tensor,
        targets: Tensor,
        generator: torch.Generator,
    ) -> Judged:
        with torch.no_grad():
            plain = head.embed(parameters, activations)
        mask, ids = activations[..., -2].long(), activations[..., -1].long()
        ids = torch.where(mask > 0, ids, self.vocabulary.pad)
        altered, chosen = masked(ids, mask, self.vocabulary, generator)
        if not bool(chosen.any()):
            return Judged(plain.new_zeros(()).requires_grad_(), plain)
        values, seen = self._trunk.boundary({"input_ids": altered, "attention_mask": mask})
        states = self._tail.states(head.tail_values(parameters), values, seen)
        scores = self.scores(parameters, states[chosen])
        return Judged(functional.cross_entropy(scores.float(), ids[chosen]), plain)

    def scores(self, parameters: Mapping[str, Tensor], states: Tensor) -> Tensor:
        """Return logits `[n, V]` of words, given hidden states `[n, d]`."""
        own = {name.removeprefix("objective."): value for name, value in parameters.items()}
        hidden = functional.gelu(functional.linear(states, own["dense.weight"], own["dense.bias"]))
        normed = functional.layer_norm(
            hidden, hidden.shape[-1:], own["norm.weight"], own["norm.bias"], eps=self._epsilon
        )
        return functional.linear(normed, self._words.to(normed), own["bias"])


def masked(ids: Tensor, mask: Tensor, vocabulary: Vocabulary, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return texts with altered tokens, and the tokens to predict.

    Args:
        ids: `[n, length]`.
        mask: `[n, length]`, 0 for padding.
        vocabulary: of the tokenizer.
        generator: on the CPU.
    """
    drawn, fate = (torch.rand(ids.shape, generator=generator).to(ids.device) for _ in range(2))
    others = torch.randint(vocabulary.size, ids.shape, generator=generator).to(ids.device)
    chosen = (drawn < CHOSEN) & (mask > 0) & ~torch.isin(ids, vocabulary.special.to(ids.device))
    altered = torch.where(chosen & (fate < MASKED), vocabulary.mask, ids)
    return torch.where(chosen & (fate >= 1 - REPLACED), others, altered), chosen


def masked_language(backbone: Backbone, parts: Split, *, pretrained: bool) -> MaskedLanguage:
    """Return the objective for a cut encoder.

    Args:
        backbone: the whole.
        parts: its two parts.
        pretrained: whether to start from the head in the encoder's files, if they hold one.

    Raises:
        UserError: if it is no text encoder with a mask token, or has no hidden states of single tokens.
    """
    if backbone.kind != "text" or not backbone.spec.startswith("hf:"):
        raise UserError(
            f"The objective 'mlm' masks the words of texts, which {backbone.spec} does not take as a text encoder "
            "hf:NAME does; choose 'simsiam', or leave tune.objective out."
        )
    encoder: Any = backbone.module
    words: Tensor = encoder.model.get_input_embeddings().weight.detach()
    vocabulary = _vocabulary(backbone, len(words))
    with torch.no_grad():
        states = parts.tail.states({}, *parts.trunk.boundary(backbone.probe_batch()))
    if states.ndim != 3 or states.shape[-1] != words.shape[1]:
        raise UserError(
            f"The objective 'mlm' predicts words from hidden states as wide as their embeddings, {words.shape[1]} "
            f"values; the layers of {backbone.spec} give {list(states.shape[1:])} for a text. Choose 'simsiam'."
        )
    epsilon = float(getattr(encoder.model.config, "layer_norm_eps", 1e-12))
    head = _pretrained(backbone) if pretrained and backbone.trained else {}
    return MaskedLanguage(parts, words, vocabulary, epsilon, head)


def _vocabulary(backbone: Backbone, size: int) -> Vocabulary:
    try:
        added = json.loads(backbone.files["tokenizer.json"])["added_tokens"]
        special = {str(one["content"]): int(one["id"]) for one in added if one["special"]}
    except (KeyError, TypeError, ValueError):
        special = {}
    found = [special[name] for name in _MASK_TOKENS if name in special]
    if not found or found[0] >= size:
        raise UserError(
            f"The tokenizer of {backbone.spec} has no mask token, which masked words need; choose "
            "'simsiam', or leave tune.objective out."
        )
    preprocessing = backbone.preprocessing
    pad = preprocessing.pad if isinstance(preprocessing, TextPreprocessing) else 0
    return Vocabulary(size, found[0], torch.tensor(sorted(special.values())), pad)


def _pretrained(backbone: Backbone) -> dict[str, Tensor]:
    """Return the head in the encoder's files, if they are on this machine and hold one."""
    from fedhead.backbones.hf import folder_here

    folder = folder_here(backbone.spec.partition(":")[2])
    if folder is None:
        return {}
    for dense, norm, output in _PRETRAINED:
        wanted = {
            f"{dense}.weight": "dense.weight",
            f"{dense}.bias": "dense.bias",
            f"{norm}.weight": "norm.weight",
            f"{norm}.bias": "norm.bias",
            f"{output}.bias": "bias",
            f"{output}.decoder.bias": "bias",
        }
        found = {wanted[name]: value for name, value in _read(folder, set(wanted)).items()}
        if len(found) == len(set(wanted.values())):
            return found
    return {}


def _read(folder: Path, names: set[str]) -> dict[str, Tensor]:
    """Return the named tensors of a folder's weights, float32."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name).float() for name in names & set(file.keys())}
    return found
