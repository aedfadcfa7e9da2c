"""What runs of ops on the machine share, whoever launches: the memory, the launches' reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from tests.gpu.ptx.machine import Memory, Report


class Simulation:
    """Ops on the machine, and what their launches did.

    Attributes:
        memory: what they may touch: tensors are named by `give`.
        reports: of the launches, in their order.
        failed: errors of launches, which go through frames of C.
        seed: of the order of blocks and warps.
    """

    def __init__(self) -> None:
        self.memory = Memory()
        self.reports: list[Report] = []
        self.failed: list[BaseException] = []
        self.seed = 1

    def give(self, *tensors: Tensor | None, readonly: bool = True) -> None:
        """Names what an op is given."""
        for k, t in enumerate(tensors):
            if t is not None:
                self.memory.add(t, f"tensor {k} {tuple(t.shape)}", readonly=readonly)

    def check(self) -> None:
        """Raises for errors and faults of any launch so far."""
        if self.failed:
            raise self.failed[0]
        faults = [str(report) for report in self.reports if report.faults]
        assert not faults, "\n".join(faults)

    def total(self, of: Callable[[Report], int]) -> int:
        return sum(of(report) for report in self.reports)


def of(reports: Sequence[Report], name: str) -> list[Report]:
    """Those of the kernels whose names have `name`."""
    return [report for report in reports if name in report.kernel]
