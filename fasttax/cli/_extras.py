"""Optional packages, and the command that brings each."""

from __future__ import annotations

EXTRAS = {  # package -> the extra that has it
    "transformers": "transformers",
    "trl": "trl",
    "datasets": "trl",
    "lightning": "lightning",
    "matplotlib": "report",
    "scipy": "report",
    "jinja2": "report",
    "rich": "demo",
    "gguf": "demo",
    "shtab": "completion",
}


def install(package: str) -> str:
    """The command for a package of EXTRAS."""
    return f"pip install 'fasttax[{EXTRAS[package]}]'"
