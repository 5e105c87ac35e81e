"""The call shape of package llmlingua 0.2.2, so that its users change one import:

    from fewer.adapters.llmlingua import PromptCompressor

    PromptCompressor("microsoft/llmlingua-2-xlm-roberta-large-meetingbank", use_llmlingua2=True).compress_prompt(
        context, rate=0.33, force_tokens=["\\n", "?"])["compressed_prompt"]

What an argument asks for is done, or refused by its name: none is taken and forgotten. What differs, on purpose: the
budget is a ceiling that is met in `tokenizer` (the package counts in cl100k_base and comes out near it); texts stay
pieces of the source; the default models are fewer's, which fit on a CPU; no money is made up (`saving` is left out);
`compression` says where each piece came from, and `fewer.restore` gives the source back, which `recover` did not.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from math import isfinite
from numbers import Real
from typing import Any

import regex

from fewer import checks
from fewer.methods import METHODS
from fewer.prompts.counting import counter
from fewer.prompts.front import GLUE, compress_prompt, read_documents, read_text
from fewer.prompts.protect import pattern
from fewer.types import BudgetError, FewerError

_DIGITS = pattern(regex.compile(r"\w*\d\w*"), "digits")

_FIXED: dict[str, tuple[Any, str]] = {
    "force_context_ids": (None, "protect those documents: give their text in force_tokens"),
    "force_context_number": (None, "documents are taken by their worth until the budget is full"),
    "use_sentence_level_filter": (False, "take fewer.compress_prompt with a method of sentences, such as 'exit'"),
    "use_token_level_filter": (True, "take fewer.compress_prompt with a method of whole documents"),
    "keep_first_sentence": (0, "give those sentences in force_tokens"),
    "keep_last_sentence": (0, "give those sentences in force_tokens"),
    "keep_sentence_number": (0, "give those sentences in force_tokens"),
    "high_priority_bonus": (100, "it belongs to the filter of sentences, which there is not"),
    "token_budget_ratio": (1.4, "it belongs to the filter of sentences, which there is not"),
    "add_instruction": (False, "methods do not look at the instruction"),
    "context_segs": (None, "what must stay goes in force_tokens"),
    "context_segs_rate": (None, "there is one budget for all"),
    "context_segs_compress": (None, "what must stay goes in force_tokens"),
    "strict_preserve_uncompressed": (True, "what is protected stays, always"),
    "target_context": (-1, "documents have no budget of their own"),
    "context_level_rate": (1.0, "documents have no budget of their own"),
    "context_level_target_token": (-1, "documents have no budget of their own"),
}
"""Arguments of which one value is done here, and what to do instead of the others."""


class PromptCompressor:
    """llmlingua's `PromptCompressor` on fewer's methods: `llmlingua`, `longllmlingua` and `llmlingua2`.

    Args:
        model_name: a causal language model, with `use_llmlingua2` a token classifier: a folder, a hub name, a pair of
            model and tokenizer; "default" for fewer's own.
        device_map: "cpu", or a device that torch knows; one device holds all of the model.
        model_config, open_api_config: refused unless empty; give a loaded model as `model_name` instead.
        use_llmlingua2: the token classifier.
        llmlingua2_config: `max_force_token` is honoured; `max_batch_size` is refused, batches are made by length.
        tokenizer: what counts tokens, as in `fewer.compress_prompt`; "cl100k_base" counts as the package does, where
            tiktoken is installed.
        compat: with `use_llmlingua2`, choose words as the package does, chunk by chunk.
    """

    def __init__(
        self,
        model_name: Any = "default",
        device_map: str = "cpu",
        model_config: dict[str, Any] | None = None,
        open_api_config: dict[str, Any] | None = None,
        use_llmlingua2: bool = False,
        llmlingua2_config: dict[str, Any] | None = None,
        *,
        tokenizer: Any = None,
        compat: bool = False,
    ) -> None:
        for name, config in (("model_config", model_config), ("open_api_config", open_api_config)):
            if config:
                raise FewerError(f"PromptCompressor({name}={config!r}) is not taken here: give a loaded model and its "
                                 f"tokenizer as model_name")  # fmt: skip
        if not isinstance(llmlingua2_config, (dict, type(None))):
            raise FewerError(f"PromptCompressor(llmlingua2_config={llmlingua2_config!r}): give a dict")
        config = dict(llmlingua2_config or {})
        self.max_force_token = config.pop("max_force_token", 100)
        checks.counts(0, max_force_token=self.max_force_token)
        if config:
            raise FewerError(f"PromptCompressor(llmlingua2_config={config!r}): only max_force_token is taken here; "
                             f"batches are made by length")  # fmt: skip
        if compat and not use_llmlingua2:
            raise FewerError("PromptCompressor(compat=True) goes with use_llmlingua2=True")
        self.use_llmlingua2, self.compat = use_llmlingua2, compat
        self.counter = counter(tokenizer)
        self.model = _placed(model_name, device_map, use_llmlingua2)

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.compress_prompt(*args, **kwargs)

    def compress_prompt(
        self,
        context: str | Sequence[str],
        instruction: str = "",
        question: str = "",
        rate: float | int = 0.5,
        target_token: float | int = -1,
        iterative_size: int = 200,
        force_context_ids: list[int] | None = None,
        force_context_number: int | None = None,
        use_sentence_level_filter: bool = False,
        use_context_level_filter: bool | None = None,
        use_token_level_filter: bool = True,
        keep_split: bool = False,
        keep_first_sentence: int = 0,
        keep_last_sentence: int = 0,
        keep_sentence_number: int = 0,
        high_priority_bonus: int = 100,
        context_budget: str = "+100",
        token_budget_ratio: float | int = 1.4,
        condition_in_question: str = "none",
        reorder_context: str = "original",
        dynamic_context_compression_ratio: float | int = 0.0,
        condition_compare: bool | None = None,
        add_instruction: bool = False,
        rank_method: str = "llmlingua",
        concate_question: bool = True,
        context_segs: list[Any] | None = None,
        context_segs_rate: list[Any] | None = None,
        context_segs_compress: list[Any] | None = None,
        target_context: int = -1,
        context_level_rate: float | int = 1.0,
        context_level_target_token: int = -1,
        return_word_label: bool = False,
        word_sep: str = "\t\t|\t\t",
        label_sep: str = " ",
        token_to_word: str = "mean",  # noqa: S107  # no password
        force_tokens: Sequence[str] = (),
        force_reserve_digit: bool = False,
        drop_consecutive: bool = False,
        chunk_end_tokens: Sequence[str] = (".", "\n"),
        strict_preserve_uncompressed: bool = True,
    ) -> dict[str, Any]:
        """Shorten a context, and put instruction and question around it.

        Args:
            context: a text or documents.
            instruction, question: stay whole; `concate_question=False` leaves the question out. Not with LLMLingua-2,
                which puts out the context alone.
            rate: the share of tokens that stays: of instruction, context and question together, with the blank lines
                between them, which the context pays for, as in the package; with LLMLingua-2 of the context.
            target_token: how many tokens of the context stay instead, unless -1.
            iterative_size, context_budget, use_context_level_filter, reorder_context,
                dynamic_context_compression_ratio: settings of `LLMLingua` and `LongLLMLingua`; a context budget is
                "*1.5" or the like, and "+100", the package's default, stands for the paper's "*2".
            force_tokens, force_reserve_digit, keep_split: what stays wherever it stands: these strings, words with a
                digit, blank lines. With `drop_consecutive`, or `compat`, the first two come before all others instead,
                and may go where the budget is full.
            token_to_word, drop_consecutive: settings of `LLMLingua2`.
            return_word_label: say of each unit whether it stayed, as `fn_labeled_original_prompt`.

        Returns:
            `compressed_prompt`, `compressed_prompt_list` (each document's part), `origin_tokens`, `compressed_tokens`,
            `ratio`, `rate` as the package gives them, and `compression`.

        Raises:
            FewerError: an argument asks for what is not done here.
        """
        given = locals()
        for name, (only, instead) in _FIXED.items():
            if given[name] != only and not (only is None and given[name] == []):
                raise FewerError(f"compress_prompt({name}={given[name]!r}) is not done here: {instead}")
        _check_types(given)
        if len(force_tokens) > self.max_force_token:
            raise FewerError(f"compress_prompt(force_tokens=...): {len(force_tokens)} of them, and max_force_token is "
                             f"{self.max_force_token}")  # fmt: skip
        documents = list(read_documents(context))
        forced = {"force_tokens": tuple(force_tokens), "force_reserve_digit": force_reserve_digit}
        protect = [*force_tokens, *([_DIGITS] if force_reserve_digit else [])]
        if self.compat or drop_consecutive:
            protect = []  # the method sees to them: it may let some of them go
        protect += ["\n\n"] if keep_split else []
        options = {
            key: given[key]
            for key in (
                "iterative_size", "use_context_level_filter", "context_budget", "condition_in_question",
                "reorder_context", "dynamic_context_compression_ratio", "condition_compare", "rank_method",
                "chunk_end_tokens", "token_to_word", "drop_consecutive",
            )
        }  # fmt: skip
        if self.use_llmlingua2:
            method = self._classifier(instruction, question, concate_question, len(documents), options, forced)
        else:
            method = self._pruner(question, options)
        ending = question if concate_question else ""
        before = self.counter.count(_joined(instruction, GLUE.join(documents), question))
        budget, limit = self._budget(documents, instruction, ending, before, rate, target_token)
        while True:
            done = compress_prompt(
                documents, method, question=question, protect=protect, tokenizer=self.counter, **budget
            )
            text = _joined(instruction, done.text if done.text.strip() else "", ending)
            after = self.counter.count(text)
            if limit is None or after <= limit:
                break  # seldom not at once: tokens of the whole are no sum over its parts
            budget = {"tokens": _left(min(budget["tokens"], done.tokens_after) - (after - limit), rate)}
        ratio = before / after if after else 1
        said = {
            "compressed_prompt": text,
            "compressed_prompt_list": list(done.documents),
            "origin_tokens": before,
            "compressed_tokens": after,
            "ratio": f"{ratio:.1f}x",
            "rate": f"{100 / ratio:.1f}%",
            "compression": done,
        }
        if return_word_label:
            units = done.units or [(*span, True) for span in done.source.words]
            said["fn_labeled_original_prompt"] = word_sep.join(
                f"{done.source.of(unit[:3])}{label_sep}{int(unit[3])}" for unit in units
            )
        return said

    def compress_prompt_llmlingua2(self, context: str | Sequence[str], **options: Any) -> dict[str, Any]:
        """The same, as the package names it for LLMLingua-2."""
        if not self.use_llmlingua2:
            raise FewerError("compress_prompt_llmlingua2() wants PromptCompressor(use_llmlingua2=True)")
        return self.compress_prompt(context, **options)

    def _budget(
        self, documents: list[str], instruction: str, ending: str, before: int, rate: float | int, target: float | int
    ) -> tuple[dict[str, Any], int | None]:
        """What the context may have, and how many tokens all of the prompt may, where that is what is asked for."""
        if target != -1:
            if target < 1 or target != int(target):
                raise BudgetError(
                    f"target_token={target!r}: give how many tokens of the context stay, from 1 on, or -1"
                )
            return {"tokens": int(target)}, None
        if not 0 < rate <= 1:
            raise BudgetError(f"rate={rate!r}: give the share of tokens that stays, in (0, 1]")
        if rate == 1 or self.use_llmlingua2:
            return {"keep": float(rate)}, None
        whole, limit = GLUE.join(documents), int(rate * before)
        around = self.counter.count(_joined(instruction, whole, ending)) - self.counter.count(whole)
        return {"tokens": _left(limit - around, rate)}, limit

    def _pruner(self, question: str, options: dict[str, Any]) -> Any:
        """LLMLingua or LongLLMLingua with these settings."""
        long, budget = options["rank_method"] == "longllmlingua", options["context_budget"]
        if options["rank_method"] not in ("llmlingua", "longllmlingua"):
            _refuse(options, "rank_method", "documents are ranked by 'llmlingua' or 'longllmlingua'")
        of_two = {"chunk_end_tokens": (".", "\n"), "token_to_word": "mean", "drop_consecutive": False}
        for name, only in of_two.items():
            if (tuple(options[name]) if isinstance(only, tuple) else options[name]) != only:
                _refuse(options, name, "it belongs to LLMLingua-2")
        if budget != "+100" and not regex.fullmatch(r"\*\d+(?:\.\d+)?", budget):
            _refuse(options, "context_budget", "give a factor, such as '*1.5', or leave it out")
        coarse = 2.0 if budget == "+100" else float(budget[1:])
        settings: dict[str, Any] = {
            "model": self.model,
            "window": options["iterative_size"],
            "coarse": float("inf") if options["use_context_level_filter"] is False else coarse,
        }
        compared = "LongLLMLingua always compares with and without the question, LLMLingua never"
        if options["condition_compare"] not in (None, long):
            _refuse(options, "condition_compare", compared)
        if options["condition_in_question"] not in (("none", "after", "after_condition") if long else ("none",)):
            _refuse(options, "condition_in_question", f"{compared}; it stands after the document")
        if long:
            if not question.strip():
                raise FewerError("compress_prompt(rank_method='longllmlingua') wants a question")
            if options["reorder_context"] not in ("original", "sort", "two_stage"):
                _refuse(options, "reorder_context", "known are 'original', 'sort' and 'two_stage'")
            slope = options["dynamic_context_compression_ratio"]
            return METHODS["longllmlingua"](**settings, reorder=options["reorder_context"], slope=slope)
        for name, only in (("reorder_context", "original"), ("dynamic_context_compression_ratio", 0)):
            if options[name] != only:
                _refuse(options, name, "it belongs to rank_method='longllmlingua'")
        return METHODS["llmlingua"](**settings)

    def _classifier(
        self,
        instruction: str,
        question: str,
        concate_question: bool,
        documents: int,
        options: dict[str, Any],
        forced: dict[str, Any],
    ) -> Any:
        """LLMLingua-2; what belongs to the other methods is refused."""
        for name, value in (("instruction", instruction), ("question", question)):
            if value:
                raise FewerError(
                    f"compress_prompt({name}={value[:40]!r}): LLMLingua-2 does not look at it and the package leaves "
                    f"it out of the text; leave it out, and put it there yourself"
                )
        only: dict[str, Any] = {
            "iterative_size": 200, "context_budget": "+100", "condition_in_question": "none",
            "reorder_context": "original", "dynamic_context_compression_ratio": 0.0, "condition_compare": None,
            "rank_method": "llmlingua",
        }  # fmt: skip
        for name, value in only.items():
            if options[name] != value:
                _refuse(options, name, "it belongs to LLMLingua and LongLLMLingua")
        if not concate_question:
            raise FewerError("compress_prompt(concate_question=False): there is no question with LLMLingua-2")
        if options["use_context_level_filter"] and documents > 1:
            _refuse(options, "use_context_level_filter", "words of all documents share one budget")
        if list(options["chunk_end_tokens"]) != [".", "\n"]:
            _refuse(options, "chunk_end_tokens", "chunks end where sentences or lines do")
        if options["token_to_word"] not in ("mean", "first"):
            _refuse(options, "token_to_word", "known are 'mean' and 'first'")
        settings = {"pool": options["token_to_word"], "drop_consecutive": options["drop_consecutive"]}
        settings |= forced if self.compat or options["drop_consecutive"] else {}
        settings |= {} if isinstance(self.model, str) and self.model == "default" else {"model": self.model}
        return METHODS["llmlingua2"](**settings, compat=self.compat)


def _joined(*parts: str) -> str:
    return GLUE.join(part for part in parts if part)


def _left(tokens: int, rate: float | int) -> int:
    if tokens < 1:
        raise BudgetError(
            f"rate={rate!r} leaves {tokens} tokens to the context: instruction and question take the others and stay "
            f"whole; give a higher rate, or target_token"
        )
    return tokens


def _check_types(given: dict[str, Any]) -> None:
    """Refuse what is not of the kind that the package takes."""
    for name in ("instruction", "question", "word_sep", "label_sep", "context_budget"):
        if not isinstance(given[name], str):
            raise FewerError(f"compress_prompt({name}={given[name]!r}): give text")
        read_text(given[name], name)
    for name in ("force_tokens", "chunk_end_tokens"):
        listed = isinstance(given[name], Sequence) and not isinstance(given[name], (str, bytes))
        if not listed or not all(isinstance(text, str) for text in given[name]):
            raise FewerError(f"compress_prompt({name}={given[name]!r}): give a list of texts")
    for name in ("rate", "target_token", "dynamic_context_compression_ratio"):
        number = given[name]
        if not isinstance(number, Real) or isinstance(number, bool) or not isfinite(number):
            raise FewerError(f"compress_prompt({name}={number!r}): give a number")
    checks.counts(iterative_size=given["iterative_size"])


def _refuse(options: dict[str, Any], name: str, instead: str) -> None:
    raise FewerError(f"compress_prompt({name}={options[name]!r}) is not done here: {instead}")


def _placed(name: Any, device: str, classifier: bool) -> Any:
    """The model where it is wanted; on a CPU, what fewer loads by itself and shares."""
    if device == "cpu":
        return name
    if not isinstance(name, str):
        raise FewerError(f"PromptCompressor(device_map={device!r}) goes with a name; a loaded model stays where it is")
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as why:
        raise FewerError(f"PromptCompressor(device_map={device!r}): {str(why).splitlines()[0]}; 'cpu' works") from None
    if classifier:
        from fewer.score.keepers import keeper

        found = keeper("minilm" if name == "default" else name)
        return replace(found, model=deepcopy(found.model).to(device))
    from fewer.models import load
    from fewer.score.surprise import Reader

    return Reader(*load(name, device=device))
