"""Measures this project; run it from the project's folder. The figures of the README come from here.

    python .github/bench.py step                  what a training step costs under each mask
    python .github/bench.py data SHARDS           images that a core reads, decodes and augments per second
    python .github/bench.py masks SHARDS          what each part of pgs changes, and how much masks vary
    python .github/bench.py open_clip step SHARD  a training step and open_clip's, in turns
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
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, os.getcwd())
import clip_pgs
import data
import evaluate

# Training time relative to CLIP's, as the papers report it: Pei et al. 2025 for the masks, Yang et al. 2023
# for two views.
PAPERS = {"none": 1.0, "random 0.5": 0.5, "cluster 0.5": 0.6, "pgs 0.5": 0.5, "pgs 0.3 0.5": 0.6,
          "A-CLIP": 1.16, "A-CLIP, EMA at half size": 0.86}
ROWS = {"none": dict(mask="none"), **{f"{mask} 0.5": dict(mask=mask) for mask in clip_pgs.MASKS[1:]},
        "pgs 0.3 0.5": dict(ratio=(0.3, 0.5)), "pgs 0.5, 8 text tokens": dict(text_tokens=8),
        "attentive 0.5, EMA at half size": dict(mask="attentive", ema_size=112),
        "pgs 0.5, two views": dict(views=2),
        "A-CLIP": dict(mask="attentive", views=2, contrast=("simclr", "byol"))}
ROWS["A-CLIP, EMA at half size"] = ROWS["A-CLIP"] | dict(ema_size=112)
DRAWS = 6  # masks of an image, to see how much they vary
PEAK_TFLOPS = {"A100": 312, "H100": 989, "H200": 989, "B200": 2250}  # dense bf16, from NVIDIA's data sheets

def markdown(rows):
    """Prints a list of {column: cell} as a Markdown table."""
    lines = [[*rows[0]], ["---:"] * len(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(rows[0]))]
    for line in lines:
        print("| " + " | ".join(map(str.rjust, line, widths)) + " |", flush=True)

def timed(device, work):
    """(seconds, result) of work(), all of it done on the device."""
    synchronize = torch.get_device_module(device).synchronize  # of a CPU: does nothing
    synchronize()
    start = time.perf_counter()
    result = work()
    synchronize()
    return time.perf_counter() - start, result

def peak_memory(device):
    """GiB held at most since the last call: by a GPU's tensors, else by the process (Linux, else nan)."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak / 2 ** 30
    if not os.path.exists("/proc/self/clear_refs"):
        return math.nan
    with open("/proc/self/status") as status, open("/proc/self/clear_refs", "w") as control:
        control.write("5")  # the kernel forgets the highest point when the file is closed, after the return
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 2 ** 20  # from kB

def made_up_batch(config):
    """(images, boxes, tokens, decoded) on the CPU: noise of two scales, so that a range of ratios can decide,
    and captions as long as CC12M's, 25 tokens on average, or text_tokens at most."""
    B, size, end = config.batch_size * config.accum, config.image_size, config.vocab_size - 1
    blobs = F.interpolate(torch.rand(B, 3, 28, 28), (size, size), mode="bicubic")
    images = (255 * (blobs + 0.3 * torch.rand(B, 3, size, size))).clamp(0, 255).byte()
    images = images.repeat(config.views + (config.views > 1), 1, 1, 1, 1)
    lengths = torch.randint(6, 45, (B, 1)).clamp(max=config.context_length)
    if config.text_tokens:
        lengths = lengths.clamp(max=config.text_tokens + 2)
    place, tokens = torch.arange(config.context_length), torch.randint(1, end, (B, config.context_length))
    tokens = tokens.where(place < lengths - 1, 0).where(place != lengths - 1, end)
    boxes = torch.tensor([[0, 0, 0.9, 0.8], [0.1, 0.2, 1, 1]])[:config.views, None].repeat(1, B, 1)
    batch = images, boxes, tokens, torch.ones(B, dtype=torch.bool)
    return tuple(x.pin_memory() for x in batch) if torch.cuda.is_available() else batch

