"""Say how to install the optional packages."""

from __future__ import annotations


def how_to_install(extra: str) -> str:
    """Return the command that installs an optional dependency group of the package, and where to run it.

    extra: a key of `project.optional-dependencies` in pyproject.toml.
    """
    return f'run pip install -e ".[{extra}]" in a checkout of torch_xlstm_ops'
