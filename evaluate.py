"""What a CLIP checkpoint is worth: the papers' evaluations, number for number with CLIP_benchmark.

    python evaluate.py out/ckpt.pt                               the folders that --val named in training
    python evaluate.py out/ckpt.pt --data imagenet1k flickr30k   any folders in CLIP_benchmark's layout
    python evaluate.py ViT-B-16.pt --vocab bpe_simple_vocab_16e6.txt.gz --data imagenet1k --probe
    python evaluate.py out/ckpt.pt --sugarcrepe sugar-crepe/data --images coco/val2017

Takes checkpoints of clip_pgs.py, state dicts with open_clip's names (so also the CLIP-PGS authors' files) and
OpenAI's archives. A folder tells by what lies in it how to evaluate it. The story, top to bottom: load, preprocess,
folders, embed, classification, retrieval, linear probe, one folder, compositionality, pictures, table and main.
"""
import argparse
import json
import math
import os
import sys
import textwrap
import zipfile
from collections import deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import clip_pgs
import data

# -----------------------------------------------------------------------------
# Load. A checkpoint made here knows its size and its tokenizer; of any other file, the tensors' shapes tell the size.


def load(path, vocab="", quick_gelu=False):
    """(model, tokenizer, config) of a checkpoint; the model is on the CPU, in float32, every tensor from the file.

    vocab: CLIP's bpe_simple_vocab_16e6.txt.gz, which files that were not made here need. quick_gelu: for OpenAI's
    weights, known without it only if the file is OpenAI's own archive or its state dict. Raises ValueError or
    OSError with one line: a file that is missing, damaged, of another size, or that would run code when loaded.
    """
    checkpoint = read_checkpoint(path)
    ours = {"model", "config", "merges"} <= checkpoint.keys()
    state = checkpoint["model"] if ours else checkpoint.get("state_dict", checkpoint)
    state = {name.removeprefix("module."): tensor.float() for name, tensor in state.items()
             if isinstance(tensor, torch.Tensor)}
    # Only OpenAI's archives hold these three, and OpenAI's weights need QuickGELU.
    openai = [state.pop(name, None) is not None for name in ("input_resolution", "context_length", "vocab_size")]

    config = read_config(path, checkpoint["config"]) if ours else infer_config(path, state)
    config.quick_gelu |= quick_gelu or any(openai)
    if not ours and not vocab:
        raise ValueError(f"{path}: no tokenizer inside; pass CLIP's own with --vocab bpe_simple_vocab_16e6.txt.gz")
    tokenizer = (data.Tokenizer.from_file(vocab, config.context_length) if vocab
                 else data.Tokenizer(checkpoint["merges"], config.context_length))
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(f"{path}: embeds {config.vocab_size} tokens, but the tokenizer has {tokenizer.vocab_size}")

    with torch.device("meta"):  # shapes alone: random weights would be drawn only to be thrown away
        model = clip_pgs.CLIP(config)
    check_tensors(path, state, model.state_dict())
    model.load_state_dict(state, assign=True)
    return model.eval(), tokenizer, config


