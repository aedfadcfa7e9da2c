"""A reference kept as top-k log-probs: computed once, then training needs no reference model.

On files it is `fasttax kl cache MODEL DATA`.

python examples/cached_reference.py [MODEL]
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from fasttax.integrations.reference import TopKReference
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
rows = [
    {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids}
    for ids in tokenizer(TEXTS)["input_ids"]
]

# 8 bytes for each of the k
TopKReference.make(model, [row["input_ids"] for row in rows], k=64).save("reference.safetensors")

args = TrainingArguments(
    "out",
    max_steps=2,
    per_device_train_batch_size=1,
    learning_rate=1e-4,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    use_cpu=not torch.cuda.is_available(),
)
trainer = Trainer(model, args, train_dataset=rows)
with attach(trainer, kl={"ref_model": "reference.safetensors", "beta": 0.1, "kind": "ref_policy"}):
    trainer.train()
print(trainer.state.log_history[-2])
