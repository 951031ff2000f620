"""A Ray for this process alone: on the loopback, without dashboard, behind a token, in a folder that is removed.

The folder holds the process's id: that of a process which was killed is removed when another starts Ray.
"""

from __future__ import annotations

import atexit
import os
import re
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch_xlstm_ops.runtime import environment, forks
from torch_xlstm_ops.runtime.state import on_reset

LOOPBACK = "127.0.0.1"
_PREFIX = "xlr-"
_SOCKET_BYTES = 107  # most that the path of a socket may have
# Ray takes the loopback for a node's address only where clusters are off, as on macOS; so servers stay there.
_ONE_HOST = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_MODE, _TOKEN, _TOKEN_FILE = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"

_folder: Path | None = None
_token: str | None = None  # of the Ray that was started


def start() -> None:
    """Start Ray and connect to it."""
    global _folder
    _use_token()
    with environment.variable(_ONE_HOST, "0"):  # the processes that Ray starts inherit it: they keep to the loopback
        import ray
        from ray._private import ray_constants

        _remove_left_over()
        _folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=_base()))
        atexit.register(_end)
        enabled = ray_constants.ENABLE_RAY_CLUSTER
        ray_constants.ENABLE_RAY_CLUSTER = False  # Ray may have been imported before
        try:
            ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR",
                     _node_ip_address=LOOPBACK, _temp_dir=str(_folder))
        except BaseException:
            remove()
            raise
        finally:
            ray_constants.ENABLE_RAY_CLUSTER = enabled


@on_reset
def remove() -> None:
    """Remove the folder and the token of the Ray that was started, which must have ended."""
    global _folder, _token
    if _folder is not None:
        atexit.unregister(_end)
        shutil.rmtree(_folder, ignore_errors=True)
    if _token is not None and os.environ.get(_TOKEN) == _token:
        _set_token(None)
    _folder = _token = None


def _leave_to_parent() -> None:
    """In a forked child: the Ray that was started, and its folder, are the parent's."""
    global _folder, _token
    atexit.unregister(_end)
    _folder = _token = None


forks.in_child(_leave_to_parent)


def _end() -> None:
    """End Ray at the exit of the process; Ray's own function for that runs later, and would write into the folder."""
    import ray

    ray.shutdown()
    remove()


def _use_token() -> None:
    """Have Ray ask for a token that only this process and its children know, unless the user has set what it asks."""
    global _token
    if not any(name in os.environ for name in (_MODE, _TOKEN, _TOKEN_FILE)):
        _token = secrets.token_hex(32)
        _set_token(_token)


def _set_token(token: str | None) -> None:
    for name, value in ((_MODE, "token"), (_TOKEN, token)):
        if token is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value or ""
    from ray import _raylet

    raylet: Any = _raylet
    raylet.Config.initialize("")  # Ray reads the environment once
    raylet.AuthenticationTokenLoader.instance().reset_cache()


def _base() -> str:
    """Return the folder for ours: RAY_TMPDIR, unless paths of sockets in it would be too long."""
    given, pid = os.environ.get("RAY_TMPDIR"), os.getpid()
    socket = f"/{_PREFIX}{pid}-12345678/session_2000-01-01_00-00-00_000000_{pid}/sockets/plasma_store"
    if given and len(os.fsencode(given + socket)) <= _SOCKET_BYTES:
        return given
    return "/tmp" if Path("/tmp").is_dir() else tempfile.gettempdir()


def _remove_left_over() -> None:
    for folder in Path(_base()).glob(f"{_PREFIX}*-*"):
        named = re.fullmatch(rf"{_PREFIX}(\d+)-\w+", folder.name)
        if named is None or folder.is_symlink() or folder.stat().st_uid != os.getuid():
            continue
        if not _lives(int(named[1])):
            shutil.rmtree(folder, ignore_errors=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
