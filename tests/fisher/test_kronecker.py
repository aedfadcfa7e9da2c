"""The Kronecker-factored Fisher against enumerated blocks, and its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fasttax
from fasttax import KroneckerEstimate
from fasttax.fisher import factor
from fasttax.fisher.kronecker_fisher import KroneckerFisher
from tests.tools.models import EXACT, TokenModel, assert_exact, causal_lm, fisher_of, ids


def kron(model: nn.Module, batches: Any, **options: Any) -> KroneckerEstimate:
    return fasttax.estimate_fisher(model, batches, structure="kron", progress=False, **options)


def error(got: Tensor, truth: Tensor) -> float:
    assert got.shape == truth.shape
    return float((got.double() - truth.double()).norm() / truth.double().norm())


# --- the factors --------------------------------------------------------------------------------


def test_is_the_enumerated_block_where_inputs_are_one() -> None:
    """With one input for all examples the product is the block itself, over all labels."""
    torch.manual_seed(0)
    model = nn.Linear(5, 4)
    x = torch.randn(1, 5).expand(64, 5).clone()
    estimate = kron(model, [(x, torch.zeros(64, dtype=torch.long))], likelihood="softmax")
    p = model(x[:1]).double().softmax(-1)[0]
    block = torch.zeros(20, 20, dtype=torch.float64)
    for y in range(4):
        score = p - nn.functional.one_hot(torch.tensor(y), 4)
        g = score.outer(x[0].double()).reshape(-1)
        block += p[y] * g.outer(g)
    a, g = estimate.factors["weight"]
    assert error(torch.kron(g, a), block.detach()) < EXACT
    assert error(estimate["weight"], block.diagonal().reshape(4, 5).detach()) < EXACT
    assert estimate.metadata["head"] == "closed form"


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_regression_and_independent_outputs(likelihood: str) -> None:
    torch.manual_seed(1)
    model = nn.Linear(6, 3)
    x = torch.randn(400, 6)
    labels = torch.randint(0, 2, (400, 3)).float()
    estimate = kron(model, [(x, labels)], likelihood=likelihood, mc_samples=8)
    a, g = estimate.factors["weight"]
    assert error(a, x.T @ x / 400) < EXACT
    truth = torch.eye(3)
    if likelihood == "bernoulli":
        p = model(x).sigmoid()
        truth = (p * (1 - p)).mean(0).diag()
    assert error(g, truth.detach()) < 6 / (400 * 8) ** 0.5  # sampled labels
    assert estimate.metadata["head"] == "labels"


def test_of_a_loop_over_tokens() -> None:
    """A and G as their definition: sums over the tokens that the loss reaches, by hooks."""
    model, x = causal_lm("llama").double(), ids(3, 9)
    labels = torch.cat((x[:, :6], torch.full((3, 3), -100)), 1)
    layer = model.model.layers[0].mlp.gate_proj
    met: list[Tensor] = []
    grads: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        met.append(args[0].detach())
        output.register_hook(grads.append)

    handle = layer.register_forward_hook(keep)
    logits = model(x).logits[:, :-1]
    loss = nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    loss.backward()
    handle.remove()
    batch = {"input_ids": x, "labels": labels}
    estimate = kron(model, [batch], labels="true")
    inputs = met[0][:, :5].flatten(0, 1)  # predictions of tokens 1 to 5
    outputs = grads[0].flatten(0, 1)
    a, g = estimate.factors["model.layers.0.mlp.gate_proj.weight"]
    assert error(a, inputs.T @ inputs / len(inputs)) < 1e-12
    assert error(g, outputs.T @ outputs / 3) < 1e-12


def test_what_is_no_linear_weight_keeps_its_diagonal() -> None:
    model, x = causal_lm("llama"), ids(3, 11)
    estimate = kron(model, [x])
    plain = {n: t / 3 for n, t in fisher_of(model, x, labels="exact_head").items()}
    assert {*estimate} == {*plain}
    others = {n: plain[n] for n in estimate.diagonal}
    assert any("norm" in n for n in others)
    assert any("embed" in n for n in others)
    assert_exact(dict(estimate.diagonal), others, EXACT)
    head = estimate.factors["lm_head.weight"]
    assert head[0].shape == (32, 32)
    # the closed form's diagonal is that of the labels' own
    assert error(estimate["lm_head.weight"].sum(), plain["lm_head.weight"].sum()) < EXACT


@pytest.mark.parametrize("kind", ["gpt2_untied", "llama_tied"])
def test_other_layouts(kind: str) -> None:
    model, x = causal_lm(kind), ids(3, 11)
    estimate = kron(model, [x])
    for name, p in model.named_parameters():
        assert estimate[name].shape == p.shape
    if kind == "gpt2_untied":
        name = "transformer.h.0.mlp.c_fc.weight"  # (in, out)
        a, g = estimate.factors[name]
        assert (a.shape[0], g.shape[0]) == tuple(model.get_parameter(name).shape)
        assert estimate.sides(name)[0] is a
    else:
        assert "model.embed_tokens.weight" in estimate.diagonal, "shared by embedding and head"


def test_convolutions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 4, 5))
    x = torch.randn(6, 2, 4, 4)
    estimate = kron(model, [(x, torch.arange(6) % 5)], labels="true", likelihood="softmax")
    a, g = estimate.factors["0.weight"]
    patches = nn.functional.unfold(x, 3).transpose(1, 2).flatten(0, 1)
    assert error(a, patches.T @ patches / len(patches)) < EXACT
    assert estimate["0.weight"].shape == (3, 2, 3, 3)
    assert g.shape == (3, 3)


def test_more_samples_and_more_batches_are_means() -> None:
    model, x = causal_lm("llama"), ids(4, 7)
    once = kron(model, [x], labels="true")
    apart = kron(model, [x[:2], x[2:]], labels="true")
    summed = kron(model, [x], labels="true", normalize="sum")
    for name, (a, g) in once.factors.items():
        assert error(apart.factors[name][0], a) < EXACT, name
        assert error(apart.factors[name][1], g) < EXACT, name
        assert error(summed.factors[name][1], 4 * g) < EXACT, name
        assert torch.equal(g, g.T)
    tokens = kron(model, [x], labels="true", unit="token")
    name = "lm_head.weight"
    assert error(tokens.factors[name][1] * 24, summed.factors[name][1]) < EXACT


def test_padding_counts_for_nothing() -> None:
    model, x = causal_lm("llama"), ids(2, 8)
    padded = torch.cat((x, torch.zeros(2, 3, dtype=torch.long)), 1)
    mask = torch.cat((torch.ones(2, 8), torch.zeros(2, 3)), 1).long()
    one = kron(model, [{"input_ids": x, "labels": x}], labels="true")
    two = kron(
        model, [{"input_ids": padded, "attention_mask": mask, "labels": padded}], labels="true"
    )
    for name, pair in one.factors.items():
        for mine, other in zip(pair, two.factors[name], strict=True):
            assert error(other, mine) < EXACT, name


def test_tokens_that_no_loss_reaches_count_for_nothing_by_token() -> None:
    """A is the same mean whether squares are taken by example or by token."""
    model, x = causal_lm("llama").double(), ids(3, 9)
    mask, labels = torch.ones_like(x), x.clone()
    mask[0, :3] = 0
    labels[1, :4] = labels[2, 6:] = -100
    batch = {"input_ids": x, "attention_mask": mask, "labels": labels}
    one = kron(model, [batch], labels="true")
    two = kron(model, [batch], labels="true", unit="token")
    examples_a_token = 3 / one.metadata["tokens"]
    for name, (a, g) in one.factors.items():
        assert error(two.factors[name][0], a) < 1e-12, name
        assert error(two.factors[name][1], g * examples_a_token) < 1e-12, name


def test_examples_without_a_label_count_for_nothing() -> None:
    """Of a classifier, whose every example is one row."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, labels = torch.randn(5, 6).double(), torch.tensor([0, 1, -100, 2, -100])
    options: dict[str, Any] = {"labels": "true", "likelihood": "softmax"}
    some = kron(model, [(x, labels)], **options)
    kept = labels >= 0
    alone = kron(model, [(x[kept], labels[kept])], **options)
    for name, (a, g) in alone.factors.items():
        assert error(some.factors[name][0], a) < 1e-12, name
        assert error(some.factors[name][1], g * 3 / 5) < 1e-12, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_of_nothing_but_rounding_is_none(dtype: torch.dtype) -> None:
    """A row's first query sees one key, and its gradient is 0 but for the rounding of attention."""
    model, x = causal_lm("llama", dtype), ids(8, 5)
    found = kron(model, [x], labels="true")
    exact = kron(causal_lm("llama", dtype).double(), [x], labels="true")
    met: list[Tensor] = []
    layer = model.double().model.layers[0].self_attn.q_proj
    handle = layer.register_forward_hook(lambda module, args, output: met.append(args[0].detach()))
    model(x)
    handle.remove()
    rows = met[0][:, 1:-1].flatten(0, 1)  # the last token predicts nothing
    a = exact.factors["model.layers.0.self_attn.q_proj.weight"][0]
    assert error(a, rows.T @ rows / len(rows)) < 1e-12
    if dtype == torch.float32:
        for name, pair in exact.factors.items():
            for mine, other in zip(found.factors[name], pair, strict=True):
                assert error(mine, other) < EXACT, name


