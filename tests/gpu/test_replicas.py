"""The hash of a tensor on a GPU is the CPU's."""

from __future__ import annotations

import pytest
import torch

from pretrain.zero.replicas import hash_tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda is not available"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_hash_is_the_same_on_every_device(dtype):
    for size in (0, 1, 1000, 2**14, 2**22 + 2**14 + 5):
        tensor = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
        assert int(hash_tensor(tensor.cuda())) == int(hash_tensor(tensor))
