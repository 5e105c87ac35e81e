"""plan.toml: a setting, the model it is for, and the promise that was measured, in a file that people can read.

    format = "fewer-plan 1"
    model = "default"                      what it was loaded by
    fingerprint = "3f0c..."                of its weights
    [setting.text]  [setting.held]         see fewer.tuning.setting
    [promise]                              loss, confidence, measure, and on how much it rests
    [made]                                 date, versions, command
    sha256 = "..."                         over all of it: a promise holds for the setting that it was measured with

A file without [promise] is a setting and nothing more: it needs no fingerprint and no checksum, and may be edited.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError

from fewer import fit
from fewer.tuning.setting import Setting
from fewer.types import FewerError, FewerWarning

FORMAT = "fewer-plan 1"
AGAIN = "run `fewer tune` again"
ONCE = "a context with several questions counts once, with the mean of their losses"


@dataclass(frozen=True)
class Promise:
    """With `confidence`, on data like the examples, the expected loss is at most `loss`.

    `measure` names the loss, `examples` how many it was calibrated on, `lost` their mean loss, `p` the p-value;
    `held_out` and `held_out_lost` are of examples that had no part in any choice. `unseen` says that contexts were
    compressed before the question was read; `max_new_tokens` is how long answers could be, greedy ones; `stake` is what
    an answer of nothing at all would have lost. `grouped` says that some examples shared a context: such a context
    counts as one example, with the mean loss of its questions, and so it is in what is promised. `test` says which test
    this was on these calibration examples: the confidence is that of the first.
    """

    loss: float
    confidence: float
    measure: str
    examples: int
    lost: float
    p: float
    held_out: int
    held_out_lost: float
    unseen: bool = False
    max_new_tokens: int = 64
    stake: float = 1.0
    grouped: bool = False
    test: int = 1

    def __str__(self) -> str:
        return (
            f"with confidence {self.confidence:g}, on data like the examples, the expected loss ({self.measure}) is at "
            f"most {self.loss:g}; it was {self.lost:.4f} on {self.examples} calibration examples and "
            f"{self.held_out_lost:.4f} on {self.held_out} held out (an answer of nothing would lose {self.stake:.4f})"
            + ("; contexts were compressed before their questions were read" if self.unseen else "")
            + (f"; {ONCE}" if self.grouped else "")
            + (f"; {again(self.test)}" if self.test > 1 else "")
        )


@dataclass(frozen=True)
class TunedPlan:
    """What a plan file holds."""

    setting: Setting
    model: str = ""
    fingerprint: str = ""
    promise: Promise | None = None
    made: Mapping[str, str] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write the file; what was there is replaced whole, or not at all.

        Raises:
            FewerError: the file cannot be written.
        """
        path = Path(path)
        said = self.to_dict()
        if self.promise is not None:
            said["sha256"] = _digest(said)
        draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            draft.write_text(_HEAD + tomlkit.dumps(said), encoding="utf-8")
            draft.replace(path)
        except (OSError, UnicodeEncodeError) as why:  # half a surrogate pair, out of a name or a command line
            reason = why.reason if isinstance(why, UnicodeEncodeError) else why.strerror
            raise FewerError(f"{path} cannot be written ({reason}); nothing was changed") from None
        finally:
            with suppress(OSError):
                draft.unlink()

    @classmethod
    def load(cls, path: str | Path) -> "TunedPlan":
        """Read a plan, and check all of it that can be checked without its model.

        Raises:
            FewerError: the file cannot be read, is no plan, is of another format or version of fewer, was changed
                since its promise was measured, or holds nonsense.
        """
        if not isinstance(path, (str, os.PathLike)) or path == "":
            raise FewerError(f"TunedPlan.load({path!r}): give the path of a plan's file, such as 'plan.toml'")
        path = Path(path)
        try:
            said: dict[str, Any] = tomlkit.parse(path.read_text(encoding="utf-8")).unwrap()
        except OSError as why:
            raise FewerError(f"{path}: the plan cannot be read ({why.strerror})") from None
        except (TOMLKitError, UnicodeDecodeError) as why:
            raise FewerError(f"{path} is no TOML, and so no plan: {why}") from None
        stated = said.pop("sha256", None)
        if said.get("format") != FORMAT:
            raise FewerError(
                f"{path} is no plan that this fewer reads: format is {said.get('format')!r}, not {FORMAT!r}"
            )
        if wrong := [
            name for name in said if name not in ("format", "model", "fingerprint", "setting", "promise", "made")
        ]:
            raise FewerError(f"{path}: {wrong[0]!r} means nothing in a plan")
        if "setting" not in said:
            raise FewerError(f"{path} has no [setting.text] and no [setting.held], so it says nothing to do")
        promised = said.get("promise")
        if promised is not None and stated != _digest(said):
            raise FewerError(
                f"{path} was changed since it was written, so its promise holds no more; {AGAIN}, or take [promise] "
                f"and sha256 out of it to use it as a setting without one"
            )
        model, fingerprint = said.get("model", ""), said.get("fingerprint", "")
        for name, value in (("model", model), ("fingerprint", fingerprint)):
            if not isinstance(value, str):
                raise FewerError(f"{path}: {name} = {value!r} cannot be read: it is a text")
        tables = [said.get(name, {}) for name in ("setting", "made")]
        if not all(isinstance(one, dict) for one in tables):
            raise FewerError(f"{path}: setting and made are tables")
        setting = Setting.from_dict(said["setting"], f"{path}: setting").beside(path.parent)
        if setting == Setting():
            raise FewerError(f"{path} has no [setting.text] and no [setting.held], so it says nothing to do")
        promise = None if promised is None else _promise(path, promised)
        plan = cls(setting, model, fingerprint, promise, said.get("made", {}))
        theirs = plan.made.get("fewer")
        if plan.promise is not None and theirs != _version():
            raise FewerError(
                f"{path} was measured with fewer {theirs}, and this is {_version()}, whose methods may keep other "
                f"tokens; {AGAIN}, or take [promise] and sha256 out of it to use it as a setting without one"
            )
        return plan

    @classmethod
    def of(cls, method: Any) -> "TunedPlan | None":
        """The plan that `fewer.compress` was given in the place of a method: a file's name, a path, or a plan."""
        if isinstance(method, cls):
            return method
        return cls.load(method) if isinstance(method, Path) or is_plan(method) else None

    def check(self, model: Any) -> None:
        """Raise `FewerError` if this is not the model that the plan is for."""
        if self.fingerprint and (ours := fit.fingerprint(model, "answers")) != self.fingerprint:
            raise FewerError(
                f"the plan is for {self.model or 'another model'} ({self.fingerprint[:12]}), and this "
                f"{type(model).__name__} is another one ({ours[:12]}); {AGAIN} on this one"
            )

    @contextmanager
    def under(self, model: Any) -> Iterator[Any]:
        """The model with the plan's part for it; `setting.shorten` is the part for prompts.

        Raises:
            FewerError: this is not the plan's model, or the plan has nothing for a model to do.
        """
        self.check(model)
        if self.setting.held is None:
            raise FewerError(
                f"the plan shortens prompts ({self.setting}) and leaves the model as it is: pass texts through "
                f"TunedPlan.load(...).setting.shorten(context, question, tokenizer)"
            )
        if self.setting.text is not None:
            warnings.warn(
                f"the plan's promise is for prompts shortened by {self.setting.text.method} before the model reads "
                f"them: pass texts through TunedPlan.load(...).setting.shorten(context, question, tokenizer)",
                FewerWarning,
                stacklevel=4,
            )
        if self.promise is not None and self.promise.unseen:
            warnings.warn(
                "the plan's promise is for contexts that were compressed before their question was read: read the "
                "context by itself, then run.cache.freeze(), then the question",
                FewerWarning,
                stacklevel=4,
            )
        with self.setting.under(model) as run:
            yield run

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as the file holds it."""
        said: dict[str, Any] = {"format": FORMAT, "model": self.model, "fingerprint": self.fingerprint}
        said["setting"] = self.setting.to_dict()
        if self.promise is not None:
            said["promise"] = asdict(self.promise)
        return {**said, "made": dict(self.made)}

    def __str__(self) -> str:
        return f"{self.setting}: {self.promise or 'nothing is promised'}"


def again(test: int) -> str:
    """What to say of a later test on the same examples: they are no new evidence."""
    return f"this was test number {test} on the same calibration examples, and the confidence is that of the first"


def is_plan(method: Any) -> bool:
    """Whether a name is that of a plan's file."""
    return isinstance(method, str) and method.endswith(".toml")


_HEAD = """\
# Made by `fewer tune`; use it by fewer.compress(model, "plan.toml"), fewer generate --plan, fewer serve --plan.
# Its promise is for this setting: edit the file, and fewer refuses it until [promise] and sha256 are taken out.
"""


def versions() -> dict[str, str]:
    """What a promise was measured with."""
    import torch
    import transformers

    return {"fewer": _version(), "torch": torch.__version__, "transformers": transformers.__version__}


def _version() -> str:
    try:
        return version("fewer")
    except PackageNotFoundError:
        from fewer import __version__

        return __version__


def _promise(path: Path, said: Any) -> Promise:
    known = {f.name: f.type for f in fields(Promise)}
    if not isinstance(said, dict) or (said.keys() ^ known.keys()):
        raise FewerError(f"{path}: [promise] holds {', '.join(known)}, and nothing else")
    return Promise(**said)


def _digest(said: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()
