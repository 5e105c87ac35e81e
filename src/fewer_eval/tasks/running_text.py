"""Running text: real prose and how it truly goes on; nothing is asked."""

from fewer.types import FewerError
from fewer_eval.tasks.base import Draw, Example, Task, maker
from fewer_eval.tasks.haystack import window

_CONTINUATION = 128


def _running_text(draw: Draw) -> Example:
    # A word has at least one token, so the window holds the continuation, too.
    words = window(draw.rng, draw.tokens + _CONTINUATION)
    context = draw.longest(lambda count: "".join(words[:count]).rstrip(), len(words))
    after = "".join(words)[len(context) :]
    tokens = draw.tokenizer(after, add_special_tokens=False).input_ids[:_CONTINUATION]
    if len(tokens) < _CONTINUATION:
        raise FewerError(f"text cannot fill {draw.tokens} tokens and go on: the text ends")
    return Example(context, "", (str(draw.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)),))


RUNNING_TEXT = Task(
    name="text",
    description=f"real prose, measured on its true continuation of {_CONTINUATION} tokens",
    max_new_tokens=_CONTINUATION,
    make=maker("text", _running_text),
    kind="text",
)
