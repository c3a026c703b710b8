"""The command line of `launch/prepare.py`: what it takes, and which of its modes is meant."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from pretrain.command_line import CommandLine, count
from pretrain.errors import EXIT_INTERRUPTED, ConfigError
from pretrain.interrupts import begin_work
from pretrain.options.config_arguments import add_config
from pretrain.storage.stores import is_remote

EXAMPLES = """examples:
  python launch/prepare.py configs/quickstart.yaml
  python launch/prepare.py configs/llama-350m.yaml data.prepare_processes=32 data.on_bad_file=skip
  python launch/prepare.py configs/llama-350m.yaml --dry-run
  python launch/prepare.py configs/llama-350m.yaml --share 3/16    # and 15 others; then --merge 16
  python launch/prepare.py mine.yaml --index               # paths: [web/*.tar], which stay as they are
  python launch/prepare.py --inspect data/web
  python launch/prepare.py --verify data/web --processes 8
  python launch/prepare.py --verify s3://bucket/corpora/web

exit status: 0 done, 1 failed (--verify: problems were found), 2 wrong config or use, 75 stopped by a signal; the same
command then goes on (130 where nothing is written: --dry-run, --inspect, --verify)."""


def parse(argv: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    """Read the arguments; ends the process with status 2 and a message where they do not fit each other."""
    parser = CommandLine("prepare", description, EXAMPLES)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry-run", action="store_true", help="write nothing; foresee from samples what there will be")
    mode.add_argument(
        "--index", action="store_true", help="of .tar files with text: index them as they are; training tokenizes"
    )
    mode.add_argument(
        "--inspect",
        metavar="PLACE",
        help="say what is in prepared shards, a folder or a URL; CONFIG may name the tokenizer",
    )
    mode.add_argument(
        "--verify", metavar="PLACE", help="read prepared shards, likewise, and compare every checksum; needs no CONFIG"
    )
    mode.add_argument(
        "--train-tokenizer", action="store_true", help="train the tokenizer if it does not exist, no more"
    )
    mode.add_argument("--share", metavar="K/N", help="make the K-th of N shares of every source, for --merge")
    mode.add_argument("--merge", metavar="N", type=count, help="make the shards of N shares, the same as without them")
    parser.add_argument("--json", action="store_true", help="with one of these: print one JSON object")
    parser.add_argument("--tokenizer", metavar="PATH", help="with --inspect: the tokenizer, if it is not found")
    parser.add_argument("--samples", metavar="N", type=count, help="with --inspect: documents to show; default: 3")
    parser.add_argument("--processes", metavar="N", type=count, help="with --verify; default: one per core")
    add_config(parser, nargs="?")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.json and not (arguments.dry_run or arguments.inspect or arguments.verify):
        parser.error("--json is for --dry-run, --inspect and --verify")
    for option, owner in (("tokenizer", "inspect"), ("samples", "inspect"), ("processes", "verify")):
        if getattr(arguments, option) is not None and not getattr(arguments, owner):
            parser.error(f"--{option} is for --{owner}")
    if arguments.samples is not None and is_remote(arguments.inspect):
        parser.error("--samples is for shards in a folder: a store's are not downloaded by --inspect")
    if arguments.verify and arguments.config:
        parser.error(f"--verify takes a folder or URL alone, not {arguments.config}")
    if not arguments.config and not (arguments.inspect or arguments.verify):
        parser.error("CONFIG is missing")
    return arguments


def run(arguments: argparse.Namespace) -> None:
    """Do what a mode that writes is for.

    Raises:
        LonghaulError: as the mode itself.
    """
    from pretrain.options.settings import load_config
    from pretrain.preparing.prepare import prepare, prepare_tokenizer
    from pretrain.preparing.shares import parse_share

    begin_work("stopped: what is complete is kept; the same command goes on where it stopped")
    share = parse_share(arguments.share) if arguments.share else None
    config = load_config(arguments.config, arguments.overrides)
    if arguments.train_tokenizer:
        prepare_tokenizer(config)
    else:
        prepare(config, share, arguments.merge or 0, arguments.index)


def report(arguments: argparse.Namespace) -> tuple[str, int] | None:
    """What a mode that writes nothing prints, and its exit status; None for the others.

    Raises:
        LonghaulError: as the mode itself.
    """
    if not (arguments.dry_run or arguments.inspect or arguments.verify):
        return None
    from pretrain.options.settings import load_config

    begin_work("stopped; nothing was written", EXIT_INTERRUPTED)
    for option in ("inspect", "verify"):
        place = getattr(arguments, option)
        if place and not is_remote(place) and Path(place).is_file():
            raise ConfigError(
                f"--{option}: {place} is a file; expected the folder of prepared shards. Name {Path(place).parent}"
            )
    config = load_config(arguments.config, arguments.overrides) if arguments.config else None
    if arguments.dry_run:
        assert config is not None
        from pretrain.preparing import dry_run

        content, render = dry_run.forecast(config), dry_run.render
    elif arguments.inspect:
        from pretrain.preparing import inspect_shards, store_check

        render = inspect_shards.render
        if is_remote(arguments.inspect):
            content = store_check.inspect_store(arguments.inspect, config, arguments.tokenizer)
        else:
            num_samples = 3 if arguments.samples is None else arguments.samples
            content = inspect_shards.inspect(arguments.inspect, config, arguments.tokenizer, num_samples)
    else:
        from pretrain.preparing import store_check, verify_shards

        render = verify_shards.render
        verify = store_check.verify_store if is_remote(arguments.verify) else verify_shards.verify
        content = verify(arguments.verify, arguments.processes or 0)
    text = json.dumps(content, indent=1, ensure_ascii=False) if arguments.json else render(content)
    return text, int(bool(content.get("problems")))
