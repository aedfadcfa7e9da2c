"""The demo's course: Fishers, a plain run, every method's grid, seed by seed, then a step's times.

Everything found goes into one JSON-ready dictionary, saved after each stage, so that an interrupted
demo leaves what was done.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import fasttax
from fasttax._base import devices, files, json_results
from fasttax.demo import environment, models, verdicts
from fasttax.demo.compare import Comparison
from fasttax.demo.measure import Bench, Vectors, difference, summary
from fasttax.demo.methods import MERGE, STOP, Recipe, title, trained
from fasttax.demo.settings import DemoError, Settings, make_folder
from fasttax.demo.texts import Item, collate, general_text, pairs, passages, read_alignment
from fasttax.demo.timing import measure_step
from fasttax.demo.training import Batch, Diverged, reset, train, training_batches

# what EWC holds, and what estimate_fisher calls it; Any: its overloads take no union
FISHERS: dict[str, Any] = {"ewc": "diagonal", "kron": "kron"}
HELD_OUT = ("validation", "test")


class Experiment:
    """State of one demo. `results` is what results.json holds."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.begin = time.perf_counter()
        self.device = devices.named("fasttax demo", settings.device)
        self.results: dict[str, Any] = {
            "format": 2,
            "status": "running",
            "settings": settings.as_json(),
            "machine": environment.machine(self.device),
            "versions": environment.versions(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "stages": [],
            "fishers": {},
            "points": [],
            "failures": [],
        }
        self.ewcs: dict[str, fasttax.EWC] = {}

    # --- stages -----------------------------------------------------------------------------------

    def run(self) -> None:
        """All stages in order; each one's results are saved as it ends."""
        with self._stage("model and texts"):
            self._load()
        # the diagonal one measures the distance of every run
        for name in FISHERS if "kron" in self.settings.grids else ("ewc",):
            with self._stage(f"{FISHERS[name]} Fisher of the base model on general text"):
                self.ewcs[name] = fasttax.EWC(self.model, self._fisher(name), strength=0.0)
        with self._stage("base model, before training"):
            reset(self.model, self.reference)
            self.base = self.bench.measure(self.model, "base", preference=True)
            self.results["base"] = {"metrics": self._metrics(self.base)}
        for seed in range(self.settings.seed, self.settings.seed + self.settings.seeds):
            self._seed(seed)
        with self._stage("time that a step's parts take"):
            s = self.settings
            self.results["timing"] = measure_step(
                self.model, self.reference, self.ewcs["ewc"], self.answers, s.lr, s.timing_rounds
            )
        self.finish("complete")

    def finish(self, status: str) -> None:
        """Adds the verdicts on what is there, and saves; `status` is "complete" or why not."""
        self.results["status"] = status
        self.results["seconds"] = time.perf_counter() - self.begin
        self.results["processor_seconds"] = time.process_time()
        self.results["comparison"] = Comparison(self.results["points"]).as_json()
        self.results["verdicts"] = verdicts.sentences(self.results)
        self.save()

    def save(self) -> None:
        """Writes results.json whole, over the one before."""
        text = json_results.text_of(self.results, default=str)
        json_results.put("demo", str(self.settings.output / "results.json"), text)

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        print(f"[{begin - self.begin:4.0f} s] {name}", flush=True)
        yield
        self.results["stages"].append({"title": name, "seconds": time.perf_counter() - begin})
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
        held_out = [row for split in HELD_OUT for row in rows[split]]
        if len(held_out) > s.test_answers:
            held_out = random.Random(s.seed).sample(held_out, s.test_answers)
        training, cut = pairs(rows["train"], codec, s.length)
        test, cut_too = pairs(held_out, codec, s.length)
        self.training = [p.good for p in training]
        self.passages = passages(general["fisher"], codec, s.length, s.fisher_examples, s.seed)
        unseen = {**general["validation"], **general["test"]}
        self.bench = Bench(test, passages(unseen, codec, s.length, s.test_passages, s.seed), codec)
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
                "cut_answers": cut + cut_too,
                "train": len(training),
                "held_out": len(test),
            },
            "general": {
                "source": "pydoc_data.topics of this Python",
                "fisher": {"topics": sorted(general["fisher"]), "passages": s.fisher_examples},
                "held_out": {"topics": sorted(unseen), "passages": s.test_passages},
            },
        }
        self._say(
            f"{loaded.name}, {parameters / 1e6:.1f} M parameters, on {self.device}; "
            f"{len(training)} training answers, {len(test)} held out"
        )

    def _fisher(self, name: str) -> fasttax.FisherEstimate | fasttax.KroneckerEstimate:
        s, begin, structure = self.settings, time.perf_counter(), FISHERS[name]
        ids = hashlib.sha256(str([item.ids for item in self.passages]).encode()).hexdigest()
        key = hashlib.sha256(
            f"{self.results['model']['hash']} {ids} {structure} sample example {s.seed} "
            f"{fasttax.__version__}".encode()
        ).hexdigest()[:16]
        path = None if s.cache is None else s.cache / f"fisher-{structure}-{key}.safetensors"
        reused = path is not None and path.is_file()
        kind = fasttax.FisherEstimate if name == "ewc" else fasttax.KroneckerEstimate
        fisher: fasttax.FisherEstimate | fasttax.KroneckerEstimate
        if path is not None and reused:
            try:
                fisher = kind.load(path)
            except (OSError, ValueError) as error:
                raise DemoError(f"{error}; delete that file, or add --no-cache") from None
            self._say(f"reused from {path}")
        else:
            batches = (
                self._batch(self.passages[i : i + s.fisher_batch])
                for i in range(0, len(self.passages), s.fisher_batch)
            )
            fisher = fasttax.estimate_fisher(
                self.model,
                batches,
                structure=structure,
                max_examples=s.fisher_examples,
                progress=sys.stderr.isatty(),
                generator=torch.Generator(self.device).manual_seed(s.seed),
            )
            if path is not None:
                make_folder(path.parent, "the cache folder")
                fisher.save(path)
                self._say(f"kept in {path}: the next demo reuses it")
        self.results["fishers"][structure] = {
            "reused": reused,
            "path": None if path is None else str(path),
            "seconds": time.perf_counter() - begin,
            "metadata": fisher.metadata,
        }
        return fisher

    def _batch(self, items: Sequence[Item]) -> dict[str, Tensor]:
        batch = collate(items, self.codec.pad_id, self.device)
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    def _batches(self, items: Sequence[Item], size: int, seed: int) -> list[Batch]:
        return training_batches(items, self.settings.steps, size, seed, self.codec, self.device)

    # --- one seed ---------------------------------------------------------------------------------

    def _seed(self, seed: int) -> None:
        """The plain run with its stops and merges, then every method's grid."""
        s = self.settings
        self.answers = self._batches(self.training, s.batch_size, seed)
        self.general = self._batches(self.passages, s.replay_batch, seed)
        with self._stage(f"seed {seed}: plain fine-tuning"):
            self._plain(seed)
        if s.grids.get(MERGE):
            with self._stage(f"seed {seed}: {title(MERGE)}"):
                self._merges(seed)
        for recipe in trained(s.grids):
            with self._stage(f"seed {seed}: {title(recipe.method)}, {recipe.label}"):
                try:
                    curve = self._train(recipe)
                except Diverged as error:
                    failure = {"method": recipe.method, "seed": seed, "label": recipe.label}
                    self.results["failures"].append({**failure, "reason": str(error)})
                    self._say(f"FAILED: {error}")
                    continue
                self._point(recipe.method, seed, recipe.label, curve)

    def _train(
        self, recipe: Recipe, at: dict[int, Callable[[], None]] | None = None
    ) -> list[dict[str, float]]:
        return train(
            self.model,
            self.reference,
            self.ewcs,
            self.answers,
            self.general,
            recipe,
            self.settings.lr,
            f"fine-tuning, {recipe.label}",
            at,
        )

    def _plain(self, seed: int) -> None:
        """Trains; its gain is known at the end, so that the stops' shares follow it."""
        stopped: list[tuple[int, Vectors, dict[str, Any]]] = []

        def stop(step: int) -> Callable[[], None]:
            def measure() -> None:
                vectors = self.bench.measure(self.model, f"step {step}", preference=False)
                stopped.append((step, vectors, self._metrics(vectors)))

            return measure

        steps = [int(at) for (at,) in self.settings.grids.get(STOP, ())]
        curve = self._train(Recipe(), {step: stop(step) for step in steps})
        self.plain = self.bench.measure(self.model, "plain", preference=True)
        self.gain = float((self.base["answer_nll"] - self.plain["answer_nll"]).mean())
        self._add("plain", seed, "plain", self.plain, self._metrics(self.plain), curve)
        for step, vectors, metrics in stopped:
            self._add(STOP, seed, f"step {step}", vectors, metrics, [])

    def _merges(self, seed: int) -> None:
        """Each alpha of merge.linear, in the model's own weights; the plain ones are copied."""
        aligned = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        base = {n: p.detach() for n, p in self.reference.named_parameters()}
        for (alpha,) in self.settings.grids[MERGE]:
            merged = fasttax.merge.linear(base, aligned, alpha, progress=False)
            with torch.no_grad():
                for name, p in self.model.named_parameters():
                    p.copy_(merged[name])
            self._point(MERGE, seed, f"alpha {alpha:g}", [])

    def _point(self, method: str, seed: int, label: str, curve: Sequence[dict[str, float]]) -> None:
        """Measures the model as it is."""
        vectors = self.bench.measure(self.model, label, preference=False)
        self._add(method, seed, label, vectors, self._metrics(vectors), curve)

    def _metrics(self, vectors: Vectors) -> dict[str, Any]:
        distance = float(self.ewcs["ewc"].distance().total)
        return {**summary(vectors), "fisher_distance": {"mean": distance, "se": None, "n": 1}}

    def _add(
        self,
        method: str,
        seed: int,
        label: str,
        vectors: Vectors,
        metrics: dict[str, Any],
        curve: Sequence[dict[str, float]],
    ) -> None:
        changes = vectors["general_nll"] - self.base["general_nll"]
        won = float((self.base["answer_nll"] - vectors["answer_nll"]).mean())
        row = {
            "method": method,
            "seed": seed,
            "label": label,
            "share": won / self.gain if self.gain > 0 else None,
            "tax": float(changes.mean()),
            "changes": [round(value, 6) for value in changes.tolist()],
            "metrics": metrics,
            "against_base": difference(vectors, self.base),
            "curve": {k: [round(c[k], 6) for c in curve] for k in (curve[0] if curve else ())},
            "train_seconds": sum(c["seconds"] for c in curve),
        }
        self.results["points"].append(row)
        share = "no gain" if row["share"] is None else f"share of the gain {row['share']:.2f}"
        self._say(
            f"{label}: {share}, tax {row['tax']:+.4f} nats a token (answer NLL "
            f"{metrics['answer_nll']['mean']:.3f}, perplexity {metrics['perplexity']['mean']:.2f})"
        )
