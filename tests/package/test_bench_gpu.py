"""`make bench-gpu` without a GPU: everything but the time, which the tests give."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench import __main__ as bench  # noqa: E402
from bench import bench_gpu, gpu_clock, gpu_peers, gpu_run, gpu_table, logits  # noqa: E402

RATES = gpu_clock.Rates(copy=1e12, products={"bfloat16": 1e14, "float32": 1e13})


class Clock:
    """A device whose calls take what the test says, and a host's clock that they move on."""

    def __init__(self, seconds: Callable[[Callable[[], Any]], float]) -> None:
        self.name, self.device = "fake", torch.device("cpu")
        self._seconds, self._now, self.calls = seconds, 0.0, 0

    def seconds(self, call: Callable[[], Any]) -> float:
        call()
        taken = self._seconds(call)
        self.calls += 1
        self._now += taken
        return taken

    def wall(self) -> float:
        return self._now


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """torch.compile stands aside."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def nothing() -> None:
    pass


def spec(
    seconds: dict[str, float] | None = None, floor_bytes: float = 0.0, floor_flops: float = 0.0
) -> tuple[gpu_run.Spec, Callable[[Callable[[], Any]], float]]:
    """A case whose contenders take so long, and the clock's answers."""
    named = {name: (lambda: None) for name in seconds or {"fasttax": 1.0}}
    by_call = {id(call): (seconds or {"fasttax": 1.0})[name] for name, call in named.items()}
    case = gpu_run.GpuCase(named, floor_bytes, floor_flops)
    return gpu_run.Spec("op", "size", lambda: case), lambda call: by_call[id(call)]


def test_every_case_runs_and_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The dry run: small cases of all families, by the CPU's clock."""
    monkeypatch.setattr(gpu_run, "MOST", 3)
    report = json.loads(bench.measure_gpu(True, 300.0, tmp_path).read_text())
    assert not report["left_out"]
    found = {(r["name"], r["shape"]) for r in report["results"]}
    expected = bench_gpu.specs(torch.device("cpu"), bench_gpu.TINY)
    assert found == {(spec.name, spec.shape) for spec in expected}
    for r in report["results"]:
        assert r["milliseconds"]["fasttax"] > 0
        assert r["share"] >= 0  # rounded, of cases so small
        assert r["rounds"] == 3
        assert set(r["ratios"]) == set(r["milliseconds"]) - {"fasttax"}
        assert r["ratios"]
    by_name = {r["name"]: r for r in report["results"]}
    adamw = by_name["AdamWEWC, float32"]["ratios"]
    assert {*adamw} == {
        "fused AdamW alone",
        "foreach AdamW alone",
        "foreach EWC, then fused AdamW",
    }
    kl = by_name["token_kl forward+backward, bfloat16"]
    assert {"eager", "torch.compile"} <= {*kl["ratios"]}
    assert "Liger" in {*kl["ratios"], *kl["absent"]}
    for kind in logits.SYNTHETIC:
        assert f"token_kl on rows that are {kind}, bfloat16" in by_name
    printed = capsys.readouterr().out
    assert all(f"{name}, {shape}: " in printed for name, shape in found)


def test_the_real_sizes_are_the_models() -> None:
    sizes = bench_gpu.Sizes()
    vocabularies = {v for _, _, v in sizes.kl}
    assert vocabularies == {49152, 128256, 151936}
    assert {v for *_, v in sizes.linear} == vocabularies
    specs = bench_gpu.specs(torch.device("meta"), sizes)  # none is made before its turn
    assert len(specs) > 30


def test_times_ratios_and_shares() -> None:
    seconds = {"eager": 4e-3, "slow": 6e-3, "fasttax": 2e-3}
    case, clock = spec(seconds, floor_bytes=1e9)
    result = gpu_run.measure(case, Clock(clock), RATES, 10.0)
    assert result.milliseconds == pytest.approx({"eager": 4.0, "slow": 6.0, "fasttax": 2.0})
    assert result.ratios == pytest.approx({"eager": 2.0, "slow": 3.0})
    assert result.bound == "copy"
    assert result.share == pytest.approx(0.5)
    assert result.rounds == gpu_run.MOST
    case, clock = spec(seconds, floor_bytes=1e9, floor_flops=1.6e11)
    result = gpu_run.measure(case, Clock(clock), RATES, 10.0)
    assert result.bound == "product"
    assert result.share == pytest.approx(0.8)
    assert "80 % of the measured GEMM rate" in gpu_run.line(result)


