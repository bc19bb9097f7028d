"""CLIP-PGS: contrastive language-image pre-training on the half of the patches that matters, in one file.

    torchrun clip_pgs.py --mask pgs --ratio 0.5               the demo: draws its own data, minutes on a CPU
    torchrun --nproc_per_node 8 clip_pgs.py --data 'cc12m/{00000..01242}.tar' --mask pgs --val imagenet/
    python clip_pgs.py --resume                               go on with the run in out/
    python clip_pgs.py --show-masks photo.jpg --ratio 0.5     draw what each mask leaves of a photograph
    python clip_pgs.py --help                                 every option, its default and meaning

CLIP trains an image encoder and a text encoder so that a photograph and its caption get similar features.
Most of the cost is the image encoder, and most patches of an image repeat their neighbours. Six masks choose
which patches it sees: none (CLIP), random (FLIP), center (GLIP), cluster (E-CLIP), attentive (A-CLIP) and
pgs (CLIP-PGS, Pei et al., CVPR 2025, arXiv 2503.17080), which is what this file is about.

The story, top to bottom: config, masks, model, teacher, losses, optimizer, one step. A reader may stop there:
the rest is plumbing (the run, main). data.py reads shards, evaluate.py measures what was learned.
"""
import argparse
import copy
import fcntl
import itertools
import json
import math
import os
import re
import signal
import sys
import time
import traceback
from collections import Counter, OrderedDict
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
import evaluate

# -----------------------------------------------------------------------------
# Config. The one place for every knob: a field is a default, an option, and what the checkpoint stores. In
# brackets: where a default comes from. Release: CLIP-PGS's code, its recipe for CC12M. Ours: we chose it.

def knob(default, meaning, least=0):
    """A Config field with its help text and, if it is a number, its least value."""
    return field(default=default, metadata={"help": meaning, "least": least})

@dataclass
class Config:
    """The paper's run: ViT-B-16 at 224 on CC12M."""
    # data
    data: tuple = knob((), "training shards: paths, globs, brace ranges; none: the demo draws its own")
    val: tuple = knob((), "folders to evaluate after every epoch, in CLIP_benchmark's layout")
    vocab: str = knob("", "CLIP's bpe_simple_vocab_16e6.txt.gz; without it, captions teach the merges")
    vocab_size: int = knob(49408, "largest vocabulary to learn (CLIP)", least=514)
    max_bad: float = knob(0.1, "share of shards or samples that may be broken before the run stops (ours)")
    # model
    model: str = knob("ViT-B-16", "model size: ViT-B-16, ViT-S-16, ViT-L-16 or demo")
    image_size: int = knob(224, "side of the square input, pixels", least=1)
    patch_size: int = knob(16, "side of a patch, pixels", least=1)
    context_length: int = knob(77, "tokens a caption is cut to, with start and end (CLIP)", least=3)
    quick_gelu: bool = knob(False, "x * sigmoid(1.702 x) in place of GELU, as in OpenAI's own weights")
    # mask
    mask: str = knob("pgs", "patches to remove: none, random, center, cluster, attentive or pgs")
    ratio: tuple = knob((0.5,), "share of patches removed; two numbers: each image decides in between")
    edges: bool = knob(True, "pgs: propose patches without edges; off: any patch (paper's ablation)")
    transport: bool = knob(True, "pgs: balance the similarity by optimal transport (paper's ablation)")
    embeddings: bool = knob(True, "cluster, pgs: compare embeddings, too; off: pixels alone (E-CLIP)")
    ema_size: int = knob(0, "side of the EMA encoder's input, such as 112 (A-CLIP); 0: as the images")
    text_tokens: int = knob(0, "words' tokens of a caption; longer ones lose common words; 0: all (CLIPF)")
    views: int = knob(1, "crops of each image, each with its own mask: 1 or 2 (A-CLIP)", least=1)
    contrast: tuple = knob((), "with --views 2, losses between the views: simclr, byol or both (A-CLIP)")
    unmasked_epochs: float = knob(0.0, "epochs at the end on whole images (FLIP's unmasked tuning)")
    # optimization
    batch_size: int = knob(512, "images per rank and forward pass (release: 8 x 512 = 4096)", least=1)
    accum: int = knob(1, "passes per step: exactly the update of a batch this many times as large", least=1)
    epochs: int = knob(32, "passes over the data (paper)", least=1)
    steps: int = knob(0, "stop after this many optimizer steps instead; 0: epochs decide")
    lr: float = knob(1e-3, "peak learning rate, for a batch of 4096 (release)")
    warmup: int = knob(10_000, "steps of linear warm-up (release); at most a fifth of the run (ours)")
    weight_decay: float = knob(0.2, "decoupled weight decay of the weight matrices (CLIP)")
    grad_clip: float = knob(0.0, "largest norm of the gradient, which is then in the log; 0: any")
    scale: tuple = knob((0.9, 1.0), "area of the random crop, as a share of the image (open_clip)")
    # run
    seed: int = knob(0, "fixes the first weights, the order of the data, the crops and the masks")
    workers: int = knob(4, "processes per rank that read and decode; 0: the rank reads by itself")
    out: str = knob("out", "folder for ckpt.pt, log.jsonl, masks.png, curves.png and the shards' index")
    save_every: int = knob(1000, "steps between checkpoints; the end of an epoch writes one", least=1)
    keep_epochs: bool = knob(False, "keep the checkpoint of every epoch, as epoch_1.pt and so on")
    init: str = knob("", "weights to start from, of any kind that evaluate.py reads; they fix the model")
    resume: str = knob("", "checkpoint to go on from, with its run's options; alone: that in --out, if any")
    precision: str = knob("", "bf16 or fp32; without it, bf16 on a GPU that has it, else fp32")
    grad_checkpointing: bool = knob(False, "recompute activations in the backward pass, do not store them")
    compile: bool = knob(False, "fuse the layers by torch.compile; the first step of a size is slow")
    show_masks: tuple = knob((), "photographs: draw what every mask leaves to masks.png in --out, then stop")

# Width and layers of the image tower, of the text tower, size of the embedding; heads are 64 wide. B and L
# are CLIP's (Radford et al. 2021); S is DeiT's small ViT with a text tower of its width.
SIZES = {"ViT-B-16": "768x12-512x12-512", "ViT-S-16": "384x12-384x12-384", "ViT-L-16": "1024x24-768x12-768",
         "demo": "128x4-64x2-128"}
HEAD_WIDTH = 64

# What the demo changes, tuned together with its data on 2 CPU cores.
DEMO = dict(model="demo", image_size=48, patch_size=8, context_length=24, vocab_size=1024, batch_size=256,
            epochs=8, unmasked_epochs=1.5, lr=3e-3, warmup=50, workers=1,
            val=("demo/seen", "demo/unseen", "demo/retrieval"))

def tower_sizes(model):
    """(width, layers, text width, text layers, E) of a name in SIZES, or of numbers written as there."""
    found = re.fullmatch(r"(\d+)x(\d+)-(\d+)x(\d+)-(\d+)", SIZES.get(model, model))
    if not found or any(int(width) % HEAD_WIDTH for width in found.group(1, 3)):
        raise ValueError(f"--model {model}: choose one of {', '.join(SIZES)}")
    return tuple(map(int, found.groups()))

