"""Times this project against open_clip on the same work, in turns, in one process; the figures in the README.

    python .github/against_open_clip.py train CAPTIONS.tar [--threads 2] [--rounds 5]
    python .github/against_open_clip.py data PHOTOS.tar --vocab bpe_simple_vocab_16e6.txt.gz [--rounds 5]

Needs open_clip_torch[training]; run it from the project's folder. `train`: a ViT-B/16 step in float32 on random
pixels and real captions. `data`: photographs and captions to batches, one thread, open_clip's own webdataset pipeline.
"""
import argparse
import logging
import os
import statistics
import sys
import time
from types import SimpleNamespace

import open_clip
import torch
from open_clip_train.data import get_wds_dataset

sys.path.insert(0, os.getcwd())
import clip_pgs
import data

BATCH = 16


def in_turns(contestants, rounds):
    """{name: median seconds} of functions called one after the other, again and again."""
    seconds = {name: [] for name in contestants}
    for number in range(rounds + 1):  # the first round is warm-up
        for name, work in contestants.items():
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def their_step(patch_dropout, images, tokens):
    """A function that makes one training step as open_clip's main program does."""
    model = open_clip.create_model("ViT-B-16", force_patch_dropout=patch_dropout)
    exclude = [p for name, p in model.named_parameters()
               if p.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))]
    known = {id(p) for p in exclude}
    rest = [p for p in model.parameters() if id(p) not in known]
    optimizer = torch.optim.AdamW([{"params": exclude, "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.2}],
                                  lr=5e-4, betas=(0.9, 0.98), eps=1e-6)
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
    config = clip_pgs.Config(mask=mask, batch_size=BATCH)
    clip, _, optimizer, ema = clip_pgs.build(config, {}, torch.device("cpu"))
    noise = None if mask == "none" else torch.rand(BATCH, 197)
    real = torch.ones(BATCH, dtype=torch.bool)
    return lambda: clip_pgs.train_step(config, clip, optimizer, ema, pixels, tokens, real, noise, 0.5)


def train(options):
    torch.set_num_threads(options.threads)
    index, _ = data.build_index([options.shard])
    captions = [data.read_caption(options.shard, row).splitlines()[0] for row in index[:BATCH]]
    tokens = open_clip.get_tokenizer("ViT-B-16")(captions)
    pixels = torch.randint(0, 256, (BATCH, 3, 224, 224), dtype=torch.uint8)
    images = clip_pgs.normalize(pixels, torch.device("cpu"))
    seconds = in_turns({"open_clip": their_step(0.0, images, tokens), "none": our_step("none", pixels, tokens),
                        "open_clip, patch dropout 0.5": their_step(0.5, images, tokens),
                        "random": our_step("random", pixels, tokens), "pgs": our_step("pgs", pixels, tokens)},
                       options.rounds)
    for name, base in (("none", "open_clip"), ("random", "open_clip, patch dropout 0.5"),
                       ("pgs", "open_clip, patch dropout 0.5")):
        print(f"{name}: {BATCH / seconds[name]:.2f} images/s, {base}: {BATCH / seconds[base]:.2f} images/s, "
              f"{seconds[base] / seconds[name]:.2f} x")


def read(options):
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    index, _ = data.build_index([options.shard])
    order = data.epoch_order(index, 0, 0)[:len(index) // BATCH * BATCH].reshape(-1, BATCH)
    tokenizer = data.Tokenizer.from_file(options.vocab)
    ours = data.Batches([options.shard], index, order, tokenizer, 224, (0.9, 1.0), (0, 0))
    theirs = get_wds_dataset(
        SimpleNamespace(train_data=options.shard, train_num_samples=order.size, train_data_upsampling_factors=None,
                        seed=0, workers=0, world_size=1, batch_size=BATCH),
        open_clip.image_transform(224, is_train=True, aug_cfg={"scale": (0.9, 1.0)}), is_train=True,
        tokenizer=open_clip.get_tokenizer("ViT-B-16")).dataloader
    seconds = in_turns({"open_clip": lambda: [None for _ in theirs],
                        "ours": lambda: [ours[number] for number in range(len(order))]}, options.rounds)
    print(f"{order.size} images, one thread: ours {order.size / seconds['ours']:.0f} images/s, open_clip "
          f"{order.size / seconds['open_clip']:.0f} images/s, {seconds['open_clip'] / seconds['ours']:.2f} x")


parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
parser.add_argument("what", choices=("train", "data"))
parser.add_argument("shard")
parser.add_argument("--vocab")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--rounds", type=int, default=5)
options = parser.parse_args()
(train if options.what == "train" else read)(options)
