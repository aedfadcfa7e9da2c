"""Text to tokens and back to characters, by a Hub tokenizer or as plain bytes."""

from __future__ import annotations

from typing import Any, Protocol

Span = tuple[int, int]


class Codec(Protocol):
    """What the demo asks of a tokenizer."""

    pad_id: int

    def encode(self, text: str) -> tuple[list[int], list[Span]]:
        """Tokens and the characters that each stands for; no special tokens."""

    def prompt(self, text: str) -> list[int]:
        """A user's turn, up to where the answer begins."""

    def answer(self, text: str) -> list[int]:
        """An answer with the end of its turn."""


class HubCodec:
    """A transformers tokenizer with its chat template.

    Where it has none a prompt is "Question: ..." and "Answer: " on the next line.
    """

    def __init__(self, tokenizer: Any, system: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.system = system
        self.end_id = int(tokenizer.eos_token_id)
        self.pad_id = self.end_id if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)

    def encode(self, text: str) -> tuple[list[int], list[Span]]:
        """As `Codec.encode`."""
        # verbose=False: whole topics are longer than the model's context, and are cut into passages
        # afterwards
        encoded = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return list(encoded["input_ids"]), [tuple(span) for span in encoded["offset_mapping"]]

    def prompt(self, text: str) -> list[int]:
        """As `Codec.prompt`."""
        if self.tokenizer.chat_template is None:
            return self.encode(f"Question: {text}\nAnswer: ")[0]
        turns = [{"role": "user", "content": text}]
        if self.system is not None:
            turns.insert(0, {"role": "system", "content": self.system})
        return self.encode(
            self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        )[0]

    def answer(self, text: str) -> list[int]:
        """As `Codec.answer`."""
        return [*self.encode(text)[0], self.end_id]


class ByteCodec:
    """A token for each byte of UTF-8, and three for padding, the start of an answer and its end."""

    pad_id, answer_id, end_id, vocabulary = 256, 257, 258, 259

    def encode(self, text: str) -> tuple[list[int], list[Span]]:
        """As `Codec.encode`."""
        ids: list[int] = []
        spans: list[Span] = []
        for i, character in enumerate(text):
            data = character.encode()
            ids += data
            spans += [(i, i + 1)] * len(data)
        return ids, spans

    def prompt(self, text: str) -> list[int]:
        """As `Codec.prompt`."""
        return [*self.encode(text)[0], self.answer_id]

    def answer(self, text: str) -> list[int]:
        """As `Codec.answer`."""
        return [*self.encode(text)[0], self.end_id]
