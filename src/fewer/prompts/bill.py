"""What a prompt costs where providers cache prefixes, and when shortening it would raise the bill.

    cost = read * cached + write * rest       the rest is written to the cache
    cost = read * cached + plain * rest       or not

A cache holds prefixes: from the first token that differs on, nothing of it can be read. So a shorter prompt may cost
more than a long one that the cache holds, until enough requests have read the shorter one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from numbers import Real
from typing import Any

from fewer.prompts.counting import counter
from fewer.prompts.turns import ChatCounter, read_turns
from fewer.types import FewerError


@dataclass(frozen=True)
class Prices:
    """Prices of input tokens, in any currency, for `per` of them.

    Args:
        plain: of a token that has nothing to do with a cache.
        read: of one that is read from the cache; default a tenth of `plain`.
        write: of one that is written to it; default 1.25 times `plain`. Equal to `plain` where writing is free.
        per: how many tokens the prices are for.
    """

    plain: float | int = 1.0
    read: float | int | None = None
    write: float | int | None = None
    per: int = 1_000_000

    def __post_init__(self) -> None:
        for name in ("plain", "read", "write", "per"):
            price = getattr(self, name)
            if price is None and name in ("read", "write"):
                continue
            real = isinstance(price, Real) and not isinstance(price, bool) and isfinite(price)
            if not real or price < 0 or (price == 0 and name == "per"):
                raise FewerError(f"Prices({name}={price!r}): prices are numbers from 0 on, for 1 token or more")

    def cost(self, read: int, written: int, plain: int) -> float:
        """The cost of so many tokens of each kind."""
        reading = self.plain * 0.1 if self.read is None else self.read
        writing = self.plain * 1.25 if self.write is None else self.write
        return (reading * read + writing * written + self.plain * plain) / self.per


@dataclass(frozen=True)
class Bill:
    """What one request costs for its input: tokens `read` from the cache, `written` to it, and `plain` ones."""

    read: int
    written: int
    plain: int
    cost: float

    @property
    def tokens(self) -> int:
        return self.read + self.written + self.plain


@dataclass(frozen=True)
class Worth:
    """Whether shortening pays: what the requests cost `before`, as the prompt is, and `after`, shortened.

    True in a condition if it pays. `requests` is how many are counted, and `breakeven` from how many on it pays, None
    where it never does.
    """

    before: float
    after: float
    requests: int
    breakeven: int | None

    @property
    def saved(self) -> float:
        """What shortening saves; below 0 where it raises the bill."""
        return self.before - self.after

    def __bool__(self) -> bool:
        return self.after < self.before

    def __str__(self) -> str:
        what = f"{self.before:.6g} as it is, {self.after:.6g} shortened, for {self.requests} request(s)"
        if self:
            return f"{what}: shortening pays"
        later = "it never pays" if self.breakeven is None else f"it pays from {self.breakeven} requests on"
        return f"{what}: shortening {'raises the bill' if self.after > self.before else 'changes nothing'}; {later}"


def bill(
    messages: int | Sequence[Any], prices: Prices, *, cached: int = 0, caching: bool = True, tokenizer: Any = None
) -> Bill:
    """What one request costs for its input.

    What providers do beside this is not in it: shortest prefixes that they cache, how long they keep them, and the
    price of the answer.

    Args:
        messages: how many tokens, or the messages of a chat, which are counted in `tokenizer`.
        prices: see `Prices`.
        cached: how many tokens from the start on are in the cache already.
        caching: whether the rest is written to it.

    >>> bill(10_000, Prices(plain=3.0), cached=8_000)  # 8000 at 0.30 and 2000 at 3.75 a million
    Bill(read=8000, written=2000, plain=0, cost=0.0099)
    """
    _check(prices, "bill")
    tokens = _count(messages, tokenizer, "bill")
    cached = _cached(cached, tokens)
    rest = tokens - cached
    written, plain = (rest, 0) if caching else (0, rest)
    return Bill(cached, written, plain, prices.cost(cached, written, plain))


def worth(
    before: int | Sequence[Any],
    after: int | Sequence[Any],
    prices: Prices,
    *,
    cached: int = 0,
    same: int | None = None,
    requests: int = 1,
    caching: bool = True,
    tokenizer: Any = None,
) -> Worth:
    """Whether to send the shortened prompt or the one as it is.

    Both go out `requests` times. The first request reads what is cached of it, and of the shortened one no more than
    the part that is the same; with `caching`, the others read all of it. What a chat grows by meanwhile costs the same
    either way and is left out.

    Args:
        before: tokens as it is, or the messages of a chat.
        after: tokens shortened, or the shortened messages, as `compress_messages` gives them.
        prices: see `Prices`.
        cached: how many tokens from the start on are in the cache, of the prompt as it is.
        same: how many tokens from the start on the two have in common; of messages, by default those of the leading
            messages that are equal. Of mere counts, 0.
        requests: how many times the prompt will be sent.

    >>> verdict = worth(100_000, 50_000, Prices(plain=3.0), cached=90_000)
    >>> print(verdict)
    0.0645 as it is, 0.1875 shortened, for 1 request(s): shortening raises the bill; it pays from 10 requests on
    >>> bool(verdict), bool(worth(100_000, 50_000, Prices(plain=3.0), cached=90_000, requests=10))
    (False, True)
    """
    _check(prices, "worth")
    if isinstance(requests, bool) or not isinstance(requests, int) or requests < 1:
        raise FewerError(f"worth(): requests={requests!r}; give how many times the prompt is sent, from 1 on")
    had, has = _count(before, tokenizer, "worth"), _count(after, tokenizer, "worth")
    cached = _cached(cached, had)
    if same is None:
        same = min(_common(before, after, tokenizer), had, has)
    if isinstance(same, bool) or not isinstance(same, int) or not 0 <= same <= min(had, has):
        raise FewerError(f"worth(): same={same!r}; the two have at most {min(had, has)} tokens in common")

    def costs(tokens: int, hits: int) -> tuple[float, float]:
        first = bill(tokens, prices, cached=hits, caching=caching).cost
        later = bill(tokens, prices, cached=tokens if caching else hits, caching=caching).cost
        return first, later

    full, short = costs(had, cached), costs(has, min(cached, same))
    lost, gained = short[0] - full[0], full[1] - short[1]  # by the first request, and by each after it
    hair = 1e-9 * max(full[0], short[0])  # costs are sums of floats
    if lost < -hair:
        breakeven: int | None = 1
    else:  # the gain has to be above the loss, not equal
        breakeven = 2 + int(max(lost, 0.0) / gained + 1e-9) if gained > hair else None
    sums = [first + (requests - 1) * later for first, later in (full, short)]
    return Worth(sums[0], sums[1], requests, breakeven)


def _check(prices: Any, call: str) -> None:
    if not isinstance(prices, Prices):
        raise FewerError(f"{call}(): prices is {type(prices).__name__}; give fewer.Prices(plain=...)")


def _count(given: int | Sequence[Any], tokenizer: Any, call: str) -> int:
    if isinstance(given, int) and not isinstance(given, bool):
        if given < 0:
            raise FewerError(f"{call}(): {given} tokens; give a count from 0 on, or messages")
        return given
    turns = read_turns(given, call)
    return ChatCounter.of(counter(tokenizer), turns).count(turns)


def _cached(cached: int, tokens: int) -> int:
    if isinstance(cached, bool) or not isinstance(cached, int) or not 0 <= cached <= tokens:
        raise FewerError(f"cached={cached!r}; of a prompt of {tokens} tokens the cache holds 0 to {tokens}")
    return cached


def _common(before: Any, after: Any, tokenizer: Any) -> int:
    """Tokens of the leading messages that are equal."""
    if isinstance(before, int) or isinstance(after, int):
        return 0
    first, other = read_turns(before, "worth"), read_turns(after, "worth")
    n = 0
    while n < min(len(first), len(other)) and first[n] == other[n]:
        n += 1
    # some templates refuse messages without a user's among them
    return ChatCounter.of(counter(tokenizer), first[:n]).count(first[:n], answer=False) if n else 0
