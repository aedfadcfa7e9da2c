"""A training loop of your own: exact Fisher, EWC, an exact KL to the frozen base.

The KL's coefficient steers towards a target.

python examples/plain_loop.py [MODEL]
"""

import copy
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fasttax
from fasttax.integrations import AdaptiveKL

MODEL = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
TEXTS = [
    "Water boils at 100 degrees Celsius.",
    "The capital of France is Paris.",
    "Two and two make four.",
    "A week has seven days.",
]

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
reference = copy.deepcopy(model).eval().requires_grad_(False)
batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

ewc = fasttax.EWC(model, fasttax.estimate_fisher(model, [batch], progress=False), strength=100.0)
control = AdaptiveKL(target=0.02, beta=0.1)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

for step in range(4):
    logits = model(**batch).logits
    with torch.no_grad():
        ref_logits = reference(**batch).logits
    task = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    kl = fasttax.token_kl(logits, ref_logits, mask=batch["attention_mask"], reduction="mean")
    (task + control.beta * kl).backward()
    penalty = ewc.add_grad_()  # before clipping: part of what is clipped
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    control.update(kl.item())
    print(
        f"step {step}: task {task.item():.4f}, KL {kl.item():.2e}, penalty {penalty.item():.2e}, "
        f"beta {control.beta:.3f}"
    )
