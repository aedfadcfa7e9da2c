"""EWC in files and in a trainer's checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fasttax._base import checks, dtensor, files, mapped
from fasttax.ewc.fit import differences, match, survey
from fasttax.ewc.lora import LoraHeld
from fasttax.ewc.store import Held, Kept, Store, decode_anchor, encode_anchor, encode_for
from fasttax.fisher.estimate import STORAGES, FisherEstimate, Stored

if TYPE_CHECKING:
    from fasttax.ewc.ewc import EWC


def anchor_hash(ewc: EWC) -> str:
    """As FisherEstimate's model_hash: of the anchor, base weights standing for LoRA's."""
    anchors = (
        (h.name, dtensor.whole(dtensor.as_theta(h.decoded_anchor(), h.theta)))
        for h in ewc._store.held.values()
    )
    bases = ((h.name, dtensor.whole(h.module.base_layer.weight)) for h in ewc._lora)
    return files.weights_hash((*anchors, *bases))


def _tensors(held: Mapping[str, Held], lora: list[LoraHeld]) -> dict[str, Tensor]:
    out = {f"anchor.{n}": h.anchor for n, h in held.items()}
    kept: list[Kept] = [*held.values(), *lora]
    for h in kept:
        out[f"fisher.{h.name}"] = h.fisher.values
        if h.fisher.scales is not None:
            out[f"scales.{h.name}"] = h.fisher.scales
    for update in lora:
        if update.anchor is not None:
            out[f"lora_b.{update.name}"], out[f"lora_a.{update.name}"] = update.anchor
    return out


def _gathered(ewc: EWC) -> dict[str, Held]:
    """Whole tensors where parameters are sharded.

    u8log blocks do not meet at the seams, so what is stored is decoded first.
    """
    out = {}
    for name, h in ewc._store.held.items():
        if dtensor.is_sharded(h.theta):
            whole = [
                dtensor.whole(dtensor.as_theta(t, h.theta))
                for t in (h.fisher.decode(), h.decoded_anchor())
            ]
            kind: Any = h.anchor.dtype if h.anchor.dtype != torch.uint8 else ewc._anchor_dtype
            h = Held(
                name,
                encode_for(h.theta, whole[0], ewc.storage),
                h.theta,
                encode_anchor(whole[1], kind),
            )
        out[name] = h
    return out


def _facts(ewc: EWC) -> dict[str, Any]:
    dtype = ewc._anchor_dtype
    return {
        "strength": ewc.strength,
        "storage": ewc.storage,
        "offload": ewc.offload,
        "anchor_dtype": dtype if dtype is None else str(dtype),
    }


def save(ewc: EWC, path: str | os.PathLike[str]) -> None:
    sharded = any(key is not None for key in ewc._store.meshes())
    held = _gathered(ewc)
    anchors = {n: h.anchor for n, h in held.items()}
    if not sharded or dist.get_rank() == 0:
        extra = {**_facts(ewc), "anchor_hash": files.weights_hash(anchors.items())}
        tensors = _tensors(held, ewc._lora)
        specs = {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}
        mapped.write_streamed(path, "EWC", specs, {**ewc.metadata, "ewc": extra}, tensors.items())
    if sharded:
        dist.barrier()


def _dtype_of(text: str | None) -> torch.dtype | str | None:
    return (
        getattr(torch, text.removeprefix("torch."))
        if text is not None and text.startswith("torch.")
        else text
    )


def load(
    ewc: EWC,
    path: str | os.PathLike[str],
    model: nn.Module,
    offload: str | None,
    rename: Mapping[str, str] | None,
) -> None:
    op = "EWC.load"
    tensors, metadata = files.read(path, "EWC")
    extra = metadata.pop("ewc")
    damaged = f"{op}: {path}: {{}}; the file is damaged, write it anew with .save()"
    anchors = {n.removeprefix("anchor."): t for n, t in tensors.items() if n.startswith("anchor.")}
    stored = {
        n.removeprefix("fisher."): Stored(t, tensors.get("scales." + n.removeprefix("fisher.")))
        for n, t in tensors.items()
        if n.startswith("fisher.")
    }
    if files.weights_hash(anchors.items()) != extra["anchor_hash"]:
        raise ValueError(damaged.format("the anchor does not match its hash"))
    missing = [n for n in anchors if n not in stored]
    if missing:
        raise ValueError(damaged.format(f"no Fisher for {', '.join(missing[:5])}"))
    if offload == "as saved":
        offload = extra["offload"]
    if offload not in (None, "cpu"):
        raise checks.fail(op, "offload", "None, 'cpu', or 'as saved'", repr(offload))
    survey(op, FisherEstimate(stored), stored, None, None)  # decodes them one by one
    targets = match(op, model, {n: s.values for n, s in stored.items()}, rename)
    ewc.strength, ewc.storage, ewc.offload, ewc.metadata = (
        extra["strength"],
        checks.choice(op, "storage", extra["storage"], STORAGES),
        offload,
        metadata,
    )
    ewc._anchor_dtype = _dtype_of(extra.get("anchor_dtype"))
    ewc._store, ewc._lora = Store(offload), []
    plain = {}
    for t in targets:
        if t.lora is not None:
            device = t.theta.device
            scales = stored[t.given].scales
            pair = tuple(
                tensors[f"lora_{k}.{t.given}"].to(device)
                for k in ("b", "a")
                if f"lora_{k}.{t.given}" in tensors
            )
            kept = Stored(
                stored[t.given].values.to(device), None if scales is None else scales.to(device)
            )
            ewc._lora.append(
                LoraHeld(t.name, kept, t.lora, (pair[0], pair[1]) if len(pair) == 2 else None)
            )
        elif t.given not in anchors:
            raise ValueError(damaged.format(f"no anchor for {t.given}"))
        else:
            plain[t.given] = t
    if offload == "cpu" and all(
        t.theta.device.type == "cpu" and t.given == t.name and not dtensor.is_sharded(t.theta)
        for t in plain.values()
    ):
        del tensors, anchors, stored
        ewc._store.adopt(mapped.Mapped(path), {t.name: t.theta for t in plain.values()})
        return
    held = []
    for given, t in plain.items():
        fisher, anchor = stored[given], anchors[given]
        if dtensor.is_sharded(t.theta):
            kind: Any = anchor.dtype if anchor.dtype != torch.uint8 else ewc._anchor_dtype
            fisher = encode_for(t.theta, dtensor.part_of(fisher.decode(), t.theta), ewc.storage)
            anchor = encode_anchor(
                dtensor.part_of(decode_anchor(anchor, torch.Size(t.shape)), t.theta), kind
            )
        held.append(Held(t.name, fisher, t.theta, anchor))
    ewc._store.put(*held)


def state_dict(ewc: EWC) -> dict[str, Any]:
    tensors = {n: t.detach().clone() for n, t in _tensors(ewc._store.held, ewc._lora).items()}
    return {**_facts(ewc), "metadata": dict(ewc.metadata), "tensors": tensors}


def load_state_dict(ewc: EWC, state: Mapping[str, Any]) -> None:
    op = "EWC.load_state_dict"
    needed = {"strength", "storage", "metadata", "tensors"}
    if not isinstance(state, Mapping) or not needed <= set(state):
        raise checks.fail(
            op,
            "state",
            "what EWC.state_dict() gave",
            state if not isinstance(state, Mapping) else f"keys {sorted(state)[:10]}",
        )
    tensors: dict[str, Tensor] = state["tensors"]
    own: dict[str, Kept] = {h.name: h for h in ewc.kept()}
    given = {n.removeprefix("fisher."): t for n, t in tensors.items() if n.startswith("fisher.")}
    wrong = [f"{n}: not held here" for n in given if n not in own] + [
        f"{n}: missing" for n in own if n not in given
    ]
    wrong += [
        f"{n}: shape {tuple(given[n].shape)}, held with {tuple(h.fisher.values.shape)}"
        for n, h in own.items()
        if n in given and given[n].shape != h.fisher.values.shape
    ]
    differences(op, "state", wrong)
    ewc.strength, ewc.storage, ewc.metadata = (
        float(state["strength"]),
        checks.choice(op, "storage", state["storage"], STORAGES),
        dict(state["metadata"]),
    )
    ewc._anchor_dtype = _dtype_of(state.get("anchor_dtype"))
    store = Store(ewc.offload)
    held = [
        Held(n, Stored(given[n], tensors.get(f"scales.{n}")), h.theta, tensors[f"anchor.{n}"])
        for n, h in ewc._store.held.items()
    ]
    store.put(*held)
    for lora in ewc._lora:
        device, n = lora.fisher.values.device, lora.name
        scales = tensors.get(f"scales.{n}")
        lora.fisher = Stored(given[n].to(device), None if scales is None else scales.to(device))
        lora.anchor = (
            (tensors[f"lora_b.{n}"].to(device), tensors[f"lora_a.{n}"].to(device))
            if f"lora_b.{n}" in tensors
            else None
        )
    ewc._store = store
