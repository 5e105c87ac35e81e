"""LLMLingua-2: words by hand, the package's kept words, chunks, 8 bits, and what is refused."""

import hashlib
import random
import threading
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import BertConfig, BertForTokenClassification, PreTrainedTokenizerFast

import fewer
from fewer.fit import Fit, fingerprint
from fewer.methods.prompt.llmlingua2 import LLMLingua2
from fewer.prompts.source import Source
from fewer.score import keepers
from fewer.score.int8 import Linear8, eight_bits
from fewer.score.keepers import Keeper, classifier, cuts, keeper
from fewer.score.llmlingua022 import Options, shorten
from fewer.train_keeper import fresh
from fewer.types import Budget, BudgetError, FewerError, UnsupportedModel
from tests.encoders import words_embedder

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = (
    "the a of to in is was not it mayor paid for new bridge city council said vote on rain fell all night and then "
    "New York un do don t s ve item number 1 2 3 7 . , ? ! ; ( ) - ' # ##s ##ed ##ing ##ly ##do ##e ##1 ##2 ##3 ##."
)
WORDS = PIECES.split()


def word_pieces(extra: tuple[str, ...] = ()) -> Any:
    """A WordPiece tokenizer of these pieces."""
    inner = Tokenizer(models.WordPiece({w: i for i, w in enumerate([*SPECIAL, *WORDS, *extra])}, unk_token="[UNK]"))  # noqa: S106
    inner.normalizer = normalizers.BertNormalizer(lowercase=False)
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    inner.add_special_tokens(SPECIAL)
    names = {f"{mark[1:-1].lower()}_token": mark for mark in SPECIAL}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


