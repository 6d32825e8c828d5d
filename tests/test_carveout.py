"""SMs left to exchanges: set while products are launched, put back whatever happens."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from lina.parallel.tokens import carveout as module
from lina.parallel.tokens.carveout import carveout

from helpers import Carveout


@pytest.fixture
def setting() -> Iterator[Carveout]:
    with Carveout() as found:
        yield found


def test_set_and_put_back(setting: Carveout) -> None:
    with carveout(0):
        assert setting.value is None
    with carveout(4):
        assert setting.value == 4
        with carveout(2):                    # never less than is asked for outside
            assert setting.value == 4
        with carveout(8):
            assert setting.value == 8
        assert setting.value == 4
    assert setting.value is None
    with pytest.raises(MemoryError), carveout(4):
        raise MemoryError
    assert setting.value is None


def test_of_two_threads_in_any_order(setting: Carveout) -> None:
    """The first to come leaves first."""
    first, second = carveout(8), carveout(4)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert setting.value == 4
    second.__exit__(None, None, None)
    assert setting.value is None


def test_the_users_own_stays(setting: Carveout) -> None:
    setting.set(16)
    with carveout(4):
        assert setting.value == 16
    assert setting.value == 16


def test_without_the_setting(setting: Carveout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_set", None)
    with carveout(4):
        assert setting.value is None


def test_says_nothing() -> None:
    """torch warns of its setting at the first use, on stderr."""
    code = "from lina.parallel.tokens.carveout import carveout\nwith carveout(4): pass\nprint('done')"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("done\n", "", 0)
