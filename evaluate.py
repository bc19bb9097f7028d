"""What a CLIP checkpoint is worth: the papers' evaluations, number for number with CLIP_benchmark.

    python evaluate.py out/ckpt.pt                               the folders that --val named in training
    python evaluate.py out/ckpt.pt --data imagenet1k flickr30k   any folders in CLIP_benchmark's layout
    python evaluate.py ViT-B-16.pt --vocab bpe_simple_vocab_16e6.txt.gz --data imagenet1k --probe
    python evaluate.py out/ckpt.pt --sugarcrepe sugar-crepe/data --images coco/val2017
    python evaluate.py --curves out/*/log.jsonl                  losses and metrics of runs in one picture

Takes checkpoints of clip_pgs.py, weights with open_clip's names (so also the CLIP-PGS authors' files) and
OpenAI's archives. What lies in a folder says how to evaluate it. The story, top to bottom: folders, embed,
classification, retrieval, linear probe, one folder, compositionality, pictures, weights, table and main.
"""
import argparse
import json
import math
import os
import sys
import textwrap
import warnings
import zipfile
from collections import deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageFont
from tqdm import tqdm

import data

# -----------------------------------------------------------------------------
# Folders, in the layout of LAION's CLIP_benchmark. All of it is read and checked before the first image is
# encoded. A sample that cannot be read is an error, never skipped: a score over fewer samples would be a lie.

Sample = namedtuple("Sample", "path offset size name")  # where an image lies; name is for messages
# One split. targets: class numbers, or lists of captions for retrieval, where classnames, templates are
# empty.
Folder = namedtuple("Folder", "samples targets classnames templates")

def read_folder(folder, split="test"):
    """The Folder at a path. ValueError with one line for what is missing from it or contradicts itself."""
    if not os.path.isdir(folder):
        raise ValueError(f"{folder}: no such folder")
    typed = os.path.exists(os.path.join(folder, "dataset_type.txt"))
    kind = read_lines(folder, "dataset_type.txt")[0].lower() if typed else "classification"
    if kind == "retrieval":
        samples, texts = read_split(folder, split, "txt")
        return Folder(samples, [text.splitlines() for text in texts], [], [])
    if kind != "classification":
        raise ValueError(f"{folder}/dataset_type.txt: '{kind}', expected retrieval or classification")
    samples, texts = read_split(folder, split, "cls")
    classnames = read_lines(folder, "classnames.txt")
    templates = read_lines(folder, "zeroshot_classification_templates.txt")
    for line in templates:
        if "{c}" not in line:
            raise ValueError(f"{folder}/zeroshot_classification_templates.txt: '{line}' lacks {{c}}")
    for sample, text in zip(samples, texts):
        if not text.strip().isdecimal() or int(text) >= len(classnames):
            raise ValueError(f"{sample.path}: the label of {sample.name} is '{text.strip()[:20]}', but "
                             f"classnames.txt has {len(classnames)} lines, for 0 to {len(classnames) - 1}")
    return Folder(samples, [int(text) for text in texts], classnames, templates)

def read_lines(folder, name):
    """The lines of a text file in a folder. ValueError if it is missing or a line is blank."""
    path = os.path.join(folder, name)
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [line.strip() for line in file.read().splitlines()] or [""]
    except FileNotFoundError:
        raise ValueError(f"{path}: missing; is {folder} a folder in CLIP_benchmark's layout?") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8") from None
    if "" in lines:
        raise ValueError(f"{path}: line {lines.index('') + 1} is blank")
    return lines

def read_split(folder, split, extension):
    """[Sample], [str]: the images of a split and the text of the `extension` file beside each, in order."""
    number = read_lines(folder, os.path.join(split, "nshards.txt"))[0]
    if not number.isdecimal() or int(number) == 0:
        raise ValueError(f"{folder}/{split}/nshards.txt: '{number}', expected the number of shards")
    samples, texts = [], []
    for shard in (os.path.join(folder, split, f"{i}.tar") for i in range(int(number))):
        if not os.path.exists(shard):
            raise ValueError(f"{shard}: missing, though nshards.txt says {number}")
        members, fault = data.tar_samples(shard)
        if fault:
            raise ValueError(fault)
        for key, files in members:
            image = next((name for name in data.IMAGE_EXTENSIONS if name in files), None)
            if image is None or extension not in files:
                raise ValueError(f"{shard}: sample {key} has no {f'.{extension}' if image else 'image'}")
            try:
                text = data.read_bytes(shard, *files[extension]).decode("utf-8-sig")
            except UnicodeDecodeError:
                text = ""
            if not text.strip():
                raise ValueError(f"{shard}: {key}.{extension} is empty or not UTF-8")
            samples.append(Sample(shard, *files[image], f"{key}.{image}"))
            texts.append(text)
    return samples, texts


