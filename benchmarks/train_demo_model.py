"""Train the embedded demo model: a byte-level xLSTM trained on the Python standard library.

    python -m benchmarks.train_demo_model --minutes 8

Whole files are held out by a hash of their path, so every machine and Python version holds out the same ones. The
model is transformers' `xLSTMForCausalLM` on our operators; what is written loads in plain transformers. Each of the
batch's lanes reads files one after another and carries its states, now and then cleared, from window to window.
The weights kept are the best on the validation files; the figure reported is theirs, in bfloat16, on the test files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_xlstm_ops.patch import patch

END = 256  # the token between files; 0 to 255 are bytes
VOCABULARY = 257
SPLITS = {"test": 4, "validation": 2}  # percent of the files; the rest is for training
EVALUATION_WINDOW = 4096  # tokens; changes speed only, states are carried
LIMIT = 8 * 2**20  # bytes that the whole directory may take

States = list[tuple[Tensor, Tensor, Tensor]]


class Source(NamedTuple):
    """One file of the standard library."""

    path: str  # relative to the library, with slashes
    tokens: Tensor  # (bytes,) int16


class Clock:
    """Progress of training from 0 to 1, by steps or by time, whichever is further."""

    def __init__(self, steps: int, minutes: float) -> None:
        self.born = self.started = time.perf_counter()
        self.steps, self.minutes = steps, minutes

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.born

    def start(self) -> None:
        """Exclude the time so far, mostly compilation, from the schedule."""
        self.started = time.perf_counter()

    def progress(self, step: int) -> float:
        training = self.minutes * 60 - (self.started - self.born)
        return min(1.0, max(step / self.steps, (time.perf_counter() - self.started) / max(training, 1.0)))


def split_of(path: str) -> str:
    """Return the split of a library file."""
    bucket = int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big") % 100
    edge = 0
    for split, percent in SPLITS.items():
        edge += percent
        if bucket < edge:
            return split
    return "train"


def standard_library() -> dict[str, list[Source]]:
    """Read the library's UTF-8 sources, by split."""
    root = Path(sysconfig.get_path("stdlib"))
    sources: dict[str, list[Source]] = {"train": [], **{split: [] for split in SPLITS}}
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        if {"site-packages", "dist-packages"} & set(path.parts):
            continue
        content = file.read_bytes()
        try:
            content.decode()
        except UnicodeDecodeError:
            continue
        if content:
            tokens = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(torch.int16)
            sources[split_of(path.as_posix())].append(Source(path.as_posix(), tokens))
    return sources


# A conversation as the comments that the model has read: one line a message.
CHAT = (
    "{% for message in messages %}{{ '# ' + message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '# assistant:' }}{% endif %}"
)


