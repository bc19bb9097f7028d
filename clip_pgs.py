"""CLIP-PGS: contrastive language-image pre-training on the half of the patches that matters.

    torchrun clip_pgs.py --mask pgs --ratio 0.5              the demo: draws its own data, minutes on a CPU
    torchrun --nproc_per_node 8 clip_pgs.py --data 'cc12m/{00000..01242}.tar' --mask pgs --val imagenet/
    python clip_pgs.py --resume                              go on with the run in out/
    python clip_pgs.py --show-masks photo.jpg --ratio 0.5    draw what each mask leaves of a photograph
    python clip_pgs.py --help                                every option, its default and meaning

CLIP trains an image encoder and a text encoder so that a photograph and its caption get similar
features. Most of the cost is the image encoder, and most patches of an image repeat their neighbours.
Six masks choose which patches it sees: none (CLIP), random (FLIP), center (GLIP), cluster (E-CLIP),
attentive (A-CLIP) and, what this file is about, pgs (CLIP-PGS, Pei et al., CVPR 2025, arXiv 2503.17080).

One step of training, with the functions that do it:

    edges = how much changes inside each patch                       sobel_edges
    candidates = a few flat patches, by chance                       pgs_candidates
    S = cosines of pixels, later of embeddings, too; balanced        patch_similarity, balance
    score = S to the most similar candidate; similar: above 0.5      pgs_score
    keep = what stays: similar ones are removed first, by chance     remove; make_mask calls all of these
    image_features = ViT(the patches keep of the images)             CLIP.encode_image
    text_features = transformer(tokens), at <end>                    CLIP.encode_text
    logits = exp(logit_scale) * cosines of both features             clip_loss
    loss = cross_entropy(logits), both ways, over all ranks          clip_loss
    loss.backward(), AdamW                                           train_step, update

The story, top to bottom: config, masks, model, teacher (for attentive alone), loss, optimizer, one
step. Everybody reads up to there. Then come many passes (--accum), two views (A-CLIP, SLIP), the run
and main. data.py reads shards, evaluate.py measures what was learned.
"""
import argparse
import copy
import json
import math
import os
import signal
import sys
import threading
import time
import traceback
import zlib
from collections import Counter, OrderedDict
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import evaluate

if not hasattr(data, "Batches") or not hasattr(evaluate, "embed_images"):
    raise SystemExit(f"error: {data} or {evaluate} is another project's; clip_pgs.py needs those beside it")

# -----------------------------------------------------------------------------
# Config. The one place for every knob: a field is a default, an option, and what the checkpoint
# stores. In brackets: where the default or the option comes from. Release: CLIP-PGS's code, its
# recipe for CC12M. Ours: we chose it. Skip the list at first, and look up names in it later.

def knob(default, meaning, least=0):
    """A Config field with its help text and, if it is a number, its least value."""
    return field(default=default, metadata={"help": meaning, "least": least})