# -----------------------------------------------------------------------------
# Embed: open_clip's evaluation transform, bit for bit, then unit features. With several ranks, rank r encodes
# every world_size-th sample from the r-th on, and all ranks get all features.

IMAGE_BATCH, TEXT_BATCH = 128, 512  # large enough to fill a GPU; features depend on them by rounding alone

def read_image(sample):
    """The RGB image of a sample. ValueError that says which one does not decode, and why."""
    try:
        with open(sample.path, "rb") as file:  # not data.read_bytes, whose files another thread might close
            file.seek(sample.offset)
            image = data.decode_image(file.read(sample.size))
        return data.eight_bits(image).convert("RGB")  # before the resize, as CLIP_benchmark
    except (ValueError, OSError) as error:
        raise ValueError(f"{sample.path}: {sample.name} does not decode ({error})") from None

def resize_and_crop(image, size):
    """The middle of a PIL image, its shorter side resized to `size`: (3, size, size) uint8, RGB.
    Resized in the image's own mode and converted last, as open_clip does: a palette image then gets its
    nearest pixels instead of a bicubic mix. No orientation tag is applied."""
    image, bicubic = data.eight_bits(image), Image.Resampling.BICUBIC
    longer = int(size * max(image.size) / min(image.size))  # cut off, not rounded
    width, height = (size, longer) if image.width <= image.height else (longer, size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    box = np.array([left, top, left + size, top + size])
    if width * height <= data.MAX_PIXELS:
        image = image.resize((width, height), bicubic).crop(tuple(box))
    else:  # a picture so long that the whole would fill the memory: only the middle is resized
        box = box / (width, height, width, height) * (image.size * 2)
        image = image.resize((size, size), bicubic, tuple(np.minimum(box, image.size * 2)))
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)

def preprocess(image, size):
    """What the encoder sees of a PIL image: (3, size, size) float."""
    return data.normalize(resize_and_crop(image, size))

def image_batches(samples, size, workers):
    """Yields (B, 3, size, size) uint8, read by threads two batches ahead.
    Threads, not processes: Pillow works without Python's lock, threads start at once in the middle of a
    training run, and an error arrives as it was raised."""
    def read(sample):
        return resize_and_crop(read_image(sample), size)

    with ThreadPoolExecutor(max(1, workers)) as pool:
        starts = range(0, len(samples), IMAGE_BATCH)
        batches = (pool.map(read, samples[start:start + IMAGE_BATCH]) for start in starts)
        ahead = deque(islice(batches, 2))  # each is at work as soon as it is asked for
        while ahead:
            ahead.extend(islice(batches, 1))
            yield torch.stack([*ahead.popleft()])

@torch.no_grad()
def embed_images(model, samples, config, rank=0, world_size=1, workers=4, name=""):
    """Unit features (N, E) of samples, on the model's device; `name` is what the progress bar says.
    ValueError on all ranks if a picture of one of them does not decode."""
    device, features, fault = model.logit_scale.device, [], ""
    with tqdm(total=len(samples), desc=name, unit=" images", leave=False, disable=rank > 0) as bar:
        try:
            for images in image_batches(samples[rank::world_size], config.image_size, workers):
                features.append(model.encode_image(data.normalize(images.to(device))))
                bar.update(min(len(images) * world_size, bar.total - bar.n))
        except ValueError as error:
            fault = str(error)
    return gather(features, len(samples), model, world_size, fault)

@torch.no_grad()
def embed_texts(model, tokenizer, texts, rank=0, world_size=1):
    """Unit features (N, E) of a list of str, on the model's device."""
    own = texts[rank::world_size]
    features = [model.encode_text(tokenizer.encode(own[start:start + TEXT_BATCH]))
                for start in range(0, len(own), TEXT_BATCH)]
    return gather(features, len(texts), model, world_size)

def gather(features, total, model, world_size, fault=""):
    """Joins what each rank has encoded: unit features (total, E) in the order of the samples. A fault of one
    rank is an error on all: none may wait for one that has stopped."""
    faults = [fault] * world_size
    if world_size > 1:
        dist.all_gather_object(faults, fault)
    if any(faults):
        raise ValueError(next(filter(None, faults)))
    E = model.text_projection.shape[1]
    features = torch.cat([model.text_projection.new_zeros(0, E), *features]).float()
    if world_size > 1:
        most = math.ceil(total / world_size)  # the last ranks may have one sample less: a zero stands for it
        features = F.pad(features, (0, 0, 0, most - len(features)))
        parts = [torch.empty_like(features) for _ in range(world_size)]
        dist.all_gather(parts, features)
        features = torch.stack(parts, dim=1).flatten(0, 1)[:total]   # row i * world_size + rank
    if not features.isfinite().all():
        raise ValueError("the features are not finite numbers: the training has diverged")
    return F.normalize(features, dim=-1)


