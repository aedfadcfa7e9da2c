"""`fasttax doctor --warm`: every Triton kernel compiled for the device.

In the dtypes and shapes that training calls it with, so that no first step waits for it. Triton
keeps what it compiles on disk (TRITON_CACHE_DIR, else ~/.triton/cache).

A kernel is compiled by a call on little data: a row of a vocabulary, a layer of 64. What a kernel
is compiled anew for is the dtype, the kind, a softcap, whether 16 divides the vocabulary, and which
gradients are wanted; not the number of tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttax._base.packed import SPLIT, encode, encode_anchor
from fasttax.kl.call import KINDS, tempering
from fasttax.reference.weigh import K3
from fasttax.triton import implementation

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
VOCABULARIES = (151936, 50257)  # Qwen's, which 16 divides, and GPT-2's, which 2 does not
LAYER, PARAMETERS = 64, 4096

Call = Callable[[], Any]


class Warmed(NamedTuple):
    """What one call compiled, and the seconds that it took."""

    what: str
    seconds: float


def warm(
    device: torch.device,
    say: Callable[[Warmed], None],
    vocabularies: Sequence[int] = VOCABULARIES,
) -> list[Warmed]:
    """Compiles all, one after the other, and tells `say` of each."""
    done = []
    for what, call in _calls(device, vocabularies):
        begun = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        done.append(Warmed(what, time.perf_counter() - begun))
        say(done[-1])
    return done


def _calls(device: torch.device, vocabularies: Sequence[int]) -> Iterator[tuple[str, Call]]:
    for v in vocabularies:
        for dtype in DTYPES:
            x, y = (torch.randn(1, v, device=device).to(dtype) for _ in range(2))
            name = f"{v} {str(dtype).removeprefix('torch.')}"
            yield from _kl(x, y, name)
            yield from _stats(x, y, name)
    yield from _weigh(device)
    for dtype in DTYPES:
        yield from _fisher(device, dtype)
    yield from _ewc(device)


def _kl(x: Tensor, y: Tensor, name: str) -> Iterator[tuple[str, Call]]:
    one = torch.ones(1, device=x.device)
    variants: dict[str, dict[str, Any]] = {kind: {"kind": kind} for kind in KINDS}
    variants["renyi"]["beta"] = 2.0
    variants["policy_ref under a softcap"] = {"softcap": 30.0, "ref_softcap": 30.0}
    for variant, options in variants.items():
        args = tempering("doctor", **options).args()

        def call(args: Any = args) -> None:
            _, saved = implementation("token_kl")(x, y, None, *args)
            backward = implementation("token_kl_backward")
            backward(one, x, y, None, saved, *args, True, False)
            backward(one, x, y, None, saved, *args, True, True)
            implementation("token_kl_grad")(one, x, y, None, *args, True, False)

        yield f"token_kl {variant} {name}", call


def _stats(x: Tensor, y: Tensor, name: str) -> Iterator[tuple[str, Call]]:
    ids = torch.zeros(1, dtype=torch.int64, device=x.device)
    sides = tempering("doctor").sides()
    for variant, ref in (("of both rows", y), ("of the policy", None)):

        def call(ref: Tensor | None = ref) -> None:
            values, saved = implementation("token_stats")(x, ref, ids, None, *sides)
            back = (torch.ones_like(values), x, ref, ids, None, saved, *sides, True)
            implementation("token_stats_backward")(*back, False)
            if ref is not None:
                implementation("token_stats_backward")(*back, True)

        yield f"token_stats {variant} {name}", call


def _weigh(device: torch.device) -> Iterator[tuple[str, Call]]:
    values = [torch.rand(6, 32, device=device)]
    mask = torch.ones(32, dtype=torch.bool, device=device)
    weight = torch.ones(32, device=device)

    def call() -> None:
        for reduction in range(3):
            implementation("token_weights")(weight, mask, weight, reduction, 1.0)
            given = (values, (0, K3), (0, 1), mask, weight, reduction, 1.0, 20.0, False)
            results = implementation("weigh_tokens")(*given)
            grads = [torch.ones_like(of) for of in results]
            implementation("weigh_tokens_backward")(grads, (0, 1), *given)
        for dtype in DTYPES:
            held = torch.ones(32, LAYER, device=device, dtype=dtype)
            implementation("scale_held_")(held, torch.full((), 0.5, device=device))

    yield "weights of tokens and of held gradients", call


def _fisher(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    def call() -> None:
        out = torch.zeros(LAYER, LAYER, device=device)
        # examples of several tokens, and of one each
        for cu in (torch.tensor([0, 24, 32]), torch.arange(33)):
            cu = cu.to(device)
            a, d = (torch.randn(32, LAYER, device=device).to(dtype) for _ in range(2))
            weight = torch.ones(len(cu) - 1, device=device)
            implementation("linear_sqgrad_")(out, a, d, cu, weight)
            implementation("bias_sqgrad_")(out[0], d, cu, weight)
            implementation("norm_sqgrad_")(out[0], a, d, cu, weight)
            ids = torch.zeros(32, dtype=torch.int64, device=device)
            implementation("embedding_sqgrad_")(out, ids, d, cu, weight, -1)
        implementation("label_variance_")(d.clone())
        implementation("accumulate_sqgrad_")([out], [torch.ones_like(out, dtype=dtype)], 1.0)

    yield f"the Fisher's sums {str(dtype).removeprefix('torch.')}", call


# parameter, anchor and Fisher as EWC's storage names them
_MIXES = {
    "float32": (torch.float32, torch.float32, "fp32"),
    "float32, packed": (torch.float32, SPLIT, "u8log"),
    "bfloat16": (torch.bfloat16, torch.bfloat16, "bf16"),
}


def _ewc(device: torch.device) -> Iterator[tuple[str, Call]]:
    for name, (dtype, anchored, storage) in _MIXES.items():

        def call(
            dtype: torch.dtype = dtype, anchored: Any = anchored, stored: str = storage
        ) -> None:
            theta, grad, m, v = (torch.rand(PARAMETERS, device=device).to(dtype) for _ in range(4))
            fisher = encode(torch.rand(PARAMETERS, device=device), stored)
            scales = [] if fisher.scales is None else [fisher.scales]
            anchor = encode_anchor(torch.rand(PARAMETERS, device=device), anchored)
            held = ([anchor], [fisher.values], scales)
            implementation("ewc_penalty")([theta], *held, 1.0)
            upstream = torch.ones((), device=device)
            implementation("ewc_penalty_backward")(upstream, [theta], *held, 1.0)
            implementation("ewc_add_grad_")([theta], [grad], *held, 1.0, 1.0, None)
            implementation("ewc_prox_")([theta], *held, 0.1, None)
            rate = torch.full((), 1e-3, dtype=torch.float64, device=device)
            steps = [torch.zeros((), device=device)]
            given: tuple[Any, ...] = ([theta], [grad], [m], [v], [], steps, *held)
            for prox in (False, True):
                implementation("ewc_adamw_")(
                    *given, prox, 1.0, 0.0, rate, 0.9, 0.999, 1e-8, 0.0, False, None, None
                )

        yield f"EWC and AdamW {name}", call

    def lora() -> None:
        a, b = torch.rand(16, LAYER, device=device), torch.rand(LAYER, 16, device=device)
        fisher = torch.rand(LAYER, LAYER, device=device)
        for gradient in (True, False):
            implementation("lora_ewc_penalty")(
                a, b, fisher, torch.empty(0, device=device), 1.0, 1.0, gradient
            )

    yield "EWC of LoRA's factors", lora
