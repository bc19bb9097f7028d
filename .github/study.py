"""A fair comparison of the masks on Tiny-ImageNet: one loop, one grid, several seeds. Run it from the project's folder.

    python .github/study.py prepare tiny-imagenet-200/ tiny    shards and an evaluation folder from the public archive
    python .github/study.py run tiny runs --jobs 2             every run of the grid; a finished one is not run again
    python .github/study.py table                              the tables of the README, and .github/study.png

Each run is an ordinary command line of clip_pgs.py, which is printed. A run that was killed goes on where it was. What
came out of a run is kept as a line of .github/study.jsonl, from which the tables are made.
"""
import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from glob import glob

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, os.getcwd())
import data
import evaluate

RESULTS = ".github/study.jsonl"
COMMON = ("--model demo --image-size 64 --patch-size 8 --context-length 24 --batch-size 128 --epochs 8 --unmasked-epochs 1 "
          "--lr 1e-3 --warmup 50 --workers 0 --vocab-size 2048")
FIVE = {"random": "--mask random", "pgs": "--mask pgs", "cluster": "--mask cluster", "attentive": "--mask attentive",
        "none": "--mask none"}
THREE = {"center": "--mask center", "pgs --no-transport": "--mask pgs --no-transport",
         "pgs --no-edges": "--mask pgs --no-edges", "pgs --no-embeddings": "--mask pgs --no-embeddings",
         "cluster --no-embeddings": "--mask cluster --no-embeddings", "pgs, ratio 0.3 0.5": "--mask pgs --ratio 0.3 0.5",
         "attentive, two views": "--mask attentive --views 2 --scale 0.5 1",
         "pgs, two views": "--mask pgs --views 2 --scale 0.5 1",
         "attentive, two views, contrast": "--mask attentive --views 2 --contrast simclr byol --scale 0.5 1",
         "pgs, two views, contrast": "--mask pgs --views 2 --contrast simclr byol --scale 0.5 1",
         "none, SLIP's losses": "--mask none --views 2 --contrast simclr --scale 0.08 1",
         "random, ratio 0.75": "--mask random --ratio 0.75", "center, ratio 0.75": "--mask center --ratio 0.75",
         "pgs, ratio 0.75": "--mask pgs --ratio 0.75", "random, 5 text tokens": "--mask random --text-tokens 5",
         "center, 5 text tokens": "--mask center --text-tokens 5", "pgs, 5 text tokens": "--mask pgs --text-tokens 5"}
# What is missing when time ends should matter least: the five masks with all seeds first.
GRID = [(name, seed) for seed in range(5) for name in FIVE] + [(name, seed) for name in THREE for seed in range(3)]
TEMPLATES = ("a photo of a {c}", "a blurry photo of a {c}", "a cropped photo of the {c}.", "a snapshot showing a {c}",
             "this is a picture of a {c}", "a {c} in the middle of the frame.", "a close-up of a {c}", "there is a {c} here",
             "a small picture of the {c}", "an old photo of a {c}", "the {c}", "a {c}")


