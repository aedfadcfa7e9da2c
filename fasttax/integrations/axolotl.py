"""fasttax in Axolotl: EWC and an exact KL from the YAML, in every trainer that it makes.

    plugins:
      - fasttax.integrations.axolotl.FasttaxPlugin
    fasttax:
      ewc: {fisher: fisher.safetensors, strength: 10.0}
      kl: {beta: 0.1}

`fasttax fisher` writes the Fisher of the base model. Written against axolotl 0.19.
"""

from __future__ import annotations

from typing import Any

from fasttax.integrations.transformers import attach

try:
    from axolotl.integrations.base import BasePlugin
    from pydantic import BaseModel

    from fasttax.integrations._options import FasttaxOptions, arguments, read
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"fasttax.integrations.axolotl: {error.name} is not installed; run `pip install axolotl`",
        name=error.name,
    ) from error

OP = "FasttaxPlugin"


class FasttaxArgs(BaseModel):
    """What the plugin adds to Axolotl's configuration.

    Example:
        >>> from fasttax.integrations.axolotl import FasttaxArgs
        >>> FasttaxArgs(fasttax={"kl": {"beta": 0.1}}).fasttax.kl.beta
        0.1
    """

    fasttax: FasttaxOptions | None = None


class FasttaxPlugin(BasePlugin):  # type: ignore[misc, unused-ignore]
    """Attaches what the block `fasttax` asks for to the trainer that Axolotl has made.

    Example:
        >>> from fasttax.integrations.axolotl import FasttaxPlugin
        >>> FasttaxPlugin().post_trainer_create({"fasttax": {"kl": {"beta": 0.1}}}, trainer)
        >>> result = trainer.train()
    """

    def get_input_args(self) -> str:
        """Where Axolotl finds the block's fields."""
        return f"{__name__}.{FasttaxArgs.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Puts EWC and KL into the trainer.

        Raises:
            ValueError: no block, or an empty one; as `EWC` and `attach`.
        """
        options = read(OP, cfg.get("fasttax"), "take the plugin out of `plugins`")
        attach(trainer, **arguments(OP, options, trainer.model))
