"""An EWC acts on its model's own parameters, or says that they are others; names and hashes."""

from __future__ import annotations

import copy
import pickle
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fasttax
from fasttax import EWC, AdamWEWC
from fasttax._base.hashes import same_weights, weights_hash
from tests.tools.models import causal_lm


def net(head: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, head))


def ones(model: nn.Module) -> dict[str, Tensor]:
    return {n: torch.ones_like(p) for n, p in model.named_parameters()}


def move(model: nn.Module, by: float = 1.0) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by)


# --- parameters that are another's -------------------------------------------------------------


def replaced(model: Any) -> None:
    model[2] = nn.Linear(4, 2)


def grown(model: Any) -> None:
    old, model[2] = model[2], nn.Linear(4, 4)
    with torch.no_grad():
        model[2].weight[:2] = old.weight


def assigned(model: Any) -> None:
    model.load_state_dict({n: p.clone() for n, p in model.state_dict().items()}, assign=True)


def deleted(model: Any) -> None:
    del model[2]


def one_parameter(model: Any) -> None:
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())


CHANGES = [replaced, grown, assigned, deleted, one_parameter]
USES: dict[str, Callable[[EWC, nn.Module], Any]] = {
    "penalty": lambda ewc, model: ewc.penalty(),
    "add_grad_": lambda ewc, model: ewc.add_grad_(),
    "prox_": lambda ewc, model: ewc.prox_(0.1),
    "distance": lambda ewc, model: ewc.distance(),
    "attach": lambda ewc, model: ewc.attach(torch.optim.SGD(model.parameters(), lr=0.1)),
    "during_backward": lambda ewc, model: ewc.during_backward(),
    "AdamWEWC": lambda ewc, model: AdamWEWC(model.parameters(), ewc=ewc),
    "consolidate": lambda ewc, model: ewc.consolidate(dict(ewc.fisher)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("used_before", [False, True])
def test_a_parameter_that_is_no_longer_the_models_is_named(
    change: Callable[[Any], None], use: str, used_before: bool
) -> None:
    model = net()
    ewc = EWC(model, ones(model), strength=2.0)
    if used_before:
        ewc.penalty()
    change(model)
    with pytest.raises(ValueError, match=r"2\.weight.*ewc\.on\(model\)"):
        USES[use](ewc, model)


@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize("which", ["model.embed_tokens", "lm_head"])
def test_a_tied_weight_that_comes_apart_is_named(which: str, used_before: bool) -> None:
    model = causal_lm("llama", tie_word_embeddings=True)
    ewc = EWC(model, {"lm_head.weight": torch.ones_like(model.lm_head.weight)}, strength=2.0)
    if used_before:
        ewc.penalty()
    model.get_submodule(which).weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(ValueError, match=rf"{which}\.weight"):
        ewc.penalty()


@pytest.mark.parametrize("how", ["attach", "AdamWEWC"])
def test_a_change_between_steps_is_seen_at_the_next(how: str) -> None:
    model = net()
    ewc = EWC(model, ones(model), strength=2.0)
    optimizer: Any
    if how == "attach":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        handle = ewc.attach(optimizer)
    else:
        handle, optimizer = None, AdamWEWC(model.parameters(), ewc=ewc, lr=0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    replaced(model)
    with pytest.raises(ValueError, match=r"2\.weight"):
        optimizer.step()
    if handle is not None:
        handle.remove()


def test_the_advice_is_followed() -> None:
    model = net()
    fisher = ones(model)
    ewc = EWC(model, fisher, strength=2.0)
    assigned(model)
    again = ewc.on(model)
    move(model)
    assert float(again.penalty()) == pytest.approx(sum(f.numel() for f in fisher.values()))
    grown(model)
    with pytest.raises(ValueError, match=r"2\.weight: shape"):
        again.on(model)
    kept = {n: f for n, f in ewc.fisher.items() if not n.startswith("2.")}
    body = EWC(model, kept, strength=2.0, anchor=ewc.anchor)
    assert float(body.penalty()) == pytest.approx(28)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_resized_embeddings_are_named(name: str, use: str) -> None:
    """transformers gives the embedding's own parameter another shape, and makes a new head."""
    model = causal_lm("llama")
    ewc = EWC(model, {name: ones(model)[name]}, strength=1.0)
    model.resize_token_embeddings(70)
    with pytest.raises(ValueError, match=rf"{name}.*resized"):
        USES[use](ewc, model)


def test_what_keeps_the_parameters_is_accepted() -> None:
    """Moves, wrappers and wrapped layers."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model: Any = net()
    ewc = EWC(model, ones(model), strength=2.0)
    ewc.penalty()
    model.load_state_dict(model.state_dict())
    model.double().float()
    model[0] = torch.compile(model[0])
    model[2] = checkpoint_wrapper(model[2])
    nn.DataParallel(model)
    move(model)
    assert float(ewc.penalty()) == pytest.approx(38)
    replaced(model)
    with pytest.raises(ValueError, match=r"2\.weight"):
        ewc.penalty()


@pytest.mark.parametrize(("made", "used"), [("float", "double"), ("double", "float")])
def test_a_model_that_goes_to_float64_or_from_it_is_named(made: str, used: str) -> None:
    model: Any = getattr(net(), made)()
    ewc = EWC(model, ones(model), strength=1.0)
    getattr(model, used)()
    uses = (
        ewc.penalty,
        ewc.add_grad_,
        ewc.distance,
        lambda: ewc.prox_(0.1),
        lambda: ewc.on(model),
        lambda: ewc.attach(torch.optim.SGD(model.parameters())),
    )
    for use in uses:
        with pytest.raises(ValueError, match=r"float64, or of less, .* got 0\.(weight|bias) in"):
            use()
    anew = EWC(model, ewc.fisher, strength=ewc.strength, anchor=ewc.anchor)
    move(model)
    assert float(anew.penalty()) == pytest.approx(sum(p.numel() for p in model.parameters()) / 2)


def test_an_anchor_wider_than_its_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match=r"anchor_dtype: expected float32 or less for 0\.weight"):
        EWC(net(), ones(net()), strength=1.0, anchor_dtype=torch.float64)
    model = net().double()
    assert float(EWC(model, ones(model), strength=1.0, anchor_dtype=torch.float64).penalty()) == 0


def test_a_head_outside_the_ewc_may_be_replaced() -> None:
    model = net()
    ewc = EWC(model, {"0.weight": torch.ones(4, 6)}, strength=2.0)
    replaced(model)
    move(model)
    assert float(ewc.penalty()) == pytest.approx(24)


def test_a_tied_weight_is_still_held_under_either_name() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    ewc = EWC(model, {"b.weight": torch.ones(3, 3)}, strength=2.0)
    ewc.penalty()
    model["b"].weight = model["a"].weight
    move(model["a"])
    assert float(ewc.penalty()) == pytest.approx(9)


def test_a_look_takes_microseconds() -> None:
    """At most 5 a parameter, with a slow machine's tenfold left."""
    model = nn.Sequential(*[nn.Sequential(nn.Linear(2, 2)) for _ in range(300)])
    ewc = EWC(model, ones(model), strength=2.0)
    ewc.hold.check("test")
    start = time.perf_counter()
    for _ in range(10):
        ewc.hold.check("test")
    assert (time.perf_counter() - start) / 10 / 600 < 50e-6


# --- copies ------------------------------------------------------------------------------------


def test_model_and_ewc_are_copied_together() -> None:
    model = net()
    ewc = EWC(model, ones(model), strength=2.0, anchor_dtype="bf16+8", storage="u8log")
    twin, copied = copy.deepcopy((model, ewc))
    move(twin)
    assert float(ewc.penalty()) == pytest.approx(0, abs=1e-7)
    assert float(copied.penalty()) == pytest.approx(38, rel=1e-3)
    assert {id(p) for p in copied.parameters().values()} == {id(p) for p in twin.parameters()}
    copied.strength = 4.0
    assert ewc.strength == 2.0
    replaced(twin)
    with pytest.raises(ValueError, match=r"2\.weight"):
        copied.penalty()
    ewc.penalty()


def test_an_ewc_that_hangs_on_its_model_is_copied_with_it() -> None:
    model: Any = net()
    model.ewc = EWC(model, ones(model), strength=2.0)
    twin = copy.deepcopy(model)
    move(twin)
    assert float(twin.ewc.penalty()) == pytest.approx(38)
    assert float(model.ewc.penalty()) == 0


def test_optimizers_are_copied_with_the_model() -> None:
    model = net()
    ewc = EWC(model, ones(model), strength=2.0)
    optimizer = AdamWEWC(model.parameters(), ewc=ewc, lr=0.1, mode="prox", every=2)
    twin, own = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (twin, own)):
        for _ in range(3):
            for p in m.parameters():
                p.grad = torch.ones_like(p)
            o.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    with pytest.raises(ValueError, match="count twice"):
        own.ewc.attach(own)


@pytest.mark.parametrize("alone", [lambda e, m: e, lambda e, m: (e, m), lambda e, m: e.hold])
def test_an_ewc_alone_is_not_copied(alone: Callable[[EWC, nn.Module], Any]) -> None:
    model = net()
    ewc = EWC(model, ones(model), strength=2.0)
    with pytest.raises(TypeError, match=r"deepcopy\(\(model, ewc\)\).*ewc\.on"):
        copy.deepcopy(alone(ewc, model))
    twin = copy.deepcopy(model)
    copied = ewc.on(twin)
    move(twin)
    assert float(copied.penalty()) == pytest.approx(38)
    assert float(ewc.penalty()) == 0


def test_an_ewc_is_not_pickled(tmp_path: Any) -> None:
    model = net()
    ewc = EWC(model, ones(model), strength=2.0)
    optimizer = AdamWEWC(model.parameters(), ewc=ewc)
    for what in (ewc, (model, ewc), optimizer):
        with pytest.raises(TypeError, match=r"state_dict\(\) or save"):
            pickle.dumps(what)
        with pytest.raises(TypeError, match=r"state_dict\(\) or save"):
            torch.save(what, tmp_path / "x")


# --- names -------------------------------------------------------------------------------------


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "plain": lambda m: m,
    "DataParallel": nn.DataParallel,
    "compile": torch.compile,
    "DataParallel of compile": lambda m: nn.DataParallel(torch.compile(m)),
    "compile of DataParallel": lambda m: torch.compile(nn.DataParallel(m)),
}


@pytest.mark.parametrize("mine", WRAPPERS)
@pytest.mark.parametrize("theirs", WRAPPERS)
def test_wrappers_on_either_side(mine: str, theirs: str) -> None:
    names = [n for n, _ in WRAPPERS[theirs](net()).named_parameters()]
    fisher = {n: torch.ones_like(p) for n, p in zip(names, net().parameters(), strict=True)}
    model = WRAPPERS[mine](net())
    ewc = EWC(model, fisher, strength=2.0)
    move(model)
    assert float(ewc.penalty()) == pytest.approx(38)
    assert set(ewc.anchor) == {"0.weight", "0.bias", "2.weight", "2.bias"}


@pytest.mark.parametrize(
    "pattern",
    ["inner._orig_mod.{}", "module.inner.{}", "inner.module.{}", "base_model.model.inner.{}"],
)
def test_wrappers_in_the_middle(pattern: str) -> None:
    model = Outer(net())
    fisher = {pattern.format(n): torch.ones_like(p) for n, p in net().named_parameters()}
    ewc = EWC(model, fisher, strength=2.0)
    move(model)
    assert float(ewc.penalty()) == pytest.approx(38)
    wrapped = Outer(torch.compile(net()))
    assert len(EWC(wrapped, ones(Outer(net())), strength=1.0).parameters()) == 4


@pytest.mark.parametrize(
    ("old", "rename"),
    [
        ("module.{}", {"module": ""}),
        ("module.{}", {"module.": ""}),
        ("student.{}", {"student": ""}),
        ("a.b.{}", {"a.b": ""}),
        ("{}", {"0": "0", "": ""}),
        ("old.{}", {"old.0": "0", "old.2": "2."}),
    ],
)
def test_rename_takes_a_module_away(old: str, rename: dict[str, str]) -> None:
    model = net()
    fisher = {old.format(n): torch.ones_like(p) for n, p in model.named_parameters()}
    ewc = EWC(model, fisher, strength=2.0, rename=rename)
    move(model)
    assert float(ewc.penalty()) == pytest.approx(38)


def test_rename_puts_a_module_in_front() -> None:
    model = Outer(net())
    ewc = EWC(model, ones(net()), strength=2.0, rename={"": "inner"})
    move(model)
    assert float(ewc.penalty()) == pytest.approx(38)


def test_a_modules_own_name_is_no_wrapper() -> None:
    """`module` and `base_layer` are the model's own attributes here, beside the bare ones."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3))
            self.module = nn.Linear(2, 2)

    model = Own()
    fisher = {"weight": torch.ones(3), "module.weight": 10 * torch.ones(2, 2)}
    ewc = EWC(model, fisher, strength=2.0)
    move(model)
    assert float(ewc.penalty()) == pytest.approx(43)
    again = EWC(model, dict(ewc.fisher), strength=2.0)
    assert set(again.parameters()) == {"weight", "module.weight"}
    with pytest.raises(ValueError, match=r"may be weight or module\.weight"):
        EWC(model, {"_orig_mod.weight": torch.ones(3)}, strength=1.0)


# --- hashes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimated", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trained", [torch.float32, torch.bfloat16, torch.float16])
def test_a_checkpoint_is_known_in_another_dtype(
    estimated: torch.dtype, trained: torch.dtype
) -> None:
    base = [(n, p.detach()) for n, p in causal_lm("llama").named_parameters()]
    other = [(n, p + 1e-2 * torch.randn_like(p)) for n, p in base]
    of = weights_hash((n, p.to(estimated)) for n, p in base)
    # the two halves have no more of each other than their common checkpoint
    known = torch.float32 in (estimated, trained) or estimated == trained
    assert same_weights(of, weights_hash((n, p.to(trained)) for n, p in base)) == known
    assert not same_weights(of, weights_hash((n, p.to(trained)) for n, p in other))


def test_a_hash_of_an_older_file_is_compared_in_bfloat16() -> None:
    own = weights_hash([("w", torch.randn(10))])
    assert same_weights(own.partition("-")[0], own)
    assert not same_weights("0" * 16, own)
    assert not same_weights(None, own)


def test_half_precision_loads_are_accepted_and_others_refused() -> None:
    model = causal_lm("llama").eval()
    ids = torch.randint(3, 60, (2, 6))
    fisher = fasttax.estimate_fisher(model, [ids], labels="true", progress=False)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        loaded = copy.deepcopy(model).to(dtype)
        EWC(loaded, fisher, strength=1.0)
        move(loaded, 0.1)
        with pytest.raises(ValueError, match="hash"):
            EWC(loaded, fisher, strength=1.0)