def prepare(options):
    """Shards with captions, and a test folder, of the first 40 classes of the public archive; 350 images of each class
    train, its 50 validation images test."""
    rng, root = random.Random(0), options.archive
    with open(os.path.join(root, "words.txt"), encoding="utf-8") as file:
        words = {line.split("\t")[0]: line.split("\t")[1].strip().split(",")[0] for line in file}
    classes = sorted(os.listdir(os.path.join(root, "train")))[:40]
    pictures = [(path, label) for label, name in enumerate(classes)
                for path in sorted(glob(os.path.join(root, "train", name, "images", "*.JPEG")))[:350]]
    rng.shuffle(pictures)
    with open(os.path.join(root, "val", "val_annotations.txt"), encoding="utf-8") as file:
        tests = [line.split("\t")[:2] for line in file]
    tests = [(os.path.join(root, "val", "images", name), classes.index(label)) for name, label in tests if label in classes]

    def samples(paths, text):
        for path, label in paths:
            with open(path, "rb") as file:
                yield {"jpg": file.read(), **text(words[classes[label]], label)}

    data.write_shards(os.path.join(options.out, "train"), samples(
        pictures, lambda name, label: {"txt": rng.choice(TEMPLATES).replace("{c}", name).encode()}))
    number = data.write_shards(os.path.join(options.out, "test"), samples(
        tests, lambda name, label: {"cls": str(label).encode()}), name="{}.tar")
    for name, lines in {"test/nshards.txt": [number], "classnames.txt": [words[name] for name in classes],
                        "zeroshot_classification_templates.txt": TEMPLATES}.items():
        with open(os.path.join(options.out, name), "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
    print(f"wrote {len(pictures)} training images and {len(tests)} test images of {len(classes)} classes to {options.out}")


def results():
    """{name: {seed: line}} of study.jsonl."""
    found = defaultdict(dict)
    if os.path.exists(RESULTS):
        with open(RESULTS, encoding="utf-8") as file:
            for line in map(json.loads, file):
                found[line["name"]][line["seed"]] = line
    return found


def collect(name, seed, folder):
    """Adds what a finished run left in its log to study.jsonl."""
    records = evaluate.read_log(os.path.join(folder, "log.jsonl"))
    accuracy = [round(next(iter(record["eval"].values()))["acc1"], 5) for record in records if "eval" in record]
    steps = [record for record in records if "eval" not in record]
    with open(RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(dict(name=name, seed=seed, acc1=accuracy, steps=len(steps), seconds=round(
            sum(steps[0]["batch"] / record["images_per_s"] if "batch" in steps[0] else 128 / record["images_per_s"]
                for record in steps), 1))) + "\n")


def run_one(job):
    """Runs one cell of the grid, or the rest of it."""
    (name, seed), folder, command = job
    print(" ".join(command), flush=True)
    status = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)
    if status.returncode:
        return f"{name}, seed {seed}: {status.stderr.strip().splitlines()[-1]}"
    collect(name, seed, folder)


def run(options):
    """Runs what is missing of the grid, `jobs` runs at a time."""
    found, jobs = results(), []
    for name, seed in GRID:
        if seed not in found[name]:
            folder = os.path.join(options.out, f"{name.replace(', ', '_').replace(' ', '_')}-{seed}")
            command = [sys.executable, "clip_pgs.py", "--data", f"{options.data}/train/*.tar", "--val", options.data,
                       *COMMON.split(), *({**FIVE, **THREE})[name].split(), "--seed", str(seed), "--out", folder, "--resume"]
            jobs.append(((name, seed), folder, command))
    with ThreadPoolExecutor(options.jobs) as pool:
        faults = [fault for fault in pool.map(run_one, jobs) if fault]
    sys.exit("\n".join(faults) or None)


