"""Speed, as ratios that are measured side by side in one process.

    python test_all.py --bench
"""
import contextlib
import functools
import io
import itertools
import time

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import data
import evaluate as ev
import train
from autoencoder import ConvAutoencoder
from lamp_loss import ReconstructionLoss
from uniad import Attention, Backbone, UniAD


def images(n, size, channels=1):
    return torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8)


def quietly(work, *arguments, **options):
    with contextlib.redirect_stdout(io.StringIO()):
        return work(*arguments, **options)


def ratio(text, slow, fast):
    """Print the median seconds of slow over those of fast. They take turns.

    The first turn of six warms up, and is left out.
    """
    seconds = {slow: [], fast: []}
    for work in (slow, fast) * 6:
        start = time.perf_counter()
        quietly(work)
        seconds[work].append(time.perf_counter() - start)
    a, b = (np.median(turns[1:]) for turns in seconds.values())
    print(f"{text:<68}{a:8.3f} s /{b:8.3f} s = {a / b:5.2f}", flush=True)


def bare_loop(model, optim, batches, amp=False):
    """What a training loop cannot do without."""
    model.train()
    for x in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            x_hat = model(x)
        optim.zero_grad()
        (x_hat.float() - x).square().mean().backward()
        optim.step()


@torch.no_grad()
def infer(model, batches, amp=False):
    model.eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        return sum(float((model(x) - x).square().sum()) for x in batches)


def adam(model, fused):
    return torch.optim.Adam(model.parameters(), fused=fused)


def usual_loader(x):
    """A DataLoader of Pillow images with ToTensor, as most code has it."""
    to_tensor = torchvision.transforms.functional.to_tensor
    stored = [Image.fromarray(image[0].numpy()) for image in x]

    def collate(batch):
        return torch.stack([to_tensor(image) for image in batch])
    return torch.utils.data.DataLoader(stored, 32, collate_fn=collate)


def our_batches(x):
    return [data.to_float(x[index]) for index in torch.randperm(len(x)).split(32)]


def bench_autoencoder():
    x = images(2048, 32)
    y, loader = data.to_float(x), usual_loader(x)
    usual = ConvAutoencoder()
    ours = ConvAutoencoder().to(memory_format=torch.channels_last)
    slow, fast = adam(usual, fused=False), adam(ours, fused=True)
    criterion = ReconstructionLoss()
    fit = functools.partial(train.fit, ConvAutoencoder(), x, criterion, epochs=1)
    ratio("2,048 images, bare loop on tensors / fit",
          lambda: bare_loop(ours, fast, y.split(32)), fit)
    ratio("their batches alone, DataLoader with ToTensor / ours",
          lambda: list(loader), lambda: our_batches(x))
    ratio("training, usual (DataLoader, NCHW, Adam) / fit",
          lambda: bare_loop(usual, slow, loader), fit)
    ratio("a landscape's point on 1,024 images, DataLoader / in memory",
          lambda: infer(usual, itertools.islice(loader, 32)),
          lambda: infer(ours, [y[:1024]]))


class AuthorsAttention(nn.MultiheadAttention):
    """The layer of UniAD's authors, restated: tokens first, the weights returned."""

    def __init__(self, dim, heads, mask):
        super().__init__(dim, heads, 0.1)
        self.mask = mask

    def forward(self, q, k, v):
        q, k, v = (x.transpose(0, 1) for x in (q.expand_as(k), k, v))
        return super().forward(q, k, v, attn_mask=self.mask)[0].transpose(0, 1)


class FusedAttention(Attention):
    """Ours with PyTorch's fused function."""

    def forward(self, q, k, v):
        q, k, v = self.to_q(q), self.to_k(k), self.to_v(v)
        q, k, v = (self.split_heads(x) for x in (q, k, v))
        mask = self.mask.to(q.dtype)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))


