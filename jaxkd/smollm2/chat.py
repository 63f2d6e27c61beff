"""Chat templates: jinja from a checkpoint, rendered in a sandbox."""

import json
from collections.abc import Sequence
from functools import cache

from jaxkd.smollm2.tokenization import Tokenizer


@cache
def _compiled(template: str):
    """The template in jinja's sandbox, with the filters and functions that checkpoints rely on."""
    import jinja2
    from jinja2 import ext, nodes, sandbox

    class Generation(ext.Extension):
        """`{% generation %}` marks what the assistant says; it renders as what is inside."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def refuse(message):
        raise jinja2.TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def now(form):
        from datetime import datetime

        return datetime.now().strftime(form)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": refuse, "strftime_now": now}
    return environment.from_string(template)


_CUT = "<<the final message goes on here>> "


def apply_chat_template(
    tokenizer: Tokenizer, messages: Sequence[dict], *, add_generation_prompt: bool = False, continue_final: bool = False
) -> str:
    """Render messages ({"role", "content"}) as one text.

    Args:
      tokenizer: whose template is rendered.
      messages: the conversation; entries that are None are left out.
      add_generation_prompt: end with what opens the assistant's turn.
      continue_final: end where the last message's content ends, so that the model goes on with it.

    Raises:
      ValueError: where there is no template, or it refuses the messages.
    """
    import jinja2

    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template: give plain text, or use an Instruct checkpoint")
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    if continue_final:
        messages[-1]["content"] += _CUT
    names = {"tools": None, "documents": None, **tokenizer.special}
    try:
        text = _compiled(tokenizer.chat_template).render(
            messages=messages, add_generation_prompt=add_generation_prompt, **names
        )
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        raise ValueError(f"the chat template refuses the messages: {error}") from None
    if not continue_final:
        return text
    before, mark, after = text.rpartition(_CUT.strip())
    if not mark:
        raise ValueError("the chat template does not render the final message, which was to be continued")
    # A template that trims contents has lost the mark's own space: then it would have trimmed the message as well.
    return before if after.startswith(" ") else before.rstrip()
