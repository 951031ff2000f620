"""Laws of the embedded model: it is a plain Hugging Face directory, small, and has learnt Python."""

from __future__ import annotations

import copy
import json
import math
import sysconfig
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")

from benchmarks import train_demo_model  # noqa: E402
from torch_xlstm_ops.patch import patch  # noqa: E402

DIRECTORY = Path(str(files("torch_xlstm_ops"))) / "demo_model"
LIMIT = 8 * 2**20
END = 256  # stands before a file
HELD_OUT = "unittest/loader.py"  # every Python has it


@pytest.fixture(scope="module")
def model() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(DIRECTORY, local_files_only=True).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(DIRECTORY, local_files_only=True)


def bits_per_byte(model: Any, content: bytes) -> float:
    tokens = torch.tensor([[END, *content]])
    with torch.no_grad():
        logits = model(tokens[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits[0].float(), tokens[0, 1:]).item() / math.log(2)


def test_directory_is_complete_and_small() -> None:
    names = {file.name for file in DIRECTORY.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training.json"} <= names
    assert sum(file.stat().st_size for file in DIRECTORY.iterdir()) <= LIMIT


def test_weights_are_bfloat16(model: Any) -> None:
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_token_is_a_byte(tokenizer: Any) -> None:
    text = "def f(é, 'Ā'):\n\treturn \x00 🙂"
    assert tokenizer(text).input_ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer.eos_token_id == END


def test_a_conversation_is_a_comment_a_message(tokenizer: Any) -> None:
    pytest.importorskip("jinja2", reason="needs the package jinja2, as transformers' chat templates do")
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "# user: hi\n# assistant: yes\n# assistant:"
    assert tokenizer.chat_template == train_demo_model.CHAT


def test_held_out_file_costs_few_bits(model: Any) -> None:
    training = json.loads((DIRECTORY / "training.json").read_text())
    stated = training["test_bits_per_byte"]
    assert HELD_OUT in training["test_files"]
    assert stated <= 1.5
    content = (Path(sysconfig.get_path("stdlib")) / HELD_OUT).read_bytes()[:4096]
    plain = bits_per_byte(copy.deepcopy(model).float(), content)  # theirs mixes dtypes in bfloat16 and raises
    with patch("transformers"):
        ours = bits_per_byte(model, content)
    assert ours <= stated + 0.5  # one file is not the average
    assert ours == pytest.approx(plain, abs=0.02)


@pytest.mark.smoke
def test_it_writes_python(model: Any, tokenizer: Any) -> None:
    prompt = tokenizer("import os\n\n\ndef read(path):\n    ", return_tensors="pt")
    with patch("transformers"):
        written = model.generate(**prompt, max_new_tokens=64, do_sample=False)
    text = tokenizer.decode(written[0, prompt.input_ids.shape[1] :])
    assert text.isascii()
    assert len(set(text)) > 8  # not one word over and over
