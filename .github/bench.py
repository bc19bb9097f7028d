"""Measures this project; run it from the project's folder. The figures of the README come from here.

    python .github/bench.py step                  what a training step costs under each mask
    python .github/bench.py data SHARDS           images that a core reads, decodes and augments per second
    python .github/bench.py masks SHARDS          what each part of pgs changes, and how much masks vary
    python .github/bench.py open_clip step SHARD  a training step and open_clip's: speed in turns, losses
    python .github/bench.py open_clip data SHARD --vocab bpe_simple_vocab_16e6.txt.gz   the data pipelines

`open_clip` needs open_clip_torch[training]. Everything that is compared runs in turns in one process.
"""
import argparse
import copy
import json
import math
import os
import sys
import time
from collections import Counter, defaultdict
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, os.getcwd())
import clip_pgs
import data
import evaluate

# -----------------------------------------------------------------------------
# Tables and clocks.

def markdown(rows):
    """Prints a list of {column: cell} as a Markdown table."""
    lines = [list(rows[0]), ["---:"] * len(rows[0])]
    for row in rows:
        lines.append([str(cell) for cell in row.values()])
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("| " + " | ".join(map(str.rjust, line, widths)) + " |", flush=True)

def find_device():
    """A GPU if there is one, else the CPU. Switches cuDNN's attention off, as clip_pgs.py does."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

def timed(device, work):
    """(seconds, result) of work(), all of it done on the device."""
    synchronize = torch.get_device_module(device).synchronize  # of a CPU: does nothing
    synchronize()
    start = time.perf_counter()
    result = work()
    synchronize()
    return time.perf_counter() - start, result

def peak_memory(device):
    """GiB held at most since the last call: by a GPU's tensors, else by the process (Linux, else
    nan)."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak / 2 ** 30
    if not os.path.exists("/proc/self/clear_refs"):
        return math.nan
    with open("/proc/self/status") as file:
        peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))  # in kB
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the kernel forgets the highest point
    return peak / 2 ** 20

# -----------------------------------------------------------------------------
# step: what a training step costs under each mask.

# Training time relative to CLIP's, as the papers report it: Pei et al. 2025 for the masks, Yang et
# al. 2023 for two views.
PAPERS = {
    "none": 1.0,
    "random 0.5": 0.5,
    "cluster 0.5": 0.6,
    "pgs 0.5": 0.5,
    "pgs 0.3 0.5": 0.6,
    "A-CLIP": 1.16,
    "A-CLIP, EMA at half size": 0.86}
A_CLIP = dict(mask="attentive", views=2, contrast=("simclr", "byol"))
ROWS = {  # what differs from Config's defaults
    "none": dict(mask="none"),
    **{f"{mask} 0.5": dict(mask=mask) for mask in clip_pgs.MASKS[1:]},
    "pgs 0.3 0.5": dict(ratio=(0.3, 0.5)),
    "pgs 0.5, 8 text tokens": dict(text_tokens=8),
    "attentive 0.5, EMA at half size": dict(mask="attentive", ema_size=112),
    "pgs 0.5, two views": dict(views=2),
    "A-CLIP": A_CLIP,
    "A-CLIP, EMA at half size": A_CLIP | dict(ema_size=112)}
PROGRESS = 0.5  # of the run: pixels and embeddings count alike
PEAK_TFLOPS = {"A100": 312, "H100": 989, "H200": 989, "B200": 2250}  # dense bf16, from NVIDIA's data sheets

class Setting(NamedTuple):
    """What the training step of a row is called with."""
    config: clip_pgs.Config
    clip: clip_pgs.CLIP
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    batch: data.Batch     # on the CPU
    noise: Any            # on the device, or None
    ema: Any
    heads: Any

