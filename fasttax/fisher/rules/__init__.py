"""The rules: which modules' parameters can be squared inside one ordinary backward, and how.

A rule is a Tap in a file of its own; a module's is the first of RULES that fits it. What none fits
runs again on its own, example by example (rules/module.py), and blocks that send tokens to experts
run example by example as a whole (rules/routing.py).
"""

from __future__ import annotations

import torch
from torch import nn

from fasttax.fisher.rules.conv import ConvTap
from fasttax.fisher.rules.elementwise import ElementwiseTap, GatedNormTap
from fasttax.fisher.rules.embedding import EmbeddingTap
from fasttax.fisher.rules.groupnorm import GroupNormTap
from fasttax.fisher.rules.linear import Conv1DTap, LinearTap
from fasttax.fisher.rules.recurrent import RecurrentTap
from fasttax.fisher.tap import Tap

RULES: tuple[type[Tap], ...] = (
    LinearTap,
    EmbeddingTap,
    Conv1DTap,
    ConvTap,
    GroupNormTap,
    RecurrentTap,
    GatedNormTap,
    ElementwiseTap,
)


def rule_of(module: nn.Module) -> type[Tap] | None:
    """The first rule that fits the module; None where its class says nothing, as scripted ones'."""
    if isinstance(module, torch.jit.ScriptModule):
        return None
    return next((rule for rule in RULES if rule.fits(module)), None)
