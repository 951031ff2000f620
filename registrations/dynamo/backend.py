"""The Dynamo backend ``xlstm``: replace other packages' xLSTM functions by our operators, compile with Inductor.

    torch.compile(model, backend="xlstm")

Torch finds it by an entry point, so it needs no import of this package. `rules` lists the functions, `substitution`
replaces them, and `splice` inlines operators into the graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import fx

from torch_xlstm_ops import config, schedules
from torch_xlstm_ops.runtime import torch_internals

from . import substitution
from .splice import arguments, is_faster_inlined, operator_of, splice

INLINE = "inline"


class Options(NamedTuple):
    """The options of one `torch.compile` call."""

    settings: Mapping[str, object]  # fields of Config, for every call of an operator in the compiled code
    inline: bool | None  # whether operators are inlined; None: where measured to be faster
    inductor: Mapping[str, Any]  # options of Inductor


def parse_options(options: Mapping[str, Any] | None, mode: str | None) -> Options:
    """Check the options and the mode given to `torch.compile`, and group them.

    Raises ValueError for an unknown name or an invalid value.
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
    """Inline operators into the graph as the options say; return the nodes that remain calls of our operators.

    Raises NotImplementedError for a schedule that cannot run on the tensors' device.
    """
    for node in module.graph.nodes:
        if operator_of(node) is not None and "schedule" in options.settings:
            first = next(iter(arguments(node).values()))
            schedules.load(config.Schedule(options.settings["schedule"]), first.meta["example_value"].device)
    with config.use(**options.settings):
        return splice(module, is_faster_inlined if options.inline is None else lambda node, name: bool(options.inline))


def mark_static_inputs(module: fx.GraphModule) -> None:
    """Mark the inputs that the graph writes to as static for CUDA graphs: a model keeps its states at one address.

    Torch does not capture a graph that writes to other inputs. If a static input moves, torch captures the graph again,
    as it compares the addresses at every call.
    """
    for node in module.graph.nodes:
        target = getattr(node.target, "__name__", str(node.target))
        written = node.args[0] if node.args else None
        if isinstance(written, fx.Node) and written.op == "placeholder" and _writes(node.op, target):
            torch_internals.hold_address(written)


def _writes(op: str, target: str) -> bool:
    """Return whether a node writes to its first argument: ``copy_``, ``iadd``, ``copy_.default``, ``mlstm_step_``."""
    name = target.split(".")[0]
    if op == "call_method":
        return name.endswith("_") and not name.endswith("__")
    return op == "call_function" and (name.endswith("_") or name in ("iadd", "imul", "isub", "itruediv"))


def xlstm(
    module: fx.GraphModule, examples: Sequence[Any], *, options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Any:
    """Compile a graph; the function that Dynamo calls.

    options: fields of `Config` (all but trace), ``inline``, and options of Inductor. mode: of `torch.compile`.
    """
    parsed = parse_options(options, mode)
    _warn(module)
    prepare(module, parsed)
    if parsed.inductor.get("triton.cudagraphs"):
        mark_static_inputs(module)
    return _lower(module, examples, parsed)


xlstm.wants_xlstm_rules = True  # type: ignore[attr-defined]


def _warn(module: fx.GraphModule) -> None:
    """Warn of calls that are not replaced, and of a frame without any xLSTM."""
    found = substitution.findings()
    refusals = dict.fromkeys(f"{f.place} is not replaced: {f.refusal}" for f in found if f.refusal is not None)
    for refusal in refusals:
        warnings.warn(f"backend xlstm: {refusal}", stacklevel=2)
    if not found and not substitution.is_piece(module) and not any(operator_of(node) for node in module.graph.nodes):
        warnings.warn("backend xlstm found no xLSTM in this graph and compiles it with Inductor alone; "
                      "torch_xlstm_ops.explain(model, *inputs) prints the calls of each graph", stacklevel=2)


def _lower(module: fx.GraphModule, examples: Sequence[Any], options: Options) -> Any:
    # Autograd chooses the threads of forward and backward, so each sets the configuration itself.
    def with_settings(run: Callable[[Any], Any], args: Any) -> Any:
        with config.use(**options.settings):
            return run(args)

    around = with_settings if options.settings else None
    return torch_internals.compile_graph(module, examples, options.inductor, around)


substitution.watch()
