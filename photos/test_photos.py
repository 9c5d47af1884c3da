"""Each claim that photos/ makes, as a test whose name is the claim.

    python -m pytest photos
"""
import contextlib
import csv
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
import threading
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

# The tests' work is too small to share. numpy's threads are set when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, features

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data
import evaluate as ev
import train
import uniad
from photos import alike, copies, images, judge, learn, page
from photos.copies import moved
from photos.images import read_folder, read_photo
from photos.judge import Judge

SMALL = dict(
    backbone="resnet18", backbone_weights="random", strides=(8, 16), grid_stride=8,
    bank_images=10 ** 6, coreset=0.5, image_size=64)
ALL_STEPS = copies.STEPS
build_network, networks = uniad.torchvision_stages, {}


def network_built_once(*arguments):
    """The frozen network, of which each Backbone would build an equal one."""
    if str(arguments) not in networks:
        networks[str(arguments)] = build_network(*arguments)
    return networks[str(arguments)]


def make_small(patch, folder):
    """Learn little and fast, in this folder."""
    torch.set_num_threads(1)
    patch.chdir(folder)
    patch.setattr(learn, "NEAREST", SMALL)
    patch.setattr(copies, "TO_DECIDE", 6)
    patch.setattr(copies, "MOVED", 1)
    patch.setattr(learn, "TO_MOVE", 2)
    first_steps = {name: steps[:1] for name, steps in ALL_STEPS.items()}
    patch.setattr(copies, "STEPS", first_steps)
    patch.setattr(uniad, "torchvision_stages", network_built_once)


@pytest.fixture(autouse=True)
def small_and_in_an_empty_folder(tmp_path, monkeypatch):
    make_small(monkeypatch, tmp_path)


@pytest.fixture(scope="session")
def learned_once(tmp_path_factory):
    """A folder with 24 photos in good/, learned by each model as runs/<model>."""
    folder = tmp_path_factory.mktemp("learned")
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch, folder)
        make_photos()
        for model in ("nearest", "pca"):
            said(learn.learn, "good", f"runs/{model}", model=model)
    return folder


def take(learned_once, model):
    """Copy the photos and their run by this model here, as good/ and runs/good."""
    shutil.copytree(learned_once / "good", "good")
    shutil.copytree(learned_once / f"runs/{model}", "runs/good")
    shutil.copytree(learned_once / "runs/features", "runs/features")


def said(work, *arguments, **options):
    """A call's result, and what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        return work(*arguments, **options), out.getvalue()


def call(main, command, status=0):
    """Run a command's main(argv), check its exit status -> what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        with pytest.raises(SystemExit) as stop:
            main(shlex.split(command))
    assert stop.value.code == status, f"{command}\n{out.getvalue()}"
    return out.getvalue()


def judged(command):
    """What judge.py prints, whatever its exit status is."""
    return said(judge.run_command, judge.parser().parse_args(shlex.split(command)))[1]


def refused(words, work, *arguments, **options):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        work(*arguments, **options)


def part(seed, defect=False, shape=(64, 64), color=70):
    """A photo of a part: noise, and a red block above; with a defect, a spot below."""
    draw = np.random.default_rng(seed)
    pixels = draw.normal(90, 6, (shape[1], shape[0], 3))
    pixels[4:24, 8:52, 0] += color
    if defect:
        pixels[40:48, 40:48] = 250
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def save(image, path, **options):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def make_photos(folder="good", count=24, start=0, **how):
    for i in range(start, start + count):
        save(part(i, **how), f"{folder}/{i:03}.png")


def make_set(*kinds, root="set", count=20):
    """Kinds in MVTec AD's layout, each with 4 good and 4 defective test photos."""
    for number, kind in enumerate(kinds):
        for place, first, number_of in (("train/good", 0, count), ("test/good", 20, 4),
                                        ("test/hole", 24, 4)):
            for i in range(number_of):
                seed = 100 * number + first + i
                image = part(seed, "hole" in place, color=70 - 60 * number)
                save(image, f"{root}/{kind}/{place}/{i:03}.png")
                if "hole" in place:
                    mask = np.zeros((64, 64), np.uint8)
                    mask[40:48, 40:48] = 255
                    masks = f"{root}/{kind}/ground_truth/hole"
                    save(Image.fromarray(mask), f"{masks}/{i:03}_mask.png")
    return Path(root)


def table_of(text):
    """The rows of the judged.csv that a command has named, and its folder."""
    path = Path(re.search("table: (.*)", text)[1])
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream)), path.parent


# ---- one photo ----

def test_every_kind_of_image_becomes_three_channels_of_eight_bits():
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image, ink, black = (Image.fromarray(x) for x in (gray, 255 - gray, 0 * gray))
    for name in ("L.png", "L.gif", "L.tif", "line\nbreak $x$.png", "\udcff.bmp"):
        image.save(name)
    for top, kind in ((1, "float32"), (255, "int32"), (255, "float32"),
                      # 10 and 12 bits come in files of 16.
                      (1023, "uint16"), (4095, "uint16"), (65535, "uint16")):
        scaled = gray * (top / 255) if top == 1 else (gray * (top / 255)).round()
        Image.fromarray(scaled.astype(kind)).save(f"{top} {kind}.tif")
    image.convert("P").save("P.bmp")
    Image.merge("CMYK", [ink, ink, ink, black]).save("CMYK.tif")
    # Black pixels, as transparent as `image` is bright, lie on white.
    Image.merge("RGBA", [black, black, black, ink]).save("RGBA.tiff")
    image.transpose(Image.Transpose.ROTATE_90).save("turned.tif", tiffinfo={0x0112: 6})
    expected = torch.tensor(gray).expand(3, -1, -1)
    for source in (*Path().iterdir(), image, gray, np.stack([gray] * 3, 2)):
        assert torch.equal(read_photo(source, 16).pixels, expected), source
    by_another_scale = read_photo("4095 uint16.tif", 16, 65535).pixels
    assert by_another_scale.max() == round(4095 / 65535 * 255)


def test_photos_of_16_bits_share_one_scale_which_the_run_keeps_for_new_ones():
    for i in range(22):
        pixels = np.asarray(part(i).convert("L")).astype(np.uint16) * 16      # 12 bits
        save(Image.fromarray(pixels), f"good/{i}.tif")
    call(learn.main, "good --model pca")
    assert ev.load_run("runs/good")[0]["config"]["white"] == 4095
    dim = Image.fromarray(np.asarray(part(0).convert("L")).astype(np.uint16))
    assert Judge("runs/good").read(dim).pixels.max() < 20  # not brought to full scale
    assert [images.find_white(x) for x in (0, 1.04, 255, 256, 65535)] == [
        None, 1.0, 255.0, 1023.0, 65535.0]


def test_a_photo_of_16_bits_is_refused_where_photos_of_8_were_learned(learned_once):
    take(learned_once, "pca")
    save(Image.fromarray(np.full((64, 64), 999, np.uint16)), "new/deep.tif")
    text = call(judge.main, "runs/good new --no-page", 2)
    assert "deep.tif cannot be read (it has 16 or 32 bits" in text
    make_set("bolt")
    shutil.copy("new/deep.tif", "set/bolt/test/good/deep.tif")
    found, text = said(read_folder, "set", 16)
    assert "deep.tif cannot be read" in text and len(found.data.test) == 8


def test_transparent_parts_are_white_whatever_color_is_hidden_under_them():
    alpha = Image.fromarray(np.repeat(np.uint8([[255], [0]]), 32, 0).repeat(64, 1))
    read = []
    for color in ("black", "lime"):
        image = part(1)
        image.paste(color, (0, 32, 64, 64))
        image.putalpha(alpha)
        image.save(f"{color}.png")
        read.append(read_photo(f"{color}.png", 64).pixels)
    assert torch.equal(*read) and (read[0][:, 32:] == 255).all()


