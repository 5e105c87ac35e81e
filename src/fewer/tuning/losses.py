"""What counts as lost, in [0, 1], between the full model's answer and the compressed one's; any such function will do.

changed    1 unless both say the same, but for case, spaces and marks at the end
wrong      the part of the expected answers that the full model gives and the compressed one does not
numbers    the share of the numbers in the full model's answer that are not in the other
"""

from collections.abc import Callable

import regex

from fewer.tuning.examples import Example
from fewer.types import FewerError, UnknownName

Loss = Callable[[str, str, Example], float]

_NUMBER = regex.compile(r"\d(?:[\d.,]*\d)?")


def changed(full: str, said: str, example: Example) -> float:
    """Whether the answer is another one.

    >>> changed("Paris.", "paris", Example("c", "q")), changed("Paris", "Rome", Example("c", "q"))
    (0.0, 1.0)
    """
    return float(_plain(full) != _plain(said))


def wrong(full: str, said: str, example: Example) -> float:
    """How much of what was expected the compressed answer lacks and the full one has; better answers count nothing.

    Its mean is at least the fall of the mean score, so a bound on it bounds that too.

    >>> one = Example("c", "q", ("4711", "blue"))
    >>> wrong("4711, blue", "it is BLUE", one), wrong("none", "4711", one)
    (0.5, 0.0)
    """
    return max(0.0, example.score(full) - example.score(said))


def numbers(full: str, said: str, example: Example) -> float:
    """The share of numbers lost, each as often as it stands there; 0 where the full answer has none.

    >>> numbers("3.50 euros for 2 of 2", "2 cost 3.50", Example("c", "q"))
    0.3333333333333333
    """
    had, there = _NUMBER.findall(full), _NUMBER.findall(said)
    lost = 0
    for one in had:
        if one in there:
            there.remove(one)
        else:
            lost += 1
    return lost / len(had) if had else 0.0


OWN = "own: "
"""Before the name of a loss that is not one of these."""

LOSSES: dict[str, Loss] = {"changed": changed, "wrong": wrong, "numbers": numbers}


def resolve_loss(measure: str | Loss) -> Loss:
    """The loss of that name, or the function itself."""
    if callable(measure):
        return measure
    if not isinstance(measure, str) or measure not in LOSSES:
        raise UnknownName(f"measure={measure!r} is no loss; known are {', '.join(LOSSES)}")
    return LOSSES[measure]


def name_of(measure: str | Loss) -> str:
    """What a loss is called in reports and plans. One of your own says so, also where it is called like one of ours."""
    if isinstance(measure, str):
        return measure
    name = getattr(measure, "__name__", "a loss")
    return name if LOSSES.get(name) is measure else f"{OWN}{name}"


def lost(loss: Loss, full: str, said: str, example: Example) -> float:
    """A loss, held to [0, 1]."""
    name = getattr(loss, "__name__", "the loss")
    try:
        value = float(loss(full, said, example))
    except TypeError as why:  # what it takes, or gives, is not what it should
        raise FewerError(
            f"measure={name}: a loss takes the full model's answer, the other one, and the example, and gives a number "
            f"({why})"
        ) from why
    if not 0 <= value <= 1:  # nan fails this too
        raise FewerError(f"{name} gave {value} for example {example.line}; a loss lies in [0, 1]")
    return value


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .!")
