"""What labels are drawn from and where they lie: likelihoods, shifts, batches without ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import fasttax
from fasttax import DiagonalFisher
from tests.tools.models import VOCAB, assert_exact, fisher_of, ids

B = 4
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "pad_token_id": 0,
}


def spread(model: nn.Module) -> nn.Module:
    """In float64 and eval mode, every weight unlike its neighbours."""
    torch.manual_seed(0)
    model = model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


def classifier(kind: str = "Llama", **options: Any) -> Any:
    config = getattr(transformers, f"{kind}Config")(**SMALL, **options)
    return spread(getattr(transformers, f"{kind}ForSequenceClassification")(config))


class Plain(nn.Module):
    """No config, no ids: forward(x) -> (B, outputs)."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh())


def truth_of(model: nn.Module, loss: Callable[[int], Tensor], examples: int = B) -> dict[str, Any]:
    params = dict(model.named_parameters())
    total = {n: torch.zeros_like(p) for n, p in params.items()}
    for n in range(examples):
        found = torch.autograd.grad(loss(n), list(params.values()), allow_unused=True)
        for name, g in zip(params, found, strict=True):
            if g is not None:
                total[name] += g**2
    return total


# --- likelihoods ----------------------------------------------------------------------------------

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gaussian": lambda out, y: ((out - y) ** 2).sum() / 2,
    "bernoulli": lambda out, y: F.binary_cross_entropy_with_logits(out, y, reduction="sum"),
    "softmax": lambda out, y: F.cross_entropy(out, y, reduction="sum"),
}
LABELS = {
    "gaussian": torch.randn(B, 3, dtype=torch.float64),
    "bernoulli": torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]], dtype=torch.float64),
    "softmax": torch.tensor([0, 2, 1, 1]),
}
PROBLEMS = {
    "gaussian": "regression",
    "bernoulli": "multi_label_classification",
    "softmax": "single_label_classification",
}


@pytest.mark.parametrize("likelihood", LOSSES)
@pytest.mark.parametrize("fallback", [None, "loop"])
def test_true_labels(likelihood: str, fallback: str | None) -> None:
    x, y = torch.randn(B, 6).double(), LABELS[likelihood]
    model = spread(Plain(3))
    truth = truth_of(model, lambda n: LOSSES[likelihood](model(x[n : n + 1]), y[n : n + 1]))
    for batch in ((x, y), {"x": x, "labels": y}):
        found = fisher_of(model, batch, likelihood=likelihood, fallback=fallback)
        assert_exact(found, truth, 1e-10)


@pytest.mark.parametrize("likelihood", LOSSES)
def test_the_config_says_which(likelihood: str) -> None:
    model = classifier(num_labels=3, problem_type=PROBLEMS[likelihood])
    x, y = ids(B, 5), LABELS[likelihood]
    truth = truth_of(model, lambda n: LOSSES[likelihood](model(x[n : n + 1]).logits, y[n : n + 1]))
    assert_exact(fisher_of(model, {"input_ids": x, "labels": y}), truth, 1e-10)


def test_float_labels_of_transformers_are_a_sigmoids() -> None:
    """As its own loss takes them: two columns and more of floats."""
    model, x, y = classifier("Bert", num_labels=3), ids(B, 5), LABELS["bernoulli"]
    truth = truth_of(model, lambda n: LOSSES["bernoulli"](model(x[n : n + 1]).logits, y[n : n + 1]))
    assert_exact(fisher_of(model, {"input_ids": x, "labels": y}), truth, 1e-10)


@pytest.mark.parametrize("labels", [(B,), (B, 1)])
def test_one_label_of_transformers_is_a_regression(labels: tuple[int, ...]) -> None:
    model, x, y = classifier(num_labels=1), ids(B, 5), torch.randn(labels)
    rows = y.double().view(B, 1)
    truth = truth_of(
        model, lambda n: LOSSES["gaussian"](model(x[n : n + 1]).logits, rows[n : n + 1])
    )
    assert_exact(fisher_of(model, {"input_ids": x, "labels": y}), truth, 1e-6)


