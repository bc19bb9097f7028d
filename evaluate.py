"""What a CLIP (ours, open_clip's, OpenAI's) is worth: the papers' evaluations, equal to CLIP_benchmark's.

    python evaluate.py out/ckpt.pt                               the folders that --val named in training
    python evaluate.py out/ckpt.pt --data imagenet1k flickr30k   any folders in CLIP_benchmark's layout
    python evaluate.py ViT-B-16.pt --vocab bpe_simple_vocab_16e6.txt.gz --data imagenet1k --probe
    python evaluate.py out/ckpt.pt --sugarcrepe sugar-crepe/data --images coco/val2017
    python evaluate.py --curves out/*/log.jsonl                  losses and metrics of runs in one picture

Top to bottom: folders, embed, zero-shot, probe, pictures, weights, evaluate, main.
"""
import argparse
import json
import math
import os
import sys
import textwrap
import warnings
from collections import defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import chain, count, cycle, pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

import data

# -----------------------------------------------------------------------------
# Folders, in the layout of LAION's CLIP_benchmark. All of it is read and checked before the first image is
# encoded. A sample that cannot be read is an error, never skipped: a score over fewer samples would be a lie.

Sample = namedtuple("Sample", "path offset size name", defaults=(0, -1, "the picture"))  # where an image is
# One split. targets: class numbers, or for retrieval lists of captions, without classnames and templates.
Folder = namedtuple("Folder", "samples targets classnames templates")

def read_folder(folder, split="test"):
    """The Folder at a path. ValueError with one line for what is missing from it or contradicts itself."""
    if not os.path.isdir(folder):
        raise ValueError(f"{folder}: no such folder")
    typed = os.path.exists(f"{folder}/dataset_type.txt")
    kind = read_lines(f"{folder}/dataset_type.txt")[0].lower() if typed else "classification"
    if kind not in ("retrieval", "classification"):
        raise ValueError(f"{folder}/dataset_type.txt: '{kind}', expected retrieval or classification")
    samples, texts = zip(*read_split(f"{folder}/{split}", "txt" if kind == "retrieval" else "cls"))
    if kind == "retrieval":
        return Folder(samples, [text.splitlines() for text in texts], [], [])
    classnames = read_lines(f"{folder}/classnames.txt")
    templates = read_lines(f"{folder}/zeroshot_classification_templates.txt")
    if wrong := [line for line in templates if "{c}" not in line]:
        raise ValueError(f"{folder}/zeroshot_classification_templates.txt: '{wrong[0]}' lacks {{c}}")
    for sample, text in zip(samples, texts):
        if not text.strip().isdecimal() or int(text) >= len(classnames):
            raise ValueError(f"{sample.path}: the label of {sample.name} is '{text.strip()[:20]}', but "
                             f"classnames.txt has {len(classnames)} lines, counted from 0")
    return Folder(samples, [int(text) for text in texts], classnames, templates)

def read_split(folder, extension):
    """Yields (Sample, text of the `extension` file beside it) for each image of a split, in order."""
    number = read_lines(f"{folder}/nshards.txt")[0]
    if not number.isdecimal() or int(number) == 0:
        raise ValueError(f"{folder}/nshards.txt: '{number}', expected the number of shards")
    for shard in (f"{folder}/{i}.tar" for i in range(int(number))):
        if not os.path.exists(shard):
            raise ValueError(f"{shard}: missing, though nshards.txt says {number}")
        members, fault = data.tar_samples(shard)
        if fault:
            raise ValueError(fault)
        for key, files in members:
            image = next((name for name in data.IMAGE_EXTENSIONS if name in files), None)
            if image is None or extension not in files:
                raise ValueError(f"{shard}: sample {key} has no {f'.{extension}' if image else 'image'}")
            text = ""
            with suppress(UnicodeDecodeError):
                text = data.read_bytes(shard, *files[extension]).decode("utf-8-sig")
            if not text.strip():
                raise ValueError(f"{shard}: {key}.{extension} is empty or not UTF-8")
            yield Sample(shard, *files[image], f"{key}.{image}"), text