class Table(nn.Module):
    """A classifier that looks at a piece and its place alone: p = (1 + (37 id + 11 place + 5) mod 101) / 103."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(SPECIAL) + len(WORDS), 4)
        self.config = SimpleNamespace(num_labels=2, model_type="bert", max_position_embeddings=512, pad_token_id=0)
        self.device = torch.device("cpu")

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def set_input_embeddings(self, embedding: nn.Embedding) -> None:
        self.embedding = embedding

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None) -> Any:
        p = (1 + (37 * input_ids + 11 * torch.arange(input_ids.shape[1]) + 5) % 101) / 103
        return SimpleNamespace(logits=torch.stack([torch.zeros_like(p), torch.log(p / (1 - p))], -1), loss=None)


def table_p(piece: str, place: int) -> float:
    return float((1 + (37 * [*SPECIAL, *WORDS].index(piece) + 11 * place + 5) % 101) / 103)


def four_letters(word: str) -> int:
    return -(-len(word) // 4)


TABLE = Keeper(Table().eval(), word_pieces())


def tiny(seed: int = 0, window: int | None = None) -> Keeper:
    """A random BERT with two labels, its weights spread out."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=96, max_position_embeddings=128, num_labels=2,
    )  # fmt: skip
    model = BertForTokenClassification(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.mul_(12 if "word" in name else 4)
    return Keeper(model, word_pieces(), window)


def prose(count: int, seed: int = 0) -> str:
    rng, out = random.Random(seed), ""
    for _ in range(count):
        out += (
            rng.choice([" ", " ", " ", " ", "\n"]) + rng.choice(WORDS[:40]) + rng.choice(["", "", "", ".", ",", "ed"])
        )
    return out.strip()


def test_words_by_hand() -> None:
    text = "the mayored paid 12."
    pieces = ["the", "mayor", "##ed", "paid", "1", "##2", "."]
    p = [table_p(piece, place) for place, piece in enumerate(pieces, 1)]
    by_hand = [p[0], (p[1] + p[2]) / 2, p[3], (p[4] + p[5]) / 2, p[6]]
    ranking = LLMLingua2(model=TABLE).rank(Source((text,)), None)
    assert [text[s.start : s.end] for s in ranking.units] == ["the", "mayored", "paid", "12", "."]
    assert ranking.value.tolist() == pytest.approx(by_hand, abs=1e-6)
    assert ranking.chosen is not None and ranking.chosen.tolist() == [value > 0.5 for value in by_hand]
    assert 0 < ranking.chosen.sum() < 5
    first = LLMLingua2(model=TABLE, pool="first").rank(Source((text,)), None)
    assert first.value.tolist() == pytest.approx([p[0], p[1], p[3], p[4], p[6]], abs=1e-6)


def test_one_threshold_for_the_whole_prompt() -> None:
    """The best words of all documents stay, not a share of each chunk."""
    one, documents = tiny(window=16), (prose(120), prose(80, 1))
    method, source = LLMLingua2(model=one), Source(documents)
    ranking = method.rank(source, Budget.parse(0.3))
    done = fewer.compress_prompt(documents, method, keep=0.3, tokenizer=lambda text: len(text.split()))
    kept = np.array([unit.kept for unit in done.units])
    assert ranking.chosen is None and ranking.value[kept].min() >= np.sort(ranking.value[~kept])[-20]
    shares = [kept[at : at + 12].mean() for at in range(0, 120, 12)]
    assert max(shares) > min(shares) + 0.2


@pytest.mark.parametrize("window", [8, 16, 40, None])
def test_agrees_with_each_chunk_alone(window: int | None) -> None:
    one = tiny(window=window)
    texts = (prose(300), "the city", "", prose(33, 2))
    for text, (offsets, p) in zip(texts, one(texts), strict=True):
        read = one.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert [tuple(pair) for pair in offsets.tolist()] == read["offset_mapping"]
        edges, naive = cuts(text, offsets, one.room), []
        assert edges == sorted(set(edges)) and max(np.diff(edges), default=0) <= one.room == (window or 128) - 2
        for start, end in pairwise(edges):
            row = torch.tensor([[2, *read["input_ids"][start:end], 3]])
            naive += one.model(input_ids=row).logits[0].softmax(-1)[1:-1, 1].tolist()
        assert p.tolist() == pytest.approx(naive, abs=1e-5) and len(p) == len(read["input_ids"])


def test_chunks_side_by_side_give_the_same() -> None:
    """Each thread of torch takes chunks of its own; afterwards torch has as many threads as before, new ones too."""
    one, texts, before, seen = tiny(window=16), (prose(300), prose(40, 1)), torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        alone = one(texts)
        torch.set_num_threads(3)
        together = one(texts)
        new = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        new.start()
        new.join()
        assert torch.get_num_threads() == 3 and seen == [3]
    finally:
        torch.set_num_threads(before)
    for (_, p), (_, q) in zip(alone, together, strict=True):
        assert p == pytest.approx(q, abs=1e-6)


def test_chunks_end_where_sentences_or_lines_do() -> None:
    def parts(text: str, room: int) -> list[str]:
        _, offsets = TABLE.tokens(text)
        edges = cuts(text, offsets, room)
        return [text[offsets[a, 0] : offsets[b - 1, 1]] for a, b in pairwise(edges)]

    assert parts("the city paid. it was not the mayor and then", 7) == [
        "the city paid.",
        "it was not the mayor and then",
    ]
    assert parts("the city\npaid for it all night", 3) == ["the city", "paid for it", "all night"]
    assert parts("the city paid for it all", 4) == ["the city paid for", "it all"]
    assert parts("mayoredly12321", 2) == ["mayored", "ly1", "23", "21"], "where there is no end, where it is full"
    assert parts("the mayored", 2) == ["the", "mayored"]


def test_pieces_of_a_text_read_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keepers, "PIECE", 17)
    monkeypatch.setattr(keepers, "PIECES", 3)
    for text in (
        prose(200),
        "a " * 40,
        "the\n\n  city\t\tpaid   for",
        "thecitypaid" * 9,
        " city ",
        "é 東京 👩‍🚀 city " * 9,
    ):
        ids, offsets = TABLE.tokens(text)
        read = TABLE.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert ids.tolist() == read["input_ids"]
        assert [tuple(pair) for pair in offsets.tolist()] == read["offset_mapping"]


def test_a_text_cannot_say_special_tokens() -> None:
    ids, _ = TABLE.tokens("city [SEP] [PAD] city")
    assert not {0, 2, 3} & set(ids.tolist())


def test_forced_words_come_first() -> None:
    text = "the mayor paid for 12 bridges, in New York, not the newer one."
    source = Source((text,))
    plain = LLMLingua2(model=TABLE).rank(source, Budget.parse(0.5))
    method = LLMLingua2(model=TABLE, force_tokens=("New York", "not", ",", "on"), force_reserve_digit=True)
    ranking = method.rank(source, Budget.parse(0.5))
    forced = [text[s.start : s.end] for s, up in zip(ranking.units, ranking.value > plain.value, strict=True) if up]
    assert forced == ["12", ",", "New", "York", ",", "not"], "no 'on' in 'one'"
    assert ranking.value == pytest.approx(plain.value + (ranking.value > plain.value))
    done = fewer.compress_prompt(text, method, tokens=26, tokenizer="characters")
    assert done.text == "the 12 , New York, not the"