def check(config):
    """ValueError with one line for the first option whose value cannot work."""
    for f in fields(config):
        value, least = getattr(config, f.name), f.metadata["least"]
        if isinstance(value, (int, float)) and not least <= value < math.inf:  # nan fails this, too
            raise ValueError(f"--{f.name.replace('_', '-')} {value}: must be at least {least}")
    tower_sizes(config.model)
    check_mask(config.mask, config.ratio)
    P, low, *rest = config.patch_size, *config.scale
    for works, option, rule in (
            (config.image_size % P == 0, "image_size", f"a multiple of --patch-size {P}"),
            (config.ema_size % P == 0, "ema_size", f"a multiple of --patch-size {P}"),
            (config.views <= 2, "views", "1 or 2"),
            (config.precision in ("", "bf16", "fp32"), "precision", "bf16 or fp32"),
            ({*config.contrast} <= {"simclr", "byol"}, "contrast", "simclr, byol or both"),
            (not config.contrast or config.views == 2, "contrast", "used with --views 2"),
            (len(rest) == 1 and 0 < low <= rest[0] <= 1, "scale", "two numbers, 0 < low <= high <= 1")):
        if not works:
            raise ValueError(f"--{option.replace('_', '-')} {getattr(config, option)}: must be {rule}")

# -----------------------------------------------------------------------------
# Masks. Each answers one question: which patches does the encoder get to see? pgs goes through five steps:
#
#     sobel_edges         how much changes inside each patch?
#     pgs_candidates      a few patches, by chance and rather those without edges, are proposed for removal
#     patch_similarity    how alike are every two patches?
#     balance             optimal transport: a patch with many twins becomes less alike to each of them
#     remove              the patches most similar to a candidate go
#
# The other masks share some of the steps. To add a mask, name it in MASKS and give it a branch in make_mask.
# Letters in shapes: B images, L patches of an image, K of them kept, D width of a tower, E size of an
# embedding, T tokens of a caption, N packed tokens of a batch, H and W pixels, P side of a patch.

MASKS = ("none", "random", "center", "cluster", "attentive", "pgs")
ANCHORS = 0.03     # share of the patches that start a cluster (E-CLIP)
CANDIDATES = 0.05  # share of the patches proposed for removal (CLIP-PGS)
EPS = 0.05         # of optimal transport: the smaller, the more mass stays with the nearest twins (ours)

def check_mask(name, ratio):
    """ValueError unless name is one of MASKS and ratio one share of patches, or a range of two, in [0, 1)."""
    if name not in MASKS:
        raise ValueError(f"--mask {name}: choose one of {', '.join(MASKS)}")
    if len(ratio) not in (1, 2) or not 0 <= ratio[0] <= ratio[-1] < 1:
        raise ValueError(f"--ratio {ratio}: must be a share, at least 0 and below 1, or two, low then high")

