"""`fewer.compress_messages`: chats shortened where they may be, to one budget over all of it, and given back.

What may be shortened is text of the user and of tools after the cached prefix. Assistant turns, tool calls, ids, names,
images and the question stay: providers refuse a chat whose parts no longer fit together, and a question that lost words
is another question.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fewer.methods import name_of, resolve_prompt
from fewer.methods.any.full import Full
from fewer.prompts.chat_result import ChatCompression
from fewer.prompts.compression import Compression
from fewer.prompts.counting import Counter, counter
from fewer.prompts.front import GLUE, KEPT, checked, compress_prompt, read_budget, read_documents, read_text
from fewer.prompts.protect import Rule, idle, listed, protected
from fewer.prompts.settle import Kept
from fewer.prompts.source import PromptMethod, Protected, Ranking, Source, Span, Units
from fewer.prompts.turns import ChatCounter, Place, parts_of, put, read_turns, texts_of
from fewer.types import Budget, BudgetError, FewerError, Keep

SHORT = 400
"""Characters that the first or last paragraph of the last user turn may have to be taken for the question."""

UNTOUCHED = "nothing in these messages may be shortened"
OPEN, ASKED = ("user", "tool", "function"), ("system", "developer")


def compress_messages(
    messages: Sequence[Any],
    method: str | PromptMethod = "llmlingua2",
    *,
    keep: Keep | None = None,
    tokens: int | None = None,
    frozen: int = 0,
    protect: Any = (),
    tokenizer: Any = None,
    question: str | None = None,
    system: bool = False,
) -> ChatCompression:
    """Shorten a chat of OpenAI's or Anthropic's shape; the messages that are given are not changed.

    Text of the user and of tools may be shortened, all of it to one budget, so that what is worth most stays wherever
    it stands; of each text something stays. The rest is never touched, and the chat never gets longer.

    Args:
        messages: mappings with `role` and `content`: text, or a list of parts.
        method: a name that `fewer methods --family prompt` lists, or an object with `rank`.
        keep: the share of the tokens of what may be shortened that may stay, in (0, 1]; the question is not in it.
        tokens: how many tokens the whole chat may have, with what its template adds. Give `keep`, or this, or neither
            with a method that has a threshold of its own.
        frozen: how many leading messages stay as they are, because a provider has them cached; see `fewer.worth`.
        protect: what must stay, as in `compress_prompt`, but for ranges.
        tokenizer: what counts tokens; see `ChatCounter` for what a chat counts.
        question: what is asked. By default it is found in the last user turn: its first and its last paragraph where
            they are no longer than 400 characters, else the last one. There the question is never shortened, so a turn
            of one paragraph is not.
        system: whether system and developer messages may be shortened as well.

    Raises:
        BudgetError: the budget cannot be read, or what may not be shortened takes more.
        FewerError: the messages are no chat.

    >>> from fewer import restore_messages
    >>> chat = [{"role": "user", "content": "What?"}, {"role": "tool", "content": "alpha beta gamma"}]
    >>> done = compress_messages(chat, "truncation", keep=0.8, tokenizer="characters")
    >>> done.messages[1], done.messages[0] is chat[0]
    ({'role': 'tool', 'content': 'alpha beta'}, True)
    >>> restore_messages(done.messages, done.patch()) == chat
    True
    """
    start = time.perf_counter()
    turns = read_turns(messages, "compress_messages")
    if isinstance(frozen, bool) or not isinstance(frozen, int) or not 0 <= frozen <= len(turns):
        raise FewerError(f"compress_messages(): frozen={frozen!r}; there are {len(turns)} messages, so give 0 to that")
    if not isinstance(system, bool):
        raise FewerError(f"compress_messages(): system={system!r}; give True or False")
    made, count, budget = resolve_prompt(method), counter(tokenizer), read_budget(keep, tokens)
    tokens = None if budget is None else budget.tokens
    chat = ChatCounter.of(count, turns)
    asked, spans = _question(turns, read_text(question, "question", "compress_messages").strip())
    roles = OPEN + ASKED * system
    places = {
        Place(index, path): text
        for index, turn in enumerate(turns)
        if index >= frozen and turn["role"] in roles and isinstance(messages[index], Mapping)
        for path, text in texts_of(turn)
        if _without(text, spans.get(text, ())).strip()
    }
    before = chat.count(turns)
    rules = listed(protect)
    if ranges := [rule for rule in rules if isinstance(rule, (tuple, list))]:
        raise FewerError(
            f"protect={ranges[0]!r}: in a chat, ranges belong to no document; give the text, or a function"
        )
    rules.append(Rule("question", lambda text: spans.get(text, ())))

    def built(texts: Sequence[str]) -> list[Any]:
        new = list(messages)
        for (place, old), text in zip(places.items(), texts, strict=True):
            if text != old:
                new[place.message] = put(new[place.message], place.path, text)
        return new

    def size(texts: Sequence[str]) -> int:
        return sum(map(count.count, texts)) if tokens is None else chat.count(read_turns(built(texts), ""))

    documents = list(places.values())
    found = protected(documents, rules)
    had = size(documents)
    stays = sum(count.count(text[a:b]) for text in documents for a, b in spans.get(text, ()))
    limit = None if budget is None else tokens if tokens is not None else stays + budget.count(had - stays)
    if limit is not None and not places and had > limit:
        raise BudgetError(f"tokens={tokens}: the chat takes {had} of {count.name}, and nothing in it may be shortened")
    done = None
    if places and not isinstance(made, Full) and (limit is None or had > limit):
        done = _shortened(documents, made, count, asked, rules, found, limit, had, size)
    new = list(messages) if done is None else built(done.documents)
    after = before if done is None else chat.count(read_turns(new, ""))
    notes = [chat.note] if chat.note else []
    if objects := [i for i, turn in enumerate(turns) if turn["role"] in roles and turn is not messages[i]]:
        notes.append(f"messages {objects} are objects, not mappings, and stay as they are")
    if mixed := [
        i for i, turn in enumerate(turns)
        if turn["role"] in roles and turn is messages[i] and any(said is not part for part, said in parts_of(turn))
    ]:  # fmt: skip
        notes.append(f"parts of messages {mixed} are objects, not mappings, and stay as they are")
    notes += done.notes if done is not None else idle(rules, found) if places else [UNTOUCHED]
    notes += [KEPT] * (isinstance(made, Full) and limit is not None and limit < had)
    if done is not None and after >= before:
        notes.append("shortening would not have made the chat shorter, so it is as it was")
        new, after, done = list(messages), before, None
    changed = {} if done is None else {place: _part(done, i) for i, place in enumerate(places)}
    return ChatCompression(
        new, before, after, name_of(made), count.name, asked,
        {place: part for place, part in changed.items() if part.text != places[place]},
        time.perf_counter() - start, tuple(notes),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Ranked:
    """A ranking that is there already: the budget is tried several times, and ranking is what takes long."""

    ranking: Ranking

    def rank(self, source: Source, budget: Budget | None) -> Ranking:
        return self.ranking


def _shortened(
    documents: list[str], method: Any, count: Counter, question: str, rules: list[Any], found: tuple[Protected, ...],
    limit: int | None, had: int, size: Any,
) -> Compression:  # fmt: skip
    """The documents with `size` no more than `limit`, and none of them empty."""
    read_documents(documents)
    joined = count.count(GLUE.join(documents))
    allowed = None if limit is None else joined - (had - limit)
    if allowed is not None and allowed < 1:
        raise BudgetError(
            f"compress_messages(): {limit} tokens may stay, and {had - joined} of {count.name} are in what is never "
            f"shortened; allow more"
        )
    source = Source(tuple(documents), question, "", found, count)
    asked = None if allowed is None else Budget(allowed, tokens=allowed)
    ranking = replace(checked(method, method.rank(source, asked), source.documents), order=None)
    if allowed is None and ranking.chosen is None:
        raise BudgetError(f"{name_of(method)} has no threshold of its own: give keep=, or tokens=")
    best: dict[str, list[tuple[int, int]]] = {}
    stays = {p.document for p in found if source.of(p[:3]).strip()}
    for i, text in enumerate(documents):
        mine = ranking.units.of(i)
        if mine.start < mine.stop and i not in stays:
            unit = mine.start + int(np.argmax(ranking.value[mine]))
            best.setdefault(text, [(int(ranking.units.start[unit]), int(ranking.units.end[unit]))])
    rules = [*rules, Rule("no message becomes empty", lambda text: best.get(text, ()))]
    while True:
        try:
            done = compress_prompt(
                documents, _Ranked(ranking), tokens=allowed, question=question, protect=rules, tokenizer=count
            )
        except BudgetError as why:
            raise BudgetError(f"compress_messages(): of what may be shortened, {why}") from None
        over = 0 if limit is None else size(done.documents) - limit
        if over <= 0:
            return replace(done, method=name_of(method))
        assert allowed is not None
        allowed = min(allowed, done.tokens_after) - over
        if allowed < 1:
            raise BudgetError(
                f"compress_messages(): {limit} tokens cannot be met without emptying a message; allow more"
            )


def _question(turns: list[Mapping[str, Any]], given: str) -> tuple[str, dict[str, list[tuple[int, int]]]]:
    """The question, and where it stands in the last user turn: spans for each text that holds some of it."""
    for turn in reversed(turns):
        texts = [text for path, text in texts_of(turn) if "content" not in path[1:] and text.strip()]
        if turn["role"] != "user" or not texts:
            continue  # of tool results alone
        source = Source(tuple(texts))
        found = [
            Span(i, text.find(given), text.find(given) + len(given)) for i, text in enumerate(texts) if given in text
        ]
        if not given or not found:
            ends = list(source.paragraphs)
            ends = [ends[0]] if len(ends) == 1 else [ends[0], ends[-1]]
            found = [span for span in ends if len(source.of(span)) <= SHORT] or ends[-1:]
        spans: dict[str, list[tuple[int, int]]] = {}
        for span in found:
            spans.setdefault(texts[span.document], []).append((span.start, span.end))
        return given or "\n\n".join(map(source.of, found)), spans
    return given, {}


def _without(text: str, spans: Iterable[tuple[int, int]]) -> str:
    for start, end in sorted(spans, reverse=True):
        text = text[:start] + text[end:]
    return text


def _part(done: Compression, index: int) -> Compression:
    """What became of one document, as a compression of its own."""
    text = done.source.documents[index]
    assert done.kept_units is not None
    ranking = done.kept_units.ranking
    mine = ranking.units.of(index)
    units = Units(ranking.units.document[mine] * 0, ranking.units.start[mine], ranking.units.end[mine])
    alone = Ranking(
        units, ranking.value[mine], None if ranking.chosen is None else ranking.chosen[mine],
        written={i - mine.start: new for i, new in ranking.written.items() if mine.start <= i < mine.stop},
    )  # fmt: skip
    runs = tuple(run._replace(document=0) for run in done.runs if run.document == index)
    after = done.source.counter.count(done.documents[index])
    guard = tuple(span._replace(document=0) for span in done.source.protected if span.document == index)
    return replace(
        done, text=done.documents[index], runs=runs, single=True,
        source=Source((text,), done.source.question, "", guard, done.source.counter),
        tokens_before=done.source.counter.count(text), tokens_after=after,
        kept_units=Kept(alone, done.kept_units.mask[mine], done.kept_units.rules[mine], runs, after),
    )  # fmt: skip
