"""A comparison of the masks on Tiny-ImageNet: one loop, one grid, several seeds. Run it in the repository.

    python .github/study.py prepare tiny-imagenet-200/ tiny    shards and a test folder of the archive
    python .github/study.py run tiny runs --jobs 2             every run of the grid that is not finished yet
    python .github/study.py time tiny runs                     what a step of each row costs
    python .github/study.py table                              the tables of the README, and .github/study.png

With seven times the data, in a file of results of its own:

    python .github/study.py prepare --classes 200 tiny-imagenet-200/ tiny200
    python .github/study.py run tiny200 runs200 --results .github/study200.jsonl --patch-size 8 --seeds 0 1 \\
        --rows random pgs "none, 5 epochs"
    python .github/study.py table --results .github/study200.jsonl

The grid has two axes: what a run does (a row of the tables) and how many patches its images have: 64 of 8x8
pixels or 256 of 4x4. Each run is an ordinary command line of clip_pgs.py, which is printed. A run that was
killed goes on where it was. What came out of a run is kept as a line of a file, by default
.github/study.jsonl; the tables are made from that file.
"""
import argparse
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from glob import glob

import numpy as np
import torch
from PIL import Image, ImageDraw

sys.path.insert(0, os.getcwd())
import data
import evaluate

# A line for each run: {"name": "pgs", "patch_size": 8, "rule": "chance", "seed": 0, "device": "cpu",
# "acc1": [one per epoch]}. Lines without a device are of a CPU.
RESULTS = ".github/study.jsonl"
# {number of patches: {row: time of a masked step, 1 for none}}, such as {"64": {"random": 0.59}, "256": {}}.
TIMES = ".github/study_time.json"
# {number of patches: {row: share of the removed patches that differ between two draws for one image}}, the
# rows named as in ROWS, such as {"64": {"random": 0.5}, "256": {}}. `bench.py masks` measures it; a row or
# a number that is missing leaves its cell empty.
SHARES = ".github/study_masks.json"

# -----------------------------------------------------------------------------
# The grid: which command lines, at how many patches, with how many seeds.

IMAGE_SIZE = 64
PATCH_SIZES = (8, 4)
EPOCHS = 8  # the last one on whole images
COMMON = (f"--model demo --image-size {IMAGE_SIZE} --context-length 24 --batch-size 128 --epochs {EPOCHS} "
          "--unmasked-epochs 1 --lr 1e-3 --warmup 50 --vocab-size 2048 --precision fp32")
ROWS = {
    "random": "--mask random",
    "center": "--mask center",
    "attentive": "--mask attentive",
    "cluster": "--mask cluster",
    "pgs": "--mask pgs",
    "none": "--mask none",
    "none, 5 epochs": "--mask none --epochs 5",  # whole epochs in random's time: with 64 patches
    "none, 4 epochs": "--mask none --epochs 4",  # and with 256
    "pgs --no-transport": "--mask pgs --no-transport",
    "pgs --no-edges": "--mask pgs --no-edges",
    "pgs --no-embeddings": "--mask pgs --no-embeddings",
    "cluster --no-embeddings": "--mask cluster --no-embeddings",
    "pgs, ratio 0.3 0.5": "--mask pgs --ratio 0.3 0.5",
    "random, ratio 0.75": "--mask random --ratio 0.75",
    "center, ratio 0.75": "--mask center --ratio 0.75",
    "pgs, ratio 0.75": "--mask pgs --ratio 0.75",
    "attentive, two views": "--mask attentive --views 2 --scale 0.5 1",
    "pgs, two views": "--mask pgs --views 2 --scale 0.5 1",
    "attentive, two views, contrast": "--mask attentive --views 2 --contrast simclr byol --scale 0.5 1",
    "pgs, two views, contrast": "--mask pgs --views 2 --contrast simclr byol --scale 0.5 1",
    "none, SLIP's losses": "--mask none --views 2 --contrast simclr --scale 0.08 1",
    "random, 5 text tokens": "--mask random --text-tokens 5",
    "center, 5 text tokens": "--mask center --text-tokens 5",
    "pgs, 5 text tokens": "--mask pgs --text-tokens 5",
}
MASKS = ("random", "center", "attentive", "cluster", "pgs", "none")
# The rows whose masks the new rule, below, has changed.
VARIANTS = [name for name in ROWS if name.startswith(("pgs", "cluster")) and name not in MASKS]
# The rows of the small tables, and the curves of the picture.
SMALL = (*MASKS, "none, 5 epochs", "none, 4 epochs", "pgs --no-edges")
COLORS = {"random": "#1f77b4", "center": "#8c564b", "attentive": "#9467bd", "cluster": "#2ca02c",
          "pgs": "#d62728", "none": "#ff7f0e"}

