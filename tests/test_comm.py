"""csrc/comm without a GPU: several ranks in one process, over a fake CUDA and a fake NCCL.

What is checked stands in fuzz_comm.c and fake_cuda.h; `make sanitize` runs more of it, under
ThreadSanitizer and AddressSanitizer. Python's Communicator is built over the same fakes.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PLAIN = "build/fuzz/plain"
CC = os.environ.get("CC", "cc")
PATIENCE_S = 20.0
AHEAD = 25  # calls of a thread; an abort lets them end, a millisecond each of the fake's stream

needs_compiler = pytest.mark.skipif(
    not (shutil.which("make") and shutil.which(CC)), reason="needs make and a C compiler"
)
INCLUDE = sysconfig.get_paths()["include"]
needs_headers = pytest.mark.skipif(not Path(INCLUDE, "Python.h").exists(), reason="needs Python.h")


def make(target: str) -> None:
    built = subprocess.run(
        ["make", "--no-print-directory", target], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert built.returncode == 0, built.stderr


def run(*command: str, **env: str) -> str:
    ran = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "LD_LIBRARY_PATH": str(ROOT / PLAIN), **env},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ran.returncode == 0, ran.stderr + ran.stdout
    return ran.stdout


@needs_compiler
def test_rounds_and_faults() -> None:
    make(f"{PLAIN}/comm")
    # Rounds enough for two sessions with other numbers of ranks; then each fault once.
    said = run(f"{PLAIN}/comm", "40", "1")
    assert re.search(r"40 rounds in .* 19 faults in", said), said


@needs_compiler
@needs_headers
def test_communicator_of_several_threads(tmp_path: Path) -> None:
    make(f"{PLAIN}/libnccl.so.2")
    comm = [p for p in sorted(ROOT.glob("csrc/comm/*.c")) if not p.name.startswith("peers")]
    rest = "module_comm.c module_error.c nccl_abi.c error.c plan/policy.c plan/link.c"
    sources = [ROOT / "tests/fake_module.c", *comm, *(ROOT / "csrc" / name for name in rest.split())]
    flags = f"-std=c11 -g -O1 -fPIC -shared -DLINA_CUDA=1 -Icsrc -Itests -isystem tests/fake_cuda -I{INCLUDE}"
    out = tmp_path / "fake_module.so"
    run(CC, *flags.split(), "-o", str(out), *map(str, sources), f"{PLAIN}/libnccl.so.2", "-lm", "-ldl",
        "-lpthread")  # fmt: skip
    path = os.pathsep.join([str(tmp_path), str(ROOT / "tests")])
    # Freed memory reads as garbage, so that a use of it shows.
    said = run(sys.executable, "-c", "import test_comm; test_comm.several_threads()", PYTHONPATH=path,
               MALLOC_PERTURB_="165")  # fmt: skip
    assert said.splitlines() == ["closed", "closed again", "forked", "one policy"]


# ---- what the program above does; one rank, so that every operation ends by itself ----


class Reducer:
    """A communicator, and threads that reduce with it until it is closed."""

    def __init__(self, count: int) -> None:
        import fake_module as fake  # type: ignore[import-not-found]

        self.stream, self.memory, self.count = fake.stream(0), ctypes.create_string_buffer(4 * count), count
        self.comm = fake.Communicator(fake.nccl_id(), 0, 1, 0, "gradients", PATIENCE_S)
        self.comm.set_policy(0.0, 1e-9, 512e-9, 4)
        self.errors: list[str] = []
        self.threads = [threading.Thread(target=self._reduce, daemon=True) for _ in range(4)]

    def reduce(self) -> None:
        self.comm.all_reduce(ctypes.addressof(self.memory), self.count, 0, False, True, self.stream)

    def _reduce(self) -> None:
        try:
            for _ in range(AHEAD):
                self.reduce()
            while True:
                self.comm.check()
                time.sleep(1e-3)
        except RuntimeError as error:
            self.errors.append(str(error))

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def close(self) -> None:
        import fake_module as fake

        self.comm.close()
        for thread in self.threads:
            thread.join(PATIENCE_S)
        assert not any(thread.is_alive() for thread in self.threads), "a call hangs"
        assert len(self.errors) == 4 and all("closed" in error for error in self.errors), self.errors
        for again in (self.comm.check, self._reduce):
            try:
                again()
            except RuntimeError as error:
                self.errors.append(str(error))
        assert self.errors[4:] == ["Communicator: closed"] * 2
        self.comm.close()  # nothing more to do
        since = time.monotonic()
        while fake.live():  # aborts run on threads of their own
            assert time.monotonic() - since < PATIENCE_S, "a communicator leaks"
            time.sleep(1e-3)
        assert fake.drain(self.stream, PATIENCE_S)


def several_threads() -> None:
    import fake_module as fake

    # One is inside NCCL, which does not come back; the others wait for their turn.
    one = Reducer(128)
    fake.stick(0, True)
    one.start()
    time.sleep(0.2)
    one.close()
    fake.stick(0, False)
    print("closed")

    # Threads are anywhere between Python and NCCL.
    for _ in range(50):
        one = Reducer(128)
        one.start()
        one.close()
    print("closed again")

    # A fork has a copy, which is nobody's to abort.
    one = Reducer(128)
    one.reduce()
    assert fake.drain(one.stream, PATIENCE_S)  # or an abort in the child would wait for it, and not show
    child = os.fork()
    if child == 0:
        one.comm.close()
        del one.comm
        time.sleep(0.05)
        os._exit(fake.live())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    one.reduce()
    one.comm.close()
    print("forked")

    # One call is cut by one policy, though another is set meanwhile: 256 micro-ops or a single one.
    for _ in range(2):
        one = Reducer(256 * 128)
        call = threading.Thread(target=one.reduce)
        call.start()
        time.sleep(2e-3)
        one.comm.set_policy(0.0, 1e-9, 1.0, 4)
        call.join(PATIENCE_S)
        assert fake.drain(one.stream, PATIENCE_S)
        assert fake.waited(one.stream) in (1, 256), fake.waited(one.stream)
        one.comm.close()
    print("one policy")
