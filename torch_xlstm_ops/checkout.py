"""Find the package's parts when it is imported from a source checkout that is not installed.

An installed package has `registrations` inside. In a checkout the folder lies beside the package, and only an editable
install maps it. Without this module a checkout on PYTHONPATH, or a Python that was started in the checkout's root,
could not import the package, or would mix the checkout with the installed copy. Importing this module is what loads
`registrations`.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_NAME = "torch_xlstm_ops.registrations"


def load_registrations() -> None:
    """Import `torch_xlstm_ops.registrations` from the checkout that this file belongs to, if it belongs to one.

    Raises ImportError when the folder is neither inside the package nor beside it.
    """
    package = Path(__file__).parent
    folder = package.parent / "registrations"
    if _NAME in sys.modules or (package / "registrations").is_dir():
        return
    if not (folder / "__init__.py").is_file():
        raise ImportError(f"torch_xlstm_ops must have its folder registrations in {package} (installed) or beside it "
                          f"(a checkout), got neither: install it with pip install {package.parent}")
    start = folder / "__init__.py"
    spec = importlib.util.spec_from_file_location(_NAME, start, submodule_search_locations=[str(folder)])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[_NAME] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[_NAME]
        raise


load_registrations()