@dataclass
class Config:
    """The paper's run: ViT-B-16 at 224 on CC12M."""
    # data
    data: tuple = knob((), "training shards: paths, globs, ranges; none: the demo draws its own")
    val: tuple = knob((), "folders to evaluate after every epoch, in CLIP_benchmark's layout")
    vocab: str = knob("", "CLIP's bpe_simple_vocab_16e6.txt.gz; else captions teach the merges")
    vocab_size: int = knob(49408, "largest vocabulary to learn (CLIP)", least=514)
    max_bad: float = knob(0.1, "share of shards or samples that may be broken (ours)")
    # model
    model: str = knob("ViT-B-16", "model size: ViT-B-16, ViT-S-16, ViT-L-16 or demo")
    image_size: int = knob(224, "side of the square input, pixels", least=1)
    patch_size: int = knob(16, "side of a patch, pixels, whatever the model's name says", least=1)
    context_length: int = knob(77, "tokens a caption is cut to, with start and end (CLIP)", least=3)
    quick_gelu: bool = knob(False, "x * sigmoid(1.702 x) for GELU, as in OpenAI's own weights")
    # mask
    mask: str = knob("pgs", "patches to remove: none, random, center, cluster, attentive or pgs")
    ratio: tuple = knob((0.5,), "share of patches removed; for cluster, attentive, pgs also a range")
    edges: bool = knob(True, "pgs: propose flat patches; off: any patch (paper's ablation)")
    transport: bool = knob(True, "pgs: balance the similarity by transport (paper's ablation)")
    embeddings: bool = knob(True, "cluster, pgs: compare embeddings, too; off: pixels (E-CLIP)")
    ema_size: int = knob(0, "side of the EMA encoder's input, such as 112 (A-CLIP); 0: image_size")
    text_tokens: int = knob(0, "longer captions lose common words, down to this; 0: off (CLIPF)")
    views: int = knob(1, "crops of each image, each with its own mask: 1 or 2 (A-CLIP)", least=1)
    contrast: tuple = knob((), "with --views 2, losses on class tokens: simclr, byol or both (A-CLIP)")
    unmasked_epochs: float = knob(0.0, "epochs on whole images at the end, at most half of all (FLIP)")
    # optimization
    batch_size: int = knob(512, "images per rank and pass (release: 8 x 512 = 4096)", least=1)
    accum: int = knob(1, "passes per step: the exact update of a batch this much larger", least=1)
    epochs: int = knob(32, "passes over the data (paper)", least=1)
    steps: int = knob(0, "stop after this many optimizer steps instead; 0: epochs decide")
    lr: float = knob(1e-3, "peak learning rate (release, for 4096 images), not scaled")
    warmup: int = knob(10_000, "steps of linear warm-up (release), at most a fifth of all (ours)")
    weight_decay: float = knob(0.2, "decoupled weight decay of the weight matrices (CLIP)")
    grad_clip: float = knob(0.0, "largest norm of the gradient, which is then in the log; 0: no limit")
    scale: tuple = knob((0.9, 1.0), "area of the random crop, as a share of the image (open_clip)")
    # run
    seed: int = knob(0, "fixes the first weights, the order of the data, the crops and the masks")
    workers: int = knob(4, "processes per rank that decode, some 400 images/s each; 0: the rank does")
    out: str = knob("out", "folder for the checkpoint, log, pictures and index of the shards")
    save_every: int = knob(1000, "steps between checkpoints; an epoch's end writes one", least=1)
    keep_epochs: bool = knob(False, "keep the checkpoint of every epoch, as epoch_1.pt and so on")
    init: str = knob("", "weights to start from, as evaluate.py reads; they fix the model")
    resume: str = knob("", "checkpoint to go on from, with its options; alone: that in --out")
    precision: str = knob("", "bf16 or fp32; without it, bf16 on a GPU that has it, else fp32")
    compile: bool = knob(False, "fuse layers by torch.compile; the first step of a size is slow")
    show_masks: tuple = knob((), "photographs: draw masks.png and steps.png to --out, then stop")

    @property
    def num_patches(self):
        """L, the patches of an image."""
        return (self.image_size // self.patch_size) ** 2

# Width and layers of the image tower, of the text tower, size of the embedding; heads are 64 wide.
# B and L are CLIP's (Radford et al. 2021); S is DeiT's small ViT with a text tower of its width.
SIZES = {"ViT-B-16": (768, 12, 512, 12, 512),
         "ViT-S-16": (384, 12, 384, 12, 384),
         "ViT-L-16": (1024, 24, 768, 12, 768),
         "demo": (128, 4, 64, 2, 128)}
HEAD_WIDTH = 64

# What the demo changes, tuned together with its data on 2 CPU cores.
DEMO = dict(model="demo", image_size=48, patch_size=8, context_length=24, vocab_size=1024,
            batch_size=256, epochs=8, unmasked_epochs=1.5, lr=3e-3, warmup=50, workers=1,
            val=("demo/seen", "demo/unseen", "demo/retrieval"))

def tower_sizes(model):
    """(width, layers, text width, text layers, E) of a name in SIZES; or the sizes themselves,
    which evaluate.infer_config reads from weights made elsewhere."""
    if isinstance(model, str) and model not in SIZES:
        raise ValueError(f"--model {model}: choose one of {', '.join(SIZES)}")
    return SIZES[model] if isinstance(model, str) else tuple(model)

def check(config):
    """ValueError with one line for the first option whose value cannot work."""
    def need(works, option, rule):
        if not works:
            raise ValueError(f"--{option.replace('_', '-')} {getattr(config, option)}: must be {rule}")

    for option in fields(config):
        value = getattr(config, option.name)
        least = option.metadata["least"]
        if isinstance(value, (int, float)):  # nan fails this, too
            need(least <= value < math.inf, option.name, f"finite, at least {least}")
    tower_sizes(config.model)
    check_mask(config.mask, config.ratio)
    need(config.image_size % config.patch_size == 0, "image_size", f"a multiple of {config.patch_size}")
    need(config.ema_size % config.patch_size == 0, "ema_size", f"a multiple of {config.patch_size}")
    need(config.views <= 2, "views", "1 or 2")
    need(config.precision in ("", "bf16", "fp32"), "precision", "bf16 or fp32")
    need(set(config.contrast) <= {"simclr", "byol"}, "contrast", "simclr, byol or both")
    need(not config.contrast or config.views == 2, "contrast", "used with --views 2")
    need(len(config.scale) == 2 and 0 < config.scale[0] <= config.scale[1] <= 1, "scale",
         "two numbers, 0 < low <= high <= 1")

# -----------------------------------------------------------------------------
# Masks. Each answers one question: which patches does the encoder get to see? pgs goes through
# the first five lines of the step at the head of this file; the other masks share some of them. To
# add a mask, name it in MASKS (and in COUNTING, if it takes a range of ratios) and give it a branch
# in make_mask, above that of cluster.
#
# Letters in shapes: B images, C their channels, H and W pixels, P side of a patch, L patches of an
# image, K of them kept, A candidates, D width of a tower, E size of an embedding, T tokens of a
# caption, N packed tokens of a batch; in the losses, N pairs of all ranks. In formulas: S similarity,
# T the transport plan, u its scaling.

MASKS = ("none", "random", "center", "cluster", "attentive", "pgs")
COUNTING = ("cluster", "attentive", "pgs")  # they find how many could go: `ratio` may be a range
ANCHORS = 0.03     # share of the patches that start a cluster (E-CLIP)
CANDIDATES = 0.05  # share of the patches proposed for removal (CLIP-PGS)
SIMILAR = 0.5      # more than this is similar to a candidate (`target_mask_ratio` in both releases)
EPS = 0.05    # of optimal transport: the smaller, the more mass stays with the nearest twins (ours)

def check_mask(name, ratio):
    """ValueError unless name is one of MASKS and ratio one share of patches, or a range of two, in
    [0, 1)."""
    if name not in MASKS:
        raise ValueError(f"--mask {name}: choose one of {', '.join(MASKS)}")
    if len(ratio) not in (1, 2) or not 0 <= ratio[0] <= ratio[-1] < 1:
        raise ValueError(f"--ratio {ratio}: must be a share, at least 0 and below 1, or two, low then high")
    if len(ratio) == 2 and name not in ("none", *COUNTING):
        raise ValueError(f"--ratio {ratio[0]} {ratio[1]}: --mask {name} takes one share; a range is for "
                         f"{', '.join(COUNTING)}, which find out how many patches of an image could go")

def patchify(images, patch_size):
    """(B, C, H, W) -> (B, L, C*P*P): patches row by row, as channel, row, column. ValueError for a
    bad P."""
    B, C, H, W = images.shape
    P = patch_size
    if H % P or W % P:
        raise ValueError(f"--patch-size {P}: does not divide images of {H}x{W}")
    patches = images.reshape(B, C, H // P, P, W // P, P)
    patches = patches.permute(0, 2, 4, 1, 3, 5)           # (B, H/P, W/P, C, P, P)
    return patches.reshape(B, -1, C * P * P)

def sobel_edges(images, patch_size=16):
    """Edge strength of each patch, (B, L) in [0, 1]; images (B, 3, H, W) are normalised as for the
    model. Mean gradient magnitude of the luminance, min-max scaled per image; a constant image
    gives zeros. ValueError if the patch size does not divide H and W. CLIP-PGS, edge detection
    (its release differs, see the README)."""
    weights = torch.tensor([0.299, 0.587, 0.114]) * torch.tensor(data.STD)  # MEAN drops out
    weights = weights.view(3, 1, 1).to(images, non_blocking=True)
    kernel_x = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    kernels = torch.stack([kernel_x, kernel_x.T])[:, None].to(images, non_blocking=True)  # (2, 1, 3, 3)
    luminance = (images * weights).sum(1, keepdim=True)                     # (B, 1, H, W)
    # We subtract the first pixel: a flat image then gives exactly zero, not noise for the scaling
    # to blow up.
    luminance = luminance - luminance[..., :1, :1]
    gradient = F.conv2d(F.pad(luminance, (1, 1, 1, 1), mode="replicate"), kernels)  # (B, 2, H, W)
    magnitude = gradient.square().sum(1, keepdim=True).sqrt()               # (B, 1, H, W)
    edges = patchify(magnitude, patch_size).mean(-1)                        # (B, L)
    edges = edges - edges.amin(1, keepdim=True)
    return edges / edges.amax(1, keepdim=True).clamp(min=1e-12)

def pgs_candidates(edges, noise):
    """(B, A) indices of the patches proposed for removal: the highest `noise - edges` (CLIP-PGS,
    generation). edges (B, L) in [0, 1], noise (B, L) uniform in [0, 1): by chance, flat patches
    often, outlines rarely. A candidate has no privilege later: it counts as similar because it is
    similar to itself."""
    L = noise.shape[1]
    return (noise - edges).topk(max(1, round(CANDIDATES * L))).indices

def patch_similarity(images, patch_size=16, embeddings=None, alpha=0.0):
    """Similarity of every two patches of an image, (B, L, L) in [-1, 1]; images (B, 3, H, W). The
    cosine of their pixels, brought to zero mean and unit variance (E-CLIP: contrast must not
    matter). With embeddings (B, L, D): (1 - alpha) * cosine of pixels + alpha * cosine of
    embeddings. These hold the positions, too, as in both releases: near patches are more alike.
    In a run, alpha grows, see `alpha_at`."""
    def cosines(x):
        z = F.normalize(x, dim=-1)                        # (B, L, D)
        return z @ z.transpose(1, 2)                      # (B, L, L)

    pixels = patchify(images.float(), patch_size)
    pixels = pixels - pixels.mean(-1, keepdim=True)       # the cosine divides by the deviation
    # A patch whose values are all equal is now zero plus rounding noise, whose direction is random.
    # The same small number, appended to every patch, makes such patches alike.
    S = cosines(F.pad(pixels, (0, 1), value=1e-3))
    if embeddings is None or alpha == 0:
        return S
    return (1 - alpha) * S + alpha * cosines(embeddings.float())

def sinkhorn_scaling(similarity):
    """log u (B, L, 1) of a symmetric similarity S (B, L, L) in [-1, 1]: the scaling u that makes the
    plan T = diag(u) exp((S - 1) / EPS) diag(u) doubly stochastic. That is optimal transport with
    uniform marginals (Cuturi 2013): each patch gives away a unit of mass. One that has many twins
    shares it with all of them; one that is like no other keeps it.
    Rows sum to 1 when u * (kernel @ u) = 1. Repeating u <- 1 / (kernel @ u) would alternate between
    two vectors, so each step takes the geometric mean of u and that: near the answer it at least
    halves the error, as a kernel of cosines is positive semi-definite."""
    kernel = ((similarity.float() - 1) / EPS).exp()  # (B, L, L) between exp(-2 / EPS) and 1: never 0
    u = torch.ones_like(kernel[..., :1])                  # (B, L, 1)
    for _ in range(20):                                   # rows then sum to 1 within 1e-3
        u = (u / (kernel @ u)).sqrt()
    return u.log()

def balance(similarity):
    """Balanced similarity S' = 1 + EPS * log T = S + EPS * (log u_i + log u_j) of a symmetric S
    (B, L, L) in [-1, 1] with S_ii = 1: same shape, float32. To compare by S' is to compare by the
    plan T. As u is at most 1, S' is at most S, and it is S where both patches are like no other."""
    log_u = sinkhorn_scaling(similarity)
    return similarity.float() + EPS * (log_u + log_u.transpose(1, 2))

def sinkhorn(similarity):
    """The plan T of `sinkhorn_scaling`, (B, L, L) float32: the doubly stochastic matrix nearest in
    KL to exp(S / EPS). Rows and columns sum to 1. Selection needs its logarithm only: `balance`."""
    return ((balance(similarity) - 1) / EPS).exp()

def pgs_score(similarity, candidates, transport=True):
    """(B, L): the similarity to the most similar candidate, balanced by optimal transport
    (CLIP-PGS, selection). similarity (B, L, L), candidates (B, A). Without balance, one large area
    can take all that goes."""
    if transport:
        similarity = balance(similarity)
    rows = similarity.take_along_dim(candidates[..., None], dim=1)  # (B, A, L), the candidates' rows
    return rows.amax(1)

def block_mean(x, rows, columns):
    """(B, L) -> (B, L): the mean of each patch's block of 2x2; x itself if a side of the grid is
    odd."""
    if rows % 2 or columns % 2:
        return x
    blocks = F.avg_pool2d(x.view(-1, 1, rows, columns), 2)          # (B, 1, rows / 2, columns / 2)
    return F.interpolate(blocks, scale_factor=2, mode="nearest").flatten(1)

def remove(priority, ratio, count=None):
    """Removes the patches of the highest priority (B, L): keep (B, K) int64, valid (B, K) bool or
    None. With one ratio all images lose that share. With a range they lose `count` (B,), or the
    nearest end of the range. keep is sorted by priority, the lowest first, not by position: each
    patch takes its position with it. Valid slots of `keep` come first; the others hold removed
    patches, and only fill up the row. Of equal priorities the last patches go: add noise to let
    chance decide."""
    L = priority.shape[1]
    fewest = min(round(ratio[0] * L), L - 1)        # one patch always stays
    most = min(round(ratio[-1] * L), L - 1)
    order = priority.argsort(dim=1, stable=True)    # (B, L) lowest first: these stay longest
    # K follows from the ratio alone: to learn the largest num_kept, the CPU would wait for the GPU.
    keep = order[:, :L - fewest]                    # (B, K)
    if fewest == most:
        return keep, None
    num_kept = L - count.clamp(fewest, most)        # (B,)
    valid = torch.arange(L - fewest, device=keep.device) < num_kept[:, None]  # (B, K)
    return keep, valid

@torch.no_grad()
def make_mask(name, images, ratio, generator=None, *, patch_size=16, noise=None, alpha=0.0,
              embeddings=None, attention=None, edges=True, transport=True):
    """The patches that the encoder sees: keep (B, K) indices, valid (B, K) bool or None if all
    are, see `remove`. name: one of MASKS. images: (B, 3, H, W), normalised. ratio: share of
    patches REMOVED, (r,) exactly, or for one of COUNTING (low, high), decided per image. noise:
    (B, 2, L) uniform in [0, 1), else drawn from generator: noise[:, 0] decides who is proposed,
    noise[:, 1] who of the similar patches is removed. cluster and pgs compare pixels and, by the
    share alpha, embeddings (B, L, D), see `patch_tokens`; attentive needs attention (B, L). A mask
    does not depend on the other images of the batch. ValueError for an unknown name or ratio."""
    check_mask(name, ratio)
    B = len(images)
    rows = images.shape[2] // patch_size
    columns = images.shape[3] // patch_size
    L = rows * columns
    if name == "none":
        return torch.arange(L, device=images.device).expand(B, L), None
    if noise is None:
        noise = torch.rand(B, 2, L, generator=generator, device=images.device)
    proposal, choice = noise.unbind(1)              # (B, L) each

    with torch.autocast(images.device.type, enabled=False):  # exp(S / EPS) needs float32
        if name == "random":  # FLIP, Li et al., CVPR 2023
            return remove(choice, ratio)
        if name == "center":  # GLIP, Liang and Larson, ECML 2024: a Gaussian of variance 0.2 per axis
            y = torch.linspace(-1, 1, rows, device=noise.device)[:, None]
            x = torch.linspace(-1, 1, columns, device=noise.device)
            density = (-(y ** 2 + x ** 2) / 0.4).exp() / (0.4 * math.pi)  # (rows, columns)
            return remove(choice - density.flatten(), ratio)
        if name == "attentive":  # A-CLIP, Yang et al., ICCV 2023, by blocks of 2x2 patches
            blocks = block_mean(attention, rows, columns)
            count = (blocks < attention.mean(1, keepdim=True)).sum(1)  # less than an even share: could go
            return remove(-blocks, ratio, count)
        if name == "cluster":  # E-CLIP, Wei et al., CVPR 2024: candidates are a few anchors
            candidates = proposal.topk(max(1, round(ANCHORS * L))).indices  # (B, A)
            transport = False                       # E-CLIP has none
        elif name == "pgs":    # CLIP-PGS
            strength = torch.zeros_like(proposal)   # (B, L) of edges
            if edges:
                strength = sobel_edges(images.float(), patch_size)
            candidates = pgs_candidates(strength, proposal)
        similarity = patch_similarity(images, patch_size, embeddings, alpha)
        similar = pgs_score(similarity, candidates, transport) > SIMILAR  # (B, L)
        # Similar patches go first, in random order (True counts as 1, choice is below 1), as in
        # both releases. If they are too few, others fill up at random. Ranked by score instead, a
        # mask would hardly vary between epochs.
        return remove(similar + choice, ratio, similar.sum(1))

# -----------------------------------------------------------------------------
# Model: a ViT and a causal text transformer. Parameter names and shapes are those of OpenAI CLIP
# and open_clip, so that weights load strictly in both directions. Captions differ in length, and
# so do images if --ratio is a range. Padding is not computed: between the attentions the valid
# tokens lie packed, one image after the other, (N, D). That saves 4 to 6 % of a step on captions
# (ViT-B/16, batches of 64 and 256, half of the patches), and 13 to 18 % on a range of ratios.

class Slots(NamedTuple):
    """Which slots of a padded batch hold a token: the way from the padded form to the packed one,
    and back."""
    valid: torch.Tensor   # (B, K) bool
    places: torch.Tensor  # (N,) int64, where the tokens lie among the B * K slots

    def pack(self, x):
        """(B, K, D) -> (N, D): the valid tokens, one after the other."""
        return x.flatten(0, 1).index_select(0, self.places)

    def unpack(self, x):
        """(N, D) -> (B, K, D): the tokens in their slots, zeros in the others."""
        B, K = self.valid.shape
        padded = x.new_zeros(B * K, x.shape[1])
        return padded.index_copy(0, self.places, x).view(B, K, -1)

class Attention(nn.Module):
    """Multi-head self-attention with the parameter names of nn.MultiheadAttention."""
    def __init__(self, width):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def qkv(self, x, slots=None):
        """Queries, keys and values, (B, heads, K, 64) each, of x (B, K, D), or (N, D) with its
        slots."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        if slots is not None:
            qkv = slots.unpack(qkv)                                         # (B, K, 3 * D)
        # Cut in three, not viewed as (3, ...): the gradient then needs one copy less. That saves a
        # tenth of a step of ViT-B/16 on an H200.
        parts = qkv.chunk(3, dim=2)                                        # (B, K, D) each
        parts = [part.unflatten(2, (-1, HEAD_WIDTH)) for part in parts]    # (B, K, heads, 64)
        return [part.transpose(1, 2) for part in parts]                    # (B, heads, K, 64)

    def mix(self, q, k, v, slots=None, causal=False):
        """What each query takes from the values, (B, queries, D)."""
        # Causal attention needs no mask: padding follows the valid tokens, which never look ahead.
        mask = None
        if slots is not None and not causal:
            mask = slots.valid[:, None, None]                             # (B, 1, 1, K)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return y.transpose(1, 2).flatten(2)

    def forward(self, x, slots=None, causal=False):
        """See `Block.forward`."""
        q, k, v = self.qkv(x, slots)
        y = self.mix(q, k, v, slots, causal)
        if slots is not None:
            y = slots.pack(y)
        return self.out_proj(y)

class QuickGELU(nn.Module):
    """The approximation of GELU in OpenAI's weights."""
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)

class Block(nn.Module):
    """A pre-norm transformer layer."""
    def __init__(self, width, quick_gelu):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, 4 * width),
            gelu=QuickGELU() if quick_gelu else nn.GELU(),
            c_proj=nn.Linear(4 * width, width)))

    def forward(self, x, slots=None, causal=False):
        """(B, K, D) -> (B, K, D); or with slots, packed: (N, D) -> (N, D)."""
        x = x + self.attn(self.ln_1(x), slots, causal)
        return x + self.mlp(self.ln_2(x))

    def first(self, x, slots=None):
        """What `forward` makes of the first token of each image, (B, D), and of no other."""
        q, k, v = self.attn.qkv(self.ln_1(x), slots)
        y = self.attn.out_proj(self.attn.mix(q[:, :, :1], k, v, slots))  # (B, 1, D)
        if slots is not None:
            x = slots.unpack(x)
        x = x[:, 0] + y[:, 0]
        return x + self.mlp(self.ln_2(x))

