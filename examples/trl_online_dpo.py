"""Online DPO on fasttax's log-probs.

python examples/trl_online_dpo.py [MODEL]
"""

import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from fasttax.integrations.trl import patch

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
args = OnlineDPOConfig(
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
    max_new_tokens=16,
)
trainer = OnlineDPOTrainer(
    model,
    ref_model=base,
    reward_funcs=brevity,
    args=args,
    train_dataset=data,
    processing_class=tokenizer,
)

with patch("online_dpo"):  # fasttax's op in place of TRL's; taken back at the end
    trainer.train()
print(trainer.state.log_history[-2])
