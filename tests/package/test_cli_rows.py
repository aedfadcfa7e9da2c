"""The sequences that kl cache keeps are those that TRL's trainers make of the same data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fasttax import cli
from fasttax.cli import _rows
from fasttax.integrations.reference import TopKReference
from tests.tools import tiny_lm

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")
LENGTH = 40
USER = {"role": "user", "content": "what is 2 + 2"}
SECOND = {"role": "user", "content": "and 3 + 3"}
FOUR, FIVE = ({"role": "assistant", "content": c} for c in ("it is 4", "it is 5, I think"))
FORMS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": "to be just"}, {"text": "blue sky over the sea, and nothing else in sight"}],
    "messages": [{"messages": [USER, FOUR]}, {"messages": [SECOND, FIVE, USER, FOUR]}],
    "conversations": [
        {
            "conversations": [
                {"from": "user", "value": "what is 2 + 2"},
                {"from": "assistant", "value": "it is 4"},
            ]
        }
    ],
    "prompt and completion": [{"prompt": "two and two", "completion": " make four"}],
    "conversational prompt and completion": [{"prompt": [USER], "completion": [FOUR]}],
    "preference": [{"prompt": "two and two", "chosen": " make four", "rejected": " make five"}],
    "preference with an implicit prompt": [
        {"chosen": "two and two make four", "rejected": "two and two make five"}
    ],
    "conversational preference": [{"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]}],
    "conversational preference, implicit": [{"chosen": [USER, FOUR], "rejected": [USER, FIVE]}],
    "input_ids": [{"input_ids": [5, 6, 7]}, {"input_ids": list(range(4, 90))}],
}


def trained_on(rows: list[dict[str, Any]], tmp_path: Path) -> list[list[int]]:
    """What a trainer makes of the rows, cut as it cuts."""
    data = datasets.Dataset.from_list(rows)
    model, tokenizer = tiny_lm.model(), tiny_lm.tokenizer()
    options = {
        "output_dir": str(tmp_path / "out"),
        "max_length": LENGTH,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
    }
    if "chosen" in rows[0]:
        made = trl.DPOTrainer(
            model,
            tiny_lm.model(1),
            trl.DPOConfig(**options),
            train_dataset=data,
            processing_class=tokenizer,
        ).train_dataset
        return [r["prompt_ids"] + r[key] for r in made for key in ("chosen_ids", "rejected_ids")]
    made = trl.SFTTrainer(
        model, trl.SFTConfig(**options), train_dataset=data, processing_class=tokenizer
    ).train_dataset
    return [r["input_ids"] for r in made]


def read(path: Path | str, split: str = "train") -> list[list[int]]:
    data = _rows.opened("test", str(path), split, None)
    return [row.ids for row in data.rows(tiny_lm.tokenizer(), LENGTH)]


@pytest.mark.parametrize("form", FORMS)
def test_every_sequence_of_a_trainer_is_in_the_cache(form: str, tmp_path: Path) -> None:
    """A trainer may append an end-of-text token, from which nothing is predicted."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, FORMS[form])))
    made = [ids[:LENGTH] for ids in trained_on(FORMS[form], tmp_path)]
    found = read(path)
    assert len(found) == len(made)
    for mine, theirs in zip(found, made, strict=True):
        assert mine in (theirs, theirs[:-1])


def test_every_way_to_store_rows_is_the_same(tmp_path: Path) -> None:
    rows = [*FORMS["messages"], *FORMS["messages"][::-1]]
    data = datasets.Dataset.from_list(rows)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "lists.jsonl").write_text("\n".join(json.dumps(r["messages"]) for r in rows))
    data.to_parquet(str(tmp_path / "a.parquet"))
    data.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(
        str(tmp_path / "splits")
    )
    (tmp_path / "folder").mkdir()
    data.to_parquet(str(tmp_path / "folder" / "train-00000.parquet"))
    first = read(tmp_path / "a.jsonl")
    assert len(first) == 4
    for name in ("a.json", "lists.jsonl", "a.parquet", "saved", "splits", "folder"):
        assert read(tmp_path / name) == first, name
    assert read(tmp_path / "splits", "test") == first[:1]
    with pytest.raises(ValueError, match="one of 'train', 'test'"):
        read(tmp_path / "splits", "validation")
    for name in ("a.jsonl", "a.json", "a.parquet", "saved"):  # a part of these would be all of them
        with pytest.raises(ValueError, match=r"--split: expected none for .*leave out --split"):
            read(tmp_path / name, "train[:1]")
        with pytest.raises(ValueError, match=r"--config: expected none for .*leave out --config"):
            _rows.opened("test", str(tmp_path / name), None, "main")


