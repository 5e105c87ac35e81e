"""Files of ours: tensors by name and a head of strings, as safetensors, with a checksum over all of it."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fewer.types import FewerError


def write(path: str | Path, tensors: Mapping[str, Tensor], head: Mapping[str, str]) -> None:
    """Write a file; what was there is replaced whole, or not at all.

    Raises:
        FewerError: the file cannot be written.
    """
    path = Path(path)
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = safetensors.torch.save(ready, {**head, "sha256": digest(ready, head)})
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise FewerError(f"{path} cannot be written ({error.strerror})") from None


def read(path: str | Path, kind: str, version: str, what: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The head and the tensors of a file whose head says `format` = kind; `what` is what errors call it.

    Raises:
        FewerError: it cannot be read, is none of ours, is of another version, or was cut short or changed since.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise FewerError(f"{path}: the {what} cannot be read ({error.strerror})") from None
    size = int.from_bytes(data[:8], "little")
    damaged = FewerError(f"{path} is damaged: it was cut short or changed since it was written; make the {what} anew")
    try:
        head = dict(json.loads(data[8 : 8 + size])["__metadata__"])
        known = head["format"] == kind
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        if kind.encode() in data[:4096]:
            raise damaged
        raise FewerError(f"{path} is no {what} that fewer wrote")
    if head.get("version") != version:
        raise FewerError(f"{path} is a {what} of format version {head.get('version')}; this fewer reads {version} only")
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError, TypeError):
        raise damaged from None
    if head.pop("sha256", None) != digest(tensors, head):
        raise damaged
    return head, tensors


def digest(tensors: Mapping[str, Tensor], head: Mapping[str, str]) -> str:
    """sha256 over the head and the tensors, each told apart from the next by its length."""
    total = hashlib.sha256()
    parts = [json.dumps(dict(head), sort_keys=True).encode()]
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        parts += [f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()]
        parts += [tensor.flatten().view(torch.uint8).numpy().tobytes()]
    for part in parts:
        total.update(len(part).to_bytes(8, "little") + part)
    return total.hexdigest()
