"""References from vLLM's and SGLang's JSON: recorded responses, and such made of a model.

`python -m tests.tools.record_servers` records.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttax import topk_kl
from fasttax.integrations.reference import TopKReference
from tests.tools import kl_steps as k

RECORDED = Path(__file__).parent / "recorded"
ROWS = [row.tolist() for row in (k.IDS[0], k.IDS[1, :5], k.IDS[2, :7])]
V = k.VOCABULARY
VLLM = """{"id": "cmpl-1", "object": "text_completion", "model": "m", "choices": [{"index": 0,
"text": " a", "logprobs": null, "finish_reason": "length", "prompt_token_ids": [7, 3, 5],
"prompt_logprobs": [null,
{"3": {"logprob": -2.25, "rank": 5, "decoded_token": "c"},
 "9": {"logprob": -0.5, "rank": 1, "decoded_token": "i"},
 "4": {"logprob": -1.75, "rank": 2, "decoded_token": "d"}},
{"5": {"logprob": -0.125, "rank": 1, "decoded_token": "e"},
 "1": {"logprob": -3.0, "rank": 2, "decoded_token": "a"}}]}]}"""
SGLANG = """{"text": " a", "output_ids": [4], "meta_info": {"id": "1", "prompt_tokens": 3,
"input_token_logprobs": [[null, 7, null], [-2.25, 3, "c"], [-0.125, 5, "e"]],
"input_top_logprobs": [null, [[-0.5, 9, "i"], [-1.75, 4, "d"]],
 [[-0.125, 5, "e"], [-3.0, 1, "a"]]]}}"""


def logp_of(model: Any, row: list[int], temperature: float = 1.0) -> Tensor:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row])).logits[0].double()
    return (logits / temperature).log_softmax(-1)


def vllm(model: Any, row: list[int], top: int, temperature: float = 1.0) -> dict[str, Any]:
    """As the server writes it: the prompt's own token first, then the top ones; keys are text."""
    entries: list[Any] = [None]
    for t, logp in enumerate(logp_of(model, row, temperature)[:-1], 1):
        ranks = logp.argsort(descending=True).tolist()
        chosen = dict.fromkeys([row[t], *ranks[:top]])
        entries.append(
            {
                str(i): {"logprob": float(logp[i]), "rank": ranks.index(i) + 1, "decoded_token": ""}
                for i in chosen
            }
        )
    given = {"prompt_token_ids": row, "prompt_logprobs": entries}
    found: dict[str, Any] = json.loads(json.dumps(given))
    return found


def sglang(model: Any, row: list[int], top: int) -> dict[str, Any]:
    own: list[Any] = [[None, row[0], None]]
    lists: list[Any] = [None]
    for t, logp in enumerate(logp_of(model, row)[:-1], 1):
        own.append([float(logp[row[t]]), row[t], None])
        lists.append([[float(v), int(i), None] for v, i in zip(*logp.topk(top), strict=True)])
    given = {"input_token_logprobs": own, "input_top_logprobs": lists}
    found: dict[str, Any] = json.loads(json.dumps({"text": "", "meta_info": given}))
    return found


@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_recorded_servers(server: str) -> None:
    """Transformers' numbers in float64, as far as its own float32 has them."""
    recorded = json.loads((RECORDED / f"{server}.json").read_text())
    make = TopKReference.from_prompt_logprobs
    made = make(recorded["rows"], vocab_size=recorded["vocab_size"])
    assert made.k == 4
    assert made.temperature == 1.0
    for tokens, exact in zip(recorded["tokens"], recorded["log_probs"], strict=True):
        logp, ids = made.lookup(torch.tensor(tokens))
        for t, wanted in enumerate(exact):
            some = logp[t] > -torch.inf
            found = dict(zip(ids[t][some].tolist(), logp[t][some].tolist(), strict=True))
            own = str(tokens[t + 1])
            largest = sorted(wanted, key=lambda i: -wanted[i])[:3]
            assert found.keys() == {int(i) for i in (own, *largest)}
            error = max(abs(value - wanted[str(i)]) for i, value in found.items())
            assert error <= 2 * recorded["float32_error"]


