"""docs/machine-code.md within its budgets: the committed table, the kernels that compile in seconds
as they are, and in `make test-ptx` all of them. tests/gpu/test_cuda_kl.py compiles those of the KL.
"""

from __future__ import annotations

import pytest

from tests.gpu import machine_code
from tests.gpu.machine_code import COLUMNS, TABLE, by_family, faults, row
from tests.gpu.ptx import cuda, sass
from tests.gpu.ptx.text import parse

QUICK = ("ewc", "adamw", "fisher", "weigh")


def rows() -> list[dict[str, str]]:
    """Of the table of kernels."""
    text = TABLE.read_text().split("## Bandwidth")[0]
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line] for line in lines[2:]]
    return [dict(zip(COLUMNS, line, strict=True)) for line in cells]


def test_the_table_is_within_its_budgets() -> None:
    found = rows()
    assert len(found) >= 25
    assert not [fault for cells in found for fault in faults(cells)]


def test_every_kernel_is_in_the_table() -> None:
    kernels = {
        machine_code.family(name) for text in cuda.modules("90") for name in parse(text).entries
    }
    assert {cells["kernel"] for cells in rows()} == kernels, "run `make machine-code`"


def test_what_is_predicted_says_so() -> None:
    prediction = TABLE.read_text().split("## Bandwidth")[1]
    assert "as a prediction" in prediction
    assert "**Predicted, not measured**" in prediction
    for card in machine_code.CARDS:
        assert card in prediction


@pytest.mark.parametrize(
    ("column", "cell"),
    [
        ("spilled", "8"),
        ("stack", "16"),
        ("registers", "64 / 129 / 64 / 64"),
        ("KB under way", "31"),
    ],
)
def test_what_is_over_budget_is_seen(column: str, cell: str) -> None:
    cells = next(one for one in rows() if one["kernel"].startswith("kl_forward_kernel"))
    assert not faults(cells)
    assert len(faults({**cells, column: cell})) == 1


def test_the_code_is_within_its_budgets() -> None:
    found = machine_code.codes(["90"], QUICK)
    for name, of_arch in by_family(found).items():
        cells = dict(zip(COLUMNS, row(name, of_arch), strict=True))
        assert not faults(cells), cells


@pytest.mark.full
def test_the_table_is_the_codes() -> None:
    before = TABLE.read_text()
    machine_code.main()
    assert TABLE.read_text() == before, "docs/machine-code.md was not of this code"


def test_occupancy_and_what_is_under_way() -> None:
    """By hand: 128 registers leave two blocks of 256 threads; four loads of 16 bytes are under way
    before the first is used.
    """
    loads = ["LDG.E.128"] * 4
    code = sass.Code("k", 128, 0, 0, 0, 256, [["MOV", *loads, "FADD", "LDG.E.EF.128"], ["LDG.E"]])
    assert (code.blocks("90"), code.occupancy("90"), code.at_once()) == (2, 0.25, 64)
    assert code.in_flight("90") == 2 * 256 * 64
    assert code.widths(sass.LOADS) == {16: 5, 4: 1}
    small = code._replace(registers=32)
    assert (small.blocks("90"), small.blocks("120")) == (8, 6)
    assert code._replace(registers=32, shared=100 << 10).blocks("90") == 2
