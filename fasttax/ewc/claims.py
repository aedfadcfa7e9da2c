"""Who applies EWC to which parameters: one holder in a run, or the strength would count twice."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fasttax._base import checks


class Claim:
    """`holder` applies EWC to these parameters at the steps of `optimizer`.

    None is an optimizer that is not known: whatever steps them. A claim lasts until `release`, or
    until who holds it or the optimizer is collected.
    """

    def __init__(self, holder: str, parameters: Mapping[str, Tensor], optimizer: Any) -> None:
        self.holder = holder
        self._held = {id(p) for p in parameters.values()}  # the holder keeps them alive
        self._optimizer = optimizer if optimizer is None else weakref.ref(optimizer)

    def shared(self, parameters: Mapping[str, Tensor], optimizer: Any) -> list[str]:
        """Which of `parameters` would be pulled by it, too, at one step of `optimizer`."""
        known = self._optimizer is not None and optimizer is not None
        if known and self._steps() is not optimizer:
            return []
        return [name for name, p in parameters.items() if id(p) in self._held]

    def _steps(self) -> Any:
        """The optimizer, None where it is gone or not known."""
        return None if self._optimizer is None else self._optimizer()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy holds other parameters, for which it claims them itself."""

    def release(self) -> None:
        """Lets others hold the parameters."""
        _live.discard(self)


_live: weakref.WeakSet[Claim] = weakref.WeakSet()


def claim(
    op: str, argument: str, holder: str, parameters: Mapping[str, Tensor], optimizer: Any = None
) -> Claim:
    """The parameters for `holder`, as errors name it, unless another has them."""
    for other in _live:
        shared = other.shared(parameters, optimizer)
        if shared:
            raise checks.fail(
                op,
                argument,
                "parameters that nothing else applies EWC to in this run",
                f"{len(shared)} that {other.holder} holds, as {shared[0]}",
                "their strength would count twice: take the first one out (.remove() or .undo() on "
                "its handle), or make one EWC of several with EWC.combine",
            )
    own = Claim(holder, parameters, optimizer)
    _live.add(own)
    return own
