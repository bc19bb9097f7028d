"""What a CLIP is worth (ours, open_clip's, OpenAI's): the papers' evaluations.

    python evaluate.py out/ckpt.pt                               the folders of --val in training
    python evaluate.py out/ckpt.pt --data imagenet1k flickr30k   folders in CLIP_benchmark's layout
    python evaluate.py ViT-B-16.pt --vocab bpe_simple_vocab_16e6.txt.gz --data imagenet1k --probe
    python evaluate.py out/ckpt.pt --sugarcrepe sugar-crepe/data --images coco/val2017
    python evaluate.py --curves out/*/log.jsonl                  the curves of runs in one picture

Every zero-shot and retrieval metric equals CLIP_benchmark's. Top to bottom: folders, embed,
classification, retrieval; linear probe, compositionality, pictures and weights, each of which a
reader may skip; evaluate and main.
"""
import argparse
import json
import math
import os
import re
import sys
import tempfile
import textwrap
import warnings
from collections import defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

import data

# -----------------------------------------------------------------------------
# Folders, in the layout of LAION's CLIP_benchmark. All of it is read and checked before the first
# image is encoded. A sample that cannot be read is an error, never skipped: a score over fewer
# samples would be a lie.

# Where an image is: `size` bytes of a file from `offset` on, or all of it. Messages call it `name`.
Sample = namedtuple("Sample", "path offset size name", defaults=(0, -1, "the picture"))
# A split. Its targets are the classes of the samples, as numbers; or, for retrieval, a list of
# captions for each sample, and no classnames and templates.
Folder = namedtuple("Folder", "samples targets classnames templates")

def read_lines(path, blank=False):
    """The lines of a text file. ValueError if it is missing, not UTF-8, or a line is blank that may
    not be."""
    try:
        text = Path(path).read_text("utf-8-sig")
    except (FileNotFoundError, UnicodeDecodeError):
        raise ValueError(f"{path}: missing or not UTF-8; expected CLIP_benchmark's layout") from None
    lines = [line.strip() for line in text.splitlines()] or [""]
    if not any(lines) or ("" in lines and not blank):
        raise ValueError(f"{path}: line {lines.index('') + 1} is blank")
    return lines

def read_shard(shard, extension):
    """Yields (Sample, text of the `extension` file beside it) of each image in a tar, in order."""
    samples, fault = data.tar_samples(shard)
    if fault:
        raise ValueError(fault)
    with open(shard, "rb") as file:
        for key, files in samples:
            image = next((name for name in data.IMAGE_EXTENSIONS if name in files), None)
            if image is None:
                raise ValueError(f"{shard}: sample {key} has no image")
            if extension not in files:
                raise ValueError(f"{shard}: sample {key} has no .{extension}")
            offset, size = files[extension]
            try:
                file.seek(offset)
                text = file.read(size).decode("utf-8-sig")
            except UnicodeDecodeError:
                text = ""
            except OSError as error:
                raise OSError(f"{shard}: {error.strerror}") from None
            if not text.strip():
                raise ValueError(f"{shard}: {key}.{extension} is empty or not UTF-8")
            yield Sample(shard, *files[image], f"{key}.{image}"), text

def read_split(folder, extension):
    """Yields what read_shard does, for all shards of a split."""
    number = read_lines(f"{folder}/nshards.txt")[0]
    there = len(list(Path(folder).glob("[!.]*.tar")))  # no ._0.tar, which macOS puts beside 0.tar
    if there == 0 or number != str(there):
        raise ValueError(f"{folder}/nshards.txt: says {number}, but the folder holds {there} tars")
    for i in range(there):
        yield from read_shard(f"{folder}/{i}.tar", extension)

def read_folder(folder, split="test"):
    """The Folder at a path. ValueError with one line for what is missing or contradicts itself."""
    if not os.path.isdir(folder):
        raise ValueError(f"{folder}: no such folder")
    kind = "classification"
    if os.path.exists(f"{folder}/dataset_type.txt"):
        kind = read_lines(f"{folder}/dataset_type.txt")[0].lower()
    if kind == "retrieval":
        samples, texts = zip(*read_split(f"{folder}/{split}", "txt"))
        return Folder(samples, [text.splitlines() for text in texts], [], [])
    if kind != "classification":
        raise ValueError(f"{folder}/dataset_type.txt: '{kind}', expected retrieval or classification")
    samples, labels = zip(*read_split(f"{folder}/{split}", "cls"))
    classnames = read_lines(f"{folder}/classnames.txt", blank=True)  # in one of CLEVR a class has no name
    templates = read_lines(f"{folder}/zeroshot_classification_templates.txt")
    for line in templates:
        if "{c}" not in line:
            raise ValueError(f"{folder}/zeroshot_classification_templates.txt: '{line}' lacks {{c}}")
    for sample, label in zip(samples, labels):
        if not label.strip().isdecimal() or int(label) >= len(classnames):
            raise ValueError(f"{sample.path}: the label of {sample.name} is '{label.strip()[:20]}', "
                             f"but classnames.txt has {len(classnames)} lines, counted from 0")
    return Folder(samples, [int(label) for label in labels], classnames, templates)

