"""Recipe of a causal language model: everything besides its weights, read from its folder without executing code."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from fedhead.backbones.chat import ChatForm
from fedhead.backbones.hf_config import UNREAD, architecture, first_line
from fedhead.backbones.hf_recipe import MAX_LENGTH, longest_text
from fedhead.data.conversations import Turn
from fedhead.errors import UserError

GGUF = ".gguf"

LEAST_LENGTH = 8
"""Smallest limit of tokens."""


@dataclass(frozen=True)
class CausalRecipe:
    """Everything besides the weights of a causal model; it is sent with the weights.

    Attributes:
        config: the architecture, as in `config.json`.
        tokenizer: as in `tokenizer.json`.
        chat: the texts around turns.
        max_length: the limit of tokens of a conversation.
        leading: the ids before every conversation.
        first: the id before an answer that nothing else precedes.
        pad: the padding id.
        stops: the ids that end an answer.
    """

    config: Mapping[str, Any]
    tokenizer: str
    chat: ChatForm
    max_length: int
    leading: tuple[int, ...]
    first: int
    pad: int
    stops: tuple[int, ...]

    @property
    def pairs(self) -> bool:
        """Whether an encoder reads the prompt, and a decoder writes the answer."""
        return bool(self.config.get("is_encoder_decoder"))

    def to_files(self) -> dict[str, str]:
        """Return texts for `from_files`."""
        own = {key: value for key, value in asdict(self).items() if key not in ("config", "tokenizer")}
        files = {"config.json": self.config, "generation.json": own}
        return {
            **{name: json.dumps(values, sort_keys=True) for name, values in files.items()},
            "tokenizer.json": self.tokenizer,
        }

    @classmethod
    def from_files(cls, files: Mapping[str, str], path: str) -> Self:
        """Undo `to_files`, which may come from another machine.

        Raises:
            UserError: if the files are invalid.
        """
        try:
            own = json.loads(files["generation.json"])
            chat = ChatForm(**own.pop("chat"))
            texts = [value for value in asdict(chat).values() if value is not None]
            made = cls(
                architecture(files["config.json"]),
                files["tokenizer.json"],
                chat,
                int(own.pop("max_length")),
                tuple(map(int, own.pop("leading"))),
                int(own.pop("first")),
                int(own.pop("pad")),
                tuple(map(int, own.pop("stops"))),
            )
            if own or not all(isinstance(text, str) for text in texts) or made.max_length < LEAST_LENGTH:
                raise ValueError("other values than expected")
            positions = made.config.get("max_position_embeddings", made.config.get("n_positions"))
            if len(made.leading) >= made.max_length or (positions is not None and made.max_length > positions):
                raise ValueError("conversations longer than the model's positions, or no room for one")
            if min(*made.leading, *made.stops, made.first, made.pad) < 0:
                raise ValueError("negative ids of tokens")
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} has no valid description of a causal language model: {error}.") from None
        return made


def read_causal_recipe(source: Path, max_length: int | None, spec: str) -> CausalRecipe:
    """Read everything besides the weights from a folder in the library's format, or from a GGUF file.

    Raises:
        UserError: if something is missing, or the chat template does more than put texts around turns.
    """
    from transformers import AutoConfig, AutoTokenizer

    folder, options = located(source)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
        backend = getattr(tokenizer, "backend_tokenizer", None)
    # Configurations and tokenizers come from many libraries and versions.
    except Exception as error:
        raise UserError(f"The configuration or the tokenizer of {spec} cannot be read: {first_line(error)}") from None
    if backend is None:
        raise UserError(
            f"{spec} has a tokenizer in Python code, as Marian's own models do; a folder with tokenizer.json is needed."
        )
    backend.no_padding()
    backend.no_truncation()
    kept = {key: value for key, value in config.to_dict().items() if key not in (*UNREAD, "quantization_config")}
    longest = longest_text(tokenizer.model_max_length, config)
    if max_length is not None and not LEAST_LENGTH <= max_length <= longest:
        raise UserError(f"{spec} takes {LEAST_LENGTH} to {longest} tokens, not {max_length}.")
    pairs = bool(config.is_encoder_decoder)
    chat = ChatForm() if pairs else _chat(tokenizer, spec)
    of_text = [one for one in backend.encode("", add_special_tokens=True).ids if one == tokenizer.bos_token_id]
    told = chat.start or chat.system or ""
    ends = backend.encode(chat.end, add_special_tokens=False).ids[:1]
    starts = getattr(config, "decoder_start_token_id", None) if pairs else None
    known = (
        starts if isinstance(starts, int) else None,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        0,
    )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    stops = {one for one in (tokenizer.eos_token_id, *ends) if one is not None}
    return CausalRecipe(
        config=kept,
        tokenizer=backend.to_str(),
        chat=chat,
        max_length=max_length or min(longest, MAX_LENGTH),
        leading=() if pairs or (tokenizer.bos_token and told.startswith(tokenizer.bos_token)) else tuple(of_text),
        first=next(int(one) for one in known if one is not None),
        pad=int(pad),
        stops=tuple(sorted(map(int, stops))),
    )


def _chat(tokenizer: Any, spec: str) -> ChatForm:
    """Return the form of a tokenizer's chat template; without one, turns are lines and an answer ends the text."""
    if not tokenizer.chat_template:
        return ChatForm(end=tokenizer.eos_token or "")

    def render(turns: Sequence[Turn], generating: bool) -> str:
        messages = [{"role": role, "content": said} for role, said in turns]
        made: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generating)
        return made

    try:
        return ChatForm.of(render)
    # Templates raise errors of their own.
    except Exception as error:
        raise UserError(
            f"The chat template of {spec} cannot be turned into texts around the turns of a conversation: "
            f"{first_line(error)}"
        ) from None


def located(source: Path) -> tuple[Path, dict[str, Any]]:
    """Return the folder for the library, and its options."""
    return (source.parent, {"gguf_file": source.name}) if source.suffix == GGUF else (source, {})
