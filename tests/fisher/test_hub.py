"""Fishers on the Hub: the calls that huggingface_hub gets, as a folder that stands in for the Hub.

Each call is bound to the real method's arguments, so that one which huggingface_hub does not have
is an error here too.
"""

from __future__ import annotations

import inspect
import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

import fasttax
from fasttax import FisherEstimate, KroneckerEstimate

REAL, SNAPSHOT = huggingface_hub.HfApi, huggingface_hub.snapshot_download


class Hub:
    """Repositories as folders, and what was called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.error: Exception | None = None
        self.token: str | None = "secret"

    def api(self, **options: Any) -> Any:
        inspect.signature(REAL).bind(**options)
        return SimpleNamespace(
            **{
                name: self._bound(name)
                for name in ("create_repo", "create_branch", "file_exists", "upload_folder")
            }
        )

    def _bound(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(getattr(REAL, name)).bind(None, *args, **kwargs).arguments
            given.pop("self", None)
            self.calls.append((name, given))
            if self.error is not None:
                raise self.error
            return getattr(self, f"_{name}")(**given)

        return call

    def _create_repo(self, repo_id: str, private: Any, exist_ok: bool) -> None:
        (self.folder / repo_id).mkdir(parents=True, exist_ok=exist_ok)

    def _create_branch(self, repo_id: str, branch: str, exist_ok: bool) -> None:
        assert (self.folder / repo_id).is_dir()

    def _file_exists(self, repo_id: str, filename: str, revision: Any) -> bool:
        return (self.folder / repo_id / filename).exists()

    def _upload_folder(
        self,
        repo_id: str,
        folder_path: Path,
        revision: Any,
        commit_message: str,
        delete_patterns: Any,
    ) -> Any:
        repo = self.folder / repo_id
        for path in sorted(repo.rglob("*")):
            name = str(path.relative_to(repo))
            if any(fnmatch(name, pattern) for pattern in delete_patterns or ()):
                path.unlink()
        shutil.copytree(folder_path, repo, dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/1")

    def snapshot(self, *args: Any, **kwargs: Any) -> str:
        given = inspect.signature(SNAPSHOT).bind(*args, **kwargs).arguments
        self.calls.append(("snapshot_download", given))
        if self.error is not None:
            raise self.error
        repo, cache = self.folder / given["repo_id"], self.folder / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        for path in repo.rglob("*"):
            name = str(path.relative_to(repo))
            if path.is_file() and any(fnmatch(name, p) for p in given["allow_patterns"]):
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, cache / name)
        cache.mkdir(exist_ok=True)
        return str(cache)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", made.api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: made.token)
    return made


def diagonal() -> FisherEstimate:
    facts = {"labels": "sample", "examples": 6, "relative_error": 0.123456, "model": "A | B"}
    return FisherEstimate({"a": torch.rand(4, 3), "b": torch.rand(7)}, facts)


def factored() -> KroneckerEstimate:
    return KroneckerEstimate(
        {"w": (torch.eye(3), torch.eye(4))}, {"b": torch.rand(7)}, {"examples": 6}
    )


def test_there_and_back(hub: Hub) -> None:
    fisher = diagonal()
    url = fisher.push_to_hub("me/fisher", private=True)
    assert url == "https://huggingface.co/me/fisher/commit/1"
    assert [name for name, _ in hub.calls] == ["create_repo", "file_exists", "upload_folder"]
    assert hub.calls[0][1] == {"repo_id": "me/fisher", "private": True, "exist_ok": True}
    message = hub.calls[2][1]["commit_message"]
    assert message == "Add fisher.safetensors (FisherEstimate of fasttax)"
    read = FisherEstimate.from_pretrained("me/fisher", revision="main", token="other")
    assert hub.calls[-1][1]["revision"] == "main"
    assert hub.calls[-1][1]["token"] == "other"
    assert set(read) == {"a", "b"}
    assert all(torch.equal(read[name], fisher[name]) for name in read)
    assert read.metadata == fisher.metadata


def test_the_card_says_where_it_comes_from_and_stays_another_ones(hub: Hub) -> None:
    diagonal().push_to_hub("me/fisher")
    card = huggingface_hub.ModelCard.load(hub.folder / "me" / "fisher" / "README.md")
    assert card.data.library_name == "fasttax"
    for row in ("| labels | sample |", "| relative_error | 0.1235 |", "| model | A \\| B |"):
        assert row in card.text
    assert 'fasttax.FisherEstimate.from_pretrained("me/fisher")' in card.text
    (hub.folder / "me" / "model").mkdir(parents=True)
    readme = hub.folder / "me" / "model" / "README.md"
    readme.write_text("a model's own")
    factored().push_to_hub("me/model", filename="general.safetensors", commit_message="Fisher")
    assert readme.read_text() == "a model's own"
    assert hub.calls[-1][1]["commit_message"] == "Fisher"
    read = KroneckerEstimate.from_pretrained("me/model", filename="general.safetensors")
    assert torch.equal(read.factors["w"][1], torch.eye(4))
    with pytest.raises(ValueError, match="is not a FisherEstimate file"):
        FisherEstimate.from_pretrained("me/model", filename="general.safetensors")


def test_a_folder_of_files(hub: Hub, tmp_path: Path) -> None:
    fisher = diagonal()
    for _ in range(2):  # the parts of the first go as those of the second come
        fisher.push_to_hub("me/large", sharded=True, revision="v2")
    assert ("create_branch", {"repo_id": "me/large", "branch": "v2", "exist_ok": True}) in hub.calls
    parts = list((hub.folder / "me" / "large" / "fisher").glob("part-*"))
    assert len(parts) == 1
    read = FisherEstimate.from_pretrained("me/large")
    assert torch.equal(read["a"], fisher["a"])
    folder = tmp_path / "here"
    folder.mkdir()
    fisher.save(folder / "fisher.safetensors")
    calls = len(hub.calls)
    for source in (folder, folder / "fisher.safetensors"):
        assert torch.equal(FisherEstimate.from_pretrained(source)["b"], fisher["b"])
    assert len(hub.calls) == calls


def test_what_is_refused_says_the_way_out(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fisher = diagonal()
    with pytest.raises(ValueError, match="repo_id: expected a repository's name"):
        fisher.push_to_hub("not a name")
    with pytest.raises(ValueError, match="filename: expected a name in the repository"):
        fisher.push_to_hub("me/x", filename="../x.safetensors")
    with pytest.raises(
        ValueError, match=r"KroneckerEstimate\.push_to_hub: sharded: expected False"
    ):
        factored().push_to_hub("me/x", sharded=True)
    hub.token = None
    with pytest.raises(ValueError, match=r"token: .* got none; run `hf auth login`, set HF_TOKEN"):
        fisher.push_to_hub("me/x")
    assert not hub.calls
    fisher.push_to_hub("me/x", token="given")
    for error in (OfflineModeIsEnabled("offline"), refusal()):
        hub.error = error
        with pytest.raises(
            OSError, match=r"push_to_hub: me/x: .*; see whether the token may write"
        ):
            fisher.push_to_hub("me/x", token="given")
        with pytest.raises(OSError, match=r"from_pretrained: me/x: .*; there is no such file or f"):
            FisherEstimate.from_pretrained("me/x")
    hub.error = None
    with pytest.raises(FileNotFoundError, match=r"expected y in it, got me/x without; name the"):
        FisherEstimate.from_pretrained("me/x", filename="y")
    with pytest.raises(FileNotFoundError, match=r"a file, a folder, or a repository of the Hub"):
        FisherEstimate.from_pretrained(tmp_path / "none")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (
        lambda: fisher.push_to_hub("me/x"),
        lambda: FisherEstimate.from_pretrained("me/x"),
    ):
        with pytest.raises(ModuleNotFoundError, match="run `pip install huggingface_hub`"):
            call()


def refusal() -> HfHubHTTPError:
    """What huggingface_hub raises of a 403, of its own HTTP client's response."""
    client: Any = inspect.getmodule(HfHubHTTPError.__bases__[0])
    package: Any = sys.modules[client.__name__.partition(".")[0]]
    request = package.Request("POST", "https://huggingface.co/api/repos/create")
    response = package.Response(403, request=request)
    return HfHubHTTPError("403 Forbidden", response=response)


def test_an_ewc_of_a_repository(hub: Hub) -> None:
    model = torch.nn.Linear(3, 4)
    FisherEstimate({"weight": torch.rand(4, 3)}).push_to_hub("me/linear")
    fisher = FisherEstimate.from_pretrained("me/linear")
    ewc = fasttax.EWC(model, fisher, strength=2.0)
    with torch.no_grad():
        model.weight += 1
    assert float(ewc.penalty()) == pytest.approx(float(fisher["weight"].sum()), rel=1e-6)
