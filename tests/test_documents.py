"""What the documents say that code can check: tables, links, commands, examples."""

from __future__ import annotations

import importlib.util
import inspect
import re
import shlex
from pathlib import Path

import pytest
import torch

import torch_xlstm_ops
from benchmarks import quotes
from torch_xlstm_ops import cli, config, context, parallel, patch, trace
from torch_xlstm_ops.cli.shared.errors import BadInput

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "torch_xlstm_ops/docs"
README = ROOT / "csrc_free_README.md"
DOCUMENTS = [README, *sorted(DOCS.glob("*.md")), ROOT / "registrations/README.md", ROOT / "benchmarks/README.md",
             ROOT / "tests/README.md"]
BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.S)
PUBLIC = (torch_xlstm_ops, patch, context, parallel, trace, config)
MOST_LINES = 200  # of the README


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(path: Path, language: str) -> list[str]:
    return [body for found, body in BLOCK.findall(text(path)) if found == language]


def anchors(path: Path) -> set[str]:
    """Return the names under which a host can link to the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", text(path)), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(path: Path) -> list[list[str]]:
    """Return the command lines of a document's plain blocks, without comments."""
    lines = "\n".join(blocks(path, "")).splitlines()
    return [shlex.split(part, comments=True) for line in lines for part in line.split("&&") if part.strip()]


def test_the_readme_is_short():
    assert len(text(README).splitlines()) <= MOST_LINES


def test_the_configuration_table_is_that_of_the_code():
    assert config.markdown().strip() in text(DOCS / "schedules.md")


def test_every_operator_is_listed():
    """The library's own list of operators, as the dispatcher has it."""
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("xlstm::")}
    assert names
    assert all(f"`{name}`" in text(DOCS / "operators.md") for name in names)


@pytest.mark.parametrize("name", ["mlstm_step", "mlstm_chunkwise", "slstm_step", "slstm_sequence"])
def test_an_operators_arguments_are_those_of_its_schema(name):
    (row,) = [line for line in text(DOCS / "operators.md").splitlines() if line.startswith(f"| `{name}` |")]
    given, results = row.split("|")[2].split(" -> ")
    positional, keywords = given.split(", *, ")
    schema = getattr(torch.ops.xlstm, name).default._schema
    assert positional.split() == [
        argument.name + "?" * argument.has_default_value() for argument in schema.arguments if not argument.kwarg_only
    ]
    assert keywords.split(", ") == [argument.name for argument in schema.arguments if argument.kwarg_only]
    assert len(results.split()) == len(schema.returns)


@pytest.mark.parametrize("quote", quotes.QUOTES, ids=lambda quote: quote.name)
def test_figures_are_those_of_the_stored_results(quote):
    assert quote.text in text(quote.document)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", text(path))):
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        place = (path.parent / target).resolve() if target else path
        assert place.exists(), link
        assert not anchor or anchor in anchors(place), link


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_exist(path):
    for words in commands(path):
        words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
        if words[0] == "xlstm-ops":
            try:
                cli.parser().parse_args(words[1:words.index(">") if ">" in words else None])
            except BadInput as error:
                pytest.fail(f"{words}: {error}")
        elif words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]) is not None or words[2] == "pytest", words
    for module in re.findall(r"python -m (benchmarks[\w.]*)", text(path).replace("\n", " ")):
        assert importlib.util.find_spec(module.rstrip(".")), module


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_examples_are_python(path):
    for code in blocks(path, "python"):
        compile(code, str(path), "exec")


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_every_public_name_has_a_docstring(module):
    for name in module.__all__:
        value = getattr(module, name)
        if callable(value):
            assert inspect.getdoc(value), name
            if inspect.isclass(value):
                for method, function in inspect.getmembers(value, inspect.isfunction):
                    if not method.startswith("_"):
                        assert inspect.getdoc(function), f"{name}.{method}"


@pytest.mark.slow
def test_the_example_for_own_blocks_runs():
    (code,) = (block for block in blocks(README, "python") if "mlstm_chunkwise(q" in block)
    scope: dict[str, object] = {}
    exec(code, scope)
    assert isinstance(scope["state"], torch_xlstm_ops.MLSTMState)
