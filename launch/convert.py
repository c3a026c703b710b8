"""Convert a checkpoint to files that other software loads, verified: `python launch/convert.py RUN OUT --to hf`;
or a published model to a run folder, to go on training it: `python launch/convert.py DIR OUT --from hf`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file: launch/ would shadow the package `pretrain`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain.console import ends_at_closed_pipe
from pretrain.formats.convert_options import make_parser
from pretrain.formats.import_options import import_model


@ends_at_closed_pipe
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = make_parser(__doc__)
    arguments = parser.parse_args(argv)
    if (status := import_model(arguments, parser)) is not None:
        return status
    from pretrain.errors import EXIT_STOPPED, LonghaulError
    from pretrain.formats.convert import ConvertOptions, convert, parse_size, summary
    from pretrain.redaction import print_error

    try:
        if arguments.to == "peft":
            from pretrain.formats.adapter_export import export_adapter

            print(json.dumps(export_adapter(arguments.run, arguments.out, arguments.step, arguments.dtype)))
            return 0
        options = ConvertOptions(arguments.to, arguments.dtype, parse_size(arguments.max_shard_size), arguments.verify,
                                 arguments.license)  # fmt: skip
        report = convert(arguments.run, arguments.out, arguments.step, options)
    except LonghaulError as error:
        print_error(error)
        return error.exit_status
    except KeyboardInterrupt:
        print("stopped; the same command goes on with what is written", file=sys.stderr)
        return EXIT_STOPPED
    print(json.dumps(report) if arguments.json else summary(report, arguments.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