# -----------------------------------------------------------------------------
# Zero-shot classification: the class whose sentences are nearest to the image.

def mean(x):
    """The mean of a tensor of counts or truths, as a plain number."""
    return x.double().mean().item()

def class_features(model, tokenizer, classnames, templates, rank=0, world_size=1):
    """(C, E) unit features: for each class, the mean over the templates of its sentences' unit features."""
    texts = [template.replace("{c}", name) for name in classnames for template in templates]
    features = embed_texts(model, tokenizer, texts, rank, world_size)           # (C * templates, E)
    return F.normalize(features.view(len(classnames), len(templates), -1).mean(1), dim=-1)

def classification_metrics(scores, labels):
    """acc1, acc5 and mean_per_class_recall of scores (N, C) and labels (N,).
    acc5 looks at all classes if there are fewer than five. A class without an image has no recall to
    average."""
    C = scores.shape[1]
    right = scores.topk(min(5, C)).indices == labels[:, None]                  # (N, 5)
    images, hits = labels.bincount(minlength=C), labels[right[:, 0]].bincount(minlength=C)
    return {"acc1": mean(right[:, 0]), "acc5": mean(right.any(1)),
            "mean_per_class_recall": mean((hits / images.double())[images > 0])}


# -----------------------------------------------------------------------------
# Retrieval: find the image of a caption, and a caption of an image.

QUERIES = 512  # at a time: of 5,000 x 25,000 scores, only a tenth is ever in memory

def nearest(queries, gallery, k=10):
    """(Q, k) indices of the rows of gallery (G, E) nearest to each of queries (Q, E), best first."""
    k = min(k, len(gallery))
    return torch.cat([(rows @ gallery.T).topk(k).indices for rows in queries.split(QUERIES)])

def retrieval_metrics(image_features, text_features, image_of_text):
    """Recall at 1, 5, 10 in both directions, of features (I, E), (T, E); image_of_text (T,) is the image that
    each caption belongs to. A query counts as answered if one right answer is among its k nearest, as in
    CLIP's papers; it is not the share of the right answers that was found."""
    images = image_of_text[:, None] == nearest(text_features, image_features)                  # (T, 10)
    texts = image_of_text[nearest(image_features, text_features)]                              # (I, 10)
    texts = texts == torch.arange(len(image_features), device=texts.device)[:, None]
    return {f"{name}_retrieval_recall@{k}": mean(right[:, :k].any(1))
            for name, right in (("image", images), ("text", texts)) for k in (1, 5, 10)}


# -----------------------------------------------------------------------------
# Linear probe: how well a linear classifier does on the frozen image features.

TRIED_C = [10.0 ** power for power in range(-1, 7)]  # for C, the inverse of the regularisation's strength

def fit_logistic(features, labels, num_classes, C, start=None):
    """(num_classes, E + 1) weights, bias last, of L2-regularised logistic regression; C as in scikit-learn.
    Minimises the mean cross entropy + |weights|^2 / (2 C N), bias free of charge, by L-BFGS in float64."""
    N, E = features.shape
    weights = features.new_zeros(num_classes, E + 1) if start is None else start.clone()
    optimizer = torch.optim.LBFGS([weights.requires_grad_()], max_iter=1000, tolerance_grad=1e-6,
                                  tolerance_change=1e-9, history_size=20, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(features, weights[:, :E], weights[:, E]), labels)
        loss = loss + weights[:, :E].square().sum() / (2 * C * N)
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()

