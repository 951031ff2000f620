"""Load an xLSTM and its tokenizer from a Hugging Face directory, or report in one line what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from torch_xlstm_ops.cli.shared.errors import BadInput
from torch_xlstm_ops.runtime import environment

_NO_DYNAMO = "TORCHDYNAMO_DISABLE"  # torch's: `torch.compile` does nothing
_WANTED = "--model must be a directory of a Hugging Face xLSTM"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Loaded(NamedTuple):
    """A model that is ready to run, and its tokenizer; both are of transformers."""

    model: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype


def load(directory: Path, device: torch.device, dtype: str = "auto", *, patched: bool = False) -> Loaded:
    """Load the xLSTM and the tokenizer in a Hugging Face directory.

    dtype: a name in `DTYPES`, or auto: float32 on the CPU, else the checkpoint's.
    patched: whether the model will run on our operators alone.

    Raises BadInput if the directory does not hold them, if possible before any weight is read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    check_directory(directory)
    if not any(directory.glob("*.safetensors")) and not any(directory.glob("pytorch_model*.bin")):
        raise BadInput(f"{_WANTED}, got {directory} without weights (model.safetensors)")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    settings = _load_part("a config.json", AutoConfig.from_pretrained, directory)
    settings.mode, settings.return_last_states = "inference", True  # a checkpoint may have been saved in training
    tokenizer = _load_tokenizer(directory)
    stored = getattr(settings, "dtype", None) or torch.float32
    wanted = DTYPES.get(dtype, torch.float32 if device.type == "cpu" else stored)
    with _functions_left_uncompiled() if patched and device.type == "cpu" else nullcontext():
        model, report = _load_part("weights", AutoModelForCausalLM.from_pretrained, directory, config=settings,
                                   dtype=wanted, output_loading_info=True, ignore_mismatched_sizes=True)
    _check_complete(directory, report)
    return Loaded(model.to(device).eval(), tokenizer, device, wanted)


def _functions_left_uncompiled() -> AbstractContextManager[None]:
    """Make `torch.compile` return functions as they are, inside a ``with`` block.

    To build a model, the package xlstm imports every kernel of mlstm_kernels. Some of these decorate helpers of Triton
    kernels with `torch.compile`, which imports all of Inductor for functions that a patched model never calls.
    """
    return environment.variable(_NO_DYNAMO, "1")


def _check_complete(directory: Path, report: Any) -> None:
    """Raise BadInput for weights that transformers would initialise at random."""
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
    return _load_part("a tokenizer", AutoTokenizer.from_pretrained, directory)


def _load_part(part: str, loader: Callable[..., Any], directory: Path, **options: object) -> Any:
    """Call a loader of transformers; raise whatever it raises as BadInput about a part of the directory."""
    try:
        return loader(directory, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # OSError, ValueError, RuntimeError, SafetensorError, tokenizers' bare Exception
        reason = " ".join(str(error).split())[:200]
        raise BadInput(f"--model must hold {part} that transformers can read, got {directory}: "
                       f"{type(error).__name__}: {reason}") from error


def end_tokens(loaded: Loaded) -> frozenset[int]:
    """Return the tokens with which the model ends a text."""
    given = loaded.model.generation_config.eos_token_id
    return frozenset([given] if isinstance(given, int) else given or [])
