"""Raw text to a tokenizer and shards of token ids; goes on where an interrupted run stopped."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file: launch/ would shadow the package `pretrain`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain.console import ends_at_closed_pipe


@ends_at_closed_pipe
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    from pretrain.errors import EXIT_DONE, EXIT_STOPPED, LonghaulError
    from pretrain.preparing.prepare_options import parse, report, run

    arguments = parse(argv, __doc__)
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's stop is Ctrl-C too
    try:
        reported = report(arguments)
        if reported is not None:
            print(reported[0])
            return reported[1]
        run(arguments)
    except LonghaulError as error:
        from pretrain.redaction import print_error

        print_error(error)
        return error.exit_status
    except KeyboardInterrupt:
        print("stopped: what is complete is kept; the same command goes on where it stopped", file=sys.stderr)
        return EXIT_STOPPED
    finally:
        signal.signal(signal.SIGTERM, previous)
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
