"""A pytest plugin: the CUDA library that tests/tools/fake_cuda.py has built is fasttax's."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys

import torch  # noqa: F401  (the library wants its symbols)

_NAME = "fasttax._C_cuda"


def _load(path: str) -> None:
    """Before fasttax, which takes the module that is there."""
    loader = importlib.machinery.ExtensionFileLoader(_NAME, path)
    spec = importlib.util.spec_from_loader(_NAME, loader)
    assert spec is not None
    sys.modules[_NAME] = importlib.util.module_from_spec(spec)


_load(os.environ["FAKE_CUDA_LIBRARY"])
