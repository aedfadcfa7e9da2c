"""As test_calls.py: the ops of weights, and what is made of them."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fasttax import EWC, AdamWEWC, FisherMask, functional, merge
from tests.faults.drawn import (
    DTYPES,
    INTERPRETED,
    LAYOUTS,
    WIDTHS,
    laid_out,
    seeds,
    shapes,
    trials,
)
from tests.tools.models import TokenModel, assert_exact, fisher_of, loop
from tests.tools.optim_tools import formula

# --- squares -------------------------------------------------------------------------------------


def test_squares(request: pytest.FixtureRequest, simd: str | int) -> None:
    """Of batches and of packed rows, with weights, added to what is there."""

    @trials(request, 40, 4000)
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        dtype = data.draw(st.sampled_from(DTYPES))
        lengths = data.draw(st.lists(st.integers(0, 5), max_size=4))
        packed = data.draw(st.booleans())
        if not packed:
            lengths = [data.draw(st.integers(0, 5))] * len(lengths)
        wide, out = (data.draw(st.sampled_from(WIDTHS)) for _ in range(2))
        g = torch.Generator().manual_seed(data.draw(seeds))
        layout = data.draw(st.sampled_from(LAYOUTS))
        lead = (sum(lengths),) if packed else (len(lengths), lengths[0] if lengths else 0)

        def drawn(width: int) -> Tensor:
            return laid_out(torch.randn(*lead, width, generator=g).to(dtype), layout)

        a, d, x = drawn(wide), drawn(out), drawn(out)
        ids = torch.randint(11, lead, generator=g)
        given_: dict[str, Any] = {}
        per = torch.ones(len(lengths), dtype=torch.float64)
        if data.draw(st.booleans()):
            given_["example_weight"] = torch.rand(len(lengths), generator=g)
            per = given_["example_weight"].double()
        if packed:
            index = data.draw(st.sampled_from([torch.int32, torch.int64]))
            given_["cu_seqlens"] = torch.tensor([0, *accumulate(lengths)], dtype=index)
        skip = data.draw(st.sampled_from([None, 3, -1]))
        D, X, A = (t.double().reshape(-1, t.shape[-1]).split(lengths) for t in (d, x, a))
        rows = torch.nn.functional.one_hot(ids.reshape(-1), 11).double()
        if skip is not None:
            rows[:, skip] = 0.0
        H = rows.split(lengths)
        found: dict[str, tuple[Any, ...]] = {
            "linear": (functional.linear_sqgrad, (a, d), zip(A, D, strict=True)),
            "norm": (functional.norm_sqgrad, (x, d), zip(X, D, strict=True)),
            "embedding": (functional.embedding_sqgrad, (ids, d, 11), zip(H, D, strict=True)),
            "bias": (functional.bias_sqgrad, (d,), zip(D, D, strict=True)),
        }
        for name, (op, arguments, examples) in found.items():
            grads = [_gradient(name, u, v) for u, v in examples]
            shape = _gradient(name, *_nothing(name, wide, out)).shape
            skipped = {"padding_idx": skip} if name == "embedding" else {}
            start = torch.rand(shape, generator=g, dtype=_sums(dtype))
            got = start.clone()
            op(*arguments, out=got, **given_, **skipped)
            terms = [w * u.square() for w, u in zip(per, grads, strict=True)]
            close(got, start.double() + sum(terms, torch.zeros(shape)), name)

    tried()


def _gradient(name: str, u: Tensor, v: Tensor) -> Tensor:
    """An example's, of (T, ...) inputs and gradients."""
    if name == "linear":
        return v.T @ u
    if name == "embedding":
        return u.T @ v
    return (u * v).sum(0) if name == "norm" else v.sum(0)


def _nothing(name: str, wide: int, out: int) -> tuple[Tensor, Tensor]:
    """Of no tokens, for the shape alone."""
    first = {"linear": wide, "embedding": 11}.get(name, out)
    return torch.zeros(0, first), torch.zeros(0, out)


