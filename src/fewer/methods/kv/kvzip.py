"""KVzip (arXiv 2505.23416): keep what the model looks at when it has to repeat its context.

    for each chunk of the context, the model reads on:  instruction, last tokens of the chunk before, the chunk again
    a   = softmax of those queries over [sinks, the chunk's cached keys, what they read so far]
    s_j = max of a over the queries and over the query heads that share the key-value head
    keep the sinks, and the top of s over all layers and heads together

Nothing is asked of the prompt, so one compressed cache serves any question. Reading twice about doubles the prefill.

Differs from the paper: no instruction by default, since there is no tokenizer at hand (`with_prompt` makes the
published one); the first tokens of a row are its sinks, where the authors leave the system prompt alone; a later turn
is repeated by itself, and what the model wrote between two turns is never repeated and stays. Totals are exact. The
authors' half precision softmax is float32 here. The normalisation known as KVzip+ is left out.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fewer import checks
from fewer.allocate.across_layers import across_layers
from fewer.reduce.select import top_k
from fewer.score.position import must_stay, sinks_stay
from fewer.score.reconstruction import UNASKED, Instruction, Reconstruction
from fewer.signals import EveryLayer
from fewer.types import Allocation, Budget, Card, Plan, Tokens


@dataclass(frozen=True)
class KVzip:
    """Context reconstruction.

    Args:
        chunk: tokens that are repeated at once.
        previous: tokens of the chunk before that lead into the next one.
        sinks: first tokens of a row that always stay.
        prompt: what tells the model to repeat; see `with_prompt`.
    """

    chunk: int = 2048
    previous: int = 8
    sinks: int = 4
    prompt: Instruction = UNASKED

    card: ClassVar[Card] = Card(
        source="arXiv 2505.23416",
        faithfulness="official",
        differs="no instruction unless with_prompt; the first tokens are the sinks; exact totals",
    )

    def __post_init__(self) -> None:
        checks.counts(chunk=self.chunk)
        checks.counts(0, previous=self.previous, sinks=self.sinks)

    @classmethod
    def with_prompt(cls, tokenizer: Any, **settings: Any) -> "KVzip":
        """With the published instruction, in the tokenizer's chat template where it has one."""
        opening = "\n"
        if tokenizer.chat_template is not None:
            mark = "\n" + "#" * 13
            message = [{"role": "user", "content": f"context{mark}"}]
            text = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
            opening = text.partition(mark)[2]
        texts = (
            "\n\nRepeat the previous context exactly.",
            "\n\nRepeat the part of the previous context exactly, starting with",
            opening,
        )
        return cls(
            prompt=Instruction(*(tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts)), **settings
        )

    @property
    def needs(self) -> frozenset[object]:
        return frozenset({Reconstruction(self.chunk, self.previous, self.sinks, self.prompt), EveryLayer()})

    def score(self, tokens: Tokens) -> Tensor:
        rated = tokens.signal(Reconstruction, Tensor)
        return sinks_stay(must_stay(rated, rated == 0), tokens, self.sinks)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return across_layers(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        return top_k(scores, allocation)
