"""Encoder-decoders of transformers, such as T5 and BART, as language models: `hf:NAME` with the layer `next-token`.

The encoder reads the prompt, and the decoder learns the answer. Their features are those of `hf_causal`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedhead.backbones.hf_causal import NO_TARGET, ConversationPreprocessing, NextTokens
from fedhead.backbones.hf_causal_recipe import CausalRecipe
from fedhead.backbones.preprocessing import Batch
from fedhead.data import Item
from fedhead.data.conversations import Conversation, Turn
from fedhead.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS = 2**27
"""Logits that are in memory at a time, unless one conversation has more."""


class NextTargets(NextTokens):
    """An encoder-decoder that returns the loss of each answer, its tokens, and whether the conversation was cut.

    Args:
        whole: the library's model.
        spec: the backbone, for messages.

    Raises:
        UserError: if the model does not name the token that its answers start with.
    """

    def __init__(self, whole: "PreTrainedModel", spec: str) -> None:
        nn.Module.__init__(self)
        start = getattr(whole.config, "decoder_start_token_id", None)
        if not isinstance(start, int) or not 0 <= start < whole.get_input_embeddings().weight.shape[0]:
            raise UserError(f"The configuration of {spec} has no valid decoder_start_token_id, which starts answers.")
        self.model = whole
        self._causal = (whole,)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, targets: Tensor, cut: Tensor) -> Tensor:
        return answer_losses(self.model, input_ids, attention_mask, targets, cut)


def answer_losses(model: Any, ids: Tensor, mask: Tensor, targets: Tensor, cut: Tensor) -> Tensor:
    """Return `[n, 3]`, float32: summed negative log-likelihood of the answers, their tokens, and whether they were cut.

    Args:
        model: the library's encoder-decoder.
        ids: `[n, length]`, the tokens of a prompt, then those of its answer.
        mask: `[n, length]`, 0 for padding at the end.
        targets: `[n, length]`, 1 for tokens of the answer.
        cut: `[n]`.
    """
    answered = ((targets > 0) & (mask > 0)).sum(1)
    asked = (mask > 0).sum(1) - answered
    places = torch.arange(ids.shape[1], device=ids.device)
    prompts = (places < asked[:, None])[:, : int(asked.max())]
    known = (places < answered[:, None])[:, : int(answered.max())]
    wanted = (asked[:, None] + places).clamp(max=ids.shape[1] - 1)
    labels = torch.where(known, ids.gather(1, wanted)[:, : known.shape[1]], NO_TARGET)
    before = torch.full_like(labels[:, :1], int(model.config.decoder_start_token_id))
    given = torch.cat([before, labels[:, :-1]], dim=1).clamp(min=0)
    step = max(LOGITS // max(labels.shape[1] * int(model.get_output_embeddings().weight.shape[0]), 1), 1)
    total = []
    for start in range(0, len(ids), step):
        some = slice(start, start + step)
        logits = model(
            input_ids=ids[some, : prompts.shape[1]],
            attention_mask=prompts[some].long(),
            decoder_input_ids=given[some],
            use_cache=False,
            return_dict=True,
        ).logits
        values = functional.cross_entropy(
            logits.float().transpose(1, 2), labels[some], reduction="none", ignore_index=NO_TARGET
        )
        total.append(values.sum(1))
    return torch.stack([torch.cat(total), answered.to(total[0]), cut.to(total[0])], dim=1)


@dataclass(frozen=True)
class PairPreprocessing(ConversationPreprocessing):
    """Preprocessing of conversations to the token ids of a prompt and its answer.

    The texts before the last answer are the prompt, one a line.

    Attributes:
        before: the special ids before a text.
        after: the special ids after it.
    """

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @classmethod
    def of(cls, recipe: CausalRecipe) -> Self:
        """Return the preprocessing of a model.

        Raises:
            UserError: if its tokenizer cannot be read, or puts more around a text than the model takes.
        """
        from tokenizers import Tokenizer

        plain = super().of(recipe)
        own, whole = list(plain.ids_of("a")), Tokenizer.from_str(recipe.tokenizer).encode("a").ids
        start = next((at for at in range(len(whole)) if whole[at : at + len(own)] == own), 0)
        before, after = tuple(whole[:start]), tuple(whole[start + len(own) :])
        if not own or len(before) + len(after) >= recipe.max_length:
            raise UserError("The tokenizer of the model leaves no room for a text.")
        return cls(plain.ids_of, recipe, plain.digest, plain.text_of, before, after)

    def __call__(self, item: Item) -> Tensor:
        """Return `[length, 3]`, int64: ids of the prompt and the answer, 1 for the answer's, and 1 if one was cut.

        A plain text is a prompt, without an answer.

        Raises:
            UserError: for an image or numbers.
        """
        if not isinstance(item, str):
            raise UserError("This model takes conversations, but was given an image, a sound or a row of numbers.")
        turns: Sequence[Turn] = item.turns if isinstance(item, Conversation) else (("user", item),)
        *asked, (role, said) = turns
        if role != "assistant":
            asked, said = [*turns], ""
        room = self.recipe.max_length - len(self.before) - len(self.after)
        prompt = list(self.ids_of("\n".join(text.strip() for _, text in asked)))
        answer = list(self.ids_of(said.strip()))
        source = [*self.before, *prompt[-room:], *self.after] or [self.recipe.pad]
        target = [*self.before, *answer[:room], *self.after] if role == "assistant" else []
        ids = torch.tensor([*source, *target])
        learned = torch.arange(len(ids)) >= len(source)
        cut = max(len(prompt), len(answer)) > room
        return torch.stack([ids, learned.long(), torch.full_like(ids, cut)], dim=1)

    def collate(self, inputs: Sequence[Tensor]) -> Batch:
        """Return ids, mask, marks of answers `[n, length]` and the cuts `[n]`, padded at the end."""
        longest = max(len(one) for one in inputs)
        ids = torch.full((len(inputs), longest), self.recipe.pad, dtype=torch.int64)
        mask, targets = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, one in enumerate(inputs):
            ids[row, : len(one)], mask[row, : len(one)], targets[row, : len(one)] = one[:, 0], 1, one[:, 1]
        cut = torch.stack([one[0, 2] for one in inputs])
        return {"input_ids": ids, "attention_mask": mask, "targets": targets, "cut": cut}


@torch.no_grad()
def require_pairs(module: NextTargets, recipe: CausalRecipe, spec: str) -> None:
    """Check that the model knows all ids of its tokenizer, and that no token of an answer sees later ones.

    Raises:
        UserError: if not.
    """
    module.eval()
    module.causal.eval()
    most = int(module.causal.get_output_embeddings().weight.shape[0])
    if not max(*recipe.stops, recipe.first, recipe.pad, 0) < most:
        raise UserError(f"The tokenizer of {spec} has ids beyond the {most} outputs of its model.")
    source = torch.tensor([[1, 2, 3], [1, 2, 3]]) % most
    given = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]]) % most
    logits = module.causal(input_ids=source, decoder_input_ids=given, use_cache=False, return_dict=True).logits.float()
    if not torch.allclose(logits[0, :3], logits[1, :3], atol=1e-4, rtol=1e-4):
        raise UserError(f"The decoder of {spec} sees the tokens that it is to predict; choose another model.")
