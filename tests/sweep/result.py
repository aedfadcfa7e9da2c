"""What the sweep visits and what comes of it; imports nothing that is slow."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

RIGHT, REFUSED, WRONG, CRASH, NONE = "right", "refused", "WRONG", "CRASH", "-"
CHECKS = ("update", "advice", "observe", "kl_self", "kl")
# A family of classes -> transformers' mappings that list them
FAMILIES = {
    "causal": ("CAUSAL_LM",),
    "seq2seq": ("SEQ_TO_SEQ_CAUSAL_LM",),
    "image": ("IMAGE_CLASSIFICATION",),
    "audio": ("AUDIO_CLASSIFICATION",),
    "sequence": ("SEQUENCE_CLASSIFICATION",),
    "token": ("TOKEN_CLASSIFICATION", "AUDIO_FRAME_CLASSIFICATION"),
    "image-text": ("IMAGE_TEXT_TO_TEXT",),
    "speech": ("SPEECH_SEQ_2_SEQ",),
    "masked": ("MASKED_LM",),
    "other": ("CTC", "AUDIO_XVECTOR", "VIDEO_CLASSIFICATION", "SEMANTIC_SEGMENTATION"),
}


@dataclass(frozen=True)
class Case:
    """A class of transformers under the family of the first mapping that lists it."""

    name: str
    family: str


@dataclass
class Outcome:
    """How one check of one class ended."""

    kind: str
    detail: str = ""


@dataclass
class Row:
    """What came of one class.

    Attributes:
        unbuilt: why no tiny model of it could be made, or no gradient of it taken; "" where it was.
        outcomes: by check: `update`; `advice`, the loop that a refusal of `update` advises;
            `observe`; `kl_self`, FullKL against a copy of the policy; `kl`, against another model.
    """

    name: str
    family: str
    unbuilt: str = ""
    parameters: int = 0
    seconds: float = 0.0
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    @property
    def faults(self) -> list[str]:
        """The checks that came out wrong or as an error that is no refusal, with what came."""
        return [
            f"{self.name}: {check}: {outcome.kind}: {outcome.detail}"
            for check, outcome in self.outcomes.items()
            if outcome.kind in (WRONG, CRASH)
        ]

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Row:
        """The row that `to_json` wrote."""
        found = json.loads(text)
        outcomes = {k: Outcome(**v) for k, v in found.pop("outcomes").items()}
        return Row(**found, outcomes=outcomes)
