"""Settings of methods: whatever they cannot work with is one error, raised when the method is made."""

from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from fewer import checks
from fewer.methods import METHODS, of_family
from fewer.types import FewerError, UnknownName

COUNTS = (-1, 2.5, True, "8", None)
POSITIVE = (0, *COUNTS)
ODD = (4, 5.0, *POSITIVE)
SHARES = (-0.1, 1.5, 3.0, float("nan"), True, "half")
SOME = (0.0, *SHARES)
NUMBERS = (-0.1, float("nan"), True, "half")
BITS = (1, 5, True)
POOLING = ("average", "", None)
SEEDS = (0.5, "a", True)

BAD: dict[str, dict[str, tuple[Any, ...]]] = {
    "a2sf": {"factor": SHARES, "recent": COUNTS},
    "adakv": {"floor": SHARES},
    "compresskv": {"window": POSITIVE, "kernel": ODD, "voters": POSITIVE},
    "criticalkv": {"first": SHARES, "eps": NUMBERS},
    "dapq": {"count": POSITIVE, "content": ("first", -1, True), "kernel": ODD, "pooling": POOLING},
    "ems": {"window": POSITIVE, "evict": NUMBERS, "threshold": NUMBERS},
    "expected-attention": {"future": POSITIVE, "sinks": COUNTS, "eps": NUMBERS},
    "fastkv": {"window": POSITIVE, "kernel": ODD, "rate": ("64MB",)},
    "gear": {
        "bits": BITS, "group": POSITIVE, "block": POSITIVE, "rank": COUNTS, "rank_decode": COUNTS, "sparsity": (1.5,),
    },
    "h2o": {"recent": SHARES},
    "kivi": {"bits": BITS, "group": POSITIVE, "residual": POSITIVE},
    "kvzap": {"window": COUNTS},
    "kvzip": {"chunk": POSITIVE, "previous": COUNTS, "sinks": COUNTS},
    "lagkv": {"lag": POSITIVE, "sinks": COUNTS},
    "merge-evict": {"how": ("pivotal",)},
    "mikv": {"important": SHARES, "recent": SHARES, "bits_important": BITS, "bits_others": BITS},
    "minicache": {"interpolation": SHARES, "gamma": NUMBERS, "start": SHARES},
    "pyramidkv": {"window": POSITIVE, "kernel": ODD, "pooling": POOLING, "beta": POSITIVE},
    "random": {"seed": SEEDS},
    "razorattention": {"sinks": COUNTS},
    "scissorhands": {"history": POSITIVE, "recent": COUNTS, "beta": POSITIVE},
    "sinklora": {"sinks": COUNTS, "recent": SHARES},
    "snapkv": {"window": POSITIVE, "kernel": ODD, "pooling": POOLING},
    "streaming-llm": {"sinks": COUNTS, "positions": ("org", None)},
    "tidaldecode": {"top_k": POSITIVE, "start": COUNTS, "correction": COUNTS},
    "treekv": {"sinks": COUNTS, "recent": SHARES, "block": POSITIVE},
    "zipcache": {"important": SHARES, "bits_important": BITS, "bits_others": BITS, "probes": SOME, "seed": SEEDS},
    "zipvl": {
        "tau": SOME, "variant": ("dorp", None), "bits_important": BITS, "bits_others": BITS, "probes": SOME,
        "seed": SEEDS,
    },
}  # fmt: skip
OTHER = {
    "adakv": {"scorer"}, "compresskv": {"fit"}, "criticalkv": {"scorer"}, "fastkv": {"layer"},
    "kvzap": {"fit", "across"}, "kvzip": {"prompt"},
    "merge-evict": {"scorer"}, "razorattention": {"fit"}, "zipvl": {"dense"},
}  # fmt: skip
"""What has tests of its own, or is a switch."""


@pytest.mark.parametrize(("name", "setting"), [(name, setting) for name, bad in BAD.items() for setting in bad])
def test_a_setting_that_cannot_be_is_named(name: str, setting: str) -> None:
    """Types are looked at by a hook in tests, which comes first and which users do not have: so it is gone around."""
    for value in BAD[name][setting]:
        method: Any = METHODS[name]()
        object.__setattr__(method, setting, value)
        with pytest.raises(FewerError, match="bits=" if setting.startswith("bits") else f"{setting}="):
            method.__post_init__()


def test_no_setting_is_left_out() -> None:
    found = {name: {one.name for one in fields(METHODS[name])} for name in of_family("kv")}
    assert {name: settings for name, settings in found.items() if settings} == {
        name: {*BAD.get(name, ()), *OTHER.get(name, ())} for name in (*BAD, *(set(OTHER) - set(BAD)))
    }


def test_what_would_do_is_said() -> None:
    with pytest.raises(FewerError, match=r"^window=0 must be a whole number, at least 1$"):
        checks.counts(window=0)
    with pytest.raises(FewerError, match=r"^kernel=4 must be an odd number, such as 5"):
        checks.odd(kernel=4)
    with pytest.raises(FewerError, match=r"^recent=3.0 is not a share in \[0, 1\]$"):
        checks.shares(recent=3.0)
    with pytest.raises(FewerError, match=r"^tau=0 is not a share in \(0, 1\]$"):
        checks.shares(some=True, tau=0)
    with pytest.raises(UnknownName, match=r"^positions='org': choose 'cache' or 'original'$"):
        checks.words(("cache", "original"), positions="org")
    checks.counts(0, sinks=0, window=np.int64(3))
    checks.shares(recent=0, floor=1, first=np.float32(0.5))
