"""SimPO (CPO's trainer) on fasttax's log-probs.

python examples/trl_cpo.py [MODEL]
"""

import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.cpo import CPOConfig, CPOTrainer

from fasttax.integrations.trl import patch

MODEL = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
CPU = not torch.cuda.is_available()

data = Dataset.from_list(
    [
        {"prompt": "Water boils at", "chosen": " 100 degrees Celsius.", "rejected": " night."},
        {"prompt": "The capital of France", "chosen": " is Paris.", "rejected": " is a city."},
    ]
    * 4
)

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
args = CPOConfig(
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
    loss_type="simpo",
    cpo_alpha=0.0,
)
trainer = CPOTrainer(model, args, train_dataset=data, processing_class=tokenizer)

with patch("cpo"):  # fasttax's op in place of TRL's; taken back at the end
    trainer.train()
print(trainer.state.log_history[-2])
