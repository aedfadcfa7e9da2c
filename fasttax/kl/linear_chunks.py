"""How many tokens of a linear op are worked on at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

# of logits at a time: 208 tokens of SmolLM2's vocabulary and 104 of the reference's
CPU_BYTES = 60 << 20
# the same where gradients lie beside the logits, rounded: 128 tokens' logits by both models, and
# 512 tokens' gradients. A product reads all of the head for few tokens or for many.
CPU_LOGITS_BYTES, CPU_ROUNDED_BYTES = 52 << 20, 52 << 20
# of a thread, whose float32 gradients exist: 3 MB that stay in its cache until they are rounded
ROUNDED_ROWS = 16
# of a GPU's memory: 4 400 tokens of Qwen's vocabulary on 80 GB, bfloat16 logits of both models.
# Every chunk reads and writes the head's gradient once, for H = 3584 as many bytes as 2 000 tokens'
# logits.
GPU_SHARE = 32
ACCELERATOR_BYTES = 1 << 30
MIN_TOKENS = 128  # below it a GEMM no longer runs at its rate
# tokens, of the reference; 512 of them took 1.04 of their GEMMs' time by 176 and 88, 1.05 by 128
# and 128, 1.09 by 256 and 56
MIN_REF_TOKENS = 56
STEP = 16  # chunks are multiples of so many tokens


def up(n: int, to: int) -> int:
    """`n` rounded up to a multiple of `to`."""
    return -(-n // to) * to


@dataclass(frozen=True)
class Asked:
    """What a sweep is to give of every token, and how much of the logits may exist at a time.

    `kl` is token_kl's, which takes whole rows. `stats` are token_stats' of the policy's rows, or
    with `pair` of both, and then the reference's lse too: all that `combine_parts` wants of a tile
    of the vocabulary. `gemm_dtype` is what hidden states and heads are rounded to before they are
    multiplied, or None.
    """

    kl: bool = False
    stats: bool = False
    pair: bool = False
    token_chunk: int | None = None
    vocab_chunk: int | None = None
    gemm_dtype: torch.dtype | None = None

    def columns(self, V: int) -> int:
        """Of the logits that exist at a time."""
        return V if self.kl else self.vocab_columns(V)

    def tiles(self, V: int) -> int:
        """Into how many tiles of columns a vocabulary falls."""
        return -(-V // self.columns(V))

    def vocab_columns(self, V: int) -> int:
        """The columns that were asked for, whether or not whole rows are taken."""
        return min(self.vocab_chunk or V, V)


class ChunkSize(NamedTuple):
    """How many tokens are worked on at a time, each a part of those above it."""

    tokens: int  # whose gradient goes into one product
    logits_tokens: int  # whose logits exist
    ref_tokens: int  # whose reference logits exist
    part_tokens: int  # that the ops over logits take, whose results may lie beside the logits

    def at_most(self, tokens: int) -> ChunkSize:
        """The same of so many tokens, at least one."""
        return ChunkSize(*(max(1, min(n, tokens)) for n in self))


class Layout(NamedTuple):
    """What exists of a chunk.

    Args:
        device: where.
        dtype: of the logits.
        shared: both models' logits are made by one GEMM over one head.
        d_dtype: of the logits' gradient where it lies beside them, else None.
        ref_trains: the reference has gradients.
    """

    device: torch.device
    dtype: torch.dtype
    shared: bool
    d_dtype: torch.dtype | None
    ref_trains: bool


def chunk_size(asked: Asked, layout: Layout, N: int, V: int) -> ChunkSize:
    """For N tokens and V columns."""
    both, d_dtype = asked.kl or asked.pair, layout.d_dtype
    columns = asked.columns(V)
    logits, d_bytes = layout.dtype.itemsize * columns, 0
    if d_dtype is not None:
        d_bytes = d_dtype.itemsize * columns

    def tokens_within(size: int, row: float) -> int:
        """Of `row` bytes each."""
        asked_for = asked.token_chunk or max(MIN_TOKENS, int(size / row) // STEP * STEP)
        if asked.kl:  # whole rows, of so many tokens fewer
            asked_for = max(1, asked_for * asked.vocab_columns(V) // V)
        return asked_for if asked.token_chunk else even(N, asked_for)

    if layout.device.type != "cpu":
        rows = 1 + both + asked.stats + asked.pair  # and of token_stats' gradients
        tokens = tokens_within(budget(layout.device), rows * logits + d_bytes)
        return ChunkSize(tokens, tokens, tokens, tokens)
    if d_dtype is not None:
        tokens = tokens_within(CPU_ROUNDED_BYTES, d_bytes)
        most = int(CPU_LOGITS_BYTES / (1 + both) / logits) // STEP * STEP
        some = even(tokens, max(MIN_REF_TOKENS, most))
        part = some if layout.ref_trains else ROUNDED_ROWS * torch.get_num_threads()
        return ChunkSize(tokens, some, some, min(some, part))
    if both and layout.shared:
        tokens = tokens_within(CPU_BYTES, 2 * logits)
        return ChunkSize(tokens, tokens, tokens, tokens)
    tokens = tokens_within(CPU_BYTES, (1.5 if both else 1.0) * logits)
    part = min(tokens, max(MIN_REF_TOKENS, up(tokens, STEP) // 2 if both else 0))
    return ChunkSize(tokens, tokens, part, part)


def even(N: int, most: int) -> int:
    """Tokens of as few chunks as there must be of at most `most`, all of one size but the last."""
    chunks = max(1, -(-N // most))
    return min(most, max(1, up(-(-N // chunks), STEP)))


def budget(device: torch.device) -> int:
    """Bytes of logits at a time; of one device, and so of one order of sums, always the same."""
    if device.type == "cpu":
        return CPU_BYTES
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory) // GPU_SHARE
    return ACCELERATOR_BYTES