def linear_probe(train_features, train_labels, test_features, test_labels, num_classes):
    """(test accuracy, C, held-out accuracy): C is chosen on a held-out tenth of the training set, then refit.
    Each fit starts from the one before, which was regularised more. The features' mean is subtracted first:
    the free bias makes up for it, so the solution is the same, but L-BFGS needs a fraction of the steps."""
    def accuracy(weights, features, labels):
        return mean(F.linear(features, weights[:, :-1], weights[:, -1]).argmax(1) == labels)

    center = train_features.double().mean(0)
    train_features, test_features = train_features.double() - center, test_features.double() - center
    order = torch.randperm(len(train_labels), generator=torch.Generator().manual_seed(0))
    held_out, rest = order.to(train_labels.device).tensor_split([max(1, len(order) // 10)])
    weights, known = None, {}
    for C in TRIED_C:
        weights = fit_logistic(train_features[rest], train_labels[rest], num_classes, C, weights)
        known[C] = accuracy(weights, train_features[held_out], train_labels[held_out])
    C = max(known, key=known.get)  # of equals the first, regularised most
    weights = fit_logistic(train_features, train_labels, num_classes, C)
    return accuracy(weights, test_features, test_labels), C, known[C]


# -----------------------------------------------------------------------------
# One folder, from its files to its metrics.

def evaluate(model, tokenizer, config, folder, rank=0, world_size=1, workers=4, probe=False, pictures=""):
    """The metrics of a folder, {CLIP_benchmark's name: value in [0, 1]}, on rank 0; the others return {}.
    All ranks call it together. probe: a linear probe of a classification folder as well ("lp_acc1"), which
    needs its train/ split. pictures: a folder for a PNG of what was found or mistaken."""
    name, this = os.path.basename(os.path.abspath(folder)), read_folder(folder)
    train = read_folder(folder, "train") if probe and this.classnames else None
    images = embed_images(model, this.samples, config, rank, world_size, workers, name)
    device, path = images.device, os.path.join(pictures, f"{name}.png")
    if not this.classnames:
        captions = [caption for captions in this.targets for caption in captions]
        image_of_text = [i for i, captions in enumerate(this.targets) for _ in captions]
        texts = embed_texts(model, tokenizer, captions, rank, world_size)
        if rank > 0:
            return {}
        if pictures:
            draw_retrieval(path, this.samples, captions, image_of_text, images, texts)
        return retrieval_metrics(images, texts, torch.tensor(image_of_text, device=device))

    classes = class_features(model, tokenizer, this.classnames, this.templates, rank, world_size)
    if train:
        known = embed_images(model, train.samples, config, rank, world_size, workers, f"{name} train")
    if rank > 0:
        return {}
    scores, labels = images @ classes.T, torch.tensor(this.targets, device=device)
    metrics = classification_metrics(scores, labels)
    if pictures:
        draw_mistakes(path, this, scores, labels)
    if train:
        targets = torch.tensor(train.targets, device=device)
        metrics["lp_acc1"], C, held_out = linear_probe(known, targets, images, labels, len(this.classnames))
        print(f"{name}: linear probe by full-batch L-BFGS on {len(known)} images; C = {C:.3g}, the best of "
              f"{len(TRIED_C)} on a held-out tenth ({held_out:.1%} right), then refit on all")
    return metrics

def evaluate_all(model, tokenizer, config, folders, rank=0, world_size=1):
    """{folder: its metrics}; of a folder that cannot be evaluated {"failed": why}, on all ranks."""
    results = {}
    for folder in folders:
        try:
            results[folder] = evaluate(model, tokenizer, config, folder, rank, world_size)
        except (ValueError, OSError) as error:
            results[folder] = {"failed": data.message(error)}
    return results

def short(metric):
    """image@1 for CLIP_benchmark's image_retrieval_recall@1."""
    return metric.replace("_retrieval_recall", "")

def first_metrics(results):
    """{"imagenet acc1": value in [0, 1], ...}: the first metric of each folder, with a short name."""
    return {f"{os.path.basename(os.path.normpath(folder))} {short(name)}": value for folder, metrics in
            results.items() for name, value in list(metrics.items())[:1] if name != "failed"}


# -----------------------------------------------------------------------------
# Compositionality (SugarCrepe, Hsieh et al., NeurIPS 2023): is the image nearer to its caption than to one in
# which an object, an attribute or a relation was replaced, swapped or added?

SUGARCREPE = {"replace": ("obj", "att", "rel"), "swap": ("obj", "att"), "add": ("obj", "att")}

def sugarcrepe(model, tokenizer, config, folder, images, workers=4):
    """{"sugar_crepe/replace_obj": {"acc": ...}, ...}: the seven files, after those of a kind their mean.
    folder: of the json files; images: COCO's val2017. Many questions are about one image: it is encoded
    once."""
    files = {f"{kind}_{part}": read_questions(os.path.join(folder, f"{kind}_{part}.json"))
             for kind, parts in SUGARCREPE.items() for part in parts}
    names = sorted({name for questions in files.values() for name, _, _ in questions})
    samples = [Sample(os.path.join(images, name), 0, -1, name) for name in names]
    features = embed_images(model, samples, config, workers=workers, name="sugar_crepe")
    row, results = {name: number for number, name in enumerate(names)}, {}
    for kind, parts in SUGARCREPE.items():
        for part in parts:
            asked, *texts = zip(*files[f"{kind}_{part}"])
            image = features[[row[name] for name in asked]]                      # (N, E)
            right, wrong = ((image * embed_texts(model, tokenizer, list(text))).sum(1) for text in texts)
            results[f"sugar_crepe/{kind}_{part}"] = {"acc": mean(right > wrong)}
        accuracies = [results[f"sugar_crepe/{kind}_{part}"]["acc"] for part in parts]
        results[f"sugar_crepe/{kind}"] = {"acc": sum(accuracies) / len(parts)}
    return results

def read_questions(path):
    """[(file name of the image, caption, negative caption)] of one of SugarCrepe's json files."""
    with open(path, encoding="utf-8-sig") as file:
        try:
            questions = [(entry["filename"], entry["caption"], entry["negative_caption"])
                         for entry in json.load(file).values()]
        except (ValueError, KeyError, TypeError, AttributeError):
            questions = []
    if not questions:
        raise ValueError(f"{path}: expected SugarCrepe's filename, caption and negative_caption per question")
    return questions


# -----------------------------------------------------------------------------
# Pictures: sheets of masks, of what was found, of mistakes; curves of runs.

TILE, GAP, LINE = 160, 8, 15  # pixels: a picture, the space around it, a line of text
COLORS = "#1f77b4 #d62728 #2ca02c #9467bd #ff7f0e #8c564b #e377c2 #17becf #7f7f7f #bcbd22".split()

def sheet(path, rows):
    """Writes a PNG of rows (title, [(picture (3, H, W) uint8, text, color of the frame)]); the title is
    left of the pictures, the text below each."""
    left = 240 if any(title for title, _ in rows) else 0
    lines = max(text.count("\n") + bool(text) for _, tiles in rows for _, text, _ in tiles)
    width, height = TILE + 2 * GAP, TILE + 2 * GAP + LINE * lines
    columns = max(len(tiles) for _, tiles in rows)
    image = Image.new("RGB", (left + columns * width, len(rows) * height), "white")
    draw, font, near = ImageDraw.Draw(image), ImageFont.load_default(12), Image.Resampling.NEAREST
    for row, (title, tiles) in enumerate(rows):
        draw.multiline_text((GAP, row * height + GAP), textwrap.fill(title, 34), "black", font)
        for column, (picture, text, color) in enumerate(tiles):
            x, y = left + column * width + GAP, row * height + GAP
            draw.rectangle((x - 4, y - 4, x + TILE + 3, y + TILE + 3), fill=color)
            picture = Image.fromarray(picture.permute(1, 2, 0).cpu().numpy())
            resample = near if picture.width < TILE else Image.Resampling.LANCZOS
            image.paste(picture.resize((TILE, TILE), resample), (x, y))
            draw.multiline_text((x, y + TILE + 4), text, "black", font)
    image.save(path)

def open_photo(path, size):
    """The middle of a photograph as people see it, upright and on white: (3, size, size) uint8."""
    try:
        with open(path, "rb") as file:
            image = data.to_rgb(data.upright(data.decode_image(file.read())))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    return resize_and_crop(image, size)

def per_pixel(patches, side):
    """A value per patch (B, L) -> (B, 1, side, side), a value per pixel."""
    grid = math.isqrt(patches.shape[1])
    return F.interpolate(patches.view(-1, 1, grid, grid).float(), (side, side), mode="nearest")

def heat_map(patches, side):
    """A grey picture (3, side, side) uint8 of a value per patch, (1, L): the highest is white."""
    return (255 * per_pixel(patches / patches.max().clamp(min=1e-12), side)[0]).byte().expand(3, -1, -1)

def masked(images, keep, valid, patch_size):
    """images (B, 3, H, H) uint8 with the removed patches grey; keep, valid as of `clip_pgs.make_mask`."""
    if keep is None:
        return images
    seen = torch.zeros(len(images), (images.shape[-1] // patch_size) ** 2, device=keep.device)
    seen = seen.scatter(1, keep[:len(images)], 1.0 if valid is None else valid[:len(images)].float())
    return images.where(per_pixel(seen, images.shape[-1]).cpu() > 0, 128)

def draw_masks(path, images, keep, valid, patch_size):
    """Writes a PNG of images (B, 3, H, H) uint8 and, below, of what the masks of the first view leave."""
    keep, valid = (x if x is None else x[0] for x in (keep, valid))
    rows = images, masked(images, keep, valid, patch_size)
    sheet(path, [("", [(picture, "", "white") for picture in row]) for row in rows])

def draw_retrieval(path, samples, captions, image_of_text, images, texts):
    """Ten captions, evenly spread, each with its five nearest images; the right one in a green frame."""
    asked, rows = sorted({number * len(captions) // 10 for number in range(10)}), []
    for query, found in zip(asked, nearest(texts[asked], images, k=5).tolist()):
        frames = ["limegreen" if i == image_of_text[query] else "white" for i in found]
        pictures = [resize_and_crop(read_image(samples[i]), TILE) for i in found]
        rows.append((captions[query], [(picture, "", frame) for picture, frame in zip(pictures, frames)]))
    sheet(path, rows)

def draw_mistakes(path, folder, scores, labels):
    """Up to twenty mistakes, those in which the wrong class leads the true one by most, with both names."""
    best, predicted = scores.max(1)
    lead = best - scores.gather(1, labels[:, None])[:, 0]
    worst = [i for i in lead.argsort(descending=True)[:20].tolist() if lead[i] > 0]
    names = [textwrap.shorten(name, 20, placeholder="...") for name in folder.classnames]
    tiles = [(resize_and_crop(read_image(folder.samples[i]), TILE),
              f"predicted: {names[predicted[i]]}\ntrue: {names[labels[i]]}", "white") for i in worst]
    if tiles:  # a perfect score leaves nothing to draw
        sheet(path, [("", tiles[first:first + 5]) for first in range(0, len(tiles), 5)])

def read_log(path):
    """The records of a log.jsonl; damaged lines are dropped with a warning."""
    records, damaged = [], 0
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
                record["step"], record["loss"]
                records.append(record)
            except (ValueError, KeyError, TypeError):
                damaged += 1
    if damaged:
        print(f"warning: {path}: {damaged} damaged lines dropped")
    return records

def plot(draw, left, title, series):
    """Draws a panel with numbered axes; series: (color, x, y), y is (N,) for a line, (2, N) for a band."""
    x0, y0, width, height, font = left + 50, 290, 350, 250, ImageFont.load_default(11)
    xs, ys = (np.concatenate([np.ravel(one[axis]) for one in series]) for axis in (1, 2))
    (low_x, high_x), (low_y, high_y) = ((v.min(), max(v.max(), v.min() + 1e-9)) for v in (xs, ys))
    for tick in np.linspace(low_y, high_y, 5):
        y = y0 - (tick - low_y) / (high_y - low_y) * height
        draw.line((x0, y, x0 + width, y), "#d0d0d0")
        draw.text((x0 - 6, y), f"{tick:.3g}", "black", font, "rm")
    for tick in np.unique(np.linspace(low_x, high_x, 5).round()):  # steps and epochs are whole numbers
        x = x0 + (tick - low_x) / (high_x - low_x) * width
        draw.text((x, y0 + 6), f"{tick:.0f}", "black", font, "mt")
    for color, x, y in series:
        across, up = (x - low_x) / (high_x - low_x), (np.atleast_2d(y) - low_y) / (high_y - low_y)
        lines = [[*zip(x0 + across * width, y0 - row * height)] for row in up]
        draw.line(lines[0], color, 2) if len(lines) == 1 else draw.polygon(lines[0] + lines[1][::-1], color)
    draw.text((x0, 20), title, "black", font)

def draw_curves(path, logs):
    """Writes a PNG of runs' log.jsonl, a color per run: the loss over steps, smoothed, the raw one behind it,
    and the first metric of each folder over epochs; returns {run: last metrics}."""
    panels, last = {"loss over steps": []}, {}
    for log, color in zip(logs, COLORS * len(logs)):
        records, name, metrics = read_log(log), os.path.dirname(log) or log, {}
        points = [(record["step"], record["loss"]) for record in records if "eval" not in record]
        if not points:
            raise ValueError(f"{log}: no training step in it; expected the log.jsonl of a run")
        steps, losses = np.array(points).T
        window = max(1, len(steps) // 40)
        pale = tuple(160 + value * 95 // 255 for value in ImageColor.getrgb(color))
        smooth = color, steps[window - 1:], np.convolve(losses, np.ones(window) / window, "valid")
        panels["loss over steps"] = [(pale, steps, losses), *panels["loss over steps"], smooth]
        for record in records:
            for title, value in first_metrics(record.get("eval", {})).items():
                metrics.setdefault(title, []).append((record["epoch"], 100 * value))
        for title, found in metrics.items():
            panels.setdefault(f"{title}, %, over epochs", []).append((color, *np.array(found).T))
        last[name] = {title: found[-1][1] / 100 for title, found in metrics.items()}
    image = Image.new("RGB", (420 * len(panels), 330 + 16 * len(logs)), "white")
    for number, (title, series) in enumerate(panels.items()):
        plot(ImageDraw.Draw(image), 420 * number, title, series)
    for number, (name, color) in enumerate(zip(last, COLORS * len(logs))):
        ImageDraw.Draw(image).text((50, 320 + 16 * number), name, color, ImageFont.load_default(12))
    image.save(path)
    return last


# -----------------------------------------------------------------------------
# Weights. A checkpoint made here knows its size and its tokenizer; of any other file, the shapes tell the
# size.

# Plain numbers that NumPy wraps, which other programs store beside the tensors: not code.
scalar = np.float64(0).__reduce__()[0]
NUMBERS = [np.dtype, *(type(np.dtype(kind)) for kind in "efdilbB?"),
           (scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar")]

def read_checkpoint(path):
    """The dict inside a checkpoint file, tensors on the CPU. ValueError with one line if it is missing,
    damaged, or would run code. OpenAI's files are archives of TorchScript, which has its own way to load."""
    try:
        if os.path.splitext(path)[1] == ".safetensors":
            return read_safetensors(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals(NUMBERS):
            warnings.simplefilter("ignore")  # torch prints a warning before it rejects a file; ours follows
            names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
            if any(name.endswith("/constants.pkl") for name in names):
                return dict(torch.jit.load(path, map_location="cpu").state_dict())
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; expected a file of weights") from None
    except Exception as error:  # zip, pickle and torch each have their own for a damaged file
        what = data.what_it_is(path, "damaged, no checkpoint, or one that could run code when loaded")
        raise ValueError(f"{path}: refused ({type(error).__name__}): {what}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path}: not a checkpoint, it holds a {type(state).__name__}")
    return state

def read_safetensors(path):
    """{name: tensor} of a .safetensors file: a header's length, the header in json, the tensors' bytes."""
    types = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
             "I64": torch.int64}
    with open(path, "rb") as file:
        raw = bytearray(file.read())
    start, tensors = 8 + int.from_bytes(raw[:8], "little"), {}
    for name, entry in json.loads(raw[8:start]).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            tensor = torch.frombuffer(raw[start + first:start + last], dtype=types[entry["dtype"]])
            tensors[name] = tensor.reshape(entry["shape"])
    return tensors

def load(path, vocab="", quick_gelu=False):
    """(model, tokenizer, config) of a checkpoint; the model is on the CPU, in float32.
    vocab: CLIP's bpe_simple_vocab_16e6.txt.gz, for files that were not made here. quick_gelu: for OpenAI's
    weights, known without it only if the file is OpenAI's own archive or its state dict. ValueError or
    OSError with one line: a file that is missing, damaged, of another size, or that would run code when
    loaded."""
    import clip_pgs  # the model to fill; everything else here takes any model

    checkpoint = read_checkpoint(path)
    ours = {"model", "config", "merges"} <= checkpoint.keys()
    state = checkpoint["model"] if ours else checkpoint.get("state_dict", checkpoint)
    # DDP and torch.compile put "module." and "_orig_mod." into names.
    state = {name.removeprefix("module.").replace("_orig_mod.", ""): tensor.float()
             for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    # Only OpenAI's archives hold these three, and OpenAI's weights need QuickGELU.
    openai = {"input_resolution", "context_length", "vocab_size"} & state.keys()
    state = {name: tensor for name, tensor in state.items() if name not in openai}
    try:
        known, names = checkpoint["config"] if ours else infer_config(state), fields(clip_pgs.Config)
        config = clip_pgs.Config(**{f.name: known[f.name] for f in names if f.name in known})
        config.quick_gelu |= quick_gelu or bool(openai)
        clip_pgs.check(config)
        with torch.device("meta"):  # shapes alone: random weights would be drawn only to be thrown away
            model = clip_pgs.CLIP(config)
        model.load_state_dict(state, assign=True)
    except (KeyError, ValueError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        cause = str(error).splitlines()[-1].strip()
        raise ValueError(f"{path}: not a CLIP with a ViT, in open_clip's names ({cause:.300})") from None
    if not ours and not config.quick_gelu:
        print(f"{path}: read with GELU; weights that OpenAI trained need --quick-gelu", file=sys.stderr)
    if not ours and not vocab:
        raise ValueError(f"{path}: no tokenizer inside; pass CLIP's --vocab bpe_simple_vocab_16e6.txt.gz")
    tokenizer = (data.Tokenizer.from_file(vocab, config.context_length) if vocab
                 else data.Tokenizer(checkpoint["merges"], config.context_length))
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(f"{path}: {config.vocab_size} tokens, but the tokenizer has {tokenizer.vocab_size}")
    return model.eval(), tokenizer, config

def infer_config(state):
    """{name: value} of the Config fields that the shapes of a state dict in CLIP's names tell."""
    def depth(prefix):
        return len({name[len(prefix):].split(".")[0] for name in state if name.startswith(prefix)})

    width, _, patch_size, _ = state["visual.conv1.weight"].shape
    context_length, text_width = state["positional_embedding"].shape
    if width % 64 or text_width % 64 or width > 1024:
        # No tensor tells the number of heads. All of CLIP's are 64 wide; those of ViT-H and up are not.
        raise ValueError(f"a ViT of width {width}, text {text_width}, whose heads may not be 64 wide")
    layers, text_layers = depth("visual.transformer.resblocks."), depth("transformer.resblocks.")
    side = math.isqrt(len(state["visual.positional_embedding"]) - 1)
    return dict(model=f"{width}x{layers}-{text_width}x{text_layers}-{state['text_projection'].shape[1]}",
                image_size=patch_size * side, patch_size=patch_size, context_length=context_length,
                vocab_size=len(state["token_embedding.weight"]))


# -----------------------------------------------------------------------------
# Table and main.

def table(results):
    """{name: metrics} as an aligned Markdown table, in percent; several acc1 get an average row."""
    rows, classified = dict(results), [metrics for metrics in results.values() if "acc1" in metrics]
    if len(classified) > 1:
        rows["average"] = {name: sum(metrics[name] for metrics in classified) / len(classified)
                           for name in classified[0]}
    names = list(dict.fromkeys(name for metrics in rows.values() for name in metrics))
    cells = [["", *map(short, names)]]
    for row, metrics in rows.items():
        cells.append([row, *(metrics[name] if name == "failed" and name in metrics else
                             f"{100 * metrics[name]:.2f}" if name in metrics else "" for name in names)])
    widths = [max(len(row[column]) for row in cells) for column in range(len(names) + 1)]
    first, *rest = ["| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |"
                    for row in cells]
    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([first, rule, *rest])

def run(options):
    """Evaluates all that was asked for and prints the table, or draws the curves of runs."""
    if options.curves:
        print(table(draw_curves("curves.png", options.curves)) + "\nwrote curves.png")
        return
    if not options.checkpoint:
        raise ValueError("name a checkpoint, such as out/ckpt.pt, or logs with --curves")
    if bool(options.sugarcrepe) != bool(options.images):
        raise ValueError("--sugarcrepe and --images go together: the json files, and COCO's val2017 images")
    model, tokenizer, config = load(options.checkpoint, options.vocab, options.quick_gelu)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    folders = list(options.data or (() if options.sugarcrepe else config.val))
    if not folders and not options.sugarcrepe:
        raise ValueError(f"{options.checkpoint}: was trained without --val; say what to evaluate with --data")
    for folder in folders:  # a slip in the last folder shows before the first one's hour of work
        read_folder(folder)
    if options.pictures:
        os.makedirs(options.pictures, exist_ok=True)
    results = {folder: evaluate(model, tokenizer, config, folder, workers=options.workers,
                                probe=options.probe, pictures=options.pictures) for folder in folders}
    if options.sugarcrepe:
        results |= sugarcrepe(model, tokenizer, config, options.sugarcrepe, options.images, options.workers)
    print(table(results))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)

def main():
    """The command line."""
    parser = argparse.ArgumentParser(description="Evaluates a CLIP checkpoint.")
    parser.add_argument("checkpoint", nargs="?", help="a file of clip_pgs.py, open_clip, OpenAI or CLIP-PGS")
    for name, how in {
            "data": dict(nargs="+", default=(), metavar="DIR",
                         help="folders in CLIP_benchmark's layout; without it those of --val in training"),
            "probe": dict(action="store_true", help="also a linear probe, of folders with a labelled train/"),
            "sugarcrepe": dict(default="", metavar="DIR", help="folder of SugarCrepe's seven json files"),
            "images": dict(default="", metavar="DIR", help="COCO's val2017 images, for --sugarcrepe"),
            "vocab": dict(default="", help="CLIP's bpe_simple_vocab_16e6.txt.gz, for weights made elsewhere"),
            "quick-gelu": dict(action="store_true", help="for OpenAI's weights in a plain state dict"),
            "json": dict(default="", metavar="FILE", help="write the metrics, with CLIP_benchmark's names"),
            "pictures": dict(default="", metavar="DIR", help="write a PNG of what was found or mistaken"),
            "curves": dict(nargs="+", default=(), metavar="LOG",
                           help="draw the log.jsonl of runs to curves.png and print their last metrics"),
            "workers": dict(type=int, default=4, help="threads that read and decode images")}.items():
        parser.add_argument(f"--{name}", **how)
    try:
        run(parser.parse_args())
    except (ValueError, OSError, KeyboardInterrupt) as error:
        sys.exit(f"error: {data.message(error)}")

if __name__ == "__main__":
    main()
