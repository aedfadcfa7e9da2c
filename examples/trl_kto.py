"""KTO with an exact KL to the base beside its own loss.

python examples/trl_kto.py [MODEL]
"""

import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import KTOConfig, KTOTrainer

from fasttax.integrations.trl import FullKL, patch

MODEL = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
CPU = not torch.cuda.is_available()

data = Dataset.from_list(
    [
        {"prompt": "Water boils at", "completion": " 100 degrees Celsius.", "label": True},
        {"prompt": "The capital of France", "completion": " is a city.", "label": False},
    ]
    * 4
)

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
args = KTOConfig(
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
    max_length=64,
)
trainer = KTOTrainer(
    model, ref_model=base, args=args, train_dataset=data, processing_class=tokenizer
)

with patch("kto"), FullKL(trainer, base, beta=0.1, kind="policy_ref"):
    trainer.train()
print(trainer.state.log_history[-2])