@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_hand_made_responses(server: str) -> None:
    """Two of k = 2, where the first token predicted is not among the two largest."""
    row = json.loads(VLLM)["choices"][0] if server == "vllm" else json.loads(SGLANG)
    made = TopKReference.from_prompt_logprobs([row], vocab_size=20)
    assert made.tokens.tolist() == [7, 3, 5]
    assert (made.k, made.vocabulary, made.temperature, len(made)) == (3, 20, 1.0, 1)
    logp, ids = made.lookup(torch.tensor([7, 3, 5]))
    assert ids[0].tolist() == [9, 4, 3]
    assert logp[0].tolist() == [-0.5, -1.75, -2.25]
    assert ids[1, :2].tolist() == [5, 1]
    assert logp[1].tolist() == [-0.125, -3.0, -torch.inf]
    assert (made.logp[2] == -torch.inf).all()  # nothing is predicted from the last token


@pytest.mark.parametrize("server", [vllm, sglang])
def test_the_whole_vocabulary_is_the_model(server: Any, tmp_path: Path) -> None:
    policy, ref = k.llama(), k.llama(1)
    rows = [server(ref, row.tolist(), V) for row in k.IDS]
    made = TopKReference.from_prompt_logprobs(rows, vocab_size=V)
    made.save(tmp_path / "cache.safetensors")
    wanted, grads = k.truth(policy, ref)
    read = TopKReference.load(tmp_path / "cache.safetensors")
    found = k.step(policy, read, cls=k.NoLogits)
    assert found.kl == pytest.approx(wanted, rel=2e-4)
    assert k.error(found.grads, grads, 0.5) < 1e-3


@pytest.mark.parametrize("server", [vllm, sglang])
@pytest.mark.parametrize("top", [1, 8])
def test_the_sampled_token_is_added_to_the_top(server: Any, top: int) -> None:
    policy, ref = k.llama(), k.llama(1)
    made = TopKReference.from_prompt_logprobs([server(ref, r, top) for r in ROWS], vocab_size=V)
    assert made.k == top + 1
    total = 0.0
    for row in ROWS:
        logp, ids = made.lookup(torch.tensor(row))
        exact = logp_of(ref, row)
        for t in range(len(row) - 1):
            listed = ids[t][logp[t] > -torch.inf]
            assert set(listed.tolist()) == {row[t + 1], *exact[t].topk(top).indices.tolist()}
            assert torch.allclose(logp[t, : len(listed)].double(), exact[t][listed], atol=1e-6)
        x = policy(input_ids=torch.tensor([row])).logits[0, :-1].detach()
        total += float(topk_kl(x, logp, ids, kind="ref_policy", reduction="sum"))
    T = max(map(len, ROWS))
    ids = torch.tensor([row + [0] * (T - len(row)) for row in ROWS])
    mask = torch.tensor([[1] * len(row) + [0] * (T - len(row)) for row in ROWS])
    labels = ids.masked_fill(mask == 0, -100)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    found = k.step(policy, made, "ref_policy", batch=batch)
    assert found.kl * found.tokens == pytest.approx(total, rel=1e-4)


def test_temperature_is_stated() -> None:
    policy, ref = k.llama(), k.llama(1)
    wanted, _ = k.truth(policy, ref, temperature=2.0)
    rows = [vllm(ref, row.tolist(), V, 2.0) for row in k.IDS]
    made = TopKReference.from_prompt_logprobs(rows, vocab_size=V, temperature=2.0)
    assert k.step(policy, made, temperature=2.0).kl == pytest.approx(wanted, rel=2e-4)
    rows = [vllm(ref, row.tolist(), V) for row in k.IDS]  # whole ones lead to any other
    made = TopKReference.from_prompt_logprobs(rows, vocab_size=V)
    assert k.step(policy, made, temperature=2.0).kl == pytest.approx(wanted, rel=2e-4)
    rows = [vllm(ref, row.tolist(), V - 1) for row in k.IDS]  # some of which lack the last token
    made = TopKReference.from_prompt_logprobs(rows, vocab_size=V)
    with pytest.raises(ValueError, match=r"log-probs at the temperature 2, .* a cache made at 1"):
        k.step(policy, made, temperature=2.0)


