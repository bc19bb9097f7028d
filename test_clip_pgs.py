"""The promises of this project, one behaviour a test, in the order of the code. `pytest -q` runs them in a
minute or two on 2 CPU cores, without GPU, network or data. Expected values come from elsewhere: a loop, a
closed form, float64, finite differences, a drawn picture.
"""
import copy
import fcntl
import gzip
import io
import json
import math
import os
import pickle
import re
import resource
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections import Counter
from contextlib import nullcontext, redirect_stderr
from dataclasses import fields
from itertools import pairwise

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU computes in bf16: nothing would be exactly equal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import clip_pgs
import data
import evaluate
from clip_pgs import CLIP, MASKS, Config, make_mask, patch_similarity, sinkhorn, sobel_edges

torch.set_num_threads(1)  # tiny tensors, and the processes started here use one thread, too
HERE = os.path.dirname(os.path.abspath(__file__))

# -----------------------------------------------------------------------------
# What the tests are made of: a tiny model, numbers, pictures, shards.

clip_pgs.SIZES["tiny"] = (128, 2, 64, 2, 16)

def tiny(**changes):
    """A Config whose images have 4 x 4 patches of 4 x 4 pixels."""
    size = dict(model="tiny", image_size=16, patch_size=4, context_length=24, vocab_size=600)
    return Config(**size | changes)

def random_clip(config):
    """A model in which no bias is zero and no norm the identity, so that none can be forgotten unseen."""
    torch.manual_seed(0)
    clip = CLIP(config)
    for p in clip.parameters():
        p.data += 0.1 * torch.randn_like(p) * (p.ndim == 1)
    return clip

def seeded(seed=0):
    return torch.Generator().manual_seed(seed)

def noise_images(B, H=16, W=16, seed=0):
    return torch.randn(B, 3, H, W, generator=seeded(seed))

def random_tokens(B):
    """(B, 24): <start>, between 1 and 22 ids, <end>, zeros."""
    ends = torch.randint(2, 24, (B, 1), generator=seeded())
    tokens = torch.randint(1, 598, (B, 24), generator=seeded()).scatter(1, ends, 599)
    tokens[:, 0] = 598
    return tokens.masked_fill(torch.arange(24) > ends, 0)

