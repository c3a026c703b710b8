"""Whether this machine has what reads and writes the URLs of a config: what a config alone cannot tell."""

from __future__ import annotations

from pretrain.errors import EXIT_DONE, ConfigError, DataError
from pretrain.options.config import Config
from pretrain.storage.stores import check_installed, is_remote


def check_places(config: Config) -> None:
    """Look for what reads and writes each URL of a config, without opening any.

    Raises:
        ConfigError: this machine lacks something, or nobody reads such URLs; one line for each option.
    """
    places = {f"data.sources.{number}.shards": source.shards for number, source in enumerate(config.data.sources)}
    places |= {"checkpoint.dir": config.checkpoint.dir, "resume.from": config.resume.from_}
    problems = []
    for name, place in places.items():
        try:
            if is_remote(place):
                check_installed(place)
        except DataError as error:
            problems.append(f"{name} is {error}")
    if problems:
        raise ConfigError("\n".join(problems))


def show_checked(config: Config) -> int:
    """Check a config's places and print its run folder; return the exit status."""
    check_places(config)
    print(config.run.dir)
    return EXIT_DONE