def made_up_batch(config):
    """A Batch on the CPU: noise of two scales, so that a range of ratios can decide, and captions
    as long as CC12M's, 25 tokens on average, or text_tokens at most."""
    B = config.batch_size
    size = config.image_size
    T = config.context_length
    end = config.vocab_size - 1
    blobs = F.interpolate(torch.rand(B, 3, 28, 28), (size, size), mode="bicubic")
    grain = torch.rand(B, 3, size, size)
    images = (255 * (blobs + 0.3 * grain)).clamp(0, 255).byte()
    lengths = torch.randint(6, 45, (B, 1)).clamp(max=T)
    if config.text_tokens:
        lengths = lengths.clamp(max=config.text_tokens + 2)
    place = torch.arange(T)
    tokens = torch.randint(1, end, (B, T))
    tokens = tokens.where(place < lengths, 0)
    tokens = tokens.where(place != lengths - 1, end)
    decoded = torch.ones(B, dtype=torch.bool)
    boxes = None
    if config.views == 2:
        images = images[:, None].repeat(1, 3, 1, 1, 1)                   # (B, 3, 3, H, W)
        boxes = torch.tensor([[0, 0, 0.9, 0.8], [0.1, 0.2, 1, 1]])
        boxes = boxes.repeat(B, 1, 1)                                    # (B, 2, 4)
    if torch.cuda.is_available():
        images = images.pin_memory()
        tokens = tokens.pin_memory()
        decoded = decoded.pin_memory()
        boxes = boxes if boxes is None else boxes.pin_memory()
    return data.Batch(images, tokens, decoded, boxes, lost=[], fault="")

def make_settings(base, names, device):
    """{name: Setting} of the rows `names`. They share one model, teacher, heads and optimizer: at
    learning rate 0 these stay as they are. A teacher and heads are made if a row needs them."""
    clip, *_ = clip_pgs.build(base, {}, device)
    configs = {name: replace(base, **ROWS[name]) for name in names}
    teacher = None
    if any(config.mask == "attentive" for config in configs.values()):
        teacher = copy.deepcopy(clip.visual)
    contrast = max((config.contrast for config in configs.values()), key=len)
    all_heads = clip_pgs.Heads(replace(base, contrast=contrast)).to(device)
    optimizer = clip_pgs.make_optimizer(base, clip, all_heads)  # AdamW skips heads whose gradient is None
    settings = {}
    for name, config in configs.items():
        torch.manual_seed(0)
        batch = made_up_batch(config)
        model = clip_pgs.TwoViews(clip) if config.views == 2 else clip
        ema = teacher if config.mask == "attentive" or config.contrast else None
        heads = all_heads if config.contrast else None
        noise = None
        if config.mask != "none":
            noise = clip_pgs.step_noise(config, 0, config.batch_size * config.views, device)
        settings[name] = Setting(config, clip, model, optimizer, batch, noise, ema, heads)
    return settings

def run_step(setting):
    """The numbers of a training step."""
    config, clip, model, optimizer, batch, noise, ema, heads = setting
    if config.views == 2:
        numbers, _, _ = clip_pgs.two_view_step(config, clip, model, optimizer, batch, noise, PROGRESS,
                                               ema, heads)
    else:
        numbers, _, _ = clip_pgs.train_step(config, clip, model, optimizer, batch, noise, PROGRESS, ema)
    return numbers

def pixels_of(setting, device):
    """What a step has on the device: images (B, 3, H, W), None; or views (2B, 3, H, W) and the pictures
    around them (B, 3, H, W)."""
    images = data.normalize(setting.batch.images.to(device))
    if setting.config.views == 1:
        return images, None
    return images[:, :2].flatten(0, 1), images[:, 2]

def choose(setting, images, wholes):
    """keep, valid for all views: the part of a step that chooses patches, and nothing else."""
    config, clip, _, _, batch, noise, ema, _ = setting
    with clip_pgs.autocast(config, images.device):
        if config.views == 1:
            return clip_pgs.choose_patches(config, clip.visual, ema, images, noise, PROGRESS)
        boxes = batch.boxes.to(images.device).flatten(0, 1)
        keep, valid, _ = clip_pgs.choose_patches_of_views(config, clip.visual, ema, images, wholes, boxes,
                                                          noise, PROGRESS)
        return keep, valid

def count_flops(setting, device):
    """Floating-point operations of a step's towers; the backward pass costs about two forward
    passes."""
    images, wholes = pixels_of(setting, device)
    keep, valid = choose(setting, images, wholes)
    counter = FlopCounterMode(display=False)
    eager = torch.compiler.set_stance("force_eager")
    with counter, eager, torch.no_grad(), clip_pgs.autocast(setting.config, device):
        setting.model(images, setting.batch.tokens, keep, valid)
    return 3 * counter.get_total_flops()

