"""The README's examples run as they are printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from ranks import environment

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


def test_there_are_examples_of_ten_lines():
    assert len(BLOCKS) >= 3 and all(len(block.splitlines()) <= 14 for block in BLOCKS)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_example_runs(number, tmp_path):
    code = BLOCKS[number]
    if "transformers" in code:
        pytest.importorskip("transformers")
    script = tmp_path / "example.py"
    script.write_text(code)
    ranks = "init_process_group" in code
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if ranks else []
    done = subprocess.run([sys.executable, *launcher, str(script)], cwd=tmp_path, capture_output=True,
                          text=True, timeout=200, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    if "lina.trace" in code:
        assert (tmp_path / "step.json").stat().st_size > 0
    if "swap_report" in code:
        assert "swapped" in done.stdout
