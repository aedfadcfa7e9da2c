"""`fasttax demo`: align a small real model by every method, and report what each costs."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Sequence

from fasttax._base import json_results
from fasttax.demo.settings import SMOLLM2, DemoError, Settings, make_folder, parse

NEEDS = {
    "transformers": "demo",
    "gguf": "demo",
    "rich": "demo",
    "matplotlib": "report",
    "scipy": "report",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo.

    Returns 0, 2 after an error that the user can put right, or 130 after Ctrl-C (finished runs are
    kept).
    """
    settings = parse(argv)
    printed = settings.json == json_results.STDOUT
    try:
        with contextlib.redirect_stdout(sys.stderr if printed else sys.stdout):
            code = _run(settings)
        _copy_results(settings)
        return code
    except DemoError as error:
        print(f"fasttax demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before there was anything to keep
        print("fasttax demo: interrupted", file=sys.stderr)
        return 130


def _copy_results(settings: Settings) -> None:
    """Where `--json` says."""
    if settings.json is None:
        return
    text = (settings.output / "results.json").read_text(encoding="utf-8")
    json_results.put("fasttax demo", settings.json, text)


def _check_extras(settings: Settings) -> None:
    missing = [
        name
        for name in NEEDS
        if importlib.util.find_spec(name) is None and (name != "gguf" or settings.model == SMOLLM2)
    ]
    if missing:
        extras = ",".join(sorted({NEEDS[name] for name in missing}))
        raise DemoError(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed; run: pip "
            f"install 'fasttax[{extras}]'"
        )


def _run(settings: Settings) -> int:
    _check_extras(settings)
    make_folder(settings.output, "the output folder")
    what = (
        "a tiny byte-level model, trained from scratch first" if settings.tiny else settings.model
    )
    print(
        f"fasttax demo: {what}, aligned plainly and by {len(settings.grids)} methods, "
        f"{settings.seeds} training seeds; results go to {settings.output}",
        flush=True,
    )
    import torch

    from fasttax.demo import report
    from fasttax.demo.experiment import Experiment

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    experiment = Experiment(settings)
    code = 0
    try:
        experiment.run()
    except KeyboardInterrupt:
        experiment.finish("interrupted")
        print(
            "\nfasttax demo: interrupted; what was finished is kept. A new start reuses the Fisher "
            "if it was complete.",
            flush=True,
        )
        code = 130
    page = report.write(experiment.results, settings.output)
    report.print_table(experiment.results)
    for sentence in experiment.results["verdicts"]:
        print(f"- {sentence}")
    print(f"{experiment.results['seconds']:.0f} s in total. The report:")
    print(page.resolve(), flush=True)
    return code