def bench_step(options):
    """Prints a row per setting: images/s, time against `none`, the mask's share, memory; on a GPU
    FLOP/s and MFU, their share of the card's; with --compile the first step, which compiles."""
    device = find_device()
    on_gpu = device.type == "cuda"
    base = clip_pgs.Config(model=options.model, image_size=options.image_size, patch_size=options.patch_size,
                           lr=0.0, batch_size=options.batch_size or (512 if on_gpu else 16),
                           compile=options.compile,
                           precision=options.precision or ("bf16" if on_gpu else "fp32"))
    names = [name for name in ROWS if not options.rows or name in options.rows or name == "none"]
    settings = make_settings(base, names, device)
    rounds = options.rounds or (20 if on_gpu else 3)
    warmup = 3 if on_gpu else 1
    seconds = {name: [] for name in names}
    first = {}
    memory = {}
    kept = {}
    flops = {}
    turns = [(number, name) for number in range(-warmup, rounds) for name in names]
    for number, name in tqdm(turns, "bench", unit=" steps", leave=False):
        setting = settings[name]
        peak_memory(device)
        step, numbers = timed(device, lambda: run_step(setting))
        first.setdefault(name, step)
        memory[name] = peak_memory(device)
        kept[name] = float(numbers["kept"])
        images, wholes = pixels_of(setting, device)
        in_mask, _ = timed(device, lambda: choose(setting, images, wholes))
        del images, wholes  # before the next step's memory is measured
        if number == -warmup and on_gpu:  # the counter does not know a CPU's attention
            flops[name] = count_flops(setting, device)
        if number >= 0:
            seconds[name].append((step, in_mask))
    card = torch.cuda.get_device_name() if on_gpu else f"CPU with {torch.get_num_threads()} threads"
    print(f"{base.model} at {base.image_size}, {base.batch_size} images, {base.precision}, {rounds} rounds"
          f"{', compiled' if base.compile else ''}, PyTorch {torch.__version__}, {card}")
    peak = next((peak for gpu, peak in PEAK_TFLOPS.items() if gpu in card), math.nan)
    none, _ = np.median(seconds["none"], axis=0)
    table = []
    for name in names:
        step, in_mask = np.median(seconds[name], axis=0)
        cells = {"mask": name, "kept": f"{kept[name]:.2f}", "images/s": f"{base.batch_size / step:.1f}",
                 "time": f"{step / none:.2f}", "papers": PAPERS.get(name, ""),
                 "in mask": f"{in_mask / step:.1%}", "GiB": f"{memory[name]:.1f}"}
        if base.compile:
            cells["first step, s"] = f"{first[name]:.0f}"
        if on_gpu:
            tflops = flops[name] / step / 1e12
            cells["TFLOP/s"] = f"{tflops:.0f}"
            cells["MFU"] = f"{tflops / peak:.1%}"
        table.append(cells)
    markdown(table)

# -----------------------------------------------------------------------------
# data: how many images one core prepares.

def time_stages(shard, row, size, tokenizer, rng):
    """Counter of the seconds that each stage takes for one sample."""
    start = time.perf_counter()
    raw = data.read_bytes(shard, row["image"], row["image_size"])
    caption = data.read_captions(shard, row)[0]
    read = time.perf_counter()
    with data.open_image(raw) as image:
        image.load()
    decoded = time.perf_counter()
    box = data.random_box(*image.size, (0.9, 1.0), rng)
    data.crops(image, box[None], size)
    augmented = time.perf_counter()
    tokenizer.encode([caption])
    tokenised = time.perf_counter()
    return Counter({"read": read - start, "decode": decoded - read, "augment": augmented - decoded,
                    "tokenise": tokenised - augmented})

def bench_data(options):
    """Prints how many images one core reads, decodes, augments and tokenises a second."""
    torch.set_num_threads(1)
    shards = data.expand(options.shards)
    index, _ = data.build_index(shards)
    rows = index[::max(1, math.ceil(len(index) / 512))]
    merges = data.learn_merges(data.sample_captions(shards, index), 49408 - 514)
    num_merges = len(merges.splitlines())
    print(f"{len(rows)} samples, {num_merges} merges, crops of {options.image_size} pixels")
    config = clip_pgs.Config(image_size=options.image_size)
    order = np.arange(len(rows))[None]
    rng = np.random.default_rng(0)
    seconds = defaultdict(list)
    for number in range(4):  # the first pass may meet a cold disk
        tokenizer = data.Tokenizer(merges)  # one that has no word in its cache
        spent = Counter()
        for row in rows:
            spent += time_stages(shards[row["shard"]], row, options.image_size, tokenizer, rng)
        batches = data.Batches(config, shards, rows, order, data.Tokenizer(merges), epoch=0)
        start = time.perf_counter()
        batches[0]
        spent["together"] = time.perf_counter() - start
        if number == 0:
            continue
        for stage, time_spent in spent.items():
            seconds[stage].append(time_spent)
    table = []
    for stage, times in seconds.items():
        each = np.median(times) / len(rows)
        table.append({"stage": stage, "images/s per core": f"{1 / each:.0f}",
                      "ms per image": f"{1000 * each:.3f}"})
    markdown(table)

