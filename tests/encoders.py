"""A small random BERT whose words are a list, as an embedder."""

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from fewer.score.embed import Embedder


def words_embedder(
    words: Sequence[str], longest: int = 64, layers: int = 2, seed: int = 0, spread: bool = True
) -> Embedder:
    """Each of these words is a token, any other an unknown one; the weights are random, spread out unless told."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocab = {word: index for index, word in enumerate([*special, *dict.fromkeys(words)])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))  # noqa: S106
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocab), hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=128,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if spread and weight.ndim == 2:
                weight.mul_(20 if "embeddings.word" in name else 8)
    return Embedder(model, tokenizer, longest)
