"""Convert a checkpoint to files that other software loads, verified: `python launch/convert.py RUN OUT --to hf`;
or a published model to a run folder, to go on training it: `python launch/convert.py DIR OUT --from hf`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file: launch/ would shadow the package `pretrain`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain.console import ends_at_closed_pipe
from pretrain.errors import EXIT_INTERRUPTED, EXIT_STOPPED, LonghaulError
from pretrain.interrupts import begin_work, ends_on_signal


@ends_at_closed_pipe
@ends_on_signal(EXIT_STOPPED)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    import json

    from pretrain.formats.convert_options import make_parser, parse
    from pretrain.formats.import_options import import_model

    parser = make_parser(__doc__)
    arguments = parse(parser, argv)
    try:
        if (status := import_model(arguments, parser)) is not None:
            return status
        if arguments.to == "peft":
            from pretrain.formats.adapter_export import export_adapter

            begin_work("stopped; nothing was exported", EXIT_INTERRUPTED)
            report = export_adapter(arguments.run, arguments.out, arguments.step, arguments.dtype)
            said = f"{arguments.out}: adapters of step {report['source']['step']} in {report['dtype']}, beside "
            said += f"{', '.join(report['target_modules'])}. Read back, they add what the checkpoint's add."
            print(json.dumps(report) if arguments.json else said)
            return 0
        from pretrain.formats.convert import ConvertOptions, convert, parse_size, summary

        size = parse_size(arguments.max_shard_size or "5GB")
        options = ConvertOptions(arguments.to, arguments.dtype, size, arguments.verify, arguments.license)
        begin_work("stopped; the same command goes on with what is written")
        report = convert(arguments.run, arguments.out, arguments.step, options)
    except LonghaulError as error:
        from pretrain.redaction import print_error

        print_error(error)
        return error.exit_status
    print(json.dumps(report) if arguments.json else summary(report, arguments.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