def test_sampled_labels_approach_the_exact_fisher() -> None:
    """Over many draws: J^T J of a Gaussian, J^T diag(p (1 - p)) J of a Bernoulli."""
    x, model = torch.randn(B, 6).double(), spread(Plain(2))
    params = dict(model.named_parameters())
    exact = {
        k: {n: torch.zeros_like(p) for n, p in params.items()} for k in ("gaussian", "bernoulli")
    }
    for n in range(B):
        for c in range(2):
            out = model(x[n : n + 1])[0, c]
            p = out.detach().sigmoid()
            slopes = torch.autograd.grad(out, list(params.values()))
            for name, g in zip(params, slopes, strict=True):
                exact["gaussian"][name] += g**2
                exact["bernoulli"][name] += p * (1 - p) * g**2
    for likelihood, truth in exact.items():
        found = fisher_of(model, x, labels="sample", likelihood=likelihood, mc_samples=3000)
        assert_exact(found, truth, 0.15)


@pytest.mark.parametrize(
    ("model", "batch", "options"),
    [
        (Plain(1), torch.randn(B, 6), {"labels": "sample"}),
        (Plain(1), (torch.randn(B, 6), torch.randn(B)), {}),
        (Plain(3), (torch.randn(B, 6), torch.randn(B, 3)), {}),
        (Plain(1), torch.randn(B, 6), {"labels": "sample", "likelihood": "softmax"}),
    ],
    ids=["one output", "one output, labels", "float labels", "a softmax of one output"],
)
def test_what_cannot_be_known_is_an_error(model: nn.Module, batch: Any, options: Any) -> None:
    with pytest.raises(ValueError, match="likelihood: expected 'bernoulli' or 'gaussian'"):
        fisher_of(model, batch, **options)
    fisher_of(model, batch, **{**options, "likelihood": "gaussian"})  # the way out


def test_labels_that_do_not_fit_a_likelihood() -> None:
    x, model = torch.randn(B, 6), Plain(3)
    for labels, words in (
        (torch.randn(B, 2), r"labels'\]: expected shape \(2, 3\)"),
        (torch.full((B, 3), 2.0), r"labels in \[0, 1\]"),
        (torch.full((B, 3), float("nan")), "finite labels"),
        (torch.randn(B - 1, 3), r"labels'\]"),
    ):
        with pytest.raises(ValueError, match=words):
            fisher_of(model, (x, labels), likelihood="bernoulli")
    with pytest.raises(ValueError, match="likelihood"):
        DiagonalFisher(model, likelihood="poisson")


@pytest.mark.parametrize("fallback", [None, "loop"])
@pytest.mark.parametrize("label", [-1, -99, 3])
def test_labels_that_are_no_class(label: int, fallback: str | None) -> None:
    """Below 0 only -100 means none; a label of -1 is no class 0."""
    x, model, labels = torch.randn(B, 6), Plain(3), torch.tensor([0, 1, 2, label])
    with pytest.raises(ValueError, match=r"labels in \[0, 3\) or -100, got"):
        fisher_of(model, (x, labels), likelihood="softmax", fallback=fallback)
    labels[3] = -100  # the way out
    found = fisher_of(model, (x, labels), likelihood="softmax", fallback=fallback)
    three = fisher_of(model, (x[:3], labels[:3]), likelihood="softmax", fallback=fallback)
    assert_exact(found, dict(three), 1e-6)


# --- where labels lie -----------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForTokenClassification"])
def test_labels_in_place_of_classes_that_say_so(head: str) -> None:
    config = transformers.BertConfig(**SMALL, num_labels=5)
    model: Any = spread(getattr(transformers, f"Bert{head}")(config))
    x, labels = ids(B, 5), torch.randint(0, 5, (B, 5))
    labels[:, 0] = -100
    truth = truth_of(
        model,
        lambda n: F.cross_entropy(
            model(input_ids=x[n : n + 1]).logits[0], labels[n], reduction="sum"
        ),
    )
    batch = {"input_ids": x, "labels": labels}
    assert_exact(fisher_of(model, batch), truth, 1e-10)
    assert_exact(fisher_of(model, batch, shift=False), truth, 1e-10)
    assert_exact(fisher_of(model, batch, fallback="loop"), truth, 1e-10)


def bart() -> Any:
    config = transformers.BartConfig(
        vocab_size=VOCAB,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=20,
        decoder_ffn_dim=20,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        max_position_embeddings=32,
    )
    return spread(transformers.BartForConditionalGeneration(config))


