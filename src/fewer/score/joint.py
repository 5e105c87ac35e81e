"""One encoder pass over a question and a passage that says both how well the passage answers, and which tokens matter.

    [CLS] question [SEP] passage [SEP]  ->  hidden states h
    rerank score = w_r . h_CLS + b_r        keep probability of token j = sigmoid(w_k . h_j + b_k)

The two heads, and those of the encoder's own weights that were trained with them, are given by name; the encoder that
is passed in is not changed.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fewer.score.embed import Embedder

BATCH = 4096
"""Cells, padding included, of a forward."""


class Cited(NamedTuple):
    """A question, the sentences of a passage, and which of them one has to read to answer it."""

    question: str
    sentences: tuple[str, ...]
    useful: tuple[bool, ...]


class Row(NamedTuple):
    """Token ids of a question and a passage; of the passage's tokens, 1 for those that matter, where that is known."""

    question: list[int]
    passage: list[int]
    useful: list[int]


class Judged(NamedTuple):
    """Of a batch of rows: rerank scores `(b,)`, and for all places `(b, n)` the logit that a token matters, whether it
    is the passage's, and the labels that the rows came with."""

    rerank: Tensor
    logits: Tensor
    inside: Tensor
    useful: Tensor


def judge(embed: Embedder, tensors: Mapping[str, Tensor], rows: Sequence[Row]) -> Judged:
    """One pass over these rows."""
    head, part = [embed.tokenizer.cls_token_id], [embed.tokenizer.sep_token_id]
    ids = [head + row.question + part + row.passage + part for row in rows]
    longest = max(map(len, ids))
    batch = torch.zeros(3, len(rows), longest, dtype=torch.long)  # ids, kinds, what is there
    inside, useful = torch.zeros(len(rows), longest, dtype=torch.bool), torch.zeros(len(rows), longest)
    for i, row in enumerate(rows):
        first, after = len(row.question) + 2, len(row.question) + 2 + len(row.passage)
        batch[0, i, : len(ids[i])] = torch.tensor(ids[i])
        batch[1, i, first : after + 1] = 1
        batch[2, i, : len(ids[i])] = 1
        inside[i, first:after] = True
        useful[i, first : first + len(row.useful)] = torch.tensor(row.useful, dtype=torch.float32)
    own = {name: weight.detach() for name, weight in embed.model.named_parameters()}
    own |= {name: weight for name, weight in tensors.items() if not name.startswith(("rerank.", "keep."))}
    told = dict(zip(("input_ids", "token_type_ids", "attention_mask"), batch.to(embed.model.device), strict=True))
    hidden = torch.func.functional_call(embed.model, own, kwargs=told).last_hidden_state.float().cpu()
    rerank = hidden[:, 0] @ tensors["rerank.weight"] + tensors["rerank.bias"]
    return Judged(rerank, hidden @ tensors["keep.weight"] + tensors["keep.bias"], inside, useful)


@torch.inference_mode()
def keep_probabilities(
    embed: Embedder, tensors: Mapping[str, Tensor], question: list[int], passages: Sequence[list[int]]
) -> tuple[list[float], list[list[float]]]:
    """For each passage, given by its token ids, its rerank score and the keep probability of each of its tokens."""
    tensors = {name: weight.float() for name, weight in tensors.items()}
    rerank, keep = [0.0] * len(passages), [[0.0]] * len(passages)
    order = sorted(range(len(passages)), key=lambda i: -len(passages[i]))
    while order:
        take = max(1, BATCH // (len(question) + len(passages[order[0]]) + 3))
        mine, order = order[:take], order[take:]
        judged = judge(embed, tensors, [Row(question, passages[i], []) for i in mine])
        for row, i in enumerate(mine):
            rerank[i] = float(judged.rerank[row])
            keep[i] = judged.logits[row][judged.inside[row]].sigmoid().tolist()
    return rerank, keep
