"""What commands do with wrong input, and claims too small for test_all.py's room."""
import itertools
import math
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # the repository's folder
import autoencoder
import data
import evaluate as ev
import figures
import landscape
import train
import uniad
from data import to_float
from lamp_loss import OPTIMIZERS, lamp, take_step
from test_all import (FOLDER, TINY, call, close, make_folder, seeded_and_in_an_empty_folder,
                      trained)


def test_malformed_commands_end_with_status_2_never_a_traceback():
    options = re.findall(r"--[a-z-]+", call(train.main, "--help"))
    values = ["", "-1", "nan", "inf", "1e99", "0", "../../x", "é", "--", "a,b", "None", "1,,2"]
    draw = np.random.default_rng(0)
    for _ in range(150):
        words = [draw.choice(part) for part in (options, values) * 2]
        call(train.main, shlex.join(["--epochs", "0", *words]), 0, 2)


def test_a_run_that_cannot_be_written_to_still_gives_its_verdicts():
    folder = make_folder("bolt") / "bolt/test/hole"
    call(train.main, FOLDER)
    call(ev.main, f"run --image {folder}", 0, 1)
    assert Path("run/judged.csv").read_text().count("\n") == 5
    shutil.rmtree("run/judged")
    Path("run/judged").touch()                              # no folder can be made there
    text = call(ev.main, f"run --image {folder}", 0, 1)
    assert "no CSV and no pictures" in text and text.count(", score ") == 4
    text = call(ev.main, f"run --image {folder} --category nut", 2)
    assert "knows bolt" in text


def test_a_run_cut_short_or_that_failed_at_once_is_not_judged_and_blocks_no_other(monkeypatch):
    take_step = train.take_step

    def interrupted(*arguments):
        if "epoch 2" in arguments[-1]:
            raise OSError("as if killed")
        take_step(*arguments)
    monkeypatch.setattr(train, "take_step", interrupted)
    assert "as if killed" in call(train.main, f"{TINY} --epochs 3 --out run", 2)
    for text in (call(ev.main, "run", 2), call(landscape.main, "run", 2)):
        assert "its training was cut short" in text
    monkeypatch.setattr(train, "take_step", take_step)
    call(train.main, f"{TINY} --epochs 3 --out run --resume")
    assert "image_auroc" in call(ev.main, "run")
    assert "divides" in call(train.main, f"{TINY} --patches 3 --epochs 1 --out other", 2)
    call(train.main, f"{TINY} --epochs 1 --out other")
    assert "no normal images" in call(
        train.main, "--dataset folder --data-dir nowhere --out other --overwrite", 2)
    assert Path("other/run.json").exists()                  # what failed has replaced nothing


def test_ctrl_c_before_the_first_epoch_has_ended_judges_nothing(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "take_step", interrupted)
    assert "interrupted" in call(train.main, f"{TINY} --epochs 1 --out run", 130)
    assert not Path("run/run.json").exists() and "cut short" in call(ev.main, "run", 2)


def test_categories_called_masks_are_found_and_those_without_normals_named(capsys):
    make_folder("masks")
    shutil.copytree("set/masks/test", "set/nut/test")
    d = data.load("folder", "all", "set", 8)
    assert {*d.categories} == {"masks"} and len(d.train) == 20 and len(d.test) == 8
    assert "1 categories without normal images to train on (train/good), left out: nut" in (
        capsys.readouterr().out)


def test_two_normals_give_scores_of_a_size_and_a_score_of_any_fpr_is_promised():
    assert autoencoder.left_out_scores(torch.rand(2, 8, 8)).abs().max() < 9
    assert "about 0.5% of new" in autoencoder.promise(1000, 0.005)


def test_a_file_name_of_bytes_that_are_no_text_is_judged_and_written():
    make_folder("bolt")
    call(train.main, FOLDER)
    image = Path("set/bolt/test/hole/000.png")
    for name in (b"caf\xe9.png", b"x" * 240 + b".png"):
        shutil.copy(image, "new" + os.fsdecode(name))
        text = call(ev.main, "run --image new" + os.fsdecode(name), 0, 1)
        assert ", score " in text and len(list(Path("run/judged").iterdir())) == 1


def test_ctrl_c_ends_evaluate_py_with_status_130(monkeypatch):
    call(train.main, f"{TINY} --epochs 1 --out run")

    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(ev, "judge", interrupted)
    assert "interrupted" in call(ev.main, "run", 130)


@pytest.mark.parametrize("content", (b"", b"PK garbage"))
def test_a_damaged_run_is_named(content):
    Path("model.pt").write_bytes(content)
    assert "damaged" in call(ev.main, ".", 2) and "damaged" in call(landscape.main, ".", 2)


def test_a_masked_token_cannot_reach_its_neighbors_within_one_layer():
    mask, token = uniad.neighbor_mask(6, 6, 3), 2 * 6 + 3
    x = torch.randn(1, 36, 8, requires_grad=True)
    y = uniad.Attention(8, 2, mask)(torch.randn(1, 36, 8), x, x)
    seen, near = torch.autograd.grad(y[0, token].sum(), x)[0][0], mask[token] < 0
    assert near.sum() == 9 and not seen[near].any() and seen[~near].abs().sum(1).min() > 0


