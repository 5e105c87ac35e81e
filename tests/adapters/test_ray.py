"""A bulk run on a Ray cluster: the same bytes as on one machine, also when workers die. Where Ray is not installed its
tests are skipped; `make test-ray` runs them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from fewer.adapters.ray import engine
from fewer.methods.prompt.truncation import Truncation
from fewer.prompts.bulk import Shortener
from fewer.prompts.checkpoint import shorten_lines
from fewer.types import FewerError

CUT = Shortener("truncation", keep=0.5, tokenizer="characters", patches=True)


def many(n: int) -> list[bytes]:
    return [
        json.dumps({"id": i, "text": f"Document {i} says that {i * i} is {i} times {i}. And so on."}).encode() + b"\n"
        for i in range(n)
    ]


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(FewerError, match=r"pip install 'fewer\[ray\]'"):
        engine()


@dataclass(frozen=True)
class Watched(Truncation):
    """Writes down which process ranked what; with `deadly`, kills that process the first time it sees this text."""

    folder: str = ""
    deadly: str = ""
    always: bool = False

    def rank(self, source: Any, budget: Any) -> Any:
        log = Path(self.folder) / "log"
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{os.getpid()} {source.documents[0][:12]}\n")
        for _ in range(600 if "Document" in source.documents[0] else 0):  # no line before two workers have begun
            if len({row.split()[0] for row in log.read_text(encoding="utf-8").splitlines()}) > 1:
                break
            time.sleep(0.05)
        dead = Path(self.folder) / "dead"
        if self.deadly and self.deadly in source.documents[0] and (self.always or not dead.exists()):
            dead.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().rank(source, budget)

    def __repr__(self) -> str:
        return "Watched"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes with a core each, on this machine."""
    ray = pytest.importorskip("ray", reason="Ray is not installed here: make test-ray runs these")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()
    made.shutdown()


def test_a_killed_worker_loses_and_doubles_nothing(cluster: Any, tmp_path: Path) -> None:
    lines, whole, out = many(60), tmp_path / "whole", tmp_path / "out"
    watched = Watched(folder=str(tmp_path), deadly="Document 30 ")
    shorten_lines(lines, whole, CUT)
    summary = shorten_lines(lines, out, replace(CUT, method=watched), engine())
    assert out.read_bytes().replace(b'"method": "Watched"', b'"method": "truncation"') == whole.read_bytes()
    assert (summary.lines, summary.errors) == (60, 0)
    rows = (tmp_path / "log").read_text().splitlines()
    ranked = [(pid, text) for pid, text in (row.split(" ", 1) for row in rows) if text.startswith("Document")]
    assert (tmp_path / "dead").exists() and len({pid for pid, _ in ranked}) >= 2
    dead, alive = [pid for pid, text in ranked if text.startswith("Document 30")]  # ranked twice, written once
    assert dead != alive and all(pid != dead for pid, _ in ranked[ranked.index((dead, "Document 30 ")) + 1 :])


def test_lines_are_taken_as_they_are_needed(cluster: Any, tmp_path: Path) -> None:
    taken = [0]

    def source() -> Iterator[bytes]:
        for raw in many(60):
            taken[0] += 1
            yield raw

    ahead: list[int] = []
    total = shorten_lines(
        source(), tmp_path / "out", CUT, engine(), tick=lambda sum: ahead.append(taken[0] - sum.lines)
    )
    assert total.lines == 60 and max(ahead) < 2 * 4  # two cores, four lines each


def test_an_interrupted_run_goes_on_with_the_other_engine(cluster: Any, tmp_path: Path) -> None:
    lines, whole, out = [*many(20), b'{"text": " "}', b"\n", *many(1)], tmp_path / "whole", tmp_path / "out"
    shorten_lines(lines, whole, CUT)
    for last, run in ((7, None), (14, engine()), (23, engine())):
        broken = lines if last == 23 else [*lines[:last], b"no JSON", *lines[last + 1 :]]
        options = {} if run is None else {"engine": run}
        if last == 23:
            assert shorten_lines(broken, out, CUT, **options).resumed == 14
        else:
            with pytest.raises(FewerError, match=f"line {last + 1} of the input is not JSON"):
                shorten_lines(broken, out, CUT, **options)
    assert out.read_bytes() == whole.read_bytes()


def test_a_line_that_always_kills_its_worker_ends_the_run(cluster: Any, tmp_path: Path) -> None:
    watched = Watched(folder=str(tmp_path), deadly="Document 5 ", always=True)
    with pytest.raises(FewerError, match=r"line 6: its worker died, 2 times"):
        shorten_lines(many(12), tmp_path / "out", replace(CUT, method=watched), engine(retries=1))
    assert len((tmp_path / "out.partial").read_text().splitlines()) == 5


@dataclass(frozen=True)
class Broken(Truncation):
    """A method with a fault."""

    def rank(self, source: Any, budget: Any) -> Any:
        if "Document 2" in source.documents[0]:
            raise ZeroDivisionError("oops")
        return super().rank(source, budget)


def test_wrong_settings_and_faults_are_told_as_they_are(cluster: Any, tmp_path: Path) -> None:
    with pytest.raises(FewerError, match="has no threshold of its own"):
        shorten_lines(many(3), tmp_path / "out", replace(CUT, keep=None), engine())
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="line 3 of the input: the method failed"):
        shorten_lines(many(5), tmp_path / "out", replace(CUT, method=Broken()), engine())


def test_the_command_on_a_cluster_of_its_own_and_on_one_by_address(cluster: Any, tmp_path: Path) -> None:
    data, whole = tmp_path / "data", tmp_path / "whole"
    data.write_bytes(b"".join(many(12)))
    shorten_lines(many(12), whole, CUT)
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", "from fewer.cli import main; main()", "prompt"]
    command += ["--in", str(data), "--method", "truncation", "--keep", "0.5", "--tokenizer", "characters", "--patches"]
    for name, address in (("own", ""), ("given", cluster.get_runtime_context().gcs_address), ("none", "127.0.0.1:1")):
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        environment |= {"RAY_ADDRESS": address} if address else {}
        words = [*command, "--engine", "ray", "--out", str(tmp_path / name)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
        if name == "none":
            assert done.returncode == 2 and "RAY_ADDRESS=127.0.0.1:1: nothing answers there" in done.stderr
        else:
            assert done.returncode == 0, done.stderr
            assert (tmp_path / name).read_bytes() == whole.read_bytes()
