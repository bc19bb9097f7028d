"""CLIP-PGS: contrastive language-image pre-training on the half of the patches that matters, in one file.

    torchrun clip_pgs.py --mask pgs --ratio 0.5                          the demo: makes its data, minutes on a CPU
    torchrun --nproc_per_node 8 clip_pgs.py --data 'cc12m/{00000..01242}.tar' --mask pgs --ratio 0.5 --val imagenet/
    python clip_pgs.py --show-masks photo.jpg --ratio 0.5                what each mask leaves of a photograph
    python clip_pgs.py --bench                                           what a training step costs under each mask
    python clip_pgs.py --help                                            every option, its default and meaning

CLIP trains an image and a text encoder so that a photograph and its caption get similar features. Most of the cost
is the image encoder, and most patches of an image repeat their neighbours. Five masks choose which patches it sees:
none (CLIP), random (FLIP), cluster (E-CLIP), attentive (A-CLIP) and pgs (CLIP-PGS, Pei et al., CVPR 2025,
arXiv 2503.17080), which is what this file is about.

The story, top to bottom: Config, masks, model, loss, optimizer and schedule, checkpoint, pictures, training, bench,
main. Shards, images and tokens come from data.py; evaluate.py measures what was learned.
"""
import argparse
import copy
import json
import math
import os
import signal
import sys
import time
import traceback
import warnings
from collections import Counter, OrderedDict, deque
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data

# -----------------------------------------------------------------------------
# Config. The one place for every knob: a field is a default, an option of the command line, and what the checkpoint
# stores. "Release" is the code that the authors of CLIP-PGS published; its recipe for CC12M is the default here.


def knob(default, meaning):
    """A Config field that brings its help text along."""
    return field(default=default, metadata={"help": meaning})


@dataclass
class Config:
    """The paper's run: ViT-B-16 at 224 on CC12M."""
    # data
    data: tuple = knob((), "training shards: paths, globs, brace ranges; none: the demo draws its own")
    val: tuple = knob((), "folders to evaluate after every epoch, in CLIP_benchmark's layout")
    vocab: str = knob("", "CLIP's bpe_simple_vocab_16e6.txt.gz; without it the merges are learned from the captions")
    vocab_size: int = knob(49408, "vocabulary size, at most, when the merges are learned (CLIP's)")
    max_bad: float = knob(0.1, "share of shards or samples that may be broken before the run stops (ours)")
    # model
    model: str = knob("ViT-B-16", "model size: ViT-B-16, ViT-S-16, ViT-L-16 or demo")
    image_size: int = knob(224, "side of the square input, pixels")
    patch_size: int = knob(16, "side of a patch, pixels")
    context_length: int = knob(77, "tokens a caption is cut to, with start and end (CLIP)")
    quick_gelu: bool = knob(False, "x * sigmoid(1.702 x) for GELU, as in OpenAI's own weights")
    # mask
    mask: str = knob("pgs", "which patches to remove: none, random, cluster, attentive or pgs")
    ratio: tuple = knob((0.5,), "share of patches removed; two numbers: each image picks its own in between")
    edges: bool = knob(True, "pgs: propose patches without edges; off: any (the paper's ablation)")
    transport: bool = knob(True, "pgs: balance the similarity by optimal transport (the paper's ablation)")
    embeddings: bool = knob(True, "cluster, pgs: compare the patches' embeddings too, more and more as training goes "
                                  "on; off: pixels alone (E-CLIP's first variant)")
    ema_size: int = knob(0, "attentive: side of the EMA encoder's input, such as 112; 0: that of the image (A-CLIP)")
    unmasked_epochs: float = knob(0.0, "train the last so many epochs on whole images (FLIP's unmasked tuning)")
    # optimization
    batch_size: int = knob(512, "images per rank and forward pass (release: 8 x 512 = 4096 in all)")
    accum: int = knob(1, "forward passes per step: the exact update of one batch so many times as large")
    epochs: int = knob(32, "passes over the data (paper)")
    steps: int = knob(0, "stop after so many optimizer steps instead; 0: epochs decide")
    lr: float = knob(1e-3, "peak learning rate, for a batch of 4096 (release)")
    warmup: int = knob(10_000, "steps of linear warm-up (release); at most a fifth of a run")
    weight_decay: float = knob(0.2, "decoupled weight decay of the weight matrices (CLIP)")
    betas: tuple = knob((0.9, 0.98), "AdamW's two averages (CLIP, for ViT)")
    eps: float = knob(1e-6, "AdamW's epsilon (CLIP, for ViT)")
    scale: tuple = knob((0.9, 1.0), "area of the random crop, a share of the image (open_clip)")
    # run
    seed: int = knob(0, "fixes the weights at the start, the order of the data, the crops and the masks")
    workers: int = knob(4, "processes per rank that read and decode; 0: the rank itself does")
    out: str = knob("out", "folder for ckpt.pt, log.jsonl, masks.png and index.npz (where the samples lie)")
    save_every: int = knob(1000, "steps between checkpoints; the end of an epoch always writes one")
    keep: bool = knob(False, "keep the checkpoint of every epoch, as epoch_1.pt and so on")
    resume: str = knob("", "checkpoint to go on from; alone: that in --out, or a fresh start if there is none")
    force: bool = knob(False, "resume although an option that changes the result is another than before")
    grad_checkpointing: bool = knob(False, "compute activations again on the way back, not to store them: same loss")
    compile: bool = knob(False, "let torch.compile fuse the layers: the first step of each shape takes far longer")
    bench: bool = knob(False, "time --steps training steps of every mask, or of --mask and none, then stop")
    show_masks: tuple = knob((), "photographs: write what every mask leaves of them to masks.png in --out, then stop")


# Sizes of both towers. Heads are 64 wide, as in CLIP's ViTs. B and L have CLIP's widths and depths (Radford et al.
# 2021); S pairs DeiT's small ViT with a text tower of its width.
SIZES = {
    "ViT-B-16": dict(embed_dim=512, width=768, layers=12, text_width=512, text_layers=12),
    "ViT-S-16": dict(embed_dim=384, width=384, layers=12, text_width=384, text_layers=12),
    "ViT-L-16": dict(embed_dim=768, width=1024, layers=24, text_width=768, text_layers=12),
    "demo": dict(embed_dim=128, width=128, layers=4, text_width=64, text_layers=2),
}
HEAD_WIDTH = 64

# What the demo changes, tuned together with its data on 2 CPU cores.
DEMO = dict(model="demo", image_size=64, patch_size=16, context_length=24, vocab_size=1024, batch_size=128, epochs=8,
            unmasked_epochs=1.0, lr=2e-3, warmup=50, workers=1, val=("demo/seen", "demo/unseen", "demo/retrieval"))


