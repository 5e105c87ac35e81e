"""Time to the first token of a vision-language model with fewer visual tokens, stage by stage, and of a decoding step.

What is measured, in words. The first token costs the vision tower, the choice of tokens, and the language model's
prefill; only the last gets cheaper, so the least that any method could take is the tower plus the prefill's share of
FLOPs, which is printed beside each time. What choosing takes is shown as a share of the prefill that is left.

The model: DINOv2 ViT-S/14 and SmolLM2-135M in LLaVA's shape, real weights but for an untrained projector: speed does
not ask what is said. Attention that a method reads of the tower comes from single rows while it runs; beside it stands
what many implementations do, the tower run once more with its attention maps written out.

Correctness comes first: for evenly spaced tokens the logits must equal those of transformers' own way with a shortened
prompt (`mm_encoder_outputs`, explicit positions), and every method must leave just what was asked; otherwise nothing is
timed. All runs take turns, and what is shown are medians.

    python benchmarks/vlm.py [--keep 64] [--methods all] [--rounds 7] [--json F]
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import date
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fewer
from fewer import reference_vlm
from fewer.adapters.vlm_stages import early
from fewer.cost import Decoder
from fewer.methods import METHODS, of_family
from fewer_eval import environment

VISUAL = reference_vlm.VISUAL
VIDEO = ("evs", "dycoke", "ts-llava")
QUESTION = "What is in the middle of this picture, and what colour does it have? Answer in one sentence."


def inputs_of(processor: Any) -> dict[str, Tensor]:
    noise = torch.randint(0, 255, (224, 224, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    picture = Image.fromarray(noise.numpy())
    text = f"{reference_vlm.IMAGE}\n{QUESTION}"
    return dict(processor(images=[picture], text=[text], return_tensors="pt"))


@torch.inference_mode()
def correct(model: Any, inputs: dict[str, Tensor], keep: int) -> None:
    """Whether what is to be timed is right."""
    with fewer.compress(model, "uniform", keep=keep) as run:
        got = model(**inputs).logits[:, -1]
    features = model.model.get_image_features(inputs["pixel_values"])
    alive = run.kept[0][0]
    features.pooler_output = [features.pooler_output[0][alive]]
    at = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten()
    stays = torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool)
    stays[at] = False
    stays[at[alive]] = True
    ids = inputs["input_ids"][:, stays]
    expected = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=torch.arange(len(stays))[stays].unsqueeze(0),
        mm_encoder_outputs={"image": features},
    ).logits[:, -1]
    off = float((got - expected).abs().max())
    if len(alive) != keep or off > 1e-2 * float(expected.abs().max()):
        raise SystemExit(f"{len(alive)} tokens were left of {keep}, and logits are off by {off}: nothing is timed")


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Case:
    """One method: what each round of it took, stage by stage."""

    def __init__(self, model: Any, inputs: dict[str, Tensor], method: str | None, keep: int) -> None:
        self.model, self.inputs, self.method, self.keep = model, inputs, method, keep
        self.first: list[float] = []
        self.tower: list[float] = []
        self.choosing: list[float] = []
        self.step: list[float] = []
        self.flops, self.mean, self.bytes = 1.0, float(VISUAL), 0
        self._towers = 0.0

    @torch.inference_mode()
    def round(self) -> None:
        tower, began = self.model.base_model.vision_tower, [0.0]
        handles = [
            tower.register_forward_pre_hook(lambda *_: began.__setitem__(0, time.perf_counter())),
            tower.register_forward_hook(lambda *_: self.tower.append(time.perf_counter() - began[0])),
        ]
        whole = self.method is None
        try:
            with nullcontext() if whole else fewer.compress(self.model, self.method, keep=self.keep) as run:
                start = time.perf_counter()
                out = self.model(**self.inputs, use_cache=True, logits_to_keep=1)
                self.first.append(time.perf_counter() - start)
                token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
                mask = torch.cat([self.inputs["attention_mask"], torch.ones(1, 1, dtype=torch.long)], 1)
                start = time.perf_counter()
                for _ in range(4):
                    told = {"input_ids": token, "attention_mask": mask, "past_key_values": cache}
                    token = self.model(**told).logits[:, -1:].argmax(-1)
                    mask = torch.cat([mask, torch.ones(1, 1, dtype=torch.long)], 1)
                self.step.append((time.perf_counter() - start) / 4)
        finally:
            for handle in handles:
                handle.remove()
        if not whole:
            report = run.report
            self.choosing.append(report.seconds)
            self.flops, self.mean, self.bytes = report.flops - report.choosing, report.mean, report.cache.bytes_kept
            if report.read[-1] > self.keep:
                raise SystemExit(f"{self.method} left {report.read[-1]} tokens of {self.keep}: nothing is worth timing")

    def figures(self) -> dict[str, Any]:
        first, tower = statistics.median(self.first), statistics.median(self.tower)
        choosing = statistics.median(self.choosing) if self.choosing else 0.0
        prefill = first - tower - choosing
        return {
            "method": self.method or "whole", "tokens a layer": round(self.mean, 1), "first token": first,
            "tower": tower, "choosing": choosing, "prefill": prefill, "choosing / prefill": choosing / prefill,
            "decoding step": statistics.median(self.step), "flops": self.flops, "cache bytes": self.bytes,
        }  # fmt: skip


@torch.inference_mode()
def rows_on_demand(model: Any, inputs: dict[str, Tensor], rounds: int) -> dict[str, float]:
    """Reading the class token's row while the tower runs, beside running it a second time with maps written out."""
    tower, pixels = model.base_model.vision_tower, inputs["pixel_values"]
    plain, watched, twice = [], [], []
    for _ in range(rounds):
        plain.append(timed(lambda: model.model.get_image_features(pixels)))
        with fewer.compress(model, "vispruner", keep=64):
            watched.append(timed(lambda: model.model.get_image_features(pixels)))
        start = time.perf_counter()
        model.model.get_image_features(pixels)
        tower.set_attn_implementation("eager")
        tower(pixels, output_attentions=True)
        tower.set_attn_implementation("sdpa")
        twice.append(time.perf_counter() - start)
    return {
        "features": statistics.median(plain),
        "features, one row read": statistics.median(watched),
        "features, and the tower again with its maps": statistics.median(twice),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=int, default=64)
    parser.add_argument("--methods", default="all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, default=Path("results/vlm-speed.json"))
    options = parser.parse_args()
    torch.manual_seed(0)
    model, tokenizer = reference_vlm.build("smollm2")
    inputs = inputs_of(reference_vlm.processor_of(tokenizer))
    correct(model, inputs, options.keep)
    known = [name for name in of_family("vlm") if name not in ("full", *VIDEO)]
    chosen = [*known, "turbo", "tome"] if options.methods == "all" else options.methods.split(",")
    cases = [Case(model, inputs, None, options.keep), *(Case(model, inputs, name, options.keep) for name in chosen)]
    for case in cases:  # once for nothing: first calls make tables and pages
        case.round()
    for case in cases:
        case.first, case.tower, case.choosing, case.step = [], [], [], []
    for _ in range(options.rounds):
        for case in cases:
            case.round()
    figures = [case.figures() for case in cases]
    whole = figures[0]
    table = Table(
        *("method", "tokens a layer", "first token", "speed-up", "floor", "tower", "choosing", "of the prefill", "step")
    )
    for one in figures:
        floor = whole["first token"] / (whole["tower"] + whole["prefill"] * one["flops"])
        one["speed-up"], one["floor"] = whole["first token"] / one["first token"], floor
        if not (one["method"] in METHODS and early(METHODS[one["method"]]())):
            one["within 3 %"] = one["choosing / prefill"] <= 0.03
        table.add_row(
            one["method"], f"{one['tokens a layer']:.0f}", f"{one['first token'] * 1e3:.0f} ms",
            f"{one['speed-up']:.2f}", f"{floor:.2f}", f"{one['tower'] * 1e3:.0f} ms",
            f"{one['choosing'] * 1e3:.1f} ms", f"{one['choosing / prefill']:.1%}",
            f"{one['decoding step'] * 1e3:.1f} ms",
        )  # fmt: skip
    console = Console(width=140)
    console.print(table)
    rows = rows_on_demand(model, inputs, options.rounds)
    console.print({name: f"{seconds * 1e3:.1f} ms" for name, seconds in rows.items()})
    record = {
        "benchmark": "vlm", "date": date.today().isoformat(), "hardware": environment.hardware(),
        "versions": environment.versions(), "threads": torch.get_num_threads(), "keep": options.keep,
        "rounds": options.rounds, "tokens": int(inputs["input_ids"].shape[1]),
        "prefill flops": Decoder.of(model).prefill_flops(int(inputs["input_ids"].shape[1])),
        "methods": figures, "rows on demand": rows,
    }  # fmt: skip
    options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
