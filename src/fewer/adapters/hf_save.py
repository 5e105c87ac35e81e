"""A compressed cache as one safetensors file: tensors by name, everything else as JSON in the header.

    save:  cache -> plain data, each tensor replaced by its name -> file, with a checksum over all of it
    load:  file -> checked -> plain data -> objects of known classes only, on a model of the same weights and settings

Nothing in a file is run: objects are made from a fixed list of dataclasses, and names that are not on it are refused.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewer import files
from fewer.allocate.levels import Levels
from fewer.codec import Coded
from fewer.fit import Fit, fingerprint
from fewer.methods import METHODS
from fewer.ragged import Ragged
from fewer.signals import QueryWindow, Rotary
from fewer.types import Budget, FewerError

FORMAT, VERSION = "fewer-cache", "2"

LAYER = ("keys", "values", "padding", "coded", "kept", "length", "real", "asked", "since")
"""What a layer of ours is, but for its observers and what it shares with the others."""

SLIDING = ("keys", "values", "cumulative_length")
"""What a sliding-window layer of transformers is."""


def _known() -> dict[str, type]:
    """The dataclasses that a file may name."""

    def below(kind: type) -> Iterator[type]:
        child: type
        for child in kind.__subclasses__():
            yield child
            yield from below(child)

    found: list[type] = [Ragged, Budget, Levels, QueryWindow, Fit, *METHODS.values(), *below(Coded)]
    for kind in list(found):  # and the dataclasses that those are built of, where their module defines them
        module = __import__(kind.__module__, fromlist=["_"])
        found += [x for x in vars(module).values() if isinstance(x, type) and dataclasses.is_dataclass(x)]
    return {f"{kind.__module__}.{kind.__qualname__}": kind for kind in found if kind.__module__.startswith("fewer.")}


class _Pack:
    """Plain data out of objects. What two hold together is written once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.known = _known()
        self.done: dict[int, tuple[Any, dict[str, Any]]] = {}  # by id, which lasts as long as the thing itself

    def __call__(self, thing: Any, where: str) -> Any:
        if thing is None or isinstance(thing, (bool, int, float, str)):
            return thing
        if id(thing) in self.done:
            return self.done[id(thing)][1]
        if isinstance(thing, Tensor):
            name = str(len(self.tensors))
            self.tensors[name] = thing.detach().cpu().contiguous().clone()
            self.done[id(thing)] = thing, {"tensor": name}
            return {"tensor": name}
        if isinstance(thing, torch.dtype):
            return {"dtype": str(thing).removeprefix("torch.")}
        if isinstance(thing, Rotary):
            return {"rotary": True}  # the model's own
        if isinstance(thing, (tuple, list)):
            kind = "tuple" if isinstance(thing, tuple) else "list"
            return {kind: [self(part, f"{where}[{index}]") for index, part in enumerate(thing)]}
        if isinstance(thing, dict) and all(isinstance(key, str) for key in thing):
            return {"dict": {key: self(part, f"{where}[{key!r}]") for key, part in thing.items()}}
        name = f"{type(thing).__module__}.{type(thing).__qualname__}"
        if dataclasses.is_dataclass(thing) and name in self.known:
            parts = {f.name: self(getattr(thing, f.name), f"{where}.{f.name}") for f in dataclasses.fields(thing)}
            number = len(self.done)
            self.done[id(thing)] = thing, {"same": number}
            return {"object": name, "fields": parts, "number": number}
        raise FewerError(f"this cache cannot be saved: {where} is a {name}, which no file may hold")


