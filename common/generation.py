"""Answers of a language model to prompts."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from fedhead.backbones import Backbone
from fedhead.backbones.hf_causal import ConversationPreprocessing
from fedhead.data.conversations import Conversation, Turn
from fedhead.errors import UserError
from fedhead.model import TransferModel


def generate(
    model: TransferModel,
    prompts: str | Iterable[str | Sequence[Turn]],
    *,
    system: str = "",
    max_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[str]:
    """Yield an answer to each prompt; a single text is one prompt.

    Args:
        model: of the task `generation`.
        prompts: a text of the user, or the turns of a conversation that ends with one.
        system: a text that tells the model how to answer; empty for the model's own.
        max_tokens: the largest number of tokens of an answer.
        temperature: 0 for the most probable token each time; otherwise tokens are drawn, at 1 by their probabilities.
        seed: of the draws.

    Raises:
        UserError: if the model does not generate texts, or a value is out of range.
    """
    preprocessing = model.backbone.preprocessing
    if not isinstance(preprocessing, ConversationPreprocessing):
        raise UserError(f"This model is {model.task.description}: it does not generate texts. Use fedhead predict.")
    longest = preprocessing.recipe.max_length
    if not 0 < max_tokens < longest:
        raise UserError(f"Answers of this model have 1 to {longest - 1} tokens, not {max_tokens}.")
    if not 0 <= temperature <= 100:
        raise UserError(f"The temperature is from 0 to 100, not {temperature:g}.")
    for number, prompt in enumerate([prompts] if isinstance(prompts, str) else prompts):
        turns: list[Turn] = [("user", prompt)] if isinstance(prompt, str) else list(prompt)
        if system and turns[0][0] != "system":
            turns.insert(0, ("system", system))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + number)
            yield _answer(model.backbone, preprocessing, turns, max_tokens, temperature)


@torch.inference_mode()
def _answer(
    backbone: Backbone,
    preprocessing: ConversationPreprocessing,
    turns: Sequence[Turn],
    max_tokens: int,
    temperature: float,
) -> str:
    recipe, module = preprocessing.recipe, backbone.module
    room = recipe.max_length - max_tokens
    ids = preprocessing(Conversation(turns))[:, 0][-room:][None].to(backbone.device)
    drawn: dict[str, Any] = (
        {"do_sample": True, "temperature": float(temperature)} if temperature else {"do_sample": False}
    )
    causal: Any = module.causal
    made = causal.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_tokens,
        eos_token_id=list(recipe.stops) or None,
        pad_token_id=recipe.pad,
        use_cache=True,
        **drawn,
    )
    return preprocessing.text_of(made[0, ids.shape[1] :].tolist()).strip()
