"""A reference's top-k log-probs, made batch by batch: in memory, or in a file as they come.

The file grows in a folder beside its place, NAME.partial, with a line for every batch that is done
and the checksum of its values. After an interruption the same call verifies what is there and goes
on with the next batch: batches are the same, and so are the bits of the whole.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fasttax._base import checks, mapped, placed
from fasttax._base.hashes import fingerprint
from fasttax._base.version import __version__
from fasttax.integrations._models import frozen
from fasttax.kl.topk import topk_logprobs

try:
    import fcntl
except ImportError:  # not a posix system: two runs of one file must take turns by themselves
    fcntl = None  # type: ignore[assignment]

VALUES, DONE = "values", "done.jsonl"  # in the folder NAME.partial
# of a configuration: where a model lies, who wrote it, and what the weights themselves say
NO_LOGITS = {
    *("_name_or_path", "base_model_name_or_path", "revision"),
    *("transformers_version", "peft_version", "architectures", "inference_mode"),
    *("dtype", "torch_dtype"),
}


@dataclass(frozen=True)
class Batch:
    """What a forward gives: sequences, their log-probs and ids (n, k), the logits' width."""

    number: int
    chosen: list[int]
    logp: list[Tensor]
    ids: list[Tensor]
    vocabulary: int


@dataclass
class Job:
    """What is to be made.

    Attributes:
        op: the caller, for errors.
        model: a transformers causal language model.
        rows: token ids.
        k: log-probs of a token.
        batch_size: sequences at a time, the longest first, so that batches are even.
        temperature: that the logits are divided by.
    """

    op: str
    model: nn.Module
    rows: Sequence[Tensor]
    k: int
    batch_size: int
    temperature: float
    batches: list[list[int]] = field(init=False)
    begins: list[int] = field(init=False)

    def __post_init__(self) -> None:
        checks.positive(self.op, "temperature", self.temperature)
        self.batch_size = checks.count(self.op, "batch_size", self.batch_size)
        self.k = checks.count(self.op, "k", self.k)
        if getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            raise checks.fail(
                self.op,
                "model",
                "a causal language model, whose predictions are found by its ids alone",
                f"{type(self.model).__name__}, an encoder-decoder",
                "pass FullKL the model itself",
            )
        lengths = [row.numel() for row in self.rows]
        if min(lengths, default=0) < 2:
            raise checks.fail(
                self.op,
                "sequences",
                "at least one, each of at least 2 tokens",
                f"{len(lengths)}, the shortest of {min(lengths, default=0)}",
            )
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        size = self.batch_size
        self.batches = [order[i : i + size] for i in range(0, len(order), size)]
        self.begins = list(accumulate(lengths, initial=0))

    @functools.cached_property
    def identity(self) -> dict[str, str]:
        """What the model's logits are of; all of its bytes are read for it."""
        return identity(self.model)

    def metadata(self, vocabulary: int) -> dict[str, Any]:
        """What a reader must know of the log-probs."""
        return {
            "k": self.k,
            "sequences": len(self.rows),
            "tokens": self.begins[-1],
            "vocabulary": vocabulary,
            "temperature": float(self.temperature),
            **self.identity,
        }

    def made(self, first: int = 0) -> Iterator[Batch]:
        """The batches from `first` on.

        Raises:
            ValueError: the model's logits are NaN, or fewer than k.

        Yields:
            A batch; its tensors are on the CPU.
        """
        device = next(self.model.parameters()).device
        with frozen(self.model):
            for number, chosen in enumerate(self.batches[first:], first):
                rows = [self.rows[i].long() for i in chosen]
                lengths = torch.tensor([row.numel() for row in rows], device="cpu")
                # on the right: what is behind a token is not seen
                padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
                mask = torch.arange(padded.shape[1], device="cpu") < lengths[:, None]
                logits = self.model(
                    input_ids=padded.to(device),
                    attention_mask=mask.to(device, torch.int64),
                ).logits
                batch = Batch(number, chosen, [], [], logits.shape[-1])
                for i, row, values in zip(chosen, rows, logits, strict=True):
                    logp, ids = topk_logprobs(values[: row.numel()] / self.temperature, self.k)
                    if bool(logp.isnan().any()):
                        raise self._no_numbers(i)
                    batch.logp.append(logp.float().cpu().contiguous())
                    batch.ids.append(ids.to(torch.int32).cpu().contiguous())
                yield batch

    def _no_numbers(self, i: int) -> Exception:
        return checks.fail(
            self.op,
            "model",
            "a model whose logits are numbers",
            f"NaN for sequence {i}",
            "load it in float32 or bfloat16",
        )


# --- in memory ------------------------------------------------------------------------------------


