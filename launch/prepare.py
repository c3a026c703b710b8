"""Raw text to a tokenizer and shards of token ids; goes on where an interrupted run stopped."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file: launch/ would shadow the package `pretrain`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain.console import ends_at_closed_pipe
from pretrain.errors import EXIT_DONE, EXIT_STOPPED, LonghaulError
from pretrain.interrupts import ends_on_signal


@ends_at_closed_pipe
@ends_on_signal(EXIT_STOPPED)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    from pretrain.preparing.prepare_options import parse, report, run

    arguments = parse(argv, __doc__)
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
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