def patchify(images, patch_size):
    """(B, C, H, W) -> (B, L, C*P*P): patches row by row, as channel, row, column. ValueError for a bad P."""
    (B, C, H, W), P = images.shape, patch_size
    if H % P or W % P:
        raise ValueError(f"--patch-size {P}: does not divide images of {H}x{W}")
    patches = images.reshape(B, C, H // P, P, W // P, P).permute(0, 2, 4, 1, 3, 5)  # (B, H/P, W/P, C, P, P)
    return patches.reshape(B, H // P * (W // P), C * P * P)

def sobel_edges(images, patch_size=16):
    """Edge strength of each patch, (B, L) in [0, 1]; images (B, 3, H, W) are normalised as for the model.
    Mean gradient magnitude of the luminance, min-max scaled per image; a constant image gives zeros.
    ValueError if the patch size does not divide H and W. CLIP-PGS, edge detection (see the README)."""
    weights = torch.tensor([0.299, 0.587, 0.114]) * torch.tensor(data.STD)  # the gradient ignores data.MEAN
    kernel_x = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    kernels = torch.stack([kernel_x, kernel_x.T])[:, None]                  # (2, 1, 3, 3)
    weights, kernels = (x.to(images, non_blocking=True) for x in (weights.view(3, 1, 1), kernels))
    luminance = (images * weights).sum(1, keepdim=True)                     # (B, 1, H, W)
    # We subtract the first pixel: a flat image then gives exactly zero, not noise for the scaling to blow up.
    luminance = luminance - luminance[..., :1, :1]
    gradient = F.conv2d(F.pad(luminance, (1, 1, 1, 1), mode="replicate"), kernels)  # (B, 2, H, W)
    magnitude = gradient.square().sum(1, keepdim=True).sqrt()               # (B, 1, H, W)
    edges = patchify(magnitude, patch_size).mean(-1)                        # (B, L)
    edges = edges - edges.amin(1, keepdim=True)
    return edges / edges.amax(1, keepdim=True).clamp(min=1e-12)

def pgs_candidates(edges, noise):
    """(B, C) indices of the patches proposed for removal: the highest `noise - edges` (CLIP-PGS, generation).
    edges (B, L) in [0, 1], noise (B, L) uniform in [0, 1): by chance, flat patches often, outlines rarely."""
    return (noise - edges).topk(max(1, round(CANDIDATES * noise.shape[1]))).indices

def patch_similarity(images, patch_size=16, embeddings=None, alpha=0.0):
    """Similarity of every two patches of an image, (B, L, L) in [-1, 1]; images (B, 3, H, W).
    The cosine of their pixels, brought to zero mean and unit variance (E-CLIP: contrast must not matter).
    With embeddings (B, L, D): (1 - alpha) * cosine of pixels + alpha * cosine of embeddings."""
    def cosines(x):
        z = F.normalize(x, dim=-1)                        # (B, L, D)
        return z @ z.transpose(1, 2)                      # (B, L, L)

    pixels = patchify(images.float(), patch_size)
    pixels = pixels - pixels.mean(-1, keepdim=True)       # the cosine itself divides by the deviation
    # A patch of one grey is now zero plus rounding noise, whose direction is random. We append the same small
    # number to every patch. Patches of one grey then point the same way, and the others hardly change.
    S = cosines(F.pad(pixels, (0, 1), value=1e-3))
    if embeddings is None or alpha == 0:
        return S
    return (1 - alpha) * S + alpha * cosines(embeddings.float())

def balance(similarity, eps=EPS, iterations=20):
    """Balanced similarity S' = 1 + eps * log T of a symmetric S (B, L, L) in [-1, 1]: same shape, float32.
    T is the doubly stochastic matrix of `sinkhorn`: to rank by S' is to rank by T. It has the form
    T = diag(u) K diag(u), K = exp((S - 1) / eps), u * (K u) = 1, so that S' = S + eps * (log u_i + log u_j).
    Repeating u <- 1 / (K u) would alternate between two vectors, so each step takes the geometric mean of u
    and 1 / (K u): near the answer it at least halves the error, as K of cosines is positive semi-definite."""
    similarity = similarity.float()
    kernel = ((similarity - 1) / eps).exp()               # (B, L, L) between exp(-2 / eps) and 1: never 0
    u = torch.ones_like(kernel[..., :1])                  # (B, L, 1)
    for _ in range(iterations):
        u = (u / (kernel @ u)).sqrt()
    return similarity + eps * (u.log() + u.log().transpose(-1, -2))

def sinkhorn(similarity, eps=EPS, iterations=20):
    """The doubly stochastic matrix T nearest in KL to exp(similarity / eps), both (B, L, L); float32.
    Optimal transport with uniform marginals (Cuturi 2013): rows and columns sum to 1. A patch that has many
    twins shares its unit of mass with all of them; a patch that is like no other keeps it."""
    return ((balance(similarity, eps, iterations) - 1) / eps).exp()

def pgs_score(similarity, candidates, transport=True):
    """(B, L): the similarity to the nearest candidate, balanced by optimal transport (CLIP-PGS, selection).
    similarity (B, L, L), candidates (B, C). Without balance, one large area can take all that goes."""
    if transport:
        similarity = balance(similarity)
    return similarity.take_along_dim(candidates[..., None], dim=1).amax(1)

def block_mean(x, rows, columns):
    """(B, L) -> (B, L): the mean of each patch's block of 2x2; x itself if a side of the grid is odd."""
    if rows % 2 or columns % 2:
        return x
    blocks = F.avg_pool2d(x.view(-1, 1, rows, columns), 2)                     # (B, 1, rows / 2, columns / 2)
    return F.interpolate(blocks, scale_factor=2, mode="nearest").flatten(1)

def remove(score, ratio, noise, counted=None, share=None):
    """Removes the patches with the highest score (B, L): keep (B, K) sorted, valid (B, K) bool or None.
    The number is that of scores, or of `counted` (B, L), above 0.5, clamped to the range `ratio`; with share
    (B,) in [0, 1), it lies that far in the range. Of equal scores, the highest noise (B, L) goes first."""
    L = score.shape[1]
    low, high = (min(round(end * L), L - 1) for end in (ratio[0], ratio[-1]))  # one patch always stays
    count = ((score if counted is None else counted) > 0.5).sum(1).clamp(low, high)
    if share is not None:
        count = low + (share * (high - low + 1)).long()
    order = (score.double() + 1e-5 * noise).argsort(1, descending=True)        # float64: noise must part ties
    rank = order.argsort(1)                                                    # (B, L) 0: the first to go
    removed = (rank < count[:, None]).byte()
    # A stable sort of zeros and ones: the kept patches in their order, then the removed ones. K is the most
    # that the ratio allows: for the batch's own maximum, the CPU would have to wait for the GPU.
    keep = removed.argsort(dim=1, stable=True)[:, :L - low]                    # (B, K)
    valid = torch.arange(L - low, device=score.device) < (L - count)[:, None]
    return keep, valid if low < high else None

@torch.no_grad()
def make_mask(name, images, ratio, generator=None, *, patch_size=16, noise=None, alpha=0.0, embeddings=None,
              attention=None, edges=True, transport=True):
    """The patches that the encoder sees: keep (B, K) sorted indices, valid (B, K) bool or None if all are.
    name: one of MASKS. images: (B, 3, H, W), normalised. ratio: share of patches REMOVED, (r,) exactly, or
    (low, high), chosen per image; then K is the most that any image may keep, and valid slots come first.
    noise: (B, L + 1) uniform in [0, 1), else drawn from generator. cluster and pgs compare pixels and, by the
    share alpha, embeddings (B, L, D), see `patch_tokens`; attentive needs attention (B, L). A mask does not
    depend on the other images of the batch. ValueError for an unknown name or ratio."""
    check_mask(name, ratio)
    B, grid = len(images), (images.shape[2] // patch_size, images.shape[3] // patch_size)
    L = grid[0] * grid[1]
    if name == "none":
        return torch.arange(L, device=images.device).expand(B, L), None
    if noise is None:
        noise = torch.rand(B, L + 1, generator=generator, device=images.device)
    noise, share = noise[:, :L], noise[:, L]  # share: for masks without scores to count

    with torch.autocast(images.device.type, enabled=False):  # ranks and exp(20 S) need float32
        if name == "random":  # FLIP, Li et al., CVPR 2023
            return remove(noise, ratio, noise, share=share)
        if name == "center":  # GLIP, Liang and Larson, ECML 2024: a Gaussian of variance 0.2 per axis
            y, x = (torch.linspace(-1, 1, side, device=noise.device) for side in grid)
            density = (-(y[:, None] ** 2 + x ** 2) / 0.4).exp() / (0.4 * math.pi)      # 0.80 in the middle
            return remove(-noise - density.flatten(), ratio, noise, share=share)
        if name == "attentive":  # A-CLIP, Yang et al., ICCV 2023
            # Patches of a block go together. A score above 0.5: less than an even share of the attention.
            score = 1 / (1 + block_mean(attention, *grid) / attention.mean(1, keepdim=True))
            return remove(score, ratio, block_mean(noise, *grid))
        if name == "cluster":  # E-CLIP, Wei et al., CVPR 2024: patches like the nearest of a few anchors
            chosen, transport = noise.topk(max(1, round(ANCHORS * L))).indices, False  # (B, C)
        else:
            strength = sobel_edges(images.float(), patch_size) if edges else torch.zeros_like(noise)
            chosen = pgs_candidates(strength, noise)
        similarity = patch_similarity(images, patch_size, embeddings, alpha)
        score = counted = pgs_score(similarity, chosen, transport)
        # Pixels alone say how many go: trained embeddings are so alike that it would nearly always be `high`.
        if len(ratio) == 2 and embeddings is not None and alpha > 0:
            counted = pgs_score(patch_similarity(images, patch_size), chosen, transport)
        return remove(score, ratio, noise, counted)

# -----------------------------------------------------------------------------
# Model: a ViT and a causal text transformer. Parameter names and shapes are those of OpenAI CLIP and
# open_clip, so that weights load strictly in both directions. Captions differ in length, as do images if
# `--ratio` is a range. Padding is not computed: all but attention runs on the valid tokens, packed one after
# the other, (N, D). Attention needs the padded form, (B, K, D).

class Slots(NamedTuple):
    """Which slots of a padded batch hold a token: how to get from one form to the other."""
    valid: torch.Tensor   # (B, K) bool
    places: torch.Tensor  # (N,) int64, where the tokens lie among the B * K slots

    def pack(self, x):
        """(B, K, D) -> (N, D): the valid tokens, one after the other."""
        return x.flatten(0, 1).index_select(0, self.places)

    def unpack(self, x):
        """(N, D) -> (B, K, D): the tokens in their slots, zeros in the others."""
        B, K = self.valid.shape
        return x.new_zeros(B * K, x.shape[1]).index_copy(0, self.places, x).view(B, K, -1)

class Attention(nn.Module):
    """Multi-head self-attention with the parameter names of nn.MultiheadAttention."""
    def __init__(self, width):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, slots=None, causal=False, first_only=False, rows=None):
        """See `Block.forward`."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        if x.ndim == 2:
            qkv = slots.unpack(qkv)
        q, k, v = qkv.unflatten(2, (3, -1, HEAD_WIDTH)).permute(2, 0, 3, 1, 4)           # (B, heads, K, 64)
        if rows is not None:
            row = (q[:, :, :1] @ k.transpose(2, 3) * HEAD_WIDTH ** -0.5).float().softmax(-1)
            rows.append(row[:, :, 0, 1:].mean(1))                                        # (B, K - 1)
        if first_only:
            q = q[:, :, :1]
        # Causal attention needs no mask: padding follows the valid tokens, which never look ahead.
        mask = None if slots is None or causal else slots.valid[:, None, None]           # (B, 1, 1, K)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        y = y.transpose(1, 2).flatten(2)                                                 # (B, K, D)
        return self.out_proj(slots.pack(y) if x.ndim == 2 else y)

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
        gelu = QuickGELU() if quick_gelu else nn.GELU()
        layers = OrderedDict(c_fc=nn.Linear(width, 4 * width), gelu=gelu, c_proj=nn.Linear(4 * width, width))
        self.mlp = nn.Sequential(layers)

    def forward(self, x, slots=None, causal=False, first_only=False, rows=None):
        """(B, K, D), or (N, D) with its slots -> same shape; with first_only, the first token, (B, 1, D).
        A list `rows` takes the first token's attention to the others, mean over the heads: (B, K - 1)."""
        y = self.attn(self.ln_1(x), slots, causal, first_only, rows)
        x = (x[:, :1] if first_only else x) + y
        return x + self.mlp(self.ln_2(x))

class Transformer(nn.Module):
    """A stack of blocks."""
    def __init__(self, config, width, layers):
        super().__init__()
        self.grad_checkpointing = config.grad_checkpointing
        self.resblocks = nn.ModuleList(Block(width, config.quick_gelu) for _ in range(layers))
        # CLIP's text initialisation: the sum of all residual branches has the scale of a single one.
        for block in self.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width ** -0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width ** -0.5 * (2 * layers) ** -0.5)
            nn.init.zeros_(block.attn.out_proj.bias)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width ** -0.5 * (2 * layers) ** -0.5)

    def forward(self, x, slots=None, causal=False, first_only=False, rows=None):
        """As `Block.forward`; with first_only, the last layer computes the first token of each image."""
        for number, block in enumerate(self.resblocks, 1):
            only = first_only and number == len(self.resblocks)
            if only and x.ndim == 2:
                x = slots.unpack(x)
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, slots, causal, only, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, slots, causal, only, rows)
        return x

