"""What a model card says of how a model was held to its base, out of the objects that held it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fasttax._base import checks, files, hub
from fasttax.ewc import EWC
from fasttax.fisher.hub import cell
from fasttax.fisher.kronecker import KroneckerEstimate
from fasttax.integrations.to_base import BothWays
from fasttax.tax import words
from fasttax.tax.checkpoints import Checkpoint
from fasttax.tax.measurements import Measurements

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

OP = "ModelCardSection"
BEGIN, END = "<!-- fasttax:begin -->", "<!-- fasttax:end -->"
TITLE = "## Held to its base by fasttax"
KINDS = {
    "policy_ref": "KL(model || base)",
    "ref_policy": "KL(base || model)",
    "jsd": "JSD(model, base)",
}
FISHER = ("labels", "unit", "examples", "tokens", "normalize")  # facts that are said of it
FILES = ("FisherEstimate", "KroneckerEstimate")
SAME = ("model_hash", "examples", "tokens", "labels")  # of an EWC's Fisher and of the file


class KLTerm(Protocol):
    """A FullKL."""

    kind: Any
    control: Any

    @property
    def beta(self) -> float:
        """The coefficient."""


@dataclass(frozen=True)
class ModelCardSection:
    """A section of a model card: method, strength, Fisher, KL to the base, alignment tax.

    Every number is an object's own. `str(section)` is Markdown, and `into(card)` puts it, with the
    results that the Hub's tables show, into a card of huggingface_hub's, in the place of an older
    one.

    Args:
        ewc: that held the weights.
        full_kl: the FullKL that was in the loss.
        fisher: where the EWC's Fisher can be had: a repository of the Hub, or a file, of which the
            name is said once it is seen to hold that Fisher.
        kl: by the name of a text, what `fasttax.tax.kl_both_ways` measured on it.
        report: a TaxReport.
        checkpoint: which of the report's checkpoints the card is of; its scores are then among the
            results.

    Raises:
        ValueError: nothing is given; a file of another Fisher than the EWC's; a checkpoint that the
            report does not have, or has twice.

    Example:
        >>> from huggingface_hub import ModelCard
        >>> both = fasttax.tax.kl_both_ways(model, base, loader)
        >>> section = fasttax.tax.ModelCardSection(ewc=ewc, fisher="me/fisher", kl={"web": both})
        >>> card = section.into(ModelCard("# My model"), model_name="my model")
        >>> "| EWC, strength |" in card.text
        True
    """

    ewc: EWC | None = None
    full_kl: KLTerm | None = None
    fisher: str | os.PathLike[str] | None = None
    kl: Mapping[str, BothWays] = field(default_factory=dict)
    report: Measurements | None = None
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        if self.ewc is None and self.full_kl is None and not self.kl and self.report is None:
            expected = "at least one of ewc, full_kl, kl and report"
            raise checks.fail(OP, "ewc", expected, "none of them")
        if self.fisher is not None:
            if self.ewc is None:
                raise checks.fail(OP, "fisher", "an EWC that was made of it", "none", "pass ewc=")
            _check_same(self.ewc, Path(self.fisher))
        if self.checkpoint is not None:
            self._of()

    def __str__(self) -> str:
        parts = [TITLE, _table(words.Table(["", ""], list(self._methods()), ""))]
        if self.kl:
            rows = [
                [name, str(m.tokens), f"{m.policy_ref:.4g}", f"{m.ref_policy:.4g}"]
                for name, m in self.kl.items()
            ]
            headings = ["text", "tokens", "KL(model \\|\\| base)", "KL(base \\|\\| model)"]
            parts.append(_table(words.Table(headings, rows, "Means in nats a token, exact.")))
        if self.report is not None:
            tables = (words.checkpoints(self.report), words.methods(self.report))
            parts += [_table(table) for table in tables if table is not None]
        return "\n\n".join(filter(None, parts))

    def _methods(self) -> Iterator[list[str]]:
        """What held the model, a row each."""
        if self.ewc is not None:
            yield ["EWC, strength", f"{self.ewc.strength:g}"]
            yield ["parameters held", f"{_numel(self.ewc):,}"]
            facts = self.ewc.metadata
            said = [f"{name} {cell(facts[name])}" for name in FISHER if facts.get(name) is not None]
            yield ["Fisher", ", ".join([_structure(self.ewc), *said])]
            yield ["EWC penalty at the end", f"{float(self.ewc.penalty().detach()):.4g}"]
        if self.fisher is not None:
            yield ["Fisher file", _link(self.fisher)]
        if self.full_kl is not None:
            term = KINDS[self.full_kl.kind].replace("|", "\\|")
            coefficient = f"{self.full_kl.beta:.4g}"
            if self.full_kl.control is not None:
                target = f"{self.full_kl.control.target:g}"
                coefficient += f" at the end, steered to {target} nats a token"
            yield [f"{term} in the loss, coefficient", coefficient]

    # --- the Hub's tables -------------------------------------------------------------------------

    def eval_results(self) -> list[EvalResult]:
        """The KLs, and the checkpoint's scores and tax, as huggingface_hub's EvalResult."""
        result = hub.client(f"{OP}.eval_results").EvalResult
        return [
            result(
                task_type="text-generation",
                dataset_type=data.lower().replace(" ", "-"),
                dataset_name=data,
                metric_type=metric.lower().replace(" ", "-"),
                metric_name=metric,
                metric_value=value,
            )
            for data, metric, value in self._results()
        ]

    def _results(self) -> Iterator[tuple[str, str, float]]:
        """Of each: a data set, a metric, the value."""
        for name, measured in self.kl.items():
            yield name, KINDS["policy_ref"], measured.policy_ref
            yield name, KINDS["ref_policy"], measured.ref_policy
        if self.checkpoint is not None and self.report is not None:
            mine = self._of()
            for side in ("capability", "alignment"):
                for name, value in getattr(mine, side).items():
                    yield name, side, value
            yield "all benchmarks", "alignment tax", self.report.tax(mine)

    def _of(self) -> Checkpoint:
        """The report's checkpoint that the card is of."""
        every = [] if self.report is None else list(self.report.checkpoints)
        found = [c for c in every if c.name == self.checkpoint or c.label == self.checkpoint]
        if len(found) != 1:
            names = ", ".join(dict.fromkeys(c.label for c in every)) or "no report"
            raise checks.fail(
                OP, "checkpoint", f"one of {names}", f"{self.checkpoint}, {len(found)} times"
            )
        return found[0]

    def into(self, card: ModelCard, *, model_name: str | None = None) -> ModelCard:
        """A card of huggingface_hub's (ModelCard) with this section and these results.

        Args:
            card: it is not changed.
            model_name: in the results, which the Hub wants named; None: the card's own.

        Raises:
            ValueError: there are results, and no name for them.
        """
        op = f"{OP}.into"
        made: Any = type(card)(str(card))
        name = model_name or made.data.model_name
        if name is None and any(True for _ in self._results()):
            raise checks.fail(op, "model_name", "a name for the results", "none", "pass it")
        made.text = _replaced(made.text, str(self))
        made.data.tags = [*dict.fromkeys([*(made.data.tags or []), "fasttax"])]
        new = self.eval_results()
        if new:
            keys = {_key(result) for result in new}
            kept = [r for r in made.data.eval_results or [] if _key(r) not in keys]
            made.data.model_name, made.data.eval_results = name, [*kept, *new]
        return made


