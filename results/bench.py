"""Speed, as ratios measured side by side in one process: python test_all.py --bench"""
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
import uniad
from autoencoder import ConvAutoencoder
from lamp_loss import Muon, ReconstructionLoss, draw_batches
from uniad import Backbone, UniAD


def images(n, size, channels=1):
    return torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8)


def quietly(work, *arguments, **options):
    with contextlib.redirect_stdout(io.StringIO()):
        return work(*arguments, **options)


def ratio(text, slow, fast):
    """Median seconds of slow over those of fast, in turns; the first turn warms up."""
    seconds = {slow: [], fast: []}
    for work in (slow, fast) * 6:
        start = time.perf_counter()
        quietly(work)
        seconds[work].append(time.perf_counter() - start)
    a, b = (np.median(turns[1:]) for turns in seconds.values())
    print(f"{text:<68}{a:8.3f} s /{b:8.3f} s = {a / b:5.2f}", flush=True)


def bare_loop(model, optim, batches, amp=False):
    model.train()
    for x in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            x_hat = model(x)
        optim.zero_grad()
        (x_hat.float() - x).square().mean().backward()
        optim.step()


@torch.no_grad()
def infer(model, batches, amp=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        return sum(float((model.eval()(x) - x).square().sum()) for x in batches)


def bench_autoencoder():
    x, to_tensor = images(2048, 32), torchvision.transforms.functional.to_tensor
    y, stored = data.to_float(x), [Image.fromarray(image[0].numpy()) for image in x]
    loader = torch.utils.data.DataLoader(
        stored, 32, collate_fn=lambda batch: torch.stack([to_tensor(image) for image in batch]))
    usual, ours = ConvAutoencoder(), ConvAutoencoder().to(memory_format=torch.channels_last)
    slow, fast = (torch.optim.Adam(model.parameters(), fused=model is ours)
                  for model in (usual, ours))
    fit = functools.partial(train.fit, ConvAutoencoder(), x, ReconstructionLoss(), epochs=1)
    ratio("2,048 images, bare loop on tensors / fit",
          lambda: bare_loop(ours, fast, y.split(32)), fit)
    ratio("their batches alone, DataLoader with ToTensor / ours", lambda: list(loader), lambda: [
        data.to_float(x[i]) for i in draw_batches(2048, 32, torch.Generator(), 1)])
    ratio("training, usual (DataLoader, NCHW, Adam) / fit",
          lambda: bare_loop(usual, slow, loader), fit)
    ratio("a landscape's point on 1,024 images, DataLoader / in memory",
          lambda: infer(usual, itertools.islice(loader, 32)), lambda: infer(ours, [y[:1024]]))


class AuthorsAttention(nn.MultiheadAttention):
    """Their layer, restated: tokens first, a token's weights returned."""

    def __init__(self, dim, heads, mask):
        super().__init__(dim, heads, 0.1)
        self.mask = mask

    def forward(self, q, k, v):
        tokens_first = [x.transpose(0, 1) for x in (q.expand_as(k), k, v)]
        return super().forward(*tokens_first, attn_mask=self.mask)[0].transpose(0, 1)


def bench_uniad():
    batch, ours = [torch.randn(8, 272, 14, 14)], UniAD()
    uniad.Attention = AuthorsAttention
    theirs = UniAD()
    slow, fast = (torch.optim.AdamW(model.parameters(), fused=model is ours)
                  for model in (theirs, ours))
    for how, amp in (("", False), (" with --amp", True)):
        ratio(f"UniAD training step, batch 8, authors' layer / ours{how}",
              functools.partial(bare_loop, theirs, slow, batch),
              functools.partial(bare_loop, ours, fast, batch, amp))
        ratio(f"UniAD inference, batch 8, authors' layer / ours{how}",
              functools.partial(infer, theirs, batch), functools.partial(infer, ours, batch, amp))
    backbone, x = Backbone(weights="random", standardize=False), images(16, 224, 3)
    raw = backbone.raw(data.to_float(x))
    fit = functools.partial(train.fit, ours, criterion=nn.MSELoss(), epochs=1, batch_size=8)
    ratio("an epoch of UniAD, features by B4 each time / from the cache",
          lambda: fit(x, prepare=lambda x: backbone(data.to_float(x))),
          lambda: fit(raw, prepare=backbone.standardize))


def bench_step():
    """Where a step's time goes, and what its products would take at the rate of a large one."""
    model, batch = UniAD(dropout=0.0), torch.randn(8, 272, 14, 14)
    optim, square = Muon(model, 0.01, 1e-4), torch.randn(2048, 2048, dtype=torch.bfloat16)

    def turn():                                             # -> seconds of its four parts
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
    forward, backward, muon, product = np.median([turn() for _ in range(6)][1:], axis=0)
    of_product = 2 * len(square) ** 3
    flop = counter.get_total_flops() - of_product
    print(f"a UniAD training step with --amp, batch 8: forward {forward:.3f} s, backward "
          f"{backward:.3f} s, Muon {muon:.3f} s;\n  {flop / 1e9:.0f} GFLOP of matrix products, "
          f"{flop / of_product * product:.3f} s at the rate of 2048 x 2048 ones, "
          f"{of_product / product / 1e9:.0f} GFLOP/s")


def main():
    import resource                                         # not on Windows
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; medians of 5 turns")
    for n in (5000, 10000, 20000):              # in this order: memory is the process's peak
        x, model, start = images(n, 32), ConvAutoencoder(), time.perf_counter()
        quietly(train.fit, model, x, ReconstructionLoss(), epochs=1)
        ev.image_scores(ev.error_maps(model, x, data.to_float))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024            # on Linux
        print(f"{n:,} images: {time.perf_counter() - start:.1f} s, {peak:.0f} MB")
    bench_autoencoder()
    bench_step()
    bench_uniad()
