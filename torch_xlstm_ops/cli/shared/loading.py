"""Find an xLSTM and its tokenizer in a Hugging Face directory, or say in one line what is wrong with it."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from torch_xlstm_ops.cli.generation.sampling import CONTEXT
from torch_xlstm_ops.context import text_tokens
from torch_xlstm_ops.runtime.extras import how_to_install

DEMO_MODEL = Path(__file__).parents[2] / "demo_model"
EXTRA = ("transformers", "safetensors", "rich")
_WANTED = "--model must be a directory of a Hugging Face xLSTM"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class BadInput(Exception):
    """What the user gave cannot be used; the message is one line."""


def check_extra(command: str) -> None:
    """Raise BadInput unless the packages of the extra `models`, which `command` needs, are installed."""
    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        raise BadInput(f"{command} needs {', '.join(missing)}: {how_to_install('models')}")


class Loaded(NamedTuple):
    """A model ready to run, and its tokenizer; both are transformers' own."""

    model: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype


def load(directory: Path, device: torch.device, dtype: str = "auto") -> Loaded:
    """Load the xLSTM and the tokenizer in a Hugging Face directory.

    dtype: a name in `DTYPES`, or auto: the checkpoint's, and float32 on the CPU.

    Raises BadInput when the directory does not hold them, before any weight is read if it can be known by then.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    check_directory(directory)
    if not any(directory.glob("*.safetensors")) and not any(directory.glob("pytorch_model*.bin")):
        raise BadInput(f"{_WANTED}, got {directory} without weights (model.safetensors)")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    settings = _understood("a config.json", AutoConfig.from_pretrained, directory)
    settings.mode, settings.return_last_states = "inference", True  # a checkpoint may have been saved in training
    tokenizer = _load_tokenizer(directory)
    stored = getattr(settings, "dtype", None) or torch.float32
    wanted = DTYPES.get(dtype, torch.float32 if device.type == "cpu" else stored)
    model, report = _understood("weights", AutoModelForCausalLM.from_pretrained, directory, config=settings,
                                dtype=wanted, output_loading_info=True, ignore_mismatched_sizes=True)
    _check_complete(directory, report)
    return Loaded(model.to(device).eval(), tokenizer, device, wanted)


def _check_complete(directory: Path, report: Any) -> None:
    """Raise BadInput for weights that transformers would otherwise draw at random."""
    for name, stored, wanted in sorted(report["mismatched_keys"]):
        raise BadInput(f"--model must hold {name} of shape {tuple(wanted)}, got {tuple(stored)} in {directory}")
    if report["missing_keys"]:
        raise BadInput(f"--model must hold every weight of its config.json, got {directory} without "
                       f"{', '.join(sorted(report['missing_keys'])[:3])}")


def check_directory(directory: Path) -> None:
    """Raise BadInput unless a directory holds the configuration of an xLSTM."""
    if not directory.is_dir():
        raise BadInput(f"{_WANTED}, got {directory}, which is {'a file' if directory.exists() else 'not there'}")
    try:
        kind = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("model_type")
    except FileNotFoundError:
        raise BadInput(f"{_WANTED}, got {directory} without config.json") from None
    except (OSError, ValueError, AttributeError):
        raise BadInput(f"{_WANTED}, got {directory} with a config.json that cannot be read") from None
    if kind != "xlstm":
        raise BadInput(f"{_WANTED}, got {directory} of model_type {kind!r}")


def _load_tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    if not any((directory / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise BadInput(f"--model must hold its tokenizer, got {directory} without tokenizer.json")
    return _understood("a tokenizer", AutoTokenizer.from_pretrained, directory)


def _understood(part: str, loader: Callable[..., Any], directory: Path, **options: object) -> Any:
    """Call a loader of transformers; whatever it raises means that this part of the directory is no good."""
    try:
        return loader(directory, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # OSError, ValueError, RuntimeError, SafetensorError, tokenizers' bare Exception
        reason = " ".join(str(error).split())[:200]
        raise BadInput(f"--model must hold {part} that transformers can read, got {directory}: "
                       f"{type(error).__name__}: {reason}") from error


def encode(loaded: Loaded, prompt: str) -> list[int]:
    """Return the prompt's tokens. Raises BadInput for a prompt without tokens, or tokens the model does not know."""
    tokens = list(loaded.tokenizer(prompt)["input_ids"])
    if not tokens:
        raise BadInput(f"the prompt must hold at least one token, got {prompt!r}")
    known = loaded.model.get_input_embeddings().num_embeddings
    if max(tokens) >= known:
        raise BadInput(f"the tokenizer must give tokens below the model's {known}, got {max(tokens)}")
    return tokens


class LongPrompt:
    """The tokens of a file of any length, read from it whenever they are asked for.

    Raises BadInput like `encode`.
    """

    def __init__(self, loaded: Loaded, path: Path) -> None:
        self._path, self._tokenizer = path, loaded.tokenizer
        known = loaded.model.get_input_embeddings().num_embeddings
        last: deque[int] = deque(maxlen=CONTEXT)
        self._count = 0
        for token in self:
            if token >= known:
                raise BadInput(f"the tokenizer must give tokens below the model's {known}, got {token}")
            last.append(token)
            self._count += 1
        self.last = list(last)
        if not last:
            raise BadInput(f"the prompt must hold at least one token, got {path}")

    def __iter__(self) -> Iterator[int]:
        return text_tokens(self._path, self._tokenizer)

    def __len__(self) -> int:
        return self._count


Prompt = Sequence[int] | LongPrompt


def prompt_of(loaded: Loaded, prompt: str | Path) -> Prompt:
    """Return the tokens of a text, or of a file that is too long to be held as one."""
    return LongPrompt(loaded, prompt) if isinstance(prompt, Path) else encode(loaded, prompt)


def end_tokens(loaded: Loaded) -> frozenset[int]:
    """Return the tokens at which the model says that it has finished."""
    given = loaded.model.generation_config.eos_token_id
    return frozenset([given] if isinstance(given, int) else given or [])
