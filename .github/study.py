"""A comparison of the masks on Tiny-ImageNet: one loop, one grid, several seeds. Run it in the repository.

    python .github/study.py prepare tiny-imagenet-200/ tiny    shards and a test folder of the archive
    python .github/study.py run tiny runs --jobs 2             every run of the grid that is not finished yet
    python .github/study.py time tiny runs                     what a step of each row costs
    python .github/study.py table                              the tables of the README, and .github/study.png

Each run is an ordinary command line of clip_pgs.py, which is printed. A run that was killed goes on where it
was. What came out of a run is kept as a line of .github/study.jsonl, from which the tables are made.
"""
import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from glob import glob

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

sys.path.insert(0, os.getcwd())
import data
import evaluate

RESULTS, TIMES = ".github/study.jsonl", ".github/study_time.json"
COMMON = ("--model demo --image-size 64 --patch-size 8 --context-length 24 --batch-size 128 --epochs 8 "
          "--unmasked-epochs 1 --lr 1e-3 --warmup 50 --workers 0 --vocab-size 2048")
FIVE = {"random": "--mask random", "pgs": "--mask pgs", "cluster": "--mask cluster",
        "attentive": "--mask attentive", "none": "--mask none"}  # with five seeds
THREE = {  # with three
    "center": "--mask center",
    "pgs --no-transport": "--mask pgs --no-transport",
    "pgs --no-edges": "--mask pgs --no-edges",
    "pgs --no-embeddings": "--mask pgs --no-embeddings",
    "cluster --no-embeddings": "--mask cluster --no-embeddings",
    "pgs, ratio 0.3 0.5": "--mask pgs --ratio 0.3 0.5",
    "attentive, two views": "--mask attentive --views 2 --scale 0.5 1",
    "pgs, two views": "--mask pgs --views 2 --scale 0.5 1",
    "attentive, two views, contrast": "--mask attentive --views 2 --contrast simclr byol --scale 0.5 1",
    "pgs, two views, contrast": "--mask pgs --views 2 --contrast simclr byol --scale 0.5 1",
    "none, SLIP's losses": "--mask none --views 2 --contrast simclr --scale 0.08 1",
    "random, ratio 0.75": "--mask random --ratio 0.75",
    "center, ratio 0.75": "--mask center --ratio 0.75",
    "pgs, ratio 0.75": "--mask pgs --ratio 0.75",
    "random, 5 text tokens": "--mask random --text-tokens 5",
    "center, 5 text tokens": "--mask center --text-tokens 5",
    "pgs, 5 text tokens": "--mask pgs --text-tokens 5"}
ROWS = FIVE | THREE
# What is missing when time ends should matter least: the five masks with all seeds come first.
GRID = [(name, seed) for seed in range(5) for name in FIVE]
GRID += [(name, seed) for name in THREE for seed in range(3)]
TEMPLATES = ("a photo of a {c}", "a blurry photo of a {c}", "a cropped photo of the {c}.", "the {c}", "a {c}",
             "a snapshot showing a {c}", "this is a picture of a {c}", "a {c} in the middle of the frame.",
             "a close-up of a {c}", "there is a {c}", "a small picture of the {c}", "an old photo of a {c}")


def prepare(options):
    """Writes shards with captions and a test folder, of the archive's first 40 classes: 350 training images
    of each, and all 50 validation images."""
    rng, root = random.Random(0), options.archive
    with open(os.path.join(root, "words.txt"), encoding="utf-8") as file:
        words = dict(line.rstrip("\n").split("\t")[:2] for line in file)
    with open(os.path.join(root, "val", "val_annotations.txt"), encoding="utf-8") as file:
        tests = [line.split("\t")[:2] for line in file]
    classes = sorted(os.listdir(os.path.join(root, "train")))[:40]
    names = [words[name].split(",")[0] for name in classes]
    tests = [(os.path.join(root, "val", "images", name), classes.index(label))
             for name, label in tests if label in classes]
    pictures = [(path, label) for label, name in enumerate(classes)
                for path in sorted(glob(os.path.join(root, "train", name, "images", "*.JPEG")))[:350]]
    rng.shuffle(pictures)

    def samples(paths, text):
        for path, label in paths:
            with open(path, "rb") as file:
                yield {"jpg": file.read(), **text(label)}

    data.write_shards(os.path.join(options.out, "train"), samples(
        pictures, lambda label: {"txt": rng.choice(TEMPLATES).replace("{c}", names[label]).encode()}))
    number = data.write_shards(os.path.join(options.out, "test"), samples(
        tests, lambda label: {"cls": str(label).encode()}), name="{}.tar")
    for name, lines in {"test/nshards.txt": [number], "classnames.txt": names,
                        "zeroshot_classification_templates.txt": TEMPLATES}.items():
        with open(os.path.join(options.out, name), "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
    print(f"wrote {len(pictures)} training and {len(tests)} test images of {len(classes)} classes")


def results():
    """{name: {seed: [acc1 after each epoch]}} of study.jsonl."""
    found = defaultdict(dict)
    if os.path.exists(RESULTS):
        with open(RESULTS, encoding="utf-8") as file:
            for line in map(json.loads, file):
                found[line["name"]][line["seed"]] = line["acc1"]
    return found


def run_one(job):
    """Runs a cell of the grid, or the rest of it, and keeps what came out; returns what went wrong."""
    name, seed, folder, command = job
    print(" ".join(command), flush=True)
    status = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)
    if status.returncode:
        return f"{name}, seed {seed}: {status.stderr.strip().splitlines()[-1]}"
    records = evaluate.read_log(os.path.join(folder, "log.jsonl"))
    accuracy = [next(iter(record["eval"].values()))["acc1"] for record in records if "eval" in record]
    with open(RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(dict(name=name, seed=seed, acc1=[round(x, 5) for x in accuracy])) + "\n")


