"""One total for all layers, more to the early ones."""

import torch

from fewer.types import Allocation, Budget, Tokens


def falling(tokens: Tokens, even: Allocation, beta: int, reserved: int) -> Allocation:
    """Linear from many at the first layer to few at the last; the total over the layers is that of `even` everywhere.

    `reserved` of each share are kept out of the slope (the observation window); of the rest c the last layer gets
    c / beta and the first 2c - c / beta, or, where that is more than there is, all there is.
    """
    layers, counts = tokens.site.layers, even.counts.clone()
    for index in torch.cartesian_prod(*[torch.arange(size) for size in counts.shape]).view(-1, counts.ndim).tolist():
        at = tuple(index)
        share, available = int(even.counts[at]), int(tokens.available[at])
        free = share - min(reserved, share)
        room = available - (share - free)
        if layers < 2 or free == 0:
            continue
        first = min(2 * free - free / beta, room)
        slope = [first + (2 * free - 2 * first) * layer / (layers - 1) for layer in range(layers)]
        parts = Budget.split(free * layers, slope, [room] * layers)
        counts[at] = share - free + parts[tokens.site.layer]
    return Allocation(counts, note=even.note)
