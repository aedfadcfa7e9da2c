"""What fasttax does with the TRL and transformers that are installed, each thing tried out.

    python -m tests.integrations.features OUT.json [WORDS]

WORDS choose features that have one of them in their name. Each is two runs of two or more steps,
one of them by another way to the same numbers; `tests.integrations.matrix` makes a table of several
environments' answers.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
import trl

from fasttax.integrations.transformers import attach
from fasttax.integrations.trl import CHOICES, FullKL, patch
from tests.tools import launched, tiny_lm, trl_runs, value_trainers
from tests.tools.full_kl_runs import BETA, make, oracle
from tests.tools.trainer_runs import difference, train
from tests.tools.value_trainers import Hand, by_hand, held

ROUNDING = 2e-6
MOVED = 3e-5  # what is added moves the weights by more
TRAINERS = ("sft", "dpo", "kto", "grpo", "rloo")
OK, REFUSED, ABSENT, THEIRS, FAILED = "ok", "refused", "absent", "theirs", "failed"


class Refused(Exception):
    """By fasttax, before training."""


class Absent(Exception):
    """This TRL has no such trainer."""


class Theirs(Exception):
    """The trainer does not run by itself."""


@contextmanager
def refusable() -> Iterator[None]:
    """What fasttax raises here is its refusal."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError) as error:
        raise Refused(str(error)) from error


@contextmanager
def theirs() -> Iterator[None]:
    """What is raised here is of TRL and transformers alone."""
    try:
        yield
    except Exception as error:
        of_trl = isinstance(error, ModuleNotFoundError) and str(error.name).startswith("trl.")
        if of_trl or (isinstance(error, AttributeError) and "module trl" in str(error)):
            raise Absent(str(error)) from error
        raise Theirs(f"{type(error).__name__}: {error}") from error


@contextmanager
def runnable() -> Iterator[None]:
    """TRL 1.15's own ops are Triton's alone: fasttax's are in their place on a CPU."""
    if trl.__version__.startswith("1.15."):
        with patch(quiet=True):
            yield
    else:
        yield


def same(ours: Any, wanted: Any, plain: Any) -> None:
    """The numbers are those of the other way, and not those of a run without."""
    error, effect = (difference(ours.model, t.model) for t in (wanted, plain))
    if not error <= ROUNDING:
        raise AssertionError(f"parameters differ by {error:.1e}")
    if not effect > MOVED:
        raise AssertionError(f"parameters differ by {effect:.1e} from a run without it")


# --- features -------------------------------------------------------------------------------------


def patched(name: str, folder: Path) -> None:
    """`patch(name)`: the same run by fasttax's ops."""
    with theirs():
        trl_runs.classes(name)
    with refusable():
        patch(name, quiet=True).undo()
    if trl.__version__.startswith("1.15.") and name in (*TRAINERS, "distillation"):
        return  # whose own op needs a GPU: patch has compared a few tokens in Triton's interpreter
    with theirs():
        plain = train(trl_runs.make(name, folder))
    with patch(name, quiet=True) as handle:
        ours = train(trl_runs.make(name, folder))
        if not handle.calls:
            raise AssertionError("fasttax's op was not called")
    error = difference(ours.model, plain.model)
    if not error <= 3e-5:
        raise AssertionError(f"parameters differ by {error:.1e}")


def full_kl(name: str, folder: Path) -> None:
    """`FullKL`: the KL in the loss by a second forward and log-softmaxes."""
    with theirs():
        plain, ours = train(make(name, folder)), make(name, folder)
    with refusable():
        full = FullKL(ours, tiny_lm.model(1), BETA)
    with full:
        train(ours)
    wanted = make(name, folder, base=oracle(name, "policy_ref"))
    wanted.reference = tiny_lm.model(1)
    same(ours, train(wanted), plain)


def full_kl_of(make_one: Callable[[Path], Any], folder: Path) -> None:
    """`FullKL` in a trainer that it does not serve: refused as it is made."""
    with theirs():
        made = make_one(folder)
    with refusable():
        FullKL(made, tiny_lm.model(1), BETA)
    raise AssertionError("it was not refused")


def ewc_in(make_one: Callable[..., Any], folder: Path, **changes: Any) -> None:
    """`attach(ewc=)`: the gradient added by hand before the optimizer's step."""
    with theirs():
        plain = train(make_one(folder, **changes))
        ours, wanted = make_one(folder, **changes), make_one(folder, **changes)
    with refusable():
        handle = attach(ours, ewc=held(ours.model)[0])
    with handle:
        train(ours)
    if not any("ewc/penalty" in entry for entry in ours.state.log_history):
        raise AssertionError("ewc/penalty was not logged")
    wanted.add_callback(Hand())
    same(ours, train(wanted), plain)


def ewc_in_ppo(folder: Path) -> None:
    """The same on the optimizer, which PPO steps in a loop of its own."""
    with theirs():
        plain = train(value_trainers.ppo(folder))
        ours, wanted = value_trainers.ppo(folder), value_trainers.ppo(folder)
    with refusable():
        attach(ours, ewc=held(ours.policy_model)[0])
    train(ours)
    by_hand(wanted.policy_model, wanted.optimizer.optimizer)
    same(ours, train(wanted), plain)


