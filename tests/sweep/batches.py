"""Inputs for a tiny model, by the arguments of its forward, as single examples and as one batch."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from tests.sweep.configs import FRAMES, IMAGE, MELS
from tests.sweep.exceptions import NOT_PADDED
from tests.sweep.images import with_images
from tests.sweep.models import CLASSES, encodes
from tests.sweep.result import Case

EXAMPLES, TOKENS, TARGETS = 3, 7, 5
VOCABULARY = ("causal", "masked", "image-text", "seq2seq", "speech")  # families that predict ids
SAMPLES = 1300  # of a waveform: four frames of 400 samples every 320


def batch(case: Case, model: Any) -> dict[str, Tensor]:
    """What a collator gives: the second example is shorter and padded on the right."""
    g = torch.Generator().manual_seed(1)
    takes = inspect.signature(model.forward).parameters
    found: dict[str, Tensor] = {}
    main = getattr(model, "main_input_name", "input_ids")
    if case.family == "image-text":
        found |= with_images(model, EXAMPLES, g) or {}
    if found:
        pass
    elif main == "input_ids" or (case.family == "image-text" and "input_ids" in takes):
        found |= _text(takes, g, padded=not case.name.startswith(NOT_PADDED))
    elif main == "input_features":
        mels = getattr(model.config, "feature_projection_input_dim", MELS)
        shape: tuple[int, ...] = (
            (EXAMPLES, MELS, FRAMES) if _mels_first(model) else (EXAMPLES, FRAMES, mels)
        )
        found["input_features"] = torch.randn(shape, generator=g, dtype=torch.float64)
    elif main == "input_values":
        shape = _spectrogram(model) or (EXAMPLES, SAMPLES)
        found["input_values"] = torch.randn(shape, generator=g, dtype=torch.float64)
    elif main in ("pixel_values", "pixel_values_videos"):
        found[main] = torch.randn(_pixels(case, model), generator=g, dtype=torch.float64)
    else:
        raise NotImplementedError(f"no rule for the input {main}")
    return found | labels(case, model, found, g)


def labels(case: Case, model: nn.Module, found: dict[str, Tensor], g: Any) -> dict[str, Tensor]:
    """(B, T) next tokens or (B,) classes, as the family's trainers pass them."""
    if encodes(model.config) and case.family in VOCABULARY:
        targets = torch.randint(3, 60, (EXAMPLES, TARGETS), generator=g)
        targets[2, 3:] = -100
        return {"labels": targets}
    if case.family in ("image", "audio", "sequence"):
        if encodes(model.config):  # whose classifier reads the hidden state of the last </s>
            found["input_ids"][:, 3] = 2
        return {"labels": torch.randint(0, CLASSES, (EXAMPLES,), generator=g)}
    if case.family == "token" and "input_ids" in found:
        targets = torch.randint(0, CLASSES, (EXAMPLES, TOKENS), generator=g)
        return {"labels": targets.masked_fill(found["attention_mask"] == 0, -100)}
    if case.family in VOCABULARY and "input_ids" in found:
        return {"labels": found["input_ids"].masked_fill(found["attention_mask"] == 0, -100)}
    return {}


def _text(takes: Any, g: torch.Generator, padded: bool) -> dict[str, Tensor]:
    ids = torch.randint(3, 60, (EXAMPLES, TOKENS), generator=g)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, -2:] = 0
    found = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    if "bbox" in takes:
        corner = torch.randint(0, 30, (EXAMPLES, TOKENS, 2), generator=g)
        found["bbox"] = torch.cat((corner, corner + 5), -1)
    return found


def _mels_first(model: Any) -> bool:
    """Whisper's family takes (B, mels, time); the others (B, time, mels)."""
    return any(
        isinstance(m, nn.Conv1d) and m.in_channels == MELS and "conv1" in name
        for name, m in model.named_modules()
    )


def _spectrogram(model: Any) -> tuple[int, ...] | None:
    """AST's (B, time, mels); None for a waveform."""
    config = model.config
    if hasattr(config, "max_length") and hasattr(config, "frequency_stride"):
        return EXAMPLES, config.max_length, config.num_mel_bins
    return None


def _pixels(case: Case, model: Any) -> tuple[int, ...]:
    config = getattr(model.config, "vision_config", model.config)
    channels = getattr(config, "num_channels", 3)
    size = getattr(config, "image_size", IMAGE)
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", None)
    if case.family == "other" and frames is not None:
        return EXAMPLES, frames, channels, height, width
    return EXAMPLES, channels, height, width


def example(whole: dict[str, Any], n: int) -> dict[str, Any]:
    """Example n of a batch as a batch of its own: its rows, or its share of the patches."""
    found = {}
    for name, value in whole.items():
        rows = value.shape[0] // EXAMPLES
        found[name] = value[n * rows : (n + 1) * rows]
    return found


def collated(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The batch again."""
    return {name: torch.cat([part[name] for part in examples]) for name in examples[0]}