# -----------------------------------------------------------------------------
# masks: what each part of a mask changes.

DRAWS = 6  # masks of an image, to see how much they vary

def bench_masks(options):
    """Prints what the parts of each mask change on photographs of the shards, and how much a mask
    varies. --json FILE keeps {number of patches: {mask: share of the removed patches that differ
    between two draws}} for study.py's table."""
    shards = data.expand(options.shards)
    P = options.patch_size
    config = clip_pgs.Config(image_size=options.image_size, patch_size=P)
    index, _ = data.build_index(shards)
    index = index[::max(1, len(index) // options.images)][:options.images]
    pictures = []
    for row in index:
        sample = evaluate.Sample(shards[row["shard"]], row["image"], row["image_size"])
        pictures.append(evaluate.read_image(sample, options.image_size))
    images = data.normalize(torch.stack(pictures))                       # (B, 3, H, W)
    B = len(images)
    torch.manual_seed(0)
    visual = clip_pgs.CLIP(config).visual
    edges = clip_pgs.sobel_edges(images, P)                              # (B, L)
    L = edges.shape[1]
    generator = torch.Generator().manual_seed(0)
    noises = torch.rand(DRAWS, B, 2, L, generator=generator)
    with torch.no_grad():
        embeddings = visual.patch_tokens(images)
        attention, _ = clip_pgs.class_attention(visual, images)

    def removed(mask, noise, **changes):
        given = dict(patch_size=P, attention=attention) | changes
        keep, _ = clip_pgs.make_mask(mask, images, (0.5,), noise=noise, **given)
        return torch.ones(B, L).scatter(1, keep, 0.0)

    mixed = dict(alpha=0.5, embeddings=embeddings)
    rows = {mask: (mask, {}, None) for mask in clip_pgs.MASKS[1:]}  # mask, what it is given, against what
    rows["pgs --no-edges"] = ("pgs", dict(edges=False), {})
    rows["pgs --no-transport"] = ("pgs", dict(transport=False), {})
    rows["pgs, alpha 0.5"] = ("pgs", mixed, None)
    rows["pgs --no-embeddings, alpha 0.5"] = ("pgs", {}, mixed)
    rows["cluster --no-embeddings, alpha 0.5"] = ("cluster", {}, mixed)
    table = []
    shares = {}
    for name, (mask, changes, against) in rows.items():
        draws = torch.stack([removed(mask, noise, **changes) for noise in noises])   # (DRAWS, B, L)
        changed = ""
        if against is not None:
            other = removed(mask, noises[0], **against)
            changed = f"{(draws[0] * (1 - other)).sum(1).mean():.1f}"
        differ = (draws[0] * (1 - draws[1])).sum(1).mean().item()
        same_fate = (draws == draws[0]).all(0).double().mean()
        edges_kept = ((1 - draws[0]) * edges).sum(1).div(edges.sum(1)).mean()
        shares[name] = round(differ / draws[0].sum(1).mean().item(), 3)
        table.append({"mask": name, "patches changed": changed, "differ between two draws": f"{differ:.1f}",
                      f"same fate in {DRAWS} draws": f"{same_fate:.0%}", "edges kept": f"{edges_kept:.2f}"})
    print(f"{B} photographs, {round(0.5 * L)} of {L} patches removed, ViT-B-16 with random weights")
    markdown(table)
    candidates = clip_pgs.pgs_candidates(edges, noises[0][:, 0])
    score = clip_pgs.pgs_score(clip_pgs.patch_similarity(images, P), candidates)
    similar = (score > clip_pgs.SIMILAR).double().mean(1)                # (B,)
    low, high = similar.quantile(torch.tensor([0.1, 0.9], dtype=torch.float64))
    _, valid = clip_pgs.make_mask("pgs", images, (0.3, 0.5), noise=noises[0], patch_size=P)
    removed_share = 1 - valid.sum(1).div(L).mean()
    print(f"similar to a candidate of pgs: {similar.mean():.2f} of the patches; 10 % of the images below "
          f"{low:.2f}, 10 % above {high:.2f}; --ratio 0.3 0.5 removes {removed_share:.3f}")
    if options.json:
        known = {}
        if os.path.exists(options.json):
            with open(options.json) as file:
                known = json.load(file)
        with open(options.json, "w") as file:
            json.dump(known | {str(L): shares}, file, indent=1)

# -----------------------------------------------------------------------------
# open_clip: the same work by the library that most people train CLIP with.

LR = 5e-4  # open_clip's, for both

def in_turns(contestants, rounds):
    """{name: median seconds} of functions called one after the other, again and again. They wait
    for the GPU themselves, by loss.item()."""
    seconds = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, work in contestants.items():
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    return {name: np.median(times[1:]) for name, times in seconds.items()}  # the first round is warm-up

def their_step(device, precision, patch_dropout, weights=None):
    """A function that makes a training step of images and tokens as open_clip's main program does,
    and returns the loss. It starts from weights, if there are any."""
    import open_clip
    model = open_clip.create_model("ViT-B-16", device=device, force_patch_dropout=patch_dropout)
    if weights:
        model.load_state_dict(weights)
    decayed = []
    others = []
    for name, p in model.named_parameters():
        if p.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale")):
            others.append(p)
        else:
            decayed.append(p)
    groups = [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.2}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.98), eps=1e-6)
    loss_of = open_clip.ClipLoss()

    def step(images, tokens):
        images = images.to(device, non_blocking=True)
        tokens = tokens.to(device, non_blocking=True)
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(*model(images, tokens))
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        return loss.item()
    return step