def check(config):
    """ValueError with one line for the first option whose value cannot work."""
    if config.model not in SIZES:
        raise ValueError(f"--model {config.model}: choose one of {', '.join(SIZES)}")
    check_mask((config.mask or "none") if config.bench else config.mask, config.ratio)
    if config.patch_size < 1 or config.image_size < 1 or config.image_size % config.patch_size:
        raise ValueError(f"--patch-size {config.patch_size}: must divide --image-size {config.image_size}")
    if config.ema_size % config.patch_size:
        raise ValueError(f"--ema-size {config.ema_size}: must be a multiple of --patch-size {config.patch_size}")
    for name, least in dict(batch_size=1, accum=1, epochs=1, save_every=1, context_length=3, vocab_size=514, steps=0,
                            warmup=0, workers=0, lr=0, weight_decay=0, eps=0, max_bad=0, seed=0, ema_size=0,
                            unmasked_epochs=0).items():
        if not least <= getattr(config, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be at least {least}")
    if not (len(config.scale) == 2 and 0 < config.scale[0] <= config.scale[1] <= 1):
        raise ValueError(f"--scale {config.scale}: two numbers, 0 < low <= high <= 1")
    if not (len(config.betas) == 2 and all(0 <= beta < 1 for beta in config.betas)):
        raise ValueError(f"--betas {config.betas}: two numbers, at least 0 and below 1")


# -----------------------------------------------------------------------------
# Masks. Each answers one question: which patches does the encoder get to see?

MASKS = ("none", "random", "cluster", "attentive", "pgs")
ANCHORS = 0.03     # share of the patches that start a cluster (E-CLIP)
CANDIDATES = 0.05  # share of the patches proposed for removal (CLIP-PGS)
EPS = 0.05         # of optimal transport: the smaller, the more a patch's mass stays with its nearest twins (ours)


def check_mask(name, ratio):
    """ValueError unless `name` is one of MASKS and `ratio` one share of patches or a range of two, each in [0, 1)."""
    if name not in MASKS:
        raise ValueError(f"--mask {name}: choose one of {', '.join(MASKS)}")
    if len(ratio) not in (1, 2) or not 0 <= ratio[0] <= ratio[-1] < 1:
        raise ValueError(f"--ratio {' '.join(map(str, ratio))}: a share of patches to remove, at least 0 and below 1, "
                         "or a range of two, low then high")


def patchify(images, patch_size):
    """(B, 3, H, W) -> (B, L, 3*P*P): patches row by row, each as channel, row, column like conv1's weights."""
    B, C, H, W = images.shape
    P = patch_size
    if H % P or W % P:
        raise ValueError(f"--patch-size {P}: does not divide images of {H}x{W}")
    patches = images.reshape(B, C, H // P, P, W // P, P).permute(0, 2, 4, 1, 3, 5)  # (B, H/P, W/P, C, P, P)
    return patches.reshape(B, H // P * (W // P), C * P * P)


def patch_similarity(images, patch_size=16, embeddings=None, alpha=0.0):
    """Cosine similarity of every two patches of an image, (B, L, L) in [-1, 1]; images (B, 3, H, W).

    Pixels of a patch are first brought to zero mean and unit variance (E-CLIP: contrast must not matter). With
    `embeddings` (B, L, D) the result is (1 - alpha) * cos(pixels) + alpha * cos(embeddings).
    """
    pixels = patchify(images.float(), patch_size)
    pixels = pixels - pixels.mean(-1, keepdim=True)       # the cosine itself takes care of the variance
    # A patch of one grey is now zero up to rounding noise, which a cosine would blow up. One more, tiny, equal
    # coordinate outweighs the noise: such patches become similar to each other, others hardly change.
    S = _cosine(F.pad(pixels, (0, 1), value=1e-3))
    if embeddings is None or alpha == 0:
        return S
    return (1 - alpha) * S + alpha * _cosine(embeddings.float())


def _cosine(x):
    z = F.normalize(x, dim=-1)                            # (B, L, D)
    return z @ z.transpose(1, 2)                          # (B, L, L)


def sobel_edges(images, patch_size=16):
    """Edge strength of each patch, (B, L) in [0, 1]; images (B, 3, H, W) are normalised as for the model.

    Mean gradient magnitude of the luminance, min-max scaled per image; a constant image gives zeros. ValueError if
    H or W is not a multiple of patch_size. CLIP-PGS, edge detection; the released code differs (README).
    """
    # De-normalising is x * std + mean, and the gradient does not see the mean.
    red, green, blue = (images[:, c:c + 1] * (weight * data.STD[c]) for c, weight in enumerate((0.299, 0.587, 0.114)))
    luminance = red + green + blue                                          # (B, 1, H, W)
    # Nor does it see any other offset; without one, flat stays exactly zero instead of the kernels' rounding noise.
    luminance = luminance - luminance[..., :1, :1]
    kernel_x = torch.tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], dtype=images.dtype)
    kernels = torch.stack([kernel_x, kernel_x.T])[:, None].to(images.device, non_blocking=True)  # (2, 1, 3, 3)
    gradient = F.conv2d(F.pad(luminance, (1, 1, 1, 1), mode="replicate"), kernels)  # (B, 2, H, W)
    magnitude = gradient.square().sum(1, keepdim=True).sqrt()               # (B, 1, H, W)
    edges = patchify(magnitude, patch_size).mean(-1)                        # (B, L)
    edges = edges - edges.amin(1, keepdim=True)
    return edges / edges.amax(1, keepdim=True).clamp(min=1e-12)


def balance(similarity, eps=EPS, iterations=20):
    """Similarity (B, L, L), symmetric, in [-1, 1] -> balanced similarity S' = 1 + eps * log T, same shape, float32.

    T is the doubly stochastic matrix of `sinkhorn`: ranking a row by S' is ranking it by T. The answer is
    T = diag(u) K diag(u) with K = exp((S - 1) / eps), so S' = S + eps * (log u_i + log u_j), on the scale of S. One
    vector u with u * (K u) = 1 is left to find. Repeating u <- 1 / (K u) alternates between two vectors. The geometric
    mean of u and 1 / (K u) converges: K of cosines is positive semi-definite, so near the answer each step at least
    halves the error.
    """
    with torch.autocast(similarity.device.type, enabled=False):
        similarity = similarity.float()
        kernel = ((similarity - 1) / eps).exp()           # (B, L, L) from exp(-2 / eps) to 1: no overflow, no zero
        u = torch.ones_like(kernel[..., :1])              # (B, L, 1)
        for _ in range(iterations):
            u = (u / (kernel @ u)).sqrt()
        return similarity + eps * (u.log() + u.log().transpose(-1, -2))


def sinkhorn(similarity, eps=EPS, iterations=20):
    """The doubly stochastic matrix T nearest (in KL) to exp(similarity / eps): (B, L, L) -> (B, L, L), float32.

    Optimal transport with uniform marginals (Cuturi 2013): rows and columns sum to 1. A patch that has many twins
    shares its unit of mass with all of them; a patch that is like no other keeps it.
    """
    return ((balance(similarity, eps, iterations) - 1) / eps).exp()


def removal_range(ratio, L):
    """(least, most) patches of L to remove for a ratio of one or two shares; one patch always stays."""
    return tuple(min(round(share * L), L - 1) for share in (ratio[0], ratio[-1]))


def remove(score, ratio, noise, count=None):
    """Removes the patches with the highest scores: (B, L) -> keep (B, K) sorted, valid (B, K) bool or None.

    How many go is the number of scores above 0.5, clamped to the range `ratio`, unless `count` (B,) says it. E-CLIP
    searches one threshold for the whole data set instead; ranks in each image do the same job with a static shape.
    `noise` (B, L) decides between equal scores, so that ties do not always cost the bottom of the picture.
    """
    L = score.shape[1]
    low, high = removal_range(ratio, L)
    if count is None:
        count = (score > 0.5).sum(1).clamp(low, high)                # (B,)
    # float64: equal scores must stay apart by their noise.
    rank = (score.double() + 1e-5 * noise).argsort(1, descending=True).argsort(1)      # (B, L) 0 for the first to go
    # K is static, the most that any image may keep: asking for the true maximum would make the CPU wait for the GPU.
    removed = (rank < count[:, None]).byte()
    keep = removed.argsort(dim=1, stable=True)[:, :L - low]          # (B, K) kept before removed, each in order
    if low == high:
        return keep, None
    return keep, torch.arange(L - low, device=score.device) < (L - count)[:, None]


def cluster_score(similarity, noise):
    """(B, L): the similarity to the nearest of a few random anchor patches (E-CLIP, Wei et al., CVPR 2024)."""
    num_anchors = max(1, round(ANCHORS * noise.shape[1]))
    anchors = noise.topk(num_anchors).indices                        # (B, A)
    return similarity.take_along_dim(anchors[..., None], dim=1).amax(1)


def pgs_candidates(edges, noise):
    """(B, C) indices: a few patches to propose for removal, the highest `noise - edges` (CLIP-PGS, generation).

    edges (B, L) in [0, 1], noise (B, L) uniform in [0, 1): flat patches are proposed, outlines rarely, and not the
    same ones every time.
    """
    return (noise - edges).topk(max(1, round(CANDIDATES * noise.shape[1]))).indices


def pgs_score(similarity, candidates, transport=True):
    """(B, L): the similarity to the nearest candidate, balanced by optimal transport (CLIP-PGS, selection).

    similarity (B, L, L), candidates (B, C). Without balance, one large flat area takes most of the patches to remove.
    """
    if transport:
        similarity = balance(similarity)
    return similarity.take_along_dim(candidates[..., None], dim=1).amax(1)


def block_mean(x, rows, columns):
    """(B, L) -> (B, L): each patch gets the mean of its block of 2x2 patches; x itself if a side of the grid is odd."""
    if rows % 2 or columns % 2:
        return x
    blocks = F.avg_pool2d(x.view(-1, 1, rows, columns), 2)                     # (B, 1, rows / 2, columns / 2)
    return F.interpolate(blocks, scale_factor=2, mode="nearest").flatten(1)


@torch.no_grad()
def make_mask(name, images, ratio, generator=None, *, patch_size=16, noise=None, alpha=0.0, embeddings=None,
              attention=None, edges=True, transport=True):
    """The patches that the encoder gets to see: keep (B, K) sorted indices, valid (B, K) bool or None if all are.

    name: one of MASKS. ratio: the share of patches REMOVED, (r,) exactly or (low, high) with the number chosen per
    image; then K is the most an image may keep, real slots come first and `valid` tells them. Randomness comes from
    `noise` (B, L + 1) uniform in [0, 1), or else from `generator`. cluster and pgs compare pixels, and patch
    `embeddings` (B, L, D) by the share `alpha`, see `VisionTransformer.patch_tokens`. attentive needs `attention`
    (B, L), see `class_attention`. pgs can do without `edges` or `transport`, the paper's ablation.
    An image's mask does not depend on the other images of its batch. ValueError for an unknown name or a bad ratio.
    """
    check_mask(name, ratio)
    B, _, H, W = images.shape
    L = H // patch_size * (W // patch_size)
    if name == "none":
        return torch.arange(L, device=images.device).expand(B, L), None
    if noise is None:
        noise = torch.rand(B, L + 1, generator=generator, device=images.device)
    noise, spare = noise[:, :L], noise[:, L]  # spare: random draws from it how many go

    with torch.autocast(images.device.type, enabled=False):  # ranks and exp(20 S) are no place for bf16
        if name == "random":  # FLIP, Li et al., CVPR 2023
            low, high = removal_range(ratio, L)
            return remove(noise, ratio, noise, count=low + (spare * (high - low + 1)).long())
        if name == "attentive":  # A-CLIP, Yang et al., ICCV 2023
            if attention is None:
                raise ValueError("--mask attentive: needs the attention of an EMA encoder")
            # The patches of a block share their score and their noise, so they go one after the other. The score is
            # above 0.5 where a block gets less than its even share of the class token's attention.
            grid = H // patch_size, W // patch_size
            score = 1 / (1 + block_mean(attention, *grid) / attention.mean(1, keepdim=True))
            return remove(score, ratio, block_mean(noise, *grid))
        similarity = patch_similarity(images, patch_size, embeddings, alpha)
        if name == "cluster":
            return remove(cluster_score(similarity, noise), ratio, noise)
        strength = sobel_edges(images.float(), patch_size) if edges else torch.zeros_like(noise)
        candidates = pgs_candidates(strength, noise)
        return remove(pgs_score(similarity, candidates, transport), ratio, noise)


# -----------------------------------------------------------------------------
# Model: a ViT and a causal text transformer. Parameter names and shapes are those of OpenAI CLIP and open_clip, so
# that weights load strictly in both directions.


class QuickGELU(nn.Module):
    """The approximation of GELU in OpenAI's weights."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


# Captions differ in length, and with a range of ratios so do images; `valid` (B, K) says which slots hold a token. The
# others need not cost anything: most of a transformer treats each token by itself, so the real ones lie packed, one
# after the other, (N, D). Attention alone, a few percent of the work, unpacks them to their `places` (N,) of B * K.


class Pack(torch.autograd.Function):
    """The tokens x (B, K, D) at `places`: (N, D). No place comes twice, so the gradient can be copied, not added up."""

    @staticmethod
    def forward(ctx, x, places):
        ctx.save_for_backward(places)
        ctx.shape = x.shape[:2]
        return x.flatten(0, 1)[places]

    @staticmethod
    def backward(ctx, gradient):
        return unpack(gradient, *ctx.saved_tensors, ctx.shape), None


def unpack(x, places, shape):
    """Puts tokens (N, D) back to their places among zeros: (B, K, D), `shape` (B, K)."""
    return x.new_zeros(math.prod(shape), x.shape[1]).index_copy_(0, places, x).view(*shape, -1)


class Attention(nn.Module):
    """Multi-head self-attention with the parameter names of nn.MultiheadAttention."""

    def __init__(self, width):
        super().__init__()
        self.num_heads = width // HEAD_WIDTH
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def heads(self, x, valid=None, places=None):
        """(B, K, D), or (N, D) with its places -> queries, keys, values, each (B, heads, K, HEAD_WIDTH)."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        if places is not None:
            qkv = unpack(qkv, places, valid.shape)
        B, K, _ = qkv.shape
        return qkv.view(B, K, 3, self.num_heads, HEAD_WIDTH).permute(2, 0, 3, 1, 4).unbind(0)

    def mix(self, q, k, v, valid=None, places=None, causal=False):
        """Values averaged by attention, (B, Q, D) for Q queries, or (N, D) with their places."""
        # Padding comes last, where causal attention does not look.
        seen = None if valid is None or causal else valid[:, None, None]
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=causal).transpose(1, 2).flatten(2)
        return self.out_proj(x if places is None else Pack.apply(x, places))


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

    def forward(self, x, valid=None, places=None, causal=False, first_only=False):
        q, k, v = self.attn.heads(self.ln_1(x), valid, places)
        if first_only:  # only the first token's output is wanted: it still sees all the others
            x, q = x[:, :1], q[:, :, :1]
        x = x + self.attn.mix(q, k, v, valid, places, causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks."""

    def __init__(self, config, width, layers):
        super().__init__()
        self.grad_checkpointing = config.grad_checkpointing
        self.resblocks = nn.ModuleList(Block(width, config.quick_gelu) for _ in range(layers))
        # Initialised as CLIP does its text tower: the sum of all residual branches has the scale of a single one.
        for block in self.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width ** -0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width ** -0.5 * (2 * layers) ** -0.5)
            nn.init.zeros_(block.attn.out_proj.bias)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width ** -0.5 * (2 * layers) ** -0.5)

    def run(self, block, x, *layout, **options):
        """One block; with gradient checkpointing its activations are computed again on the way back."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, *layout, use_reentrant=False, preserve_rng_state=False, **options)
        return block(x, *layout, **options)


class VisionTransformer(nn.Module):
    """The image tower (Dosovitskiy et al., ICLR 2021), which embeds and encodes only the patches that it is given."""

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
        """Projections of the patches `keep` (B, K), or of all, plus their positional embeddings: (B, K, D)."""
        patches, position = patchify(images, self.patch_size), self.positional_embedding[1:]
        if keep is not None:
            patches, position = patches.take_along_dim(keep[..., None], dim=1), position[keep]  # both (B, K, ...)
        elif patches.shape[1] != len(position):  # another resolution: stretch the grid of positions
            side, wanted = math.isqrt(len(position)), images.shape[-1] // self.patch_size
            position = position.T.view(1, -1, side, side)
            position = F.interpolate(position, (wanted, wanted), mode="bicubic", antialias=True).flatten(2)[0].T
        return F.linear(patches, self.conv1.weight.flatten(1)) + position   # conv1, at any subset of its positions

    def embed(self, images, keep=None):
        """What enters the first layer: the class token, then those of the patches `keep` (B, K): (B, 1 + K, D)."""
        x = self.patch_tokens(images, keep)
        first = self.class_embedding + self.positional_embedding[0]
        return self.ln_pre(torch.cat([first.to(x.dtype).expand(len(x), 1, -1), x], dim=1))

    def forward(self, images, keep=None, valid=None):
        x, places = self.embed(images, keep), None
        if valid is not None:
            valid = F.pad(valid, (1, 0), value=True)                 # (B, 1 + K) the class token is always real
            places = valid.flatten().nonzero()[:, 0]                 # (N,) waits for the device, which knows N
            x = Pack.apply(x, places)                                # (N, D)
        *blocks, last = self.transformer.resblocks
        for block in blocks:
            x = self.transformer.run(block, x, valid, places)
        if valid is not None:
            x = unpack(x, places, valid.shape)                       # (B, 1 + K, D)
        x = self.transformer.run(last, x, valid, first_only=True)    # (B, 1, D)
        return self.ln_post(x[:, 0]) @ self.proj


class CLIP(nn.Module):
    """Two towers and a temperature. `config.vocab_size` is that of the tokenizer."""

    def __init__(self, config):
        super().__init__()
        size = SIZES[config.model]
        width, embed_dim = size["text_width"], size["embed_dim"]
        self.visual = VisionTransformer(config, size["width"], size["layers"], embed_dim)
        self.transformer = Transformer(config, width, size["text_layers"])
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.randn(config.context_length, width) * 0.01)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, embed_dim) * width ** -0.5)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def encode_image(self, images, keep=None, valid=None):
        """Features (B, D), not normalised. images (B, 3, H, W); only the patches `keep` (B, K) are looked at.

        With `valid` (B, K), the slots that are not real have no influence, and next to no cost.
        """
        return self.visual(images, keep, valid)

    def encode_text(self, tokens):
        """Features (B, D), not normalised, of tokens (B, T): the output at <end>, the highest id.

        What follows <end> is not computed, which is exact: causal attention never looks beyond <end>. Pass tokens on
        the CPU: their lengths are then known without waiting for the device.
        """
        lengths = tokens.argmax(1) + 1
        T, N = int(lengths.max()), int(lengths.sum())
        tokens = tokens.to(self.text_projection.device, non_blocking=True)[:, :T]
        valid = torch.arange(T, device=tokens.device) <= tokens.argmax(1)[:, None]           # (B, T)
        places = (~valid).flatten().byte().argsort(stable=True)[:N]  # nonzero(), without asking the device for N
        x = Pack.apply(self.token_embedding(tokens) + self.positional_embedding[:T], places) # (N, D)
        for block in self.transformer.resblocks:
            x = self.transformer.run(block, x, valid, places, causal=True)
        ends = valid.sum(1).cumsum(0) - 1                                                    # (B,) among the N
        return self.ln_final(x[ends]) @ self.text_projection

    def forward(self, images, tokens, keep=None, valid=None):
        return self.encode_image(images, keep, valid), self.encode_text(tokens), self.logit_scale.exp()