def read_checkpoint(path):
    """The dict inside a checkpoint file. OpenAI's are archives of TorchScript, which has its own way to load."""
    try:
        names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
        if any(name.endswith("/constants.pkl") for name in names):
            return dict(torch.jit.load(path, map_location="cpu").state_dict())
    except (RuntimeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: a damaged archive ({str(error).splitlines()[0]:.120})") from None
    return clip_pgs.load_checkpoint(path)


def read_config(path, values):
    """The Config that a checkpoint made here was trained with."""
    try:
        config = clip_pgs.Config(**values)
        clip_pgs.check(config)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: its config does not fit this version of clip_pgs.py ({error})") from None
    return config


def infer_config(path, state):
    """The Config that a state dict of CLIP's parameter names belongs to, by the shapes of its tensors."""
    def depth(prefix):
        return len({name[len(prefix):].split(".")[0] for name in state if name.startswith(prefix)})

    try:
        width, _, patch_size, _ = state["visual.conv1.weight"].shape
        num_patches = len(state["visual.positional_embedding"]) - 1
        context_length, text_width = state["positional_embedding"].shape
        vocab_size = len(state["token_embedding.weight"])
        embed_dim = state["text_projection"].shape[1]
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise ValueError(f"{path}: not a CLIP with a ViT, in open_clip's names ({error})") from None
    if width % clip_pgs.HEAD_WIDTH or text_width % clip_pgs.HEAD_WIDTH or width > 1024:
        # No tensor tells the number of heads. All of CLIP's are 64 wide; those of open_clip's ViT-H and up are not.
        raise ValueError(f"{path}: a ViT of width {width}, text {text_width}, whose heads may not be 64 wide")
    size = dict(embed_dim=embed_dim, width=width, layers=depth("visual.transformer.resblocks."),
                text_width=text_width, text_layers=depth("transformer.resblocks."))
    model = next((name for name, known in clip_pgs.SIZES.items() if known == size), f"the ViT in {path}")
    clip_pgs.SIZES[model] = size  # a size that has no name yet gets one
    return clip_pgs.Config(model=model, image_size=patch_size * math.isqrt(num_patches), patch_size=patch_size,
                           context_length=context_length, vocab_size=vocab_size)


def check_tensors(path, state, expected):
    """ValueError that names the first tensor of a state dict that is missing, of another shape, or unknown."""
    for name in expected | state:
        found = tuple(state[name].shape) if name in state else "missing"
        wanted = tuple(expected[name].shape) if name in expected else "no tensor of that name"
        if found != wanted:
            raise ValueError(f"{path}: {name} is {found}, expected {wanted}")


# -----------------------------------------------------------------------------
# Preprocess: open_clip's evaluation transform, bit for bit. Images stay bytes until they reach the device.


def resize_and_crop(image, size):
    """The middle of a PIL image, its shorter side resized to `size`: (3, size, size) uint8, RGB.

    Resized in the image's own mode and converted last, as open_clip does: a palette image then gets its nearest
    pixels instead of a bicubic mix. No orientation tag is applied.
    """
    short, long = min(image.size), max(image.size)
    longer = int(size * long / short)  # cut off, not rounded
    width, height = (size, longer) if image.width <= image.height else (longer, size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.crop((left, top, left + size, top + size)).convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def preprocess(image, size):
    """What the encoder sees of a PIL image: (3, size, size) float."""
    return data.normalize(resize_and_crop(image, size))


# -----------------------------------------------------------------------------
# Folders, in the layout of LAION's CLIP_benchmark. All of it is read and checked before the first image is encoded.
# A sample that cannot be read is an error, never skipped: a test score over fewer samples would be a lie.

Sample = namedtuple("Sample", "path offset size name")  # where an image lies; name is for messages
# One split. targets: class numbers, or lists of captions for retrieval, where classnames and templates are empty.
Folder = namedtuple("Folder", "samples targets classnames templates")


def read_folder(folder, split="test"):
    """The Folder at a path. ValueError with one line for whatever is missing from it or contradicts itself."""
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
            raise ValueError(f"{folder}/zeroshot_classification_templates.txt: '{line}' lacks {{c}}, the class name")
    for sample, text in zip(samples, texts):
        if not text.strip().isdecimal() or int(text) >= len(classnames):
            raise ValueError(f"{sample.path}: the label of {sample.name} is '{text.strip()[:20]}', but classnames.txt "
                             f"has {len(classnames)} lines, for 0 to {len(classnames) - 1}")
    return Folder(samples, [int(text) for text in texts], classnames, templates)


def read_lines(folder, name):
    """The lines of a text file in a folder. ValueError if it is missing or one is blank: their numbers count."""
    path = os.path.join(folder, name)
    try:
        with open(path, encoding="utf-8") as file:
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
        for key, files in data.tar_samples(shard).items():
            image = next((name for name in data.IMAGE_EXTENSIONS if name in files), None)
            if image is None or extension not in files:
                raise ValueError(f"{shard}: sample {key} has no {f'.{extension}' if image else 'image'}")
            text = data.read_bytes(shard, *files[extension]).decode("utf-8", "replace")
            if not text.strip() or "\ufffd" in text:
                raise ValueError(f"{shard}: {key}.{extension} is empty or not UTF-8")
            samples.append(Sample(shard, *files[image], f"{key}.{image}"))
            texts.append(text)
    return samples, texts


def read_image(sample):
    """The RGB image of a sample. ValueError that says which one does not decode, and why."""
    try:
        with open(sample.path, "rb") as file:  # not data.read_bytes, whose files another thread might close
            file.seek(sample.offset)
            return data.decode_image(file.read(sample.size)).convert("RGB")  # before the resize, as CLIP_benchmark
    except (ValueError, OSError) as error:
        raise ValueError(f"{sample.path}: {sample.name} does not decode ({error})") from None


# -----------------------------------------------------------------------------
# Embed. Everything below works on unit features. With several ranks, rank r encodes every world_size-th sample from
# the r-th on, and all ranks get all features.

IMAGE_BATCH, TEXT_BATCH = 128, 512  # large enough to fill a GPU; features do not depend on them, but for rounding


def image_batches(samples, size, workers):
    """Yields (B, 3, size, size) uint8, read by threads two batches ahead.

    Threads, not processes: Pillow decodes and resizes without Python's lock, they start at once in the middle of a
    training run, and an error arrives as it was raised.
    """
    def read(sample):
        return resize_and_crop(read_image(sample), size)

    with ThreadPoolExecutor(max(1, workers)) as pool:
        batches = (pool.map(read, samples[start:start + IMAGE_BATCH]) for start in range(0, len(samples), IMAGE_BATCH))
        ahead = deque(islice(batches, 2))
        while ahead:
            ahead.extend(islice(batches, 1))
            yield torch.stack([*ahead.popleft()])


@torch.no_grad()
def embed_images(model, samples, config, rank=0, world_size=1, workers=4, name=""):
    """Unit features (N, D) of samples, on the model's device; `name` is what the progress bar says."""
    device, features = model.logit_scale.device, []
    with tqdm(total=len(samples), desc=name, unit=" images", leave=False, disable=rank > 0) as bar:
        for images in image_batches(samples[rank::world_size], config.image_size, workers):
            features.append(model.encode_image(data.normalize(images.to(device))))
            bar.update(min(len(images) * world_size, bar.total - bar.n))
    return gather(features, len(samples), model, world_size)


@torch.no_grad()
def embed_texts(model, tokenizer, texts, rank=0, world_size=1):
    """Unit features (N, D) of a list of str, on the model's device."""
    own = texts[rank::world_size]
    features = [model.encode_text(tokenizer.encode(own[start:start + TEXT_BATCH]))
                for start in range(0, len(own), TEXT_BATCH)]
    return gather(features, len(texts), model, world_size)


def gather(features, total, model, world_size):
    """Joins what each rank has encoded: unit features (total, D) in the order of the samples."""
    features = torch.cat([model.text_projection.new_zeros(0, model.text_projection.shape[1]), *features]).float()
    if world_size > 1:
        most = math.ceil(total / world_size)  # the last ranks may have one sample less: a zero stands for it
        features = F.pad(features, (0, 0, 0, most - len(features)))
        features = clip_pgs.Gather.apply(features).view(world_size, most, -1)
        features = features.transpose(0, 1).flatten(0, 1)[:total]    # row i * world_size + rank
    if not features.isfinite().all():
        raise ValueError("the features are not finite numbers: the training has diverged")
    return F.normalize(features, dim=-1)


# -----------------------------------------------------------------------------
# Zero-shot classification: the class whose sentences are nearest to the image.


def class_features(model, tokenizer, classnames, templates, rank=0, world_size=1):
    """(C, D) unit features: for each class, the mean over the templates of its sentences' unit features."""
    texts = [template.replace("{c}", name) for name in classnames for template in templates]
    features = embed_texts(model, tokenizer, texts, rank, world_size)           # (C * templates, D)
    return F.normalize(features.view(len(classnames), len(templates), -1).mean(1), dim=-1)


def classification_metrics(scores, labels):
    """acc1, acc5 and mean_per_class_recall of scores (N, C) and labels (N,).

    acc5 looks at all classes where there are fewer than five. Classes without an image have no recall to average.
    """
    C = scores.shape[1]
    right = scores.topk(min(5, C)).indices == labels[:, None]                  # (N, 5)
    images, hits = labels.bincount(minlength=C), labels[right[:, 0]].bincount(minlength=C)
    return {"acc1": mean(right[:, 0]), "acc5": mean(right.any(1)),
            "mean_per_class_recall": mean((hits / images.double())[images > 0])}


def mean(x):
    """The mean of a tensor of counts or truths, as a plain number."""
    return x.double().mean().item()


# -----------------------------------------------------------------------------
# Retrieval: find the image of a caption, and a caption of an image.

QUERIES = 512  # at a time: of 5,000 x 25,000 scores, only a tenth is ever in memory


def nearest(queries, gallery, k=10):
    """(Q, k) indices of the rows of gallery (G, D) nearest to each of queries (Q, D), best first; k is at most G."""
    return torch.cat([(rows @ gallery.T).topk(min(k, len(gallery))).indices for rows in queries.split(QUERIES)])


def retrieval_metrics(image_features, text_features, image_of_text):
    """Recall at 1, 5, 10 in both directions; image_of_text (T,) is the image that each caption belongs to.

    A query counts as answered if one right answer is among its k nearest, as in CLIP's papers; it is not the share of
    the right answers that was found.
    """
    images = image_of_text[:, None] == nearest(text_features, image_features)                         # (T, 10)
    texts = image_of_text[nearest(image_features, text_features)]                                     # (I, 10)
    texts = texts == torch.arange(len(image_features), device=texts.device)[:, None]
    return {f"{name}_retrieval_recall@{k}": mean(right[:, :k].any(1))
            for name, right in (("image", images), ("text", texts)) for k in (1, 5, 10)}


# -----------------------------------------------------------------------------
# Linear probe: how well a linear classifier does on the frozen image features.

TRIED_C = [10.0 ** power for power in range(-1, 7)]  # for C, the inverse of the regularisation's strength
PROBE_ROWS = 65536  # rows of logits in memory at a time; the gradient is that of all rows


def fit_logistic(features, labels, num_classes, C, start=None):
    """(num_classes, D + 1) weights, bias last, of L2-regularised logistic regression; C as in scikit-learn.

    Minimises the mean cross entropy + |weights|^2 / (2 C N), bias free of charge, by full-batch L-BFGS in float64.
    """
    N, D = features.shape
    weights = features.new_zeros(num_classes, D + 1) if start is None else start.clone()
    optimizer = torch.optim.LBFGS([weights.requires_grad_()], max_iter=1000, tolerance_grad=1e-6,
                                  tolerance_change=1e-9, history_size=20, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = weights[:, :D].square().sum() / (2 * C * N)
        loss.backward()
        for x, y in zip(features.split(PROBE_ROWS), labels.split(PROBE_ROWS)):
            part = F.cross_entropy(F.linear(x, weights[:, :D], weights[:, D]), y, reduction="sum") / N
            part.backward()
            loss = loss.detach() + part.detach()
        return loss

    optimizer.step(closure)
    return weights.detach()


def probe_accuracy(weights, features, labels):
    """The share of features (N, D) that the weights put into their class."""
    return mean(F.linear(features, weights[:, :-1], weights[:, -1]).argmax(1) == labels)


def linear_probe(train_features, train_labels, test_features, test_labels, num_classes):
    """(test accuracy, C, held-out accuracy): C is chosen on a held-out tenth of the training set, then refit on all.

    Each fit starts from the one before, which was regularised more. The features' mean is subtracted first: the free
    bias makes up for it, so the solution is the same, but L-BFGS needs a fraction of the steps.
    """
    center = train_features.double().mean(0)
    train_features, test_features = train_features.double() - center, test_features.double() - center
    order = torch.randperm(len(train_labels), generator=torch.Generator().manual_seed(0)).to(train_labels.device)
    held_out, rest = order.tensor_split([max(1, len(order) // 10)])

    weights, accuracy = None, {}
    for C in TRIED_C:
        weights = fit_logistic(train_features[rest], train_labels[rest], num_classes, C, weights)
        accuracy[C] = probe_accuracy(weights, train_features[held_out], train_labels[held_out])
    C = max(accuracy, key=accuracy.get)  # of equals the first, regularised most
    weights = fit_logistic(train_features, train_labels, num_classes, C)
    return probe_accuracy(weights, test_features, test_labels), C, accuracy[C]


# -----------------------------------------------------------------------------
# One folder, from its files to its metrics.


def evaluate(model, tokenizer, config, folder, rank=0, world_size=1, workers=4, probe=False, pictures=""):
    """The metrics of a folder, {CLIP_benchmark's name: value in [0, 1]}, on rank 0; the others return {}.

    All ranks call it together. probe: a linear probe of a classification folder as well ("lp_acc1"), which needs
    its train/ split. pictures: a folder for a PNG of what was found or mistaken.
    """
    name, this = os.path.basename(os.path.abspath(folder)), read_folder(folder)
    train = read_folder(folder, "train") if probe and this.classnames else None
    images = embed_images(model, this.samples, config, rank, world_size, workers, name)
    device, sheet = images.device, os.path.join(pictures, f"{name}.png")

    if not this.classnames:
        captions = [caption for captions in this.targets for caption in captions]
        image_of_text = [i for i, captions in enumerate(this.targets) for _ in captions]
        texts = embed_texts(model, tokenizer, captions, rank, world_size)
        if rank > 0:
            return {}
        if pictures:
            draw_retrieval(sheet, this.samples, captions, image_of_text, images, texts)
        return retrieval_metrics(images, texts, torch.tensor(image_of_text, device=device))

    classes = class_features(model, tokenizer, this.classnames, this.templates, rank, world_size)
    known = embed_images(model, train.samples, config, rank, world_size, workers, f"{name} train") if probe else None
    if rank > 0:
        return {}
    scores, labels = images @ classes.T, torch.tensor(this.targets, device=device)
    metrics = classification_metrics(scores, labels)
    if pictures:
        draw_mistakes(sheet, this, scores, labels)
    if probe:
        known_labels = torch.tensor(train.targets, device=device)
        metrics["lp_acc1"], C, held_out = linear_probe(known, known_labels, images, labels, len(this.classnames))
        print(f"{name}: linear probe by full-batch L-BFGS on {len(known)} images; C = {C:.3g}, the best of "
              f"{len(TRIED_C)} on a held-out tenth ({held_out:.1%} right), then refit on all")
    return metrics


# -----------------------------------------------------------------------------
# Compositionality (SugarCrepe, Hsieh et al., NeurIPS 2023): is the image nearer to its caption than to one in which
# an object, an attribute or a relation was replaced, swapped or added?

SUGARCREPE = {"replace": ("obj", "att", "rel"), "swap": ("obj", "att"), "add": ("obj", "att")}


def sugarcrepe(model, tokenizer, config, folder, images, workers=4):
    """{"sugar_crepe/replace_obj": {"acc": ...}, ...}: the seven files, after those of a kind their mean.

    folder: of the json files; images: COCO's val2017. Many questions are about one image: it is encoded once.
    """
    files = {f"{kind}_{part}": read_questions(os.path.join(folder, f"{kind}_{part}.json"))
             for kind, parts in SUGARCREPE.items() for part in parts}
    pictures = sorted({picture for questions in files.values() for picture, _, _ in questions})
    samples = [Sample(os.path.join(images, picture), 0, -1, picture) for picture in pictures]
    features = embed_images(model, samples, config, workers=workers, name="sugar_crepe")
    row = {picture: number for number, picture in enumerate(pictures)}

    results = {}
    for kind, parts in SUGARCREPE.items():
        for part in parts:
            asked, right, wrong = zip(*files[f"{kind}_{part}"])
            image = features[[row[picture] for picture in asked]]                # (N, D)
            right, wrong = (embed_texts(model, tokenizer, list(texts)) for texts in (right, wrong))
            results[f"sugar_crepe/{kind}_{part}"] = {"acc": mean((image * right).sum(1) > (image * wrong).sum(1))}
        accuracies = [results[f"sugar_crepe/{kind}_{part}"]["acc"] for part in parts]
        results[f"sugar_crepe/{kind}"] = {"acc": sum(accuracies) / len(parts)}
    return results


def read_questions(path):
    """[(file name of the image, caption, negative caption)] of one of SugarCrepe's json files."""
    with open(path, encoding="utf-8") as file:
        try:
            questions = [(entry["filename"], entry["caption"], entry["negative_caption"])
                         for entry in json.load(file).values()]
        except (ValueError, KeyError, TypeError, AttributeError):
            questions = []
    if not questions:
        raise ValueError(f"{path}: expected SugarCrepe's questions: filename, caption and negative_caption of each")
    return questions


# -----------------------------------------------------------------------------
# Pictures: ten queries with what was found, twenty mistakes.

TILE, MARGIN = 160, 8


def draw_sheet(path, rows):
    """Writes rows (title, [(sample, text, color of the frame), at most five]) as a PNG, each text below its image."""
    left, width, height = (240 if rows[0][0] else 0), TILE + 2 * MARGIN, TILE + 2 * MARGIN + 28
    sheet, font = Image.new("RGB", (left + 5 * width, len(rows) * height), "white"), ImageFont.load_default(12)
    draw = ImageDraw.Draw(sheet)
    for row, (title, tiles) in enumerate(rows):
        draw.multiline_text((MARGIN, row * height + MARGIN), textwrap.fill(title, 34), "black", font)
        for column, (sample, text, color) in enumerate(tiles):
            x, y = left + column * width + MARGIN, row * height + MARGIN
            draw.rectangle((x - 4, y - 4, x + TILE + 3, y + TILE + 3), fill=color)
            sheet.paste(Image.fromarray(resize_and_crop(read_image(sample), TILE).permute(1, 2, 0).numpy()), (x, y))
            draw.multiline_text((x, y + TILE + 4), text, "black", font)
    sheet.save(path)


def draw_retrieval(path, samples, captions, image_of_text, images, texts):
    """Ten captions, evenly spread, each with its five nearest images; the right one in a green frame."""
    asked = sorted({number * len(captions) // 10 for number in range(10)})
    draw_sheet(path, [(captions[query], [(samples[i], "", "limegreen" if i == image_of_text[query] else "white")
                                         for i in found])
                      for query, found in zip(asked, nearest(texts[asked], images, k=5).tolist())])


def draw_mistakes(path, folder, scores, labels):
    """Up to twenty mistakes, those in which the wrong class leads the true one by most, with both names."""
    best, predicted = scores.max(1)
    lead = best - scores.gather(1, labels[:, None])[:, 0]
    worst = [i for i in lead.argsort(descending=True)[:20].tolist() if lead[i] > 0]
    names = [textwrap.shorten(name, 20, placeholder="...") for name in folder.classnames]
    tiles = [(folder.samples[i], f"predicted: {names[predicted[i]]}\ntrue: {names[labels[i]]}", "white")
             for i in worst]
    if tiles:  # a perfect score leaves nothing to draw
        draw_sheet(path, [("", tiles[first:first + 5]) for first in range(0, len(tiles), 5)])


# -----------------------------------------------------------------------------
# Table and main.


def table(results):
    """{name: metrics} as an aligned Markdown table, in percent; several classification folders get an average row.

    Retrieval columns are named image@1 and so on, short for CLIP_benchmark's image_retrieval_recall@1.
    """
    rows, classified = dict(results), [metrics for metrics in results.values() if "acc1" in metrics]
    if len(classified) > 1:
        rows["average"] = {name: sum(metrics[name] for metrics in classified) / len(classified)
                           for name in classified[0]}
    names = list(dict.fromkeys(name for metrics in rows.values() for name in metrics))
    cells = [["", *(name.replace("_retrieval_recall", "") for name in names)]]
    for row, metrics in rows.items():
        cells.append([row, *(f"{100 * metrics[name]:.2f}" if name in metrics else "" for name in names)])
    widths = [max(len(row[column]) for row in cells) for column in range(len(names) + 1)]
    first, *rest = ["| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |"
                    for row in cells]
    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([first, rule, *rest])


def run(options):
    """Loads the checkpoint, evaluates all that was asked for, prints the table."""
    if bool(options.sugarcrepe) != bool(options.images):
        raise ValueError("--sugarcrepe and --images go together: the json files, and COCO's val2017 images")
    model, tokenizer, config = load(options.checkpoint, options.vocab, options.quick_gelu)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    folders = list(options.data or (() if options.sugarcrepe else config.val))
    if not folders and not options.sugarcrepe:
        raise ValueError(f"{options.checkpoint}: was trained without --val; say what to evaluate on with --data DIR")
    for folder in folders:  # a slip in the last folder shows before the first one's hour of work
        read_folder(folder)
    if options.pictures:
        os.makedirs(options.pictures, exist_ok=True)

    results = {folder: evaluate(model, tokenizer, config, folder, workers=options.workers, probe=options.probe,
                                pictures=options.pictures) for folder in folders}
    if options.sugarcrepe:
        results |= sugarcrepe(model, tokenizer, config, options.sugarcrepe, options.images, options.workers)
    print(table(results))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description="Evaluates a CLIP checkpoint.")
    parser.add_argument("checkpoint", help="a file of clip_pgs.py, open_clip, OpenAI or the CLIP-PGS authors")
    parser.add_argument("--data", nargs="+", default=(), metavar="DIR",
                        help="folders in CLIP_benchmark's layout; without it those of --val in training")
    parser.add_argument("--probe", action="store_true", help="also a linear probe, of folders with labelled train/")
    parser.add_argument("--sugarcrepe", default="", metavar="DIR", help="folder of SugarCrepe's seven json files")
    parser.add_argument("--images", default="", metavar="DIR", help="COCO's val2017 images, for --sugarcrepe")
    parser.add_argument("--vocab", default="", help="CLIP's bpe_simple_vocab_16e6.txt.gz, for weights made elsewhere")
    parser.add_argument("--quick-gelu", action="store_true", help="for OpenAI's weights in a plain state dict")
    parser.add_argument("--json", default="", metavar="FILE", help="write the metrics, with CLIP_benchmark's names")
    parser.add_argument("--pictures", default="", metavar="DIR", help="write a PNG of what was found or mistaken")
    parser.add_argument("--workers", type=int, default=4, help="threads that read and decode images")
    try:
        run(parser.parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {data.message(error)}")


if __name__ == "__main__":
    main()
