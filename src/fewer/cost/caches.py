"""A decoder's cache in closed form, under any method of the family "kv" and any form of storage."""

from functools import partial
from typing import Any

import torch

from fewer.allocate.levels import levelled
from fewer.cost.choosing import choosing, fixed_bytes
from fewer.cost.layers import Layer, Place, kept, layer, paired_bytes
from fewer.cost.record import Cost
from fewer.cost.sizes import Decoder
from fewer.types import Budget, Tokens

PAIRED = "how many tokens stay whole in both layers of a pair depends on the data: one a head, the least, is counted"
AMONG = "how many tokens attend to the prompt depends on the data: FLOPs are a ceiling"


def of_cache(
    model: Any, method: Any, keep: Any, *, tokens: int, rows: int, new_tokens: int, store: Any, when: Any, every: Any
) -> Cost:
    """What a decoder's prompt costs; see `fewer.cost.of`."""
    from fewer.adapters.hf_bind import Host  # hosts are imported on use
    from fewer.adapters.hf_policy import Policy

    host, policy = Host.of(model), Policy.of(*levelled(method, keep), when, every, store)
    method = policy.method  # with budgets of its own for each layer, where keep is a list
    host.gives(method)
    sizes, plain = Decoder.of(model), host.plain_layers()
    place, ours = Place.of(host, sizes), [index for index, mine in enumerate(plain) if mine]
    for form in policy.stores:
        if form is not None:
            form.check(place.d, place.e)
    reads, cuts, prefill = getattr(method, "reads", None), not policy.idle, policy.covers("prefill")
    beside = 0  # signals that wait for the next decoding step
    if prefill and policy.covers("decode"):
        beside = place.layers * fixed_bytes(method, sizes, rows, tokens, lives=True, dense=False)
    budget = policy.budget.within(
        lambda count: (
            rows * place.heads * place.layers * policy.bytes_for(count, place.d, place.e, place.itemsize) + beside
        )
    )
    after, going = place.layers - 1, tokens
    if prefill and getattr(method, "shortens", None) is not None:
        after = method.shortens(place.layers)
        if ours[after] < sizes.layers - 1:  # behind the model's last layer nobody goes on
            going = int(method.go_on(place.tokens(after, tokens, tokens), torch.zeros(1, place.heads, tokens)).counts)
    couples = [] if policy.pairs is None else policy.pairs.couples(place.layers)
    joined = {index for couple in couples for index in couple}

    def counts(here: Tokens, asked: Budget) -> list[int]:
        return rows * kept(method, asked, here)[0]

    layers = []
    for index in range(place.layers):
        there = tokens if index <= after else going
        here = place.tokens(index, there, tokens)
        if index in joined:
            layers.append(Layer(0, float(there)))
        else:
            late, own = there < tokens, budget
            if cuts and prefill:
                own = policy.fill(
                    budget, partial(counts, here), there, place.d, place.e, place.itemsize,
                    places=rows * place.heads * place.layers,
                )  # fmt: skip
            layers.append(layer(policy, own, place, sizes, here, rows=rows, cuts=cuts and prefill, late=late))
    # of a sliding-window layer transformers shows the window, and holds all that it is a view of
    total = sum(one.bytes for one in layers) + rows * place.heads * tokens * place.entry * (len(plain) - len(ours))
    total += len(couples) * paired_bytes(place, tokens, rows)
    notes = {note for one in layers for note in one.notes} | ({PAIRED} if couples else set())
    notes |= {AMONG} if cuts and prefill and getattr(method, "among", None) is not None else set()
    read = tuple(tokens if index <= ours[after] else going for index in range(sizes.layers))
    chosen, remark = 0, ""
    if prefill:
        held = [one.held for one in layers]
        chosen, remark = choosing(
            method, policy.stores, sizes, [read[index] for index in ours], held, rows=rows, decides=cuts
        )
    fixed = policy.covers("decode") and not policy.budget.whole
    grown = 0 if fixed else new_tokens // 2
    least = total + rows * place.heads * sizes.layers * place.entry * grown
    if reads is not None:  # every key-value head reads at least what one of its query heads chose
        skipped = sum(max(0, tokens + grown - method.top_k) for i in range(place.layers) if reads(i) == "chosen")
        least -= rows * place.heads * skipped * place.entry
    return Cost(
        family="kv",
        tokens=rows * read[-1],
        flops=rows * sizes.flops(read, tokens),
        bytes=total,
        decode_bytes=sizes.decode_bytes(least),
        choosing=chosen,
        whole=rows * sizes.prefill_flops(tokens),
        length=tokens,
        read=read,
        rows=rows,
        exact=not notes,
        modelled=not remark,
        notes=(*sorted(notes), *([remark] if remark else [])),
    )