def time_rows(options):
    """Times 30 steps of each row in turns, three rounds, and writes the medians to .github/study_time.json."""
    speeds = defaultdict(list)
    for _ in range(3):
        for name, arguments in {**FIVE, **THREE}.items():
            out = os.path.join(options.out, "time")
            subprocess.run(["rm", "-rf", out])
            subprocess.run([sys.executable, "clip_pgs.py", "--data", f"{options.data}/train/*.tar", *COMMON.split(),
                            *arguments.split(), "--steps", "40", "--unmasked-epochs", "0", "--out", out], check=True,
                           env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            speeds[name] += [record["images_per_s"] for record in evaluate.read_log(os.path.join(out, "log.jsonl"))[10:]]
            print(name, round(float(np.median(speeds[name])), 1), flush=True)
    none = np.median(speeds["none"])
    with open(".github/study_time.json", "w") as file:
        json.dump({name: round(float(none / np.median(values)), 3) for name, values in speeds.items()}, file, indent=1)


def table(options):
    """Prints the tables: mean and standard deviation over seeds, and the same at the time of the fastest row."""
    found, times = results(), {}
    if os.path.exists(".github/study_time.json"):
        with open(".github/study_time.json") as file:
            times = json.load(file)
    rows = []
    for name in {**FIVE, **THREE}:
        runs = found[name]
        if not runs:
            continue
        ends = 100 * np.array([line["acc1"] for line in runs.values()])             # (seeds, epochs)
        paired = np.array([100 * (line["acc1"][-1] - found["random"][seed]["acc1"][-1])
                           for seed, line in runs.items() if seed in found["random"]])
        rows.append({"run": name, "seeds": len(runs), "time": times.get(name, ""),
                     "before": f"{ends[:, -2].mean():.1f} ± {ends[:, -2].std(ddof=1):.1f}" if len(runs) > 1 else
                     f"{ends[0, -2]:.1f}", "after": f"{ends[:, -1].mean():.1f} ± {ends[:, -1].std(ddof=1):.1f}"
                     if len(runs) > 1 else f"{ends[0, -1]:.1f}",
                     "minus random": "" if name == "random" or len(paired) < 2 else
                     f"{paired.mean():+.1f} ± {paired.std(ddof=1) / len(paired) ** 0.5:.1f}"})
    for row in [dict.fromkeys(rows[0], "---"), *rows] if rows else ():
        if row["run"] == "---":
            print("| " + " | ".join(rows[0]) + " |")
        print("| " + " | ".join(map(str, row.values())) + " |")
    if times:
        # A masked epoch costs its row's time, the unmasked one that of none; clocks in epochs of none.
        clocks = {name: np.cumsum([times[name]] * 7 + [max(1.0, times[name]) if "two views" in name else 1.0])
                  for name in times if found[name]}
        budget = min(clock[-1] for clock in clocks.values())
        print(f"\nAt the time of the fastest run, {budget:.1f} epochs of none:\n\n| run | epochs | acc1 |\n| --- | --- | --- |")
        for name, clock in clocks.items():
            done = int((clock <= budget + 1e-6).sum())
            if done:
                print(f"| {name} | {done} | {100 * np.mean([line['acc1'][done - 1] for line in found[name].values()]):.1f} |")
    draw(found)


def draw(found):
    """Writes .github/study.png: per mask the mean curve of acc1 and the band of its seeds' standard deviation."""
    image, series = Image.new("RGB", (430, 420), "white"), []
    shown = [name for name in FIVE if found[name]]
    for name, color in zip(shown, evaluate.COLORS):
        curve = 100 * np.array([line["acc1"] for line in found[name].values()])
        mean, spread, epochs = curve.mean(0), curve.std(0, ddof=1) if len(curve) > 1 else 0, np.arange(1, curve.shape[1] + 1)
        pale = tuple(200 + value * 55 // 255 for value in evaluate.ImageColor.getrgb(color))
        series = [(pale, epochs, np.stack([mean - spread, mean + spread])), *series, (color, epochs, mean)]
    draw = ImageDraw.Draw(image)
    evaluate.plot(draw, 0, "Tiny-ImageNet, 40 classes: acc1, %, over epochs, the last on whole images", series)
    for number, (name, color) in enumerate(zip(shown, evaluate.COLORS)):
        draw.text((50, 320 + 16 * number), f"{name}, {len(found[name])} seeds", color, ImageFont.load_default(12))
    image.save(".github/study.png")


parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
commands = parser.add_subparsers(dest="command", required=True)
for command, arguments in {"prepare": ("archive", "out"), "run": ("data", "out"), "time": ("data", "out"), "table": ()}.items():
    subparser = commands.add_parser(command)
    for argument in arguments:
        subparser.add_argument(argument)
    if command == "run":
        subparser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
options = parser.parse_args()
{"prepare": prepare, "run": run, "time": time_rows, "table": table}[options.command](options)
