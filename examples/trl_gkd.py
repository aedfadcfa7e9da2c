"""GKD with fasttax's divergence, by a mixin: nothing is patched.

python examples/trl_gkd.py [MODEL]
"""

import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from fasttax.integrations.trl import FusedGKDMixin


class FusedGKDTrainer(FusedGKDMixin, GKDTrainer):
    """TRL's trainer, whose divergence is fasttax's."""


MODEL = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
CPU = not torch.cuda.is_available()

CHATS = [("Where is Paris?", "In France."), ("2 + 2?", "4")]
turns = [
    [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    for question, answer in CHATS * 4
]
data = Dataset.from_list([{"messages": chat} for chat in turns])

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
# in earnest: a larger one of the same vocabulary
teacher = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
args = GKDConfig(
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
    max_new_tokens=16,
)
trainer = FusedGKDTrainer(
    model, teacher_model=teacher, args=args, train_dataset=data, processing_class=tokenizer
)

trainer.train()
print(trainer.state.log_history[-2])