# -----------------------------------------------------------------------------
# The EMA encoder of the attentive mask.


@torch.no_grad()
def class_attention(visual, images, size=0):
    """How much the class token attends to each patch, averaged over layers and heads: (B, L).

    A-CLIP's score; a row sums to less than 1, the rest is attention to itself. Only the class token's row of each map
    is formed, and the last layer ends there. With `size`, the encoder looks at images of that side, a multiple of the
    patch (A-CLIP's efficient version).
    """
    grid = images.shape[-1] // visual.patch_size
    if size:
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    x = visual.embed(images)
    total = 0
    for block in visual.transformer.resblocks:
        q, k, v = block.attn.heads(block.ln_1(x))
        row = (q[:, :, :1] @ k.transpose(2, 3) * HEAD_WIDTH ** -0.5).float().softmax(-1)  # (B, heads, 1, 1 + L)
        total = total + row[:, :, 0, 1:].mean(1)                                           # (B, L)
        if block is not visual.transformer.resblocks[-1]:
            x = x + block.attn.mix(q, k, v)
            x = x + block.mlp(block.ln_2(x))
    attention = total / len(visual.transformer.resblocks)
    if size:
        side = size // visual.patch_size
        attention = F.interpolate(attention.view(-1, 1, side, side), (grid, grid), mode="bilinear").flatten(1)
    return attention


