"""From a model spec to a model ready to prefill.

============================  ==================================================================
``embedded``                  the default: a small planted model, nothing to download
``planted:<shape>``           stock class and shape of a published model, invented weights
``<directory>``               config.json and safetensors; the network is not touched
``<organisation>/<name>``     a model of the Hugging Face hub, the only spec that may download
============================  ==================================================================
"""

import hashlib
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from minference_green.errors import UsageError
from minference_green.methods.patterns import Patterns
from minference_green.model.planted import SHAPES
from minference_green.model.planting import RECIPE, plant
from minference_green.workload import Workload, synthetic_tokens

EMBEDDED_SHAPE = "tiny"
"""The planted shape that ``embedded`` stands for."""

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode on its device, and what identifies it."""

    model: PreTrainedModel
    spec: str
    revision: str
    """Commit of a hub snapshot, hash of a directory's content, or version of a recipe."""
    weights: str
    """``trained`` or ``planted weights``."""
    parameters: int
    max_context: int | None
    """Longest prompt the model is made for, in tokens, if it says."""
    vocabulary: int
    bos: int | None
    patterns: Patterns | None
    """The pattern file the model carries."""
    allow_longer: bool
    directory: Path | None
    """Where its tokenizer is."""

    def prompt(self, workload: Workload, context_length: int) -> Tensor:
        """Token ids, int64 ``[batch, context_length]``, on the model's device.

        Synthetic: the model's first token if it has one, then tokens drawn evenly from all
        others, each row its own. A text file: its first tokens, the same in every row. Raises
        ``UsageError`` if the model is not made for the length, or a text cannot fill it.
        """
        if not self.allow_longer and self.max_context and context_length > self.max_context:
            raise UsageError(
                f"{self.spec} is made for {self.max_context} tokens, {context_length} were asked; "
                "choose a shorter length, or --allow-longer to measure it all the same"
            )
        if workload.prompt == "synthetic":
            rows = [
                self._synthetic(workload.seed, row, context_length) for row in range(workload.batch)
            ]
        else:
            rows = [self._text(workload, context_length)] * workload.batch
        return torch.stack(rows).to(self.model.device)

    def _synthetic(self, seed: int, row: int, length: int) -> Tensor:
        if self.bos is None:
            return torch.from_numpy(synthetic_tokens(seed, row, length, self.vocabulary))
        drawn = torch.from_numpy(synthetic_tokens(seed, row, length - 1, self.vocabulary - 1))
        # Skipping the first token's number leaves the draw even over all others.
        return torch.cat([torch.tensor([self.bos]), drawn + (drawn >= self.bos)])

    def _text(self, workload: Workload, length: int) -> Tensor:
        path = Path(workload.prompt)
        try:
            content = path.read_bytes()
            text = content.decode()
        except OSError as error:
            raise UsageError(f"cannot read prompt {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UsageError(f"prompt {path} is not UTF-8 text: {error}") from error
        found = hashlib.sha256(content).hexdigest()
        if workload.prompt_sha256 not in (None, found):
            raise UsageError(
                f"prompt {path} has changed since this workload was made: sha256 {found[:16]}..., "
                f"was {str(workload.prompt_sha256)[:16]}...; restore it or start a new run"
            )
        ids = self._tokenizer_ids(text)
        if len(ids) < length:
            raise UsageError(
                f"prompt {path} has {len(ids)} tokens for {self.spec}, {length} are needed; "
                "give a longer text or a shorter length"
            )
        return torch.tensor(ids[:length])

    def _tokenizer_ids(self, text: str) -> list[int]:
        if self.directory is None:
            raise UsageError(
                f"{self.spec} has no tokenizer, so it cannot read a text; use --prompt synthetic"
            )
        try:
            with _quiet():
                tokenizer = AutoTokenizer.from_pretrained(
                    self.directory, local_files_only=True, trust_remote_code=False
                )
        except (OSError, ValueError, ImportError, TypeError, AttributeError) as error:
            raise UsageError(
                f"no usable tokenizer in {self.directory} ({_first_line(error)}); "
                "add the model's tokenizer.json, or use --prompt synthetic"
            ) from error
        ids: list[int] = tokenizer(text)["input_ids"]
        return ids


def load(
    spec: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    allow_longer: bool = False,
) -> LoadedModel:
    """Load the model that ``spec`` names; see the module's table.

    ``seed`` draws the weights of a planted model. ``allow_longer`` lets prompts exceed the
    length the model is made for. Raises ``UsageError`` for a spec that names nothing, files
    missing or damaged, a model that is no causal language model, or one too big for the device.
    """
    try:
        if spec == "embedded":
            return _planted(spec, EMBEDDED_SHAPE, device, dtype, seed, allow_longer)
        if spec.startswith("planted:"):
            return _planted(spec, spec.removeprefix("planted:"), device, dtype, seed, allow_longer)
        path = Path(spec).expanduser()
        if spec and path.is_dir():
            return _trained(spec, path, device, dtype, allow_longer)
        if _HUB_ID.fullmatch(spec):
            return _trained(spec, _download(spec), device, dtype, allow_longer)
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"{spec} does not fit on {device}: {_first_line(error)}; "
            "free the device, or choose a smaller model or --dtype bfloat16"
        ) from error
    raise UsageError(
        f"{spec!r} is no model: there is no such directory, and it is neither a hub id "
        f"(organisation/name) nor embedded nor {_planted_specs()}"
    )