class Transformer(nn.Module):
    """A stack of blocks."""
    def __init__(self, width, layers, quick_gelu):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, quick_gelu) for _ in range(layers))
        # CLIP's text initialisation, here for both towers: the sum of all residual branches has the
        # scale of a single one.
        for block in self.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width ** -0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width ** -0.5 * (2 * layers) ** -0.5)
            nn.init.zeros_(block.attn.out_proj.bias)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width ** -0.5 * (2 * layers) ** -0.5)

    def forward(self, x, slots=None, causal=False):
        """As `Block.forward`."""
        for block in self.resblocks:
            x = block(x, slots, causal)
        return x

def resize_positions(position, L):
    """Positional embeddings of a square grid, stretched to the grid of L patches: (old L, D) ->
    (L, D)."""
    old = math.isqrt(len(position))
    new = math.isqrt(L)
    if old == new:
        return position
    grid = position.T.view(1, -1, old, old)
    grid = F.interpolate(grid, (new, new), mode="bicubic", antialias=True)
    return grid.flatten(2)[0].T

class VisionTransformer(nn.Module):
    """The image tower (Dosovitskiy et al., ICLR 2021). It embeds and encodes only the patches it
    is given."""
    def __init__(self, config, width, layers, embed_dim):
        super().__init__()
        self.patch_size = config.patch_size
        self.conv1 = nn.Conv2d(3, width, config.patch_size, config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width ** -0.5)
        self.positional_embedding = nn.Parameter(torch.randn(config.num_patches + 1, width) * width ** -0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, config.quick_gelu)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, embed_dim) * width ** -0.5)

    def patch_tokens(self, images, keep=None):
        """Projections of the patches `keep` (B, K), or of all, plus positional embeddings: (B, K,
        D)."""
        patches = patchify(images, self.patch_size)
        position = resize_positions(self.positional_embedding[1:], patches.shape[1])  # for --ema-size
        if keep is not None:
            # From here on only what stays is computed.
            patches = patches.take_along_dim(keep[..., None], dim=1)
            # As position[keep], but on a CPU, too, the gradient is the same each time.
            position = F.embedding(keep, position)
        weight = self.conv1.weight.flatten(1)    # conv1 has no overlap: at one patch it is a matrix
        return F.linear(patches, weight) + position

    def embed(self, images, keep=None):
        """What enters the first layer: the class token, then the patches `keep` or all: (B, 1 + K,
        D)."""
        x = self.patch_tokens(images, keep)
        first = self.class_embedding + self.positional_embedding[0]
        first = first.to(x.dtype).expand(len(x), 1, -1)
        return self.ln_pre(torch.cat([first, x], dim=1))

    def forward(self, images, keep=None, valid=None):
        """The class token at the end, (B, D); arguments as of `CLIP.encode_image`."""
        x = self.embed(images, keep)                                     # (B, 1 + K, D)
        slots = None
        if valid is not None:
            valid = F.pad(valid, (1, 0), value=True)               # the class token is always valid
            # nonzero: the CPU waits here, because only the GPU knows how many patches are kept.
            slots = Slots(valid, valid.flatten().nonzero()[:, 0])
            x = slots.pack(x)                                            # (N, D)
        *blocks, last = self.transformer.resblocks
        for block in blocks:
            x = block(x, slots)
        # Nothing after the last layer looks at the patches, so it computes the class token alone: a
        # step takes 4 to 5 % less.
        return self.ln_post(last.first(x, slots))                        # (B, D)

def send(x, device):
    """x on the device. To a GPU from pinned memory: then the CPU does not wait for the copy."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.contiguous().pin_memory()
    return x.to(device, non_blocking=True)

class CLIP(nn.Module):
    """Two towers and logit_scale, the log of an inverse temperature. `config.vocab_size` is the
    tokenizer's."""
    def __init__(self, config):
        super().__init__()
        width, layers, text_width, text_layers, embed_dim = tower_sizes(config.model)
        self.visual = VisionTransformer(config, width, layers, embed_dim)
        self.transformer = Transformer(text_width, text_layers, config.quick_gelu)
        self.token_embedding = nn.Embedding(config.vocab_size, text_width)
        self.positional_embedding = nn.Parameter(torch.randn(config.context_length, text_width) * 0.01)
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(torch.randn(text_width, embed_dim) * text_width ** -0.5)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def encode_image(self, images, keep=None, valid=None):
        """Features (B, E), not normalised, of images (B, 3, H, W); only the patches `keep` (B, K)
        are seen. With valid (B, K) bool, slots of `keep` that are not valid have no influence and
        almost no cost."""
        return self.visual(images, keep, valid) @ self.visual.proj

    def encode_text(self, tokens):
        """Features (B, E), not normalised, of tokens (B, T): the output at <end>, which sees all
        before it. What comes after <end> is not computed. Tokens stay on the CPU until here, where
        they are counted: on the GPU, the CPU would have to wait for the result."""
        device = self.text_projection.device
        ends = tokens.argmax(1)                                          # (B,); <end> is the highest id
        T = int(ends.max()) + 1                                          # of the longest caption
        valid = torch.arange(T, device=ends.device) <= ends[:, None]     # (B, T)
        places = send(valid.flatten().nonzero()[:, 0], device)           # (N,)
        slots = Slots(valid, places)    # causal attention reads of valid its shape alone
        tokens = send(tokens[:, :T], device)
        x = self.token_embedding(tokens) + self.positional_embedding[:T]
        x = self.transformer(slots.pack(x), slots, causal=True)          # (N, D)
        last = (ends + 1).cumsum(0) - 1                                  # <end>'s place among the N
        x = x[send(last, device)]                                        # (B, D)
        return self.ln_final(x) @ self.text_projection

    def forward(self, images, tokens, keep=None, valid=None):
        """Image features, text features (B, E), and exp(logit_scale)."""
        return self.encode_image(images, keep, valid), self.encode_text(tokens), self.logit_scale.exp()

