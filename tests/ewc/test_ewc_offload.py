"""offload="cpu": the file-backed path of CPU-only machines is the one that GPUs stream through;
what it keeps in memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttax import EWC, AdamWEWC
from fasttax._base import files, mapped
from fasttax.ewc import store
from tests.tools.models import TokenModel


def pair(storage: str = "fp32") -> tuple[Any, EWC, EWC]:
    """A model moved from its anchor, held from memory and from a file."""
    model = TokenModel()
    fisher = {n: torch.rand(p.shape) for n, p in model.named_parameters()}
    ewcs = [
        EWC(
            model,
            fisher,
            strength=2.0,
            storage=storage,
            anchor_dtype="bf16+8" if storage == "u8log" else None,
            offload=o,
        )
        for o in (None, "cpu")
    ]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model, ewcs[0], ewcs[1]


def blocks_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "STREAMED", 1)


@pytest.mark.parametrize("storage", ["fp32", "bf16", "u8log"])
def test_same_bits_as_from_memory(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks_of_one(monkeypatch)
    model, near, far = pair(storage)
    assert far.hold.store.file is not None
    torch.testing.assert_close(near.penalty(), far.penalty(), rtol=1e-6, atol=0)
    grads = [torch.autograd.grad(e.penalty() * 3, list(model.parameters())) for e in (near, far)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    results = []
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    for ewc in (near, far):
        model.load_state_dict(start)
        model.zero_grad()
        ewc.add_grad_(2.0)
        ewc.prox_(0.1)
        optimizer = AdamWEWC(model.parameters(), ewc=ewc, lr=1e-2, mode="prox")
        optimizer.step()
        ewc.consolidate(ewc.fisher, decay=0.5)
        results.append(
            [t.detach().clone() for p in model.parameters() for t in (p, p.grad)]
            + list(ewc.anchor.values())
            + [ewc.fisher[n] for n in ewc.fisher]
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_during_backward_is_add_grad_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the pass, with 1/k each of k micro-batches; a parameter that takes no part in a pass is
    not pulled by it.
    """
    blocks_of_one(monkeypatch)
    model, near, far = pair()
    x = torch.arange(3, 12)[None]

    def backward() -> None:
        model(x).logits.square().mean().backward()

    backward()
    backward()
    value = near.add_grad_()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with far.during_backward(scale=0.5) as handle:
        backward()
        backward()
    for got, want in zip((p.grad for p in model.parameters()), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(handle.penalty, value, rtol=1e-5, atol=0)
    model.zero_grad()
    backward()  # removed: nothing is added
    plain = [p.grad.clone() for p in model.parameters()]
    assert any(not torch.equal(a, b / 2) for a, b in zip(plain, expected, strict=True))
    model.zero_grad()
    with near.during_backward():
        model.up.weight.square().sum().backward()
    assert model.down.weight.grad is None
    weight = model.up.weight.detach()
    torch.testing.assert_close(
        model.up.weight.grad,
        2 * weight + 2.0 * near.fisher["up.weight"] * (weight - near.anchor["up.weight"]),
    )


def test_loading_maps_the_file_itself(tmp_path: Path) -> None:
    model, near, _ = pair()
    near.save(tmp_path / "e.safetensors")
    mapped = EWC.load(tmp_path / "e.safetensors", model, offload="cpu")
    assert mapped.hold.store.file is not None
    assert torch.equal(mapped.penalty().detach(), near.penalty().detach())
    assert EWC.load(tmp_path / "e.safetensors", model).hold.store.file is None


def test_no_file_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    _, _, far = pair()
    assert os.listdir(tmp_path) == []
    assert float(far.penalty().detach()) > 0

    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("json.dumps", crash)
    with pytest.raises(KeyboardInterrupt):
        pair()
    assert os.listdir(tmp_path) == []


def test_streamed_files_are_safetensors_with_every_dtype(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {
        "b": torch.randn(3, 5).bfloat16(),
        "a": torch.randn(7),
        "c": torch.arange(9, dtype=torch.uint8),
        "d": torch.randn(2).double(),
        "e": torch.empty(0, 4),
        "h": torch.randn(1).half(),
    }
    mapped.write_streamed(
        tmp_path / "t",
        "EWC",
        {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()},
        {"k": 1},
        tensors.items(),
    )
    read = load_file(tmp_path / "t")
    with mapped.TensorFile(tmp_path / "t") as opened:
        file = mapped.Mapped(opened)
    for name, t in tensors.items():
        assert torch.equal(read[name], t)
        assert torch.equal(file.tensor(name), t)
    assert files.read(tmp_path / "t", "EWC")[1] == {"k": 1}


MEMORY = """
import ctypes, json, sys, torch
import fasttax
from torch import nn
torch.set_num_threads(1)
def rss():
    # glibc keeps 0 to 32 MB of what was freed
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None: trim(0)
    text = open("/proc/self/status").read()
    keys = ("RssAnon", "RssFile", "VmHWM")
    return {k: int(text.split(k + ":")[1].split()[0]) / 1024 for k in keys}
model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(24)))
for p in model.parameters(): p.grad = torch.ones_like(p)
fisher = {n: torch.ones(()).expand(p.shape) for n, p in model.named_parameters()}
before = rss()
ewc = fasttax.EWC(model, fisher, strength=1.0, offload=None if sys.argv[1] == "None" else "cpu")
for _ in range(2): ewc.add_grad_()
after = rss()
print(json.dumps({k: after[k] - before[k] for k in after}))
"""


def test_anchors_need_no_memory() -> None:
    """24 M parameters: 192 MB of Fisher and anchor in memory, and next to nothing (0.2 MB, and 4.5
    MB of code) from a file.
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's /proc")
    grown = {}
    for offload in ("None", "cpu"):
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, offload], capture_output=True, text=True, check=True
        )
        grown[offload] = json.loads(done.stdout.splitlines()[-1])
    assert grown["None"]["RssAnon"] > 180
    assert grown["cpu"]["RssAnon"] < 4
    assert grown["cpu"]["RssFile"] < 16