def test_what_cannot_be_read_is_refused_by_name(monkeypatch):
    good = Image.new("L", (8, 8), 9)
    expected = {"pages.tif": "2 pages"}
    refused("no such file or folder: no.png", read_photo, "no.png", 8)
    good.save("good.png")
    Path("cut.png").write_bytes(Path("good.png").read_bytes()[:45])
    good.save("pages.tif", save_all=True, append_images=[good])
    for value in (math.nan, math.inf, -1):
        Image.fromarray(np.full((8, 8), value, np.float32)).save(f"{value}.tif")
        expected[f"{value}.tif"] = "negative or infinite"
    Path("phone.heic").write_bytes(b"none")
    os.mkfifo("pipe.png")
    expected["pipe.png"] = "it is a pipe, not a file"
    expected["phone.heic"] = "" if images.pillow_heif else "pip install pillow-heif"
    for name, words in (expected | {"cut.png": ""}).items():
        refused(f"{name} cannot be read.*{words}", read_photo, name, 8)
    refused("expected .height, width, 3. uint8", read_photo, np.zeros((8, 8, 3)), 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 31)  # twice as many are refused
    refused("good.png cannot be read.*decompression bomb", read_photo, "good.png", 8)


def test_whatever_pillow_reads_is_found_in_a_folder():
    kinds = {".jpe": "JPEG", ".pnm": "PPM", ".mpo": "MPO", ".jp2": "JPEG2000",
             ".webp": "WEBP",
             ".PNG": "PNG"} | ({".avif": "AVIF"} if features.check("avif") else {})
    for i, (suffix, form) in enumerate(kinds.items()):
        save(part(i), f"good/{i}{suffix}", format=form)
    Path("good/notes.txt").touch()
    found, text = said(read_folder, "good", 16)
    assert len(found.files) == len(kinds)
    assert "1 file is no image by the end of its name" in text
    assert ".heic" in images.SUFFIXES


