"""Raw text to a tokenizer and shards of token ids; goes on where an interrupted run stopped."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file: launch/ would shadow the package `pretrain`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

EXAMPLES = """examples:
  python launch/prepare.py configs/quickstart.yaml
  python launch/prepare.py configs/llama-350m.yaml data.prepare_processes=32 data.on_bad_file=skip
  python launch/prepare.py configs/llama-350m.yaml --dry-run

exit status: 0 done, 1 failed, 2 wrong config or use, 75 stopped by a signal; the same command then goes on."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="prepare", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="write nothing; foresee from samples what there will be")
    parser.add_argument("--json", action="store_true", help="with --dry-run: print one JSON object")
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options that replace the file's")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.json and not arguments.dry_run:
        parser.error("--json is for --dry-run")
    from pretrain.errors import EXIT_DONE, EXIT_STOPPED, LonghaulError

    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's stop is Ctrl-C too
    try:
        from pretrain.prepare import prepare
        from pretrain.settings import load_config

        config = load_config(arguments.config, arguments.overrides)
        if arguments.dry_run:
            from pretrain.dry_run import forecast, render

            content = forecast(config)
            print(json.dumps(content, indent=1) if arguments.json else render(content))
        else:
            prepare(config)
    except LonghaulError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("stopped: what is complete is kept; the same command goes on where it stopped", file=sys.stderr)
        return EXIT_STOPPED
    finally:
        signal.signal(signal.SIGTERM, previous)
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
