"""Bills under prompt caching, worked by hand."""

import math
import subprocess
import sys

import pytest

from fewer import FewerError, Prices, bill, worth
from fewer.prompts.counting import Counter

P = Prices(plain=10.0, read=1.0, write=12.5, per=1000)


def test_a_bill_by_hand() -> None:
    assert bill(1000, P).cost == pytest.approx(12.5)  # all of it written
    assert bill(1000, P, caching=False).cost == pytest.approx(10.0)
    assert bill(1000, P, cached=1000).cost == pytest.approx(1.0)
    mixed = bill(1000, P, cached=600)
    assert (mixed.read, mixed.written, mixed.plain, mixed.tokens) == (600, 400, 0, 1000)
    assert mixed.cost == pytest.approx(0.6 + 5.0)
    assert bill(1000, P, cached=600, caching=False).cost == pytest.approx(0.6 + 4.0)


def test_default_prices_are_multiples_of_plain() -> None:
    assert Prices(plain=2.0, per=1).cost(10, 0, 0) == pytest.approx(2.0)
    assert Prices(plain=2.0, per=1).cost(0, 4, 0) == pytest.approx(10.0)
    assert Prices(plain=2.0, read=0, per=1).cost(10, 0, 3) == 6.0


def test_shortening_a_cached_prompt_raises_the_bill() -> None:
    # as it is: 900 read at 1, 100 written at 12.5 -> 0.9 + 1.25 = 2.15; shortened: 500 written -> 6.25
    verdict = worth(1000, 500, P, cached=900)
    assert not verdict and (verdict.before, verdict.after) == pytest.approx((2.15, 6.25))
    assert verdict.saved == pytest.approx(-4.10) and "raises the bill" in str(verdict)
    # each later request reads 500 fewer: 0.5 saved; 4.10 / 0.5 = 8.2, so nine later ones, ten in all
    assert verdict.breakeven == 10
    assert not worth(1000, 500, P, cached=900, requests=9) and worth(1000, 500, P, cached=900, requests=10)


def test_shortening_behind_the_cached_part_pays() -> None:
    # both read 900; as it is 100 are written, shortened 50
    verdict = worth(1000, 950, P, cached=900, same=900)
    assert verdict and (verdict.before, verdict.after) == pytest.approx((2.15, 1.525)) and verdict.breakeven == 1


def test_without_a_cache_shorter_is_cheaper() -> None:
    verdict = worth(1000, 500, P, caching=False)
    assert verdict and (verdict.before, verdict.after) == pytest.approx((10.0, 5.0)) and "pays" in str(verdict)


def test_no_change_is_not_worth_it() -> None:
    verdict = worth(1000, 1000, P, cached=1000, same=1000)
    assert not verdict and verdict.saved == 0 and verdict.breakeven is None and "changes nothing" in str(verdict)


@pytest.mark.parametrize("cached", [0, 300, 1000])
@pytest.mark.parametrize("after", [100, 500, 999])
@pytest.mark.parametrize("same", [0, 80])
@pytest.mark.parametrize("caching", [True, False])
def test_breakeven_is_where_the_verdict_turns(cached: int, after: int, same: int, caching: bool) -> None:
    def asked(requests: int) -> bool:
        return bool(worth(1000, after, P, cached=cached, same=same, requests=requests, caching=caching))

    found = worth(1000, after, P, cached=cached, same=same, caching=caching).breakeven
    if found is None:
        assert not asked(1_000_000)
    else:
        assert asked(found) and asked(found + 1) and (found == 1 or not asked(found - 1))


def test_breakeven_where_loss_and_gain_are_multiples() -> None:
    verdict = worth(5, 4, Prices(plain=3, write=3), cached=4, same=1, requests=18)
    assert not verdict and verdict.breakeven == 19
    assert worth(5, 4, Prices(plain=3, write=3), cached=4, same=1, requests=19)


def test_messages_are_counted_and_their_common_start_found() -> None:
    head = {"role": "system", "content": "x" * 100}
    chat = [head, {"role": "user", "content": "y" * 200}]
    done = [head, {"role": "user", "content": "y" * 50}]
    verdict = worth(chat, done, P, cached=104, tokenizer="characters")  # each message 4 more, the answer's opening 3
    assert verdict.before == pytest.approx((104 * 1 + 207 * 12.5) / 1000)
    assert verdict.after == pytest.approx((104 * 1 + 57 * 12.5) / 1000)
    assert bill(chat, P, tokenizer="characters").tokens == 100 + 200 + 2 * 4 + 3
    changed = [{"role": "system", "content": "x" * 90}, chat[1]]
    assert worth(chat, changed, P, cached=104, tokenizer="characters").after == pytest.approx(301 * 12.5 / 1000)


def test_a_template_that_refuses_a_prefix() -> None:
    """As Qwen's do where no user has spoken."""

    def chat(messages: list[dict[str, str]], answer: bool) -> int:
        if not any(message["role"] == "user" for message in messages):
            raise ValueError("No user query found in messages.")
        return sum(len(message["content"]) + 5 for message in messages) + 3 * answer

    tokenizer = Counter("strict", len, chat=chat)
    head, asked = {"role": "system", "content": "x" * 100}, {"role": "user", "content": "y" * 200}
    verdict = worth([head, asked], [head, {**asked, "content": "y"}], P, cached=105, tokenizer=tokenizer)
    assert verdict.after == pytest.approx((104 * 1 + (114 - 104) * 12.5) / 1000)
    again = worth([head, asked], [head, asked], P, cached=313, tokenizer=tokenizer)
    assert again.after == pytest.approx((310 * 1 + 3 * 12.5) / 1000)


def test_wrong_types() -> None:
    """In a process of its own: in this one, annotations are checked before fewer can."""
    calls = {
        "Prices(plain='3')": "plain='3'", "Prices(per='x')": "per='x'", "Prices(plain=None)": "plain=None",
        "Prices(read=True)": "read=True", "worth(10, 5, None)": "worth(): prices is NoneType",
        "bill(10, 3.0)": "bill(): prices is float", "worth(None, 5, Prices())": "messages is NoneType",
    }  # fmt: skip
    code = "from fewer import FewerError, Prices, bill, worth\n"
    for call in calls:
        code += f"try:\n    {call}\nexcept FewerError as why:\n    print(str(why).splitlines()[0])\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    for wanted, found in zip(calls.values(), done.stdout.splitlines(), strict=True):
        assert wanted in found


def test_bad_arguments() -> None:
    for made, said in (
        (lambda: Prices(plain=-1.0), "plain=-1.0"),
        (lambda: Prices(per=0), "per=0"),
        (lambda: Prices(read=math.nan), "read=nan"),
        (lambda: Prices(write=math.inf), "write=inf"),
        (lambda: bill(10, P, cached=11), "cached=11"),
        (lambda: bill(-1, P), "-1 tokens"),
        (lambda: bill("text", P), "messages is str"),
        (lambda: worth(10, 5, P, same=6), "at most 5 tokens in common"),
        (lambda: worth(10, 5, P, requests=0), "requests=0"),
    ):
        with pytest.raises(FewerError, match=said):
            made()
