"""torch's optimizers, which here do not import torch's compiler.

torch's own do, at their first step and in several methods, only to tell the compiler to leave them alone: 890 modules,
a third of a start on a CPU (docs/notes/0027). Nothing compiles an optimizer here; blocks that are compiled import it.
"""

from __future__ import annotations

from inspect import unwrap

import torch
from torch.optim import Optimizer

# What torch asks the compiler for at a method's first call, and keeps under this name: the method itself.
for _method in (Optimizer.add_param_group, Optimizer.zero_grad, Optimizer.state_dict, Optimizer.load_state_dict):
    setattr(unwrap(_method), "__dynamo_disable", unwrap(_method))


class AdamW(torch.optim.AdamW):
    """Loshchilov and Hutter 2019."""

    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))


class Adam(torch.optim.Adam):
    """Kingma and Ba 2015."""

    step = torch.no_grad()(unwrap(torch.optim.Adam.step))


class SGD(torch.optim.SGD):
    """Gradient descent, with momentum by choice."""

    step = torch.no_grad()(unwrap(torch.optim.SGD.step))


class RMSprop(torch.optim.RMSprop):
    """Hinton 2012."""

    step = torch.no_grad()(unwrap(torch.optim.RMSprop.step))
