"""`fasttax kl measure POLICY REF TEXT...`: both KLs, by domain and token by token."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fasttax._base import checks, devices, files
from fasttax._base import page as pages
from fasttax.cli import _language_model, _options, _rows
from fasttax.cli._rows import Data, Row
from fasttax.integrations._models import frozen
from fasttax.integrations.to_base import token_kls
from fasttax.tax.words import Table, aligned

OP = "fasttax kl measure"
LENGTH = 512
CONTEXT = 8  # tokens before a token that the list of the worst shows


@dataclass(frozen=True)
class Measured:
    """A sequence's KLs, nats, of the predictions of its tokens from the second on."""

    row: Row
    policy_ref: Tensor
    ref_policy: Tensor


@dataclass(frozen=True)
class Domain:
    """Means over a domain's tokens, with standard errors over its sequences."""

    name: str
    sequences: int
    tokens: int
    policy_ref: float
    policy_ref_se: float | None
    ref_policy: float
    ref_policy_se: float | None


def main(args: argparse.Namespace) -> int:
    """Measures and prints; writes --html and --json.

    Raises:
        ValueError: a size below its least, a text without two tokens, or models whose tokenizers
            differ.
    """
    _options.check_least(OP, args, length=2, batch_size=1, worst=1, rows=1)
    models = {"policy": args.policy, "ref": args.ref}
    device = devices.named(OP, args.device)
    opened = [_rows.opened(OP, name, args.split, args.config) for name in args.text]
    texts = _told_apart(opened, args.text)
    for word, name in models.items():
        _language_model.check_model(OP, word, name)
    tokenizer = _language_model.tokenizer_of(args.policy)
    _same_tokenizers(tokenizer, _language_model.tokenizer_of(args.ref))
    length = _language_model.length_of(args.length, LENGTH, *models.values())
    rows = [row for text in texts for row in text.rows(tokenizer, length)]
    if not rows:
        raise checks.fail(OP, "text", "a sequence of at least 2 tokens", f"none in {args.text}")
    for name in models.values():
        _language_model.check_rows(OP, name, [row.ids for row in rows])
    policy, ref = (_language_model.load(name, device, args) for name in models.values())
    shown = _options.shown(args)
    measured = list(_measured(policy, ref, rows, args.batch_size, shown))
    domains = by_domain(measured)
    worst = _worst(measured, tokenizer, args.worst)
    for table in (_domains(domains), worst):
        _options.say(args, "\n".join([*aligned(table), ""]))
    if args.html:
        text = _page(args, domains, worst, measured, tokenizer)
        page = files.whole(OP, args.html, lambda name: name.write_text(text, encoding="utf-8"))
        _options.say(args, page)
    _options.write_json(
        OP,
        args.json,
        {
            **models,
            "domains": [vars(domain) for domain in domains],
            "worst": [dict(zip(worst.headings, row, strict=True)) for row in worst.rows],
        },
    )
    return 0


def add_parser(tools: Any) -> None:
    """The tool's arguments."""
    parser = tools.add_parser(
        "measure",
        help="both KLs of two models on text, token by token",
        description=(
            "Exact KL between POLICY and REF in both directions, in nats a token: by domain, the "
            "tokens where it is largest, and a page with the tokens coloured by it."
        ),
    )
    parser.set_defaults(parser=parser)
    parser.add_argument(
        "policy", type=_options.Input, help="a folder or Hub id of a causal language model"
    )
    parser.add_argument(
        "ref", type=_options.Input, help="the same of the reference, with the same tokenizer"
    )
    parser.add_argument(
        "text",
        type=_options.Input,
        nargs="+",
        help="UTF-8 text, or data as for `kl cache`; each is a domain, or its rows' `domain`",
    )
    _rows.add_options(parser)
    parser.add_argument(
        "--html", type=_options.Output, metavar="FILE", help="write a page, tokens coloured by KL"
    )
    parser.add_argument(
        "--length",
        type=int,
        help=f"tokens a sequence is cut to (default {LENGTH}, or the models' positions where they "
        "are fewer)",
    )
    parser.add_argument("--batch-size", type=int, default=8, help="sequences (default 8)")
    parser.add_argument("--worst", type=int, default=20, help="tokens that are listed (default 20)")
    parser.add_argument("--rows", type=int, default=20, help="sequences on the page (default 20)")
    _language_model.add_options(parser)


def _told_apart(texts: Sequence[Data], names: Sequence[str]) -> list[Data]:
    """Each a domain: by the whole of what was given where several have one short name."""
    count = Counter(text.name for text in texts)
    return [
        replace(text, name=given) if count[text.name] > 1 else text
        for text, given in zip(texts, names, strict=True)
    ]


def _same_tokenizers(one: Any, other: Any) -> None:
    """Both must give tokens the same ids, or a KL compares different words."""
    mine, theirs = one.get_vocab(), other.get_vocab()
    if mine == theirs:
        return
    differing = [token for token in (*mine, *theirs) if mine.get(token) != theirs.get(token)]
    token = differing[0]
    raise checks.fail(
        OP,
        "ref",
        "a model with the policy's tokenizer",
        f"{len({*differing})} tokens with other ids, as {token!r}: {mine.get(token)} and "
        f"{theirs.get(token)}",
        "a token-level KL is between models of one vocabulary",
    )


