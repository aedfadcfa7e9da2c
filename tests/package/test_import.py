"""What `import fasttax` brings along, and how long it takes beyond torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from fasttax.cli.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
# which a training may never need; torch brings jinja2, sympy and networkx itself where it wants
HEAVY = (
    "transformers",
    "trl",
    "datasets",
    "pyarrow",
    "pandas",
    "peft",
    "accelerate",
    "lightning",
    "scipy",
    "matplotlib",
    "jinja2",
    "triton",
    "rich",
    "gguf",
    "shtab",
    "huggingface_hub",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "sympy",
    "networkx",
)
LOADED = """
import json, sys
import torch
before = set(sys.modules)
import fasttax
print(json.dumps(sorted(set(sys.modules) - before)))
"""
TIMED = """
import time
begun = time.process_time()
import torch
between = time.process_time()
import fasttax
print(between - begun, time.process_time() - between)
"""
MOST = 0.060  # seconds, where torch takes no more than one: a busy machine is slower for both


def python(code: str, root: Path = ROOT) -> str:
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    environment["PYTHONDONTWRITEBYTECODE"] = ""  # an installed package has its bytecode
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    return done.stdout


def test_nothing_heavy_is_imported() -> None:
    loaded = json.loads(python(LOADED))
    assert "fasttax.kl.token_kl" in loaded
    assert [name for name in loaded if name in HEAVY] == []


def test_no_command_is_slow_to_refuse() -> None:
    """What a command imports before it has looked at what it was given."""
    imported = "\n".join(f"import fasttax.cli.{name}" for name in COMMANDS)
    loaded = json.loads(python(LOADED.replace("import fasttax\n", f"import fasttax\n{imported}\n")))
    assert "fasttax.cli.kl" in loaded
    assert [name for name in loaded if name in HEAVY] == []


def test_it_takes_60_ms_beyond_torch(tmp_path: Path) -> None:
    """Processor time of both in one process, the least of several."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "fasttax", tmp_path / "fasttax", ignore=ignored)
    python("import fasttax", tmp_path)
    taken = []
    for _ in range(5):
        torch_s, ours = map(float, python(TIMED, tmp_path).split())
        taken.append((ours / max(1.0, torch_s), ours, torch_s))
        if min(taken)[0] <= MOST:
            break
    assert min(taken)[0] <= MOST, taken