def test_forced_words_that_stand_again_go() -> None:
    text = "the city . of . of . the city ."
    for budget in (None, Budget.parse(0.6)):
        ranking = LLMLingua2(model=TABLE, force_tokens=(".",), drop_consecutive=True).rank(Source((text,)), budget)
        plain = LLMLingua2(model=TABLE, force_tokens=(".",)).rank(Source((text,)), budget)
        stops = [i for i, s in enumerate(ranking.units) if text[s.start] == "."]
        stays = plain.value > 0.5
        if budget is not None:
            sizes = [s.end - s.start + 1 for s in plain.units]
            order, room, stays = (
                np.argsort(-plain.value),
                int(np.ceil(0.6 * len(text))),
                np.zeros(len(sizes), dtype=bool),
            )
            for unit in order:
                room -= sizes[unit]
                if room < 0:
                    break
                stays[unit] = True
        expected = [b for a, b in pairwise(stops) if not stays[a + 1 : b].any()]
        assert np.flatnonzero(ranking.value < 0).tolist() == expected
        assert expected or budget is not None


# Made with package llmlingua 0.2.2 (transformers 4.48.3), its model and cl100k counter replaced by `Table` and
# `four_letters` above: documents, rate, options -> the label of each word, and the text or the start of its sha256.
SHORT = "The mayor said: don't. the mayored paid, paid for 12 bridges\nin New York! It is not, not the ##ing city."
LONG = prose(900, 5)
GOLDEN: list[tuple[tuple[str, ...], float, dict[str, Any], str, str]] = [
    ((SHORT,), 0.5, {}, "000110101101011011000001111", "' t the paid, for bridges in York! # # city."),
    ((SHORT,), 0.33, {"pool": "first"}, "000110101100000011000001101", "' t the paid, York! # #."),
    (
        (SHORT,),
        0.4,
        {"force_tokens": ("\n", ".", "New York"), "force_reserve_digit": True},
        "000101101100101011000000101",
        "'. the paid, 12 \n New York! #.",
    ),
    (
        (SHORT + " . . paid . the .",),
        0.45,
        {"force_tokens": (".",), "drop_consecutive": True},
        "000111101101010011000001111001000",
        "' t. the paid, for bridges York! # # city. paid",
    ),
    (
        (
            SHORT,
            "the city council said",
            "rain fell on the city",
        ),
        0.5,
        {},
        "000000000000000000000000000100010100",
        "the\n\nrain on",
    ),
    (
        (
            SHORT,
            "the city council said",
            "rain fell on the city",
        ),
        0.5,
        {"coarse": False},
        "000110101101011011000001111100010100",
        "' t the paid, for bridges in York! # # city.\n\nthe\n\nrain on",
    ),
    ((LONG,), 0.5, {}, "e6f63ef3ded8cd9b", "199dab9eed899614"),
    (
        (
            LONG,
            LONG[:700],
        ),
        0.2,
        {"force_tokens": ("\n", "the")},
        "cc3cd0b9ddf21278",
        "241c311180b089db",
    ),
]


@pytest.mark.parametrize(("documents", "rate", "options", "labels", "text"), GOLDEN)
def test_compat_keeps_the_words_of_the_package(
    documents: tuple[str, ...], rate: float, options: dict[str, Any], labels: str, text: str
) -> None:
    done = shorten(TABLE, documents, rate, Options(**options, weigh=four_letters))
    words = [word for document in done for word in document.words]
    said = "".join(str(int(word.kept)) for word in words)
    joined = "\n\n".join(document.text for document in done if not document.left_out)
    if len(labels) != len(said):
        said, joined = (hashlib.sha256(each.encode()).hexdigest()[:16] for each in (said, joined))
    assert (said, joined) == (labels, text)
    for document, one in zip(documents, done, strict=True):
        for word in one.words:
            if word.start >= 0:
                assert document[word.start : word.end].lstrip("#").startswith(word.text.lstrip("#")[:2])


def compat(**options: Any) -> LLMLingua2:
    return LLMLingua2(model=TABLE, compat=True, **options)


