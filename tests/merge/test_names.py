"""merge under other names: wrappers, tied weights, names that transformers converts, adapters;
and folders whose files have one name.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fasttax
from fasttax import FisherEstimate, merge

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}
BERT = {**SIZES, "max_position_embeddings": 16}
T5 = {"vocab_size": 31, "d_model": 16, "d_ff": 20, "d_kv": 8, "num_layers": 1}
MODELS: dict[str, Any] = {
    "Qwen3Moe": ("ForCausalLM", {**SIZES, **EXPERTS}),
    "Mixtral": ("ForCausalLM", {**SIZES, "num_local_experts": 3}),
    "Llama": ("ForCausalLM", {**SIZES, "tie_word_embeddings": True}),
    "Bert": ("ForMaskedLM", BERT),
    "T5": ("ForConditionalGeneration", T5),
}


def pair(kind: str) -> list[Any]:
    """Two models of a kind, with no two weights alike."""
    task, options = MODELS[kind]
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = getattr(transformers, f"{kind}Config")(**options)
        model = getattr(transformers, f"{kind}{task}")(config).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.1)
        made.append(model)
    return made


def fishers_of(models: list[Any]) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(2)
    return [
        {n: torch.rand(p.shape, generator=g) + 0.05 for n, p in m.named_parameters()}
        for m in models
    ]


def formula(models: list[Any], fishers: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    a, b = (dict(m.named_parameters()) for m in models)
    f, g = fishers
    return {n: ((f[n] * a[n] + g[n] * b[n]) / (f[n] + g[n])).detach() for n in a}


def close(got: Any, want: dict[str, Tensor]) -> None:
    for name, t in want.items():
        torch.testing.assert_close(got[name].detach(), t, rtol=1e-5, atol=1e-6, msg=name)


# --- wrappers ----------------------------------------------------------------------------------

WRAPPED = {
    "DDP": lambda n: f"module.{n}",
    "compiled": lambda n: f"_orig_mod.{n}",
    "both": lambda n: f"_orig_mod.module.{n}",
    "compiled inside": lambda n: n.replace(".", "._orig_mod.", 1),
    "PEFT": lambda n: f"base_model.model.{n}".replace(".weight", ".base_layer.weight"),
    "checkpointed": lambda n: n.replace("0.", "0._checkpoint_wrapped_module."),
}


def plain_pair() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)) for _ in range(2)]


@pytest.mark.parametrize("missing", ["error", "mean"])
@pytest.mark.parametrize("case", WRAPPED)
def test_fishers_and_models_of_wrapped_modules(case: str, missing: str) -> None:
    models, wrapped = plain_pair(), WRAPPED[case]
    fishers = fishers_of(models)
    want = formula(models, fishers)
    foreign = [{wrapped(n): f for n, f in each.items()} for each in fishers]
    close(merge.fisher_average(models, foreign, missing=missing), want)
    close(merge.fisher_average(models, [fishers[0], foreign[1]], missing=missing), want)
    state = {wrapped(n): t for n, t in models[1].state_dict().items()}
    close(merge.fisher_average([models[0], state], fishers, missing=missing), want)


@pytest.mark.parametrize("missing", ["error", "mean"])
def test_fishers_of_other_names_are_refused(missing: str) -> None:
    models = plain_pair()
    fishers = fishers_of(models)
    other = {f"backbone.{n}": f for n, f in fishers[1].items()}
    with pytest.raises(ValueError, match=r"(?s)fishers\[1\].*backbone\.0\.weight"):
        merge.fisher_average(models, [fishers[0], other], missing=missing)


def test_a_mean_for_lack_of_a_name_is_refused() -> None:
    """Half of the names fit; the others would be averaged plainly without a word."""
    models = plain_pair()
    fishers = fishers_of(models)
    half = {n.replace("1.", "head."): f for n, f in fishers[1].items()}
    with pytest.raises(ValueError, match=r"(?s)head\.weight.*rename them, or pass a mapping"):
        merge.fisher_average(models, [fishers[0], half], missing="mean")
    renamed = {n.replace("head.", "1."): f for n, f in half.items()}
    close(merge.fisher_average(models, [fishers[0], renamed]), formula(models, fishers))
    fewer = [{n: f for n, f in each.items() if n in fishers[0]} for each in (fishers[0], half)]
    merge.fisher_average(models, fewer, missing="mean")


# --- tied weights ------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["error", "mean"])
@pytest.mark.parametrize("kind", ["Llama", "Bert", "T5"])
def test_tied_weights_in_memory(kind: str, missing: str) -> None:
    """Bert ties a bias too, which has one dimension and may be constant."""
    models = pair(kind)
    fishers = fishers_of(models)
    merged = merge.fisher_average(models, fishers, missing=missing)
    loaded = copy.deepcopy(models[0])
    loaded.load_state_dict(merged)
    close(dict(loaded.named_parameters()), formula(models, fishers))
    close(merge.fisher_average([m.state_dict() for m in models], fishers, missing=missing), merged)


def test_tied_weights_in_files_that_have_both(tmp_path: Path) -> None:
    models = pair("Llama")
    fishers = fishers_of(models)
    for k, m in enumerate(models):
        state = {n: t.clone() for n, t in m.state_dict().items()}
        save_file(state, tmp_path / f"{k}.safetensors")
    paths = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
    for missing in ("error", "mean"):
        got = merge.fisher_average(paths, fishers, missing=missing)
        close(got, formula(models, fishers))
        assert torch.equal(got["lm_head.weight"], got["model.embed_tokens.weight"])
    close(merge.linear(models[0], paths[1], 0.5), merge.linear(models[0], models[1], 0.5))


def test_a_tied_bias_in_files_that_have_both(tmp_path: Path) -> None:
    models, paths = pair("Bert"), [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
    fishers = fishers_of(models)
    for m, path in zip(models, paths, strict=True):
        save_file({n: t.clone() for n, t in m.state_dict().items()}, path)
    got = merge.fisher_average(paths, fishers, missing="mean")
    close(got, formula(models, fishers))
    assert torch.equal(got["cls.predictions.decoder.bias"], got["cls.predictions.bias"])


def test_fishers_under_the_other_name_of_a_tied_weight(tmp_path: Path) -> None:
    """The folder has the embedding, the Fisher the head."""
    models = pair("Llama")
    fishers = fishers_of(models)
    want = formula(models, fishers)
    for k, m in enumerate(models):
        m.save_pretrained(tmp_path / str(k))
    heads = [{**f, "lm_head.weight": f["model.embed_tokens.weight"]} for f in fishers]
    for f in heads:
        del f["model.embed_tokens.weight"]
    assert "lm_head.weight" not in load_file(tmp_path / "0" / "model.safetensors")
    close(merge.fisher_average([tmp_path / "0", tmp_path / "1"], heads), want)


def test_two_fishers_of_one_weight_are_refused() -> None:
    models = pair("Llama")
    fishers = fishers_of(models)
    both = [{**f, "lm_head.weight": f["model.embed_tokens.weight"] * 2} for f in fishers]
    with pytest.raises(ValueError, match=r"fishers\[0\]: expected one Fisher of .*embed_tokens"):
        merge.fisher_average(models, both)
    equal = [{**f, "lm_head.weight": f["model.embed_tokens.weight"]} for f in fishers]
    close(merge.fisher_average(models, equal), formula(models, fishers))


def test_equal_weights_of_a_head_that_was_trained_are_not_tied() -> None:
    """One model's head is a copy of its embedding, the other's has moved."""
    w, v, u = (torch.randn(5, 4) for _ in range(3))
    models: Any = [{"embed": w, "head": w.clone()}, {"embed": v, "head": u}]
    with pytest.raises(ValueError, match="got none for:\n  head"):
        merge.fisher_average(models, [{"embed": torch.rand(5, 4)}] * 2)


# --- names on disk and in memory ---------------------------------------------------------------


@pytest.mark.parametrize("max_shard_size", ["2KB", "1GB"])
@pytest.mark.parametrize("kind", ["Qwen3Moe", "Mixtral"])
def test_fused_experts(kind: str, max_shard_size: str, tmp_path: Path) -> None:
    models = pair(kind)
    fishers = fishers_of(models)
    want = formula(models, fishers)
    for k, m in enumerate(models):
        m.save_pretrained(tmp_path / str(k), max_shard_size=max_shard_size)
        FisherEstimate(fishers[k]).save(tmp_path / f"f{k}")
    folders = [tmp_path / "0", tmp_path / "1"]
    merge.fisher_average(folders, fishers, output=tmp_path / "m", progress=False)
    loaded = type(models[0]).from_pretrained(tmp_path / "m", dtype=torch.float32)
    close(dict(loaded.named_parameters()), want)
    # Fishers from files; a folder beside a module, whose names the merge then has
    mixed = merge.fisher_average([models[0], folders[1]], [tmp_path / "f0", tmp_path / "f1"])
    close(mixed, want)
    on_disk = merge.fisher_average([folders[0], models[1]], fishers)
    assert set(on_disk) >= {n for n in _names(folders[0]) if "experts.0" in n}
    close(merge.linear(models[0], folders[1], 0.25), merge.linear(models[0], models[1], 0.25))
    # a Fisher by the names on disk
    as_saved = merge.linear(folders[0], folders[0], 0)
    named_so = {n: torch.rand_like(t) for n, t in as_saved.items()}
    merge.fisher_average(models, [named_so, fishers[1]], progress=False)


def _names(folder: Path) -> set[str]:
    return {n for f in folder.glob("*.safetensors") for n in load_file(f)}


def test_a_fisher_by_the_names_on_disk_is_that_of_memory(tmp_path: Path) -> None:
    """Saved as a checkpoint, a Fisher goes through transformers' own conversion."""
    models = pair("Qwen3Moe")
    fishers = fishers_of(models)
    holders = pair("Qwen3Moe")
    named_so = []
    for k, holder in enumerate(holders):
        holder.load_state_dict(fishers[k])
        holder.save_pretrained(tmp_path / str(k))
        named_so.append(load_file(tmp_path / str(k) / "model.safetensors"))
    close(merge.fisher_average(models, named_so), formula(models, fishers))


