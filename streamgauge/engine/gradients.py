"""How the loss answers to small changes of the stream: backwards through the model, a block at a
time.
"""

import contextlib
from typing import TYPE_CHECKING

from streamgauge.engine.anatomy import first
from streamgauge.engine.blockwise import Batch, Blockwise

if TYPE_CHECKING:
    import torch


def loss_gradient(
    model: Blockwise, ids: "torch.Tensor", stream: "torch.Tensor", counted: "torch.Tensor"
) -> "torch.Tensor":
    """Of the sum of losses, nats, by the stream behind the last block, (rows, positions, d_model).

    counted: (rows, positions - 1), 1 where the next token's loss counts and 0 where it does not.
    """
    import torch

    gradient = torch.empty_like(stream)
    for part in model.in_parts(ids):
        with torch.enable_grad():
            x = stream[part].detach().clone().requires_grad_()
            logits = model.logits(ids[part], x)[:, :-1].flatten(0, 1)
            losses = torch.nn.functional.cross_entropy(
                logits, ids[part][:, 1:].flatten(), reduction="none"
            )
            total = losses @ counted[part].flatten()
        (gradient[part],) = torch.autograd.grad(total, x)
    return gradient


def through_block(
    model: Blockwise, layer: int, batch: Batch, stream: "torch.Tensor", behind: "torch.Tensor"
) -> "tuple[torch.Tensor, torch.Tensor | None]":
    """The gradients by the stream before a held block and by what its attention adds, from that by
    the stream behind it; None where it is not one module whose output the block leaves as it is.
    """
    import torch

    anatomy, kept = model.anatomies[layer], []
    terms = anatomy.of("attn") if anatomy else []
    with torch.enable_grad(), contextlib.ExitStack() as stack:
        if len(terms) == 1 and terms[0].factor and not terms[0].mutated:
            module = model.module(layer, terms[0].path)
            hook = module.register_forward_hook(lambda *call: kept.append(first(call[2])))
            stack.callback(hook.remove)
        args, kwargs = batch.calls[layer]
        x = stream.detach().clone().requires_grad_()
        # Some blocks change what they are given in place.
        output = first(model.blocks[layer](x * 1, *args, **kwargs))
    before, *added = torch.autograd.grad(output, [x, *kept], behind)
    return before, added[0].reshape(x.shape) / terms[0].factor if added else None
