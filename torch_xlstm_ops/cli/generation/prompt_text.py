"""The text that `--prompt` and `--prompt-file` give, before a tokenizer is loaded."""

from __future__ import annotations

import argparse
import codecs
import io
import os
from pathlib import Path

from torch_xlstm_ops.cli.shared.errors import BadInput
from torch_xlstm_ops.context.tokens import TEXT_BLOCK

DEFAULT_PROMPT = "import os\nimport sys\n\n\n"


def prompt_text(parsed: argparse.Namespace) -> str | Path:
    """Return the text of `--prompt` or `--prompt-file`, or the path of a file longer than `TEXT_BLOCK`.

    Raises BadInput.
    """
    if parsed.prompt is not None and parsed.prompt_file is not None:
        raise BadInput("--prompt must come without --prompt-file, got both")
    name = "--prompt"
    text: str | Path | None = None if parsed.prompt is None else _argument(parsed.prompt)
    if parsed.prompt_file is not None:
        name = "--prompt-file"
        try:
            text = _read(Path(parsed.prompt_file))
        except OSError as error:
            raise BadInput(f"{name} must be a file that can be read, got {parsed.prompt_file}: {error.strerror}"
                           ) from None
        except UnicodeDecodeError as error:
            raise BadInput(f"{name} must be UTF-8 text, got {parsed.prompt_file}: {error.reason} at byte {error.start}"
                           ) from None
    if text == "":
        raise BadInput(f"{name} must not be empty, got {'an empty file' if parsed.prompt_file else repr(text)}")
    return DEFAULT_PROMPT if text is None else text


def _argument(text: str) -> str:
    """Return an argument that holds UTF-8, whatever the locale in which Python decoded it. Raises BadInput."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:  # bytes that the locale does not have
        try:
            return os.fsencode(text).decode("utf-8")
        except UnicodeError:
            raise BadInput(f"--prompt must be UTF-8 text, got {text!a}") from None


def _read(path: Path) -> str | Path:
    """Return a file's text, or the path of a long file, whose encoding is checked. Raises UnicodeDecodeError."""
    with open(path, "rb") as file:
        content = file.read(TEXT_BLOCK)
        if len(content) < TEXT_BLOCK:
            return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8").read()
        decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
        while content:
            waiting = len(decoder.getstate()[0])
            try:
                decoder.decode(content)
            except UnicodeDecodeError as error:
                error.start += done - waiting
                raise
            done += len(content)
            content = file.read(TEXT_BLOCK)
        waiting = len(decoder.getstate()[0])
        if waiting:
            raise UnicodeDecodeError("utf-8", b"", done - waiting, done, "unexpected end of data")
    return path
