"""What the pages say: the experiments' CSV files, tables, figures, and all pages.

    python -m pytest results      from the repository's folder; each table is made anew
"""
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent
sys.path[:0] = [str(RESULTS.parent), str(RESULTS)]

import functools
import json

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

import choices
import data
import evaluate as ev
import evening
import experiments
import figures
import landscape
import levers
import pairs
import sixty
import steepness
import sweep
import tables
import train
import uniad
from autoencoder import ConvAutoencoder
from lamp_loss import ReconstructionLoss, lamp
from test_all import call, close, images, make_products, seeded_and_in_an_empty_folder
from train import OPTIMIZERS, take_step
from uniad import Backbone, UniAD

PAGES = sorted(RESULTS.glob("*.md"))
READMES = [RESULTS.parent / "README.md", RESULTS.parent / "photos/README.md"]
README = "\n".join(path.read_text() for path in (*READMES, *PAGES))


# ---- the runs, and the CSV files ----

@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_each_csv_holds_the_runs_of_its_experiment(name):
    runs, path = list(experiments.EXPERIMENTS[name]()), RESULTS / f"{name}.csv"
    columns = sweep.columns_of(runs)
    rows = sweep.read_csv(path)[1]
    keys = [(*sweep.key_of(row, columns), row["epoch"], row["category"])
            for row in rows]
    assert len(set(keys)) == len(keys)                      # no row twice
    made = {key[:-2] for key in keys}
    planned = {sweep.key_of(options, columns) for options in runs}
    assert made == planned
    words = sweep.read_csv(path)[0]                         # what all its runs share
    assert words == sweep.comment_of(runs, words)


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_each_run_of_an_experiment_is_a_config_that_train_py_takes(name):
    if name in experiments.RECORDED:
        pytest.skip("its rows were made by an earlier version, and are not made again")
    runs = list(experiments.EXPERIMENTS[name]())
    # One run of each kind: all runs would take seconds.
    kinds = {str({**options, "normal": 0, "seed": 0}): options for options in runs}
    for options in kinds.values():
        own = ("log", "lever")                              # of sweep.py, not train.py
        given = {key: value for key, value in options.items() if key not in own}
        config = train.with_defaults(given)
        assert given.items() <= config.items()
        assert options.get("lever") in (None, *levers.LEVERS)


def test_a_run_s_rows_are_those_of_its_run_json_with_pull_and_spread():
    make_products("bolt", "nut")
    options = dict(dataset="mvtec", model="pca", image_size=32, seed=0)
    places = {"data_dir": "data", "device": "cpu"}
    run = {**options, "components": 3}
    whole, *parts = sweep.make_run("table1", run, "run", places, True)[0]
    m = json.loads(Path("run/run.json").read_text())["metrics"]
    assert whole["image_auroc"] == m["image_auroc"]
    assert whole["pull"] and whole["spread"]
    assert [row["category"] for row in parts] == ["bolt", "nut"]
    assert all(row.items() >= m["categories"][row["category"]].items() for row in parts)
    assert whole["machine"] == train.machine_name("cpu")
    wrong = {**options, "components": -1}
    words = "ValueError.*components -1.*see lost/log.txt"
    with pytest.raises(RuntimeError, match=words):
        sweep.make_run("table1", wrong, "lost", places, True)


TWELVE_RUNS = f"""
import sys, time
sys.path.insert(0, {str(RESULTS)!r})
import sweep

def make_run(name, options, out, places, afresh):
    time.sleep(0.3)
    if options["seed"] == 1:
        raise RuntimeError("no good")
    metrics = dict(image_auroc=0.5 + options["seed"] / 16, categories=dict(zero=dict()))
    record = dict(history=[], metrics=metrics, seconds=0.2, versions=dict(machine="m"))
    return sweep.rows_of(record, {{}}), "made_with=this"

sweep.EXPERIMENTS["twelve"] = lambda: [
    dict(normal="0", seed=seed) for seed in range(12)]
sweep.make_run, sweep.RESULTS = make_run, sweep.Path.cwd()
if __name__ == "__main__":
    sweep.main(["twelve", *sys.argv[1:]])
"""