def test_a_matrix_that_lies_both_ways_keeps_its_diagonal() -> None:
    """A weight of nn.Linear (out, in) that is also a Conv1D's (in, out) has no one product."""
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two = nn.Linear(8, 8), pytorch_utils.Conv1D(8, 8)
            self.two.weight = self.one.weight
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))

    batch = (torch.randn(6, 8), torch.randint(0, 3, (6,)))
    estimate = kron(Shared(), [batch], labels="true", likelihood="softmax")
    assert list(estimate.factors) == ["head.weight"]
    plain = fasttax.estimate_fisher(
        Shared(), [batch], labels="true", likelihood="softmax", progress=False
    )
    assert error(estimate["one.weight"], plain["one.weight"]) < EXACT


@pytest.mark.parametrize("max_dim", [40, 20, 7])
def test_cut_to_max_dim(max_dim: int) -> None:
    """Blocks of the whole factor, or its diagonal."""
    model, x = causal_lm("llama"), ids(3, 9)
    whole, cut = kron(model, [x]), kron(model, [x], max_dim=max_dim)
    for name, pair in whole.factors.items():
        for mine, full in zip(cut.factors[name], pair, strict=True):
            n = full.shape[0]
            if mine.dim() == 2:
                assert n <= max_dim
                assert torch.equal(mine, full)
            elif mine.dim() == 1:
                assert error(mine, full.diagonal()) < EXACT
            else:
                assert mine.shape[1] <= max_dim
                assert error(torch.block_diag(*mine), full * (torch.block_diag(*mine) != 0)) < EXACT
        assert error(cut[name], whole[name]) < EXACT


