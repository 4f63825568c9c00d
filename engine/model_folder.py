"""From what a configuration calls a model to a folder: the path itself, or a repository of the Hugging Face hub.

Called once by whoever starts a deployment, before any worker: workers are only ever given folders. From the hub come
the small files first, so that a model which the engine cannot compute is refused before its weights are fetched; then
the weights that the index names, and no others (many repositories hold the same weights in three formats).
"""

from __future__ import annotations

import re
from pathlib import Path

from engine.config_fields import UnsupportedModel, read_json
from engine.model_config import ModelConfig

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_INDEX = "model.safetensors.index.json"
_SMALL_FILES = (
    "config.json",
    "generation_config.json",
    _INDEX,
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)


class ModelNotFound(FileNotFoundError):
    """There is no such model folder, and the hub did not give one; the message says what to do."""


def is_hub_name(path: str) -> bool:
    """Whether it could be the name of a model on the hub: org/name."""
    return _HUB_ID.fullmatch(path) is not None


def resolve(path: str | Path) -> Path:
    """The absolute path of the model's folder; `org/name` that is no folder is fetched from the hub.

    Progress goes to standard error, as huggingface_hub does it. What was fetched before is not fetched again, and then
    needs no network. Raises ModelNotFound, or UnsupportedModel for a model of the hub that the engine cannot compute.
    """
    folder = Path(path).expanduser()
    if str(path) and folder.is_dir():
        return folder.resolve()
    if not is_hub_name(str(path)):
        raise ModelNotFound(
            f"{path}: no such folder, nor the name of a model on the Hugging Face hub (org/name)"
        )
    return _fetch(str(path))


def _fetch(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError:
        raise ModelNotFound(
            f"{name}: no such folder; to fetch it from the Hugging Face hub, install huggingface_hub"
        ) from None
    try:
        folder = Path(snapshot_download(name, allow_patterns=list(_SMALL_FILES)))
        if not (folder / "config.json").exists():
            raise ModelNotFound(f"{name}: the hub's repository has no config.json")
        ModelConfig.from_folder(folder)
        # The same commit again: its name is the folder's, and the branch may have moved on since.
        return Path(snapshot_download(name, revision=folder.name, allow_patterns=_weight_names(folder)))
    except (ModelNotFound, UnsupportedModel):
        raise
    except (HfHubHTTPError, HFValidationError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise ModelNotFound(f"{name}: no such folder here, and the hub refuses it: {first_line}") from error
    except Exception as error:  # offline, timeout, lost connection, full disk: each library has its own
        raise ModelNotFound(
            f"{name}: no such folder here, and the Hugging Face hub does not "
            f"answer ({type(error).__name__}). "
            f"Download the model where there is a network (hf download {name} --local-dir FOLDER) and give the "
            "folder as model.path"
        ) from error


def _weight_names(folder: Path) -> list[str]:
    """The shards that the index names, or the single file."""
    index = folder / _INDEX
    if not index.exists():
        return ["model.safetensors"]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UnsupportedModel(f"{index}: weight_map is missing or empty")
    return sorted(set(weight_map.values()))
