"""`xlstm-ops tune`: search for the fastest plans, report on searches, and exchange tuned plans."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

from torch_xlstm_ops import config
from torch_xlstm_ops.cli.shared.actions import About, describe
from torch_xlstm_ops.cli.shared.errors import BadInput, bad_input, check_extra
from torch_xlstm_ops.cli.shared.quiet import third_party_messages_hidden
from torch_xlstm_ops.cli.tuning.request import OPTIONS, read
from torch_xlstm_ops.config import tuned_plans
from torch_xlstm_ops.runtime.extras import how_to_install

_EXTRAS = {"optuna": "tune", "rich": "tune", "matplotlib": "plot"}
_OF_SEARCH = ("method", "trials", "time_budget", "seed")  # options that ablate does not read
HELP = "search for the plans that are fastest here"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `tune`."""
    parser.usage = ("xlstm-ops tune [search] [--out DIR] [FLAG ...]\n       xlstm-ops tune report [--out DIR]\n"
                    "       xlstm-ops tune ablate [--out DIR] [FLAG ...]\n"
                    "       xlstm-ops tune (--export FILE | --import FILE)")
    action = parser.add_argument("action", nargs="?", choices=("search", "report", "ablate"))
    out = parser.add_argument("--out", metavar="DIR", default="xlstm-tune",
                              help="where all is written (default %(default)s)")
    exchange = parser.add_argument_group("tuned plans of other machines")
    exchanged = (
        exchange.add_argument("--export", metavar="FILE", help="write what is kept for auto to a file, and search "
                              "nothing"),
        exchange.add_argument("--import", metavar="FILE", dest="source", help="keep what a file holds, and search "
                              "nothing"),
    )
    both, of_search = _add_flags_of_search(parser)
    describe(parser, action, {
        "search": About("find the fastest plans (the default)", "search [--out DIR] [FLAG ...]",
                        (out, *both, *of_search)),
        "report": About("write pictures and a page of the searches in --out, measuring nothing",
                        "report [--out DIR]", (out,)),
        "ablate": About("change one setting of the default plan at a time, and time each plan",
                        "ablate [--out DIR] [FLAG ...]", (out, *both)),
    }, others=exchanged)


def _add_flags_of_search(parser: argparse.ArgumentParser) -> tuple[list[argparse.Action], list[argparse.Action]]:
    """Add the flags of search and ablate, and those of search alone; return both."""
    flags = parser.add_argument_group("flags of search and ablate")
    alone = parser.add_argument_group("flags of search")
    both = [flags.add_argument("--model", metavar="DIR",
                               help="Hugging Face directory of an xLSTM (default: the embedded one)")]
    of_search = [
        alone.add_argument("--resume", action="store_true", help="resume the searches in --out"),
        alone.add_argument("--no-apply", action="store_true", help="do not keep the winner for schedule auto"),
    ]
    for option in OPTIONS:
        shown = isinstance(option.default, (str, int, float))
        default = f" (default {option.default})" if shown else ""
        group, added = (alone, of_search) if option.name in _OF_SEARCH else (flags, both)
        added.append(group.add_argument(option.flag, metavar=option.metavar, help=option.help + default))
    return both, of_search


def execute(parsed: argparse.Namespace) -> int:
    """Execute the action and return the exit status. Raises BadInput."""
    if parsed.export is not None or parsed.source is not None:
        return _exchange(parsed)
    with bad_input():
        config.reload(flags={})
    if parsed.action == "report":
        _check_packages("tune report", "optuna", "matplotlib")
        from torch_xlstm_ops.tune import report

        with bad_input():
            written = report.write(Path(parsed.out))
        print("\n".join(f"wrote {path}" for path in written))
        return 0
    _check_packages("tune", "optuna", "rich")
    from torch_xlstm_ops.cli.tuning import search

    request = read(parsed)
    if request.needs_model:
        check_extra("tune")
    with bad_input(), third_party_messages_hidden():
        return search.search(request) if parsed.action != "ablate" else search.ablate(request)


def _exchange(parsed: argparse.Namespace) -> int:
    from torch_xlstm_ops.tune import publish

    with bad_input():
        own = tuned_plans.place(config.reload(flags={}).tuned)
    if own is None:
        raise BadInput("--export and --import must come with a place for tuned plans, got XLSTM_OPS_TUNED=off")
    if parsed.export is not None and parsed.source is not None:
        raise BadInput("--export must come without --import, got both")
    flag, name = ("--export", parsed.export) if parsed.source is None else ("--import", parsed.source)
    path = Path(name)
    try:
        count = publish.copy(own, path) if flag == "--export" else publish.copy(path, own)
    except FileNotFoundError as error:
        raise BadInput(f"{flag} must have tuned plans to read, got no file {error.filename}") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{flag}: {error}") from None
    print(f"{count} tuned {'plan' if count == 1 else 'plans'}: {own if flag == '--export' else path} -> "
          f"{path if flag == '--export' else own}")
    return 0


def _check_packages(command: str, *packages: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        extras = ",".join(dict.fromkeys(_EXTRAS[name] for name in missing))
        raise BadInput(f"{command} needs {', '.join(missing)}: {how_to_install(extras)}")
