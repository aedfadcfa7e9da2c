"""What users do, on this machine's device: every family against float64 on the CPU.

On a GPU (`make test-gpu`) CUDA C++ and Triton serve the ops; without one the same tests run on the
CPU, which shows that they are right, and what only a GPU has is skipped by name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fasttax
from fasttax import EWC, AdamWEWC
from fasttax import functional as F
from tests.tools import linear_cases, optim_tools
from tests.tools.models import causal_lm, fisher_of, ids, worst

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
on_a_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
V = 4099  # a prime: no row of it but the first is aligned to 16 bytes


@pytest.fixture(autouse=True)
def _no_tf32() -> Iterator[None]:
    """Products are compared with float64's."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def off(got: Tensor, truth: Tensor) -> float:
    """The relative error of a norm."""
    assert got.shape == truth.shape
    size = float(truth.detach().double().norm())
    return float((got.detach().cpu().double() - truth.detach().cpu().double()).norm()) / size


def logits(dtype: torch.dtype, tokens: int = 6) -> tuple[Tensor, Tensor]:
    """Near rows, as in training, on the CPU in `dtype`."""
    generator = torch.Generator().manual_seed(1)
    x = 4 * torch.randn(tokens, V, generator=generator)
    y = x + 0.3 * torch.randn(tokens, V, generator=generator)
    return x.to(dtype), y.to(dtype)


# --- the KL ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["policy_ref", "ref_policy", "jsd", "renyi"])
def test_token_kl(kind: str, dtype: torch.dtype, reduction: str) -> None:
    x, y = logits(dtype)
    mask = torch.tensor([True, False, True, True, True, True])
    found, grads = [], []
    for device, width in ((DEVICE, dtype), (torch.device("cpu"), torch.float64)):
        p, q = (t.to(device, width).requires_grad_() for t in (x, y))
        options: dict[str, Any] = {"kind": kind, "beta": 0.3, "mask": mask.to(device)}
        kl = fasttax.token_kl(p, q, reduction=reduction, **options)
        grads.append(torch.autograd.grad((kl * 0.7).sum(), [p, q]))
        found.append(kl)
    assert off(found[0], found[1]) < 1e-4
    bound = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    for mine, truth in zip(*grads, strict=True):
        assert mine.dtype == dtype
        assert off(mine, truth) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_stats(dtype: torch.dtype) -> None:
    x, y = logits(dtype)
    labels = torch.arange(6) * 611
    found, grads = [], []
    for device, width in ((DEVICE, dtype), (torch.device("cpu"), torch.float64)):
        p, q = (t.to(device, width).requires_grad_() for t in (x, y))
        outputs = ("kl_policy_ref", "entropy", "logp")
        stats = fasttax.token_stats(p, q, ids=labels.to(device), outputs=outputs)
        found.append([getattr(stats, name) for name in outputs])
        total = torch.stack([v.sum() for v in found[-1]]).sum()
        grads.append(torch.autograd.grad(total, [p, q]))
    for mine, truth in zip(*found, strict=True):
        assert off(mine, truth) < 1e-4
    for mine, truth in zip(*grads, strict=True):
        assert off(mine, truth) < (1e-2 if dtype == torch.bfloat16 else 1e-4)