# -----------------------------------------------------------------------------
# Teacher: the EMA copy of the image tower. `attentive` ranks by its attention; BYOL, in the chapter
# on two views, learns its class token. Other runs have none.

@torch.no_grad()
def class_attention(visual, images, size=0):
    """How much the class token attends to each patch, mean over layers and heads, (B, L), and the
    class token at the end, (B, D); images (B, 3, H, W). Its attention to itself is left out. With
    size, a multiple of the patch size, the tower looks at images of that side (A-CLIP, efficient
    version), and the attention is stretched back."""
    grid = images.shape[-1] // visual.patch_size
    if size:
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    rows = []
    x = visual.embed(images)                                             # (B, 1 + L, D)
    for block in visual.transformer.resblocks:
        # The layer, line by line: scaled_dot_product_attention does not return its weights.
        q, k, v = block.attn.qkv(block.ln_1(x))
        logits = q[:, :, :1] @ k.transpose(2, 3) * HEAD_WIDTH ** -0.5    # (B, heads, 1, 1 + L)
        row = logits.float().softmax(-1)
        rows.append(row[:, :, 0, 1:].mean(1))                            # (B, L)
        x = x + block.attn.out_proj(block.attn.mix(q, k, v))
        x = x + block.mlp(block.ln_2(x))
    attention = sum(rows) / len(rows)
    if size:
        small = size // visual.patch_size
        attention = attention.view(-1, 1, small, small)
        attention = F.interpolate(attention, (grid, grid), mode="bilinear").flatten(1)
    return attention, visual.ln_post(x[:, 0])

@torch.no_grad()
def update_ema(ema, source, progress):
    """Moves the EMA weights towards those of the source. The rate falls from 0.004 to 0 by a cosine
    as progress goes 0 -> 1 (A-CLIP: momentum 0.996 -> 1)."""
    rate = 0.004 * (math.cos(math.pi * progress) + 1) / 2
    for average, weight in zip(ema.parameters(), source.parameters()):
        average.lerp_(weight, rate)

# -----------------------------------------------------------------------------
# Loss. To try another one, rewrite clip_loss. What a loss learns, such as logit_scale, is a
# parameter of CLIP; CLIP.forward and TwoViews.forward return all of it as one tensor, so that DDP
# and --accum see it. `update` limits it, `step_numbers` logs it. Older checkpoints do not hold a
# new parameter.

ranks = evaluate.ranks  # (rank, world_size): (0, 1) without torchrun

def gather(x):
    """(B, ...) of each rank -> (world_size * B, ...) on all ranks, in their order. All ranks then
    compute the same loss of all pairs. The gradient goes to this rank's own rows, times world_size,
    because DDP will take the mean of the ranks' gradients. Parameters of the loss, such as
    logit_scale, need no factor: each rank has all of their gradient."""
    rank, world_size = ranks()
    if world_size == 1:
        return x
    blocks = [torch.empty_like(x) for _ in range(world_size)]
    dist.all_gather(blocks, x.detach().contiguous())
    blocks[rank] = x.clone()  # a clone, so that the hook sits on it and not on the caller's tensor
    if x.requires_grad:
        blocks[rank].register_hook(lambda gradient: gradient * world_size)
    return torch.cat(blocks)

def clip_loss(image_features, text_features, logit_scale, decoded=None):
    """Symmetric cross entropy (Radford et al. 2021, figure 3) of the features (B, E) of all ranks,
    the same on each. logit_scale multiplies their cosines; pairs that are not decoded (B,) bool
    are left out."""
    images = gather(F.normalize(image_features, dim=-1))              # (N, E), N pairs of all ranks
    texts = gather(F.normalize(text_features, dim=-1))
    if decoded is None:
        decoded = torch.ones(len(image_features), dtype=torch.bool, device=image_features.device)
    decoded = gather(decoded)                                            # (N,)
    logits = logit_scale * images @ texts.T                              # (N, N)
    # A pair that does not decode has no say: cross_entropy skips the label -100, and at -inf
    # nobody takes it for an answer.
    labels = torch.arange(len(logits), device=logits.device).where(decoded, -100)
    per_image = F.cross_entropy(logits.masked_fill(~decoded, -math.inf), labels, reduction="sum")
    per_text = F.cross_entropy(logits.T.masked_fill(~decoded, -math.inf), labels, reduction="sum")
    return (per_image + per_text) / 2 / decoded.sum().clamp(min=1)

# -----------------------------------------------------------------------------
# Optimizer.

def make_optimizer(config, *modules):
    """AdamW with CLIP's betas and eps; decay on matrices only, not on biases, norms, other
    vectors."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, config.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)

# -----------------------------------------------------------------------------
# One step. The loop (`take_step`) sets the learning rate and draws the noise, by the functions
# below; `train_step` does the rest. During a run the learning rate changes, and alpha, the weight
# of embeddings in pgs and cluster, grows. The last steps may have no masks. What None means here:
#
#     noise          this step sees whole images: --mask none, or the last, unmasked epochs
#     keep           the encoder sees all patches
#     valid          all K slots of keep are for patches that stay: one --ratio; a range has spare slots
#     embeddings     this mask compares nothing, or pixels alone
#     attention, ema this mask needs no teacher: any but attentive (BYOL has one, too)
#     slots          nothing is padded
#     grad_norm      no --grad-clip

def learning_rate(config, step, total_steps):
    """Linear to config.lr over the warm-up, then a cosine to 0; step counts from 0."""
    warmup = min(config.warmup, total_steps // 5)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * (1 + math.cos(math.pi * (step - warmup) / (total_steps - warmup))) / 2

def alpha_at(progress):
    """The weight of embeddings in the similarity, at this progress of a run, in [0, 1]: untrained
    embeddings say nothing, so it grows linearly from 0 (ours; the releases: epoch / 32)."""
    return progress

def end_of_masks(config, total_steps, steps_per_epoch):
    """The step from which on images are whole: --unmasked-epochs before the end."""
    return total_steps - min(round(config.unmasked_epochs * steps_per_epoch), total_steps // 2)

def step_noise(config, step, num_images, device):
    """This rank's part of the mask noise: (B, 2, L), uniform in [0, 1), from the run's seed and
    the step. Drawn for the images of all ranks, then sliced: so masks depend neither on the number
    of ranks nor on --accum."""
    rank, world_size = ranks()
    seed = int(np.random.SeedSequence([config.seed, step]).generate_state(1)[0])
    generator = torch.Generator(device).manual_seed(seed)
    noise = torch.rand(num_images, 2, config.num_patches, generator=generator, device=device)
    return noise.chunk(world_size)[rank]

def autocast(config, device):
    """bf16 for the layers of the towers, if the run says so; masks and losses compute in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")

@torch.no_grad()
def choose_patches(config, visual, ema, images, noise, progress):
    """`make_mask` of images (B, 3, H, W) with the options of the run: keep (B, K), valid (B, K) or
    None; without noise both are None. visual, the image tower, and its EMA copy bring what some
    masks compare."""
    if noise is None:
        return None, None
    attention = None
    embeddings = None
    if config.mask == "attentive":
        attention, _ = class_attention(ema, images, config.ema_size)     # (B, L)
    if config.mask in ("cluster", "pgs") and config.embeddings:
        embeddings = visual.patch_tokens(images)                         # (B, L, D)
    return make_mask(config.mask, images, config.ratio, patch_size=config.patch_size, noise=noise,
                     alpha=alpha_at(progress), embeddings=embeddings, attention=attention,
                     edges=config.edges, transport=config.transport)

def train_step(config, clip, model, optimizer, batch, noise, progress, ema=None):
    """One update on a local batch, a `data.Batch`: (numbers of this rank for the log; keep and
    valid for masks.png). model is clip, or clip in DDP. progress: the share of the run that is
    done. The CPU only gives orders here and reads nothing back from the GPU (a range of ratios:
    once), so that the GPU always has work to do; the loop waits for it once a step, for the log."""
    device = clip.logit_scale.device
    images = data.normalize(batch.images.to(device, non_blocking=True))               # (B, 3, H, W)
    decoded = batch.decoded.to(device, non_blocking=True)                                   # (B,)
    with autocast(config, device):
        keep, valid = choose_patches(config, clip.visual, ema, images, noise, progress)     # (B, K)
        image_features, text_features, logit_scale = model(images, batch.tokens, keep, valid)
    loss = clip_loss(image_features.float(), text_features.float(), logit_scale, decoded)    # of (B, E)
    loss.backward()
    grad_norm = update(config, clip, optimizer, ema, progress)
    return step_numbers(config, clip, loss, grad_norm, keep, valid), keep, valid

def update(config, clip, optimizer, ema, progress):
    """AdamW's step; then clears the gradients, limits logit_scale and moves the EMA weights.
    Returns the gradient's norm before clipping, None without --grad-clip."""
    grad_norm = None
    if config.grad_clip:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        grad_norm = nn.utils.clip_grad_norm_(parameters, config.grad_clip)
    optimizer.step()
    optimizer.zero_grad()
    # CLIP's limit of 100. We clamp after the step: a clamp in forward has no gradient beyond it.
    with torch.no_grad():
        clip.logit_scale.clamp_(max=math.log(100))
    if ema is not None:
        update_ema(ema, clip.visual, progress)
    return grad_norm

def step_numbers(config, clip, loss, grad_norm, keep, valid):
    """What the log says of a step. kept: the mean share of patches that the encoder saw."""
    kept = 1.0
    if keep is not None:
        kept = keep.shape[1] / config.num_patches
    if valid is not None:
        kept = kept * valid.float().mean()
    numbers = {"loss": loss.detach(), "logit_scale": clip.logit_scale.detach().exp(), "kept": kept}
    if grad_norm is not None:
        numbers["grad_norm"] = grad_norm
    return numbers

# -----------------------------------------------------------------------------
# Many passes (--accum). Skip this chapter unless a batch does not fit your GPU. The loss compares
# every image with every caption, so a large batch cannot simply be cut into small ones whose
# gradients are added. GradCache (Gao et al. 2021) does it exactly, for the price of a second
# forward pass: features of all passes without gradient; the loss and its gradient at the features;
# each pass again, backward from that gradient.

