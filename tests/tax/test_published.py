"""Published tables of the tax as reports, and the KL to second order beside the KL."""

from __future__ import annotations

from pathlib import Path

import pytest

from fasttax import cli
from fasttax.tax import TaxReport, published
from fasttax.tax.published import NAMES


@pytest.mark.parametrize("name", NAMES)
def test_published_tables_are_reports_with_sources(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = published(name)
    assert found.sources
    assert all("arXiv" in s or "MODEL_CARD" in s for s in found.sources)
    scores = [
        value
        for c in found.report.with_base()
        for side in (c.capability, c.alignment)
        for value in side.values()
    ]
    assert all(0 < value < 1 for value in scores)
    assert cli.main(["tax", "--published", name]) == 0
    printed = capsys.readouterr().out
    assert f"Source: {found.sources[0]}" in printed
    assert f"Note: {found.notes[-1]}" in printed


def test_published_numbers() -> None:
    """Some of each table, as they stand in the papers."""
    report = published("instructgpt-175b").report
    base, ppo = report.base.capability, report.of("PPO")[0].capability
    assert (base["DROP, few-shot F1"], ppo["DROP, few-shot F1"]) == (0.3527, 0.2778)
    assert report.tax(report.of("PPO")[0]) > 0.06
    assert report.tax(report.of("PPO-ptx")[0]) < 0  # replay gave it back
    llama = published("llama2-7b")
    assert llama.report.base.capability == {"MMLU, 5-shot": 0.457}
    assert llama.report.tax(llama.report.checkpoints[0]) == pytest.approx(0.116)
    assert any("14.6" in note and "11.8" in note for note in llama.notes)
    with pytest.raises(ValueError, match=r"instructgpt-1\.3b"):
        published("gpt-4")


def test_the_second_order_is_a_column(tmp_path: Path) -> None:
    report = TaxReport(0.6, 0.2)
    report.add("a", 0.5, 0.3, kl=0.2)
    assert "2nd order" not in str(report)
    report.add("b", 0.5, 0.4, kl=0.3, quadratic=0.25)
    assert "KL to 2nd order" in str(report)
    again = TaxReport.load(report.save(tmp_path / "r.json"))
    assert [c.quadratic for c in again.with_base()] == [0.0, None, 0.25]
    assert str(again) == str(report)
    with pytest.raises(ValueError, match="quadratic"):
        report.add("c", 0.5, 0.4, quadratic=-1)


@pytest.mark.parametrize("option", ["--alignment", "--metric", "--task"])
def test_options_of_the_harness_are_refused_elsewhere(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(published("llama2-7b").report.save(tmp_path / "r.json"))
    for source in (["--published", "llama2-7b"], [file]):
        assert cli.main(["tax", *source, option, "a=b"]) == 2
        said = capsys.readouterr()
        assert f"leave out {option}" in said.err
        assert not said.out
        assert cli.main(["tax", *source]) == 0
        capsys.readouterr()