def in_memory(job: Job) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
    """Tokens (n,), offsets, log-probs (n, k), ids (n, k), metadata."""
    n = job.begins[-1]
    logp = torch.empty(n, job.k, dtype=torch.float32, device="cpu")
    ids = torch.empty(n, job.k, dtype=torch.int32, device="cpu")
    vocabulary = 0
    for batch in job.made():
        vocabulary = batch.vocabulary
        for i, some_logp, some_ids in zip(batch.chosen, batch.logp, batch.ids, strict=True):
            logp[job.begins[i] : job.begins[i + 1]] = some_logp
            ids[job.begins[i] : job.begins[i + 1]] = some_ids
    return _tokens(job), torch.tensor(job.begins, device="cpu"), logp, ids, job.metadata(vocabulary)


def _tokens(job: Job) -> Tensor:
    return torch.cat([row.long() for row in job.rows])


# --- in a file ------------------------------------------------------------------------------------


def in_a_file(
    job: Job, path: str | os.PathLike[str], kind: str, restart: bool, progress: bool
) -> dict[str, Any]:
    """Makes the file at `path`, or what is left of it to be made; returns its metadata.

    Raises:
        ValueError: NAME.partial is of other options, of another model or of other sequences.
        OSError: another process is at it, or the disk has no room.
    """
    target = placed.for_file(job.op, path)
    folder = placed.for_folder(job.op, target.with_name(f"{target.name}.partial"))
    specs = _specs(job)
    with _alone(job.op, folder) as journal:
        _check_room(job.op, folder, specs)
        lines = _records(job, journal, folder, restart)
        with mapped.Filled(folder / VALUES, specs) as values:
            done = _verified(job, values, lines)
            _keep(journal, 1 + done)
            values.write("tokens", 0, _tokens(job))
            values.write("offsets", 0, torch.tensor(job.begins, device="cpu"))
            vocabulary = lines[done - 1]["vocabulary"] if done else 0
            for batch in _shown(job, done, progress):
                _write(job, values, journal, batch)
                vocabulary = batch.vocabulary
            metadata = job.metadata(vocabulary)
            values.finish(kind, metadata)
        placed.sync(folder / VALUES)
        os.replace(folder / VALUES, target)
        placed.sync(target.parent)
        _keep(journal, 0)
    return metadata


def _specs(job: Job) -> dict[str, mapped.Spec]:
    n = job.begins[-1]
    return {
        "tokens": (torch.int64, (n,)),
        "offsets": (torch.int64, (len(job.begins),)),
        "logp": (torch.float32, (n, job.k)),
        "ids": (torch.int32, (n, job.k)),
    }


def _check_room(op: str, folder: Path, specs: Mapping[str, mapped.Spec]) -> None:
    """That the disk has room for what is not yet there.

    Raises:
        OSError: it has not.
    """
    wanted = sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in specs.values())
    values = folder / VALUES
    there = values.stat().st_blocks * 512 if values.exists() else 0
    free = shutil.disk_usage(folder).free
    if wanted - there > free:
        raise OSError(
            f"{op}: {folder.parent} has {free / 1e9:.3g} GB free, and the file takes "
            f"{wanted / 1e9:.3g} GB; make room, or keep fewer log-probs a token: k="
        )


@contextlib.contextmanager
def _alone(op: str, folder: Path) -> Iterator[BinaryIO]:
    """Holds the folder for this process; in the end it goes, unless its journal has a batch.

    Raises:
        BlockingIOError: another process has it.

    Yields:
        The journal.
    """
    with _locked(op, folder) as journal:
        try:
            yield journal
        finally:
            journal.seek(0)
            if len(journal.readlines()) < 2:
                # the journal last: who opens one that is not there any more takes a new one
                for name in (VALUES, DONE):
                    (folder / name).unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # another process has begun there
                    folder.rmdir()


def _locked(op: str, folder: Path) -> BinaryIO:
    """The journal of a folder that no other process has, made where it is not there.

    Raises:
        BlockingIOError: another process has it.
    """
    while True:
        folder.mkdir(exist_ok=True)
        try:
            journal = open(folder / DONE, "a+b")  # noqa: SIM115 (closed by who asked for it)
        except FileNotFoundError:  # who had the folder took it away since
            continue
        if fcntl is None:
            return journal
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            journal.close()
            raise BlockingIOError(
                f"{op}: another process is writing {folder}; wait for it, or give another output"
            ) from None
        if placed.is_at(journal.fileno(), folder / DONE):
            return journal
        journal.close()


def _settings(job: Job) -> dict[str, Any]:
    """What two runs must have in common for the one to go on where the other was stopped."""
    parameter = next(job.model.parameters())
    lengths = torch.tensor(job.begins, device="cpu")
    return {
        "k": job.k,
        "batch_size": job.batch_size,
        "temperature": float(job.temperature),
        **job.identity,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": parameter.device.type,
        "sequences": f"{mapped.crc(_tokens(job), mapped.crc(lengths)):08x}",
        "fasttax": __version__,
    }