def _key(result: Any) -> tuple[Any, ...]:
    return result.task_type, result.dataset_name, result.metric_name


def _replaced(text: str, section: str) -> str:
    """A card's text with the section between its marks, at the end where it has none."""
    whole = f"{BEGIN}\n{section}\n{END}"
    before, begun, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if begun and ended:
        return f"{before}{whole}{after}"
    return f"{text.rstrip()}\n\n{whole}\n"


def _table(table: words.Table) -> str:
    """In Markdown; "" without rows."""
    if not table.rows:
        return ""
    aligns = ["---", *["---:"] * (len(table.headings) - 1)]
    rows = [list(table.headings), aligns, *table.rows]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, *(["", table.note] if table.note else [])])


def _numel(ewc: EWC) -> int:
    return sum(p.numel() for p in ewc.parameters().values())


def _structure(ewc: EWC) -> str:
    return "Kronecker factors" if isinstance(ewc.fisher, KroneckerEstimate) else "diagonal"


def _link(fisher: str | os.PathLike[str]) -> str:
    """A repository as a link, of a file the name."""
    name = os.fspath(fisher)
    if Path(name).exists():
        return f"`{Path(name).name}`"
    return f"[{name}](https://huggingface.co/{name})"


def _check_same(ewc: EWC, path: Path) -> None:
    """A file must hold what the EWC was made of, as far as both say where they come from.

    Raises:
        ValueError: it does not, or is no Fisher, or no name of a repository.
    """
    if not path.exists():
        if not hub.ID.fullmatch(os.fspath(path)):
            expected = "a file, or a repository of the Hub (owner/name)"
            raise checks.fail(OP, "fisher", expected, f"{path}, which is neither")
        return
    kind = files.kind_of(path)
    if kind not in FILES:
        raise checks.fail(OP, "fisher", f"a file of {' or '.join(FILES)}", f"{path} of {kind!r}")
    with files.opened(path, kind) as (_, found):
        pass
    held = ewc.metadata
    differing = [
        f"{name} {found[name]} (the EWC's: {held[name]})"
        for name in SAME
        if None not in (found.get(name), held.get(name)) and found[name] != held[name]
    ]
    if differing:
        raise checks.fail(OP, "fisher", "the EWC's own", f"{path} of {', '.join(differing)}")
