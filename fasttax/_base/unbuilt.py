"""What to tell the user of a package without its CPU library, and what to do about it."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path


def built_elsewhere(package: Path) -> Path | None:
    """The folder of an installed fasttax other than `package` that has its CPU library."""
    for distribution in metadata.distributions(name="fasttax"):
        for file in distribution.files or ():
            if file.name.startswith("_C."):
                library = Path(str(distribution.locate_file(file))).resolve()
                if library.is_file() and library.parent != package.resolve():
                    return library.parent
    return None


def advice(package: Path, why: str) -> str:
    """The warning of an import from `package`, whose `_C` is missing because of `why`.

    Python looks into the current folder before site-packages, so that after `pip install .` a
    Python started in the source folder imports the sources beside it, which have no library.
    """
    installed = built_elsewhere(package)
    if installed:
        return (
            f"fasttax: imported from {package}, whose C++ CPU kernels are not available ({why}), "
            f"and not from {installed}, where they are installed: Python looks into the current "
            "folder first. The PyTorch reference is used, which is slower by far. Start Python in "
            "another folder or with PYTHONSAFEPATH=1 (Python 3.11), or build here too: "
            "`pip install --no-build-isolation -e .`"
        )
    return (
        f"fasttax: the C++ CPU kernels are not available ({why}); the PyTorch reference is used. "
        "Install g++ and run `pip install --no-build-isolation .` in the source folder; "
        "`fasttax doctor` tells more."
    )
