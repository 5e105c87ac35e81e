"""One total for all layers, more to the early ones or to the late ones."""

import torch

from fewer.types import Allocation, Budget, Tokens


def falling(tokens: Tokens, budget: Budget, window: int, beta: int, even: Allocation) -> Allocation:
    """Linear from many at the first layer to few at the last; over the layers, exactly what `even` shares would be.

    The window is kept out of the slope; of the rest c of a share, the last layer gets c / beta and the first
    2c - c / beta, or, where that is more than there is, all there is. Prompts of less than 2c tokens are too
    short to be worth a slope. Every layer works the same list of shares out, so nothing passes between layers.
    """
    return _sloped(tokens, budget, window, beta, even, tokens.site.layer)


def rising(tokens: Tokens, budget: Budget, window: int, beta: int, even: Allocation) -> Allocation:
    """`falling` read backwards: few at the first layer, many at the last, the same total."""
    return _sloped(tokens, budget, window, beta, even, tokens.site.layers - 1 - tokens.site.layer)


def _sloped(tokens: Tokens, budget: Budget, window: int, beta: int, even: Allocation, step: int) -> Allocation:
    """The share that is `step` shares down the slope."""
    layers, counts = tokens.site.layers, even.counts.clone()
    for row, seen in enumerate(tokens.seen.tolist()):
        share = budget.count(seen)
        free, room = share - min(window, share), seen - min(window, share)
        if layers > 1 and free > 0 and seen >= 2 * free:
            first = min(2 * free - free / beta, room)
            slope = [first + (2 * free - 2 * first) * layer / (layers - 1) for layer in range(layers)]
            parts = Budget.split(free * layers, slope, [room] * layers)
            counts[row] = share - free + parts[step]
    return Allocation(torch.minimum(counts, tokens.available), note=even.note)
