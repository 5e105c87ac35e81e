"""LlamaIndex: shorten retrieved nodes, each for itself. Needs the extra `llamaindex`.

index.as_query_engine(node_postprocessors=[FewerPostprocessor(keep=0.5)])
"""

from typing import Annotated, Any

from fewer.adapters.documents import KEY, shortened
from fewer.prompts.protect import listed

try:
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
    from pydantic import BeforeValidator, ConfigDict
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

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    method: Any = "llmlingua2"
    keep: Any = None  # read where it is used: pydantic would make 1.0 of True
    tokens: Any = None
    protect: Annotated[Any, BeforeValidator(listed)] = ()
    tokenizer: Any = None

    @classmethod
    def class_name(cls) -> str:
        return "FewerPostprocessor"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        texts = [node for node in nodes if _holds_text(node.node)]
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
        return [*out, *(node for node in nodes if not _holds_text(node.node))]


def _holds_text(node: Any) -> bool:
    """Nodes of pictures are text nodes too, with no text; a text node of white space alone is shortened to nothing."""
    return isinstance(node, TextNode) and (type(node) is TextNode or bool(node.text.strip()))