def identity(model: nn.Module) -> dict[str, str]:
    """What its logits are of: every weight and buffer, and a hash of its configuration."""
    tensors = chain(model.named_parameters(), model.named_buffers())
    return {"model": fingerprint(tensors), "configuration": _configuration(model)}


def _configuration(model: nn.Module) -> str:
    """A hash of what configures a model and its adapters: weights alone do not say its logits."""
    configs = [getattr(model, "config", None), *getattr(model, "peft_config", {}).values()]
    facts = [config.to_dict() for config in configs if hasattr(config, "to_dict")]
    text = json.dumps(_of_logits(facts), sort_keys=True, default=_plain)
    return f"{zlib.crc32(text.encode()):08x}"


def _of_logits(value: Any) -> Any:
    """A configuration, and those within it, without what logits do not depend on."""
    if isinstance(value, dict):
        return {key: _of_logits(each) for key, each in value.items() if key not in NO_LOGITS}
    return [_of_logits(each) for each in value] if isinstance(value, (list, tuple)) else value


def _plain(value: Any) -> Any:
    """What JSON has not, the same in every process."""
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    return str(value) if isinstance(value, torch.dtype) else type(value).__name__


def _records(job: Job, journal: BinaryIO, folder: Path, restart: bool) -> list[dict[str, Any]]:
    """The lines of batches that are done, of a journal of the same settings or a new one.

    Raises:
        ValueError: the settings are others; names them.
    """
    journal.seek(0)
    lines: list[dict[str, Any]] = []
    for line in journal.read().split(b"\n")[:-1]:  # behind the last one is nothing, or a torn line
        with contextlib.suppress(ValueError):  # of a line that a power loss took
            found = json.loads(line)
            lines += [found] if isinstance(found, dict) else []
    mine = _settings(job)
    if restart or not lines:
        journal.truncate(0)
        _append(journal, mine)
        return []
    was = lines[0]
    differing = [
        f"{key} {was.get(key)!r}, now {value!r}"
        for key, value in mine.items()
        if was.get(key) != value
    ]
    if differing:
        raise checks.fail(
            job.op,
            str(folder),
            "what a run of the same model, sequences and options left",
            "; ".join(differing),
            "repeat it as it was, or pass restart=, which begins anew",
        )
    return lines[1:]


def _append(journal: BinaryIO, record: Mapping[str, Any]) -> None:
    journal.write(json.dumps(record).encode() + b"\n")
    journal.flush()


def _keep(journal: BinaryIO, lines: int) -> None:
    """Cuts the journal after so many lines."""
    journal.seek(0)
    for _ in range(lines):
        journal.readline()
    journal.truncate(journal.tell())


def _verified(job: Job, values: mapped.Filled, lines: Sequence[Mapping[str, Any]]) -> int:
    """How many batches lie in the file as their lines say.

    A power loss may have taken values whose line is there.
    """
    for number, (line, chosen) in enumerate(zip(lines, job.batches, strict=False)):
        said = line.get("batch") == number and type(line.get("vocabulary")) is int
        if not said or line.get("crc") != _checksum(job, values, chosen):
            return number
    return min(len(lines), len(job.batches))


def _checksum(job: Job, values: mapped.Filled, chosen: Sequence[int]) -> str:
    crc = 0
    for i in chosen:
        begin, rows = job.begins[i], job.rows[i].numel()
        for name in ("logp", "ids"):
            crc = values.checksum(name, begin, rows, crc)
    return f"{crc:08x}"


def _write(job: Job, values: mapped.Filled, journal: BinaryIO, batch: Batch) -> None:
    """Values first, then the line that says that they are there."""
    crc = 0
    for i, logp, ids in zip(batch.chosen, batch.logp, batch.ids, strict=True):
        for name, some in (("logp", logp), ("ids", ids)):
            values.write(name, job.begins[i], some)
            crc = mapped.crc(some, crc)
    done = {"batch": batch.number, "crc": f"{crc:08x}", "vocabulary": batch.vocabulary}
    _append(journal, done)


def _shown(job: Job, done: int, progress: bool) -> Iterator[Batch]:
    """The batches that are left, with a bar of tokens.

    Yields:
        A batch, which is done when the next one is asked for.
    """

    def tokens(batches: Sequence[Sequence[int]]) -> int:
        return sum(job.rows[i].numel() for chosen in batches for i in chosen)

    with tqdm(
        total=job.begins[-1],
        initial=tokens(job.batches[:done]),
        desc=job.op,
        unit="token",
        unit_scale=True,
        disable=None if progress else True,
    ) as bar:
        for batch in job.made(done):
            yield batch
            bar.update(tokens([batch.chosen]))
