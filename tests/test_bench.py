"""`make bench-gpu` has no GPU to be tried on: its contenders, small and on the CPU, with torch.compile standing aside."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch


def test_every_contender_of_the_gpu_bench_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1]))
    from bench import bench_gpu

    torch.compiler.set_stance("force_eager")
    try:
        names = []
        for case in bench_gpu.cases("cpu", [("4 x 300", 4, 300)], 1000, [("N=2 T=3 5x7", 2, 3, 5, 7)]):
            assert list(case.contenders)[-1] == "fasttax"
            assert case.floor_bytes > 0
            for call in case.contenders.values():
                call()
            names.append(case.name)
    finally:
        torch.compiler.set_stance("default")
    assert len(names) == len(set(names)) == 11
    assert "bench.bench_gpu" in sys.modules