def test_a_part_of_the_experts_is_no_fisher_of_all() -> None:
    models = pair("Qwen3Moe")
    fishers = fishers_of(models)
    gone = next(n for n in fishers[0] if "gate_up_proj" in n)
    some = [{n: f for n, f in each.items() if n != gone} for each in fishers]
    for each in some:
        each[gone.replace("gate_up_proj", "0.gate_proj.weight")] = torch.rand(8, 16)
    with pytest.raises(ValueError, match=r"got none for:\n  .*gate_up_proj"):
        merge.fisher_average(models, some)


# --- what has no average -----------------------------------------------------------------------


def test_counters_are_the_first_models() -> None:
    a: Any = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    b = copy.deepcopy(a).train()
    b(torch.randn(5, 3))
    got = merge.linear(a, b, 0.25)
    assert int(got["1.num_batches_tracked"]) == 0
    assert int(merge.linear(b, a, 0.25)["1.num_batches_tracked"]) == 1
    running = 0.75 * a[1].running_mean + 0.25 * b[1].running_mean
    torch.testing.assert_close(got["1.running_mean"], running)
    copy.deepcopy(a).load_state_dict(got)


ADAPTERS: dict[str, Any] = {
    "LoraConfig": {"r": 2, "init_lora_weights": False},
    "LoHaConfig": {"r": 2, "init_weights": False},
    "LoKrConfig": {"r": 2, "init_weights": False},
    "VeraConfig": {"r": 2, "init_weights": False},
    "OFTConfig": {"r": 2, "oft_block_size": 0, "init_weights": False},
    "HRAConfig": {"r": 2, "init_weights": False},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_factors_of_adapters(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    bases = [pair("Llama")[0] for _ in range(2)]
    adapted = []
    for seed, base in enumerate(bases):
        torch.manual_seed(seed)
        config = getattr(peft, kind)(target_modules=["q_proj"], **ADAPTERS[kind])
        adapted.append(peft.get_peft_model(base, config))
        adapted[-1].save_pretrained(tmp_path / str(seed))
    files = [tmp_path / str(k) / "adapter_model.safetensors" for k in (0, 1)]
    for sources in (files, adapted):
        with pytest.raises(ValueError, match=r"q_proj\.\w*(lora|hada|lokr|vera|oft|hra)_.*factor"):
            merge.linear(sources[0], sources[1], 0.5)
    with pytest.raises(ValueError, match="factor"):
        merge.fisher_average(files, [load_file(files[0])] * 2)
    # the ends are exact, and so is the average of one adapter with itself
    assert torch.equal(
        *(m[next(iter(m))] for m in (merge.linear(files[0], files[1], 1), load_file(files[1])))
    )
    merge.linear(files[0], files[0], 0.5)
    # the way out
    whole = [model.merge_and_unload() for model in adapted]
    a, b = (dict(m.named_parameters()) for m in whole)
    close(merge.linear(whole[0], whole[1], 0.5), {n: ((a[n] + b[n]) / 2).detach() for n in a})


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("unet.down.0.attn.to_q.lora.down.weight", True),
        ("lora_unet_down_blocks_0_attn.lora_up.weight", True),
        ("base_model.model.q.lora_magnitude_vector", True),
        ("base_model.model.q.boft_R", True),
        ("base_model.model.q.randlora_lambda", True),
        ("base_model.model.q.ia3_l", False),
        ("blocks.0.w_lora.lora.0.weight", False),  # RWKV-7's own low-rank layer
        ("model.soft_max.weight", False),
    ],
)
def test_names_of_factors(name: str, refused: bool) -> None:
    models: Any = [{name: torch.randn(3, 4)}, {name: torch.randn(3, 4)}]
    if refused:
        with pytest.raises(ValueError, match="factor of an adapter"):
            merge.linear(models[0], models[1], 0.5)
    else:
        merge.linear(models[0], models[1], 0.5)


