"""Records what a running vLLM or SGLang returns of prompts, for tests/integrations/recorded/.

    python -m tests.tools.record_servers vllm http://localhost:8000 MODEL_FOLDER
    python -m tests.tools.record_servers sglang http://localhost:30000 MODEL_FOLDER

Beside the server's rows a file has the same log-probs by transformers in float64, and how far its
own float32 is from them: the measure of what the server's may differ by. The servers sample at
temperature 2, which the prompts' log-probs do not depend on.
"""

from __future__ import annotations

import argparse
import json
import urllib.request
from pathlib import Path
from typing import Any

import torch

RECORDED = Path(__file__).parents[1] / "integrations" / "recorded"
PROMPTS = ("The capital of France is", "def f(x):\n    return")
SAMPLED = {"temperature": 2.0}
TOP = 3


def request(url: str, body: Any = None) -> Any:
    """The server's JSON."""
    sent = urllib.request.Request(url)
    if body is not None:
        sent.data = json.dumps(body).encode()
        sent.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(sent, timeout=300) as answer:
        return json.load(answer)


def vllm(url: str) -> dict[str, Any]:
    """The choices of one completion, and a chat's response, which has the prompt's beside them."""
    asked = {"max_tokens": 1, "prompt_logprobs": TOP, "return_token_ids": True, **SAMPLED}
    completion = request(f"{url}/v1/completions", {"prompt": PROMPTS, **asked})
    messages = [{"role": "user", "content": PROMPTS[0]}]
    chat = request(f"{url}/v1/chat/completions", {"messages": messages, **asked})
    version = request(f"{url}/version")["version"]
    return {"version": version, "asked": asked, "rows": [*completion["choices"], chat]}


def sglang(url: str) -> dict[str, Any]:
    """The responses to one request of /generate."""
    asked = {
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": TOP,
        "sampling_params": {"max_new_tokens": 1, **SAMPLED},
    }
    rows = request(f"{url}/generate", {"text": PROMPTS, **asked})
    return {"version": request(f"{url}/server_info")["version"], "asked": asked, "rows": rows}


def log_probs(folder: str, tokens: list[int]) -> tuple[list[dict[str, float]], float]:
    """Of each token but the first, those of the TOP + 1 largest and its own; float32's error."""
    from transformers import AutoModelForCausalLM

    row = torch.tensor([tokens])
    found = {}
    for dtype in (torch.float32, torch.float64):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        with torch.no_grad():
            found[dtype] = model(input_ids=row).logits[0, :-1].double().log_softmax(-1)
    exact = found[torch.float64]
    listed = []
    for t, logp in enumerate(exact, 1):
        ids = dict.fromkeys([tokens[t], *logp.topk(TOP + 1).indices.tolist()])
        listed.append({str(i): float(logp[i]) for i in ids})
    at = torch.tensor([[int(i) for i in [*entry][:TOP]] for entry in listed])
    error = (found[torch.float32] - exact).gather(1, at).abs().max()
    return listed, float(error)


def main() -> None:
    """Writes recorded/SERVER.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("server", choices=("vllm", "sglang"))
    parser.add_argument("url")
    parser.add_argument("model", help="the folder that it serves, in float32")
    args = parser.parse_args()
    from transformers import AutoConfig, AutoTokenizer

    recorded = {"vllm": vllm, "sglang": sglang}[args.server](args.url.rstrip("/"))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    config = AutoConfig.from_pretrained(args.model)
    tokens = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    if args.server == "vllm":
        tokens.append(recorded["rows"][-1]["prompt_token_ids"])
    by_transformers = [log_probs(args.model, row) for row in tokens]
    recorded |= {
        "server": args.server,
        "model": Path(args.model).name,
        "vocab_size": config.vocab_size,
        "tokens": tokens,
        "log_probs": [listed for listed, _ in by_transformers],
        "float32_error": max(error for _, error in by_transformers),
    }
    path = RECORDED / f"{args.server}.json"
    path.write_text(json.dumps(recorded, indent=1) + "\n")
    print(f"{path}: {len(tokens)} rows of {args.server} {recorded['version']}")


if __name__ == "__main__":
    main()