def bench_step(options):
    """Prints a row per setting: images/s, time against `none`, the mask's share, memory, on a GPU FLOP/s."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    base = clip_pgs.Config(model=options.model, image_size=options.image_size, patch_size=options.patch_size,
                           lr=0.0, batch_size=options.batch_size or (512 if on_gpu else 16),
                           compile=options.compile, grad_checkpointing=options.grad_checkpointing,
                           precision=options.precision or ("bf16" if on_gpu else "fp32"))
    chosen = {name: replace(base, **changes) for name, changes in ROWS.items()
              if not options.rows or name in options.rows or name == "none"}
    clip, model, *_ = clip_pgs.build(base, {}, device)  # for all rows: at learning rate 0 it stays
    teacher = copy.deepcopy(clip.visual)
    all_heads = clip_pgs.Heads(replace(base, contrast=("simclr", "byol"))).to(device)
    of_clip, of_both = clip_pgs.make_optimizer(base, clip), clip_pgs.make_optimizer(base, clip, all_heads)
    seconds, memory, kept, flops, batches = {name: [] for name in chosen}, {}, {}, {}, {}
    for name, config in chosen.items():
        torch.manual_seed(0)
        batches[name] = made_up_batch(config)
    rounds, warmup, alpha = options.rounds or (20 if on_gpu else 3), 3 if on_gpu else 1, 0.5
    turns = [(number, name) for number in range(-warmup, rounds) for name in chosen]
    for number, name in tqdm(turns, "bench", unit=" steps", leave=False):
        config, (images, boxes, tokens, decoded) = chosen[name], batches[name]
        ema = teacher if config.mask == "attentive" or config.contrast else None
        heads, optimizer = (all_heads, of_both) if config.contrast else (None, of_clip)
        noise = None if config.mask == "none" else clip_pgs.step_noise(config, 0, images.shape[1], device)
        peak_memory(device)
        step, (numbers, keep, valid) = timed(device, lambda: clip_pgs.train_step(
            config, model, optimizer, ema, heads, images, boxes, tokens, decoded, noise, alpha))
        memory[name], kept[name] = peak_memory(device), float(numbers["kept"])
        there, there_boxes = images.to(device), boxes.to(device)

        def mask():
            attention = clip_pgs.teach(config, ema, there, there_boxes)[0] if ema else None
            if noise is not None:
                clip_pgs.batch_masks(config, clip.visual, attention, there[:config.views], noise, alpha)

        in_mask, _ = timed(device, mask)
        if number == -warmup and on_gpu:  # the counter does not know a CPU's attention
            with (FlopCounterMode(display=False) as counter, torch.no_grad(),
                  clip_pgs.autocast(config, device), torch.compiler.set_stance("force_eager")):
                clip(data.normalize(there[:config.views].flatten(0, 1)), tokens,
                     *(x if x is None else x.flatten(0, 1) for x in (keep, valid)))
            flops[name] = 3 * counter.get_total_flops()  # the backward pass costs about two forward passes
        if number >= 0:
            seconds[name].append((step, in_mask))
    card = torch.cuda.get_device_name() if on_gpu else f"CPU with {torch.get_num_threads()} threads"
    print(f"{base.model} at {base.image_size}, {base.batch_size} images, {base.precision}, {rounds} rounds"
          f"{', compiled' * base.compile}{', checkpointing' * base.grad_checkpointing}, "
          f"PyTorch {torch.__version__}, {card}")
    table, none = [], np.median(seconds["none"], axis=0)[0]
    for name in chosen:
        step, in_mask = np.median(seconds[name], axis=0)
        cells = {"mask": name, "kept": f"{kept[name]:.2f}", "images/s": f"{base.batch_size / step:.1f}",
                 "time": f"{step / none:.2f}", "papers": PAPERS.get(name, ""),
                 "in mask": f"{in_mask / step:.1%}", "GiB": f"{memory[name]:.1f}"}
        if on_gpu:
            peak = next((peak for gpu, peak in PEAK_TFLOPS.items() if gpu in card), math.nan)
            tflops = flops[name] / step / 1e12
            cells |= {"TFLOP/s": f"{tflops:.0f}", "MFU": f"{tflops / peak:.1%}"}
        table.append(cells)
    markdown(table)

def bench_data(options):
    """Prints how many images one core reads, decodes, augments and tokenises a second."""
    torch.set_num_threads(1)
    shards = data.expand(options.shards)
    index, _ = data.build_index(shards)
    rows = index[::max(1, math.ceil(len(index) / 512))]
    merges = data.learn_merges(data.sample_captions(shards, index), 49408 - 514)
    print(f"{len(rows)} samples, {merges.count(chr(10)) + 1} merges, crops of {options.image_size} pixels")
    order, rng, seconds = np.arange(len(rows))[None], np.random.default_rng(0), defaultdict(list)
    for number in range(4):  # the first pass may meet a cold disk
        tokenizer, spent = data.Tokenizer(merges), Counter()  # one that has no word in its cache
        for row in rows:
            start = time.perf_counter()
            shard = shards[row["shard"]]
            raw = data.read_bytes(shard, row["image"], row["image_size"])
            caption = data.read_captions(shard, row)[0]
            read = time.perf_counter()
            with data.open_image(raw) as image:
                image.load()
            decoded = time.perf_counter()
            data.crops(image, data.random_box(*image.size, (0.9, 1.0), rng)[None], options.image_size)
            augmented = time.perf_counter()
            tokenizer.encode([caption])
            spent += Counter(read=read - start, decode=decoded - read, augment=augmented - decoded,
                             tokenise=time.perf_counter() - augmented)
        start = time.perf_counter()
        config = clip_pgs.Config(image_size=options.image_size)
        data.Batches(config, shards, rows, order, data.Tokenizer(merges), epoch=0)[0]
        for stage, time_spent in (spent | {"together": time.perf_counter() - start}).items():
            seconds[stage] += [time_spent] if number else []
    each = {stage: np.median(times) / len(rows) for stage, times in seconds.items()}
    markdown([{"stage": stage, "images/s per core": f"{1 / mean:.0f}", "ms per image": f"{1000 * mean:.3f}"}
              for stage, mean in each.items()])

def bench_masks(options):
    """Prints what the parts of each mask change on photographs of the shards, and how much a mask varies.
    --json FILE keeps {number of patches: {mask: share of the removed patches that differ between two draws}}
    for study.py's table."""
    shards = data.expand(options.shards)
    config = clip_pgs.Config(image_size=options.image_size, patch_size=options.patch_size)
    index, _ = data.build_index(shards)
    index = index[::max(1, len(index) // options.images)][:options.images]
    samples = [evaluate.Sample(shards[row["shard"]], row["image"], row["image_size"]) for row in index]
    pictures = [evaluate.read_image(sample, options.image_size) for sample in samples]
    images = data.normalize(torch.stack(pictures))
    torch.manual_seed(0)
    visual = clip_pgs.CLIP(config).visual
    edges = clip_pgs.sobel_edges(images, options.patch_size)
    L = edges.shape[1]
    noises = torch.rand(DRAWS, len(images), 2, L, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        embeddings = visual.patch_tokens(images)
        attention = clip_pgs.class_attention(visual, images)[0]

    def removed(mask, noise, **changes):
        given = dict(patch_size=options.patch_size, attention=attention) | changes
        keep, _ = clip_pgs.make_mask(mask, images, (0.5,), noise=noise, **given)
        return torch.ones(len(images), L).scatter(1, keep, 0.0)

    mixed = dict(alpha=0.5, embeddings=embeddings)
    rows = {mask: (mask, {}, None) for mask in clip_pgs.MASKS[1:]}
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
    print(f"{len(images)} photographs, {round(0.5 * L)} of {L} patches removed, ViT-B-16 with random weights")
    markdown(table)
    scores = []
    original = clip_pgs.pgs_score
    clip_pgs.pgs_score = lambda *given: scores.append(original(*given)) or scores[-1]
    keep, valid = clip_pgs.make_mask("pgs", images, (0.3, 0.5), noise=noises[0], patch_size=options.patch_size)
    clip_pgs.pgs_score = original
    similar = (scores[0] > clip_pgs.SIMILAR).double().mean(1)
    low, high = similar.quantile(torch.tensor([0.1, 0.9], dtype=torch.float64))
    print(f"similar to a candidate of pgs: {similar.mean():.2f} of the patches; 10 % of the images below "
          f"{low:.2f}, 10 % above {high:.2f}; --ratio 0.3 0.5 removes {1 - valid.sum(1).div(L).mean():.3f}")
    if options.json:
        known = {}
        if os.path.exists(options.json):
            with open(options.json) as file:
                known = json.load(file)
        with open(options.json, "w") as file:
            json.dump(known | {str(L): shares}, file, indent=1)

def in_turns(contestants, rounds):
    """{name: median seconds} of functions called one after the other, again and again."""
    seconds = {name: [] for name in contestants}
    for number in range(rounds + 1):  # the first round is warm-up
        for name, work in contestants.items():
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    return {name: np.median(times[1:]) for name, times in seconds.items()}

def their_step(patch_dropout, images, tokens):
    """A function that makes one training step as open_clip's main program does."""
    import open_clip
    model = open_clip.create_model("ViT-B-16", force_patch_dropout=patch_dropout)
    exclude = [p for name, p in model.named_parameters()
               if p.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))]
    known = {id(p) for p in exclude}
    rest = [p for p in model.parameters() if id(p) not in known]
    groups = [{"params": exclude, "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.2}]
    optimizer = torch.optim.AdamW(groups, lr=5e-4, betas=(0.9, 0.98), eps=1e-6)
    loss = open_clip.ClipLoss()

    def step():
        optimizer.zero_grad()
        loss(*model(images, tokens)).backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)
    return step

def our_step(mask, pixels, tokens):
    """The same with this project's training step, mask included."""
    config = clip_pgs.Config(mask=mask, batch_size=len(tokens))
    clip, model, optimizer, ema, heads = clip_pgs.build(config, {}, torch.device("cpu"))
    noise, boxes = None if mask == "none" else torch.rand(1, len(tokens), 2, 196), torch.zeros(1, len(tokens), 4)
    decoded = torch.ones(len(tokens), dtype=torch.bool)
    return lambda: clip_pgs.train_step(config, model, optimizer, ema, heads, pixels[None], boxes, tokens,
                                       decoded, noise, 0.5)

def bench_open_clip(options):
    """Prints our images/s, open_clip's and their ratio, for a training step or for the data pipeline."""
    import logging

    import open_clip
    from open_clip_train.data import get_wds_dataset
    index, _ = data.build_index([options.shard])
    B = options.batch_size or 16
    if options.what == "step":  # ViT-B/16 in float32, random pixels and real captions
        captions = [data.read_captions(options.shard, row)[0] for row in index[:B]]
        tokens = open_clip.get_tokenizer("ViT-B-16")(captions)
        pixels = torch.randint(0, 256, (B, 3, 224, 224), dtype=torch.uint8)
        images = data.normalize(pixels)
        ours = {mask: our_step(mask, pixels, tokens) for mask in ("none", "random", "pgs")}
        theirs = {"open_clip": their_step(0.0, images, tokens),
                  "open_clip, patch dropout 0.5": their_step(0.5, images, tokens)}
        seconds = in_turns(theirs | ours, options.rounds or 5)
        for name in ours:
            base = list(theirs)[name != "none"]
            print(f"{name}: {B / seconds[name]:.2f} images/s, {base}: {B / seconds[base]:.2f} images/s, "
                  f"{seconds[base] / seconds[name]:.2f} x")
        return
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    order = data.epoch_order(index, 0, 0)[:len(index) // B * B].reshape(-1, B)
    tokenizer = data.Tokenizer.from_file(options.vocab)
    ours = data.Batches(clip_pgs.Config(), [options.shard], index, order, tokenizer, epoch=0)
    theirs = get_wds_dataset(
        SimpleNamespace(train_data=options.shard, train_num_samples=order.size,
                        train_data_upsampling_factors=None, seed=0, workers=0, world_size=1, batch_size=B),
        open_clip.image_transform(224, is_train=True, aug_cfg={"scale": (0.9, 1.0)}), is_train=True,
        tokenizer=open_clip.get_tokenizer("ViT-B-16")).dataloader
    seconds = in_turns({"open_clip": lambda: [None for _ in theirs],
                        "ours": lambda: [ours[number] for number in range(len(order))]}, options.rounds or 5)
    print(f"{order.size} images, one thread: ours {order.size / seconds['ours']:.0f} images/s, open_clip "
          f"{order.size / seconds['open_clip']:.0f} images/s, {seconds['open_clip'] / seconds['ours']:.2f} x")


parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
commands = parser.add_subparsers(dest="command", required=True)
step = commands.add_parser("step")
step.add_argument("--model", default="ViT-B-16")
step.add_argument("--image-size", type=int, default=224)
step.add_argument("--patch-size", type=int, default=16)
step.add_argument("--precision", default="")
step.add_argument("--rows", nargs="+", default=(), help=f"some of: {', '.join(ROWS)}; beside none")
step.add_argument("--compile", action="store_true")
step.add_argument("--grad-checkpointing", action="store_true")
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
options = parser.parse_args()
benches = {"step": bench_step, "data": bench_data, "masks": bench_masks, "open_clip": bench_open_clip}
benches[options.command](options)