def uniad_with(attention):
    """UniAD with another layer in place of ours."""
    model = UniAD()
    for layer in (*model.encoder, *model.decoder):
        for name, ours in list(layer.named_children()):
            if isinstance(ours, Attention):
                dim = ours.out.in_features
                setattr(layer, name, attention(dim, ours.heads, ours.mask))
    return model


def bench_uniad():
    batch = [torch.randn(8, 272, 14, 14)]
    ours, theirs = UniAD(), uniad_with(AuthorsAttention)
    fused = uniad_with(FusedAttention)
    slow = torch.optim.AdamW(theirs.parameters(), fused=False)
    fast = torch.optim.AdamW(ours.parameters(), fused=True)
    also_fast = torch.optim.AdamW(fused.parameters(), fused=True)
    for how, amp in (("", False), (" with amp", True)):
        ratio(f"UniAD training step, batch 8, fused attention / ours{how}",
              lambda: bare_loop(fused, also_fast, batch, amp),
              lambda: bare_loop(ours, fast, batch, amp))
        ratio(f"UniAD training step, batch 8, authors' layer / ours{how}",
              lambda: bare_loop(theirs, slow, batch),
              lambda: bare_loop(ours, fast, batch, amp))
        ratio(f"UniAD inference, batch 8, authors' layer / ours{how}",
              lambda: infer(theirs, batch), lambda: infer(ours, batch, amp))
    backbone = Backbone(weights="random", standardize=False)
    x = images(16, 224, 3)
    features = backbone.extract(data.to_float(x))
    fit = functools.partial(train.fit, ours, criterion=nn.MSELoss(), epochs=1,
                            batch_size=8)
    ratio("an epoch of UniAD, features by B4 each time / from the cache",
          lambda: fit(x, prepare=lambda x: backbone(data.to_float(x))),
          lambda: fit(features, prepare=backbone.standardize))


def bench_step():
    """Where a step's time goes, and what its products take at a large one's rate."""
    model, batch = UniAD(dropout=0.0), torch.randn(8, 272, 14, 14)
    optim = train.Muon(model.named_parameters(), lr=0.01, weight_decay=1e-4)
    square = torch.randn(2048, 2048, dtype=torch.bfloat16)

    def turn():                                     # -> the seconds of its four parts
        optim.zero_grad()
        times = [time.perf_counter()]
        with torch.autocast("cpu", torch.bfloat16):
            loss = (model(batch).float() - batch).square().mean()
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        with torch.autocast("cpu", torch.bfloat16):
            optim.step()
        times.append(time.perf_counter())
        square @ square
        return np.diff([*times, time.perf_counter()])

    with FlopCounterMode(display=False) as counter:
        turn()
    turns = [turn() for _ in range(6)]
    forward, backward, muon, product = np.median(turns[1:], axis=0)
    of_product = 2 * len(square) ** 3
    flop = counter.get_total_flops() - of_product
    print(f"a UniAD training step with amp, batch 8: forward {forward:.3f} s, backward "
          f"{backward:.3f} s, Muon {muon:.3f} s;\n  {flop / 1e9:.0f} GFLOP of matrix "
          f"products, {flop / of_product * product:.3f} s at the rate of 2048 x 2048 "
          f"ones, {of_product / product / 1e9:.0f} GFLOP/s")


def bench_memory():
    """Seconds and memory by the number of images, upward: memory is the peak so far."""
    import resource                                 # not on Windows
    for n in (5000, 10000, 20000):
        x, model, start = images(n, 32), ConvAutoencoder(), time.perf_counter()
        quietly(train.fit, model, x, ReconstructionLoss(), epochs=1)
        ev.image_scores(ev.error_maps(model, x, data.to_float))
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024    # on Linux
        print(f"{n:,} images: {seconds:.1f} s, {peak:.0f} MB")


def main():
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; "
          "medians of 5 turns")
    bench_memory()
    bench_autoencoder()
    bench_step()
    bench_uniad()