def our_step(device, precision, mask):
    """(function, clip): the same with this project's training step, mask included, of pixels as
    bytes; and the model, which starts from new weights."""
    config = clip_pgs.Config(mask=mask, lr=LR, precision=precision)
    clip, model, optimizer, ema, _ = clip_pgs.build(config, {}, device)

    def step(pixels, tokens):
        B = len(tokens)
        noise = None if mask == "none" else torch.rand(B, 2, 196, device=device)
        decoded = torch.ones(B, dtype=torch.bool)
        batch = data.Batch(pixels, tokens, decoded, boxes=None, lost=[], fault="")
        numbers, _, _ = clip_pgs.train_step(config, clip, model, optimizer, batch, noise, PROGRESS, ema)
        return numbers["loss"].item()
    return step, clip

def compare_losses(device, captions, batch_size=8, steps=6):
    """Prints how far our losses and open_clip's are apart, from the same weights on the same
    batches, in float32."""
    import open_clip
    tokenizer = open_clip.get_tokenizer("ViT-B-16")
    ours, clip = our_step(device, "fp32", "none")
    theirs = their_step(device, "fp32", 0.0, clip.state_dict())
    losses = []
    differences = []
    for number in range(steps):
        at = [(number * batch_size + i) % len(captions) for i in range(batch_size)]
        tokens = tokenizer([captions[i] for i in at])
        pixels = torch.randint(0, 256, (batch_size, 3, 224, 224), dtype=torch.uint8)
        losses.append(ours(pixels, tokens))
        differences.append(abs(losses[-1] - theirs(data.normalize(pixels), tokens)))
    print(f"{steps} steps of {batch_size} images from the same weights: losses {min(losses):.3f} to "
          f"{max(losses):.3f}, they differ from open_clip's by {max(differences):.1e} at most")

