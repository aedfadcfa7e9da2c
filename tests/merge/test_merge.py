"""merge: weights against the formulas in float64, checkpoints that transformers loads, one tensor
in memory, and what is refused.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import fasttax
from fasttax import FisherEstimate, merge
from fasttax.merge import average
from tests.tools.models import causal_lm
from tests.tools.quantised import Int8Weight


def weights(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(7, 5, generator=g).to(dtype),
        "b.c": torch.randn(3, generator=g).to(dtype),
        "steps": torch.tensor([3, 4]),
    }


def fisher(seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"a": torch.rand(7, 5, generator=g) * 1e-3, "b.c": torch.rand(3, generator=g) * 1e-3}


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_linear(dtype: torch.dtype, alpha: float) -> None:
    base, aligned = weights(1, dtype), weights(2, dtype)
    got = merge.linear(base, aligned, alpha)
    for name in ("a", "b.c"):
        exact = (1 - alpha) * base[name].double() + alpha * aligned[name].double()
        own = (exact.to(dtype).double() - exact).abs().max()  # what rounding to the dtype costs
        assert got[name].dtype == dtype
        assert (got[name].double() - exact).abs().max() <= own + 4 * torch.finfo(
            torch.promote_types(dtype, torch.float32)
        ).eps
    assert torch.equal(got["steps"], base["steps"])
    if alpha in (0, 1):
        assert all(torch.equal(got[n], (base, aligned)[int(alpha)][n]) for n in got)


def test_the_ends_are_exact_where_the_other_is_not_finite() -> None:
    base, aligned = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([torch.inf, torch.nan])}
    assert torch.equal(merge.linear(base, aligned, 0)["w"], base["w"])


@given(
    st.lists(st.floats(0, 1e30), min_size=3, max_size=3),
    st.lists(st.floats(1e-3, 1e3), min_size=3, max_size=3),
    st.floats(1e-30, 1),
)
@settings(max_examples=60, deadline=None)
def test_fisher_average(importance: list[float], shares: list[float], size: float) -> None:
    thetas = [torch.tensor([x], dtype=torch.float32) for x in (-1.0, 2.0, 5.0)]
    fishers = [{"w": torch.tensor([f * size], dtype=torch.float32)} for f in importance]
    got = merge.fisher_average([{"w": t} for t in thetas], fishers, weights=shares)["w"].double()
    factors = [w * f["w"].double() for w, f in zip(shares, fishers, strict=True)]
    if not any(float(f) > 0 for f in factors):
        factors = [torch.tensor([w], dtype=torch.float64) for w in shares]
    exact = sum(f * t for f, t in zip(factors, thetas, strict=True)) / sum(factors)
    # |theta| <= 5; a product, a quotient and a sum each for three models
    assert float((got - exact).abs()) <= 5 * 8 * torch.finfo(torch.float32).eps
    assert -1 <= float(got) <= 5 + 1e-5


def test_equal_fishers_give_the_mean_and_a_certain_one_its_own() -> None:
    models = [weights(1), weights(2)]
    even = merge.fisher_average(models, [fisher(3), fisher(3)])
    torch.testing.assert_close(
        even["a"], (models[0]["a"] + models[1]["a"]) / 2, rtol=1e-6, atol=1e-7
    )
    certain = merge.fisher_average(
        models, [fisher(3), {n: torch.zeros_like(f) for n, f in fisher(3).items()}]
    )
    assert torch.equal(certain["a"], models[0]["a"])


@pytest.mark.parametrize("shares", [[1e-50, 3e-50], [1e39, 2e39], [1e-30, 1e30]])
@pytest.mark.parametrize("size", [1e-60, 1e-45, 1.0, 1e50])
def test_the_scale_of_weights_and_fishers_is_free(size: float, shares: list[float]) -> None:
    """Beyond float32's range too; where one model alone has a Fisher the weight is its own."""
    models = [weights(1), weights(2)]
    fishers = [{n: f.double() * size for n, f in fisher(seed).items()} for seed in (3, 4)]
    fishers[0]["a"][:2] = 0
    fishers[1]["a"][1:3] = 0
    got = merge.fisher_average(models, fishers, weights=shares)
    even = [share / max(shares) for share in shares]
    for name in ("a", "b.c"):
        factors = [w * (f[name] / size) for w, f in zip(even, fishers, strict=True)]
        none = sum(factors) == 0
        factors = [torch.where(none, w, f) for w, f in zip(even, factors, strict=True)]
        products = [f * m[name].double() for f, m in zip(factors, models, strict=True)]
        exact = torch.as_tensor(sum(products) / sum(factors))
        torch.testing.assert_close(got[name], exact.float(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_the_models_have_in_common_stays_to_the_bit(dtype: torch.dtype) -> None:
    """Also an infinity, as some attention masks in buffers have it."""
    base, aligned = weights(1, dtype), weights(2, dtype)
    for model in (base, aligned):
        model["a"][:4] = weights(3, dtype)["a"][:4]
        model["a"][0, 0] = -torch.inf
    zero = {**fisher(4), "a": torch.zeros(7, 5)}
    for merged in (
        merge.linear(base, aligned, 0.3),
        merge.linear(base, aligned, -7.1),
        merge.fisher_average([base, aligned, base], [fisher(4), zero, fisher(5)]),
    ):
        assert torch.equal(merged["a"][:4], base["a"][:4])


def test_more_values_than_one_block() -> None:
    base, aligned = (torch.randn(3, average.BLOCK // 2 + 5) for _ in range(2))
    merged = merge.linear({"w": base.T}, {"w": aligned.T}, 0.25)["w"]
    expected = 0.75 * base.T.double() + 0.25 * aligned.T.double()
    assert torch.equal(merged, expected.float())


def test_the_average_is_where_the_penalties_are_least() -> None:
    """It minimises sum_k F_k (theta - theta_k)^2 / 2: EWC's own quadratics."""
    models, fishers = [weights(1), weights(2)], [fisher(3), fisher(4)]
    merged = merge.fisher_average(models, fishers)
    linears = [torch.nn.Linear(2, 2, bias=False) for _ in models]
    ones = [{"weight": torch.ones(2, 2)} for _ in models]
    got = merge.fisher_average(torch.nn.ModuleList(linears), ones)["weight"]
    torch.testing.assert_close(got, (linears[0].weight + linears[1].weight).detach() / 2)
    slope = sum(
        f["a"].double() * (merged["a"].double() - m["a"].double())
        for m, f in zip(models, fishers, strict=True)
    )
    assert float(torch.as_tensor(slope).abs().max()) <= 1e-3 * 16 * torch.finfo(torch.float32).eps


# --- files ----------------------------------------------------------------------------------------


def saved(folder: Path, name: str, seed: int, max_shard_size: str = "20KB") -> Any:
    torch.manual_seed(seed)
    model: Any = causal_lm("llama_tied")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    model.save_pretrained(folder / name, max_shard_size=max_shard_size)
    (folder / name / "tokenizer.json").write_text(json.dumps({"of": name}))
    (folder / name / "pytorch_model.bin").write_text("old weights")
    return model


@pytest.mark.parametrize("max_shard_size", ["20KB", "1GB"])
def test_folders_that_transformers_loads(max_shard_size: str, tmp_path: Path) -> None:
    base, aligned = (
        saved(tmp_path, "base", 1, max_shard_size),
        saved(tmp_path, "aligned", 2, max_shard_size),
    )
    out = merge.linear(
        tmp_path / "base", tmp_path / "aligned", 0.25, output=tmp_path / "merged", progress=False
    )
    assert out == tmp_path / "merged"
    shards = {f.name for f in (tmp_path / "base").glob("*.safetensors*")}
    assert (len(shards) > 2) == (max_shard_size == "20KB")
    assert {f.name for f in out.iterdir()} == shards | {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
    }
    assert json.loads((out / "tokenizer.json").read_text())["of"] == "aligned"
    loaded = type(base).from_pretrained(out)
    for (name, p), a, b in zip(
        loaded.named_parameters(), base.parameters(), aligned.parameters(), strict=True
    ):
        torch.testing.assert_close(p, 0.75 * a + 0.25 * b, rtol=1e-6, atol=1e-7, msg=name)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    with safe_open(next(out.glob("*.safetensors")), framework="pt") as file:
        assert json.loads(file.metadata()["metadata"])["alpha"] == 0.25


@pytest.mark.parametrize("way", ["file", "bf16 file", "sharded", "mapping"])
def test_fishers_from_where_they_are(way: str, tmp_path: Path) -> None:
    models, estimates = (
        [weights(1), weights(2)],
        [FisherEstimate(fisher(3)), FisherEstimate(fisher(4))],
    )
    if way == "bf16 file":
        estimates = [e.to("u8log") for e in estimates]
    sources: list[Any] = estimates
    if way != "mapping":
        sources = [tmp_path / "0", tmp_path / "1"]
        for e, path in zip(estimates, sources, strict=True):
            e.save(
                path,
                sharded=way == "sharded",
                **({"max_shard_bytes": 100} if way == "sharded" else {}),
            )
    got = merge.fisher_average(models, sources)
    expected = merge.fisher_average(models, [dict(e) for e in estimates])
    assert all(torch.equal(got[n], expected[n]) for n in expected)


def test_a_module_and_a_file_are_sources_too(tmp_path: Path) -> None:
    model: Any = causal_lm("llama")
    save_file({n: t + 1 for n, t in model.state_dict().items()}, tmp_path / "m.safetensors")
    out = merge.linear(model, tmp_path / "m.safetensors", 0.5, output=tmp_path / "out.safetensors")
    got = load_file(out)
    assert all(torch.allclose(got[n], t + 0.5, atol=1e-6) for n, t in model.state_dict().items())


STREAMED = """
import resource, sys
from fasttax import merge
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge.linear(sys.argv[1], sys.argv[2], 0.5, output=sys.argv[3])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_one_tensor_of_each_model_in_memory(tmp_path: Path) -> None:
    """Of 40 tensors of 8 MB in 4 files a side, the process holds a few; mapped pages of the two
    files that are being read count too.
    """
    for name in ("base", "aligned"):
        (tmp_path / name).mkdir()
        files = [f"model-0000{k}-of-00004.safetensors" for k in range(1, 5)]
        for k, file in enumerate(files):
            save_file(
                {f"w{10 * k + j}": torch.full((1024, 2048), float(k + j)) for j in range(10)},
                tmp_path / name / file,
                metadata={"format": "pt"},
            )
        weight_map = {f"w{10 * k + j}": file for k, file in enumerate(files) for j in range(10)}
        (tmp_path / name / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            STREAMED,
            *(str(tmp_path / n) for n in ("base", "aligned", "merged")),
        ],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 40 * 2**23  # one model


# --- what is refused ------------------------------------------------------------------------------

A, B = weights(1), weights(2)
WRONG: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no model": (
        lambda p: merge.linear(A, 3, 0.5),
        TypeError,
        r"merge\.linear: aligned: expected a module, a mapping .* or a path, got 3",
    ),
    "no path": (
        lambda p: merge.linear(A, B, 0.5, output=["out"]),
        TypeError,
        r"merge\.linear: output: expected a path, got \['out'\]",
    ),
    "no list": (
        lambda p: merge.fisher_average(A, [fisher(3)]),
        TypeError,
        r"merge\.fisher_average: models: expected a list, one for each model",
    ),
    "alpha": (
        lambda p: merge.linear(A, B, float("nan")),
        ValueError,
        r"merge\.linear: alpha: expected a finite number",
    ),
    "quantised": (
        lambda p: merge.linear(A, {**B, "a": Int8Weight(B["a"].to(torch.int8), B["a"])}, 0.5),
        TypeError,
        r"aligned\['a'\]: expected values that lie in the tensor itself, .* class Int8Weight",
    ),
    "names": (
        lambda p: merge.linear(A, {"a": B["a"]}, 0.5),
        ValueError,
        r"b\.c: only in base\n  steps: only in base",
    ),
    "shapes": (
        lambda p: merge.linear(A, {**B, "a": torch.zeros(7, 6)}, 0.5),
        ValueError,
        r"a: shape \(7, 5\) in base, \(7, 6\) in aligned",
    ),
    "kinds": (
        lambda p: merge.linear(A, {**B, "steps": torch.zeros(2)}, 0.5),
        ValueError,
        r"steps: torch\.int64 in base, torch\.float32 in aligned",
    ),
    "integers": (
        lambda p: merge.linear(A, {**B, "steps": torch.tensor([3, 5])}, 0.5),
        ValueError,
        r"steps: expected equal values",
    ),
    "folder": (
        lambda p: merge.linear(p, B, 0.5),
        FileNotFoundError,
        r"merge\.linear: base: expected a \.safetensors file, or a folder",
    ),
    "file": (
        lambda p: merge.linear(A, str(p / "broken"), 0.5),
        ValueError,
        r"aligned: .*broken is truncated or no safetensors file",
    ),
    "shard": (
        lambda p: merge.linear(p / "torn", B, 0.5),
        FileNotFoundError,
        r"names model-1\.safetensors, which .* lacks",
    ),
    "index": (
        lambda p: merge.linear(p / "odd", B, 0.5),
        ValueError,
        r"expected an index of weights in .*odd",
    ),
    "there": (
        lambda p: merge.linear(A, B, 0.5, output=p),
        FileExistsError,
        r"output: .* is there already",
    ),
    "nowhere": (
        lambda p: merge.linear(A, B, 0.5, output=p / "x" / "y"),
        FileNotFoundError,
        r"folder .*x does not exist",
    ),
    "one model": (
        lambda p: merge.fisher_average([A], [fisher(3)]),
        ValueError,
        r"models: expected two or more, got 1",
    ),
    "fishers": (
        lambda p: merge.fisher_average([A, B], [fisher(3)]),
        ValueError,
        r"fishers: expected one for each of the 2 models, got 1",
    ),
    "weights": (
        lambda p: merge.fisher_average([A, B], [fisher(3)] * 2, weights=[1.0, 0.0]),
        ValueError,
        r"weights: expected a finite number > 0",
    ),
    "lacking": (
        lambda p: merge.fisher_average([A, B], [fisher(3), {"a": fisher(4)["a"]}]),
        ValueError,
        r"got none for:\n  b\.c\n",
    ),
    "fisher's shape": (
        lambda p: merge.fisher_average([A, B], [fisher(3), {**fisher(4), "a": torch.ones(5)}]),
        ValueError,
        r"fishers\[1\]\['a'\].*\(7, 5\)",
    ),
    "negative": (
        lambda p: merge.fisher_average([A, B], [fisher(3), {**fisher(4), "b.c": -torch.ones(3)}]),
        ValueError,
        r"finite values >= 0",
    ),
    "missing": (
        lambda p: merge.fisher_average([A, B], [fisher(3)] * 2, missing="skip"),
        ValueError,
        r"missing: expected one of 'error', 'mean'",
    ),
    "no estimate": (
        lambda p: merge.fisher_average([A, B], [p / "plain.safetensors"] * 2),
        ValueError,
        r"is not a FisherEstimate file",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls(case: str, tmp_path: Path) -> None:
    (tmp_path / "broken").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    save_file(A, tmp_path / "plain.safetensors")
    for name, text in (("torn", '{"weight_map": {"a": "model-1.safetensors"}}'), ("odd", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors.index.json").write_text(text)
    before = sorted(tmp_path.rglob("*"))
    call, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        call(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_error_half_way_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="steps: expected equal values"):
        merge.linear(A, {**B, "steps": torch.tensor([0, 0])}, 0.5, output=tmp_path / "out")
    assert [*tmp_path.iterdir()] == []


def test_missing_fishers_as_the_mean() -> None:
    got = merge.fisher_average(
        [A, B], [{"a": fisher(3)["a"]}, {"a": fisher(4)["a"]}], missing="mean", weights=[1, 3]
    )
    torch.testing.assert_close(got["b.c"], (A["b.c"] + 3 * B["b.c"]) / 4, rtol=1e-6, atol=1e-7)


def test_the_command(tmp_path: Path) -> None:
    for name, seed in (("base", 1), ("aligned", 2)):
        save_file(weights(seed), tmp_path / f"{name}.safetensors")
        FisherEstimate(fisher(seed + 2)).save(tmp_path / f"{name}.fisher")
    base, aligned, out = (
        str(tmp_path / n) for n in ("base.safetensors", "aligned.safetensors", "linear.safetensors")
    )
    from fasttax.cli import main

    assert main(["merge", "linear", base, aligned, "--alpha", "0.5", "-o", out]) == 0
    assert torch.equal(load_file(out)["a"], merge.linear(A, B, 0.5)["a"])
    fishers = [f"--fisher={tmp_path / n}.fisher" for n in ("base", "aligned")]
    assert (
        main(
            [
                "merge",
                "fisher",
                base,
                aligned,
                *fishers,
                "--output",
                str(tmp_path / "f.safetensors"),
            ]
        )
        == 0
    )
    assert torch.equal(
        load_file(tmp_path / "f.safetensors")["a"],
        fasttax.merge.fisher_average([A, B], [fisher(3), fisher(4)])["a"],
    )
    # there already
    assert main(["merge", "linear", base, aligned, "--alpha", "0.5", "--output", out]) == 2
