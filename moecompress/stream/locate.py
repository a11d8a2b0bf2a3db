"""From a recipe's `model` to a local directory: a path as it is, or a hub id through the hub's cache."""

from __future__ import annotations

import re
from pathlib import Path

from moecompress.errors import CheckpointError, MachineError, message

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "*.py", "chat_templates/*"]


def locate_model(model: str, revision: str | None = None) -> Path:
    """The directory of a checkpoint. A hub id is looked up in the local cache first, then downloaded.

    Raises CheckpointError for a path that does not exist, MachineError when the hub cannot be reached.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not _HUB_ID.fullmatch(model):
        raise CheckpointError(
            message(f"model '{model}'", "no such directory", "a checkpoint directory or a hub id like org/name")
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_PATTERNS, local_files_only=True))
    except Exception:  # not in the cache: the hub's own errors decide below
        pass
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_PATTERNS))
    except Exception as error:  # the hub raises many types: no network, no such repository, gated, ...
        reason = str(error).split("\n")[0][:200]
        raise MachineError(
            message(
                f"model '{model}'",
                f"is no directory here and the hub gave: {reason}",
                then="check the name and the network, or give a local directory",
            )
        ) from error