def _measured(
    policy: nn.Module, ref: nn.Module, rows: Sequence[Row], batch_size: int, shown: bool
) -> Iterator[Measured]:
    """Each sequence's KLs, the longest first, so that batches are even."""
    rows = sorted(rows, key=lambda row: -len(row.ids))
    parts = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    with frozen(policy), frozen(ref):
        for part in tqdm(parts, desc=OP, unit="batch", disable=not shown):
            batch = _rows.padded([row.ids for row in part])
            found = next(token_kls(OP, policy, ref, [batch], False))
            forward, backward = found[0].float().cpu(), found[1].float().cpu()
            for k, row in enumerate(part):
                n = len(row.ids) - 1
                yield Measured(row, forward[k, :n], backward[k, :n])


def by_domain(measured: Sequence[Measured]) -> list[Domain]:
    """Each domain's means, then those of all where there are several."""
    names = sorted({m.row.domain for m in measured})
    found = [_domain(name, [m for m in measured if m.row.domain == name]) for name in names]
    if len(names) > 1:
        found.append(_domain("all", measured))
    return found


def _domain(name: str, some: Sequence[Measured]) -> Domain:
    one, one_se = _mean([m.policy_ref for m in some])
    other, other_se = _mean([m.ref_policy for m in some])
    tokens = sum(len(m.policy_ref) for m in some)
    return Domain(name, len(some), tokens, one, one_se, other, other_se)


def _mean(values: Sequence[Tensor]) -> tuple[float, float | None]:
    """The mean over tokens, and its standard error over sequences, whose tokens hang together.

    The ratio estimator's, sqrt(n / (n - 1) sum_i (S_i - mean T_i)^2) / sum T_i of sequences with
    sums S_i over T_i tokens; None for one sequence.
    """
    tokens = sum(len(v) for v in values)
    sums = [float(v.double().sum()) for v in values]
    mean = sum(sums) / tokens
    if len(values) < 2:
        return mean, None
    errors = [s - mean * len(v) for s, v in zip(sums, values, strict=True)]
    n = len(values)
    return mean, math.sqrt(n / (n - 1) * sum(e * e for e in errors)) / tokens


def _domains(domains: Sequence[Domain]) -> Table:
    """The domains in words."""
    rows = [
        [
            d.name,
            str(d.sequences),
            str(d.tokens),
            _with_error(d.policy_ref, d.policy_ref_se),
            _with_error(d.ref_policy, d.ref_policy_se),
        ]
        for d in domains
    ]
    headings = ["domain", "sequences", "tokens", "KL(policy||ref)", "KL(ref||policy)"]
    return Table(headings, rows, "nats a token; ±: one standard error over sequences")


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4g}" if error is None else f"{value:.4g} ±{error:.2g}"


def _worst(measured: Sequence[Measured], tokenizer: Any, count: int) -> Table:
    """The tokens where the larger of both KLs is largest, with what comes before them."""
    found: list[tuple[float, int, int]] = []
    for k, m in enumerate(measured):
        values, places = torch.maximum(m.policy_ref, m.ref_policy).topk(
            min(count, len(m.policy_ref))
        )
        found += [(-v, k, t) for v, t in zip(values.tolist(), places.tolist(), strict=True)]
    rows = []
    for _, k, t in sorted(found)[:count]:
        m = measured[k]
        before = tokenizer.decode(m.row.ids[max(0, t + 1 - CONTEXT) : t + 1])
        rows.append(
            [
                repr(tokenizer.decode([m.row.ids[t + 1]])),
                f"{float(m.policy_ref[t]):.4g}",
                f"{float(m.ref_policy[t]):.4g}",
                m.row.domain,
                repr(before),
            ]
        )
    headings = ["token", "KL(policy||ref)", "KL(ref||policy)", "domain", "after"]
    return Table(headings, rows, "KL of the prediction of the token, from what comes before it")


def _page(
    args: argparse.Namespace,
    domains: Sequence[Domain],
    worst: Table,
    measured: Sequence[Measured],
    tokenizer: Any,
) -> str:
    """Tables, then the sequences of the largest mean KL with their tokens coloured."""
    every = torch.cat([m.policy_ref for m in measured])
    every = every[torch.isfinite(every)]
    full = max(float(every.quantile(0.99)) if 0 < len(every) <= 1 << 24 else 1.0, 1e-12)
    shown = sorted(measured, key=lambda m: -float(m.policy_ref.mean()))[: args.rows]
    return pages.render(
        "cli/kl_measure.html",
        title=f"KL of {Path(args.policy).name} to {Path(args.ref).name}",
        domains=_domains(domains),
        worst=worst,
        rows=[list(_coloured(m, tokenizer, full)) for m in shown],
        count=len(measured),
        full=full,
    )


def _coloured(m: Measured, tokenizer: Any, full: float) -> Iterator[tuple[str, float, str]]:
    """A sequence's tokens, the strength of each one's KL, and its numbers.

    Yields:
        Of the first token, of which nothing is predicted, no numbers.
    """
    yield tokenizer.decode(m.row.ids[:1]), 0.0, ""
    for token, one, other in zip(
        m.row.ids[1:], m.policy_ref.tolist(), m.ref_policy.tolist(), strict=True
    ):
        said = f"{one:.3g} policy||ref, {other:.3g} ref||policy"
        yield tokenizer.decode([token]), min(1.0, one / full), said