def resize_positions(position, L):
    """Positional embeddings of a square grid, stretched to the grid of L patches: (old L, D) -> (L, D)."""
    side, wanted = math.isqrt(len(position)), math.isqrt(L)
    if side == wanted:
        return position
    position = position.T.view(1, -1, side, side)
    return F.interpolate(position, (wanted, wanted), mode="bicubic", antialias=True).flatten(2)[0].T

class VisionTransformer(nn.Module):
    """The image tower (Dosovitskiy et al., ICLR 2021). It embeds and encodes only the patches it is given."""
    def __init__(self, config, width, layers, embed_dim):
        super().__init__()
        self.patch_size = config.patch_size
        num_patches = (config.image_size // config.patch_size) ** 2
        self.conv1 = nn.Conv2d(3, width, config.patch_size, config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width ** -0.5)
        self.positional_embedding = nn.Parameter(torch.randn(num_patches + 1, width) * width ** -0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(config, width, layers)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, embed_dim) * width ** -0.5)

    def patch_tokens(self, images, keep=None):
        """Projections of the patches `keep` (B, K), or of all, plus positional embeddings: (B, K, D)."""
        patches = patchify(images, self.patch_size)
        position = resize_positions(self.positional_embedding[1:], patches.shape[1])  # for --ema-size
        if keep is not None:
            patches = patches.take_along_dim(keep[..., None], dim=1)
            position = F.embedding(keep, position)  # position[keep]'s gradient varies between CPU threads
        return F.linear(patches, self.conv1.weight.flatten(1)) + position  # conv1, at any subset of positions

    def embed(self, images, keep=None):
        """What enters the first layer: the class token, then the patches `keep` or all: (B, 1 + K, D)."""
        x = self.patch_tokens(images, keep)
        first = self.class_embedding + self.positional_embedding[0]
        return self.ln_pre(torch.cat([first.to(x.dtype).expand(len(x), 1, -1), x], dim=1))

    def class_token(self, images, keep=None, valid=None, rows=None):
        """The class token at the end, (B, D); arguments as of `CLIP.encode_image` and `Block.forward`."""
        x, slots = self.embed(images, keep), None                        # (B, 1 + K, D)
        if valid is not None:
            valid = F.pad(valid, (1, 0), value=True)                     # the class token is always valid
            # nonzero: the CPU waits here, because only the GPU knows how many patches are kept.
            slots = Slots(valid, valid.flatten().nonzero()[:, 0])
            x = slots.pack(x)                                            # (N, D)
        x = self.transformer(x, slots, first_only=True, rows=rows)       # (B, 1, D)
        return self.ln_post(x[:, 0])

class CLIP(nn.Module):
    """Two towers and a temperature. `config.vocab_size` is the tokenizer's."""
    def __init__(self, config):
        super().__init__()
        width, layers, text_width, text_layers, embed_dim = tower_sizes(config.model)
        self.visual = VisionTransformer(config, width, layers, embed_dim)
        self.transformer = Transformer(config, text_width, text_layers)
        self.token_embedding = nn.Embedding(config.vocab_size, text_width)
        self.positional_embedding = nn.Parameter(torch.randn(config.context_length, text_width) * 0.01)
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(torch.randn(text_width, embed_dim) * text_width ** -0.5)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def encode_image(self, images, keep=None, valid=None):
        """Features (B, E), not normalised, of images (B, 3, H, W); only the patches `keep` (B, K) are seen.
        With valid (B, K) bool, slots of `keep` that are not valid have no influence and almost no cost."""
        return self.visual.class_token(images, keep, valid) @ self.visual.proj

    def encode_text(self, tokens):
        """Features (B, E), not normalised, of tokens (B, T): the output at <end>, the highest id. The rest
        is not computed: causal attention never looks ahead. Tokens on the CPU save waiting for the GPU."""
        device, ends = self.text_projection.device, tokens.argmax(1)     # (B,)
        T = int(ends.max()) + 1                                          # of the longest caption
        valid = torch.arange(T, device=ends.device) <= ends[:, None]     # (B, T), not needed on the GPU
        places, last = valid.flatten().nonzero()[:, 0], (ends + 1).cumsum(0) - 1  # last: each <end> in N
        tokens, places, last = (x.to(device, non_blocking=True) for x in (tokens[:, :T], places, last))
        x, slots = self.token_embedding(tokens) + self.positional_embedding[:T], Slots(valid, places)
        x = self.transformer(slots.pack(x), slots, causal=True)          # (N, D)
        return self.ln_final(x[last]) @ self.text_projection

    def forward(self, images, tokens, keep=None, valid=None):
        """Image features, text features (B, E), the factor of their cosines, class tokens (B, D)."""
        token = self.visual.class_token(images, keep, valid)
        return token @ self.visual.proj, self.encode_text(tokens), self.logit_scale.exp(), token

# -----------------------------------------------------------------------------
# Teacher: the EMA copy of the image tower. `attentive` ranks by its attention, BYOL predicts its token.

@torch.no_grad()
def class_attention(visual, images, size=0):
    """How much the class token attends to each patch, mean over layers and heads, (B, L), and the class token
    at the end, (B, D); images (B, 3, H, W). A row sums to less than 1, the rest is attention to itself. With
    size, a multiple of the patch size, the tower looks at images of that side (A-CLIP, efficient version)."""
    grid, rows = images.shape[-1] // visual.patch_size, []
    if size:
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    token = visual.class_token(images, rows=rows)
    attention = sum(rows) / len(rows)
    if size:
        side = size // visual.patch_size
        attention = F.interpolate(attention.view(-1, 1, side, side), (grid, grid), mode="bilinear").flatten(1)
    return attention, token

@torch.no_grad()
def update_ema(ema, model, progress):
    """Moves the EMA weights towards the model's; momentum 0.996 -> 1 by a cosine as progress goes 0 -> 1."""
    momentum = 1 - (1 - 0.996) * (math.cos(math.pi * progress) + 1) / 2
    for average, weight in zip(ema.parameters(), model.parameters()):
        average.lerp_(weight, 1 - momentum)

