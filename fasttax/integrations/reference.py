"""A reference model kept as each token's k largest log-probs, read in training without the model.

`fasttax kl cache MODEL DATA` writes the file; `FullKL(trainer, ref_model="cache.safetensors", ...)`
reads it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fasttax._base import checks, files, mapped
from fasttax.integrations import _reference_file
from fasttax.integrations._prompt_logprobs import UNKNOWN, tensors

KIND = "TopKReference"
CHECKED = 1 << 18  # entries of a file that are checked at a time, in 50 bytes each
NAMES = ("tokens", "offsets", "logp", "ids")  # tensors of a file
ROUNDING = 1e-3  # that float32 log-probs of a large vocabulary may sum above 1


class TopKReference:
    """The k largest log-probs (float32) and ids of a reference model after every token.

    It covers the sequences that it was made on. A sequence is found by its token ids, or by all of
    them but the last: nothing is predicted from that one, so a cache made without the end-of-text
    token serves sequences that have one.

    Example:
        >>> from fasttax.integrations.reference import TopKReference
        >>> from fasttax.integrations.trl import FullKL
        >>> TopKReference.make(base, sequences, k=8).save("reference.safetensors")
        >>> handle = FullKL(trainer, "reference.safetensors", beta=0.1)
    """

    def __init__(
        self,
        tokens: Tensor,
        offsets: Tensor,
        logp: Tensor,
        ids: Tensor,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokens, self.offsets = tokens, offsets
        self.logp, self.ids = logp, ids
        self.metadata = dict(metadata or {})
        bounds = offsets.tolist()
        self._where = {self._key(tokens[begin:end]): begin for begin, end in pairwise(bounds)}
        # whether there are sequences of which the first token is not known
        self._open = bool((tokens == UNKNOWN).any())

    @staticmethod
    def _key(tokens: Tensor) -> bytes:
        return tokens.to(torch.int32).numpy().tobytes()

    def __len__(self) -> int:
        return self.offsets.numel() - 1

    def __repr__(self) -> str:
        return f"TopKReference({len(self)} sequences, {self.tokens.numel()} tokens, k={self.k})"

    def __contains__(self, tokens: Any) -> bool:
        """Whether there is such a sequence, up to its last token."""
        return self._begin(torch.as_tensor(tokens).cpu()) is not None

    @property
    def vocabulary(self) -> int | None:
        """Tokens of the reference's vocabulary, where the file says so."""
        found = self.metadata.get("vocabulary")
        return None if found is None else int(found)

    @property
    def temperature(self) -> float:
        """At which the log-probs were taken."""
        return float(self.metadata.get("temperature", 1.0))

    @property
    def k(self) -> int:
        """Log-probs kept a token."""
        return self.logp.shape[-1]

    @functools.cached_property
    def highest_id(self) -> int:
        """The largest of `ids`; -1 where there are none."""
        return max((int(some.max()) for some in self.ids.split(_rows(self.k))), default=-1)

    @staticmethod
    def make(
        model: nn.Module,
        sequences: Iterable[Sequence[int] | Tensor],
        k: int = 64,
        batch_size: int = 8,
        temperature: float = 1.0,
    ) -> TopKReference:
        """Runs the model over token sequences, the longest first, so that batches are even.

        Args:
            model: a transformers causal language model; its mode is kept.
            sequences: token ids, each at least 2.
            k: log-probs to keep a token, at most the vocabulary; 8 bytes each.
            batch_size: sequences at a time.
            temperature: that the logits are divided by, as FullKL's where it is not 1.

        Raises:
            ValueError: a sequence without a prediction, a temperature <= 0, an encoder-decoder, a
                model whose logits are NaN.
        """
        job = _job("TopKReference.make", model, sequences, k, batch_size, temperature)
        return TopKReference(*_reference_file.in_memory(job))

    @staticmethod
    def make_file(
        path: str | os.PathLike[str],
        model: nn.Module,
        sequences: Iterable[Sequence[int] | Tensor],
        k: int = 64,
        batch_size: int = 8,
        temperature: float = 1.0,
        *,
        restart: bool = False,
        progress: bool = True,
    ) -> dict[str, Any]:
        """As `make`, but to a file that `load` reads, batch by batch, with none kept in memory.

        An interrupted call leaves the folder PATH.partial. The same call goes on there, after it
        has verified what it holds, and makes the same file, to the bit, as one that was not.

        Args:
            path: of the file; an older one stays until the new one is whole.
            model: as of `make`, and so on.
            sequences: token ids, each at least 2.
            k: log-probs to keep a token.
            batch_size: sequences at a time.
            temperature: that the logits are divided by.
            restart: begin anew where a PATH.partial is.
            progress: show a bar where stderr is a terminal.

        Returns:
            The file's metadata.

        Raises:
            ValueError: as of `make`; or PATH.partial is of other arguments.
            OSError: the disk has no room, or another process is writing the file.

        Example:
            >>> TopKReference.make_file("reference.safetensors", model, rows, k=64)
            >>> FullKL(trainer, "reference.safetensors", beta=0.1)
        """
        job = _job("TopKReference.make_file", model, sequences, k, batch_size, temperature)
        return _reference_file.in_a_file(job, path, KIND, restart, progress)

    @staticmethod
    def from_prompt_logprobs(
        rows: Iterable[Any], *, vocab_size: int, temperature: float = 1.0
    ) -> TopKReference:
        """From the log-probs of prompts that vLLM or SGLang returned, as JSON or as their objects.

        The sampled token is kept beside the k largest, so that a token's list has k or k + 1
        entries. A row is one sequence, as the server gives it:

        - vLLM, asked with prompt_logprobs=k: {"prompt_token_ids": [...], "prompt_logprobs": [None,
          {id: {"logprob": ..., "rank": ..., "decoded_token": ...}, ...}, ...]}, or prompt_logprobs
          alone. Each mapping then begins with the prompt's own token, as vLLM's do, and the first
          token is not known: the row serves sequences that begin with any token and go on so.
        - SGLang, asked with return_logprob=True, logprob_start_len=0, top_logprobs_num=k: the
          response or its meta_info, with input_token_logprobs ([log-prob, id, text] each) and
          input_top_logprobs (None, then a list of such).

        Args:
            rows: the sequences.
            vocab_size: of the reference, the size of its logits.
            temperature: that the server divided logits by before it took these log-probs. Those of
                prompts are of the raw logits (1.0) whatever is sampled at: SGLang's, and vLLM's as
                long as its logprobs_mode is "raw_logprobs".

        Raises:
            ValueError: a row is malformed; its place is named.
        """
        op = "TopKReference.from_prompt_logprobs"
        V = checks.count(op, "vocab_size", vocab_size)
        temperature = checks.positive(op, "temperature", temperature)
        if isinstance(rows, (str, bytes, Mapping)) or not isinstance(rows, Iterable):
            expected = "a list of rows, one for each sequence"
            keys = set(rows) if isinstance(rows, Mapping) else set()
            several = "choices" in keys and "prompt_logprobs" not in keys
            way_out = "pass response['choices']" if several else "pass [row]"
            raise checks.fail(op, "rows", expected, rows, way_out, TypeError)
        given = list(rows)
        if not given or given[0] is None:
            got = "the entries of one row" if given else "none"
            raise checks.fail(
                op, "rows", "a list of rows, one for each sequence", got, "pass [row]"
            )
        tokens, offsets, logp, ids = tensors(given, V)
        metadata = {
            "k": logp.shape[-1],
            "sequences": len(given),
            "tokens": tokens.numel(),
            "vocabulary": V,
            "temperature": temperature,
            "source": "prompt_logprobs",
        }
        made = TopKReference(tokens, offsets, logp, ids, metadata)
        made._check_distinct(op)
        return made

    def _check_distinct(self, op: str) -> None:
        """Refuses sequences that differ in what predicts their tokens alone.

        Raises:
            ValueError: two of them have the same tokens, as far as they are known.
        """
        first: dict[bytes, int] = {}
        for i, (begin, end) in enumerate(pairwise(self.offsets.tolist())):
            key = self._key(self.tokens[begin:end])
            other = first.setdefault(key, i)
            start = int(self.offsets[other])
            same = slice(start, start + end - begin)
            if other != i and not (
                torch.equal(self.logp[begin:end], self.logp[same])
                and torch.equal(self.ids[begin:end], self.ids[same])
            ):
                raise checks.fail(
                    op,
                    f"rows[{i}]",
                    "one list of log-probs for a sequence",
                    f"others for the tokens of rows[{other}], as far as the two are known",
                    "give the rows' prompt_token_ids; leave one of two equal prompts out",
                )

    def save(self, path: str | os.PathLike[str]) -> None:
        """A safetensors file; a crash leaves the old one."""
        files.write(
            path,
            KIND,
            {"tokens": self.tokens, "offsets": self.offsets, "logp": self.logp, "ids": self.ids},
            self.metadata,
        )

    @staticmethod
    def load(path: str | os.PathLike[str]) -> TopKReference:
        """From a file that `save` wrote; a foreign or cut one is an error that names it.

        All of it is read once, some rows at a time, for its checksums. After that `logp` and `ids`
        lie in the file: what `lookup` asks for is read, and the system may drop it again.

        Raises:
            ValueError: it holds what no reference's top-k can be: NaN, probabilities above 1, ids
                outside the vocabulary, an id twice in a row.
        """
        with files.opened(path, KIND) as (file, metadata):
            wrong = _wrong(file, metadata.get("vocabulary"))
            if wrong:
                raise ValueError(
                    f"TopKReference.load: {os.fspath(path)}: {wrong}; make the cache anew with "
                    "`fasttax kl cache`"
                )
            lists = mapped.Mapped(file)
            return TopKReference(
                file["tokens"],
                file["offsets"],
                lists.tensor("logp"),
                lists.tensor("ids"),
                metadata,
            )

    def _begin(self, tokens: Tensor) -> int | None:
        """Where a sequence's log-probs begin; the whole sequence goes before its own prefix."""
        known = self._where.get(self._key(tokens), self._where.get(self._key(tokens[:-1])))
        if known is not None or tokens.numel() < 2 or not self._open:
            return known
        tokens = tokens.clone()
        tokens[0] = UNKNOWN
        return self._where.get(self._key(tokens), self._where.get(self._key(tokens[:-1])))

    def lookup(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(logp, ids), each (n - 1, k), of the predictions within the sequence `tokens` (n,).

        Raises:
            KeyError: the cache has no such sequence.
        """
        tokens = tokens.cpu()
        begin = self._begin(tokens)
        if begin is None:
            raise KeyError(
                f"TopKReference: expected one of the {len(self)} cached sequences, got "
                f"{tokens.numel()} tokens {tokens[:8].tolist()}...; make the cache on the "
                "sequences that the trainer trains on (TopKReference.make), with the same "
                "tokenizer and length"
            )
        end = begin + tokens.numel() - 1
        return self.logp[begin:end], self.ids[begin:end].long()

    def rows(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, T - 1, k) log-probs and ids for rows padded on either side, or of several sequences.

        They are 0 where a prediction is not within a sequence's real tokens. A sequence of a packed
        row begins where `position_ids` (B or 1, T) do not go on by one.
        """
        B, T = input_ids.shape
        real = torch.ones(B, T, dtype=torch.bool, device="cpu")
        if attention_mask is not None:
            op = "TopKReference.rows"
            real = checks.attention_mask(op, "attention_mask", attention_mask.cpu())
        places = torch.arange(T, device="cpu").expand(B, T)
        if position_ids is not None and position_ids.dim() <= 2:
            places = position_ids.cpu().expand(B, T)
        logp = self.logp.new_zeros(B, T - 1, self.k)
        ids = torch.zeros(B, T - 1, self.k, dtype=torch.int64, device="cpu")
        for b, (row, mask) in enumerate(zip(input_ids.cpu(), real, strict=True)):
            where = mask.nonzero().flatten()
            begins = (places[b, where].diff() != 1).nonzero().flatten() + 1
            for part in where.tensor_split(begins):
                if part.numel() < 2:
                    continue
                found_logp, found_ids = self.lookup(row[part])
                logp[b, part[:-1]], ids[b, part[:-1]] = found_logp, found_ids
        return logp.to(input_ids.device), ids.to(input_ids.device)


def _job(
    op: str,
    model: nn.Module,
    sequences: Iterable[Sequence[int] | Tensor],
    k: int,
    batch_size: int,
    temperature: float,
) -> _reference_file.Job:
    rows = [torch.as_tensor(s, dtype=torch.int32, device="cpu") for s in sequences]
    return _reference_file.Job(op, model, rows, k, batch_size, temperature)


def _rows(k: int) -> int:
    """Rows of k entries that are read at a time."""
    return max(1, CHECKED // max(1, k))


def _wrong(file: mapped.TensorFile, vocabulary: Any) -> str:
    """What is wrong with a cache's file, all of which is read; "" for nothing."""
    lacking = [name for name in NAMES if name not in file]
    if lacking:
        return f"expected tokens, offsets, logp and ids, got no {', '.join(lacking)}"
    (tokens, n), (offsets, bounds), (logp, shape), (ids, of_ids) = map(file.spec, NAMES)
    if not logp.is_floating_point or any(d.is_floating_point for d in (tokens, offsets, ids)):
        return "expected logp as floats, and tokens, offsets and ids as integers"
    shaped = len(n) == len(bounds) == 1 and len(shape) == 2 and shape == of_ids
    if not shaped or shape[:1] != n or bounds == (0,):
        return "expected tokens (n,), offsets, and logp and ids (n, k)"
    begins = file["offsets"]
    if begins[0] != 0 or begins[-1] != n[0] or bool((begins.diff() < 1).any()):
        return f"offsets: expected to rise from 0 to {n[0]}"
    count = _rows(shape[1])
    rows = zip(file.parts("logp", count), file.parts("ids", count), strict=True)
    # to the end, where a checksum says that the file is damaged and not made so
    wrong = [_wrong_rows(*some, vocabulary) for some in rows]
    return next(filter(None, wrong), "")


def _wrong_rows(logp: Tensor, ids: Tensor, vocabulary: Any) -> str:
    """Of some rows; entries of log-prob -inf fill a row up and have no id."""
    real = logp > -torch.inf
    total = logp.double().exp().sum(-1)
    if not bool((total <= 1 + ROUNDING).all()):  # NaN is not
        return "logp: expected log-probs, of a row's probabilities at most 1 together, got others"
    chosen = ids[real]
    most = vocabulary if isinstance(vocabulary, int) else torch.iinfo(torch.int32).max
    if bool(((chosen < 0) | (chosen >= most)).any()):
        return f"ids: expected values in [0, {most}), got others"
    # a filler of its own for each place, below every id
    fillers = -1 - torch.arange(ids.shape[1], device="cpu").expand_as(ids)
    ordered = torch.where(real, ids.long(), fillers).sort(-1).values
    if bool((ordered.diff(dim=-1) == 0).any()):
        return "ids: expected each once in a row, got one twice"
    return ""
