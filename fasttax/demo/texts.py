"""The demo's data: general text from Python's documentation, and fasttax's own alignment set.

General text is `pydoc_data.topics`. Topics repeat each other (a quarter of the paragraphs stand in
several), so topics that share a paragraph stay together when the text is split, and a repeated
paragraph is kept once.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttax.demo.codecs import Codec, Span
from fasttax.demo.settings import DemoError

PARTS = ("fisher", "validation", "test")
SPLITS = ("train", "validation", "test")
FIELDS = ("id", "kind", "split", "prompt", "good", "bad")
# characters from which a repeated paragraph counts as shared text and not as a common phrase
SHARED = 80
WORD = re.compile(r"[A-Za-z]{3,}")


@dataclass(frozen=True)
class Item:
    """A token sequence of which the tokens from `start` on are scored.

    `words` are the words in it as ranges of tokens.
    """

    ids: tuple[int, ...]
    start: int
    words: tuple[Span, ...] = ()


@dataclass(frozen=True)
class Pair:
    """One prompt of the alignment set with its good and its bad answer."""

    kind: str
    good: Item
    bad: Item


def collate(items: Sequence[Item], pad_id: int, device: torch.device) -> dict[str, Tensor]:
    """input_ids and attention_mask (padded on the right), and the tokens that are `scored`."""
    width = max(len(item.ids) for item in items)
    ids = torch.full((len(items), width), pad_id)
    mask, scored = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, item in enumerate(items):
        n = len(item.ids)
        ids[row, :n] = torch.tensor(item.ids)
        mask[row, :n] = 1
        scored[row, item.start : n] = True
    return {
        "input_ids": ids.to(device),
        "attention_mask": mask.to(device),
        "scored": scored.to(device),
    }


def paragraphs(text: str) -> list[str]:
    """What empty lines separate, without what is blank."""
    return [p for p in text.split("\n\n") if p.strip()]


def normal(paragraph: str) -> str:
    """A paragraph whatever its line breaks, for comparing."""
    return " ".join(paragraph.split())


def general_text() -> dict[str, dict[str, str]]:
    """Part -> topic -> text; no paragraph of SHARED characters or more stands twice anywhere."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DemoError(
            "the general text is Python's own pydoc_data.topics, which this Python lacks; use one "
            "with the full standard library "
            "(builds of python.org, conda and uv have it; on Debian: apt install libpython3-stdlib)"
        ) from None
    parts: dict[str, dict[str, str]] = {part: {} for part in PARTS}
    seen: set[str] = set()
    for i, names in enumerate(_families(topics)):
        # the largest family, and every second of the others, go to the Fisher
        part = ("fisher", "test", "fisher", "validation")[i % 4]
        for name in names:
            parts[part][name] = _unseen(topics[name], seen)
    return parts


def _families(topics: dict[str, str]) -> list[list[str]]:
    """Groups of topics that share a long paragraph, if through others; the longest group first."""
    owners: dict[str, list[str]] = {}
    for topic in sorted(topics):
        for p in {normal(p) for p in paragraphs(topics[topic])}:
            if len(p) >= SHARED:
                owners.setdefault(p, []).append(topic)
    leader = {topic: topic for topic in topics}

    def find(topic: str) -> str:
        while leader[topic] != topic:
            topic = leader[topic]
        return topic

    for group in owners.values():
        for other in group[1:]:
            leader[find(other)] = find(group[0])
    families: dict[str, list[str]] = {}
    for topic in sorted(topics):
        families.setdefault(find(topic), []).append(topic)
    return sorted(families.values(), key=lambda names: (-sum(len(topics[n]) for n in names), names))


def _unseen(text: str, seen: set[str]) -> str:
    """The text without the long paragraphs that were `seen`, to which its own are added."""
    kept = []
    for p in paragraphs(text):
        if len(normal(p)) < SHARED or normal(p) not in seen:
            seen.add(normal(p))
            kept.append(p)
    return "\n\n".join(kept)


def passages(texts: dict[str, str], codec: Codec, length: int, count: int, seed: int) -> list[Item]:
    """`count` windows of `length` tokens that do not overlap, drawn evenly from all the texts."""
    windows = []
    for text in texts.values():
        ids, spans = codec.encode(text)
        words = [w.span() for w in WORD.finditer(text)]
        windows += [
            (ids[i : i + length], spans[i : i + length], words)
            for i in range(0, len(ids) - length + 1, length)
        ]
    if len(windows) < count:
        raise DemoError(
            f"the general text gives {len(windows)} passages of {length} tokens where {count} were "
            "asked for; use a smaller --length or --fisher-examples"
        )
    chosen = random.Random(seed).sample(windows, count)
    return [
        Item(tuple(ids), 1, tuple(_words(spans, words, length // 3)))
        for ids, spans, words in chosen
    ]


def _words(spans: list[Span], words: list[Span], first: int) -> list[Span]:
    """Token ranges of the words that begin and end on token borders, from token `first` on."""
    begins: dict[int, int] = {}
    ends: dict[int, int] = {}
    for t, (a, b) in enumerate(spans):
        begins[a] = t
        ends[b] = t
    found = []
    for a, b in words:
        # many tokenizers join the space before a word to its first token
        begin = begins.get(a, begins.get(a - 1))
        if begin is not None and b in ends and first <= begin <= ends[b]:
            found.append((begin, ends[b] + 1))
    return found


def read_alignment(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of an alignment file by split. Every row has the FIELDS; no prompt stands twice."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise DemoError(
            f"cannot read the alignment set {path} ({error.strerror}); expected a JSON-lines file "
            f"with {', '.join(FIELDS)}"
        ) from None
    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    prompts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            texts = [row[field] for field in FIELDS]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DemoError(
                f"{path}, line {number}: expected a JSON object with {', '.join(FIELDS)} "
                f"({error!r})"
            ) from None
        if not all(isinstance(t, str) and t.strip() for t in texts) or row["split"] not in splits:
            raise DemoError(
                f"{path}, line {number}: expected text in every field and a split among "
                f"{', '.join(SPLITS)}"
            )
        if row["prompt"] in prompts:
            raise DemoError(
                f"{path}, line {number}: the prompt of line {prompts[row['prompt']]} again; each "
                "may stand once, or splits overlap"
            )
        prompts[row["prompt"]] = number
        splits[row["split"]].append(row)
    empty = [split for split, rows in splits.items() if len(rows) < 2]
    if empty:
        raise DemoError(
            f"{path}: expected at least two rows in every split, got fewer in {', '.join(empty)}"
        )
    return splits


def pairs(rows: Sequence[dict[str, Any]], codec: Codec, length: int) -> tuple[list[Pair], int]:
    """Rows as token sequences of at most `length`, and the number of answers that had to be cut."""
    result, cut = [], 0
    for row in rows:
        prompt = codec.prompt(row["prompt"])[-(length * 2 // 3) :]
        answers = [codec.answer(row["good"]), codec.answer(row["bad"])]
        cut += sum(len(prompt) + len(a) > length for a in answers)
        good, bad = (Item(tuple([*prompt, *a][:length]), len(prompt)) for a in answers)
        result.append(Pair(row["kind"], good, bad))
    return result, cut
