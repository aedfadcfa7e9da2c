"""RLOO with an exact KL in the loss, with a gradient, where RLOO has an estimate in the reward.

python examples/trl_rloo.py [MODEL]
"""

import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import RLOOConfig, RLOOTrainer

from fasttax.integrations.trl import FullKL, patch

MODEL = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
CPU = not torch.cuda.is_available()

PROMPTS = ["Water boils at", "The capital of France", "Two and two", "A week has"]
data = Dataset.from_list([{"prompt": text} for text in PROMPTS * 2])


def brevity(completions, **others):
    """A reward of -1 a character."""
    return [-float(len(text)) for text in completions]


tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
args = RLOOConfig(
    output_dir="out",
    max_steps=2,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    learning_rate=1e-4,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    use_cpu=CPU,
    bf16=not CPU,
    beta=0.0,
    num_generations=2,
    max_completion_length=16,
)
trainer = RLOOTrainer(
    model, reward_funcs=brevity, args=args, train_dataset=data, processing_class=tokenizer
)

with patch("rloo"), FullKL(trainer, base, beta=0.1, kind="policy_ref"):
    trainer.train()
print(trainer.state.log_history[-2])
