"""A compression as a page that stands for itself: what stayed dark, what was dropped pale, what was protected lined."""

from html import escape
from itertools import pairwise

from fewer.prompts.compression import Compression

_STYLE = """
body { font: 16px/1.6 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem; color: #111;
  background: #fff; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; border-top: 1px solid #ccc; padding: 1rem 0;
  unicode-bidi: isolate; }
del { color: #767676; text-decoration: none; }
u { text-decoration: underline 2px #06c; text-underline-offset: 3px; }
ins { background: #e6f2e6; text-decoration: none; }
dt { font-weight: 600; float: left; clear: left; width: 10rem; }
dd { margin: 0 0 0 10rem; }
"""

_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"} | {0x7F: 0x2421}


def html_of(done: Compression) -> str:
    """The page: counts, then every document whole. It asks for nothing from outside and runs no script."""
    facts = {
        "method": done.method,
        "tokens before": f"{done.tokens_before:,}",
        "tokens after": f"{done.tokens_after:,} ({done.share:.1%})",
        "allowed": "the method's own threshold" if done.limit is None else f"{done.limit:,}",
        "counted by": done.tokenizer,
        "protected": ", ".join(sorted({unit.rule for unit in done.units if unit.rule})) or "nothing",
        **{f"note {i}": note for i, note in enumerate(done.notes, 1)},
    }
    order = list(dict.fromkeys(run.document for run in done.runs))
    if order != sorted(order):
        facts["order"] = "documents were put out as " + ", ".join(str(i + 1) for i in order)
    said = "".join(f"<dt>{_shown(key)}</dt><dd>{_shown(value)}</dd>\n" for key, value in facts.items())
    bodies = "".join(
        f'<section class="text" dir="auto" aria-label="document {i + 1}">{_document(done, i)}</section>\n'
        for i in range(len(done.source.documents))
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>fewer: {done.tokens_before:,} tokens to {done.tokens_after:,}</title>\n"
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{done.tokens_before:,} tokens to {done.tokens_after:,}</h1>\n"
        "<p>Dark: kept. <del>Pale: dropped.</del> <u>Underlined: protected.</u> <ins>Green: written anew.</ins></p>\n"
        f"<dl>\n{said}</dl>\n{bodies}</body>\n</html>\n"
    )


def _document(done: Compression, index: int) -> str:
    """One document, cut wherever something begins or ends to stay, to be protected or to be rewritten."""
    text = done.source.documents[index]
    kept = [(run.start, run.end) for run in done.runs if run.document == index and run.written is None]
    rules = [(unit.start, unit.end, unit.rule) for unit in done.units if unit.document == index and unit.rule]
    written = {run.start: run.written for run in done.runs if run.document == index and run.written is not None}
    edges = sorted(
        {0, len(text), *(at for span in kept for at in span), *(at for r in rules for at in r[:2]), *written}
    )
    stays = _inside([(*span, "kept") for span in kept], edges)
    named = _inside(rules, edges)
    out = []
    for (start, end), dark, rule in zip(pairwise(edges), stays, named, strict=True):
        if (new := written.pop(start, None)) is not None:
            out.append(f"<ins>{_shown(new)}</ins>")
        piece = _shown(text[start:end])
        piece = piece if dark else f"<del>{piece}</del>"
        out.append(f'<u title="{_shown(rule)}">{piece}</u>' if rule else piece)
    return "".join(out + [f"<ins>{_shown(new)}</ins>" for new in written.values() if new])


def _inside(spans: list[tuple[int, int, str]], edges: list[int]) -> list[str]:
    """For each stretch between two edges, the name of the span that holds it, "" for none."""
    spans, at, out = sorted(spans), 0, []
    for start, _ in pairwise(edges):
        while at < len(spans) and spans[at][1] <= start:
            at += 1
        out.append(spans[at][2] if at < len(spans) and spans[at][0] <= start else "")
    return out


def _shown(text: str) -> str:
    return escape(text.translate(_CONTROLS))
