"""The Dynamo backend ``xlstm``: the peers' xLSTM functions become our operators, and Inductor compiles the graph.

    torch.compile(model, backend="xlstm")

Torch finds it by an entry point, so nobody has to import us. `rules` recognises, `splice` splices.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import fx

from torch_xlstm_ops import config, schedules
from torch_xlstm_ops.runtime import torch_internals

from . import rules
from .splice import arguments, measures_better, operator_of, splice

INLINE = "inline"


class Options(NamedTuple):
    """What a user asked of the backend."""

    settings: Mapping[str, object]  # fields of Config, for every call of an operator in the compiled code
    inline: bool | None  # whether operators are spliced; None: where it measures better
    inductor: Mapping[str, Any]  # everything else


def read(options: Mapping[str, Any] | None, mode: str | None) -> Options:
    """Sort and check what `torch.compile` was given.

    Raises ValueError for a name that neither we nor Inductor know, and for a value that cannot be used.
    """
    settings: dict[str, object] = {}
    inline: bool | None = None
    rest, known = torch_internals.inductor_options(mode)
    for name, value in (options or {}).items():
        if name == INLINE:
            if not isinstance(value, bool):
                raise ValueError(f"option {INLINE} must be True or False, got {value!r}")
            inline = value
        elif name == "trace":
            raise ValueError("an option must not be trace, which is process-wide: use trace.record(FILE)")
        elif name in config.SETTINGS:
            settings[name] = config.check(config.SETTINGS[name].kind, value, f"option {name}", text=False)
        elif name.replace("-", "_") in known:
            rest[name] = value
        else:
            ours = ", ".join([*(n for n in config.SETTINGS if n != "trace"), INLINE])
            raise ValueError(f"an option must be one of {ours}, or of torch._inductor.list_options(), got {name!r}")
    return Options(settings, inline, rest)


def prepare(module: fx.GraphModule, options: Options) -> list[fx.Node]:
    """Splice what is to be spliced; return the nodes that stay calls of our operators.

    Raises NotImplementedError for a schedule that cannot run where they are.
    """
    for node in module.graph.nodes:
        if operator_of(node) is not None and "schedule" in options.settings:
            first = next(iter(arguments(node).values()))
            schedules.load(config.Schedule(options.settings["schedule"]), first.meta["example_value"].device)
    with config.use(**options.settings):
        return splice(module, measures_better if options.inline is None else lambda node, name: bool(options.inline))


def hold_states(module: fx.GraphModule) -> None:
    """Tell CUDA graphs that inputs which the graph writes over stay where they are, as the states of a model do.

    Otherwise a graph that writes over its inputs is not recorded at all. Where one does move, the graph is recorded
    again: torch compares the addresses at every call.
    """
    for node in module.graph.nodes:
        target = getattr(node.target, "__name__", str(node.target))
        written = node.args[0] if node.args else None
        if isinstance(written, fx.Node) and written.op == "placeholder" and _writes(node.op, target):
            torch_internals.hold_address(written)


def _writes(op: str, target: str) -> bool:
    """Return whether a node writes over its first argument: ``copy_``, ``iadd``, ``copy_.default``, ``mlstm_step_``."""
    name = target.split(".")[0]
    if op == "call_method":
        return name.endswith("_") and not name.endswith("__")
    return op == "call_function" and (name.endswith("_") or name in ("iadd", "imul", "isub", "itruediv"))


def xlstm(
    module: fx.GraphModule, examples: Sequence[Any], *, options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Any:
    """Compile a graph: the backend itself.

    options: fields of `Config` (all but trace), ``inline``, and options of Inductor. mode: as Inductor has it.
    """
    asked = read(options, mode)
    _warn(module)
    prepare(module, asked)
    if asked.inductor.get("triton.cudagraphs"):
        hold_states(module)
    return _lower(module, examples, asked)


xlstm.wants_xlstm_rules = True  # type: ignore[attr-defined]


def _warn(module: fx.GraphModule) -> None:
    """Say what stays as it is: a call that no operator promises, or a whole frame without any xLSTM."""
    found = rules.findings()
    refusals = dict.fromkeys(f"{f.place} stays as it is: {f.refusal}" for f in found if f.refusal is not None)
    for refusal in refusals:
        warnings.warn(f"backend xlstm: {refusal}", stacklevel=2)
    if not found and not rules.is_piece(module) and not any(operator_of(node) for node in module.graph.nodes):
        warnings.warn("backend xlstm found no xLSTM here and leaves all to Inductor; torch_xlstm_ops.explain(model, "
                      "*inputs) says more", stacklevel=2)


def _lower(module: fx.GraphModule, examples: Sequence[Any], options: Options) -> Any:
    # Forward and backward run apart, in threads of autograd's choosing: each brings the settings with it.
    def with_settings(run: Callable[[Any], Any], args: Any) -> Any:
        with config.use(**options.settings):
            return run(args)

    around = with_settings if options.settings else None
    return torch_internals.compile_graph(module, examples, options.inductor, around)


rules.watch()