# -----------------------------------------------------------------------------
# Losses.

def ranks():
    """(rank, world_size): (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

def gather(x):
    """(B, ...) of each rank -> (world_size * B, ...) on all ranks, in their order. The gradient goes to this
    rank's own part, times world_size, because DDP will take the mean of the ranks' gradients."""
    rank, world_size = ranks()
    if world_size == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size)]
    dist.all_gather(parts, x.detach().contiguous())
    parts[rank] = x.clone()
    if x.requires_grad:
        parts[rank].register_hook(lambda gradient: gradient * world_size)
    return torch.cat(parts)

def clip_loss(image_features, text_features, logit_scale, decoded=None):
    """Symmetric cross entropy (Radford et al. 2021, figure 3) of the features (B, E) of all ranks, the same
    on each. logit_scale multiplies their cosines; pairs that are not decoded (B,) bool are left out."""
    images, texts = (gather(F.normalize(x, dim=-1)) for x in (image_features, text_features))
    known = torch.ones_like(images[:, 0], dtype=torch.bool) if decoded is None else gather(decoded)
    labels = torch.arange(len(known), device=known.device).where(known, -100)  # cross_entropy skips -100
    both = ((logit_scale * rows @ columns.T).masked_fill(~known, -math.inf)
            for rows, columns in ((images, texts), (texts, images)))           # (world_size * B, E) each
    loss = sum(F.cross_entropy(logits, labels, reduction="sum") for logits in both) / 2
    return loss / known.sum().clamp(min=1)

# -----------------------------------------------------------------------------
# Two views (A-CLIP, SLIP); a student may skip this chapter. With --views 2, each image is cropped twice, and
# the CLIP loss is the mean over both views. --contrast compares the views: heads see the class tokens of all
# ranks and passes, everywhere alike and outside DDP, so that batch norm is that of the whole global batch.

def nt_xent(a, b, temperature=0.1):
    """SimCLR's loss (Chen et al. 2020); features (N, E) of both views of the gathered batch, not normalised.
    Each of the 2N views has to find the other view of its image among the 2N - 1 other views: the mean."""
    z, N = F.normalize(torch.cat([a, b]), dim=-1), len(a)                # (2N, E)
    logits = (z @ z.T / temperature).fill_diagonal_(-math.inf)           # no view is compared with itself
    return F.cross_entropy(logits, torch.arange(2 * N, device=a.device).roll(N))

def byol(prediction, target):
    """BYOL's loss (Grill et al. 2020): mean 2 - 2 cos of features (N, E); the target gets no gradient."""
    return (2 - 2 * F.cosine_similarity(prediction, target.detach(), dim=-1)).mean()

def head(*widths):
    """Linear layers of these widths with batch norm and ReLU between; batch norm needs no bias before it."""
    *hidden, last = itertools.pairwise(widths)
    layers = [(nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU()) for a, b in hidden]
    return nn.Sequential(*itertools.chain(*layers), nn.Linear(*last))

class Heads(nn.Module):
    """What --contrast trains beside the towers; for ViT-B the widths are A-CLIP's."""
    def __init__(self, config):
        super().__init__()
        D = tower_sizes(config.model)[0]
        wide = 4096 if D >= 768 else 4 * D
        if "simclr" in config.contrast:
            self.simclr = head(D, wide, wide, 256)
        if "byol" in config.contrast:
            self.projector, self.predictor = head(D, wide, 256), head(256, wide, 256)
            self.teacher = copy.deepcopy(self.projector).requires_grad_(False)  # its EMA

    def forward(self, tokens, taught, decoded):
        """The losses of class tokens (2, B, D) and the teacher's (B, D), of all ranks, without the pairs that
        are not decoded (B,) bool; weighted as in A-CLIP's release."""
        known, loss = gather(decoded), 0
        tokens = [gather(token)[known] for token in tokens]                           # (N, D) of each view
        if hasattr(self, "simclr"):
            loss = loss + nt_xent(*(self.simclr(token) for token in tokens))
        if hasattr(self, "projector"):  # 2.0 times the mean of both views
            target = self.teacher(gather(taught)[known])
            loss = loss + sum(byol(self.predictor(self.projector(token)), target) for token in tokens)
        return loss

def cut_attention(attention, boxes, side):
    """Attention (B, L), cut to boxes (B, 4) of left, top, right, bottom in [0, 1]: (B, side ** 2)."""
    centers = (torch.arange(side, device=attention.device) + 0.5) / side              # of the part's patches
    x, y = (boxes[:, i, None] + centers * (boxes[:, i + 2] - boxes[:, i])[:, None] for i in (0, 1))
    where = torch.stack(torch.broadcast_tensors(x[:, None], y[..., None]), dim=-1)    # (B, side, side, 2)
    full = attention.view(len(attention), 1, math.isqrt(attention.shape[1]), -1)
    return F.grid_sample(full, 2 * where.to(full) - 1, padding_mode="border", align_corners=False).flatten(1)

# -----------------------------------------------------------------------------
# Optimizer and schedule.

def make_optimizer(config, *modules):
    """AdamW with CLIP's betas and eps; decay on matrices only, not on biases, norms, other vectors."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
              {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, config.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)

def learning_rate(step, total_steps, peak, warmup):
    """Linear to `peak` over the warm-up, then a cosine to 0; step counts from 0."""
    warmup = min(warmup, total_steps // 5)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (total_steps - warmup))) / 2

# -----------------------------------------------------------------------------
# One step: noise, masks, features, loss, gradients, update. V is the number of views, 1 or 2.

def step_noise(config, step, global_batch, device):
    """This rank's part of the mask noise: (V, B, L + 1), uniform in [0, 1), from the run's seed and the step.
    Drawn for all ranks, then sliced: so masks depend neither on the number of ranks nor on --accum."""
    (rank, world_size), L = ranks(), (config.image_size // config.patch_size) ** 2
    seed = int(np.random.SeedSequence([config.seed, step]).generate_state(1)[0])
    generator = torch.Generator(device).manual_seed(seed)
    noise = torch.rand(config.views, global_batch, L + 1, generator=generator, device=device)
    return noise.chunk(world_size, dim=1)[rank]

def autocast(config, device):
    """bf16 for the towers, if the run says so; masks and losses compute in float32 all the same."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")

def parts_of(config, batch):
    """The slices of a local batch that go through the towers one after the other, --accum of them."""
    size = batch // config.accum
    return [slice(first, first + size) for first in range(0, batch, size)]

@torch.no_grad()
def teach(config, ema, images, boxes):
    """The EMA encoder's attention to the patches of each view, (V, B, L), and its class token, (B, D). It
    sees the last of images: (V + 1, B, 3, H, W) uint8, the views are boxes (V, B, 4) of it; or one view."""
    with autocast(config, images.device):
        seen = [class_attention(ema, data.normalize(images[-1, part]), config.ema_size)
                for part in parts_of(config, images.shape[1])]
    attention, taught = map(torch.cat, zip(*seen))
    side, cuts = config.image_size // config.patch_size, boxes if len(images) > 1 else ()
    views = [cut_attention(attention, box, side) for box in cuts] or [attention]
    return torch.stack(views), taught.float()

