"""Causal language models of transformers: `hf:NAME` with the layer `next-token`.

Their features of a conversation are the summed negative log-likelihood of its answers in nats, the number of tokens of
these, and whether the conversation was cut because it is longer than the model takes. They are what a language model is
judged by, so that a run needs no head.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fedhead.backbones import hf_building as building
from fedhead.backbones.backbone import Backbone, read_files
from fedhead.backbones.chat import encode
from fedhead.backbones.hf import local_folder, parse_name, query_of, require_safetensors, snapshot
from fedhead.backbones.hf_causal_recipe import GGUF, CausalRecipe, located, read_causal_recipe
from fedhead.backbones.hf_config import configure, first_line, quiet
from fedhead.backbones.preprocessing import Batch
from fedhead.backbones.state_dict import assign_weights, read_weights
from fedhead.data import Item, Kind
from fedhead.data.conversations import Conversation, Turn
from fedhead.data.specs import to_path
from fedhead.errors import UserError
from fedhead.extras import require
from fedhead.tuning import NEXT_TOKEN
from fedhead.wording import listed

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

NO_TARGET = -1
"""Target of a token whose successor is not learned."""

CHUNK = 512
"""Tokens whose logits are in memory at a time."""

_PROBES = (
    Conversation([("user", "Where is my card?"), ("assistant", "It is on its way.")]),
    Conversation([("user", "Naïve Bayes, 3.5 %?"), ("assistant", "Yes: the quick brown fox, twice.")]),
)
_EXACT = 1e-4


def load_causal(name: str, weights: str, seed: int) -> Backbone:
    """Build a causal model from the hub's cache, a folder or a GGUF file, whose weights are converted to float32.

    Args:
        name: as for `fedhead.backbones.hf.load`; `max_length` limits the tokens of a conversation.
        weights: `default`, the file of a saved backbone, or `random`.
        seed: seeds random weights.

    Raises:
        UserError: if it is not a causal model, or its files do not fit.
        FedheadError: if the model is not on this machine and cannot be downloaded.
    """
    plain, settings = parse_name(name)
    files = read_files(weights) if weights not in ("default", "random") else {}
    source = None if files else _source(plain, settings.revision)
    spec = f"hf:{source if source is not None and to_path(plain).exists() else plain}{query_of(settings)}"
    with quiet():
        if source is None:
            recipe = CausalRecipe.from_files(files, weights)
        else:
            recipe = read_causal_recipe(source, settings.max_length, spec)
        config = configure(recipe.config, spec, pairs=True)
        if weights == "default":
            assert source is not None
            causal = _pretrained(source, config, spec)
        else:
            causal = building.build(_class_of(config, spec), config, seed, weights if files else "", spec)
    module = _module_of(causal, recipe, spec)
    if weights not in ("default", "random"):
        assign_weights(module, read_weights(weights), set(), spec, weights)
    return Backbone(
        spec,
        module,
        _checked(module, recipe, spec),
        layer=NEXT_TOKEN,
        trained=weights != "random",
        files=recipe.to_files(),
    )


def _module_of(causal: "PreTrainedModel", recipe: CausalRecipe, spec: str) -> "NextTokens":
    if recipe.pairs:
        from fedhead.backbones.hf_seq2seq import NextTargets

        return NextTargets(causal, spec)
    return NextTokens(causal, spec)


def _checked(module: "NextTokens", recipe: CausalRecipe, spec: str) -> "ConversationPreprocessing":
    """Return the preprocessing, once the model is known to be one that learns answers.

    Raises:
        UserError: if it is not.
    """
    if recipe.pairs:
        from fedhead.backbones.hf_seq2seq import NextTargets, PairPreprocessing, require_pairs

        assert isinstance(module, NextTargets)
        require_pairs(module, recipe, spec)
        return PairPreprocessing.of(recipe)
    _require_causal(module, recipe, spec)
    return ConversationPreprocessing.of(recipe)


class NextTokens(nn.Module):
    """A causal model that returns the loss of each conversation, its learned tokens, and whether it was cut.

    Args:
        causal: the library's model.
        spec: the backbone, for messages.

    Raises:
        UserError: if the model has no output layer on top of a plain one.
    """

    pooled = False
    hidden = None

    def __init__(self, causal: "PreTrainedModel", spec: str) -> None:
        super().__init__()
        output = causal.get_output_embeddings()
        inner = causal.base_model
        if not isinstance(output, nn.Linear) or inner is causal:
            raise UserError(f"{spec} has no linear output layer over its vocabulary; choose a causal language model.")
        self.model: Any = inner
        self.output = output
        # In a tuple, so that its parameters are not registered twice; it shares them.
        self._causal = (causal,)

    @property
    def causal(self) -> "PreTrainedModel":
        """The library's model, with the same tensors."""
        return self._causal[0]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, targets: Tensor, cut: Tensor) -> Tensor:
        states = self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True).last_hidden_state
        return losses(states, self.output, targets, cut)

    def _tied(self) -> dict[str, str]:
        """Return the names of tensors that are another one's under a second name, with the first name."""
        seen: dict[int, str] = {}
        tied = {}
        for name, tensor in self.causal.state_dict().items():
            if (first := seen.setdefault(tensor.data_ptr(), name)) != name and tensor.numel():
                tied[name] = first
        return tied

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        tied = self._tied()
        return {name: tensor for name, tensor in self.causal.state_dict(*args, **kwargs).items() if name not in tied}

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        again = {name: state_dict[first] for name, first in self._tied().items() if first in state_dict}
        return self.causal.load_state_dict({**state_dict, **again}, *args, **kwargs)


