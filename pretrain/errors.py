"""The errors that a user can cause or must act on, and the exit statuses of every command.

A `LonghaulError` is printed as one message without a traceback; anything else is a bug and keeps its
traceback. Messages follow one pattern: `<where>: <name> is <value>; expected <rule>. <fix>`.
"""

from __future__ import annotations

from dataclasses import dataclass

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_RETRY = 69  # the machine or another rank failed, and the same command may well succeed: BSD's EX_UNAVAILABLE
EXIT_STOPPED = 75  # stopped early and resumable: BSD's EX_TEMPFAIL, which SLURM's afterok does not accept
EXIT_INTERRUPTED = 130  # stopped early, with nothing to go on with: a shell's status of a program that Ctrl-C has ended


class LonghaulError(Exception):
    """Base of every error that is the user's or the machine's, not a bug."""

    exit_status = EXIT_FAILED
    agreed = False  # all ranks raise it together, so that rank 0 alone shows it


class ConfigError(LonghaulError):
    """The config, the command line or what they refer to is wrong; nothing was started."""

    exit_status = EXIT_USAGE


class DataError(LonghaulError):
    """Sources, shards or the tokenizer are missing, damaged or do not fit each other."""


class CheckpointError(LonghaulError):
    """A checkpoint is missing, damaged or does not fit the run."""


class StoreAccessError(LonghaulError):
    """A store of checkpoints cannot be reached, or does not let this run read or write; what is in it is untouched."""


class ExportError(LonghaulError):
    """A conversion could not be made or did not verify."""


class TrainingError(LonghaulError):
    """Training cannot go on: non-finite values, a failed self-test, an unusable device."""


class CorruptionError(TrainingError):
    """Memory does not hold what was computed; a new start goes on from the newest checkpoint, which is sound."""

    exit_status = EXIT_RETRY


class PeerError(LonghaulError):
    """Another rank was lost, has failed or does not answer; this one is in order."""

    exit_status = EXIT_RETRY


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with one option.

    Args:
        option: dotted name, whose place in the file the report gives.
        text: `<name> is <value>; expected <rule>. <fix>`.
    """

    option: str
    text: str
