"""A LightningModule with EWC: one callback.

python examples/lightning_module.py [MODEL]
"""

import sys

import lightning
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fasttax
from fasttax.integrations.lightning import EWCCallback

MODEL = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
TEXTS = [
    "Water boils at 100 degrees Celsius.",
    "The capital of France is Paris.",
    "Two and two make four.",
    "A week has seven days.",
]


class Model(lightning.LightningModule):
    """A language model's own loss, with AdamW."""

    def __init__(self):
        super().__init__()
        self.lm = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)

    def training_step(self, batch, index):
        """Every token is predicted, but padding."""
        return self.lm(**batch).loss

    def configure_optimizers(self):
        """AdamW knows nothing of EWC."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


tokenizer = AutoTokenizer.from_pretrained(MODEL)
texts = tokenizer(TEXTS * 2, return_tensors="pt", padding=True)
texts["labels"] = texts["input_ids"].masked_fill(texts["attention_mask"] == 0, -100)
rows = [{name: values[i] for name, values in texts.items()} for i in range(8)]
module = Model()
fisher = fasttax.estimate_fisher(module.lm, [texts], progress=False)
callback = EWCCallback(fasttax.EWC(module.lm, fisher, strength=100.0))

trainer = lightning.Trainer(
    max_steps=4,
    gradient_clip_val=1.0,
    accelerator="auto",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    callbacks=[callback],
)
trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=2))
print({name: value.item() for name, value in trainer.callback_metrics.items()})
