"""EWC and the KL under each launcher, for the matrix.

python -m tests.integrations.launchers OUT.json NAMES...
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from torch import Tensor

from tests.tools import launched

ROUNDING = 2e-6


def tried(name: str, what: str, port: int, wanted: dict[str, Tensor]) -> tuple[str, str]:
    """(what came of it, why): the weights are those of one process."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            (found,) = launched.launch(name, [what], Path(folder), port)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return "failed", str(error).strip().splitlines()[-1]
    if found.refused:
        return "refused", found.refused
    apart = max(float((found.weights[n] - wanted[n]).abs().max()) for n in wanted)
    return ("ok", "") if apart <= ROUNDING else ("failed", f"parameters differ by {apart:.1e}")


def main(arguments: list[str]) -> None:
    """Tries every launcher that is named with both, and writes what came of it."""
    path, names = Path(arguments[0]), arguments[1:]
    with tempfile.TemporaryDirectory() as folder:
        alone = {what: launched.trained(Path(folder), what).weights for what in ("ewc", "kl")}
    out = {
        name: {
            what: tried(name, what, 29650 + 2 * i + j, wanted)
            for j, (what, wanted) in enumerate(alone.items())
        }
        for i, name in enumerate(names)
    }
    path.write_text(json.dumps(out))


if __name__ == "__main__":
    main(sys.argv[1:])
