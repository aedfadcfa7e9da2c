"""KLs in the shapes of verl's and OpenRLHF's batches, and verl's top-k loss with its tail.

Where verl is not installed its modules are stand-ins with the same names and signatures; its own
function is written out here as it is specified: sum over the teacher's k of p (log p - log q).
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fasttax
from fasttax.integrations import verl
from fasttax.integrations.rlhf import response_kl, response_linear_kl, response_topk_kl

B, P, R, V, H, K = 3, 5, 4, 40, 16, 6  # rows, prompt, response, vocabulary, hidden, top
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0]])  # 0: padding, tool output


def logits(seed: int, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(B, P + R, V, generator=generator)


def exact(policy: Tensor, ref: Tensor, kind: str = "policy_ref") -> Tensor:
    """(B, R) in float64, of the rows that predict the last R tokens."""
    p, q = (x.double()[:, P - 1 : -1].log_softmax(-1) for x in (policy, ref))
    a, b = (p, q) if kind == "policy_ref" else (q, p)
    return (a.exp() * (a - b)).sum(-1) * MASK


# --- the whole vocabulary -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["policy_ref", "ref_policy"])
@pytest.mark.parametrize("mask", [MASK, MASK.bool(), MASK.float()])
def test_is_the_kl_of_the_responses(kind: Any, mask: Tensor) -> None:
    """Values and gradients are those of a log-softmax in float64; prompts have none."""
    policy, ref = logits(0).requires_grad_(), logits(1)
    kl = response_kl(policy, ref, mask, kind=kind)
    wanted = exact(policy, ref, kind)
    assert kl.shape == (B, R)
    assert torch.allclose(kl.double(), wanted, rtol=1e-5, atol=1e-6)
    (found,) = torch.autograd.grad(kl.sum(), policy)
    (own,) = torch.autograd.grad(wanted.sum(), policy)
    assert torch.allclose(found, own, atol=1e-6)
    assert not found[:, : P - 1].any()
    assert not found[:, -1].any()
    assert float(found.abs().max()) > 0.05


def test_a_row_of_the_mask_is_never_read() -> None:
    policy, ref = logits(0), logits(1)
    clean = response_kl(policy, ref, MASK)
    policy[1, P + 1 :], ref[1, P + 1 :] = float("nan"), float("inf")
    assert torch.equal(response_kl(policy, ref, MASK), clean)


def test_options_are_those_of_the_ops() -> None:
    """Temperatures, the mixture's share and the order, of whole logits, hidden states and top k."""
    policy, ref = logits(0), logits(1)
    x, y = (z[:, P - 1 : -1] for z in (policy, ref))
    options: list[dict[str, Any]] = [
        {"kind": "jsd", "jsd_beta": 0.2, "temperature": 2.0, "ref_temperature": 0.5},
        {"kind": "renyi", "jsd_beta": 0.7},
    ]
    for given in options:
        own = {("beta" if name == "jsd_beta" else name): value for name, value in given.items()}
        wanted = fasttax.token_kl(x, y, mask=MASK.bool(), **own)
        assert torch.equal(response_kl(policy, ref, MASK, **given), wanted)
        heads = torch.eye(V)
        found = response_linear_kl(policy, heads, ref, heads, MASK, **given)
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-6)
    logp, ids = fasttax.topk_logprobs(ref, K)
    given = {"kind": "jsd", "jsd_beta": 0.2, "temperature": 2.0}
    found = response_topk_kl(policy, logp, ids, MASK, **given)
    top = (z[:, P - 1 : -1] for z in (logp, ids))
    wanted = fasttax.topk_kl(x, *top, kind="jsd", beta=0.2, temperature=2.0, mask=MASK.bool())
    assert torch.equal(found, wanted)


def test_rows_of_the_responses_alone() -> None:
    policy, ref = logits(0), logits(1)
    mine, own = (x[:, P - 1 : -1] for x in (policy, ref))
    assert torch.equal(response_kl(mine, own, MASK), response_kl(policy, ref, MASK))