# -----------------------------------------------------------------------------
# Embed: open_clip's evaluation transform, bit for bit, then unit features. Of several ranks, rank r
# encodes every world_size-th sample from the r-th on, and all get all features.

IMAGE_BATCH = 128  # encoded at a time, enough to fill a GPU
TEXT_BATCH = 512

def ranks():
    """(rank, world_size): (0, 1) without torchrun."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1

def resize_and_crop(image, size):
    """The middle of a PIL image, its shorter side resized to `size`: (3, size, size) uint8, RGB."""
    image = data.eight_bits(image)
    shorter = min(image.size)
    # Of a very long picture we keep the middle first. To resize all of it could fill the memory.
    longest = data.MAX_PIXELS // size ** 2 * shorter
    cut_x = max(0, image.width - longest) // 2
    cut_y = max(0, image.height - longest) // 2
    image = ImageOps.crop(image, (cut_x, cut_y))
    # As open_clip does, we cut the new size off to whole pixels and round where the crop begins.
    width = int(size * image.width / shorter)
    height = int(size * image.height / shorter)
    left = round((width - size) / 2)
    top = round((height - size) / 2)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    image = image.crop((left, top, left + size, top + size))
    pixels = np.array(image.convert("RGB"))  # after the resize, as open_clip; read_image did it before
    return torch.from_numpy(pixels).permute(2, 0, 1)

def preprocess(image, size):
    """What the encoder sees of a PIL image: (3, size, size) float."""
    return data.normalize(resize_and_crop(image, size))

def read_image(sample, size, upright=False):
    """The middle of a Sample, (3, size, size) uint8: as CLIP_benchmark sees it, which converts to RGB
    first, or as people do, upright and on white. ValueError with its name if it does not decode."""
    try:
        with open(sample.path, "rb") as file:
            file.seek(sample.offset)
            raw = file.read(sample.size)
        with data.open_image(raw) as image:
            if upright:
                image = data.to_rgb(data.upright(image))
            else:
                image = data.eight_bits(image).convert("RGB")
            return resize_and_crop(image, size)
    except (ValueError, OSError) as error:
        cause = getattr(error, "strerror", None) or error
        raise ValueError(f"{sample.path}: {cause} ({sample.name} does not decode)") from None

def read_batches(samples, size, workers, name):
    """Yields the images of samples in batches (B, 3, size, size) uint8; threads read the next one
    while the caller works on this one. Threads, not processes: they start at once, even in the
    middle of a training run, and Pillow decodes without Python's lock."""
    read = partial(read_image, size=size)
    starts = tqdm(range(0, len(samples), IMAGE_BATCH), name, leave=False, unit=" batches", disable=not name)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        ahead = pool.map(read, samples[:IMAGE_BATCH])
        for start in starts:
            images = torch.stack(list(ahead))
            ahead = pool.map(read, samples[start + IMAGE_BATCH:start + 2 * IMAGE_BATCH])
            yield images

def fail_together(fault):
    """ValueError on all ranks if one has a fault that is not "": none may wait for one that is gone."""
    _, world_size = ranks()
    if world_size > 1:
        faults = [""] * world_size
        dist.all_gather_object(faults, fault)
        fault = max(faults)  # "" comes before any text
    if fault:
        raise ValueError(fault)

def collect(model, features, total):
    """Unit features (total, E) of all samples, in order, on all ranks; features: a list of (B, E), of
    this rank."""
    rank, world_size = ranks()
    joined = model.text_projection.new_zeros(total, model.text_projection.shape[1])
    if features:  # there may be fewer samples than ranks
        joined[rank::world_size] = torch.cat(features)
    if world_size > 1:
        dist.all_reduce(joined)  # a sum: each row is zero on all ranks but one
    if not joined.isfinite().all():
        raise ValueError("the features are not finite numbers: the training has diverged")
    return F.normalize(joined, dim=-1)

@torch.no_grad()
def embed_images(model, samples, config, workers=4, name=""):
    """Unit features (N, E) of samples, on the model's device; name: what rank 0's progress bar says."""
    rank, world_size = ranks()
    own = samples[rank::world_size]
    if rank > 0:
        name = ""
    features = []
    fault = ""
    try:
        for images in read_batches(own, config.image_size, workers, name):
            images = data.normalize(images.to(model.logit_scale.device))
            features.append(model.encode_image(images))
    except ValueError as error:
        fault = str(error)
    fail_together(fault)
    return collect(model, features, len(samples))

@torch.no_grad()
def embed_texts(model, tokenizer, texts):
    """Unit features (N, E) of a list of str, on the model's device."""
    rank, world_size = ranks()
    own = texts[rank::world_size]
    features = []
    for start in range(0, len(own), TEXT_BATCH):
        tokens = tokenizer.encode(own[start:start + TEXT_BATCH])
        features.append(model.encode_text(tokens))
    return collect(model, features, len(texts))

# -----------------------------------------------------------------------------
# Zero-shot classification: the class whose sentences are nearest to the image.

def mean(x):
    """The mean of a tensor of counts or truths, as a plain number."""
    return x.double().mean().item()