def linear_on_device(
    t: dict[str, Tensor], options: dict[str, Any]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """linear_token_kl there, and its gradients by all that it takes."""
    here = {n: v.detach().to(DEVICE).requires_grad_() for n, v in t.items()}
    kl = fasttax.linear_token_kl(
        *(here[n] for n in ("hidden", "weight", "ref_hidden", "ref_weight")),
        bias=here["bias"],
        ref_bias=here["ref_bias"],
        **options,
    )
    weights = linear_cases.upstream().to(DEVICE, torch.float32)
    mine = torch.autograd.grad((kl * weights).sum(), list(here.values()))
    return kl, mine


@pytest.mark.parametrize("option", list(linear_cases.OPTIONS))
def test_linear_token_kl(option: str) -> None:
    t = linear_cases.tensors()
    options = linear_cases.OPTIONS[option]
    truth, gradients = linear_cases.materialised(t, torch.float64, **options)
    kl, mine = linear_on_device(t, options)
    assert off(kl, truth) < 1e-4
    for a, b in zip(mine, gradients, strict=True):
        assert off(a, b) < 1e-4


@pytest.mark.parametrize("option", list(linear_cases.OPTIONS))
def test_linear_token_kl_of_bfloat16(option: str) -> None:
    """Whose products are of bfloat16: at most twice as far off as whole logits of it are."""
    t = linear_cases.tensors(torch.bfloat16)
    options = linear_cases.OPTIONS[option]
    truth, gradients = linear_cases.materialised(t, torch.float64, **options)
    own, own_gradients = linear_cases.materialised(t, torch.bfloat16, **options)
    kl, mine = linear_on_device(t, options)
    assert off(kl, truth) <= 2 * off(own, truth)
    for a, b, eager in zip(mine, gradients, own_gradients, strict=True):
        assert off(a, b) <= 2 * off(eager, b)


def test_linear_token_logprobs() -> None:
    t = {n: v.detach() for n, v in linear_cases.tensors().items()}
    labels = torch.arange(linear_cases.N) % linear_cases.V
    here = [t[n].to(DEVICE).requires_grad_() for n in ("hidden", "weight")]
    got = fasttax.linear_token_logprobs(here[0], here[1], labels.to(DEVICE))
    logp = got.logp
    assert logp is not None
    wide = [t[n].double().requires_grad_() for n in ("hidden", "weight")]
    truth = (wide[0] @ wide[1].T).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    assert off(logp, truth) < 1e-5
    pairs = zip(
        torch.autograd.grad(logp.sum(), here), torch.autograd.grad(truth.sum(), wide), strict=True
    )
    for mine, expected in pairs:
        assert off(mine, expected) < 1e-4


def test_compiled() -> None:
    x, y = (t.to(DEVICE) for t in logits(torch.float32))

    def loss(p: Tensor, q: Tensor) -> Tensor:
        return fasttax.token_kl(p, q, reduction="mean") * 0.5

    eager, compiled = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss(eager, y).backward()
    torch.compile(loss, fullgraph=True)(compiled, y).backward()
    assert eager.grad is not None
    assert compiled.grad is not None
    torch.testing.assert_close(compiled.grad, eager.grad)


# --- EWC ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "prox_adam"},
        {"fisher": "second_moment", "fisher_scale": 4.0},
        {"amsgrad": True, "maximize": True},
        {"every": 2, "weight_decay": 0.1},
    ],
    ids=lambda o: "-".join(map(str, o)) or "grad",
)
@pytest.mark.parametrize("storage", ["fp32", "bf16", "u8log"])
def test_adamw_ewc(options: dict[str, Any], storage: str) -> None:
    torch.manual_seed(3)
    here = optim_tools.Sizes()
    there = copy.deepcopy(here)
    fisher = here.fisher()
    optimizers = []
    for model, device in ((here, DEVICE), (there, torch.device("cpu"))):
        model.to(device)
        ewc = EWC(
            model, {n: f.to(device) for n, f in fisher.items()}, strength=0.5, storage=storage
        )
        optimizers.append(AdamWEWC(model.parameters(), ewc=ewc, lr=1e-2, **options))
    for step in range(4):
        for model, optimizer in zip((here, there), optimizers, strict=True):
            optim_tools.set_gradients(model, step)
            optimizer.step()
    here.cpu()
    assert optim_tools.distance(here, there) < 2e-5
    assert float(optimizers[0].penalty) == pytest.approx(float(optimizers[1].penalty), rel=1e-3)


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_ewc(offload: str | None) -> None:
    model = causal_lm("llama")
    fisher = {n: torch.rand(p.shape) for n, p in model.named_parameters()}
    anchors = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.to(DEVICE)
    ewc = EWC(model, fisher, strength=3.0, offload=offload)
    assert float(ewc.penalty().detach()) == 0.0
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    scale = torch.tensor(2.0, device=DEVICE)
    value = ewc.add_grad_(scale)
    total = 0.0
    for n, p in model.named_parameters():
        d = p.detach().cpu().double() - anchors[n].double()
        total += float((1.5 * fisher[n].double() * d * d).sum())
        assert p.grad is not None
        assert off(p.grad, 6 * fisher[n].double() * d) < 1e-5
    assert float(value) == pytest.approx(total, rel=1e-5)
    ewc.prox_(0.1)
    assert float(ewc.penalty().detach()) < float(value)


def test_lora_penalty() -> None:
    torch.manual_seed(4)
    a, b, fisher = torch.randn(5, 70), torch.randn(33, 5), torch.rand(33, 70)
    here = [t.to(DEVICE).requires_grad_() for t in (a, b)]
    value = F.lora_ewc_penalty(here[0], here[1], fisher.to(DEVICE), 0.5, 3.0)
    wide = [t.double().requires_grad_() for t in (a, b)]
    truth = 1.5 * (fisher.double() * (0.5 * wide[1] @ wide[0]) ** 2).sum()
    assert off(value, truth) < 1e-5
    pairs = zip(torch.autograd.grad(value, here), torch.autograd.grad(truth, wide), strict=True)
    for mine, expected in pairs:
        assert off(mine, expected) < 1e-5


# --- the Fisher -----------------------------------------------------------------------------------


def squares(name: str, x: Tensor, d: Tensor, tokens: Tensor) -> Tensor:
    if name == "linear":
        return F.linear_sqgrad(x, d)
    if name == "bias":
        return F.bias_sqgrad(d)
    if name == "norm":
        return F.norm_sqgrad(d, d)
    return F.embedding_sqgrad(tokens, d, 50)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["linear", "bias", "norm", "embedding"])
