from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def tiny_tokenizer(template: str = CHATML, **special: Any) -> Any:
    """Return a byte-level tokenizer without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: number for number, name in enumerate([*SPECIAL, *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokens = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", **special}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{k: v for k, v in tokens.items() if v is not None})
    if template:
        made.chat_template = template
    return made


def tiny_language_model(folder: Path, family: str = "llama", template: str = CHATML, **special: Any) -> Path:
    """Write a random causal model of two blocks, with its tokenizer, as transformers does."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    size: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    tokenizer = tiny_tokenizer(template, **special)
    torch.manual_seed(0)
    model: Any
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **size))
    elif family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), tie_word_embeddings=False, **size))
    else:
        own = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=256)
        model = GPT2LMHeadModel(own)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_encoder_decoder(folder: Path, family: str = "t5") -> Path:
    """Write a random encoder-decoder of two blocks each, with a tokenizer of its form, as transformers does."""
    import torch
    from tokenizers.processors import TemplateProcessing
    from transformers import (
        BartConfig,
        BartForConditionalGeneration,
        MarianConfig,
        MarianMTModel,
        T5Config,
        T5ForConditionalGeneration,
    )

    tokenizer = tiny_tokenizer("")
    ends = tokenizer.convert_tokens_to_ids("<|im_end|>")
    form = "<|im_start|> $A <|im_end|>" if family == "bart" else "$A <|im_end|>"
    special = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<|im_start|>", "<|im_end|>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=form, special_tokens=special)
    tokenizer.eos_token = "<|im_end|>"
    torch.manual_seed(0)
    own = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": ends, "d_model": 32}
    model: Any
    if family == "t5":
        model = T5ForConditionalGeneration(
            T5Config(**own, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
        )
    else:
        size = {f"{half}_{what}": value for half in ("encoder", "decoder") for what, value in _HALVES.items()}
        settings = {**own, **size, "max_position_embeddings": 256, "forced_eos_token_id": ends}
        if family == "bart":
            model = BartForConditionalGeneration(BartConfig(**settings, bos_token_id=1, decoder_start_token_id=ends))
        else:
            model = MarianMTModel(MarianConfig(**settings, decoder_start_token_id=0))
            model.final_logits_bias.normal_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


_HALVES = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}