def losses(states: Tensor, output: nn.Module, targets: Tensor, cut: Tensor) -> Tensor:
    """Return `[n, 3]`, float32: summed negative log-likelihood of the targets, their number, and whether it was cut.

    Args:
        states: `[n, length, d]`, after the model's last layer.
        output: maps states to logits.
        targets: `[n, length]`, the next token where it is learned, else `NO_TARGET`.
        cut: `[n]`.
    """
    learned = targets >= 0
    chosen, wanted = states[learned], targets[learned]
    rows = learned.nonzero()[:, 0]

    def some(part: Tensor, ids: Tensor) -> Tensor:
        return functional.cross_entropy(output(part).float(), ids, reduction="none")

    total = states.new_zeros(len(states), dtype=torch.float32)
    for start in range(0, len(chosen), CHUNK):
        block = slice(start, start + CHUNK)
        # Logits are as wide as the vocabulary: they are computed again for gradients rather than kept.
        values = (
            checkpoint(some, chosen[block], wanted[block], use_reentrant=False)
            if torch.is_grad_enabled()
            else some(chosen[block], wanted[block])
        )
        total = total.index_add(0, rows[block], values)
    return torch.stack([total, learned.sum(1).to(total), cut.to(total)], dim=1)


@dataclass(frozen=True)
class ConversationPreprocessing:
    """Preprocessing of conversations to token ids with targets.

    Attributes:
        ids_of: returns a text's token ids, without special ones around it.
        recipe: the model's.
        digest: of everything that the ids depend on.
        text_of: returns the text of ids, without special ones.
    """

    ids_of: Callable[[str], Sequence[int]]
    recipe: CausalRecipe
    digest: str
    text_of: Callable[[Sequence[int]], str]

    @classmethod
    def of(cls, recipe: CausalRecipe) -> Self:
        """Return the preprocessing of a model.

        Raises:
            UserError: if its tokenizer cannot be read.
        """
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_str(recipe.tokenizer)
        # The library raises a plain exception.
        except Exception as error:
            raise UserError(f"The tokenizer of the model cannot be read: {first_line(error)}") from None
        tokenizer.no_padding()
        tokenizer.no_truncation()

        def ids_of(text: str) -> Sequence[int]:
            # Half of a surrogate pair, as in damaged JSON, is not a valid character for a tokenizer.
            ids: list[int] = tokenizer.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False).ids
            return ids

        files = recipe.to_files()
        what = f"{files['tokenizer.json']} {files['generation.json']}"
        return cls(ids_of, recipe, hashlib.sha256(what.encode()).hexdigest(), tokenizer.decode)

    @property
    def kind(self) -> Kind:
        """Always "text"."""
        return "text"

    def __call__(self, item: Item) -> Tensor:
        """Return `[length, 3]`, int64: token ids, 1 for those of answers, and 1 if the conversation was cut.

        A plain text is what a user says before an answer.

        Raises:
            UserError: for an image or numbers.
        """
        if not isinstance(item, str):
            raise UserError("This model takes conversations, but was given an image, a sound or a row of numbers.")
        turns: Sequence[Turn] = item.turns if isinstance(item, Conversation) else (("user", item),)
        recipe = self.recipe
        parts = recipe.chat.parts(turns)
        made = encode(parts, self.ids_of, recipe.first, recipe.max_length - len(recipe.leading))
        ids = torch.tensor([*recipe.leading, *made.ids])
        learned = torch.tensor([*[False] * len(recipe.leading), *made.learned])
        return torch.stack([ids, learned.long(), torch.full_like(ids, made.cut)], dim=1)

    def collate(self, inputs: Sequence[Tensor]) -> Batch:
        """Return ids, mask, targets `[n, length]` and the cuts `[n]`, padded at the end."""
        longest = max(len(one) for one in inputs)
        ids = torch.full((len(inputs), longest), self.recipe.pad, dtype=torch.int64)
        mask, targets = torch.zeros_like(ids), torch.full_like(ids, NO_TARGET)
        for row, one in enumerate(inputs):
            ids[row, : len(one)] = one[:, 0]
            mask[row, : len(one)] = 1
            targets[row, : len(one) - 1] = torch.where(one[1:, 1] == 1, one[1:, 0], NO_TARGET)
        cut = torch.stack([one[0, 2] for one in inputs])
        return {"input_ids": ids, "attention_mask": mask, "targets": targets, "cut": cut}

    def probes(self) -> Sequence[Item]:
        """Return short conversations."""
        return _PROBES

    def describe(self) -> dict[str, Any]:
        """Return the digest."""
        return {"conversations": self.digest}


