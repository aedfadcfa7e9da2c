"""Images for a model of images and text: the layout that its forward takes, found by trying."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tests.sweep.configs import IMAGE

TOKENS = (4, 1, 16, 5, 17, 2, 3, 8, 9, 12, 20, 6, 64, 32)  # that an image may become
GRID = 4  # patches on a side, of models that take patches in place of images
TEXT = 6  # tokens beside the images'
# what the models' own code raises at a layout that is not theirs
REFUSALS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError)


def with_images(model: Any, examples: int, g: torch.Generator) -> dict[str, Tensor] | None:
    """One image an example, on which the logits depend; None where no layout that is known fits."""
    takes = inspect.signature(model.forward).parameters
    config = model.config
    names = ("image_token_id", "image_token_index")
    token = next((v for n in names if isinstance(v := getattr(config, n, None), int)), None)
    if token is None or "pixel_values" not in takes:
        return None
    for pixels in _layouts(config, takes, examples, g):
        for count in TOKENS:
            found = {**_text(token, count, examples, g, "mm_token_type_ids" in takes), **pixels}
            if _looks(model, found):
                return found
    return None


def _layouts(
    config: Any, takes: Any, examples: int, g: torch.Generator
) -> Iterator[dict[str, Tensor]]:
    vision = getattr(config, "vision_config", config)
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", 3)
    if "image_grid_thw" in takes:
        patch, frames = getattr(vision, "patch_size", 8), getattr(vision, "temporal_patch_size", 1)
        grid = torch.tensor([[1, GRID, GRID]] * examples)
        for width in (channels * frames * patch * patch, channels * patch * patch):
            pixels = torch.randn(examples * GRID * GRID, width, generator=g, dtype=torch.float64)
            yield {"pixel_values": pixels, "image_grid_thw": grid}
        return
    size = getattr(vision, "image_size", IMAGE)
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    extra: dict[str, Tensor] = {}
    if "image_sizes" in takes:
        extra["image_sizes"] = torch.tensor([[height, width]] * examples)
    for shape in ((), (1,), (2,)):
        pixels = torch.randn(
            examples, *shape, channels, height, width, generator=g, dtype=torch.float64
        )
        yield {"pixel_values": pixels, **extra}


def _text(token: int, count: int, examples: int, g: Any, types: bool) -> dict[str, Tensor]:
    ids = torch.randint(3, 60, (examples, count + TEXT), generator=g)
    ids[:, 1 : 1 + count] = token
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**found, "mm_token_type_ids": (ids == token).long()} if types else found


def _looks(model: Any, batch: dict[str, Tensor]) -> bool:
    pixels = batch["pixel_values"].clone().requires_grad_()
    try:
        logits = model(**{**batch, "pixel_values": pixels}).logits
        (seen,) = torch.autograd.grad(logits.square().sum(), pixels, allow_unused=True)
    except (*REFUSALS, ValueError):  # another layout than this model's
        return False
    return seen is not None and bool(seen.flatten(1).any(1).all())
