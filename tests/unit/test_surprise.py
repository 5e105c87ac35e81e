"""The surprise of a language model: against one plain forward, in windows, in batches, and after what was kept."""

from typing import Any

import numpy as np
import pytest
import torch

from fewer.score.surprise import CHUNK, Prefix, Reader
from tests.readers import bytes_reader, pairs_reader

TEXT = "Naïve café — 日本 costs 12 €.\r\nThe dog 🐕‍🦺 ran, and ran; it did not stop!"


def plain(reader: Reader, ids: list[int]) -> np.ndarray[Any, Any]:
    """Surprise at all but the first of these, by one forward over all of them."""
    with torch.inference_mode():
        log = reader.model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    return -log[torch.arange(len(ids) - 1), ids[1:]].numpy()


def in_windows(reader: Reader, ids: list[int], head: list[int]) -> list[float]:
    """The same for a text that does not fit in the window, without caches."""
    out: list[float] = []
    at = 0
    while at < len(ids):
        part = ids[at : at + reader.window - len(head)]
        out += plain(reader, head + part)[len(head) - 1 :].tolist()
        at += len(part)
        head = (head + part)[-(reader.window // 2) :]
    return out


class Work:
    """How much a model was made to read: tokens in all, and the most at once with the cache and in logits."""

    def __init__(self, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens = self.context = self.logits = 0
        forward = reader.model.forward

        def counted(input_ids: Any, past_key_values: Any = None, logits_to_keep: int = 0, **more: Any) -> Any:
            out = forward(input_ids, past_key_values=past_key_values, logits_to_keep=logits_to_keep, **more)
            self.tokens += input_ids.numel()
            held = past_key_values.get_seq_length() if past_key_values is not None else input_ids.shape[1]
            self.context, self.logits = max(self.context, held), max(self.logits, out.logits[..., 0].numel())
            return out

        monkeypatch.setattr(reader.model, "forward", counted)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
def test_it_is_what_one_forward_says(family: str) -> None:
    reader = bytes_reader(family)
    ids, _ = reader.tokens(TEXT)
    _, found = reader.surprise(TEXT)
    assert np.allclose(found, plain(reader, [256, *ids]), atol=1e-4)
    assert np.ptp(found) > 1  # not all alike


def test_a_word_costs_what_the_table_says() -> None:
    reader = pairs_reader({"new": 3.0, "york": 5.0, "is": 2.0}, {("new", "york"): 0.5})
    offsets, nats = reader.surprise("new york is new")
    assert nats.tolist() == pytest.approx([3.0, 0.5, 2.0, 3.0])
    assert offsets.tolist() == [[0, 3], [4, 8], [9, 11], [12, 15]]
    assert reader.surprise("york", before="is new")[1].tolist() == pytest.approx([0.5])


def test_tokens_lie_where_they_stand() -> None:
    reader = bytes_reader()
    ids, offsets = reader.tokens(TEXT)
    assert len(ids) == len(TEXT.encode()) == len(offsets) and offsets[-1, 1] == len(TEXT)
    sizes = {tuple(pair): len(TEXT[pair[0] : pair[1]].encode()) for pair in offsets.tolist()}
    counted: dict[tuple[int, ...], int] = {}
    for pair in offsets.tolist():
        counted[tuple(pair)] = counted.get(tuple(pair), 0) + 1
    assert counted == sizes  # a character has as many tokens as bytes
    assert reader.tokens("")[1].shape == (0, 2) and reader.surprise("")[1].shape == (0,)


def test_what_stands_before_is_read_and_not_reported() -> None:
    reader = bytes_reader()
    before, text = reader.tokens("Who ran? ")[0], reader.tokens("The dog.")[0]
    _, found = reader.surprise("The dog.", before="Who ran? ")
    assert np.allclose(found, plain(reader, [256, *before, *text])[len(before) :], atol=1e-4)
    assert not np.allclose(found, reader.surprise("The dog.")[1], atol=1e-2)


def test_without_a_token_to_start_with_the_first_is_no_surprise() -> None:
    reader = bytes_reader()
    found = reader.of_ids([65, 66, 67], [])
    assert found[0] == 0 and np.allclose(found[1:], plain(reader, [65, 66, 67]), atol=1e-4)
    bare = Prefix(reader, [])
    assert np.allclose(bare.tried([65, 66, 67]), found, atol=1e-4)
    assert np.allclose(bare.tried([65, 66, 67]), found, atol=1e-4)  # nothing was left in the cache


@pytest.mark.parametrize("window", [8, 16, 33])
def test_long_texts_are_read_in_windows(window: int) -> None:
    reader = bytes_reader(window=window)
    ids, _ = reader.tokens(TEXT)
    assert np.allclose(reader.surprise(TEXT)[1], in_windows(reader, ids, [256]), atol=1e-4)
    short = reader.surprise("dog", before=TEXT)[1]
    head = [256, *ids][-(window // 2) :]
    assert np.allclose(short, plain(reader, head + reader.tokens("dog")[0])[len(head) - 1 :], atol=1e-4)


def test_memory_does_not_grow_with_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = bytes_reader(window=1024)
    seen = []
    for times in (40, 120):
        with monkeypatch.context() as patch:
            work = Work(reader, patch)
            reader.surprise("It ran, and it did not stop! 12 times. " * times)
            seen.append((work.context, work.logits))
    assert seen[0] == seen[1] and seen[1][0] <= 1024 and seen[1][1] <= CHUNK


def test_many_at_once_are_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = bytes_reader(window=40)
    texts = ["dog", "", "a", TEXT, "The dog ran.", "It did not stop.", "x" * 39, "y" * 40]
    ids = [reader.tokens(text)[0] for text in texts]
    before = [[256], [256], [], [256], [256, 65], [66], [256], [256]]
    work = Work(reader, monkeypatch)
    found = reader.of_many(ids, before)
    assert work.context <= 40  # what does not fit in the window is not padded into it
    for text, head, one in zip(ids, before, found, strict=True):
        assert np.allclose(one, reader.of_ids(text, head), atol=1e-4) and len(one) == len(text)
    assert reader.of_many([], []) == []


def test_many_short_texts_share_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = bytes_reader()
    calls = Work(reader, monkeypatch)
    reader.of_many([[65] * 31] * 64, [[256]] * 64)
    assert calls.tokens == 64 * 31 and 8 * 31 <= calls.logits <= CHUNK


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
def test_a_prefix_says_what_one_forward_over_what_was_kept_says(family: str) -> None:
    reader = bytes_reader(family)
    prefix, kept = reader.prefix("Q: who? "), [256, *reader.tokens("Q: who? ")[0]]
    ids = reader.tokens(TEXT * 3)[0]
    for at in range(0, len(ids), 50):
        part = ids[at : at + 50]
        wanted = plain(reader, kept + part)[len(kept) - 1 :]
        assert np.allclose(prefix.tried(part), wanted, atol=1e-4)
        assert np.allclose(prefix.tried(part), wanted, atol=1e-4)  # a trial leaves nothing behind
        prefix.keep(part[::3])
        kept += part[::3]
    assert len(prefix.tried([])) == 0


def test_a_prefix_that_is_full_keeps_its_first_and_its_last_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = bytes_reader(window=64)
    head = [256, *reader.tokens("Who? ")[0]]
    prefix, kept = reader.prefix("Who? "), list(head)
    work = Work(reader, monkeypatch)
    rng, full = np.random.default_rng(0), 0
    for _ in range(30):
        part = rng.integers(0, 256, 20).tolist()
        if len(kept) + len(part) > 64:
            kept, full = head + kept[-16:], full + 1
        found = prefix.tried(part)
        assert np.allclose(found, plain(reader, kept + part)[len(kept) - 1 :], atol=1e-4)
        prefix.keep(part[:7])
        kept += part[:7]
    assert full > 3 and work.context <= 64
    with pytest.raises(ValueError, match="takes 32"):
        prefix.tried([65] * 33)
    assert len(Prefix(reader, [65] * 500).ids) == 16


def test_a_token_is_read_when_it_is_tried_and_once_more_if_it_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = bytes_reader()
    prefix = reader.prefix()
    work = Work(reader, monkeypatch)
    for _ in range(10):
        prefix.tried([65] * 50)
        prefix.keep([65] * 20)
    assert work.tokens == 10 * 50 + 9 * 20