def test_the_seconds_of_a_row_are_those_of_all_epochs_so_far():
    history = [dict(epoch=1, seconds=2.5, image_auroc=0.5), dict(epoch=2, seconds=3.0),
               dict(epoch=3, seconds=4.0, image_auroc=0.6)]
    record = dict(history=history, seconds=20, versions=dict(machine="m"),
                  metrics=dict(image_auroc=0.7, categories=dict(nut={})))
    rows = sweep.rows_of(record, {})
    spent = [(row["epoch"], row["training_seconds"], row["seconds"]) for row in rows]
    assert spent == [(1, 2.5, None), (3, 9.5, 20)]


def test_a_sweep_goes_on_after_kill_9_and_ctrl_c_without_a_row_twice_or_lost():
    Path("twelve.py").write_text(TWELVE_RUNS)
    command, held = [sys.executable, "twelve.py", "--processes", "2"], []
    for sent, status in ((signal.SIGKILL, -9), (signal.SIGINT, 130)):
        # A shell that starts the tests in the background has Ctrl-C ignored.
        reset = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        with subprocess.Popen(command, stdout=-1, text=True,
                              preexec_fn=reset) as process:
            next(line for line in process.stdout if line.startswith("3 of"))
            process.send_signal(sent)
            assert process.wait(9) == status
        held.append(Path("twelve.csv").read_text())
    last = subprocess.run(command, capture_output=True, text=True)
    assert last.returncode == 2 and "seed=1  FAILED: no good" in last.stdout
    assert last.stderr == "1 runs failed\n"
    whole = Path("twelve.csv").read_text()
    assert held[0] < held[1] < whole
    assert whole.startswith(held[0]) and whole.startswith(held[1])
    seeds = [int(line.split(",")[0]) for line in whole.splitlines()[2:]]
    assert sorted(seeds) == [0, *range(2, 12)]
    only = [*command, "--only", "seed=3"]
    checked = subprocess.run(only, capture_output=True, text=True)
    assert re.search(r"image_auroc +0.6875 +0.6875 +\+0", checked.stdout)
    assert "equal to the last digit" in checked.stdout
    assert Path("twelve.csv").read_text() == whole

    # --again replaces the row, in its place.
    wrong = whole.replace("0.6875", "0.9")
    Path("twelve.csv").write_text(wrong)
    again = subprocess.run([*only, "--again"], capture_output=True, text=True)
    assert "DIFFERENT: image AUROC differs by 0.21" in again.stdout
    assert Path("twelve.csv").read_text() == whole


def test_a_trained_model_may_differ_by_005_between_machines_a_solved_one_by_0005():
    limits = {"ae": 0.005, "uniad": 0.005, "pca": 0.0005, "nearest": 0.0005}
    for model, limit in limits.items():
        run = {"model": model}
        assert "equal" in sweep.verdict(0.9, 0.9, run)
        near = sweep.verdict(0.9, 0.9 - 0.9 * limit, run)
        assert "within what machines differ by" in near
        assert "DIFFERENT" in sweep.verdict(0.9, 0.9 + 1.1 * limit, run)


def test_a_run_goes_on_only_with_its_own_options():
    config = dict(depth=2, epochs=1, pictures=False, out="run")
    assert not sweep.is_begun(train, config)                # there is none yet
    train.run(config, report=False)
    assert sweep.is_begun(train, {**config, "data_dir": "elsewhere"})
    assert not sweep.is_begun(train, {**config, "seed": 1})


def test_rows_made_with_other_options_are_not_mixed_with_new_ones(monkeypatch):
    monkeypatch.setattr(sweep, "RESULTS", Path())
    runs = list(experiments.EXPERIMENTS["pca"]())
    row = dict(runs[0], epoch=0, category="0", image_auroc=0.9, seconds=1, machine="m")
    sweep.write_csv(Path("pca.csv"), runs, [], [row])
    assert len(sweep.plan("pca", "", False, {})) == len(runs) - 1
    changed = Path("pca.csv").read_text().replace("image_size=32", "image_size=64")
    Path("pca.csv").write_text(changed)
    with pytest.raises(ValueError, match="delete the file"):
        sweep.plan("pca", "", False, {})
    with pytest.raises(ValueError, match="earlier version"):
        sweep.plan("photos", "", False, {})