@torch.no_grad()
def batch_masks(config, visual, attention, images, noise, alpha):
    """keep (V, B, K), valid (V, B, K) or None of images (V, B, 3, H, W) uint8 with noise (V, B, L + 1)."""
    masks, mixed = [], config.embeddings and config.mask in ("cluster", "pgs")
    with autocast(config, images.device):
        for part in itertools.product(range(config.views), parts_of(config, images.shape[1])):
            pixels = data.normalize(images[part])  # again for the towers: floats are too large to keep
            masks.append(make_mask(
                config.mask, pixels, config.ratio, patch_size=config.patch_size, noise=noise[part],
                embeddings=visual.patch_tokens(pixels) if mixed else None, alpha=alpha, edges=config.edges,
                attention=None if attention is None else attention[part], transport=config.transport))
    return [None if x[0] is None else torch.cat(x).unflatten(0, (config.views, -1)) for x in zip(*masks)]

def gradients(config, model, heads, images, tokens, keep, valid, decoded, taught):
    """Adds the gradients of the whole batch's loss to the parameters, in --accum passes; returns the loss.
    images (V, B, 3, H, W) uint8, tokens (B, T), keep, valid (V, B, K) or None, decoded (B,), taught (B, D).
    One pass: forward, loss, backward. More passes (GradCache, Gao et al. 2021), exactly the same: features of
    all parts without gradient, the loss and its gradient at them, each part again, backward from there."""
    def features(part):
        with autocast(config, images.device):
            pixels, *masks = (x if x is None else x[:, part].flatten(0, 1) for x in (images, keep, valid))
            image, text, scale, token = model(data.normalize(pixels), tokens[part], *masks)
        image, token = (x.float().unflatten(0, (config.views, -1)) for x in (image, token))
        return image, text.float(), scale, token         # (V, b, E), (b, E), (), (V, b, D)

    parts = parts_of(config, images.shape[1])
    with torch.set_grad_enabled(config.accum == 1):
        image, text, scale, token = zip(*(features(part) for part in parts))
    cached = torch.cat(image, dim=1), torch.cat(text), scale[0], torch.cat(token, dim=1)
    image, text, scale, token = (x.requires_grad_() for x in cached)
    loss = sum(clip_loss(view, text, scale, decoded) for view in image) / config.views
    if heads:
        loss = loss + heads(token, taught, decoded)
    loss.backward()
    if config.accum > 1:
        image, text, scale, token = (torch.zeros_like(x) if x.grad is None else x.grad for x in cached)
        for part in parts:
            # DDP averages gradients over the ranks at the end of a backward pass: once, in the last, is
            # enough. The gradient of the temperature belongs to all parts: it, too, goes in once.
            last = model.require_backward_grad_sync = part is parts[-1]
            grads = image[:, part], text[part], scale * last, token[:, part]
            torch.autograd.backward(features(part), grads)
    return loss.detach()

