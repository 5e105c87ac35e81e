"""What can gain on a machine and what cannot, from what it has: the last table of `fewer doctor`.

No numbers: they are in docs/, with the machine that they were measured on, which was a CPU.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Facts:
    """What the gains depend on: an accelerator that torch sees, and a CPU that multiplies bfloat16 itself."""

    accelerator: bool = False
    native_bfloat16: bool = False


@dataclass(frozen=True)
class Gain:
    """One way to save, whether it pays, and why."""

    way: str
    pays: Literal["yes", "in part", "no", "not measured"]
    why: str


def gains(facts: Facts) -> tuple[Gain, ...]:
    """Every way to save, on a machine with these facts.

    >>> [gain.way for gain in gains(Facts()) if gain.pays == "no"]
    ['torch.compile around encoders', 'fused attention of an accelerator']
    """
    return (
        Gain(
            "shorter prompts",
            "yes",
            "what is not sent is neither read, kept nor paid for, on any machine; where a provider caches prompts, ask "
            "fewer.worth first",
        ),
        Gain(
            "fewer entries in the cache",
            "yes",
            "memory, and time to decode once the context is long (a short cache does not show beside the weights); "
            "not the first token, since the prompt is still read whole",
        ),
        _bits(facts),
        Gain(
            "fewer tokens in later layers (fastkv), fewer visual tokens",
            "yes",
            "the first token comes sooner; short prompts leave cores idle and gain less than their FLOPs say",
        ),
        Gain(
            "fewer tokens in encoders", "in part", "large images and batches; one small image gains little or nothing"
        ),
        Gain("torch.compile around encoders", "no", "inside the context the blocks run eagerly all the same"),
        Gain(
            "bfloat16",
            "yes" if facts.native_bfloat16 or facts.accelerator else "in part",
            "half the bytes, and faster: it is multiplied in hardware"
            if facts.native_bfloat16 or facts.accelerator
            else "half the bytes; slower where it is worked out in float32, and nothing here says otherwise",
        ),
        Gain("fused attention of an accelerator", "not measured", _UNMEASURED)
        if facts.accelerator
        else Gain("fused attention of an accelerator", "no", "there is none here, and flash kernels were not measured"),
    )


_UNMEASURED = "nothing in docs/ was timed on an accelerator; fewer compare measures quality and time on yours"


def _bits(facts: Facts) -> Gain:
    less = "less memory at little loss in 4 bits"
    if facts.accelerator:
        return Gain("a cache in fewer bits", "not measured", f"{less}; time: {_UNMEASURED}")
    return Gain(
        "a cache in fewer bits", "in part", f"{less}; steps get slower, as unpacking costs a CPU more than it saves"
    )
