"""The arithmetic of a step: rows, ranks, micro-steps and tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pretrain.console import counted
from pretrain.errors import ConfigError
from pretrain.options.config import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """How the rows of each step are divided over ranks and micro-steps.

    Rank r computes rows `[d * rows_per_rank, (d + 1) * rows_per_rank)` of each global batch, in `num_micro_steps`
    micro-batches of `micro_batch_size` rows each; d is r divided by the ranks that share rows, rounded down.

    Args:
        global_batch_size: rows in a step, over all ranks.
        micro_batch_size: rows that one rank computes at once, whole or its part of each.
        num_micro_steps: forward and backward passes of one rank in a step.
        rows_per_rank: rows of one rank in a step.
        seq_len: tokens in a row.
        tokens_per_step: tokens of all ranks in a step.
        num_steps: updates of the whole run.
        world_size: number of ranks.
        sequence_parallel_size: neighbouring ranks that share rows.
    """

    global_batch_size: int
    micro_batch_size: int
    num_micro_steps: int
    rows_per_rank: int
    seq_len: int
    tokens_per_step: int
    num_steps: int
    world_size: int
    sequence_parallel_size: int = 1

    @classmethod
    def of(cls, config: Config, world_size: int) -> BatchPlan:
        """Divide the config's global batch over `world_size` ranks.

        Raises:
            ConfigError: the ranks are not whole groups that share rows, or the global batch is not a whole number of
                micro-batches on every rank.
        """
        train, shared_by = config.train, config.parallel.sequence_parallel_size
        if world_size % shared_by:
            raise ConfigError(_not_whole_groups(shared_by, world_size))
        together = train.micro_batch_size * (world_size // shared_by)
        if train.global_batch_size % together:
            raise ConfigError(_not_divisible(train.global_batch_size, train.micro_batch_size, world_size, shared_by))
        return cls(
            global_batch_size=train.global_batch_size,
            micro_batch_size=train.micro_batch_size,
            num_micro_steps=train.global_batch_size // together,
            rows_per_rank=train.global_batch_size // (world_size // shared_by),
            seq_len=config.data.seq_len,
            tokens_per_step=train.global_batch_size * config.data.seq_len,
            num_steps=num_steps_of(config),
            world_size=world_size,
            sequence_parallel_size=shared_by,
        )

    @property
    def tokens_of_micro_step(self) -> int:
        """Tokens that one rank computes at once."""
        return self.micro_batch_size * self.seq_len // self.sequence_parallel_size

    def reader_of(self, rank: int) -> int:
        """Return which part of a step's rows a rank has; ranks that share rows have the same."""
        return rank // self.sequence_parallel_size

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


def sharing_problem(config: Config) -> str | None:
    """Say why `parallel.sequence_parallel_size` ranks cannot share rows, with the nearest sizes that can; else None."""
    size, heads = config.parallel.sequence_parallel_size, config.model.num_heads
    kv_heads, seq_lens = config.model.num_kv_heads or heads, config.data.seq_lens

    def can_share(size: int) -> bool:
        even_heads = kv_heads % size == 0 or size % kv_heads == 0
        return heads % size == 0 and even_heads and all(seq_len % size == 0 for seq_len in seq_lens)

    if can_share(size):
        return None
    lengths = " and ".join(str(seq_len) for seq_len in seq_lens)
    return (
        f"parallel.sequence_parallel_size is {size}; expected a divisor of data.seq_len ({lengths}) and of "
        f"model.num_heads ({heads}), and a divisor or multiple of model.num_kv_heads ({kv_heads}). "
        f"Use {_nearest(size, [found for found in range(1, heads + 1) if can_share(found)])}."
    )


def _nearest(value: int, allowed: list[int]) -> str:
    """Name the allowed values next to one that is not."""
    around = (
        max((one for one in allowed if one < value), default=0),
        min((one for one in allowed if one > value), default=0),
    )
    return " or ".join(str(one) for one in around if one)


def _not_whole_groups(size: int, world_size: int) -> str:
    """Write the error for ranks that do not make whole groups, with the nearest sizes that do."""
    divisors = [found for found in range(1, world_size + 1) if world_size % found == 0]
    return (
        f"on {counted(world_size, 'rank')}: parallel.sequence_parallel_size is {size}; expected a divisor of the "
        f"number of ranks. Use {_nearest(size, divisors)}, or a multiple of {counted(size, 'rank')}."
    )


def _not_divisible(global_batch_size: int, micro_batch_size: int, num_ranks: int, shared_by: int) -> str:
    """Write the error for a batch that does not divide, with the nearest sizes that do."""
    world_size = num_ranks // shared_by
    together = micro_batch_size * world_size
    below = global_batch_size // together * together
    nearest = " or ".join(str(size) for size in (below, below + together) if size)
    who, ranks = "ranks", counted(num_ranks, "rank")
    on = ranks
    if shared_by > 1:
        who, ranks = f"groups of {shared_by} ranks", f"{ranks} in {counted(world_size, 'group')}"
        on = f"{counted(world_size, 'group')} of {shared_by} ranks"
    message = (
        f"on {ranks}: train.global_batch_size is {global_batch_size}; expected "
        f"a multiple of train.micro_batch_size x {who} ({micro_batch_size} x {world_size} = {together}). Use {nearest}"
    )
    rows, remainder = divmod(global_batch_size, world_size)
    if remainder:
        return f"{message}; no micro-batch size divides {counted(global_batch_size, 'row')} on {on}."
    sizes = [size for size in range(1, rows + 1) if rows % size == 0]
    sizes = sorted(sorted(sizes, key=lambda size: abs(size - micro_batch_size))[:3])
    return f"{message}, or train.micro_batch_size {' or '.join(str(size) for size in sizes)}."