@torch.no_grad()
def update_ema(ema, model, progress):
    """Moves the EMA weights towards the model's; momentum 0.996 -> 1 by a cosine as progress goes 0 -> 1."""
    momentum = 1 - (1 - 0.996) * (math.cos(math.pi * progress) + 1) / 2
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - momentum)


# -----------------------------------------------------------------------------
# Loss.


def ranks():
    """(rank, world_size): (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class Gather(torch.autograd.Function):
    """(B, D) of each rank -> (world_size * B, D) on all. dist.all_gather itself has no gradient."""

    @staticmethod
    def forward(ctx, x):
        gathered = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, x)
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)  # every rank's loss depends on our features
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


LOSS_ROWS = 1024  # of logits in memory at a time: against 32,768 columns 128 MiB, where all rows would take 4 GiB


def cross_entropy_sum(queries, gallery, logit_scale, labels, gallery_real):
    """The summed cross entropy of queries (R, D) against gallery (N, D); labels (R,) of -100 do not count."""
    logits = (logit_scale * queries @ gallery.T).masked_fill(~gallery_real, -math.inf)    # (R, N)
    return F.cross_entropy(logits, labels, reduction="sum")


def clip_loss(image_features, text_features, logit_scale, real=None):
    """Symmetric cross entropy (Radford et al. 2021, figure 3) of features (B, D), which it normalises.

    logit_scale multiplies the cosines. Pairs that are not `real` (B,) bool are left out, as rows and as columns.
    With several ranks, each computes the rows of its own pairs against the columns of all; the mean over the ranks
    of what they return is the loss of the whole batch, and DDP's mean of the gradients is its gradient.
    """
    B, D = image_features.shape
    real = torch.ones(B, dtype=torch.bool, device=image_features.device) if real is None else real
    image_features, text_features = F.normalize(image_features, dim=-1), F.normalize(text_features, dim=-1)
    rank, world_size = ranks()
    all_images, all_texts, all_real = image_features, text_features, real
    if world_size > 1:
        both = torch.cat([image_features, text_features, real[:, None].to(image_features.dtype)], dim=1)
        all_images, all_texts, all_real = Gather.apply(both).split([D, D, 1], dim=1)
        all_real = all_real[:, 0] > 0

    labels = torch.arange(rank * B, (rank + 1) * B, device=real.device)
    labels = labels.where(real, -100)  # -100: cross_entropy skips the row
    loss = 0
    for ours, others in ((image_features, all_texts), (text_features, all_images)):
        for rows, row_labels in zip(ours.split(LOSS_ROWS), labels.split(LOSS_ROWS)):
            # Logits are not kept for the way back, but computed again: next to the encoders they cost nothing.
            loss = loss + checkpoint(cross_entropy_sum, rows, others, logit_scale, row_labels, all_real,
                                     use_reentrant=False, preserve_rng_state=False) / 2
    return loss * world_size / all_real.sum().clamp(min=1)


# -----------------------------------------------------------------------------
# Optimizer and schedule.


def make_optimizer(model, config):
    """AdamW with decay on matrices only: not on biases, norms, other vectors, logit_scale."""
    parameters = list(model.parameters())
    groups = [{"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
              {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, config.lr, config.betas, config.eps, fused=True)


def learning_rate(step, total_steps, peak, warmup):
    """Linear to `peak` over the warm-up, then a cosine to 0; step counts from 0."""
    warmup = min(warmup, total_steps // 5)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (total_steps - warmup))) / 2


# -----------------------------------------------------------------------------
# Checkpoint. The order of the data, the crops and the masks follow from seed and step: there is no random state to
# save, and a resumed run continues as if it had never stopped.


def save_checkpoint(path, **state):
    """Writes a torch file; OSError if it can't be, and then the previous one is still there."""
    with data.appearing(path) as file:
        torch.save(state, file)


