"""A shortened prompt in closed form, under any method of the family "prompt"."""

from typing import Any

from fewer.cost.record import Cost
from fewer.cost.sizes import Decoder
from fewer.methods import resolve_prompt
from fewer.methods.any.full import Full
from fewer.methods.prompt.llmlingua import LLMLingua
from fewer.methods.prompt.llmlingua2 import LLMLingua2
from fewer.methods.prompt.provence import Provence
from fewer.methods.prompt.recomp_extractive import RECOMPExtractive
from fewer.methods.prompt.selective_context import SelectiveContext
from fewer.types import Budget, BudgetError, FewerError

CEILING = "a prompt loses whole units, so it may have fewer tokens than it may: a ceiling"
AGAIN = "the method reads the text more than once, or writes; one reading of it is counted"
READ_ONCE = (LLMLingua, LLMLingua2, SelectiveContext, RECOMPExtractive, Provence)
UNKNOWN = "the method reads the text with a model of its own: pass it as scorer= to count that"


def of_text(model: Any, method: Any, keep: Any, *, tokens: int, rows: int, new_tokens: int, scorer: Any) -> Cost:
    """What a decoder pays for a shortened prompt; see `fewer.cost.of`."""
    chosen, budget, sizes = resolve_prompt(method), Budget.parse(keep), Decoder.of(model)
    if budget.size is not None:
        raise BudgetError(f"keep={keep!r}: a prompt is shortened to a share, or a number, of its tokens, not to bytes")
    free = not {"model", "rewrite", "summarise"} & getattr(chosen, "__dataclass_fields__", {}).keys()
    if free and scorer is not None:
        raise FewerError(f"cost.of(scorer=...) means nothing for {method!r}, which reads the text with no model")
    whole = budget.whole or isinstance(chosen, Full)
    left = tokens if whole else budget.count(tokens)
    cache = sizes.cache_bytes(left, rows=rows)
    grown = sizes.cache_bytes(left + new_tokens // 2, rows=rows)
    known = free or (scorer is not None and isinstance(chosen, READ_ONCE))
    unknown = [] if known else [UNKNOWN if scorer is None else AGAIN]
    return Cost(
        family="prompt",
        tokens=rows * left,
        flops=rows * sizes.prefill_flops(left),
        bytes=cache,
        decode_bytes=sizes.decode_bytes(grown),
        choosing=0 if free or scorer is None else rows * Decoder.of(scorer).prefill_flops(tokens),
        whole=rows * sizes.prefill_flops(tokens),
        length=tokens,
        read=(left,) * sizes.layers,
        rows=rows,
        exact=whole,
        modelled=known,
        notes=(*([] if whole else [CEILING]), *unknown),
    )