class _Unpack:
    """Objects out of plain data."""

    def __init__(self, tensors: dict[str, Tensor], rotary: Any) -> None:
        self.tensors, self.rotary, self.known = tensors, rotary, _known()
        self.made: dict[int, Any] = {}

    def __call__(self, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kind, value = next(iter(data.items()))
        made: dict[str, Callable[[], Any]] = {
            "tensor": lambda: self.tensors[value],
            "dtype": lambda: getattr(torch, value),
            "rotary": lambda: self.rotary,
            "tuple": lambda: tuple(self(part) for part in value),
            "list": lambda: [self(part) for part in value],
            "dict": lambda: {key: self(part) for key, part in value.items()},
            "object": lambda: self.made.setdefault(data["number"], self._object(value, data["fields"])),
            "same": lambda: self.made[value],
        }
        return made[kind]()

    def _object(self, name: str, parts: dict[str, Any]) -> Any:
        if name not in self.known:
            raise FewerError(f"the file holds a {name}, which this version of fewer does not know")
        kind = self.known[name]
        made = {f.name: self(parts[f.name]) for f in dataclasses.fields(kind) if f.init and f.name in parts}
        return kind(**made)


def save(cache: Any, path: str | Path) -> None:
    """Write a cache of ours; see `Cache.save`."""
    from fewer.adapters.hf_layer import Layer

    shared, pack, layers = cache.shared, _Pack(), []
    if getattr(shared.cutter, "shift", None) is not None:
        raise FewerError(
            "this cache cannot be saved: its positions were made compact, and what is read later has to be moved by as "
            "much; use positions='keep'"
        )
    policy = (
        shared.policy
    )  # first, as it is read first: what needs and methods share is spelled out where it comes first
    named = [f.name for f in dataclasses.fields(policy) if f.name != "cutter"]  # what is cut already stays cut
    said = {name: pack(getattr(policy, name), f"policy.{name}") for name in named}
    for index, layer in enumerate(cache.layers):
        mine = isinstance(layer, Layer)
        names = LAYER if mine else SLIDING
        state = {}
        if layer.is_initialized:
            state = {name: pack(getattr(layer, name), f"layer {index}.{name}") for name in names}
        if mine and layer.is_initialized:
            state["observers"] = [
                [
                    pack(need, "need"),
                    {
                        k: pack(v, f"layer {index}: {type(o).__name__}.{k}")
                        for k, v in vars(o).items()
                        if not callable(v)
                    },
                ]
                for need, o in layer.observers.items()
                if o.lasting or shared.policy.covers("decode")
            ]
        layers.append({"ours": mine, "state": state})
    data = {
        "policy": said,
        "frozen": shared.frozen,
        "notes": shared.notes,
        "layers": layers,
    }
    model = fingerprint(shared.host.model, "states")
    head = {"format": FORMAT, "version": VERSION, "model": model, "cache": json.dumps(data)}
    files.write(path, pack.tensors, head)


def load(cache_class: Any, model: Any, path: str | Path) -> Any:
    """Read a cache of ours, attached to `model`; see `Cache.load`."""
    from fewer.adapters.hf_bind import Host
    from fewer.adapters.hf_layer import Layer
    from fewer.adapters.hf_policy import Policy

    head, tensors = files.read(path, FORMAT, VERSION, "saved cache")
    host, data = Host.of(model), json.loads(head["cache"])
    if head["model"] != fingerprint(model, "states"):
        raise FewerError(
            f"{path} was saved from another model, other weights or adapters, or other settings of the same ones (of "
            f"its rotary embedding, say), than this {type(model).__name__}"
        )
    device = host.model.device
    unpack = _Unpack({name: tensor.to(device) for name, tensor in tensors.items()}, host.rotary)
    policy = Policy(**{name: unpack(value) for name, value in data["policy"].items()})
    cache = cache_class.within(host, policy)
    cache.shared.frozen, cache.shared.notes = data["frozen"], list(data["notes"])
    for layer, saved in zip(cache.layers, data["layers"], strict=True):
        if not saved["state"]:
            continue
        made = {name: unpack(value) for name, value in saved["state"].items() if name != "observers"}
        layer.lazy_initialization(made["keys"], made["values"])
        for name, value in made.items():
            setattr(layer, name, value)
        if isinstance(layer, Layer):
            for need, state in saved["state"]["observers"]:
                asked = unpack(need)
                layer.observers[asked] = observer = asked.start()
                for name, value in state.items():
                    setattr(observer, name, unpack(value))
            layer._weigh()
    return cache
