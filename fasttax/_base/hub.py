"""Files on the Hugging Face Hub, by huggingface_hub's own calls."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fasttax._base import checks
from fasttax._base.version import __version__

ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
CARD = "README.md"


def client(op: str) -> Any:
    """The package huggingface_hub.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{op}: huggingface_hub is not installed; run `pip install huggingface_hub`",
            name=error.name,
        ) from error
    return huggingface_hub


def errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises of a name, an answer, or a network that is not there."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # of the client that this huggingface_hub has (requests, httpx, httpx2), without a network too
    bases: Any = HfHubHTTPError.__bases__
    return (*bases, OSError, HFValidationError)


@contextlib.contextmanager
def told(op: str, repo_id: str, way_out: str) -> Iterator[None]:
    """The Hub's errors in a line, with the repository's name and the way out.

    Raises:
        OSError: one came.
    """
    try:
        yield
    except errors() as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = " ".join(lines)[:300] or type(error).__name__
        raise OSError(f"{op}: {repo_id}: {said}; {way_out}") from error


def push(
    op: str,
    repo_id: str,
    folder: Path,
    card: str,
    *,
    private: bool | None,
    token: str | None,
    revision: str | None,
    message: str,
    replaced: Sequence[str],
) -> str:
    """Puts a folder's files into a repository, which is made where it is not there, as one commit.

    Args:
        op: the caller, for errors.
        repo_id: the repository, owner/name.
        folder: whose files are taken.
        card: the README of a repository that has none; another stays as it is.
        private: of a repository that is made.
        token: None: the one that `hf auth login` or HF_TOKEN has set.
        revision: the branch, made where it is not there; None: main.
        message: of the commit.
        replaced: patterns of files that go where the folder has none of the name.

    Returns:
        The commit's URL.

    Raises:
        ModuleNotFoundError: huggingface_hub is not installed.
        ValueError: there is no token, or no such name.
        OSError: the Hub refuses it, or can't be reached.
    """
    hub = client(op)
    if not ID.fullmatch(repo_id):
        raise checks.fail(op, "repo_id", "a repository's name, owner/name", repr(repo_id))
    if token is None and hub.get_token() is None:
        way_out = "run `hf auth login`, set HF_TOKEN, or pass token="
        raise checks.fail(op, "token", "a token that may write to the Hub", "none", way_out)
    api = hub.HfApi(token=token, library_name="fasttax", library_version=__version__)
    with told(op, repo_id, "see whether the token may write there (`hf auth whoami`)"):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if not api.file_exists(repo_id, CARD, revision=revision):
            (folder / CARD).write_text(card, encoding="utf-8")
        made = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            delete_patterns=list(replaced) or None,
        )
    return str(made.commit_url)


def fetched(
    op: str, source: str, names: Sequence[str], *, revision: str | None, token: str | None
) -> Path:
    """Where the first of `names` lies, in a folder or repository; or a file's own path.

    Of a repository what has these names is downloaded, to huggingface_hub's cache.

    Raises:
        ModuleNotFoundError: huggingface_hub is not installed.
        FileNotFoundError: none is there.
        OSError: the Hub has no such repository, or can't be reached.
    """
    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir():
        if not ID.fullmatch(source):
            expected = "a file, a folder, or a repository of the Hub (owner/name)"
            raise checks.fail(op, "source", expected, repr(source), error=FileNotFoundError)
        hub = client(op)
        with told(
            op, source, "there is no such file or folder here either; log in if it is private"
        ):
            found = hub.snapshot_download(
                source,
                revision=revision,
                token=token,
                allow_patterns=[pattern for name in names for pattern in (name, f"{name}/*")],
                library_name="fasttax",
                library_version=__version__,
            )
        path = Path(found)
    for name in names:
        if (path / name).exists():
            return path / name
    raise checks.fail(
        op,
        "source",
        f"{' or '.join(names)} in it",
        f"{source} without",
        "name the file with filename=",
        FileNotFoundError,
    )
