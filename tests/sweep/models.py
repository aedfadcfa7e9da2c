"""The classes of transformers that the sweep visits, and how a tiny one of each is built."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from tests.sweep.configs import tiny
from tests.sweep.exceptions import DEFAULT_DOUBLE, NOT_A_MODEL
from tests.sweep.result import FAMILIES, Case

CLASSES = 3  # of a classifier


def cases() -> list[Case]:
    """Every class once, in the order of the mappings."""
    found: dict[str, Case] = {}
    for family, mappings in FAMILIES.items():
        for mapping in mappings:
            names = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES")
            for entry in names.values():
                for name in [entry] if isinstance(entry, str) else entry:
                    found.setdefault(name, Case(name, family))
    return [case for name, case in found.items() if name not in NOT_A_MODEL]


def encodes(config: Any) -> bool:
    """Whether labels are the decoder's, not to be shifted, as those of translation are."""
    return bool(getattr(config, "is_encoder_decoder", False))


def build(case: Case) -> nn.Module:
    """In float64 and eval mode, no weight equal to its neighbour, those that start at 0 too."""
    cls: Any = getattr(transformers, case.name)
    config = tiny(cls.config_class)
    if case.family in ("image", "audio", "sequence", "token"):
        config.num_labels = CLASSES
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0
    if encodes(config) and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 1
    if case.name.startswith(DEFAULT_DOUBLE):
        torch.set_default_dtype(torch.float64)  # of this child process
    torch.manual_seed(0)
    model: Any = cls(config).double().eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped_mm has no float64
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            # statistics stay frozen
            module.train = lambda mode=True, module=module: module  # type: ignore[method-assign,misc]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    found: nn.Module = model
    return found
