"""Write the generated parts of the README: the methods, and the last demo's numbers with their picture.

    python scripts/readme.py [--results out/results.jsonl]     write
    python scripts/readme.py --check                           fail if the table of methods is not what the code says

The parts stand between markers, `<!-- methods -->` and `<!-- /methods -->`; everything else is left alone.
"""

import argparse
import re
import sys
from pathlib import Path

from fewer.cli import describe
from fewer.methods import METHODS
from fewer_eval import report
from fewer_eval.schema import Row, RunInfo

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PICTURE = ROOT / "docs" / "demo.svg"
FAMILIES = {"kv": "caches", "vit": "encoders", "vlm": "visual tokens", "prompt": "prompts", "any": "all"}


def methods_table() -> str:
    lines = ["| method | for | mechanism | needs | faithful to | source |", "| --- | --- | --- | --- | --- | --- |"]
    for name in METHODS:
        card = describe(name)
        path = METHODS[name].__module__.replace(".", "/")
        needs = ", ".join(card["needs"]) or "–"
        family = FAMILIES[card["family"]]
        lines.append(
            f"| [{name}](src/{path}.py) | {family} | {card['mechanism']} | {needs} | {card['faithfulness']} "
            f"| {card['source']} |"
        )
    return "\n".join(lines)


def demo_table(rows: list[Row], info: RunInfo) -> str:
    """The compare table in Markdown, with the circumstances under it."""
    head, *body = report.cells(rows)
    lines = [" | ".join(["", *head, ""]).strip(), "|" + " --- |" * len(head)]
    lines += [" | ".join(["", *line, ""]).strip() for line in body]
    where = f"{info.hardware['cpu']}, {info.hardware['cores']} cores; torch {info.versions['torch']}, "
    where += f"transformers {info.versions['transformers']}; {info.tokens} tokens, {info.samples} samples a task, "
    where += f"seed {info.seed}, {info.date}"
    return "\n".join([*lines, "", f"`{info.command}` on {where}."])


def put(text: str, part: str, content: str) -> str:
    """The text with the part's content replaced."""
    start, end = f"<!-- {part} -->", f"<!-- /{part} -->"
    if text.count(start) != 1 or text.count(end) != 1:
        raise SystemExit(f"README.md needs {start} and {end} once each")
    return re.sub(re.escape(start) + ".*?" + re.escape(end), lambda _: f"{start}\n{content}\n{end}", text, flags=re.S)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="results.jsonl of a comparison")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    before = README.read_text()
    text = put(before, "methods", methods_table())
    if options.check:
        if text != before:
            print("README.md: the table of methods has drifted; run `make docs`", file=sys.stderr)
        return int(text != before)
    if options.results:
        rows, info = report.read_jsonl(options.results)
        text = put(text, "demo", demo_table(rows, info))
        report.svg_file(PICTURE, rows)
    README.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
