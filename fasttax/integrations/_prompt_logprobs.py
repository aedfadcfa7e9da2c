"""The log-probs of prompts as inference servers give them, read into a TopKReference's tensors.

vLLM (`prompt_logprobs=k`): None for the first token ({} in its FlatLogprobs), then for each token a
mapping {id: {"logprob": ..., "rank": ..., "decoded_token": ...}} of the prompt's own token, which
stands first, and the k largest. SGLang (`return_logprob=True, logprob_start_len=0,
top_logprobs_num=k`): `input_token_logprobs`, [log-prob, id, text] of the prompt's own tokens, and
`input_top_logprobs`, for each the list of the k largest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fasttax._base import checks

OP = "TopKReference.from_prompt_logprobs"
UNKNOWN = -1  # the first token of a row that does not say it
NOTHING = -9999.0  # what vLLM's server writes for -inf
ROUNDING = 1e-3  # that a server's rounded log-probs may sum above 1, or stand above 0
IDS = ("prompt_token_ids", "input_ids", "token_ids")
Entries = dict[int, float]  # log-probs by id


def wrong(where: str, expected: str, got: Any, way_out: str = "") -> Exception:
    """The error of a malformed row, by its place."""
    return checks.fail(OP, where, expected, got, way_out)


def read_row(row: Any, where: str, V: int) -> tuple[list[int], list[Entries]]:
    """(tokens, for each but the first the log-probs from which it was drawn).

    Args:
        row: of one sequence, in one of the servers' shapes.
        where: its place, for errors.
        V: size of the vocabulary.

    Raises:
        ValueError: the row is malformed.
    """
    fields = _fields(row)
    if "input_top_logprobs" in fields or "input_token_logprobs" in fields:
        tokens, entries = _sglang(fields, where, V)
    else:
        tokens, entries = _vllm(fields, where, V)
    if len(tokens) < 2:
        raise wrong(where, "at least 2 tokens", f"{len(tokens)}")
    for t, listed in enumerate(entries, 1):
        total = math.fsum(map(math.exp, listed.values()))
        if total > 1 + ROUNDING:
            raise wrong(
                f"{where}, token {t}",
                "log-probs of one distribution, probabilities of at most 1 together",
                f"{total:.4g}",
                "ask the server for natural logarithms at the temperature that is stated",
            )
    return tokens, entries


def _fields(row: Any) -> Mapping[str, Any]:
    """A row's lists by the servers' names for them."""
    if isinstance(row, Mapping):
        inner = row.get("meta_info")
        return {**row, **inner} if isinstance(inner, Mapping) else row
    if hasattr(row, "prompt_logprobs"):  # vLLM's own object
        return {name: getattr(row, name, None) for name in ("prompt_logprobs", *IDS)}
    if isinstance(row, Sequence) and not isinstance(row, (str, bytes)):
        lists = any(isinstance(entry, (list, tuple)) for entry in row)
        return {"input_top_logprobs" if lists else "prompt_logprobs": row}
    return {}


def _list(fields: Mapping[str, Any], name: str, where: str) -> Sequence[Any]:
    found = fields.get(name)
    if not isinstance(found, Sequence) or isinstance(found, (str, bytes)):
        raise wrong(f"{where}[{name!r}]", "a list with an entry for each token", found)
    return found


def _given_tokens(fields: Mapping[str, Any], where: str, V: int) -> list[int] | None:
    name = next((name for name in IDS if fields.get(name) is not None), None)
    if name is None:
        return None
    ids = fields[name]
    found = ids.tolist() if isinstance(ids, Tensor) else _list(fields, name, where)
    return [_id(x, f"{where}[{name!r}][{t}]", V) for t, x in enumerate(found)]


# --- the servers ----------------------------------------------------------------------------------


def _vllm(fields: Mapping[str, Any], where: str, V: int) -> tuple[list[int], list[Entries]]:
    if "prompt_logprobs" not in fields:
        raise wrong(
            where,
            "vLLM's prompt_logprobs, or SGLang's input_top_logprobs with input_token_logprobs",
            f"keys {sorted(map(str, fields))}" if fields else "neither",
            "pass response['choices']" if "choices" in fields else "",
        )
    listed = _list(fields, "prompt_logprobs", where)
    if not listed or (listed[0] is not None and listed[0] != {}):
        raise wrong(
            f"{where}, token 0", "None, for nothing predicts it", listed[0] if listed else "none"
        )
    given = _given_tokens(fields, where, V)
    if given is not None and len(given) != len(listed):
        raise wrong(where, f"{len(given)} entries, one for each prompt token", f"{len(listed)}")
    tokens = [UNKNOWN if given is None else given[0]]
    entries = []
    for t, mapping in enumerate(listed[1:], 1):
        place = f"{where}, token {t}"
        if not isinstance(mapping, Mapping) or not mapping:
            raise wrong(place, "a mapping {id: {'logprob': ...}} with the token's own", mapping)
        ranks = {_id(key, place, V): _member(value, "rank") for key, value in mapping.items()}
        found = _entries(
            [(key, _member(value, "logprob", value)) for key, value in mapping.items()], place, V
        )
        own = _own(ranks, place) if given is None else given[t]
        if own not in ranks:
            raise wrong(
                place,
                f"the prompt's own token {own} beside the top ones",
                f"the ids {sorted(ranks)[:8]}",
                "give the ids of this prompt",
            )
        tokens.append(own)
        entries.append(found)
    return tokens, entries


def _own(ranks: Mapping[int, Any], place: str) -> int:
    """The prompt's own token: vLLM puts it first, and of those outside the top k it is the one."""
    first = next(iter(ranks))
    outside = [
        token for token, rank in ranks.items() if isinstance(rank, int) and rank > len(ranks)
    ]
    if outside and outside != [first]:
        raise wrong(
            place,
            "the prompt's own token first, as vLLM has it",
            f"token {first} first, and {outside} of a rank below the top ones",
            "give the row as {'prompt_token_ids': [...], 'prompt_logprobs': [...]}",
        )
    return first