def test_without_its_logarithm_lamp_is_eq_2_alone():
    y_hat, y = torch.rand(2, 4, 1, 8, 8)
    error = (y_hat - y) ** 2
    criterion = experiments.WithoutLogarithm(0.1, "image", True)
    close(criterion(y_hat, y), (1 - torch.exp(-lamp(error, 0.1, "image"))).sum() / 4)
    close(criterion.base_error, error.sum() / 4)


def test_pull_is_toward_the_nearest_training_image_and_spread_a_ratio_of_variances():
    normals, test, halve = images(5), images(12), nn.Conv2d(1, 1, 1, bias=False)
    halve.weight.data.fill_(0.5)
    y, normal = (x.flatten(1) / 255 for x in (test[:7], normals))
    near = [min(((v - n) ** 2).sum() for n in normal) for v in (*y, *(y / 2))]
    inputs = data.Inputs(normals, None, None, None, test, data.to_float)
    found = experiments.pull_and_spread(halve, inputs, torch.tensor([1] * 7 + [0] * 5))
    close(found["pull"], np.mean([near[7 + i] / near[i] for i in range(7)]), 1e-4)
    close(found["spread"], 0.25)


# ---- levers ----

def masked_in(model):
    """How many tokens the mask hides from each token on average, by attention."""
    return {name: float((module.mask < 0).sum(1).float().mean())
            for name, module in model.named_modules()
            if isinstance(module, uniad.Attention)}


@pytest.mark.parametrize("name", levers.LEVERS)
def test_a_lever_changes_uniad_within_its_block_alone(name):
    def trained():
        torch.manual_seed(0)
        model = UniAD(4, 14, dim=32, layers=1, hidden=8, start="two-step")
        train.fit(model, features, ReconstructionLoss("l2"), epochs=1, batch_size=2,
                  lr=0.01, optimizer="muon")
        return [*model.state_dict().values()]

    features = torch.randn(4, 4, 14, 14)
    if name == "16 heads":                                  # the two-step start has 8
        name = "4 heads"
    before = trained()
    with levers.pulled(name):
        changed = trained()
    assert not all(map(torch.equal, before, changed))
    assert all(map(torch.equal, before, trained()))


def test_a_mask_in_one_attention_hides_nothing_in_the_others():
    kinds = {"encoder": "attention", "memory attention": "memory_attention",
             "layer attention": "layer_attention"}
    whole = masked_in(UniAD(4, 14, dim=32, layers=2))
    for words, kind in kinds.items():
        words = f"mask in {'the ' if words == 'encoder' else ''}{words}"
        with levers.pulled(words):
            hidden = masked_in(UniAD(4, 14, dim=32, layers=2))
        for name, count in hidden.items():
            assert count == (whole[name] if name.split(".")[-1] == kind else 0)


def test_a_mask_grows_to_7_x_7_in_four_epochs_and_is_whole_when_judged():
    sides = []
    with levers.pulled("growing mask"):
        model = UniAD(4, 14, dim=32, layers=1)
        for _ in range(5):
            attention = model.train().encoder[0].attention
            # Token 105 is that in row 7, column 7: its whole window is in the grid.
            sides.append(int((attention.mask[105] < 0).sum()) ** 0.5)
            model.eval()
            assert int((attention.mask[105] < 0).sum()) == 7 * 7
    assert sides == [1, 3, 5, 7, 7]


def test_with_pre_norm_nothing_but_the_residual_passes_a_layer_of_zero_weights():
    layer = uniad.EncoderLayer(32, 8, 8, 0.0, torch.zeros(9, 9))
    for p in layer.parameters():
        nn.init.zeros_(p)
    x = torch.randn(2, 9, 32)
    assert not torch.equal(layer(x, 0), x)
    with levers.pulled("pre-norm"):
        assert torch.equal(layer(x, 0), x)


def test_positions_take_adam_s_steps_at_the_full_rate_or_those_of_muon():
    def moved(optimizer):
        torch.manual_seed(0)
        model = UniAD(4, 14, dim=32, layers=1, jitter=0.0, dropout=0.0)
        optim = optimizer(model.named_parameters(), lr=0.01, weight_decay=0.0)
        before = model.rows.detach().clone()
        model(f).square().mean().backward()
        take_step(optim, model, 0.01, 0.0, False)
        return model.rows.detach() - before

    f = torch.randn(2, 4, 14, 14)
    close(moved(train.Muon).abs().median(), 0.01 / 20, 1e-5)
    close(moved(levers.FastPositions).abs().median(), 0.01, 1e-4)
    sizes = torch.linalg.svdvals(moved(levers.MuonMovesPositions)) / 0.01
    assert (sizes < 1.2).all() and (sizes > 0.6).float().mean() > 0.7


