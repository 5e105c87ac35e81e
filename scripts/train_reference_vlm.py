"""Makes the reference vision-language model: reference model trained for this, not a general one.

    python scripts/train_reference_vlm.py --minutes 45              # two cores, a language model from scratch
    python scripts/train_reference_vlm.py --language smollm2 --device cuda --minutes 15

Scenes are drawn from seeds, the tower sees each once (features are kept in the cache folder), then the projector and
the language model learn to answer. A call that was interrupted goes on from its checkpoint. At the end the weights are
written, read back, and graded on held-out samples, with and without the image: results/reference-vlm.json.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch

from fewer import files
from fewer.models import cache_dir
from fewer.reference_vlm import KIND, VERSION, build, load, word_tokenizer
from fewer_eval import environment
from fewer_eval.looking import TASKS
from fewer_eval.looking.course import Course, Recipe
from fewer_eval.looking.grade import CLEARLY, Grader
from fewer_eval.looking.learner import Learner
from fewer_eval.looking.lessons import vocabulary
from fewer_eval.looking.pool import Pool, pool

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "src" / "fewer" / "data" / "reference-vlm.safetensors"
RESULTS = ROOT / "results" / "reference-vlm.json"
SIZES = {
    "hidden_size": 256, "intermediate_size": 448, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip
RANK = 16
NOTE = "reference model trained for this, not a general one"
CUT = {
    "small": (
        "language model from scratch instead of SmolLM2-135M (which needs an accelerator: --language smollm2); "
        "no free captions: a stamp's kind instead; no 'same objects in both' of two images"
    ),
    "smollm2": "no free captions: a stamp's kind instead; no 'same objects in both' of two images",
}


def ship(learner: Learner, tokenizer: Any, language: str, out: Path) -> None:
    """The weights, and beside them the tokenizer where it is our own."""
    head = {"format": KIND, "version": VERSION, "language": language, "sizes": json.dumps(SIZES), "note": NOTE}
    files.write(out, learner.weights(), head)
    if language == "small":
        described = json.loads(tokenizer.backend_tokenizer.to_str())
        described["padding"] = described["truncation"] = None
        beside = out.with_name(f"{out.stem}.tokenizer.json")
        beside.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


def grades(out: Path, pools: dict[str, Pool], n: int, device: str) -> list[dict[str, Any]]:
    """Every task on held-out seeds, by the model as it is loaded from its file."""
    mean = torch.cat([one.features[:100].float().flatten(0, 1) for one in pools.values()]).mean(0)
    grader = Grader(*load(out, device=device), mean)
    made = []
    for task in TASKS.values():
        made.append(grader.task(task, range(n)).to_dict())
        print(made[-1], flush=True)
    made.append(grader.second_turns(range(n)).to_dict())
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language", choices=("small", "smollm2"), default="small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=45.0, help="of training, beside the tower and the grading")
    parser.add_argument("--images", type=int, nargs=3, default=(800, 400, 500), metavar=("GRIDS", "PAGES", "STAMPS"))
    parser.add_argument("--rate", type=float, help="default 0.003, or 0.0005 for smollm2")
    parser.add_argument("--graded", type=int, default=200, help="held-out samples a task")
    parser.add_argument(
        "--features", type=Path, default=cache_dir() / "looking-1", help="folder of the tower's features"
    )
    parser.add_argument("--out", type=Path, default=SHIPPED)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    small = options.language == "small"
    torch.manual_seed(0)
    start = time.monotonic()
    model, tokenizer = build(options.language, word_tokenizer(vocabulary()) if small else None, SIZES, say=print)
    model = model.to(options.device)
    sorts = zip(("grid", "page", "portrait"), options.images, strict=True)
    pools = {sort: pool(sort, n, model.model.vision_tower, folder=options.features) for sort, n in sorts}
    drawn = time.monotonic() - start
    recipe = Recipe(options.minutes, rate=options.rate or (3e-3 if small else 5e-4), pointing=0.5 if small else 0.0)
    every = torch.cat([one.features[:100] for one in pools.values()])
    learner = Learner(model, every, rank=0 if small else RANK).to(options.device)
    course = Course(learner, tokenizer, pools, recipe, options.device)
    checkpoint = options.features / f"{options.language}.checkpoint"
    course.run(checkpoint)
    ship(learner, tokenizer, options.language, options.out)
    graded = grades(options.out, pools, options.graded, options.device)
    record = {
        "note": NOTE, "date": date.today().isoformat(), "language": options.language,
        "cut": CUT[options.language], "hardware": environment.hardware(), "versions": environment.versions(),
        "threads": torch.get_num_threads(), "device": options.device,
        "tower": "DINOv2 ViT-S/14 of fewer.vision, frozen, hidden_states[-2], 224 x 224 pixels, 256 tokens",
        "sizes": SIZES if small else {"rank": RANK}, "weights": sum(one.numel() for one in learner.weights().values()),
        "data": {
            "code": "fewer_eval.looking.scenes.scene(sort, seed, held_out)",
            "training seeds": {sort: [0, len(one.scenes)] for sort, one in pools.items()},
            "held-out seeds": [0, options.graded], "pairs": "two training grids, drawn at each step",
        },
        "recipe": asdict(recipe), "steps": course.steps, "seconds before training": round(drawn),
        "minutes of training": round(course.spent / 60, 1), "clearly": CLEARLY,
        "graded in": "bfloat16 (autocast), as it was trained; greedy; exact match of the whole answer",
        "blind": "the same model, each visual token replaced by the mean of all training features",
        "tasks": graded, "curve": course.curve,
    }  # fmt: skip
    options.results.write_text(json.dumps(record, indent=1) + "\n")
    checkpoint.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
