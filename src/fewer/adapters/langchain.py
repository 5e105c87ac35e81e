"""LangChain: shorten retrieved documents, each for itself. Needs the extra `langchain`.

ContextualCompressionRetriever(base_compressor=FewerCompressor(keep=0.5), base_retriever=...)
"""

from collections.abc import Sequence
from typing import Annotated, Any

from fewer.adapters.documents import KEY, shortened
from fewer.prompts.protect import listed

try:
    from langchain_core.callbacks import Callbacks
    from langchain_core.documents import BaseDocumentCompressor, Document
    from pydantic import BeforeValidator, ConfigDict
except ImportError as why:
    raise ImportError(f"fewer.adapters.langchain wants langchain-core: pip install 'fewer[langchain]' ({why})") from why


class FewerCompressor(BaseDocumentCompressor):
    """Shortens documents to one budget over all of them; the query is the question.

    Each document that keeps something comes back as one document, with its id, its metadata, and under
    `metadata["fewer"]` the spans of it that stayed. `acompress_documents` does the same on another thread.

    Args:
        method, keep, tokens, protect, tokenizer: as `fewer.compress_prompt` takes them.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    method: Any = "llmlingua2"
    keep: Any = None  # read where it is used: pydantic would make 1.0 of True
    tokens: Any = None
    protect: Annotated[Any, BeforeValidator(listed)] = ()
    tokenizer: Any = None

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks = None
    ) -> Sequence[Document]:
        """The documents, shorter; `callbacks` have nothing to hear of and are there for the interface."""
        found = shortened(
            [document.page_content for document in documents], query, method=self.method, keep=self.keep,
            tokens=self.tokens, protect=self.protect, tokenizer=self.tokenizer,
        )  # fmt: skip
        return [
            documents[i].model_copy(update={"page_content": text, "metadata": {**documents[i].metadata, KEY: record}})
            for i, text, record in found
        ]