# ---- tables and figures ----

def write_results(rows, monkeypatch):
    """Rows of equal keys as the CSV of an experiment x, the only one tables.py sees."""
    monkeypatch.setattr(pairs, "RESULTS", Path().resolve())
    lines = [rows[0], *(row.values() for row in rows)]
    Path("x.csv").write_text("\n".join(",".join(map(str, line)) for line in lines))


def test_a_table_pairs_the_means_over_seeds_category_by_category(monkeypatch):
    values = {("3", False): (0.5, 0.7, 0.1), ("3", True): (0.9, 0.9),
              ("5", False): (0.6, 0.6), ("5", True): (0.5, 0.7),
              ("8", False): (0.4, 0.6), ("8", True): (0.6, 0.8)}
    rows = []
    for (normal, amplified), aurocs in values.items():
        for seed, auroc in enumerate(aurocs):               # seed 2 of 3 has no partner
            run = dict(normal=normal, category=normal, lamp=amplified, loss="l1",
                       epochs=2, seed=seed, eps=amplified or "")
            for epoch in (1, 2):
                rows.append(dict(run, epoch=epoch, base_error=1,
                                 image_auroc=auroc * epoch / 2))
    write_results(rows, monkeypatch)
    for command, line in (
            # differences of the means: .3, 0, .2; t(.975, 2) = 4.3027
            ("eps",
             "True | 0.5667 ± 0.1434 | 0.7333 ± 0.3795 | "
             "+0.1667 ± 0.3795 | 2 of 3 | 0.500"),
            # over the seeds: without .5 and .6333, with .6667 and .8;
            # t(.975, 1) = 12.7062
            ("loss --over seeds",
             "l1 | 0.5667 ± 0.8471 | 0.7333 ± 0.8471 | "
             "+0.1667 ± 0.0000 | 2 of 2 | 0.500"),
            ("epoch --picture z.png",
             "1 | 0.2833 ± 0.0717 | 0.3667 ± 0.1897 | +0.0833"),
            ("loss --where normal=3,seed=0",
             "l1 | 0.5000 | 0.9000 | +0.4000 | 1 of 1 |  |")):
        assert line in call(tables.main, f"x --rows {command}").splitlines()[2], command
    assert Path("z.png").exists()
    # Of two experiments, a run lacks the options that only the other one has.
    Path("w.csv").write_text("# epochs=2\nnormal,category,lamp,seed,epoch,image_auroc\n"
                             "3,3,False,0,2,.8\n3,3,True,0,2,.7\n")
    text = call(tables.main, "w x --rows loss --where normal=3,seed=0")
    assert "|  | 0.8000 | 0.7000 |" in text and "| l1 | 0.5000 | 0.9000 |" in text
    for wrong, words in (("y", "There are w, x"), ("x --rows lr", "no option lr"),
                         ("x --where lr=1", "no lr"), ("x --where seed=9", "no run")):
        assert words in call(tables.main, wrong, 2)


def test_the_best_setting_is_that_of_the_category_itself_or_of_the_others(monkeypatch):
    values = {("sgd", "a"): 0.9, ("sgd", "b"): 0.5, ("sgd", "c"): 0.6,
              ("adam", "a"): 0.7, ("adam", "b"): 0.8, ("adam", "c"): 0.4}
    rows = [dict(normal=name, category=name, optimizer=optimizer, epoch=0,
                 image_auroc=value, seed=0)
            for (optimizer, name), value in values.items()]
    write_results(rows, monkeypatch)
    # on the others: a by b and c (.55 and .6) takes adam, b by a and c sgd,
    # c by a and b adam
    for chosen_on, cells in (("itself", (0.9, 0.8, 0.6)), ("others", (0.7, 0.5, 0.4))):
        command = f"x --best-of optimizer --chosen-on {chosen_on}"
        lines = call(tables.main, command).splitlines()
        assert lines[2:] == [*(f"| {c} | {v:.4f} |" for c, v in zip("abc", cells)),
                             f"| mean | {pairs.mean_and_interval(cells)} |"]
    assert "differ in optimizer" in call(tables.main, "x", 2)
    alone = "x --where normal=a --best-of optimizer --chosen-on others"
    assert "no other category" in call(tables.main, alone, 2)


