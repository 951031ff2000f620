"""A tiny model for tests of the command line, and the ways to run it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.conftest import Command
from torch_xlstm_ops import config
from torch_xlstm_ops.cli.generation import prompt
from torch_xlstm_ops.cli.shared import loading

PROMPT = "def main(argv):\n"
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a Hugging Face directory of a random xLSTM with a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, xLSTMConfig, xLSTMForCausalLM

    directory = tmp_path_factory.mktemp("xlstm") / "tiny"
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**vocabulary, "<end>": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(directory)
    torch.manual_seed(0)
    settings = xLSTMConfig(vocab_size=257, hidden_size=64, num_hidden_layers=2, num_heads=2, qk_dim_factor=1.0,
                           chunk_size=16, pad_token_id=256, bos_token_id=256, eos_token_id=256)
    xLSTMForCausalLM(settings).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def loaded(model_directory: Path) -> loading.Loaded:
    return loading.load(model_directory, CPU)


@pytest.fixture(autouse=True)
def clean_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in list(os.environ):
        if name.startswith(config.PREFIX):
            monkeypatch.delenv(name)
    config.reload(flags={})
    yield
    monkeypatch.undo()
    config.reload(flags={})


@pytest.fixture
def write(run: Command, model_directory: Path) -> Command:
    """Run `generate` on the tiny model with transformers' own code, which needs no compiler."""

    def write(*arguments: object) -> tuple[int, str, str]:
        return run("generate", "--model", model_directory, "--prompt", PROMPT, "--no-patch", *arguments)

    return write


def text_and_table(out: str, err: str) -> tuple[str, dict[str, str]]:
    """Return the text on stdout, which holds nothing else, and the table on stderr."""
    return out.removesuffix("\n"), dict(re.findall(r"│ (.+?) +│ (.+?) +│", err))


def reference(loaded: loading.Loaded, count: int) -> str:
    """Return transformers' own greedy text."""
    ids = torch.tensor([prompt.encode(loaded, PROMPT)])
    with torch.inference_mode():
        out = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return str(loaded.tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True))


def error(result: tuple[int, str, str]) -> str:
    """Return the one line of an error."""
    status, out, err = result
    assert (status, out) == (2, "")
    assert err.endswith("\n")
    (line,) = [line for line in err.splitlines() if line not in ("loading broken", "warming up")]
    assert line.startswith("xlstm-ops: error: ")
    return line.removeprefix("xlstm-ops: error: ")