def load_checkpoint(path):
    """The dict of a torch file, on the CPU. ValueError with one line if it is missing, corrupt, or would run code."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch remarks on files that it then refuses
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint") from None
    except Exception as error:  # zip, pickle and torch each have their own for a damaged file
        raise ValueError(f"{path}: refused ({type(error).__name__}): damaged, no checkpoint, or one that holds more "
                         "than tensors and plain values and could run code") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path}: not a checkpoint, it holds a {type(state).__name__}")
    return state


# -----------------------------------------------------------------------------
# Pictures of masks.


def masked_pictures(images, keep, valid, patch_size):
    """What the encoder sees of the first images of a batch: (B, H, W, 3) uint8 with the removed patches grey."""
    if keep is None:
        return data.denormalize(images)
    (B, _, H, W), P = images.shape, patch_size
    seen = torch.zeros(B, H // P * (W // P), dtype=torch.bool, device=keep.device)
    seen.scatter_(1, keep[:B], True if valid is None else valid[:B])
    seen = seen.view(B, H // P, W // P, 1).repeat_interleave(P, 1).repeat_interleave(P, 2)  # (B, H, W, 1)
    return np.where(seen.cpu().numpy(), data.denormalize(images), np.uint8(128))


def save_grid(path, grid, titles=(), tile=192):
    """Writes rows of (H, W, 3) uint8 pictures as one PNG; titles stand above the columns."""
    gap, head = 6, 18 if titles else 0
    sheet = Image.new("RGB", (len(grid[0]) * (tile + gap) + gap, head + len(grid) * (tile + gap) + gap), "white")
    for column, title in enumerate(titles):
        ImageDraw.Draw(sheet).text((gap + column * (tile + gap), 4), title, fill="black")
    for r, row in enumerate(grid):
        for c, picture in enumerate(row):
            resample = Image.Resampling.NEAREST if len(picture) < tile else Image.Resampling.LANCZOS
            picture = Image.fromarray(picture).resize((tile, tile), resample)
            sheet.paste(picture, (gap + c * (tile + gap), head + gap + r * (tile + gap)))
    sheet.save(path)


def open_photo(path, size):
    """A photograph as the model sees it in evaluation, (1, 3, size, size): upright, centre square, normalised."""
    try:
        with open(path, "rb") as file:
            image = ImageOps.exif_transpose(data.decode_image(file.read())).convert("RGB")
    except (OSError, ValueError) as error:
        raise ValueError(f"--show-masks {path}: {getattr(error, 'strerror', None) or error}") from None
    image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return data.normalize(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])


def show_masks(config):
    """Writes masks.png: a row a photograph, with its edges and what each mask keeps of it."""
    stored = load_checkpoint(config.resume) if config.resume else {}
    if stored and not {"model", "config"} <= stored.keys():
        raise ValueError(f"--resume {config.resume}: weights only, not a checkpoint of this program")
    for name in ("model", "image_size", "patch_size", "quick_gelu") if stored else ():
        setattr(config, name, stored["config"][name])
    torch.manual_seed(config.seed)
    visual = CLIP(config).visual
    if stored:
        visual.load_state_dict(stored.get("ema") or {
            name.removeprefix("visual."): x for name, x in stored["model"].items() if name.startswith("visual.")})
    generator, P, grid = torch.Generator().manual_seed(config.seed), config.patch_size, []
    for path in config.show_masks:
        images = open_photo(path, config.image_size)
        attention = class_attention(visual, images, config.ema_size)
        edges = sobel_edges(images, P).view(2 * [config.image_size // P]).kron(torch.ones(P, P))     # (H, W)
        row = [data.denormalize(images)[0], (edges * 255).byte()[..., None].expand(-1, -1, 3).numpy()]
        for name in MASKS[1:]:
            keep, valid = make_mask(name, images, config.ratio, generator, patch_size=P, attention=attention,
                                    edges=config.edges, transport=config.transport)
            row.append(masked_pictures(images, keep, valid, P)[0])
        grid.append(row)
    os.makedirs(config.out, exist_ok=True)
    path = os.path.join(config.out, "masks.png")
    save_grid(path, grid, ("photograph", "Sobel edges", *MASKS[1:]))
    print(f"wrote {path}" + ("" if stored else "; attentive: of an encoder that has learned nothing, see --resume"))


# -----------------------------------------------------------------------------
# Training.


def gather_objects(thing):
    """[thing of rank 0, thing of rank 1, ...] on every rank."""
    things = [thing] * ranks()[1]
    if dist.is_initialized():
        dist.all_gather_object(things, thing)
    return things


class Report:
    """Numbers of a step, means over the ranks, on their way from the device to us.

    A GPU works on what it was given while Python runs ahead. Asking for a number makes Python wait for the GPU, and
    then the GPU for Python. So a step's numbers are read when the step after it has been handed over.
    """

    def __init__(self, **numbers):
        device = numbers["loss"].device
        values = torch.stack([x.double() if isinstance(x, torch.Tensor) else  # full: a copy would have to wait
                              torch.full((), x, dtype=torch.float64, device=device) for x in numbers.values()])
        if dist.is_initialized():
            dist.all_reduce(values)
        self.names, self.values = list(numbers), (values / ranks()[1]).to("cpu", non_blocking=True)
        self.arrived = torch.cuda.current_stream().record_event() if device.type == "cuda" else None

    def read(self):
        """{name: float}."""
        if self.arrived:
            self.arrived.synchronize()
        return dict(zip(self.names, self.values.tolist()))


def step_noise(config, step, global_batch, device):
    """This rank's rows of the mask noise of the whole global batch, (local batch, L + 1).

    Drawn for all ranks and sliced: masks then depend neither on their number nor on --accum.
    """
    rank, world_size = ranks()
    L = (config.image_size // config.patch_size) ** 2
    seed = int(np.random.SeedSequence([config.seed, step]).generate_state(1)[0])
    generator = torch.Generator(device).manual_seed(seed)
    return torch.rand(global_batch, L + 1, generator=generator, device=device).chunk(world_size)[rank]


def autocast(device):
    """bf16 on a GPU; on a CPU, float32 as it is."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


@torch.no_grad()
def batch_masks(config, visual, ema, images, noise, alpha):
    """keep, valid for a local batch of uint8 images; what the masks look at is computed from the model as it is now."""
    masks, P = [], config.patch_size
    with autocast(images.device):
        for pixels, part_noise in zip(images.chunk(config.accum), noise.chunk(config.accum)):  # a forward pass each
            pixels = data.normalize(pixels)
            mixed = config.embeddings and config.mask in ("cluster", "pgs")
            embeddings = visual.patch_tokens(pixels) if mixed else None
            attention = class_attention(ema, pixels, config.ema_size) if config.mask == "attentive" else None
            masks.append(make_mask(config.mask, pixels, config.ratio, patch_size=P, noise=part_noise, alpha=alpha,
                                   embeddings=embeddings, attention=attention, edges=config.edges,
                                   transport=config.transport))
    keeps, valids = zip(*masks)
    return torch.cat(keeps), None if valids[0] is None else torch.cat(valids)