def test_a_quarter_turn_is_exact_and_any_turn_is_mirrored_at_the_borders():
    x = torch.randint(1, 256, (2, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(moved(x, degrees=90), x.rot90(1, (2, 3)))
    assert torch.equal(moved(x, degrees=180), x.flip(2, 3)) and torch.equal(moved(x), x)
    white = torch.full_like(x, 200)                         # no black corners
    assert (moved(white, degrees=45) == 200).all()


def test_a_moved_camera_shifts_the_pixels_and_more_light_scales_them():
    x = torch.randint(1, 100, (1, 3, 16, 16), dtype=torch.uint8)
    right, down = moved(x, right=2 / 16), moved(x, down=-3 / 16)
    assert torch.equal(right[..., 2:], x[..., :-2])
    assert torch.equal(down[..., :-3, :], x[..., 3:, :])
    assert torch.equal(moved(x, light=1.0), 2 * x)
    assert torch.equal(moved(x, light=-0.5), (x / 2).round().byte())


# ---- a folder ----

def test_folders_keep_kinds_pair_masks_and_name_what_they_pass_over():
    bolt = make_set("bolt", "nut 3") / "bolt"
    (bolt / "test/hole/notes.txt").touch()
    (bolt / "test/hole/003.png").rename(bolt / "test/hole/9.png")
    (bolt / "train/good/camera 2").mkdir()
    part(99).save(bolt / "train/good/camera 2/000.png")
    found, text = said(read_folder, "set", 16)
    d = found.data
    assert d.train.shape == (40, 3, 16, 16)
    assert d.train_classes == ["bolt"] * 20 + ["nut 3"] * 20
    assert d.labels.tolist() == ([0] * 4 + [1] * 4) * 2
    assert d.categories[7:9] == ["bolt", "nut 3"]
    expected = torch.zeros(16, 16, 16, dtype=torch.bool)
    expected[[4, 5, 6, 12, 13, 14, 15], 10:12, 10:12] = True
    assert torch.equal(d.masks, expected)
    for words in ("1 file is no image.*notes.txt",
                  "1 image lies elsewhere.*camera 2/000.png",
                  "1 defect has no mask.*hole/9.png",
                  "1 mask matches no.*hole/003_mask.png"):
        assert re.search(words, text), (words, text)


def test_good_photos_have_other_names_too_and_what_is_ambiguous_is_refused():
    root = make_set("bolt") / "bolt"
    for old, new in itertools.pairwise(("good", "Good", "OK", "normal")):
        for place in ("train", "test"):
            (root / place / old).rename(root / place / new)
        d = read_folder(root, 8).data
        assert d.labels.tolist() == [0] * 4 + [1] * 4 and len(d.train) == 20
    d = read_folder(root / "train/normal", 8).data  # photos alone: good ones
    assert d.train_classes == ["normal"] * 20
    assert d.test.shape == (0, 3, 8, 8)
    assert d.masks is None
    shutil.copytree(root / "train/normal", root / "train/good")
    refused("which holds the good ones", read_folder, "set", 8)
    Path("none/deep").mkdir(parents=True)
    refused("no photos of good parts in none, expected(.*\n)*found there: deep",
            read_folder, "none", 8)
    make_photos("mine/OK", count=2)
    make_photos("mine/bad", count=2)
    refused("Learn the good ones: python photos/learn.py mine/OK",
            read_folder, "mine", 8)


def test_a_kind_whose_photos_cannot_be_read_is_left_out_with_its_test_photos():
    make_set("bolt", "nut")
    for path in Path("set/nut/train/good").iterdir():
        path.write_bytes(b"")
    found, text = said(read_folder, "set", 64)
    assert {*found.data.train_categories} == {*found.data.categories} == {"bolt"}
    assert "photos to test by are of kinds that have none to learn" in text


def test_what_cannot_serve_is_named_and_left_out():
    root = make_set("bolt") / "bolt"
    for i in range(4):
        (root / f"train/good/empty{i}.png").touch()
    shutil.copy(root / "train/good/003.png", root / "train/good/copy.png")
    shutil.copy(root / "train/good/004.png", root / "test/good/learned.png")
    found, text = said(read_folder, "set", 64)
    assert len(found.data.train) == 20 and len(found.data.test) == 8
    assert "bolt/train/good/000.png" in found.files
    for words in ("4 photos cannot be read.*empty0.png, .*empty2.png and 1 more",
                  "1 photo is an exact copy.*",
                  "1 photo to test by is learned, too.*learned.png"):
        assert re.search(words, text), (words, text)


def test_a_folder_that_cannot_be_opened_is_named_and_no_verdict_hides_it(
        learned_once, monkeypatch):
    take(learned_once, "pca")
    make_photos("good/locked", 1, start=60)
    original = os.scandir

    def scandir(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)
    monkeypatch.setattr(os, "scandir", scandir)
    found, text = said(read_folder, "good", 16)
    assert len(found.files) == 24
    assert "1 folder cannot be opened, and is left out: good/locked" in text
    text = call(judge.main, "runs/good good --threshold 1e9", 2)
    assert "good/locked cannot be read" in text and "1 could not be read" in text


def test_a_link_to_a_folder_is_followed_unless_it_leads_back():
    make_photos("elsewhere", 2)
    make_photos("good", 1, start=50)
    os.symlink(Path("elsewhere").resolve(), "good/linked")
    os.symlink(Path("good").resolve(), "good/back")
    os.symlink(Path.cwd(), "elsewhere/further_back")
    found = sorted(path.as_posix() for path in images.list_images(["good"]))
    assert found == ["good/050.png", "good/linked/000.png", "good/linked/001.png"]


def test_folders_that_lead_to_each_other_are_listed_once_and_files_judged_once(
        learned_once):
    for name in "ab":
        save(part(0), f"set/{name}/0.png")
    Path("set/a/to_b").symlink_to("../b")
    Path("set/b/to_a").symlink_to("../a")
    assert len(images.list_images(["set"])) == 2
    take(learned_once, "pca")
    assert "24 photos: " in judged("runs/good good good/000.png")


def test_only_images_that_can_be_read_set_the_white_of_16_bits():
    dark, infinite = np.full((8, 8), 1000, np.uint16), np.full((8, 8), math.inf)
    Image.fromarray(dark).save("a.png")
    Image.fromarray(infinite.astype(np.float32)).save("b.tif")
    assert images.white_of([Path("a.png"), Path("b.tif")]) == 1023


def mask_of(masks, size=16):
    """What `read_folder` makes of masks {place: image} of the only test photo."""
    shutil.rmtree("set", ignore_errors=True)
    save(Image.new("L", (32, 32), 9), "set/train/good/0.png")
    for place, image in {"test/hole/0.png": Image.new("L", (32, 32)), **masks}.items():
        save(image, f"set/{place}", quality=90)
    found, text = said(read_folder, "set", size)
    return found.data.masks[0], text


def test_a_mask_marks_by_any_color_but_black_whatever_its_form_its_name_and_its_place():
    bar = np.zeros((32, 32), np.uint8)
    bar[4:12, 8:20] = np.arange(1, 97).reshape(8, 12)  # many values, the lowest 1
    odd, even = (Image.fromarray(np.where(bar % 2 == k, bar, 0)) for k in (1, 0))
    sharp, palette = (Image.fromarray((bar > 0) * np.uint8(v)) for v in (255, 1))
    palette.putpalette([0, 0, 0, 0, 0, 1])
    forms = [Image.fromarray(bar.astype(kind)) for kind in "?BHif"]
    forms += [palette, Image.merge("LA", [Image.new("L", (32, 32), 255), sharp])]
    found = [mask_of({"masks/hole/0.tif": form})[0] for form in forms]
    places = ("masks/hole/0.PNG", "GT/Hole/0/1.tif", "gt/hole/0.jpg",
              "mask/hole/0-label.png")
    found += [mask_of({place: sharp})[0] for place in places]
    # MVTec LOCO has a folder of masks for each image.
    found.append(mask_of({"gt/hole/0/a.png": odd, "gt/hole/0/b.png": even})[0])
    for number, mask in enumerate(found):
        assert torch.equal(mask, torch.tensor(bar[::2, ::2] > 0)), number
    mask, text = mask_of({"gt/hole/0.png": Image.new("L", (5, 7))})
    assert not mask.any()
    assert "0.png: the mask has 5 x 7 pixels, its photo 32 x 32" in text


def test_a_mask_lies_on_its_turned_photo_and_a_thin_one_does_not_vanish():
    view, mask = np.full((64, 64, 3), 110, np.uint8), np.zeros((64, 64), np.uint8)
    view[4:12, 30:60], mask[4:12, 30:60] = 255, 255  # as a person sees it
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90 degrees
    stored = Image.fromarray(view).transpose(Image.Transpose.ROTATE_90)
    save(part(0), "set/train/good/0.png")
    save(stored, "set/test/hole/p.jpg", exif=exif, quality=98)
    save(Image.fromarray(mask), "set/ground_truth/hole/p_mask.png")
    d = read_folder("set", 64).data
    assert torch.equal(d.test[0].float().mean(0) > 180, d.masks[0])
    thin = np.zeros((1024, 1024), np.uint8)
    thin[513:516, 100:900] = 255
    save(Image.fromarray(thin), "set/test/hole/p.png")
    Path("set/test/hole/p.jpg").unlink()
    save(Image.fromarray(thin), "set/ground_truth/hole/p_mask.png")
    assert read_folder("set", 128).data.masks[0].any()


# ---- doubts ----

def test_near_copies_are_photos_far_closer_than_is_usual_and_exposure_does_not_matter():
    def shot(number, exposure=1.0):
        draw = np.random.default_rng(number)
        blocks = draw.uniform(60, 180, (8, 8, 3)) * exposure
        noise = np.random.default_rng().normal(0, 1, (64, 64, 3))
        return torch.from_numpy(blocks.repeat(8, 0).repeat(8, 1) + noise)
    several = torch.stack([shot(i) for i in range(12)]).permute(0, 3, 1, 2).byte()
    assert len(set(alike.near_copies(several))) == 12
    bursts = torch.stack([shot(i // 4, 1 + i % 4 / 20) for i in range(12)])
    groups = alike.near_copies(bursts.permute(0, 3, 1, 2).byte())
    assert [groups[i] == groups[j] for i in range(12) for j in range(12)] == [
        i // 4 == j // 4 for i in range(12) for j in range(12)]


def test_shots_of_a_hand_held_camera_are_near_copies_too():
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(12, 3, 28, 28, generator=generator)
    parts = (F.interpolate(coarse, (112, 112), mode="bicubic") * 255).clamp(0, 255)
    shots = []
    for right, down in ((0, 0), (0.011, -0.005), (-0.014, 0.003)):
        shots.append(moved(parts.byte(), right, down))
    groups = alike.near_copies(torch.cat(shots))
    assert groups[:12] == groups[12:24] == groups[24:] and len(set(groups)) == 12


def test_the_shift_of_a_photo_is_found_and_undone_to_a_fraction_of_a_pixel():
    values = -(torch.tensor([-1.0, 0.0, 1.0]) - 0.3) ** 2               # highest at .3
    assert float(alike.top_of_parabola(*values)) == pytest.approx(0.3)
    torch.manual_seed(0)
    photo = F.interpolate(torch.rand(1, 3, 14, 14) * 255, (112, 112), mode="bicubic")
    photo = photo.clamp(0, 255).byte()
    shifted = moved(photo, right=1.3 / 112, down=-2.4 / 112)
    reference = alike.details(photo)[0]
    there, back = alike.aligned(torch.cat([photo, shifted]), reference)
    plain = F.interpolate(shifted.float(), (48, 48), mode="area")[0]
    assert (back - there).abs().mean() < 0.2 * (plain - there).abs().mean()


def test_exposures_of_one_photo_are_near_copies_and_no_size_is_too_small():
    photos = torch.randint(0, 200, (1, 3, 64, 64), dtype=torch.uint8)
    exposures = torch.cat([photos + step for step in range(30)])
    assert len(set(alike.near_copies(exposures))) == 1
    for side in (1, 2, 3, 8):
        photos = torch.randint(0, 256, (5, 3, side, side), dtype=torch.uint8)
        assert len(alike.near_copies(photos)) == 5


def test_shots_of_most_photos_part_are_found_and_their_kind_is_compared_with_itself():
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(11, 3, 16, 16, generator=generator)
    parts = (F.interpolate(coarse, (64, 64), mode="bicubic") * 255).clamp(0, 255).byte()
    shots = torch.cat([moved(parts[:1], i / 640, -i / 640) for i in range(30)])
    groups = alike.near_copies(torch.cat([shots, parts[1:]]))
    assert len(set(groups[:30])) == 1 and len(set(groups)) == 11
    # Photos of a kind that shows one part set its threshold by each other.
    for number in range(24):
        save(part(0).point(lambda v: v + number), f"both/one/train/good/{number}.png")
        save(part(number), f"both/many/train/good/{number}.png")
    call(learn.main, "both")
    call(learn.main, "both/one/train/good --out alone")
    both, alone = ev.load_run("runs/both")[0], ev.load_run("alone")[0]
    errors = [float(state["calibration"]["statistics"][name][0].mean())
              for state, name in ((both, "one"), (alone, "good"))]
    assert errors[0] < 2 * errors[1]


def test_photos_learned_at_another_size_are_compared_by_their_names():
    make_photos(count=20)
    call(learn.main, "good")
    make_photos(count=1, start=20)
    text = call(learn.main, f"{Path('good').resolve()} --image-size 96")
    assert "Photos since the last time: 1 new (020.png), 0 gone." in text
    assert "at 64 pixels then and are at 96 now" in text
    assert "The threshold of good was" not in text


def test_a_photo_is_not_compared_with_near_copies_of_it():
    for number in range(24):                                # 8 shots of each of 3 parts
        shot = part(number % 3).point(lambda v: v + number // 3)
        save(shot, f"burst/{number:02}.png")
    text = call(learn.main, "burst --image-size 64")
    assert "about 3 different parts" in text and "compared with a near-copy" in text
    state, model = ev.load_run("runs/burst")
    assert len(state["photos"]["files"]) == 24
    assert set(model.image.tolist()) == {0, 1, 2}
    numbers = learn.left_out_together([0, 1, 1, 2, 2, 2], list("aaabbb"))
    # Of b, which shows one part alone, nothing would be left to compare a photo with.
    assert numbers.tolist() == [0, 1, 1, 9, 10, 11]


def test_learning_says_that_photos_are_a_burst_or_have_several_shapes():
    for number in range(24):
        save(part(number // 8).point(lambda v: v + number % 8), f"burst/{number}.png")
        shape = (96, 64) if number % 2 else (64, 96)
        save(part(number, shape=shape), f"mixed/{number}.png")
    make_photos("plain")
    text = call(learn.main, "burst --model pca")
    assert "near-copies of others" in text and "about 3 different parts" in text
    text = call(learn.main, "mixed --model pca")
    assert "several shapes (from 64 x 96 to 96 x 64 pixels)" in text
    assert "WARNING" not in call(learn.main, "plain --model pca")


def test_judging_names_photos_of_another_shape_and_says_how_all_differ(learned_once):
    take(learned_once, "pca")
    make_photos("new", 3, start=100, shape=(64, 96))
    make_photos("same", 6, start=200)
    for i in range(6):
        save(part(300 + i).point(lambda v: v * 0.6), f"dark/{i}.png")
    words = "3 have another shape than those learned (64 x 96 pixels, learned 64 x 64)"
    assert words in call(judge.main, "runs/good new", 10)
    assert "as a whole the photos are darker" in call(judge.main, "runs/good dark", 10)
    assert "as a whole" not in judged("runs/good same")


def test_a_measure_of_appearance_moves_with_what_it_is_named_for():
    x = torch.stack([torch.from_numpy(np.asarray(part(i)).copy()) for i in range(8)])
    x = x.permute(0, 3, 1, 2)
    usual = alike.appearance(x)
    red = x.clone()
    red[:, 0] += 30
    blurred = F.avg_pool2d(x.float(), 5, 1, 2, count_include_pad=False)
    for other, words in ((x // 2, "darker"), (x + 40, "brighter"), (red, "redder"),
                         (blurred, "blurrier"), (x, None)):
        found = alike.how_they_differ(alike.appearance(other), usual)
        assert words in found if words else not found, (words, found)
    plain = torch.full((8, 3, 64, 64), 50, dtype=torch.uint8)
    plain[:, :, 20:40, 20:40] = 200                         # moved: 9 pixels of 64
    usual = alike.appearance(plain)
    for other, words in ((plain.roll(9, 3), "shifted to the right"),
                         (plain.roll(-9, 2), "shifted up")):
        assert alike.how_they_differ(alike.appearance(other), usual) == [words]


def test_a_photo_among_the_good_ones_that_shows_a_defect_is_pointed_at():
    make_photos(count=24)
    save(part(7000, defect=True), "good/bad.png")
    text = call(learn.main, "good")
    found = re.search(r"LOOK: bad.png fits.*about (\S+) instead of (\S+)\.\n", text)
    assert float(found[1]) < float(found[2])
    html = Path("runs/good/learned.html").read_text()
    assert html.index("<b>bad.png</b>") < html.index("<b>000.png</b>")
    state = ev.load_run("runs/good")[0]
    scores = state["calibration"]["scores"]["good"].view(2, 25)  # photos, moved copies
    rest = np.delete(scores.numpy(), state["photos"]["files"].index("bad.png"), axis=1)
    assert f"{ev.threshold(rest.ravel()):.4g}" == found[1]


# ---- learning ----

def test_turned_copies_are_learned_where_parts_lie_anyhow_alone():
    ramp = np.arange(64.0)[:, None] * 4
    for i in range(10):
        noise = np.random.default_rng(i).uniform(0, 16, (64, 64))
        pixels = noise + np.where(ramp.T > 128, ramp, 0)
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        save(image, f"set/alike/train/good/{i}.png")
        save(image.rotate(i * 45 + 1 + i % 2), f"set/anyhow/train/good/{i}.png")
    text = call(learn.main, "set")
    assert "anyhow: the parts lie in any direction" in text
    assert "alike: the parts" not in text
    config = ev.load_run("runs/set")[0]["config"]
    plain = read_folder("set", 64).data
    d, shares = copies.add_copies(plain, ev.open_backbone(config))
    assert shares["anyhow"] >= 0.75 > shares["alike"]
    turned = d.copies[d.copy_in_bank]
    assert d.copy_of[d.copy_in_bank].tolist() == list(range(10, 20)) * 7
    for turn in range(1, 8):
        expected = moved(plain.train[10:], degrees=45 * turn)
        assert torch.equal(turned[10 * (turn - 1):10 * turn], expected)
    assert d.copy_of[~d.copy_in_bank].tolist() == list(range(20))  # moved: each once


def test_the_share_of_turned_is_counted_token_by_token(monkeypatch):
    torch.manual_seed(0)
    features = torch.randn(8 * 3, 5, 2, 2)                  # 8 positions of 3 photos
    monkeypatch.setattr(copies, "cached_features", lambda *_: features)
    backbone = SimpleNamespace(
        mean=torch.zeros(1), standardize=torch.clone, fit_statistics=len)
    turned = 0
    for i in range(3):
        for token in features[i].flatten(1).T:
            nearest = None
            for number, image in enumerate(features):
                for other in image.flatten(1).T:
                    distance = float((other - token).norm())
                    if number % 3 != i and (nearest is None or distance < nearest[0]):
                        nearest = distance, number >= 3
            turned += nearest[1]
    photos = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    assert copies.share_of_turned(photos, "a", backbone) == pytest.approx(turned / 12)


def test_a_photo_s_moved_copies_do_not_depend_on_the_other_photos():
    photos = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    copied = copies.moved_at_random(photos, 0)
    assert copies.moved_at_random(photos.flip(0)[:2], 0).equal(copied.flip(0)[:2])
    assert not copies.moved_at_random(photos, 1).equal(copied)


def test_a_step_is_stood_while_at_most_a_fifth_of_the_photos_exceed_the_threshold(
        monkeypatch):
    photos = torch.full((10, 3, 8, 8), 100, dtype=torch.uint8)
    photos[:2] = 130                                        # two are always above

    def scores_of(images):  # by how much the light changed
        return (images.float().mean((1, 2, 3)) - 100).abs()
    monkeypatch.setattr(copies, "STEPS", ALL_STEPS)
    stood = copies.tolerated_moves(scores_of, 12, photos)
    assert stood["shift"] == 4 / 256 and stood["degrees"] == 4
    assert stood["darker"] == 0.1 and stood["brighter"] == 0.1
    words = copies.moves_in_words(stood, 10)
    assert "moves by 1.6 % of the picture or turns by 4 degrees" in words
    assert "the light is 10 % darker or 10 % brighter" in words
    words = copies.moves_in_words(dict(stood, shift=0, brighter=0), 10)
    assert "moves by less than 0.39 % of the picture or turns by 4 degrees" in words
    assert "10 % darker or less than 5 % brighter" in words

    # Nothing but the photos as they are is stood, or not even they.
    def changed(images):
        return torch.full((10,), float(not images.equal(photos)))
    ramp = torch.arange(8).mul(20).expand(10, 3, 8, 8).contiguous()
    photos = ramp + torch.arange(8)[:, None]
    photos = photos.byte()
    words = copies.moves_in_words(copies.tolerated_moves(changed, 0.5, photos), 10)
    assert "a fifth exceed the threshold if the camera moves by 0.4 %" in words

    # With many false alarms allowed, the photos exceed it as they are.
    make_photos()
    text = call(learn.main, "good --false-alarms .9")
    assert "more than a fifth exceed the threshold as they are" in text


def test_a_single_photo_sets_no_threshold_and_learning_says_what_is_missing():
    make_photos(count=1)
    expected = "a single photo of good cannot set a threshold"
    assert expected in call(learn.main, "good", 2)
    make_photos("set/a/train/good", count=1)                # nor that of one kind
    make_photos("set/b/train/good", count=3)
    assert "a single photo of a cannot" in call(learn.main, "set", 2)


@pytest.mark.parametrize("count", (2, 5, 19))
def test_of_few_photos_it_is_said_what_their_threshold_can_promise(count):
    make_photos(count=count)
    text = call(learn.main, "good")
    if count == 19:
        assert "About 5 % of new good parts will exceed it" in text
    else:
        share = f"{100 / (count + 1):.2g} %"
        assert f"about {share} of new good parts may exceed it" in text
        assert "photos of at least 19 different parts are needed" in text
    assert f"by {count} good photos" in judged("runs/good good")


def test_near_copies_count_as_one_photo_in_what_a_threshold_promises():
    assert "(It was set by 40 good photos.)" in judge.promise(40, 0.05, 40)
    text = judge.promise(40, 0.05, 30)
    assert "About 5 % of new good parts will exceed it, or more. (It was set by 40 " \
           "good photos that show about 30 different parts.)" == text
    text = judge.promise(40, 0.05, 4)
    assert "5 %: about 20 % of new good parts may exceed it, or" in text
    assert "at least 19 different parts" in text
    # Nothing is added where no photo was compared with its near-copies.
    assert "may exceed it. For" in judge.promise(40, 0.05, 4, apart=True)

    for number in range(24):                                # 8 shots of each of 3 parts
        save(part(number // 8).point(lambda v: v + number % 8), f"burst/{number}.png")
    for model in ("nearest", "pca"):
        text = call(learn.main, f"burst --model {model} --out {model}")
        run = ev.load_run(model)[0]
        photos = run["calibration"]["images"]["burst"]
        expected = judge.promise(photos, 0.05, 3, apart=model == "nearest")
        assert expected in text and expected in judged(f"{model} burst/0.png")


def test_the_features_kept_are_those_used_last_and_never_more_than_the_limit(
        learned_once, monkeypatch):
    take(learned_once, "nearest")
    files = sorted(Path("runs/features").iterdir())
    for age, path in enumerate(files):
        os.utime(path, (1e9 - age, 1e9 - age))
    os.utime(files[-1], (1e9 + 1, 0))                       # read last, written first
    each = files[0].stat().st_size
    assert all(path.stat().st_size == each for path in files)
    monkeypatch.setattr(learn, "FEATURES_LIMIT", 10 * each + 1)
    assert learn.prune_features(Path("runs/features")) == 10 * each
    assert sorted(Path("runs/features").iterdir()) == files[:9] + files[-1:]
    text = call(learn.main, "good --again")
    assert len(list(Path("runs/features").iterdir())) == 10
    assert "Features of photos are kept in runs/features (" in text


def test_learning_again_takes_in_new_photos_and_says_what_has_changed(learned_once):
    take(learned_once, "nearest")
    stamp = learn.stamp_of(Path("runs/good"))
    assert "Nothing is new" in call(learn.main, "good")
    assert learn.stamp_of(Path("runs/good")) == stamp
    make_photos(count=3, start=50)
    Path("good/001.png").unlink()
    text = call(learn.main, "good")
    assert "3 new (050.png, 051.png, 052.png), 1 gone (001.png)" in text
    assert re.search(r"The threshold of good was \S+ and is \S+ now", text)
    assert learn.stamp_of(Path("runs/good")) != stamp
    Path("runs/good/model.pt").write_bytes(b"no run")
    assert "--again to replace it" in call(learn.main, "good", 2)
    call(learn.main, "good --again")


def test_learning_again_keeps_the_options_that_were_given_the_last_time():
    make_photos()
    call(learn.main, "good --model pca --false-alarms .2")
    make_photos(count=2, start=50)
    text = call(learn.main, "good")
    assert "As the last time: --false-alarms 0.2 --model pca." in text
    assert "About 20 % of new good parts" in text and "another model" not in text
    assert "Nothing is new" in call(learn.main, "good")
    record = json.loads(Path("runs/good/run.json").read_text())
    assert record["config"]["out"] == "runs/good"
    assert (record["config"]["model"], record["config"]["fpr"]) == ("pca", 0.2)
    # What is given anew counts. With another model the model's own options are left.
    assert "As the last time" not in call(
        learn.main, "good --model pca --false-alarms .3")
    text = call(learn.main, "good --model nearest")
    assert "As the last time: --false-alarms 0.3." in text
    # A run of another folder of this name is replaced with all of its options.
    make_photos("other/good", start=100)
    assert "As the last time" not in call(learn.main, "other/good --again")


def test_new_photos_to_test_by_are_learning_s_business_too():
    make_set("bolt")
    call(learn.main, "set --model pca")
    assert "Nothing is new" in call(learn.main, "set --model pca")
    part(77, defect=True).save("set/bolt/test/hole/new.png")
    text = call(learn.main, "set --model pca")
    assert "Nothing is new" not in text and "4 good and 5 defective" in text
    assert "keeps features" in call(learn.main, "set --out runs/features", 2)
    assert "such as .05 for 5 %" in call(learn.main, "set --false-alarms 5", 2)


def test_few_photos_of_two_kinds_set_one_threshold_and_that_is_said():
    for kind in "ab":
        make_photos(f"set/{kind}/train/good", count=12, start=40 * (kind == "b"))
    text = call(learn.main, "set")
    assert text.count("by 24 good photos of all kinds") == 2
    assert text.count("of new good parts, of all kinds together, will exceed it") == 2
    assert "by 24 good photos of all kinds" in judged("runs/set set/a --no-page")


def test_a_run_is_replaced_by_a_complete_one_and_by_one_learning_only(
        learned_once, monkeypatch):
    take(learned_once, "pca")
    before = Path("runs/good/model.pt").read_bytes()
    Path("runs/good/mine.txt").touch()

    def run(config, **options):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(train, "run", run)
        text = call(learn.main, "good --model pca --again", 130)
        assert "nothing was replaced" in text
    assert Path("runs/good/model.pt").read_bytes() == before
    assert sorted(os.listdir("runs/good")) == [
        "learned.html", "mine.txt", "model.pt", "run.json"]

    original, others = train.run, []

    def run_with_another(config, **options):
        if not others:  # another learning begins and ends first
            others.append(True)
            call(learn.main, "good --model pca --again")
        return original(config, **options)
    monkeypatch.setattr(train, "run", run_with_another)
    text = call(learn.main, "good --model pca --again", 2)
    assert "another learning has written" in text
    ev.load_run("runs/good")
    assert not list(Path("runs/good").glob(".learning*"))


def test_an_interrupted_training_replaces_no_run(learned_once, monkeypatch):
    take(learned_once, "pca")
    before, original, epochs = Path("runs/good/model.pt").read_bytes(), train.fit, []

    def fit(*arguments, after_epoch, **options):
        def stop_after_two(*of_epoch):
            after_epoch(*of_epoch)
            epochs.append(of_epoch)
            if len(epochs) == 2:
                raise KeyboardInterrupt
        return original(*arguments, after_epoch=stop_after_two, **options)
    monkeypatch.setattr(train, "fit", fit)
    text = call(learn.main, "good --model ae", 130)
    assert len(epochs) == 2 and "nothing was replaced" in text
    assert Path("runs/good/model.pt").read_bytes() == before


def test_any_model_learns_photos_and_a_run_of_train_py_is_not_replaced():
    make_photos(count=30)
    small = {key: SMALL[key] for key in ("backbone", "backbone_weights", "image_size")}
    for model, given in (("pca", {}), ("ae", {"epochs": 2}),
                         ("mlp", small | {"epochs": 2, "width": 64})):
        said(learn.learn, "good", f"runs/{model}", model=model, **given)
        verdict = Judge(f"runs/{model}")("good/000.png")
        assert verdict.threshold is not None and np.isfinite(verdict.score)
    call(train.main, "--model pca --out digits")
    text = call(learn.main, "good --model pca --out digits", 2)
    assert "holds a run of train.py" in text


def test_a_run_is_not_replaced_by_another_folder_of_the_same_name():
    make_photos("a/good")
    make_photos("b/good", start=100)
    call(learn.main, "a/good --model pca")
    before = Path("runs/good/model.pt").read_bytes()
    text = call(learn.main, "b/good --model pca", 2)
    assert "has learned other photos, of a/good" in text
    assert Path("runs/good/model.pt").read_bytes() == before
    call(learn.main, "b/good --model pca --again")


def test_features_are_computed_of_new_photos_alone(learned_once, monkeypatch):
    take(learned_once, "nearest")
    computed, original = [], data.compute_features

    def compute(backbone, images, name):
        computed.append(len(images))
        return original(backbone, images, name)
    monkeypatch.setattr(data, "compute_features", compute)
    make_photos(count=2, start=90)                          # last by their names
    text = call(learn.main, "good")
    assert sum(computed) == 2 * 2  # each, and one moved copy of it
    size = sum(path.stat().st_size for path in Path("runs/features").iterdir())
    assert (f"Features of photos are kept in runs/features ({size / 2 ** 20:,.0f} MB, "
            "at most 1,024 MB)") in text


def test_where_features_cannot_be_kept_learning_goes_on(monkeypatch):
    make_photos(count=8)
    Path("file").touch()
    for module in (ev, copies.ev):
        monkeypatch.setattr(module, "FEATURE_CACHE", "file/features")
    text = call(learn.main, "good")
    assert "features are not kept for the next run" in text and "Threshold" in text


# ---- judging ----

def test_a_verdict_is_the_model_s_score_by_the_run_s_threshold_and_all_doors_agree(
        learned_once):
    take(learned_once, "nearest")
    state, model = ev.load_run("runs/good")
    c, calibration = state["config"], ev.Calibration(**state["calibration"])
    backbone = ev.open_backbone(c, state=state)
    ours = Judge("runs/good")
    for seed, defect in ((500, False), (501, True)):
        image = part(seed, defect)
        image.save("new.png")
        pixels = read_photo("new.png", 64).pixels[None]
        errors = ev.error_maps(model, backbone(data.to_float(pixels)), lambda x: x)
        above = ev.standardize(errors, calibration.statistics["good"])
        count = max(1, round(0.025 * above[0].numel()))
        score = float(above.flatten().topk(count).values.mean())
        verdicts = [ours("new.png"), ours(Path("new.png")), ours(image),
                    ours(np.asarray(image)), ours([image, image])[1]]
        for verdict in verdicts:
            assert verdict.score == pytest.approx(score, abs=1e-3)
            assert verdict.threshold == calibration.thresholds["good"]
            assert verdict.kind == "good"
            assert verdict.anomalous == (score > verdict.threshold) == defect
            whole = ev.heat_maps(above, 64)[0].numpy()
            np.testing.assert_allclose(verdict.heat_map * verdict.threshold, whole,
                                       rtol=1e-3, atol=1e-3)
            row, column = np.unravel_index(whole.argmax(), whole.shape)
            peak = (column + 0.5) / 64, (row + 0.5) / 64
            assert (verdict.peak_x, verdict.peak_y) == peak


def test_the_exit_status_tells_verdicts_from_each_other_and_from_a_crash():
    make_photos()
    save(part(500, defect=True), "new/bad.png")
    Path("empty.png").touch()
    call(learn.main, "good --model pca --false-alarms .1")
    text = call(judge.main, "runs/good good/000.png good/001.png --threshold 1e9", 0)
    assert "2 photos: 0 anomalous, 2 normal" in text and "anomalous  " not in text
    text = call(judge.main, "runs/good good/000.png new", 10)
    assert "anomalous  new/bad.png" in text
    files = "new/bad.png empty.png good/000.png"
    text = call(judge.main, f"runs/good {files} --threshold 1e9 --all", 2)
    assert text.count("normal     ") == 2 and "empty.png cannot be read" in text
    assert "1 could not be read" in text
    rows = table_of(text)[0]
    assert [row["verdict"] for row in rows] == ["normal", "not read", "normal"]
    call(judge.main, "nowhere good", 2)
    call(judge.main, "runs/good", 2)
    assert "no images" in call(judge.main, "runs/good runs", 2)
    broken = Path("broken/torch/__init__.py")
    broken.parent.mkdir(parents=True)
    broken.write_text("raise ModuleNotFoundError(\"No module named 'torch'\")\n")
    done = subprocess.run(
        [sys.executable, ROOT / "photos/judge.py", "runs/good", "good"],
        env={**os.environ, "PYTHONPATH": "broken"}, capture_output=True)
    assert done.returncode not in (judge.NORMAL, judge.ANOMALOUS, judge.NO_VERDICT)


def test_judging_says_which_photos_were_learned_and_refuses_names_that_are_not_there(
        learned_once):
    take(learned_once, "nearest")
    learned, *_ = sorted(Path("good").iterdir())
    part(999).save("new.png")
    text = judged(f"runs/good {learned} new.png gone.png")
    assert f"as good, their scores are too low: {learned}" in text
    assert "no such file or folder: gone.png" in text and "1 could not be read" in text
    assert "as good, their" not in judged("runs/good new.png")
    assert "no such file or folder: gone" in call(judge.main, "runs/good gone", 2)
    assert "no such folder: gone" in call(learn.main, "gone", 2)


def test_the_threshold_is_the_user_s_without_learning_again(learned_once):
    take(learned_once, "nearest")
    scores = ev.load_run("runs/good")[0]["calibration"]["scores"]["good"]
    assert len(scores) == 2 * 24  # each photo and its moved copy
    for fpr in (0.05, 0.2, 0.5):
        ours = Judge("runs/good", false_alarms=fpr)
        assert ours.thresholds["good"] == ev.threshold(scores, fpr)
        assert f"About {100 * fpr:.2g} % of new good parts" in ours.promise("good")
    ours = Judge("runs/good", false_alarms=0.01)
    assert "too few to promise 1 %: about 4 %" in ours.promise("good")
    middle = float(scores.median())
    assert Judge("runs/good", threshold=middle).thresholds["good"] == middle
    text = call(judge.main, f"runs/good good/000.png --threshold {middle - 1e9}", 10)
    assert "24 of the 24 good photos" in text
    assert "false alarms 7" in call(judge.main, "runs/good good --false-alarms 7", 2)


def test_learning_prints_what_each_threshold_would_find_of_the_defects():
    make_set("bolt")
    text = call(learn.main, "set")
    state = ev.load_run("runs/set")[0]
    ours = Judge("runs/set")
    good = [v.score for v in ours(sorted(Path("set/bolt/test/good").iterdir()))]
    bad = [v.score for v in ours(sorted(Path("set/bolt/test/hole").iterdir()))]
    for fpr in (0.2, 0.1, 0.05):
        limit = ev.threshold(state["calibration"]["scores"]["bolt"], fpr)
        alarms, found = (sum(s > limit for s in scores) for scores in (good, bad))
        row = [f"{fpr:g}", f"{limit:.4g}", f"{alarms} of 4", f"{found} of 4"]
        assert re.search(" +".join(map(re.escape, row)), text), (row, text)
    assert not re.search(r"\n +1 %", text)  # 20 photos cannot promise it


def test_a_kind_that_is_not_given_is_told_from_the_photo():
    make_set("bolt", "nut 3", count=10)
    text = call(learn.main, "set")
    assert "rightly for 20 of 20" in text
    ours = Judge("runs/set")
    for kind in ("bolt", "nut 3"):
        verdicts = ours(sorted(Path(f"set/{kind}/test/good").glob("*.png")))
        assert [v.kind for v in verdicts] == [kind] * 4
    image = "set/bolt/test/good/000.png"
    assert ours(image, kind="nut 3").kind == "nut 3"
    assert Judge("runs/set", kind="nut 3")(image).kind == "nut 3"
    assert "learned bolt, nut 3" in call(judge.main, f"runs/set {image} --kind nut", 2)
    status = 10 if ours(image, kind="nut 3").anomalous else 0
    text = call(judge.main, f"runs/set {image} --all --kind 'nut 3'", status)
    assert "as nut 3" in text


def test_models_that_set_photos_aside_tell_kinds_too():
    make_set("bolt", "nut 3")
    assert "rightly for 40 of 40" in call(learn.main, "set --model pca")
    learned = ev.load_run("runs/set")[0]["photos"]
    assert len(learned["looks"]) == len(learned["kinds"]) == 40
    for kind in ("bolt", "nut 3"):
        verdicts = Judge("runs/set")(sorted(Path(f"set/{kind}/test/good").iterdir()))
        assert [verdict.kind for verdict in verdicts] == [kind] * 4


def test_the_nearest_look_is_measured_by_how_far_photos_of_one_kind_differ():
    torch.manual_seed(0)
    learned, looks = torch.randn(20, 6), torch.randn(5, 6)
    learned[:, 0], looks[:, 0] = 7.0, 7.0                   # the same in all
    kinds = ["a"] * 5 + ["b"] * 15
    learned[:5, 1] += 30                                    # kind a is known by this
    variances = [learned[:5].var(0, correction=0), learned[5:].var(0, correction=0)]
    width = (variances[0] / 4 + variances[1] * 3 / 4).sqrt()
    width = width + 0.05 * width.mean() + 1e-6
    for look, found in zip(looks, alike.nearest_look(looks, learned, kinds)):
        distances = [float(((look - other) / width).norm()) for other in learned]
        assert found == int(np.argmin(distances))
    assert alike.nearest_look(learned, learned, kinds) == list(range(20))
    others = alike.nearest_look(learned, learned, kinds, leave_out=True)
    assert all(i != other for i, other in enumerate(others))
    assert [kinds[i] for i in others] == kinds


def test_the_peak_lies_at_what_made_a_photo_anomalous_not_where_parts_differ_anyhow():
    def photo(seed, defect):
        draw = np.random.default_rng(seed)
        pixels = np.full((64, 64, 3), 90.0)
        # In one corner the parts differ anyhow, as where each has a number.
        pixels[:24, :24] = draw.uniform(0, 255, (24, 24, 1))
        pixels += draw.normal(0, 2, pixels.shape)
        if defect:
            pixels[44:52, 44:52] += 120
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    for i in range(20):
        save(photo(i, False), f"good/{i}.png")
    for model in ("pca", "nearest"):
        call(learn.main, f"good --out {model} --model {model} --image-size 96 --again")
        for verdict in Judge(model)([photo(500 + i, True) for i in range(4)]):
            assert verdict.anomalous
            assert abs(verdict.peak_x - 0.73) < 0.2 and abs(verdict.peak_y - 0.73) < 0.2


def test_a_call_leaves_a_folder_of_its_own_and_its_pictures_are_no_input():
    make_photos(count=22)
    make_photos("new", 3)
    call(learn.main, "good --model pca --out new/run")
    for i in range(2):
        save(part(i), f"new/run/judged/mine{i}.png")
    texts = [judged("new/run new")
             for _ in range(2)]
    folders = [table_of(text)[1] for text in texts]
    assert folders[0] != folders[1]
    for text, folder in zip(texts, folders):
        assert "5 photos: " in text and len(table_of(text)[0]) == 5
        assert len(list((folder / "pictures").iterdir())) == 10
    assert "2 photos" in judged("new/run new/run/judged")
    assert sorted(path.name for path in Path("new/run/judged").glob("*.png")) == [
        "mine0.png", "mine1.png"]
    assert "and not empty" in call(judge.main, "new/run new --out new", 2)
    judged("new/run new --out mine")
    assert {"judged.csv", "judged.html", "pictures"} == {*os.listdir("mine")}
    assert "mine/judged.html" in Path("new/run/judged.html").read_text()


def test_a_run_that_cannot_be_written_is_judged_by_all_the_same(
        learned_once, monkeypatch):
    take(learned_once, "pca")
    mkdir = Path.mkdir

    def refuse(path, *arguments, **options):
        if "judged" in str(path):
            raise PermissionError(f"read-only: {path}")
        return mkdir(path, *arguments, **options)
    monkeypatch.setattr(Path, "mkdir", refuse)
    text = call(judge.main, "runs/good good/000.png --threshold 1e9 --all")
    assert "no table and no page are written" in text
    assert "normal     good/000.png" in text
    call(judge.main, "runs/good good/000.png --threshold 1e9 --out elsewhere")


def test_photos_of_any_shape_are_judged_and_shown(learned_once):
    take(learned_once, "pca")
    for shape in ((1, 1), (1, 3000), (3000, 1), (2, 2)):
        save(Image.new("RGB", shape, (90, 90, 90)), f"new/{shape}.png")
    rows, folder = table_of(judged("runs/good new --threshold 1e9"))
    assert [row["verdict"] for row in rows] == ["normal"] * 4
    assert all(math.isfinite(float(row["score"])) for row in rows)
    assert len(list((folder / "pictures").iterdir())) == 8


def test_the_way_to_the_latest_page_holds_for_any_name_and_a_read_only_run():
    Path("run").mkdir()
    judge.lead_to_latest(Path("run/50% off"), "run")
    assert 'href="50%25%20off/judged.html"' in Path("run/judged.html").read_text()
    judge.lead_to_latest(Path("new"), "not/there")          # nothing can be written


def test_no_table_and_no_page_are_named_that_are_not_there(learned_once, monkeypatch):
    take(learned_once, "pca")
    for option in ("", "--no-page"):
        shutil.copytree("runs/good", "run")

        def delete(*arguments):
            shutil.rmtree("run")
            return []
        monkeypatch.setattr(judge, "differences", delete)   # after the last photo
        text = call(judge.main, f"run good --threshold 1e9 {option}", 2)
        assert "24 photos: 0 anomalous, 24 normal" in text
        assert "table: " not in text and "page: " not in text
        assert "table and page are not complete: " in text


def test_a_score_or_a_threshold_that_is_no_number_is_never_normal(learned_once):
    take(learned_once, "pca")
    text = call(judge.main, "runs/good good --threshold nan", 2)
    assert "threshold nan: expected a number" in text
    call(judge.main, "runs/good good --threshold inf", 2)
    text = call(judge.main, "runs/good good --threshold 3 --false-alarms .1", 2)
    assert "not both" in text
    ours = Judge("runs/good")
    errors = torch.zeros(64, 64)
    assert ours.verdict("", "good", math.nan, errors).word == "anomalous"
    assert ours.verdict("", "good", ours.thresholds["good"], errors).word == "normal"


def test_after_an_interruption_what_was_judged_is_in_the_table(
        learned_once, monkeypatch):
    take(learned_once, "pca")
    original, calls = Judge.judge, []

    def stop_at_the_second_batch(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)
    monkeypatch.setattr(Judge, "judge", stop_at_the_second_batch)
    text = call(judge.main, "runs/good good", 130)
    rows, folder = table_of(text)
    assert len(rows) == 8 and "broken off after 8 of 24 photos" in text
    assert "broken off" in (folder / "judged.html").read_text()
    assert (folder / "judged.html").read_text().count("<figure") == 8


def test_a_run_may_be_copied_and_one_of_train_py_judges_images_too(learned_once):
    take(learned_once, "pca")
    shutil.copytree("runs/good", "elsewhere")
    scores = [Judge(run)("good/000.png").score for run in ("elsewhere", "runs/good")]
    assert scores[0] == scores[1]
    call(train.main, "--model pca --out digits")
    verdict = Judge("digits")(np.zeros((8, 8), np.uint8))
    assert verdict.kind == "0" and verdict.heat_map.shape == (32, 32)


def test_names_in_any_script_are_learned_judged_and_shown():
    for i, name in enumerate(("\u56fe\u50cf", "a\nb", "<b>&amp;", "\udcff")):
        for j in range(5):
            save(part(10 * i + j), f"\u56fe/{name}{j}.png")
    for main, command in ((learn.main, "\u56fe --model pca"),
                          (judge.main, "runs/\u56fe \u56fe --all --threshold 1e9")):
        console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")  # it has no Chinese
        with contextlib.redirect_stdout(console), contextlib.redirect_stderr(console):
            with pytest.raises(SystemExit) as stop:
                main(shlex.split(command))
        console.flush()
        text = console.buffer.getvalue().decode("cp1252")
        assert stop.value.code == 0, text
    rows, folder = table_of(text.encode().decode("unicode_escape"))
    assert len(rows) == 20
    html = (folder / "judged.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;&amp;amp;0.png" in html


# ---- the page ----

def test_a_heat_map_is_clear_where_it_is_low_and_never_hides_the_photo():
    picture = Image.new("RGB", (40, 20), (10, 200, 30))
    same = np.asarray(page.lay_over(picture, np.zeros((8, 8))))
    assert (same == (10, 200, 30)).all()
    heat = np.zeros((8, 8))
    heat[:, 4:] = 5
    laid = np.asarray(page.lay_over(picture, heat))
    assert laid.shape == (20, 40, 3) and (laid[:, :10] == (10, 200, 30)).all()
    yellow = 255 * np.array((0.988, 0.998, 0.645))          # the end of "inferno"
    brightest = 0.3 * np.array((10, 200, 30)) + 0.7 * yellow
    assert np.abs(laid[:, -5:] - brightest).max() < 2


def test_the_page_shows_the_worst_first_and_its_filter_works_in_a_browser():
    tags = [("normal",), ("normal",), ("normal", "doubtful")] + [("anomalous",)] * 3
    rows = [page.Row(f"{i}.png", "", "", i / 2, f"score {i}", tags[i])
            for i in range(6)]
    page.write_page("page.html", "six", ["a < b"], rows)
    text = Path("page.html").read_text()
    places = [text.index(f"<b>{i}.png") for i in range(6)]
    assert places == sorted(places, reverse=True) and "a &lt; b" in text
    browsers = map(shutil.which, ("chromium", "google-chrome", "chrome"))
    browser = next(filter(None, browsers), None)
    if browser is None:
        pytest.skip("no browser is here to open the page with")
    # It is opened at #anomalous. Then a script follows the other buttons.
    Path("page.html").write_text(text + """<script>
        const shown = () => document.querySelectorAll("figure:not([hidden])").length;
        const counts = [shown()];
        const links = [...document.querySelectorAll("nav a")];
        addEventListener("hashchange", () => {
          counts.push(location.hash + " " + shown());
          document.title = "shown: " + counts;
          if (links.length) links.shift().click();
        });
        links.shift();
        links.shift().click();
        </script>""")
    address = Path("page.html").resolve().as_uri() + "#anomalous"
    dom = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
         "--virtual-time-budget=5000", address], capture_output=True, text=True).stdout
    assert len(re.findall("<figure [^>]*>", dom)) == 6
    assert "<title>shown: 3,#doubtful 1,#normal 3,#all 6</title>" in dom


# ---- README.md ----

def python_blocks():
    text = (ROOT / "photos/README.md").read_text(encoding="utf-8")
    return re.findall("```python\n(.*?)```", text, re.DOTALL)


def test_the_examples_of_the_readme_run():
    make_photos("my_images")
    save(part(500, defect=True), "new_images/000.png")
    call(learn.main, "my_images --model pca")
    short, server = python_blocks()
    assert len(short.splitlines()) <= 12 and len(server.splitlines()) < 30
    output = said(exec, short, {})[1]
    assert output.startswith("True") and "(64, 64)" in output

    start = 'HTTPServer(("127.0.0.1", 8000), Inspector).serve_forever()\n'
    assert server.endswith(start)
    names = {}
    exec(server.removesuffix(start), names)
    service = names["HTTPServer"](("127.0.0.1", 0), names["Inspector"])
    names["Inspector"].log_message = lambda *_: None
    bomb = io.BytesIO()
    Image.new("1", (2 ** 15, 2 ** 14)).save(bomb, "PNG")    # too large to be read
    for body, status, words in ((Path("new_images/000.png").read_bytes(), 200, b"true"),
                                (b"no photo", 400, b"cannot be read"),
                                (b"", 400, b"cannot be read"),
                                (bomb.getvalue(), 400, b"Make it smaller")):
        threading.Thread(target=service.handle_request).start()
        url = f"http://127.0.0.1:{service.server_port}"
        try:
            request = urllib.request.Request(url, body)
            reply = urllib.request.urlopen(request, timeout=20)
        except urllib.error.HTTPError as error:
            reply = error
        assert reply.status == status and words in reply.read()
    service.server_close()


def test_each_command_of_the_readme_is_understood():
    text = (ROOT / "photos/README.md").read_text(encoding="utf-8")
    lines = re.findall(r"python photos/(learn|judge)\.py ([^`#\n]*)", text)
    assert len(lines) >= 4
    for name, command in lines:
        {"learn": learn, "judge": judge}[name].parser().parse_args(shlex.split(command))
