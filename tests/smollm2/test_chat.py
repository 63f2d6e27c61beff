"""Chat templates."""

import pytest

from jaxkd.smollm2 import chat, tokenization


def with_template(tokenizer, template):
    return tokenization.Tokenizer(tokenizer.backend, tokenizer.special, template)


def test_template_has_what_checkpoints_rely_on(tokenizer):
    template = (
        "{% for m in messages %}{% if m.role == 'skip' %}{% continue %}{% endif %}"
        "{{ bos_token }}{% generation %}{{ m['content'] }}{% endgeneration %}{{ {'é': '<'} | tojson }}"
        "{{ {'b': 'é', 'a': 1} | tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=True) }}{% endfor %}"
    )
    messages = [{"role": "skip", "content": "no"}, {"role": "user", "content": "yes", "name": None}]
    rendered = chat.apply_chat_template(with_template(tokenizer, template), messages)
    assert rendered == '<|im_start|>yes{"é": "<"}{"a":1,"b":"\\u00e9"}'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{% if %}", "refuses"),
        (None, "has no chat template"),
    ],
)
def test_template_can_refuse_and_can_not_reach_out(tokenizer, template, message):
    with pytest.raises(ValueError, match=message):
        chat.apply_chat_template(with_template(tokenizer, template), [{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize(("content", "trimmed"), [("It is ", False), ("It is ", True), ("It is", True)])
def test_final_message_is_continued(tokenizer, content, trimmed):
    template = (
        tokenization.CHATML.replace("message['content']", "message['content'] | trim")
        if trimmed
        else tokenization.CHATML
    )
    rendered = chat.apply_chat_template(
        with_template(tokenizer, template), [{"role": "assistant", "content": content}], continue_final=True
    )
    assert rendered == "<|im_start|>assistant\n" + (content.rstrip() if trimmed else content)
