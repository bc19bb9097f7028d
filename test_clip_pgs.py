"""The promises of this project, one behaviour a test, in the order of the code: clip_pgs.py, data.py, evaluate.py.

    pytest -q                        everything: a minute or two on 2 CPU cores, no GPU, no network, no data
    pytest -q -k "mask or sinkhorn"  a part of it

Expected values come from elsewhere: a loop, a closed form, float64, finite differences, a picture drawn by hand.
"""
import copy
import gzip
import io
import json
import math
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import fields
from itertools import islice, pairwise
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU computes in bf16: nothing would be equal to the last digit

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.nn.parallel import DistributedDataParallel

import clip_pgs
import data
import evaluate
from clip_pgs import CLIP, MASKS, Config, make_mask, patch_similarity, sinkhorn, sobel_edges

torch.set_num_threads(1)  # tiny tensors, and the processes started here use one thread, too
HERE = os.path.dirname(os.path.abspath(__file__))
CPU = torch.device("cpu")

clip_pgs.SIZES["tiny"] = dict(embed_dim=16, width=128, layers=2, text_width=64, text_layers=2)


def tiny(**changes):
    """A Config whose images have 4 x 4 patches of 4 x 4 pixels."""
    return Config(**dict(model="tiny", image_size=16, patch_size=4, context_length=24, vocab_size=600) | changes)


def random_clip(config):
    """A model in which no bias is zero and no norm the identity, so that none of them can be forgotten unseen."""
    torch.manual_seed(0)
    clip = CLIP(config)
    for p in clip.parameters():
        p.data += 0.1 * torch.randn_like(p) * (p.ndim == 1)
    return clip


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise_images(B, H=16, W=16, seed=0):
    return torch.randn(B, 3, H, W, generator=seeded(seed))


def random_tokens(B, T=24, end=599):
    """(B, T): <start>, between 1 and T - 2 ids, <end>, zeros."""
    rng, tokens = np.random.default_rng(0), torch.zeros(B, T, dtype=torch.int64)
    for row in tokens:
        length = rng.integers(1, T - 1)
        row[:length + 2] = torch.tensor([end - 1, *rng.integers(1, end - 1, length), end])
    return tokens


def picture(size=32, background=(90, 100, 110)):
    """A red disc with a white cross on a plain background, as PIL draws it."""
    image = Image.new("RGB", (size, size), background)
    draw, s = ImageDraw.Draw(image), size / 32
    draw.ellipse((9 * s, 9 * s, 26 * s, 26 * s), fill=(220, 40, 30))
    draw.line((12 * s, 17 * s, 23 * s, 17 * s), fill="white", width=2)
    draw.line((17 * s, 12 * s, 17 * s, 23 * s), fill="white", width=2)
    return image


def for_model(image):
    """(1, 3, H, W): a PIL image with CLIP's mean and std."""
    pixels = np.asarray(image.convert("RGB"), np.float64).transpose(2, 0, 1) / 255
    return torch.tensor((pixels - np.reshape(data.MEAN, (3, 1, 1))) / np.reshape(data.STD, (3, 1, 1)))[None].float()


def two_colours(size=16, split=6):
    image = Image.new("RGB", (size, size), "black")
    image.paste((255, 200, 0), (split, 0, size, size))
    return image


