"""The block `fasttax` of a framework's YAML: EWC and an exact KL by names and numbers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

from peft import PeftModel
from pydantic import BaseModel, ConfigDict, Field
from transformers import AutoModelForCausalLM

from fasttax._base import checks
from fasttax._base.choices import KlKind
from fasttax.ewc import EWC

EXAMPLE = "fasttax: {ewc: {fisher: fisher.safetensors, strength: 10.0}, kl: {beta: 0.1}}"


class _Strict(BaseModel):
    """A block of the YAML: a key that it does not know is an error, not a wish."""

    model_config = ConfigDict(extra="forbid")


class EWCOptions(_Strict):
    """`fasttax.EWC` around the weights that training starts from."""

    fisher: str = Field(description="a file or folder of `fasttax fisher`")
    strength: float = Field(ge=0)
    storage: Literal["fp32", "bf16", "u8log"] = "fp32"
    where: Literal["pre_clip", "post_clip"] = "pre_clip"


class KLOptions(_Strict):
    """`FullKL` to a reference: a model, a cache of top log-probs, or what training starts from."""

    beta: float = Field(ge=0)
    kind: KlKind = "policy_ref"
    temperature: float | None = None
    jsd_beta: float = 0.5
    estimator: Literal["token", "sequence"] = "token"
    reference_model: str | None = None
    reference_cache: str | None = None


class FasttaxOptions(_Strict):
    """The block `fasttax`."""

    ewc: EWCOptions | None = None
    kl: KLOptions | None = None


def read(op: str, block: Any, leave_out: str) -> FasttaxOptions:
    """A block, checked.

    Args:
        op: who reads it, for errors.
        block: the mapping under `fasttax`, or None.
        leave_out: how to do without it, for the error of an empty one.

    Raises:
        ValueError: no block, an empty one, or one with keys or values that do not fit.
    """
    options = FasttaxOptions.model_validate(_plain(block or {}))
    if options.ewc is None and options.kl is None:
        raise checks.fail(
            op,
            "fasttax",
            "a block with ewc or kl, or both",
            "none",
            f"write {EXAMPLE}, or {leave_out}",
        )
    return options


def arguments(op: str, options: FasttaxOptions, model: Any) -> dict[str, Any]:
    """Those of `attach` for a model at the weights that training starts from.

    Raises:
        ValueError, OSError: as `EWC`; two references at once; a model that can't be loaded.
    """
    found: dict[str, Any] = {}
    if options.ewc is not None:
        given = options.ewc
        found["ewc"] = EWC(model, given.fisher, strength=given.strength, storage=given.storage)
        found["where"] = given.where
    if options.kl is not None:
        found["kl"] = _kl_of(op, options.kl, model)
    return found


def _plain(block: Any) -> Any:
    """Mappings that give None for what they lack, as Axolotl's, as a dict of what is there."""
    if not isinstance(block, Mapping):
        return block
    return {key: _plain(value) for key, value in block.items() if value is not None}


def _kl_of(op: str, options: KLOptions, model: Any) -> dict[str, Any]:
    """The arguments of `attach(kl=)`; without a reference, a frozen copy of the model as it is."""
    given = options.model_dump(exclude={"reference_model", "reference_cache"})
    if options.reference_model is not None and options.reference_cache is not None:
        raise checks.fail(
            op, "kl", "reference_model or reference_cache", "both", "leave out one of the two"
        )
    if options.reference_cache is not None:
        return given | {"ref_model": options.reference_cache}
    if options.reference_model is not None:
        ref = AutoModelForCausalLM.from_pretrained(options.reference_model, dtype=model.dtype)
        return given | {"ref_model": ref}
    if isinstance(model, PeftModel):
        return given | {"ref_model": None}  # the model without its adapter
    return given | {"ref_model": copy.deepcopy(model).eval().requires_grad_(False)}