def test_tables_load_no_torch():
    command = ("import sys, tables\n"
               "assert not {'torch', 'train', 'evaluate'} & {*sys.modules}")
    subprocess.run([sys.executable, "-c", command], cwd=RESULTS, check=True)


def small_run(out, **options):
    """A run on the digits that takes a second."""
    train.run(dict(depth=2, epochs=1, pictures=False, out=out, **options), report=False)


def test_the_idea_draws_normals_then_anomalies_as_a_model_makes_them(monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig",
                        lambda figure, *_, **__: drawn.append(figure))
    config = dict(depth=2, latent=2, epochs=1, normal="4", out="four")
    monkeypatch.setattr(figures, "IDEA", {"above": config, "below": config})
    figures.idea("idea.png", [])
    axes = drawn[0].axes
    assert len(axes) == 2 * 3 * 8                           # blocks, rows, columns
    titles = [axis.get_title().split("\n")[0] for axis in axes[:8]]
    assert titles == 4 * ["normal"] + 4 * ["anomalous"]
    shown = axes[8].images[0].get_array()                   # the first reconstruction
    state, model = ev.load_run("four")
    d, inputs, _ = ev.open_data(state["config"], state=state)
    first = inputs.test[d.labels == 0][:1]
    close(shown[..., 0], ev.reconstruct(model, inputs, first)[0, 0].clamp(0, 1), 1e-6)


def test_influence_is_the_squared_slope_of_the_middle_token_by_each_token():
    def model(f):                                           # itself, and 3 x the corner
        return f + 3 * f[:, :, :1, :1]
    model.eval = lambda: model
    squared = figures.influence(model, torch.randn(2, 200, 5, 5), draws=64)
    others = squared.copy()
    others[2, 2] = others[0, 0] = 0
    assert not others.any()
    close(squared[2, 2] / 200, 1, 0.05)                     # C, of random directions
    close(squared[0, 0] / squared[2, 2], 9, 1e-5)


def test_a_model_that_knows_the_mean_map_alone_has_all_of_its_error():
    f, mean_map = torch.randn(9, 6, 5, 5), torch.randn(6, 5, 5)
    knows_it = nn.Module()
    knows_it.forward = lambda f: mean_map.expand_as(f)
    close(figures.over_mean_map(knows_it, f, mean_map), 1)
    assert figures.over_mean_map(nn.Identity(), f, mean_map) == 0


def test_figures_draw_what_runs_make_of_the_same_images_and_their_history(monkeypatch):
    drawn, save = [], Figure.savefig

    def keep_and_save(figure, *arguments, **options):
        drawn.append(figure)
        save(figure, *arguments, **options)
    monkeypatch.setattr(Figure, "savefig", keep_and_save)
    small_run("a")
    small_run("b", lamp=True)
    small_run("c", validate=True)
    assert "c has other test images" in call(figures.main, "examples z.jpg a c", 2)
    call(figures.main, "examples z.jpg a b")
    call(figures.main, "curves z.png a b")
    shown, curves = drawn
    cells = [axis.images[0].get_array() for axis in shown.axes[:40]]
    # The images, then two rows of each run.
    rows = [np.stack(cells[start:start + 8]) for start in range(0, 40, 8)]
    y = torch.tensor(rows[0])[..., 0][:, None].float()
    for run, (y_hat, error) in zip("ab", (rows[1:3], rows[3:5])):
        close(y_hat[..., 0], ev.load_run(run)[1](y)[:, 0], 1e-5)
        close(error, (y_hat[..., 0] - rows[0][..., 0]) ** 2, 1e-5)
    for axis, key in zip(curves.axes, figures.CURVES):
        for run, line in zip("ab", axis.lines, strict=True):
            history = json.loads(Path(run, "run.json").read_text())["history"]
            points = [[entry["epoch"], entry[key]] for entry in history]
            assert line.get_xydata().tolist() == points


