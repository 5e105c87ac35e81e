"""Code token merging (arXiv 2507.14423): the subtokens of one identifier become one token, as a compiler reads it.

    groups    a lexer says which subtokens spell one identifier; no score has a say
    merge     before the first block, the mean of the embeddings of each group
    count     in the end each identifier is one token: 1 to 19 % fewer FLOPs in the paper

Differs from the paper: written from its abstract, into which the place, before the first block, is read. Only the
mean, not the learned weights, and no training; so attention counts a merged token as all its subtokens, which the paper
does not say and `masses="off"` turns off. Identifiers and keywords merge, nothing else that a lexer takes for one, such
as a number. `keep` is the least that stays: if merging all would leave fewer, the longest identifiers merge first,
whole ones only. For encoders with class tokens; CodeT5's is none here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from fewer.allocate.uniform import uniform
from fewer.reduce.fold import closed, fold
from fewer.score.lexer import groups, identifiers
from fewer.types import Allocation, Budget, Card, FewerError, Matching, Plan, Tokens


@dataclass(frozen=True, eq=False)
class CodeTokenMerging:
    """Merging by the lexer, for encoders of source code such as CodeBERT, GraphCodeBERT and UniXcoder.

    `compress(model, CodeTokenMerging.for_code(text, tokenizer), keep=0.1)` merges every identifier of nearly any text.

    Args:
        groups: for each token of each row the number of its identifier, -1 for those that stand alone; `for_code` makes
            it. None merges nothing.
    """

    groups: Int[Tensor, "b n"] | None = None

    card: ClassVar[Card] = Card(
        source="arXiv 2507.14423",
        faithfulness="style",
        mechanism="merge",
        differs="the mean alone, without training; keep is the least that stays",
        slugs=("code-token-merging",),
    )
    needs: ClassVar[frozenset[Any]] = frozenset()
    before: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    floor: ClassVar[bool] = True
    for_text: ClassVar[bool] = True

    @classmethod
    def for_code(
        cls, code: str | Sequence[str], tokenizer: Any, *, language: str = "python", **options: Any
    ) -> "CodeTokenMerging":
        """The method for these texts, one a row.

        Args:
            code: what the encoder is going to read.
            tokenizer: the encoder's own, one of transformers' fast ones.
            language: "python", read by Python's tokenizer, or "other", where all that is spelled like a name is one.
            options: as the tokenizer is called with for the encoder, `padding` and `truncation` above all.
        """
        texts = [code] if isinstance(code, str) else list(code)
        if not getattr(tokenizer, "is_fast", False):
            raise FewerError(f"{type(tokenizer).__name__} does not say where tokens stand: take transformers' fast one")
        options = {name: value for name, value in options.items() if name != "return_tensors"}
        offsets = tokenizer(texts, **options, return_offsets_mapping=True)["offset_mapping"]
        if len({len(row) for row in offsets}) > 1:
            raise FewerError("the rows differ in length: pass padding=True, as for the encoder")
        return cls(
            torch.tensor([groups(t, row, identifiers(t, language)) for t, row in zip(texts, offsets, strict=True)])
        )

    def places(self, layers: int) -> list[int]:
        return [0]

    def score(self, tokens: Tokens) -> Matching:
        n, device = tokens.positions.shape[1], tokens.positions.device
        index = torch.arange(n, device=device).expand_as(tokens.positions)
        if self.groups is None:
            return Matching(torch.full(index.shape, torch.inf, device=device), index)
        if self.groups.shape != index.shape:
            raise FewerError(
                f"the groups are {tuple(self.groups.shape)} and the tokens {tuple(index.shape)}: call for_code with "
                "the texts and options that the tokenizer was called with"
            )
        own = self.groups.to(device).masked_fill(closed(tokens), -1)
        same = (own.unsqueeze(-1) == own.unsqueeze(-2)) & (own >= 0).unsqueeze(-1)  # (b, n, n)
        first = torch.where(own >= 0, same.int().argmax(-1), index)
        # longer identifiers are worth less, of equally long ones the earlier; no two are worth the same
        value = (first - n * same.sum(-1)).float().masked_fill(first == index, torch.inf)
        return Matching(value, first)

    def allocate(self, tokens: Tokens, scores: Matching, budget: Budget) -> Allocation:
        asked = uniform(tokens, budget)
        worth = scores.value.masked_fill(~scores.value.isfinite(), torch.inf).sort(-1).values
        leaving = torch.arange(1, worth.shape[1] + 1, device=worth.device)
        whole = worth.isfinite() & torch.cat([worth[:, 1:] != worth[:, :-1], torch.ones_like(worth[:, :1]) > 0], -1)
        may = leaving <= (tokens.available - asked.counts).unsqueeze(-1)
        return Allocation(tokens.available - (leaving * (whole & may)).max(-1).values)

    def reduce(self, tokens: Tokens, scores: Matching, allocation: Allocation) -> Plan:
        return fold(tokens, scores, allocation)