def replayed(folder: Path) -> None:
    """`attach(replay=)`: the loss of other text added to the loss."""
    rows = tiny_lm.ids(2, seed=9)

    class WithReplay(trl.SFTTrainer):
        def training_step(self, *given: Any, **others: Any) -> Any:
            loss = super().training_step(*given, **others)
            (self.model(input_ids=rows, labels=rows).loss / 2).backward()  # of two micro-batches
            return loss

    with theirs():
        plain, ours = train(make("sft", folder)), make("sft", folder)
    with refusable():
        handle = attach(ours, replay={"loader": [rows]})
    with handle:
        train(ours)
    same(ours, train(make("sft", folder, base=WithReplay)), plain)


def projected(folder: Path) -> None:
    """`attach(project=)`: a step of SGD leaves the loss of other text, to first order."""
    rows = tiny_lm.ids(2, seed=9)

    def step(with_it: bool) -> float:
        made = make("sft", folder, max_steps=1, learning_rate=1e-3, max_grad_norm=0.0)
        if with_it:
            with refusable():
                attach(made, project={"general": [rows], "directions": 1})
        start = {n: p.detach().clone() for n, p in made.model.named_parameters()}
        made.model(input_ids=rows, labels=rows).loss.backward()
        slope = {n: p.grad.clone() for n, p in made.model.named_parameters()}
        made.model.zero_grad()
        train(made)
        moves = [(p.detach() - start[n], slope[n]) for n, p in made.model.named_parameters()]
        along = sum(float((m * g).sum()) for m, g in moves)
        sizes = [float(torch.cat([pair[i].flatten() for pair in moves]).norm()) for i in (0, 1)]
        return abs(along) / (sizes[0] * sizes[1])

    with theirs():
        plain = step(False)
    ours = step(True)
    if not (ours < 1e-4 and plain > 10 * ours):
        raise AssertionError(f"cosine {ours:.1e}, without it {plain:.1e}")


def plain_trainer(folder: Path, **changes: Any) -> Any:
    """transformers' own Trainer."""
    return launched.trainer(folder, use_cpu=True, **changes)


def kl_in_trainer(folder: Path) -> None:
    """`FullKL` in transformers' own Trainer."""

    def with_kl(made: Any) -> Any:
        own, ref = made.compute_loss, tiny_lm.model(1)

        def compute_loss(model: Any, inputs: Any, *rest: Any, **others: Any) -> Any:
            loss, given = own(model, inputs, *rest, **others), dict(inputs)
            tokens = given.pop("labels")[:, 1:] != -100
            p, q = (m(**given).logits[:, :-1].log_softmax(-1) for m in (model, ref))
            kl = (p.exp() * (p - q.detach())).sum(-1)[tokens].sum()
            return loss + BETA * kl / others["num_items_in_batch"]

        made.compute_loss = compute_loss
        return made

    with theirs():
        plain, ours = train(plain_trainer(folder)), plain_trainer(folder)
    with refusable():
        full = FullKL(ours, tiny_lm.model(1), BETA)
    with full:
        train(ours)
    same(ours, train(with_kl(plain_trainer(folder))), plain)


UNCLIPPED: dict[str, Any] = {"max_grad_norm": 0.0}
FEATURES: dict[str, Callable[[Path], None]] = {
    **{f"patch: {CHOICES[n]}": partial(patched, n) for n in CHOICES},
    "FullKL: transformers.Trainer": kl_in_trainer,
    **{f"FullKL: {CHOICES[n]}": partial(full_kl, n) for n in TRAINERS},
    "FullKL: RewardTrainer": partial(full_kl_of, value_trainers.reward),
    "FullKL: PPOTrainer": partial(full_kl_of, value_trainers.ppo),
    "EWC: transformers.Trainer": partial(ewc_in, plain_trainer, **UNCLIPPED),
    **{f"EWC: {CHOICES[n]}": partial(ewc_in, partial(make, n), **UNCLIPPED) for n in TRAINERS},
    "EWC: RewardTrainer": partial(ewc_in, value_trainers.reward, **UNCLIPPED),
    "EWC: PPOTrainer": ewc_in_ppo,
    "replay: SFTTrainer": replayed,
    "projection: SFTTrainer": projected,
}
OWN_PATCH = "patch: "


def tried(name: str) -> tuple[str, str]:
    """(what came of a feature, why)."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            if name.startswith(OWN_PATCH):
                FEATURES[name](Path(folder))
            else:
                with runnable():
                    FEATURES[name](Path(folder))
    except Refused as error:
        return REFUSED, str(error)
    except Absent as error:
        return ABSENT, str(error)
    except Theirs as error:
        return THEIRS, str(error)
    except Exception as error:
        traceback.print_exc()
        return FAILED, f"{type(error).__name__}: {error}"
    return OK, ""


def main(arguments: list[str]) -> None:
    """Tries the features and writes what came of them."""
    path, words = Path(arguments[0]), arguments[1:]
    torch.set_num_threads(1)
    chosen = [n for n in FEATURES if not words or any(w in n for w in words)]
    versions = {"trl": trl.__version__, "transformers": transformers.__version__}
    path.write_text(
        json.dumps({"versions": versions, "features": {name: tried(name) for name in chosen}})
    )


if __name__ == "__main__":
    main(sys.argv[1:])