def _planted_specs() -> str:
    return ", ".join(f"planted:{name}" for name in SHAPES)


def _planted(
    spec: str, name: str, device: torch.device, dtype: torch.dtype, seed: int, allow_longer: bool
) -> LoadedModel:
    if name not in SHAPES:
        raise UsageError(f"{spec!r} is not a planted model; choose from {_planted_specs()}")
    shape = SHAPES[name]()
    model = plant(shape, device=device, dtype=dtype, seed=seed)
    return _loaded(
        model,
        spec=spec,
        revision=f"{RECIPE} seed {seed}",
        weights="planted weights",
        patterns=shape.patterns,
        allow_longer=allow_longer,
        directory=None,
    )


def _download(spec: str) -> Path:
    """The hub's snapshot of a model; only weights, configuration and tokenizer."""
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
            f"cannot get {spec!r} from the hub ({_first_line(error)}), and there is no such "
            "directory; check the name, log in if it is gated, or download it first and give "
            "the directory"
        ) from error


def _trained(
    spec: str, directory: Path, device: torch.device, dtype: torch.dtype, allow_longer: bool
) -> LoadedModel:
    _check_config(directory)
    files = _weight_files(directory)
    try:
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                # Both kinds of wrong tensor are then reported, and refused below.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, SafetensorError) as error:
        raise UsageError(f"transformers cannot load {directory}: {_first_line(error)}") from error
    model, info = loaded
    misshaped = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
    wrong = sorted([*info["missing_keys"], *misshaped])
    if wrong:
        raise UsageError(
            f"the weights in {directory} lack or misshape {len(wrong)} of the tensors that "
            f"{type(model).__name__} needs, the first being {wrong[0]}; "
            "download or convert the model again"
        )
    return _loaded(
        model.to(device).eval(),
        spec=spec,
        revision=_revision(directory, files),
        weights="trained",
        patterns=None,
        allow_longer=allow_longer,
        directory=directory,
    )


def _loaded(
    model: PreTrainedModel,
    *,
    spec: str,
    revision: str,
    weights: str,
    patterns: Patterns | None,
    allow_longer: bool,
    directory: Path | None,
) -> LoadedModel:
    config = model.config
    model.requires_grad_(False)
    return LoadedModel(
        model=model,
        spec=spec,
        revision=revision,
        weights=weights,
        parameters=sum(p.numel() for p in model.parameters()),
        max_context=getattr(config, "max_position_embeddings", None),
        vocabulary=config.vocab_size,
        bos=config.bos_token_id,
        patterns=patterns,
        allow_longer=allow_longer,
        directory=directory,
    )


def _check_config(directory: Path) -> None:
    """Raise unless the directory is configured as a causal language model of transformers'."""
    file = directory / "config.json"
    if not file.is_file():
        raise UsageError(f"{directory} has no config.json, so it is no model directory")
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{file} is no configuration that transformers knows: {_first_line(error)}"
        ) from error
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    named = config.architectures or [causal.get(config.model_type, "")]
    if not set(named) & set(causal.values()):
        raise UsageError(
            f"{directory} holds a {config.model_type} model ({', '.join(named) or 'no class'}), "
            "not a causal language model; give a decoder such as Llama, Qwen or Mistral"
        )


def _weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model, each seen to be whole."""
    index = directory / _INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{index} is damaged ({_first_line(error)}); get it again") from error
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
                f"{file} is damaged or cut short ({_first_line(error)}); get it again"
            ) from error
    return files


def _revision(directory: Path, files: list[Path]) -> str:
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
def _quiet() -> Iterator[None]:
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


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