def _source(name: str, revision: str | None) -> Path:
    """Return the folder of a model, or its GGUF file."""
    if not name.endswith(GGUF):
        return local_folder(name) or snapshot(name, revision)
    path = to_path(name)
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    require("gguf", "gguf", f"Reading {path.name}")
    return path.resolve()


def _pretrained(source: Path, config: "PreTrainedConfig", spec: str) -> "PreTrainedModel":
    cls = _class_of(config, spec)
    folder, options = located(source)
    if not options:
        require_safetensors(folder, spec)
        options = {"use_safetensors": True}
    try:
        causal, found = cls.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            output_loading_info=True,
            dtype=torch.float32,
            **options,
        )
    # Damaged files and wrong shapes raise many kinds of errors.
    except Exception as error:
        raise UserError(f"The weights of {spec} in {source} cannot be read: {first_line(error)}") from None
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"The weights of {spec} in {source} lack {listed(missing, 4)}: it is no causal language model.")
    model: PreTrainedModel = causal
    return model


def _class_of(config: "PreTrainedConfig", spec: str) -> Any:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    )

    try:
        if config.is_encoder_decoder:
            return MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[type(config)]
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        raise UserError(
            f"{spec} ({config.model_type}) is no causal language model; take one that continues texts, such as a "
            "Llama, Qwen or SmolLM."
        ) from None


@torch.no_grad()
def _require_causal(module: NextTokens, recipe: CausalRecipe, spec: str) -> None:
    """Check that no token sees later ones, and that losses are those of the library's own logits.

    Raises:
        UserError: if not.
    """
    module.eval()
    module.causal.eval()
    most = int(module.output.weight.shape[0])
    if not max(*recipe.leading, *recipe.stops, recipe.first, recipe.pad) < most:
        raise UserError(f"The tokenizer of {spec} has ids beyond the {most} outputs of its model.")
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]]) % most
    mask = torch.ones_like(ids)
    logits = module.causal(input_ids=ids, attention_mask=mask, return_dict=True).logits.float()
    if not torch.allclose(logits[0, :3], logits[1, :3], atol=_EXACT, rtol=_EXACT):
        raise UserError(f"{spec} reads texts in both directions: it is no causal language model.")
    states = module.model(input_ids=ids, attention_mask=mask, return_dict=True).last_hidden_state
    if not torch.allclose(module.output(states).float(), logits, atol=_EXACT, rtol=_EXACT):
        raise UserError(f"{spec} changes the outputs of its last layer before they are used; it is not supported yet.")