def test_models_without_values() -> None:
    with torch.device("meta"):
        empty = nn.Linear(3, 4)
    with pytest.raises(ValueError, match=r"base\['weight'\]: expected values.*load its weights"):
        merge.linear(empty, nn.Linear(3, 4), 0.5)


# --- folders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_the_config_says_the_dtype_of_the_weights(dtypes: tuple[str, str], tmp_path: Path) -> None:
    models = [m.to(getattr(torch, d)) for m, d in zip(pair("Llama"), dtypes, strict=True)]
    for k, m in enumerate(models):
        m.save_pretrained(tmp_path / str(k))
        config = json.loads((tmp_path / str(k) / "config.json").read_text())
        config |= {"torch_dtype": dtypes[k], "part": {"dtype": dtypes[k]}}
        (tmp_path / str(k) / "config.json").write_text(json.dumps(config))
    out = merge.linear(tmp_path / "0", tmp_path / "1", 0.5, output=tmp_path / "m", progress=False)
    config = json.loads((out / "config.json").read_text())
    assert config["torch_dtype"] == config["part"]["dtype"] == dtypes[0]
    loaded = type(models[0]).from_pretrained(out)
    assert str(loaded.dtype) == f"torch.{dtypes[0]}"
    want = merge.linear(models[0], models[1], 0.5)
    close(want, dict(loaded.named_parameters()))