def class_features(model, tokenizer, classnames, templates):
    """(C, E) unit features: of a class, the mean over the templates of its sentences' features."""
    texts = [template.replace("{c}", name) for name in classnames for template in templates]
    features = embed_texts(model, tokenizer, texts)                             # (C * templates, E)
    features = features.view(len(classnames), len(templates), -1).mean(1)       # (C, E)
    return F.normalize(features, dim=-1)

def classification_metrics(scores, labels):
    """acc1, acc5 (of five classes or more), mean_per_class_recall of scores (N, C), labels (N,)."""
    C = scores.shape[1]
    right = scores.topk(min(5, C)).indices == labels[:, None]                   # (N, 5)
    first = right[:, 0]                                                         # (N,)
    hits = labels[first].bincount(minlength=C)                                  # (C,)
    total = labels.bincount(minlength=C)
    recall = hits.double() / total
    recall = recall[total > 0]  # a class without an image has none
    metrics = {"acc1": mean(first)}
    if C >= 5:
        metrics["acc5"] = mean(right.any(1))
    metrics["mean_per_class_recall"] = mean(recall)
    return metrics

# -----------------------------------------------------------------------------
# Retrieval: the image of a caption, and a caption of an image.

def nearest(queries, gallery, k=10):
    """(Q, k) indices of the rows of gallery (G, E) nearest to each of queries (Q, E), best first."""
    found = []
    for some in queries.split(512):  # all scores of COCO's captions and images would take 500 MB
        scores = some @ gallery.T                                               # (512, G)
        found.append(scores.topk(min(k, len(gallery))).indices)
    return torch.cat(found)

def retrieval_metrics(image_features, text_features, image_of_text):
    """Recall at 1, 5, 10 in both directions, of features (I, E), (T, E); image_of_text (T,): the
    image of each caption. A query counts if one right answer is among its k nearest, as for CLIP."""
    images = nearest(text_features, image_features)                             # (T, 10)
    texts = nearest(image_features, text_features)                              # (I, 10)
    numbers = torch.arange(len(image_features), device=texts.device)            # (I,)
    right = {"image": images == image_of_text[:, None],
             "text": image_of_text[texts] == numbers[:, None]}
    metrics = {}
    for name in right:
        for k in (1, 5, 10):
            metrics[f"{name}_retrieval_recall@{k}"] = mean(right[name][:, :k].any(1))
    return metrics

# -----------------------------------------------------------------------------
# Linear probe, which a reader without --probe may skip: how well does a linear classifier do on the
# frozen features? CLIP_benchmark's is trained by ten epochs of SGD, so the numbers do not compare.

def pieces(features, labels):
    """Yields (features, then a one for the bias, in float64; labels) of 4096 samples at a time. Such
    copies, and the logits, of all of ImageNet at once would not fit into memory."""
    for x, y in zip(features.split(4096), labels.split(4096)):
        yield F.pad(x.double(), (0, 1), value=1.0), y                            # (4096, E + 1)

def fit_logistic(features, labels, start, C):
    """(classes, E + 1) weights, bias last, of L2-regularised logistic regression on features (N, E),
    by L-BFGS from the weights `start`: those of the least mean cross entropy + |weights|^2 /
    (2 C N), bias free of charge. C is scikit-learn's."""
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=1000, history_size=20, tolerance_grad=1e-6,
                                  tolerance_change=1e-9, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = weights[:, :-1].square().sum() / (2 * C * len(features))
        loss.backward()
        for x, y in pieces(features, labels):
            part = F.cross_entropy(x @ weights.T, y, reduction="sum") / len(features)
            part.backward()  # adds to the gradient now, so that these logits can go
            loss = loss + part.detach()
        return loss

    optimizer.step(closure)
    return weights.detach()

def probe_accuracy(weights, features, labels):
    """The share of features (N, E) whose class the weights of fit_logistic tell."""
    right = [(x @ weights.T).argmax(1) == y for x, y in pieces(features, labels)]
    return mean(torch.cat(right))