def compare_steps(options):
    """Prints how far our losses and open_clip's are apart; then our images/s, open_clip's and their
    ratio for a training step of ViT-B/16 on random pixels and real captions: in bf16 on a GPU."""
    import open_clip
    device = find_device()
    on_gpu = device.type == "cuda"
    precision = "bf16" if on_gpu else "fp32"
    # Neither of the two has its own settings here: open_clip would use cuDNN's attention and TF32,
    # we would not search for the fastest convolution.
    torch.backends.cudnn.benchmark = True
    index, _ = data.build_index([options.shard])
    captions = [data.read_captions(options.shard, row)[0] for row in index]
    B = options.batch_size or (512 if on_gpu else 16)
    captions = captions * math.ceil(B / len(captions))  # a shard may hold fewer than a batch
    tokens = open_clip.get_tokenizer("ViT-B-16")(captions[:B])
    pixels = torch.randint(0, 256, (B, 3, 224, 224), dtype=torch.uint8)
    images = data.normalize(pixels)
    if on_gpu:  # as our loader does; open_clip's loader of shards does not
        tokens, pixels, images = tokens.pin_memory(), pixels.pin_memory(), images.pin_memory()
    compare_losses(device, captions)
    contestants = {}
    against = {"none": "open_clip", "random": "open_clip, patch dropout 0.5",
               "pgs": "open_clip, patch dropout 0.5"}
    for name, patch_dropout in (("open_clip", 0.0), ("open_clip, patch dropout 0.5", 0.5)):
        contestants[name] = partial(their_step(device, precision, patch_dropout), images, tokens)
    for mask in against:
        step, _ = our_step(device, precision, mask)
        contestants[mask] = partial(step, pixels, tokens)
    seconds = in_turns(contestants, options.rounds or (20 if on_gpu else 5))
    for mask, name in against.items():
        print(f"{mask}: {B / seconds[mask]:.2f} images/s, {name}: {B / seconds[name]:.2f} images/s, "
              f"{seconds[name] / seconds[mask]:.2f} x")

def compare_data(options):
    """Prints our images/s, open_clip's and their ratio for the data pipeline, in one thread."""
    import logging

    import open_clip
    from open_clip_train.data import get_wds_dataset
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    index, _ = data.build_index([options.shard])
    B = options.batch_size or 16
    order = data.epoch_order(index, 0, 0)
    order = order[:len(index) // B * B].reshape(-1, B)
    tokenizer = data.Tokenizer.from_file(options.vocab)
    ours = data.Batches(clip_pgs.Config(), [options.shard], index, order, tokenizer, epoch=0)
    given = SimpleNamespace(train_data=options.shard, train_num_samples=order.size,
                            train_data_upsampling_factors=None, seed=0, workers=0, world_size=1, batch_size=B)
    transform = open_clip.image_transform(224, is_train=True, aug_cfg={"scale": (0.9, 1.0)})
    theirs = get_wds_dataset(given, transform, is_train=True, tokenizer=open_clip.get_tokenizer("ViT-B-16"))

    def read_ours():
        for number in range(len(order)):
            ours[number]

    def read_theirs():
        for _ in theirs.dataloader:
            pass

    seconds = in_turns({"open_clip": read_theirs, "ours": read_ours}, options.rounds or 5)
    print(f"{order.size} images, one thread: ours {order.size / seconds['ours']:.0f} images/s, open_clip "
          f"{order.size / seconds['open_clip']:.0f} images/s, {seconds['open_clip'] / seconds['ours']:.2f} x")

def bench_open_clip(options):
    """Compares a training step or the data pipeline with open_clip's."""
    if options.what == "step":
        compare_steps(options)
    else:
        compare_data(options)

# -----------------------------------------------------------------------------
# The commands.

def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("step")
    step.add_argument("--model", default="ViT-B-16")
    step.add_argument("--image-size", type=int, default=224)
    step.add_argument("--patch-size", type=int, default=16)
    step.add_argument("--precision", default="")
    step.add_argument("--rows", nargs="+", default=(), help=f"some of: {', '.join(ROWS)}; beside none")
    step.add_argument("--compile", action="store_true")
    timing = commands.add_parser("data")
    timing.add_argument("shards", nargs="+")
    timing.add_argument("--image-size", type=int, default=224)
    masks = commands.add_parser("masks")
    masks.add_argument("shards", nargs="+")
    masks.add_argument("--images", type=int, default=128)
    masks.add_argument("--image-size", type=int, default=224)
    masks.add_argument("--patch-size", type=int, default=16)
    masks.add_argument("--json", default="")
    against = commands.add_parser("open_clip")
    against.add_argument("what", choices=("step", "data"))
    against.add_argument("shard")
    against.add_argument("--vocab")
    for command in (step, against):
        command.add_argument("--batch-size", type=int, default=0)
        command.add_argument("--rounds", type=int, default=0)
    step.set_defaults(bench=bench_step)
    timing.set_defaults(bench=bench_data)
    masks.set_defaults(bench=bench_masks)
    against.set_defaults(bench=bench_open_clip)
    options = parser.parse_args()
    options.bench(options)

if __name__ == "__main__":
    main()