def test_at_equal_training_error_lamp_is_compared_to_a_point_on_l2_s_curve(monkeypatch):
    # Each point: epoch, training error, AUROC.
    plain = [(2, 4.0, 0.8), (4, 2.0, 0.7), (6, 1.0, 0.6)]
    gain = figures.equal_error(plain, [(2, 9.0, 0.1), (4, 1.5, 0.75)])
    close(gain, 0.1)
    for never in (4.5, 0.9):
        assert figures.equal_error(plain, [(2, never, 0.9)]) is None
    amplified = [(2, 3.0, 0.7), (4, 2.5, 0.8), (6, 1.5, 0.75)]
    rows = []
    for lamp_or_not, curve in ((0, plain), (1, amplified)):
        run = dict(batch_size=32, epochs=6, seed=1, category=3, normal=3)
        for epoch, error, auroc in curve:
            rows.append(dict(run, lamp=lamp_or_not, epoch=epoch, base_error=error,
                             image_auroc=auroc))
    # These are not in the figure.
    unlike = [{**rows[0], "batch_size": 16}, {**rows[0], "seed": 0}]
    # A whole run of 4 epochs, and that of 6: L2 has .7 at LAMP's error of 1.5.
    whole = dict(rows[0], epochs=4, epoch=4, base_error=1.6, image_auroc=0.72)
    csvs = {"table1": [*rows, *unlike], "annealed": [whole]}
    monkeypatch.setattr(figures, "read", csvs.get)
    text = call(figures.main, "copying z.png")
    assert "L2, at equal training error: +0.1000, ahead on 1 of 1 digits" in text
    assert "to its end, at equal training error: +0.0500, ahead on 1 of 1" in text
    assert "name runs" in call(figures.main, "copying z.png run", 2)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_alone_makes_the_step_that_train_py_makes_with_it(name):
    alone, model = (UniAD(6, 4, 8, 2, 1, 16, neighbors=3) for _ in range(2))
    model.load_state_dict(alone.state_dict())
    weights = torch.randn(sum(p.numel() for p in model.parameters()))
    optims = []
    for m in (alone, model):
        optims.append(OPTIMIZERS[name](m.named_parameters(), lr=0.01, weight_decay=0.1))
    for _ in range(2):
        for m, optim in zip((alone, model), optims):
            optim.zero_grad()
            values = torch.cat([p.flatten() for p in m.parameters()])
            (values ** 2 * weights).sum().backward()
        optims[0].step()
        take_step(optims[1], model, 0.01, 0, False)
    for one, other in zip(alone.parameters(), model.parameters()):
        assert torch.equal(one, other)


def test_a_plane_is_as_steep_as_its_gradient_and_a_paraboloid_as_its_curvature():
    xs, ys = np.linspace(-1, 1, 5), np.linspace(-2, 2, 7)
    plane = steepness.steepness(3 * xs[:, None] + 4 * ys + 20, xs, ys)
    # The loss at the center is 20.
    close([*plane.values()], [5, 0, 0.25, 0], 1e-9)
    bowl = steepness.steepness(xs[:, None] ** 2 + 3 * ys ** 2 + 1, xs, ys)
    close(bowl["curvature"], (2 + 6) / 2, 1e-9)


def test_a_model_is_once_as_steep_as_itself_and_through_lamp_as_under_it(monkeypatch):
    model, x = nn.Linear(3, 2), torch.rand(6, 3)
    monkeypatch.setattr(steepness, "train_classifier",
                        lambda *_: (model, x, torch.zeros(6, 2)))
    settings = landscape.Settings(landscape.steps(1.0, 3))
    a, b, c = steepness.measure_steepness("classifier", 4, 0, settings).splitlines()
    assert c == "classifier,4,0,c" + 4 * ",1.0000" and a.replace(",a,", ",b,") == b
    # Fig. 1 draws the default LAMP.
    drawn = landscape.EQ_2["autoencoder"].items()
    assert drawn <= train.with_defaults({}).items()


