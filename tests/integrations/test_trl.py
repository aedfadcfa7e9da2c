"""`patch` against TRL's own ops: each op against float64, every trainer with and without it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from fasttax.integrations import _trl_chunks, _trl_divergence, _trl_logprob
from fasttax.integrations.trl import FusedGKDMixin, patch
from tests.tools import tiny_lm, trl_runs
from tests.tools.utils import assert_within

N, H, V = 37, 16, 67  # odd sizes: no multiple of a vector or a chunk
ROUNDING = 2e-7  # parameters, in two steps of SGD: a rounding of a value below 2


# --- the ops --------------------------------------------------------------------------------------

CASES: list[dict[str, Any]] = [
    {},
    {"bias": True},
    {"softcap": 5.0, "scale": 0.5, "temperature": 1.7},
    {"dtype": torch.bfloat16},
    {"autocast": True},
    {"autocast": True, "bias": True},
    {"chunks": True},
]


def tensors(bias: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    hidden = torch.randn(N, H).to(dtype).requires_grad_()
    weight = (2 * torch.randn(V, H)).to(dtype).requires_grad_()
    return hidden, weight, torch.randn(V).to(dtype).requires_grad_() if bias else None


def gradients(
    values: list[Tensor], leaves: list[Tensor | None], weights: list[Tensor]
) -> list[Tensor]:
    total = sum((v * w.to(v)).sum() for v, w in zip(values, weights, strict=True))
    assert isinstance(total, Tensor)
    return list(torch.autograd.grad(total, [x for x in leaves if x is not None]))


def wide(*leaves: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.detach().double().requires_grad_() for x in leaves]


def log_softmax(leaves: list[Tensor | None], case: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Log-probs and logits of hidden states, head and bias, tempered as the case says."""
    hidden, weight, bias = leaves
    assert hidden is not None
    assert weight is not None
    z = hidden @ weight.T + (0 if bias is None else bias)
    z = z * case.get("scale", 1.0)
    z = z if case.get("softcap") is None else case["softcap"] * torch.tanh(z / case["softcap"])
    z = z / case.get("temperature", 1.0)
    return z.log_softmax(-1), z


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)) or "plain")
def test_logprob_is_trls(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from trl.kernels import ChunkedLogProbFunction

    if case.get("chunks"):
        monkeypatch.setattr(_trl_chunks, "CHUNK_BYTES", {"cpu": 1})
        monkeypatch.setattr(_trl_chunks, "MIN_ROWS", 8)
    leaves = tensors(bool(case.get("bias")), case.get("dtype", torch.float32))
    targets = torch.randint(V, (N,))
    weights = [torch.randn(N), torch.randn(N)]
    # tokens that the loss leaves out
    weights = [w.masked_fill(torch.arange(N) % 3 == 0, 0.0) for w in weights]
    names = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    scalars = (case.get("temperature", 1.0), case.get("softcap"), case.get("scale", 1.0))
    with torch.autocast("cpu", torch.bfloat16, enabled=bool(case.get("autocast"))):
        theirs = ChunkedLogProbFunction.apply(*leaves, targets, scalars[0], 32, *scalars[1:], names)
        ours = _trl_logprob.LogProb.apply(*leaves, targets, *scalars, names)
    exact = wide(*leaves)
    logp, z = log_softmax(exact, case)
    truth = [
        logp.gather(-1, targets[:, None])[:, 0],
        -(logp.exp() * logp).sum(-1),
        (2 * logp).logsumexp(-1),
        z.mean(-1),
    ]
    for name, a, b, t in zip(("logp", *names), ours, theirs, truth, strict=False):
        assert a.dtype == b.dtype == torch.float32
        assert_within(a, b, t.detach(), name=name)
    assert torch.equal(ours[4], theirs[4])
    got, own, true = (
        gradients([r[0], r[1]], list(x), weights)
        for r, x in ((ours, leaves), (theirs, leaves), (truth, exact))
    )
    for name, a, b, t in zip(("hidden", "weight", "bias"), got, own, true, strict=False):
        assert a.dtype == b.dtype
        assert_within(a, b, t, name=f"gradient of {name}")
    assert _trl_logprob.LogProb.apply(*leaves, targets, *scalars, ())[1:] == (None,) * 4


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)) or "plain")
def test_divergence_is_trls(
    case: dict[str, Any], beta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    if case.get("chunks"):
        monkeypatch.setattr(_trl_chunks, "CHUNK_BYTES", {"cpu": 1})
        monkeypatch.setattr(_trl_chunks, "MIN_ROWS", 8)
    student, teacher = (
        tensors(bool(case.get("bias")), case.get("dtype", torch.float32)) for _ in range(2)
    )
    weights = [torch.randn(N).masked_fill(torch.arange(N) % 3 == 0, 0.0)]
    extra = (
        beta,
        case.get("temperature", 1.0),
        case.get("scale", 1.0),
        case.get("softcap"),
        1.25,
        None,
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=bool(case.get("autocast"))):
        theirs = ChunkedDivergenceFunction.apply(*student, *teacher, *extra)
        ours = _trl_divergence.Divergence.apply(*student, *teacher, *extra)
    exact = wide(*student)
    s = log_softmax(exact, case)[0]
    t = log_softmax(wide(*teacher), {"scale": 1.25, "temperature": extra[1]})[0].detach()
    if beta == 0:
        truth = (t.exp() * (t - s)).sum(-1)
    elif beta == 1:
        truth = (s.exp() * (s - t)).sum(-1)
    else:
        m = torch.log((1 - beta) * s.exp() + beta * t.exp())
        truth = (beta * t.exp() * (t - m) + (1 - beta) * s.exp() * (s - m)).sum(-1)
    assert_within(ours[0], theirs[0], truth.detach(), name="divergence")
    assert_within(ours[1], theirs[1], -(s.exp() * s).sum(-1).detach(), name="entropy")
    assert not ours[1].requires_grad
    got, own, true = (
        gradients([v], list(x), weights)
        for v, x in ((ours[0], student), (theirs[0], student), (truth, exact))
    )
    for name, a, b, g in zip(("hidden", "weight", "bias"), got, own, true, strict=False):
        assert a.dtype == b.dtype
        assert_within(a, b, g, name=f"gradient of {name}")


@pytest.mark.parametrize(
    "case",
    [{}, {"autocast": True}, {"items": 50}, {"masked": True}, {"no_grad": True}],
    ids=lambda c: "-".join(c) or "plain",
)
def test_divergence_loss_is_trls(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose gradients are made in the forward, with a factor from above that it does not know."""
    from trl.trainer import distillation_trainer

    monkeypatch.setattr(_trl_chunks, "CHUNK_BYTES", {"cpu": 1})
    monkeypatch.setattr(_trl_chunks, "MIN_ROWS", 8)
    student, teacher = tensors(True, torch.float32), tensors(True, torch.float32)
    mask = torch.zeros(1, N) if case.get("masked") else (torch.rand(1, N) < 0.6).float()
    results = []
    for replaced in (False, True):
        with (
            patch("distillation", quiet=True) if replaced else contextlib.nullcontext(),
            torch.set_grad_enabled(not case.get("no_grad")),
        ):
            with torch.autocast("cpu", torch.bfloat16, enabled=bool(case.get("autocast"))):
                loss, entropy, count = distillation_trainer._chunked_divergence_loss(
                    student[0][None],
                    teacher[0][None],
                    student[1],
                    teacher[1],
                    mask,
                    0.3,
                    num_items_in_batch=case.get("items"),
                    student_lm_head_bias=student[2],
                    teacher_lm_head_bias=teacher[2],
                    student_logit_scale=0.5,
                    temperature=1.7,
                )
            slopes = (
                []
                if case.get("no_grad")
                else torch.autograd.grad(
                    3.7 * loss, [x for x in student if x is not None], retain_graph=True
                )
            )
            again = (
                []
                if case.get("no_grad")
                else torch.autograd.grad(3.7 * loss, [x for x in student if x is not None])
            )
        assert all(torch.equal(a, b) for a, b in zip(slopes, again, strict=True))
        results.append((loss, entropy, count, slopes))
    (loss, entropy, count, slopes), (own, own_entropy, own_count, own_slopes) = results
    assert count == own_count
    assert not own_entropy.requires_grad
    assert torch.allclose(own, loss, rtol=1e-6, atol=0)
    assert torch.allclose(own_entropy, entropy, rtol=1e-6, atol=0)
    for a, b in zip(own_slopes, slopes, strict=True):
        # under bf16 the two round a gradient before and after the factor 3.7
        assert torch.allclose(
            a, b, rtol=0, atol=float(b.abs().max()) * (2**-7 if case.get("autocast") else 2e-6)
        )


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none", "items"])
@pytest.mark.parametrize("beta", [0, 0.5, 1])
def test_generalized_jsd_loss_is_gkds(beta: float, reduction: str) -> None:
    from trl.experimental.gkd import GKDTrainer

    student, teacher = torch.randn(2, 9, V, requires_grad=True), torch.randn(2, 9, V)
    labels = torch.randint(V, (2, 8)).masked_fill(torch.rand(2, 8) < 0.3, -100)
    options: dict[str, Any] = {"beta": beta, "temperature": 1.3}
    options |= (
        {"num_items_in_batch": torch.tensor(23)}
        if reduction == "items"
        else {"reduction": reduction}
    )
    for given in (labels, None):
        theirs, ours = (
            f(student[:, :-1], teacher[:, :-1], given, **options)
            for f in (GKDTrainer.generalized_jsd_loss, FusedGKDMixin.generalized_jsd_loss)
        )
        their_slope, slope = (torch.autograd.grad(v.sum(), student)[0] for v in (theirs, ours))
        assert torch.allclose(theirs, ours, rtol=2e-6, atol=1e-8)
        assert torch.allclose(their_slope, slope, rtol=2e-5, atol=1e-8)


def test_mixin_wants_a_trainer_of_its_kind() -> None:
    from trl.experimental.gkd import GKDTrainer

    for bases in ((FusedGKDMixin, nn.Module), (GKDTrainer, FusedGKDMixin)):
        with pytest.raises(
            TypeError, match=r"FusedGKDMixin: bases: expected \(FusedGKDMixin, GKDTrainer\)"
        ):
            type("Wrong", bases, {})


# --- the trainers ---------------------------------------------------------------------------------

RUNS: list[tuple[str, dict[str, Any]]] = [
    ("sft", {}),
    ("sft", {"bf16": True}),
    ("sft", {"lora": True}),
    ("sft", {"gradient_checkpointing": True}),
    ("dpo", {}),
    ("dpo", {"lora": True}),
    ("dpo", {"use_weighting": True}),
    ("kto", {}),
    ("grpo", {"beta": 0.1}),
    ("grpo", {"lora": True, "beta": 0.1}),
    ("rloo", {"beta": 0.1}),
    ("distillation", {"beta": 0.0}),
    ("distillation", {}),
    ("distillation", {"beta": 1.0, "bf16": True}),
    ("gkd", {}),
    ("gkd", {"beta": 0.0, "bf16": True}),
    ("gold", {"beta": 1.0}),
    ("orpo", {}),
    ("cpo", {}),
    ("cpo", {"loss_type": "simpo", "cpo_alpha": 0.0}),
    ("online_dpo", {}),
]
DIVERGENCES = {
    "kto": "kl",
    "grpo": "kl",
    "rloo": "kl",
    "online_dpo": "objective/kl",
    "distillation": "loss",
    "gkd": "loss",
    "gold": "loss",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trl")


@pytest.fixture(scope="module")
def saved(folder: Path) -> str:
    """GRPO and RLOO load their own reference, by path."""
    return tiny_lm.save(folder / "model")


def trained(
    name: str, folder: Path, saved: str, changes: dict[str, Any], base: type | None = None
) -> Any:
    changes = dict(changes)
    if changes.get("beta") and name in ("grpo", "rloo"):
        changes["max_steps"] = 3  # the first has KL 0: policy and reference are still one
        if not changes.get("lora"):
            changes["model"] = saved
    trainer = trl_runs.make(name, folder, base=base, **changes)
    transformers.set_seed(5)
    trainer.train()
    return trainer


def log(trainer: Any) -> list[dict[str, float]]:
    """Without what a clock says."""
    clock = ("runtime", "per_second", "time", "flos")
    return [
        {k: v for k, v in entry.items() if not any(c in k for c in clock)}
        for entry in trainer.state.log_history
    ]


def assert_same_run(ours: Any, theirs: Any, bf16: bool = False) -> None:
    """The same weights and metrics up to rounding.

    In bf16 the logits are equal to the bit; a gradient that falls on the other side of a rounding
    differs by 2^-8 of itself.
    """
    difference = max(
        float((a - b).detach().abs().max())
        for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True)
    )
    assert difference <= (2e-5 if bf16 else ROUNDING)
    assert len(log(ours)) == len(log(theirs)) >= 3
    for a, b in zip(log(ours), log(theirs), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=2**-12 if bf16 else 2e-5, abs=2e-6), key


@pytest.mark.parametrize(
    ("name", "changes"), RUNS, ids=[f"{n}{'-' if c else ''}{'-'.join(c)}" for n, c in RUNS]
)
def test_a_patched_run_is_the_unpatched_one(
    name: str, changes: dict[str, Any], folder: Path, saved: str
) -> None:
    theirs = trained(name, folder, saved, changes)
    with patch(name, quiet=True) as handle:
        ours = trained(name, folder, saved, changes)
    # fasttax's op ran; Distillation's per-token one only where the loss around it does not know the
    # tokens' weights
    assert set(handle.calls) == {
        n for n in handle.patched if not n.endswith("ChunkedDivergenceFunction")
    }
    assert min(handle.calls.values()) >= 2 * trl_runs.COMMON["gradient_accumulation_steps"]
    if name in DIVERGENCES:
        assert max(entry.get(DIVERGENCES[name], 0.0) for entry in log(ours)) > 1e-6
    assert_same_run(ours, theirs, bool(changes.get("bf16")))


def test_clipping_is_active(folder: Path, saved: str) -> None:
    """The runs above rely on it: the gradient is longer than max_grad_norm, the model moves."""
    trainer = trained("sft", folder, saved, {})
    assert (
        min(entry["grad_norm"] for entry in log(trainer) if "grad_norm" in entry)
        > trl_runs.COMMON["max_grad_norm"]
    )
    moved = max(
        float((a - b).detach().abs().max())
        for a, b in zip(trainer.model.parameters(), tiny_lm.model().parameters(), strict=True)
    )
    assert moved > 1e3 * ROUNDING


@pytest.mark.parametrize("name", ["gkd", "gold"])
def test_mixin_run_is_the_plain_one(
    name: str, folder: Path, saved: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    op = _trl_divergence.jsd_loss

    def counted(*args: Any) -> Tensor:
        calls.append(1)
        return op(*args)

    monkeypatch.setattr("fasttax.integrations.trl.jsd_loss", counted)
    fused = type("Fused", (FusedGKDMixin, trl_runs.classes(name)[0]), {})
    assert_same_run(trained(name, folder, saved, {}, base=fused), trained(name, folder, saved, {}))
    assert len(calls) == 4
