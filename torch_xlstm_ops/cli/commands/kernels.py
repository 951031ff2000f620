"""`xlstm-ops kernels`: list, check, fill and exchange the compiled kernels that are kept for later processes."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch

from torch_xlstm_ops import config
from torch_xlstm_ops.cli.shared import amounts, options, warming
from torch_xlstm_ops.cli.shared.actions import About, describe
from torch_xlstm_ops.cli.shared.errors import BadInput, bad_input, check_extra
from torch_xlstm_ops.cli.shared.loading import DTYPES
from torch_xlstm_ops.cli.shared.table import aligned
from torch_xlstm_ops.runtime import kernel_store
from torch_xlstm_ops.runtime.kernel_store import Damaged, Store, Untrusted

HELP = "list, check, fill and exchange the kernels that are kept for later processes"
_WARM_USAGE = "warm (--model DIR | --shape NHxDHQKxDHHV | --slstm NHxDH) [FLAG ...]"
_BATCH = options.Option("batch", config.WHOLE, "COUNT", 1, "")
_FLAGS = {
    "bytes": ("prune",), "remove": ("verify",), "model": ("warm",), "shape": ("warm",), "slstm": ("warm",),
    "training": ("warm",), "batch": ("warm",), "dtype": ("warm",), "file": ("export", "import"),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `kernels`."""
    parser.usage = ("xlstm-ops kernels (ls | stats | verify [--remove] | prune --bytes SIZE) [--kernels FOLDER]\n"
                    f"       xlstm-ops kernels {_WARM_USAGE}\n"
                    "       xlstm-ops kernels (export | import) FILE [--kernels FOLDER]")
    action = parser.add_argument("action", choices=list(_ACTIONS))
    file = parser.add_argument("file", nargs="?", metavar="FILE", help="archive that export writes or import reads")
    setting = config.SETTINGS["kernels"]
    folder = parser.add_argument(setting.flag, metavar=setting.metavar,
                                 help="folder of kernels (default: the configured one)")
    size = parser.add_argument("--bytes", metavar="SIZE",
                               help="what prune leaves: a number of bytes, or with K, M, G or T")
    remove = parser.add_argument("--remove", action="store_true", help="verify removes what is damaged")
    describe(parser, action, {
        "ls": About("list every kernel", "ls [--kernels FOLDER]", (folder,)),
        "stats": About("print totals", "stats [--kernels FOLDER]", (folder,)),
        "verify": About("read every file, and list the damaged ones", "verify [--remove] [--kernels FOLDER]",
                        (folder, remove)),
        "prune": About("remove the kernels that were not used for longest", "prune --bytes SIZE [--kernels FOLDER]",
                       (folder, size)),
        "warm": About("compile kernels ahead of time", f"{_WARM_USAGE} [--kernels FOLDER]",
                      (folder, *_add_flags_of_warm(parser))),
        "export": About("write the kernels to a FILE", "export FILE [--kernels FOLDER]", (file, folder)),
        "import": About("add the kernels of a FILE", "import FILE [--kernels FOLDER]", (file, folder)),
    })


