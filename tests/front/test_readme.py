"""What the README says is true: its generated table is the code's, its links exist, its first example runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_table_of_methods_has_not_drifted() -> None:
    done = subprocess.run(  # noqa: S603
        [sys.executable, str(ROOT / "scripts/readme.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", re.sub(r"```.*?```", "", README, flags=re.S))  # code subscripts and calls too
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


@pytest.mark.slow
def test_the_first_example_runs(default_model_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = re.search(r"```python\n(.*?)```", README, re.S)
    assert code is not None
    exec(compile(code[1], "README.md", "exec"), {})  # noqa: S102  # our own text
    assert "snapkv keep=0.25: kept" in capsys.readouterr().out
