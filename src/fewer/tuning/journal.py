"""Answers on disk as they come: a JSON line each, so that a search that was broken off goes on where it stopped.

line 1     what the run is about: model, seed, versions; a run about something else is refused
then       {"example": key, "setting": key, "answer": [...]}, {"search": name, "levels": [...], "stage": i,
           "fitness": x}, or {"test": digest} for a calibration
"""

import json
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from fewer.tuning.examples import Example
from fewer.tuning.hosts import Answer
from fewer.tuning.setting import Setting
from fewer.types import FewerError


class Journal:
    """The answers of one run, by example and setting; without a path they are in memory alone.

    Args:
        path: the file, made if it is not there. A last line that was cut short is taken off it.
        about: what the run depends on.

    Raises:
        FewerError: the file is another run's, is none of ours, or cannot be read or written.
    """

    def __init__(self, path: Path | None, about: Mapping[str, Any]) -> None:
        self.path = path
        self.answers: dict[tuple[str, str], Answer] = {}
        self.tests: list[str] = []
        self.fitness: dict[str, dict[tuple[tuple[int, ...], int], float]] = {}
        if path is None:
            return
        said = json.loads(json.dumps({"kind": "tune", **about}))
        if path.exists() and not self._blank(path):
            self._read(path, said)
        else:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"")
            except OSError as why:
                raise FewerError(f"{path} cannot be written ({why.strerror})") from None
            self._write(said)

    def get(self, example: Example, setting: Setting) -> Answer | None:
        """The answer of an earlier run, or of earlier in this one."""
        return self.answers.get((example.key, setting.key))

    def put(self, example: Example, setting: Setting, answer: Answer) -> None:
        """Remember an answer; it is on disk when this returns."""
        self.answers[example.key, setting.key] = answer
        self._write({"example": example.key, "setting": setting.key, "answer": list(answer)})

    def known(self, search: str) -> "Known":
        """What a search for levels knows, of this name."""
        return Known(self, search)

    def test(self, digest: str) -> int:
        """Which test this is on the record's calibration examples; the same test again is no other one."""
        if digest not in self.tests:
            self.tests.append(digest)
            self._write({"test": digest})
        return self.tests.index(digest) + 1

    def _blank(self, path: Path) -> bool:
        """Whether not even the first line was written whole, as where the disk was full."""
        try:
            content = path.read_bytes()
        except OSError as why:
            raise FewerError(f"{path} cannot be read: {why.strerror}") from None
        return not content or (b"\n" not in content and b'{"kind": "tune"'.startswith(content[:15]))

    def _read(self, path: Path, about: dict[str, Any]) -> None:
        try:
            content = path.read_bytes()
        except OSError as why:
            raise FewerError(f"{path} cannot be read: {why.strerror}") from None
        whole = content[: content.rfind(b"\n") + 1]
        try:
            lines = [json.loads(line) for line in whole.decode().split("\n") if line]
            first = lines[0]
            if first.get("kind") != "tune":
                raise ValueError("kind")
        except (ValueError, IndexError, AttributeError):
            raise FewerError(f"{path} is no record of `fewer tune`; give another folder (--out)") from None
        if other := [name for name in about.keys() | first.keys() if about.get(name) != first.get(name)]:
            raise FewerError(
                f"{path} is the record of another run ({', '.join(sorted(other))} differ); give another folder "
                f"(--out), or delete it to start anew"
            )
        try:
            for line in lines[1:]:
                if "answer" in line:
                    *rest, shares, refused = line["answer"]
                    answer = Answer._make([*rest, tuple(tuple(one) for one in shares), refused])
                    self.answers[line["example"], line["setting"]] = answer
                elif "test" in line:
                    self.tests.append(line["test"])
                else:
                    known = self.fitness.setdefault(line["search"], {})
                    known[tuple(line["levels"]), line["stage"]] = line["fitness"]
        except (KeyError, TypeError, ValueError) as why:
            raise FewerError(f"{path} holds a line that is no answer ({why}); delete it to start anew") from None
        if len(whole) < len(content):
            with path.open("r+b") as file:
                file.truncate(len(whole))

    def _write(self, line: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as why:
            raise FewerError(
                f"{self.path} cannot be written ({why.strerror}); what is in it stays, and the same command "
                f"goes on from it"
            ) from None


class Known(MutableMapping[tuple[tuple[int, ...], int], float]):
    """Fitnesses by levels and stage, kept in a journal as they come."""

    def __init__(self, journal: Journal, search: str) -> None:
        self.journal, self.search = journal, search
        self.data = journal.fitness.setdefault(search, {})

    def __getitem__(self, key: tuple[tuple[int, ...], int]) -> float:
        return self.data[key]

    def __setitem__(self, key: tuple[tuple[int, ...], int], value: float) -> None:
        self.data[key] = value
        levels, stage = key
        self.journal._write({"search": self.search, "levels": list(levels), "stage": stage, "fitness": value})

    def __delitem__(self, key: tuple[tuple[int, ...], int]) -> None:
        raise TypeError("what is on disk stays")

    def __iter__(self) -> Iterator[tuple[tuple[int, ...], int]]:
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)
