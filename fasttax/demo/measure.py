"""What is measured of a model, item by item, and when a difference between two models counts.

Every metric is a vector over held-out items (answers or passages), so that two models are compared
in pairs over the same items and each mean has a standard error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

import fasttax
from fasttax.demo.codecs import Codec
from fasttax.demo.progress import bar as progress_bar
from fasttax.demo.texts import Item, Pair, collate

BATCH = 8


@dataclass
class Scores:
    """Of each item's scored tokens.

    Negative log-likelihood, whether the greedy choice was right, and KL to the base.
    """

    nll: list[Tensor]
    hit: list[Tensor]
    kl: list[Tensor]


@dataclass
class ItemSet:
    """Items to score, and the base model's logits at the scored tokens.

    The logits are kept from the base's own turn, so that KL costs no second forward.
    """

    items: Sequence[Item]
    keep_base: bool
    base: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def score(self, model: PreTrainedModel, codec: Codec, bar: tqdm) -> Scores:
        """Scores every item with the model; the first model that is scored is the base."""
        model.eval()
        # alike lengths together: little padding
        order = sorted(range(len(self.items)), key=lambda i: len(self.items[i].ids))
        first_time = self.keep_base and not self.base
        empty = torch.empty(0)
        result = Scores([empty] * len(order), [empty] * len(order), [empty] * len(order))
        for number, at in enumerate(range(0, len(order), BATCH)):
            chosen = order[at : at + BATCH]
            batch = collate([self.items[i] for i in chosen], codec.pad_id, model.device)
            logits = model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                use_cache=False,
            ).logits
            rows = logits[:, :-1][batch["scored"][:, 1:]].float()
            targets = batch["input_ids"][:, 1:][batch["scored"][:, 1:]]
            if first_time:
                self.base.append(rows)
            kl = (
                fasttax.token_kl(rows, self.base[number])
                if self.keep_base
                else torch.zeros(len(rows))
            )
            counts = batch["scored"].sum(1).tolist()
            parts = (
                F.cross_entropy(rows, targets, reduction="none"),
                rows.argmax(-1) == targets,
                kl,
            )
            for kept, values in zip((result.nll, result.hit, result.kl), parts, strict=True):
                for i, value in zip(chosen, values.cpu().split(counts), strict=True):
                    kept[i] = value
            bar.update(len(chosen))
        return result


METRICS = {  # name: (label, which direction is better: -1 lower, +1 higher, 0 neither)
    "answer_nll": ("answer NLL, nats a token", -1),
    "preference": ("preference accuracy", 1),
    "general_nll": ("general text NLL, nats a token", -1),
    "last_word": ("last-word accuracy", 1),
    "kl_general": ("KL to base, general text", -1),
    "kl_answers": ("KL to base, answers", 0),
}
Vectors = dict[str, Tensor]


class Bench:
    """Held-out items: the good and bad answers, and general passages."""

    def __init__(self, pairs: Sequence[Pair], passages: Sequence[Item], codec: Codec) -> None:
        self.codec = codec
        self.passages = passages
        self.general = ItemSet(passages, keep_base=True)
        self.good = ItemSet([p.good for p in pairs], keep_base=True)
        self.bad = ItemSet([p.bad for p in pairs], keep_base=False)

    def measure(self, model: PreTrainedModel, name: str, *, preference: bool) -> Vectors:
        """Metric -> a value for each item; `preference` reads the bad answers, too."""
        total = len(self.general.items) + (1 + preference) * len(self.good.items)
        with progress_bar(total=total, desc=f"measuring {name}", unit="item") as bar:
            good = self.good.score(model, self.codec, bar)
            general = self.general.score(model, self.codec, bar)
            # token t of a passage is scored at t - 1, since a passage's first token is not
            # predicted
            right = [
                [bool(hit[a - 1 : b - 1].all()) for a, b in p.words]
                for p, hit in zip(self.passages, general.hit, strict=True)
            ]
            found = {
                "answer_nll": _means(good.nll),
                "general_nll": _means(general.nll),
                "last_word": torch.tensor(
                    [sum(r) / len(r) for r in right if r], dtype=torch.float64
                ),
                "kl_general": _means(general.kl),
                "kl_answers": _means(good.kl),
            }
            if preference:
                bad = self.bad.score(model, self.codec, bar)
                found["preference"] = (_means(good.nll) < _means(bad.nll)).double()
        return found


def _means(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([v.double().mean() for v in values])


def mean_and_error(values: Tensor) -> dict[str, float]:
    """Mean over items and its standard error."""
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return {"mean": float(values.mean()), "se": error, "n": len(values)}


def summary(vectors: Vectors) -> dict[str, dict[str, float]]:
    """Means and errors by metric, with the perplexity of the mean NLL."""
    result = {name: mean_and_error(values) for name, values in vectors.items()}
    nll = result["general_nll"]
    perplexity = math.exp(nll["mean"])
    # the error of exp(NLL) to first order
    result["perplexity"] = {"mean": perplexity, "se": perplexity * nll["se"], "n": nll["n"]}
    return result


def difference(ours: Vectors, theirs: Vectors) -> dict[str, dict[str, float | str]]:
    """Ours - theirs in pairs over the same items, with a verdict.

    "better" or "worse" only beyond two standard errors.
    """
    result: dict[str, dict[str, float | str]] = {}
    for name, (_, direction) in METRICS.items():
        if name not in ours or name not in theirs:
            continue
        paired = mean_and_error(ours[name] - theirs[name])
        result[name] = {**paired, "verdict": _verdict(paired, direction)}
    return result


def _verdict(paired: dict[str, float], direction: int) -> str:
    """What a paired change says; `direction` is 1 or -1 for what is better, 0 for neither."""
    if not abs(paired["mean"]) > 2 * paired["se"]:
        return "same"
    sign = direction * paired["mean"]
    if sign == 0:
        return "different"
    return "better" if sign > 0 else "worse"
