"""Errors that the command line prints as one line, with exit status 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from torch_xlstm_ops.runtime.extras import how_to_install

MODEL_PACKAGES = ("transformers", "safetensors", "rich")  # the extra `models`


class BadInput(Exception):
    """The user's input cannot be used; the message is one line."""


@contextmanager
def bad_input() -> Iterator[None]:
    """Raise the ValueErrors and RuntimeErrors of a ``with`` block as BadInput."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise BadInput(str(error)) from error


def check_extra(command: str) -> None:
    """Raise BadInput unless the packages of the extra `models`, which `command` needs, are installed."""
    missing = [name for name in MODEL_PACKAGES if find_spec(name) is None]
    if missing:
        raise BadInput(f"{command} needs {', '.join(missing)}: {how_to_install('models')}")