@pytest.fixture
def _counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tiktoken: words weigh what `four_letters` says."""
    monkeypatch.setattr("fewer.score.llmlingua022.counter", lambda _: SimpleNamespace(count=four_letters))


@pytest.mark.usefixtures("_counted")
def test_compat_without_a_budget_is_the_package() -> None:
    """The same words as the package, as the source says them; what it cannot read goes, as there."""
    text = SHORT.replace("Is it", "naïve it").replace("It is", "東京 is")
    done = fewer.compress_prompt(text, compat(rate=0.5), tokenizer="characters")
    words = [word for word in shorten(TABLE, [text], 0.5, Options(weigh=four_letters))[0].words if word.kept]
    assert "".join(done.text.split()) == "".join(text[word.start : word.end] for word in words)
    assert "東京" not in done.text and done.verify(text) and fewer.restore(done.text, done.patch()) == text
    assert done.limit is None and done.extractive


@pytest.mark.usefixtures("_counted")
def test_compat_with_a_budget_meets_it() -> None:
    package = {word.start for word in shorten(TABLE, [LONG], 0.5, Options(weigh=four_letters))[0].words if word.kept}
    done = fewer.compress_prompt(LONG, compat(), keep=0.5, tokenizer="characters")
    kept = {unit.start for unit in done.units if unit.kept}
    assert done.tokens_after <= (done.limit or 0) < 1.01 * done.tokens_after
    assert kept <= package or package <= kept, "the package's words, and more only when all of them are in"
    by_count = LLMLingua2(model=TABLE, compat=True).rank(Source((LONG,)), Budget(400, tokens=400))
    told = shorten(TABLE, [LONG], 1.0, Options(weigh=four_letters), tokens=400)[0].words
    assert by_count.chosen is not None and by_count.chosen.sum() == sum(word.kept for word in told)


@pytest.mark.usefixtures("_counted")
def test_compat_at_a_rate_of_one_keeps_everything() -> None:
    assert fewer.compress_prompt(SHORT, compat(rate=1.0), tokenizer="characters").text == SHORT
    with pytest.raises(BudgetError, match="has no threshold of its own: give keep="):
        compat().rank(Source((SHORT,)), None)


def test_new_rows_are_the_mean_of_all_others() -> None:
    """A forced string of several pieces is read as a row that no one has trained; the model itself is not changed."""
    one = tiny()
    before = {name: weight.clone() for name, weight in one.model.state_dict().items()}
    text, forced = "the city, New York, paid", ("New York",)
    done = shorten(one, [text], 0.5, Options(force_tokens=forced, weigh=four_letters))[0]
    assert [word.text for word in done.words if word.start == text.index("New")] == ["New York"]
    table = before["bert.embeddings.word_embeddings.weight"]
    ids = [[*SPECIAL, *WORDS].index(piece) for piece in ["[CLS]", "the", "city", ",", "the", ",", "paid", "[SEP]"]]
    rows = table[ids]
    rows[4] = table.mean(0)
    p = one.model(inputs_embeds=rows[None]).logits[0].softmax(-1)[:, 1].tolist()
    assert [word.p for word in done.words] == pytest.approx([*p[1:4], 1.0, *p[5:7]], abs=1e-5)
    assert all(torch.equal(weight, before[name]) for name, weight in one.model.state_dict().items())


def test_eight_bits_by_hand() -> None:
    linear = nn.Linear(80, 70)
    x = torch.randn(3, 300, 80) * torch.rand(3, 300, 1)
    w = linear.weight.detach().numpy()
    t = np.abs(w).max(1, keepdims=True) / 127
    most, least = x.numpy().max(-1, keepdims=True), x.numpy().min(-1, keepdims=True)
    m, s = (most + least) / 2, (most - least) / 254
    whole = np.rint((x.numpy() - m) / s).astype(int) @ np.rint(w / t).astype(int).T
    by_hand = whole * s * t.T + m * (np.rint(w / t) * t).sum(1) + linear.bias.detach().numpy()
    out = Linear8(linear)(x)
    assert out.numpy() == pytest.approx(by_hand, abs=1e-4)
    assert (out - linear(x)).abs().max() < 0.02 * linear(x).abs().max()
    assert torch.equal(Linear8(linear)(x[1:2, :7])[0], out[1, :7]), "what else is in a batch changes nothing"
    assert sum(t.nbytes for t in Linear8(linear).buffers()) < 0.35 * linear.weight.nbytes


def test_eight_bits_keep_nearly_the_same() -> None:
    one = tiny()
    before = {name: weight.clone() for name, weight in one.model.state_dict().items()}
    text = prose(400)
    (_, p), (_, q) = one([text])[0], keeper(one, bits=8)([text])[0]
    assert 0 < np.abs(p - q).max() < 0.1 and np.corrcoef(p, q)[0, 1] > 0.995
    assert all(torch.equal(weight, before[name]) for name, weight in one.model.state_dict().items())
    assert fewer.methods.name_of(LLMLingua2(bits=8)) == "llmlingua2-8bit"
    with pytest.raises(
        UnsupportedModel, match=r"float32 on a CPU; this BertForTokenClassification is in torch.bfloat16"
    ):
        eight_bits(BertForTokenClassification(one.model.config).bfloat16())
    with pytest.raises(UnsupportedModel, match="no linear layers"):
        eight_bits(nn.Sequential(nn.Linear(2, 2)))


def test_a_fit_takes_the_place_of_the_encoders_own() -> None:
    base = words_embedder(WORDS[:30])
    trained = fresh(base.model)
    with torch.no_grad():
        for weight in trained.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    names = [name for name in trained.state_dict() if name.startswith(("classifier", "bert.encoder.layer.1."))]
    fit = Fit("llmlingua2", fingerprint(base.model), {name: trained.state_dict()[name].half() for name in names})
    model, _ = classifier(fit, base)
    for name, weight in model.state_dict().items():
        expected = trained.state_dict()[name].half().float() if name in names else fresh(base.model).state_dict()[name]
        assert torch.equal(weight, expected)
    ranking = LLMLingua2(fit, base).rank(Source(("the mayor paid for it",)), None)
    assert len(ranking.value) == 5 and ranking.value.std() > 0
    with pytest.raises(FewerError, match="another encoder"):
        classifier(Fit("llmlingua2", "0" * 64, fit.tensors), base)
    with pytest.raises(FewerError, match=r"does not suit a token classifier: bert\.x"):
        classifier(Fit("llmlingua2", fit.model, {**fit.tensors, "bert.x": torch.zeros(2)}), base)
    with pytest.raises(FewerError, match="it has no classifier"):
        classifier(Fit("llmlingua2", fit.model, {}), base)


def test_without_a_head_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keepers, "shipped", lambda: None)
    keepers._made.cache_clear()
    with pytest.raises(FewerError, match=r"has to be fitted first: `fewer fit llmlingua2 --out FILE`"):
        fewer.compress_prompt("one two", "llmlingua2", tokens=3, tokenizer="characters")


def test_bad_arguments() -> None:
    three = BertForTokenClassification(BertConfig(num_labels=3, hidden_size=12, num_hidden_layers=1, vocab_size=9))
    with pytest.raises(UnsupportedModel, match="has 3 labels; a token classifier has two"):
        Keeper(three, word_pieces())
    with pytest.raises(UnsupportedModel, match="gives no offsets"):
        Keeper(tiny().model, object())
    with pytest.raises(UnsupportedModel, match="window=2 leaves no room"):
        tiny(window=2)
    with pytest.raises(FewerError, match="bits=4: a classifier is read in 8 bits"):
        keeper(TABLE, bits=4)
    with pytest.raises(UnsupportedModel, match=r"model='/nowhere' is no token classifier"):
        keeper("/nowhere")
    with pytest.raises(BudgetError, match=r"threshold=1\.5"):
        LLMLingua2(threshold=1.5)
    with pytest.raises(BudgetError, match="with compat=True, the share"):
        LLMLingua2(rate=0.5)
    with pytest.raises(FewerError, match="up to 100, none empty"):
        shorten(TABLE, ["the"], 0.5, Options(force_tokens=("",), weigh=four_letters))
    with pytest.raises(BudgetError, match="rates above 0 alone"):
        shorten(TABLE, ["the"], 0.0, Options(weigh=four_letters))
    letters = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1}, unk_token="[UNK]"))  # noqa: S106
    with pytest.raises(UnsupportedModel, match="takes WordPiece and unigram tokenizers, not WordLevel"):
        shorten(Keeper(TABLE.model, PreTrainedTokenizerFast(tokenizer_object=letters)), ["the"], 0.5, Options())


def test_empty_documents_give_nothing() -> None:
    ranking = LLMLingua2(model=TABLE).rank(Source(("", "  ", "the city")), None)
    assert ranking.units.document.tolist() == [2, 2]


@pytest.mark.slow
def test_the_head_that_comes_with_fewer(default_model_path: Any) -> None:
    text = (
        "Thank you, everybody, and good evening. What we wanted to say is that the bridge on Mill Street will close "
        "on 14 March 2027, and that the council has set aside $420,000 for it, which is, well, quite a lot of money."
    )
    done = fewer.compress_prompt(text, keep=0.5)
    eight = fewer.compress_prompt(text, LLMLingua2(bits=8), keep=0.5)
    for word in ("bridge", "Mill", "14", "March", "2027", "420"):
        assert word in done.text
    kept, also = ({unit[:3] for unit in one.units if unit.kept} for one in (done, eight))
    assert len(kept & also) >= 0.9 * len(kept)
    own = fewer.compress_prompt(text, "llmlingua2")
    assert 0.1 < own.share < 0.9 and own.limit is None
