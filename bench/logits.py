"""Kinds of logits to measure on: a real model's, before and after training, and synthetic ones.

`python -m bench.logits` makes the real ones and keeps them in fasttax's cache folder: SmolLM2-135M
and itself after 5 and 12 steps of the demo's fine-tuning, on text that it has not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROWS, REAL_VOCABULARY = 512, 49152
STEPS = (5, 12)
BASE = "base"

Pair = tuple[Tensor, Tensor]


def _normal(n: int, v: int, scale: float) -> Tensor:
    return scale * torch.randn(n, v)


def _moved(by: float) -> Callable[[int, int], Pair]:
    def pair(n: int, v: int) -> Pair:
        y = _normal(n, v, 3.0)
        return y + by * torch.randn(n, v), y

    return pair


def _confident(n: int, v: int) -> Pair:
    """Two tokens of a row 14 and 20 above the rest, anywhere in it: near all of the mass."""
    y = _normal(n, v, 1.0)
    places = torch.rand(n, v).topk(2).indices
    y.scatter_(1, places, torch.tensor([20.0, 14.0]).expand(n, 2))
    return y + 0.1 * torch.randn(n, v), y


def _far(n: int, v: int) -> Pair:
    return _normal(n, v, 3.0), _normal(n, v, 3.0)


def _equal(n: int, v: int) -> Pair:
    y = _normal(n, v, 3.0)
    return y.clone(), y


# policy and reference, float32, by name
SYNTHETIC: dict[str, Callable[[int, int], Pair]] = {
    "equal": _equal,
    "moved .01": _moved(0.01),
    "moved .1": _moved(0.1),
    "moved .3": _moved(0.3),
    "confident": _confident,
    "far": _far,
}
REAL = {f"SmolLM2 after {steps} steps": steps for steps in STEPS}
TRAINED = next(iter(REAL))  # what the first steps of a training look like
KINDS = (*REAL, *SYNTHETIC)


def kept_kinds() -> tuple[str, ...]:
    """The kinds that are to be had here: real ones, of ROWS rows at most, where they are kept."""
    real = REAL if _file().exists() else {}
    return (*real, *SYNTHETIC)


def pair(kind: str, n: int, v: int, dtype: torch.dtype) -> Pair:
    """Policy and reference logits (n, v) of a kind, the same ones on every call.

    Real ones are SmolLM2's, of whose vocabulary of 49152 a larger v takes several rows side by
    side.
    """
    if kind in SYNTHETIC:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            x, y = SYNTHETIC[kind](n, v)
        return x.to(dtype), y.to(dtype)
    rows = _real()
    x, y = (_shaped(rows[name], n, v).to(dtype) for name in (_name(REAL[kind]), BASE))
    return x, y


def _name(steps: int) -> str:
    return f"after_{steps}"


def _shaped(rows: Tensor, n: int, v: int) -> Tensor:
    wanted, side_by_side = n * v, -(-v // REAL_VOCABULARY)
    if n * side_by_side > ROWS:
        raise ValueError(f"{n} rows of {v} logits: only {ROWS} x {REAL_VOCABULARY} are kept")
    return rows[: n * side_by_side].reshape(n, -1)[:, :v].contiguous().reshape(wanted).view(n, v)


def _file() -> Path:
    from fasttax.demo.settings import cache_folder

    return cache_folder() / "bench" / "smollm2-logits-1.safetensors"


@cache
def _real() -> dict[str, Tensor]:
    file = _file()
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(_made(), file)
    return load_file(file)


def _made() -> dict[str, Tensor]:
    """Half of the rows are general text, half answers that the training teaches, all held out."""
    from fasttax.demo import models, texts, training
    from fasttax.demo.methods import Recipe
    from fasttax.demo.settings import REAL as PRESET
    from fasttax.demo.settings import SMOLLM2, Settings

    torch.manual_seed(0)
    settings = Settings(**vars(PRESET))
    device, general = torch.device("cpu"), texts.general_text()
    loaded = models.load(settings, device, general["fisher"])
    assert loaded.name == SMOLLM2
    reference, codec = models.copy_of(loaded.model), loaded.codec
    rows = texts.read_alignment(settings.alignment)
    answers = {s: [p.good for p in texts.pairs(rows[s], codec, settings.length)[0]] for s in rows}
    read = texts.passages(general["test"], codec, settings.length, 8, settings.seed)
    batches = [texts.collate(items, codec.pad_id, device) for items in (read, answers["test"][:16])]
    out = {BASE: _logits(reference, batches)}
    taught = training.training_batches(
        answers["train"], settings.steps, settings.batch_size, settings.seed, codec, device
    )
    for steps in STEPS:
        training.train(
            loaded.model,
            reference,
            {},
            taught[:steps],
            [],
            Recipe(),
            settings.lr,
            f"{steps} steps",
        )
        out[_name(steps)] = _logits(loaded.model.eval(), batches)
    return out


@torch.no_grad()
def _logits(model: torch.nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    from fasttax.demo.training import forward

    halves = []
    for batch in batches:
        live = batch["attention_mask"] != 0
        halves.append(forward(model, batch)[live][: ROWS // 2])
    found = torch.cat(halves).float().contiguous()
    assert found.shape == (ROWS, REAL_VOCABULARY), found.shape
    return found


if __name__ == "__main__":
    _real()
    print(_file())
