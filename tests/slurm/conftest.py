"""A SLURM cluster of two nodes on this machine, for a file of tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.rank_helpers import skip_for
from tests.slurm.cluster import Cluster, why_not


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """The cluster; without SLURM's programs the tests are skipped."""
    skip_for(why_not(), "LONGHAUL_REQUIRE_SLURM")
    with Cluster() as cluster:
        yield cluster