def backward(model, images, tokens, keep, valid, real, accum):
    """Computes the gradients of the loss of the whole batch in `accum` passes; returns this rank's loss.

    One pass: the loss, backwards. More: features of all chunks without gradient, the loss and its gradient for the
    features, then each chunk again, now with that gradient (GradCache, Gao et al. 2021). The result is exact.
    """
    def features(rows):
        with autocast(images.device):
            image, text, scale = model(data.normalize(images[rows]), tokens[rows],
                                       None if keep is None else keep[rows], None if valid is None else valid[rows])
        return image.float(), text.float(), scale

    if accum == 1:
        loss = clip_loss(*features(slice(None)), real)
        loss.backward()
        return loss.detach()
    chunks = [slice(first, first + len(images) // accum) for first in range(0, len(images), len(images) // accum)]
    with torch.no_grad():
        image, text, scale = zip(*(features(rows) for rows in chunks))
    cached = [x.requires_grad_() for x in (torch.cat(image), torch.cat(text), scale[0])]
    loss = clip_loss(*cached, real)
    loss.backward()
    for rows in chunks:
        last = rows is chunks[-1]
        with nullcontext() if last or ranks()[1] == 1 else model.no_sync():  # the ranks' gradients meet once, at last
            image, text, scale = features(rows)
            # The temperature's gradient is already that of the whole batch: it goes in once, with the last chunk.
            pairs = [(image, cached[0].grad[rows]), (text, cached[1].grad[rows])] + [(scale, cached[2].grad)] * last
            torch.autograd.backward(*zip(*pairs))
    return loss.detach()


def train_step(config, model, optimizer, ema, images, tokens, real, noise, alpha):
    """One update on a local batch: (loss of this rank, keep, valid). Without noise, nothing is masked.

    Nothing waits for the device, but once for a range of ratios: how many patches stay is known only there.
    """
    clip = getattr(model, "module", model)
    images, real = (x.to(clip.logit_scale.device, non_blocking=True) for x in (images, real))
    keep, valid = (None, None) if noise is None else batch_masks(config, clip.visual, ema, images, noise, alpha)
    loss = backward(model, images, tokens, keep, valid, real, config.accum)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        clip.logit_scale.clamp_(max=math.log(100))  # CLIP: keeps training stable
    if ema:
        update_ema(ema, clip.visual, alpha)
    return loss, keep, valid


def describe(config, clip, world_size, steps_per_epoch, total_steps):
    """The line that says what will happen."""
    L = (config.image_size // config.patch_size) ** 2
    removed = " to ".join(str(round(share * L)) for share in config.ratio) if config.mask != "none" else 0
    return (f"{config.model}, {sum(p.numel() for p in clip.parameters()) / 1e6:.1f}M parameters | "
            f"mask {config.mask}, {removed} of {L} patches removed | "
            f"{world_size} rank{'s' * (world_size > 1)} x {config.batch_size * config.accum} images | "
            f"{steps_per_epoch} steps an epoch, {total_steps} in all")


def kept_share(config, keep, valid):
    """The share of the patches that the encoder sees, mean over the batch: a number, or a tensor on the device."""
    if keep is None:
        return 1.0
    share = keep.shape[1] / (config.image_size // config.patch_size) ** 2
    return share if valid is None else share * valid.float().mean()


def write_names(config, step, names):
    """Writes the names of a batch's samples, of all ranks, to a file in --out; returns its path."""
    path = os.path.join(config.out, f"not_finite_step_{step}.txt")
    names = gather_objects(names)
    if ranks()[0] == 0:
        with open(path, "w") as file:
            file.writelines(f"{name}\n" for part in names for name in part)
    return path


def together(work):
    """What work() returns, once all ranks are done with theirs; ValueError on all if one fails: none waits on."""
    result, fault = None, ""
    try:
        result = work()
    except (ValueError, OSError) as error:
        fault = data.message(error)
    faults = list(filter(None, gather_objects(fault)))
    if faults:
        raise ValueError(faults[0])
    return result


def load_data(config):
    """Shard paths and their index. Rank 0 alone draws the demo data, and prints."""
    rank, _ = ranks()
    together(lambda: not config.data and rank == 0 and data.make_demo("demo"))
    shards = data.expand(config.data or ("demo/train/*.tar",))
    cache, found = os.path.join(config.out, "index.npz"), None
    reads_first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    for my_turn in (reads_first, not reads_first):  # one rank of each machine reads the shards, the others its cache
        found = together(lambda: data.build_index(shards, config.max_bad, cache, config.workers, progress=rank == 0)
                         if my_turn else found)
    index, remarks = found
    for line in remarks if rank == 0 else ():
        print("warning:", line)
    return shards, index


def load_tokenizer(config, shards, index, merges=None):
    """CLIP's own with --vocab, that of the checkpoint if we resume (`merges`), or one learned from the captions."""
    if config.vocab and merges is None:
        return data.Tokenizer.from_file(config.vocab, config.context_length)
    if merges is None and ranks()[0] == 0:
        merges = data.learn_merges(data.sample_captions(shards, index), config.vocab_size - 514)
    return data.Tokenizer(gather_objects(merges)[0], config.context_length)


# Options that may change in the middle of a run: they do not change what is learned. batch_size and accum may if the
# number of ranks changes with them: what counts is their product, which the checkpoint has as global_batch.
FREE = ("val", "vocab", "vocab_size", "max_bad", "batch_size", "accum", "workers", "out", "save_every", "keep",
        "resume", "force", "grad_checkpointing", "compile", "bench", "show_masks")


def resume_state(config, global_batch):
    """The checkpoint to go on from, or {}. ValueError if an option that changes the result differs from it."""
    if not config.resume:
        return {}
    state = load_checkpoint(config.resume)
    if not {"model", "optimizer", "step", "config", "global_batch", "num_samples"} <= state.keys():
        raise ValueError(f"--resume {config.resume}: weights only, no state of a training run")
    then, now = state["config"], asdict(config)
    changed = [f"--{name.replace('_', '-')} was {then[name]}, now {now[name]}"
               for name in then if name in now and name not in FREE and then[name] != now[name]]
    if state["global_batch"] != global_batch:
        changed.append(f"images a step (ranks x --batch-size x --accum) were {state['global_batch']}, "
                       f"now {global_batch}")
    if changed and not config.force:
        raise ValueError(f"--resume {config.resume}: {'; '.join(changed)}. --force goes on all the same")
    return state


def open_log(path, step):
    """The log, open for appending, cut back to the checkpoint's step: what came later will be done again."""
    lines = []
    if step and os.path.exists(path):
        with open(path, "rb") as file:
            lines = [line for line in file if line.endswith(b"\n") and json.loads(line)["step"] <= step]
    with data.appearing(path) as file:
        file.writelines(lines)
    return open(path, "a", buffering=1)


class Stop:
    """Turns the first SIGINT or SIGTERM into a request to stop after the next step; a second one exits at once."""

    def __init__(self):
        self.signal, self.time = 0, 0.0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.request)

    def request(self, number, frame):
        # A Ctrl-C comes twice, from the terminal and from torchrun: two signals within a second are one.
        if self.signal and time.monotonic() - self.time > 1:
            os._exit(128 + number)
        self.signal, self.time = number, time.monotonic()


def build(config, state, device):
    """(clip, model, optimizer, ema): new ones, or as the checkpoint `state` has them.

    model is clip itself, or clip with gradients averaged over the ranks if there are several; ema is the encoder of the
    attentive mask, else None.
    """
    torch.manual_seed(config.seed)
    clip = CLIP(config).to(device)
    optimizer = make_optimizer(clip, config)
    if state:
        try:
            clip.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:  # --force can do much, but not change the shape of tensors
            raise ValueError(f"--resume {config.resume}: does not fit this model: "
                             f"{str(error).splitlines()[-1].strip()}") from None
    ema = copy.deepcopy(clip.visual) if config.mask == "attentive" else None
    if ema and state.get("ema"):
        ema.load_state_dict(state["ema"])
    if config.compile:
        # Layers of a tower share one compiled graph. Towers, last layers, lengths and evaluation make about a dozen;
        # past its limit, 8, torch would run the rest uncompiled.
        torch._dynamo.config.cache_size_limit = 32
        torch._dynamo.config.optimize_ddp = False  # would split larger graphs, for DDP, and stumble over Pack
        for block in (*clip.visual.transformer.resblocks, *clip.transformer.resblocks):
            block.compile()
    # Without device_ids, with which DDP would wait for the tokens to be on the GPU.
    model = DistributedDataParallel(clip) if ranks()[1] > 1 else clip
    return clip, model, optimizer, ema


def epoch_batches(config, shards, index, tokenizer, epoch, steps):
    """(loader, samples): this rank's batches `steps`, a range, of an epoch, and all its sample numbers (steps, B)."""
    rank, world_size = ranks()
    local_batch = config.batch_size * config.accum
    num_steps = len(index) // (local_batch * world_size)  # what is left over waits for another epoch
    order = data.epoch_order(index, config.seed, epoch)[:num_steps * local_batch * world_size]
    samples = order.reshape(num_steps, world_size, local_batch)[:, rank]
    batches = data.Batches(shards, index, samples, tokenizer, config.image_size, config.scale, (config.seed, epoch))
    loader = torch.utils.data.DataLoader(batches, batch_size=None, sampler=steps, num_workers=config.workers,
                                         pin_memory=torch.cuda.is_available(), worker_init_fn=data.ignore_signals)
    return loader, samples


def account(config, shards, epoch, read, lost):
    """Reports the samples of an epoch that did not decode; ValueError if they were more than the share max_bad.

    read: Counter of the samples that this rank read from each shard's number; lost: list of (shard number, cause).
    """
    reads, losts = zip(*gather_objects((read, lost)))
    read, lost = sum(reads, Counter()), sum(losts, [])
    if not lost:
        return
    lines = [f"epoch {epoch + 1}: {len(lost)} of {read.total()} samples skipped"]
    lines += [f"{n:8}  {cause}" for cause, n in Counter(cause for _, cause in lost).most_common(10)]
    bad = Counter(shard for shard, _ in lost)
    lines += [f"{shards[shard]}: none of its {n} samples decodes" for shard, n in bad.items() if n == read[shard]]
    if len(lost) > config.max_bad * read.total():
        raise ValueError("\n".join([*lines, f"more than --max-bad {config.max_bad} of the samples: stopped"]))
    if ranks()[0] == 0:
        print("\n".join(lines))


def train(config, device):
    """Trains a model as `config` says and leaves ckpt.pt, log.jsonl and masks.png in config.out."""
    import evaluate  # here, because evaluate.py imports this file

    rank, world_size = ranks()
    global_batch = config.batch_size * config.accum * world_size
    state = resume_state(config, global_batch)
    if config.data:  # check before work starts; the demo's folders may have yet to be drawn
        for folder in config.val:
            evaluate.read_folder(folder)
    try:
        os.makedirs(config.out, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {config.out}: {error.strerror}; name a folder that can be made") from None
    shards, index = load_data(config)
    if state and state["num_samples"] != len(index) and not config.force:
        raise ValueError(f"--resume {config.resume}: the data had {state['num_samples']} samples, now {len(index)}. "
                         "--force goes on all the same")
    steps_per_epoch = len(index) // global_batch
    if not steps_per_epoch:
        raise ValueError(f"--batch-size {config.batch_size}: {global_batch} images a step of only {len(index)} samples")
    total_steps = config.steps or config.epochs * steps_per_epoch
    masked_steps = total_steps - round(config.unmasked_epochs * steps_per_epoch)
    tokenizer = load_tokenizer(config, shards, index, state.get("merges"))
    config.vocab_size = tokenizer.vocab_size

    step = state.get("step", 0)
    clip, model, optimizer, ema = build(config, state, device)
    state.clear()  # gigabytes that the model and the optimizer hold themselves by now

    def save(name):
        save_checkpoint(os.path.join(config.out, name), model=clip.state_dict(), optimizer=optimizer.state_dict(),
                        ema=ema and ema.state_dict(), config=asdict(config), merges=tokenizer.merges, step=step,
                        global_batch=global_batch, num_samples=len(index))

    def evaluate_all():
        return {folder: evaluate.evaluate(clip, tokenizer, config, folder, rank, world_size) for folder in config.val}

    if rank == 0:
        log = open_log(os.path.join(config.out, "log.jsonl"), step)
        print(describe(config, clip, world_size, steps_per_epoch, total_steps), flush=True)

    def settle(ahead):
        """Reads and logs all but the last `ahead` reports; all of them, and True, if a signal has reached any rank."""
        signalled = False
        while len(reports) > ahead:
            report, record, samples = reports.popleft()
            numbers = report.read()
            if numbers.pop("signalled"):
                signalled, ahead = True, 0
            if not math.isfinite(numbers["loss"]):
                names = write_names(config, record["step"], data.sample_names(shards, index, samples))
                raise ValueError(f"step {record['step']}: the loss is {numbers['loss']}; no checkpoint has seen this "
                                 f"step. Its samples are in {names}")
            latest.update(record | numbers)
            if rank == 0:
                log.write(json.dumps(latest) + "\n")
                bar.set_postfix_str(f"loss {numbers['loss']:.3f}, {record['images_per_s']:.0f} images/s", refresh=False)
                bar.update()
        return signalled

    stop, reports, latest, results = Stop(), deque(), {}, {}
    while step < total_steps:
        epoch, first = divmod(step, steps_per_epoch)
        last = min(steps_per_epoch, first + total_steps - step)
        loader, samples = epoch_batches(config, shards, index, tokenizer, epoch, range(first, last))
        bar = tqdm(total=last, initial=first, desc=f"epoch {epoch + 1}/{math.ceil(total_steps / steps_per_epoch)}",
                   disable=rank > 0, bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} "
                                                "[{elapsed}<{remaining}{postfix}]")
        lost, tick = [], time.perf_counter()
        for batch, (images, tokens, real, bad) in zip(range(first, last), loader):
            alpha = step / total_steps
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, total_steps, config.lr, config.warmup)
            masked = step < masked_steps and config.mask != "none"
            noise = step_noise(config, step, global_batch, device) if masked else None
            loss, keep, valid = train_step(config, model, optimizer, ema, images, tokens, real, noise, alpha)
            step += 1

            images_per_s = round(global_batch / (time.perf_counter() - tick), 1)
            tick = time.perf_counter()
            record = dict(step=step, epoch=epoch + 1, lr=group["lr"], images_per_s=images_per_s)
            report = Report(loss=loss, logit_scale=clip.logit_scale.exp().detach(),
                            kept=kept_share(config, keep, valid), signalled=bool(stop.signal))
            reports.append((report, record, samples[batch]))
            lost += [(int(index["shard"][samples[batch][i]]), cause) for i, cause in bad]
            if rank == 0 and batch == first and (keep is not None or config.mask == "none"):
                shown = data.normalize(images[:8].to(device))
                save_grid(os.path.join(config.out, "masks.png"),
                          [data.denormalize(shown), masked_pictures(shown, keep, valid, config.patch_size)])
            save_now, ended = step % config.save_every == 0, batch + 1 == last
            stopping = settle(ahead=0 if save_now or ended else 1)
            if rank == 0 and (save_now or stopping) and not ended:
                save("ckpt.pt")
            if stopping:
                break
        bar.close()
        if not ended:  # a signal, in the middle of an epoch
            break

        if rank == 0:
            if config.keep and batch + 1 == steps_per_epoch:
                save(f"epoch_{epoch + 1}.pt")
            save("ckpt.pt")
        account(config, shards, epoch, Counter(index["shard"][samples[first:last]].ravel().tolist()), lost)
        results = evaluate_all()
        if rank == 0 and results:
            log.write(json.dumps(latest | {"eval": results}) + "\n")
        if stopping:
            break
    if step < total_steps:
        message = f"stopped after step {step} of {total_steps}; go on with the same command and --resume"
        sys.exit(message if rank == 0 else 1)
    results = results or evaluate_all()  # none yet: resumed at the very end
    if rank == 0:
        if results:
            print(evaluate.table(results))
        path = os.path.join(config.out, "ckpt.pt")
        print(f"wrote {path}; now: python evaluate.py {path}")


# -----------------------------------------------------------------------------
# Bench: what a training step costs under each mask, on one made-up batch that lies in memory.

# Training time relative to CLIP's, as the papers report it (Pei et al. 2025); the last is their CLIP-PGS_0.3.
PAPERS = {("none", (0.0,)): 1.0, ("random", (0.5,)): 0.5, ("cluster", (0.5,)): 0.6, ("attentive", (0.5,)): 1.1,
          ("pgs", (0.5,)): 0.5, ("pgs", (0.3, 0.5)): 0.6}
PEAK_TFLOPS = {"A100": 312, "H100": 989, "H200": 989, "B200": 2250}  # dense bf16, from NVIDIA's data sheets


def made_up_batch(config):
    """(images, tokens, real) on the CPU: noise of two scales, which leaves a range of ratios something to decide, and
    captions as long as CC12M's, 25 tokens on average.
    """
    B, size = config.batch_size * config.accum, config.image_size
    blobs = F.interpolate(torch.rand(B, 3, 28, 28), (size, size), mode="bicubic")
    images = (255 * (blobs + 0.3 * torch.rand(B, 3, size, size))).clamp(0, 255).byte()
    lengths = torch.randint(6, 45, (B, 1)).clamp(max=config.context_length)
    place, end = torch.arange(config.context_length), config.vocab_size - 1
    tokens = torch.randint(1, end, (B, config.context_length))
    tokens = tokens.where(place < lengths - 1, 0).where(place != lengths - 1, end)
    batch = images, tokens, torch.ones(B, dtype=torch.bool)
    return tuple(x.pin_memory() for x in batch) if torch.cuda.is_available() else batch


def peak_memory(device):
    """GiB held at most since the last call: by the tensors of a GPU, else by the whole process (Linux, else nan)."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak / 2 ** 30
    if not os.path.exists("/proc/self/clear_refs"):
        return math.nan
    with open("/proc/self/status") as status, open("/proc/self/clear_refs", "w") as control:
        control.write("5")  # forgets the highest point (proc(5)), when the file is closed: after the next line
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 2 ** 20  # from kB


def bench(config, device):
    """Prints a Markdown table with a row a mask: images/s, time against `none`, the mask's share, memory, FLOP/s.

    Rounds go over all masks in turn, so that a machine that slows down does so for all; times are medians.
    """
    chosen = [("none", (0.0,))] + [(mask, config.ratio) for mask in MASKS[1:]] + [("pgs", (0.3, 0.5))]
    chosen = [row for row in dict.fromkeys(chosen) if config.mask in (row[0], "") or row[0] == "none"]
    rank, world_size = ranks()
    # The EMA encoder is in the memory of all rows. No learning: random pixels would drive all patches to one embedding.
    clip, model, optimizer, ema = build(replace(config, mask="attentive", lr=0.0), {}, device)
    images, tokens, real = made_up_batch(config)
    global_batch = len(images) * world_size
    noise, alpha, on_gpu = step_noise(config, 0, global_batch, device), 0.5, device.type == "cuda"
    synchronize = torch.get_device_module(device).synchronize  # of a CPU: does nothing

    def timed(work):
        synchronize()
        start = time.perf_counter()
        result = work()
        synchronize()
        return time.perf_counter() - start, result

    rounds, warmup = config.steps or (20 if on_gpu else 3), 3 if on_gpu else 1
    seconds, memory, kept, flops = {row: [] for row in chosen}, {}, {}, {}
    turns = [(number, row) for number in range(-warmup, rounds) for row in chosen]
    for number, row in tqdm(turns, "bench", unit=" steps", leave=False, disable=rank > 0):
        this = replace(config, mask=row[0], ratio=row[1])
        masked, teacher = row[0] != "none", ema if row[0] == "attentive" else None
        peak_memory(device)
        step_time, (loss, keep, valid) = timed(lambda: train_step(
            this, model, optimizer, teacher, images, tokens, real, noise if masked else None, alpha))
        memory[row], kept[row] = peak_memory(device), float(kept_share(this, keep, valid))
        on_device = images.to(device)
        mask_time, _ = timed(lambda: masked and batch_masks(this, clip.visual, ema, on_device, noise, alpha))
        if number == -warmup and on_gpu:  # the counter does not know a CPU's attention
            with (torch.no_grad(), autocast(device), FlopCounterMode(display=False) as counter,
                  torch.compiler.set_stance("force_eager")):
                clip(data.normalize(on_device), tokens, keep, valid)
            flops[row] = 3 * counter.get_total_flops()  # the way back costs twice the way there
        if number >= 0:
            seconds[row].append((step_time, mask_time))
    if rank > 0:
        return

    name = torch.cuda.get_device_name() if on_gpu else f"CPU with {torch.get_num_threads()} threads"
    print(f"{config.model} at {config.image_size}, {world_size} x {len(images)} images, {rounds} rounds"
          f"{', compiled' * config.compile}, PyTorch {torch.__version__}, {name}")
    table, (base, _) = [], np.median(seconds[chosen[0]], axis=0)
    for row in chosen:
        step_time, mask_time = np.median(seconds[row], axis=0)
        cells = {"mask": row[0], "ratio": " ".join(map(str, row[1])), "kept": f"{kept[row]:.2f}",
                 "images/s": f"{global_batch / step_time:.1f}", "time": f"{step_time / base:.2f}",
                 "papers": PAPERS.get(row, ""), "in mask": f"{mask_time / step_time:.1%}", "GiB": f"{memory[row]:.1f}"}
        if on_gpu:
            tflops = flops[row] / step_time / 1e12
            peak = next((peak for gpu, peak in PEAK_TFLOPS.items() if gpu in name), math.nan)
            cells |= {"TFLOP/s": f"{tflops:.0f}", "MFU": f"{tflops / peak:.1%}"}
        table.append(cells)
    for line in (table[0], ["--------:"] * len(table[0]), *(cells.values() for cells in table)):
        print("| " + " | ".join(f"{cell:>9}" for cell in line) + " |")


# -----------------------------------------------------------------------------
# Main.


def parse(arguments):
    """A Config from the command line. Without --data, what DEMO says takes the place of the defaults."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     epilog="Without --data, the demo has other defaults: " +
                                     ", ".join(f"{name} {value}" for name, value in DEMO.items()))
    for f in fields(Config):
        shown = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else str(f.default)
        how = dict(metavar="X", type=type(f.default), nargs="?" if f.name == "resume" else None)
        if isinstance(f.default, bool):
            how = dict(action=argparse.BooleanOptionalAction)
        elif isinstance(f.default, tuple):
            how = dict(metavar="X", type=float if f.default else str, nargs="+")
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, **how,
                            help=f"{f.metadata['help']} (default: {shown or 'none'})")
    options = parser.parse_args(arguments)
    if options.bench:  # all masks
        parser.set_defaults(mask="", batch_size=512 if torch.cuda.is_available() else 16)
    elif not options.data and not options.show_masks:
        parser.set_defaults(**DEMO)
    options = parser.parse_args(arguments)
    if options.resume is None:  # --resume without a path
        path = os.path.join(options.out, "ckpt.pt")
        options.resume = path if os.path.exists(path) else ""
    return Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in vars(options).items()})