def test_options_of_a_conversation(tmp_path: Path) -> None:
    """Tools as text or as a list, and what a row gives the chat template."""
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    tokenizer: Any = tiny_lm.tokenizer()
    tokenizer.chat_template = (
        "{% for t in tools or [] %}{{ t['function']['name'] }}{% endfor %}{{ mood or '' }}"
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    path = tmp_path / "a.jsonl"
    row = {"messages": [USER], "tools": tools, "chat_template_kwargs": {"mood": "glad"}}
    path.write_text("\n".join(map(json.dumps, [row, {**row, "tools": json.dumps(tools)}])))
    data = _rows.opened("test", str(path), "train", None)
    texts = [tokenizer.decode(found.ids) for found in data.rows(tokenizer, LENGTH)]
    assert texts == [f"addglad{USER['content']}"] * 2


def wrong(folder: Path) -> dict[str, tuple[str, str]]:
    """A file, and what is said of it."""

    def file(name: str, content: bytes) -> str:
        path = folder / name
        path.write_bytes(content)
        return str(path)

    def rows(name: str, *found: Any) -> str:
        return file(f"{name}.jsonl", "\n".join(map(json.dumps, found)).encode())

    (folder / "empty").mkdir()
    return {
        "no file": (str(folder / "none.jsonl"), "No such file"),
        "no folder": (str(folder / "none"), "No such file"),
        "no parquet": (file("a.parquet", b"PAR1 and no more"), "a.parquet does not load"),
        "no JSON": (file("a.json", b"{no"), "a.json does not load"),
        "no data set": (str(folder / "empty"), "does not load"),
        "not UTF-8": (file("latin.jsonl", '{"text": "é"}'.encode("latin-1")), "expected UTF-8"),
        "a number": (rows("number", {"text": "ab"}, 3), "row 2: expected a JSON object"),
        "a prompt alone": (rows("prompt", {"prompt": "ab"}), "row 1: expected input_ids, messages"),
        "a completion alone": (rows("completion", {"completion": "ab"}), "row 1: expected input_i"),
        "text and messages": (
            rows("mixed", {"prompt": "ab", "completion": [USER]}),
            "row 1: expected input_ids",
        ),
        "images": (rows("images", {"text": "ab", "images": ["x"]}), "row 1: expected text alone"),
        "tools that are none": (
            rows("tools", {"messages": [USER], "tools": "{no"}),
            "row 1: the chat template does not take it",
        ),
        "nothing": (rows("nothing", {"text": "a"}), "none in"),
    }


def test_what_is_wrong_with_rows_is_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_lm.save(tmp_path / "model")
    for case, (path, says) in wrong(tmp_path).items():
        output = tmp_path / "cache.safetensors"
        assert cli.main(["kl", "cache", model, path, "-o", str(output)]) == 2, case
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert says in said, (case, said)
        assert said.count("fasttax") == 1, (case, said)
        assert not output.exists()


def test_rows_without_a_prediction_are_left_out(tmp_path: Path) -> None:
    model = tiny_lm.save(tmp_path / "model")
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "ab"}\n{"text": null, "input_ids": [4, 5]}\n')
    output = str(tmp_path / "c.safetensors")
    assert cli.main(["kl", "cache", model, str(path), "--output", output]) == 0
    assert len(TopKReference.load(output)) == 2


def test_rows_of_ids_need_no_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = Path(tiny_lm.save(tmp_path / "model")), tmp_path / "rows.jsonl"
    for file in model.glob("tokenizer*"):
        file.unlink()
    data.write_text('{"input_ids": [4, 5, 6]}\n{"input_ids": [7, 8]}\n')
    made = tmp_path / "made.safetensors"
    for command in (["fisher"], ["kl", "cache"]):
        assert cli.main([*command, str(model), str(data), "--output", str(made)]) == 0
        made.unlink()
    data.write_text('{"text": "water"}\n')
    assert cli.main(["fisher", str(model), str(data), "--output", str(made)]) == 2
    assert "its tokenizer does not load" in (said := capsys.readouterr().err)
    assert "rows of input_ids" in said


def test_jsonl_with_separators_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    raw = json.dumps({"text": "a\u2028b\u2029c\x85d"}, ensure_ascii=False)
    path.write_text(f"{raw}\r\n\n{raw}\n", encoding="utf-8", newline="")
    want = tiny_lm.tokenizer()("a\u2028b\u2029c\x85d")["input_ids"]
    assert read(path) == [want, want]
    path.write_text(f"{raw}\nno JSON\n", encoding="utf-8")
    with pytest.raises(ValueError, match="row 2: no JSON"):
        read(path)
