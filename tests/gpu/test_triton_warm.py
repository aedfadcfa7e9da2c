"""`fasttax doctor --warm` launches every kernel of fasttax.triton, counted in the interpreter; and
what it says where there is no GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from fasttax import triton as ours
from fasttax.cli import doctor

pytest.importorskip("triton", reason="Triton kernels need triton: `pip install triton`")
from tests.tools.triton_tools import check_in_the_interpreter


def kernels() -> set[tuple[str, str]]:
    """(file, kernel) of all that are there."""
    folder = Path(ours.__file__).parent
    return {
        (path.name, line.removeprefix("def ").partition("(")[0])
        for path in folder.glob("*.py")
        for line in path.read_text().splitlines()
        if line.startswith("def ") and "_kernel(" in line
    }


def check_all() -> None:
    from triton.runtime.interpreter import InterpretedFunction

    from fasttax.cli import _warm

    started = set()
    run = InterpretedFunction.run

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        started.add((Path(self.fn.__code__.co_filename).name, self.fn.__name__))
        return run(self, *args, **options)

    said: list[_warm.Warmed] = []
    with mock.patch.object(InterpretedFunction, "run", counted):
        done = _warm.warm(torch.device("cpu"), said.append, vocabularies=(48,))
    assert started == kernels(), kernels() ^ started
    assert said == done
    names = [of.what for of in done]
    assert len(set(names)) == len(names)
    assert all(of.seconds > 0 for of in done)


def test_every_kernel_is_warmed() -> None:
    check_in_the_interpreter(__file__, "t.check_all()")


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor.main(["--warm"]) == 1
    said = capsys.readouterr()
    assert "no GPU" in said.err
    assert "compiled on the GPU that they run on" in said.err
    assert not said.out


def test_without_triton_it_says_what_brings_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ours, "available", lambda: False)
    assert doctor.main(["--warm"]) == 1
    assert "pip install triton" in capsys.readouterr().err


def test_it_tells_what_it_compiled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fasttax.cli import _warm

    def stands_in(device: torch.device, say: Any) -> list[_warm.Warmed]:
        assert device.type == "cuda"
        for of in (done := [_warm.Warmed("token_kl jsd", 1.25), _warm.Warmed("EWC", 0.5)]):
            say(of)
        return done

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(_warm, "warm", stands_in)
    assert doctor.main(["--warm"]) == 0
    said = capsys.readouterr().out
    assert "token_kl jsd" in said
    assert "1.2 s" in said
    assert "2 kinds of calls in 1.8 s for a GPU" in said