def test_prompt_logprobs_alone_serve_any_first_token() -> None:
    """vLLM's list does not say the first token."""
    ref = k.llama(1)
    bare = [vllm(ref, row, 4)["prompt_logprobs"] for row in ROWS]
    whole = [vllm(ref, row, 4) for row in ROWS]
    made, known = (TopKReference.from_prompt_logprobs(r, vocab_size=V) for r in (bare, whole))
    for row in ROWS:
        ends = [*row, 60]  # a cache without the end-of-text token serves rows that have one
        for tokens in (torch.tensor(row), torch.tensor(ends)):
            found, wanted = made.lookup(tokens), known.lookup(tokens)
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        assert torch.tensor([row[0], row[1] + 1, *row[2:]]) not in made
    other = copy.deepcopy(bare)
    other.append(vllm(ref, [ROWS[0][0] + 1, *ROWS[0][1:]], 4)["prompt_logprobs"])
    with pytest.raises(
        ValueError,
        match=r"rows\[3\]: expected one list of log-probs for a sequence, got others for the "
        r"tokens of rows\[0\], as far as the two are known; give the rows' prompt_token_ids",
    ):
        TopKReference.from_prompt_logprobs(other, vocab_size=V)
    whole.append(vllm(ref, [ROWS[0][0] + 1, *ROWS[0][1:]], 4))  # as advised
    assert len(TopKReference.from_prompt_logprobs(whole, vocab_size=V)) == 4


@pytest.mark.parametrize("first", [None, {}])  # {} is of vLLM's FlatLogprobs
def test_objects_and_impossible_tokens(first: Any) -> None:
    """vLLM's RequestOutput; -9999 is what its server writes for a log-prob of -inf."""
    entries = [
        first,
        {3: SimpleNamespace(logprob=-0.5, rank=1), 4: SimpleNamespace(logprob=-9999.0, rank=2)},
    ]
    output = SimpleNamespace(prompt_token_ids=[1, 3], prompt_logprobs=entries)
    made = TopKReference.from_prompt_logprobs([output], vocab_size=5)
    assert made.lookup(torch.tensor([1, 3]))[0].tolist() == [[-0.5, -torch.inf]]


def changed(server: str, path: tuple[Any, ...], value: Any) -> Any:
    row = json.loads(VLLM)["choices"][0] if server == "vllm" else json.loads(SGLANG)["meta_info"]
    place = row
    for key in path[:-1]:
        place = place[key]
    if value is KeyError:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return row