def linear_probe(train_features, train_labels, test_features, test_labels, num_classes):
    """(test accuracy, C, held-out accuracy). C is the best on a held-out tenth of the training set;
    the last fit is to all of it."""
    # The bias, which is free, makes up for taking the mean away. L-BFGS then needs far fewer steps.
    average = train_features.mean(0)
    order = torch.randperm(len(train_labels), generator=torch.Generator().manual_seed(0))
    order = order.to(train_labels.device)
    x = train_features[order] - average
    y = train_labels[order]
    n = max(1, len(order) // 10)  # held out
    zeros = x.new_zeros(num_classes, x.shape[1] + 1, dtype=torch.float64)
    weights = zeros
    accuracy = {}
    for C in (0.1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5, 1e6):  # each fit starts from the one before
        weights = fit_logistic(x[n:], y[n:], weights, C)
        accuracy[C] = probe_accuracy(weights, x[:n], y[:n])
    C = max(accuracy, key=accuracy.get)  # of equals the first, regularised most
    weights = fit_logistic(x, y, zeros, C)
    return probe_accuracy(weights, test_features - average, test_labels), C, accuracy[C]

# -----------------------------------------------------------------------------
# Compositionality, which a reader without --sugarcrepe may skip: is the true caption nearer to the
# image than an altered one? (SugarCrepe, Hsieh et al., NeurIPS 2023)

SUGARCREPE = "replace_obj replace_att replace_rel swap_obj swap_att add_obj add_att".split()

def read_questions(path):
    """(images' file names, captions, negative captions) of one of SugarCrepe's json files."""
    try:
        questions = json.loads(Path(path).read_bytes()).values()
        rows = [(question["filename"], question["caption"], question["negative_caption"])
                for question in questions]
        names, captions, negatives = zip(*rows)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: expected a filename, caption, negative_caption per question") from None
    return names, captions, negatives

def sugarcrepe(model, tokenizer, config, folder, images, workers=4):
    """{"sugar_crepe/replace_obj": {"acc": ...}, ...}, then the means of a kind; images: a folder,
    COCO's val2017."""
    accuracy = {}
    for kind in SUGARCREPE:
        names, captions, negatives = read_questions(f"{folder}/{kind}.json")
        samples = [Sample(f"{images}/{name}") for name in names]
        image = embed_images(model, samples, config, workers, kind)             # (N, E)
        right = (image * embed_texts(model, tokenizer, captions)).sum(1)        # (N,)
        wrong = (image * embed_texts(model, tokenizer, negatives)).sum(1)
        accuracy[kind] = mean(right > wrong)
    for group in ("replace", "swap", "add"):
        kinds = [kind for kind in SUGARCREPE if kind.startswith(group)]
        accuracy[group] = sum(accuracy[kind] for kind in kinds) / len(kinds)
    return {f"sugar_crepe/{kind}": {"acc": acc} for kind, acc in accuracy.items()}

# -----------------------------------------------------------------------------
# Pictures, which a reader may skip, as no metric needs them: sheets of masks, of what was found, of
# mistakes; curves of runs.

TILE, GAP, LINE = 160, 8, 15  # pixels: a picture, the space around it, a line of text
COLORS = "#1f77b4 #d62728 #2ca02c #9467bd #ff7f0e #8c564b #e377c2 #17becf #7f7f7f #bcbd22".split()

def save_png(path, image):
    """Writes a picture. OSError that names the path if it can't be."""
    with data.write_whole(path) as file:
        image.save(file, "PNG")

def sheet(path, tiles, columns):
    """Writes a PNG of tiles, row by row: (picture (3, H, W) uint8, text below it)."""
    lines = max(len(text.splitlines()) for _, text in tiles)
    width = TILE + 2 * GAP
    height = TILE + 2 * GAP + LINE * lines
    rows = math.ceil(len(tiles) / columns)
    image = Image.new("RGB", (columns * width, rows * height), "white")
    draw = ImageDraw.Draw(image)
    for number, (picture, text) in enumerate(tiles):
        x = number % columns * width + GAP
        y = number // columns * height + GAP
        picture = Image.fromarray(picture.permute(1, 2, 0).cpu().numpy())
        picture = picture.resize((TILE, TILE), Image.Resampling.BOX)  # keeps small pixels sharp
        image.paste(picture, (x, y))
        draw.text((x, y + TILE + 4), text, "black", font_size=12)
    save_png(path, image)

def heat_map(patches, side):
    """A grey picture (3, side, side) uint8 of a value per patch, (1, L): the highest is white."""
    grid = math.isqrt(patches.shape[1])
    shades = 255 * (patches / patches.max().clamp(min=1e-12))
    shades = F.interpolate(shades.view(1, 1, grid, grid), (side, side))
    return shades[0].byte().expand(3, -1, -1)

def frame_patches(image, patches, patch_size):
    """The image (3, H, H) uint8 with a green frame around each of the patches, (N,) indices."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    draw = ImageDraw.Draw(picture)
    width = max(1, patch_size // 8)
    for patch in patches.tolist():
        row, column = divmod(patch, image.shape[-1] // patch_size)
        x, y = column * patch_size, row * patch_size
        draw.rectangle((x, y, x + patch_size - 1, y + patch_size - 1), outline="lime", width=width)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)

def hide_removed(images, keep, valid, patch_size):
    """images (B, 3, H, H) uint8 with the removed patches grey; keep, valid as of clip_pgs.make_mask.
    They may have more rows than there are images: the first ones count."""
    grid = images.shape[-1] // patch_size
    if valid is None:
        valid = torch.ones_like(keep)
    shown = torch.zeros(len(keep), grid ** 2, device=keep.device)
    shown = shown.scatter(1, keep, valid.float())                               # (B, L)
    shown = shown.view(-1, 1, grid, grid)[:len(images)]
    shown = F.interpolate(shown, images.shape[2:]).cpu()                        # (B, 1, H, H)
    return images.where(shown > 0, 128)

def draw_masks(path, images, keep, valid, patch_size):
    """Writes a PNG of images (B, 3, H, H) uint8 and, below, of what their masks leave. keep is None:
    there is no mask."""
    left = images
    if keep is not None:
        left = hide_removed(images, keep, valid, patch_size)
    sheet(path, [(picture, "") for picture in torch.cat([images, left])], len(images))

def draw_retrieval(path, samples, captions, image_of_text, images, texts):
    """Writes a PNG of ten captions, evenly spread: each with its image, then the five images that are
    nearest to it, and which of them is right."""
    asked = sorted({number * len(captions) // 10 for number in range(10)})
    found = nearest(texts[asked], images, k=5).tolist()
    tiles = []
    for query, neighbours in zip(asked, found):
        own = image_of_text[query]
        tiles.append((read_image(samples[own], TILE), textwrap.fill(captions[query], 26)))
        for image in neighbours:
            text = "found" * (image == own)
            tiles.append((read_image(samples[image], TILE), text))
    sheet(path, tiles, 1 + len(found[0]))

def draw_mistakes(path, folder, scores, labels):
    """Writes a PNG of up to twenty mistakes, with both names: those in which the wrong class leads
    the true one by most."""
    of_label = scores.gather(1, labels[:, None])[:, 0]                          # (N,)
    lead = scores.amax(1) - of_label                                            # 0: it is right
    num_wrong = int((lead > 0).sum())
    tiles = []
    for i in lead.topk(min(20, num_wrong)).indices.tolist():
        predicted = folder.classnames[scores[i].argmax()]
        true = folder.classnames[labels[i]]
        text = f"predicted: {predicted:.20}\ntrue: {true:.20}"
        tiles.append((read_image(folder.samples[i], TILE), text))
    if tiles:  # a perfect score leaves nothing to draw
        sheet(path, tiles, 5)

def read_log(path):
    """The records of a log.jsonl; damaged lines are dropped with a warning."""
    lines = Path(path).read_text("utf-8", "replace").splitlines()
    records = []
    for line in lines:
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            record = json.loads(line)
            if math.isfinite(record["step"] + record["loss"]):
                records.append(record)
    if len(records) < len(lines):
        print(f"warning: {path}: {len(lines) - len(records)} damaged lines dropped")
    return records

def plot(draw, left, title, series):
    """Draws a panel with numbered axes and the lines of series, (color, x, y), y (N,). Returns the
    functions from values to pixels, of x and of y."""
    all_x = np.concatenate([x for _, x, _ in series])
    all_y = np.concatenate([y for _, _, y in series])
    x_range = (all_x.min(), all_x.max())
    y_range = (all_y.min(), all_y.max())
    across = partial(np.interp, xp=x_range, fp=(left + 50, left + 400))
    down = partial(np.interp, xp=y_range, fp=(290, 40))
    for tick in np.linspace(*y_range, 5):
        draw.line((left + 50, down(tick), left + 400, down(tick)), "#d0d0d0")
        draw.text((left + 44, down(tick)), f"{tick:.3g}", "black", anchor="rm", font_size=11)
    for tick in np.unique(np.linspace(*x_range, 5).round()):  # steps and epochs are whole numbers
        draw.text((across(tick), 296), f"{tick:.0f}", "black", anchor="mt", font_size=11)
    for color, x, y in series:
        draw.line(list(zip(across(x), down(y))), color, 2)
    draw.text((left + 50, 20), title, "black", font_size=11)
    return across, down

def tell_apart(paths):
    """{path: its last part}, or as many of its last parts as tell all paths apart."""
    parts = {path: Path(os.path.abspath(path)).parts for path in paths}
    number = 1
    while len({own[-number:] for own in parts.values()}) < len({*parts.values()}):
        number += 1
    return {path: "/".join(own[-number:]) for path, own in parts.items()}

def short_name(metric):
    """What a table calls a metric: image@1 for image_retrieval_recall@1, others by their names."""
    return metric.replace("_retrieval_recall", "")

def first_metrics(results, names):
    """{"imagenet acc1": value in [0, 1], "coco image@1": ...}: the first metric of each folder, by
    the folders' short names."""
    found = {}
    for folder, metrics in results.items():
        first = next(iter(metrics), "failed")
        if first != "failed":
            found[f"{names[folder]} {short_name(first)}"] = metrics[first]
    return found

def draw_curves(path, logs):
    """Writes a PNG of the losses and first metrics in runs' logs; {run: its last metrics}."""
    runs = {log.removesuffix("/log.jsonl"): read_log(log) for log in logs}
    names = tell_apart(runs)
    folders = []
    for records in runs.values():
        for record in records:
            folders += record.get("eval", {})
    folders = tell_apart(folders)
    panels = defaultdict(list)  # {title: series}
    last = {}
    for (path_of_run, records), color in zip(runs.items(), cycle(COLORS)):
        run = names[path_of_run]
        last[run] = {}
        curves = defaultdict(list)  # {title: points}
        for record in records:
            curves["loss over steps"].append((record["step"], record["loss"]))
            for name, value in first_metrics(record.get("eval", {}), folders).items():
                curves[f"{name}, %, over epochs"].append((record["epoch"], 100 * value))
                last[run][name] = value
        if not curves:
            raise ValueError(f"{path_of_run}: no training step in it; expected the log.jsonl of a run")
        for title, points in curves.items():
            x, y = np.array(points).T
            window = max(1, len(x) // 40)  # a moving average: the loss of a step alone jumps
            smooth = np.convolve(y, np.ones(window) / window, "valid")
            panels[title].append((color, x[window - 1:], smooth))
    image = Image.new("RGB", (420 * len(panels), 330 + 16 * len(last)), "white")
    draw = ImageDraw.Draw(image)
    for number, title in enumerate(panels):
        plot(draw, 420 * number, title, panels[title])
    for number, (run, color) in enumerate(zip(last, cycle(COLORS))):
        draw.text((50, 320 + 16 * number), run, color, font_size=12)
    save_png(path, image)
    return last

# -----------------------------------------------------------------------------
# Weights, which a reader may skip: whatever kind of file it is, `load` makes a model of it. Our own
# checkpoint knows its size and its tokenizer; of any other file, the shapes tell the size.

# The types in .safetensors, and what torch calls them.
TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool",
         "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
         "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "C64": "complex64",
         "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
         "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8"}

# Who trained with QuickGELU. No tensor tells; OpenAI's archives are known by what else they hold.
QUICK_GELU = "OpenAI (in a plain dict), MetaCLIP, DFN or LAION-400M's ViT-B-32"

# Trainers store numbers of NumPy, too: a learning rate of open_clip's is one. torch.load takes them
# for code unless it is told the parts they are made of, one of which NumPy 2 has renamed.
scalar = np.float64(0).__reduce__()[0]
NUMBERS = [np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType, np.dtypes.Int64DType,
           (scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar")]

def read_safetensors(path):
    """{name: tensor} of a .safetensors file: its header's length, the header in json, the tensors."""
    raw = bytearray(Path(path).read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    content = torch.frombuffer(raw, dtype=torch.uint8)[start:]
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        dtype = getattr(torch, TYPES.get(entry["dtype"], ""), None)  # F8_E8M0 came with torch 2.7
        if dtype is None:
            raise NotImplementedError(f"{name} is of type {entry['dtype']}, which is not read here")
        # A copy, as numbers have to begin at a multiple of their size in memory.
        tensors[name] = content[first:last].clone().view(dtype).view(entry["shape"])
    return tensors

def read_checkpoint(path):
    """The dict in a checkpoint, on the CPU. ValueError if it is missing, damaged, or would run code."""
    if re.search(r"-\d{5}-of-\d{5}\.|\.json$", os.path.basename(path)):
        raise ValueError(f"{path}: an index, or a part, of weights in several files; name a whole file")
    try:
        with open(path, "rb") as file:
            head = file.read(9)
        if head[8:] == b"{":  # after the header's length in 8 bytes, its json
            return read_safetensors(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals(NUMBERS):
            warnings.simplefilter("ignore")  # torch's, before it rejects a file; our line follows
            with suppress(ValueError, RuntimeError):  # no archive of TorchScript, as OpenAI's are
                return torch.jit.load(path, map_location="cpu").state_dict()
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch each have their own for a damaged file
        if getattr(error, "filename", None):  # the system's error: no such file, or no permission
            what = error.strerror
        elif isinstance(error, NotImplementedError):
            what = str(error)
        else:
            what = "damaged, no checkpoint, or one that could run code when loaded"
            what = data.what_it_is(path, what)
        raise ValueError(f"{path}: refused ({type(error).__name__}): {what}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path}: not a checkpoint, it holds a {type(state).__name__}")
    return state

def infer_config(state):
    """{name: value} of the Config fields that the shapes of a state dict in CLIP's names tell."""
    width, _, patch_size, _ = state["visual.conv1.weight"].shape
    context_length, text_width = state["positional_embedding"].shape
    # No tensor tells the number of heads. Up to ViT-L they are 64 wide, from ViT-H on they are not.
    if width % 64 or text_width % 64 or width > 1024:
        raise ValueError(f"a ViT of width {width}, text {text_width}, whose heads may not be 64 wide")
    norms = [name for name in state if name.endswith(".ln_1.weight")]  # one in each layer
    layers = sum(name.startswith("visual.") for name in norms)
    embed_dim = state["text_projection"].shape[1]
    num_patches = len(state["visual.positional_embedding"]) - 1  # the other is for the class token
    return {"model": (width, layers, text_width, len(norms) - layers, embed_dim),
            "image_size": patch_size * math.isqrt(num_patches),
            "patch_size": patch_size,
            "context_length": context_length,
            "vocab_size": len(state["token_embedding.weight"])}

def load(path, vocab="", quick_gelu=False):
    """(model, tokenizer, config) of a checkpoint, on the CPU, in float32. ValueError, OSError if it
    is none. vocab: CLIP's, for weights made elsewhere; quick_gelu: for OpenAI's in a plain dict."""
    import clip_pgs  # the model to fill; everything else here takes any model
    checkpoint = read_checkpoint(path)
    ours = {"model", "config", "merges"} <= checkpoint.keys()
    stored = checkpoint["model"] if ours else checkpoint.get("state_dict", checkpoint)
    try:
        state = {}
        for name, x in stored.items():
            if torch.is_tensor(x):
                name = name.replace("_orig_mod.", "")  # torch.compile puts this into names,
                name = name.removeprefix("module.")    # and DDP this
                state[name] = x.float()
        openai = "input_resolution" in state  # OpenAI's archives alone hold these three numbers
        for name in ("input_resolution", "context_length", "vocab_size", "logit_bias"):  # SigLIP's bias
            state.pop(name, None)
        values = checkpoint["config"] if ours else infer_config(state)
        options = clip_pgs.Config.__dataclass_fields__  # an older file may have some that are gone
        config = clip_pgs.Config(**{name: values[name] for name in values if name in options})
        config.quick_gelu |= quick_gelu or openai  # OpenAI trained with QuickGELU
        clip_pgs.check(config)
        with torch.device("meta"):  # shapes alone: no need to draw weights that are thrown away
            model = clip_pgs.CLIP(config)
        model.load_state_dict(state, assign=True)
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        cause = str(error).splitlines()[-1].strip()
        raise ValueError(f"{path}: not a CLIP with a ViT, in open_clip's names ({cause:.300})") from None
    if not ours and not config.quick_gelu:
        print(f"{path}: read with GELU; weights of {QUICK_GELU} need --quick-gelu", file=sys.stderr)
    if vocab:
        tokenizer = data.Tokenizer.from_file(vocab, config.context_length)
    elif ours:
        tokenizer = data.Tokenizer(checkpoint["merges"], config.context_length)
    else:
        raise ValueError(f"{path}: no tokenizer inside; pass CLIP's --vocab bpe_simple_vocab_16e6.txt.gz")
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(f"{path}: {config.vocab_size} tokens, but the tokenizer has {tokenizer.vocab_size}")
    return model.eval(), tokenizer, config

# -----------------------------------------------------------------------------
# Evaluate: a folder from its files to its metrics, several folders, the table of all, main.

def evaluate(model, tokenizer, config, folder, workers=4, probe=False, pictures="", name=""):
    """The metrics of a folder, {CLIP_benchmark's name: value in [0, 1]}; all ranks call it together.
    probe: also "lp_acc1", of a folder with a train/ split. pictures: a folder for a PNG. name: what
    to call the folder in the progress bar and among the pictures, if not by its path."""
    name = name or folder
    picture = pictures and f"{pictures}/{name.replace('/', '__')}.png"
    fault = ""
    try:
        test = read_folder(folder)
    except (ValueError, OSError) as error:  # maybe on this machine alone
        fault = data.message(error)
    fail_together(fault)
    images = embed_images(model, test.samples, config, workers, name)

    if not test.classnames:  # retrieval
        captions = []
        image_of_text = []
        for number, lines in enumerate(test.targets):
            captions += lines
            image_of_text += [number] * len(lines)
        texts = embed_texts(model, tokenizer, captions)
        if picture:
            draw_retrieval(picture, test.samples, captions, image_of_text, images, texts)
        return retrieval_metrics(images, texts, torch.tensor(image_of_text, device=images.device))

    classes = class_features(model, tokenizer, test.classnames, test.templates)
    scores = images @ classes.T                                                 # (N, C)
    labels = torch.tensor(test.targets, device=images.device)
    metrics = classification_metrics(scores, labels)
    if picture:
        draw_mistakes(picture, test, scores, labels)
    if probe:
        train = read_folder(folder, "train")
        features = embed_images(model, train.samples, config, workers, f"{name} train")
        targets = torch.tensor(train.targets, device=images.device)
        accuracy, C, held_out = linear_probe(features, targets, images, labels, len(classes))
        metrics["lp_acc1"] = accuracy
        print(f"{name}: probe on {len(features)} images; C = {C:.3g}, "
              f"{held_out:.1%} right on a held-out tenth")
    return metrics

def percent(value):
    """0.5 as "50.00"; a text, such as why a folder failed, as it is."""
    return value if isinstance(value, str) else f"{100 * value:.2f}"

def table(results):
    """{name: metrics} as an aligned Markdown table, in percent; several acc1 get an average row."""
    rows = dict(results)
    classified = [metrics for metrics in results.values() if "acc1" in metrics]
    if len(classified) > 1:
        rows["average"] = {}
        for name in max(classified, key=len):  # acc5 may be missing
            values = [metrics[name] for metrics in classified if name in metrics]
            rows["average"][name] = sum(values) / len(values)
    columns = dict.fromkeys(name for metrics in rows.values() for name in metrics)  # each name once
    longest = max(map(len, rows))
    head = " " * longest
    ruler = "-" * longest
    lines = [name.ljust(longest) for name in rows]
    for column in columns:
        cells = [percent(metrics.get(column, "")) for metrics in rows.values()]
        title = short_name(column)
        width = max(map(len, [title, *cells]))
        head += " | " + title.rjust(width)
        ruler += " | " + "-" * (width - 1) + ":"
        lines = [f"{line} | {cell:>{width}}" for line, cell in zip(lines, cells)]
    return "\n".join(f"| {line} |" for line in [head, ruler, *lines])

def write_json(path, results):
    """Writes the results to a file, if there is a path."""
    if path:
        with data.write_whole(path) as file:
            file.write(json.dumps(results, indent=1).encode())

def evaluate_all(model, tokenizer, config, folders, requests=(), workers=4, probe=False, pictures="",
                 show=False, json_path=""):
    """{folder: its metrics}; of a folder that cannot be evaluated {"failed": why}, on all ranks.
    show: print each row when it is done. json_path: a file for the results so far. requests: a list
    that a signal handler fills; once it holds something on any rank, no other folder is begun."""
    names = tell_apart(folders)
    results = {}
    for folder in dict.fromkeys(folders):  # one that is named twice is evaluated once
        requested = model.logit_scale.new_tensor(len(requests))
        if dist.is_initialized():
            dist.all_reduce(requested)
        if requested > 0:
            break
        try:
            results[folder] = evaluate(model, tokenizer, config, folder, workers, probe, pictures,
                                       names[folder])
        except (ValueError, OSError) as error:
            results[folder] = {"failed": data.message(error)}
        if show:
            row = [f"{short_name(name)}: {percent(x)}" for name, x in results[folder].items()]
            print(folder, *row, sep=" | ", flush=True)
        write_json(json_path, results)
    return results

def check(args, folders):
    """ValueError or OSError for what is missing or cannot be written: better now than after the first
    folder's hour."""
    for folder in folders:
        test = read_folder(folder)
        if args.probe and test.classnames:
            read_folder(folder, "train")
    if args.sugarcrepe:
        for kind in SUGARCREPE:
            for name in read_questions(f"{args.sugarcrepe}/{kind}.json")[0]:
                os.stat(f"{args.images}/{name}")
    if args.pictures:
        os.makedirs(args.pictures, exist_ok=True)
        tempfile.TemporaryFile(dir=args.pictures).close()  # may we write there?
    write_json(args.json, {})

def run(args):
    """What the command line asks for: draws the curves of runs, or evaluates a checkpoint."""
    if args.curves:
        print(table(draw_curves("curves.png", args.curves)))
        print("wrote curves.png")
        return
    if not args.checkpoint:
        raise ValueError("name a checkpoint, such as out/ckpt.pt, or logs with --curves")
    if bool(args.sugarcrepe) != bool(args.images):
        raise ValueError("--sugarcrepe and --images go together: json files, and COCO's val2017 images")
    model, tokenizer, config = load(args.checkpoint, args.vocab, args.quick_gelu)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    folders = args.data or []
    if not args.data and not args.sugarcrepe:
        folders = config.val
        if not folders:
            raise ValueError(f"{args.checkpoint}: trained without --val; say what to evaluate with --data")
    check(args, folders)
    results = evaluate_all(model, tokenizer, config, folders, workers=args.workers, probe=args.probe,
                           pictures=args.pictures, show=True, json_path=args.json)
    if args.sugarcrepe:
        results |= sugarcrepe(model, tokenizer, config, args.sugarcrepe, args.images, args.workers)
        write_json(args.json, results)
    print(table(results))
    if any("failed" in metrics for metrics in results.values()):
        sys.exit(1)

def main():
    """The command line; what went wrong is one line."""
    parser = argparse.ArgumentParser(description="Evaluates a CLIP checkpoint.")
    add = parser.add_argument
    add("checkpoint", nargs="?", help="a file of clip_pgs.py, open_clip, OpenAI or CLIP-PGS")
    add("--data", nargs="+", metavar="DIR", help="folders in CLIP_benchmark's layout; else training's --val")
    add("--probe", action="store_true", help="also a linear probe, of folders with a labelled train/")
    add("--sugarcrepe", metavar="DIR", help="folder of SugarCrepe's seven json files")
    add("--images", metavar="DIR", help="COCO's val2017 images, for --sugarcrepe")
    add("--vocab", metavar="FILE", help="CLIP's bpe_simple_vocab_16e6.txt.gz, for weights made elsewhere")
    add("--quick-gelu", action="store_true", help=f"for weights of {QUICK_GELU}")
    add("--json", metavar="FILE", help="write the metrics, with CLIP_benchmark's names")
    add("--pictures", metavar="DIR", help="write a PNG of what was found or mistaken")
    add("--curves", nargs="+", metavar="LOG", help="draw runs' log.jsonl to curves.png, print last metrics")
    add("--workers", type=int, default=4, help="threads that read and decode images")
    args = parser.parse_args()
    if int(os.environ.get("RANK", 0)) > 0:
        return  # under torchrun; the first process does it all
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        print("one process is enough: call python evaluate.py, not torchrun", file=sys.stderr)
    try:
        run(args)
    except torch.OutOfMemoryError:
        sys.exit("error: out of GPU memory; does another process use the card?")
    except (ValueError, OSError, KeyboardInterrupt) as error:
        sys.exit(f"error: {data.message(error)}")

if __name__ == "__main__":
    sys.stdout = data.Unread(sys.stdout)
    sys.stderr = data.Unread(sys.stderr)
    main()