def test_the_config_says_whether_the_head_is_tied(tmp_path: Path) -> None:
    """base has one name of the weight; aligned has two equal ones, and says that they are two."""
    models = pair("Llama")
    models[0].save_pretrained(tmp_path / "0")
    models[1].config.tie_word_embeddings = False
    models[1].lm_head.weight = nn.Parameter(models[1].lm_head.weight.detach().clone())
    models[1].save_pretrained(tmp_path / "1")
    assert "lm_head.weight" in load_file(tmp_path / "1" / "model.safetensors")
    out = merge.linear(tmp_path / "0", tmp_path / "1", 0.5, output=tmp_path / "m", progress=False)
    loaded = type(models[0]).from_pretrained(out)
    want = (models[0].lm_head.weight + models[1].lm_head.weight).detach() / 2
    torch.testing.assert_close(loaded.lm_head.weight.detach(), want)


def sharded(folder: Path, files: dict[str, dict[str, Tensor]], listed: dict[str, str]) -> Path:
    for file, tensors in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": listed}))
    return folder


A, B = torch.randn(3), torch.randn(4)


def test_two_shards_of_one_name_in_two_folders(tmp_path: Path) -> None:
    files = {"x/w.safetensors": {"a": A}, "y/w.safetensors": {"b": B}}
    listed = {"a": "x/w.safetensors", "b": "y/w.safetensors"}
    one = sharded(tmp_path / "one", files, listed)
    out = merge.linear(one, {"a": A, "b": B}, 0.5, output=tmp_path / "m", progress=False)
    assert isinstance(out, Path)
    again = merge.linear(out, out, 0.5)
    assert torch.equal(again["a"], A)
    assert torch.equal(again["b"], B)
    written = json.loads((out / "model.safetensors.index.json").read_text())
    assert written["weight_map"] == listed


