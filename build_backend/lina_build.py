"""The build backend: setuptools' own, plus CUDA's compiler as a requirement where it is missing.

PyPI carries nvcc and a C++ compiler for it, so `pip install .` compiles CUDA code on a machine with
gcc alone. What the machine has is not downloaded, and LINA_CUDA=0 downloads neither.
"""

from __future__ import annotations

import sys

from setuptools.build_meta import *  # noqa: F403
from setuptools.build_meta import get_requires_for_build_wheel as _requires_for_wheel

from toolchain import CXX_REQUIREMENTS, NVCC_REQUIREMENTS, cuda_wanted, cxx_compiler, find_nvcc


def _cuda_requirements() -> list[str]:
    if sys.platform != "linux" or cuda_wanted() is False:
        return []
    nvcc = [] if find_nvcc(packages=False) else NVCC_REQUIREMENTS
    cxx = [] if cxx_compiler() else CXX_REQUIREMENTS
    return nvcc + cxx


def get_requires_for_build_wheel(config_settings=None):
    return [*_requires_for_wheel(config_settings), *_cuda_requirements()]


get_requires_for_build_editable = get_requires_for_build_wheel
