"""Levers: changes of UniAD that train.py has no option for, each tried alone.

From random weights UniAD sticks on some products. The two-step start is a way off.
Whether other changes are, too, `python results/sweep.py levers` has tried: none is
(results/uniad.md). It trains like this:

    with levers.pulled("pre-norm"):
        train.run({"model": "uniad", "dataset": "mvtec", "start": "random",
                   "out": "runs/pre-norm"})

A lever replaces a function or a class of uniad.py or train.py, as long as the `with`
block lasts. The run is judged in there, too. Its folder does not say that there was a
lever: outside of the block it would be taken for a plain UniAD, and judged wrongly.
"""
import contextlib
import functools
from unittest import mock

import torch
import torch.nn.functional as F

import train
import uniad

# ---- layer normalization before each block, not after it ----

# The authors' code can do this as well, and differs a little: it has a learned layer
# norm after the encoder, and does not normalize what the decoder layer before has made.

def encode_pre_norm(self, x, position):
    """An encoder layer: (B, N, D) -> (B, N, D)."""
    y = self.norm1(x)
    x = x + self.dropout(self.attention(y + position, y + position, y))
    return x + self.dropout(self.mlp(self.norm2(x)))


def decode_pre_norm(self, memory, previous, position):
    """A decoder layer. The memory has not been normalized yet, nor has `previous`."""
    x = previous if self.query is None else self.query.expand_as(memory)
    memory = F.layer_norm(memory, memory.shape[-1:])
    previous = F.layer_norm(previous, previous.shape[-1:])
    query = self.norm1(x) + position
    x = x + self.dropout(self.memory_attention(query, memory + position, memory))
    query = self.norm2(x) + position
    x = x + self.dropout(self.layer_attention(query, previous + position, previous))
    return x + self.dropout(self.mlp(self.norm3(x)))


# ---- the mask in one kind of attention alone, or growing ----

def with_mask_in(kind):
    """UniAD.__init__ that keeps the mask in attentions whose name ends in `kind`."""
    original = uniad.UniAD.__init__

    def initialize(self, *args, **options):
        original(self, *args, **options)
        for name, module in self.named_modules():
            if isinstance(module, uniad.Attention) and not name.endswith(kind):
                module.mask = torch.zeros_like(module.mask)

    return initialize


def grow_mask(self, training=True):
    """UniAD.train. The mask hides 1 x 1, 3 x 3, 5 x 5 tokens in the first epochs.

    `train.fit` calls this at the start of each epoch. A model that is judged has its
    whole mask of 7 x 7.
    """
    self.epoch = getattr(self, "epoch", 0) + training
    size = min(7, 2 * self.epoch - 1) if training else 7
    grid = len(self.rows)
    for module in self.modules():
        if isinstance(module, uniad.Attention):
            module.mask.copy_(uniad.neighbor_mask(grid, grid, size))
    return torch.nn.Module.train(self, training)


# ---- heads ----

def with_heads(count):
    original = uniad.UniAD.__init__

    def initialize(self, *args, **options):
        original(self, *args, heads=count, **options)

    return initialize


# ---- faster positions: usually they take Adam's steps at a twentieth of the rate ----

class MuonMovesPositions(train.Muon):
    """The positions are moved as Muon moves weights: two matrices (g, D/2)."""

    def __init__(self, named_parameters, lr, weight_decay):
        renamed = []
        for name, p in named_parameters:
            is_position = name in ("rows", "columns")
            renamed.append((name + ".weight" if is_position else name, p))
        super().__init__(renamed, lr, weight_decay)


class FastPositions(train.Muon):
    """The positions take Adam's steps at the full learning rate."""

    def __init__(self, named_parameters, lr, weight_decay):
        named = dict(named_parameters)
        positions = [named.pop("rows"), named.pop("columns")]
        super().__init__(named.items(), lr, weight_decay)
        self.add_param_group(dict(params=positions, muon=False, weight_decay=0.0,
                                  lr=lr, lr_ratio=1.0))


# For each lever, what it replaces: (where, name, by what).
LEVERS = {
    "pre-norm": [(uniad.EncoderLayer, "forward", encode_pre_norm),
                 (uniad.DecoderLayer, "forward", decode_pre_norm)],
    "growing mask": [(uniad.UniAD, "train", grow_mask)],
    "mask in the encoder": [
        (uniad.UniAD, "__init__", with_mask_in(".attention"))],
    "mask in memory attention": [
        (uniad.UniAD, "__init__", with_mask_in(".memory_attention"))],
    "mask in layer attention": [
        (uniad.UniAD, "__init__", with_mask_in(".layer_attention"))],
    "4 heads": [(uniad.UniAD, "__init__", with_heads(4))],
    "16 heads": [(uniad.UniAD, "__init__", with_heads(16))],
    "positions by Muon": [(train.OPTIMIZERS, "muon", MuonMovesPositions)],
    "positions at full rate": [(train.OPTIMIZERS, "muon", FastPositions)],
    "amplitude 1.5": [
        (uniad, "two_step_start",
         functools.partial(uniad.two_step_start, amplitude=1.5))],
}


@contextlib.contextmanager
def pulled(name):
    """Within this block UniAD, and its training, have the lever `name` of LEVERS."""
    with contextlib.ExitStack() as stack:
        for where, attribute, new in LEVERS[name]:
            if isinstance(where, dict):
                stack.enter_context(mock.patch.dict(where, {attribute: new}))
            else:
                stack.enter_context(mock.patch.object(where, attribute, new))
        yield
