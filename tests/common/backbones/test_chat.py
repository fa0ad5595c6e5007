from collections.abc import Sequence

import pytest

from fedhead.backbones.chat import ChatForm, encode
from fedhead.data.conversations import Turn

from .tiny_language_model import CHATML, tiny_tokenizer

LLAMA = (
    "{{ '<|endoftext|>' }}{% for m in messages %}{{ '<h>' + m['role'] + '</h>\n\n' + m['content'] | trim + '<e>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<h>assistant</h>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}{% elif m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '<t></t>\n' }}{% endif %}{{ m['content'] + '<e>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
TURNS: Sequence[Turn] = (("user", "One?"), ("assistant", "Two."), ("user", "Three?"), ("assistant", "Four."))


def rendering(template: str):  # type: ignore[no-untyped-def]
    tokenizer = tiny_tokenizer(template)

    def render(turns: Sequence[Turn], generating: bool) -> str:
        messages = [{"role": role, "content": said} for role, said in turns]
        made: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generating)
        return made

    return render


@pytest.mark.parametrize("template", [CHATML, LLAMA, MISTRAL, THINKING])
def test_texts_around_turns_give_what_the_template_gives(template: str) -> None:
    render = rendering(template)
    form = ChatForm.of(render)
    for turns in (TURNS, TURNS[:2]):
        parts = form.parts(turns)
        assert "".join(text for text, _ in parts) == render(turns, False)
        learned = [text for text, answer in parts if answer]
        assert [text[: len(said)] for text, (role, said) in zip(learned, turns[1::2], strict=True)] == [
            said for _, said in turns[1::2]
        ]
    assert "".join(text for text, _ in form.parts(TURNS[:3])) == render(TURNS[:3], True)


def test_an_answer_includes_its_end_so_that_models_learn_to_stop() -> None:
    parts = ChatForm.of(rendering(CHATML)).parts(TURNS)
    assert [text for text, answer in parts if answer] == ["Two.<|im_end|>\n", "Four.<|im_end|>\n"]


def test_a_template_that_does_more_is_refused() -> None:
    for template in (
        "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
        "{% for m in messages %}{{ m['content'] + m['content'] }}{% endfor %}",
        "{{ messages | length }}{% for m in messages %}{{ '|' + m['content'] }}{% endfor %}",
    ):
        with pytest.raises(ValueError, match=r"it |longer"):
            ChatForm.of(rendering(template))


def test_long_conversations_are_cut_at_the_left() -> None:
    def ids_of(text: str) -> list[int]:
        return [ord(one) for one in text]

    parts = [("abcdefgh", False), ("XYZ", True)]
    whole = encode(parts, ids_of, 0, 20)
    assert (len(whole.ids), whole.cut) == (11, False)
    short = encode(parts, ids_of, 0, 6)
    assert ("".join(map(chr, short.ids)), short.cut) == ("fghXYZ", True)
    assert list(short.learned) == [False] * 3 + [True] * 3
    tiny = encode(parts, ids_of, 0, 3)
    assert "".join(map(chr, tiny.ids)) == "hXY"
    assert list(encode([("XY", True)], ids_of, 7, 5).ids) == [7, ord("X"), ord("Y")]
    assert list(encode([("", False)], ids_of, 7, 5).ids) == [7]
