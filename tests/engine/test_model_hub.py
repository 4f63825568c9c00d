"""Names of the hub: which files are fetched and when, and what the refusals say. A stand-in for the hub's download."""

from __future__ import annotations

import fnmatch
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.model_config import ModelConfig, UnsupportedModel, weight_files
from engine.model_folder import ModelNotFound, resolve

TINY = Path(__file__).parents[2] / "models" / "baton-tiny"


class Hub:
    """One repository; `snapshot_download` copies what the patterns ask for, as huggingface_hub does."""

    def __init__(self, root: Path) -> None:
        self.repository = Path(shutil.copytree(TINY, root / "repository"))
        self.cache = root / "cache"
        self.calls: list[tuple[str | None, list[str]]] = []

    def snapshot_download(
        self, name: str, *, revision: str | None = None, allow_patterns: list[str] | None = None
    ) -> str:
        assert name == "an-org/a.model" and allow_patterns
        folder = self.cache / "snapshots" / "c0ffee"
        folder.mkdir(parents=True, exist_ok=True)
        found = [
            file
            for file in self.repository.iterdir()
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns)
        ]
        for file in found:
            shutil.copy(file, folder)
        self.calls.append((revision, sorted(file.name for file in found)))
        return str(folder)

    def edit(self, **changes: Any) -> None:
        file = self.repository / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    return hub


def test_a_folder_is_itself(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even when it looks like a name of the hub."""
    monkeypatch.chdir(TINY.parents[1])
    assert resolve("models/baton-tiny") == TINY.resolve()
    assert resolve(TINY) == TINY.resolve()
    assert hub.calls == []


def test_small_files_first_then_the_weights_of_the_same_commit(hub: Hub) -> None:
    for extra in ("chat_template.jinja", "consolidated.safetensors", "pytorch_model.bin", "README.md"):
        (hub.repository / extra).write_text("x")
    folder = resolve("an-org/a.model")
    small = sorted({file.name for file in TINY.iterdir()} - {"model.safetensors"} | {"chat_template.jinja"})
    assert hub.calls == [(None, small), ("c0ffee", ["model.safetensors"])]
    assert ModelConfig.from_folder(folder) == ModelConfig.from_folder(TINY)
    assert weight_files(folder) == [folder / "model.safetensors"]


def test_only_shards_that_the_index_names(hub: Hub) -> None:
    (hub.repository / "model.safetensors").rename(hub.repository / "part-1.safetensors")
    (hub.repository / "other.safetensors").write_text("x")
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-1.safetensors"}}
    (hub.repository / "model.safetensors.index.json").write_text(json.dumps(index))
    folder = resolve("an-org/a.model")
    assert hub.calls[1] == ("c0ffee", ["part-1.safetensors"])
    assert weight_files(folder) == [folder / "part-1.safetensors"]


def test_an_unsupported_model_is_refused_before_its_weights_come(hub: Hub) -> None:
    hub.edit(quantization_config={"quant_method": "gptq"})
    with pytest.raises(UnsupportedModel, match="quantization_config={'quant_method': 'gptq'}"):
        resolve("an-org/a.model")
    assert len(hub.calls) == 1
    (hub.repository / "config.json").unlink()
    shutil.rmtree(hub.cache)
    with pytest.raises(ModelNotFound, match="an-org/a.model: the hub's repository has no config.json"):
        resolve("an-org/a.model")


@pytest.mark.parametrize("path", ["/no/such", "./no/such", "~/no-such", "single", "a/b/c", "a/b c", ""])
def test_what_cannot_be_a_name_of_the_hub_is_not_asked_for(hub: Hub, path: str) -> None:
    with pytest.raises(ModelNotFound, match="no such folder, nor the name of a model"):
        resolve(path)
    assert hub.calls == []


def test_without_a_network_it_says_how_to_get_the_folder(tmp_path: Path) -> None:
    """The real huggingface_hub, told to stay offline, with an empty cache; it reads its settings at import."""
    code = "from engine.model_folder import resolve; resolve('an-org/a.model')"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=TINY.parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert (
        "an-org/a.model: no such folder here, and the Hugging Face hub does not answer (LocalEntryNotFoundError)"
        in last
    )
    assert "hf download an-org/a.model --local-dir FOLDER" in last


def test_what_the_hub_refuses_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import GatedRepoError

    def gated(*_: Any, **__: Any) -> str:
        error = GatedRepoError.__new__(GatedRepoError)
        Exception.__init__(error, "Access is restricted.\nRequest id: 1")
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", gated)
    with pytest.raises(ModelNotFound) as refusal:
        resolve("an-org/a.model")
    assert str(refusal.value).endswith("and the hub refuses it: Access is restricted.")