def tokenizer() -> Any:
    """Return a byte-level tokenizer in transformers' own format: token b is byte b, `END` is the end of a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that ByteLevel does not map
    hidden = [b for b in range(256) if b not in shown]
    letters = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}
    codec = Tokenizer(models.BPE(vocab={letters[b]: b for b in range(256)}, merges=[]))
    codec.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    codec.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    codec.add_special_tokens([AddedToken(end, special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=codec, bos_token=end, eos_token=end, pad_token=end, clean_up_tokenization_spaces=False,
        chat_template=CHAT,
    )


def build(args: argparse.Namespace) -> Any:
    """Return an untrained model."""
    from transformers import xLSTMConfig, xLSTMForCausalLM

    torch.manual_seed(args.seed)
    config = xLSTMConfig(
        vocab_size=VOCABULARY, hidden_size=args.hidden, num_hidden_layers=args.layers, num_heads=args.heads,
        qk_dim_factor=args.qk_factor, ffn_proj_factor=args.ffn_factor, bos_token_id=END, eos_token_id=END,
        pad_token_id=END,
    )
    return xLSTMForCausalLM(config).to(args.device)


def zero_states(model: Any, B: int) -> States:
    """Return the states of every layer before the first token."""
    config, device = model.config, model.device
    NH, DHQK, DHHV = config.num_heads, config.qk_head_dim, config.v_head_dim

    def zeros(*rest: int) -> Tensor:
        return torch.zeros(B, NH, *rest, device=device)

    return [(zeros(DHQK, DHHV), zeros(DHQK), zeros(1)) for _ in range(config.num_hidden_layers)]


def advance(model: Any, block: Callable[..., Any], ids: Tensor, states: States) -> tuple[Tensor, States]:
    """Run the model over ids (B, S) from `states`; return the hidden states before the head, and the states after."""
    x = model.backbone.embeddings(ids)
    after: States = []
    for layer, state in zip(model.backbone.blocks, states, strict=True):
        x, (c, n, m) = block(layer, x, state)
        after.append((c.detach(), n.detach(), m.detach()))
    return x, after


def nats(model: Any, x: Tensor, targets: Tensor) -> Tensor:
    """Return the negative log-likelihood (B * S,) of targets (B, S); a target of -1 counts 0."""
    cap = model.config.output_logit_soft_cap
    logits = cap * torch.tanh(model.lm_head(model.backbone.out_norm(x)).float() / cap)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")


def call(layer: Any, x: Tensor, state: tuple[Tensor, Tensor, Tensor]) -> Any:
    """Run one block; a separate function for torch.compile."""
    return layer(x, state)


def autocast(device: str) -> Any:
    return torch.autocast(device, torch.bfloat16, enabled=device != "cpu")


@torch.no_grad()
def bits_per_byte(model: Any, sources: Sequence[Source], rows: int, length: int) -> float:
    """Return the cost of whole files, each read from its start to its end with the states kept."""
    was_training = model.training
    model.eval()
    device, total = model.device, torch.zeros((), dtype=torch.float64, device=model.device)
    inputs, targets, fresh = (t.to(device) for t in rows_of_files(sources, rows, length))
    states = zero_states(model, rows)
    for index, first in enumerate(fresh.T):  # (rows,) which rows begin a file with this window
        window = slice(index * length, (index + 1) * length)
        with autocast(device.type):
            x, states = advance(model, call, inputs[:, window].long(), clear(states, first))
            total += nats(model, x, targets[:, window].long()).sum(dtype=torch.float64)
    model.train(was_training)
    return total.item() / math.log(2) / sum(len(source.tokens) for source in sources)


def evaluate(model: Any, sources: Sequence[Source], args: argparse.Namespace) -> float:
    """Return the bits a byte of the first `count` sources, in few long rows, as files are long."""
    sources = sources[: args.evaluate_files]
    return bits_per_byte(model, sources, max(1, args.batch * args.length // EVALUATION_WINDOW), EVALUATION_WINDOW)


def rows_of_files(sources: Sequence[Source], rows: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Arrange whole files in rows of similar length, each file at the start of a window; fill the targets with -1.

    Returns inputs and targets (rows, NW * length), and which windows begin a file (rows, NW).
    """
    work: list[list[Tensor]] = [[] for _ in range(rows)]
    for source in sorted(sources, key=lambda source: -len(source.tokens)):
        shortest = min(work, key=lambda row: sum(len(part) for part in row))
        shortest.append(F.pad(source.tokens, (0, -len(source.tokens) % length), value=-1))
    longest = max(sum(len(part) for part in row) for row in work)
    targets = torch.full((rows, longest), -1, dtype=torch.int16)
    fresh = torch.zeros(rows, longest // length, dtype=torch.bool)
    for row, parts in enumerate(work):
        start = 0
        for part in parts:
            targets[row, start : start + len(part)] = part
            fresh[row, start // length] = True
            start += len(part)
    inputs = F.pad(targets[:, :-1], (1, 0)).clamp(min=0)
    inputs[:, ::length][fresh] = END
    return inputs, targets, fresh


def windows(sources: Sequence[Source], args: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets (B, S) without end: every lane continues its files, which are shuffled each epoch."""
    generator = torch.Generator().manual_seed(args.seed)
    end = torch.tensor([END], dtype=torch.int16)
    while True:
        order = torch.randperm(len(sources), generator=generator).tolist()
        stream = torch.cat([part for i in order for part in (end, sources[i].tokens)]).to(args.device)
        lane = (len(stream) - 1) // (args.batch * args.length) * args.length
        if lane == 0:
            asked = args.batch * args.length
            raise SystemExit(f"--batch times --length must be at most {len(stream) - 1} bytes, got {asked}")
        inputs, targets = (stream[shift:][: args.batch * lane].view(args.batch, lane) for shift in (0, 1))
        for start in range(0, lane, args.length):
            yield inputs[:, start : start + args.length].long(), targets[:, start : start + args.length].long()


def clear(states: States, lanes: Tensor) -> States:
    """Return the states with those of the lanes (B,) bool set to zero."""
    keep = (~lanes).float()
    return [(c * keep[:, None, None, None], n * keep[:, None, None], m * keep[:, None, None]) for c, n, m in states]


def optimizer(model: Any, args: argparse.Namespace) -> torch.optim.AdamW:
    """Return AdamW with decay on the matrices inside the blocks only."""
    inside = {id(p) for p in model.backbone.blocks.parameters() if p.dim() > 1}
    groups = [
        {"params": [p for p in model.parameters() if id(p) in inside], "weight_decay": args.weight_decay},
        {"params": [p for p in model.parameters() if id(p) not in inside], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=args.device != "cpu")


def add_dropout(model: Any, probability: float) -> None:
    """Apply dropout to the output of each residual branch in training."""
    def drop(module: torch.nn.Module, _: Any, output: Tensor) -> Tensor:
        return F.dropout(output, probability, module.training)

    if probability:
        for block in model.backbone.blocks:
            block.mlstm_layer.out_proj.register_forward_hook(drop)
            block.ffn.proj_down.register_forward_hook(drop)


def train(
    model: Any, sources: dict[str, list[Source]], args: argparse.Namespace, clock: Clock
) -> list[dict[str, float]]:
    """Train `model`, load the best weights into it, and return the curve."""
    block = torch.compile(call, dynamic=False) if args.compile else call
    add_dropout(model, args.dropout)
    adam, states = optimizer(model.train(), args), zero_states(model, args.batch)
    curve: list[dict[str, float]] = []
    best, kept = math.inf, {}
    next_evaluation, recent = 0.0, torch.zeros((), device=args.device)
    for step, (inputs, targets) in enumerate(windows(sources["train"], args)):
        progress = clock.progress(step)
        rate = args.lr * min(1.0, (step + 1) / args.warmup) * (0.5 + 0.5 * math.cos(math.pi * progress))
        for group in adam.param_groups:
            group["lr"] = rate
        with autocast(args.device):
            forgets = torch.rand(args.batch, device=args.device) < args.clear
            x, states = advance(model, block, inputs, clear(states, forgets))
            loss = nats(model, x, targets).mean()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        recent = loss.detach() if step == 0 else torch.lerp(recent, loss.detach(), 0.05)
        if step % 8 == 0 and not math.isfinite(recent.item()):  # which also waits for the device
            raise SystemExit(f"the loss is {recent.item()} at step {step}: try a lower --lr")
        if step == 1:
            clock.start()
        if progress >= next_evaluation or progress >= 1:
            bits = evaluate(model, sources["validation"], args)
            curve.append({
                "seconds": round(clock.seconds, 1), "step": step + 1, "tokens": (step + 1) * inputs.numel(),
                "train_bits_per_byte": round(recent.item() / math.log(2), 4),
                "validation_bits_per_byte": round(bits, 4),
            })
            print(json.dumps(curve[-1]), flush=True)
            if bits < best:
                best, kept = bits, {name: value.clone() for name, value in model.state_dict().items()}
            next_evaluation = progress + 1 / args.evaluations
        if progress >= 1:
            break
    model.load_state_dict(kept)
    return curve


def machine(device: str) -> dict[str, str]:
    import transformers

    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name, "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    clock = Clock(args.steps, args.minutes)
    sources = standard_library()
    torch.set_float32_matmul_precision("high")
    with patch("transformers"):
        model = build(args)
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{parameters:,} parameters; " + ", ".join(f"{len(sources[s])} {s} files" for s in sources), flush=True)
        curve = train(model, sources, args, clock)
        model = model.to(torch.bfloat16)
        test = evaluate(model, sources["test"], args)
    args.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.out)
    tokenizer().save_pretrained(args.out)
    report = {
        "test_bits_per_byte": round(test, 4), "parameters": parameters, "seconds": round(clock.seconds, 1),
        "splits": {
            split: {"files": len(files), "bytes": sum(len(file.tokens) for file in files)}
            for split, files in sources.items()
        },
        "test_files": [file.path for file in sources["test"]],
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "machine": machine(args.device), "curve": curve,
    }
    (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    files = [file for file in args.out.iterdir() if file.is_file()]
    for file in files:
        file.chmod(0o644)  # package data: readable for everybody
    size = sum(file.stat().st_size for file in files)
    print(f"test: {test:.4f} bits a byte; {args.out}: {size:,} bytes", flush=True)
    if size > LIMIT:
        raise SystemExit(f"{args.out} must take at most {LIMIT:,} bytes, got {size:,}: use fewer parameters")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    default_out = Path(__file__).resolve().parent.parent / "torch_xlstm_ops" / "demo_model"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, default=8.0, help="time for everything but the last evaluation (default %(default)s)")
    add("--steps", type=int, default=1_000_000, help="steps at most (default %(default)s)")
    add("--batch", type=int, default=64, help="lanes (default %(default)s)")
    add("--length", type=int, default=1024, help="tokens a window (default %(default)s)")
    add("--hidden", type=int, default=256, help="width (default %(default)s)")
    add("--layers", type=int, default=6, help="blocks (default %(default)s)")
    add("--heads", type=int, default=4, help="heads (default %(default)s)")
    add("--qk-factor", type=float, default=1.0, help="query/key width over width (default %(default)s)")
    add("--ffn-factor", type=float, default=1.5, help="feed-forward width over width (default %(default)s)")
    add("--lr", type=float, default=3e-3, help="peak learning rate, cosine to 0 (default %(default)s)")
    add("--warmup", type=int, default=200, help="steps to reach it (default %(default)s)")
    add("--weight-decay", type=float, default=0.1, help="on the blocks' matrices (default %(default)s)")
    add("--dropout", type=float, default=0.1, help="on the residual branches (default %(default)s)")
    add("--clear", type=float, default=0.1, help="chance that a lane forgets before a window (default %(default)s)")
    add("--evaluations", type=int, default=16, help="points of the curve (default %(default)s)")
    add("--evaluate-files", type=int, help="files of a split to evaluate on (default all)")
    add("--seed", type=int, default=0, help="of weights, order and dropout (default %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default %(default)s)")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile the blocks (default on)")
    add("--out", type=Path, default=default_out, help="directory to write (default: the package's demo_model)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
