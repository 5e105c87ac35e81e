"""The sizes of models that their costs follow from: `Decoder`, and one block of an `Encoder`.

These are the floors that a benchmark prints beside what it measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fewer.codec import POSITION_BYTES
from fewer.types import Budget, Keep

TEXT = ("language_model", "text_model")
"""What models that see call their language model."""


@dataclass(frozen=True)
class Decoder:
    """The sizes of a decoder that its costs follow from.

    `parameters` are all weights that a step reads: tied embeddings count once, as the output matrix. `embedding` is how
    many of them are embeddings and output matrix, and so in no layer; `hidden` is the width between layers.

    >>> tiny = Decoder(layers=2, heads=4, kv_heads=2, head_dim=8, parameters=1000, itemsize=4)
    >>> tiny.cache_bytes(10)
    2560
    >>> tiny.cache_bytes(10, keep=0.5)  # half of it, and a position for each of the 5 * 2 * 2 entries
    1360
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    parameters: int
    itemsize: int
    embedding: int = 0
    hidden: int = 0

    @classmethod
    def of(cls, model: Any) -> "Decoder":
        """Read a transformers decoder's sizes; every layer is taken to be a full-attention one. Of a model that sees,
        the language model's: its tower is in no layer of it."""
        config, inner = model.config.get_text_config(decoder=True), model.base_model
        parts = [next((part for name in TEXT if (part := getattr(inner, name, None)) is not None), model)]
        parts += [head] if (head := model.get_output_embeddings()) is not None else []
        weights = {id(p): p for part in parts for p in part.parameters()}.values()
        ends = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=head_dim,
            parameters=sum(p.numel() for p in weights),
            itemsize=next(iter(weights)).element_size(),
            embedding=sum(p.numel() for p in {id(p): p for m in ends for p in m.parameters()}.values()),
            hidden=config.hidden_size,
        )

    def cache_bytes(self, tokens: int, *, rows: int = 1, keep: Keep = 1.0) -> int:
        """Bytes of the cache of `rows` prompts of `tokens` tokens, right after compression, metadata included.

        Packed keys and values and their positions; what the full cache holds where everything stays.
        """
        budget = Budget.parse(keep)
        entry = 2 * self.head_dim * self.itemsize
        places = rows * self.layers * self.kv_heads
        if budget.whole:
            return places * tokens * entry
        budget = budget.within(lambda count: places * count * (entry + POSITION_BYTES))
        kept = budget.count(tokens)
        return places * kept * (entry + (POSITION_BYTES if kept < tokens else 0))

    def prefill_flops(self, tokens: int) -> int:
        """Multiply-adds count two: two for each weight and token, and causal attention's scores and values."""
        return self.flops([tokens] * self.layers, tokens)

    def flops(self, read: Sequence[int], tokens: int) -> int:
        """`prefill_flops` where every layer reads a number of tokens of its own; embeddings and the output matrix are
        for all `tokens`.

        >>> tiny = Decoder(layers=2, heads=1, kv_heads=1, head_dim=1, parameters=100, itemsize=4, embedding=20)
        >>> tiny.flops([8, 2], 8)  # 2 * 40 * (8 + 2) + 2 * 20 * 8, and 4 * (36 + 3)
        1276
        """
        inside = (self.parameters - self.embedding) * sum(read) // self.layers
        seen = sum(count * (count + 1) // 2 for count in read)
        return 2 * (inside + self.embedding * tokens) + 2 * 2 * self.heads * self.head_dim * seen

    def layer_flops(self, tokens: float | int) -> float:
        """One layer that so many tokens pass, causally; embeddings and the output matrix are in no layer."""
        inside = (self.parameters - self.embedding) / self.layers
        return 2 * inside * tokens + 2 * self.heads * self.head_dim * tokens * (tokens + 1)

    def shortened_prefill_flops(self, tokens: int, *, layer: int, rate: Keep) -> int:
        """`prefill_flops` where the layers after `layer` read only some of the tokens, a fraction or a count of them
        (FastKV; at least its window goes on).

        >>> tiny = Decoder(layers=2, heads=1, kv_heads=1, head_dim=1, parameters=100, itemsize=4, embedding=20)
        >>> tiny.shortened_prefill_flops(8, layer=0, rate=0.25)  # 2 * 40 * (8 + 2) + 2 * 20 * 8, and 4 * (36 + 3)
        1276
        >>> tiny.shortened_prefill_flops(8, layer=0, rate=1.0) == tiny.prefill_flops(8)
        True
        """
        going = Budget.parse(rate).count(tokens)
        return self.flops([tokens] * (layer + 1) + [going] * (self.layers - layer - 1), tokens)

    def decode_bytes(self, cache_bytes: int) -> int:
        """Bytes that one decoding step cannot avoid reading: every weight, and the cache."""
        return self.parameters * self.itemsize + cache_bytes


@dataclass(frozen=True)
class Encoder:
    """The sizes of one block of an encoder, all blocks being alike.

    `inner` is the width of all heads together; `attention` and `mlp` are the weights of the matrices of each part.

    >>> Encoder(inner=4, attention=64, mlp=128).block_flops(10, 5)  # 2 * 10 * 64 + 4 * 10 * 10 * 4 + 2 * 5 * 128
    4160
    """

    inner: int
    attention: int
    mlp: int

    @classmethod
    def of(cls, block: Any, attention: str, mlp: Sequence[str]) -> "Encoder":
        """Read a block's sizes; attention is taken to have four matrices of one shape, fused or not."""
        weights = _matrices(getattr(block, attention))
        width = next(m.shape[1] for m in block.parameters() if m.ndim == 2)
        return cls(sum(weights) // (4 * width), sum(weights), sum(sum(_matrices(getattr(block, name))) for name in mlp))

    def block_flops(self, came: int, went: int) -> int:
        """One block that `came` tokens attend in and `went` pass the rest of; a multiply-add counts two."""
        return 2 * came * self.attention + 4 * came * came * self.inner + 2 * went * self.mlp

    def share(self, blocks: Sequence[tuple[int, int]], tokens: int) -> float:
        """FLOPs of blocks with these counts, over those of as many blocks with all `tokens`."""
        return sum(self.block_flops(*one) for one in blocks) / (len(blocks) * self.block_flops(tokens, tokens))


def _matrices(module: Any) -> list[int]:
    return [p.numel() for p in module.parameters() if p.ndim == 2]
