"""The README: its Python program runs, and its table of models is what the registry says.

`python tests/python/test_readme.py` writes the table. (The README's C++ program: test_consumer.py.)
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from fastpage.models import architectures
from fastpage.models.registry import _BUILT_IN

README = Path(__file__).resolve().parents[2] / "README.md"
TABLE_HEAD = "| `architectures` in config.json | models |\n|---|---|\n"


def test_offline(smollm2_gguf: Path, tmp_path: Path) -> None:
    program = README.read_text().split("```python\n")[1].split("```")[0]
    (tmp_path / smollm2_gguf.name).symlink_to(smollm2_gguf)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "'The capital of France is'" in done.stdout


def test_table_of_models() -> None:
    text = README.read_text()
    assert with_table(text) == text, "run `python tests/python/test_readme.py`"


def test_docstrings_name_what_is_registered() -> None:
    for module, names in modules().items():
        assert set(described(module)[0]) == names, f"the docstring of {module}.py"


def with_table(readme: str) -> str:
    before, _, after = readme.partition(TABLE_HEAD)
    rest = after.lstrip("\n") if after.startswith("\n") else after[after.index("\n\n") + 2 :]
    return f"{before}{TABLE_HEAD}{table()}\n{rest}"


def table() -> str:
    lines = []
    for module in modules():
        names, models = described(module)
        listed = ", ".join(f"`{name}`" for name in names)
        lines.append(f"| {listed} | {models.removesuffix('.')} |\n")
    return "".join(sorted(lines, key=str.lower))


def modules() -> dict[str, set[str]]:
    """The modules of architectures, with the names that are registered for each."""
    found: dict[str, set[str]] = defaultdict(set)
    for name, module in _BUILT_IN.items():
        found[module].add(name)
    return found


def described(module: str) -> tuple[list[str], str]:
    """The names in the first paragraph of the module's docstring, and what they are. (A name may
    have a remark in parentheses.)"""
    path = Path(architectures.__file__).with_name(f"{module}.py")
    paragraph = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0]
    names, _, models = " ".join(paragraph.split()).partition(": ")
    return re.sub(r" \([^)]*\)", "", names).split(", "), models


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