L, S, O = "prompt_logprobs", "input_top_logprobs", "input_token_logprobs"
BAD: list[tuple[str, tuple[Any, ...], Any, str]] = [
    ("vllm", (L, 0), {"3": {"logprob": -1.0}}, r", token 0: expected None, for nothing predicts"),
    ("vllm", (L, 1), None, r", token 1: expected a mapping \{id: \{'logprob'"),
    ("vllm", (L, 1), {}, r", token 1: expected a mapping"),
    ("vllm", (L, 2, "5", "logprob"), "a", r", token 2: expected a log-prob, a number <= 0, got"),
    ("vllm", (L, 2, "5", "logprob"), 0.5, r", token 2: expected a log-prob, a number <= 0, got 0"),
    ("vllm", (L, 2, "5", "logprob"), float("nan"), r", token 2: expected a log-prob, .* got nan"),
    ("vllm", (L, 2, "5", "logprob"), KeyError, r", token 2: expected a log-prob, .* got None"),
    ("vllm", (L, 2, "x"), {"logprob": -1.0}, r", token 2: expected a token id in \[0, 20\), got"),
    ("vllm", (L, 2, "20"), {"logprob": -9.0}, r", token 2: expected a token id in \[0, 20\)"),
    ("vllm", (L, 2, "1", "logprob"), -0.2, r", token 2: expected log-probs of one distribution"),
    ("vllm", (L, 2, "5"), KeyError, r", token 2: expected the prompt's own token 5 beside"),
    ("vllm", ("prompt_token_ids",), [7, 3], r": expected 2 entries, one for each prompt token, g"),
    ("vllm", ("prompt_token_ids", 1), 20, r"\['prompt_token_ids'\]\[1\]: expected a token id"),
    ("vllm", (L,), KeyError, r": expected vLLM's prompt_logprobs, or SGLang's .* got keys"),
    ("vllm", (L,), "text", r"\['prompt_logprobs'\]: expected a list with an entry for each token"),
    ("sglang", (S,), KeyError, r": expected input_top_logprobs beside .*; ask .* top_logprobs_n"),
    ("sglang", (O,), KeyError, r": expected input_token_logprobs beside input_top_logprobs"),
    ("sglang", (O, 0, 0), -1.0, r", token 0: expected a log-prob of None, .* logprob_start_len=0"),
    ("sglang", (O, 1), [-1.0], r", token 1: expected \[log-prob, id, text\]"),
    ("sglang", (S, 1), None, r", token 1: expected a list of \[log-prob, id, text\]"),
    ("sglang", (S, 1, 0), [-0.5], r", token 1: expected \[log-prob, id, text\], got \[-0.5\]"),
    ("sglang", (S, 1, 1, 1), 9, r", token 1: expected each id once, got id 9 twice"),
    ("sglang", (S, 2), KeyError, r": expected 3 entries, one for each prompt token, got 2"),
    ("sglang", (O, 2, 1), 21, r", token 2: expected a token id in \[0, 20\)"),
]


@pytest.mark.parametrize(("server", "path", "value", "message"), BAD)
def test_malformed_rows_are_named(
    server: str, path: tuple[Any, ...], value: Any, message: str
) -> None:
    good, bad = changed(server, ("kept",), 1), changed(server, path, value)
    with pytest.raises(
        ValueError, match=r"^TopKReference\.from_prompt_logprobs: rows\[1\]" + message
    ):
        TopKReference.from_prompt_logprobs([good, bad], vocab_size=20)


def test_other_wrong_calls() -> None:
    row = json.loads(VLLM)["choices"][0]
    make = TopKReference.from_prompt_logprobs
    wrong: list[list[Any]] = [[], row[L]]
    for rows in wrong:
        with pytest.raises(ValueError, match=r"rows: expected a list of rows, one for each sequ"):
            make(rows, vocab_size=20)
    make([row[L]], vocab_size=20)  # as advised
    with pytest.raises(TypeError, match=r"rows: expected a list of rows, .*; pass \[row\]"):
        make(row, vocab_size=20)
    make([row], vocab_size=20)  # as advised
    response = json.loads(VLLM)
    with pytest.raises(TypeError, match=r"rows: expected a list of rows, .*; pass response\['choi"):
        make(response, vocab_size=20)
    with pytest.raises(ValueError, match=r"rows\[0\]: expected vLLM's .*; pass response\['choices"):
        make([response], vocab_size=20)
    make(response["choices"], vocab_size=20)  # as advised
    with pytest.raises(ValueError, match="vocab_size: expected an integer >= 1, got 0"):
        make([row], vocab_size=0)
    with pytest.raises(ValueError, match="temperature: expected a finite number > 0, got 0"):
        make([row], vocab_size=20, temperature=0.0)
    with pytest.raises(ValueError, match=r"rows\[0\]: expected at least 2 tokens, got 1"):
        make([{"prompt_token_ids": [3], L: [None]}], vocab_size=20)
    turned = [None, dict(reversed(row[L][1].items())), row[L][2]]
    with pytest.raises(
        ValueError,
        match=r"rows\[0\], token 1: expected the prompt's own token first, as vLLM has it, got "
        r"token 4 first, and \[3\] of a rank below the top ones; give the row as",
    ):
        make([turned], vocab_size=20)
    made = make([{"prompt_token_ids": [7, 3, 5], L: turned}], vocab_size=20)  # as advised
    assert made.tokens.tolist() == [7, 3, 5]
