"""What squaring a batch's gradient, or each token's, gives in place of an example's.

On the demo's tiny model and its general text: the relative distance of estimates from the Fisher of
whole examples (the mean over many draws of sampled labels), split into bias and noise, by unit.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import fasttax
from fasttax.demo import models, settings, texts


@dataclass(frozen=True)
class Error:
    """Of estimates E against a Fisher F, relative to the norm of F.

    `bias` is that of the mean over draws, with what the draws' number leaves of noise taken out,
    `spread` the root of the mean square of an estimate's distance from that mean.
    """

    bias: float
    spread: float
    trace: float  # of the mean over F's


class Texts:
    """The model and its passages.

    Args:
        examples: passages.
    """

    def __init__(self, examples: int) -> None:
        asked = settings.parse(["--tiny"])
        general = texts.general_text()["fisher"]
        loaded = models.load(asked, torch.device("cpu"), general)
        items = texts.passages(general, loaded.codec, asked.length, examples, asked.seed)
        self.model = loaded.model
        found = texts.collate(items, loaded.codec.pad_id, torch.device("cpu"))
        self.inputs = {k: found[k] for k in ("input_ids", "attention_mask")}
        # the mean over tokens, of which an example has so many, is a sum over an example's
        self.tokens = asked.length - 1

    def fisher(self, unit: str, labels: str, seed: int, batch: int = 8) -> Tensor:
        """An estimate of an example's Fisher, flat, in float64."""
        parts = {k: v.split(batch) for k, v in self.inputs.items()}
        estimate = fasttax.estimate_fisher(
            self.model,
            [dict(zip(parts, rows, strict=True)) for rows in zip(*parts.values(), strict=True)],
            unit=unit,
            labels=labels,
            progress=False,
            generator=torch.Generator().manual_seed(seed),
        )
        flat = torch.cat([value.double().flatten() for value in estimate.values()])
        return flat * self.tokens if unit == "token" else flat


def error(draws: Sequence[Tensor], truth: Tensor, truth_noise: float) -> Error:
    """Of draws against a truth whose own squared noise is known."""
    found = torch.stack(list(draws))
    mean = found.mean(0)
    noise = float((found - mean).square().sum(1).mean()) * len(found) / max(len(found) - 1, 1)
    apart = float((mean - truth).square().sum()) - noise / len(found) - truth_noise
    scale = float(truth.norm())
    spread = noise**0.5 / scale
    return Error(max(apart, 0.0) ** 0.5 / scale, spread, float(mean.sum() / truth.sum()))


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table behind docs/exact.md's sentence."""
    parser = argparse.ArgumentParser(prog="python -m bench.bench_units", description=__doc__)
    parser.add_argument("--draws", type=int, default=12)
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 4, 8])
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    data = Texts(args.examples)
    # the truth has draws of its own
    own = torch.stack([data.fisher("example", "sample", 1000 + k) for k in range(args.draws)])
    truth = own.mean(0)
    noise = float((own - truth).square().sum(1).sum()) / (args.draws - 1) / args.draws
    print("| unit | labels | bias | spread | trace |")
    print("|---|---|---:|---:|---:|")
    cases = [("example", 8), *(("batch", size) for size in args.batches), ("token", 8)]
    for unit, size in cases:
        draws = [data.fisher(unit, "sample", k, size) for k in range(args.draws)]
        e = error(draws, truth, noise)
        name = f"batch of {size}" if unit == "batch" else unit
        print(f"| {name} | sampled | {e.bias:.2f} | {e.spread:.2f} | {e.trace:.2f} |", flush=True)
    true = data.fisher("example", "true", 0)
    e = error([data.fisher("token", "true", 0)], true, 0.0)
    print(f"| token, of true labels' examples | true | {e.bias:.2f} | | {e.trace:.2f} |")
    e = error([true], truth, noise)
    print(f"| example, of sampled labels' | true | {e.bias:.2f} | | {e.trace:.2f} |")


if __name__ == "__main__":
    main()