def test_a_budget_is_kept() -> None:
    """Slow cases have fewer rounds, and those that are left at its end are said."""
    slow, clock = spec({"eager": 3.0, "fasttax": 1.0})
    fake = Clock(clock)
    specs = [gpu_run.Spec("op", str(i), slow.make) for i in range(20)]
    said: list[str] = []
    report = gpu_run.run_all(specs, fake, RATES, budget=100.0, say=said.append)
    assert 0 < len(report.results) < 20
    assert len(report.results) + len(report.left_out) == 20
    assert fake.wall() < 100 + 4 * (4 + gpu_run.FEWEST)  # the one under way is ended
    assert all(r.rounds >= gpu_run.FEWEST for r in report.results)
    assert "op, 19" in report.left_out
    assert any("the budget of 100 s was used up" in line for line in said)


def test_peers_that_are_absent_or_fail_are_said() -> None:
    def broken() -> None:  # as Triton where it finds no driver
        raise AssertionError("no kernel for this\nand more")

    case = gpu_run.GpuCase(
        {"broken": broken, "fasttax": nothing}, 1.0, absent={"Liger": "not installed"}
    )
    make = gpu_run.Spec("op", "size", lambda: case)
    result = gpu_run.measure(make, Clock(lambda call: 1e-3), RATES, 1.0)
    assert result.absent == {
        "Liger": "not installed",
        "broken": "AssertionError: no kernel for this",
    }
    assert not result.ratios
    assert "; no Liger: not installed" in gpu_run.line(result)
    assert "pip install nowhere" in gpu_peers.missing("nowhere_at_all", "nowhere")


def test_fasttax_that_fails_is_a_failure() -> None:
    def broken() -> None:
        raise RuntimeError("wrong")

    case = gpu_run.GpuCase({"fasttax": broken}, 1.0)
    with pytest.raises(RuntimeError, match="wrong"):
        gpu_run.run_all([gpu_run.Spec("op", "size", lambda: case)], Clock(lambda call: 1.0), RATES)


def test_memory_that_is_short_leaves_a_case_out() -> None:
    def short() -> gpu_run.GpuCase:
        raise torch.OutOfMemoryError("CUDA out of memory")

    good, clock = spec()
    report = gpu_run.run_all(
        [gpu_run.Spec("large", "size", short), good], Clock(clock), RATES, say=lambda line: None
    )
    assert "out of memory" in report.left_out["large, size"]
    assert [r.name for r in report.results] == ["op"]


def test_readmes_table_is_predicted_until_measured(tmp_path: Path) -> None:
    predicted = gpu_table.table(tmp_path)
    assert "Predicted, not measured" in predicted
    assert predicted.count("not yet") == len(gpu_table.ROWS)
    assert {"A100", "H100", "H200", "B200", "MI300X"} == {*gpu_table.bandwidths()}
    assert all(f"{gpu}, predicted" in predicted for gpu in gpu_table.bandwidths())
    name, size, floor, _ = gpu_table.ROWS[0]
    result = {
        "name": name,
        "shape": size,
        "milliseconds": {"fasttax": 1.25, "eager": 10.0},
        "ratios": {"eager": 8.0},
        "floor_bytes": floor,
        "bound": "copy",
        "share": 0.87,
        "absent": {"Liger": "not installed"},
        "headline": True,
    }
    report = {
        "command": "python -m bench gpu",
        "environment": {
            "gpu": "NVIDIA H100 80GB HBM3",
            "torch": "2",
            "commit": "c",
            "date": "d",
        },
        "rates": {"copy": 3e12, "products": {"bfloat16": 7e14}},
        "results": [result, {**result, "name": "hidden", "headline": False}],
    }
    target = tmp_path / f"{gpu_table.slug('NVIDIA H100 80GB HBM3')}.json"
    assert target.name == "nvidia-h100-80gb-hbm3.json"
    target.write_text(json.dumps(report))
    (tmp_path / "cpu-kl.json").write_text(json.dumps({"command": "python -m bench kl"}))
    measured = gpu_table.table(tmp_path)
    assert "Predicted, not measured" not in measured
    assert "1.25 ms | 87 % of copying | 0.90 ms | eager 8.00x; no Liger |" in measured
    assert "hidden" not in measured


def test_without_a_gpu_the_command_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("torch sees a GPU here")
    monkeypatch.setattr(sys, "argv", ["bench", "gpu"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "--dry-run" in capsys.readouterr().err


def test_a_gpu_has_its_caches_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CudaClock asks of the device, in order, on a stand-in for it."""
    asked: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            asked.append("record")

        def synchronize(self) -> None:
            asked.append("synchronize")

        def elapsed_time(self, other: Event) -> float:
            return 2.5

    class Flushed:
        def zero_(self) -> None:
            asked.append("write")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    monkeypatch.setattr(torch, "empty", lambda *size, **options: Flushed())
    clock = gpu_clock.CudaClock()
    assert clock.seconds(lambda: asked.append("call")) == pytest.approx(2.5e-3)
    writes = ["write"] * clock.WRITES
    assert asked == [*writes, "record", "call", "record", "synchronize"]
