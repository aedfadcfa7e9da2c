"""The demo's course: Fisher, four runs, strengths chosen on validation items, measures, timing.

Everything found goes into one JSON-ready dictionary, saved after each stage, so that an interrupted
demo leaves what was done.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import fasttax
from fasttax._base import files
from fasttax.demo import environment, folders, models, verdicts
from fasttax.demo.measure import Bench, Vectors, difference, mean_and_error, summary
from fasttax.demo.settings import Settings
from fasttax.demo.texts import Item, collate, general_text, pairs, passages, read_alignment
from fasttax.demo.timing import measure_step
from fasttax.demo.training import Recipe, reset, train, training_batches

RUNS = ("plain", "kl", "ewc", "both")


class Experiment:
    """State of one demo. `results` is what results.json holds."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.begin = time.perf_counter()
        self.results: dict[str, Any] = {
            "format": 1,
            "status": "running",
            "settings": settings.as_json(),
            "machine": environment.machine(),
            "versions": environment.versions(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "stages": [],
            "candidates": [],
            "runs": {},
        }
        self.vectors: dict[str, Vectors] = {}
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    # --- stages -----------------------------------------------------------------------------------

    def run(self) -> None:
        """All stages in order; each one's results are saved as it ends."""
        with self._stage("model and texts"):
            self._load()
        with self._stage("diagonal Fisher of the base model on general text"):
            fisher = self._fisher()
        self.ewc = fasttax.EWC(self.model, fisher, strength=0.0)
        with self._stage("base model, before training"):
            self._measure("base", Recipe("base"), [])
        with self._stage("plain fine-tuning"):
            curve, self.plain_validation = self._try(Recipe("plain"))
            self._measure("plain", Recipe("plain"), curve)
        chosen = {}
        for family, strengths in (
            ("kl", self.settings.kl_strengths),
            ("ewc", self.settings.ewc_strengths),
        ):
            chosen[family] = self._choose(family, strengths)
        both = Recipe("both", kl=chosen["kl"], ewc=chosen["ewc"])
        with self._stage(f"fine-tuning with both: {both.label}"):
            curve, _ = self._try(both)
            self._measure("both", both, curve)
        with self._stage("time that a step's parts take"):
            s = self.settings
            self.results["timing"] = measure_step(
                self.model, self.reference, self.ewc, self.batches, both.ewc, s.lr, s.timing_rounds
            )
        self.finish("complete")

    def finish(self, status: str) -> None:
        """Adds the verdicts on what is there, and saves; `status` is "complete" or why not."""
        self.results["status"] = status
        self.results["seconds"] = time.perf_counter() - self.begin
        self.results["verdicts"] = verdicts.sentences(self.results)
        self.save()

    def save(self) -> None:
        """Writes results.json whole, over the one before."""
        text = json.dumps(self.results, indent=1, allow_nan=False, default=str)
        files.whole(
            "demo",
            self.settings.output / "results.json",
            lambda path: path.write_text(text + "\n", encoding="utf-8"),
        )

    @contextlib.contextmanager
    def _stage(self, title: str) -> Iterator[None]:
        begin = time.perf_counter()
        print(f"[{begin - self.begin:4.0f} s] {title}", flush=True)
        yield
        self.results["stages"].append({"title": title, "seconds": time.perf_counter() - begin})
        self.save()

    def _say(self, text: str) -> None:
        print(f"         {text}", flush=True)

    # --- what the stages do -----------------------------------------------------------------------

    def _load(self) -> None:
        s = self.settings
        general, rows = general_text(), read_alignment(s.alignment)
        loaded = models.load(s, self.device, general["fisher"])
        self.model, codec = loaded.model, loaded.codec
        self.codec = codec
        self.reference = models.copy_of(self.model)
        aligned, cut = {}, 0
        for split, part in rows.items():
            aligned[split], n = pairs(part, codec, s.length)
            cut += n
        self.batches = training_batches(
            [p.good for p in aligned["train"]], s.steps, s.batch_size, s.seed, codec, self.device
        )
        self.fisher_items = passages(general["fisher"], codec, s.length, s.fisher_examples, s.seed)
        self.validation = Bench(
            aligned["validation"],
            passages(general["validation"], codec, s.length, s.validation_passages, s.seed),
            codec,
            full=False,
        )
        self.test = Bench(
            aligned["test"],
            passages(general["test"], codec, s.length, s.test_passages, s.seed),
            codec,
            full=True,
        )
        parameters = sum(p.numel() for p in self.model.parameters())
        self.results["model"] = {
            "name": loaded.name,
            "origin": loaded.origin,
            "parameters": parameters,
            "device": str(self.device),
            "hash": files.weights_hash(self.reference.named_parameters()),
        }
        self.results["data"] = {
            "alignment": {
                "file": str(s.alignment),
                "sha256": hashlib.sha256(s.alignment.read_bytes()).hexdigest(),
                "cut_answers": cut,
                **{split: len(part) for split, part in rows.items()},
            },
            "general": {
                "source": "pydoc_data.topics of this Python",
                "topics": {part: sorted(texts) for part, texts in general.items()},
                "passages": {
                    "fisher": s.fisher_examples,
                    "validation": s.validation_passages,
                    "test": s.test_passages,
                },
            },
        }
        self._say(
            f"{loaded.name}, {parameters / 1e6:.1f} M parameters, on {self.device}; "
            f"{len(rows['train'])} training answers, {len(rows['test'])} held out"
        )

    def _fisher(self) -> fasttax.FisherEstimate:
        s, begin = self.settings, time.perf_counter()
        ids = hashlib.sha256(str([item.ids for item in self.fisher_items]).encode()).hexdigest()
        key = hashlib.sha256(
            f"{self.results['model']['hash']} {ids} sample example {s.seed} "
            f"{fasttax.__version__}".encode()
        ).hexdigest()[:16]
        path = None if s.cache is None else s.cache / f"fisher-{key}.safetensors"
        reused = path is not None and path.is_file()
        if path is not None and reused:
            fisher = fasttax.FisherEstimate.load(path)
            self._say(f"reused from {path}")
        else:
            batches = (
                self._batch(self.fisher_items[i : i + s.fisher_batch])
                for i in range(0, len(self.fisher_items), s.fisher_batch)
            )
            generator = torch.Generator(self.device).manual_seed(s.seed)
            fisher = fasttax.estimate_fisher(
                self.model,
                batches,
                max_examples=s.fisher_examples,
                progress=sys.stderr.isatty(),
                generator=generator,
            )
            if path is not None:
                folders.folder(path.parent, "the cache folder")
                fisher.save(path)
                self._say(f"kept in {path}: the next demo reuses it")
        self.results["fisher"] = {
            "reused": reused,
            "path": None if path is None else str(path),
            "seconds": time.perf_counter() - begin,
            "metadata": fisher.metadata,
        }
        return fisher

    def _batch(self, items: Sequence[Item]) -> dict[str, Tensor]:
        batch = collate(items, self.codec.pad_id, self.device)
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    def _try(self, recipe: Recipe) -> tuple[list[dict[str, float]], Vectors]:
        curve = train(
            self.model,
            self.reference,
            self.ewc,
            self.batches,
            recipe,
            self.settings.lr,
            f"fine-tuning, {recipe.label}",
        )
        found = self.validation.measure(self.model, recipe.label)
        self._say(
            f"{recipe.label}: validation answer NLL {found['answer_nll'].mean():.3f}, general NLL "
            f"{found['general_nll'].mean():.3f}"
        )
        return curve, found

    def _choose(self, family: str, strengths: Sequence[float]) -> float:
        """Trains with each candidate and measures the best by validation on the test items."""
        tried: list[dict[str, Any]] = []
        best: dict[str, Any] = {}
        for strength in strengths:
            recipe = Recipe(family, **{family: strength})
            with self._stage(f"candidate {recipe.label}"):
                curve, found = self._try(recipe)
            means = {name: mean_and_error(values) for name, values in found.items()}
            tried.append(
                {"family": family, "strength": strength, "validation": means, "chosen": False}
            )
            base, plain = (
                self._validation_mean(v) for v in (self.base_validation, self.plain_validation)
            )
            index, reason = verdicts.choose(tried, base, plain, self.settings.keep_gain)
            if index == len(tried) - 1:
                best = {
                    "recipe": recipe,
                    "curve": curve,
                    "weights": [p.detach().clone() for p in self.model.parameters()],
                }
            best["reason"] = reason
            self.results["candidates"] = [
                c for c in self.results["candidates"] if c["family"] != family
            ] + tried
        tried[index]["chosen"] = True
        tried[index]["reason"] = best["reason"]
        self._say(f"chosen on the validation split: {best['recipe'].label} ({best['reason']})")
        with self._stage(f"measuring the chosen run, {best['recipe'].label}"):
            with torch.no_grad():
                for p, kept in zip(self.model.parameters(), best["weights"], strict=True):
                    p.copy_(kept)
            self._measure(family, best["recipe"], best["curve"])
        chosen: float = tried[index]["strength"]
        return chosen

    @staticmethod
    def _validation_mean(vectors: Vectors) -> dict[str, float]:
        return {name: float(values.mean()) for name, values in vectors.items()}

    def _measure(self, name: str, recipe: Recipe, curve: list[dict[str, float]]) -> None:
        if name == "base":
            reset(self.model, self.reference)
            self.base_validation = self.validation.measure(self.model, "base")
            self.results["validation"] = {"base": self._validation_mean(self.base_validation)}
        elif name == "plain":
            self.results["validation"]["plain"] = self._validation_mean(self.plain_validation)
        vectors = self.test.measure(self.model, name)
        self.vectors[name] = vectors
        metrics: dict[str, Any] = summary(vectors)
        metrics["fisher_distance"] = {"mean": float(self.ewc.distance().total), "se": None, "n": 1}
        row: dict[str, Any] = {
            "label": recipe.label if name != "base" else "base, untrained",
            "kl_strength": recipe.kl,
            "ewc_strength": recipe.ewc,
            "metrics": metrics,
            "curve": curve,
            "train_seconds": sum(c["seconds"] for c in curve),
        }
        for other in ("base", "plain"):
            if other in self.vectors and other != name:
                row[f"against_{other}"] = difference(vectors, self.vectors[other])
        if name == "base":
            self.results["base"] = row
        else:
            self.results["runs"][name] = row
        shown = {
            k: metrics[k]["mean"] for k in ("answer_nll", "preference", "perplexity", "last_word")
        }
        self._say(
            f"test: answer NLL {shown['answer_nll']:.3f}, preference {shown['preference']:.0%}, "
            f"perplexity {shown['perplexity']:.2f}, "
            f"last word {shown['last_word']:.1%}"
        )