def scene(seed):
    """A sky that fades, a meadow with grain, 20 discs and boxes: as smooth and as rough as photographs."""
    rng, y = np.random.default_rng(seed), np.linspace(0, 1, 224)[:, None, None]
    grain = Image.fromarray(rng.normal(0, 1, (28, 28)).astype(np.float32))
    grain = np.asarray(grain.resize((224, 224), Image.Resampling.BICUBIC))[..., None]
    sky, meadow = (1 - y) * rng.uniform(90, 220, 3) + y * rng.uniform(140, 250, 3), rng.uniform(60, 140, 3)
    pixels = np.where(y < 0.6, sky + 2 * grain, meadow + 25 * grain).clip(0, 255)
    image = Image.fromarray(pixels.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for shape in (draw.ellipse, draw.rectangle) * 10:
        x, y, width, height = rng.integers((0, 60, 12, 12), (200, 160, 60, 60)).tolist()
        shape((x, y, x + width, y + height), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image

PLAIN = Image.new("RGB", (16, 16), (13, 130, 77))
TWO_COLOURS = PLAIN.copy()
TWO_COLOURS.paste("yellow", (6, 0, 16, 16))
KINDS = [noise_images(1), *(evaluate.preprocess(x, 16)[None] for x in (PLAIN, TWO_COLOURS, scene(0)))]

def masked(name, images, ratio, **options):
    """make_mask on patches of 4 x 4 pixels; attentive sees a random attention."""
    attention = torch.rand(len(images), images[0, 0].numel() // 16, generator=seeded(1))
    return make_mask(name, images, ratio, seeded(), **dict(patch_size=4, attention=attention) | options)

def encoded(image, format="PNG", **options):
    raw = io.BytesIO()
    image.save(raw, format, **options)
    return raw.getvalue()

def noise_image(seed=0, size=(20, 20), format="PNG"):
    """The bytes of a picture of random pixels."""
    pixels = np.random.default_rng(seed).bytes(3 * math.prod(size))
    return encoded(Image.frombytes("RGB", size, pixels), format)

def caption_of(i):
    return f"a {' '.join(data.PAIRS[i])} and number {i}"

def write_shard(path, members, **options):
    """A tar with these (name, bytes) members, by Python's own tarfile; its path."""
    with tarfile.open(path, "w", **options) as tar:
        for name, raw in members:
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
    return str(path)

def pairs(numbers, broken=()):
    for i in numbers:
        yield f"{i:04d}.png", b"no picture" if i in broken else noise_image(i)
        yield f"{i:04d}.txt", caption_of(i).encode()

def draw_shards(folder, broken=()):
    """Two shards of 20 pairs each."""
    for shard in (0, 1):
        write_shard(folder / f"{shard}.tar", pairs(range(20 * shard, 20 * shard + 20), broken))

def make_folder(path, samples, shards="1", classnames="cat\ndog\nfox", templates="a {c}\nthe {c}.", kind=""):
    """An evaluation folder with one shard; samples: a list of {extension: bytes}."""
    (path / "test").mkdir(parents=True)
    write_shard(path / "test" / "0.tar", [
        (f"{number:03d}.{kind}", raw) for number, files in enumerate(samples) for kind, raw in files.items()])
    texts = {"test/nshards.txt": shards, "classnames.txt": classnames,
             "zeroshot_classification_templates.txt": templates, "dataset_type.txt": kind}
    for name, text in texts.items():
        if text:
            (path / name).write_text(text, encoding="utf-8")
    return str(path)

def labelled(count):
    return [{"jpg": noise_image(i, (40, 32), "JPEG"), "cls": str(i % 3).encode()} for i in range(count)]

# -----------------------------------------------------------------------------
# Config and command line.

def test_help_mentions_every_option_with_its_meaning(capsys):
    with pytest.raises(SystemExit):
        clip_pgs.parse(["--help"])
    shown = "".join(capsys.readouterr().out.split())
    for f in fields(Config):
        assert f"--{f.name.replace('_', '-')}" in shown and "".join(f.metadata["help"].split()) in shown

def test_without_data_the_demo_has_its_own_defaults_and_options_win():
    expected = Config(**clip_pgs.DEMO | dict(lr=2.0, edges=False))
    assert clip_pgs.parse(["--lr", "2", "--no-edges"]) == (expected, {})

@pytest.mark.parametrize("name, value", [
    ("model", "ViT-B-17"), ("mask", "rnd"), ("ratio", (0.5, 0.3)), ("ratio", (math.nan,)),
    ("image_size", 225), ("ema_size", 100), ("batch_size", 0), ("lr", math.nan), ("scale", (0.9, 1.1))])
def test_a_value_that_cannot_work_is_refused_in_one_line_that_names_its_option(name, value):
    with pytest.raises(ValueError, match=f"^--{name.replace('_', '-')}[^\n]+$"):
        clip_pgs.check(Config(**{name: value}))

# -----------------------------------------------------------------------------
# Masks: similarity, edges, optimal transport, which patches go.

def patches_by_loop(image, P):
    """Patches of one (3, H, W) image, row by row, in float64."""
    image, (_, H, W) = image.double().numpy(), image.shape
    return [image[:, y:y + P, x:x + P] for y in range(0, H, P) for x in range(0, W, P)]

def test_similarity_mixes_the_cosine_of_patches_of_zero_mean_with_that_of_embeddings():
    images, embeddings = noise_images(2, 8, 20), torch.randn(2, 10, 5, generator=seeded())
    for image, x, S in zip(images, embeddings.numpy(), patch_similarity(images, 4, embeddings, alpha=0.25)):
        z = np.stack([(p - p.mean()).ravel() for p in patches_by_loop(image, 4)])
        z, x = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (z, x))
        assert S.numpy() == pytest.approx(0.75 * z @ z.T + 0.25 * x @ x.T, abs=1e-5)

def test_flat_grey_patches_are_similar_to_each_other_and_not_to_the_others():
    images = noise_images(1)
    images[..., :4], images[..., 12:] = 1.23, 0.0                       # the first and the last column
    S, flat = patch_similarity(images, 4)[0], torch.tensor([True, False, False, True] * 4)
    assert S[flat][:, flat].min() > 0.999 and S[flat][:, ~flat].abs().max() < 0.01

@torch.no_grad()
def test_embeddings_are_what_enters_the_first_layer_before_its_norm():
    visual, images, keep = random_clip(tiny()).visual, noise_images(2), torch.tensor([[3, 5], [0, 9]])
    expected = F.conv2d(images, visual.conv1.weight, stride=4).flatten(2).mT + visual.positional_embedding[1:]
    assert visual.patch_tokens(images).allclose(expected, atol=1e-5)
    assert visual.ln_pre(visual.patch_tokens(images)).allclose(visual.embed(images)[:, 1:], atol=1e-5)
    assert visual.patch_tokens(images, keep).allclose(expected.take_along_dim(keep[..., None], 1), atol=1e-5)

def edges_by_loop(image, P):
    """Sobel by hand on one normalised (3, H, W) image: luminance in float64, borders repeated."""
    colour = image.double().numpy() * np.reshape(data.STD, (3, 1, 1)) + np.reshape(data.MEAN, (3, 1, 1))
    y = np.pad(np.tensordot((0.299, 0.587, 0.114), colour, 1), 1, mode="edge")
    smooth_x, smooth_y = y[:, :-2] + 2 * y[:, 1:-1] + y[:, 2:], y[:-2] + 2 * y[1:-1] + y[2:]
    magnitude = np.hypot(smooth_y[:, 2:] - smooth_y[:, :-2], smooth_x[2:] - smooth_x[:-2])
    edges = np.array([p.mean() for p in patches_by_loop(torch.tensor(magnitude)[None], P)])
    return (edges - edges.min()) / max(edges.max() - edges.min(), 1e-9)                 # flat: zeros

@pytest.mark.parametrize("images", [*KINDS, noise_images(1, 8, 20)])
def test_edges_equal_sobel_s_filter_by_hand(images):
    edges = sobel_edges(torch.cat([images, 3 * images]), 4)[0]          # each image has its own scale
    assert edges.numpy() == pytest.approx(edges_by_loop(images[0], 4), abs=1e-5)

def alternating_sinkhorn(S, tolerance=1e-9):
    """Rows and columns normalised in turns, in float64, until nothing moves."""
    plan, before = (S.double() / 0.05).exp(), torch.zeros(1)
    while (plan - before).abs().max() > tolerance:
        before, plan = plan, plan / plan.sum(2, keepdim=True)
        plan = plan / plan.sum(1, keepdim=True)
    return plan

REPEATED = F.normalize(torch.randn(16, 4, generator=seeded()), dim=1)[[0] * 7 + [1] * 3 + [2, 3, 4, 5, 6, 7]]

@pytest.mark.parametrize("S", [patch_similarity(KINDS[3], 4), (REPEATED @ REPEATED.T)[None]])
def test_sinkhorn_equals_the_plain_alternating_one_run_to_convergence(S):
    assert sinkhorn(S).double().allclose(alternating_sinkhorn(S), atol=1e-5, rtol=0)

def test_the_balanced_similarity_ranks_each_row_as_the_log_of_the_transport_plan():
    x = F.normalize(torch.randn(4, 40, 24, generator=seeded(), dtype=torch.float64), dim=-1)
    S = (x @ x.mT).float()
    log_plan = alternating_sinkhorn(S, tolerance=1e-11).log()
    assert clip_pgs.balance(S).argsort(-1).equal(log_plan.argsort(-1))
    assert clip_pgs.balance(S).double().allclose(1 + 0.05 * log_plan, atol=5e-5, rtol=0)

@pytest.mark.parametrize("low, high", [(0.5, 0.5), (0.25, 0.75)])
def test_the_highest_priority_goes_and_the_count_stays_within_the_range(low, high):
    priority = torch.rand(4, 20, generator=seeded())
    count = torch.tensor([2, 8, 13, 19])
    keep, valid = clip_pgs.remove(priority, (low, high), count)
    for row in range(4):
        n = 20 - min(max(int(count[row]), round(20 * low)), round(20 * high))
        stays = keep[row] if valid is None else keep[row][valid[row]]
        assert sorted(stays.tolist()) == sorted(np.argsort(priority[row].numpy())[:n])
        assert valid is None or valid[row].tolist() == [True] * n + [False] * (15 - n)

@pytest.mark.parametrize("mask", MASKS[1:])
@pytest.mark.parametrize("ratio, size, kept", [(0.3, (16, 16), 11), (0.75, (8, 20), 2), (0.99, (4, 12), 1)])
def test_one_ratio_removes_exactly_that_share_of_every_image(mask, ratio, size, kept):
    keep, valid = masked(mask, noise_images(3, *size), (ratio,))
    assert keep.shape == (3, kept) and valid is None

def test_random_keeps_every_patch_equally_often():
    keep, _ = masked("random", noise_images(2000), (0.25,))
    assert (keep.flatten().bincount() / 2000).sub(0.75).abs().max() < 0.06

@pytest.mark.parametrize("mask", ["random", "center"])
def test_a_mask_that_counts_nothing_refuses_a_range(mask):
    with pytest.raises(ValueError, match=f"--ratio 0.3 0.5: --mask {mask} takes one share"):
        masked(mask, noise_images(1), (0.3, 0.5))

def test_center_keeps_each_cell_as_often_as_a_plain_simulation():
    share = masked("center", noise_images(4000, 24, 24), (0.5,))[0].flatten().bincount(minlength=36) / 4000
    rng, axis, count = np.random.default_rng(0), np.linspace(-1, 1, 6), np.zeros(36)
    density = np.exp(-(axis[:, None] ** 2 + axis ** 2) / 0.4) / (0.4 * np.pi)           # 0.80 in the middle
    for _ in range(4000):
        count[np.argsort(rng.random(36) + density.ravel())[18:]] += 1
    assert share.sub(torch.tensor(count / 4000)).abs().max() < 0.05

@pytest.mark.parametrize("ratio, kept", [(0.5, [4] * 24 + [2]), (0.3, [4] * 34 + [1])])
def test_attentive_keeps_the_blocks_with_the_highest_attention_and_splits_at_most_one(ratio, kept):
    attention = torch.rand(20, 196, generator=seeded())
    keep, _ = make_mask("attentive", torch.zeros(20, 3, 224, 224), (ratio,), seeded(1), attention=attention)
    of_block, blocks = (x.view(20, 7, 2, 7, 2).sum((2, 4)).flatten(1)
                        for x in (torch.zeros(20, 196).scatter(1, keep, 1), attention))
    best_first = of_block.take_along_dim(blocks.argsort(1, descending=True), 1)
    assert best_first.equal(F.pad(torch.tensor(kept), (0, 49 - len(kept))).float().expand(20, 49))

def test_attentive_ranks_single_patches_where_the_grid_is_odd():
    attention = torch.rand(3, 15, generator=seeded())
    keep, _ = masked("attentive", noise_images(3, 12, 20), (0.4,), attention=attention)
    assert keep.equal(attention.argsort(1, descending=True)[:, :9])

def test_attentive_with_a_range_removes_blocks_that_get_less_than_an_even_share():
    attention = torch.tensor([[4.0, 4, 1, 1] * 2 + [1] * 8])            # one block of four is above the mean
    keep, valid = masked("attentive", noise_images(1), (0.0, 0.9), attention=attention)
    assert sorted(keep[valid].tolist()) == [0, 1, 4, 5]

@pytest.fixture(scope="module")
def scenes():
    """What make_mask gets of 60 scenes and a new ViT-B-16."""
    torch.manual_seed(0)
    images = torch.stack([evaluate.preprocess(scene(i), 224) for i in range(60)])
    return dict(images=images, ratio=(0.5,), noise=torch.rand(60, 2, 196, generator=seeded()), alpha=0.5,
                embeddings=CLIP(Config()).visual.patch_tokens(images).detach())

def removed(keep, valid=None):
    """(B, 196) bool: which patches of scenes are gone."""
    kept = torch.zeros(len(keep), 196)
    kept.scatter_(1, keep, 1.0 if valid is None else valid.float())
    return kept == 0

@pytest.fixture
def scores(monkeypatch):
    """The scores that pgs_score returns, as make_mask sees them."""
    seen, score = [], clip_pgs.pgs_score
    monkeypatch.setattr(clip_pgs, "pgs_score", lambda *given: seen.append(score(*given)) or seen[-1])
    return seen

@pytest.mark.parametrize("mask", ["cluster", "pgs"])
def test_all_similar_patches_go_or_all_that_go_are_similar(scenes, scores, mask):
    gone = removed(*make_mask(mask, **scenes | dict(alpha=0)))
    similar = scores[0] > 0.5
    few = (similar <= gone).all(1)                                      # all similar patches are removed
    many = (gone <= similar).all(1)                                     # all removed patches are similar
    assert (few | many).all() and few.any() and many.any()

@pytest.mark.parametrize("mask", ["cluster", "pgs"])
def test_a_range_removes_as_many_as_are_similar(scenes, scores, mask):
    gone = removed(*make_mask(mask, **scenes | dict(ratio=(0.3, 0.5))))
    assert gone.sum(1).equal((scores[0] > 0.5).sum(1).clamp(59, 98))

@pytest.mark.parametrize("mask", ["cluster", "pgs"])
def test_of_two_similar_patches_the_second_half_of_the_noise_chooses(scenes, mask):
    gone = removed(*make_mask(mask, **scenes | dict(alpha=0)))
    flipped = scenes["noise"].clone()
    flipped[:, 1] = 1 - flipped[:, 1]                                   # same candidates, same similar patches
    other = removed(*make_mask(mask, **scenes | dict(alpha=0, noise=flipped)))
    assert (gone & ~other).sum(1).double().mean() > 20

@pytest.mark.parametrize("transport", [True, False])
def test_pgs_scores_by_the_nearest_candidate(scenes, scores, transport):
    images, noise = scenes["images"][:3], scenes["noise"][:3]
    make_mask("pgs", images, (0.5,), noise=noise, transport=transport)
    S = patch_similarity(images)
    expected = 1 + 0.05 * sinkhorn(S).log() if transport else S
    for row in range(3):                                                # 5 % of 196 patches: ten candidates
        candidates = np.argsort(edges_by_loop(images[row], 16) - noise[row, 0].numpy())[:10]
        assert scores[0][row].allclose(expected[row, candidates].amax(0), atol=1e-4)

def test_cluster_scores_by_the_nearest_anchor(scenes, scores):
    make_mask("cluster", **scenes | dict(alpha=0))
    S = patch_similarity(scenes["images"])
    for row in range(3):                                                # 3 % of 196 patches: six anchors
        anchors = scenes["noise"][row, 0].argsort(descending=True)[:6]
        assert scores[0][row].equal(S[row, anchors].amax(0))

@pytest.mark.parametrize("mask, least", [("random", 45), ("cluster", 34), ("pgs", 24)])
def test_two_draws_of_a_mask_differ(scenes, mask, least):
    first = removed(*make_mask(mask, **scenes | dict(alpha=0)))
    other = torch.rand(60, 2, 196, generator=seeded(1))
    second = removed(*make_mask(mask, **scenes | dict(alpha=0, noise=other)))
    assert (first & ~second).sum(1).double().mean() > least

@pytest.mark.parametrize("mask, switch, least", [
    ("pgs", dict(edges=False), 5), ("pgs", dict(transport=False), 1.5), ("pgs", dict(embeddings=None), 2.5),
    ("cluster", dict(embeddings=None), 2.5)])
def test_every_switch_changes_the_mask_of_a_picture(scenes, mask, switch, least):
    gone = removed(*make_mask(mask, **scenes))
    other = removed(*make_mask(mask, **scenes | switch))
    assert least < (gone & ~other).sum(1).double().mean() < 50

@pytest.mark.parametrize("mask", MASKS)
def test_a_mask_does_not_depend_on_the_other_images_in_the_batch(mask):
    images, noise = torch.cat(KINDS), torch.rand(4, 2, 16, generator=seeded())
    embeddings, attention = (torch.rand(4, 16, *size, generator=seeded(1)) for size in ((8,), ()))
    together, *alone = (make_mask(
        mask, images[rows], (0.3, 0.7) if mask in clip_pgs.COUNTING else (0.5,), patch_size=4, noise=noise[rows], embeddings=embeddings[rows],
        attention=attention[rows], alpha=0.3) for rows in ([0, 1, 2, 3], [0], [1], [2], [3]))
    assert together[0].equal(torch.cat([keep for keep, _ in alone]))
    assert mask not in clip_pgs.COUNTING or together[1].equal(torch.cat([valid for _, valid in alone]))

def test_a_mask_is_the_same_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        inside = masked("pgs", noise_images(50), (0.5,))[0]
    assert inside.equal(masked("pgs", noise_images(50), (0.5,))[0])

def test_the_mask_that_the_readme_adds_works_as_written(tmp_path, monkeypatch):
    readme, source = (open(f"{HERE}/{n}", encoding="utf-8").read() for n in ("README.md", "clip_pgs.py"))
    names, branch = re.search(r'^    (MASKS = .*"bright"\))\n\n((?:    .*\n)+)', readme, re.M).groups()
    source = re.sub(r"^MASKS = .*$", names, source, flags=re.M)
    branch = re.sub("^(?=.)", "    ", branch, flags=re.M)               # into the body of make_mask
    (tmp_path / "mine.py").write_text(re.sub('(?=^ *if name == "cluster":)', branch, source, flags=re.M))
    monkeypatch.syspath_prepend(tmp_path)
    keep, _ = __import__("mine").make_mask("bright", noise_images(2), (0.5,), patch_size=4)
    assert keep.equal(clip_pgs.patchify(noise_images(2), 4).mean(-1).argsort(1)[:, :8])

# -----------------------------------------------------------------------------
# Model and teacher.

def test_vit_b_16_has_open_clip_s_names_and_number_of_parameters():
    block = [f"{layer}.{kind}" for layer in ("ln_1", "ln_2", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
             for kind in ("weight", "bias")] + ["attn.in_proj_weight", "attn.in_proj_bias"]
    blocks = [f"transformer.resblocks.{i}.{name}" for i in range(12) for name in block]
    visual = ("class_embedding positional_embedding proj conv1.weight ln_pre.weight ln_pre.bias "
              "ln_post.weight ln_post.bias").split() + blocks
    text = ("positional_embedding text_projection logit_scale token_embedding.weight ln_final.weight "
            "ln_final.bias").split() + blocks
    with torch.device("meta"):
        parameters = CLIP(Config()).state_dict()
    assert sorted(parameters) == sorted(text + [f"visual.{name}" for name in visual])
    assert sum(p.numel() for p in parameters.values()) == 149_620_737

@pytest.mark.parametrize("quick, gelu", [(False, F.gelu), (True, lambda x: x / (1 + (-1.702 * x).exp()))])
def test_a_block_equals_pytorch_s_own_transformer_layer_also_a_causal_one(quick, gelu):
    block = random_clip(tiny(quick_gelu=quick)).visual.transformer.resblocks[0]
    layer = torch.nn.TransformerEncoderLayer(128, 2, 512, 0.0, gelu, batch_first=True, norm_first=True)
    x = torch.randn(2, 5, 128, generator=seeded())
    ours = [p for part in (block.attn, block.mlp, block.ln_1, block.ln_2) for p in part.parameters()]
    layer.load_state_dict(dict(zip(layer.state_dict(), ours)))
    assert block(x).allclose(layer(x), atol=1e-5)
    later = torch.nn.Transformer.generate_square_subsequent_mask(5)
    assert block(x, causal=True).allclose(layer(x, later), atol=1e-5)

def test_removed_patches_and_padded_slots_change_neither_the_features_nor_the_gradients():
    clip, images = random_clip(tiny()), noise_images(8).requires_grad_()
    order, weight = torch.rand(2, 8, 16, generator=seeded())
    keep = order.argsort(1)[:, :12]
    valid = torch.arange(12) < torch.randint(1, 13, (8, 1), generator=seeded())
    alone = torch.cat([clip.encode_image(images[i:i + 1], keep[i:i + 1, valid[i]]) for i in range(8)])
    padded = clip.encode_image(images, keep, valid)
    assert padded.allclose(alone, atol=1e-5)
    grads, expected = (torch.autograd.grad((x * weight).sum(), [images, *clip.visual.parameters()])
                       for x in (padded, alone))
    assert all(ours.allclose(theirs, atol=1e-4) for ours, theirs in zip(grads, expected))
    seen = torch.zeros(8, 16).scatter(1, keep, valid.float()).bool()
    assert clip_pgs.patchify(grads[0], 4).any(2).equal(seen)

def test_two_threads_give_the_same_gradients_every_time():
    clip, images = random_clip(tiny()), noise_images(500)
    keep = torch.rand(500, 16, generator=seeded()).argsort(1)[:, :8]
    torch.set_num_threads(2)
    first, *others = (torch.autograd.grad(clip.encode_image(images, keep).square().sum(),
                                          clip.visual.positional_embedding)[0] for _ in range(5))
    torch.set_num_threads(1)
    assert all(grad.equal(first) for grad in others)

def test_a_caption_s_feature_depends_on_its_tokens_up_to_the_end_and_on_nothing_after_it():
    clip = random_clip(tiny())
    clip.encode_text(torch.tensor([[598, 1, 2, 3, 599, 7, 0]])).sum().backward()
    assert clip.token_embedding.weight.grad.any(1).nonzero().flatten().tolist() == [1, 2, 3, 598, 599]

def test_captions_encoded_together_get_the_features_of_each_alone():
    clip, tokens = random_clip(tiny()), random_tokens(20)
    alone = torch.cat([clip.encode_text(row[None]) for row in tokens])
    assert clip.encode_text(tokens).allclose(alone, atol=1e-5)

@pytest.mark.parametrize("size, side", [(0, 16), (8, 8)])
def test_class_attention_is_the_class_token_s_row_of_pytorch_s_maps_stretched_over_the_patches(size, side):
    clip, images, maps = random_clip(tiny()), noise_images(3), []
    seen = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
    x = clip.visual.embed(seen)
    for block in clip.visual.transformer.resblocks:
        theirs, y = torch.nn.MultiheadAttention(128, 2, batch_first=True), block.ln_1(x)
        theirs.load_state_dict(block.attn.state_dict())
        maps.append(theirs(y, y, y)[1])                                 # mean over the heads
        x = block(x)
    rows = sum(maps)[:, 0, 1:].view(3, 1, side // 4, side // 4) / len(maps)
    attention, token = clip_pgs.class_attention(clip.visual, images, size)
    assert attention.allclose(F.interpolate(rows, (4, 4), mode="bilinear").flatten(1), atol=1e-6)
    assert (token @ clip.visual.proj).allclose(clip.encode_image(seen), atol=1e-5)

@pytest.mark.parametrize("progress, share", [(0, 0.004), (0.5, 0.002), (1, 0)])
def test_the_ema_takes_a_share_of_the_model_that_falls_to_zero_by_a_cosine(progress, share):
    ema, model = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    expected = [(1 - share) * e + share * m for e, m in zip(ema.parameters(), model.parameters())]
    clip_pgs.update_ema(ema, model, progress)
    assert all(e.allclose(x, atol=1e-7) for e, x in zip(ema.parameters(), expected))

# -----------------------------------------------------------------------------
# Losses, optimizer, schedule; one step, in one pass or many, on one rank or two.

def features(B=6, E=4):
    return [torch.randn(B, E, dtype=torch.float64, generator=seeded(i), requires_grad=True) for i in (0, 1)]

def test_the_loss_is_the_cross_entropy_of_rows_and_columns_of_the_decoded_pairs_alone():
    (images, texts), decoded = features(), torch.tensor([True, False, True, True, False, True])
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    scores = (9 * F.cosine_similarity(images[decoded][:, None], texts[decoded], dim=-1)).exp()
    expected = -(scores.diagonal() ** 2 / scores.sum(0) / scores.sum(1)).log().mean() / 2
    assert clip_pgs.clip_loss(images, texts, scale, decoded).allclose(expected, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(clip_pgs.clip_loss, (images, texts, scale, decoded))

def test_nt_xent_asks_for_the_other_view_among_all_others():
    a, b = features()
    z = torch.cat([a, b])
    scores = (F.cosine_similarity(z[:, None], z, dim=-1) / 0.1).exp().fill_diagonal_(0)
    expected = -(scores[range(12), np.roll(range(12), 6)] / scores.sum(1)).log().mean()
    assert clip_pgs.nt_xent(a, b).allclose(expected, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(clip_pgs.nt_xent, (a, b))

def test_byol_is_the_mean_of_2_minus_2_cosines_and_teaches_one_side_only():
    a, b = features()
    expected = np.mean([2 - 2 * (x @ y / x.norm() / y.norm()).item() for x, y in zip(a, b)])
    loss = clip_pgs.byol(a, b)
    loss.backward()
    assert loss.item() == pytest.approx(expected) and a.grad.abs().sum() > 0 and b.grad is None

def test_attention_cut_by_a_box_of_whole_patches_is_a_slice():
    attention, box = torch.rand(2, 64, generator=seeded()), torch.tensor([[0.25, 0.5, 0.75, 1.0]] * 2)
    cut = attention.view(2, 8, 8)[:, 4:, 2:6].flatten(1)
    assert clip_pgs.cut_attention(attention, box, 4).allclose(cut, atol=1e-6)

def test_boxes_say_where_the_views_lie_in_the_whole(tmp_path, monkeypatch):
    x, y = np.meshgrid(np.arange(256), np.arange(256))
    image = Image.fromarray(np.stack([x, y, 0 * x], 2).astype(np.uint8))  # a pixel's colour says where it was
    made = batches(tmp_path, [("0.png", encoded(image)), ("0.txt", b"coordinates")], [[0]],
                   tiny(image_size=32, scale=(0.3, 0.5), views=2))
    augmented = made[0].images
    monkeypatch.setattr(data, "augment", lambda view, rng: view)
    images, boxes = made[0].images, made[0].boxes
    assert images[2].equal(augmented[2]) and not any(images[i].equal(augmented[i]) for i in (0, 1))
    whole = images[2, 0, :2].double().flatten(1)
    low, high = (pick(whole, dim=1).repeat(2) for pick in (torch.amin, torch.amax))
    for view, box in zip(images[:2, 0, :2].double().flatten(2), boxes[:, 0].double()):
        assert (torch.cat([view.amin(1), view.amax(1)]) - (low + box * (high - low))).abs().max() < 5

def test_only_matrices_decay():
    decay, rest = clip_pgs.make_optimizer(tiny(weight_decay=0.2), CLIP(tiny())).param_groups
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.2, 0)
    assert {p.ndim for p in decay["params"]} == {2, 4} and {p.ndim for p in rest["params"]} == {0, 1}

def test_the_learning_rate_rises_in_a_line_and_falls_in_a_cosine_to_zero():
    config = Config(lr=2.0, warmup=10)
    steps = (0, 4, 9, 10, 35, 60, 85, 109, 110)
    rates = [clip_pgs.learning_rate(config, step, 110) for step in steps]
    cosine = [1 + math.cos(math.pi * share) for share in (0, 0.25, 0.5, 0.75, 0.99, 1)]
    assert rates == pytest.approx([0.2, 1.0, 2.0, *cosine], abs=1e-12)
    at_most_a_fifth = [clip_pgs.learning_rate(Config(lr=1.0), step, 10) for step in (0, 1, 2)]
    assert at_most_a_fifth == [0.5, 1.0, 1.0]

def step_for(config, clip):
    """(the function that makes a step, its model)."""
    if config.views == 2:
        return clip_pgs.two_view_step, clip_pgs.TwoViews(clip)
    return (clip_pgs.train_step if config.accum == 1 else clip_pgs.train_step_in_passes), clip

def one_step(config, step=None):
    """(1 + P,) loss and gradients of a step on 8 pairs, one of them not decoded, shared among the ranks."""
    rank, world_size = clip_pgs.ranks()
    clip = random_clip(config)
    heads = clip_pgs.Heads(config) if config.contrast else None
    function, model = step_for(config, clip)
    if world_size > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)
    shape = (8, 3, 16, 16) if config.views == 1 else (3, 8, 3, 16, 16)
    images = torch.randint(256, shape, generator=seeded(), dtype=torch.uint8)
    boxes = torch.tensor([[[0.0, 0.0, 1.0, 0.7]] * 8, [[0.2, 0.1, 1.0, 1.0]] * 8])
    batch = data.Batch(images.chunk(world_size, dim=config.views - 1)[rank],
                       random_tokens(8).chunk(world_size)[rank],
                       (torch.arange(8) != 5).chunk(world_size)[rank],
                       boxes.chunk(world_size, dim=1)[rank], [], "")
    noise = clip_pgs.step_noise(config, 3, 8 * config.views, "cpu")
    optimizer = Keep(clip, heads)
    more = dict(heads=heads) if config.views == 2 else {}
    numbers, *_ = (step or function)(config, clip, model, optimizer, batch, noise, 0.5, copy.deepcopy(clip.visual), **more)
    return torch.cat([numbers["loss"][None], *optimizer.gradients])

class Keep:
    """An optimizer that keeps the gradients and changes nothing."""
    def __init__(self, *modules):
        self.parameters = [p for m in modules if m for p in m.parameters() if p.requires_grad]
        self.param_groups = [{"params": self.parameters}]

    def step(self):
        self.gradients = [p.grad.flatten() for p in self.parameters]

    def zero_grad(self):
        pass

FULL = dict(mask="attentive", views=2, contrast=("simclr", "byol"))     # A-CLIP
RANGE = dict(mask="pgs", ratio=(0.25, 0.75))

def test_the_noise_of_masks_follows_from_seed_and_step():
    one, *others = (clip_pgs.step_noise(tiny(seed=seed), step, 4, "cpu")
                    for seed, step in ((0, 1), (0, 1), (0, 2), (1, 1)))
    assert [one.equal(other) for other in others] == [True, False, False]

@pytest.mark.parametrize("changes", [dict(mask="pgs"), RANGE, FULL], ids=["fixed", "range", "A-CLIP"])
def test_many_small_passes_make_the_gradients_of_one_large_batch(changes):
    whole = one_step(tiny(**changes))
    passes = one_step(tiny(**changes, accum=4))
    assert whole[1:].abs().max() > 0.1 and passes.allclose(whole, rtol=0, atol=1e-5)

@pytest.mark.parametrize("changes", [dict(mask="none"), dict(mask="attentive"), RANGE], ids=str)
def test_many_passes_with_one_pass_give_the_plain_step_s_gradients_to_the_last_digit(changes):
    plain = one_step(tiny(**changes))
    assert one_step(tiny(**changes), clip_pgs.train_step_in_passes).equal(plain)

def work_of_a_rank(rank, folder):
    """What two processes do for the tests below; leaves its results in the folder."""
    os.environ["LOCAL_RANK"] = str(rank)  # rank 1 reads the index that rank 0 has made
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    steps = [one_step(tiny(accum=accum, **changes)) for changes in (RANGE, FULL) for accum in (1, 2)]
    more = ("--batch-size", 2, "--accum", 2, "--resume", f"{folder}/one/epoch_1.pt", "--out", f"{folder}/two")
    clip_pgs.train(*clip_pgs.parse(options(folder, *more)), torch.device("cpu"))
    metrics = evaluate.evaluate(*SMALL_CLIP, f"{folder}/retrieval", rank, 2, workers=1)
    with pytest.raises(ValueError, match="001.jpg does not decode"):    # a picture of rank 1: both hear of it
        evaluate.evaluate(*SMALL_CLIP, f"{folder}/broken", rank, 2, workers=1)
    torch.save((steps, metrics), f"{folder}/rank_{rank}.pt")
    os._exit(0)  # as main does

@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """A folder with the work of one process (`one`) and of two: gradients, training runs, metrics."""
    folder = tmp_path_factory.mktemp("two_ranks")
    draw_shards(folder)
    val = make_folder(folder / "val", labelled(7))
    samples = [{"jpg": noise_image(i), "txt": f"{i} a\n{i} b".encode()[:3 + i]} for i in range(16)]
    make_folder(folder / "retrieval", samples, kind="retrieval")
    make_folder(folder / "broken", [samples[0], samples[1] | {"jpg": b"no picture"}], kind="retrieval")
    command(*options(folder, "--out", folder / "one", "--keep-epochs", "--val", val))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(work_of_a_rank, (str(folder),), nprocs=2)
    return folder

@pytest.mark.parametrize("number", range(4), ids=["range", "range, accum 2", "A-CLIP", "A-CLIP, accum 2"])
def test_two_ranks_give_the_loss_and_gradients_of_one_with_both_batches(two_ranks, number):
    expected = one_step(tiny(**(RANGE, FULL)[number // 2]))
    for rank in (0, 1):
        assert torch.load(two_ranks / f"rank_{rank}.pt")[0][number].allclose(expected, rtol=0, atol=1e-5)

def test_a_run_of_one_rank_goes_on_with_two_and_with_its_folders(two_ranks):
    one, two = read_log(two_ranks / "one")[5:], read_log(two_ranks / "two")
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in one], abs=1e-5)
    assert [r.get("eval") for r in two] == [r.get("eval") for r in one]
    assert one[-1]["eval"][f"{two_ranks}/val"].keys() == {"acc1", "acc5", "mean_per_class_recall"}

def tiny_step(config, device, logit_scale=1.0):
    """train_step on 4 pairs with weights and noise on the device and SGD of rate 1: (numbers, clip)."""
    with torch.device(device):
        clip = random_clip(config)
        ema = random_clip(config).visual
        noise = torch.rand(4, 2, 16)
    clip.logit_scale.data.fill_(logit_scale)
    images = torch.arange(4 * 768).view(4, 3, 16, 16).byte()
    batch = data.Batch(images, random_tokens(4), torch.ones(4, dtype=torch.bool), None, [], "")
    optimizer = torch.optim.SGD(clip.parameters(), lr=1.0)
    return clip_pgs.train_step(config, clip, clip, optimizer, batch, noise, 0.5, ema)[0], clip

@pytest.mark.parametrize("mask", MASKS)
def test_a_step_at_a_fixed_ratio_reads_nothing_back_from_the_device(monkeypatch, mask):
    # Tensors on meta have no value: to read one is an error. It does not know autocast.
    monkeypatch.setattr(torch, "autocast", lambda *where, **how: nullcontext())
    assert tiny_step(tiny(mask=mask), "meta")[0]["loss"].is_meta

def test_grad_clip_limits_the_norm_of_the_gradient_and_counts_what_it_was():
    (_, before), (numbers, clip) = (tiny_step(tiny(grad_clip=most), "cpu") for most in (1e-9, 0.01))
    moved = torch.cat([(p - old).flatten() for p, old in zip(clip.parameters(), before.parameters())])
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3) and numbers["grad_norm"] > 0.1

def test_logit_scale_never_exceeds_100():
    numbers, _ = tiny_step(tiny(grad_clip=0.01), "cpu", logit_scale=9.0)
    assert numbers["logit_scale"].item() == pytest.approx(100)

# -----------------------------------------------------------------------------
# The run, and pictures of masks.

SMALL = "--model tiny --image-size 16 --patch-size 4 --batch-size 8 --workers 0".split()

def options(folder, *more):
    """The command line of a tiny run: 5 steps an epoch, 10 in all."""
    return ["--data", f"{folder}/*.tar", *SMALL, *"--context-length 12 --vocab-size 600 --epochs 2".split(),
            *map(str, more)]

def read_log(folder):
    """The records of a log without the speed, which differs from run to run."""
    records = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in record.items() if k != "images_per_s"} for record in records]

def command(*arguments, module=clip_pgs, fails=""):
    """`python clip_pgs.py arguments`, in this process, which keeps its command line and its signals.
    fails: a pattern for the line in which it must end."""
    if fails:
        with pytest.raises(SystemExit, match=rf"^error: [^\n]*{fails}[^\n]*$"):
            command(*arguments, module=module)
        return
    handlers = [(number, signal.getsignal(number)) for number in data.STOP_SIGNALS]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(printed):
        patch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        status = module.main()
    for number, handler in handlers:
        signal.signal(number, handler)
    print(printed.getvalue(), file=sys.stderr, end="")
    if status:
        _, error, line = printed.getvalue().rpartition("error: ")
        raise SystemExit(f"error: {line}".rstrip() if error else status)

@pytest.fixture
def train(tmp_path):
    """train(options, out=folder, fails=pattern): a tiny run on 40 pairs; returns its log."""
    draw_shards(tmp_path)

    def run(*more, out="out", fails=""):
        command(*options(tmp_path, "--out", tmp_path / out, *more), fails=fails)
        return fails or read_log(tmp_path / out)
    return run

def test_a_run_leaves_a_log_a_checkpoint_and_a_picture_and_says_what_to_do_next(train, tmp_path, capsys):
    log = train()
    assert [(record["step"], record["epoch"]) for record in log] == [(i + 1, i // 5 + 1) for i in range(10)]
    assert log[0].keys() == {"step", "epoch", "loss", "lr", "logit_scale", "kept"}
    assert (tmp_path / "out" / "log.jsonl").read_text().count('"images_per_s": ') == 10
    files = ".lock ckpt.pt curves.png index.json index.npy log.jsonl masks.png"
    assert sorted(os.listdir(tmp_path / "out")) == files.split()
    assert torch.load(tmp_path / "out" / "ckpt.pt")["step"] == 10
    printed = capsys.readouterr().out
    assert "8 of 16 patches removed" in printed and "python evaluate.py" in printed.splitlines()[-1]

def test_the_same_seed_gives_the_same_losses_to_the_last_digit_with_any_number_of_workers(train):
    first = train("--seed", 1)
    assert train("--seed", 1, "--workers", 2, out="again") == first
    assert train("--seed", 2, out="other") != first

@pytest.mark.parametrize("more", ["--text-tokens 4", "--mask attentive --views 2 --contrast simclr byol"])
def test_a_run_goes_on_from_an_epoch_s_end_as_if_it_had_never_stopped(train, tmp_path, more):
    whole = train(*more.split(), "--keep-epochs", "--ratio", 0.3, 0.5)
    command("--resume", tmp_path / "out" / "epoch_1.pt", "--out", tmp_path / "rest")
    assert read_log(tmp_path / "rest") == whole[5:]

def test_a_run_killed_before_its_evaluation_makes_up_for_it_and_drops_damaged_lines(train, tmp_path, capsys):
    whole, log = train("--val", make_folder(tmp_path / "pets", labelled(10))), tmp_path / "out" / "log.jsonl"
    log.write_text("\n".join([*log.read_text().splitlines()[:-1], "\0\0\0", "", "{}", '{"step": null}']))
    assert "eval" in whole[-1] and train("--resume") == whole == train("--resume")
    assert "4 damaged lines" in capsys.readouterr().out

def test_training_learns_its_pairs_by_heart(train):
    log = train("--epochs", 20, "--lr", 0.003, "--mask", "none", "--scale", 1, 1)
    assert np.mean([record["loss"] for record in log[-5:]]) < 1         # chance: log(8) = 2.1

def test_the_last_epochs_can_see_whole_images_but_no_more_than_half_of_the_run(train):
    assert [r["kept"] for r in train("--unmasked-epochs", 0.6)] == [0.5] * 7 + [1.0] * 3
    assert [r["kept"] for r in train("--unmasked-epochs", 9, "--steps", 5, out="x")] == [0.5] * 3 + [1.0] * 2

def test_a_loss_that_is_not_finite_stops_the_run_and_no_checkpoint_holds_it(train, tmp_path):
    train("--lr", 1e30, "--save-every", 1, fails="step 2: the loss is nan")
    assert torch.load(tmp_path / "out" / "ckpt.pt")["step"] == 1

def test_resuming_needs_the_same_images_per_step_and_samples_and_nothing_else(train, tmp_path):
    train("--steps", 3)
    train("--batch-size", 4, "--resume", fails="--resume .*had 8 images per step.*now there are 4")
    train("--image-size", 32, "--resume", fails="ckpt.pt: does not fit this model: size mismatch")
    assert len(train("--steps", 5, "--batch-size", 4, "--accum", 2, "--mask", "attentive", "--resume")) == 5
    write_shard(tmp_path / "1.tar", pairs(range(20, 36)))               # one in ten is gone: another order
    train("--steps", 8, "--accum", 1, "--resume", fails="--resume .*had 40 samples, now there are 36")

def test_broken_samples_are_skipped_and_counted(train, tmp_path, capsys):
    draw_shards(tmp_path, broken=(7, 33))
    train("--epochs", 1)
    printed = capsys.readouterr().out
    assert printed.count("2 of 40 samples skipped") == printed.count("  2  cannot identify image file") == 1

@pytest.mark.parametrize("broken, most, says, steps", [
    (20, 0.1, "20 of 40 samples skipped[^$]*20  cannot identify image[^$]*--max-bad 0.1", 4),
    (40, 1, "8 of 8 samples skipped[^$]*8  cannot identify image", 0)])  # no step without a pair
def test_too_many_broken_samples_stop_a_run_before_its_checkpoint(train, tmp_path, broken, most, says, steps):
    draw_shards(tmp_path, broken=range(broken))
    with pytest.raises(SystemExit, match=says):
        train("--max-bad", most)
    assert not (tmp_path / "out" / "ckpt.pt").exists() and len(read_log(tmp_path / "out")) == steps

def test_a_fresh_start_never_overwrites_a_run(train, tmp_path):
    train("--steps", 3, "--mask", "random")
    train("--steps", 1, "--resume", out="other")                        # nothing to go on with: a fresh start
    before = (tmp_path / "out" / "ckpt.pt").read_bytes()
    for more in ((), ("--resume", tmp_path / "other" / "ckpt.pt")):
        train(*more, fails=r"holds a run \(mask random, step 3\).*--resume.*--out")
    assert (tmp_path / "out" / "ckpt.pt").read_bytes() == before
    torch.save({"config": {}}, tmp_path / "other" / "ckpt.pt")
    train(out="other", fails="--out .*other: holds a ckpt.pt; ")

def test_a_second_process_in_the_same_folder_notices_the_first(train, tmp_path):
    train("--steps", 3)
    with open(tmp_path / "out" / ".lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        second = started(tmp_path, "--out", tmp_path / "out", "--resume")
        _, errors = second.communicate(timeout=60)
    assert second.returncode == 1 and "another process trains there" in errors and "Traceback" not in errors

def test_a_folder_that_fails_is_named_and_does_not_end_the_training(train, tmp_path, capsys):
    bad = make_folder(tmp_path / "bad", [*labelled(1), dict(jpg=b"no picture", cls=b"1")])
    with pytest.raises(SystemExit) as stop:
        train("--val", bad, make_folder(tmp_path / "good", labelled(3)))
    printed = capsys.readouterr().out
    assert stop.value.code == 1 and len(read_log(tmp_path / "out")) == 10 + 2
    assert f"| {bad}" in printed and "001.jpg does not decode" in printed and "wrote" in printed

def test_init_starts_from_weights_with_a_new_optimizer_and_another_image_size(train, tmp_path):
    train("--steps", 3)
    train("--init", tmp_path / "out" / "ckpt.pt", "--image-size", 32, "--lr", 0, "--steps", 2, out="fine")
    old, new = (torch.load(tmp_path / out / "ckpt.pt") for out in ("out", "fine"))
    grids = [run["model"].pop("visual.positional_embedding")[1:].T.unflatten(1, (side, side))
             for run, side in ((old, 4), (new, 8))]
    assert grids[1].equal(F.interpolate(grids[0][None], (8, 8), mode="bicubic", antialias=True)[0])
    assert new["step"] == 2 and new["merges"] == old["merges"]
    assert all(new["model"][name].equal(x) for name, x in old["model"].items() if name != "logit_scale")

def test_bf16_on_a_cpu_is_near_fp32(train):
    fp32, bf16 = train("--precision", "fp32"), train("--precision", "bf16", out="bf16")
    assert 0 < max(abs(a["loss"] - b["loss"]) for a, b in zip(fp32, bf16)) < 0.05

def test_slurm_tasks_without_torchrun_are_told_to_use_it(train, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "8")
    train(fails="SLURM_NTASKS.*torchrun")

ONE_THREAD = dict(cwd=HERE, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True)
LONG = ("--epochs", 6, "--save-every", 3, "--mask", "attentive", "--workers", 1)        # 30 steps

def started(folder, *more):
    """`python clip_pgs.py` in another process, which the demo model keeps busy for some seconds."""
    return subprocess.Popen([sys.executable, "clip_pgs.py", *options(folder, "--model", "demo", *more)],
                            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, **ONE_THREAD)

@pytest.mark.parametrize("number, status, says", [
    (signal.SIGKILL, -9, ""), (signal.SIGTERM, 1, "stopped after step {} of 30; go on with --resume\n")])
def test_a_run_ended_by_a_signal_goes_on_as_if_it_had_never_stopped(train, tmp_path, number, status, says):
    whole = train("--model", "demo", *LONG, out="whole")
    process, log = started(tmp_path, *LONG, "--out", tmp_path / "out"), tmp_path / "out" / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 7):
        time.sleep(0.002)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    steps = log.read_text().count("\n")
    assert process.returncode == status and errors.endswith(says.format(steps))
    assert "Traceback" not in errors or number == signal.SIGKILL        # whose worker may miss its parent
    command("--resume", "--out", tmp_path / "out")
    assert steps < 30 and read_log(tmp_path / "out") == whole

def test_a_request_to_stop_is_heard_from_schedulers_and_closed_terminals():
    names = {number.name for number in data.STOP_SIGNALS}
    assert names == {"SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"}

def test_training_goes_on_when_nobody_reads_its_output(train, tmp_path):
    whole = train("--model", "demo", out="whole")
    process = subprocess.Popen(
        [sys.executable, "clip_pgs.py", *options(tmp_path, "--model", "demo", "--out", tmp_path / "out")],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **ONE_THREAD)
    process.stdout.close()                                              # as `| head -1` does
    assert process.wait(timeout=60) == 0 and read_log(tmp_path / "out") == whole

def test_resuming_a_run_that_is_longer_is_refused_and_leaves_its_log(train, tmp_path):
    before = train("--steps", 4)
    train("--steps", 2, "--resume", fails="step 4 is done, 2 were asked for")
    assert read_log(tmp_path / "out") == before

def test_a_resumed_run_says_what_differs(train, tmp_path, capsys):
    train("--steps", 3)
    train("--steps", 5, "--lr", 0.1, "--resume")
    printed = capsys.readouterr().out
    assert "going on after step 3" in printed and "--lr 0.1 (was 0.001)" in printed
    train("--steps", 5, "--resume", out="new")
    assert f"no checkpoint in {tmp_path}/new: a new run" in capsys.readouterr().out

@pytest.mark.parametrize("more", [("--init", "x.pt"), ("--vocab", "x.gz"), ("--vocab-size", 520)], ids=str)
def test_what_cannot_take_effect_on_a_resumed_run_is_refused(train, more):
    train("--steps", 2)
    train(*more, "--steps", 4, "--resume", fails=f"{more[0]}: no effect on a run that goes on")

def test_a_resumed_run_takes_a_new_weight_decay(train, tmp_path):
    train("--steps", 2)
    train("--steps", 3, "--weight-decay", 0.7, "--resume")
    groups = torch.load(tmp_path / "out" / "ckpt.pt")["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.7, 0.0]

def test_ranks_with_other_shards_or_checkpoints_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(clip_pgs, "ranks", lambda: (0, 2))
    index = np.zeros(3, data.INDEX)

    def other_rank(everyone, mine):
        everyone[:] = [mine, mine | {"steps done": 21}]
    monkeypatch.setattr(torch.distributed, "all_gather_object", other_rank)
    with pytest.raises(ValueError, match="steps done: 21 on rank 1, 0 on rank 0; all machines need the same"):
        clip_pgs.check_ranks_agree(tiny(), 0, index, "")

@pytest.mark.parametrize("changes", [dict(mask="pgs", unmasked_epochs=1.0), RANGE, FULL], ids=str)
def test_a_rehearsal_changes_nothing(tmp_path, changes):
    """The step on whole images that a small card is to refuse at once, not at the end."""
    draw_shards(tmp_path)
    config = tiny(data=(f"{tmp_path}/*.tar",), out=str(tmp_path), batch_size=8, workers=0, **changes)
    run = clip_pgs.prepare(config, {}, torch.device("cpu"))
    batch = next(iter(clip_pgs.epoch_loader(run, 0, range(5))))
    state = lambda: torch.cat([x.flatten().double() for module in (run.clip, run.heads, run.ema)
                               if module is not None for x in module.state_dict().values()])
    before, noise = state(), torch.get_rng_state()
    clip_pgs.rehearse(run, batch)
    assert state().equal(before) and torch.get_rng_state().equal(noise)
    assert all(p.grad is None for p in run.clip.parameters())

def test_a_rank_that_fails_alone_brings_the_run_down_with_its_message(tmp_path):
    draw_shards(tmp_path)
    most = 100_000  # bytes in a file: too few for rank 0's checkpoint after step 3, while rank 1 goes on
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node 2 clip_pgs.py".split()
    arguments = [*torchrun, *options(tmp_path, "--model", "demo", *LONG, "--out", tmp_path)]
    run = subprocess.run([sys.executable, *arguments], timeout=60, capture_output=True, **ONE_THREAD,
                         preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)))
    assert run.returncode == 1 and f"error: {tmp_path}/ckpt.pt: " in run.stderr

@pytest.mark.parametrize("arguments, says", [
    ("--data a.tar", "a.tar: no such file"), ("--data *.rat", "no file"), ("--data {3..1}.tar", "range"),
    ("--data .", "a folder"), ("--batch-size 9", "9 images per step, but only 8 samples"),
    ("--val nowhere", "nowhere: no such folder"), ("--resume good.tar", "good.tar: refused"),
    ("--vocab good.tar", "--vocab good.tar: [^\n]*not CLIP"), ("--vocab three.gz", "--vocab three.gz: "),
    ("--show-masks good.tar", "good.tar: cannot identify image file")])
def test_bad_input_ends_in_one_clear_line_and_exit_status_1(tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    write_shard("good.tar", pairs(range(8)))
    (tmp_path / "three.gz").write_bytes(gzip.compress(b"version\nthree words here\n"))
    command("--data", "good.tar", *SMALL, *arguments.split(), fails=says)

def test_masks_are_shown_of_photographs_of_any_mode_also_with_a_trained_encoder(train, tmp_path):
    train("--mask", "attentive", "--steps", 2)
    photos = [tmp_path / "palette.png", tmp_path / "cmyk.jpg"]
    for photo, mode in zip(photos, ("P", "CMYK")):
        scene(0).convert(mode).save(photo)
    for number, how in enumerate(("", "--resume", "--init")):
        more = (how, tmp_path / "out" / "ckpt.pt") if how else SMALL
        command("--show-masks", *photos, *more, "--out", tmp_path / f"{number}")
        # Two rows of photograph, edges, attention and five masks, a line of text below each.
        assert Image.open(tmp_path / f"{number}" / "masks.png").size == (8 * 176, 2 * 191)

# -----------------------------------------------------------------------------
# data.py: shards, index, order, images, words, batches, pack, the demo.

def contents(shards, index):
    """The captions and the image bytes of an index's samples."""
    captions = []
    images = []
    for row in index:
        shard = shards[row["shard"]]
        captions.append("\n".join(data.read_captions(shard, row)))
        images.append(data.read_bytes(shard, row["image"], row["image_size"]))
    return captions, images

def test_brace_ranges_keep_their_width_and_multiply_and_a_shard_named_twice_is_read_once(tmp_path):
    every = []
    for name in ("08-1", "08-2", "09-1", "09-2", "10-1", "10-2"):
        (tmp_path / name).touch()
        every.append(f"{tmp_path}/{name}")
    patterns = [f"{tmp_path}/{{08..10}}-{{1..2}}", f"{tmp_path}/*", every[0]]
    assert data.expand(patterns) == every

@pytest.mark.parametrize("pattern", [
    "set [v2]/*.tar",
    "*/*.tar",
    "set [v2]/[ab].tar",
    "*[v2]/[!c].tar",
    "set [v2]/a.tar",
    "set [[]v2[]]/a.tar"])
def test_a_folder_whose_name_looks_like_a_pattern_is_found(tmp_path, pattern):
    folder = tmp_path / "set [v2]"
    folder.mkdir()
    (folder / "a.tar").touch()
    assert data.expand([f"{tmp_path}/{pattern}"]) == [f"{folder}/a.tar"]

@pytest.mark.parametrize("names, samples", [
    ("v1.0/7.seg.png v1.0/7.TXT 7.txt", "v1.0/7:seg.png,txt 7:txt"),
    ("._7.txt a/.b.png 7.txt", "7:txt"),
    ("0.png 1.png 1.txt 0.txt", "0:png,txt 1:png,txt"),
    ("0.png 0.txt 0.png 1.txt", "0:png,txt 0:png 1:txt"),
    ("0.png 0.txt 1.png README 0.jpg 0.json", "0:png,txt 1:png 0:jpg,json"),
    ("\udce4.png \udcf6.png", "\udce4:png \udcf6:png"),
], ids="dots hidden apart again format bytes".split())
def test_files_of_a_key_are_a_sample_until_a_name_comes_again_and_links_are_none(tmp_path, names, samples):
    path = write_shard(tmp_path / "0.tar", [(name, b"") for name in names.split()])
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("5.txt")
        link.type = tarfile.SYMTYPE
        tar.addfile(link)
    found, fault = data.tar_samples(path)
    assert [f"{key}:{','.join(files)}" for key, files in found] == samples.split()
    assert fault == ""

BUFFER = io.BytesIO()
write_shard("", [(f"{i}.{kind}", b"x") for i in range(4) for kind in ("png", "txt")], fileobj=BUFFER)
WHOLE = BUFFER.getvalue()  # 8 times a header and a block, each of 512 bytes; zeros
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"

@pytest.mark.parametrize("says, complete, raw", [
    ("truncated", 2, WHOLE[:4700]),
    ("truncated", 3, WHOLE[:7900]),
    ("truncated, the", 4, WHOLE[:8192]),
    ("more than zeros", 2, WHOLE[:4096] + bytes(512) + WHOLE[4608:]),
    ("damaged header", 2, WHOLE[:4096] + b"?" * 512 + WHOLE[4608:]),
    ("two tars in one", 4, WHOLE + WHOLE),
    ("a tar without files", 0, bytes(10240)),
    ("empty file, not a tar", 0, b""),
    ("not a tar", 0, b"hello " * 500),
    ("git lfs pull", 0, LFS),
    ("compressed: unpack it", 0, gzip.compress(WHOLE)),
], ids=range(11))
def test_a_damaged_tar_is_named_with_its_fault_and_gives_what_stands_before_it(tmp_path, says, complete, raw):
    path = tmp_path / "0.tar"
    path.write_bytes(raw)
    samples, fault = data.tar_samples(str(path))
    assert fault.startswith(f"{path}: ") and says in fault
    assert [key for key, files in samples if len(files) == 2] == [*"0123"[:complete]]

def test_a_disk_that_fails_while_a_tar_is_read_is_an_error_that_names_it(tmp_path, monkeypatch):
    path = write_shard(tmp_path / "0.tar", pairs([0]))

    def fail(_):
        raise OSError(5, "Input/output error")
    monkeypatch.setattr(tarfile.TarFile, "next", fail)
    with pytest.raises(OSError, match=f"^{path}: Input/output error$"):
        data.build_index([path])

def test_the_index_holds_every_image_with_a_caption(tmp_path):
    members = [("a.json", b'{"caption": "from json"}'), ("a.webp", b"5"),
               ("b.txt", "grün".encode()), ("b.json", b"{}"), ("b.jpeg", b"6"),
               ("a.webp", b"7"), ("a.txt", b"again")]
    shards = [write_shard(tmp_path / "0.tar", pairs([0, 1]))]
    shards += [write_shard(tmp_path / "1.tar", members)]
    index, warnings = data.build_index(shards, workers=2)
    assert warnings == []
    assert index["shard"].tolist() == [0, 0, 1, 1, 1]
    captions, images = contents(shards, index)
    assert captions == [caption_of(0), caption_of(1), "from json", "grün", "again"]
    assert images == [noise_image(0), noise_image(1), b"5", b"6", b"7"]

def test_a_broken_shard_costs_itself_and_a_warning_if_few_are(tmp_path):
    shards = [write_shard(tmp_path / f"{i}.tar", pairs([i])) for i in range(10)]
    (tmp_path / "3.tar").write_bytes(b"")
    for folder in ("", str(tmp_path), str(tmp_path)):  # scanned, scanned and kept, read
        index, warnings = data.build_index(shards, max_bad=0.1, folder=folder)
        assert len(index) == 9
        assert len(warnings) == 1 and "3.tar: empty" in warnings[0]
        with pytest.raises(ValueError, match="3.tar"):
            data.build_index(shards, max_bad=0.05, folder=folder)

@pytest.mark.parametrize("name, says", [
    ("lonely.png", "1 with no caption, such as lonely.png"),
    ("mute.txt", "1 with no image, such as mute"),
    ("img.v2.png", r"1 with no caption \(a key ends at the first dot .*\), such as img.v2.png")])
def test_samples_without_a_partner_count_as_lost_and_one_is_named(tmp_path, name, says):
    shard = write_shard(tmp_path / "0.tar", [*pairs(range(20)), (name, b"x")])
    index, warnings = data.build_index([shard])
    assert len(index) == 20
    assert len(warnings) == 1 and warnings[0].startswith("1 of 21 samples passed over")
    with pytest.raises(ValueError, match=says):
        data.build_index([shard], max_bad=0.04)

def test_a_second_start_maps_the_kept_index_and_notices_a_shard_that_changed(tmp_path):
    shards = [write_shard(tmp_path / f"{i}.tar", pairs([2 * i, 2 * i + 1])) for i in (0, 1)]
    index, _ = data.build_index(shards, folder=str(tmp_path))

    def captions_now():
        found, _ = data.build_index(shards, folder=str(tmp_path))
        return contents(shards, found)[0], isinstance(found, np.memmap)

    kept = tmp_path / "index.npy"
    np.save(kept, index[1:])  # other than the shards: it is read
    assert captions_now() == ([caption_of(i) for i in (1, 2, 3)], True)
    kept.write_bytes(b"damaged")
    assert captions_now() == ([caption_of(i) for i in (0, 1, 2, 3)], False)
    write_shard(shards[0], pairs([7]))
    assert captions_now() == ([caption_of(i) for i in (7, 2, 3)], False)

def test_an_epoch_shuffles_all_samples_and_yet_reads_its_shards_nearly_one_after_the_other(monkeypatch):
    monkeypatch.setattr(data, "WINDOW", 10)
    index = np.zeros(5000, data.INDEX)
    index["shard"] = np.arange(5000) // 100
    order = data.epoch_order(index, seed=3, epoch=2)
    assert sorted(order.tolist()) == list(range(5000))
    assert (np.diff(order) != 1).mean() > 0.5
    assert (order == data.epoch_order(index, 3, 2)).all()
    assert (order != data.epoch_order(index, 3, 1)).any()
    shards = index["shard"][order].reshape(50, 100)
    middles = shards[:, 10:90]  # the ends mix with their neighbours
    assert (middles == middles[:, :1]).all()
    assert (np.diff(middles[:, 0]) < 0).any()  # and the shards come in any order

@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_images_of_the_known_formats_decode(format):
    with data.open_image(encoded(Image.new("RGB", (30, 20), "red"), format)) as image:
        assert image.size == (30, 20)
        assert data.to_rgb(image).getpixel((10, 10))[0] > 250

@pytest.mark.parametrize("says, raw", [
    ("truncated", encoded(scene(0), "JPEG")[:-300]),
    ("cannot identify", encoded(scene(0), "EPS")),
    ("9000x9000 pixels", encoded(Image.new("1", (9000, 9000)))),
], ids=["cut", "EPS", "bomb"])
def test_what_is_no_whole_picture_of_a_known_format_is_a_value_error(says, raw):
    with pytest.raises(ValueError, match=f"^[^\n]*{says}[^\n]*$") as error, data.open_image(raw) as image:
        image.convert("L")
    assert " at 0x" not in str(error.value)  # no address: causes can be counted

@pytest.mark.parametrize("bug", [TypeError, MemoryError])
def test_a_bug_while_a_picture_is_open_is_not_taken_for_a_damaged_picture(tmp_path, monkeypatch, bug):
    def broken(*_):
        raise bug
    monkeypatch.setattr(data, "random_box", broken)
    with pytest.raises(bug):
        batches(tmp_path)[0]

def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

LARGE = zlib.compress(bytes(3 * 2 ** 20))
@pytest.mark.parametrize("extra", [
    chunk(b"zTXt", b"key\0\0" + LARGE),
    chunk(b"iTXt", b"key\0\1\0\0\0" + LARGE),
    chunk(b"iCCP", b"key\0\0" + LARGE),
    chunk(b"tEXt", b"key\0" + bytes(65 * 2 ** 20)),
    b"".join(chunk(b"zTXt", b"%d\0\0" % i + zlib.compress(bytes(2 ** 20))) for i in range(70)),
], ids=["zTXt", "iTXt", "iCCP", "tEXt", "many"])
@pytest.mark.parametrize("place", [33, -12], ids=["before", "after"])  # the pixels
def test_the_pixels_of_a_png_do_not_depend_on_its_texts_and_profiles(extra, place):
    raw = noise_image()
    raw = raw[:place] + extra + raw[place:]
    with data.open_image(raw) as image:
        pixels = np.asarray(data.to_rgb(image))
    assert pixels.tobytes() == Image.open(io.BytesIO(noise_image())).tobytes()

@pytest.mark.parametrize("dtype, scale", [
    ("uint16", 257), ("int32", 257), ("float32", 257), ("int32", 1)])
def test_greys_of_more_than_8_bits_keep_their_upper_8(dtype, scale):
    grey = np.arange(256).reshape(16, 16)
    image = Image.fromarray((grey * scale).astype(dtype))  # of mode I;16, I or F
    assert (np.asarray(data.to_rgb(image)) == grey[..., None]).all()
    assert (evaluate.resize_and_crop(image, 16).numpy() == grey).all()

@pytest.mark.parametrize("palette", [False, True])
def test_transparent_parts_lie_on_white_in_training(palette):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 4, 8))  # black, its left half transparent
    if palette:
        image = image.quantize(2)
    with data.open_image(encoded(image)) as image:
        pixels = data.crops(image, np.array([[0, 0, 8, 8]]), 8)[0]
    assert pixels[:, :, :3].min() > 250
    assert pixels[:, :, 5:].max() < 5

def test_training_and_show_masks_see_photographs_upright_and_evaluation_does_not(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    raw = encoded(TWO_COLOURS.transpose(Image.Transpose.ROTATE_90), exif=exif)
    (tmp_path / "0.png").write_bytes(raw)
    members = [("0.png", raw), ("0.txt", b"x")]
    seen = batches(tmp_path, members, [[0]], tiny(scale=(1, 1)))[0].images[0]
    assert (seen.permute(1, 2, 0).numpy() == np.asarray(TWO_COLOURS)).all()
    sample = evaluate.Sample(tmp_path / "0.png")
    assert evaluate.read_image(sample, 16, upright=True).equal(seen)
    assert not evaluate.read_image(sample, 16).equal(seen)

def test_random_boxes_have_the_area_and_shape_asked_for_and_a_very_long_picture_gives_its_middle():
    rng = np.random.default_rng(0)
    boxes = np.stack([data.random_box(256, 200, (0.3, 0.7), rng) for _ in range(500)])
    assert boxes.min() == 0
    assert boxes.max(0).tolist()[2:] == [256, 200]
    w, h = (boxes[:, 2:] - boxes[:, :2]).T
    area = w * h / (256 * 200)
    aspect = w / h
    assert [area.min(), area.max()] == pytest.approx([0.3, 0.7], abs=0.02)
    assert [aspect.min(), aspect.max()] == pytest.approx([3 / 4, 4 / 3], abs=0.02)
    assert data.random_box(300, 21, (0.9, 1), rng).tolist() == [136, 0, 164, 21]

def test_a_crop_is_that_part_of_the_picture_as_pillow_resizes_it():
    box = (14, 35, 210, 203)
    pillows = np.asarray(scene(0).crop(box).resize((112, 112), Image.Resampling.BICUBIC), int)
    crop = data.crops(scene(0), np.array([box]), 112)[0].permute(1, 2, 0).numpy()
    assert np.abs(crop - pillows).max() <= 2
    assert (crop == pillows).mean() > 0.8

@pytest.mark.parametrize("size", [(640, 640), (769, 3001)])
def test_a_large_jpeg_is_decoded_no_larger_than_the_crop_needs(size):
    raw = encoded(Image.effect_noise((16, 16), 90).resize(size, Image.Resampling.BICUBIC), "JPEG")
    for seed in range(5):  # parts of the picture: a box of the wrong scale would be another part
        box = data.random_box(*size, (0.3, 0.5), np.random.default_rng(seed))[None]
        with data.open_image(raw) as image:
            crop = data.crops(image, box, 64).double()
            assert image.width <= size[0] / 1.9
        with data.open_image(raw) as image:
            exact = data.crops(image.convert("RGB"), box, 64).double()
        assert (crop - exact).square().mean().sqrt() < 4

def test_ids_are_bytes_then_word_ends_then_merges_then_start_and_end():
    ids = data.Tokenizer("a b\nab c</w>").ids
    assert (ids["!"], ids["a"], ids["a</w>"]) == (0, 64, 320)  # as in CLIP
    assert (ids["ab"], len(ids)) == (512, 514)
    assert (data.BYTES[ord(" ")], data.BYTES[ord("\n")]) == ("Ġ", "Ċ")  # as in GPT-2

@pytest.mark.parametrize("merges, caption, ids", [
    ("l o\no w</w>\nlo w</w>\ne r</w>\nlo w", "Low lower", [517, 514, 516, 515, 518, 0, 0, 0]),
    ("", "abcdefghi", [512, 64, 65, 66, 67, 68, 69, 513]),
    ("", "", [512, 513, 0, 0, 0, 0, 0, 0])])
def test_merges_are_applied_in_their_order_and_a_long_caption_is_cut_before_its_end(merges, caption, ids):
    assert data.Tokenizer(merges, 8).encode([caption]).tolist() == [ids]

@pytest.mark.parametrize("one, other", [
    ("A  Red\n\tDOG ", "a red dog"),
    ("black &amp; white", "black & white"),
    ("&amp;lt;3", "<3"),
    ("it's", "it 's"),
    ("room101", "room 1 0 1"),
    ("what?!no", "what ?! no"),
    ("a_case", "a _ case"),
    ("ÉTÉ", "été"),
    ("cafe\u0301", "caf\u00e9"),
    ("“it’s”", "\"it's\""),
    ("&ldquo;hi&rdquo;", '"hi"'),
    ("ﬁve oﬃces ﬅ", "five offices ſt"),
    ("ŉ", "'n"),
    ("ǆ", "dž"),
    ("ＡＢＣ！\u3000ﾊ", "abc! ハ"),
    ("\ufeffa\u0007 d\x00og\x7f", "a dog"),
    ("it\x92s \x1b[31mred\x1b[0m", "it's red"),
    ("\0", ""),
    ("\ud800", "?"),
    ("&#x110000; &#0;", "\ufffd \ufffd"),
    ("İ", "i̇"),
    ("a" * 9999, "a" * 2000),
], ids=range(22))
def test_captions_that_say_the_same_have_the_same_words(one, other):
    assert data.split_words(one) == data.split_words(other)

def merges_by_loop(captions, num_merges):
    """Byte pair encoding as its paper prints it: count all pairs, join the most frequent, start again."""
    words = []
    for caption in captions:
        for word in data.split_words(caption):
            words.append(" ".join(word) + "</w>")
    merges = []
    while len(merges) < num_merges:
        count = Counter()
        for word in words:
            count.update(pairwise(word.split()))
        best = min(count, key=lambda pair: (-count[pair], pair), default=None)
        if count[best] < 2:
            break
        merges.append(" ".join(best))
        pair = rf"(?<!\S){re.escape(merges[-1])}(?!\S)"
        words = [re.sub(pair, lambda _: "".join(best), word) for word in words]
    return "\n".join(merges)

def test_learned_merges_are_those_of_the_plain_algorithm():
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice([*"aab bnc "], 30)) for _ in range(40)]
    texts += ["aaaaa banana"] * 3
    texts += ["".join(rng.choice([*"日本の"], 30)) for _ in range(10)]  # a script without spaces
    assert data.learn_merges(texts, 80) == merges_by_loop(texts, 80)
    last = texts[-1:]  # of one, fewer than 80 can be learned
    assert data.learn_merges(last, 80) == merges_by_loop(last, 80)

def batches(folder, members=(), order=((3, 0), (1, 2)), config=tiny(), epoch=0, **more):
    """Batches of a shard with these members, or with four pairs."""
    shard = write_shard(folder / "0.tar", members or pairs(range(4)))
    index, _ = data.build_index([shard])
    tokenizer = data.Tokenizer("", 40)
    return data.Batches(config, [shard], index, np.array(order), tokenizer, epoch, **more)

def test_a_batch_holds_its_samples_and_what_does_not_decode_is_black_and_named(tmp_path):
    batch = batches(tmp_path, pairs(range(4), broken=[0]))[0]
    assert batch.images.shape == (2, 3, 16, 16)
    assert batch.images[0].any() and not batch.images[1].any()
    assert batch.tokens.equal(data.Tokenizer("", 40).encode([caption_of(3), caption_of(0)]))
    assert batch.decoded.tolist() == [True, False]
    assert batch.lost == ["cannot identify image file"]
    assert batch.boxes is None and batch.fault == ""

@pytest.mark.parametrize("views", [1, 2])
def test_batches_come_through_workers_as_they_are(tmp_path, views):
    made = batches(tmp_path, pairs(range(4), broken=[0]), config=tiny(views=views))
    loader = torch.utils.data.DataLoader(made, batch_size=None, sampler=range(2), num_workers=1)
    for number, batch in enumerate(loader):
        for field, expected in zip(batch, made[number]):
            assert torch.equal(field, expected) if torch.is_tensor(field) else field == expected

def test_a_sample_has_the_same_crop_in_any_batch_and_another_in_another_epoch(tmp_path):
    first = batches(tmp_path, order=((0, 1, 2),))[0].images
    assert batches(tmp_path, order=((3, 2), (2, 0)))[1].images.equal(first[[2, 0]])
    assert not batches(tmp_path, order=((0, 1, 2),), epoch=1)[0].images.equal(first)

def test_a_disk_that_fails_is_a_fault_and_not_a_lost_sample(tmp_path, monkeypatch):
    made = batches(tmp_path)

    def fail(*_):
        raise OSError(5, "Input/output error")
    monkeypatch.setattr(os, "pread", fail)
    assert made[0].lost == []
    assert made[0].fault == f"{tmp_path}/0.tar: Input/output error"

@pytest.mark.parametrize("kind, text", [
    ("txt", "\ufeffone\n\ntwo\r\nthree\n"),
    ("json", '\ufeff{"caption": ["one", "two", "three"]}')])
def test_of_several_captions_each_epoch_draws_one(tmp_path, kind, text):
    members = [("0.png", noise_image()), (f"0.{kind}", text.encode())]
    drawn = set()
    for epoch in range(30):
        batch = batches(tmp_path, members, [[0]], epoch=epoch)[0]
        drawn.add(str(batch.tokens))
    tokenizer = data.Tokenizer("", 40)
    assert drawn == {str(tokenizer.encode([word])) for word in ("one", "two", "three")}

CHANCES = {"a": 0.999, "of": 0.99, "red": 0.6, "cat": 0.3}

def test_long_captions_lose_the_words_with_the_lowest_noise_minus_chance(tmp_path):
    rng = np.random.default_rng(0)
    words = ["a", "red", "cat", "of", "unseen", "cats", "a", "of"]
    made = batches(tmp_path, config=tiny(text_tokens=9), chances=CHANCES)
    for seed in range(10):
        chosen = [str(word) for word in rng.choice(words, rng.integers(1, 9))]
        noise = np.random.default_rng(seed).random(len(chosen))
        score = [noise[i] - CHANCES.get(word, 1.0) for i, word in enumerate(chosen)]
        kept = list(range(len(chosen)))
        while sum(len(chosen[i]) for i in kept) > 9:  # without merges, a letter is a token
            kept.remove(min(kept, key=lambda i: score[i]))
        assert made.shorten(chosen, np.random.default_rng(seed)) == [chosen[i] for i in kept]
    assert made.shorten(["without-spaces"], rng) == ["without-s"]

def test_a_word_s_chance_to_go_follows_from_its_share():
    chances = data.word_chances(["a cat"] * 6 + ["a dog"] * 4, threshold=0.04)
    expected = {"a": 1 - math.sqrt(0.04 / 0.5), "cat": 1 - math.sqrt(0.04 / 0.3)}
    assert chances == pytest.approx(expected)

def test_words_are_masked_in_the_masked_batches_alone_and_crops_stay_as_they_were(tmp_path):
    whole = batches(tmp_path)
    made = batches(tmp_path, config=tiny(text_tokens=8), chances=CHANCES, num_masked=1)
    assert made[0].tokens.count_nonzero(1).max() <= 10
    assert whole[0].tokens.count_nonzero(1).min() > 10
    assert made[0].images.equal(whole[0].images)
    assert made[1].tokens.equal(whole[1].tokens)

@pytest.mark.parametrize("kind, raw", [
    ("json", b"{}"), ("json", b"3"), ("json", b'{"caption": 3}'), ("json", b"[" * 10**5),
    ("txt", b"\xff"), ("txt", b""), ("txt", b"\0\1")], ids=range(7))
def test_a_sample_whose_caption_is_none_is_lost_and_says_so(tmp_path, kind, raw):
    batch = batches(tmp_path, [("a.png", noise_image()), (f"a.{kind}", raw)], [[0]])[0]
    assert batch.decoded.tolist() == [False]
    assert len(batch.lost) == 1 and "caption" in batch.lost[0]
    assert batch.fault == ""

def pack(folder, text, fails=""):
    (folder / "list.tsv").write_bytes(text.encode("utf-8", "surrogateescape"))
    command("pack", folder / "list.tsv", folder / "out", module=data, fails=fails)

def test_packed_images_and_captions_come_back_and_captions_of_one_image_are_one_sample(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.x.PNG").write_bytes(noise_image(i))
    pack(tmp_path, "\ufeff0.x.PNG\tü 0\n0.x.PNG\tb\n1.x.PNG\t\ufffd\n2.x.PNG\tc\n\n0.x.PNG\td\n")
    pack(tmp_path, "0.x.PNG\tnew\n", fails="holds shards already")
    shards = [f"{tmp_path}/out/00000.tar"]
    captions, images = contents(shards, data.build_index(shards)[0])
    assert captions == ["ü 0\nb", "\ufffd", "c", "d"]
    assert images == [noise_image(i) for i in (0, 1, 2, 0)]

def test_keys_count_on_from_shard_to_shard(tmp_path):
    assert data.write_shards(tmp_path, [{"txt": b"x"}] * 5, shard_size=2) == 3
    samples, _ = data.tar_samples(f"{tmp_path}/00001.tar")
    assert [key for key, _ in samples] == ["000000002", "000000003"]

@pytest.mark.parametrize("line, says", [
    ("no tab here", "expected"),
    ("0.png\t\udce4", "expected"),
    ("gone.png\tx", "No such file"),
    ("list.tsv\tx", "not one of webp")])
def test_a_bad_line_of_the_list_is_named_by_its_number_before_work_starts(tmp_path, monkeypatch, line, says):
    (tmp_path / "0.png").write_bytes(noise_image())
    monkeypatch.setattr(data, "write_shards", None)
    pack(tmp_path, f"0.png\tfine\n{line}\n0.png\tfine\n", fails=f"list.tsv, line 2: .*{says}")
    assert sorted(os.listdir(tmp_path)) == ["0.png", "list.tsv"]

def full_disk(*_):
    raise OSError(28, "No space left on device")

def test_on_a_full_disk_pack_ends_in_one_line_and_no_file_is_left_half_written(tmp_path, monkeypatch):
    (tmp_path / "0.png").write_bytes(noise_image())
    monkeypatch.setattr(os, "fsync", full_disk)
    pack(tmp_path, "0.png\tfine\n", fails=r"00000.tar: could not be written \(No space")
    with pytest.raises(OSError), data.write_whole(str(tmp_path / "0.png")) as file:
        file.write(b"another")
    assert sorted(os.listdir(tmp_path)) == ["0.png", "list.tsv"]
    assert (tmp_path / "0.png").read_bytes() == noise_image()

def test_an_image_that_goes_away_after_the_check_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "list_lines", lambda path: [(f"{tmp_path}/gone.png", "x")])
    with pytest.raises(ValueError, match=f"^{tmp_path}/gone.png: No such file"):
        data.pack("list.tsv", f"{tmp_path}/out")

@pytest.mark.parametrize("out", [".", "taken", "list.tsv"])
def test_pack_leaves_alone_what_is_there(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes").touch()
    (tmp_path / "list.tsv").touch()
    command("pack", "list.tsv", out, module=data, fails=out)
    assert sorted(os.listdir(tmp_path)) == ["list.tsv", "taken"]

def test_demo_scenes_are_the_same_every_time_and_no_two_alike_and_unseen_pairs_are_not_trained_on():
    train = [data.demo_sample("train", i) for i in range(300)]
    unseen = [data.demo_sample("unseen", i) for i in range(8)]
    seen = [data.demo_sample("seen", i) for i in range(8)]
    assert train[3] == data.demo_sample("train", 3)
    assert len({sample["jpg"] for sample in train + unseen + seen}) == 316
    names = {" ".join(data.PAIRS[int(sample["cls"])]) for sample in unseen}
    assert len(names) == 8
    captions = " ".join(sample["txt"].decode() for sample in train)
    assert not any(name in captions for name in names)

@pytest.fixture
def few_scenes(monkeypatch):
    monkeypatch.setattr(data, "SPLITS", {"train": 3, "seen": 2, "unseen": 2, "retrieval": 2})

def test_the_demo_folders_have_the_layout_of_clip_benchmark(tmp_path, few_scenes):
    command("demo", tmp_path / "demo", module=data)
    for split, num_classes in [("seen", 64), ("unseen", 64), ("retrieval", 0)]:
        folder = evaluate.read_folder(f"{tmp_path}/demo/{split}")
        assert (len(folder.samples), len(folder.classnames)) == (2, num_classes)
    assert len(data.build_index([f"{tmp_path}/demo/train/00000.tar"])[0]) == 3

def test_of_two_demos_drawn_at_once_the_first_that_is_whole_stays(tmp_path, few_scenes, monkeypatch):
    demo = f"{tmp_path}/demo"
    draw_split = data.draw_split

    def slowly(split, folder):  # another starts and ends meanwhile
        monkeypatch.setattr(data, "draw_split", draw_split)
        data.make_demo(demo)
        os.remove(f"{demo}/seen/classnames.txt")  # as a mark of it
        draw_split(split, folder)
    monkeypatch.setattr(data, "draw_split", slowly)
    data.make_demo(demo)
    assert os.listdir(tmp_path) == ["demo"]
    assert sorted(os.listdir(demo)) == sorted(data.SPLITS)
    assert not os.path.exists(f"{demo}/seen/classnames.txt")

def test_a_full_disk_while_the_demo_is_drawn_is_named_with_the_file(tmp_path, few_scenes, monkeypatch):
    monkeypatch.setattr(data, "write_shards", lambda folder, *_, **__: os.makedirs(folder) or 1)
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match=r"nshards.txt: could not be written \(No space"):
        data.make_demo(f"{tmp_path}/demo")
    assert os.listdir(tmp_path) == []

# -----------------------------------------------------------------------------
# evaluate.py, on folders of a few small pictures, a model of random weights and its checkpoint.

torch.manual_seed(2)  # a model for which the pictures below are of different classes
SMALL_CLIP = CLIP(tiny(vocab_size=514)).eval(), data.Tokenizer("", 24), tiny(vocab_size=514)

@pytest.mark.parametrize("message, broken", [
    ("nshards.txt: missing", {"shards": ""}),
    ("nshards.txt: says 2, but the folder holds 1 tars", {"shards": "2"}),
    ("'a photo' lacks {c}", {"templates": "a {c}\na photo"}),
    ("000 has no .txt", {"kind": "retrieval"}),
    ("the label of 002.jpg is '2', but classnames.txt has 2 lines", {"classnames": "cat\ndog"}),
    ("line 2 is blank", {"classnames": "cat\n\ndog"}),
    ("expected retrieval or", {"kind": "captions"})])
def test_a_broken_folder_is_named_with_what_is_wrong(tmp_path, message, broken):
    folder = make_folder(tmp_path / "f", labelled(3), **broken)
    with pytest.raises(ValueError, match=f"^{folder}[^\n]*{re.escape(message)}"):
        evaluate.read_folder(folder)

def test_a_tar_that_nshards_txt_does_not_count_is_named_not_left_out(tmp_path):
    folder = make_folder(tmp_path / "f", labelled(3))
    write_shard(f"{folder}/test/1.tar", pairs([0]))
    with pytest.raises(ValueError, match="/test/nshards.txt: says 1, but the folder holds 2 tars"):
        evaluate.read_folder(folder)

def test_evaluation_reads_equal_keys_bytes_order_marks_and_u_fffd_and_passes_over_hidden_files(tmp_path):
    folder = make_folder(tmp_path / "f", [], shards="\ufeff1", kind="\ufeffretrieval")
    hidden = ("._1.png", b"")
    marked = [("9.png", b""), ("9.txt", "\ufeffwhat\ufffd".encode())]
    members = [*pairs([0, 1]), hidden, *marked, *pairs([0])]
    write_shard(f"{folder}/test/0.tar", members)
    found = evaluate.read_folder(folder)
    names = [sample.name for sample in found.samples]
    assert names == ["0000.png", "0001.png", "9.png", "0000.png"]
    assert found.targets[2:] == [["what\ufffd"], [caption_of(0)]]

@pytest.mark.parametrize("mode", ["RGB", "CMYK", "P"])
def test_preprocess_resizes_crops_and_then_converts_with_clip_s_mean_and_deviation(mode):
    image = Image.open(io.BytesIO(noise_image(0, (37, 23)))).convert(mode)
    middle = image.resize((25, 16), Image.BICUBIC)                      # 16 * 37 / 23 = 25.7
    middle = middle.crop((4, 0, 20, 16)).convert("RGB")
    mean = np.float32([0.48145466, 0.4578275, 0.40821073])
    std = np.float32([0.26862954, 0.26130258, 0.27577711])
    expected = (np.asarray(middle).astype(np.float32) / np.float32(255) - mean) / std
    seen = evaluate.preprocess(image, 16).permute(1, 2, 0)
    assert np.array_equal(seen.numpy(), expected)

@pytest.mark.parametrize("size", [(40_000, 1), (1, 40_000)])
def test_of_a_very_long_picture_only_the_middle_is_resized(size):
    ramp = (np.arange(40_000) - 19_900).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(ramp.reshape(size[::-1]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seen = evaluate.resize_and_crop(image, 224)
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert more < 100_000                                               # kB; the whole takes 8 GB
    assert seen.shape == (3, 224, 224)
    assert abs(seen.float().mean() - 99.5) < 2                          # pixel 20,000

@torch.no_grad()
def test_an_image_goes_to_the_nearest_mean_sentence_and_an_empty_class_has_no_recall(tmp_path):
    model, tokenizer, config = SMALL_CLIP
    names = ["cat", "dog", "fox", "owl"]
    classes = []
    for name in names:
        sentences = model.encode_text(tokenizer.encode([f"a {name}", f"the {name}."]))
        classes.append(F.normalize(sentences, dim=-1).mean(0))
    hits = []
    for number, sample in enumerate(labelled(20)):
        pixels = evaluate.preprocess(Image.open(io.BytesIO(sample["jpg"])), 16)
        image = model.encode_image(pixels[None])
        scores = F.cosine_similarity(image, torch.stack(classes))
        hits.append(scores.argmax() == number % 3)
    recall = np.mean([np.mean(hits[label::3]) for label in range(3)])
    folder = make_folder(tmp_path / "f", labelled(20), classnames="\n".join(names))
    metrics = evaluate.evaluate(model, tokenizer, config, folder)
    expected = {"acc1": np.mean(hits), "acc5": 1, "mean_per_class_recall": recall}
    assert metrics == pytest.approx(expected)

def test_retrieval_finds_an_image_if_fewer_than_k_are_nearer_and_a_caption_if_any_of_its_own_is_found():
    owner = torch.arange(30).repeat_interleave(torch.arange(30) % 7 + 1)
    images = F.normalize(torch.randn(30, 8, generator=seeded()), dim=-1)
    noise = torch.randn(len(owner), 8, generator=seeded(1))
    texts = F.normalize(images[owner] + noise, dim=-1)
    scores = images @ texts.T                                           # (30, captions)
    of_owner = scores[owner, range(len(owner))]
    own = owner == torch.arange(30)[:, None]
    best_own = scores.where(own, -1).amax(1, keepdim=True)
    nearer_images = (scores > of_owner).sum(0)
    nearer_texts = (scores > best_own).sum(1)
    expected = {}
    for k in (1, 5, 10):
        expected[f"image_retrieval_recall@{k}"] = np.mean(nearer_images.numpy() < k)
        expected[f"text_retrieval_recall@{k}"] = np.mean(nearer_texts.numpy() < k)
    assert evaluate.retrieval_metrics(images, texts, owner) == pytest.approx(expected)

def test_two_ranks_give_the_metrics_of_one_and_fail_together(two_ranks):
    expected = evaluate.evaluate(*SMALL_CLIP, f"{two_ranks}/retrieval")
    for rank in (0, 1):
        assert torch.load(two_ranks / f"rank_{rank}.pt")[1] == pytest.approx(expected)

def test_logistic_regression_in_pieces_ends_where_the_gradient_of_the_whole_is_zero():
    x = torch.randn(9000, 4, generator=seeded())                        # three pieces
    y = torch.arange(9000) % 3
    weights = evaluate.fit_logistic(x, y, 3, C=2e-3, average=x[0]).requires_grad_()
    logits = (x.double() - x[0]) @ weights[:, :4].T + weights[:, 4]
    penalty = weights[:, :4].square().sum() / 2
    loss = 2e-3 * F.cross_entropy(logits, y, reduction="sum") + penalty # scikit-learn's objective
    assert torch.autograd.grad(loss, weights)[0].abs().max() < 1e-4

def test_a_linear_probe_learns_what_is_linear():
    features = F.normalize(torch.randn(300, 6, generator=seeded()), dim=-1)
    labels = features[:, :3].argmax(1)
    train, test = features.split(200)
    accuracy, _, _ = evaluate.linear_probe(train, labels[:200], test, labels[200:], 3)
    assert accuracy > 0.9

@torch.no_grad()
def test_sugarcrepe_counts_the_images_that_are_nearer_to_their_caption(tmp_path):
    model, tokenizer, config = SMALL_CLIP
    (tmp_path / "a.jpg").write_bytes(noise_image())
    image = model.encode_image(evaluate.preprocess(Image.open(tmp_path / "a.jpg"), 16)[None])
    texts = ["a red cat", "two blue dogs in a field"]
    scores = F.cosine_similarity(model.encode_text(tokenizer.encode(texts)), image)
    near, far = texts[scores.argmax()], texts[scores.argmin()]
    right = {"filename": "a.jpg", "caption": near, "negative_caption": far}
    wrong = {"filename": "a.jpg", "caption": far, "negative_caption": near}
    for kind in evaluate.SUGARCREPE:
        questions = {"0": right, "3": right if kind == "replace_obj" else wrong}
        (tmp_path / f"{kind}.json").write_text("\ufeff" + json.dumps(questions), encoding="utf-8")
    results = evaluate.sugarcrepe(model, tokenizer, config, str(tmp_path), str(tmp_path))
    assert results["sugar_crepe/replace_obj"]["acc"] == 1
    assert results["sugar_crepe/add"]["acc"] == 0.5
    assert results["sugar_crepe/replace"]["acc"] == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert len(results) == 10

def test_features_that_are_not_finite_are_an_error_not_a_score():
    features = [torch.full((3, 16), math.nan)]
    with pytest.raises(ValueError, match="not finite"):
        evaluate.collect(SMALL_CLIP[0], features, 3, 0, 1)

def test_removed_patches_are_grey_and_slots_that_are_not_valid_hold_removed_ones():
    images = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    keep = torch.tensor([[3, 0], [1, 2]])                               # of a batch, of which we show one
    seen = evaluate.hide_removed(images, keep, torch.tensor([[True, False], [True, True]]), 2)
    expected = torch.full((4, 4), 128)
    expected[2:, 2:] = 0
    assert seen[0, 0].equal(expected.byte())

def test_of_paths_as_many_last_parts_are_shown_as_tell_them_apart():
    assert evaluate.tell_apart(["x/val/", "y/test", "y/test"]) == {"x/val/": "val", "y/test": "test"}
    assert evaluate.tell_apart(["a/x/val", "b/x/val"]) == {"a/x/val": "a/x/val", "b/x/val": "b/x/val"}
    results = {"a/val": {"acc1": 0.5, "acc5": 1.0}, "b/val": {"acc1": 0.25}, "c/val": {"failed": "why"}}
    assert evaluate.first_metrics(results) == {"a/val acc1": 0.5, "b/val acc1": 0.25}

def write_log(path, slope):
    """A run of 100 steps and two evaluations, whose log got a damaged end."""
    lines = [{"step": i, "epoch": 1 + i // 50, "loss": 5 - slope * i / 50} for i in range(1, 101)]
    for epoch in (1, 2):
        results = {"pets": {"acc1": slope * epoch / 4}}
        lines.append({"step": 50 * epoch, "epoch": epoch, "loss": 1, "eval": results})
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(map(json.dumps, lines)) + "\nbroken\n\0")

def test_curves_show_losses_and_metrics_of_several_runs_and_drop_damaged_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_log(tmp_path / "a" / "run" / "log.jsonl", 1.0)
    write_log(tmp_path / "b" / "run" / "log.jsonl", 0.5)
    command("--curves", "a/run/log.jsonl", "b/run/log.jsonl", module=evaluate)
    printed = capsys.readouterr().out
    assert "| a/run |     50.00 |" in printed
    assert "a/run/log.jsonl: 2 damaged lines dropped" in printed
    pixels = np.asarray(Image.open("curves.png")).astype(int)
    for left in (51, 471):                                              # coloured curves across both panels
        colour = np.ptp(pixels[41:290, left:left + 349], axis=-1)
        assert (colour > 120).any(0).mean() > 0.9
    (tmp_path / "empty.jsonl").write_text("\0\0")
    command("--curves", "empty.jsonl", module=evaluate, fails="empty.jsonl: no training step in it")

def safetensors(tensors, **types):
    """As the format's page says: the header's length in 8 bytes, the header in json, the raw tensors.
    types: those that are not F32, F16 or F64, by name."""
    header = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, x in tensors.items():
        place = [len(body), len(body) + x.nbytes]
        dtype = types.get(name, f"F{8 * x.element_size()}")
        header[name] = {"dtype": dtype, "shape": x.shape, "data_offsets": place}
        body += bytes(x.reshape(-1).view(torch.uint8).tolist())
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body

def test_safetensors_of_every_type_are_read_and_one_that_is_not_is_named(tmp_path):
    x = torch.tensor([-1.5, 0.0, 448.0])
    tensors = {"a": x.to(torch.float8_e4m3fn), "b": x > 0, "c": x.to(torch.bfloat16), "d": x.int(),
               "empty": torch.zeros(0, 3), "one": torch.tensor(2.5), "e": x.to(torch.float8_e5m2)}
    types = {"a": "F8_E4M3", "b": "BOOL", "c": "BF16", "d": "I32", "e": "F8_E5M2"}
    (tmp_path / "a.safetensors").write_bytes(safetensors(tensors, **types))
    read = evaluate.read_checkpoint(f"{tmp_path}/a.safetensors")
    for name, expected in tensors.items():
        assert read[name].dtype == expected.dtype
        assert read[name].float().equal(expected.float())
    (tmp_path / "b.safetensors").write_bytes(safetensors({"w": x}, w="F4"))
    with pytest.raises(ValueError, match=r"b.safetensors: [^\n]*w is of type F4, which is not read"):
        evaluate.read_checkpoint(f"{tmp_path}/b.safetensors")

def write_vocabulary(path):
    """A vocabulary as large as CLIP's, of which it takes 48,894 merges; its path."""
    merges = [f"{chr(256 + i // 250)} {chr(256 + i % 250)}" for i in range(50_000)]
    path.write_bytes(gzip.compress("\n".join(["#version", *merges]).encode()))
    return str(path)

@pytest.mark.parametrize("name", ["a.safetensors", "open_clip.pt", "openai.pt"])
def test_published_weights_are_read_with_clip_s_vocabulary_and_tell_their_size(tmp_path, capsys, name):
    config = Config(model=(128, 2, 64, 1, 32), image_size=48, context_length=9)
    state = CLIP(config).state_dict()
    if name == "a.safetensors":
        half = {key: x.half() if x.ndim > 1 else x for key, x in state.items()}
        (tmp_path / name).write_bytes(safetensors(half))
    elif name == "open_clip.pt":
        wrapped = {f"module._orig_mod.{key}": x for key, x in state.items()}
        torch.save({"state_dict": wrapped, "lr": np.float64(3), "n": np.int64(7)}, tmp_path / name)
    else:
        sizes = dict.fromkeys(["input_resolution", "context_length", "vocab_size"], torch.tensor(0))
        torch.save(state | sizes, tmp_path / name)
    path = str(tmp_path / name)
    with pytest.raises(ValueError, match="--vocab bpe_simple_vocab_16e6.txt.gz"):
        evaluate.load(path)
    assert ("OpenAI trained need --quick-gelu" in capsys.readouterr().err) == (name != "openai.pt")
    model, _, found = evaluate.load(path, write_vocabulary(tmp_path / "vocab.gz"))
    config.quick_gelu = name == "openai.pt"
    assert found == config
    for key, x in model.state_dict().items():
        assert x.allclose(state[key], 0, 1e-3)

def test_a_checkpoint_of_a_model_without_a_name_is_read_again(tmp_path):
    config = tiny(model=[128, 2, 64, 2, 16], vocab_size=514)
    checkpoint = {"model": SMALL_CLIP[0].state_dict(), "config": vars(config) | {"model": clip_pgs.SIZES["tiny"]}, "merges": ""}
    torch.save(checkpoint, tmp_path / "a.pt")
    assert evaluate.load(tmp_path / "a.pt")[2] == config

class Evil:
    def __reduce__(self):  # a pickle of it makes a folder when it is loaded
        return os.mkdir, ("pwned",)

@pytest.mark.parametrize("name, says, content", [
    ("a.pt", "empty file", b""), ("a.pt", "damaged", b"PK\3\4" * 99),
    ("a.pt", "compressed", gzip.compress(b"x")), ("a.pt", "git lfs pull", LFS),
    ("a.pt", "could run code", pickle.dumps(Evil(), 2)), ("a.pt", "could run code", {"model": Evil()}),
    ("a.pt", "it holds a list", [1, 2]), ("a.pt", "not a CLIP", {"n": 1}),
    ("a.safetensors", "damaged", b"{}" * 9), (".", "Is a directory", None),
    ("model.safetensors.index.json", "weights in several files", b"{}"),
    ("model-00001-of-00002.safetensors", "weights in several files", safetensors({}))], ids=range(12))
def test_what_is_no_file_of_weights_is_called_what_it_is(tmp_path, monkeypatch, name, says, content):
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content:
        torch.save(content, name)
    with pytest.raises(ValueError, match=rf"^{name}: [^\n]*{says}[^\n]*$"):
        evaluate.load(name)
    assert not (tmp_path / "pwned").exists()

@pytest.fixture
def evaluation(tmp_path):
    """evaluation(options): evaluate.py on a checkpoint of SMALL_CLIP, what it writes to x.json."""
    model, _, config = SMALL_CLIP
    checkpoint = {"model": model.state_dict(), "config": vars(config) | {"model": clip_pgs.SIZES["tiny"]}, "merges": ""}
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    path = tmp_path / "x.json"

    def run(*options, fails=""):
        command(tmp_path / "ckpt.pt", "--json", path, *options, module=evaluate, fails=fails)
        return {} if fails else json.loads(path.read_text())
    return run

def test_the_command_makes_a_table_with_an_average_json_and_pictures(evaluation, tmp_path, capsys):
    folders = [make_folder(tmp_path / name / "val", labelled(4)) for name in ("a", "b")]
    results = evaluation("--data", *folders, "--pictures", tmp_path / "pictures")
    assert list(results) == folders
    assert list(results[folders[0]]) == ["acc1", "acc5", "mean_per_class_recall"]
    average = 50 * sum(metrics["acc1"] for metrics in results.values())
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"{folders[0]} | acc1: ")
    assert printed[-1].split()[1:4] == ["average", "|", f"{average:.2f}"]
    assert sorted(os.listdir(tmp_path / "pictures")) == ["a_val.png", "b_val.png"]

def test_a_folder_that_fails_is_a_row_the_others_go_on_and_the_exit_status_is_1(evaluation, tmp_path, capsys):
    bad = make_folder(tmp_path / "bad", [{"jpg": b"no picture", "cls": b"0"}])
    good = make_folder(tmp_path / "good", labelled(3))
    with pytest.raises(SystemExit) as stop:
        evaluation("--data", bad, good)
    assert stop.value.code == 1
    results = json.loads((tmp_path / "x.json").read_text())
    assert "000.jpg does not decode" in results[bad]["failed"]
    assert "acc1" in results[good]
    assert f"{bad} | failed: {bad}/test/0.tar: " in capsys.readouterr().out

@pytest.mark.parametrize("more, says", [
    ("--probe", "no_train/train/nshards.txt: missing"),
    ("--json gone/x.json", "gone/x.json: could not be written .No such file"),
    ("--pictures ckpt.pt", "ckpt.pt: File exists"),
    ("--sugarcrepe . --images .", "replace_obj.json: No such file"),
    ("--sugarcrepe questions --images .", "gone.jpg: No such file")])
def test_what_is_missing_is_refused_before_the_first_folder(
        evaluation, tmp_path, monkeypatch, capsys, more, says):
    monkeypatch.chdir(tmp_path)
    folder = make_folder(tmp_path / "no_train", labelled(3))
    os.mkdir("questions")
    question = {"filename": "gone.jpg", "caption": "a", "negative_caption": "b"}
    for kind in evaluate.SUGARCREPE:
        (tmp_path / "questions" / f"{kind}.json").write_text(json.dumps({"0": question}))
    evaluation("--data", folder, "--pictures", "mistakes", *more.split(), fails=says)
    assert capsys.readouterr().out == "" and not os.path.exists("mistakes/no_train.png")

def test_on_a_full_disk_the_file_that_could_not_be_written_is_named(evaluation, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda *_: exec('raise OSError(28, "No space left on device")'))
    folder = make_folder(tmp_path / "f", labelled(3))
    evaluation("--data", folder, fails=r"x.json: could not be written \(No space")
    with pytest.raises(OSError, match="a.png: could not be written"):
        evaluate.sheet(f"{tmp_path}/a.png", [(torch.zeros(3, 8, 8).byte(), "")], 1)

def test_once_a_stop_is_requested_no_other_folder_is_begun(tmp_path):
    folder = make_folder(tmp_path / "f", labelled(3))
    requests = []
    assert len(evaluate.evaluate_all(*SMALL_CLIP, [folder], requests=requests)) == 1
    requests.append(signal.SIGTERM)
    assert evaluate.evaluate_all(*SMALL_CLIP, [folder], requests=requests) == {}

def test_under_torchrun_the_first_process_works_and_says_that_one_is_enough(
        evaluation, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    folder = make_folder(tmp_path / "f", labelled(3))
    assert "acc1" in evaluation("--data", folder)[folder]
    assert "call python evaluate.py" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    evaluation("--data", folder)
    assert capsys.readouterr() == ("", "")

def test_evaluation_works_with_its_output_closed(evaluation, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    folder = make_folder(tmp_path / "f", labelled(3))
    assert "acc1" in evaluation("--data", folder)[folder]

def test_evaluation_needs_neither_fcntl_nor_pread(tmp_path):
    model, _, config = SMALL_CLIP
    checkpoint = {"model": model.state_dict(), "config": vars(config) | {"model": clip_pgs.SIZES["tiny"]}, "merges": ""}
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    folder = make_folder(tmp_path / "f", labelled(3))
    program = "import os, sys; sys.modules['fcntl'] = None; del os.pread; import evaluate; evaluate.main()"
    arguments = [sys.executable, "-c", program, str(tmp_path / "ckpt.pt"), "--data", folder]
    run = subprocess.run(arguments, cwd=HERE, capture_output=True, text=True)
    assert run.returncode == 0 and "acc1" in run.stdout, run.stderr
