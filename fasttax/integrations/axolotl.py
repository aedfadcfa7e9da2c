"""fasttax in Axolotl: EWC and an exact KL from the YAML, in every trainer that it makes.

    plugins:
      - fasttax.integrations.axolotl.FasttaxPlugin
    fasttax:
      ewc: {fisher: fisher.safetensors, strength: 10.0}
      kl: {beta: 0.1}

`fasttax fisher` writes the Fisher of the base model. Written against axolotl 0.19.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

from fasttax._base import checks
from fasttax.ewc import EWC
from fasttax.integrations.transformers import attach

try:
    from axolotl.integrations.base import BasePlugin
    from peft import PeftModel
    from pydantic import BaseModel, ConfigDict, Field
    from transformers import AutoModelForCausalLM
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"fasttax.integrations.axolotl: {error.name} is not installed; run `pip install axolotl`",
        name=error.name,
    ) from error

OP = "FasttaxPlugin"
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
    kind: Literal["policy_ref", "ref_policy", "jsd"] = "policy_ref"
    temperature: float | None = None
    jsd_beta: float = 0.5
    estimator: Literal["token", "sequence"] = "token"
    reference_model: str | None = None
    reference_cache: str | None = None


class FasttaxOptions(_Strict):
    """The block `fasttax`."""

    ewc: EWCOptions | None = None
    kl: KLOptions | None = None


class FasttaxArgs(BaseModel):
    """What the plugin adds to Axolotl's configuration."""

    fasttax: FasttaxOptions | None = None


class FasttaxPlugin(BasePlugin):  # type: ignore[misc, unused-ignore]
    """Attaches what the block `fasttax` asks for to the trainer that Axolotl has made."""

    def get_input_args(self) -> str:
        """Where Axolotl finds the block's fields."""
        return f"{__name__}.{FasttaxArgs.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Puts EWC and KL into the trainer.

        Raises:
            ValueError: no block, or an empty one; as `EWC` and `attach`.
        """
        options = FasttaxOptions.model_validate(_plain(cfg.get("fasttax") or {}))
        if options.ewc is None and options.kl is None:
            raise checks.fail(
                OP,
                "fasttax",
                "a block with ewc or kl, or both",
                "none",
                f"write {EXAMPLE}, or take the plugin out of `plugins`",
            )
        ewc, where = None, "pre_clip"
        if options.ewc is not None:
            asked, where = options.ewc, options.ewc.where
            ewc = EWC(trainer.model, asked.fisher, strength=asked.strength, storage=asked.storage)
        kl = None if options.kl is None else _kl_of(options.kl, trainer.model)
        attach(trainer, ewc=ewc, kl=kl, where=where)


def _plain(block: Any) -> Any:
    """Axolotl's mappings, which give None for what they lack, as a dict of what is there."""
    if not isinstance(block, Mapping):
        return block
    return {key: _plain(value) for key, value in block.items() if value is not None}


def _kl_of(options: KLOptions, model: Any) -> dict[str, Any]:
    """The arguments of `attach(kl=)`; without a reference, a frozen copy of the model as it is."""
    given = options.model_dump(exclude={"reference_model", "reference_cache"})
    if options.reference_model is not None and options.reference_cache is not None:
        raise checks.fail(
            OP, "kl", "reference_model or reference_cache", "both", "leave out one of the two"
        )
    if options.reference_cache is not None:
        return given | {"ref_model": options.reference_cache}
    if options.reference_model is not None:
        ref = AutoModelForCausalLM.from_pretrained(options.reference_model, dtype=model.dtype)
        return given | {"ref_model": ref}
    if isinstance(model, PeftModel):
        return given | {"ref_model": None}  # the model without its adapter
    return given | {"ref_model": copy.deepcopy(model).eval().requires_grad_(False)}
