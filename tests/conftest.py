"""Markers, the device fixture, and what a machine without a GPU means."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, os.path.dirname(__file__))  # tests import `helpers`

MARKERS = (
    "gpu: needs a CUDA GPU; skipped without one, but failed if asked for by -m gpu",
    "slow: takes more than ten seconds",
    "multi: starts several processes",
)


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)


def _asks_for_gpu(config: pytest.Config) -> bool:
    """True for ``-m gpu`` and expressions with it, not for ``-m 'not gpu'``."""
    expression = config.getoption("markexpr") or ""
    words = expression.replace("(", " ").replace(")", " ").split()
    return any(word == "gpu" and (i == 0 or words[i - 1] != "not") for i, word in enumerate(words))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None or torch.cuda.is_available():
        return
    reason = "no CUDA GPU: torch.cuda.is_available() is False"
    if _asks_for_gpu(item.config):
        pytest.fail(f"-m gpu was asked for, but there is {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Every test that takes it runs on the CPU and on the GPU."""
    return request.param


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A text of our own to train on: a run on the standard library differs from Python to Python."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"def f{i}(x):\n    return x * {i * i}\n\n" for i in range(1000)))
    return str(path)


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process; one thread, as small models want."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    torch.set_num_threads(threads)


@pytest.fixture
def main(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Calls lina's command: its exit code, and what it printed and complained of."""
    from lina import cli

    def call(*argv: str) -> tuple[int, str, str]:
        try:
            code = cli.main(argv)
        except SystemExit as leave:
            code = leave.code
        return code, *capfd.readouterr()
    return call
