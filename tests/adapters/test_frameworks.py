"""Adapters of frameworks: one document out for each that keeps something, its metadata with it. Where a framework is
not installed its tests are skipped; `make test-frameworks` runs them."""

import asyncio
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from fewer import FewerError, compress_prompt
from fewer.adapters.documents import shortened
from fewer.prompts.protect import literal

TEXTS = ["alpha beta gamma", "delta <#ref0#> epsilon\n\nzeta", "   ", "eta theta"]
OPTIONS = {"method": "random", "keep": 0.6, "tokenizer": "characters"}
WHY = "{} is not installed here: make test-frameworks runs these"


def checked(found: list[tuple[str, str, dict[str, Any], dict[str, Any]]]) -> None:
    """Each `(id, text, metadata, record)` is of one document, and its spans lead back there."""
    assert [name for name, *_ in found] == sorted({name for name, *_ in found}) and len(found) >= 2
    for name, text, metadata, record in found:
        source = TEXTS[int(name)]
        assert "".join(source[start:end] for start, end in record["spans"]) == text and text.strip()
        assert metadata["where"] == int(name) and record["method"] == "random"
        assert (record["tokens_before"], record["tokens_after"]) == (len(source), len(text))
    whole = compress_prompt([text for text in TEXTS if text.strip()], **OPTIONS)
    assert "\n\n".join(text for _, text, _, _ in found) == whole.text


def test_shared_part() -> None:
    checked([(str(i), text, {"where": i}, record) for i, text, record in shortened(TEXTS, None, **OPTIONS)])
    assert shortened([], None, **OPTIONS) == shortened(["", " "], None, **OPTIONS) == []
    first = shortened(TEXTS, None, method="truncation", tokens=5, tokenizer="characters")
    assert [(i, text) for i, text, _ in first] == [(0, "alpha")]  # the others keep nothing, and are left out


def test_import_fewer_loads_no_framework() -> None:
    code = "import sys, fewer; print([m for m in ('langchain_core', 'llama_index', 'haystack') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603
    assert done.stdout == "[]\n"


def whatever_is_refused_and_protected(made: Callable[..., str]) -> None:
    """What holds for `made`, which shortens the first text with such options, in every framework."""
    options = {"method": "truncation", "keep": 0.6, "tokenizer": "characters"}
    for rule in ("gamma", ["gamma"], re.compile("gam+a"), (11, 16), literal("gamma"), (r for r in ["gamma"])):
        assert "gamma" in made(**options, protect=rule)
    assert made(**options, protect=None) == made(**options)
    for wrong, said in (
        ({"keep": True}, "keep=True cannot be read"), ({"tokens": True, "keep": None}, "tokens=True is no whole"),
        ({"protect": 5}, "protect=5 is neither"),
    ):  # fmt: skip
        with pytest.raises(FewerError, match=said):
            made(**options | wrong)


# --- langchain ---


def test_langchain() -> None:
    pytest.importorskip("langchain_core", reason=WHY.format("langchain-core"))
    from langchain_core.documents import Document

    from fewer.adapters.langchain import FewerCompressor

    given = [Document(page_content=text, id=str(i), metadata={"where": i}) for i, text in enumerate(TEXTS)]
    before = [document.model_copy(deep=True) for document in given]
    made = FewerCompressor(**OPTIONS)
    found = made.compress_documents(given, "what?")
    checked([(d.id, d.page_content, d.metadata, d.metadata["fewer"]) for d in found])
    assert given == before and list(asyncio.run(made.acompress_documents(given, "what?"))) == list(found)
    assert list(made.compress_documents([], "what?")) == []
    whatever_is_refused_and_protected(
        lambda **options: FewerCompressor(**options).compress_documents(given[:1], "what?")[0].page_content
    )
    twice = FewerCompressor(method="truncation", keep=0.6, tokenizer="characters", protect=(r for r in ["gamma"]))
    assert all("gamma" in twice.compress_documents(given[:1], "what?")[0].page_content for _ in range(2))
    with pytest.raises(ValueError, match="kep"):
        FewerCompressor(kep=0.5)
    with pytest.raises(FewerError, match="keep='2'"):
        FewerCompressor(method="random", keep="2", tokenizer="characters").compress_documents(given, "what?")


# --- llamaindex ---


@pytest.mark.filterwarnings("ignore")  # the package's own, on import
def test_llamaindex() -> None:
    pytest.importorskip("llama_index.core", reason=WHY.format("llama-index-core"))
    from llama_index.core.schema import ImageNode, MetadataMode, Node, NodeWithScore, TextNode

    from fewer.adapters.llamaindex import FewerPostprocessor

    given = [
        NodeWithScore(node=TextNode(text=t, id_=str(i), metadata={"where": i}), score=0.5) for i, t in enumerate(TEXTS)
    ]
    other = NodeWithScore(node=Node(id_="picture"), score=0.1)
    made = FewerPostprocessor(**OPTIONS)
    found = made.postprocess_nodes([other, *given], query_str="what?")
    assert found.pop() is other
    checked([(n.node.node_id, n.node.text, n.node.metadata, n.node.metadata["fewer"]) for n in found])
    assert [node.node.text for node in given] == TEXTS and all("fewer" not in node.node.metadata for node in given)
    assert {node.score for node in found} == {0.5}
    assert "spans" not in found[0].node.get_content(MetadataMode.LLM) and "where" in found[0].node.get_content(
        MetadataMode.LLM
    )
    whatever_is_refused_and_protected(
        lambda **options: FewerPostprocessor(**options).postprocess_nodes(given[:1])[0].node.text
    )
    with pytest.raises(ValueError, match="protct"):
        FewerPostprocessor(keep=0.5, protct=["delta"])
    bare, said = (NodeWithScore(node=ImageNode(id_="i", image="AAAA", text=t), score=1) for t in ("", TEXTS[0]))
    shown = made.postprocess_nodes([bare, said])
    assert shown[1] is bare and shown[0].node.image == "AAAA" and 0 < len(shown[0].node.text) < len(TEXTS[0])
    later = asyncio.run(made.apostprocess_nodes(given, query_str="what?"))
    assert [node.node.text for node in later] == [node.node.text for node in found]


# --- haystack ---


@pytest.mark.filterwarnings("ignore")  # the package's own, on import
def test_haystack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAYSTACK_TELEMETRY_ENABLED", "False")
    pytest.importorskip("haystack", reason=WHY.format("haystack-ai"))
    from haystack import Document, Pipeline

    from fewer.adapters.haystack import FewerCompressor

    given = [Document(content=text, id=str(i), meta={"where": i}, score=0.5) for i, text in enumerate(TEXTS)]
    other = Document(id="picture")
    pipeline = Pipeline()
    pipeline.add_component("shorten", FewerCompressor(**OPTIONS))
    pipeline = Pipeline.loads(pipeline.dumps(), allowed_modules=["fewer.adapters.haystack"])
    found = pipeline.run({"shorten": {"documents": [other, *given], "query": "what?"}})["shorten"]["documents"]
    assert found.pop() == other
    checked([(d.id, d.content, d.meta, d.meta["fewer"]) for d in found])
    assert [document.content for document in given] == TEXTS and {d.score for d in found} == {0.5}
    whatever_is_refused_and_protected(
        lambda **options: FewerCompressor(**options).run(given[:1])["documents"][0].content
    )
    assert FewerCompressor(**OPTIONS).run([]) == {"documents": []}
