"""Answers of a language model to prompts."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from fedhead.backbones import Backbone
from fedhead.backbones.hf_causal import ConversationPreprocessing
from fedhead.data import Samples, UnreadableSampleError
from fedhead.data.conversations import CONVERSATION, Conversation, Turn
from fedhead.errors import UserError
from fedhead.model import TransferModel

logger = logging.getLogger(__name__)

MOST_BEAMS = 64
"""Limit on the answers that are continued side by side."""


def questions(samples: Samples) -> Iterator[tuple[list[Turn], str]]:
    """Yield of each conversation the turns before its last answer, and this answer; unreadable ones are logged.

    Raises:
        UserError: if the data holds no conversations.
    """
    if samples.annotated != CONVERSATION:
        raise UserError(
            f"{samples.spec} holds no conversations. Name a file of JSON lines with messages, or with prompt and "
            "completion, as in jsonl:questions.jsonl."
        )
    for row in range(len(samples)):
        try:
            talk = samples.read(row)
        except UnreadableSampleError as error:
            logger.warning("%s It is skipped.", error)
            continue
        assert isinstance(talk, Conversation)
        *asked, (_, answer) = talk.turns
        yield asked, answer


def generate(
    model: TransferModel,
    prompts: str | Iterable[str | Sequence[Turn]],
    *,
    system: str = "",
    max_tokens: int = 128,
    temperature: float = 0.0,
    beams: int = 1,
    seed: int = 0,
) -> Iterator[str]:
    """Yield an answer to each prompt; a single text is one prompt.

    Args:
        model: of the task `generation`.
        prompts: a text of the user, or the turns of a conversation that ends with one.
        system: a text that tells the model how to answer; empty for the model's own.
        max_tokens: the largest number of tokens of an answer.
        temperature: 0 for the most probable token each time; otherwise tokens are drawn, at 1 by their probabilities.
        beams: the number of answers that are continued side by side, of which the most probable one is returned.
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
    if not 1 <= beams <= MOST_BEAMS:
        raise UserError(f"The number of beams is from 1 to {MOST_BEAMS}, not {beams}.")
    if temperature and beams > 1:
        raise UserError("Beams look for the most probable answer: leave the temperature at 0, or beams at 1.")
    for number, prompt in enumerate([prompts] if isinstance(prompts, str) else prompts):
        turns: list[Turn] = [("user", prompt)] if isinstance(prompt, str) else list(prompt)
        if system and turns[0][0] != "system":
            turns.insert(0, ("system", system))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + number)
            yield _answer(model.backbone, preprocessing, turns, max_tokens, temperature, beams)


@torch.inference_mode()
def _answer(
    backbone: Backbone,
    preprocessing: ConversationPreprocessing,
    turns: Sequence[Turn],
    max_tokens: int,
    temperature: float,
    beams: int,
) -> str:
    recipe, module = preprocessing.recipe, backbone.module
    ids = preprocessing(Conversation(turns))[:, 0]
    # An encoder reads the prompt on its own.
    read = 0 if recipe.pairs else len(ids[-(recipe.max_length - max_tokens) :])
    ids = ids[-read:][None].to(backbone.device)
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
        num_beams=beams,
        **({"decoder_start_token_id": recipe.first} if recipe.pairs else {}),
        **drawn,
    )
    return preprocessing.text_of(made[0, read:].tolist()).strip()
