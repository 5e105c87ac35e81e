"""LlamaIndex: shorten retrieved nodes, each for itself. Needs the extra `llamaindex`.

index.as_query_engine(node_postprocessors=[FewerPostprocessor(keep=0.5)])
"""

from collections.abc import Sequence
from typing import Any

from fewer.adapters.documents import KEY, shortened

try:
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
except ImportError as why:
    raise ImportError(
        f"fewer.adapters.llamaindex wants llama-index-core: pip install 'fewer[llamaindex]' ({why})"
    ) from why


class FewerPostprocessor(BaseNodePostprocessor):
    """Shortens text nodes to one budget over all of them; the query is the question.

    Each node that keeps something comes back as one node, with its id, score, relations and metadata, and under
    `metadata["fewer"]` the spans of it that stayed, which models and embeddings are not shown. Nodes that hold no text
    come back as they are, after the others.

    Args:
        method, keep, tokens, protect, tokenizer: as `fewer.compress_prompt` takes them.
    """

    method: Any = "llmlingua2"
    keep: float | str | None = None
    tokens: int | None = None
    protect: Sequence[Any] = ()
    tokenizer: Any = None

    @classmethod
    def class_name(cls) -> str:
        return "FewerPostprocessor"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        texts = [node for node in nodes if isinstance(node.node, TextNode)]
        found = shortened(
            [node.node.text for node in texts], query_bundle.query_str if query_bundle else None, method=self.method,
            keep=self.keep, tokens=self.tokens, protect=self.protect, tokenizer=self.tokenizer,
        )  # fmt: skip
        out = []
        for i, text, record in found:
            old = texts[i].node
            hidden = {
                name: [*dict.fromkeys([*getattr(old, name), KEY])]
                for name in ("excluded_llm_metadata_keys", "excluded_embed_metadata_keys")
            }
            new = old.model_copy(update={"text": text, "metadata": {**old.metadata, KEY: record}, **hidden})
            out.append(texts[i].model_copy(update={"node": new}))
        return [*out, *(node for node in nodes if not isinstance(node.node, TextNode))]
