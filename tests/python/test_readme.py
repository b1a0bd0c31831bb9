"""The Python program in the README runs as it stands. (Its C++ program: test_consumer.py.)"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "README.md"


def test_offline(smollm2_gguf: Path, tmp_path: Path) -> None:
    program = README.read_text().split("```python\n")[1].split("```")[0]
    (tmp_path / smollm2_gguf.name).symlink_to(smollm2_gguf)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "'The capital of France is'" in done.stdout