def test_near_the_weights_a_maximum_of_the_figure_stays_and_one_s_own_shrinks(capsys):
    model, x = nn.Conv2d(1, 1, 3, padding=1), torch.rand(4, 1, 8, 8)
    of_figure = steepness.near_surfaces(model, "figure", x, seed=0, grid=3)
    own = steepness.near_surfaces(model, "own", x, seed=0, grid=3)
    assert np.array_equal(of_figure[1.0], own[1.0])
    assert (of_figure[0.1] < own[0.1]).all()                # divided by a larger error
    plain = steepness.near_surfaces(model, None, x, seed=0, grid=3)
    center = float(ReconstructionLoss("l2")(model(x), x).detach())
    close([z[1, 1] for z in plain.values()], 3 * [center], 1e-6)


# ---- the READMEs and the pages ----

COMMANDS = re.findall(r"(?:^ {4}|`)(?:.*&& )?(python [\w/]+\.py[^`#\n]*)", README, re.M)
TOP = ("lamp_loss", "autoencoder", "uniad", "data", "evaluate", "train", "landscape")
MODULES = {name: sys.modules.get(name) or __import__(name) for name in TOP}
LOOPS = re.findall(r"```python\n(.*?)```", READMES[0].read_text(), re.S)


def test_each_table_is_what_its_command_prints_and_each_command_of_results_runs():
    marked = r"(?s)<!-- python results/tables.py (.*?) -->\n(.*?)\n<!--"
    shown = re.findall(marked, README)
    assert len(shown) > 30
    for command, table in shown:
        assert call(tables.main, command).strip() == table.strip(), command
    typed = r"(?m)(?:^ {4}|`)python results/tables.py ([^`\n]*)"
    for command in re.findall(typed, README):
        call(tables.main, command.replace("figures/", ""))
    swept = re.findall(r"(?m)^ {4}python results/sweep.py (\w+)", README)
    assert set(swept) <= set(experiments.EXPERIMENTS)
    assert set(experiments.EXPERIMENTS) - set(experiments.RECORDED) <= set(swept)


def test_the_table_of_sixty_photos_is_what_its_command_prints():
    manual = (RESULTS.parent / "photos/README.md").read_text()
    assert sixty.table() in manual
    # Its difference, from the CSV files by hand.
    ours, theirs = {}, {}
    for row in sixty.read("sixty.csv"):
        ours.setdefault(row["product"], []).append(float(row["image_auroc"]))
    for row in sixty.read("peers.csv"):
        if (row["method"], row["size"]) == ("patchcore", "224"):
            theirs.setdefault(row["product"], []).append(float(row["image_auroc"]))
    ahead = [np.mean(ours[name]) - np.mean(theirs[name]) for name in sixty.PRODUCTS]
    mean, width = np.mean(ahead), 2.776 * np.std(ahead, ddof=1) / 5 ** 0.5
    assert f"{mean:+.3f} ± {width:.3f}" in sixty.difference("PatchCore")


def test_the_tables_on_other_settings_and_on_a_bench_s_week_are_those_printed():
    page = (RESULTS / "photos.md").read_text()
    for table in (choices.table(), choices.leave_one_out(), evening.table()):
        assert table in page


def test_a_product_left_out_has_the_setting_that_is_best_on_the_others(monkeypatch):
    def rows(**aurocs):
        return [{"product": name, "image_auroc": aurocs.get(name, 0.9)}
                for name in sixty.PRODUCTS]
    found = {"a": rows(), "b": rows(grid=1.0)}              # b is better on the grid
    monkeypatch.setattr(choices, "settings_and_rows", lambda: found)
    assert choices.chosen_without("pill") == "b"
    assert choices.chosen_without("grid") == "a"            # equal, so the first
    assert "| grid | a | .900 |" in choices.leave_one_out()


def test_the_cosine_distance_is_that_of_tokens_of_length_1():
    torch.manual_seed(0)
    f, normals = torch.randn(2, 6, 3, 3), torch.randn(4, 6, 3, 3)
    model = choices.CosineToken(6, 4 * 9)
    model.solve(normals)
    bank = normals.flatten(2).mT.flatten(0, 1)
    bank = bank / bank.norm(dim=1, keepdim=True)
    for image, f_hat in zip(f, model(f)):
        for t, t_hat in zip(image.flatten(1).T, f_hat.flatten(1).T):
            cosine = bank @ (t / t.norm())                  # 1 where they are alike
            nearest = bank[cosine.topk(3).indices].mean(0)
            close(t_hat - t, nearest - t / t.norm(), 1e-5)