def train_step(config, model, optimizer, ema, heads, images, boxes, tokens, decoded, noise, alpha):
    """One update on a local batch: (numbers of this rank for the log, keep, valid).
    Arguments as for `teach`, `batch_masks` and `gradients`; tokens stay on the CPU. noise=None: whole images.
    At a fixed ratio the CPU never waits for the GPU; with a range or heads it waits once per pass."""
    clip, keep, valid, attention, taught = getattr(model, "module", model), None, None, None, None
    device = clip.logit_scale.device
    images, boxes, decoded = (x.to(device, non_blocking=True) for x in (images, boxes, decoded))
    if ema and (noise is not None or config.contrast):
        attention, taught = teach(config, ema, images, boxes)
    images = images[:config.views]
    if noise is not None:
        keep, valid = batch_masks(config, clip.visual, attention, images, noise, alpha)
    numbers = {"loss": gradients(config, model, heads, images, tokens, keep, valid, decoded, taught)}
    if config.grad_clip:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        numbers["grad_norm"] = nn.utils.clip_grad_norm_(parameters, config.grad_clip)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():  # CLIP's limit of 100, after the step: a clamp in forward has no gradient beyond it
        clip.logit_scale.clamp_(max=math.log(100))
    if ema:
        update_ema(ema, clip.visual, alpha)
    if "byol" in config.contrast:
        update_ema(heads.teacher, heads.projector, alpha)
    share = 1.0 if keep is None else keep.shape[-1] / (config.image_size // config.patch_size) ** 2
    kept = share if valid is None else share * valid.float().mean()  # of the patches, mean over the batch
    return numbers | {"logit_scale": clip.logit_scale.detach().exp(), "kept": kept}, keep, valid

# -----------------------------------------------------------------------------
# The run, which `prepare` returns: everything around the steps. Order, crops and masks depend only on seed
# and step. So no random generator is saved, and a resumed run continues as if it had never stopped.

def claim(config):
    """Makes --out the folder of this run; returns a file that is locked until this process ends. ValueError
    if another process trains there, or if it holds the checkpoint of a run that we do not go on with."""
    os.makedirs(config.out, exist_ok=True)
    path, lock = f"{config.out}/ckpt.pt", open(f"{config.out}/.lock", "w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # any other error: the file system cannot lock
        raise ValueError(f"--out {config.out}: another process trains there; name another folder") from None
    if os.path.exists(path) and not (config.resume and os.path.samefile(config.resume, path)):
        then = evaluate.read_checkpoint(path)
        run = f"run (mask {then['config']['mask']}, step {then['step']})" if "merges" in then else "ckpt.pt"
        raise ValueError(f"--out {config.out}: holds a {run}; go on by --resume, or name another --out")
    return lock

def load_data(config):
    """Shard paths and their index, (N,) of data.INDEX. ValueError if too much of them is broken."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0  # torchrun numbers the processes of each machine
    if dist.is_initialized() and not first:
        dist.barrier()  # the first process of the machine draws and indexes; then the others read its files
    if not config.data:
        data.make_demo("demo")
    shards = data.expand(config.data or ("demo/train/*.tar",))
    index, warnings = data.build_index(shards, config.max_bad, config.out, config.workers, ranks()[0] == 0)
    if dist.is_initialized() and first:
        dist.barrier()
    for line in warnings if ranks()[0] == 0 else ():
        print("warning:", line)
    return shards, index

def build(config, state, device):
    """(clip, model, optimizer, ema, heads): new ones, or as the checkpoint `state` has them. model is clip,
    in DDP if there are several ranks; ema is the teacher or None, heads are those of --contrast or None."""
    torch.manual_seed(config.seed)
    clip = CLIP(config).to(device)
    heads = Heads(config).to(device) if config.contrast else None
    if state:
        name, L = "visual.positional_embedding", (config.image_size // config.patch_size) ** 2
        position = state["model"][name]
        if not config.resume:  # --init, perhaps at another --image-size
            position = torch.cat([position[:1], resize_positions(position[1:], L)])
        try:
            clip.load_state_dict(state["model"] | {name: position})
        except RuntimeError as error:
            cause = str(error).splitlines()[-1].strip()
            raise ValueError(f"{config.resume or config.init}: does not fit this model: {cause}") from None
    optimizer = make_optimizer(config, clip, *([heads] if heads else []))
    ema = copy.deepcopy(clip.visual) if config.mask == "attentive" or "byol" in config.contrast else None
    for part, name in ((optimizer, "optimizer"), (ema, "ema"), (heads, "heads")):
        if part and state.get(name):
            part.load_state_dict(state[name])
    if config.compile:
        torch._dynamo.config.cache_size_limit = 32  # versions of a function: we need 12, the default is 8
        for block in (*clip.visual.transformer.resblocks, *clip.transformer.resblocks):
            block.compile()
    # No device_ids: with them DDP would copy the tokens to the GPU, and we want them on the CPU.
    return clip, nn.parallel.DistributedDataParallel(clip) if ranks()[1] > 1 else clip, optimizer, ema, heads

def prepare(config, state, device):
    """A run, new or as the checkpoint `state` has it. Checks what can be checked before work starts."""
    for folder in sorted({*config.val} - {*DEMO["val"]}):  # the demo's may have yet to be drawn
        evaluate.read_folder(folder)
    run = SimpleNamespace(config=config, device=device, step=state.get("step", 0), record=state.get("record"))
    run.lock = claim(config) if ranks()[0] == 0 else None
    shards, index = run.shards, run.index = load_data(config)
    run.global_batch = config.batch_size * config.accum * ranks()[1]
    if run.global_batch > len(index):
        raise ValueError(f"--batch-size: {run.global_batch} images per step, but only {len(index)} samples")
    for name, now, what in (("global_batch", run.global_batch, "images per step (ranks x batch x accum)"),
                            ("num_samples", len(index), "samples")):
        if state.get(name, now) != now:
            raise ValueError(f"--resume {config.resume}: had {state[name]} {what}, now there are {now}")
    if config.vocab and not state:
        run.tokenizer = data.Tokenizer.from_file(config.vocab, config.context_length)
    else:
        merges = state["merges"] if state else data.learn_merges(
            data.sample_captions(shards, index), config.vocab_size - 514, progress=ranks()[0] == 0)
        run.tokenizer = data.Tokenizer(merges, config.context_length)
    config.vocab_size = run.tokenizer.vocab_size
    run.chances = data.word_chances(data.sample_captions(shards, index)) if config.text_tokens else {}
    run.clip, run.model, run.optimizer, run.ema, run.heads = build(config, state, device)
    per_epoch = run.steps_per_epoch = len(index) // run.global_batch  # the last, incomplete batch is dropped
    run.total_steps = config.steps or config.epochs * per_epoch
    run.num_epochs = math.ceil(run.total_steps / per_epoch)
    run.masked_steps = run.total_steps - min(round(config.unmasked_epochs * per_epoch), run.total_steps // 2)
    return run

def save(run, name):
    """Rank 0 writes a checkpoint to --out. OSError if it can't be; the one from before is then whole."""
    if ranks()[0] == 0:
        with data.write_whole(os.path.join(run.config.out, name)) as file:
            torch.save(dict(model=run.clip.state_dict(), optimizer=run.optimizer.state_dict(),
                            ema=run.ema and run.ema.state_dict(), heads=run.heads and run.heads.state_dict(),
                            config=asdict(run.config), merges=run.tokenizer.merges, step=run.step,
                            record=run.record, progress=run.step / run.total_steps,
                            global_batch=run.global_batch, num_samples=len(run.index)), file)

def open_log(path, step):
    """The log, open for appending, without what comes after the checkpoint of this step, to be repeated."""
    records = evaluate.read_log(path) if step and os.path.exists(path) else []
    known = [record for record in records if record["step"] + ("eval" in record) <= step]
    with data.write_whole(path) as file:
        file.writelines(f"{json.dumps(record)}\n".encode() for record in known)
    return open(path, "a", buffering=1)

def epoch_loader(run, epoch, steps):
    """A DataLoader of this rank's batches `steps`, a range, of an epoch."""
    config, (rank, world_size) = run.config, ranks()
    order = data.epoch_order(run.index, config.seed, epoch)[:run.steps_per_epoch * run.global_batch]
    batches = data.Batches(
        config, run.shards, run.index, order.reshape(run.steps_per_epoch, world_size, -1)[:, rank],
        run.tokenizer, epoch, chances=run.chances,
        num_masked=run.masked_steps - epoch * run.steps_per_epoch)
    return torch.utils.data.DataLoader(
        batches, batch_size=None, sampler=steps, num_workers=config.workers,
        pin_memory=torch.cuda.is_available(), worker_init_fn=data.ignore_signals)

def train_epoch(run, epoch, log, requests):
    """The losses of the steps to the end of the epoch; each adds its record to `log`, a line of json.
    ValueError if too many samples do not decode; SystemExit if `requests` holds a signal on any rank."""
    config, (rank, world_size), begin = run.config, ranks(), epoch * run.steps_per_epoch
    steps = range(run.step - begin, min(run.steps_per_epoch, run.total_steps - begin))
    bar = tqdm(epoch_loader(run, epoch, steps), f"epoch {epoch + 1}/{run.num_epochs}", steps.stop,
               initial=steps.start, disable=rank > 0, leave=False, unit=" steps")
    losses, num_lost, causes, tick = [], 0, Counter(), time.perf_counter()
    for images, tokens, decoded, boxes, bad, fault in bar:
        if config.views == 1:
            images, boxes = images[None], torch.zeros(1, len(images), 4)
        if fault:
            raise OSError(fault)
        lr = learning_rate(run.step, run.total_steps, config.lr, config.warmup)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        masked = config.mask != "none" and run.step < run.masked_steps
        noise = step_noise(config, run.step, run.global_batch, run.device) if masked else None
        numbers, keep, valid = train_step(config, run.model, run.optimizer, run.ema, run.heads, images, boxes,
                                          tokens, decoded, noise, alpha=run.step / run.total_steps)
        if not losses and rank == 0 and (masked or config.mask == "none"):
            evaluate.draw_masks(f"{config.out}/masks.png", images[0, :8], keep, valid, config.patch_size)
        run.step += 1
        values = [*map(float, numbers.values()), len(bad), bool(requests)]  # waits for the GPU
        values = torch.tensor(values, dtype=torch.float64, device=run.device)
        if dist.is_initialized():
            dist.all_reduce(values)
        *sums, lost, requested = values.tolist()  # requested: a signal of one rank stops all after this step
        images_per_s, tick = run.global_batch / (time.perf_counter() - tick), time.perf_counter()
        run.record = dict(step=run.step, epoch=epoch + 1, lr=lr, images_per_s=round(images_per_s, 1),
                          **{name: x / world_size for name, x in zip(numbers, sums)})
        losses.append(run.record["loss"])
        if not math.isfinite(losses[-1]):
            raise ValueError(f"step {run.step}: the loss is {losses[-1]}; no checkpoint holds this step")
        due = requested or run.step % config.save_every == 0 or len(losses) == len(steps)
        causes.update(bad)
        num_lost, num_read = num_lost + int(lost), len(losses) * run.global_batch
        report = "\n".join([f"epoch {epoch + 1}: {num_lost} of {num_read} samples skipped; rank {rank}:",
                            *(f"{n:8}  {cause}" for cause, n in causes.most_common(10))])
        if lost == run.global_batch or num_lost > config.max_bad * (num_read if due else max(num_read, 1000)):
            raise ValueError(f"{report}\nmore than --max-bad {config.max_bad}, or a batch without a pair")
        log.write(json.dumps(run.record) + "\n")
        bar.set_postfix_str(f"loss {losses[-1]:.3f}, {images_per_s:.0f} images/s", refresh=False)
        if due:
            save(run, "ckpt.pt")
        if requested:
            line = f"stopped after step {run.step} of {run.total_steps}; go on with --resume"
            sys.exit(line if rank == 0 else 1)
    if num_lost and rank == 0:
        print(report)
    return losses

def train(config, state, device):
    """Trains as `config` says, from `state` on. Returns whether a folder failed in the last evaluation."""
    run, (rank, world_size) = prepare(config, state, device), ranks()
    state.clear()  # free the checkpoint: its tensors have been copied
    results, requests, say = {}, [], print if rank == 0 else lambda *lines, **options: None
    for number in (signal.SIGINT, signal.SIGTERM):  # a request to stop after this step
        signal.signal(number, lambda number, frame: requests.append(number))
    log = open(os.devnull, "w") if rank else open_log(f"{config.out}/log.jsonl", run.step)
    L, whole = (config.image_size // config.patch_size) ** 2, run.total_steps - run.masked_steps
    millions = sum(p.numel() for p in run.clip.parameters()) / 1e6
    removed = " to ".join(str(round(share * L)) for share in config.ratio if config.mask != "none") or 0
    say(f"{config.model}, {millions:.1f}M parameters | {device.type}, {config.precision} | {world_size} x "
        f"{run.global_batch // world_size} images, {run.steps_per_epoch} steps per epoch, {run.masked_steps}"
        f" with mask {config.mask}, {removed} of {L} patches removed, {whole} on whole images", flush=True)
    start, first = time.perf_counter(), run.step
    # After --resume from the end of an epoch, no step is left of it, but its evaluation may be missing.
    for epoch in range(max(0, run.step - 1) // run.steps_per_epoch, run.num_epochs):
        losses = train_epoch(run, epoch, log, requests)
        if config.keep_epochs:
            save(run, f"epoch_{epoch + 1}.pt")
        results = evaluate.evaluate_all(run.clip, run.tokenizer, config, config.val, rank, world_size)
        if results:
            log.write(json.dumps(run.record | dict(eval=results)) + "\n")
        if rank == 0 and (results or losses):
            evaluate.draw_curves(f"{config.out}/curves.png", [f"{config.out}/log.jsonl"])
        if losses:
            minutes = (time.perf_counter() - start) / 60
            to_go = minutes * (run.total_steps - run.step) / (run.step - first)
            metrics = [f"{name} {100 * x:.1f}, " for name, x in evaluate.first_metrics(results).items()]
            say(f"epoch {epoch + 1}: mean loss {np.mean(losses):.3f}, {''.join(metrics)}"
                f"{minutes:.1f} minutes, {to_go:.1f} to go", flush=True)
    if results:
        say(evaluate.table(results))
    say(f"wrote {config.out}/ckpt.pt; now: python evaluate.py {config.out}/ckpt.pt")
    return any("failed" in metrics for metrics in results.values())

# -----------------------------------------------------------------------------
# Pictures of masks, and main.

def show_masks(config, state):
    """Writes masks.png to --out: a row per photograph, its edges, attention and what each mask keeps of it.
    With the checkpoint `state` of --resume, embeddings and attention are those of its encoder."""
    clip, tiles, P = build(config, state, "cpu")[0], [], config.patch_size
    clip.visual.load_state_dict(state.get("ema") or clip.visual.state_dict())
    generator = torch.Generator().manual_seed(config.seed)
    for path in config.show_masks:
        pixels = evaluate.read_image(evaluate.Sample(path), config.image_size, upright=True)[None]
        images = data.normalize(pixels)                                                 # (1, 3, H, W)
        (attention, _), edges = class_attention(clip.visual, images, config.ema_size), sobel_edges(images, P)
        embeddings = clip.visual.patch_tokens(images).detach() if config.embeddings else None
        tiles += [(pixels[0], "photograph"), (evaluate.heat_map(edges, config.image_size), "Sobel edges"),
                  (evaluate.heat_map(attention, config.image_size), "class attention")]
        for name in MASKS[1:]:
            mask = make_mask(name, images, config.ratio, generator, patch_size=P, attention=attention,
                             embeddings=embeddings, alpha=state.get("progress", 0.0), edges=config.edges,
                             transport=config.transport)
            tiles.append((evaluate.masked(pixels, *mask, P)[0], name))
    os.makedirs(config.out, exist_ok=True)
    evaluate.sheet(f"{config.out}/masks.png", tiles, columns=len(tiles) // len(config.show_masks))
    print(f"wrote {config.out}/masks.png" + ("" if state else "; the encoder is untrained, see --resume"))

def parse(arguments):
    """(Config, checkpoint to go on from or {}) of a command line. Without --data, DEMO takes the place of the
    defaults. With --resume, the options of its run do; with --init, the size of its model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     epilog=f"Without --data, the demo has other defaults: {DEMO}")
    for f in fields(Config):
        how = dict(metavar="X", type=type(f.default), nargs="?" if f.name == "resume" else None)
        if isinstance(f.default, bool):
            how = dict(action=argparse.BooleanOptionalAction)
        elif isinstance(f.default, tuple):
            how = dict(metavar="X", type=float if f.default else str, nargs="+")
        shown = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else str(f.default)
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, **how,
                            help=f"{f.metadata['help']} (default: {shown or 'none'})")
    options, state = parser.parse_args(arguments), {}
    if not options.data and not options.show_masks:
        parser.set_defaults(**DEMO)
    if options.resume is None:  # --resume without a file
        path = os.path.join(options.out, "ckpt.pt")
        options.resume = path if os.path.exists(path) else ""
    if options.resume:
        state = evaluate.read_checkpoint(options.resume)
        if not {"model", "optimizer", "config", "merges", "record"} <= state.keys():
            raise ValueError(f"--resume {options.resume}: weights only, no state of a run; see --init")
        then = {f.name: state["config"][f.name] for f in fields(Config) if f.name in state["config"]}
        parser.set_defaults(**then | dict(out=os.path.dirname(options.resume) or "."))
    elif options.init:  # the weights and the tokenizer, not the state of a run
        clip, tokenizer, then = evaluate.load(options.init, options.vocab, options.quick_gelu)
        state = dict(model=clip.state_dict(), merges=tokenizer.merges)
        fixed = "model", "image_size", "patch_size", "context_length", "vocab_size", "quick_gelu"
        parser.set_defaults(**{name: getattr(then, name) for name in fixed})
    options = vars(parser.parse_args(arguments)) | dict(resume=options.resume)
    return Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}), state

def main():
    """Entry point, one process per rank under torchrun. What went wrong: a message, a code, or None."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    sys.stdout.reconfigure(errors="backslashreplace")  # names in a tar need not be text
    try:
        config, state = parse(sys.argv[1:])
        check(config)
        if config.show_masks:
            return show_masks(config, state)
        if int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "WORLD_SIZE" not in os.environ:
            raise ValueError("SLURM_NTASKS: each task would train alone; use torchrun, a task per machine")
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                config.precision = "fp32"  # an old card; the first line of the run says so
            torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each length; flash does not
        config.precision = config.precision or ("bf16" if device.type == "cuda" else "fp32")
        if world_size > 1:  # 30 minutes: one process may have to read the shards of a large data set first
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=0.5))
        return train(config, state, device)
    except SystemExit as stop:  # a signal has ended the training, or argparse has said what is wrong
        return stop.code
    except (Exception, KeyboardInterrupt) as error:
        line = data.message(error)  # "" for a bug, or for the end of the connection to a rank that has failed
        if world_size > 1:
            # torchrun ends all ranks when one ends. A rank that failed alone must speak before those that
            # lost the connection to it. Of ranks that failed alike, rank 0 speaks and the others wait.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(min(rank, 1) if line else 5)
        return f"error: {line}" if line else traceback.format_exc()

if __name__ == "__main__":
    fault = main()
    if isinstance(fault, str):
        print(fault, file=sys.stderr)
    sys.stdout.flush()
    # At once: a normal exit would wait for workers that ignore SIGTERM, and it can hang in NCCL or gloo.
    os._exit(1 if fault else 0)
