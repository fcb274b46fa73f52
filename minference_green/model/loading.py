"""From a model spec to a model ready to prefill.

============================  ==================================================================
``embedded``                  the default: a small trained model of bytes, part of the package
``planted:<shape>``           stock class and shape of a published model, invented weights
``<directory>``               config.json and safetensors; the network is not touched
``<organisation>/<name>``     a model of the Hugging Face hub, the only spec that may download
============================  ==================================================================
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from minference_green.corpus.haystack import haystack
from minference_green.errors import UsageError
from minference_green.methods.official import read_patterns
from minference_green.methods.patterns import Patterns
from minference_green.model.directory import (
    check_config,
    download,
    first_line,
    quiet,
    revision_of,
    weight_files,
)
from minference_green.model.planted import SHAPES
from minference_green.model.planting import RECIPE, plant
from minference_green.workload import Workload, synthetic_tokens

EMBEDDED = Path(__file__).parent / "embedded"
"""The model that comes with the package: config.json, weights and head patterns."""

PATTERN_FILE = "minference_patterns.json"
"""Head patterns that a model's directory may carry, in MInference's format."""

PROBE_FILE = "probe_patterns.json"
"""The same for the method ``probe``: some of its heads may be probed."""

BYTES_FLAG = "minference_green_bytes"
"""A configuration that holds this as true is of a model whose token ids are UTF-8 bytes."""

_SHORTEST_HAYSTACK = 8192
"""Bytes in which every haystack's facts have room; a shorter prompt is the beginning of one."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


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
    probe_patterns: Patterns | None = None
    """The pattern file for ``probe`` that the model carries."""

    @property
    def reads_bytes(self) -> bool:
        """Whether token ids are the bytes of UTF-8 text."""
        return bool(getattr(self.model.config, BYTES_FLAG, False))

    def prompt(self, workload: Workload, context_length: int) -> Tensor:
        """Token ids, int64 ``[batch, context_length]``, on the model's device.

        Synthetic: the model's first token if it has one, then tokens drawn evenly from all
        others, each row its own; for a model of bytes a made-up text full of facts and
        questions, as an audit asks them. A text file: its first tokens, the same in every row.
        Raises ``UsageError`` if the model is not made for the length, or a text cannot fill it.
        """
        self.check_length(context_length)
        if workload.prompt == "synthetic":
            rows = [
                self._synthetic(workload.seed, row, context_length) for row in range(workload.batch)
            ]
        else:
            rows = [self._text(workload, context_length)] * workload.batch
        return torch.stack(rows).to(self.model.device)

    def check_length(self, context_length: int) -> None:
        """Raise ``UsageError`` if the model is not made for a prompt of so many tokens."""
        if not self.allow_longer and self.max_context and context_length > self.max_context:
            raise UsageError(
                f"{self.spec} is made for {self.max_context} tokens, {context_length} were asked; "
                "choose a shorter length, or --allow-longer to measure it all the same"
            )

    def _synthetic(self, seed: int, row: int, length: int) -> Tensor:
        if self.reads_bytes:
            size = max(length, _SHORTEST_HAYSTACK)
            text = haystack(seed, row, length=size).text
            return torch.tensor([*self._opening, *text][:length])
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

    @property
    def _opening(self) -> tuple[int, ...]:
        return () if self.bos is None else (self.bos,)

    def _tokenizer_ids(self, text: str) -> list[int]:
        if self.reads_bytes:
            return [*self._opening, *text.encode()]
        if self.directory is None:
            raise UsageError(
                f"{self.spec} has no tokenizer, so it cannot read a text; use --prompt synthetic"
            )
        try:
            with quiet():
                tokenizer = AutoTokenizer.from_pretrained(
                    self.directory, local_files_only=True, trust_remote_code=False
                )
                ids: list[int] = tokenizer(text)["input_ids"]
        except (OSError, ValueError, ImportError, TypeError, AttributeError) as error:
            raise UsageError(
                f"no usable tokenizer in {self.directory} ({first_line(error)}); "
                "add the model's tokenizer.json, or use --prompt synthetic"
            ) from error
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
            return _trained(spec, EMBEDDED, device, dtype, allow_longer)
        if spec.startswith("planted:"):
            return _planted(spec, spec.removeprefix("planted:"), device, dtype, seed, allow_longer)
        path = Path(spec).expanduser()
        if spec and path.is_dir():
            return _trained(spec, path, device, dtype, allow_longer)
        if _HUB_ID.fullmatch(spec):
            return _trained(spec, download(spec), device, dtype, allow_longer)
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"{spec} does not fit on {device}: {first_line(error)}; "
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


def _trained(
    spec: str, directory: Path, device: torch.device, dtype: torch.dtype, allow_longer: bool
) -> LoadedModel:
    check_config(directory)
    files = weight_files(directory)
    try:
        with quiet():
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
        raise UsageError(f"transformers cannot load {directory}: {first_line(error)}") from error
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
        revision=revision_of(directory, files),
        weights="trained",
        patterns=_carried(directory / PATTERN_FILE),
        probe_patterns=_carried(directory / PROBE_FILE),
        allow_longer=allow_longer,
        directory=directory,
    )


def _carried(path: Path) -> Patterns | None:
    return read_patterns(path).patterns if path.exists() else None


def _loaded(
    model: PreTrainedModel,
    *,
    spec: str,
    revision: str,
    weights: str,
    patterns: Patterns | None,
    allow_longer: bool,
    directory: Path | None,
    probe_patterns: Patterns | None = None,
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
        probe_patterns=probe_patterns,
        allow_longer=allow_longer,
        directory=directory,
    )
