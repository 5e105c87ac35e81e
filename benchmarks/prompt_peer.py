"""The other side of benchmarks/prompt.py: package llmlingua 0.2.2, run by its own environment's python.

Reads one JSON request a line and answers each with one line; TIKTOKEN_CACHE_DIR has to hold the cl100k table.

    {"load": FOLDER, "threads": 2}           a token classifier; the folder's name says of which kind
    {"documents": [...], "options": {...}}   the package's text, words and labels of one call, or the error it ended in
    {"time": TEXT, "rate": 0.5}              seconds of one call, and of the forward passes in it
    {"rss": true}                            the most memory that this process had, in bytes
"""

import json
import resource
import sys
import time

import torch
import transformers
from llmlingua import PromptCompressor

WORD, LABEL = "\x1e", "\x1f"


class Timed:
    """A model's forward, and the seconds spent in it."""

    def __init__(self, model):
        self.forward, self.seconds = model.forward, 0.0

    def __call__(self, *args, **kwargs):
        start = time.perf_counter()
        out = self.forward(*args, **kwargs)
        self.seconds += time.perf_counter() - start
        return out


def labelled(compressor, documents, options):
    done = compressor.compress_prompt(
        documents, return_word_label=True, word_sep=WORD, label_sep=LABEL, **options
    )  # fmt: skip
    pairs = [pair.rsplit(LABEL, 1) for pair in done["fn_labeled_original_prompt"].split(WORD) if pair]
    return {"text": done["compressed_prompt"], "words": [[word, label == "1"] for word, label in pairs]}


def main():
    compressor = timed = None
    for line in sys.stdin:
        asked = json.loads(line)
        if "load" in asked:
            torch.set_num_threads(asked["threads"])
            compressor = PromptCompressor(asked["load"], device_map="cpu", use_llmlingua2=True)
            compressor.model.eval()
            compressor.model.forward = timed = Timed(compressor.model)
            answer = {"llmlingua": "0.2.2", "transformers": transformers.__version__, "torch": torch.__version__}
        elif "documents" in asked:
            try:
                answer = labelled(compressor, asked["documents"], asked["options"])
            except (IndexError, ZeroDivisionError, ValueError) as why:
                answer = {"error": f"{type(why).__name__}: {why}"}
        elif "time" in asked:
            timed.seconds, start = 0.0, time.perf_counter()
            done = compressor.compress_prompt([asked["time"]], rate=asked["rate"])
            answer = {"s": time.perf_counter() - start, "forward_s": timed.seconds, "tokens": done["compressed_tokens"]}
        else:
            answer = {"rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
