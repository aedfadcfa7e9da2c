"""The tests of faults on every kernel for the CPU, or on the reference where it is all there is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.tools import kernels


@pytest.fixture(params=kernels.cpu_kernels() or ["reference"], ids=kernels.name)
def simd(request: pytest.FixtureRequest) -> Iterator[str | int]:
    """As tests/conftest.py's; under FASTTAX_BACKEND=reference that."""
    yield from kernels.chosen(request)