def test_from_hidden_states() -> None:
    """No logits are made; heads of other widths, and the head's gradient."""
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(B, P + R, H, generator=generator)
    head = torch.randn(V, H, generator=generator).requires_grad_()
    ref_hidden = torch.randn(B, P + R, 2 * H, generator=generator)
    ref_head = torch.randn(V, 2 * H, generator=generator)
    kl = response_linear_kl(hidden, head, ref_hidden, ref_head, MASK, temperature=2.0)
    wanted = exact(hidden @ head.T / 2, ref_hidden @ ref_head.T / 2)
    assert torch.allclose(kl.double(), wanted, rtol=1e-4, atol=1e-5)
    found, own = (torch.autograd.grad(x.sum(), head)[0] for x in (kl, wanted))
    assert torch.allclose(found, own, atol=1e-4)


def test_openrlhfs_actor_has_these_shapes() -> None:
    """Its log-probs of actions are log_probs[:, :-1][:, -action_mask.shape[1]:]: the same rows."""
    output, ids = logits(0), torch.randint(V, (B, P + R))
    rolled = torch.roll(ids, -1, 1)
    logp = output.log_softmax(-1).gather(-1, rolled.unsqueeze(-1)).squeeze(-1)
    actions = logp[:, :-1][:, -R:]
    rows = output[:, P - 1 : -1].log_softmax(-1)
    assert torch.equal(actions, rows.gather(-1, ids[:, P:].unsqueeze(-1)).squeeze(-1))


# --- the top k ------------------------------------------------------------------------------------


def plain(policy: Tensor, logp: Tensor, ids: Tensor) -> Tensor:
    """verl's sum over the teacher's k tokens, before its clamp."""
    top = policy.float().log_softmax(-1).gather(-1, ids)
    return (logp.exp() * (logp - top)).sum(-1)


def test_the_tail_needs_no_clamp() -> None:
    """A student that is surer than its teacher: the plain sum is below 0, the KL is not."""
    ref = logits(1, 0.5)
    policy = (3 * ref).requires_grad_()
    logp, ids = fasttax.topk_logprobs(ref, K)
    below = plain(policy, logp, ids)[:, P - 1 : -1] < 0
    assert below.float().mean() > 0.9
    kl = response_topk_kl(policy, logp, ids, MASK)
    full = exact(policy, ref, "ref_policy")
    counted = MASK.bool()
    assert bool((kl[counted] > 0).all())
    assert bool((kl[counted] <= full[counted] * (1 + 1e-5)).all())
    (gradient,) = torch.autograd.grad(kl.sum(), policy)
    assert bool(gradient[:, P - 1 : -1][counted].abs().amax(-1).gt(1e-3).all())


def test_all_of_the_vocabulary_is_the_full_kl() -> None:
    policy, ref = logits(0), logits(1)
    kl = response_topk_kl(policy, *fasttax.topk_logprobs(ref, V), MASK)
    assert torch.allclose(kl, response_kl(policy, ref, MASK, kind="ref_policy"), atol=1e-5)


# --- in verl --------------------------------------------------------------------------------------


def compute_forward_kl_topk(
    student_logits: Tensor,
    teacher_topk_log_probs: Tensor,
    teacher_topk_ids: Tensor,
    config: Any,
    data_format: str,
) -> dict[str, Tensor]:
    """verl 0.9's function as it is specified, in plain PyTorch."""
    logp, ids = (t.values().unsqueeze(0) for t in (teacher_topk_log_probs, teacher_topk_ids))
    student = student_logits.log_softmax(-1)
    top = student.gather(-1, ids)
    least = config.distillation_loss.log_prob_min_clamp
    clamped, ref = top.clamp_min(least), logp.clamp_min(least)
    each = ref.exp() * (ref - clamped)
    both = (ids[..., None] == student.topk(ids.shape[-1], -1).indices[..., None, :]).any(-1)
    count = both.sum(-1)
    mean = (-each * both).sum(-1) / count.clamp_min(1)
    return {
        "distillation_losses": each.sum(-1),
        "student_mass": top.exp().sum(-1),
        "teacher_mass": logp.exp().sum(-1),
        "overlap_count": count,
        "overlap_token_advantage": torch.where(count > 0, mean, 0.0),
    }


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> Any:
    """verl's module of losses, or a stand-in of its name."""
    if importlib.util.find_spec("verl") is not None:
        return importlib.import_module(verl.MODULE)
    for name in ("verl", "verl.utils", "verl.trainer", "verl.trainer.distillation"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "verl.trainer.distillation.fsdp", ModuleType("fsdp"))
    made: Any = ModuleType(verl.MODULE)
    made.compute_forward_kl_topk = compute_forward_kl_topk
    monkeypatch.setitem(sys.modules, verl.MODULE, made)
    ulysses: Any = ModuleType("verl.utils.ulysses")
    ulysses.get_ulysses_sequence_parallel_world_size = lambda: 1
    monkeypatch.setitem(sys.modules, "verl.utils.ulysses", ulysses)
    return made