def test_average_precision_is_the_mean_precision_at_each_anomaly():
    scores, labels = torch.rand(30), torch.arange(30) % 3 == 0
    ranked = labels[scores.argsort(descending=True)].double()
    precision = ranked.cumsum(0) / torch.arange(1, 31)
    close(ev.average_precision(scores, labels), (precision * ranked).sum() / ranked.sum())


def test_amplifying_a_score_changes_no_auroc():
    scores, labels = torch.rand(60).round(decimals=1), torch.arange(60) % 3 == 0
    close(ev.auroc(lamp(scores[None])[0], labels), ev.auroc(scores, labels))


def test_each_token_is_drawn_as_the_patch_of_its_nearest_token():
    bank, patches = torch.randn(3, 5, 2, 2), torch.rand(3, 3, 32, 32)
    close(uniad.draw_tokens(bank[[2, 0]] + 1e-3, bank, patches), patches[[2, 0]])


def test_each_query_switch_is_what_it_says_and_noise_is_of_training_alone():
    f = torch.randn(2, 6, 4, 4)
    for query, learned in (("layerwise", 3), ("first", 1), ("none", 0)):
        model = uniad.UniAD(6, 4, 8, 2, layers=3, hidden=8, neighbors=3, query=query)
        assert sum(layer.query is not None for layer in model.decoder) == learned
        assert not torch.equal(model(f), model(f)) and torch.equal(model.eval()(f), model(f))


def test_neighbors_that_hide_everything_are_refused_and_a_heat_map_meets_the_corners():
    with pytest.raises(ValueError, match="7x7"):
        uniad.neighbor_mask(7, 7, 13)
    errors = torch.rand(2, 3, 3)
    maps = ev.heat_maps(errors, 9)
    for i, j in itertools.product((0, -1), (0, -1)):
        close(maps[:, i, j], errors[:, i, j])
    expected = F.interpolate(errors[None], (9, 9), mode="bilinear", align_corners=True)[0]
    close(maps, expected)
    assert math.isclose(float(maps.max()), float(errors.max()), rel_tol=1e-6)


def test_untold_and_raw_auroc_are_of_the_least_standardized_score_and_of_the_plain_sum():
    make_folder()
    model, d, inputs, m = trained(FOLDER)
    normals, errors = (ev.error_maps(model, x, to_float) for x in (inputs.train, inputs.test))
    normals, blurred = (ev.gaussian_blur(e, 0.5) for e in (normals, errors))
    names = {name: ev.of_category(inputs.train_classes, name) for name in m["categories"]}
    z = [ev.standardize(blurred, ev.place_statistics(normals[mine])) for mine in names.values()]
    as_each = [of_one.flatten(1).sort(1).values[:, -26:].mean(1) for of_one in z]   # 2.5 %
    for key, scores in (("untold_auroc", torch.minimum(*as_each)),
                        ("raw_auroc", errors.sum((1, 2)))):
        found = []
        for name in names:
            mine = ev.of_category(d.categories, name)
            found.append(ev.auroc(scores[mine], d.labels[mine]))
        assert math.isclose(m[key], np.mean(found), abs_tol=1e-6)
    for label, key in enumerate(("normal_error", "anomaly_error")):
        close(torch.tensor(m[key]), errors.sum((1, 2))[d.labels == label].mean(), 1e-4)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_alone_makes_the_step_that_train_py_makes_with_it(name):
    alone, model = (uniad.UniAD(6, 4, 8, 2, 1, 16, neighbors=3) for _ in range(2))
    model.load_state_dict(alone.state_dict())
    weights = torch.randn(sum(p.numel() for p in model.parameters()))
    optims = [OPTIMIZERS[name](m, 0.01, 0.1) for m in (alone, model)]
    for _ in range(2):
        losses = [(torch.cat([p.flatten() for p in m.parameters()]) ** 2 * weights).sum()
                  for m in (alone, model)]
        optims[0].zero_grad()
        losses[0].backward()
        optims[0].step()
        take_step(model, optims[1], losses[1], 0.01, 0, "")
    for one, other in zip(alone.parameters(), model.parameters()):
        assert torch.equal(one, other)


def test_at_equal_training_error_lamp_is_compared_with_a_point_on_l2_s_curve(monkeypatch):
    plain = [(2, 4.0, 0.8), (4, 2.0, 0.7), (6, 1.0, 0.6)]   # epoch, training error, AUROC
    gain = figures.equal_error(plain, [(2, 9.0, 0.1), (4, 1.5, 0.75)])
    close(torch.tensor(gain), torch.tensor(0.1))
    for never in (4.5, 0.9):
        assert figures.equal_error(plain, [(2, never, 0.9)]) is None
    rows = [dict(batch_size=32, lamp=lamp, seed=1, category=3, normal=3, epoch=epoch,
                 base_error=error, image_auroc=auroc)
            for lamp, curve in ((0, plain), (1, [(2, 3.0, 0.7), (4, 2.5, 0.8), (6, 1.5, 0.75)]))
            for epoch, error, auroc in curve]
    unlike = [{**rows[0], "batch_size": 16}, {**rows[0], "seed": 0}]        # not in the figure
    monkeypatch.setattr(figures, "read", lambda name: [*rows, *unlike])
    text = call(figures.main, "copying z.png")
    assert "at equal training error: +0.1000, ahead on 1 of 1 digits" in text
    assert "name runs" in call(figures.main, "copying z.png run", 2)