def test_the_index_says_which_of_two_is_meant(tmp_path: Path) -> None:
    files = {"1.safetensors": {"a": A, "b": B}, "2.safetensors": {"a": A + 1, "c": B}}
    listed = {"b": "1.safetensors", "c": "2.safetensors"}
    for chosen, want in (("1.safetensors", A), ("2.safetensors", A + 1)):
        folder = sharded(tmp_path / chosen[0], files, {**listed, "a": chosen})
        assert torch.equal(merge.linear(folder, folder, 0)["a"], want)
    folder = sharded(tmp_path / "neither", files, listed)
    with pytest.raises(ValueError, match=r"a is in .*1\.safetensors and in .*2\.safetensors"):
        merge.linear(folder, folder, 0)


@pytest.mark.parametrize("file", ["../1.safetensors", "{}/1.safetensors"])
def test_an_index_that_leaves_its_folder(file: str, tmp_path: Path) -> None:
    file = file.format(tmp_path)
    save_file({"a": A}, tmp_path / "1.safetensors")
    (tmp_path / "m").mkdir()
    folder = sharded(tmp_path / "m", {}, {"a": file})
    with pytest.raises(ValueError, match="base: expected files beside"):
        merge.linear(folder, {"a": A}, 0.5)


def test_a_shard_that_lacks_what_the_index_says(tmp_path: Path) -> None:
    listed = {"a": "1.safetensors", "b": "1.safetensors"}
    folder = sharded(tmp_path, {"1.safetensors": {"a": A}}, listed)
    with pytest.raises(ValueError, match=r"1\.safetensors lacks b"):
        merge.linear(folder, {"a": A}, 0.5)


def test_integer_and_nan_fishers_in_memory() -> None:
    models: Any = [{"a": A}, {"a": A + 1}]
    with pytest.raises(TypeError, match=r"fishers\[0\]\['a'\]: expected a tensor of dtype float32"):
        merge.fisher_average(models, [{"a": torch.ones(3, dtype=torch.int64)}] * 2)
    with pytest.raises(ValueError, match=r"fishers\[0\]\['a'\]: expected finite values >= 0"):
        merge.fisher_average(models, [{"a": A * torch.nan}] * 2)


def test_the_estimators_own_fishers_of_tied_experts(tmp_path: Path) -> None:
    """End to end: estimated, saved, merged, loaded."""
    models, data = pair("Qwen3Moe"), torch.randint(1, 31, (3, 6))
    for k, m in enumerate(models):
        fasttax.estimate_fisher(m, [data], labels="true", progress=False).save(tmp_path / f"f{k}")
        m.save_pretrained(tmp_path / str(k))
    fishers: Any = [tmp_path / "f0", tmp_path / "f1"]
    out = merge.fisher_average(
        [tmp_path / "0", tmp_path / "1"], fishers, output=tmp_path / "m", progress=False
    )
    want = merge.fisher_average(models, fishers)
    close(dict(type(models[0]).from_pretrained(out).named_parameters()), want)