def _sums(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def close(got: Tensor, want: Tensor, name: str) -> None:
    """Within a few roundings of the largest."""
    assert got.shape == want.shape, name
    if want.numel():
        error, scale = float((got.double() - want).abs().max()), float(want.abs().max())
        assert error <= 64 * torch.finfo(got.dtype).eps * (scale + 1e-3), (name, error, scale)


def test_accumulated_squares(request: pytest.FixtureRequest, simd: str | int) -> None:
    """Lists of any lengths, shapes, dtypes and strides."""

    @trials(request, 40, 4000)
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        g = torch.Generator().manual_seed(data.draw(seeds))
        grads, sums = [], []
        for _ in range(data.draw(st.integers(1, 4))):
            shape, dtype = data.draw(shapes), data.draw(st.sampled_from(DTYPES))
            grad = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
            grads.append(laid_out(grad, data.draw(st.sampled_from(LAYOUTS))))
            sums.append(torch.rand(shape, generator=g, dtype=_sums(dtype)))
        weight = data.draw(st.sampled_from([0.0, 1.0, 0.25]))
        want = [s.double() + weight * d.double().square() for s, d in zip(sums, grads, strict=True)]
        functional.accumulate_sqgrad_(sums, grads, weight)
        for got, w in zip(sums, want, strict=True):
            close(got, w, "sums")

    tried()


def test_lm_head_fisher(request: pytest.FixtureRequest, simd: str | int) -> None:
    """Every label by itself, in chunks, with a mask and a bias."""

    @trials(request, 30, 3000)
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        dtype = data.draw(st.sampled_from((torch.float32, torch.float64)))
        lead, V = data.draw(shapes), data.draw(st.sampled_from(WIDTHS))
        H, g = data.draw(st.integers(1, 20)), torch.Generator().manual_seed(data.draw(seeds))
        hidden, weight = (
            laid_out(torch.randn(shape, generator=g).to(dtype), data.draw(st.sampled_from(LAYOUTS)))
            for shape in ((*lead, H), (V, H))
        )
        bias = torch.randn(V, generator=g).to(dtype) if data.draw(st.booleans()) else None
        mask = torch.rand(lead, generator=g) < 0.7 if data.draw(st.booleans()) else None
        chunk = data.draw(st.sampled_from([1, 5, 256]))
        got = functional.lm_head_fisher(hidden, weight, bias=bias, mask=mask, token_chunk=chunk)
        logits = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
        p = logits.softmax(-1).reshape(-1, V)
        squares = hidden.double().square().reshape(-1, H)
        if mask is not None:
            p, squares = p[mask.reshape(-1)], squares[mask.reshape(-1)]
        rest = p @ (1 - torch.eye(V, dtype=p.dtype))  # 1 - p, by the other labels, to its digits
        close(got, (p * rest).T @ squares, "lm_head_fisher")

    tried()


# --- EWC -----------------------------------------------------------------------------------------


def test_quadratics(request: pytest.FixtureRequest, simd: str | int) -> None:
    """Lists of any lengths, dtypes and sizes: penalty, gradient and proximal step."""

    @trials(request, 40, 4000)
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        g = torch.Generator().manual_seed(data.draw(seeds))
        count = data.draw(st.integers(1, 4))
        sizes = [data.draw(st.sampled_from((0, 1, 5, 16, 33, 300))) for _ in range(count)]
        narrow = (torch.float32, torch.bfloat16, torch.float16)
        theta_t, grad_t, anchor_t, fisher_t = (data.draw(st.sampled_from(narrow)) for _ in range(4))
        odd = data.draw(st.booleans())

        def drawn(dtype: torch.dtype, positive: bool = False) -> list[Tensor]:
            made = [torch.randn(n + odd, generator=g) for n in sizes]
            return [(t.abs() if positive else t).to(dtype)[int(odd) :] for t in made]

        theta, anchor = drawn(theta_t), drawn(anchor_t)
        fisher, grad = drawn(fisher_t, positive=True), drawn(grad_t)
        strength = data.draw(st.sampled_from([0.0, 0.3, 5.0]))
        moved = [[x.double() for x in t] for t in (theta, anchor, fisher, grad)]
        apart = [t - a for t, a in zip(moved[0], moved[1], strict=True)]
        want = sum(float((f * x * x).sum()) for f, x in zip(moved[2], apart, strict=True))
        want *= strength / 2
        got = functional.ewc_penalty(theta, anchor, fisher, strength)
        assert float(got) == pytest.approx(want, rel=1e-5, abs=1e-7)
        added = functional.ewc_add_grad_(theta, grad, anchor, fisher, strength)
        assert float(added) == pytest.approx(want, rel=1e-5, abs=1e-7)
        for k in range(count):
            expected = moved[3][k] + strength * moved[2][k] * apart[k]
            rounded(grad[k], expected, grad_t)
        at = [t.clone() for t in theta]
        functional.ewc_prox_(at, anchor, fisher, strength)
        for k in range(count):
            rounded(at[k], moved[1][k] + apart[k] / (1 + strength * moved[2][k]), theta_t)

    tried()


def rounded(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """Within a rounding of the dtype, and a few of float32's."""
    # Triton's interpreter cuts float32 off to bfloat16
    cut = dtype == torch.bfloat16 and INTERPRETED
    eps = torch.finfo(dtype).eps * (1.01 if cut else 0.51)
    allowed = (eps + 8 * torch.finfo(torch.float32).eps) * want.abs() + 1e-6
    assert bool(((got.double() - want).abs() <= allowed).all()), (got, want)


def test_ewc_of_a_model(request: pytest.FixtureRequest, simd: str | int) -> None:
    """Of any parameters, dtypes and storages: its formula of what it stores."""

    @trials(request, 30, 3000)
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        g = torch.Generator().manual_seed(data.draw(seeds))
        named = data.draw(st.lists(shapes, min_size=1, max_size=4))
        dtype = data.draw(st.sampled_from(DTYPES))

        def drawn() -> list[Tensor]:
            made = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in named)
            return [laid_out(t, data.draw(st.sampled_from(LAYOUTS[:5]))) for t in made]

        model = torch.nn.ParameterList(drawn())
        params = dict(model.named_parameters())
        fisher = {n: f.float().abs() for n, f in zip(params, drawn(), strict=True)}
        storage = data.draw(st.sampled_from(["fp32", "bf16", "u8log"]))
        options: dict[str, Any] = {"strength": data.draw(st.sampled_from([0.0, 0.3, 5.0]))}
        options["anchor_dtype"] = data.draw(st.sampled_from([None, torch.bfloat16, "bf16+8"]))
        if options["anchor_dtype"] is not None and dtype != torch.float32:
            options["anchor_dtype"] = None
        ewc = EWC(model, fisher, storage=storage, **options)
        with torch.no_grad():
            for p, moved in zip(model, drawn(), strict=True):
                p.copy_(moved)
        anchors = {n: a.double() for n, a in ewc.anchor.items()}
        stored = {n: f.double() for n, f in ewc.fisher.items()}
        apart = {n: p.detach().double() - anchors[n] for n, p in params.items()}
        total = sum(float((stored[n] * apart[n].square()).sum()) for n in params)
        strength = options["strength"]
        near = pytest.approx(strength / 2 * total, rel=1e-5, abs=1e-7)
        assert float(ewc.penalty().detach()) == near
        assert float(ewc.distance().total) == pytest.approx(total, rel=1e-5, abs=1e-7)
        assert float(ewc.add_grad_()) == near
        for n, p in params.items():
            if p.numel():
                rounded(p.grad, strength * stored[n] * apart[n], dtype)
        again = EWC(model, fisher, **options)
        again.load_state_dict(ewc.state_dict())
        assert torch.equal(again.penalty(), ewc.penalty())
        ewc.prox_(0.1)
        for n, p in params.items():
            rounded(p, anchors[n] + apart[n] / (1 + 0.1 * strength * stored[n]), dtype)

    tried()


def test_lora_penalty(request: pytest.FixtureRequest, simd: str | int) -> None:
    @trials(request, 20, 2000)
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        g = torch.Generator().manual_seed(data.draw(seeds))
        out, wide = (data.draw(st.sampled_from(WIDTHS)) for _ in range(2))
        rank = data.draw(st.integers(1, 5))
        a = torch.randn(rank, wide, generator=g).requires_grad_()
        b = torch.randn(out, rank, generator=g).requires_grad_()
        fisher = torch.rand(out, wide, generator=g)
        got = functional.lora_ewc_penalty(a, b, fisher, 0.5, 3.0)
        d = torch.autograd.grad(got, (a, b))
        got = got.detach()
        A, B = (t.detach().double().requires_grad_() for t in (a, b))
        want = 1.5 * (fisher.double() * (0.5 * B @ A).square()).sum()
        truth = torch.autograd.grad(want, (A, B))
        want = want.detach()
        assert float(got) == pytest.approx(float(want), rel=1e-5)
        for one, other in zip(d, truth, strict=True):
            scale = float(other.abs().max())
            assert float((one.double() - other).abs().max()) <= 1e-5 * scale

    tried()


def test_adamw(request: pytest.FixtureRequest, simd: str | int) -> None:
    """AdamWEWC over any list of parameters, storages and options: its formula in float64."""

    @trials(request, 30, 3000)
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        dtype = data.draw(st.sampled_from((torch.float32, torch.float64)))
        g = torch.Generator().manual_seed(data.draw(seeds))
        sizes = data.draw(st.lists(st.sampled_from((1, 5, 16, 33, 300)), min_size=1, max_size=4))
        model = torch.nn.ParameterList(
            [torch.randn(n, generator=g, dtype=torch.float64).to(dtype) for n in sizes]
        )
        named = dict(model.named_parameters())
        held = [n for n in named if data.draw(st.booleans())] or list(named)
        fisher = {n: torch.rand(named[n].shape, generator=g).to(dtype) for n in held}
        mode = data.draw(st.sampled_from(["grad", "prox"]))
        options: dict[str, Any] = {
            "lr": data.draw(st.sampled_from([1e-3, 0.1])),
            "weight_decay": data.draw(st.sampled_from([0.0, 0.01])),
            "betas": data.draw(st.sampled_from([(0.9, 0.999), (0.0, 0.5)])),
            "amsgrad": data.draw(st.booleans()),
            "maximize": data.draw(st.booleans()),
            "eps": 1e-4,
        }
        strength = data.draw(st.sampled_from([0.0, 0.3, 50.0]))
        storage = data.draw(st.sampled_from(["fp32", "bf16", "u8log"]))
        ewc = EWC(model, fisher, strength=strength, storage=storage)
        optimizer = AdamWEWC(model.parameters(), ewc=ewc, mode=mode, **options)
        pulls = {n: (ewc.anchor[n].double(), f.double()) for n, f in ewc.fisher.items()}
        zero = {n: torch.zeros(p.shape, dtype=torch.float64) for n, p in named.items()}
        state = {
            n: {"theta": p.detach().double().clone(), "m": zero[n], "v": zero[n], "most": zero[n]}
            for n, p in named.items()
        }
        for t in range(1, data.draw(st.integers(1, 3)) + 1):
            for p in model:
                p.grad = torch.randn(p.shape, generator=g).to(dtype)
            grads = {n: p.grad.double() for n, p in named.items()}
            optimizer.step()
            truth = formula(state, grads, pulls, t, mode, strength, **options)
            bound = 1e-11 if dtype == torch.float64 else 1e-4
            assert float(optimizer.penalty) == pytest.approx(truth, rel=bound, abs=1e-9)
        bound = 1e-12 if dtype == torch.float64 else 2e-5
        for n, p in named.items():
            wanted = state[n]["theta"]
            torch.testing.assert_close(p.detach().double(), wanted, rtol=bound, atol=bound)

    tried()


# --- models --------------------------------------------------------------------------------------


def test_fisher_of_a_model(request: pytest.FixtureRequest, simd: str | int) -> None:
    """Of any sizes, batches and padding: a loop over single examples."""

    @trials(request, 15, 1000)
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        # of less than 4 features a LayerNorm's gradient is its own rounding
        V, width = data.draw(st.integers(2, 40)), data.draw(st.integers(4, 20))
        model = TokenModel(data.draw(st.booleans()), V, width)
        g = torch.Generator().manual_seed(data.draw(seeds))
        batches, examples = [], []
        for _ in range(data.draw(st.integers(1, 3))):
            lengths = data.draw(st.lists(st.integers(2, 7), min_size=1, max_size=4))
            ids = torch.randint(V, (len(lengths), max(lengths)), generator=g)
            mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
            batches.append({"input_ids": ids, "attention_mask": mask})
            examples += [
                ({"input_ids": row[None, :n]}, row[None, :n])
                for row, n in zip(ids, lengths, strict=True)
            ]
        assert_exact(fisher_of(model, *batches), loop(model, examples))

    tried()


def test_mask_and_merges(request: pytest.FixtureRequest) -> None:
    """FisherMask freezes the largest Fishers to the bit; means of models are float64's."""

    @trials(request, 20, 2000)
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        g = torch.Generator().manual_seed(data.draw(seeds))
        named = data.draw(st.lists(shapes, min_size=1, max_size=4))
        dtypes = [data.draw(st.sampled_from(DTYPES)) for _ in named]

        def drawn() -> dict[str, Tensor]:
            pairs = zip(named, dtypes, strict=True)
            return {f"w{i}": torch.randn(s, generator=g).to(t) for i, (s, t) in enumerate(pairs)}

        base, aligned = drawn(), drawn()
        fishers = [{n: t.float().abs() for n, t in drawn().items()} for _ in range(2)]
        alpha = data.draw(st.sampled_from([0.0, 0.3, 1.0, 1.5]))
        merged = merge.linear(base, aligned, alpha, progress=False)
        mean = merge.fisher_average([base, aligned], fishers, progress=False)
        for n, t in base.items():
            a, b = t.double(), aligned[n].double()
            f, h = fishers[0][n].double(), fishers[1][n].double()
            whole = f + h
            both = torch.where(whole > 0, (f * a + h * b) / whole, (a + b) / 2)
            for got, want in ((merged[n], (1 - alpha) * a + alpha * b), (mean[n], both)):
                assert got.dtype == t.dtype
                assert torch.allclose(
                    got.double(), want, rtol=torch.finfo(t.dtype).eps, atol=1e-7
                ), n

        class Model(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                for n, t in base.items():
                    self.register_parameter(n, torch.nn.Parameter(t.clone()))

        model, share = Model(), data.draw(st.sampled_from([0.1, 0.5, 1.0]))
        values = torch.cat([f.reshape(-1) for f in fishers[0].values()])
        mask = FisherMask(model, fishers[0], share=share)
        wanted = min(round(share * values.numel()), int((values > 0).sum()))
        assert mask.masked == wanted
        if values.numel():
            least = values.sort(descending=True).values[max(0, wanted - 1)]
            with mask.attach(optimizer := torch.optim.SGD(model.parameters(), lr=1.0)):
                for p in model.parameters():
                    p.grad = torch.full_like(p, 2.0)
                optimizer.step()
            for n, p in model.named_parameters():
                kept = fishers[0][n] > least
                assert torch.equal(p.detach()[kept], base[n][kept])
                free = fishers[0][n] < least
                assert torch.equal(p.detach()[free], base[n][free] - 2.0)

    tried()
