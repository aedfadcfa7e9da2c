"""The commands' own options in the library's advice, text as it is, and Ctrl-C."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fasttax import DiagonalFisher, FisherEstimate, cli
from fasttax.cli._options import in_options
from tests.tools import tiny_lm


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    made.add_argument("--params")
    made.add_argument("--fallback")
    made.add_argument("--max-rows")
    return made


@pytest.mark.parametrize(
    ("advice", "said"),
    [
        ("leave it out with params=, or more", "leave it out with --params, or more"),
        ("pass fallback='loop' (exact)", "pass --fallback loop (exact)"),
        ("choose max_rows=, or", "choose --max-rows, or"),
        ("with observe(shape=(B, T)) or verify='x'", "with observe(shape=(B, T)) or verify='x'"),
        ("params=None", "params=None"),
    ],
)
def test_advice_in_options(advice: str, said: str) -> None:
    assert in_options(advice, parser()) == said


MODELS: dict[str, Any] = {
    "Mamba": {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 1},
    "Falcon": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
    "Gpt2": {},
}


def saved(kind: str, folder: Path) -> list[str]:
    """The beginning of a command on a tiny model of a kind."""
    import transformers

    tokenizer = tiny_lm.tokenizer()
    name = kind.replace("Gpt2", "GPT2")
    options = {**MODELS[kind], "vocab_size": len(tokenizer), "eos_token_id": 1, "bos_token_id": 1}
    if kind == "Gpt2":
        options |= {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    torch.manual_seed(0)
    task = "LMHeadModel" if kind == "Gpt2" else "ForCausalLM"
    config = getattr(transformers, f"{name}Config")(**options)
    getattr(transformers, name + task)(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text("water boils at a hundred degrees " * 2)
    sizes = ["--length", "8", "--examples", "4", "--output", str(folder / "f.safetensors")]
    return ["fisher", str(folder / "model"), str(folder / "text.txt"), *sizes]


@pytest.mark.parametrize("kind", MODELS)
def test_fisher_of_any_model(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is written, or the message names an option of the command that writes it."""
    command = saved(kind, tmp_path)
    status = cli.main(command)
    if status:
        said = capsys.readouterr().err
        assert status == 2
        assert "--fallback loop" in said
        assert not re.search(r"\b(params|fallback)=", said)
        assert cli.main([*command, "--fallback", "loop"]) == 0
    written = FisherEstimate.load(tmp_path / "f.safetensors")
    assert any(bool(f.any()) for f in written.values())


@pytest.mark.parametrize("labels", ["true", "exact_head"])
def test_the_loop_is_advised_where_it_runs(
    labels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*saved("Gpt2", tmp_path), "--labels", labels]
    update = DiagonalFisher.update

    def failing(estimator: DiagonalFisher, batch: Any) -> None:
        if estimator.fallback is None:
            raise RuntimeError("of a tap")
        update(estimator, batch)

    monkeypatch.setattr(DiagonalFisher, "update", failing)
    assert cli.main(command) == 2
    advice = re.search(r"pass (--fallback loop --labels \w+)", capsys.readouterr().err)
    assert advice
    assert cli.main([*command, *advice[1].split()]) == 0


def test_the_loop_is_not_advised_where_it_fails_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = saved("Gpt2", tmp_path)

    def failing(estimator: DiagonalFisher, batch: Any) -> None:
        raise RuntimeError("of the device")

    monkeypatch.setattr(DiagonalFisher, "update", failing)
    with pytest.raises(RuntimeError, match=r"^of the device$"):
        cli.main(command)


def test_fisher_of_some_parameters(tmp_path: Path) -> None:
    command = saved("Gpt2", tmp_path)
    assert cli.main([*command, "--params", "*.attn.*", "--params", "*ln_f*"]) == 0
    names = set(FisherEstimate.load(tmp_path / "f.safetensors"))
    assert names
    assert all(".attn." in n or "ln_f" in n for n in names)


def test_merge_says_its_own_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = []
    for k in (0, 1):
        paths.append(str(tmp_path / f"{k}.safetensors"))
        save_file({"a": torch.randn(3), "b": torch.randn(3)}, paths[-1])
        FisherEstimate({"a": torch.ones(3)}).save(tmp_path / f"f{k}")
    files = [f"--fisher={tmp_path}/f{k}" for k in (0, 1)]
    command = ["merge", "fisher", *paths, *files, "--output", str(tmp_path / "m.safetensors")]
    assert cli.main(command) == 2
    said = capsys.readouterr().err
    assert "--missing mean" in said
    assert "missing=" not in said
    assert cli.main([*command, "--missing", "mean"]) == 0


def test_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C in the middle of a write: the old file, no temporary one, and shells' status."""
    command = saved("Gpt2", tmp_path)
    FisherEstimate({"old": torch.ones(2)}).save(tmp_path / "f.safetensors")
    before = sorted(tmp_path.iterdir())

    def interrupt(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("fasttax._base.mapped.zlib.crc32", interrupt)
    assert cli.main(command) == 130
    monkeypatch.undo()
    assert "interrupted" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
    assert set(FisherEstimate.load(tmp_path / "f.safetensors")) == {"old"}