def test_wide_factors_by_panels() -> None:
    torch.manual_seed(0)
    rows = torch.randn(70, factor.SMALL + 77)
    out = torch.zeros(factor.SMALL + 77, factor.SMALL + 77)
    factor.gram_(out, rows, 0.5)
    truth = 0.5 * rows.double().T @ rows.double()
    assert error(factor.completed(out), truth) <= 4 * error(0.5 * rows.T @ rows, truth)
    assert torch.equal(factor.completed(out), factor.completed(out).T)


def test_head_that_is_not_the_logits_is_sampled() -> None:
    class Mixed(TokenModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            logits = out if isinstance(out, Tensor) else out.logits
            return logits - logits.mean(-1, keepdim=True)

    x = ids(3, 6)
    estimate = kron(Mixed(), [x, x])
    assert estimate.metadata["head"] == "labels"
    assert estimate.metadata["examples"] == 6
    with pytest.raises(ValueError, match="labels: expected a linear head"):
        kron(Mixed(), [x], labels="exact_head")


@pytest.mark.parametrize("change", ["flip", "layer_norm", "cumsum"])
def test_head_whose_outputs_meet_is_sampled(change: str) -> None:
    """Also where the model says which layer is its head."""
    changes = {
        "flip": lambda z: z.flip(-1),
        "layer_norm": lambda z: nn.functional.layer_norm(z, z.shape[-1:]),
        "cumsum": lambda z: z.cumsum(-1),
    }

    class Mixed(TokenModel):
        def get_output_embeddings(self) -> nn.Module:
            return self.head

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = changes[change](out.logits)
            return out

    x = ids(3, 6)
    estimate = kron(Mixed(), [x, x])
    assert estimate.metadata["head"] == "labels"
    assert estimate.metadata["labels"] == "sample"
    with pytest.raises(ValueError, match="entry by entry"):
        kron(Mixed(), [x], labels="exact_head")


@pytest.mark.parametrize("rows", [1, 2])
def test_a_sampled_head_stays_so_across_a_crash(rows: int, tmp_path: Path) -> None:
    """Also where single rows prove nothing anew."""

    class Flipped(TokenModel):
        def get_output_embeddings(self) -> nn.Module:
            return self.head

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits.flip(-1)
            return out

    model, path = Flipped(), tmp_path / "sums.safetensors"
    batches = [ids(rows, 6, seed=s) for s in range(3)]
    whole = kron(model, batches)
    first = KroneckerFisher(model)
    for x in batches[:2]:
        first.update(x)
    first.checkpoint(path)
    second = KroneckerFisher(model)
    second.resume(path)
    assert second.finalize().metadata["head"] == "labels"
    second.update(batches[2])
    found: Any = second.finalize()
    for name, pair in found.factors.items():
        assert all(map(torch.equal, pair, whole.factors[name])), name


# --- what surrounds them ------------------------------------------------------------------------


def test_of_a_users_own_factors() -> None:
    estimate = KroneckerEstimate({"weight": (torch.eye(4), torch.eye(3))}, {"bias": torch.ones(3)})
    assert repr(estimate) == "KroneckerEstimate(1 weights of 25 values, 1 diagonals)"
    assert torch.equal(estimate["weight"], torch.ones(3, 4))


def test_files(tmp_path: Path) -> None:
    estimate = kron(causal_lm("gpt2"), [ids(2, 7)], max_dim=30, storage="u8log")
    path = tmp_path / "k.safetensors"
    estimate.save(path)
    back = KroneckerEstimate.load(path)
    assert back.metadata == estimate.metadata
    for name in estimate:
        assert torch.equal(back[name], estimate[name])
    for name, pair in estimate.factors.items():
        for mine, theirs in zip(pair, back.factors[name], strict=True):
            assert torch.equal(mine, theirs)
    with pytest.raises(ValueError, match="KroneckerEstimate"):
        fasttax.FisherEstimate.load(path)
    diagonal = estimate.to_diagonal()
    assert {*diagonal} == {*estimate}
    diagonal.save(path)
    with pytest.raises(ValueError, match="KroneckerEstimate"):
        KroneckerEstimate.load(path)


def test_damaged_factors_are_refused(tmp_path: Path) -> None:
    estimate = kron(nn.Linear(4, 3), [(torch.randn(5, 4), torch.zeros(5).long())], labels="true")
    a, g = estimate.factors["weight"]
    for bad in (a * float("nan"), -a, a + torch.ones(4, 4).triu(1), a[:3], a.half()):
        with pytest.raises((ValueError, TypeError), match="KroneckerEstimate: factors"):
            KroneckerEstimate({"weight": (bad, g)}, {}, estimate.metadata)
    with pytest.raises(ValueError, match="without factors"):
        KroneckerEstimate({"weight": (a, g)}, {"weight": torch.ones(3, 4)})


def test_resumes(tmp_path: Path) -> None:
    model, batches = causal_lm("llama"), [ids(2, 7, seed=seed) for seed in range(4)]
    path = tmp_path / "sums"
    whole = kron(model, batches)

    def broken() -> Any:
        yield from batches[:3]
        raise InterruptedError

    with pytest.raises(InterruptedError):
        kron(model, broken(), checkpoint=path, checkpoint_every=2)
    again = kron(model, batches, checkpoint=path, checkpoint_every=2)
    for name in whole:
        assert torch.equal(whole[name], again[name]), name
    assert not path.exists()


def test_wrong_options() -> None:
    model, x = causal_lm("llama"), [ids(2, 5)]
    with pytest.raises(ValueError, match="unit"):
        kron(model, x, unit="batch")
    with pytest.raises(ValueError, match="fallback"):
        kron(model, x, fallback="loop")
    with pytest.raises(ValueError, match="loss"):
        kron(model, x, labels="true", loss=lambda m, b: m(b).logits.sum())
    with pytest.raises(ValueError, match="max_dim"):
        kron(model, x, max_dim=0)
    with pytest.raises(ValueError, match="max_dim"):
        fasttax.estimate_fisher(model, x, max_dim=3, progress=False)
    with pytest.raises(ValueError, match="structure"):
        fasttax.estimate_fisher(model, x, structure="block", progress=False)
    with pytest.raises(ValueError, match="linear layer"):
        kron(model, x, params=["*norm*"])
    with pytest.raises(TypeError, match="observe"):
        KroneckerFisher(model).observe()


def test_nearest_product() -> None:
    """Van Loan's rearrangement by its singular values."""
    torch.manual_seed(0)

    def psd(n: int) -> Tensor:
        rows = torch.randn(2 * n, n, dtype=torch.float64)
        return rows.T @ rows

    terms = [(w, (psd(4), psd(3))) for w in (0.3, 1.0, 2.0)]
    (left, right), off = factor.nearest(terms)
    whole = sum(w * torch.kron(a, b) for w, (a, b) in terms)
    flat = torch.stack([w * a.reshape(-1)[:, None] * b.reshape(-1) for w, (a, b) in terms]).sum(0)
    singular = torch.linalg.svdvals(flat)
    best = float(singular[1:].norm() / singular.norm())
    assert off == pytest.approx(best, rel=1e-9)
    assert error(torch.kron(left, right), whole) == pytest.approx(best, rel=1e-9)
    assert float(torch.linalg.eigvalsh(left).min()) > 0
    same, off = factor.nearest([(1.0, terms[0][1]), (2.0, terms[0][1])])
    assert error(torch.kron(*same), 3 * torch.kron(*terms[0][1])) < 1e-12
    assert off < 1e-7
    zero, off = factor.nearest([(0.0, terms[0][1]), (0.0, terms[1][1])])
    assert float(torch.kron(*zero).norm()) == off == 0.0
