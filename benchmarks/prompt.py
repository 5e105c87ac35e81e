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
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForTokenClassification,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaForTokenClassification,
)

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

    def __init__(self, python: str, folder: Path) -> None:
        self.process = subprocess.Popen(
            [python, str(Path(__file__).parent / "prompt_peer.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
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


KINDS = {NAME: BertForTokenClassification, "xlm-roberta-large": XLMRobertaForTokenClassification}


def tiny(folder: Path, kind: str) -> Keeper:
    """A small random classifier with a tokenizer trained here, in a folder that both sides can load."""
    prose, sizes = [text.prose()[:60_000]], {
        "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "num_labels": 2,
    }  # fmt: skip
    if kind == NAME:
        inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # noqa: S106
        inner.normalizer = normalizers.BertNormalizer(lowercase=False)
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        names = {name: f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
        inner.train_from_iterator(
            prose, trainers.WordPieceTrainer(vocab_size=1200, special_tokens=list(names.values()))
        )
        inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        config: Any = BertConfig(vocab_size=inner.get_vocab_size(), **sizes)
    else:
        names = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}
        inner = Tokenizer(models.Unigram())
        inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
        inner.decoder = decoders.Metaspace()
        learned = trainers.UnigramTrainer(vocab_size=1200, special_tokens=list(names.values()), unk_token="<unk>")  # noqa: S106
        inner.train_from_iterator(prose, learned)
        inner.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
        names |= {"cls": "<s>", "sep": "</s>"}
        config = XLMRobertaConfig(vocab_size=inner.get_vocab_size(), max_position_embeddings=514, **sizes)
    torch.manual_seed(0)
    model = KINDS[kind](config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.mul_(12 if "word" in name else 4)
    return saved(folder / f"tiny-{kind}", model, inner, names, lower=False)


def saved(folder: Path, model: Any, inner: Any, names: dict[str, str], lower: bool) -> Keeper:
    """Written as files that transformers of today and of two years ago read alike; and as it is."""
    model.save_pretrained(folder)
    inner.save(str(folder / "tokenizer.json"))
    marks = {f"{name}_token": mark for name, mark in names.items()}
    known = "BertTokenizerFast" if "[CLS]" in names.values() else "XLMRobertaTokenizerFast"
    said = {"tokenizer_class": known, "do_lower_case": lower, "model_max_length": 512, **marks}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    (folder / "special_tokens_map.json").write_text(json.dumps(marks))
    return Keeper(model, PreTrainedTokenizerFast(tokenizer_object=inner, **marks))


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


# --- our own results, checked ---


def correct(plain: Keeper, eight: Keeper, source: str) -> dict[str, float]:
    """Whether what is to be timed is right: each chunk alone gives what it gives in the text; and which share of the
    words that stay in float32 stay in 8 bits."""
    ids, offsets = plain.tokens(source)
    (_, p), edges = plain([source])[0], cuts(source, offsets, plain.room)
    tokenizer = plain.tokenizer
    for start, end in list(pairwise(edges))[:8]:
        row = torch.tensor([[tokenizer.cls_token_id, *ids[start:end].tolist(), tokenizer.sep_token_id]])
        with torch.inference_mode():
            alone = plain.model(input_ids=row).logits[0].softmax(-1)[1:-1, 1].numpy()
        if (off := float(np.abs(alone - p[start:end]).max())) > 1e-4:
            raise SystemExit(f"a chunk alone is {off:.1e} off what it is in the text: nothing is timed")
    same = {}
    for keep in (0.2, 0.33, 0.5, 0.7):
        ours, theirs = (np.array([unit.kept for unit in compressed(one, source, keep).units]) for one in (plain, eight))
        same[str(keep)] = float((ours & theirs).sum() / ours.sum())
    print("words kept in float32 that 8 bits keep:", {keep: f"{share:.2%}" for keep, share in same.items()})
    if min(same.values()) < 0.98:
        print("that is fewer than 98 %")
    return same


def compressed(one: Keeper, source: str, keep: float = RATE) -> fewer.Compression:
    return fewer.compress_prompt(source, LLMLingua2(model=one), keep=keep, tokenizer="cl100k_base")


def english(tokens: int) -> str:
    """Prose of so many of the classifier's tokens; it begins again after 43,000 of them."""
    whole = text.prose() + "\n\n"
    _, offsets = keeper().tokens(whole)
    times, rest = divmod(tokens, len(offsets))
    return whole * times + whole[: offsets[rest - 1, 1] if rest else 0]


# --- time ---


@contextmanager
def forwards(one: Keeper) -> Iterator[list[tuple[float, float]]]:
    """When each forward of a keeper's model began and ended; several run side by side."""
    own, spans = one.model.forward, []

    def forward(*args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        out = own(*args, **options)
        spans.append((start, time.perf_counter()))
        return out

    one.model.forward = forward
    try:
        yield spans
    finally:
        del one.model.forward


def timed(one: Keeper, source: str) -> dict[str, float]:
    """Seconds of a call, and those of them in which some forward was under way."""
    with forwards(one) as spans:
        start = time.perf_counter()
        compressed(one, source)
        whole = time.perf_counter() - start
    busy, at = 0.0, 0.0
    for begin, end in sorted(spans):
        busy += max(0.0, end - max(begin, at))
        at = max(at, end)
    return {"s": whole, "forward_s": busy}


def middle(runs: list[dict[str, float]], tokens: int) -> dict[str, float]:
    """Medians of several runs."""
    found = {key: statistics.median(run[key] for run in runs) for key in ("s", "forward_s")}
    own = statistics.median((run["s"] - run["forward_s"]) / run["forward_s"] for run in runs)
    return {"tokens_per_s": tokens / found["s"], **found, "own_over_forward": own}


def peak() -> int:
    """The most memory that this process has had since `fresh_peak`, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory(tokens: int, bits: int | None) -> dict[str, int]:
    """The peak of one call in a process of its own, and what it had before."""
    command = [sys.executable, __file__, "--rss", str(tokens), "--bits", str(bits or 32)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def rss(tokens: int, bits: int) -> None:
    one, source = keeper(bits=None if bits == 32 else bits), english(tokens)
    compressed(one, source[:20_000])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = peak()
    compressed(one, source)
    print(json.dumps({"before": before, "peak": peak()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="the python of an environment with llmlingua 0.2.2")
    parser.add_argument("--tokens", default="1000,10000,50000,100000")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parity", type=int, help="only compare kept words, over so many calls a kind of tokenizer")
    parser.add_argument("--json", type=Path, default=Path("results/prompt-speed.json"))
    parser.add_argument("--rss", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--bits", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        shutil.copy(fetch(PARITOK, print) / next(iter(PARITOK.members)), folder / TABLE.hexdigest())
        os.environ["TIKTOKEN_CACHE_DIR"] = made
        if options.rss:
            rss(options.rss, options.bits)
            return
        if options.peer is None:
            parser.error("--peer is needed")
        record = {"date": date.today().isoformat(), "threads": torch.get_num_threads(),
                  "hardware": environment.hardware(), "versions": environment.versions()}  # fmt: skip
        same = {}
        for kind in KINDS:
            mine = tiny(folder, kind)
            peer = Peer(options.peer, folder / f"tiny-{kind}")
            same[kind] = parity(peer, mine, options.parity or 100)
            peer.close()
            print(f"compat=True beside the package, {kind}: {same[kind]}")
            if min(same[kind]["labels_the_same"], same[kind]["calls_with_every_label_the_same"]) < 0.99:
                raise SystemExit("compat=True does not keep the package's words: nothing is timed")
        if options.parity:
            options.json = Path("results/prompt-parity.json")
            finish(options, {"benchmark": "prompt, parity", **record, "kinds": same, "peer_versions": peer.versions})
            return
        measure(options, folder, {"benchmark": "prompt", **record, "parity": same})


def measure(options: argparse.Namespace, folder: Path, record: dict[str, Any]) -> None:
    """Everything that takes time, in turns."""
    plain, eight = keeper(), keeper(bits=8)
    names = {name: getattr(plain.tokenizer, f"{name}_token") for name in ("pad", "unk", "cls", "sep", "mask")}
    whole = folder / f"minilm-{NAME}"
    saved(whole, plain.model, plain.tokenizer.backend_tokenizer, names, lower=True)
    peer = Peer(options.peer, whole)
    words = correct(plain, eight, english(10_000))
    sides: dict[str, Any] = {
        "fewer": lambda source: timed(plain, source),
        "fewer, 8 bits": lambda source: timed(eight, source),
        "llmlingua 0.2.2": lambda source: peer.ask(time=source, rate=RATE),
    }
    results = {}
    for tokens in map(int, options.tokens.split(",")):
        source = english(tokens)
        for run in sides.values():
            run(source[:4000])
        runs: dict[str, list[Any]] = {name: [] for name in sides}
        for _ in range(options.rounds):
            for name, run in sides.items():
                runs[name].append(run(source))
        found = {name: middle(taken, tokens) for name, taken in runs.items()}
        base = [run["s"] for run in runs["llmlingua 0.2.2"]]
        for name in found:
            found[name]["speedup"] = statistics.median(
                theirs / run["s"] for theirs, run in zip(base, runs[name], strict=True)
            )
        results[str(tokens)] = found
        show(tokens, found)
    peaks = {
        name: {str(tokens): memory(tokens, bits) for tokens in (10_000, 100_000)}
        for name, bits in (("fewer", None), ("fewer, 8 bits", 8))
    }
    for name, found in peaks.items():
        said = ", ".join(f"{int(tokens):,} tokens {one['peak'] / 2**20:.0f} MiB" for tokens, one in found.items())
        print(f"peak memory of the process, {name}: {said}")
    finish(options, {
        **record, "keep": RATE, "rounds": options.rounds, "peer_versions": peer.versions,
        "model": "MiniLM-L6 (6 layers, 384 wide) with the head that comes with fewer, float32",
        "words_kept_in_8_bits": words, "results": results, "peak_bytes": peaks,
    })  # fmt: skip
    peer.close()


def show(tokens: int, found: dict[str, dict[str, float]]) -> None:
    table = Table("", "tokens/s", "seconds", "of that forwards", "the rest / forwards", "over the package",
                  title=f"{tokens:,} tokens")  # fmt: skip
    for name, row in found.items():
        table.add_row(
            name, f"{row['tokens_per_s']:,.0f}", f"{row['s']:.3f}", f"{row['forward_s']:.3f}",
            f"{row['own_over_forward']:.3f}", f"{row['speedup']:.2f}",
        )  # fmt: skip
    Console(width=110).print(table)


def finish(options: argparse.Namespace, record: dict[str, Any]) -> None:
    """One line of JSON, and the file."""
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