def _add_flags_of_warm(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    add = parser.add_argument
    return [
        add("--model", metavar="DIR", help="warm what a Hugging Face xLSTM needs"),
        add("--shape", metavar="NHxDHQKxDHHV", action="append", default=[],
            help="warm the mLSTM of these heads; repeatable"),
        add("--slstm", metavar="NHxDH", action="append", default=[], help="warm the sLSTM of these heads; repeatable"),
        add("--dtype", metavar="NAME", help=f"of --shape, --slstm or --model: {', '.join(DTYPES)} (default float32)"),
        add("--batch", metavar="COUNT", help="rows of a decoding step, whose kernels have a fixed number (default 1)"),
        add("--training", action="store_true", help="warm the gradients of each --shape and --slstm"),
    ]


def execute(parsed: argparse.Namespace) -> int:
    """Execute the action and return the exit status: 1 if a kernel is damaged. Raises BadInput."""
    for flag, actions in _FLAGS.items():
        if getattr(parsed, flag) and parsed.action not in actions:
            name = "FILE" if flag == "file" else f"--{flag}"
            raise BadInput(f"{name} must come with {' or '.join(actions)}, got {parsed.action}")
    with bad_input():
        config.reload(flags={} if parsed.kernels is None else {"kernels": parsed.kernels})
    unsupported, store = kernel_store.unsupported(torch.device("cpu")), kernel_store.chosen()
    if unsupported is not None:
        raise BadInput(unsupported)
    if store is None:
        raise BadInput("kernels must be on or a folder, got off")
    refused = store.refused()
    if refused is not None:
        raise BadInput(f"--kernels must be a folder that only you can write: {refused}")
    return _ACTIONS[parsed.action](store, parsed)


def _list(store: Store, parsed: argparse.Namespace) -> int:
    rows = [("kernel", "function", "arguments", "threads or GPU", "bytes", "used")]
    for entry in reversed(store.entries()):
        try:
            about = store.read(entry.key).properties
            function = about["function"].partition(" ")[0].rpartition(".")[2]
            what = (function, about["arguments"], about.get("device") or warming.threads(about["options"]))
        except (Damaged, Untrusted, OSError) as error:
            what = (str(error), "", "")
        rows.append((entry.key[:12], *what, str(entry.size), amounts.ago(entry.used)))
    print(aligned(rows))
    return 0


def _stats(store: Store, parsed: argparse.Namespace) -> int:
    entries, fit = store.entries(), 0
    for entry in entries:
        try:
            fit += kernel_store.archive.difference(store.read(entry.key)) is None
        except (Damaged, Untrusted, OSError):
            continue
    print(aligned([
        ("folder", str(store.folder)), ("kernels", str(len(entries))), ("for this machine and installation", str(fit)),
        ("bytes", f"{sum(entry.size for entry in entries)} of at most {store.capacity}"),
    ]))
    return 0


def _verify(store: Store, parsed: argparse.Namespace) -> int:
    found = ((wrong and f"{entry.key}: {wrong}", functools.partial(store.remove, entry.key))
             for entry in store.entries() for wrong in [store.wrong(entry.key)])
    return amounts.verified(found, "kernels", remove=parsed.remove)


def _prune(store: Store, parsed: argparse.Namespace) -> int:
    try:
        removed = store.prune(amounts.size(parsed.bytes))
    except OSError as error:
        raise BadInput(f"--kernels must be a folder that can be written, got {store.folder}: {error}") from error
    left = store.entries()
    print(f"{len(removed)} kernels removed, {sum(entry.size for entry in removed)} bytes; {len(left)} left, "
          f"{sum(entry.size for entry in left)} bytes")
    return 0


def _warm(store: Store, parsed: argparse.Namespace) -> int:
    if not parsed.shape and not parsed.slstm and parsed.model is None:
        raise BadInput("warm must come with --model DIR, --shape NHxDHQKxDHHV or --slstm NHxDH")
    dtype = parsed.dtype or "float32"
    if dtype not in DTYPES:
        raise BadInput(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    B = cast(int, options.parse(_BATCH, parsed.batch))
    mlstms = [warming.sizes("--shape", text) for text in parsed.shape]
    slstms = [warming.sizes("--slstm", text) for text in parsed.slstm]
    before = len(store.entries())
    for NH, DHQK, DHHV in mlstms:
        warming.warm_mlstm(B, NH, DHQK, DHHV, DTYPES[dtype], training=parsed.training)
    for NH, DH in slstms:
        warming.warm_slstm(B, NH, DH, DTYPES[dtype], training=parsed.training)
    if parsed.model is not None:
        check_extra("kernels warm --model")
        warming.warm_model(Path(parsed.model), B, dtype)
    kernel_store.background.wait()
    after = len(store.entries())
    print(f"{after - before} kernels added, {after} there")
    return 0


def _export(store: Store, parsed: argparse.Namespace) -> int:
    path = _file(parsed)
    try:
        count = kernel_store.archive.write(store, path)
    except OSError as error:
        raise BadInput(f"FILE must be a file that can be written, got {path}: {error}") from error
    print(f"{count} kernels: {store.folder} -> {path}")
    return 0


def _import(store: Store, parsed: argparse.Namespace) -> int:
    path = _file(parsed)
    try:
        found = kernel_store.archive.read(store, path)
    except (Damaged, Untrusted, OSError) as error:
        raise BadInput(f"FILE must be what export wrote, got {path}: {error}") from error
    for key, reason in found.unfit.items():
        print(f"{key} does not fit: {reason}")
    print(f"{found.added} kernels added, {found.present} there, {len(found.unfit)} do not fit: "
          f"{path} -> {store.folder}")
    return 1 if found.unfit and not found.added + found.present else 0


def _file(parsed: argparse.Namespace) -> Path:
    if parsed.file is None:
        raise BadInput(f"{parsed.action} must come with FILE")
    return Path(parsed.file)


_ACTIONS: dict[str, Callable[[Store, argparse.Namespace], int]] = {
    "ls": _list, "stats": _stats, "verify": _verify, "prune": _prune, "warm": _warm, "export": _export,
    "import": _import,
}