@pytest.mark.parametrize("targets", [4, 6, 9])
@pytest.mark.parametrize("fallback", [None, "loop"])
def test_an_encoder_decoders_labels_are_its_decoders(targets: int, fallback: str | None) -> None:
    model, x = bart(), ids(B, 6)
    labels, mask = torch.randint(3, VOCAB, (B, targets)), torch.ones_like(x)
    labels[2, 2:] = -100
    mask[1, 4:] = 0
    batch = {"input_ids": x, "attention_mask": mask, "labels": labels}

    def loss(n: int) -> Tensor:
        mine = {k: v[n : n + 1] for k, v in batch.items()}
        return model(**mine).loss * (labels[n] != -100).sum()

    truth = truth_of(model, loss)
    assert_exact(fisher_of(model, batch, fallback=fallback), truth, 1e-10)
    sampled = fisher_of(model, batch, labels="sample", fallback=fallback)
    assert any(bool(f.any()) for f in sampled.values())


@pytest.mark.parametrize("label", [-1, VOCAB])
def test_an_encoder_decoders_labels_are_of_its_vocabulary(label: int) -> None:
    x, labels = ids(B, 6), torch.randint(3, VOCAB, (B, 4))
    labels[1, 2] = label
    batch = {"input_ids": x, "decoder_input_ids": ids(B, 4), "labels": labels}
    with pytest.raises(ValueError, match=rf"labels in \[0, {VOCAB}\) or -100, got"):
        fisher_of(bart(), batch)


def test_an_encoder_decoder_needs_a_target() -> None:
    with pytest.raises(ValueError, match=r"labels .B, T of the decoder., or decoder_input_ids"):
        fisher_of(bart(), ids(B, 6), labels="sample")
    batch = {"input_ids": ids(B, 6), "decoder_input_ids": ids(B, 4)}
    found = fisher_of(bart(), batch, labels="sample")
    assert any(bool(f.any()) for f in found.values())


# --- models without ids, losses of the user's own -------------------------------------------------


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 3)

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(image)).relu_().mean((2, 3)))


def test_images_by_any_name() -> None:
    model, x, y = spread(Images()), torch.randn(B, 3, 8, 8).double(), LABELS["softmax"]
    truth = truth_of(
        model, lambda n: F.cross_entropy(model(x[n : n + 1]), y[n : n + 1], reduction="sum")
    )
    assert_exact(fisher_of(model, (x, y)), truth, 1e-10)
    assert_exact(fisher_of(model, {"image": x, "labels": y}), truth, 1e-10)
    assert_exact(fisher_of(model, (x, y), fallback="loop"), truth, 1e-10)
    found = fasttax.estimate_fisher(
        model, [(x[:3], y[:3]), (x[3:], y[3:])], labels="true", normalize="sum", progress=False
    )
    assert_exact(found, truth, 1e-10)
    with pytest.raises(ValueError, match="a key 'image'"):
        fisher_of(model, {"picture": x, "labels": y})


@pytest.mark.parametrize("fallback", [None, "loop"])
def test_estimate_fisher_of_a_loss(fallback: str | None) -> None:
    """A hinge loss, which is no likelihood of the three."""

    def hinge(model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return F.multi_margin_loss(model(x), y, reduction="sum")

    model, x, y = spread(Plain(3)), torch.randn(B, 6).double(), LABELS["softmax"]
    truth = truth_of(model, lambda n: hinge(model, (x[n : n + 1], y[n : n + 1])))
    options: Any = {"normalize": "sum", "progress": False, "fallback": fallback, "loss": hinge}
    found = fasttax.estimate_fisher(model, [(x, y)], labels="true", **options)
    assert_exact(found, truth, 1e-10)
    with pytest.raises(ValueError, match="labels: expected 'true' with loss="):
        fasttax.estimate_fisher(model, [(x, y)], **options)
    for wrong, words in (
        (lambda model, batch: model(batch[0]), r"shape \(4, 3\)"),
        (lambda model, batch: None, "None"),
        (lambda model, batch: hinge(model, batch).detach(), "one without a graph"),
    ):
        with pytest.raises(TypeError, match=rf"loss: expected a tensor of one number.*{words}"):
            fasttax.estimate_fisher(model, [(x, y)], labels="true", **{**options, "loss": wrong})