def test_each_command_in_the_readmes_is_understood():
    assert len(COMMANDS) > 20
    helps = {}
    for command in COMMANDS:
        path, *argv = shlex.split(command)[1:]
        assert (RESULTS.parent / path).exists(), command
        if path == "train.py" and not {"--help", "--resume"} & set(argv):
            train.with_defaults(without_overwrite(train.parser().parse_args(argv)))
        flags = [word for word in argv if word.startswith("--")]
        if flags and path != "test_all.py":
            helps[path] = helps.get(path) or help_of(path)
            assert all(flag in helps[path] for flag in flags), command


def test_the_runs_that_figures_are_drawn_of_are_those_that_the_sweep_makes():
    made = set()
    for name, experiment in experiments.EXPERIMENTS.items():
        runs = list(experiment())
        columns = sweep.columns_of(runs)
        made |= {f"runs/{name}/{sweep.name_of(run, columns)}" for run in runs}
    folders = dict(re.findall(r"(?m)^ {4}(\w)=(runs/\S+)$", README))
    typed = r"(?m)^ {4}python results/figures.py examples \S+ (.*\$.*)$"
    drawn = re.findall(typed, README)
    words = [word for line in drawn for word in line.split()]
    assert len(words) >= 6
    for word in words:                                      # "$r=False,seed=0"
        path = folders[word[1]] + word[2:]
        assert path.replace("$c", "capsule") in made


def anchors_of(text):
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"(?m)^#+ (.*)$", text)
    kept = [re.sub(r"[^\w -]", "", words.lower()) for words in headings]
    return [words.replace(" ", "-") for words in kept]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_each_link_of_a_page_leads_to_a_file_and_a_heading(path):
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text())
    for link in links:
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        if anchor:
            assert anchor in anchors_of(target.read_text()), link
    if path.name != "README.md":
        assert f"]({path.name})" in (RESULTS / "README.md").read_text()


def without_overwrite(args):
    return {key: value for key, value in vars(args).items() if key != "overwrite"}


def help_of(path):
    loaded = sys.modules.get(Path(path).stem)
    if loaded and Path(loaded.__file__) == RESULTS.parent / path:
        return call(loaded.main, "--help")
    command = [sys.executable, str(RESULTS.parent / path), "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_lamp_in_your_own_loop_runs_as_printed_and_prints_both_on_one_scale(capsys):
    model, y = ConvAutoencoder(depth=2), torch.rand(4, 1, 16, 16)
    error = (model(y) - y).square().detach()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    exec(LOOPS[0], {"model": model, "batches": [y] * 3,
                    "optimizer": torch.optim.Adam(model.parameters())})
    first, _, last = capsys.readouterr().out.splitlines()
    assert first == f"LAMP {lamp(error).mean():.5f}, L2 {error.mean():.5f}"
    assert float(last.split()[-1]) < float(first.split()[-1])   # L2 falls


def test_uniad_in_your_own_code_runs_as_printed_and_locates_the_anomaly(monkeypatch):
    small = functools.partial(UniAD, dim=16, heads=2, layers=1, hidden=16)
    monkeypatch.setattr(uniad, "Backbone",
                        lambda name, size: Backbone("resnet18", "random", 128))
    monkeypatch.setattr(uniad, "UniAD", small)
    normals = 0.5 + 0.01 * torch.randn(12, 3, 128, 128)
    shown = normals[:2].clone()
    shown[1, :, 80:96, 16:32] = 0                       # token (5, 1) of an 8 x 8 grid
    space = {"normals": normals, "images": shown,
             "range": lambda steps: range(steps // 20)}
    exec(LOOPS[1], space)
    assert space["error"].shape == (2, 8, 8) and space["error"][1].argmax() == 5 * 8 + 1
    assert space["error"][1].max() > 2 * space["error"][0].max()


def test_each_name_in_the_readme_s_map_of_the_papers_exists():
    names = re.findall(rf"`({'|'.join(MODULES)})\.(?!py`)(\w+)`", README)
    assert len(names) > 15
    for module, name in names:
        assert hasattr(MODULES[module], name), f"{module}.{name}"