def backward_in_passes(model, features, num_passes, loss_of):
    """Adds the gradient of the whole batch's loss to the parameters; returns the loss. features(i)
    computes pass i: tensors (b, ...), and last one that all passes share, exp(logit_scale)."""
    with torch.no_grad():
        found = [features(i) for i in range(num_passes)]
    *whole, logit_scales = zip(*found)
    whole = [torch.cat(tensors).requires_grad_() for tensors in whole]   # (B, ...) each
    logit_scale = logit_scales[0].detach().requires_grad_()
    loss = loss_of(*whole, logit_scale)
    loss.backward()                                                      # as far as the features
    # Class tokens have no gradient without --contrast.
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in whole]
    gradients = [x.chunk(num_passes) for x in gradients]
    for i in range(num_passes):
        # DDP averages gradients over the ranks at the end of a backward pass: once, in the last,
        # is enough. The gradient of logit_scale belongs to all passes: it, too, goes in once.
        is_last = i == num_passes - 1
        model.require_backward_grad_sync = is_last      # DDP's; without DDP nobody reads it
        scale_gradient = logit_scale.grad if is_last else torch.zeros_like(logit_scale)
        torch.autograd.backward(features(i), [*(x[i] for x in gradients), scale_gradient])
    return loss.detach()

def joined(tensors):
    """The passes' tensors as one, or None if they are None."""
    return None if tensors[0] is None else torch.cat(tensors)

def train_step_in_passes(config, clip, model, optimizer, batch, noise, progress, ema=None):
    """The update of `train_step` and what it returns, in --accum passes. With a range of ratios the
    CPU waits for the GPU once in each forward pass, two for each of --accum."""
    device = clip.logit_scale.device
    images = batch.images.to(device, non_blocking=True)  # as bytes: floats of the whole batch are too large
    decoded = batch.decoded.to(device, non_blocking=True)
    images = images.chunk(config.accum)
    tokens = batch.tokens.chunk(config.accum)
    noises = [None] * config.accum if noise is None else noise.chunk(config.accum)
    masks = []
    for i in range(config.accum):
        pixels = data.normalize(images[i])
        with autocast(config, device):
            masks.append(choose_patches(config, clip.visual, ema, pixels, noises[i], progress))
    keep, valid = zip(*masks)

    def features(i):
        pixels = data.normalize(images[i])
        with autocast(config, device):
            image, text, logit_scale = model(pixels, tokens[i], keep[i], valid[i])
        return image.float(), text.float(), logit_scale

    loss = backward_in_passes(model, features, config.accum, partial(clip_loss, decoded=decoded))
    grad_norm = update(config, clip, optimizer, ema, progress)
    keep = joined(keep)
    valid = joined(valid)
    return step_numbers(config, clip, loss, grad_norm, keep, valid), keep, valid

# -----------------------------------------------------------------------------
# Two views (A-CLIP, SLIP). Skip this chapter unless you compare methods. With --views 2, each
# image is cropped twice, both views are masked, and the CLIP loss is the mean over both.
# --contrast compares the views: heads see the class tokens of all ranks and passes, everywhere
# alike and outside DDP, so that batch norm is that of the whole global batch. Letters here: b the
# images of one pass, N the pairs of all ranks.

def nt_xent(a, b, temperature=0.1):
    """SimCLR's loss (Chen et al. 2020); features (N, E) of both views of the gathered batch, not
    normalised. Each of the 2N views has to find the other view of its image among the 2N - 1 other
    views: the mean."""
    N = len(a)
    z = F.normalize(torch.cat([a, b]), dim=-1)                           # (2N, E)
    logits = (z @ z.T / temperature).fill_diagonal_(-math.inf)     # no view is compared with itself
    partners = torch.arange(2 * N, device=a.device).roll(N)              # view i's is i + N or i - N
    return F.cross_entropy(logits, partners)

def byol(prediction, target):
    """BYOL's loss (Grill et al. 2020): mean 2 - 2 cos of features (N, E); the target gets no
    gradient."""
    return (2 - 2 * F.cosine_similarity(prediction, target.detach(), dim=-1)).mean()

def head(*widths):
    """Linear layers of these widths with batch norm and ReLU between; batch norm needs no bias
    before it."""
    layers = []
    for before, after in zip(widths, widths[1:-1]):
        layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))

class Heads(nn.Module):
    """What --contrast trains beside the towers; for ViT-B the widths are A-CLIP's."""
    def __init__(self, config):
        super().__init__()
        D = tower_sizes(config.model)[0]
        wide = 4096 if D >= 768 else 4 * D
        self.contrast = config.contrast
        if "simclr" in config.contrast:
            self.simclr = head(D, wide, wide, 256)
        if "byol" in config.contrast:
            self.projector = head(D, wide, 256)
            self.predictor = head(256, wide, 256)
            self.teacher = copy.deepcopy(self.projector).requires_grad_(False)  # its EMA

    def forward(self, class_tokens, taught, decoded):
        """SimCLR's loss of the class tokens (B, 2, D) of two views, plus BYOL's of both views: the
        weights of A-CLIP's release. taught (B, D): the EMA encoder's class tokens, for BYOL. All ranks
        together, without the pairs that are not decoded (B,) bool; they have to be counted, so the
        CPU waits for the GPU."""
        decoded = gather(decoded)
        views = gather(class_tokens)[decoded]                            # (N, 2, D)
        first, second = views.unbind(1)
        loss = 0
        if "simclr" in self.contrast:
            loss = loss + nt_xent(self.simclr(first), self.simclr(second))
        if "byol" in self.contrast:
            target = self.teacher(gather(taught)[decoded])
            for view in (first, second):
                loss = loss + byol(self.predictor(self.projector(view)), target)
        return loss

class TwoViews(nn.Module):
    """CLIP as this chapter needs it, with class tokens; DDP wraps it in place of CLIP."""
    def __init__(self, clip):
        super().__init__()
        self.clip = clip

    def forward(self, images, tokens, keep, valid):
        """Of images (2b, 3, H, W), the views of an image one after the other: class tokens
        (b, 2, D), image features (b, 2, E), then text features (b, E) and exp(logit_scale). keep,
        valid (2b, K) or None."""
        class_tokens = self.clip.visual(images, keep, valid).unflatten(0, (-1, 2))
        image_features = class_tokens @ self.clip.visual.proj
        return class_tokens, image_features, self.clip.encode_text(tokens), self.clip.logit_scale.exp()

def cut_attention(attention, boxes, side):
    """Attention (B, L) to the patches of pictures, resampled to the patches of cut-outs: (B,
    side ** 2). boxes (B, 4) say where these lie: left, top, right, bottom in [0, 1]."""
    left, top, right, bottom = boxes.to(attention).unbind(1)             # (B,) each
    centers = (torch.arange(side, device=attention.device) + 0.5) / side  # of the cut-out's patches
    x = left[:, None] + centers * (right - left)[:, None]                # (B, side), in the picture
    y = top[:, None] + centers * (bottom - top)[:, None]
    x = x[:, None, :].expand(-1, side, -1)                               # (B, side, side)
    y = y[:, :, None].expand(-1, -1, side)
    where = 2 * torch.stack([x, y], dim=-1) - 1                    # grid_sample counts from -1 to 1
    grid = math.isqrt(attention.shape[1])
    full = attention.view(-1, 1, grid, grid)
    return F.grid_sample(full, where, padding_mode="border", align_corners=False).flatten(1)

@torch.no_grad()
def choose_patches_of_views(config, visual, ema, views, around, boxes, noise, progress):
    """As `choose_patches`, of views (2b, 3, H, W), those of an image one after the other. The EMA
    encoder looks once at the pictures around both views, (b, 3, H, W), in which they lie in boxes
    (2b, 4); its attention is cut to each view, and its class tokens (b, D), or None, are returned,
    too."""
    attention, taught = None, None
    if ema is not None and (noise is not None or "byol" in config.contrast):
        attention, taught = class_attention(ema, around, config.ema_size)
        side = config.image_size // config.patch_size
        attention = cut_attention(attention.repeat_interleave(2, dim=0), boxes, side)
        taught = taught.float()
    if config.mask == "attentive" and noise is not None:
        keep, valid = make_mask("attentive", views, config.ratio, patch_size=config.patch_size,
                                noise=noise, attention=attention)
    else:
        keep, valid = choose_patches(config, visual, None, views, noise, progress)
    return keep, valid, taught

def two_view_step(config, clip, model, optimizer, batch, noise, progress, ema=None, heads=None):
    """The update of `train_step` with two views, in one pass or many. batch.images is
    (B, 3, 3, H, W), see `data.two_views`: both views and the picture around them. noise (2B, 2, L);
    model TwoViews(clip) or that in DDP; ema is there for attentive and for BYOL. The CPU waits for
    the GPU once for simclr, twice for byol or both; a range of ratios adds the waits of the plain
    step."""
    device = clip.logit_scale.device
    images = batch.images.to(device, non_blocking=True)
    decoded = batch.decoded.to(device, non_blocking=True)                           # (B,)
    boxes = batch.boxes.to(device, non_blocking=True).flatten(0, 1)                 # (2B, 4)
    views = images[:, :2].flatten(0, 1).chunk(config.accum)                         # (2b, 3, H, W) each
    arounds = images[:, 2].chunk(config.accum)                                      # (b, 3, H, W) each
    boxes = boxes.chunk(config.accum)
    tokens = batch.tokens.chunk(config.accum)
    noises = [None] * config.accum if noise is None else noise.chunk(config.accum)
    found = []
    for i in range(config.accum):
        pixels = data.normalize(views[i])
        around = data.normalize(arounds[i])
        with autocast(config, device):
            found.append(choose_patches_of_views(config, clip.visual, ema, pixels, around, boxes[i],
                                                 noises[i], progress))
    keep, valid, taught = zip(*found)
    taught = joined(taught)

    def features(i):
        pixels = data.normalize(views[i])
        with autocast(config, device):
            class_tokens, image, text, logit_scale = model(pixels, tokens[i], keep[i], valid[i])
        return class_tokens.float(), image.float(), text.float(), logit_scale

    def loss_of(class_tokens, image, text, logit_scale):
        first = clip_loss(image[:, 0], text, logit_scale, decoded)
        second = clip_loss(image[:, 1], text, logit_scale, decoded)
        loss = (first + second) / 2
        if config.contrast:
            loss = loss + heads(class_tokens, taught, decoded)
        return loss

    if config.accum == 1:
        loss = loss_of(*features(0))
        loss.backward()
    else:
        loss = backward_in_passes(model, features, config.accum, loss_of)
    grad_norm = update(config, clip, optimizer, ema, progress)
    if "byol" in config.contrast:  # the projector, too, has an EMA copy
        update_ema(heads.teacher, heads.projector, progress)
    keep, valid = joined(keep), joined(valid)
    return step_numbers(config, clip, loss, grad_norm, keep, valid), keep, valid

