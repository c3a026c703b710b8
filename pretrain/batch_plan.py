"""The arithmetic of a step: rows, ranks, micro-steps and tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pretrain.config import Config
from pretrain.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """How the rows of each step are divided over ranks and micro-steps.

    Rank r computes rows `[r * rows_per_rank, (r + 1) * rows_per_rank)` of each global batch, in `num_micro_steps`
    micro-batches of `micro_batch_size` rows each.

    Args:
        global_batch_size: rows in a step, over all ranks.
        micro_batch_size: rows that one rank computes at once.
        num_micro_steps: forward and backward passes of one rank in a step.
        rows_per_rank: rows of one rank in a step.
        seq_len: tokens in a row.
        tokens_per_step: tokens of all ranks in a step.
        num_steps: updates of the whole run.
        world_size: number of ranks.
    """

    global_batch_size: int
    micro_batch_size: int
    num_micro_steps: int
    rows_per_rank: int
    seq_len: int
    tokens_per_step: int
    num_steps: int
    world_size: int

    @classmethod
    def of(cls, config: Config, world_size: int) -> BatchPlan:
        """Divide the config's global batch over `world_size` ranks.

        Raises:
            ConfigError: the global batch is not a whole number of micro-batches on every rank.
        """
        train = config.train
        together = train.micro_batch_size * world_size
        if train.global_batch_size % together:
            raise ConfigError(_not_divisible(train.global_batch_size, train.micro_batch_size, world_size))
        return cls(
            global_batch_size=train.global_batch_size,
            micro_batch_size=train.micro_batch_size,
            num_micro_steps=train.global_batch_size // together,
            rows_per_rank=train.global_batch_size // world_size,
            seq_len=config.data.seq_len,
            tokens_per_step=train.global_batch_size * config.data.seq_len,
            num_steps=num_steps_of(config),
            world_size=world_size,
        )

    def for_seq_len(self, seq_len: int) -> BatchPlan:
        """Return the sizes of a step with rows of another length: as many tokens and micro-steps, other rows.

        Args:
            seq_len: tokens in a row; divides the tokens of a micro-batch, as checks.py sees to.
        """
        if seq_len == self.seq_len:
            return self
        sizes = {name: getattr(self, name) for name in ("global_batch_size", "micro_batch_size", "rows_per_rank")}
        scaled = {name: rows * self.seq_len // seq_len for name, rows in sizes.items()}
        assert all(scaled[name] * seq_len == rows * self.seq_len for name, rows in sizes.items())
        return replace(self, seq_len=seq_len, **scaled)


def num_steps_of(config: Config) -> int:
    """Return the run's number of updates: `train.num_steps`, or `train.num_tokens` rounded up to whole steps."""
    if config.train.num_steps is not None:
        return config.train.num_steps
    assert config.train.num_tokens is not None, "checks.py lets no config pass without either"
    return -(-config.train.num_tokens // (config.train.global_batch_size * config.data.seq_len))


def _not_divisible(global_batch_size: int, micro_batch_size: int, world_size: int) -> str:
    """Write the error for a batch that does not divide, with the nearest sizes that do."""
    together = micro_batch_size * world_size
    below = global_batch_size // together * together
    nearest = " or ".join(str(size) for size in (below, below + together) if size)
    ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
    message = (
        f"on {ranks}: train.global_batch_size is {global_batch_size}; expected "
        f"a multiple of train.micro_batch_size x ranks ({micro_batch_size} x {world_size} = {together}). Use {nearest}"
    )
    rows, remainder = divmod(global_batch_size, world_size)
    if remainder:
        return f"{message}; no micro-batch size divides {global_batch_size} rows on {world_size} ranks."
    sizes = [size for size in range(1, rows + 1) if rows % size == 0]
    sizes = sorted(sorted(sizes, key=lambda size: abs(size - micro_batch_size))[:3])
    return f"{message}, or train.micro_batch_size {' or '.join(str(size) for size in sizes)}."
