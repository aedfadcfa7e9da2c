"""transformers' Trainer with EWC and an exact KL to the base: one line in, one line out.

python examples/transformers_trainer.py [MODEL]
"""

import copy
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import fasttax
from fasttax.integrations.transformers import attach

MODEL = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
TEXTS = [
    "Water boils at 100 degrees Celsius.",
    "The capital of France is Paris.",
    "Two and two make four.",
    "A week has seven days.",
]

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
base = copy.deepcopy(model)
rows = [
    {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids}
    for ids in tokenizer([t[:24] for t in TEXTS * 2])["input_ids"]
]
batches = [{"input_ids": torch.tensor([row["input_ids"]])} for row in rows[:4]]
ewc = fasttax.EWC(model, fasttax.estimate_fisher(model, batches, progress=False), strength=100.0)

args = TrainingArguments(
    "out",
    max_steps=4,
    per_device_train_batch_size=1,
    gradient_accumulation_steps=2,
    learning_rate=1e-4,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    use_cpu=not torch.cuda.is_available(),
)
trainer = Trainer(model, args, train_dataset=rows)

with attach(trainer, ewc=ewc, kl={"ref_model": base, "beta": 0.1, "kind": "policy_ref"}):
    trainer.train()

last = trainer.state.log_history[-2]
print(
    {
        key: round(last[key], 6)
        for key in ("ewc/penalty", "ewc/distance", "kl/policy_ref", "kl/ref_policy", "entropy")
    }
)