def command_line(options, name, out, *more):
    """The command of a row of the grid."""
    return [sys.executable, "clip_pgs.py", "--data", f"{options.data}/train/*.tar", *COMMON.split(),
            *ROWS[name].split(), "--out", out, *more]


def run(options):
    """Runs what is missing of the grid, `jobs` runs at a time."""
    found, jobs = results(), []
    for name, seed in GRID:
        if seed not in found[name]:
            folder = os.path.join(options.out, f"{name.replace(', ', '_').replace(' ', '_')}-{seed}")
            jobs.append((name, seed, folder, command_line(options, name, folder, "--val", options.data,
                                                          "--seed", str(seed), "--resume")))
    with ThreadPoolExecutor(options.jobs) as pool:
        faults = [fault for fault in pool.map(run_one, jobs) if fault]
    sys.exit("\n".join(faults) or None)


def time_rows(options):
    """Times 20 steps of each row that has a result, in turns, twice; keeps the medians, against `none`."""
    speeds, out, found = defaultdict(list), os.path.join(options.out, "time"), results()
    for name in [name for name in ROWS if found[name] or name == "none"] * 2:
        shutil.rmtree(out, ignore_errors=True)
        command = command_line(options, name, out, "--steps", "20", "--unmasked-epochs", "0")
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
        records = evaluate.read_log(os.path.join(out, "log.jsonl"))
        speeds[name] += [record["images_per_s"] for record in records[8:]]
        print(f"{name}: {np.median(speeds[name]):.0f} images/s", flush=True)
    none = np.median(speeds["none"])
    with open(TIMES, "w") as file:
        json.dump({name: round(float(none / np.median(x)), 3) for name, x in speeds.items()}, file, indent=1)


def with_spread(values):
    """mean ± standard deviation over the seeds."""
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def table(options):
    """Prints a row per run: mean and deviation of acc1 over seeds after the last masked epoch and after the
    whole one, the paired difference to random with its standard error, and acc1 when the fastest of the five
    masks ends."""
    found, times = results(), {}
    if os.path.exists(TIMES):
        with open(TIMES) as file:
            times = json.load(file)
    # A masked epoch costs its row's time, the last one that of `none`, and of two whole images twice that.
    clocks = {name: np.cumsum([time] * 7 + [max(time, 1 + ("--views 2" in ROWS[name]))])
              for name, time in times.items() if found[name]}
    budget = min((clock[-1] for name, clock in clocks.items() if name in FIVE), default=0) + 1e-6
    print("| run | seeds | time | epoch 7 | epoch 8 | minus random | at equal time |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name in filter(found.get, ROWS):
        runs = {seed: 100 * np.array(acc1) for seed, acc1 in found[name].items()}
        masked, whole = ([acc1[epoch] for acc1 in runs.values()] for epoch in (-2, -1))
        paired = [acc1[-1] - 100 * found["random"][seed][-1] for seed, acc1 in runs.items()
                  if seed in found["random"]]
        difference, level = "", ""
        if name != "random" and len(paired) > 1:
            difference = f"{np.mean(paired):+.1f} ± {np.std(paired, ddof=1) / len(paired) ** 0.5:.1f}"
        done = int((clocks.get(name, np.array([math.inf])) <= budget).sum())
        if done:
            level = f"{np.mean([acc1[done - 1] for acc1 in runs.values()]):.1f} ({done})"
        time = f"{times[name]:.2f}" if name in times else ""
        cells = [name, len(runs), time, with_spread(masked), with_spread(whole)]
        print("| " + " | ".join(map(str, [*cells, difference, level])) + " |")
    print(f"\nAt equal time: when the fastest of the five ends, {budget:.1f} epochs of none; in brackets the epoch.")
    draw(found)


def draw(found):
    """Writes study.png: for each of the five masks the mean of acc1, and as a band its standard deviation."""
    image, series = Image.new("RGB", (430, 420), "white"), []
    shown = [name for name in FIVE if len(found[name]) > 1]
    for name, color in zip(shown, evaluate.COLORS):
        curves = 100 * np.array(list(found[name].values()))
        mean, spread, epochs = curves.mean(0), curves.std(0, ddof=1), np.arange(1, curves.shape[1] + 1)
        pale = tuple(200 + value * 55 // 255 for value in ImageColor.getrgb(color))
        series = [(pale, epochs, np.stack([mean - spread, mean + spread])), *series, (color, epochs, mean)]
    draw = ImageDraw.Draw(image)
    evaluate.plot(draw, 0, "acc1, %, over epochs, the last one on whole images", series)
    for number, (name, color) in enumerate(zip(shown, evaluate.COLORS)):
        text = f"{name}, {len(found[name])} seeds"
        draw.text((50, 320 + 16 * number), text, color, ImageFont.load_default(12))
    image.save(".github/study.png")


parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
commands = parser.add_subparsers(dest="command", required=True)
for command, arguments in {"prepare": ("archive", "out"), "run": ("data", "out"), "time": ("data", "out"),
                           "table": ()}.items():
    subparser = commands.add_parser(command)
    for argument in arguments:
        subparser.add_argument(argument)
    if command == "run":
        subparser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
options = parser.parse_args()
{"prepare": prepare, "run": run, "time": time_rows, "table": table}[options.command](options)