CONFIG = SimpleNamespace(distillation_loss=SimpleNamespace(log_prob_min_clamp=-10.0, topk=K))


def packed(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Two sequences without padding: student's rows (1, tokens, V), the teacher's nested lists."""
    lengths = (7, 4)
    student, ref = logits(seed).reshape(-1, V)[:11], logits(seed + 1).reshape(-1, V)[:11]
    top = fasttax.topk_logprobs(ref, K)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    logp, ids = (torch.nested.nested_tensor_from_jagged(t, offsets) for t in top)
    return student.unsqueeze(0), logp, ids


def test_patched_verl_has_the_tail_and_its_own_metrics(losses: Any) -> None:
    student, logp, ids = packed()
    student.requires_grad_()
    own = losses.compute_forward_kl_topk(student, logp, ids, CONFIG, "thd")
    with verl.patch(quiet=True):
        ours = losses.compute_forward_kl_topk(student, logp, ids, CONFIG, data_format="thd")
    assert losses.compute_forward_kl_topk(student, logp, ids, CONFIG, "thd").keys() == ours.keys()
    wanted = fasttax.topk_kl(student[0], logp.values(), ids.values(), tail="ghost")
    assert torch.equal(ours["distillation_losses"], wanted.unsqueeze(0))
    for name in own.keys() - {"distillation_losses"}:
        assert torch.allclose(ours[name].float(), own[name].float(), atol=1e-5), name
    # what the tail adds is exactly the mass outside of the k tokens
    rest, ref_rest = (1 - own[f"{who}_mass"] for who in ("student", "teacher"))
    tail = ref_rest * (ref_rest / rest).log()
    listed = plain(student[0], logp.values(), ids.values())  # verl's, before it clamps log-probs
    assert torch.allclose(wanted, listed + tail[0], atol=1e-4)
    ours["distillation_losses"].sum().backward()
    assert student.grad is not None


def test_another_function_of_that_name_is_refused(
    losses: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, verl.NAME, lambda logits, teacher: None)
    with pytest.raises(RuntimeError, match=r"the arguments \(student_logits.*got \(logits, teach"):
        verl.patch(quiet=True)


def test_undo_brings_verls_own_back(losses: Any, capsys: pytest.CaptureFixture[str]) -> None:
    own = losses.compute_forward_kl_topk
    handle = verl.patch(tail="renormalize", kind="policy_ref")
    assert losses.compute_forward_kl_topk is not own
    assert f"fasttax: replaced {verl.MODULE}.{verl.NAME}" in capsys.readouterr().err
    handle.undo()
    assert losses.compute_forward_kl_topk is own


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda x: response_kl(x, x, MASK[0]), ValueError, r"response_mask: .* \(B, R\), padded"),
        (lambda x: response_kl(x[:2], x, MASK), ValueError, r"logits: expected \(3, L or 4, ...\)"),
        (lambda x: response_kl(x, x[:, :3], MASK), ValueError, "ref_logits: expected at least"),
        (lambda x: response_kl(x, x, MASK, kind="forward"), ValueError, "policy_ref"),
        (lambda x: response_kl(x, x[:, :, :9], MASK), ValueError, "ref_logits"),
        (
            lambda x: response_topk_kl(x, *fasttax.topk_logprobs(x, 2), MASK, tail="plain"),
            ValueError,
            "'ghost'",
        ),
        (lambda x: verl.patch(tail="plain"), ValueError, "'ghost'"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        call(logits(0))


@pytest.mark.skipif(importlib.util.find_spec("verl") is not None, reason="verl is installed")
def test_without_verl_its_name_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModuleNotFoundError, match="verl"):
        verl.patch()


# --- the frameworks' own functions, where they are installed (`make matrix`) ----------------------


@pytest.mark.skipif(importlib.util.find_spec("verl") is None, reason="verl is not installed")
def test_in_verls_own_losses() -> None:
    """Nested batches through distillation_loss, whose clamp has nothing to do; agg_loss."""
    from tensordict import TensorDict
    from verl.trainer.distillation import losses as own
    from verl.trainer.ppo.core_algos import agg_loss

    kl = response_kl(logits(0), logits(1), MASK)
    mean = agg_loss(loss_mat=kl, loss_mask=MASK, loss_agg_mode="token-mean")
    assert float(mean) == pytest.approx(float(exact(logits(0), logits(1)).sum() / MASK.sum()))

    ref = logits(1, 0.5).reshape(-1, V)[:11]
    student = (3 * ref).unsqueeze(0).requires_grad_()  # surer than its teacher
    offsets = torch.tensor([0, 7, 11])
    top = fasttax.topk_logprobs(ref, K)
    logp, ids = (torch.nested.nested_tensor_from_jagged(t, offsets) for t in top)
    parts = {
        "prompts": [torch.zeros(4, dtype=torch.long), torch.zeros(2, dtype=torch.long)],
        "responses": [torch.zeros(3, dtype=torch.long), torch.zeros(2, dtype=torch.long)],
        "response_mask": [torch.ones(3), torch.ones(2)],
    }
    nested = {k: torch.nested.as_nested_tensor(v, layout=torch.jagged) for k, v in parts.items()}
    data = TensorDict({**nested, "teacher_logprobs": logp, "teacher_ids": ids}, batch_size=[2])
    actor: Any = SimpleNamespace(strategy="fsdp2")
    settings: Any = SimpleNamespace(
        distillation_loss=SimpleNamespace(log_prob_min_clamp=-10.0, topk=K, use_chunked_topk=False)
    )

    def counted() -> tuple[Tensor, Tensor]:
        """The losses of the responses' tokens, and which of the five have a gradient."""
        made = own.distillation_ppo_loss(actor, settings, data=data, student_logits=student)
        out = {
            k: torch.nested.nested_tensor_from_jagged(v.squeeze(0), offsets)
            for k, v in made.items()
        }
        found, _ = own.compute_forward_kl_topk(actor, settings, out, data)
        (gradient,) = torch.autograd.grad(found.sum(), student)
        rows = gradient[0, [3, 4, 5, 8, 9]]  # by which the responses' tokens are predicted
        return found, rows.abs().amax(-1) > 1e-3

    plain_loss, reached = counted()
    assert not bool(reached.any())  # all are clamped
    assert float(plain_loss.detach().sum()) == 0.0
    with verl.patch(quiet=True):
        kl, reached = counted()
    assert bool(reached.all())
    assert bool((kl.flatten()[[0, 1, 2, 3, 4]] > 0).all())


def _without_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """What OpenRLHF imports for packed rows, which needs a GPU to build, under its names."""
    for name, names in {
        "flash_attn": (),
        "flash_attn.bert_padding": ("index_first_axis", "pad_input", "rearrange", "unpad_input"),
        "flash_attn.utils": (),
        "flash_attn.utils.distributed": ("all_gather",),
    }.items():
        module: Any = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)  # transformers asks for it
        for attribute in names:
            setattr(module, attribute, None)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.skipif(
    importlib.util.find_spec("openrlhf") is None, reason="openrlhf is not installed"
)
def test_in_openrlhfs_actor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Actor's logits, tempered already, and its aggregate_loss: the mean of the exact KL."""
    if importlib.util.find_spec("flash_attn") is None:
        _without_flash_attention(monkeypatch)
    from openrlhf.models.actor import Actor
    from openrlhf.models.loss import aggregate_loss

    from tests.tools import tiny_lm

    policy, ref = (Actor(tiny_lm.model(seed, 4.0), temperature=0.7) for seed in (0, 1))
    for actor in (policy, ref):
        actor.packing_samples = False
    ids = tiny_lm.ids(B, P + R)
    given = {"attention_mask": torch.ones_like(ids), "return_output": True}
    _, output = policy(ids, MASK, **given)
    with torch.no_grad():
        _, ref_output = ref(ids, MASK, **given)
    kl = response_kl(output["logits"], ref_output["logits"], MASK)
    loss = aggregate_loss(kl, MASK, token_level_loss=True)
    wanted = exact(*(a.model(ids).logits / 0.7 for a in (policy, ref))).sum() / MASK.sum()
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-4)
    assert float(wanted.detach()) > 0.1
    loss.backward()
    assert float(policy.model.lm_head.weight.grad.abs().max()) > 1e-3