def scene(seed, size=224):
    """A sky that fades, a meadow with grain, a house and a ball with inner detail: as smooth and rough as photographs."""
    rng, y = np.random.default_rng(seed), np.linspace(0, 1, size)[:, None, None]
    blobs = Image.fromarray(rng.normal(0, 1, (size // 8, size // 8)).astype(np.float32))
    blobs = np.asarray(blobs.resize((size, size), Image.Resampling.BICUBIC))[..., None]
    sky, meadow = (1 - y) * rng.uniform(90, 220, 3) + y * rng.uniform(140, 250, 3), rng.uniform(60, 140, 3)
    horizon = size * rng.integers(8, 11) // 14
    pixels = np.where(np.arange(size)[:, None, None] < horizon, sky + 2 * blobs, meadow + 25 * blobs)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw, (house, ball) = ImageDraw.Draw(image), rng.integers(0, 256, (2, 3)).tolist()
    left, width, x, r = (int(rng.integers(*limits)) for limits in ((10, 100), (40, 80), (120, 190), (20, 34)))
    draw.rectangle((left, horizon - width, left + width, horizon + 20), fill=tuple(house))
    draw.ellipse((x - r, horizon - 20 - r, x + r, horizon - 20 + r), fill=tuple(ball))
    for step in range(0, width, 16):
        draw.rectangle((left + step + 4, horizon - width + 8, left + step + 10, horizon - width + 24), fill="black")
        draw.line((x - r + step, horizon - 30, x - r + step + 6, horizon - 10), fill="white", width=3)
    return image


KINDS = {"noise": noise_images(1), "constant": for_model(Image.new("RGB", (16, 16), (13, 130, 77))),
         "zero": torch.zeros(1, 3, 16, 16), "two colours": for_model(two_colours()), "drawn": for_model(picture(16))}
each_kind = pytest.mark.parametrize("images", KINDS.values(), ids=KINDS.keys())
each_mask = pytest.mark.parametrize("mask", MASKS)


def masked(name, images, ratio, seed=0, **options):
    """make_mask on patches of 4 x 4 pixels; attentive sees a random attention."""
    L = images.shape[2] // 4 * (images.shape[3] // 4)
    attention = torch.rand(len(images), L, generator=seeded(seed + 1))
    return make_mask(name, images, ratio, seeded(seed), **dict(patch_size=4, attention=attention) | options)


# -----------------------------------------------------------------------------
# Config and command line.

def squeezed(text):
    return "".join(text.split())


def test_help_mentions_every_option_with_its_meaning_and_default(capsys):
    with pytest.raises(SystemExit):
        clip_pgs.parse(["--help"])
    shown = squeezed(capsys.readouterr().out)
    for f in fields(Config):
        default = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else str(f.default)
        assert f"--{f.name.replace('_', '-')}" in shown
        assert squeezed(f"{f.metadata['help']} (default: {default or 'none'})") in shown


def test_with_data_the_defaults_are_those_of_the_paper():
    assert clip_pgs.parse(["--data", "x.tar"]) == Config(data=("x.tar",))


def test_without_data_the_demo_has_its_own_defaults_and_options_still_win():
    config = clip_pgs.parse(["--lr", "0.5"])
    assert config == Config(**clip_pgs.DEMO | dict(lr=0.5))


def test_options_arrive_with_the_type_of_their_field():
    config = clip_pgs.parse("--data a b --ratio 0.3 0.5 --no-edges --steps 7 --lr 1 --keep --mask none".split())
    assert config == Config(data=("a", "b"), ratio=(0.3, 0.5), edges=False, steps=7, lr=1.0, keep=True, mask="none")


@pytest.mark.parametrize("name, value", [
    ("model", "ViT-B-17"), ("mask", "rnd"), ("ratio", (1.0,)), ("ratio", (-0.1,)), ("ratio", (0.5, 0.3)),
    ("ratio", (0.1, 0.2, 0.3)), ("ratio", (math.nan,)), ("patch_size", 15), ("patch_size", 0), ("ema_size", 100),
    ("batch_size", 0), ("accum", 0), ("epochs", 0), ("context_length", 2), ("vocab_size", 513), ("lr", -1.0),
    ("lr", math.nan), ("workers", -1), ("seed", -1), ("scale", (0.0, 1.0)), ("scale", (0.9, 1.1)), ("betas", (0.9,)),
    ("betas", (0.9, 1.0)), ("unmasked_epochs", -1.0), ("save_every", 0)])
def test_a_value_that_cannot_work_is_refused_in_one_line_that_names_its_option(name, value):
    with pytest.raises(ValueError, match=f"^--{name.replace('_', '-')}[^\n]+$"):
        clip_pgs.check(Config(**{name: value}))


def test_the_paper_s_defaults_can_work():
    clip_pgs.check(Config())


# -----------------------------------------------------------------------------
# Masks: similarity, edges.

def patches_by_loop(image, P):
    """Patches of one (3, H, W) image, row by row, in float64."""
    image = image.double().numpy()
    return [image[:, y:y + P, x:x + P] for y in range(0, image.shape[1], P) for x in range(0, image.shape[2], P)]


@pytest.mark.parametrize("size", [(16, 16), (8, 20)])
def test_similarity_is_the_cosine_of_patches_of_zero_mean(size):
    images = noise_images(2, *size)
    for image, S in zip(images, patch_similarity(images, 4)):
        patches = [p - p.mean() for p in patches_by_loop(image, 4)]
        for i, a in enumerate(patches):
            for j, b in enumerate(patches):
                assert S[i, j].item() == pytest.approx((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()), abs=1e-5)


def test_similarity_does_not_see_brightness_and_contrast():
    images = noise_images(2)
    assert patch_similarity(3 * images + 5, 4).allclose(patch_similarity(images, 4), atol=1e-5)


@each_kind
def test_similarity_is_symmetric_and_at_most_one(images):
    S = patch_similarity(images, 4)
    assert S.isfinite().all() and S.abs().max() < 1 + 1e-5
    assert S.equal(S.mT) and S.diagonal(dim1=1, dim2=2).allclose(torch.tensor(1.0))


def test_flat_grey_patches_are_similar_to_each_other_and_not_to_the_others():
    images = noise_images(1)
    images[..., :4], images[..., 12:] = 1.23, -0.77                     # the first and the last column of patches
    S, flat = patch_similarity(images, 4)[0], torch.tensor([True, False, False, True] * 4)
    assert S[flat][:, flat].min() > 0.999 and S[flat][:, ~flat].abs().max() < 0.01


@torch.no_grad()
def test_embeddings_are_what_enters_the_first_layer_before_its_norm():
    visual, images = random_clip(tiny()).visual, noise_images(2)
    expected = F.conv2d(images, visual.conv1.weight, stride=4).flatten(2).mT + visual.positional_embedding[1:]
    assert visual.patch_tokens(images).allclose(expected, atol=1e-5)
    assert visual.ln_pre(visual.patch_tokens(images)).allclose(visual.embed(images)[:, 1:], atol=1e-5)
    keep = torch.tensor([[3, 5], [0, 9]])
    assert visual.patch_tokens(images, keep).allclose(expected.take_along_dim(keep[..., None], 1), atol=1e-5)


def test_alpha_mixes_the_similarity_of_pixels_with_that_of_embeddings():
    images, embeddings = noise_images(2), torch.randn(2, 16, 5, generator=seeded())
    z = embeddings / embeddings.norm(dim=-1, keepdim=True)
    expected = 0.75 * patch_similarity(images, 4) + 0.25 * z @ z.mT
    assert patch_similarity(images, 4, embeddings, alpha=0.25).allclose(expected, atol=1e-6)


def edges_by_loop(image, P):
    """Sobel by hand on one normalised (3, H, W) image: luminance in float64, borders repeated."""
    weights = np.array((0.299, 0.587, 0.114))
    colour = image.double().numpy() * np.reshape(data.STD, (3, 1, 1)) + np.reshape(data.MEAN, (3, 1, 1))
    y = np.pad(np.tensordot(weights, colour, 1), 1, mode="edge")
    magnitude = np.zeros(image.shape[1:])
    for r in range(magnitude.shape[0]):
        for c in range(magnitude.shape[1]):
            right = y[r, c + 2] + 2 * y[r + 1, c + 2] + y[r + 2, c + 2]
            left = y[r, c] + 2 * y[r + 1, c] + y[r + 2, c]
            above = y[r, c] + 2 * y[r, c + 1] + y[r, c + 2]
            below = y[r + 2, c] + 2 * y[r + 2, c + 1] + y[r + 2, c + 2]
            magnitude[r, c] = math.hypot(right - left, below - above)
    edges = np.array([p.mean() for p in patches_by_loop(torch.tensor(magnitude)[None], P)])
    return (edges - edges.min()) / (edges.max() - edges.min())


@pytest.mark.parametrize("images", [noise_images(1), noise_images(1, 8, 20), KINDS["two colours"], KINDS["drawn"]])
def test_edges_equal_sobel_s_filter_by_hand(images):
    assert sobel_edges(images, 4)[0].numpy() == pytest.approx(edges_by_loop(images[0], 4), abs=1e-5)


@pytest.mark.parametrize("images", [KINDS["constant"], KINDS["zero"], for_model(Image.new("RGB", (20, 12), "white"))])
def test_an_image_of_one_colour_has_no_edges(images):
    assert sobel_edges(images, 4).eq(0).all()


def test_edges_are_highest_where_the_image_changes():
    edges = sobel_edges(for_model(two_colours(split=8)), 4).view(4, 4)   # half black: the two middle columns
    assert edges[:, 1:3].allclose(torch.tensor(1.0)) and edges[:, [0, 3]].max() < 1e-6


def test_edges_of_an_image_do_not_depend_on_its_neighbours_in_the_batch():
    images = torch.cat([*KINDS.values()])
    assert sobel_edges(images, 4).allclose(torch.cat([sobel_edges(x[None], 4) for x in images]), atol=1e-6)


def test_edges_refuse_an_image_that_patches_do_not_cover():
    with pytest.raises(ValueError, match="16x18"):
        sobel_edges(noise_images(1, 16, 18), 4)


# -----------------------------------------------------------------------------
# Masks: optimal transport.

def alternating_sinkhorn(S, eps=0.05, tolerance=1e-9):
    """Rows and columns normalised in turns, in float64, until nothing moves."""
    plan, before = (S.double() / eps).exp(), 0
    while torch.as_tensor(plan - before).abs().max() > tolerance:
        before = plan
        plan = plan / plan.sum(2, keepdim=True)
        plan = plan / plan.sum(1, keepdim=True)
    return plan


SIGNS = torch.tensor([1.0] * 13 + [-1.0] * 3)
REPEATED = F.normalize(torch.randn(16, 4, generator=seeded()), dim=1)[[0] * 7 + [1] * 3 + [2, 3, 4, 5, 6, 7]]
each_similarity = pytest.mark.parametrize("S", [
    *(patch_similarity(images, 4) for images in KINDS.values()), torch.ones(1, 16, 16), torch.zeros(1, 16, 16),
    torch.eye(16)[None], torch.outer(SIGNS, SIGNS)[None], (REPEATED @ REPEATED.T)[None]],
    ids=[*KINDS, "ones", "zeros", "identity", "unequal halves", "repeated rows"])


@each_similarity
def test_sinkhorn_rows_and_columns_sum_to_one(S):
    T = sinkhorn(S)
    assert T.sum(1).allclose(torch.tensor(1.0), atol=1e-3) and T.sum(2).allclose(torch.tensor(1.0), atol=1e-3)


@each_similarity
def test_sinkhorn_is_symmetric_and_positive(S):
    T = sinkhorn(S)
    assert T.allclose(T.mT, atol=1e-6) and T.gt(0).all()


@each_similarity
def test_sinkhorn_equals_the_plain_alternating_one_run_to_convergence(S):
    assert sinkhorn(S).double().allclose(alternating_sinkhorn(S), atol=1e-4, rtol=0)


def random_symmetric(kind):
    """(4, 40, 40) in [-1, 1] with ones on the diagonal: cosines of random vectors, or any numbers."""
    x = F.normalize(torch.randn(4, 40, 12, generator=seeded(), dtype=torch.float64), dim=-1)
    S = x @ x.mT if kind == "cosines" else (2 * torch.rand(4, 40, 40, generator=seeded(), dtype=torch.float64) - 1).triu()
    return (S.triu(1) + S.triu(1).mT + torch.eye(40)).float()


@pytest.mark.parametrize("kind", ["cosines", "any"])
def test_the_balanced_similarity_ranks_each_row_as_the_log_of_the_transport_plan(kind):
    S = random_symmetric(kind)
    log_plan = alternating_sinkhorn(S, tolerance=1e-14).log()
    assert clip_pgs.balance(S).argsort(-1).equal(log_plan.argsort(-1))
    assert clip_pgs.balance(S).double().allclose(1 + 0.05 * log_plan, atol=1e-5, rtol=0)


def test_the_balanced_similarity_of_opposite_patches_is_finite():
    assert clip_pgs.balance(torch.outer(SIGNS, SIGNS)[None]).isfinite().all()


def test_sinkhorn_computes_in_float32_under_autocast():
    S = patch_similarity(noise_images(2), 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert sinkhorn(S).equal(sinkhorn(S.clone())) and sinkhorn(S).dtype == torch.float32
        inside = sinkhorn(S)
    assert inside.equal(sinkhorn(S))


# -----------------------------------------------------------------------------
# Masks: which patches go.

@pytest.mark.parametrize("low, high", [(0.5, 0.5), (0.25, 0.75), (0.0, 0.4)])
def test_the_highest_scores_go_as_many_as_are_above_one_half_within_the_range(low, high):
    rng = random.Random(0)
    score = torch.tensor([[rng.randint(0, 10) / 10 + bias for _ in range(20)] for bias in (-0.3, 0, 0.1, 0.4)])
    noise = torch.rand(4, 20, generator=seeded())
    keep, valid = clip_pgs.remove(score, (low, high), noise)
    for row in range(4):
        n = min(max(sum(s > 0.5 for s in score[row].tolist()), round(20 * low)), round(20 * high))
        order = sorted(range(20), key=lambda i: (score[row, i].item(), noise[row, i].item()), reverse=True)
        real = keep[row] if valid is None else keep[row][valid[row]]
        assert real.tolist() == sorted(order[n:])


@pytest.mark.parametrize("mask", MASKS[1:])
@pytest.mark.parametrize("size", [(16, 16), (8, 20), (4, 12), (4, 4)])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3, 0.5, 0.75, 0.99])
def test_one_ratio_removes_exactly_that_share_of_every_image(mask, size, ratio):
    images, L = noise_images(3, *size), size[0] * size[1] // 16
    keep, valid = masked(mask, images, (ratio,))
    assert valid is None and keep.shape[1] >= 1
    assert abs(L - keep.shape[1] - ratio * L) <= 0.5 or keep.shape[1] == 1


@each_mask
@pytest.mark.parametrize("ratio", [(0.5,), (0.3, 0.7)])
def test_kept_patches_are_sorted_different_and_inside_the_image(mask, ratio):
    keep, _ = masked(mask, torch.cat([*KINDS.values()]), ratio)
    assert keep.dtype == torch.int64 and keep.min() >= 0 and keep.max() < 16
    for row in keep.tolist():
        assert len(set(row)) == len(row)
    real = masked(mask, noise_images(4), (0.5,))[0]
    assert real.diff(dim=1).gt(0).all()


@pytest.mark.parametrize("mask", MASKS[1:])
def test_a_range_removes_between_low_and_high_and_real_slots_come_first_and_sorted(mask):
    keep, valid = masked(mask, torch.cat([*KINDS.values()] * 4), (0.25, 0.75))
    assert keep.shape[1] == 12 and valid.sum(1).min() >= 4
    for slots, real in zip(keep, valid):
        count = int(real.sum())
        assert real[:count].all() and slots[:count].diff().gt(0).all()


def test_a_random_range_draws_every_number_in_it():
    _, valid = masked("random", noise_images(400), (0.25, 0.5))
    counts = Counter((16 - valid.sum(1)).tolist())
    assert sorted(counts) == [4, 5, 6, 7, 8] and min(counts.values()) > 400 / 5 / 2


def test_random_keeps_every_patch_equally_often():
    keep, _ = masked("random", noise_images(2000), (0.5,))
    share = keep.flatten().bincount(minlength=16) / 2000
    assert share.sub(0.5).abs().max() < 5 * math.sqrt(0.25 / 2000)      # five standard deviations


def test_none_keeps_everything():
    keep, valid = masked("none", noise_images(2), (0.5,))
    assert keep.tolist() == [list(range(16))] * 2 and valid is None


def blocks_by_loop(attention):
    """(16,) -> the mean over each patch's 2x2 block of a 4x4 grid."""
    grid = attention.view(4, 4)
    return [grid[y // 2 * 2:y // 2 * 2 + 2, x // 2 * 2:x // 2 * 2 + 2].mean().item() for y in range(4) for x in range(4)]


def test_attentive_keeps_the_blocks_with_the_highest_attention():
    attention = torch.rand(3, 16, generator=seeded())
    keep, _ = masked("attentive", noise_images(3), (0.5,), attention=attention)
    assert keep.tolist() == [sorted(sorted(range(16), key=blocks_by_loop(row).__getitem__)[8:]) for row in attention]


def test_attentive_ranks_single_patches_where_the_grid_is_odd():
    attention = torch.rand(3, 15, generator=seeded())
    keep, _ = masked("attentive", noise_images(3, 12, 20), (0.4,), attention=attention)
    assert keep.tolist() == [sorted(sorted(range(15), key=row.__getitem__)[6:]) for row in attention.tolist()]


@pytest.mark.parametrize("attention", [torch.rand(20, 196, generator=seeded()), torch.ones(20, 196)])
@pytest.mark.parametrize("ratio", [(0.5,), (0.3,)])
def test_attentive_splits_at_most_one_block_and_removes_the_exact_number(attention, ratio):
    keep, _ = make_mask("attentive", torch.zeros(20, 3, 224, 224), ratio, seeded(1), attention=attention)
    kept = torch.zeros(20, 196).scatter(1, keep, 1.0).view(20, 7, 2, 7, 2).sum((2, 4))  # (20, 7, 7) of each block
    assert keep.shape[1] == 196 - round(ratio[0] * 196) and (kept % 4 > 0).sum((1, 2)).max() <= 1


def test_attentive_with_a_range_removes_blocks_that_get_less_than_an_even_share():
    attention = torch.full((1, 16), 1 / 28)
    attention[0, [0, 1, 4, 5]] = 4 / 28                                 # one block of four is above the mean
    keep, valid = masked("attentive", noise_images(1), (0.0, 0.9), attention=attention)
    assert keep[valid].tolist() == [0, 1, 4, 5]


def test_attentive_without_attention_says_what_it_needs():
    with pytest.raises(ValueError, match="EMA"):
        masked("attentive", noise_images(1), (0.5,), attention=None)


def test_cluster_removes_what_is_most_similar_to_its_anchor():
    images, noise = noise_images(3), torch.rand(3, 17, generator=seeded())
    keep, _ = masked("cluster", images, (0.5,), noise=noise)
    S = patch_similarity(images, 4)
    for row in range(3):                                                # 3 % of 16 patches: one anchor
        anchor = noise[row, :16].argmax()
        assert keep[row].tolist() == S[row, anchor].argsort()[:8].sort().values.tolist()


@pytest.mark.parametrize("transport", [True, False])
def test_pgs_removes_what_is_most_similar_to_a_candidate(transport):
    images, noise = torch.cat([for_model(scene(i)) for i in range(3)]), torch.rand(3, 197, generator=seeded(1))
    keep, _ = make_mask("pgs", images, (0.5,), noise=noise, transport=transport)
    S = patch_similarity(images).double()
    score = 1 + 0.05 * alternating_sinkhorn(S).log() if transport else S
    for row in range(3):                                                # 5 % of 196 patches: ten candidates
        candidates = np.argsort(edges_by_loop(images[row], 16) - noise[row, :196].numpy())[:10]
        removed = score[row, candidates].amax(0) + 1e-5 * noise[row, :196]
        assert keep[row].tolist() == removed.argsort()[:98].sort().values.tolist()


def test_among_equally_similar_patches_the_candidates_are_the_first_to_go():
    noise = torch.rand(1, 17, generator=seeded())
    keep, _ = masked("pgs", KINDS["constant"], (0.5,), noise=noise)
    assert keep[0].tolist() == noise[0, :16].argsort()[:8].sort().values.tolist()


def test_pgs_without_edges_proposes_patches_by_noise_alone():
    noise = torch.full((1, 17), 0.1)
    noise[0, 6] = 0.9                                                   # in the drawn disc, where edges are high
    images = KINDS["drawn"]
    assert 6 not in masked("pgs", images, (0.1,), noise=noise, edges=False)[0]
    assert 6 in masked("pgs", images, (0.1,), noise=noise * 0.5, edges=True)[0]


def patches_that_differ(mask, one, other):
    """How many of the 98 patches that `one` removes stay under `other`, mean over 12 scenes; one, other: options."""
    images, noise = torch.cat([for_model(scene(i)) for i in range(12)]), torch.rand(12, 197, generator=seeded())
    torch.manual_seed(0)
    visual = CLIP(Config()).visual
    with torch.no_grad():
        options = dict(noise=noise, embeddings=visual.patch_tokens(images), alpha=0.5)
    removed = [torch.ones(12, 196).scatter(1, make_mask(mask, images, (0.5,), **options | changes)[0], 0.0)
               for changes in (one, other)]
    return (removed[0] * (1 - removed[1])).sum(1).mean().item()


@pytest.mark.parametrize("mask, switch, least", [
    ("pgs", dict(edges=False), 12), ("pgs", dict(transport=False), 2.5), ("pgs", dict(embeddings=None), 2.5),
    ("cluster", dict(embeddings=None), 2.5)])
def test_every_switch_changes_the_mask_of_a_picture(mask, switch, least):
    assert least < patches_that_differ(mask, {}, switch) < 50


def test_blocks_change_the_mask_of_a_picture():
    images = torch.cat([for_model(scene(i)) for i in range(4)])
    torch.manual_seed(0)
    attention, noise = clip_pgs.class_attention(CLIP(Config()).visual, images), torch.rand(4, 197, generator=seeded())
    keep, _ = make_mask("attentive", images, (0.5,), noise=noise, attention=attention)
    single = attention.argsort(1, descending=True)[:, :98]              # the patches that rank alone would keep
    assert np.mean([len(set(a) - set(b)) for a, b in zip(keep.tolist(), single.tolist())]) > 10


@each_mask
@pytest.mark.parametrize("ratio", [(0.5,), (0.3, 0.7)])
def test_a_mask_does_not_depend_on_the_other_images_in_the_batch(mask, ratio):
    images = torch.cat([*KINDS.values()])
    noise, attention = torch.rand(5, 17, generator=seeded()), torch.rand(5, 16, generator=seeded(1))
    embeddings = torch.randn(5, 16, 8, generator=seeded(2))

    def mask_of(rows):
        return make_mask(mask, images[rows], ratio, patch_size=4, noise=noise[rows], alpha=0.3,
                         embeddings=embeddings[rows], attention=attention[rows])

    keep, valid = mask_of(slice(None))
    for i in range(5):
        alone, real = mask_of([i])
        assert alone[0].equal(keep[i]) and (valid is None or real[0].equal(valid[i]))


@each_mask
def test_the_same_generator_makes_the_same_mask_and_another_one_another(mask):
    images = noise_images(4)
    first, again = (masked(mask, images, (0.5,), seed=0)[0] for _ in range(2))
    assert first.equal(again)
    assert mask == "none" or not first.equal(masked(mask, images, (0.5,), seed=1)[0])


@each_mask
def test_a_mask_is_the_same_under_autocast(mask):
    images = noise_images(4)
    with torch.autocast("cpu", torch.bfloat16):
        inside = masked(mask, images, (0.5,))[0]
    assert inside.equal(masked(mask, images, (0.5,))[0])


def test_unknown_mask_names_the_choices():
    with pytest.raises(ValueError, match="none, random, cluster, attentive, pgs"):
        masked("dropout", noise_images(1), (0.5,))


@pytest.mark.parametrize("ratio", [(1.0,), (-0.1,), (0.5, 1.0), (0.6, 0.5), ()])
def test_a_ratio_outside_its_range_is_refused(ratio):
    with pytest.raises(ValueError, match="--ratio"):
        masked("random", noise_images(1), ratio)


def ranks_of(x):
    """Ranks, equal values sharing the mean of theirs."""
    return ((x[:, None] > x).sum(1) + 0.5 * (x[:, None] == x).sum(1)).double()


def test_how_often_a_patch_is_proposed_falls_with_its_edges():
    edges = torch.linspace(0, 1, 64) ** 2
    drawn = clip_pgs.pgs_candidates(edges.expand(20_000, -1), torch.rand(20_000, 64, generator=seeded()))
    often = drawn.flatten().bincount(minlength=64)
    assert torch.stack([ranks_of(edges), ranks_of(often)]).corrcoef()[0, 1] < -0.9


def test_every_patch_without_edges_is_proposed_sometimes():
    edges = torch.ones(64)
    edges[10:50] = 0
    drawn = clip_pgs.pgs_candidates(edges.expand(1000, -1), torch.rand(1000, 64, generator=seeded()))
    assert drawn.shape == (1000, 3) and drawn.flatten().bincount(minlength=64)[10:50].gt(0).all()


def test_pgs_keeps_more_edges_than_random_does():
    images = for_model(picture(64)).expand(50, -1, -1, -1)
    edges = torch.tensor(edges_by_loop(images[0], 4))
    kept = {mask: edges[masked(mask, images, (0.5,))[0]].sum(1).mean() / edges.sum() for mask in ("pgs", "random")}
    assert kept["random"].item() == pytest.approx(0.5, abs=0.03) and kept["pgs"] > 0.65


# -----------------------------------------------------------------------------
# Model.

def test_vit_b_16_has_as_many_parameters_as_open_clip_s():
    with CPU, torch.device("meta"):
        assert sum(p.numel() for p in CLIP(Config()).parameters()) == 149_620_737


def test_parameters_have_open_clip_s_names():
    block = ["ln_1.weight", "ln_1.bias", "attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight",
             "attn.out_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight",
             "mlp.c_proj.bias"]
    blocks = [f"transformer.resblocks.{i}.{name}" for i in (0, 1) for name in block]
    visual = ["class_embedding", "positional_embedding", "proj", "conv1.weight", "ln_pre.weight", "ln_pre.bias",
              "ln_post.weight", "ln_post.bias", *blocks]
    names = ["positional_embedding", "text_projection", "logit_scale", "token_embedding.weight", "ln_final.weight",
             "ln_final.bias", *blocks, *(f"visual.{name}" for name in visual)]
    assert sorted(CLIP(tiny()).state_dict()) == sorted(names)


def test_quick_gelu_is_x_times_sigmoid_of_1_702_x():
    x = torch.linspace(-4, 4, 9, dtype=torch.float64)
    expected = [v / (1 + math.exp(-1.702 * v)) for v in x.tolist()]
    block = CLIP(tiny(quick_gelu=True)).visual.transformer.resblocks[0]
    assert block.mlp.gelu(x).tolist() == pytest.approx(expected, rel=1e-12)


def test_a_block_equals_pytorch_s_own_transformer_layer():
    block = random_clip(tiny()).visual.transformer.resblocks[0]
    layer = torch.nn.TransformerEncoderLayer(128, 2, 512, 0.0, "gelu", batch_first=True, norm_first=True)
    names = {"attn.": "self_attn.", "ln_1": "norm1", "ln_2": "norm2", "mlp.c_fc": "linear1", "mlp.c_proj": "linear2"}
    for name, p in block.named_parameters():
        ours = next(prefix for prefix in names if name.startswith(prefix))
        layer.get_parameter(name.replace(ours, names[ours], 1)).data.copy_(p)
    x = torch.randn(2, 5, 128, generator=seeded())
    assert block(x).allclose(layer(x), atol=1e-5)


def test_keeping_all_patches_changes_nothing_at_all():
    clip, images = random_clip(tiny()), noise_images(3)
    assert clip.encode_image(images, torch.arange(16).expand(3, 16)).equal(clip.encode_image(images))


def test_features_do_not_depend_on_the_pixels_of_a_removed_patch():
    clip, images = random_clip(tiny()), noise_images(2)
    keep = torch.tensor([[0, 1, 2, 3, 4, 6, 9, 15]] * 2)
    changed = images.clone()
    changed[:, :, 4:8, 4:8] = 77                                        # patch 5
    assert clip.encode_image(changed, keep).equal(clip.encode_image(images, keep))
    assert not clip.encode_image(changed).allclose(clip.encode_image(images))


def test_a_kept_patch_brings_its_own_position():
    clip, images = random_clip(tiny()), torch.zeros(1, 3, 16, 16)
    one, other = (clip.encode_image(images, torch.tensor([[i]])) for i in (3, 4))
    assert not one.allclose(other, atol=1e-3)


def ragged(B):
    """Images with between 1 and 12 of their 16 patches kept, and the features of each encoded alone."""
    clip, images = random_clip(tiny()), noise_images(B)
    keep = torch.rand(B, 16, generator=seeded()).argsort(1)[:, :12]
    valid = torch.arange(12) < torch.randint(1, 13, (B, 1), generator=seeded())
    alone = torch.cat([clip.encode_image(images[i:i + 1], keep[i:i + 1, valid[i]]) for i in range(B)])
    return clip, images, keep, valid, alone


def test_padded_slots_do_not_change_the_features():
    clip, images, keep, valid, alone = ragged(20)
    assert clip.encode_image(images, keep, valid).allclose(alone, atol=1e-5)


def test_padded_slots_do_not_change_the_gradients():
    clip, images, keep, valid, alone = ragged(5)
    weight, parameters = torch.randn(5, 16, generator=seeded()), [*clip.visual.parameters()]
    expected = torch.autograd.grad((alone * weight).sum(), parameters)
    images.requires_grad_()
    loss = (clip.encode_image(images, keep, valid) * weight).sum()
    *gradients, pixels = torch.autograd.grad(loss, [*parameters, images])
    assert all(ours.allclose(theirs, atol=1e-4) for ours, theirs in zip(gradients, expected))
    seen = torch.zeros(5, 16).scatter(1, keep, valid.float())
    assert clip_pgs.patchify(pixels, 4).abs().sum(2).gt(0).equal(seen.gt(0))


def tokens_computed(tower, work):
    """How many tokens the first layer's MLP sees while work() runs."""
    seen = []
    with tower.resblocks[0].mlp.register_forward_hook(lambda mlp, inputs, x: seen.append(len(x.flatten(0, -2)))):
        work()
    return sum(seen)


def test_padded_slots_are_not_computed():
    clip, images, keep, valid, _ = ragged(20)
    computed = tokens_computed(clip.visual.transformer, lambda: clip.encode_image(images, keep, valid))
    assert computed == valid.sum() + 20 < valid.numel()                 # a class token an image


def test_a_caption_is_computed_up_to_its_end():
    clip, tokens = random_clip(tiny()), random_tokens(20)
    computed = tokens_computed(clip.transformer, lambda: clip.encode_text(tokens))
    assert computed == tokens.ne(0).sum() < tokens.numel()


def test_unpacking_undoes_packing_in_value_and_gradient():
    x, places = torch.randn(2, 3, 4, generator=seeded(), dtype=torch.float64), torch.tensor([0, 1, 4])
    there_and_back = clip_pgs.unpack(clip_pgs.Pack.apply(x, places), places, (2, 3))
    assert there_and_back.equal(x * torch.tensor([[1, 1, 0], [0, 1, 0]])[..., None])
    assert torch.autograd.gradcheck(clip_pgs.Pack.apply, (x.requires_grad_(), places))
    packed = torch.randn(3, 4, generator=seeded(), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda packed: clip_pgs.unpack(packed, places, (2, 3)), packed)


def test_a_caption_s_feature_does_not_depend_on_what_follows_its_end():
    clip, tokens = random_clip(tiny()), random_tokens(6)
    filled = tokens.where(tokens != 0, torch.randint(1, 500, tokens.shape, generator=seeded()))
    assert clip.encode_text(filled).allclose(clip.encode_text(tokens), atol=1e-5)


def test_a_caption_s_feature_depends_on_every_token_before_its_end():
    clip, tokens = random_clip(tiny()), torch.tensor([[598, 1, 2, 3, 4, 599, 0, 0]])
    for i in range(1, 5):
        changed = tokens.clone()
        changed[0, i] = 77
        assert not clip.encode_text(changed).allclose(clip.encode_text(tokens), atol=1e-4)


def test_captions_encoded_together_get_the_features_of_each_alone():
    clip, tokens = random_clip(tiny()), random_tokens(20)
    alone = torch.cat([clip.encode_text(row[None]) for row in tokens])
    assert clip.encode_text(tokens).allclose(alone, atol=1e-5)


@pytest.mark.parametrize("ratio", [(0.5,), (0.25, 0.75)])
def test_gradient_checkpointing_gives_the_same_bits(ratio):
    assert one_step(tiny(ratio=ratio, grad_checkpointing=True)).equal(one_step(tiny(ratio=ratio)))


# -----------------------------------------------------------------------------
# The EMA encoder of the attentive mask.

def class_attention_by_brute_force(visual, images):
    """Full softmax maps of every layer and head in float64; of those the class token's row."""
    visual, rows = copy.deepcopy(visual).double(), []
    x = visual.embed(images.double())
    for block in visual.transformer.resblocks:
        q, k, _ = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, dim=2)
        for head in (slice(0, 64), slice(64, 128)):
            maps = (q[:, :, head] @ k[:, :, head].mT / 8).softmax(2)
            rows.append(maps[:, 0, 1:])
        x = block(x)
    return torch.stack(rows).mean(0)


def test_class_attention_is_the_class_token_s_row_of_all_attention_maps():
    visual, images = random_clip(tiny()).visual, noise_images(3)
    expected = class_attention_by_brute_force(visual, images)
    assert clip_pgs.class_attention(visual, images).double().allclose(expected, atol=1e-6)
    assert not clip_pgs.class_attention(visual, images).requires_grad


def test_class_attention_at_half_the_size_is_stretched_over_all_patches():
    visual, images = random_clip(tiny()).visual, noise_images(3)
    half = F.interpolate(images, (8, 8), mode="bilinear", antialias=True)
    expected = F.interpolate(class_attention_by_brute_force(visual, half).view(3, 1, 2, 2), (4, 4), mode="bilinear")
    assert clip_pgs.class_attention(visual, images, size=8).double().allclose(expected.flatten(1), atol=1e-6)


@pytest.mark.parametrize("progress, share", [(0, 0.004), (0.5, 0.002), (1, 0)])
def test_the_ema_takes_a_share_of_the_model_that_falls_to_zero_by_a_cosine(progress, share):
    ema, model = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    expected = [(1 - share) * e + share * m for e, m in zip(ema.parameters(), model.parameters())]
    clip_pgs.update_ema(ema, model, progress)
    assert all(e.allclose(x, atol=1e-7) for e, x in zip(ema.parameters(), expected))


# -----------------------------------------------------------------------------
# Loss.

def features(B=6, D=4):
    return [torch.randn(B, D, dtype=torch.float64, generator=seeded(i), requires_grad=True) for i in (0, 1)]


def loss_by_loop(images, texts, scale):
    """Symmetric cross entropy as two nested loops over pairs."""
    B, total = len(images), 0.0
    cosine = [[(i @ t / i.norm() / t.norm()).item() * scale for t in texts] for i in images]
    for a in range(B):
        total += math.log(sum(math.exp(cosine[a][b]) for b in range(B))) - cosine[a][a]
        total += math.log(sum(math.exp(cosine[b][a]) for b in range(B))) - cosine[a][a]
    return total / (2 * B)


def test_the_loss_equals_a_double_loop():
    images, texts = features()
    assert clip_pgs.clip_loss(images, texts, 14.3).item() == pytest.approx(loss_by_loop(images, texts, 14.3), abs=1e-12)


def test_the_gradients_of_the_loss_equal_finite_differences():
    scale, valid = torch.tensor(5.0, dtype=torch.float64, requires_grad=True), torch.tensor([True] * 4 + [False, True])
    assert torch.autograd.gradcheck(clip_pgs.clip_loss, (*features(), scale))
    assert torch.autograd.gradcheck(clip_pgs.clip_loss, (*features(), scale, valid))


def test_logits_computed_a_few_rows_at_a_time_give_the_loss_and_gradient_of_all(monkeypatch):
    images, texts = features()
    whole = torch.autograd.grad(clip_pgs.clip_loss(images, texts, 9.0), (images, texts))
    monkeypatch.setattr(clip_pgs, "LOSS_ROWS", 4)  # of 6: one part is shorter
    loss = clip_pgs.clip_loss(images, texts, 9.0)
    assert loss.item() == pytest.approx(loss_by_loop(images, texts, 9.0), abs=1e-12)
    assert all(a.allclose(b, rtol=0, atol=1e-12) for a, b in zip(torch.autograd.grad(loss, (images, texts)), whole))


def test_identical_features_cost_log_batch_size():
    same = torch.ones(7, 4)
    assert clip_pgs.clip_loss(same, same, 100.0).item() == pytest.approx(math.log(7), abs=1e-5)


def test_pairs_that_are_not_valid_are_left_out_as_rows_and_as_columns():
    images, texts = features()
    valid = torch.tensor([True, False, True, True, False, True])
    expected = loss_by_loop(images[valid], texts[valid], 9.0)
    assert clip_pgs.clip_loss(images, texts, 9.0, valid).item() == pytest.approx(expected, abs=1e-12)


def test_a_batch_without_a_valid_pair_costs_nothing_and_has_no_gradient():
    images, texts = features()
    loss = clip_pgs.clip_loss(images, texts, 9.0, torch.zeros(6, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and images.grad.eq(0).all() and texts.grad.eq(0).all()


# -----------------------------------------------------------------------------
# One step, in one pass or many, on one rank or two.

def one_step(config):
    """(1 + P,) loss and gradients of a step on 8 pairs, one of them not valid, shared out among the ranks."""
    rank, world_size = clip_pgs.ranks()
    clip = random_clip(config)
    model = DistributedDataParallel(clip) if world_size > 1 else clip
    images = torch.randint(256, (8, 3, 16, 16), generator=seeded(), dtype=torch.uint8).chunk(world_size)[rank]
    tokens, real = random_tokens(8).chunk(world_size)[rank], (torch.arange(8) != 5).chunk(world_size)[rank]
    noise = clip_pgs.step_noise(config, 3, 8, CPU)
    keep, valid = clip_pgs.batch_masks(config, clip.visual, clip.visual, images, noise, 0.5)
    loss = clip_pgs.backward(model, images, tokens, keep, valid, real, config.accum)
    mean = torch.tensor([clip_pgs.Report(loss=loss).read()["loss"]])
    return torch.cat([mean, *(p.grad.flatten() for p in clip.parameters())])


RANGE = tiny(mask="pgs", ratio=(0.25, 0.75))


@each_mask
@pytest.mark.parametrize("ratio", [(0.5,), (0.25, 0.75)])
def test_many_small_passes_make_the_gradients_of_one_large_batch(mask, ratio):
    config = tiny(mask=mask, ratio=ratio)
    whole, parts = one_step(config), one_step(tiny(mask=mask, ratio=ratio, accum=4))
    assert whole[1:].abs().max() > 0.1 and parts.allclose(whole, rtol=0, atol=1e-5)


def work_of_a_rank(rank, folder):
    """What two processes do for the tests below; leaves its results in the folder."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)  # rank 1 reads the index that rank 0 has made
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    steps = [one_step(RANGE), one_step(tiny(mask="pgs", ratio=(0.25, 0.75), accum=2))]
    noise = clip_pgs.step_noise(RANGE, 3, 8, CPU)
    clip_pgs.train(clip_pgs.parse(options(folder, "--batch-size", 4, "--out", f"{folder}/two")), CPU)
    clip_pgs.train(clip_pgs.parse(options(folder, "--batch-size", 2, "--accum", 2, "--out", f"{folder}/resumed",
                                          "--resume", f"{folder}/one/epoch_1.pt")), CPU)
    with pytest.raises(ValueError, match="zero.bad: empty file"):  # rank 0 alone reads it; both end
        clip_pgs.train(clip_pgs.parse(["--data", f"{folder}/zero.bad", "--out", f"{folder}/three"]), CPU)
    torch.save((steps, noise), f"{folder}/rank_{rank}.pt")
    os._exit(0)  # as main does


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """A folder with the work of one process (`one`) and of two: gradients, masks, whole training runs."""
    folder = tmp_path_factory.mktemp("two_ranks")
    draw_shards(folder)
    (folder / "zero.bad").touch()
    command(*options(folder, "--out", folder / "one", "--keep"))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(work_of_a_rank, (str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("accum", [1, 2])
def test_two_ranks_give_the_loss_and_gradients_of_one_with_both_batches(two_ranks, accum):
    expected = one_step(RANGE)
    for rank in (0, 1):
        steps, _ = torch.load(two_ranks / f"rank_{rank}.pt")
        assert steps[accum - 1].allclose(expected, rtol=0, atol=1e-5)


def test_two_ranks_never_draw_the_same_masks(two_ranks):
    (_, first), (_, second) = (torch.load(two_ranks / f"rank_{rank}.pt") for rank in (0, 1))
    assert torch.cat([first, second]).equal(clip_pgs.step_noise(RANGE, 3, 8, CPU))
    assert len(torch.cat([first, second]).unique(dim=0)) == 8


def test_a_run_on_two_ranks_has_the_losses_of_one_with_the_same_global_batch(two_ranks):
    assert losses(two_ranks / "two") == pytest.approx(losses(two_ranks / "one"), abs=1e-5)


def test_a_run_of_one_rank_goes_on_with_two(two_ranks):
    assert losses(two_ranks / "resumed") == pytest.approx(losses(two_ranks / "one")[5:], abs=1e-5)


# -----------------------------------------------------------------------------
# What a step asks of the device.

@each_mask
def test_a_step_at_a_fixed_ratio_reads_nothing_back_from_the_device(monkeypatch, mask):
    monkeypatch.setattr(torch, "autocast", lambda *where, **how: nullcontext())  # which the meta device does not know
    with torch.device("meta"):  # where no tensor has a value: to read one is an error
        clip, noise = CLIP(tiny()), torch.empty(4, 17)
    images, real = torch.zeros(4, 3, 16, 16, dtype=torch.uint8), torch.ones(4, dtype=torch.bool)
    optimizer, ema = torch.optim.SGD(clip.parameters()), copy.deepcopy(clip.visual)
    loss, _, _ = clip_pgs.train_step(tiny(mask=mask), clip, optimizer, ema, images, random_tokens(4), real, noise, 0.5)
    assert loss.is_meta


# -----------------------------------------------------------------------------
# Optimizer and schedule.

def test_only_matrices_decay():
    clip = CLIP(tiny())
    decay, rest = clip_pgs.make_optimizer(clip, tiny(weight_decay=0.2)).param_groups
    assert decay["weight_decay"] == 0.2 and rest["weight_decay"] == 0
    assert {p.ndim for p in decay["params"]} == {2, 4} and {p.ndim for p in rest["params"]} == {0, 1}
    assert len(decay["params"]) + len(rest["params"]) == len(list(clip.parameters()))


def test_the_learning_rate_rises_in_a_line_and_falls_in_a_cosine_to_zero():
    rates = [clip_pgs.learning_rate(step, 110, peak=2.0, warmup=10) for step in (0, 4, 9, 10, 35, 60, 85, 109, 110)]
    cosine = [1 + math.cos(math.pi * share) for share in (0, 0.25, 0.5, 0.75, 0.99, 1)]
    assert rates == pytest.approx([0.2, 1.0, 2.0, *cosine], abs=1e-12)


def test_warm_up_takes_at_most_a_fifth_of_a_run():
    assert [clip_pgs.learning_rate(step, 10, 1.0, 10_000) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert clip_pgs.learning_rate(0, 1, 1.0, 10_000) == 1.0


# -----------------------------------------------------------------------------
# Checkpoint.

@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_a_checkpoint_that_cannot_be_finished_leaves_the_one_before_whole(tmp_path, monkeypatch, broken):
    path = str(tmp_path / "ckpt.pt")
    clip_pgs.save_checkpoint(path, step=1)

    def fail(*arguments):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(clip_pgs.os, broken, fail)
    with pytest.raises(OSError, match=r"ckpt.pt: could not be written \(No space left[^\n]*$"):
        clip_pgs.save_checkpoint(path, step=2)
    assert clip_pgs.load_checkpoint(path) == {"step": 1}


def test_a_checkpoint_gets_its_name_only_when_it_is_whole(tmp_path, monkeypatch):
    path, seen = str(tmp_path / "ckpt.pt"), []
    clip_pgs.save_checkpoint(path, step=1)
    rename = os.replace
    monkeypatch.setattr(clip_pgs.os, "replace", lambda old, new: (seen.append(torch.load(old)), rename(old, new)))
    clip_pgs.save_checkpoint(path, step=2)
    assert seen == [{"step": 2}] and os.listdir(tmp_path) == ["ckpt.pt"]


class Evil:
    """A pickle of it writes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    for write in (lambda x, path: path.write_bytes(pickle.dumps(x, 2)), torch.save):
        write({"model": Evil(str(tmp_path / "pwned"))}, tmp_path / "evil.pt")
        with pytest.raises(ValueError, match="^[^\n]*evil.pt: refused[^\n]*could run code$"):
            clip_pgs.load_checkpoint(str(tmp_path / "evil.pt"))
    assert not (tmp_path / "pwned").exists()


def saved(thing):
    raw = io.BytesIO()
    torch.save(thing, raw)
    return raw.getvalue()


@pytest.mark.parametrize("raw", [b"", b"not a checkpoint", saved({"step": 1})[:300], saved([1, 2]), None],
                         ids=["empty", "text", "cut", "list", "missing"])
def test_a_damaged_checkpoint_is_refused_in_one_line_that_names_it(tmp_path, raw):
    path = tmp_path / "ckpt.pt"
    if raw is not None:
        path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"^[^\n]*ckpt.pt: [^\n]+$"):
        clip_pgs.load_checkpoint(str(path))


# -----------------------------------------------------------------------------
# Pictures of masks.

def test_normalised_images_have_clip_s_mean_and_deviation_and_come_back_as_they_were():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert data.normalize(pixels)[0, 1, 3, 3].item() == pytest.approx((51 / 255 - 0.4578275) / 0.26130258)
    back = data.denormalize(data.normalize(pixels))
    assert (back == pixels.permute(0, 2, 3, 1).numpy()).all()


def test_removed_patches_are_grey_in_the_picture_and_kept_ones_as_they_were():
    images = for_model(picture(16))
    seen = clip_pgs.masked_pictures(images, torch.tensor([[0, 5, 15, 1]]), torch.tensor([[True, True, True, False]]), 4)
    expected = np.full((16, 16, 3), 128, np.uint8)
    for y, x in ((0, 0), (4, 4), (12, 12)):
        expected[y:y + 4, x:x + 4] = np.asarray(picture(16))[y:y + 4, x:x + 4]
    assert (seen[0] == expected).all()


def test_a_photograph_is_shown_upright_and_cut_to_its_middle(tmp_path):
    image = Image.new("RGB", (60, 30), "blue")
    image.paste("red", (15, 0, 30, 30))                                 # middle square: left half red, right half blue
    exif = Image.Exif()
    exif[0x0112] = 3                                                    # stored upside down
    image.rotate(180).save(tmp_path / "photo.png", exif=exif)
    shown = data.denormalize(clip_pgs.open_photo(str(tmp_path / "photo.png"), 16))[0]
    assert shown[8, 3].tolist() == [255, 0, 0] and shown[8, 12].tolist() == [0, 0, 255]


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "I;16", "1"])
def test_masks_are_shown_of_a_photograph_of_any_mode(tmp_path, mode):
    name = tmp_path / ("photo.jpg" if mode == "CMYK" else "photo.png")
    (Image.new("I;16", (50, 40), 9) if mode == "I;16" else picture(50).convert(mode)).save(name)
    command("--show-masks", name, name, "--model", "tiny", "--image-size", 16, "--patch-size", 4, "--out",
            tmp_path / "out")
    sheet = Image.open(tmp_path / "out" / "masks.png")
    assert sheet.width == 6 * 198 + 6 and sheet.height == 18 + 2 * 198 + 6  # photograph, edges, four masks; two rows


# -----------------------------------------------------------------------------
# Training.

WORDS = "red green blue small large old new round square striped plain dotted".split()


def png(seed=0, size=20):
    raw = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    Image.fromarray(pixels).save(raw, "PNG")
    return raw.getvalue()


def caption_of(i):
    return f"a {WORDS[i % 12]} {WORDS[i * 5 % 12]} thing number {i}"


def write_shard(path, members, **options):
    """A tar with these (name, bytes) members, by Python's own tarfile."""
    with tarfile.open(path, "w", **options) as tar:
        for name, raw in members:
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
    return str(path)


def pairs(numbers, broken=()):
    for i in numbers:
        yield f"{i:04d}.png", b"no picture" if i in broken else png(i)
        yield f"{i:04d}.txt", caption_of(i).encode()


def draw_shards(folder, broken=()):
    """Two shards of 20 pairs each."""
    for shard in (0, 1):
        write_shard(folder / f"{shard}.tar", pairs(range(20 * shard, 20 * shard + 20), broken))


def options(folder, *more):
    """The command line of a tiny run: 5 steps an epoch, 10 in all."""
    return ["--data", f"{folder}/*.tar", *map(str, (
        "--model", "tiny", "--image-size", 16, "--patch-size", 4, "--context-length", 12, "--vocab-size", 600,
        "--batch-size", 8, "--epochs", 2, "--workers", 0, *more))]


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder):
    return [record["loss"] for record in read_log(folder)]


def without_speed(log):
    return [{k: v for k, v in record.items() if k != "images_per_s"} for record in log]


def command(*arguments):
    """`python clip_pgs.py arguments`, in this process, which keeps its command line and its signals."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["clip_pgs.py", *map(str, arguments)])
        try:
            clip_pgs.main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


@pytest.fixture
def train(tmp_path):
    """train(options, out=folder): a tiny run on 40 pairs; returns its log."""
    draw_shards(tmp_path)

    def run(*more, out="out"):
        command(*options(tmp_path, "--out", tmp_path / out, *more))
        return read_log(tmp_path / out)
    return run


def test_a_run_leaves_a_log_a_checkpoint_and_a_picture_and_says_what_to_do_next(train, tmp_path, capsys):
    log = train()
    assert [(record["step"], record["epoch"]) for record in log] == [(i + 1, i // 5 + 1) for i in range(10)]
    assert log[0].keys() == {"step", "epoch", "loss", "lr", "logit_scale", "images_per_s", "kept"}
    assert log[0]["kept"] == 0.5 and log[0]["loss"] > 0
    assert sorted(os.listdir(tmp_path / "out")) == ["ckpt.pt", "index.npz", "log.jsonl", "masks.png"]
    assert clip_pgs.load_checkpoint(str(tmp_path / "out" / "ckpt.pt"))["step"] == 10
    printed = capsys.readouterr().out
    assert "8 of 16 patches removed" in printed and "python evaluate.py" in printed.splitlines()[-1]


def test_the_same_seed_gives_the_same_losses_to_the_last_digit(train):
    first = train("--seed", 1)
    assert without_speed(train("--seed", 1, out="again")) == without_speed(first)
    assert without_speed(train("--seed", 2, out="other")) != without_speed(first)


def test_the_number_of_workers_changes_nothing(train):
    assert without_speed(train("--workers", 2, out="two")) == without_speed(train())


@each_mask
def test_a_run_goes_on_from_an_epoch_s_end_as_if_it_had_never_stopped(train, tmp_path, mask):
    whole = train("--mask", mask, "--keep", "--ratio", 0.3, 0.5)
    rest = train("--mask", mask, "--ratio", 0.3, 0.5, "--resume", tmp_path / "out" / "epoch_1.pt", out="rest")
    assert without_speed(rest) == without_speed(whole)[5:]


def test_accumulated_runs_have_the_losses_of_the_large_batch(train):
    parts = train("--mask", "attentive", "--batch-size", 2, "--accum", 4, out="parts")
    whole = train("--mask", "attentive")
    assert [r["loss"] for r in parts] == pytest.approx([r["loss"] for r in whole], abs=1e-5)


def test_training_learns_its_pairs_by_heart(train):
    log = train("--epochs", 20, "--lr", 0.003, "--mask", "none", "--scale", 1, 1)
    assert np.mean([record["loss"] for record in log[-5:]]) < 1         # chance: log(8) = 2.1


def test_the_last_epochs_can_see_whole_images(train):
    assert [record["kept"] for record in train("--unmasked-epochs", 0.6)] == [0.5] * 7 + [1.0] * 3


def test_logit_scale_never_exceeds_100(train, tmp_path):
    train("--steps", 5)
    path = str(tmp_path / "out" / "ckpt.pt")
    state = clip_pgs.load_checkpoint(path)
    state["model"]["logit_scale"].fill_(9)
    clip_pgs.save_checkpoint(path, **state)
    log = train("--steps", 8, "--resume", "--force")
    assert log[5]["logit_scale"] == pytest.approx(100) and max(r["logit_scale"] for r in log[5:]) < 100.001


def test_a_loss_that_is_not_finite_stops_the_run_unsaved_and_names_the_samples(train, tmp_path):
    train("--steps", 3)
    path = str(tmp_path / "out" / "ckpt.pt")
    state = clip_pgs.load_checkpoint(path)
    state["model"]["visual.proj"].fill_(math.nan)
    clip_pgs.save_checkpoint(path, **state)
    with pytest.raises(SystemExit, match="step 4: the loss is nan[^\n]*not_finite_step_4.txt$"):
        train("--steps", 5, "--resume", "--force", "--save-every", 1)
    names = (tmp_path / "out" / "not_finite_step_4.txt").read_text().splitlines()
    assert len(names) == 8 and all(".tar: 00" in name and name.endswith(".png") for name in names)
    assert clip_pgs.load_checkpoint(path)["step"] == 3


def test_resuming_with_another_learning_rate_says_so_and_wants_force(train):
    train("--steps", 3)
    with pytest.raises(SystemExit, match=r"--lr was 0.001, now 0.5[^\n]*--force"):
        train("--steps", 3, "--lr", 0.5, "--resume")
    assert len(train("--steps", 5, "--lr", 0.5, "--resume", "--force")) == 5


def test_resuming_with_another_global_batch_is_refused_but_its_parts_may_change(train):
    train("--steps", 3)
    with pytest.raises(SystemExit, match="were 8, now 4"):
        train("--steps", 3, "--batch-size", 4, "--resume")
    assert len(train("--steps", 3, "--batch-size", 4, "--accum", 2, "--resume")) == 3


def test_resume_alone_starts_fresh_where_there_is_no_checkpoint(train):
    assert len(train("--resume", "--steps", 2)) == 2


def test_resuming_on_fewer_samples_than_before_is_refused(train, tmp_path):
    train("--steps", 3)
    write_shard(tmp_path / "1.tar", pairs(range(20, 36)))               # one sample in ten is gone: another order
    with pytest.raises(SystemExit, match="40[^\n]*36[^\n]*--force"):
        train("--steps", 3, "--resume")


def test_force_goes_on_with_another_mask_even_one_that_needs_an_ema_encoder(train):
    train("--steps", 2, "--mask", "random")
    assert len(train("--steps", 4, "--mask", "attentive", "--resume", "--force")) == 4


@pytest.mark.parametrize("option", [("--model", "demo"), ("--context-length", 8)])
def test_force_cannot_fit_a_checkpoint_into_another_model(train, option):
    train("--steps", 2)
    with pytest.raises(SystemExit, match=r"^error: [^\n]*ckpt.pt[^\n]*$"):
        train("--steps", 2, *option, "--resume", "--force")


def test_masks_can_be_shown_with_the_encoder_of_a_checkpoint(train, tmp_path, capsys):
    train("--mask", "attentive", "--steps", 2)
    picture(40).save(tmp_path / "photo.png")
    capsys.readouterr()
    command("--show-masks", tmp_path / "photo.png", "--resume", tmp_path / "out" / "ckpt.pt", "--out", tmp_path / "new")
    assert capsys.readouterr().out == f"wrote {tmp_path}/new/masks.png\n" and (tmp_path / "new" / "masks.png").exists()


def test_masks_cannot_be_shown_with_weights_of_an_unknown_model(tmp_path):
    picture(40).save(tmp_path / "photo.png")
    clip_pgs.save_checkpoint(str(tmp_path / "bare.pt"), **CLIP(tiny()).state_dict())
    with pytest.raises(SystemExit, match=r"^error: [^\n]*bare.pt[^\n]*$"):
        command("--show-masks", tmp_path / "photo.png", "--resume", tmp_path / "bare.pt", "--out", tmp_path / "shown")


def test_every_epoch_is_evaluated_and_the_result_is_in_the_log_and_on_the_screen(train, tmp_path, capsys):
    folder = tmp_path / "val"
    os.makedirs(folder / "test")
    write_shard(folder / "test" / "0.tar", [(f"{i}.{kind}", raw) for i in range(4)
                                            for kind, raw in (("png", png(i)), ("cls", b"%d" % (i % 2)))])
    for name, text in {"test/nshards.txt": "1", "classnames.txt": "cat\ndog",
                       "zeroshot_classification_templates.txt": "a {c}"}.items():
        (folder / name).write_text(text)
    evaluated = [(r["step"], r["eval"][str(folder)]["acc5"]) for r in train("--val", folder) if "eval" in r]
    assert evaluated == [(5, 1.0), (10, 1.0)] and "acc1" in capsys.readouterr().out


def test_a_truncated_shard_costs_its_tail_and_a_warning(train, tmp_path, capsys):
    os.truncate(tmp_path / "1.tar", os.path.getsize(tmp_path / "1.tar") // 2)
    assert len(train("--max-bad", 0.5)) == 2 * 3                        # at least 24 of 40 pairs are left
    assert "warning" in (printed := capsys.readouterr().out) and "1.tar: truncated" in printed


def test_broken_samples_are_counted_and_reported_once(train, tmp_path, capsys):
    draw_shards(tmp_path, broken=(7, 33))
    train("--epochs", 1)
    assert capsys.readouterr().out.count("2 of 40 samples skipped\n       2  cannot identify image file") == 1


def test_too_many_broken_samples_stop_the_run_with_their_causes_and_shards(train, tmp_path):
    draw_shards(tmp_path, broken=range(20))
    with pytest.raises(SystemExit) as stop:
        train("--epochs", 1)
    for part in ("--max-bad 0.1", "20 of 40 samples", "20  cannot identify image file", "0.tar: none of its 20"):
        assert part in stop.value.code


def started(folder, *more):
    """`python clip_pgs.py` in another process, which the demo model keeps busy for some seconds."""
    return subprocess.Popen([sys.executable, "clip_pgs.py", *options(folder, "--model", "demo", *more)],
                            cwd=HERE, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
                            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)


LONG = ("--epochs", 10, "--save-every", 3, "--mask", "attentive", "--workers", 1)   # 50 steps


def signalled(folder, out, number, least):
    """Starts a long run, sends it a signal after `least` steps; (exit status, stderr, steps it had logged)."""
    process = started(folder, *LONG, "--out", folder / out)
    log = folder / out / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= least):
        time.sleep(0.002)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors, log.read_text().count("\n")


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """A folder with shards and, in `whole`, an uninterrupted run on them."""
    folder = tmp_path_factory.mktemp("long_run")
    draw_shards(folder)
    command(*options(folder, "--model", "demo", *LONG, "--out", folder / "whole"))
    return folder


def resumed(folder, out):
    command(*options(folder, "--model", "demo", *LONG, "--out", folder / out, "--resume"))
    return read_log(folder / out)


def test_a_killed_run_resumed_in_the_middle_of_an_epoch_has_the_log_of_an_uninterrupted_one(long_run):
    status, _, steps = signalled(long_run, "killed", signal.SIGKILL, least=7)
    assert status == -signal.SIGKILL and 7 <= steps < 50
    assert without_speed(resumed(long_run, "killed")) == without_speed(read_log(long_run / "whole"))


def test_a_terminated_run_finishes_its_step_writes_a_checkpoint_and_says_how_to_go_on(long_run):
    # After step 6, which is saved: the signal is noticed behind step 8, when the numbers of 8 are still to be read.
    status, errors, steps = signalled(long_run, "stopped", signal.SIGTERM, least=6)
    assert status == 1 and "Traceback" not in errors
    assert errors.rstrip().endswith(f"stopped after step {steps} of 50; go on with the same command and --resume")
    assert clip_pgs.load_checkpoint(str(long_run / "stopped" / "ckpt.pt"))["step"] == steps < 50
    assert without_speed(resumed(long_run, "stopped")) == without_speed(read_log(long_run / "whole"))


def test_a_rank_that_fails_alone_brings_the_run_down_with_its_message(long_run):
    most = 100_000  # bytes in a file: too few for the checkpoint that rank 0 writes after step 3, while rank 1 goes on
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                          "clip_pgs.py", *options(long_run, "--model", "demo", *LONG, "--out", long_run / "full")],
                         preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)), timeout=60,
                         cwd=HERE, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert run.returncode == 1 and f"error: {long_run}/full/ckpt.pt: " in run.stderr


def bad_input(folder):
    """Files that are not what they seem: name -> path."""
    good = write_shard(folder / "good.tar", pairs(range(8)))
    whole = (folder / "good.tar").read_bytes()
    bad = {"empty": b"", "truncated": whole[:len(whole) // 2], "text": b"hello " * 500, "zero": bytes(9999)}
    for name, raw in bad.items():
        (folder / f"{name}.tar").write_bytes(raw)
    write_shard(folder / "captions.tar", [("1.txt", b"a caption without its image")])
    os.makedirs(folder / "val" / "test")
    (folder / "val" / "test" / "nshards.txt").write_text("1")
    write_shard(folder / "val" / "test" / "0.tar", [("0.png", png()), ("0.cls", b"0")])
    (folder / "corrupt.pt").write_bytes(b"PK not really")
    return good


@pytest.mark.parametrize("arguments, says", [
    ("--data {}/missing.tar", "missing.tar: no such file"),
    ("--data {}/*.rat", r"\*.rat: the pattern matches no file"),
    ("--data {}", "a folder"),
    ("--data {}/empty.tar", "empty.tar: empty file"),
    ("--data {}/truncated.tar", "truncated.tar: truncated"),
    ("--data {}/text.tar", "text.tar: not a tar"),
    ("--data {}/zero.tar", "zero.tar: a tar without members"),
    ("--data {}/captions.tar", "captions.tar: no image"),
    ("--data {}/good.tar --batch-size 9", "9 images a step of only 8 samples"),
    ("--data {}/good.tar --ratio 1", "--ratio 1.0"),
    ("--data {}/good.tar --patch-size 5", "--patch-size 5: must divide --image-size 16"),
    ("--data {}/good.tar --mask fog", "--mask fog: choose one of none, random"),
    ("--data {}/good.tar --val {}/val", "classnames"),
    ("--data {}/good.tar --val {}/nowhere", "nowhere: no such folder"),
    ("--data {}/good.tar --vocab {}/good.tar", "good.tar[^\n]*bpe_simple_vocab_16e6.txt.gz"),
    ("--data {}/good.tar --resume {}/corrupt.pt", "corrupt.pt: refused"),
    ("--data {}/good.tar --resume {}/gone.pt", "gone.pt: no such checkpoint"),
    ("--data {}/good.tar --out {}/good.tar/x", "good.tar"),
    ("--show-masks {}/good.tar", "good.tar: cannot identify image file"),
    ("--show-masks {}/gone.jpg", "gone.jpg: No such file"),
])
def test_bad_input_ends_in_one_clear_line_and_exit_status_1(tmp_path, arguments, says):
    bad_input(tmp_path)
    small = "--model tiny --image-size 16 --patch-size 4 --batch-size 8 --workers 0 --out".split()
    with pytest.raises(SystemExit, match=rf"^error: [^\n]*{says}[^\n]*$"):
        command(*small, tmp_path / "out", *arguments.format(*[tmp_path] * 2).split())


def test_bad_input_shows_no_traceback(tmp_path):
    bad_input(tmp_path)
    process = started(tmp_path, "--data", tmp_path / "truncated.tar", "--out", tmp_path / "out")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in errors and errors.splitlines()[-1].startswith("error: ")


# -----------------------------------------------------------------------------
# Bench.

def bench_rows(capsys, *more):
    """{(mask, ratio): [kept, images/s, time, papers, in mask, GiB]} of the table that --bench prints."""
    command("--bench", "--model", "tiny", "--image-size", 16, "--patch-size", 4, "--context-length", 12,
            "--vocab-size", 600, "--batch-size", 8, "--steps", 1, *more)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    return {tuple(row[:2]): row[2:] for row in cells if row[0] in MASKS}


def test_bench_has_a_row_for_every_mask_and_the_papers_beside_it(capsys):
    rows = bench_rows(capsys)
    assert list(rows) == [("none", "0.0"), *((mask, "0.5") for mask in MASKS[1:]), ("pgs", "0.3 0.5")]
    assert [rows[mask, "0.5"][0] for mask in MASKS[1:]] == ["0.50"] * 4 and rows["none", "0.0"][0] == "1.00"
    assert [row[3] for row in rows.values()] == ["1.0", "0.5", "0.6", "1.1", "0.5", "0.6"]
    assert rows["none", "0.0"][2] == "1.00" and all(float(row[1]) > 0 and float(row[5]) > 0 for row in rows.values())


def test_bench_can_be_limited_to_a_mask(capsys):
    with pytest.raises(SystemExit, match="--mask foo: choose one of none, random"):
        bench_rows(capsys, "--mask", "foo")
    assert [mask for mask, _ in bench_rows(capsys, "--mask", "cluster")] == ["none", "cluster"]


# -----------------------------------------------------------------------------
# data.py: shards.

def captions_in(shards, index):
    return [data.read_caption(shards[row["shard"]], row) for row in index]


def images_in(shards, index):
    return [data.read_bytes(shards[row["shard"]], row["image"], row["image_size"]) for row in index]


def test_braces_stand_for_numbers_of_the_same_width(tmp_path):
    names = ["a08.tar", "a09.tar", "a10.tar"]
    for name in names:
        (tmp_path / name).touch()
    assert data.expand([f"{tmp_path}/a{{08..10}}.tar"]) == [f"{tmp_path}/{name}" for name in names]


def test_two_brace_ranges_multiply_and_a_shard_named_twice_is_read_once(tmp_path):
    for name in ("0-1", "0-2", "1-1", "1-2"):
        (tmp_path / name).touch()
    every = [f"{tmp_path}/{name}" for name in ("0-1", "0-2", "1-1", "1-2")]
    assert data.expand([f"{tmp_path}/{{0..1}}-{{1..2}}", f"{tmp_path}/*", every[0]]) == every


def test_a_key_is_what_stands_before_the_first_dot_of_the_file_name(tmp_path):
    path = write_shard(tmp_path / "0.tar", [("v1.0/7.seg.png", b""), ("v1.0/7.TXT", b""), ("7.txt", b"")])
    assert {key: sorted(files) for key, files in data.tar_samples(path).items()} == {
        "v1.0/7": ["seg.png", "txt"], "7": ["txt"]}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_dialect_of_tar_is_read(tmp_path, format):
    long = "folder/" * 16 + "x" * 90 + ".txt"
    members = [("1.txt", b"one"), (long, b"two" * 500), ("ümlaut.txt", b""), ("2.txt", b"three")]
    path = write_shard(tmp_path / "0.tar", members, format=format)
    assert [(name, data.read_bytes(path, *at)) for name, *at in data.tar_members(path)] == members


def test_links_devices_and_folders_in_a_tar_are_ignored(tmp_path):
    path = str(tmp_path / "0.tar")
    with tarfile.open(path, "w") as tar:
        for kind in ("SYMTYPE", "LNKTYPE", "CHRTYPE", "BLKTYPE", "FIFOTYPE", "DIRTYPE"):
            member = tarfile.TarInfo(f"{kind}.txt")
            member.type, member.linkname = getattr(tarfile, kind), "/etc/passwd"
            tar.addfile(member)
        tar.addfile(tarfile.TarInfo("real.txt"))
    assert [name for name, _, _ in data.tar_members(path)] == ["real.txt"]


def test_member_names_are_never_used_as_paths(tmp_path):
    members = [("../../evil.png", png()), ("../../evil.txt", b"a thing"), ("/etc/pw.png", png()), ("/etc/pw.txt", b"x")]
    shards = [write_shard(tmp_path / "0.tar", members)]
    assert captions_in(shards, data.build_index(shards)[0]) == ["a thing", "x"]
    assert os.listdir(tmp_path) == ["0.tar"] and not (tmp_path.parent.parent / "evil.png").exists()


def test_a_truncated_tar_gives_its_whole_samples_and_then_an_error_that_names_it(tmp_path):
    path = write_shard(tmp_path / "0.tar", pairs(range(4)))
    starts = {name: start for name, start, _ in data.tar_members(path)}
    os.truncate(path, starts["0002.png"] + 100)
    samples = {}
    with pytest.raises(ValueError, match="0.tar: truncated"):
        data.tar_samples(path, samples)
    assert {key: sorted(files) for key, files in samples.items()} == {"0000": ["png", "txt"], "0001": ["png", "txt"]}


@pytest.mark.parametrize("field", [b"-0000001000\0", b"-0000002000\0", b"elephants  \0", b"77777777777\0",
                                   b"\x80" + b"\xff" * 11, b"\xff" * 12])
def test_a_tar_with_an_impossible_size_is_an_error_and_never_a_loop(tmp_path, field):
    path = write_shard(tmp_path / "0.tar", [("a.txt", b"12345"), ("b.txt", b"")])
    with open(path, "r+b") as file:
        file.seek(124)
        file.write(field)
    with pytest.raises(ValueError, match="0.tar: (not a tar|truncated)"):
        list(islice(data.tar_members(path), 100))


def test_random_damage_to_a_tar_is_an_error_or_nothing(tmp_path):
    write_shard(tmp_path / "0.tar", [(name, raw[:40]) for name, raw in pairs(range(3))])
    whole, rng = (tmp_path / "0.tar").read_bytes(), random.Random(0)
    for number in range(300):
        raw = bytearray(whole[:rng.randrange(1, 6000)] if number % 3 == 0 else whole)
        for _ in range(30):
            raw[rng.randrange(min(len(raw), 6000))] = rng.choice(b"\0\xff07-x")
        (tmp_path / "1.tar").write_bytes(raw)
        try:
            assert len(list(islice(data.tar_members(str(tmp_path / "1.tar")), 1000))) < 1000
        except ValueError as error:
            assert "1.tar" in str(error)


# -----------------------------------------------------------------------------
# data.py: index and order.

def test_headers_anywhere_in_a_block_are_found(tmp_path):
    sizes = [65536 - 512, 65024 - 512, 3584, 0, 1, *range(60_000, 69_000, 512), *range(3000, 5000, 256)]
    path = write_shard(tmp_path / "0.tar", [(f"{i}.jpg", bytes(size)) for i, size in enumerate(sizes)])
    with tarfile.open(path) as tar:
        expected = [(member.name, member.offset_data, member.size) for member in tar]
    assert list(data.tar_members(path)) == expected and len(expected) == len(sizes)


def test_the_index_holds_every_image_with_a_caption(tmp_path):
    members = [("a.json", b'{"caption": "from json", "url": "x"}'), ("a.webp", png(5)),
               ("b.jpeg", png(6)), ("b.txt", "grün".encode()), ("b.json", b"{}")]
    shards = [write_shard(tmp_path / "0.tar", pairs([0, 1])), write_shard(tmp_path / "1.tar", members)]
    index, warnings = data.build_index(shards)
    assert warnings == [] and index["shard"].tolist() == [0, 0, 1, 1]
    assert captions_in(shards, index) == [caption_of(0), caption_of(1), "from json", "grün"]
    assert images_in(shards, index) == [png(0), png(1), png(5), png(6)]


@pytest.mark.parametrize("name, raw", [
    ("a.json", b"{}"), ("a.json", b"[1"), ("a.json", b"3"), ("a.json", b'{"caption": 3}'), ("a.json", b"[" * 100_000),
    ("a.txt", b"\xff\xfe"), ("a.txt", b" \n")], ids=range(7))
def test_a_caption_that_is_none_is_a_value_error(tmp_path, name, raw):
    path = write_shard(tmp_path / "0.tar", [(name, raw), ("a.png", png())])
    index, _ = data.build_index([path])
    with pytest.raises(ValueError, match="caption"):
        data.read_caption(path, index[0])


def test_a_broken_shard_costs_itself_and_a_warning_if_few_are(tmp_path):
    shards = [write_shard(tmp_path / f"{i}.tar", pairs([i])) for i in range(10)]
    (tmp_path / "3.tar").write_bytes(b"")
    index, warnings = data.build_index(shards, max_bad=0.1)
    assert len(index) == 9 and len(warnings) == 1 and "3.tar: empty" in warnings[0]
    with pytest.raises(ValueError, match="3.tar"):
        data.build_index(shards, max_bad=0.05)


def test_samples_without_a_partner_are_counted(tmp_path):
    members = [*pairs(range(20)), ("lonely.png", png()), ("mute.txt", b"no image")]
    index, warnings = data.build_index([write_shard(tmp_path / "0.tar", members)])
    assert len(index) == 20 and "2 samples" in warnings[0] and "1 no caption, 1 no image" in warnings[0]
    with pytest.raises(ValueError, match="2 of 22 samples"):
        data.build_index([str(tmp_path / "0.tar")], max_bad=0.05)


@pytest.fixture
def cached(tmp_path):
    """(paths of two shards, path of the cache that their first index left)."""
    shards = [write_shard(tmp_path / f"{i}.tar", pairs([2 * i, 2 * i + 1])) for i in (0, 1)]
    cache = str(tmp_path / "index.npz")
    data.build_index(shards, cache=cache)
    return shards, cache


def test_several_processes_make_the_index_of_one(cached):
    shards, _ = cached
    assert (data.build_index(shards, workers=2)[0] == data.build_index(shards)[0]).all()


def test_a_second_start_reads_the_cache_instead_of_the_shards(cached):
    shards, cache = cached
    with np.load(cache) as stored:
        np.savez(cache, **{**stored, "index": stored["index"][1:]})  # now another than the shards would give
    assert captions_in(shards, data.build_index(shards, cache=cache)[0]) == [caption_of(i) for i in (1, 2, 3)]
    assert sorted(os.listdir(Path(cache).parent)) == ["0.tar", "1.tar", "index.npz"]


def test_a_shard_that_has_changed_is_read_again(cached):
    shards, cache = cached
    write_shard(Path(shards[0]), pairs([7]))
    assert captions_in(shards, data.build_index(shards, cache=cache)[0]) == [caption_of(i) for i in (7, 2, 3)]
    assert captions_in(shards[1:], data.build_index(shards[1:], cache=cache)[0]) == [caption_of(2), caption_of(3)]


@pytest.mark.parametrize("damage", [b"", b"hello", b"PK\x05\x06" + bytes(18)], ids=["empty", "text", "an empty zip"])
def test_a_damaged_cache_is_made_anew(cached, damage):
    shards, cache = cached
    for broken in (damage, Path(cache).read_bytes()[:-100]):
        Path(cache).write_bytes(broken)
        assert (data.build_index(shards, cache=cache)[0] == data.build_index(shards)[0]).all()


def test_a_cached_index_keeps_its_warnings(tmp_path):
    shards, cache = [write_shard(tmp_path / f"{i}.tar", pairs([i])) for i in range(3)], str(tmp_path / "index.npz")
    (tmp_path / "1.tar").write_bytes(b"")
    first, second = (data.build_index(shards, max_bad=0.5, cache=cache) for _ in range(2))
    assert second[1] == first[1] and "1.tar: empty" in first[1][0]
    with pytest.raises(ValueError, match="1.tar: empty"):
        data.build_index(shards, max_bad=0.1, cache=cache)


def test_a_shard_that_cannot_be_read_stops_the_start_and_is_not_remembered(cached, monkeypatch):
    shards, cache = cached
    os.remove(cache)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", lambda *_: exec('raise OSError(5, "Input/output error")'))
        with pytest.raises(OSError, match="0.tar: Input/output error"):
            data.build_index(shards, cache=cache)
    assert len(data.build_index(shards, cache=cache)[0]) == 4


def index_of(num_shards, samples):
    index = np.zeros(num_shards * samples, data.INDEX)
    index["shard"] = np.arange(num_shards).repeat(samples)
    return index


def test_an_epoch_reads_every_sample_exactly_once():
    order = data.epoch_order(index_of(7, 100), seed=3, epoch=2)
    assert sorted(order.tolist()) == list(range(700))


def test_the_order_follows_from_seed_and_epoch_alone():
    index = index_of(7, 100)
    order = data.epoch_order(index, 3, 2)
    assert (order == data.epoch_order(index, 3, 2)).all()
    for other in data.epoch_order(index, 3, 1), data.epoch_order(index, 4, 2):
        assert (order != other).mean() > 0.9


def test_shards_are_shuffled_and_read_nearly_one_after_the_other(monkeypatch):
    monkeypatch.setattr(data, "WINDOW", 10)
    index = index_of(50, 100)
    order = data.epoch_order(index, 0, 0)
    shards = index["shard"][order]
    assert max(len(set(shards[i:i + 20])) for i in range(len(shards) - 20)) == 2
    turns = [shard for shard, after in pairwise(shards[50::100]) if shard != after]
    assert turns != sorted(turns) and (np.diff(order) != 1).mean() > 0.5   # nor are samples in their order


# -----------------------------------------------------------------------------
# data.py: images.

def encoded(image, format, **options):
    raw = io.BytesIO()
    image.save(raw, format, **options)
    return raw.getvalue()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_images_of_the_known_formats_decode(format):
    image = data.decode_image(encoded(Image.new("RGB", (30, 20), (200, 30, 30)), format))
    assert image.size == (30, 20) and np.abs(np.asarray(image)[10, 10] - np.array((200, 30, 30))).max() < 8


@pytest.mark.parametrize("raw", [b"", b"hello", encoded(picture(64), "JPEG")[:-300],
                                 encoded(picture(64), "PNG")[:-100], encoded(picture(64), "BMP")],
                         ids=["empty", "text", "cut jpeg", "cut png", "bmp"])
def test_what_is_no_whole_picture_of_a_known_format_is_a_value_error(raw):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        data.decode_image(raw)
    assert "0x" not in str(error.value)                                 # no memory address: causes can be counted


def test_a_decompression_bomb_is_refused_before_it_is_unpacked():
    bomb = encoded(Image.new("1", (9000, 9000)), "PNG")
    with pytest.raises(ValueError, match="9000x9000 pixels"):
        data.decode_image(bomb)


def test_random_crops_have_the_area_and_shape_that_was_asked_for():
    x, y = np.meshgrid(np.arange(256), np.arange(256))
    image = Image.fromarray(np.stack([x, y, 0 * x], 2).astype(np.uint8))  # a pixel's colour says where it was
    areas = []
    for seed in range(200):
        crop = data.random_resized_crop(image, 32, (0.3, 0.8), np.random.default_rng(seed)).double()
        w, h = ((crop[c].max() - crop[c].min()).item() * 32 / 31 for c in (0, 1))
        areas.append(w * h / 256 ** 2)
        assert 3 / 4 - 0.05 < w / h < 4 / 3 + 0.05 and crop.shape == (3, 32, 32)
    assert 0.28 < min(areas) < 0.36 and 0.74 < max(areas) < 0.83


def test_the_whole_of_a_square_picture_is_just_resized():
    expected = np.asarray(picture(64).resize((32, 32), Image.Resampling.BICUBIC), np.int64).transpose(2, 0, 1)
    crop = data.random_resized_crop(picture(64), 32, (1, 1), np.random.default_rng(0))
    assert np.abs(crop.numpy() - expected).max() <= 2 and (crop.numpy() == expected).mean() > 0.8


@pytest.mark.parametrize("size", [(1000, 1), (1, 1000), (1, 1), (300, 20)])
def test_a_picture_too_long_for_a_crop_gives_its_middle(size):
    crop = data.random_resized_crop(Image.new("L", size, 7), 16, (0.9, 1), np.random.default_rng(0))
    assert crop.shape == (3, 16, 16) and crop.eq(7).all()


@pytest.mark.parametrize("size", [(640, 640), (769, 3001)])
def test_a_large_jpeg_is_decoded_no_larger_than_the_crop_needs(size):
    raw = encoded(Image.effect_noise((16, 16), 90).resize(size, Image.Resampling.BICUBIC), "JPEG")
    for seed in range(5):  # parts of the picture: a box of the wrong scale would be another part
        part, whole = data.open_image(raw), data.decode_image(raw)
        crops = [data.random_resized_crop(image, 64, (0.3, 0.5), np.random.default_rng(seed)).double()
                 for image in (part, whole)]
        assert part.width <= size[0] / 1.9 and (crops[0] - crops[1]).square().mean().sqrt() < 4


# -----------------------------------------------------------------------------
# data.py: tokenizer.

def test_merges_are_applied_in_the_order_they_were_learned():
    tokenizer = data.Tokenizer("l o\nlo w</w>\ne r</w>\nlo w", context_length=12)
    symbols = {number: symbol for symbol, number in tokenizer.ids.items()}
    ids = tokenizer.encode(["Low lower"])[0].tolist()                   # l o w</w> -> lo w</w> -> low</w>
    assert [symbols[i] for i in ids[1:4]] == ["low</w>", "low", "er</w>"]
    assert ids == [516, 513, 515, 514, 517] + [0] * 7


def test_ids_are_bytes_then_word_ends_then_merges_then_start_and_end():
    tokenizer = data.Tokenizer("a b\nab c</w>", 8)
    assert tokenizer.ids["!"] == 0 and tokenizer.ids["a"] == 64 and tokenizer.ids["a</w>"] == 320  # as in CLIP
    assert tokenizer.ids["ab"] == 512 and (tokenizer.start, tokenizer.end, tokenizer.vocab_size) == (514, 515, 516)
    assert tokenizer.encode(["abc"]).tolist() == [[514, 513, 515, 0, 0, 0, 0, 0]]


def test_a_long_caption_is_cut_and_still_ends_in_end():
    tokens = data.Tokenizer("", 6).encode(["abcdefghijk", ""])
    assert tokens[0].tolist() == [512, 64, 65, 66, 67, 513] and tokens[1].tolist() == [512, 513, 0, 0, 0, 0]


@pytest.mark.parametrize("one, other", [("A  Red\n\tDOG ", "a red dog"), ("black &amp; white", "black & white"),
                                        ("&amp;lt;3", "<3"), ("it's", "it 's"), ("room101", "room 1 0 1"),
                                        ("what?!no", "what ?! no"), ("ÉTÉ", "été"), ("snake_case", "snake _ case")])
def test_captions_that_say_the_same_have_the_same_tokens(one, other):
    tokenizer = data.Tokenizer("", 30)
    assert tokenizer.encode([one]).equal(tokenizer.encode([other]))


def text_of(tokenizer, ids):
    """The bytes that the tokens stand for, decoded; word ends are spaces."""
    symbols, byte = {n: s for s, n in tokenizer.ids.items()}, {c: b for b, c in data.BYTES.items()}
    words = "".join(symbols[i] for i in ids if i in symbols).replace("</w>", " ")
    return b"".join(b" " if c == " " else bytes([byte[c]]) for c in words).decode().rstrip()


def test_learned_merges_shorten_captions_and_lose_nothing():
    captions = ["a photo of a dog", "a photo of a döner", "日本の写真 photo", "🙂 photo of ½ a dog"] * 3
    tokenizer = data.Tokenizer(data.learn_merges(captions, 100), 77)
    for caption, row in zip(captions, tokenizer.encode(captions)):
        ids = row[1:row.argmax()].tolist()
        assert text_of(tokenizer, ids) == caption
    assert (tokenizer.encode(["a photo of a dog"]) > 0).sum() == 7      # each word has become one token


def merges_by_loop(captions, num_merges):
    """Byte pair encoding as its paper prints it: count all pairs, join the most frequent one, start again."""
    words = Counter(tuple(w[:-1]) + (w[-1] + "</w>",) for caption in captions for w in data.split_words(caption))
    merges = []
    while len(merges) < num_merges:
        count = Counter()
        for word, times in words.items():
            for pair in pairwise(word):
                count[pair] += times
        best = min(count, key=lambda pair: (-count[pair], pair), default=None)
        if best is None or count[best] < 2:
            break
        merges.append(" ".join(best))
        joined = Counter()
        for word, times in words.items():
            symbols, i = [], 0
            while i < len(word):
                step = 2 if word[i:i + 2] == best else 1
                symbols.append("".join(word[i:i + step]))
                i += step
            joined[tuple(symbols)] += times
        words = joined
    return "\n".join(merges)


def test_learned_merges_are_those_of_the_plain_algorithm():
    rng = random.Random(0)
    captions = ["".join(rng.choice("aab bnc ") for _ in range(30)) for _ in range(40)] + ["aaaa aaaaa banana"] * 3
    assert data.learn_merges(captions, 60) == merges_by_loop(captions, 60)


def test_a_vocabulary_file_is_read_as_clip_does(tmp_path):
    with gzip.open(tmp_path / "vocab.txt.gz", "wt", encoding="utf-8") as file:
        file.write("#version: 0.2\na b\n" + "x y\n" * 50_000)           # CLIP takes the first 48,894 merges only
    tokenizer = data.Tokenizer.from_file(str(tmp_path / "vocab.txt.gz"), 8)
    assert tokenizer.ids["ab"] == 512 and (tokenizer.start, tokenizer.end) == (49406, 49407)


def damaged(raw):
    return raw[:40] + bytes(b ^ 255 for b in raw[40:60]) + raw[60:]


VOCAB = gzip.compress("".join(f"word{i} other{i * i}\n" for i in range(500)).encode())


@pytest.mark.parametrize("raw", [b"plain text", VOCAB[:-50], damaged(VOCAB), gzip.compress(b"\xff\xfe"),
                                 gzip.compress(b"version\nthree words here\n")],
                         ids=["not gzip", "truncated", "damaged", "not utf-8", "three words a line"])
def test_a_vocabulary_file_that_is_something_else_is_a_value_error_that_names_it(tmp_path, raw):
    (tmp_path / "vocab.gz").write_bytes(raw)
    with pytest.raises(ValueError, match="^--vocab [^\n]*vocab.gz[^\n]*$"):
        data.Tokenizer.from_file(str(tmp_path / "vocab.gz"))


@pytest.mark.parametrize("caption", ["", "\0", "\ud800", "a" * 50_000, "&#x110000; &#0;", "\u202e\u0301", "ſ İ ß"])
def test_every_string_has_tokens(caption):
    tokens = data.Tokenizer("", 16).encode([caption])
    assert tokens.shape == (1, 16) and tokens.max() == 513


# -----------------------------------------------------------------------------
# data.py: batches.

def batches(folder, broken=(), order=((3, 0), (1, 2)), size=16, seed=(0, 0)):
    shard = write_shard(folder / "0.tar", pairs(range(4), broken))
    index, _ = data.build_index([shard])
    return data.Batches([shard], index, np.array(order), data.Tokenizer("", 40), size, (0.9, 1.0), seed)


def test_a_batch_holds_the_images_and_captions_of_its_samples(tmp_path):
    images, tokens, valid, lost = batches(tmp_path)[1]
    assert images.shape == (2, 3, 16, 16) and images.dtype == torch.uint8 and valid.all() and lost == []
    assert tokens.equal(data.Tokenizer("", 40).encode([caption_of(1), caption_of(2)]))


def test_a_sample_has_the_same_crop_in_any_batch_and_another_in_another_epoch(tmp_path):
    first = batches(tmp_path, order=((0, 1, 2),))[0][0]
    assert batches(tmp_path, order=((3, 2), (2, 0)))[1][0].equal(first[[2, 0]])
    assert not batches(tmp_path, order=((0, 1, 2),), seed=(0, 1))[0][0].equal(first)


def test_a_sample_that_does_not_decode_is_black_not_valid_and_counted(tmp_path):
    images, _, valid, lost = batches(tmp_path, broken=[0])[0]
    assert valid.tolist() == [True, False] and images[1].eq(0).all() and images[0].any()
    assert lost == [(1, "cannot identify image file")]


def test_sample_names_say_shard_and_member(tmp_path):
    made = batches(tmp_path)
    assert data.sample_names(made.shards, made.index, np.array([2, 0])) == [
        f"{tmp_path}/0.tar: 0002.png", f"{tmp_path}/0.tar: 0000.png"]


# -----------------------------------------------------------------------------
# data.py: writing shards, the demo, pack.

def test_shards_are_written_in_full_and_their_keys_count_on(tmp_path):
    samples = [{"png": bytes([i]), "txt": b"x"} for i in range(5)]
    assert data.write_shards(str(tmp_path), iter(samples), shard_size=2) == 3
    names = []
    for i in range(3):
        with tarfile.open(tmp_path / f"0000{i}.tar") as tar:
            names.append(tar.getnames())
    assert names[1] == ["000000002.png", "000000002.txt", "000000003.png", "000000003.txt"] and len(names[2]) == 2


def test_a_shard_appears_under_its_name_only_when_it_is_whole(tmp_path):
    def samples():
        yield "0", {"txt": b"fine"}
        raise ValueError("no more")
    with pytest.raises(ValueError, match="no more"):
        data.write_tar(str(tmp_path / "0.tar"), samples())
    assert not (tmp_path / "0.tar").exists()


def packed(folder, text, monkeypatch):
    (folder / "list.tsv").write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["data.py", "pack", f"{folder}/list.tsv", f"{folder}/out", "--shard-size", "2"])
    data.main()
    return data.expand([f"{folder}/out/*.tar"])


def test_data_bench_times_every_stage_and_passes_over_what_does_not_decode(tmp_path, monkeypatch, capsys):
    write_shard(tmp_path / "0.tar", pairs(range(10), broken=[3]))
    monkeypatch.setattr(sys, "argv", ["data.py", "bench", f"{tmp_path}/*.tar", "--image-size", "16"])
    threads = torch.get_num_threads()
    data.main()
    torch.set_num_threads(threads)
    rows = [line.split("|")[1:4] for line in capsys.readouterr().out.splitlines()[3:]]
    assert [row[0].strip() for row in rows] == ["read", "decode", "augment", "tokenise", "together"]
    assert all(float(row[1]) > 0 and float(row[2]) > 0 for row in rows)


def test_packed_images_and_captions_come_back(tmp_path, monkeypatch):
    for i in range(3):
        (tmp_path / f"{i}.v2.PNG").write_bytes(png(i))
    shards = packed(tmp_path, "".join(f"{i}.v2.PNG\tcaption ü {i}\n" for i in range(3)), monkeypatch)
    index, _ = data.build_index(shards)
    assert captions_in(shards, index) == ["caption ü 0", "caption ü 1", "caption ü 2"]
    assert images_in(shards, index) == [png(0), png(1), png(2)]


@pytest.mark.parametrize("line, says", [
    ("no tab here", "expected `image"), ("0.png\t ", "expected `image"), ("", "expected `image"),
    ("gone.png\ta caption", "gone.png: No such file"), ("list.tsv\tx", "not one of jpg")])
def test_a_bad_line_of_the_list_is_named_by_its_number(tmp_path, monkeypatch, line, says):
    (tmp_path / "0.png").write_bytes(png())
    with pytest.raises(SystemExit, match=f"^error: [^\n]*list.tsv, line 2: [^\n]*{says}[^\n]*$"):
        packed(tmp_path, f"0.png\tfine\n{line}\n0.png\tfine\n", monkeypatch)


def test_demo_scenes_are_the_same_every_time_and_no_two_alike():
    raws = [data.demo_sample(split, i)[0] for split in ("train", "seen", "unseen", "retrieval") for i in range(5)]
    assert raws[3] == data.demo_sample("train", 3)[0] and len(set(raws)) == 20


def test_unseen_pairs_are_in_no_training_caption():
    unseen = {f"{colour} {shape}" for colour, shape in data.UNSEEN}
    captions = [data.demo_sample("train", i)[1] for i in range(300)]
    assert len(unseen) == 8 and not any(name in caption for name in unseen for caption in captions)
    assert [data.CLASSNAMES[data.demo_sample("unseen", i)[1]] in unseen for i in range(8)] == [True] * 8


def test_the_relation_in_a_caption_is_true_of_the_picture():
    for seed in range(30):
        rng = np.random.default_rng(seed)
        (first, second), relation = data.place_objects(rng, ["star", "ring"], ["small", "large"])
        axis, sign = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}[relation]
        assert (sign * first[:, axis]).max() < (sign * second[:, axis]).min()
        assert min(first.min(), second.min()) >= 0 and max(first.max(), second.max()) <= 64


def test_the_demo_folders_have_the_layout_of_clip_benchmark(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SPLITS", {"train": 3, "seen": 2, "unseen": 2, "retrieval": 2})
    data.make_demo(str(tmp_path / "demo"))
    files = {str(path.relative_to(tmp_path / "demo")) for path in (tmp_path / "demo").rglob("*") if path.is_file()}
    zero_shot = ["classnames.txt", "test/0.tar", "test/nshards.txt", "zeroshot_classification_templates.txt"]
    retrieval = ["dataset_type.txt", "test/0.tar", "test/nshards.txt"]
    assert files == {"train/00000.tar", *(f"retrieval/{name}" for name in retrieval),
                     *(f"{split}/{name}" for split in ("seen", "unseen") for name in zero_shot)}


# -----------------------------------------------------------------------------
# evaluate.py, on folders of a few small pictures and a model of random weights.


def noise_jpeg(seed, width=40, height=32, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "JPEG")
    return file.getvalue()


def make_folder(path, samples, shards="1", classnames="cat\ndog\nfox", templates="a {c}\nthe {c}.", kind=""):
    """An evaluation folder with one shard; samples: a list of {extension: bytes}."""
    (path / "test").mkdir(parents=True)
    with tarfile.open(path / "test" / "0.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, files in enumerate(samples):
            for extension, raw in files.items():
                member = tarfile.TarInfo(f"{number:03d}.{extension}")
                member.size = len(raw)
                tar.addfile(member, io.BytesIO(raw))
    texts = {"test/nshards.txt": shards, "classnames.txt": classnames,
             "zeroshot_classification_templates.txt": templates, "dataset_type.txt": kind}
    for name, text in texts.items():
        if text:
            (path / name).write_text(text)
    return str(path)


def labelled(count):
    return [{"jpg": noise_jpeg(number), "cls": str(number % 3).encode()} for number in range(count)]


@pytest.fixture(scope="module")
def small_clip():
    """A model of random weights that knows bytes and no merges, its tokenizer, its Config."""
    config = clip_pgs.Config(model="demo", image_size=16, patch_size=8, context_length=24, vocab_size=514)
    torch.manual_seed(0)
    return clip_pgs.CLIP(config).eval(), data.Tokenizer("", 24), config


def save_small(path, small_clip, **changes):
    model, tokenizer, config = small_clip
    torch.save({"model": {**model.state_dict(), **changes}, "config": vars(config), "merges": tokenizer.merges}, path)
    return str(path)


def test_a_checkpoint_gives_back_the_weights_it_was_saved_with(tmp_path, small_clip):
    model, _, config = evaluate.load(save_small(tmp_path / "ckpt.pt", small_clip))
    assert config == small_clip[2]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), small_clip[0].state_dict().values()))


def gzip_vocab():
    symbols = [chr(256 + i) for i in range(320)]  # enough pairs for 48,894 different merges
    pairs = [f"{a} {b}" for a in symbols for b in symbols]
    return gzip.compress("\n".join(["#version", *pairs]).encode())


def test_a_foreign_state_dict_tells_its_size_by_its_shapes(tmp_path, small_clip):
    config = clip_pgs.Config(model="demo", image_size=48, patch_size=16, context_length=9, vocab_size=49408)
    state = {f"module.{name}": tensor for name, tensor in clip_pgs.CLIP(config).state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "foreign.pt")
    (tmp_path / "vocab.gz").write_bytes(gzip_vocab())
    found = evaluate.load(str(tmp_path / "foreign.pt"), str(tmp_path / "vocab.gz"))[2]
    assert (found.model, found.image_size, found.patch_size, found.context_length) == ("demo", 48, 16, 9)
    assert not found.quick_gelu


def test_a_foreign_state_dict_without_vocab_says_what_to_pass(tmp_path, small_clip):
    torch.save(small_clip[0].state_dict(), tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match="--vocab bpe_simple_vocab_16e6.txt.gz"):
        evaluate.load(str(tmp_path / "foreign.pt"))


def test_a_tensor_of_another_shape_is_named_with_both_shapes(tmp_path, small_clip):
    path = save_small(tmp_path / "ckpt.pt", small_clip, **{"visual.proj": torch.zeros(128, 64)})
    with pytest.raises(ValueError, match=r"visual.proj is \(128, 64\), expected \(128, 128\)"):
        evaluate.load(path)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("it-ran-code",)


def test_evaluating_a_checkpoint_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Malicious()}, "ckpt.pt")
    with pytest.raises(ValueError, match="ckpt.pt"):
        evaluate.load("ckpt.pt")
    assert not os.path.exists("it-ran-code")


def test_quick_gelu_is_known_by_the_keys_of_openais_archive(tmp_path, small_clip):
    openai = {name: torch.tensor(0) for name in ("input_resolution", "context_length", "vocab_size")}
    model, _, config = evaluate.load(save_small(tmp_path / "ckpt.pt", small_clip, **openai))
    assert config.quick_gelu and isinstance(model.transformer.resblocks[0].mlp.gelu, clip_pgs.QuickGELU)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "RGBA"])
def test_preprocess_resizes_crops_and_then_converts(mode):
    image = Image.open(io.BytesIO(noise_jpeg(0, 37, 23))).convert(mode)
    middle = image.resize((int(16 * 37 / 23), 16), Image.BICUBIC).crop((4, 0, 20, 16)).convert("RGB")  # 25 x 16
    mean, std = np.float32(data.MEAN), np.float32(data.STD)
    expected = (np.asarray(middle).astype(np.float32) / np.float32(255) - mean) / std
    assert np.array_equal(evaluate.preprocess(image, 16).numpy(), expected.transpose(2, 0, 1))


@torch.no_grad()
def test_classification_equals_a_loop(tmp_path, small_clip):
    model, tokenizer, config = small_clip
    folder = make_folder(tmp_path / "f", labelled(20))
    classes, hits = [], [[], [], []]
    for name in ("cat", "dog", "fox"):
        both = F.normalize(model.encode_text(tokenizer.encode([f"a {name}", f"the {name}."])), dim=-1)
        classes.append(both.mean(0) / both.mean(0).norm())
    for sample in labelled(20):
        image = evaluate.preprocess(Image.open(io.BytesIO(sample["jpg"])), 16)[None]
        scores = [float(model.encode_image(image)[0] @ c) for c in classes]
        label = int(sample["cls"])
        hits[label].append(scores.index(max(scores)) == label)
    metrics = evaluate.evaluate(model, tokenizer, config, folder)
    assert metrics["acc1"] == pytest.approx(sum(map(sum, hits)) / 20)
    assert metrics["mean_per_class_recall"] == pytest.approx(sum(sum(h) / len(h) for h in hits) / 3)
    assert metrics["acc5"] == 1  # of three classes


def test_classes_without_an_image_do_not_count_in_the_recall():
    metrics = evaluate.classification_metrics(torch.eye(4)[[0, 0, 1]], torch.tensor([0, 0, 3]))
    assert metrics["mean_per_class_recall"] == 0.5


def test_retrieval_equals_a_loop_with_one_to_seven_captions_an_image():
    generator = torch.Generator().manual_seed(0)
    image_of_text = torch.tensor([i for i in range(30) for _ in range(1 + i % 7)])
    images = F.normalize(torch.randn(30, 8, generator=generator), dim=-1)
    texts = F.normalize(images[image_of_text] + torch.randn(len(image_of_text), 8, generator=generator), dim=-1)
    scores, owner = (images @ texts.T).tolist(), image_of_text.tolist()
    expected = {}
    for k in (1, 5, 10):
        found = [owner[t] in sorted(range(30), key=lambda i: -scores[i][t])[:k] for t in range(len(owner))]
        expected[f"image_retrieval_recall@{k}"] = sum(found) / len(owner)
        best = [sorted(range(len(owner)), key=lambda t: -scores[i][t])[:k] for i in range(30)]
        expected[f"text_retrieval_recall@{k}"] = sum(i in [owner[t] for t in best[i]] for i in range(30)) / 30
    assert evaluate.retrieval_metrics(images, texts, image_of_text) == pytest.approx(expected)


def test_a_model_that_gives_all_the_same_feature_finds_nothing():
    metrics = evaluate.retrieval_metrics(torch.ones(500, 4) / 2, torch.ones(500, 4) / 2, torch.arange(500))
    assert max(metrics.values()) <= 0.05


def test_a_retrieval_folder_gives_recalls(tmp_path, small_clip):
    samples = [{"jpg": noise_jpeg(i), "txt": "\n".join(["a picture"] * (1 + i % 3)).encode()} for i in range(4)]
    metrics = evaluate.evaluate(*small_clip, make_folder(tmp_path / "f", samples, kind="retrieval"))
    assert len(metrics) == 6 and metrics["image_retrieval_recall@10"] == 1  # of four images


def embed_as_rank(rank, folder, path, rendezvous):
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    metrics = evaluate.evaluate(*evaluate.load(path), folder, rank, 2, workers=1)
    torch.distributed.destroy_process_group()
    if rank == 0:
        print(json.dumps(metrics), file=open(path + ".json", "w"))
    assert rank == 0 or metrics == {}


def test_two_ranks_give_the_metrics_of_one(tmp_path, small_clip):
    samples = [{"jpg": noise_jpeg(i), "txt": "\n".join(f"{i} {j}" for j in range(1 + i % 3)).encode()} for i in range(7)]
    folder, path = make_folder(tmp_path / "f", samples, kind="retrieval"), save_small(tmp_path / "ckpt.pt", small_clip)
    torch.multiprocessing.spawn(embed_as_rank, (folder, path, f"file://{tmp_path}/rendezvous"), nprocs=2)
    assert json.load(open(path + ".json")) == pytest.approx(evaluate.evaluate(*small_clip, folder))


def test_logistic_regression_ends_where_the_gradient_is_zero():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 4, generator=generator).double(), torch.arange(60) % 3
    weights = evaluate.fit_logistic(x, y, 3, C=2.0).requires_grad_()
    loss = F.cross_entropy(x @ weights[:, :4].T + weights[:, 4], y) * 60 * 2.0 + weights[:, :4].square().sum() / 2
    assert torch.autograd.grad(loss, weights)[0].abs().max() < 1e-3  # scikit-learn's objective


def test_a_linear_probe_learns_what_is_linear():
    features = F.normalize(torch.randn(300, 6, generator=torch.Generator().manual_seed(0)), dim=-1)
    labels = features[:, :3].argmax(1)
    accuracy, _, _ = evaluate.linear_probe(features[:200], labels[:200], features[200:], labels[200:], 3)
    assert accuracy > 0.9


@torch.no_grad()
def test_sugarcrepe_counts_the_images_that_are_nearer_to_their_caption(tmp_path, small_clip):
    model, tokenizer, config = small_clip
    (tmp_path / "a.jpg").write_bytes(noise_jpeg(0))
    image = F.normalize(model.encode_image(evaluate.preprocess(Image.open(tmp_path / "a.jpg"), 16)[None]), dim=-1)
    pair = ["a red cat", "two blue dogs in a field"]
    pair.sort(key=lambda text: -float(F.normalize(model.encode_text(tokenizer.encode([text])), dim=-1) @ image.T))
    right = {"filename": "a.jpg", "caption": pair[0], "negative_caption": pair[1]}
    wrong = {"filename": "a.jpg", "caption": pair[1], "negative_caption": pair[0]}
    for name in ("replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att", "add_obj", "add_att"):
        questions = {"0": right, "3": right if name == "replace_obj" else wrong}
        (tmp_path / f"{name}.json").write_text(json.dumps(questions))
    results = evaluate.sugarcrepe(model, tokenizer, config, str(tmp_path), str(tmp_path))
    assert results["sugar_crepe/replace_obj"]["acc"] == 1 and results["sugar_crepe/add"]["acc"] == 0.5
    assert results["sugar_crepe/replace"]["acc"] == pytest.approx((1 + 0.5 + 0.5) / 3)


def test_a_picture_shows_five_images_for_each_of_ten_queries(tmp_path, small_clip):
    samples = [{"jpg": noise_jpeg(i), "txt": b"one\ntwo"} for i in range(6)]
    folder = make_folder(tmp_path / "f", samples, kind="retrieval")
    evaluate.evaluate(*small_clip, folder, pictures=str(tmp_path))
    green = np.asarray(Image.open(tmp_path / "f.png")) == [50, 205, 50]  # limegreen: five of six images are shown
    assert green.all(-1).any()


def test_the_table_has_an_average_of_several_classification_folders():
    one, two = ({"acc1": a, "acc5": 1.0, "mean_per_class_recall": a} for a in (0.25, 0.5))
    assert "average" not in evaluate.table({"one": one})
    lines = evaluate.table({"one": one, "two": two}).splitlines()
    assert lines[-1].split() == "| average | 37.50 | 100.00 | 37.50 |".split()
    assert len({len(line) for line in lines}) == 1  # aligned


BROKEN = {
    "nshards.txt: missing": dict(shards=""),
    "1.tar: missing, though nshards.txt says 2": dict(shards="2"),
    "'many', expected the number of shards": dict(shards="many"),
    "the label of 002.jpg is '2', but classnames.txt has 2 lines": dict(classnames="cat\ndog"),
    "'a photo' lacks {c}": dict(templates="a {c}\na photo"),
    "line 2 is blank": dict(classnames="cat\n\ndog"),
    "'captions', expected retrieval or classification": dict(kind="captions"),
    "sample 000 has no .txt": dict(kind="retrieval"),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_folder_is_named_with_what_is_wrong(message, tmp_path):
    folder = make_folder(tmp_path / "f", labelled(3), **BROKEN[message])
    with pytest.raises(ValueError) as error:
        evaluate.read_folder(folder)
    assert message in str(error.value) and folder in str(error.value)


def test_an_empty_folder_and_no_folder_are_errors(tmp_path):
    with pytest.raises(ValueError, match="nshards.txt: missing"):
        evaluate.read_folder(str(tmp_path))
    with pytest.raises(ValueError, match="no such folder"):
        evaluate.read_folder(str(tmp_path / "nowhere"))


def test_a_sample_without_a_label_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="sample 001 has no .cls"):
        evaluate.read_folder(make_folder(tmp_path / "f", [*labelled(1), {"jpg": noise_jpeg(0)}]))


def test_an_image_that_does_not_decode_is_an_error_not_a_skip(tmp_path, small_clip):
    samples = labelled(3)
    samples[1]["jpg"] = samples[1]["jpg"][:400]
    with pytest.raises(ValueError, match="001.jpg does not decode"):
        evaluate.evaluate(*small_clip, make_folder(tmp_path / "f", samples))


def test_features_that_are_not_finite_are_an_error_not_a_score(tmp_path, small_clip):
    model = clip_pgs.CLIP(small_clip[2])
    model.visual.proj.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        evaluate.evaluate(model, *small_clip[1:], make_folder(tmp_path / "f", labelled(3)))


def test_the_command_prints_the_table_and_writes_the_names_of_clip_benchmark(tmp_path, small_clip, monkeypatch, capsys):
    folder, path = make_folder(tmp_path / "pets", labelled(3)), save_small(tmp_path / "ckpt.pt", small_clip)
    monkeypatch.setattr("sys.argv", ["evaluate.py", path, "--data", folder, "--json", str(tmp_path / "x.json")])
    evaluate.main()
    assert "pets |" in capsys.readouterr().out
    assert list(json.load(open(tmp_path / "x.json"))[folder]) == ["acc1", "acc5", "mean_per_class_recall"]


def test_a_users_mistake_ends_the_command_with_one_line(tmp_path, small_clip, monkeypatch):
    monkeypatch.setattr("sys.argv", ["evaluate.py", save_small(tmp_path / "ckpt.pt", small_clip), "--data", str(tmp_path / "no")])
    with pytest.raises(SystemExit, match=r"^error: .*no: no such folder$"):
        evaluate.main()