def read_lines(path):
    """The lines of a text file. ValueError if it is missing, not UTF-8, or a line is blank."""
    try:
        lines = [line.strip() for line in Path(path).read_text("utf-8-sig").splitlines()] or [""]
    except (FileNotFoundError, UnicodeDecodeError):
        raise ValueError(f"{path}: missing or not UTF-8; expected CLIP_benchmark's layout") from None
    if "" in lines:
        raise ValueError(f"{path}: line {lines.index('') + 1} is blank")
    return lines

# -----------------------------------------------------------------------------
# Embed: open_clip's evaluation transform, bit for bit, then unit features. Of several ranks, rank r encodes
# every world_size-th sample from the r-th on, and all get all features.

IMAGES, TEXTS = 128, 512  # at a time: enough to fill a GPU; features depend on it by rounding alone

def resize_and_crop(image, size):
    """The middle of a PIL image, its shorter side resized to `size`: (3, size, size) uint8, RGB."""
    longest = data.MAX_PIXELS // size ** 2 * min(image.size)  # resized, a longer one would fill the memory
    image = ImageOps.crop(data.eight_bits(image), tuple(max(0, side - longest) // 2 for side in image.size))
    width, height = (int(size * side / min(image.size)) for side in image.size)  # cut off, not rounded
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)  # last: palettes do not mix

def preprocess(image, size):
    """What the encoder sees of a PIL image: (3, size, size) float."""
    return data.normalize(resize_and_crop(image, size))

def read_image(sample, size, upright=False):
    """The middle of a Sample, (3, size, size) uint8. ValueError that names it if it does not decode.
    As CLIP_benchmark sees it, which converts to RGB first; or as people do, upright and on white."""
    try:
        with open(sample.path, "rb") as file:  # not data.read_bytes, whose files another thread might close
            file.seek(sample.offset)
            with data.open_image(file.read(sample.size)) as image:
                image = data.to_rgb(data.upright(image)) if upright else data.eight_bits(image).convert("RGB")
                return resize_and_crop(image, size)
    except (ValueError, OSError) as error:
        cause = getattr(error, "strerror", None) or error
        raise ValueError(f"{sample.path}: {cause} ({sample.name} does not decode)") from None

def embed_images(model, samples, config, rank=0, world_size=1, workers=4, name=""):
    """Unit features (N, E) of samples, on the model's device; `name` is what the progress bar says. Threads
    read: Pillow works without Python's lock, and they start at once in the middle of a training run."""
    own, read = samples[rank::world_size], partial(read_image, size=config.image_size)
    starts = tqdm(range(0, len(own), IMAGES), name, leave=False, unit=" batches", disable=rank or not name)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        reads = (pool.map(read, own[i:i + IMAGES]) for i in starts)
        batches = (torch.stack([*now]) for now, _ in pairwise(chain(reads, [None])))  # the next is being read
        features = (model.encode_image(data.normalize(x.to(model.logit_scale.device))) for x in batches)
        return gather(model, features, len(samples), rank, world_size)

def embed_texts(model, tokenizer, texts, rank=0, world_size=1):
    """Unit features (N, E) of a list of str, on the model's device."""
    own = texts[rank::world_size]
    features = (model.encode_text(tokenizer.encode(own[i:i + TEXTS])) for i in range(0, len(own), TEXTS))
    return gather(model, features, len(texts), rank, world_size)

@torch.no_grad()
def gather(model, features, total, rank, world_size):
    """Unit features (total, E) of all samples, in order, on all ranks. features yields those of this rank,
    (B, E). A ValueError of one rank is raised on all: none may wait for one that has stopped."""
    joined = model.text_projection.new_zeros(total, model.text_projection.shape[1])
    faults = [""] * world_size
    try:
        joined[rank::world_size] = torch.cat([joined[:0], *features])
    except ValueError as error:
        faults[rank] = str(error)
    if world_size > 1:
        dist.all_gather_object(faults, faults[rank])
        dist.all_reduce(joined)  # a sum: each row is zero on all ranks but one
    if any(faults):
        raise ValueError(max(faults))
    if not joined.isfinite().all():
        raise ValueError("the features are not finite numbers: the training has diverged")
    return F.normalize(joined, dim=-1)

# -----------------------------------------------------------------------------
# Zero-shot: the class whose sentences are nearest to an image; the image of a caption, a caption of an image;
# SugarCrepe (Hsieh et al., NeurIPS 2023): is the true caption nearer than an altered one?

def mean(x):
    """The mean of a tensor of counts or truths, as a plain number."""
    return x.double().mean().item()

def class_features(model, tokenizer, classnames, templates, rank=0, world_size=1):
    """(C, E) unit features: for each class, the mean over the templates of its sentences' unit features."""
    texts = [template.replace("{c}", name) for name in classnames for template in templates]
    features = embed_texts(model, tokenizer, texts, rank, world_size)           # (C * templates, E)
    return F.normalize(features.view(len(classnames), len(templates), -1).mean(1), dim=-1)

def classification_metrics(scores, labels):
    """acc1, acc5 (of C if there are fewer) and mean_per_class_recall of scores (N, C), labels (N,)."""
    C = scores.shape[1]
    right = scores.topk(min(5, C)).indices == labels[:, None]                  # (N, 5)
    images, hits = labels.bincount(minlength=C), labels[right[:, 0]].bincount(minlength=C)
    return {"acc1": mean(right[:, 0]), "acc5": mean(right.any(1)),
            "mean_per_class_recall": mean((hits / images.double())[images > 0])}  # of classes with an image

def nearest(queries, gallery, k=10):
    """(Q, k) indices of the rows of gallery (G, E) nearest to each of queries (Q, E), best first."""
    scores = (rows @ gallery.T for rows in queries.split(512))  # of 5,000 x 25,000, a tenth is in memory
    return torch.cat([some.topk(min(k, len(gallery))).indices for some in scores])

def retrieval_metrics(image_features, text_features, image_of_text):
    """Recall at 1, 5, 10 in both directions, of features (I, E), (T, E); image_of_text (T,): the image of a
    caption. A query counts as answered if one right answer is among its k nearest, as in CLIP's papers."""
    images = image_of_text[:, None] == nearest(text_features, image_features)                  # (T, 10)
    texts = image_of_text[nearest(image_features, text_features)]                              # (I, 10)
    texts = texts == torch.arange(len(image_features), device=texts.device)[:, None]
    return {f"{name}_retrieval_recall@{k}": mean(right[:, :k].any(1))
            for name, right in (("image", images), ("text", texts)) for k in (1, 5, 10)}

SUGARCREPE = "replace_obj replace_att replace_rel swap_obj swap_att add_obj add_att".split()

def sugarcrepe(model, tokenizer, config, folder, images, workers=4):
    """{"sugar_crepe/replace_obj": {"acc": ...}, ...}, then the means of a kind; images: COCO's val2017."""
    questions, results = {kind: read_questions(f"{folder}/{kind}.json") for kind in SUGARCREPE}, {}
    names = sorted({name for asked, *_ in questions.values() for name in asked})  # each is encoded once
    samples = [Sample(f"{images}/{name}") for name in names]
    features = dict(zip(names, embed_images(model, samples, config, workers=workers, name="sugar_crepe")))
    for kind, (asked, *texts) in questions.items():
        image = torch.stack([features[name] for name in asked])                  # (N, E)
        right, wrong = ((image * embed_texts(model, tokenizer, text)).sum(1) for text in texts)
        results[kind] = mean(right > wrong)
    for kind in ("replace", "swap", "add"):
        results[kind] = float(np.mean([acc for name, acc in results.items() if name.startswith(kind)]))
    return {f"sugar_crepe/{kind}": {"acc": acc} for kind, acc in results.items()}

def read_questions(path):
    """[images' file names, captions, negative captions] of one of SugarCrepe's json files."""
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        if rows := json.loads(Path(path).read_bytes()).values():
            return [[row[key] for row in rows] for key in ("filename", "caption", "negative_caption")]
    raise ValueError(f"{path}: expected a filename, caption, negative_caption per question")

# -----------------------------------------------------------------------------
# Linear probe: how well a linear classifier does on the frozen image features.

def fit_logistic(features, labels, num_classes, C, start=None):
    """(num_classes, E + 1) weights, bias last, of L2-regularised logistic regression; C as in scikit-learn.
    Minimises the mean cross entropy + |weights|^2 / (2 C N), bias free of charge, by L-BFGS in float64."""
    weights = features.new_zeros(num_classes, features.shape[1] + 1) if start is None else start.clone()
    optimizer = torch.optim.LBFGS([weights.requires_grad_()], max_iter=1000, tolerance_grad=1e-6,
                                  tolerance_change=1e-9, history_size=20, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(features, weights[:, :-1], weights[:, -1]), labels)
        loss = loss + weights[:, :-1].square().sum() / (2 * C * len(features))
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()

def linear_probe(train_features, train_labels, test_features, test_labels, num_classes):
    """(test accuracy, C, held-out accuracy); C: the best on a tenth of the training set, then fit to all."""
    def accuracy(weights, features, labels):
        return mean(F.linear(features, weights[:, :-1], weights[:, -1]).argmax(1) == labels)

    center = train_features.double().mean(0)  # the free bias replaces it; L-BFGS then needs far fewer steps
    train_features, test_features = train_features.double() - center, test_features.double() - center
    order = torch.randperm(len(train_labels), generator=torch.Generator().manual_seed(0))
    held_out, rest = order.to(train_labels.device).tensor_split([max(1, len(order) // 10)])
    weights, known = None, {}
    for C in (0.1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5, 1e6):  # each fit starts from the one before
        weights = fit_logistic(train_features[rest], train_labels[rest], num_classes, C, weights)
        known[C] = accuracy(weights, train_features[held_out], train_labels[held_out])
    C = max(known, key=known.get)  # of equals the first, regularised most
    weights = fit_logistic(train_features, train_labels, num_classes, C)
    return accuracy(weights, test_features, test_labels), C, known[C]

# -----------------------------------------------------------------------------
# Pictures: sheets of masks, of what was found, of mistakes; curves of runs.

TILE, GAP, LINE = 160, 8, 15  # pixels: a picture, the space around it, a line of text
COLORS = "#1f77b4 #d62728 #2ca02c #9467bd #ff7f0e #8c564b #e377c2 #17becf #7f7f7f #bcbd22".split()

def sheet(path, tiles, columns):
    """Writes a PNG of tiles, row by row: (picture (3, H, W) uint8, text below it[, color of a frame])."""
    lines = max(text.count("\n") + bool(text) for _, text, *_ in tiles)
    width, height = TILE + 2 * GAP, TILE + 2 * GAP + LINE * lines
    image = Image.new("RGB", (columns * width, math.ceil(len(tiles) / columns) * height), "white")
    draw = ImageDraw.Draw(image)
    for number, (picture, text, *frame) in enumerate(tiles):
        x, y = number % columns * width + GAP, number // columns * height + GAP
        if frame:
            draw.rectangle((x - 4, y - 4, x + TILE + 3, y + TILE + 3), *frame)
        picture = Image.fromarray(picture.permute(1, 2, 0).cpu().numpy())
        image.paste(picture.resize((TILE, TILE), Image.Resampling.BOX), (x, y))  # keeps small pixels sharp
        draw.text((x, y + TILE + 4), text, "black", font_size=12)
    image.save(path)

def heat_map(patches, side):
    """A grey picture (3, side, side) uint8 of a value per patch, (1, L): the highest is white."""
    grid = math.isqrt(patches.shape[1])
    shades = 255 * (patches / patches.max().clamp(min=1e-12)).view(1, 1, grid, grid)
    return F.interpolate(shades, (side, side))[0].byte().expand(3, -1, -1)

def frame_patches(image, patches, patch_size):
    """The image (3, H, H) uint8 with a green frame around each of the patches, (N,) indices."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    draw = ImageDraw.Draw(picture)
    for patch in patches.tolist():
        row, column = divmod(patch, image.shape[-1] // patch_size)
        x, y = column * patch_size, row * patch_size
        draw.rectangle((x, y, x + patch_size - 1, y + patch_size - 1), outline="lime", width=patch_size // 8)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)

def masked(images, keep, valid, patch_size):
    """images (B, 3, H, H) uint8 with the removed patches grey; keep, valid as of `clip_pgs.make_mask`."""
    B, grid = len(images), images.shape[-1] // patch_size
    seen = torch.zeros(B, grid ** 2, device=keep.device)
    seen = seen.scatter(1, keep[:B], 1.0 if valid is None else valid[:B].float()).view(B, 1, grid, grid)
    return images.where(F.interpolate(seen, images.shape[2:]).cpu() > 0, 128)

def draw_masks(path, images, keep, valid, patch_size):
    """Writes a PNG of images (B, 3, H, H) uint8 and, below, of what the masks of the first view leave."""
    valid = None if valid is None else valid[0]
    left = images if keep is None else masked(images, keep[0], valid, patch_size)
    sheet(path, [(picture, "") for picture in torch.cat([images, left])], len(images))

def draw_retrieval(path, samples, captions, image_of_text, images, texts):
    """Ten captions, evenly spread, each with its image and the five nearest ones; the right one is framed."""
    asked, tiles = sorted({number * len(captions) // 10 for number in range(10)}), []
    for query, found in zip(asked, nearest(texts[asked], images, k=5).tolist()):
        own = image_of_text[query]
        tiles.append((read_image(samples[own], TILE), textwrap.fill(captions[query], 26)))
        tiles += [(read_image(samples[i], TILE), "", "limegreen" if i == own else "white") for i in found]
    sheet(path, tiles, 1 + len(found))

def draw_mistakes(path, folder, scores, labels):
    """Up to twenty mistakes, those in which the wrong class leads the true one by most, with both names."""
    lead = scores.max(1).values - scores.gather(1, labels[:, None])[:, 0]
    names, worst = folder.classnames, lead.topk(min(20, int((lead > 0).sum()))).indices.tolist()
    texts = [f"predicted: {names[scores[i].argmax()]:.20}\ntrue: {names[labels[i]]:.20}" for i in worst]
    if worst:  # a perfect score leaves nothing to draw
        sheet(path, [(read_image(folder.samples[i], TILE), text) for i, text in zip(worst, texts)], 5)

def read_log(path):
    """The records of a log.jsonl; damaged lines are dropped with a warning."""
    lines, records = Path(path).read_text("utf-8", "replace").splitlines(), []
    for line in lines:
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            record = json.loads(line)
            if math.isfinite(record["step"] + record["loss"]):
                records.append(record)
    if len(records) < len(lines):
        print(f"warning: {path}: {len(lines) - len(records)} damaged lines dropped")
    return records

def plot(draw, left, title, series):
    """Draws a panel with numbered axes; series: (color, x, y), y is (N,) for a line, (2, N) for a band."""
    xs, ys = (np.concatenate([np.ravel(one[axis]) for one in series]) for axis in (1, 2))
    across = partial(np.interp, xp=(xs.min(), xs.max()), fp=(left + 50, left + 400))
    down = partial(np.interp, xp=(ys.min(), ys.max()), fp=(290, 40))
    for tick in np.linspace(ys.min(), ys.max(), 5):
        draw.line((left + 50, down(tick), left + 400, down(tick)), "#d0d0d0")
        draw.text((left + 44, down(tick)), f"{tick:.3g}", "black", anchor="rm", font_size=11)
    for tick in np.unique(np.linspace(xs.min(), xs.max(), 5).round()):  # steps and epochs are whole numbers
        draw.text((across(tick), 296), f"{tick:.0f}", "black", anchor="mt", font_size=11)
    for color, x, y in series:
        lines = [[*zip(across(x), row)] for row in np.atleast_2d(down(y))]
        draw.line(lines[0], color, 2) if len(lines) == 1 else draw.polygon(lines[0] + lines[1][::-1], color)
    draw.text((left + 50, 20), title, "black", font_size=11)

def first_metrics(results):
    """{"imagenet acc1": value in [0, 1], "coco image@1": ...}: the first metric of each folder."""
    return {f"{os.path.basename(os.path.normpath(folder))} {name.replace('_retrieval_recall', '')}": value
            for folder, found in results.items() for name, value in [*found.items()][:1] if name != "failed"}

def draw_curves(path, logs):
    """Writes a PNG of the losses and first metrics in runs' log.jsonl; returns {run: its last metrics}."""
    panels, last = defaultdict(list), {}
    for log, color in zip(logs, cycle(COLORS)):
        curves, metrics = defaultdict(list), last.setdefault(os.path.dirname(log) or log, {})
        for record in read_log(log):
            curves["loss over steps"].append((record["step"], record["loss"]))
            for title, value in first_metrics(record.get("eval", {})).items():
                curves[f"{title}, %, over epochs"].append((record["epoch"], 100 * value))
                metrics[title] = value
        if not curves:
            raise ValueError(f"{log}: no training step in it; expected the log.jsonl of a run")
        for title, points in curves.items():
            x, y = np.array(points).T
            window = max(1, len(x) // 40)  # of the moving average, with the values themselves pale behind it
            smooth = np.convolve(y, np.ones(window) / window, "valid")
            panels[title] += [(color + "50", x, y), (color, x[window - 1:], smooth)]
    image = Image.new("RGB", (420 * len(panels), 330 + 16 * len(logs)), "white")
    draw = ImageDraw.Draw(image, "RGBA")  # the last two digits of a pale color are its alpha
    for left, title in zip(count(0, 420), panels):
        plot(draw, left, title, panels[title])
    for top, name, color in zip(count(320, 16), last, cycle(COLORS)):
        draw.text((50, top), name, color, font_size=12)
    image.save(path)
    return last

# -----------------------------------------------------------------------------
# Weights. A checkpoint made here knows its size and tokenizer; of any other file, the shapes tell the size.

# The types in .safetensors, and plain numbers of NumPy, which others store beside the tensors: not code.
TYPES = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, I64=torch.int64)
scalar = np.float64(0).__reduce__()[0]
NUMBERS = [np.dtype, *(type(np.dtype(kind)) for kind in "efd?U" + np.typecodes["AllInteger"]),
           (scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar")]

def read_safetensors(path):
    """{name: tensor} of a .safetensors file: a header's length, the header in json, the tensors' bytes."""
    raw = bytearray(Path(path).read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    header, tensors = json.loads(raw[8:start]), {}
    header.pop("__metadata__", None)
    for name, entry in header.items():
        first, last = (start + offset for offset in entry["data_offsets"])
        tensors[name] = torch.frombuffer(raw[first:last], dtype=TYPES[entry["dtype"]]).view(entry["shape"])
    return tensors

def read_checkpoint(path):
    """The dict in a checkpoint file, on the CPU. ValueError if it is missing, damaged, or would run code."""
    try:
        if os.path.splitext(path)[1] == ".safetensors":
            return read_safetensors(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals(NUMBERS):
            warnings.simplefilter("ignore")  # torch prints a warning before it rejects a file; ours follows
            with suppress(ValueError, RuntimeError):  # what is no archive of TorchScript, as OpenAI's are
                return torch.jit.load(path, map_location="cpu").state_dict()
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch each have their own for a damaged file
        what = "damaged, no checkpoint, or one that could run code when loaded"
        what = error.strerror if getattr(error, "filename", None) else data.what_it_is(path, what)
        raise ValueError(f"{path}: refused ({type(error).__name__}): {what}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path}: not a checkpoint, it holds a {type(state).__name__}")
    return state

def load(path, vocab="", quick_gelu=False):
    """(model, tokenizer, config) of a checkpoint, on the CPU, in float32. ValueError, OSError if it is none.
    vocab: CLIP's vocabulary file, for weights made elsewhere. quick_gelu: for OpenAI's in a plain dict."""
    import clip_pgs  # the model to fill; everything else here takes any model
    checkpoint = read_checkpoint(path)
    ours = {"model", "config", "merges"} <= checkpoint.keys()
    state = checkpoint["model"] if ours else checkpoint.get("state_dict", checkpoint)
    try:
        # DDP and torch.compile put "module." and "_orig_mod." into names.
        state = {name.replace("_orig_mod.", "").removeprefix("module."): x for name, x in state.items()}
        openai = {"input_resolution", "context_length", "vocab_size"} & state.keys()  # in its archives alone
        state = {k: x.float() for k, x in state.items() if torch.is_tensor(x) and k not in openai}
        known = checkpoint["config"] if ours else infer_config(state)
        config = clip_pgs.Config(**{k: x for k, x in known.items() if hasattr(clip_pgs.Config, k)})
        config.quick_gelu |= quick_gelu or bool(openai)  # OpenAI trained with QuickGELU
        clip_pgs.check(config)
        with torch.device("meta"):  # shapes alone: random weights would be drawn only to be thrown away
            model = clip_pgs.CLIP(config)
        model.load_state_dict(state, assign=True)
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
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
    width, _, patch_size, _ = state["visual.conv1.weight"].shape
    context_length, text_width = state["positional_embedding"].shape
    if width % 64 or text_width % 64 or width > 1024:  # ViT-H and up; no tensor tells the number of heads
        raise ValueError(f"a ViT of width {width}, text {text_width}, whose heads may not be 64 wide")
    blocks = [name.startswith("visual.") for name in state if name.endswith(".ln_1.weight")]
    towers = f"{width}x{blocks.count(True)}-{text_width}x{blocks.count(False)}"
    return dict(model=f"{towers}-{state['text_projection'].shape[1]}", patch_size=patch_size,
                image_size=patch_size * math.isqrt(len(state["visual.positional_embedding"]) - 1),
                context_length=context_length, vocab_size=len(state["token_embedding.weight"]))

# -----------------------------------------------------------------------------
# Evaluate: a folder from its files to its metrics, several folders, the table of all, main.

def evaluate(model, tokenizer, config, folder, rank=0, world_size=1, workers=4, probe=False, pictures=""):
    """The metrics of a folder, {CLIP_benchmark's name: value in [0, 1]}. All ranks call it together.
    probe: also "lp_acc1", of a folder with a train/ split. pictures: a folder for a PNG of what was found."""
    name, this = os.path.basename(os.path.abspath(folder)), read_folder(folder)
    train = read_folder(folder, "train") if probe and this.classnames else None
    images = embed_images(model, this.samples, config, rank, world_size, workers, name)
    if not this.classnames:
        image_of_text, captions = zip(*((i, text) for i, texts in enumerate(this.targets) for text in texts))
        texts = embed_texts(model, tokenizer, captions, rank, world_size)
        if pictures:
            draw_retrieval(f"{pictures}/{name}.png", this.samples, captions, image_of_text, images, texts)
        return retrieval_metrics(images, texts, torch.tensor(image_of_text, device=images.device))
    classes = class_features(model, tokenizer, this.classnames, this.templates, rank, world_size)
    scores, labels = images @ classes.T, torch.tensor(this.targets, device=images.device)
    metrics = classification_metrics(scores, labels)
    if pictures:
        draw_mistakes(f"{pictures}/{name}.png", this, scores, labels)
    if train:
        known = embed_images(model, train.samples, config, rank, world_size, workers, f"{name} train")
        targets = torch.tensor(train.targets, device=images.device)
        metrics["lp_acc1"], C, held_out = linear_probe(known, targets, images, labels, len(this.classnames))
        print(f"{name}: probe on {len(known)} images; C = {C:.3g}, {held_out:.1%} right on a held-out tenth")
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

def table(results):
    """{name: metrics} as an aligned Markdown table, in percent; several acc1 get an average row."""
    header = {name: name.replace("_retrieval_recall", "") for metrics in results.values() for name in metrics}
    rows, blank = {"": header, **results}, dict.fromkeys(header, "")
    classified = [metrics for metrics in results.values() if "acc1" in metrics]
    if len(classified) > 1:
        rows["average"] = {name: sum(m[name] for m in classified) / len(classified) for name in classified[0]}
    cells = [[row, *(x if isinstance(x, str) else f"{100 * x:.2f}" for x in (blank | metrics).values())]
             for row, metrics in rows.items()]  # the header, and why a folder failed, are texts
    first, *widths = (max(map(len, column)) for column in zip(*cells))
    cells.insert(1, ["-" * first, *("-" * (width - 1) + ":" for width in widths)])
    rows = [" | ".join([row[0].ljust(first), *map(str.rjust, row[1:], widths)]) for row in cells]
    return "\n".join(f"| {row} |" for row in rows)

def main():
    """The command line: evaluates what was asked for and prints a table, or draws the curves of runs."""
    parser = argparse.ArgumentParser(description="Evaluates a CLIP checkpoint.")
    add = parser.add_argument
    add("checkpoint", nargs="?", help="a file of clip_pgs.py, open_clip, OpenAI or CLIP-PGS")
    add("--data", nargs="+", metavar="DIR", help="folders in CLIP_benchmark's layout; else training's --val")
    add("--probe", action="store_true", help="also a linear probe, of folders with a labelled train/")
    add("--sugarcrepe", metavar="DIR", help="folder of SugarCrepe's seven json files")
    add("--images", metavar="DIR", help="COCO's val2017 images, for --sugarcrepe")
    add("--vocab", metavar="FILE", help="CLIP's bpe_simple_vocab_16e6.txt.gz, for weights made elsewhere")
    add("--quick-gelu", action="store_true", help="for OpenAI's weights in a plain state dict")
    add("--json", metavar="FILE", help="write the metrics, with CLIP_benchmark's names")
    add("--pictures", metavar="DIR", help="write a PNG of what was found or mistaken")
    add("--curves", nargs="+", metavar="LOG", help="draw runs' log.jsonl to curves.png, print last metrics")
    add("--workers", type=int, default=4, help="threads that read and decode images")
    args = parser.parse_args()
    try:
        if args.curves:
            print(table(draw_curves("curves.png", args.curves)) + "\nwrote curves.png")
            return
        if not args.checkpoint:
            raise ValueError("name a checkpoint, such as out/ckpt.pt, or logs with --curves")
        if bool(args.sugarcrepe) != bool(args.images):
            raise ValueError("--sugarcrepe and --images go together: json files, and COCO's val2017 images")
        model, tokenizer, config = load(args.checkpoint, args.vocab, args.quick_gelu)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        folders = args.data or (() if args.sugarcrepe else config.val)
        if not folders and not args.sugarcrepe:
            raise ValueError(f"{args.checkpoint}: trained without --val; say what to evaluate with --data")
        os.makedirs(args.pictures or ".", exist_ok=True)
        for folder in folders:  # a slip in the last folder shows before the first one's hour of work
            read_folder(folder)
        results = {folder: evaluate(model, tokenizer, config, folder, workers=args.workers, probe=args.probe,
                                    pictures=args.pictures) for folder in folders}
        if args.sugarcrepe:
            results |= sugarcrepe(model, tokenizer, config, args.sugarcrepe, args.images, args.workers)
        print(table(results))
        if args.json:
            Path(args.json).write_text(json.dumps(results, indent=1))
    except (ValueError, OSError, KeyboardInterrupt) as error:
        sys.exit(f"error: {data.message(error)}")

if __name__ == "__main__":
    main()