# Which patches cluster and pgs remove: in runs of before, similar patches were ranked and the highest went
# first; now chance decides among them. The noise of the other masks changed at the same time. So a line of
# the old rule stays for comparison. The main rows are made anew, and those whose masks the rule has changed.
# The variants of random, center and attentive are not, nor are runs without a mask.
RULE = "chance"
OLD_RULE = "ranked"


def unmasked(name):
    """Whether no patch is removed in this row: then its results do not depend on the rule."""
    return "--mask none" in ROWS[name]


def num_epochs(name):
    """Epochs of a row's run."""
    _, given, number = ROWS[name].partition("--epochs ")
    return int(number) if given else EPOCHS


def num_patches(patch_size):
    """Patches of an image."""
    return (IMAGE_SIZE // patch_size) ** 2


def by_seed(patch_size, names, seeds):
    """Cells (patch size, row, seed) of the grid, in the order in which seeds fill up together."""
    return [(patch_size, name, seed) for seed in seeds for name in names]


def by_row(patch_size, names, seeds):
    """Cells of the grid, in the order in which one row after the other gets all its seeds."""
    return [(patch_size, name, seed) for name in names for seed in seeds]


# In the order in which they run: what is missing when time ends should matter least.
GRID = [
    *by_seed(8, ["none"], range(5)),
    *by_seed(8, ["random"], range(5)),
    *by_seed(8, ["attentive", "center", "none, 5 epochs"], range(3)),
    *by_seed(8, ["pgs", "cluster"], range(5)),
    *by_seed(4, ["random", "pgs", "pgs --no-edges", "none"], range(3)),
    *by_row(8, VARIANTS, range(3)),
    *by_seed(4, ["none, 4 epochs"], range(3)),
    *by_seed(4, ["center", "cluster", "attentive"], range(2)),
    *by_row(4, ["pgs --no-transport", "pgs, ratio 0.3 0.5"], range(2)),
    # Seeds 3 and 4 ran on a GPU (run --seeds 3 4 --workers 2), with 256 patches. A difference is taken
    # within a seed, so within one kind of device.
    *by_seed(4, [*MASKS, "none, 4 epochs", "pgs --no-edges"], [3]),
    *by_seed(4, ["pgs --no-transport", "pgs, ratio 0.3 0.5"], [3]),
    *by_seed(4, ["random", "none, 4 epochs"], [4]),
]

# -----------------------------------------------------------------------------
# The data: shards with captions that are made up around the class names, and a test folder.

TEMPLATES = ("a photo of a {c}", "a blurry photo of a {c}", "a cropped photo of the {c}.", "the {c}", "a {c}",
             "a snapshot showing a {c}", "this is a picture of a {c}", "a {c} in the middle of the frame.",
             "a close-up of a {c}", "there is a {c}", "a small picture of the {c}", "an old photo of a {c}")


def write_lines(path, lines):
    """Writes a text file."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


def read_bytes(path):
    """The bytes of a file."""
    with open(path, "rb") as file:
        return file.read()


def prepare(options):
    """Writes shards and a test folder of the archive's first classes: their training images with captions,
    and all 50 validation images of each."""
    rng = random.Random(0)
    train = os.path.join(options.archive, "train")
    val = os.path.join(options.archive, "val")
    classes = sorted(os.listdir(train))[:options.classes]
    if len(classes) < options.classes:
        sys.exit(f"--classes {options.classes}: {train} has only {len(classes)}")
    # 350 of 500: what is left of the 40 classes can train a linear probe on images that are new to a model.
    per_class = 350 if options.classes == 40 else 500

    with open(os.path.join(options.archive, "words.txt"), encoding="utf-8") as file:
        words = dict(line.rstrip("\n").split("\t")[:2] for line in file)
    names = [words[name].split(",")[0] for name in classes]

    pictures = []
    for label, name in enumerate(classes):
        paths = sorted(glob(os.path.join(train, name, "images", "*.JPEG")))
        pictures += [(path, label) for path in paths[:per_class]]
    rng.shuffle(pictures)

    tests = []
    with open(os.path.join(val, "val_annotations.txt"), encoding="utf-8") as file:
        for line in file:
            picture, name = line.split("\t")[:2]
            if name in classes:
                tests.append((os.path.join(val, "images", picture), classes.index(name)))

    def with_captions():
        for path, label in pictures:
            caption = rng.choice(TEMPLATES).replace("{c}", names[label])
            yield {"jpg": read_bytes(path), "txt": caption.encode()}

    def with_classes():
        for path, label in tests:
            yield {"jpg": read_bytes(path), "cls": str(label).encode()}

    data.write_shards(os.path.join(options.out, "train"), with_captions())
    number = data.write_shards(os.path.join(options.out, "test"), with_classes(), name="{}.tar")
    write_lines(os.path.join(options.out, "test", "nshards.txt"), [number])
    write_lines(os.path.join(options.out, "classnames.txt"), names)
    write_lines(os.path.join(options.out, "zeroshot_classification_templates.txt"), TEMPLATES)
    print(f"wrote {len(pictures)} training and {len(tests)} test images of {len(classes)} classes")

# -----------------------------------------------------------------------------
# The runs.

def read_results(path):
    """{(patch size, rule, row): {seed: acc1 in percent after each epoch}} of a file of results. The rule of
    runs without a mask is always RULE."""
    found = defaultdict(dict)
    if not os.path.exists(path):
        return found
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                result = json.loads(line)
            except ValueError:  # cut short when the machine stopped: the run is asked again
                print(f"warning: {path}, line {number}: damaged, left out", file=sys.stderr)
                continue
            name = result["name"]
            rule = RULE if unmasked(name) else result["rule"]
            found[result["patch_size"], rule, name][result["seed"]] = 100 * np.array(result["acc1"])
    return found


def command_line(options, patch_size, name, out, *more):
    """The command of a row of the grid."""
    return [sys.executable, "clip_pgs.py", "--data", f"{options.data}/train/*.tar", *COMMON.split(),
            "--workers", str(options.workers), "--patch-size", str(patch_size), *ROWS[name].split(),
            "--out", out, *more]


def start(command):
    """The process of a command, on one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def keep(path, patch_size, name, seed, folder):
    """Adds a finished run to a file of results. ValueError if its log does not hold acc1 of every epoch."""
    records = evaluate.read_log(os.path.join(folder, "log.jsonl"))
    evaluations = [record["eval"] for record in records if "eval" in record]
    metrics = [next(iter(folders.values())) for folders in evaluations]  # of the one folder in --val
    accuracy = [round(metric["acc1"], 5) for metric in metrics if "acc1" in metric]
    if len(accuracy) != num_epochs(name):
        raise ValueError(f"{folder}/log.jsonl: acc1 of {len(accuracy)} epochs, expected {num_epochs(name)}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    result = dict(name=name, patch_size=patch_size, rule=RULE, seed=seed, device=device, acc1=accuracy)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")


def run_cell(options, cell, running):
    """Runs a cell of the grid, or the rest of it, and keeps what came out; returns what went wrong, or None.
    The process is in the set `running` as long as it runs.

    If we are killed before the result is kept, the next call finds the finished checkpoint, from which
    clip_pgs.py evaluates the last epoch once more and ends."""
    patch_size, name, seed = cell
    title = f"{name}, {num_patches(patch_size)} patches, seed {seed}"
    row = name.replace(", ", "_").replace(" ", "_")
    folder = os.path.join(options.out, f"{row}-{patch_size}-{seed}")
    command = command_line(options, patch_size, name, folder,
                           "--val", options.data, "--seed", str(seed), "--resume")
    print(f"{shlex.join(command)}\n", end="", flush=True)  # at once: other threads print, too
    try:
        process = start(command)
        running.add(process)
        _, errors = process.communicate()
        running.remove(process)
        if process.returncode:
            lines = errors.strip().splitlines() or ["no message"]
            return f"{title}: status {process.returncode}, {lines[-1]}"
        keep(options.results, patch_size, name, seed, folder)
    except Exception as error:  # of this run alone: the others go on
        return f"{title}: {error!r}"


def run(options):
    """Runs what is missing of the grid, `jobs` runs at a time. Ctrl-C or SIGTERM lets the runs write their
    checkpoints; the same command then goes on."""
    found = read_results(options.results)
    asked = [(patch_size, name, seed) for patch_size, name, seed in GRID
             if patch_size in options.patch_size and name in options.rows
             and seed in (options.seeds or (seed,))]
    missing = [(patch_size, name, seed) for patch_size, name, seed in asked
               if seed not in found[patch_size, RULE, name]]
    print(f"{len(missing)} of {len(asked)} runs to do", flush=True)

    def stop(number, frame):
        signal.signal(number, signal.SIG_IGN)  # once is enough: the runs are about to stop
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    running = set()
    with ThreadPoolExecutor(options.jobs) as pool:
        futures = [pool.submit(run_cell, options, cell, running) for cell in missing]
        try:
            faults = [future.result() for future in futures]
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in [*running]:
                process.terminate()
            sys.exit("stopped; the same command goes on")
    sys.exit("\n".join(filter(None, faults)) or None)


def time_rows(options):
    """Times 20 steps of each row that has a result, in turns, twice, on the CPU; keeps the medians, against
    `none` with as many patches. Other numbers of patches keep their times."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    found = read_results(RESULTS)
    out = os.path.join(options.out, "time")
    times = {}
    if os.path.exists(TIMES):
        with open(TIMES) as file:
            times = json.load(file)
    for patch_size in options.patch_size:
        patches = num_patches(patch_size)
        names = []
        for name in ROWS:
            if "epochs" not in name and (name == "none" or newest(found, patch_size, name)):
                names.append(name)
        speeds = defaultdict(list)
        for name in names * 2:
            shutil.rmtree(out, ignore_errors=True)
            command = command_line(options, patch_size, name, out, "--steps", "20", "--unmasked-epochs", "0")
            process = start(command)
            _, errors = process.communicate()
            if process.returncode:
                sys.exit(f"{name}, {patches} patches: {errors}")
            records = evaluate.read_log(os.path.join(out, "log.jsonl"))
            speeds[name] += [record["images_per_s"] for record in records[8:]]  # the first steps are slower
            print(f"{name}, {patches} patches: {np.median(speeds[name]):.0f} images/s", flush=True)
        none = np.median(speeds["none"])
        times[str(patches)] = {name: round(float(none / np.median(speeds[name])), 3) for name in names}
    with open(TIMES, "w") as file:
        json.dump(times, file, indent=1)
        file.write("\n")

# -----------------------------------------------------------------------------
# The tables and the picture.

def read_numbers(path):
    """{(patch size, row): number} of TIMES or SHARES; nothing if there is no such file."""
    if not os.path.exists(path):
        return {}
    with open(path) as file:
        numbers = json.load(file)
    return {(patch_size, name): number for patch_size in PATCH_SIZES
            for name, number in numbers.get(str(num_patches(patch_size)), {}).items()}


def with_spread(values):
    """mean ± standard deviation over the seeds."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"


def minus(found, key, name):
    """(mean, standard error) of acc1 after the last epoch minus that of the row `name`, by the same rule and
    with as many patches, paired by seed; None if fewer than two seeds have both, or if the rows are one."""
    patch_size, rule, own_name = key
    other = found[patch_size, rule, name]
    if name == own_name:
        return None
    differences = [acc1[-1] - other[seed][-1] for seed, acc1 in found[key].items() if seed in other]
    if len(differences) < 2:
        return None
    return np.mean(differences), np.std(differences, ddof=1) / len(differences) ** 0.5


def clock(name, time):
    """When each epoch of a row ends, (epochs,), counted in epochs of `none`. A masked epoch costs the row's
    `time`; the last one as much as `none`, or with two views of whole images twice as much."""
    whole = 2 if "--views 2" in ROWS[name] else 1
    return np.cumsum([time] * (num_epochs(name) - 1) + [max(time, whole)])


def end_of_random(times, patch_size):
    """When random's run ends, in epochs of `none`; 0 if it was not timed."""
    time = times.get((patch_size, "random"))
    return clock("random", time)[-1] + 1e-6 if time else 0


def newest(found, patch_size, name):
    """The key of a row's results: by the present rule if there are some, else by the old one, else None."""
    for rule in (RULE, OLD_RULE):
        if found[patch_size, rule, name]:
            return patch_size, rule, name
    return None


def cells(found, times, shares, key):
    """{column: cell} of a row."""
    patch_size, rule, name = key
    seeds = found[key]
    row = {"patches": num_patches(patch_size), "run": name, "rule": rule, "seeds": len(seeds), "time": "",
           "two draws": "", "minus random": "", "minus its mask": "", "at equal time": ""}
    if unmasked(name):
        row["rule"] = "any"
    row["last but one"] = with_spread([acc1[-2] for acc1 in seeds.values()])
    row["last epoch"] = with_spread([acc1[-1] for acc1 in seeds.values()])
    if (patch_size, name) in shares and rule == RULE:
        row["two draws"] = f"{shares[patch_size, name]:.2f}"
    its_mask = next(mask for mask in MASKS if name.startswith(mask))
    for column, other in (("minus random", "random"), ("minus its mask", its_mask)):
        difference = minus(found, key, other)
        if difference:
            row[column] = "{:+.1f} ± {:.1f}".format(*difference)
    timed = "none" if "epochs" in name else name
    if (patch_size, timed) in times:
        time = times[patch_size, timed]
        row["time"] = f"{time:.2f}"
        done = int((clock(name, time) <= end_of_random(times, patch_size)).sum())
        if done:
            row["at equal time"] = f"{np.mean([acc1[done - 1] for acc1 in seeds.values()]):.1f} ({done})"
    return row


def print_table(title, rows, columns):
    """Prints these columns of a list of {column: cell} as a Markdown table."""
    print(f"{title}\n\n| " + " | ".join(columns) + " |")
    print("|" + "|".join("---" if column in ("run", "rule") else "--:" for column in columns) + "|")
    for row in rows:
        print("| " + " | ".join(str(row[column]) for column in columns) + " |")
    print()


def table(options):
    """Prints a small table for each number of patches, then every row there is, and draws the picture.
    Columns: time of a masked step; the share of removed patches that differ between two draws; mean and
    deviation of acc1 over seeds after the last masked epoch and after the whole one; the paired difference
    to random, and of a variant to the row of its mask, with standard errors; acc1 when random's run ends."""
    found = read_results(options.results)
    times = read_numbers(TIMES)
    shares = read_numbers(SHARES)
    columns = ["run", "rule", "seeds", "time", "two draws", "last but one", "last epoch",
               "minus random", "minus its mask", "at equal time"]
    for patch_size in PATCH_SIZES:
        keys = [newest(found, patch_size, name) for name in SMALL]
        rows = [cells(found, times, shares, key) for key in keys if key]
        if not rows:
            continue
        # A column without a cell is left out. The rule is told as long as a row still has the old one.
        shown = [column for column in columns if any(row[column] for row in rows)]
        if not any(row["rule"] == OLD_RULE for row in rows):
            shown.remove("rule")
        print_table(f"{num_patches(patch_size)} patches", rows, shown)

    every = []
    for patch_size in PATCH_SIZES:
        for name in ROWS:
            every += [(patch_size, rule, name) for rule in (RULE, OLD_RULE)]
    rows = [cells(found, times, shares, key) for key in every if found[key]]
    print_table("Every row", rows, ["patches", *columns])
    ends = [f"{end_of_random(times, size):.1f} epochs of none with {num_patches(size)} patches"
            for size in PATCH_SIZES if (size, "random") in times]
    print(f"At equal time: when random's run ends, after {', '.join(ends)}; in brackets the epoch.")
    draw(found, os.path.splitext(options.results)[0] + ".png")


def curves_over_epochs(found):
    """[(text of the legend, color, x, y, half width of the band)]: the mean of acc1 with 64 patches and its
    standard deviation over seeds."""
    curves = []
    epochs = np.arange(1, EPOCHS + 1)
    for name, color in COLORS.items():
        key = newest(found, 8, name)
        if key and len(found[key]) > 1:
            acc1 = np.array([*found[key].values()])
            curves.append((f"{name}, {len(acc1)} seeds", color, epochs, acc1.mean(0), acc1.std(0, ddof=1)))
    return curves


def lines_over_patches(found):
    """The same for acc1 minus random and its standard error over the number of patches: of masks that have
    results by the present rule at each."""
    curves = []
    sizes = np.array([num_patches(patch_size) for patch_size in PATCH_SIZES])
    for name, color in COLORS.items():
        points = [minus(found, (patch_size, RULE, name), "random") for patch_size in PATCH_SIZES]
        if None not in points:
            mean, error = np.array(points).T
            curves.append((name, color, sizes, mean, error))
    return curves


def draw(found, path):
    """Draws acc1 over epochs and, when there are results of it, minus random over patches."""
    panels = {
        "acc1, %, 64 patches, over epochs, the last one on whole images": curves_over_epochs(found),
        "acc1 minus random after the last epoch, over the number of patches": lines_over_patches(found),
    }
    panels = {title: curves for title, curves in panels.items() if len(curves) > 1}  # random is no comparison
    image = Image.new("RGB", (430 * len(panels), 330 + 16 * len(COLORS)), "white")
    canvas = ImageDraw.Draw(image, "RGBA")  # the last two digits of a color are its opacity
    for number, (title, curves) in enumerate(panels.items()):
        left = 430 * number
        series = []
        for _, color, x, y, width in curves:
            series += [(color + "00", x, y - width), (color + "00", x, y + width), (color, x, y)]
        across, down = evaluate.plot(canvas, left, title, series)
        for row, (text, color, x, y, width) in enumerate(curves):
            there = list(zip(across(x), down(y + width)))  # along one edge of the band,
            back = list(zip(across(x), down(y - width)))[::-1]  # and back along the other
            canvas.polygon(there + back, color + "38")
            canvas.text((left + 50, 320 + 16 * row), text, color, font_size=12)
    image.save(path)


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("prepare", help="write shards and a test folder")
    command.add_argument("archive", help="folder of tiny-imagenet-200")
    command.add_argument("out", help="folder to write")
    command.add_argument("--classes", type=int, default=40,
                         help="how many, by name; of 40 350 training images each, else all 500 (default: 40)")
    command.set_defaults(work=prepare)

    command = commands.add_parser("run", help="run what is missing of the grid")
    command.add_argument("data", help="folder that prepare wrote")
    command.add_argument("out", help="folder for the runs, each in its own")
    command.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (default: 2)")
    command.add_argument("--workers", type=int, default=0, help="data workers of each run (default: 0)")
    command.add_argument("--rows", nargs="+", default=[*ROWS], choices=ROWS, metavar="ROW",
                         help="run only these rows of the grid, such as random pgs (default: all)")
    command.add_argument("--patch-size", type=int, nargs="+", default=PATCH_SIZES, choices=PATCH_SIZES,
                         help="run only these sizes (default: both)")
    command.add_argument("--seeds", type=int, nargs="+", help="run only these seeds (default: all)")
    command.add_argument("--results", default=RESULTS,
                         help=f"file that keeps the results, a line for each run (default: {RESULTS})")
    command.set_defaults(work=run)

    command = commands.add_parser("time", help="time the rows that have a result")
    command.add_argument("data", help="folder that prepare wrote")
    command.add_argument("out", help="folder for the runs, each in its own")
    command.add_argument("--patch-size", type=int, nargs="+", default=PATCH_SIZES, choices=PATCH_SIZES,
                         help="time only these sizes (default: both)")
    command.set_defaults(work=time_rows, workers=0)

    command = commands.add_parser("table", help="print the tables, draw the picture beside the results")
    command.add_argument("--results", default=RESULTS, help=f"file to read (default: {RESULTS})")
    command.set_defaults(work=table)

    options = parser.parse_args()
    options.work(options)


if __name__ == "__main__":
    main()
