"""Speed and memory of llmlingua2, beside package llmlingua 0.2.2 with the same weights on the same texts.

What is measured, in words. A classifier has to read every token once, so the least that any of this could take is the
forward passes alone: their seconds are taken inside each call, on both sides, and what a side takes above its own is
its own cost. The package pads every chunk to 512 tokens and passes 50 at a time; ours are as long as they are and few
at a time, so our passes themselves are cheaper. Both sides have the same weights (MiniLM-L6 with the head that comes
with fewer), the same threads, and count tokens in cl100k; ours meets an exact budget and gives every piece's place.

The package runs in its own environment, since it needs an older transformers, and waits while we run: all take turns.
Correctness comes first: `compat=True` must keep the package's words of hundreds of random texts, chunks in batches must
give what each gives alone, and 8 bits must keep 98 % of the words that float32 keeps; otherwise nothing is timed.

    python benchmarks/prompt.py --peer .venv-llmlingua/bin/python [--tokens 1000,10000,50000,100000] [--rounds 3]
    python benchmarks/prompt.py --peer ... --parity 3000       compare kept words on so many random texts, and no more
"""

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForTokenClassification, AutoTokenizer, BertConfig, BertForTokenClassification

import fewer
from fewer.methods.prompt.llmlingua2 import LLMLingua2
from fewer.models import Pinned, fetch
from fewer.score import llmlingua022
from fewer.score.keepers import Keeper, cuts, keeper
from fewer_eval import environment, text

RATE = 0.5
NAME = "bert-base-multilingual-cased"
"""The package tells a tokenizer's kind by the name of the model's folder."""

PARITOK = Pinned(
    name="paritok",
    version="1.3.14",
    archive="78f43c5b607799049c9dac34db2d89e380629365a9dc72415aedc31aacd4dc20",
    members={"paritok/data/cl100k_base.tiktoken": "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"},
)
"""A package with the cl100k table in it, which the other side wants before it does anything."""

TABLE = hashlib.sha1(b"https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken")  # noqa: S324
"""What tiktoken calls the table's file in its cache."""


class Peer:
    """The other side, waiting for requests."""

    def __init__(self, python: str, folder: Path, cache: Path) -> None:
        self.process = subprocess.Popen(
            [python, str(Path(__file__).parent / "prompt_peer.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=os.environ | {"TIKTOKEN_CACHE_DIR": str(cache), "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        self.versions = self.ask(load=str(folder), threads=torch.get_num_threads())

    def ask(self, **asked: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the other side ended with {self.process.wait()}: nothing is timed")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait()


# --- the same words as the package's ---


def tiny(folder: Path) -> Keeper:
    """A small random classifier with a WordPiece tokenizer trained here, in a folder that both sides can load."""
    folder = folder / f"tiny-{NAME}"
    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # noqa: S106
    inner.normalizer = normalizers.BertNormalizer(lowercase=False)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    inner.train_from_iterator([text.prose()[:60_000]], trainers.WordPieceTrainer(vocab_size=1200, special_tokens=special))
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    torch.manual_seed(0)
    model = BertForTokenClassification(BertConfig(
        vocab_size=inner.get_vocab_size(), hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, num_labels=2,
    )).eval()  # fmt: skip
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.mul_(12 if "word" in name else 4)
    model.save_pretrained(folder)
    save_tokenizer(inner, folder, lower=False)
    return Keeper(model, AutoTokenizer.from_pretrained(folder))


def save_tokenizer(inner: Any, folder: Path, lower: bool) -> None:
    """As files that transformers of today and of two years ago read alike."""
    inner.save(str(folder / "tokenizer.json"))
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    said = {"tokenizer_class": "BertTokenizerFast", "do_lower_case": lower, "model_max_length": 512, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    vocab = sorted(inner.get_vocab().items(), key=lambda item: item[1])
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece, _ in vocab), encoding="utf-8")


def drawn(rng: random.Random, words: list[str]) -> str:
    """A random text: prose, odd words, numbers, marks, signs that no vocabulary has, line breaks, contractions."""
    odd = [
        "don't", "it's", "we 've", "naïve", "Zürich", "3.14", "1,250", "A-17", "x_1", "...", "!!", "?", ";", "(", ")",
        "##", "#1", "東京", "☃", "👩‍🚀", "New York", "“so”", "\n", "\n\n", "\t", " . ", " n't", "e=mc2", "C3PO", "—",
    ]  # fmt: skip
    out = []
    for _ in range(rng.choice([1, 3, 20, 60, 200, 500, 1200])):
        draw = rng.random()
        if draw < 0.75:
            out.append(rng.choice(words))
        elif draw < 0.9:
            out.append(rng.choice(odd))
        elif draw < 0.95:
            out.append("".join(rng.choice("abcdefghijklmnopqrstuvwxyz0123456789-") for _ in range(rng.randint(1, 12))))
        else:
            out.append(rng.choice([".", ",", "!", "?", ".\n"]))
    return "".join(word if word in ".,!?\n" else f" {word}" for word in out).strip() or "word"


def parity(peer: Peer, mine: Keeper, count: int, seed: int = 0) -> dict[str, Any]:
    """How much of what both sides keep is the same, over so many calls with random texts and options."""
    rng, words = random.Random(seed), text.prose()[:60_000].split()
    same, total, labels, texts, splits, failed = 0, 0, 0, 0, 0, 0
    for _ in range(count):
        documents = [drawn(rng, words) for _ in range(rng.choice([1, 1, 1, 1, 3]))]
        forced = rng.choice([(), (), (".",), ("\n", "?", "."), ("!", "New York", ","), ("the", "\n")])
        options = {
            "force_reserve_digit": rng.random() < 0.3, "drop_consecutive": rng.random() < 0.3,
            "use_context_level_filter": rng.random() < 0.7,
        }  # fmt: skip
        pool = rng.choice(["mean", "first"])
        rate = rng.choice([0.9, 0.75, 0.5, 0.33, 0.2, 0.1, round(rng.uniform(0.05, 0.95), 3)])
        theirs = peer.ask(
            documents=documents,
            options={"rate": rate, "force_tokens": forced, "token_to_word": pool, **options},
        )
        if "error" in theirs:
            failed += 1
            continue
        chosen = llmlingua022.Options(
            pool, forced, options["force_reserve_digit"], options["drop_consecutive"],
            coarse=options["use_context_level_filter"],
        )  # fmt: skip
        done = llmlingua022.shorten(mine, documents, rate, chosen)
        ours = [(word.text, word.kept) for document in done for word in document.words]
        whole = [tuple(pair) for pair in theirs["words"]]
        total += len(whole)
        if [word for word, _ in ours] != [word for word, _ in whole]:
            splits += 1
            continue
        agree = sum(a == b for a, b in zip(ours, whole, strict=True))
        same, labels = same + agree, labels + (agree == len(whole))
        texts += "\n\n".join(document.text for document in done if not document.left_out) == theirs["text"]
    return {
        "calls": count, "calls_in_which_the_package_fails": failed, "words": total,
        "labels_the_same": same / max(total, 1),
        "calls_with_every_label_the_same": labels / max(count - failed, 1),
        "calls_with_the_same_text": texts / max(count - failed, 1), "calls_with_other_words": splits,
    }  # fmt: skip