def _sglang(fields: Mapping[str, Any], where: str, V: int) -> tuple[list[int], list[Entries]]:
    if fields.get("input_top_logprobs") is None:
        raise wrong(
            where,
            "input_top_logprobs beside input_token_logprobs",
            f"keys {sorted(map(str, fields))}",
            "ask the server for top_logprobs_num=k",
        )
    top = _list(fields, "input_top_logprobs", where)
    if fields.get("input_token_logprobs") is None:
        raise wrong(
            where,
            "input_token_logprobs beside input_top_logprobs, which alone do not say the prompt",
            f"keys {sorted(map(str, fields))}",
            "give both: {'input_token_logprobs': [...], 'input_top_logprobs': [...]}, or the "
            "response's meta_info",
        )
    own = _list(fields, "input_token_logprobs", where)
    if len(own) != len(top):
        raise wrong(where, f"{len(own)} entries, one for each prompt token", f"{len(top)}")
    if not own or _triple(own[0], f"{where}, token 0")[0] is not None or top[0]:
        raise wrong(
            f"{where}, token 0",
            "a log-prob of None, for nothing predicts it",
            own[0] if own else "none",
            "ask for logprob_start_len=0",
        )
    tokens = [
        _id(_triple(x, f"{where}, token {t}")[1], f"{where}, token {t}", V)
        for t, x in enumerate(own)
    ]
    given = _given_tokens(fields, where, V)
    if given is not None and given != tokens:
        raise wrong(where, "the tokens of input_token_logprobs", "other ids beside it")
    entries = []
    for t in range(1, len(top)):
        place = f"{where}, token {t}"
        if not isinstance(top[t], Sequence) or isinstance(top[t], str):
            raise wrong(place, "a list of [log-prob, id, text]", top[t])
        pairs = [_triple(x, place)[::-1] for x in top[t]]
        listed = _entries(pairs, place, V)
        # the sampled token's own log-prob; of one in the top k it is the same number
        listed.setdefault(tokens[t], _logp(_triple(own[t], place)[0], place))
        entries.append(listed)
    return tokens, entries


# --- one entry ------------------------------------------------------------------------------------


def _triple(entry: Any, place: str) -> tuple[Any, Any]:
    """(log-prob, id) of SGLang's [log-prob, id, text]."""
    if not isinstance(entry, (list, tuple)) or not 2 <= len(entry) <= 3:
        raise wrong(place, "[log-prob, id, text]", entry)
    return entry[0], entry[1]


def _entries(pairs: Sequence[tuple[Any, Any]], place: str, V: int) -> Entries:
    """Log-probs by id of (id, log-prob); of impossible tokens there is no entry."""
    found: Entries = {}
    for key, value in pairs:
        token, logp = _id(key, place, V), _logp(value, place)
        if token in found:
            raise wrong(place, "each id once", f"id {token} twice")
        found[token] = logp
    return found


def _member(value: Any, name: str, default: Any = None) -> Any:
    """Of vLLM's {"logprob": ..., "rank": ...}, or of its object."""
    if isinstance(value, Mapping):
        return value.get(name)
    return getattr(value, name, default)


def _id(key: Any, place: str, V: int) -> int:
    """A token id; in JSON the keys of a mapping are strings."""
    token = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key
    if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < V:
        raise wrong(place, f"a token id in [0, {V})", key)
    return token


def _logp(value: Any, place: str) -> float:
    """A natural logarithm; -inf where the server writes a number for it."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not value <= ROUNDING:  # NaN is not
        raise wrong(place, "a log-prob, a number <= 0", value)
    return -math.inf if value <= NOTHING else min(float(value), 0.0)


# --- tensors --------------------------------------------------------------------------------------


def tensors(rows: Sequence[Any], V: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens (n,), offsets, log-probs (n, k) descending, ids (n, k) of all rows.

    Log-probs of -inf fill lists up, and the place after a sequence's last token.
    """
    sequences = [read_row(row, f"rows[{i}]", V) for i, row in enumerate(rows)]
    k = max(len(listed) for _, entries in sequences for listed in entries)
    lengths = torch.tensor([0] + [len(tokens) for tokens, _ in sequences], device="cpu")
    offsets = lengths.cumsum(0)
    n = int(offsets[-1])
    logp = torch.full((n, k), -torch.inf, dtype=torch.float32, device="cpu")
    ids = torch.zeros((n, k), dtype=torch.int32, device="cpu")
    for begin, (_, entries) in zip(offsets.tolist(), sequences, strict=False):
        for t, listed in enumerate(entries, begin):
            order = sorted(listed.items(), key=lambda entry: (-entry[1], entry[0]))
            logp[t, : len(order)] = torch.tensor([value for _, value in order])
            ids[t, : len(order)] = torch.tensor([token for token, _ in order])
    flat = [token for tokens, _ in sequences for token in tokens]
    return torch.tensor(flat, device="cpu"), offsets, logp, ids