# -----------------------------------------------------------------------------
# The run: everything around the steps. Order, crops and masks depend only on seed and step. So no
# random generator is saved, and a resumed run continues as if it had never stopped.

@dataclass
class Run:
    """What a training process holds."""
    config: Config
    device: torch.device
    shards: list              # paths
    index: np.ndarray         # (samples,) of data.INDEX
    tokenizer: data.Tokenizer
    chances: dict             # of --text-tokens: {word: its chance to go first}
    clip: CLIP
    model: nn.Module          # what a step calls: clip, TwoViews(clip), or one of them in DDP
    optimizer: torch.optim.Optimizer
    ema: Any                  # the teacher, a VisionTransformer, or None
    heads: Heads              # empty without --contrast
    train_step: Any           # one of the three functions above
    global_batch: int         # images per step, of all ranks
    steps_per_epoch: int      # the last, incomplete batch is dropped
    total_steps: int
    masked_steps: int         # see end_of_masks
    step: int                 # how many are done
    record: Any               # the last line of the log, or None
    lock: Any                 # see claim; rank 0 alone has it
    rehearsed: bool = False   # see rehearse

    @property
    def num_epochs(self):
        """How many epochs are at least begun."""
        return math.ceil(self.total_steps / self.steps_per_epoch)

def claim(config):
    """Makes --out the folder of this run; returns a file that is locked until this process ends.
    ValueError if another process trains there, or if it holds the checkpoint of a run that we do
    not go on with."""
    import fcntl  # here, as Windows lacks it, where evaluate.py works
    lock = open(f"{config.out}/.lock", "w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(f"--out {config.out}: another process trains there; name another folder, or "
                         "remove its .lock if that process's machine is gone") from None
    except OSError:
        print(f"warning: --out {config.out}: its disk cannot lock files; start no second run there")
    path = f"{config.out}/ckpt.pt"
    if os.path.exists(path) and not (config.resume and os.path.samefile(config.resume, path)):
        then = evaluate.read_checkpoint(path)
        holds = "ckpt.pt"
        if "merges" in then:
            holds = f"run (mask {then['config']['mask']}, step {then['step']})"
        raise ValueError(f"--out {config.out}: holds a {holds}; go on with it by --resume {path}, "
                         "or name another --out")
    return lock

def load_data(config):
    """Shard paths and their index, (N,) of data.INDEX. ValueError if too much of them is broken."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0  # torchrun numbers the processes of each machine
    if dist.is_initialized() and not first:
        dist.barrier()  # the first process of the machine draws and indexes; then the others read its files
    if not config.data:
        data.make_demo("demo")
    shards = data.expand(config.data or ("demo/train/*.tar",))
    rank, _ = ranks()
    index, warnings = data.build_index(shards, config.max_bad, config.out, config.workers, rank == 0)
    if dist.is_initialized() and first:
        dist.barrier()
    if rank == 0:
        for line in warnings:
            print("warning:", line)
    return shards, index

def load_tokenizer(config, state, shards, index):
    """The tokenizer of the checkpoint, of --vocab, or one that learns its merges from the
    captions."""
    if state:
        return data.Tokenizer(state["merges"], config.context_length)
    if config.vocab:
        return data.Tokenizer.from_file(config.vocab, config.context_length)
    rank, _ = ranks()
    num_merges = config.vocab_size - data.Tokenizer("").vocab_size
    captions = data.sample_captions(shards, index)
    return data.Tokenizer(data.learn_merges(captions, num_merges, progress=rank == 0), config.context_length)

def build(config, state, device):
    """(clip, model, optimizer, ema, heads), see Run: new ones, or as the checkpoint `state` has
    them."""
    torch.manual_seed(config.seed)  # on all ranks: heads, which are outside DDP, then start alike everywhere
    clip = CLIP(config).to(device)
    heads = Heads(config).to(device)
    if state:
        weights = dict(state["model"])
        if config.init and not config.resume:  # perhaps at another --image-size
            name = "visual.positional_embedding"
            grid = resize_positions(weights[name][1:], config.num_patches)
            weights[name] = torch.cat([weights[name][:1], grid])
        try:
            clip.load_state_dict(weights)
        except RuntimeError as error:
            cause = str(error).splitlines()[-1].strip()
            raise ValueError(f"{config.resume or config.init}: does not fit this model: {cause}") from None
    ema = None
    if config.mask == "attentive" or "byol" in config.contrast:
        ema = copy.deepcopy(clip.visual)
    optimizer = make_optimizer(config, clip, heads)
    if state.get("optimizer"):
        optimizer.load_state_dict(state["optimizer"])
        optimizer.param_groups[0]["weight_decay"] = config.weight_decay  # it may be a new one
    if ema is not None and state.get("ema"):
        ema.load_state_dict(state["ema"])
    if state.get("heads"):
        heads.load_state_dict(state["heads"])
    if config.compile:
        torch._dynamo.config.cache_size_limit = 32  # versions of a function: we need 12, the default is 8
        for block in (*clip.visual.transformer.resblocks, *clip.transformer.resblocks):
            block.compile()
    model = TwoViews(clip) if config.views == 2 else clip
    _, world_size = ranks()
    if world_size > 1:  # no device_ids: with them DDP would copy the tokens to the GPU
        model = nn.parallel.DistributedDataParallel(model)
    return clip, model, optimizer, ema, heads

def check_ranks_agree(config, state, index, merges):
    """ValueError if another rank has another state, data or options, as on machines without a
    shared disk."""
    _, world_size = ranks()
    if world_size == 1:
        return
    weights = 0
    for x in state.get("model", {}).values():
        weights = zlib.crc32(x.contiguous().numpy(), weights)
    folders = [evaluate.read_folder(folder)[1:] for folder in config.val]  # without their paths
    mine = {"steps done": state.get("step", 0), "checksum of the weights": weights,
            "samples": len(index), "checksum of the samples": data_sum(index),
            "checksum of the merges": zlib.crc32(merges.encode()),
            "checksum of --val": zlib.crc32(repr(folders).encode())} | asdict(config)
    for name in ("data", "val", "out", "resume", "init", "vocab", "workers"):  # paths and loading may differ
        del mine[name]
    everyone = [None] * world_size
    dist.all_gather_object(everyone, mine)
    for rank, theirs in enumerate(everyone):
        for name, value in everyone[0].items():
            if theirs[name] != value:
                raise ValueError(f"{name}: {theirs[name]} on rank {rank}, {value} on rank 0; all machines "
                                 "need the same command, data and checkpoint")

def prepare(config, state, device):
    """A run, new or as the checkpoint `state` has it. Checks what can be checked before work
    starts."""
    rank, world_size = ranks()
    for folder in config.val:
        if config.data or folder not in DEMO["val"]:  # the demo's may have yet to be drawn
            evaluate.read_folder(folder)
    os.makedirs(config.out, exist_ok=True)  # each machine keeps an index there
    lock = claim(config) if rank == 0 else None
    shards, index = load_data(config)
    global_batch = config.batch_size * config.accum * world_size
    if global_batch > len(index):
        raise ValueError(f"--batch-size: {global_batch} images per step, but only {len(index)} samples")
    if state.get("global_batch", global_batch) != global_batch:
        raise ValueError(f"--resume {config.resume}: had {state['global_batch']} images per step "
                         f"(ranks x batch x accum), now there are {global_batch}")
    if state.get("num_samples", len(index)) != len(index):
        raise ValueError(f"--resume {config.resume}: had {state['num_samples']} samples, now there are "
                         f"{len(index)}")
    steps_per_epoch = len(index) // global_batch
    total_steps = config.steps or config.epochs * steps_per_epoch
    step = state.get("step", 0)
    if step > total_steps:
        raise ValueError(f"--resume {config.resume}: step {step} is done, {total_steps} were asked for; "
                         "raise --epochs or --steps")
    tokenizer = load_tokenizer(config, state, shards, index)
    config.vocab_size = tokenizer.vocab_size
    chances = {}
    if config.text_tokens:
        chances = data.word_chances(data.sample_captions(shards, index))
    check_ranks_agree(config, state, index, tokenizer.merges)
    clip, model, optimizer, ema, heads = build(config, state, device)
    step_function = train_step if config.accum == 1 else train_step_in_passes
    if config.views == 2:
        step_function = partial(two_view_step, heads=heads)
    return Run(config=config, device=device, shards=shards, index=index, tokenizer=tokenizer, chances=chances,
               clip=clip, model=model, optimizer=optimizer, ema=ema, heads=heads, train_step=step_function,
               global_batch=global_batch, steps_per_epoch=steps_per_epoch, total_steps=total_steps,
               masked_steps=end_of_masks(config, total_steps, steps_per_epoch), step=step,
               record=state.get("record"), lock=lock)

def save(run, name):
    """Rank 0 writes a checkpoint to --out. OSError if it can't be, ValueError if the training has
    diverged; the one from before is then whole."""
    rank, _ = ranks()
    if rank > 0:
        return
    if not all(weights.isfinite().all() for weights in run.clip.parameters()):
        raise ValueError(f"step {run.step}: the weights are not finite; no checkpoint holds this step")
    state = dict(model=run.clip.state_dict(), optimizer=run.optimizer.state_dict(),
                 ema=None if run.ema is None else run.ema.state_dict(),
                 heads=run.heads.state_dict(),
                 config=asdict(run.config), merges=run.tokenizer.merges, step=run.step, record=run.record,
                 progress=run.step / run.total_steps, global_batch=run.global_batch,
                 num_samples=len(run.index), data_sum=data_sum(run.index))
    with data.write_whole(os.path.join(run.config.out, name)) as file:
        torch.save(state, file)

def data_sum(index):
    """A number that other samples change; the same ones in another folder do not."""
    return zlib.crc32(index)

def open_log(path, run):
    """The log, open for appending, without what comes after the checkpoint, to be repeated. At the
    end of an epoch the evaluation is repeated, too: the run may have died in it."""
    kept = []
    at_end = run.step % run.steps_per_epoch == 0 or run.step == run.total_steps
    if run.step and os.path.exists(path):
        for record in evaluate.read_log(path):
            repeated = at_end and "eval" in record
            if record["step"] < run.step or record["step"] == run.step and not repeated:
                kept.append(record)
    with data.write_whole(path) as file:
        file.writelines(f"{json.dumps(record)}\n".encode() for record in kept)
    return open(path, "a", buffering=1)

def write_record(log, record):
    """Adds a line of json to the log. OSError that names its file if it can't be."""
    try:
        log.write(json.dumps(record) + "\n")
    except OSError as error:
        raise OSError(f"{log.name}: {error.strerror}") from None