def main():
    """Trains; one process a rank under torchrun, else alone."""
    config = parse(sys.argv[1:])
    world_size, local_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    fault = None
    try:
        check(config)
        if config.show_masks:
            return show_masks(config)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.backends.cuda.enable_cudnn_sdp(False)  # flash attention instead: no plan to make for each length
        if world_size > 1:
            # Long enough for one rank to read the index of a large data set while the others wait.
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
        (bench if config.bench else train)(config, device)
    except SystemExit as stop:  # a signal has ended the training
        fault = stop.code
    except (ValueError, OSError) as error:
        fault = f"error: {data.message(error)}"
    except KeyboardInterrupt:  # before there is a step to finish
        fault = "interrupted before training began"
    except torch.OutOfMemoryError:
        fault = "error: out of GPU memory; half the --batch-size and twice the --accum make the same update with less"
    except torch._dynamo.exc.TorchDynamoException as error:  # no C++ compiler, no Triton
        fault = f"error: --compile: {str(error).splitlines()[0]}"
    except Exception:  # a bug
        fault = traceback.format_exc()
    if world_size > 1:
        # Without Python's orderly end. There NCCL may wait for a rank that waits for us, and gloo's threads abort the
        # process if they let go of a tensor then: DDP leaks the process group, so destroying it stops neither.
        if isinstance(fault, str):
            sys.stderr.write(f"{fault}\n")
        sys.stdout.flush()
        os._exit(1 if fault else 0)
    if fault:
        sys.exit(fault)


if __name__ == "__main__":
    main()
