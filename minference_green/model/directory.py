"""A directory of model files: fetched, seen to be whole, and identified by its content."""

import hashlib
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from minference_green.errors import UsageError

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_COMMIT = re.compile(r"[0-9a-f]{40}")


def download(spec: str) -> Path:
    """The hub's snapshot of a model: only weights, configuration and tokenizer.

    Without a network, the snapshot of an earlier download. Raises ``UsageError`` if there is
    neither.
    """
    try:
        return Path(
            snapshot_download(
                spec,
                allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"],
                ignore_patterns=["*/*", "consolidated*"],
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UsageError(
            f"cannot get {spec!r} from the hub ({first_line(error)}), and there is no such "
            "directory; check the name, log in if it is gated, or download it first and give "
            "the directory"
        ) from error


def check_config(directory: Path) -> None:
    """Raise ``UsageError`` unless a causal language model of transformers is configured."""
    file = directory / "config.json"
    if not file.is_file():
        raise UsageError(f"{directory} has no config.json, so it is no model directory")
    try:
        with quiet():
            config = AutoConfig.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{file} is no configuration that transformers knows: {first_line(error)}"
        ) from error
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    named = config.architectures or [causal.get(config.model_type, "")]
    if not set(named) & set(causal.values()):
        raise UsageError(
            f"{directory} holds a {config.model_type} model ({', '.join(named) or 'no class'}), "
            "not a causal language model; give a decoder such as Llama, Qwen or Mistral"
        )


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model, each seen to be whole; else ``UsageError`` names it."""
    index = directory / _INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{index} is damaged ({first_line(error)}); get it again") from error
    elif (directory / _WEIGHTS).is_file():
        names = [_WEIGHTS]
    else:
        others = sorted(
            p.name for pattern in ("*.bin", "*.pt", "*.gguf") for p in directory.glob(pattern)
        )
        found = f"only {', '.join(others)}" if others else "no weights"
        raise UsageError(
            f"{directory} has {found}; weights must be safetensors ({_WEIGHTS} or {_INDEX})"
        )
    files = [directory / name for name in names]
    for file in files:
        if not file.is_file():
            raise UsageError(f"{file} is missing, though {_INDEX} names it; get it again")
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UsageError(
                f"{file} is damaged or cut short ({first_line(error)}); get it again"
            ) from error
    return files


def revision_of(directory: Path, files: list[Path]) -> str:
    """Commit if the directory is a hub snapshot, else a hash over configuration and weights."""
    resolved = directory.resolve()
    if resolved.parent.name == "snapshots" and _COMMIT.fullmatch(resolved.name):
        return resolved.name
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        digests = list(pool.map(_digest, [directory / "config.json", *files]))
    return f"sha256:{hashlib.sha256(b''.join(digests)).hexdigest()[:16]}"


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings and progress bars of transformers; what matters is raised."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
