"""Haystack: shorten retrieved documents, each for itself. Needs the extra `haystack`.

pipeline.add_component("shorten", FewerCompressor(keep=0.5))
"""

from dataclasses import replace
from typing import Any

from fewer.adapters.documents import KEY, shortened
from fewer.prompts.protect import listed
from fewer.types import Keep

try:
    from haystack import Document, component
except ImportError as why:
    raise ImportError(f"fewer.adapters.haystack wants haystack-ai: pip install 'fewer[haystack]' ({why})") from why


@component
class FewerCompressor:
    """Shortens documents to one budget over all of them; the query is the question.

    Each document that keeps something comes back as one document, with its id, score and meta, and under
    `meta["fewer"]` the spans of it that stayed. Documents that hold no text come back as they are, after the others. A
    pipeline with it can be saved if `method` and `tokenizer` are names; Haystack loads it again where it is told that
    this module is allowed (`Pipeline.load(..., allowed_modules=["fewer.adapters.haystack"])`).

    Args:
        method, keep, tokens, protect, tokenizer: as `fewer.compress_prompt` takes them.
    """

    def __init__(
        self,
        method: Any = "llmlingua2",
        keep: Keep | None = None,
        tokens: int | None = None,
        protect: Any = (),
        tokenizer: Any = None,
    ) -> None:
        self.method = method
        self.keep = keep
        self.tokens = tokens
        self.protect = listed(protect)
        self.tokenizer = tokenizer

    @component.output_types(documents=list[Document])  # type: ignore[untyped-decorator]
    def run(self, documents: list[Document], query: str | None = None) -> dict[str, list[Document]]:
        """The documents, shorter."""
        texts = [document for document in documents if document.content is not None]
        found = shortened(
            [document.content or "" for document in texts], query, method=self.method, keep=self.keep,
            tokens=self.tokens, protect=self.protect, tokenizer=self.tokenizer,
        )  # fmt: skip
        out = [replace(texts[i], content=text, meta={**texts[i].meta, KEY: record}) for i, text, record in found]
        return {"documents": [*out, *(document for document in documents if document.content is None)]}
