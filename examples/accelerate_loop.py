"""An Accelerate loop with gradient accumulation and clipping.

The penalty goes in once a step, after the last backward, before clipping.

python examples/accelerate_loop.py [MODEL]
"""

import sys

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

import fasttax

MODEL = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
TEXTS = [
    "Water boils at 100 degrees Celsius.",
    "The capital of France is Paris.",
    "Two and two make four.",
    "A week has seven days.",
]

accelerator = Accelerator(gradient_accumulation_steps=2, cpu=not torch.cuda.is_available())
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
texts = tokenizer(TEXTS * 2, return_tensors="pt", padding=True)
texts["labels"] = texts["input_ids"].masked_fill(texts["attention_mask"] == 0, -100)
rows = [{name: values[i] for name, values in texts.items()} for i in range(8)]
fisher = fasttax.estimate_fisher(model, [texts], progress=False)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
model, optimizer, loader = accelerator.prepare(
    model, optimizer, torch.utils.data.DataLoader(rows, batch_size=2)
)
# on the prepared model, which may be on another device
ewc = fasttax.EWC(accelerator.unwrap_model(model), fisher, strength=100.0)

for batch in loader:
    with accelerator.accumulate(model):
        loss = model(**batch).loss
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            scaler = optimizer.scaler  # under fp16 the gradients still carry the loss scale here
            ewc.add_grad_(scaler.get_scale() if scaler is not None else 1.0)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    print(f"loss {loss.item():.4f}, Fisher-weighted distance {ewc.distance().total.item():.2e}")
