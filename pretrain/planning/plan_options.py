"""The command line of `launch/plan.py`."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from typing import Any

from pretrain.command_line import CommandLine, count
from pretrain.console import format_count
from pretrain.options.config_arguments import add_config
from pretrain.planning.scaling_laws import flops_of, recommend
from pretrain.ranks.gpus import find_gpu

EXAMPLES = """examples:
  python launch/plan.py configs/llama-7b.yaml
  python launch/plan.py configs/llama-70b.yaml --gpus 512 --gpu H200
  python launch/plan.py configs/llama-1.3b.yaml train.micro_batch_size=8 --gpus 16 --gpu A100 --price 1.10 --json
  python launch/plan.py configs/llama-1.3b.yaml --scaling-law      # tokens for its parameters, and so on
  python launch/plan.py --parameters 7e9
  python launch/plan.py --tokens 1e12
  python launch/plan.py --gpu-days 100 --gpu A100 --mfu 0.45

Nothing is started, and no GPU is needed. exit status: 0 done, 2 wrong config or use, 130 stopped by a signal."""
DEFAULT_MFU = 0.4
_SUFFIXES = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}  # as the reports write them


def parse(argv: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    """Read the arguments; ends the process with status 2 and a message where they do not fit each other."""
    parser = CommandLine("plan", description, EXAMPLES)
    add_config(parser, nargs="?")
    parser.add_argument("--gpus", metavar="N", type=count, help="one rank each; default: 8, or what is needed to fit")
    parser.add_argument("--gpu", metavar="NAME", default="H100", help="default: H100; docs/planning.md lists them")
    parser.add_argument("--gpus-per-node", metavar="N", type=count, default=8, help="default: 8")
    parser.add_argument("--network", metavar="GBIT", type=_positive, help="Gbit/s a GPU to other nodes")
    parser.add_argument("--price", metavar="USD", type=_positive, help="an hour of one GPU")
    parser.add_argument("--host-memory", metavar="GIB", type=_positive, help="of each node; default: 1800")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    laws = parser.add_argument_group("scaling laws", "how many tokens for how many parameters")
    which = laws.add_mutually_exclusive_group()
    which.add_argument("--scaling-law", action="store_true", help="of the config: its parameters, tokens, computing")
    which.add_argument("--parameters", metavar="N", type=_positive, help="without CONFIG: of the model")
    which.add_argument("--tokens", metavar="N", type=_positive, help="without CONFIG: that there are")
    which.add_argument("--gpu-days", metavar="N", type=_positive, help="without CONFIG: days of one GPU that there are")
    laws.add_argument("--mfu", metavar="0..1", type=_share, help="with --gpu-days; default: 0.4")
    arguments = parser.parse_intermixed_args(argv)
    if "=" in (arguments.config or ""):
        parser.error(f"CONFIG is {arguments.config}; expected a YAML file before the first key=value")
    quantity = next((name for name in ("parameters", "tokens", "gpu_days") if getattr(arguments, name)), None)
    if quantity and arguments.config:
        parser.error(f"--{quantity.replace('_', '-')} takes no CONFIG; use --scaling-law with one")
    if not quantity and not arguments.config:
        parser.error("CONFIG is missing")
    if arguments.mfu is not None and quantity != "gpu_days":
        parser.error("--mfu goes with --gpu-days")
    idle = [name for name in ("gpus", "network", "price", "host_memory") if quantity and getattr(arguments, name)]
    if idle:
        parser.error(f"--{idle[0].replace('_', '-')} goes with CONFIG")
    return arguments


def _positive(text: str) -> float:
    number, factor = (text[:-1], _SUFFIXES[text[-1]]) if text[-1:] in _SUFFIXES else (text, 1.0)
    try:
        value = float(number) * factor
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"it is {text or 'empty'}; expected a number above 0, such as 7e9 or 7B")
    return value


def _share(text: str) -> float:
    value = _positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"it is {text}; expected a number above 0 and up to 1")
    return value


def report(arguments: argparse.Namespace) -> str:
    """Return what the command prints.

    Raises:
        ConfigError: the config is wrong, the GPU is not known, or the batch does not divide.
    """
    if not arguments.config:
        content = _law(arguments)
        return json.dumps(content, indent=1) if arguments.json else _render_laws([content])
    from pretrain.options.families import num_parameters
    from pretrain.options.settings import load_config
    from pretrain.planning.plan import HOST_GIB, choose_machine, make_plan, search
    from pretrain.planning.plan_memory import shape_of
    from pretrain.planning.plan_report import render, report_json

    config = load_config(arguments.config, arguments.overrides)
    machine = choose_machine(
        config, arguments.gpu, arguments.gpus, arguments.gpus_per_node, arguments.network, arguments.price,
        arguments.host_memory or HOST_GIB,
    )  # fmt: skip
    plan = make_plan(config, machine)
    if arguments.scaling_law:
        size, tokens = num_parameters(shape_of(config)), plan.batch.num_steps * plan.batch.tokens_per_step
        laws = [{"given": "parameters", "value": size, **recommend(num_parameters=size)},
                {"given": "tokens", "value": tokens, **recommend(num_tokens=tokens)},
                {"given": "flops", "value": 6 * size * tokens, **recommend(flops=6.0 * size * tokens)}]  # fmt: skip
        return json.dumps({"scaling_laws": laws}, indent=1) if arguments.json else _render_laws(laws)
    found = search(config, machine)
    if arguments.json:
        return json.dumps({"config": str(arguments.config)} | report_json(config, plan, found), indent=1)
    return render(config, plan, found)


def _law(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.parameters:
        return {"given": "parameters", "value": arguments.parameters} | recommend(num_parameters=arguments.parameters)
    if arguments.tokens:
        return {"given": "tokens", "value": arguments.tokens} | recommend(num_tokens=arguments.tokens)
    name, gpu = find_gpu(arguments.gpu)
    mfu = arguments.mfu or DEFAULT_MFU
    flops = flops_of(arguments.gpu_days, gpu.flops, mfu)
    return {"given": "flops", "value": flops, "gpu": name, "gpu_days": arguments.gpu_days, "mfu": mfu,
            **recommend(flops=flops)}  # fmt: skip


def _render_laws(laws: Sequence[dict[str, Any]]) -> str:
    """Write what the rules make of one or several given quantities."""
    names = {
        "fit": "Chinchilla, corrected fit",
        "published": "Chinchilla, as published",
        "ratio": "20 tokens a parameter",
    }
    lines = []
    for law in laws:
        days = (
            f" ({law['gpu_days']:g} days of one {law['gpu']} at an MFU of {law['mfu']:g})" if "gpu_days" in law else ""
        )
        value = f"{law['value']:.3g}" if law["given"] == "flops" else format_count(law["value"])
        what = "floating-point operations" if law["given"] == "flops" else law["given"]
        lines.append(f"For {value} {what}{days}:")
        for rule, name in names.items():
            row = law[rule]
            lines.append(
                f"  {name:<26}{format_count(row['parameters']):>7} parameters {format_count(row['tokens']):>7} tokens "
                f"{row['flops']:9.2e} FLOPs  loss {row['loss']:.3f}"
            )
    lines.append("The loss is the corrected fit's, of its authors' text and tokenizer. Sources: docs/planning.md")
    return "\n".join(lines)
