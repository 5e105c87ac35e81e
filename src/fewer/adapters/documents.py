"""What the frameworks' adapters share: documents shortened together, each for itself in what comes back."""

from collections.abc import Sequence
from typing import Any

from fewer.prompts.front import compress_prompt

KEY = "fewer"
"""Under which the documents' metadata says what was done."""


def shortened(texts: Sequence[str], question: str | None, **options: Any) -> list[tuple[int, str, dict[str, Any]]]:
    """Of each text that keeps something its index, what stays, and a record of it; one budget over all of them.

    They come in the order that the method wants them read in. The record holds the method, the tokenizer, tokens before
    and after, and the spans `[start, end]` of the source that stayed.

    Args:
        options: `method`, `keep` or `tokens`, `protect` and `tokenizer`, as `compress_prompt` takes them.
    """
    there = [i for i, text in enumerate(texts) if text.strip()]
    if not there:
        return []
    done = compress_prompt([texts[i] for i in there], question=question, **options)
    out, parts = [], done.documents
    for index in dict.fromkeys(run.document for run in done.runs):
        if parts[index].strip():
            count = done.source.counter.count
            record = {
                "method": done.method,
                "tokenizer": done.tokenizer,
                "tokens_before": count(done.source.documents[index]),
                "tokens_after": count(parts[index]),
                "spans": [[span.start, span.end] for span in done.kept if span.document == index],
                "extractive": all(run.written is None for run in done.runs if run.document == index),
            }
            out.append((there[index], parts[index], record))
    return out
