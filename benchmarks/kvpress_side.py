"""The other side of benchmarks/kv.py: the same measurements with kvpress, run by its own environment's python.

Reads the token ids and settings from a JSON file; the last line of its output is the result as JSON.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import kvpress
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache


def main() -> None:
    given = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(given["threads"])
    removed = 1 - given["keep"]
    presses = {
        "knorm": lambda: kvpress.KnormPress(removed),
        "snapkv": lambda: kvpress.SnapKVPress(removed),
        "adakv": lambda: kvpress.AdaKVPress(kvpress.SnapKVPress(removed)),
        "expected-attention": lambda: kvpress.ExpectedAttentionPress(removed),
    }
    model = AutoModelForCausalLM.from_pretrained(given["model"], dtype=torch.float32).eval()
    ids = torch.tensor([given["ids"]])

    def forward(tokens, cache):
        start = time.perf_counter()
        at = cache.get_seq_length()
        positions = torch.arange(at, at + tokens.shape[1])
        model(tokens, past_key_values=cache, logits_to_keep=1, cache_position=positions)
        return time.perf_counter() - start

    def decode(cache, at):
        times = []
        for step in range(given["steps"] + 2):
            start = time.perf_counter()
            position = torch.tensor([at + step])
            model(
                ids[:, step : step + 1], past_key_values=cache, logits_to_keep=1,
                cache_position=position, position_ids=position.unsqueeze(0),
            )  # fmt: skip
            times.append(time.perf_counter() - start)
        return statistics.median(times[2:])

    def held(cache):
        tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    results, kept = {}, {}
    with torch.inference_mode():
        for name in ("knorm", "snapkv", "expected-attention"):
            press = presses[name]()
            attention = model.model.layers[0].self_attn
            grabbed = {}

            def score(module, *rest, press=press, own=press.score, grabbed=grabbed, attention=attention):
                scores = own(module, *rest)
                if module is attention:
                    n = int(scores.shape[-1] * given["keep"])
                    grabbed["kept"] = scores.topk(n, dim=-1).indices[0].sort(-1).values.tolist()
                return scores

            press.score = score
            with press(model):
                forward(ids[:, : given["check"]], DynamicCache())
            kept[name] = grabbed["kept"]
        forward(ids[:, :512], DynamicCache())
        for name, make in presses.items():
            prefill, step = [], []
            for _ in range(given["repeats"]):
                cache = DynamicCache()
                plain = forward(ids, cache)
                full_bytes = held(cache)
                full_step = decode(cache, ids.shape[1])
                cache = DynamicCache()
                with make()(model):
                    took = forward(ids, cache)
                    bytes_ratio = held(cache) / full_bytes
                    compressed_step = decode(cache, ids.shape[1])
                for layer in model.model.layers:
                    layer.self_attn.masked_key_indices = None
                prefill.append((took, plain))
                step.append((compressed_step, full_step))
            results[name] = {
                "prefill_ratio": statistics.median(a / b for a, b in prefill),
                "prefill_s": statistics.median(b for _, b in prefill),
                "decode_ratio": statistics.median(a / b for a, b in step),
                "decode_ms": statistics.median(a for a, _ in step) * 1000,
                "decode_full_ms": statistics.median(b for _, b in step) * 1000,
                "held_ratio": bytes_ratio,
            }
    versions = {"kvpress": "0.5.5", "transformers": transformers.__version__, "torch": torch.__version__}
    print(json.dumps({"results": results, "kept": kept, "versions": versions}))


if __name__ == "__main__":
    main()