def epoch_loader(run, epoch, steps):
    """A DataLoader of this rank's batches `steps`, a range, of an epoch."""
    config = run.config
    rank, world_size = ranks()
    order = data.epoch_order(run.index, config.seed, epoch)
    order = order[:run.steps_per_epoch * run.global_batch]
    order = order.reshape(run.steps_per_epoch, world_size, -1)[:, rank]  # (steps, this rank's samples)
    batches = data.Batches(config, run.shards, run.index, order, run.tokenizer, epoch, run.chances,
                           num_masked=run.masked_steps - epoch * run.steps_per_epoch)
    start_method = None  # Python's own
    if config.workers and sys.platform == "linux":
        start_method = "fork"  # all workers share one index in memory
    # The range is the sampler: batch number 7 is made first if 7 steps of the epoch are done.
    return torch.utils.data.DataLoader(
        batches, batch_size=None, sampler=steps, pin_memory=torch.cuda.is_available(),
        num_workers=config.workers, multiprocessing_context=start_method, worker_init_fn=data.ignore_signals)

def over_ranks(values, device):
    """The sum over all ranks of a list of numbers. Waits for the GPU."""
    values = torch.tensor([float(value) for value in values], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(values)
    return values.tolist()

def rehearse(run, batch):
    """Makes the step of this run that needs most memory, without an update: one on whole images,
    if the run ends with them, or one that keeps as much as its range allows. A card that is too
    small then says so in the first minute and not after days."""
    config = run.config
    ends_whole = config.mask != "none" and run.masked_steps < run.total_steps
    if not ends_whole and len(config.ratio) == 1:
        return  # all steps are alike
    noise = None
    if not ends_whole:
        config = replace(config, ratio=config.ratio[:1])
        noise = step_noise(config, 0, run.global_batch * config.views, run.device)
    more = {}
    if config.views == 2:
        more["heads"] = copy.deepcopy(run.heads)  # for the statistics of batch norm
    no_update = torch.optim.SGD(run.clip.parameters(), lr=0.0)
    run.train_step(config, run.clip, run.model, no_update, batch, noise, 0.0, copy.deepcopy(run.ema), **more)

def take_step(run, batch):
    """The step that comes next, number run.step from 0 on: the learning rate, then what the step's
    function returns."""
    config = run.config
    lr = learning_rate(config, run.step, run.total_steps)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    noise = None
    if config.mask != "none" and run.step < run.masked_steps:
        noise = step_noise(config, run.step, run.global_batch * config.views, run.device)
    progress = run.step / run.total_steps
    numbers, keep, valid = run.train_step(config, run.clip, run.model, run.optimizer, batch, noise,
                                          progress, run.ema)
    return lr, numbers, keep, valid

def train_epoch(run, epoch, log, requests):
    """The losses of the steps to the end of the epoch; each adds its record to `log`, a line of
    json. ValueError if too many samples do not decode; SystemExit if `requests` holds a signal on
    any rank."""
    config = run.config
    rank, world_size = ranks()
    begin = epoch * run.steps_per_epoch
    steps = range(run.step - begin, min(run.steps_per_epoch, run.total_steps - begin))
    bar = tqdm(epoch_loader(run, epoch, steps), f"epoch {epoch + 1}/{run.num_epochs}", steps.stop,
               initial=steps.start, disable=rank > 0, leave=False, unit=" steps")
    losses = []
    num_lost = 0
    causes = Counter()
    start = time.perf_counter()
    for batch in bar:
        if batch.fault:
            raise OSError(batch.fault)
        lr, numbers, keep, valid = take_step(run, batch)
        if not losses and rank == 0 and (keep is not None or config.mask == "none"):
            seen = batch.images
            if config.views == 2:
                seen = seen[:, :2].flatten(0, 1)  # both views of an image side by side
            evaluate.draw_masks(f"{config.out}/masks.png", seen[:8], keep, valid, config.patch_size)
        if run.device.type == "cuda" and not run.rehearsed:  # AdamW's moments are now in memory, too
            rehearse(run, batch)
            run.rehearsed = True
        run.step += 1
        *sums, lost, requested = over_ranks([*numbers.values(), len(batch.lost), len(requests)], run.device)
        now = time.perf_counter()
        images_per_s = run.global_batch / (now - start)
        start = now
        run.record = dict(step=run.step, epoch=epoch + 1, lr=lr, images_per_s=round(images_per_s, 1))
        for name, total in zip(numbers, sums):
            run.record[name] = total / world_size
        losses.append(run.record["loss"])
        # A signal to one rank stops all of them after this step.
        due = requested or run.step % config.save_every == 0 or len(losses) == len(steps)
        causes.update(batch.lost)
        num_lost += int(lost)
        num_read = len(losses) * run.global_batch
        whole_epoch = len(losses) == run.steps_per_epoch
        # Broken samples may lie in one shard: it needs ten shards' worth, or an epoch, to judge.
        allowed = config.max_bad * (num_read if whole_epoch else max(num_read, 10 * data.WINDOW))
        if lost == run.global_batch or num_lost > allowed:
            raise ValueError(f"{skipped_lines(epoch, num_lost, num_read, causes)}\n"
                             f"more than --max-bad {config.max_bad}, or a batch without a pair")
        if not math.isfinite(losses[-1]):
            raise ValueError(f"step {run.step}: the loss is {losses[-1]}; no checkpoint holds this step")
        write_record(log, run.record)
        bar.set_postfix_str(f"loss {losses[-1]:.3f}, {images_per_s:.0f} images/s", refresh=False)
        if due:
            save(run, "ckpt.pt")
        if requested:
            stop(run)
    if num_lost and rank == 0:
        print(skipped_lines(epoch, num_lost, num_read, causes))
    return losses

def skipped_lines(epoch, num_lost, num_read, causes):
    """How many samples did not decode on all ranks, and the most frequent causes on this one."""
    rank, _ = ranks()
    lines = [f"epoch {epoch + 1}: {num_lost} of {num_read} samples skipped; rank {rank}:"]
    for cause, number in causes.most_common(10):
        lines.append(f"{number:8}  {cause}")
    return "\n".join(lines)

def stop(run):
    """Ends this process as a signal has asked for; the checkpoint has been written."""
    if dist.is_initialized():
        dist.barrier()  # torchrun kills the others when one ends: wait for rank 0's checkpoint
    rank, _ = ranks()
    path = f"{run.config.out}/ckpt.pt"
    line = f"stopped after step {run.step} of {run.total_steps}; go on with --resume {path}"
    sys.exit(line if rank == 0 else 1)

def opening_line(run):
    """What will happen, for the first line of a run."""
    config = run.config
    _, world_size = ranks()
    L = config.num_patches
    millions = sum(p.numel() for p in run.clip.parameters()) / 1e6
    removed = "0"
    if config.mask != "none":
        removed = " to ".join(str(round(share * L)) for share in config.ratio)
    whole = run.total_steps - run.masked_steps
    return (f"{config.model}, {millions:.1f}M parameters | {run.device.type}, {config.precision} | "
            f"{world_size} x {run.global_batch // world_size} images, {run.steps_per_epoch} steps per epoch, "
            f"{run.masked_steps} with mask {config.mask}, {removed} of {L} patches removed, "
            f"{whole} on whole images")

def resume_line(run, state):
    """What a resumed run goes on from, and what differs from the run so far."""
    config = run.config
    line = f"going on after step {run.step} of {config.resume}"
    for name, value in asdict(config).items():
        then = state["config"].get(name, value)
        if name not in ("resume", "out", "show_masks", "vocab_size") and then != value:
            line += f"; --{name.replace('_', '-')} {value} (was {then})"
    if state.get("data_sum", data_sum(run.index)) != data_sum(run.index):
        line += "; the data differ from those of the run so far"
    before = state["record"]["lr"]
    if run.step < run.total_steps:
        lr = learning_rate(config, run.step, run.total_steps)
        if lr > 2 * before:
            line += f"; the learning rate jumps from {before:.2g} to {lr:.2g}"
    return line

def train(config, state, device):
    """Trains as `config` says, from `state` on. Returns whether a folder failed in the last
    evaluation."""
    run = prepare(config, state, device)
    rank, _ = ranks()
    requests = []

    def request(number, frame):
        """Notes that this process was asked to stop: it does so after a step, or a folder's
        evaluation."""
        requests.append(number)
        if rank == 0 and sys.__stderr__:  # not print, which the signal may have interrupted
            with suppress(OSError):
                os.write(2, f"\n{signal.Signals(number).name}: stopping soon, with a checkpoint\n".encode())

    data.hear_signals(request)
    log = open(os.devnull, "w")
    if rank == 0:
        if config.resume:
            print(resume_line(run, state), flush=True)
        print(opening_line(run), flush=True)
        log = open_log(f"{config.out}/log.jsonl", run)
    state.clear()  # free the checkpoint: its tensors have been copied
    start = time.perf_counter()
    first = run.step
    results = {}
    # After --resume from the end of an epoch, no step is left of it, but its evaluation may be
    # missing: that is why the last step that is done, and not the next one, says which epoch comes
    # first.
    for epoch in range(max(0, run.step - 1) // run.steps_per_epoch, run.num_epochs):
        losses = train_epoch(run, epoch, log, requests)
        if not losses:  # the checkpoint to go on from may lie in another folder
            save(run, "ckpt.pt")
        if config.keep_epochs:
            save(run, f"epoch_{epoch + 1}.pt")
        results = evaluate.evaluate_all(run.clip, run.tokenizer, config, config.val, requests)
        if len(results) < len(set(config.val)):  # a request to stop; --resume evaluates anew
            stop(run)
        if results:
            write_record(log, run.record | dict(eval=results))
        if run.step < run.total_steps and over_ranks([len(requests)], run.device)[0]:
            stop(run)
        if rank > 0:
            continue
        if results or losses:
            evaluate.draw_curves(f"{config.out}/curves.png", [f"{config.out}/log.jsonl"])
        if losses:
            minutes = (time.perf_counter() - start) / 60
            to_go = minutes * (run.total_steps - run.step) / (run.step - first)
            line = f"epoch {epoch + 1}: mean loss {np.mean(losses):.3f}, "
            names = evaluate.tell_apart(results)
            for name, value in evaluate.first_metrics(results, names).items():
                line += f"{name} {100 * value:.1f}, "
            print(f"{line}{minutes:.1f} minutes, {to_go:.1f} to go", flush=True)
    if rank == 0:
        if results:
            print(evaluate.table(results))
        print(f"wrote {config.out}/ckpt.pt; now: python evaluate.py {config.out}/ckpt.pt")
    return any("failed" in metrics for metrics in results.values())

# -----------------------------------------------------------------------------
# Pictures of masks, and main.

@torch.no_grad()
def pgs_tiles(config, visual, images, pixels, noise, progress):
    """[(picture, text)]: the steps by which pgs chooses the patches of one image, (1, 3, H, W) as
    for the model and as uint8 pixels, by the functions that training calls."""
    P = config.patch_size
    size = config.image_size
    edges = sobel_edges(images, P)                                     # (1, L)
    candidates = pgs_candidates(edges if config.edges else torch.zeros_like(edges), noise[:, 0])
    embeddings = visual.patch_tokens(images) if config.embeddings else None
    similarity = patch_similarity(images, P, embeddings, alpha_at(progress))   # (1, L, L)
    score = pgs_score(similarity, candidates, config.transport)        # (1, L)
    return [(pixels[0], "photograph"),
            (evaluate.heat_map(edges, size), "1 edges"),
            (evaluate.frame_patches(pixels[0], candidates[0], P), "2 candidates"),
            (evaluate.heat_map(score.clamp(min=0), size), "3, 4 similarity"),
            (evaluate.heat_map((score > SIMILAR).float(), size), f"{(score > SIMILAR).sum()} are similar")]

def show_masks(config, state):
    """Writes two pictures to --out, each with a row per photograph: masks.png, what every mask
    keeps of it, and steps.png, how pgs chose. With the checkpoint `state` of --resume, the encoder
    is a trained one."""
    clip, _, _, teacher, _ = build(config, state, "cpu")
    if teacher is None:
        teacher = clip.visual
    P = config.patch_size
    size = config.image_size
    progress = state.get("progress", 0.0)
    names = [name for name in MASKS if name != "none" and (len(config.ratio) == 1 or name in COUNTING)]
    generator = torch.Generator().manual_seed(config.seed)
    masks = []
    steps = []
    for path in config.show_masks:
        pixels = evaluate.read_image(evaluate.Sample(path), size, upright=True)[None]
        images = data.normalize(pixels)                                # (1, 3, H, W)
        attention, _ = class_attention(teacher, images, config.ema_size)
        masks.append((pixels[0], "photograph"))
        masks.append((evaluate.heat_map(sobel_edges(images, P), size), "Sobel edges"))
        masks.append((evaluate.heat_map(attention, size), "class attention"))
        for name in names:
            noise = torch.rand(1, 2, config.num_patches, generator=generator)
            keep, valid = choose_patches(replace(config, mask=name), clip.visual, teacher, images, noise,
                                         progress)
            picture = evaluate.hide_removed(pixels, keep, valid, P)[0]
            masks.append((picture, name))
            if name == "pgs":
                steps += pgs_tiles(config, clip.visual, images, pixels, noise, progress)
                steps.append((picture, "5 what stays"))
    os.makedirs(config.out, exist_ok=True)
    evaluate.sheet(f"{config.out}/masks.png", masks, columns=3 + len(names))
    evaluate.sheet(f"{config.out}/steps.png", steps, columns=6)
    if len(config.ratio) == 2:
        left_out = [name for name in MASKS[1:] if name not in COUNTING]
        print(f"{', '.join(left_out)} left out: they take one --ratio, not a range")
    if not state:
        print("the encoder is untrained; --resume shows a trained one")
    print(f"wrote {config.out}/masks.png, and how pgs chose: {config.out}/steps.png")

def make_parser():
    """The command line: an option for each field of Config."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     epilog=f"Without --data, the demo has other defaults: {DEMO}")
    for option in fields(Config):
        name = "--" + option.name.replace("_", "-")
        shown = option.default
        if isinstance(shown, tuple):
            shown = " ".join(map(str, shown))
        meaning = f"{option.metadata['help']} (default: {'none' if shown == '' else shown})"
        if isinstance(option.default, bool):
            how = dict(action=argparse.BooleanOptionalAction)
        elif isinstance(option.default, tuple):
            how = dict(metavar="X", nargs="+", type=float if option.default else str)
        elif option.name == "resume":
            how = dict(metavar="X", nargs="?")
        else:
            how = dict(metavar="X", type=type(option.default))
        parser.add_argument(name, default=option.default, help=meaning, **how)
    return parser

# What a run keeps: the shapes of its weights, its tokenizer.
FIXED = "model image_size patch_size context_length contrast vocab vocab_size init".split()

def parse(arguments):
    """(Config, checkpoint to go on from or {}) of a command line. Without --data, DEMO takes the
    place of the defaults. With --resume, the options of its run do; with --init, the size of its
    model."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    state = {}
    if not options.data and not options.show_masks:
        parser.set_defaults(**DEMO)
    if options.resume is None:  # --resume without a file
        options.resume = os.path.join(options.out, "ckpt.pt")
        if not os.path.exists(options.resume):
            if int(os.environ.get("RANK", 0)) == 0:
                print(f"no checkpoint in {options.out}: a new run")
            options.resume = ""
    if options.resume:
        state = evaluate.read_checkpoint(options.resume)
        if not {"model", "optimizer", "config", "merges", "record"} <= state.keys():
            raise ValueError(f"--resume {options.resume}: weights only, no state of a run; see --init")
        # An older run may have options that are gone.
        parser.set_defaults(**{name: value for name, value in state["config"].items() if name in options})
        parser.set_defaults(out=os.path.dirname(options.resume) or ".")
    elif options.init:  # the weights and the tokenizer, not the state of a run
        clip, tokenizer, then = evaluate.load(options.init, options.vocab, options.quick_gelu)
        state = dict(model=clip.state_dict(), merges=tokenizer.merges)
        for name in ("model", "image_size", "patch_size", "context_length", "vocab_size", "quick_gelu"):
            parser.set_defaults(**{name: getattr(then, name)})
    # Once more, with the new defaults: what was typed wins over them.
    options = vars(parser.parse_args(arguments)) | dict(resume=options.resume)
    for name, value in options.items():
        if isinstance(value, list):
            options[name] = tuple(value)
    if options["resume"]:
        kept = options | state["config"]
        if options["steps"] and options["epochs"] != kept["epochs"]:
            raise ValueError(f"--epochs {options['epochs']}: the run's --steps decides; pass --steps 0, too")
        if options["vocab_size"] > kept["vocab_size"]:  # a limit, which the run's captions did not reach
            options["vocab_size"] = kept["vocab_size"]
        for name in FIXED:  # a job's script may repeat these options, but not change them
            if options[name] != kept[name]:
                raise ValueError(f"--{name.replace('_', '-')} {options[name]}: the run that goes on has "
                                 f"{kept[name]}, which cannot change")
    return Config(**options), state

def start(arguments):
    """What a command line asks for. Returns whether a folder could not be evaluated. SystemExit,
    ValueError and other errors say what went wrong."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    data.hear_signals(signal.default_int_handler)  # as Ctrl-C, until training begins
    config, state = parse(arguments)
    check(config)
    if config.show_masks:
        show_masks(config, state)
        return False
    if int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "WORLD_SIZE" not in os.environ:
        raise ValueError("SLURM_NTASKS: each task would train alone; use torchrun, a task per machine")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        # Every process checks this for itself. If only the last one failed, the others would wait for
        # it in init_process_group.
        processes = max(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), device.index + 1)
        if processes > torch.cuda.device_count():
            raise ValueError(f"--nproc_per_node {processes}: each process needs a GPU of its own; GPUs "
                             f"here: {torch.cuda.device_count()}")
        torch.cuda.set_device(device)
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            config.precision = "fp32"  # an old card; the first line of the run says so
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each length; flash does not
    if not config.precision:
        config.precision = "bf16" if device.type == "cuda" else "fp32"
    if world_size > 1:
        on_gpu = device.type == "cuda"
        # Two hours: one process may have to read the shards of a large data set first.
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(hours=2),
                                device_id=device if on_gpu else None)
    return train(config, state, device)

def main():
    """Entry point, one process per rank under torchrun: returns the exit status."""
    rank = int(os.environ.get("RANK", 0))
    try:
        return int(start(sys.argv[1:]))
    except SystemExit as stopped:  # argparse or `stop` has said why
        if isinstance(stopped.code, str):
            print(stopped.code, file=sys.stderr)
            return 1
        return stopped.code or 0
    except (Exception, KeyboardInterrupt) as error:
        line = data.message(error)  # "" for a bug, or for the end of the connection to a rank that has failed
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            # torchrun ends all ranks when one ends. A rank that failed alone must speak before
            # those that lost the connection to it. Of ranks that failed alike, rank 0 speaks and
            # the others wait.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(min(rank, 1) if line else 5)
        print(f"error: {line}" if line else traceback.format_exc(), file=sys.stderr)
        return 1

if __name__ == "__main__":
    sys.stdout = data.Unread(sys.stdout)
    sys.stderr = data.Unread(sys.stderr)
    tqdm.set_lock(threading.RLock())  # its own lock is for processes: on macOS, Python warns of it at the end
    status = main()
    sys.stdout.flush()
    if "IPython" in sys.modules:  # %run in a notebook, which is to live on
        sys.exit(status)
    # At once: a normal exit would wait for workers that ignore SIGTERM, and it can hang in NCCL or
    # gloo.
    os._exit(status)
