"""Builds lina/_C.abi3.so from csrc; everything else about the package is in pyproject.toml.

    pip install .                        the usual way
    python setup.py build_ext --inplace  beside the sources, for work on them

LINA_CUDA=0 builds for the CPU alone, LINA_CUDA=1 fails where CUDA cannot be compiled; CC, CXX and
CUDA_HOME choose compilers.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))

from objects import build, sources  # noqa: E402


class BuildExt(build_ext):
    def build_extension(self, ext: Extension) -> None:
        build(ROOT, Path(self.get_ext_fullpath(ext.name)).absolute(), jobs=self.parallel)


class BuildPy(build_py):
    def run(self) -> None:
        # A module deleted from the sources must not live on in the next wheel.
        stale = Path(self.build_lib).resolve()
        if not self.editable_mode and ROOT / "build" in stale.parents:
            shutil.rmtree(stale, ignore_errors=True)
        super().run()


setup(
    ext_modules=[Extension("lina._C", [str(s) for s in sources(ROOT, cuda=True)], py_limited_api=True)],
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
