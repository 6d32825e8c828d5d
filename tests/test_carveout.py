"""SMs left to exchanges: set while products are launched, put back whatever happens."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lina.parallel.tokens import carveout as module
from lina.parallel.tokens.carveout import carveout

get, set_ = torch._C._get_sm_carveout_experimental, torch._C._set_sm_carveout_experimental


def test_set_and_put_back() -> None:
    with carveout(0):
        assert get() is None
    with carveout(4):
        assert get() == 4
        with carveout(2):                    # never less than is asked for outside
            assert get() == 4
        with carveout(8):
            assert get() == 8
        assert get() == 4
    assert get() is None
    with pytest.raises(MemoryError), carveout(4):
        raise MemoryError
    assert get() is None


def test_the_users_own_stays() -> None:
    set_(16)
    try:
        with carveout(4):
            assert get() == 16
        assert get() == 16
    finally:
        set_(None)


def test_without_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_set", None)
    with carveout(4):
        assert get() is None


def test_says_nothing() -> None:
    """torch warns of its setting at the first use, on stderr."""
    code = "from lina.parallel.tokens.carveout import carveout\nwith carveout(4): pass\nprint('done')"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("done\n", "", 0)
