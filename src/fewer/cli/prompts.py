"""`fewer prompt` and `fewer restore`: texts shortened, and given back."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import regex
import typer

from fewer import fit as fits
from fewer.cli.bulk import engine_of, shorten_file
from fewer.cli.common import Json, check_outputs, check_share, err, print_json, read_text, refuse_empty, stdout
from fewer.methods import resolve_prompt
from fewer.prompts.bulk import Shortener
from fewer.prompts.compression import restore as restored
from fewer.prompts.front import compress_prompt
from fewer.prompts.html import html_of
from fewer.prompts.protect import named, pattern
from fewer.types import FewerError

Separator = Annotated[
    str | None, typer.Option("--documents", help="What stands between documents in a file; \\n is a line break.")
]


def prompt(
    files: Annotated[
        list[Path] | None, typer.Argument(help="A text file, or several, each a document; '-' is stdin. Or --in.")
    ] = None,
    method: Annotated[str, typer.Option(help="A name that `fewer methods --family prompt` lists.")] = "llmlingua2",
    keep: Annotated[str | None, typer.Option(help="The share of tokens that may stay, in (0, 1].")] = None,
    tokens: Annotated[int | None, typer.Option(help="How many tokens may stay.")] = None,
    question: Annotated[str | None, typer.Option(help="What will be asked about the text.")] = None,
    instruction: Annotated[str | None, typer.Option(help="What the reader is told to do.")] = None,
    protect: Annotated[list[str] | None, typer.Option(help="A text that must stay; may be repeated.")] = None,
    protect_regex: Annotated[list[str] | None, typer.Option(help="What matches this must stay; repeatable.")] = None,
    protect_class: Annotated[
        list[str] | None, typer.Option(help="numbers, negations, identifiers, paths, urls, quotes, code or keys.")
    ] = None,
    tokenizer: Annotated[str, typer.Option(help="What counts tokens: a name, a folder, a hub name.")] = "default",
    separator: Separator = None,
    fit: Annotated[Path | None, typer.Option(help="A file that `fewer fit` made for the method.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page that shows what stayed.")] = None,
    patch: Annotated[Path | None, typer.Option(help="Write what `fewer restore` needs.")] = None,
    source: Annotated[
        Path | None,
        typer.Option("--in", help="Instead of FILES: JSONL, a prompt a line: text or documents, question if any."),
    ] = None,
    target: Annotated[
        Path | None, typer.Option("--out", help="With --in: JSONL, the same lines shortened. Goes on if interrupted.")
    ] = None,
    patches: Annotated[bool, typer.Option("--patches", help="With --in: each line has what restoring needs.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="With --in: replace --out if it is there.")] = False,
    engine: Annotated[str, typer.Option(help="With --in: who shortens, local or ray (a cluster).")] = "local",
    as_json: Json = False,
) -> None:
    """Shorten a text to a budget; the text goes to stdout as it is, the report to stderr.

    With --in and --out: every line of a JSONL file. One that cannot be shortened says why in its field error, and the
    exit code is 1 if there are any. What was interrupted goes on when the same command is given again.
    """
    if keep is not None:
        check_share(keep, ", or give --tokens")
    refuse_empty({"--question": question, "--instruction": instruction})
    if source is not None or target is not None:
        if source is None or target is None:
            raise FewerError("--in and --out go together: where prompts come from, and where they go")
        wrong = {"FILES": files or None, "--documents": separator, "--html": html, "--patch": patch}
        if given := [name for name, value in wrong.items() if value is not None]:
            raise FewerError(f"{given[0]} is for single texts, and --in for many: give one of them")
        shortener = Shortener(
            method if fit is None else _method(method, fit), keep=keep, tokens=tokens, question=question,
            instruction=instruction, protect=tuple(protect or ()), protect_regex=tuple(protect_regex or ()),
            protect_class=tuple(protect_class or ()), tokenizer=tokenizer, patches=patches,
        )  # fmt: skip
        shorten_file(source, target, shortener, engine_of(engine), overwrite, as_json)
        return
    if not files:
        raise FewerError("give a FILE ('-' is standard input), or --in and --out for many prompts")
    bulk = {"--patches": patches, "--overwrite": overwrite, "--engine": engine != "local"}
    if given := [name for name, value in bulk.items() if value]:
        raise FewerError(f"{given[0]} goes with --in and --out")
    if sum(str(file) == "-" for file in files) > 1:
        raise FewerError("standard input can be read once only: give '-' once")
    check_outputs(("--html", html), ("--patch", patch), read=[*files, fit])
    texts = [_read(file, "FILE") for file in files]
    parts = texts if separator is None else [part for text in texts for part in text.split(_typed(separator))]
    rules = [*(protect or ()), *map(_pattern, protect_regex or ()), *map(named, protect_class or ())]
    done = compress_prompt(
        parts[0] if len(parts) == 1 else parts, _method(method, fit), keep=keep, tokens=tokens, question=question,
        instruction=instruction, protect=rules, tokenizer=tokenizer,
    )  # fmt: skip
    if separator is not None and len(parts) == len(texts):
        done = replace(done, notes=(*done.notes, f"--documents {separator!r} is nowhere in the text"))
    if html is not None:
        _write(html, html_of(done), "--html")
    if patch is not None:
        _write(patch, done.patch(), "--patch")
    if as_json:
        print_json(done.to_dict())
        return
    _put(done.text)
    err.print(str(done), highlight=False, markup=False)


def restore(
    file: Annotated[Path, typer.Argument(help="The shortened text, as it came out; '-' is stdin.")],
    patch: Annotated[Path, typer.Option(help="What `fewer prompt --patch` wrote.")],
    separator: Separator = None,
) -> None:
    """Give back the text that `fewer prompt` shortened, byte for byte, to stdout."""
    if str(file) == str(patch) == "-":
        raise FewerError("standard input can be read once only: give '-' once")
    source = restored(_read(file, "FILE", empty=True), _read(patch, "--patch"))
    if isinstance(source, str):
        _put(source)
    elif separator is None:
        raise FewerError(f"the patch holds {len(source)} documents: say by --documents what to put between them")
    else:
        _put(_typed(separator).join(source))


def _read(file: Path, option: str, empty: bool = False) -> str:
    """The text of a file. UTF-8 text may hold zero bytes, but no text that anyone wrote does."""
    text = read_text(file, option)
    if (zero := text.find("\0")) >= 0:
        raise FewerError(f"{option} {file} is not text: there is a zero byte in it (character {zero})")
    if not text.strip() and not empty:
        raise FewerError(f"{option} {file} is empty")
    return text


def _method(name: str, fit: Path | None) -> Any:
    """The method of that name, with its fit where one was given."""
    made: Any = resolve_prompt(name)
    if fit is None:
        return made
    if "fit" not in getattr(made, "__dataclass_fields__", {}):
        raise FewerError(f"--fit {fit}: {name} is not fitted to anything; leave it out")
    return replace(made, fit=fits.load(fit, name))


def _pattern(text: str) -> object:
    try:
        return pattern(regex.compile(text))
    except regex.error as why:
        raise FewerError(f"--protect-regex {text!r} cannot be read as a regular expression: {why}") from None


def _typed(separator: str) -> str:
    if not separator:
        raise FewerError("--documents '' parts nothing; give what stands between documents, such as '\\n---\\n'")
    return separator.replace("\\n", "\n").replace("\\r", "\r").replace("\\t", "\t")


def _write(file: Path, text: str, option: str) -> None:
    try:
        file.write_bytes(text.encode())
    except OSError as why:
        raise FewerError(f"{option} {file}: {why.strerror}") from None


def _put(text: str) -> None:
    """Text to stdout, byte for byte: print would end it with a line break, and some systems change those within."""
    with stdout():
        sys.stdout.buffer.write(text.encode())