def test_squares(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    x, d = torch.randn(3, 37, 65).to(dtype), torch.randn(3, 37, 130).to(dtype)
    tokens = torch.randint(0, 50, (3, 37))
    mine = squares(name, x.to(DEVICE), d.to(DEVICE), tokens.to(DEVICE))
    truth = squares(name, x.double(), d.double(), tokens)
    assert off(mine, truth) < (2e-2 if dtype == torch.bfloat16 and name == "linear" else 1e-5)


def test_head_fisher() -> None:
    torch.manual_seed(6)
    hidden, weight = torch.randn(40, 16), torch.randn(700, 16)
    mine = F.lm_head_fisher(hidden.to(DEVICE), weight.to(DEVICE))
    assert off(mine, F.lm_head_fisher(hidden.double(), weight.double())) < 1e-5


@pytest.mark.parametrize("labels", ["true", "exact_head"])
@pytest.mark.parametrize("kind", ["llama_tied", "gpt2"])
def test_diagonal_fisher(kind: str, labels: str) -> None:
    model, x = causal_lm(kind), ids(3, 11)
    options: dict[str, Any] = {"labels": labels}
    if labels == "exact_head":
        options["generator"] = torch.Generator().manual_seed(1)  # the same labels on both
    truth = dict(fisher_of(copy.deepcopy(model).double(), x, **options))
    if labels == "exact_head":
        options["generator"] = torch.Generator().manual_seed(1)
    got = {n: t.cpu() for n, t in fisher_of(model.to(DEVICE), x.to(DEVICE), **options).items()}
    if labels == "true":
        assert worst(got, truth)[0] < 1e-4
    assert {*got} == {*truth}
    assert all(bool(t.isfinite().all()) for t in got.values())


# --- what only a GPU has --------------------------------------------------------------------------


@on_a_gpu
def test_a_training_step_in_a_graph() -> None:
    """Forward, backward, EWC and AdamWEWC are captured: no sync, and no memory but the graph's."""
    torch.manual_seed(7)
    head = nn.Linear(64, V, device=DEVICE)
    twin = copy.deepcopy(head)
    hidden, ref = torch.randn(8, 64, device=DEVICE), torch.randn(8, V, device=DEVICE)

    def step_of(model: nn.Module) -> Callable[[], None]:
        fisher = {n: torch.ones_like(p) for n, p in model.named_parameters()}
        ewc = EWC(model, fisher, strength=0.1)
        lr = torch.tensor(1e-3, device=DEVICE)
        optimizer = AdamWEWC(model.parameters(), ewc=ewc, lr=lr)

        def step() -> None:
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.zero_()
            fasttax.token_kl(model(hidden), ref, reduction="mean").backward()
            optimizer.step()

        return step

    eager, captured = step_of(head), step_of(twin)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            captured()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured()
    for _ in range(4):
        graph.replay()
    for _ in range(7):
        eager()
    torch.cuda.synchronize()
    for p, q in zip(head.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@on_a_gpu
def test_beyond_2_to_the_31_entries() -> None:
    rows, words = 16_600, 131_072  # 2.18e9 entries of bfloat16: 4.4 GB each
    free, _ = torch.cuda.mem_get_info()
    if free < 16e9:
        pytest.skip(f"needs 16 GB of free memory, there are {free / 1e9:.0f}")
    x = torch.zeros(rows, words, dtype=torch.bfloat16, device=DEVICE)
    y = torch.zeros_like(x)
    x[-1, -1] = 8.0
    x.requires_grad_()
    kl = fasttax.token_kl(x, y)
    kl[-1].backward()
    one = x.detach()[-1:].double().cpu().requires_grad_()
    truth = fasttax.token_kl(one, y[-1:].double().cpu())
    (expected,) = torch.autograd.grad(truth.sum(), one)
    assert float(kl[:-1].abs().max()) == 0.0
    assert off(kl[-1:], truth) < 1e-4
    assert x.grad is not None
    assert off(x.grad[-1:], expected) < 1e-2
    assert not bool(x.grad[:-1].any())


@on_a_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_device_than_the_current_one() -> None:
    there = torch.device("cuda", 1)
    x, y = (t.to(there).requires_grad_() for t in logits(torch.bfloat16))
    with torch.cuda.device(0):
        kl = fasttax.token_kl(x, y, reduction="mean")
        kl.backward()
        assert torch.cuda.current_device() == 0
    model = nn.Linear(30, 20, device=there)
    ewc = EWC(model, {"weight": torch.ones(20, 30)}, strength=1.0)
    with torch.no_grad():
        model.weight += 1
    assert float(ewc.add_grad_()) == pytest.approx(300, rel=1e-5)
    assert kl.device == there


@on_a_gpu
def test_on_a_side_stream() -> None:
    """Work of another stream would read the logits before they are doubled."""
    x, y = (t.to(DEVICE) for t in logits(torch.float32))
    truth = fasttax.token_kl(2 * x, y)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        x.mul_(2)
        kl = fasttax.token_kl(x, y)
    stream.synchronize()
    torch.testing.assert_close(kl, truth)
