"""SFT of a LoRA adapter: the model without it is the reference, no second model is in memory.

python examples/trl_sft_lora.py [MODEL]
"""

import sys

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from fasttax.integrations.trl import FullKL, patch

MODEL = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
CPU = not torch.cuda.is_available()

PAIRS = [
    ("Water boils at", " 100 degrees Celsius."),
    ("Two and two", " make four."),
    ("The capital of France", " is Paris."),
]
data = Dataset.from_list(
    [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS * 3]
)

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
args = SFTConfig(
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
trainer = SFTTrainer(
    model,
    args,
    train_dataset=data,
    processing_class=tokenizer,
    peft_config=LoraConfig(target_modules="all-linear", exclude_modules=["lm_head"]),
)

with patch("sft"), FullKL(trainer, ref_model=None, beta=0.1):
    trainer.train()
print(trainer.state.log_history[-2])
