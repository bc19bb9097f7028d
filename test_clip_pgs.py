"""The promises of this project, one behaviour a test, in the order of the code.

    pytest -q                        everything: a minute or two on 2 CPU cores, no GPU, no network, no data
    pytest -q -k "mask or sinkhorn"  a part of it

Expected values come from elsewhere: a loop, a closed form, float64, finite differences, a drawn picture.
"""
import copy
import fcntl
import gzip
import io
import json
import math
import os
import pickle
import random
import re
import resource
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import fields
from itertools import pairwise

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU computes in bf16: nothing would be exactly equal

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

# -----------------------------------------------------------------------------
# What the tests are made of: a tiny model, numbers, pictures, shards.

def tiny(**changes):
    """A Config whose images have 4 x 4 patches of 4 x 4 pixels."""
    size = dict(model="128x2-64x2-16", image_size=16, patch_size=4, context_length=24, vocab_size=600)
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

def random_tokens(B, T=24, end=599):
    """(B, T): <start>, between 1 and T - 2 ids, <end>, zeros."""
    rng, tokens = np.random.default_rng(0), torch.zeros(B, T, dtype=torch.int64)
    for row, length in zip(tokens, rng.integers(1, T - 1, B)):
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

def scene(seed, size=224):
    """A sky that fades, a meadow with grain, 20 discs and boxes: as smooth and as rough as photographs."""
    rng, y = np.random.default_rng(seed), np.linspace(0, 1, size)[:, None, None]
    grain = Image.fromarray(rng.normal(0, 1, (size // 8, size // 8)).astype(np.float32))
    grain = np.asarray(grain.resize((size, size), Image.Resampling.BICUBIC))[..., None]
    sky, meadow = (1 - y) * rng.uniform(90, 220, 3) + y * rng.uniform(140, 250, 3), rng.uniform(60, 140, 3)
    pixels = np.where(y < 0.6, sky + 2 * grain, meadow + 25 * grain).clip(0, 255)
    image = Image.fromarray(pixels.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for kind in ("ellipse", "rectangle") * 10:
        x, y, width, height = rng.integers((0, 60, 12, 12), (200, 160, 60, 60)).tolist()
        colour = tuple(rng.integers(0, 256, 3).tolist())
        getattr(draw, kind)((x, y, x + width, y + height), fill=colour)
    return image

def for_model(image):
    """(1, 3, H, W): a PIL image with CLIP's mean and std."""
    pixels = np.asarray(image.convert("RGB"), np.float64) / 255
    return torch.tensor((pixels - data.MEAN) / data.STD).float().permute(2, 0, 1)[None]

def two_colours(size=16, split=6):
    image = Image.new("RGB", (size, size), "black")
    image.paste((255, 200, 0), (split, 0, size, size))
    return image

KINDS = {"noise": noise_images(1), "constant": for_model(Image.new("RGB", (16, 16), (13, 130, 77))),
         "two colours": for_model(two_colours()), "drawn": for_model(picture(16))}
each_mask = pytest.mark.parametrize("mask", MASKS)

def masked(name, images, ratio, seed=0, **options):
    """make_mask on patches of 4 x 4 pixels; attentive sees a random attention."""
    L = images.shape[2] // 4 * (images.shape[3] // 4)
    attention = torch.rand(len(images), L, generator=seeded(seed + 1))
    return make_mask(name, images, ratio, seeded(seed), **dict(patch_size=4, attention=attention) | options)

WORDS = "red green blue small large old new round square striped plain dotted".split()

def encoded(image, format="PNG", **options):
    raw = io.BytesIO()
    image.save(raw, format, **options)
    return raw.getvalue()

def noise_image(seed=0, width=20, height=20, mode="RGB", format="PNG"):
    """The bytes of a picture of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return encoded(Image.fromarray(pixels).convert(mode), format)

def caption_of(i):
    return f"a {WORDS[i % 12]} {WORDS[i * 5 % 12]} thing number {i}"

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
    return [{"jpg": noise_image(number, 40, 32, format="JPEG"), "cls": str(number % 3).encode()}
            for number in range(count)]

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
# Masks: similarity, edges.

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

@pytest.mark.parametrize("images", [*KINDS.values(), noise_images(1, 8, 20)])
def test_edges_equal_sobel_s_filter_by_hand(images):
    assert sobel_edges(images, 4)[0].numpy() == pytest.approx(edges_by_loop(images[0], 4), abs=1e-5)

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

REPEATED = F.normalize(torch.randn(16, 4, generator=seeded()), dim=1)[[0] * 7 + [1] * 3 + [2, 3, 4, 5, 6, 7]]

@pytest.mark.parametrize("S", [patch_similarity(KINDS["drawn"], 4), (REPEATED @ REPEATED.T)[None]])
def test_sinkhorn_equals_the_plain_alternating_one_run_to_convergence(S):
    assert sinkhorn(S).double().allclose(alternating_sinkhorn(S), atol=1e-5, rtol=0)

def test_the_balanced_similarity_ranks_each_row_as_the_log_of_the_transport_plan():
    x = F.normalize(torch.randn(4, 40, 24, generator=seeded(), dtype=torch.float64), dim=-1)
    S = (x @ x.mT).float()
    log_plan = alternating_sinkhorn(S, tolerance=1e-11).log()
    assert clip_pgs.balance(S).argsort(-1).equal(log_plan.argsort(-1))
    assert clip_pgs.balance(S).double().allclose(1 + 0.05 * log_plan, atol=5e-5, rtol=0)

# -----------------------------------------------------------------------------
# Masks: which patches go.

@pytest.mark.parametrize("low, high", [(0.5, 0.5), (0.25, 0.75)])
def test_the_highest_scores_go_as_many_as_are_above_one_half_within_the_range(low, high):
    rng, noise = random.Random(0), torch.rand(4, 20, generator=seeded())
    score = torch.tensor([[rng.randint(0, 4) / 4 + b for _ in range(20)] for b in (-0.3, 0, 0.1, 0.4)])
    keep, valid = clip_pgs.remove(score, (low, high), noise)
    for row, scores in enumerate(score.tolist()):
        n = min(max(sum(s > 0.5 for s in scores), round(20 * low)), round(20 * high))
        order = sorted(range(20), key=lambda i: (scores[i], noise[row, i].item()), reverse=True)
        assert keep[row, :20 - n].tolist() == sorted(order[n:])
        assert (20 - round(20 * low) if valid is None else valid[row, :20 - n].sum()) == 20 - n

@pytest.mark.parametrize("mask", MASKS[1:])
@pytest.mark.parametrize("ratio, size, kept", [(0.3, (16, 16), 11), (0.75, (8, 20), 2), (0.99, (4, 12), 1)])
def test_one_ratio_removes_exactly_that_share_of_every_image(mask, ratio, size, kept):
    keep, valid = masked(mask, noise_images(3, *size), (ratio,))
    assert keep.shape == (3, kept) and valid is None

def test_random_keeps_every_patch_equally_often_and_draws_every_number_in_its_range():
    keep, valid = masked("random", noise_images(2000), (0.25, 0.5))
    assert (keep[valid].bincount() / 2000).sub(0.625).abs().max() < 0.06
    assert (valid.sum(1).bincount()[8:] / 2000).sub(1 / 5).abs().max() < 0.05           # 8 to 12 stay

def test_center_keeps_each_cell_as_often_as_a_plain_simulation():
    share = masked("center", noise_images(4000, 24, 24), (0.5,))[0].flatten().bincount(minlength=36) / 4000
    rng, axis, count = np.random.default_rng(0), np.linspace(-1, 1, 6), np.zeros(36)
    density = np.exp(-(axis[:, None] ** 2 + axis ** 2) / 0.4) / (0.4 * np.pi)           # 0.80 in the middle
    for _ in range(4000):
        count[np.argsort(rng.random(36) + density.ravel())[18:]] += 1
    assert share.sub(torch.tensor(count / 4000)).abs().max() < 0.05

def test_attentive_keeps_the_blocks_with_the_highest_attention():
    attention = torch.rand(3, 16, generator=seeded())
    blocks = attention.view(3, 2, 2, 2, 2).mean((2, 4), keepdim=True).expand(3, 2, 2, 2, 2).flatten(1)
    keep, _ = masked("attentive", noise_images(3), (0.5,), attention=attention)
    assert keep.equal(blocks.argsort(1)[:, 8:].sort(1).values)

def test_attentive_with_a_range_removes_blocks_that_get_less_than_an_even_share():
    attention = torch.tensor([[4.0, 4, 1, 1] * 2 + [1] * 8])            # one block of four is above the mean
    keep, valid = masked("attentive", noise_images(1), (0.0, 0.9), attention=attention)
    assert keep[valid].tolist() == [0, 1, 4, 5]

def test_cluster_removes_what_is_most_similar_to_its_anchor():
    images, noise = noise_images(3), torch.rand(3, 17, generator=seeded())
    keep, _ = masked("cluster", images, (0.5,), noise=noise)
    for row, S in enumerate(patch_similarity(images, 4)):               # 3 % of 16 patches: one anchor
        anchor = noise[row, :16].argmax()
        assert keep[row].tolist() == S[anchor].argsort()[:8].sort().values.tolist()

@pytest.fixture(scope="module")
def scenes():
    """What make_mask gets of 12 scenes and a new ViT-B-16."""
    torch.manual_seed(0)
    visual, images = CLIP(Config()).visual, torch.cat([for_model(scene(i)) for i in range(12)])
    return dict(images=images, ratio=(0.5,), noise=torch.rand(12, 197, generator=seeded()), alpha=0.5,
                embeddings=visual.patch_tokens(images).detach(),
                attention=clip_pgs.class_attention(visual, images)[0])

@pytest.mark.parametrize("transport", [True, False])
def test_pgs_removes_what_is_most_similar_to_a_candidate(scenes, transport):
    images, noise = scenes["images"][:3], scenes["noise"][:3]
    keep, _ = make_mask("pgs", images, (0.5,), noise=noise, transport=transport)
    S = patch_similarity(images).double()
    score = 1 + 0.05 * alternating_sinkhorn(S, tolerance=1e-7).log() if transport else S
    for row in range(3):                                                # 5 % of 196 patches: ten candidates
        candidates = np.argsort(edges_by_loop(images[row], 16) - noise[row, :196].numpy())[:10]
        removed = score[row, candidates].amax(0) + 1e-5 * noise[row, :196]
        assert keep[row].tolist() == removed.argsort()[:98].sort().values.tolist()

@pytest.mark.parametrize("mask", ["cluster", "pgs"])
def test_with_a_range_pixels_alone_decide_how_many_go_and_embeddings_which(scenes, mask):
    alike = 1 + 0.5 * torch.randn(12, 196, 8, generator=seeded())       # embeddings that are all similar
    plain, mixed = (make_mask(mask, **scenes | dict(ratio=(0.1, 0.9), embeddings=alike, alpha=alpha))
                    for alpha in (0, 0.8))
    assert mixed[1].equal(plain[1]) and len(plain[1].sum(1).unique()) > 1 and not mixed[0].equal(plain[0])

def patches_changed(keep, other):
    """How many of the 98 patches that one mask keeps the other removes, mean over the images."""
    return np.mean([len({*ours} - {*theirs}) for ours, theirs in zip(keep.tolist(), other.tolist())])

@pytest.mark.parametrize("mask, switch, least", [
    ("pgs", dict(edges=False), 12), ("pgs", dict(transport=False), 2.5), ("pgs", dict(embeddings=None), 2.5),
    ("cluster", dict(embeddings=None), 2.5)])
def test_every_switch_changes_the_mask_of_a_picture(scenes, mask, switch, least):
    assert least < patches_changed(make_mask(mask, **scenes)[0], make_mask(mask, **scenes | switch)[0]) < 50

def test_blocks_change_the_mask_of_a_picture(scenes):
    single = scenes["attention"].argsort(1, descending=True)[:, :98]    # what rank alone would keep
    assert patches_changed(make_mask("attentive", **scenes)[0], single) > 10

@each_mask
def test_a_mask_does_not_depend_on_the_other_images_in_the_batch(mask):
    images, noise = torch.cat([*KINDS.values()]), torch.rand(4, 17, generator=seeded())
    embeddings, attention = (torch.rand(4, 16, *size, generator=seeded(1)) for size in ((8,), ()))
    together, *alone = (make_mask(
        mask, images[rows], (0.3, 0.7), patch_size=4, noise=noise[rows], embeddings=embeddings[rows],
        attention=attention[rows], alpha=0.3) for rows in ([0, 1, 2, 3], [0], [1], [2], [3]))
    assert together[0].equal(torch.cat([keep for keep, _ in alone]))
    assert mask == "none" or together[1].equal(torch.cat([valid for _, valid in alone]))

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
    assert keep.equal(clip_pgs.patchify(noise_images(2), 4).mean(-1).argsort(1)[:, :8].sort(1).values)

# -----------------------------------------------------------------------------
# Model and teacher.

def test_vit_b_16_has_as_many_parameters_as_open_clip_s():
    with torch.device("meta"):
        assert sum(p.numel() for p in CLIP(Config()).parameters()) == 149_620_737

def test_parameters_have_open_clip_s_names():
    block = ("ln_1.weight ln_1.bias attn.in_proj_weight attn.in_proj_bias attn.out_proj.weight "
             "attn.out_proj.bias ln_2.weight ln_2.bias mlp.c_fc.weight mlp.c_fc.bias "
             "mlp.c_proj.weight mlp.c_proj.bias").split()
    blocks = [f"transformer.resblocks.{i}.{name}" for i in (0, 1) for name in block]
    visual = ("class_embedding positional_embedding proj conv1.weight ln_pre.weight ln_pre.bias "
              "ln_post.weight ln_post.bias").split() + blocks
    text = ("positional_embedding text_projection logit_scale token_embedding.weight ln_final.weight "
            "ln_final.bias").split() + blocks
    assert sorted(CLIP(tiny()).state_dict()) == sorted(text + [f"visual.{name}" for name in visual])

def test_quick_gelu_is_x_times_sigmoid_of_1_702_x():
    x, block = torch.linspace(-4, 4, 9), CLIP(tiny(quick_gelu=True)).visual.transformer.resblocks[0]
    assert block.mlp.gelu(x).allclose(x / (1 + (-1.702 * x).exp()))

def test_a_block_equals_pytorch_s_own_transformer_layer_also_a_causal_one():
    block, x = random_clip(tiny()).visual.transformer.resblocks[0], torch.randn(2, 5, 128, generator=seeded())
    layer = torch.nn.TransformerEncoderLayer(128, 2, 512, 0.0, "gelu", batch_first=True, norm_first=True)
    ln_1, attn, ln_2, mlp = ([*part.parameters()] for part in (block.ln_1, block.attn, block.ln_2, block.mlp))
    for theirs, ours in zip(layer.parameters(), attn + mlp + ln_1 + ln_2):
        theirs.data.copy_(ours)
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

def test_a_caption_s_feature_depends_on_its_tokens_up_to_the_end_and_on_nothing_after_it():
    clip = random_clip(tiny())
    clip.encode_text(torch.tensor([[598, 1, 2, 3, 599, 7, 0]])).sum().backward()
    assert clip.token_embedding.weight.grad.any(1).nonzero().flatten().tolist() == [1, 2, 3, 598, 599]

def test_captions_encoded_together_get_the_features_of_each_alone():
    clip, tokens = random_clip(tiny()), random_tokens(20)
    alone = torch.cat([clip.encode_text(row[None]) for row in tokens])
    assert clip.encode_text(tokens).allclose(alone, atol=1e-5)

def test_gradient_checkpointing_gives_the_same_bits():
    assert one_step(tiny(**RANGE, grad_checkpointing=True)).equal(one_step(tiny(**RANGE)))

def class_attention_by_brute_force(visual, images):
    """Full softmax maps of every layer and head in float64; of those the class token's row."""
    visual, rows = copy.deepcopy(visual).double(), []
    x = visual.embed(images.double())
    for block in visual.transformer.resblocks:
        qkv = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)
        for q, k in ((qkv[..., i:i + 64], qkv[..., 128 + i:192 + i]) for i in (0, 64)):
            rows.append((q @ k.mT / 8).softmax(2)[:, 0, 1:])
        x = block(x)
    return torch.stack(rows).mean(0)

def test_class_attention_is_the_class_token_s_row_of_all_attention_maps():
    clip, images = random_clip(tiny()), noise_images(3)
    attention, token = clip_pgs.class_attention(clip.visual, images)
    assert attention.double().allclose(class_attention_by_brute_force(clip.visual, images), atol=1e-6)
    assert (token @ clip.visual.proj).allclose(clip.encode_image(images), atol=1e-5)

def test_class_attention_at_half_the_size_is_stretched_over_all_patches():
    visual, images = random_clip(tiny()).visual, noise_images(3)
    half = F.interpolate(images, (8, 8), mode="bilinear", antialias=True)
    expected = class_attention_by_brute_force(visual, half).view(3, 1, 2, 2)
    expected = F.interpolate(expected, (4, 4), mode="bilinear").flatten(1)
    assert clip_pgs.class_attention(visual, images, size=8)[0].double().allclose(expected, atol=1e-6)

@pytest.mark.parametrize("progress, share", [(0, 0.004), (0.5, 0.002), (1, 0)])
def test_the_ema_takes_a_share_of_the_model_that_falls_to_zero_by_a_cosine(progress, share):
    ema, model = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    expected = [(1 - share) * e + share * m for e, m in zip(ema.parameters(), model.parameters())]
    clip_pgs.update_ema(ema, model, progress)
    assert all(e.allclose(x, atol=1e-7) for e, x in zip(ema.parameters(), expected))

# -----------------------------------------------------------------------------
# Losses.

def features(B=6, E=4):
    return [torch.randn(B, E, dtype=torch.float64, generator=seeded(i), requires_grad=True) for i in (0, 1)]

def loss_by_loop(images, texts, scale):
    """Symmetric cross entropy as two nested loops over pairs."""
    cosine = [[(i @ t / i.norm() / t.norm()).item() * scale for t in texts] for i in images]
    total = 0.0
    for a, row in enumerate(cosine):
        column = [other[a] for other in cosine]
        total += sum(math.log(sum(map(math.exp, logits))) - row[a] for logits in (row, column))
    return total / (2 * len(images))

def test_the_loss_and_its_gradient_equal_a_double_loop_over_the_decoded_pairs():
    (images, texts), decoded = features(), torch.tensor([True, False, True, True, False, True])
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    expected = loss_by_loop(images[decoded], texts[decoded], 9.0)
    assert clip_pgs.clip_loss(images, texts, scale, decoded).item() == pytest.approx(expected, abs=1e-12)
    assert torch.autograd.gradcheck(clip_pgs.clip_loss, (images, texts, scale, decoded))

def test_nt_xent_equals_a_loop_over_both_views():
    a, b = features()
    z, total = [x / x.norm() for x in (*a, *b)], 0.0
    for i in range(12):
        scores = {j: math.exp((z[i] @ z[j]).item() / 0.1) for j in range(12) if j != i}
        total -= math.log(scores[(i + 6) % 12] / sum(scores.values()))
    assert clip_pgs.nt_xent(a, b).item() == pytest.approx(total / 12, abs=1e-12)
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
    made = batches(tmp_path, [("0.png", encoded(image)), ("0.txt", b"coordinates")], order=((0,),), size=32,
                   scale=(0.3, 0.5), views=2, whole=True)
    augmented = made[0][0]
    monkeypatch.setattr(data, "augment", lambda view, rng: view)
    images, boxes, *_ = made[0]
    assert images[2].equal(augmented[2]) and not any(images[i].equal(augmented[i]) for i in (0, 1))
    whole = images[2, 0, :2].double().flatten(1)
    low, high = (pick(whole, dim=1).repeat(2) for pick in (torch.amin, torch.amax))
    for view, box in zip(images[:2, 0, :2].double().flatten(2), boxes[:, 0].double()):
        assert (torch.cat([view.amin(1), view.amax(1)]) - (low + box * (high - low))).abs().max() < 5

def test_only_matrices_decay():
    clip = CLIP(tiny())
    decay, rest = clip_pgs.make_optimizer(tiny(weight_decay=0.2), clip).param_groups
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.2, 0)
    assert {p.ndim for p in decay["params"]} == {2, 4} and {p.ndim for p in rest["params"]} == {0, 1}

def test_the_learning_rate_rises_in_a_line_and_falls_in_a_cosine_to_zero():
    rates = [clip_pgs.learning_rate(step, 110, 2.0, 10) for step in (0, 4, 9, 10, 35, 60, 85, 109, 110)]
    cosine = [1 + math.cos(math.pi * share) for share in (0, 0.25, 0.5, 0.75, 0.99, 1)]
    assert rates == pytest.approx([0.2, 1.0, 2.0, *cosine], abs=1e-12)
    assert [clip_pgs.learning_rate(step, 10, 1.0, 10_000) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]  # a fifth

# -----------------------------------------------------------------------------
# Optimizer, schedule and one step, in one pass or many, on one rank or two.

BOXES = torch.tensor([[0.0, 0.0, 1.0, 0.7], [0.2, 0.1, 1.0, 1.0]])

def one_step(config):
    """(1 + P,) loss and gradients of a step on 8 pairs, one of them not decoded, shared among the ranks."""
    (rank, world_size), V, clip = clip_pgs.ranks(), config.views, random_clip(config)
    heads = clip_pgs.Heads(config) if config.contrast else None
    model = DistributedDataParallel(clip) if world_size > 1 else clip
    images = torch.randint(256, (V + (V > 1), 8, 3, 16, 16), generator=seeded(), dtype=torch.uint8)
    images, boxes = (x.chunk(world_size, dim=1)[rank] for x in (images, BOXES[:V, None].expand(-1, 8, -1)))
    tokens, decoded = (x.chunk(world_size)[rank] for x in (random_tokens(8), torch.arange(8) != 5))
    noise = clip_pgs.step_noise(config, 3, 8, CPU)
    attention, taught = clip_pgs.teach(config, clip.visual, images, boxes)
    keep, valid = clip_pgs.batch_masks(config, clip.visual, attention, images[:V], noise, 0.5)
    loss = clip_pgs.gradients(config, model, heads, images[:V], tokens, keep, valid, decoded, taught)
    if world_size > 1:
        dist.all_reduce(loss)
    parameters = [*clip.parameters(), *(heads.parameters() if heads else ())]
    grads = [p.grad.flatten() for p in parameters if p.requires_grad]
    return torch.cat([loss.reshape(1) / world_size, *grads])

FULL = dict(mask="attentive", views=2, contrast=("simclr", "byol"))     # A-CLIP
RANGE = dict(mask="pgs", ratio=(0.25, 0.75))

@pytest.mark.parametrize("changes", [dict(mask="pgs"), RANGE, FULL], ids=["fixed", "range", "A-CLIP"])
def test_many_small_passes_make_the_gradients_of_one_large_batch(changes):
    whole, parts = (one_step(tiny(accum=accum, **changes)) for accum in (1, 4))
    assert whole[1:].abs().max() > 0.1 and parts.allclose(whole, rtol=0, atol=1e-5)

def work_of_a_rank(rank, folder):
    """What two processes do for the tests below; leaves its results in the folder."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)  # rank 1 reads the index that rank 0 has made
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    steps = [one_step(tiny(accum=accum, **changes)) for changes in (RANGE, FULL) for accum in (1, 2)]
    clip_pgs.train(*clip_pgs.parse(options(folder, "--batch-size", 2, "--accum", 2, "--resume",
                                           f"{folder}/one/epoch_1.pt", "--out", f"{folder}/resumed")), CPU)
    torch.save(steps, f"{folder}/rank_{rank}.pt")
    os._exit(0)  # as main does

@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """A folder with the work of one process (`one`) and of two: gradients, masks, whole training runs."""
    folder = tmp_path_factory.mktemp("two_ranks")
    draw_shards(folder)
    val = make_folder(folder / "val", labelled(7))
    command(*options(folder, "--out", folder / "one", "--keep-epochs", "--val", val))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(work_of_a_rank, (str(folder),), nprocs=2)
    return folder

@pytest.mark.parametrize("number", range(4), ids=["range", "range, accum 2", "A-CLIP", "A-CLIP, accum 2"])
def test_two_ranks_give_the_loss_and_gradients_of_one_with_both_batches(two_ranks, number):
    expected = one_step(tiny(**(RANGE, FULL)[number // 2]))
    for rank in (0, 1):
        assert torch.load(two_ranks / f"rank_{rank}.pt")[number].allclose(expected, rtol=0, atol=1e-5)

def test_a_run_of_one_rank_goes_on_with_two_and_with_its_folders(two_ranks):
    assert losses(two_ranks / "resumed") == pytest.approx(losses(two_ranks / "one")[5:], abs=1e-5)
    one, more = ([r["eval"] for r in read_log(two_ranks / n) if "eval" in r] for n in ("one", "resumed"))
    assert more == one[1:] and one[1][f"{two_ranks}/val"].keys() == {"acc1", "acc5", "mean_per_class_recall"}

def tiny_step(config, device, logit_scale=1.0):
    """train_step on 4 pairs with weights and noise on the device and SGD of rate 1: (numbers, clip)."""
    with torch.device(device):
        clip, noise = random_clip(config), torch.rand(1, 4, 17)
    clip.logit_scale.data.fill_(logit_scale)
    images, boxes = torch.arange(4 * 768).view(1, 4, 3, 16, 16).byte(), torch.zeros(1, 4, 4)
    optimizer, ema = torch.optim.SGD(clip.parameters(), lr=1.0), copy.deepcopy(clip.visual)
    return clip_pgs.train_step(config, clip, optimizer, ema, None, images, boxes, random_tokens(4),
                               torch.ones(4, dtype=torch.bool), noise, 0.5)[0], clip

@each_mask
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

SMALL = "--model 128x2-64x2-16 --image-size 16 --patch-size 4 --batch-size 8 --workers 0".split()

def options(folder, *more):
    """The command line of a tiny run: 5 steps an epoch, 10 in all."""
    return ["--data", f"{folder}/*.tar", *SMALL, *"--context-length 12 --vocab-size 600 --epochs 2".split(),
            *map(str, more)]

def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]

def losses(folder):
    return [record["loss"] for record in read_log(folder) if "eval" not in record]

def without_speed(log):
    return [{k: v for k, v in record.items() if k != "images_per_s"} for record in log]

def command(*arguments):
    """`python clip_pgs.py arguments`, in this process, which keeps its command line and its signals."""
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["clip_pgs.py", *map(str, arguments)])
        fault = clip_pgs.main()
    for number, handler in handlers:
        signal.signal(number, handler)
    if fault:
        raise SystemExit(fault)

@pytest.fixture
def train(tmp_path):
    """train(options, out=folder): a tiny run on 40 pairs; returns its log."""
    draw_shards(tmp_path)

    def run(*more, out="out"):
        command(*options(tmp_path, "--out", tmp_path / out, *more))
        return read_log(tmp_path / out)
    return run

def saved_run(folder, out="out"):
    return torch.load(folder / out / "ckpt.pt")

def test_a_run_leaves_a_log_a_checkpoint_and_a_picture_and_says_what_to_do_next(train, tmp_path, capsys):
    log = train()
    assert [(record["step"], record["epoch"]) for record in log] == [(i + 1, i // 5 + 1) for i in range(10)]
    assert log[0].keys() == {"step", "epoch", "loss", "lr", "logit_scale", "images_per_s", "kept"}
    files = ".lock ckpt.pt curves.png index.json index.npy log.jsonl masks.png"
    assert sorted(os.listdir(tmp_path / "out")) == files.split() and saved_run(tmp_path)["step"] == 10
    printed = capsys.readouterr().out
    assert "8 of 16 patches removed" in printed and "python evaluate.py" in printed.splitlines()[-1]

def test_the_same_seed_gives_the_same_losses_to_the_last_digit_with_any_number_of_workers(train):
    first = train("--seed", 1)
    assert without_speed(train("--seed", 1, "--workers", 2, out="again")) == without_speed(first)
    assert without_speed(train("--seed", 2, out="other")) != without_speed(first)

@pytest.mark.parametrize("more", [
    "--mask pgs --text-tokens 4", "--mask attentive --views 2 --contrast simclr byol"])
def test_a_run_goes_on_from_an_epoch_s_end_as_if_it_had_never_stopped(train, tmp_path, more):
    whole = train(*more.split(), "--keep-epochs", "--ratio", 0.3, 0.5)
    command("--resume", tmp_path / "out" / "epoch_1.pt", "--out", tmp_path / "rest")
    assert without_speed(read_log(tmp_path / "rest")) == without_speed(whole)[5:]

def test_training_learns_its_pairs_by_heart(train):
    log = train("--epochs", 20, "--lr", 0.003, "--mask", "none", "--scale", 1, 1)
    assert np.mean([record["loss"] for record in log[-5:]]) < 1         # chance: log(8) = 2.1

def test_the_last_epochs_can_see_whole_images_but_no_more_than_half_of_the_run(train):
    assert [r["kept"] for r in train("--unmasked-epochs", 0.6)] == [0.5] * 7 + [1.0] * 3
    assert [r["kept"] for r in train("--unmasked-epochs", 9, "--steps", 5, out="x")] == [0.5] * 3 + [1.0] * 2

def test_a_loss_that_is_not_finite_stops_the_run_and_no_checkpoint_holds_it(train, tmp_path):
    with pytest.raises(SystemExit, match="^error: step 2: the loss is nan[^\n]*$"):
        train("--lr", 1e30, "--save-every", 1)
    assert saved_run(tmp_path)["step"] == 1

def test_resuming_needs_the_same_images_per_step_and_samples_and_nothing_else(train, tmp_path):
    train("--steps", 3)
    with pytest.raises(SystemExit, match="^error: --resume [^\n]*had 8 images per step[^\n]*now there are 4"):
        train("--steps", 3, "--batch-size", 4, "--resume")
    assert len(train("--steps", 5, "--batch-size", 4, "--accum", 2, "--mask", "attentive", "--resume")) == 5
    write_shard(tmp_path / "1.tar", pairs(range(20, 36)))               # one in ten is gone: another order
    with pytest.raises(SystemExit, match="^error: --resume [^\n]*had 40 samples, now there are 36"):
        train("--steps", 8, "--accum", 1, "--resume")

def test_broken_samples_are_counted_and_too_many_stop_the_run(train, tmp_path, capsys):
    draw_shards(tmp_path, broken=(7, 33))
    train("--epochs", 1)
    printed = capsys.readouterr().out
    assert printed.count("2 of 40 samples skipped") == printed.count("  2  cannot identify image file") == 1
    draw_shards(tmp_path, broken=range(20))
    with pytest.raises(SystemExit, match="20 of 40 samples[^$]*20  cannot identify image[^$]*--max-bad 0.1"):
        train("--epochs", 1, out="worse")
    assert not (tmp_path / "worse" / "ckpt.pt").exists()

def test_a_batch_without_a_pair_is_an_error_and_not_a_step(train, tmp_path):
    draw_shards(tmp_path, broken=range(40))
    with pytest.raises(SystemExit, match="8 of 8 samples skipped[^$]*8  cannot identify image file"):
        train("--max-bad", 1)
    assert not (tmp_path / "out" / "ckpt.pt").exists() and read_log(tmp_path / "out") == []

def test_a_fresh_start_never_overwrites_a_run(train, tmp_path):
    train("--steps", 3, "--mask", "random")
    train("--steps", 1, "--resume", out="other")                        # nothing to go on with: a fresh start
    before = (tmp_path / "out" / "ckpt.pt").read_bytes()
    for more in ((), ("--resume", tmp_path / "other" / "ckpt.pt")):
        with pytest.raises(SystemExit, match=r"holds a run \(mask random, step 3\)[^\n]*--resume[^\n]*--out"):
            train(*more)
    assert (tmp_path / "out" / "ckpt.pt").read_bytes() == before

def test_a_second_process_in_the_same_folder_notices_the_first(train, tmp_path):
    train("--steps", 3)
    with open(tmp_path / "out" / ".lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        second = started(tmp_path, "--out", tmp_path / "out", "--resume")
        _, errors = second.communicate(timeout=60)
    assert second.returncode == 1 and "another process trains there" in errors and "Traceback" not in errors

def test_damaged_lines_of_a_log_are_dropped_with_a_warning(train, tmp_path, capsys):
    train("--epochs", 1)
    with open(tmp_path / "out" / "log.jsonl", "a") as log:
        log.write("\0\0\0\n\n{}\n3\n")
    assert len(train("--resume", "--epochs", 2)) == 10 and "4 damaged lines" in capsys.readouterr().out

def test_a_folder_that_fails_is_named_and_does_not_end_the_training(train, tmp_path, capsys):
    bad = make_folder(tmp_path / "bad", [*labelled(1), dict(jpg=b"no picture", cls=b"1")])
    with pytest.raises(SystemExit) as stop:
        train("--val", bad, make_folder(tmp_path / "good", labelled(3)))
    printed = capsys.readouterr().out
    assert stop.value.code == 1 and len(losses(tmp_path / "out")) == 10
    assert f"| {bad}" in printed and "001.jpg does not decode" in printed and "wrote" in printed

def test_init_starts_from_weights_with_a_new_optimizer_and_another_image_size(train, tmp_path):
    train("--steps", 3)
    train("--init", tmp_path / "out" / "ckpt.pt", "--image-size", 32, "--lr", 0, "--steps", 2, out="fine")
    (old, new), name = (saved_run(tmp_path, out) for out in ("out", "fine")), "visual.positional_embedding"
    assert new["step"] == 2 and new["merges"] == old["merges"]
    grid = old["model"].pop(name)[1:].T.view(1, -1, 4, 4)
    grid = F.interpolate(grid, (8, 8), mode="bicubic", antialias=True)  # as an image
    assert new["model"][name][1:].equal(grid.flatten(2)[0].T)
    assert all(new["model"][name].equal(x) for name, x in old["model"].items() if name != "logit_scale")

def test_bf16_on_a_cpu_is_near_fp32(train):
    fp32, bf16 = train("--precision", "fp32"), train("--precision", "bf16", out="bf16")
    assert 0 < max(abs(a["loss"] - b["loss"]) for a, b in zip(fp32, bf16)) < 0.05

def test_slurm_tasks_without_torchrun_are_told_to_use_it(train, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "8")
    with pytest.raises(SystemExit, match="SLURM_NTASKS[^\n]*torchrun"):
        train()

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
    assert process.returncode == status and errors.endswith(says.format(steps)) and "Traceback" not in errors
    command("--resume", "--out", tmp_path / "out")
    assert steps < 30 and without_speed(read_log(tmp_path / "out")) == without_speed(whole)

def test_a_rank_that_fails_alone_brings_the_run_down_with_its_message(tmp_path):
    draw_shards(tmp_path)
    most = 100_000  # bytes in a file: too few for rank 0's checkpoint after step 3, while rank 1 goes on
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node 2 clip_pgs.py".split()
    command_line = options(tmp_path, "--model", "demo", *LONG, "--out", tmp_path)
    run = subprocess.run([sys.executable, *torchrun, *command_line],
                         preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)),
                         timeout=60, capture_output=True, **ONE_THREAD)
    assert run.returncode == 1 and f"error: {tmp_path}/ckpt.pt: " in run.stderr

@pytest.mark.parametrize("arguments, says", [
    ("--data {}/missing.tar", "missing.tar: no such file"),
    ("--data {}/good.tar --batch-size 9", "9 images per step, but only 8 samples"),
    ("--data {}/good.tar --val {}/nowhere", "nowhere: no such folder"),
    ("--data {}/good.tar --resume {}/good.tar", "good.tar: refused"),
    ("--show-masks {}/good.tar", "good.tar: cannot identify image file")])
def test_bad_input_ends_in_one_clear_line_and_exit_status_1(tmp_path, arguments, says):
    write_shard(tmp_path / "good.tar", pairs(range(8)))
    with pytest.raises(SystemExit, match=rf"^error: [^\n]*{says}[^\n]*$"):
        command(*SMALL, "--out", tmp_path / "out", *arguments.format(*[tmp_path] * 2).split())

def test_masks_are_shown_of_photographs_of_any_mode_also_with_a_trained_encoder(train, tmp_path):
    train("--mask", "attentive", "--steps", 2)
    photos = [tmp_path / "palette.png", tmp_path / "cmyk.jpg"]
    for photo, mode in zip(photos, ("P", "CMYK")):
        picture(50).convert(mode).save(photo)
    for number, more in enumerate((SMALL, ("--resume", tmp_path / "out" / "ckpt.pt"))):
        command("--show-masks", *photos, *more, "--out", tmp_path / f"{number}")
        # Two rows of photograph, edges, attention and five masks, a line of text below each.
        assert Image.open(tmp_path / f"{number}" / "masks.png").size == (8 * 176, 2 * 191)


# data.py: shards, index, order.

def captions_in(shards, index):
    return [data.captions(shards[row["shard"]], row)[0] for row in index]

def images_in(shards, index):
    return [data.read_bytes(shards[row["shard"]], row["image"], row["image_size"]) for row in index]

def test_brace_ranges_keep_their_width_and_multiply_and_a_shard_named_twice_is_read_once(tmp_path):
    every = [f"{tmp_path}/{name}" for name in ("08-1", "08-2", "09-1", "09-2", "10-1", "10-2")]
    for path in every:
        open(path, "w").close()
    assert data.expand([f"{tmp_path}/{{08..10}}-{{1..2}}", f"{tmp_path}/*", every[0]]) == every

@pytest.mark.parametrize("pattern, says", [("*.rat", "the pattern matches no file"), ("{3..1}.tar", "range"), ("", "a folder")])
def test_a_pattern_that_stands_for_nothing_is_refused(tmp_path, pattern, says):
    with pytest.raises(ValueError, match=says):
        data.expand([f"{tmp_path}/{pattern}"])

def test_a_key_ends_at_the_first_dot_and_hidden_files_do_not_count(tmp_path):
    path = write_shard(tmp_path / "0.tar", [("v1.0/7.seg.png", b""), ("v1.0/7.TXT", b""), ("7.txt", b""), ("._7.txt", b"")])
    assert [(key, sorted(files)) for key, files in data.tar_samples(path)[0]] == [("v1.0/7", ["seg.png", "txt"]),
                                                                                  ("7", ["txt"])]

@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_dialect_of_tar_is_read_and_only_its_files(tmp_path, format):
    long = "folder/" * 16 + "x" * 90 + ".txt"
    members = [("1.txt", b"one"), (long, b"two" * 500), ("ümlaut.txt", b""), ("2.txt", b"three")]
    path = write_shard(tmp_path / "0.tar", members, format=format)
    with tarfile.open(path, "a", format=format) as tar:
        for kind in ("SYMTYPE", "LNKTYPE", "CHRTYPE", "FIFOTYPE", "DIRTYPE"):
            member = tarfile.TarInfo(f"{kind}.txt")
            member.type, member.linkname = getattr(tarfile, kind), "/etc/passwd"
            tar.addfile(member)
    assert [(name, data.read_bytes(path, *at)) for name, *at in data.tar_members(path)] == members

def test_member_names_are_never_used_as_paths(tmp_path):
    members = [("../../evil.png", noise_image()), ("../../evil.txt", b"a thing"), ("/etc/pw.png", noise_image()),
               ("/etc/pw.txt", b"x")]
    shards = [write_shard(tmp_path / "0.tar", members)]
    assert captions_in(shards, data.build_index(shards)[0]) == ["a thing", "x"]
    assert os.listdir(tmp_path) == ["0.tar"]

def damaged_tars(folder):
    """{what the message says: a tar of four pairs that is damaged so}"""
    whole = open(write_shard(folder / "whole.tar", pairs(range(4))), "rb").read()
    start = {name: start for name, start, _ in data.tar_members(str(folder / "whole.tar"))}
    header = start["0002.png"] - 512
    sized = whole[:header + 124] + b"-0000001000\0" + whole[header + 136:]
    return {"truncated": whole[:header + 612], "truncated, the tar breaks off": whole[:start["0003.txt"] - 512],
            "empty file, not a tar": b"", "not a tar": b"hello " * 500, "a tar without files": bytes(10240),
            "more than zeros": whole[:header] + b"?" * 512 + whole[header + 512:], "damaged header": sized,
            "two tars in one file": whole + whole, "compressed: unpack it": gzip.compress(whole),
            "git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"}

@pytest.mark.parametrize("says", ["truncated", "truncated, the tar breaks off", "empty file, not a tar", "not a tar",
                                  "a tar without files", "more than zeros", "damaged header", "two tars in one file",
                                  "compressed: unpack it", "git lfs pull"])
def test_a_damaged_tar_is_named_with_its_fault_and_gives_what_stands_before_it(tmp_path, says):
    (tmp_path / "0.tar").write_bytes(damaged_tars(tmp_path)[says])
    samples, fault = data.tar_samples(str(tmp_path / "0.tar"))
    assert fault.startswith(f"{tmp_path}/0.tar: ") and says in fault
    complete = [key for key, files in samples if sorted(files) == ["png", "txt"]]
    assert complete == {"truncated": ["0000", "0001"], "truncated, the tar breaks off": ["0000", "0001", "0002"],
                        "more than zeros": ["0000", "0001"], "damaged header": ["0000", "0001"],
                        "two tars in one file": ["0000", "0001", "0002", "0003"]}.get(says, [])

def test_random_damage_to_a_tar_is_an_error_or_nothing(tmp_path):
    write_shard(tmp_path / "0.tar", [(name, raw[:40]) for name, raw in pairs(range(3))])
    whole, rng = (tmp_path / "0.tar").read_bytes(), random.Random(0)
    for number in range(300):
        raw = bytearray(whole[:rng.randrange(1, 6000)] if number % 3 == 0 else whole)
        for _ in range(30):
            raw[rng.randrange(min(len(raw), 6000))] = rng.choice(b"\0\xff07-x")
        (tmp_path / "1.tar").write_bytes(raw)
        samples, fault = data.tar_samples(str(tmp_path / "1.tar"))
        assert len(samples) < 20 and (not fault or "1.tar: " in fault)

def test_the_index_holds_every_image_with_a_caption(tmp_path):
    members = [("a.json", b'{"caption": "from json", "url": "x"}'), ("a.webp", noise_image(5)),
               ("b.jpeg", noise_image(6)), ("b.txt", "grün".encode()), ("b.json", b"{}")]
    shards = [write_shard(tmp_path / "0.tar", pairs([0, 1])), write_shard(tmp_path / "1.tar", members)]
    index, warnings = data.build_index(shards, workers=2)
    assert warnings == [] and index["shard"].tolist() == [0, 0, 1, 1]
    assert captions_in(shards, index) == [caption_of(0), caption_of(1), "from json", "grün"]
    assert images_in(shards, index) == [noise_image(0), noise_image(1), noise_image(5), noise_image(6)]

def test_keys_that_start_again_are_other_samples_and_members_may_lie_apart(tmp_path):
    apart = [("0.png", b"0"), ("1.png", b"1"), ("1.txt", b"one"), ("0.txt", b"zero")]
    again = [("0.png", b"2"), ("0.txt", b"two"), ("1.txt", b"three")]
    shards = [write_shard(tmp_path / "0.tar", apart + again)]
    index, _ = data.build_index(shards, max_bad=0.5)
    assert (captions_in(shards, index), images_in(shards, index)) == (["zero", "one", "two"], [b"0", b"1", b"2"])

def test_names_that_are_not_utf_8_stay_different(tmp_path):
    shards = [write_shard(tmp_path / "0.tar", [(f"{name}.{kind}", name.encode("utf-8", "surrogateescape"))
                                               for name in ("\udce4", "\udcf6") for kind in ("png", "txt")])]
    assert [key for key, _ in data.tar_samples(shards[0])[0]] == ["\udce4", "\udcf6"]

def test_a_broken_shard_costs_itself_and_a_warning_if_few_are(tmp_path):
    shards = [write_shard(tmp_path / f"{i}.tar", pairs([i])) for i in range(10)]
    (tmp_path / "3.tar").write_bytes(b"")
    for folder in ("", str(tmp_path), str(tmp_path)):                   # scanned, scanned and kept, read
        index, warnings = data.build_index(shards, max_bad=0.1, folder=folder)
        assert len(index) == 9 and len(warnings) == 1 and "3.tar: empty" in warnings[0]
        with pytest.raises(ValueError, match="3.tar"):
            data.build_index(shards, max_bad=0.05, folder=folder)

@pytest.mark.parametrize("name, says", [
    ("lonely.png", "1 with no caption, such as lonely.png"), ("mute.txt", "1 with no image, such as mute"),
    ("img.v2.png", r"1 with no caption \(a key ends at the first dot of the file name\), such as img.v2.png")])
def test_samples_without_a_partner_count_as_lost_and_one_is_named(tmp_path, name, says):
    index, warnings = data.build_index([write_shard(tmp_path / "0.tar", [*pairs(range(20)), (name, noise_image())])])
    assert len(index) == 20 and len(warnings) == 1 and warnings[0].startswith("1 of 21 samples passed over")
    with pytest.raises(ValueError, match=says):
        data.build_index([str(tmp_path / "0.tar")], max_bad=0.04)

def test_images_beside_a_sample_are_not_lost_unless_they_have_a_caption_of_their_own(tmp_path):
    files = [(f"{i}.{kind}", b"x") for i in range(10) for kind in ("png", "txt", "depth.png", "2.png", "2.txt")]
    assert "10 of 20" in data.build_index([write_shard(tmp_path / "0.tar", files)], max_bad=0.5)[1][0]

def test_a_second_start_maps_the_kept_index_and_notices_a_shard_that_changed(tmp_path):
    shards = [write_shard(tmp_path / f"{i}.tar", pairs([2 * i, 2 * i + 1])) for i in (0, 1)]
    data.build_index(shards, folder=str(tmp_path))
    np.save(tmp_path / "index.npy", np.load(tmp_path / "index.npy")[1:])  # now another than the shards would give
    index, _ = data.build_index(shards, folder=str(tmp_path))
    assert isinstance(index, np.memmap) and captions_in(shards, index) == [caption_of(i) for i in (1, 2, 3)]
    write_shard(shards[0], pairs([7]))
    index, _ = data.build_index(shards, folder=str(tmp_path))
    assert captions_in(shards, index) == [caption_of(i) for i in (7, 2, 3)]
    (tmp_path / "index.npy").write_bytes(b"damaged")
    assert (data.build_index(shards, folder=str(tmp_path))[0] == index).all()

def test_a_disk_that_fails_or_a_file_that_ends_early_is_an_os_error_that_names_it(tmp_path, monkeypatch):
    path = write_shard(tmp_path / "0.tar", pairs(range(4)))
    index, _ = data.build_index([path])
    os.truncate(path, 3000)
    with pytest.raises(OSError, match="0.tar: ends before byte"):
        data.read_bytes(path, index[3]["image"], index[3]["image_size"])
    monkeypatch.setattr(os, "pread", lambda *_: exec('raise OSError(5, "Input/output error")'))
    with pytest.raises(OSError, match="0.tar: Input/output error"):
        data.read_bytes(path, 0, 10)

def index_of(num_shards, samples):
    index = np.zeros(num_shards * samples, data.INDEX)
    index["shard"] = np.arange(num_shards).repeat(samples)
    return index

def test_an_epoch_reads_every_sample_once_in_an_order_of_its_own():
    index = index_of(7, 100)
    order = data.epoch_order(index, seed=3, epoch=2)
    assert sorted(order.tolist()) == list(range(700)) and (order == data.epoch_order(index, 3, 2)).all()
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

def test_normalised_images_have_clip_s_mean_and_deviation():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert data.normalize(pixels)[0, 1, 3, 3].item() == pytest.approx((51 / 255 - 0.4578275) / 0.26130258)
    
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_images_of_the_known_formats_decode(format):
    image = data.decode_image(encoded(Image.new("RGB", (30, 20), (200, 30, 30)), format)).convert("RGB")
    assert image.size == (30, 20) and np.abs(np.asarray(image)[10, 10] - np.array((200, 30, 30))).max() < 8

@pytest.mark.parametrize("raw", [b"", b"hello", encoded(picture(64), "JPEG")[:-300], encoded(picture(64), "PNG")[:-100],
                                 encoded(picture(64), "EPS")], ids=["empty", "text", "cut jpeg", "cut png", "eps"])
def test_what_is_no_whole_picture_of_a_known_format_is_a_value_error(raw):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        data.decode_image(raw)
    assert "0x" not in str(error.value)                                 # no memory address: causes can be counted

def test_a_decompression_bomb_is_refused_before_it_is_unpacked():
    with pytest.raises(ValueError, match="9000x9000 pixels"):
        data.decode_image(encoded(Image.new("1", (9000, 9000))))

@pytest.mark.parametrize("mode, dtype, scale", [("I;16", np.uint16, 257), ("I", np.int32, 257), ("F", np.float32, 257),
                                                ("I", np.int32, 1)])
def test_greys_of_more_than_8_bits_keep_their_upper_8(mode, dtype, scale):
    grey = np.arange(256).reshape(16, 16)
    image = Image.fromarray((grey * scale).astype(dtype))
    assert image.mode == mode
    for seen in (data.to_rgb(image), evaluate.resize_and_crop(image, 16).permute(1, 2, 0).numpy()):
        assert (np.asarray(seen) == grey[..., None]).all()

@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparent_parts_lie_on_white_in_training(mode):
    image, options = Image.new("RGBA", (8, 8), (0, 0, 0, 0)), {}
    image.paste((0, 0, 0, 255), (4, 0, 8, 8))                           # black, its left half transparent
    if mode in ("P", "RGB"):                                            # one colour, here red, is transparent
        image = Image.new(mode, (8, 8), (255, 0, 0) if mode == "RGB" else 1)
        image.paste((0, 0, 0) if mode == "RGB" else 0, (4, 0, 8, 8))
        options = dict(transparency=(255, 0, 0) if mode == "RGB" else 1)
        image.putpalette([0, 0, 0, 255, 0, 0]) if mode == "P" else None
    image = data.decode_image(encoded(image if mode in ("P", "RGB") else image.convert(mode), **options))
    pixels = data.crops(image, np.array([[0, 0, 8, 8]]), 8)[0].float()
    assert pixels[:, :, :3].min() > 250 and pixels[:, :, 5:].max() < 5

def sideways(picture, orientation=6):
    """The bytes of a picture stored as its orientation tag undoes it: 6 is a quarter turn clockwise."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)

def test_training_and_show_masks_see_photographs_upright_and_evaluation_does_not(tmp_path):
    upright, raw = two_colours(16, 8), sideways(two_colours(16, 8))
    seen = data.crops(data.upright(data.open_image(raw)), np.array([[0, 0, 16, 16]]), 16)[0]
    assert (seen.permute(1, 2, 0).numpy() == np.asarray(upright)).all()
    (tmp_path / "photo.png").write_bytes(raw)
    assert evaluate.open_photo(str(tmp_path / "photo.png"), 16).equal(seen)
    assert not evaluate.resize_and_crop(data.decode_image(raw), 16).equal(seen)

def test_random_crops_have_the_area_and_shape_that_was_asked_for():
    x, y = np.meshgrid(np.arange(256), np.arange(256))
    image = Image.fromarray(np.stack([x, y, 0 * x], 2).astype(np.uint8))  # a pixel's colour says where it was
    areas = []
    for seed in range(200):
        box = data.random_box(256, 256, (0.3, 0.8), np.random.default_rng(seed))
        crop = data.crops(image, box[None], 32)[0].double()
        w, h = ((crop[c].max() - crop[c].min()).item() * 32 / 31 for c in (0, 1))
        areas.append(w * h / 256 ** 2)
        assert 3 / 4 - 0.05 < w / h < 4 / 3 + 0.05 and crop.shape == (3, 32, 32)
    assert 0.28 < min(areas) < 0.36 and 0.74 < max(areas) < 0.83

def test_the_whole_of_a_square_picture_is_just_resized():
    expected = np.asarray(picture(64).resize((32, 32), Image.Resampling.BICUBIC), np.int64).transpose(2, 0, 1)
    crop = data.crops(picture(64), data.random_box(64, 64, (1, 1), np.random.default_rng(0))[None], 32)[0]
    assert np.abs(crop.numpy() - expected).max() <= 2 and (crop.numpy() == expected).mean() > 0.8

@pytest.mark.parametrize("size", [(1000, 1), (1, 1000), (1, 1), (300, 20)])
def test_a_picture_too_long_for_a_crop_gives_its_middle(size):
    crop = data.crops(Image.new("L", size, 7), data.random_box(*size, (0.9, 1), np.random.default_rng(0))[None], 16)[0]
    assert crop.shape == (3, 16, 16) and crop.eq(7).all()

@pytest.mark.parametrize("size", [(640, 640), (769, 3001)])
def test_a_large_jpeg_is_decoded_no_larger_than_the_crop_needs(size):
    raw = encoded(Image.effect_noise((16, 16), 90).resize(size, Image.Resampling.BICUBIC), "JPEG")
    for seed in range(5):  # parts of the picture: a box of the wrong scale would be another part
        box, part = data.random_box(*size, (0.3, 0.5), np.random.default_rng(seed)), data.open_image(raw)
        crops = [data.crops(image, box[None], 64).double() for image in (part, data.decode_image(raw))]
        assert part.width <= size[0] / 1.9 and (crops[0] - crops[1]).square().mean().sqrt() < 4


# -----------------------------------------------------------------------------
# data.py: words.

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

@pytest.mark.parametrize("one, other", [
    ("A  Red\n\tDOG ", "a red dog"), ("black &amp; white", "black & white"), ("&amp;lt;3", "<3"), ("it's", "it 's"),
    ("room101", "room 1 0 1"), ("what?!no", "what ?! no"), ("ÉTÉ", "été"), ("snake_case", "snake _ case"),
    ("“it’s”", "\"it's\""), ("&ldquo;hi&rdquo;", '"hi"'), ("cafe\u0301", "caf\u00e9"), ("ﬁve oﬃces ﬅ", "five offices ſt"),
    ("ＡＢＣ！\u3000ﾊ", "abc! ハ"), ("\ufeffa\u0007 d\x00og\x7f", "a dog"), ("it\x92s \x1b[31mred\x1b[0m", "it's red"),
    ("ŉ", "'n"), ("ǆ", "dž")])
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
        assert text_of(tokenizer, row[1:row.argmax()].tolist()) == caption
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
    captions += ["".join(rng.choice("日本の") for _ in range(30)) for _ in range(10)]   # a script without spaces
    assert data.learn_merges(captions, 80) == merges_by_loop(captions, 80)

def test_a_vocabulary_file_is_read_as_clip_does(tmp_path):
    with gzip.open(tmp_path / "vocab.txt.gz", "wt", encoding="utf-8") as file:
        file.write("#version: 0.2\na b\n" + "x y\n" * 50_000)           # CLIP takes the first 48,894 merges only
    tokenizer = data.Tokenizer.from_file(str(tmp_path / "vocab.txt.gz"), 8)
    assert tokenizer.ids["ab"] == 512 and (tokenizer.start, tokenizer.end) == (49406, 49407)

VOCAB = gzip.compress("".join(f"word{i} other{i * i}\n" for i in range(500)).encode())

@pytest.mark.parametrize("raw", [b"plain text", VOCAB[:-50], VOCAB[:40] + bytes(20) + VOCAB[60:],
                                 gzip.compress(b"version\nthree words here\n")],
                         ids=["not gzip", "truncated", "damaged", "three words a line"])
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

def batches(folder, members=(), order=((3, 0), (1, 2)), size=16, seed=(0, 0), scale=(0.9, 1.0), **more):
    shard = write_shard(folder / "0.tar", members or pairs(range(4)))
    index, _ = data.build_index([shard])
    return data.Batches([shard], index, np.array(order), data.Tokenizer("", 40), size, scale, seed, **more)

def test_a_batch_holds_the_images_and_captions_of_its_samples(tmp_path):
    images, _, tokens, decoded, lost, fault = batches(tmp_path)[1]
    assert images.shape == (1, 2, 3, 16, 16) and images.dtype == torch.uint8 and decoded.all() and (lost, fault) == ([], "")
    assert tokens.equal(data.Tokenizer("", 40).encode([caption_of(1), caption_of(2)]))

def test_a_sample_has_the_same_crop_in_any_batch_and_another_in_another_epoch(tmp_path):
    first = batches(tmp_path, order=((0, 1, 2),))[0][0]
    assert batches(tmp_path, order=((3, 2), (2, 0)))[1][0].equal(first[:, [2, 0]])
    assert not batches(tmp_path, order=((0, 1, 2),), seed=(0, 1))[0][0].equal(first)

def test_a_sample_that_does_not_decode_is_black_and_counted(tmp_path):
    images, _, _, decoded, lost, _ = batches(tmp_path, pairs(range(4), broken=[0]))[0]
    assert decoded.tolist() == [True, False] and images[0, 1].eq(0).all() and images[0, 0].any()
    assert lost == ["cannot identify image file"]

def test_a_shard_that_shrinks_is_a_fault_and_not_a_lost_sample(tmp_path):
    made = batches(tmp_path)
    os.truncate(tmp_path / "0.tar", 5000)
    *_, lost, fault = made[0]
    assert lost == [] and fault.startswith(f"{tmp_path}/0.tar: ends before byte")

@pytest.mark.parametrize("name, raw", [("txt", "one\n\ntwo\r\nthree\n"), ("json", '\ufeff{"caption": ["one", "two", "three"]}')])
def test_of_several_captions_each_epoch_draws_one(tmp_path, name, raw):
    members = [("0.png", noise_image()), (f"0.{name}", raw.encode())]
    tokenizer, drawn = data.Tokenizer("", 40), []
    for epoch in [*range(30), *range(30)]:
        tokens = batches(tmp_path, members, order=((0,),), seed=(0, epoch))[0][2]
        drawn.append(next(word for word in ("one", "two", "three") if tokens.equal(tokenizer.encode([word]))))
    assert set(drawn) == {"one", "two", "three"} and drawn[:30] == drawn[30:]

CHANCES = {"a": 0.999, "of": 0.99, "red": 0.6, "cat": 0.3}

def test_long_captions_lose_the_words_with_the_lowest_noise_minus_chance(tmp_path):
    rng, words = np.random.default_rng(0), ["a", "red", "cat", "of", "unseen", "cats", "a", "of"]
    made = batches(tmp_path, text_tokens=9, chances=CHANCES, masked=1)
    for seed in range(10):
        chosen = [str(word) for word in rng.choice(words, rng.integers(1, 9))]
        noise = np.random.default_rng(seed).random(len(chosen))
        kept = list(range(len(chosen)))
        while sum(len(chosen[i]) for i in kept) > 9:                    # without merges, a letter is a token
            kept.remove(min(kept, key=lambda i: noise[i] - CHANCES.get(chosen[i], 1.0)))
        assert made.shorten(chosen, np.random.default_rng(seed)) == [chosen[i] for i in kept]

def test_a_word_s_chance_to_go_follows_from_its_share():
    captions = ["a cat"] * 6 + ["a dog"] * 4
    chances = data.word_chances(captions, threshold=0.04)
    assert chances == pytest.approx({"a": 1 - math.sqrt(0.04 / 0.5), "cat": 1 - math.sqrt(0.04 / 0.3)})

def test_words_are_masked_in_the_masked_batches_alone_and_crops_stay_as_they_were(tmp_path):
    whole, made = batches(tmp_path), batches(tmp_path, text_tokens=8, chances=CHANCES, masked=1)
    assert (made[0][2] > 0).sum(1).max() <= 10 < (whole[0][2] > 0).sum(1).min() and made[0][0].equal(whole[0][0])
    assert made[1][2].equal(whole[1][2])

@pytest.mark.parametrize("name, raw", [
    ("a.json", b"{}"), ("a.json", b"[1"), ("a.json", b"3"), ("a.json", b'{"caption": 3}'), ("a.json", b"[" * 100_000),
    ("a.txt", b"\xff\xfe"), ("a.txt", b" \n"), ("a.json", b'{"caption": []}')], ids=range(8))
def test_a_caption_that_is_none_is_a_value_error(tmp_path, name, raw):
    path = write_shard(tmp_path / "0.tar", [(name, raw), ("a.png", noise_image())])
    with pytest.raises(ValueError, match="caption"):
        data.captions(path, data.build_index([path])[0][0])


# -----------------------------------------------------------------------------
# data.py: writing, the demo, pack.

@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_a_file_that_cannot_be_finished_leaves_the_one_before_whole(tmp_path, monkeypatch, broken):
    def write(text):
        with data.write_whole(str(tmp_path / "file")) as file:
            file.write(text)

    write(b"one")
    monkeypatch.setattr(data.os, broken, lambda *_: exec('raise OSError(28, "No space left on device")'))
    with pytest.raises(OSError, match=r"file: could not be written \(No space left[^\n]*$"):
        write(b"two")
    assert (tmp_path / "file").read_bytes() == b"one" and os.listdir(tmp_path) == ["file"]

def test_shards_are_written_in_full_and_their_keys_count_on(tmp_path):
    samples = [{"png": bytes([i]), "txt": b"x"} for i in range(5)]
    assert data.write_shards(str(tmp_path), iter(samples), shard_size=2) == 3
    names = [tarfile.open(tmp_path / f"0000{i}.tar").getnames() for i in range(3)]
    assert names[1] == ["000000002.png", "000000002.txt", "000000003.png", "000000003.txt"] and len(names[2]) == 2

def packed(folder, text, monkeypatch):
    (folder / "list.tsv").write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["data.py", "pack", f"{folder}/list.tsv", f"{folder}/out", "--shard-size", "2"])
    data.main()
    return data.expand([f"{folder}/out/*.tar"])

def test_packed_images_and_captions_come_back_and_captions_of_one_image_are_one_sample(tmp_path, monkeypatch):
    for i in range(3):
        (tmp_path / f"{i}.v2.PNG").write_bytes(noise_image(i))
    lines = "\ufeff0.v2.PNG\tü 0\n0.v2.PNG\tanother 0\n1.v2.PNG\tcaption 1\n2.v2.PNG\tcaption 2\n0.v2.PNG\tagain\n"
    shards = packed(tmp_path, lines, monkeypatch)
    index, _ = data.build_index(shards)
    assert [data.captions(shards[row["shard"]], row) for row in index] == [["ü 0", "another 0"], ["caption 1"],
                                                                           ["caption 2"], ["again"]]
    assert images_in(shards, index) == [noise_image(i) for i in (0, 1, 2, 0)]

@pytest.mark.parametrize("line, says", [
    ("no tab here", "expected `image"), ("0.png\t ", "expected `image"), ("", "expected `image"),
    ("gone.png\ta caption", "gone.png: No such file"), ("list.tsv\tx", "not one of jpg")])
def test_a_bad_line_of_the_list_is_named_by_its_number(tmp_path, monkeypatch, line, says):
    (tmp_path / "0.png").write_bytes(noise_image())
    with pytest.raises(SystemExit, match=f"^error: [^\n]*list.tsv, line 2: [^\n]*{says}[^\n]*$"):
        packed(tmp_path, f"0.png\tfine\n{line}\n0.png\tfine\n", monkeypatch)

def test_demo_scenes_are_the_same_every_time_and_no_two_alike():
    raws = [data.demo_sample(split, i)[0] for split in ("train", "seen", "unseen", "retrieval") for i in range(5)]
    assert raws[3] == data.demo_sample("train", 3)[0] and len(set(raws)) == 20

def test_unseen_pairs_are_in_no_training_caption():
    unseen = {f"{colour} {shape}" for colour, shape in data.UNSEEN}
    captions = [data.demo_sample("train", i)[1] for i in range(300)]
    assert len(unseen) == 8 and not any(name in caption for name in unseen for caption in captions)
    assert [" ".join(data.PAIRS[data.demo_sample("unseen", i)[1]]) in unseen for i in range(8)] == [True] * 8

def test_the_demo_folders_have_the_layout_of_clip_benchmark(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SPLITS", {"train": 3, "seen": 2, "unseen": 2, "retrieval": 2})
    data.make_demo(str(tmp_path / "demo"))
    index, _ = data.build_index([f"{tmp_path}/demo/train/00000.tar"])
    assert len(index) == 3
    for split in ("seen", "unseen", "retrieval"):
        folder = evaluate.read_folder(str(tmp_path / "demo" / split))
        assert len(folder.samples) == 2 and len(folder.classnames) == (0 if split == "retrieval" else 64)


# -----------------------------------------------------------------------------
# evaluate.py, on folders of a few small pictures and a model of random weights.

@pytest.fixture(scope="module")
def small_clip():
    """A model of random weights that knows bytes and no merges, its tokenizer, its Config."""
    config = Config(model="demo", image_size=16, patch_size=8, context_length=24, vocab_size=514)
    torch.manual_seed(0)
    return CLIP(config).eval(), data.Tokenizer("", 24), config

@pytest.mark.parametrize("message, broken", [
    ("nshards.txt: missing", dict(shards="")), ("1.tar: missing, though nshards.txt says 2", dict(shards="2")),
    ("'many', expected the number of shards", dict(shards="many")), ("line 2 is blank", dict(classnames="cat\n\ndog")),
    ("the label of 002.jpg is '2', but classnames.txt has 2 lines", dict(classnames="cat\ndog")),
    ("'a photo' lacks {c}", dict(templates="a {c}\na photo")), ("sample 000 has no .txt", dict(kind="retrieval")),
    ("'captions', expected retrieval or classification", dict(kind="captions"))])
def test_a_broken_folder_is_named_with_what_is_wrong(tmp_path, message, broken):
    folder = make_folder(tmp_path / "f", labelled(3), **broken)
    with pytest.raises(ValueError) as error:
        evaluate.read_folder(folder)
    assert message in str(error.value) and folder in str(error.value)

def test_byte_order_marks_are_not_part_of_a_text(tmp_path):
    samples = [dict(sample, cls=b"\xef\xbb\xbf" + sample["cls"]) for sample in labelled(3)]
    folder = make_folder(tmp_path / "f", samples, "\ufeff1", "\ufeffcat\ndog\nfox", "\ufeffa {c}")
    assert evaluate.read_folder(folder)[1:] == ([0, 1, 2], ["cat", "dog", "fox"], ["a {c}"])

def test_evaluation_reads_samples_of_the_same_key_hidden_files_and_u_fffd(tmp_path):
    folder = tmp_path / "f"
    make_folder(folder, [], kind="retrieval")
    write_shard(folder / "test" / "0.tar", [*pairs([0, 1]), ("._1.png", b""), *pairs([0]), ("9.png", noise_image()),
                                            ("9.txt", "what\ufffd".encode())])
    found = evaluate.read_folder(str(folder))
    assert [sample.name for sample in found.samples] == ["0000.png", "0001.png", "0000.png", "9.png"]
    assert found.targets[3] == ["what\ufffd"]

@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "RGBA"])
def test_preprocess_resizes_crops_and_then_converts(mode):
    image = Image.open(io.BytesIO(noise_image(0, 37, 23))).convert(mode)
    middle = image.resize((int(16 * 37 / 23), 16), Image.BICUBIC).crop((4, 0, 20, 16)).convert("RGB")  # 25 x 16
    mean, std = np.float32(data.MEAN), np.float32(data.STD)
    expected = (np.asarray(middle).astype(np.float32) / np.float32(255) - mean) / std
    assert np.array_equal(evaluate.preprocess(image, 16).numpy(), expected.transpose(2, 0, 1))

@pytest.mark.parametrize("size", [(40_000, 1), (1, 40_000)])
def test_of_a_very_long_picture_only_the_middle_is_resized(size):
    ramp = np.clip(np.arange(40_000) - 19_900, 0, 255).astype(np.uint8).reshape(size[::-1])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seen = evaluate.resize_and_crop(Image.fromarray(ramp), 224)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000                # kB; 8 GB before
    assert seen.shape == (3, 224, 224) and (seen.float().mean() - 99.5).abs() < 2               # pixel 20,000

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

def test_retrieval_equals_a_loop_with_one_to_seven_captions_per_image():
    image_of_text = torch.tensor([i for i in range(30) for _ in range(1 + i % 7)])
    images = F.normalize(torch.randn(30, 8, generator=seeded()), dim=-1)
    texts = F.normalize(images[image_of_text] + torch.randn(len(image_of_text), 8, generator=seeded(1)), dim=-1)
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

def embed_as_rank(rank, folder, broken, path, rendezvous):
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    loaded = evaluate.load(path)
    metrics = evaluate.evaluate(*loaded, folder, rank, 2, workers=1)
    with pytest.raises(ValueError, match="001.jpg does not decode"):    # a picture of rank 1: both hear of it
        evaluate.evaluate(*loaded, broken, rank, 2, workers=1)
    with open(f"{path}.{rank}", "w") as file:
        json.dump(metrics, file)

def test_two_ranks_give_the_metrics_of_one_and_fail_together(tmp_path, small_clip):
    samples = [{"jpg": noise_image(i), "txt": "\n".join(f"{i} {j}" for j in range(1 + i % 3)).encode()} for i in range(7)]
    folder, path = make_folder(tmp_path / "f", samples, kind="retrieval"), save_small(tmp_path / "ckpt.pt", small_clip)
    broken = make_folder(tmp_path / "g", [samples[0], dict(samples[1], jpg=b"no picture")], kind="retrieval")
    torch.multiprocessing.spawn(embed_as_rank, (folder, broken, path, f"file://{tmp_path}/rendezvous"), nprocs=2)
    for rank in (0, 1):
        assert json.load(open(f"{path}.{rank}")) == pytest.approx(evaluate.evaluate(*small_clip, folder))

def test_logistic_regression_ends_where_the_gradient_is_zero():
    x, y = torch.randn(60, 4, generator=seeded()).double(), torch.arange(60) % 3
    weights = evaluate.fit_logistic(x, y, 3, C=2.0).requires_grad_()
    loss = F.cross_entropy(x @ weights[:, :4].T + weights[:, 4], y) * 60 * 2.0 + weights[:, :4].square().sum() / 2
    assert torch.autograd.grad(loss, weights)[0].abs().max() < 1e-3  # scikit-learn's objective

def test_a_linear_probe_learns_what_is_linear():
    features = F.normalize(torch.randn(300, 6, generator=seeded()), dim=-1)
    labels = features[:, :3].argmax(1)
    accuracy, _, _ = evaluate.linear_probe(features[:200], labels[:200], features[200:], labels[200:], 3)
    assert accuracy > 0.9

@torch.no_grad()
def test_sugarcrepe_counts_the_images_that_are_nearer_to_their_caption(tmp_path, small_clip):
    model, tokenizer, config = small_clip
    (tmp_path / "a.jpg").write_bytes(noise_image())
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

def test_an_image_that_does_not_decode_is_an_error_not_a_skip(tmp_path, small_clip):
    samples = labelled(3)
    samples[1]["jpg"] = samples[1]["jpg"][:400]
    with pytest.raises(ValueError, match="001.jpg does not decode"):
        evaluate.evaluate(*small_clip, make_folder(tmp_path / "f", samples))

def test_features_that_are_not_finite_are_an_error_not_a_score(tmp_path, small_clip):
    model = CLIP(small_clip[2])
    model.visual.proj.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        evaluate.evaluate(model, *small_clip[1:], make_folder(tmp_path / "f", labelled(3)))


# -----------------------------------------------------------------------------
# evaluate.py: pictures.

def test_a_picture_shows_five_images_for_each_of_ten_queries(tmp_path, small_clip):
    samples = [{"jpg": noise_image(i), "txt": b"one\ntwo"} for i in range(6)]
    folder = make_folder(tmp_path / "f", samples, kind="retrieval")
    evaluate.evaluate(*small_clip, folder, pictures=str(tmp_path))
    sheet = np.asarray(Image.open(tmp_path / "f.png"))
    assert sheet.shape == (10 * 176, 240 + 5 * 176, 3)
    assert (sheet == [50, 205, 50]).all(-1).any()                       # limegreen: five of six images are shown

def test_removed_patches_are_grey_in_the_picture_and_kept_ones_as_they_were():
    images = torch.from_numpy(np.array(picture(16))).permute(2, 0, 1)[None]
    keep, valid = torch.tensor([[0, 5, 15, 1]]), torch.tensor([[True, True, True, False]])
    expected = torch.full_like(images, 128)
    for y, x in ((0, 0), (4, 4), (12, 12)):
        expected[..., y:y + 4, x:x + 4] = images[..., y:y + 4, x:x + 4]
    assert evaluate.masked(images, keep, valid, 4).equal(expected)

def dark(picture, left):
    """Where a curve's color lies in a panel of curves.png: the pixels that are neither grey nor white."""
    panel = np.asarray(picture).astype(int)[41:290, left + 51:left + 400]
    return (panel.max(-1) - panel.min(-1) > 120).any(0)

def test_curves_show_losses_and_metrics_of_several_runs(tmp_path, monkeypatch, capsys):
    for run, slope in (("a", 1.0), ("b", 0.5)):
        (tmp_path / run).mkdir()
        lines = [dict(step=i, epoch=1 + i // 50, loss=5 - slope * i / 50) for i in range(1, 101)]
        lines += [dict(step=50 * e, epoch=e, loss=1, eval={"x/pets": {"acc1": slope * e / 4}, "x/bad": {"failed": "why"}})
                  for e in (1, 2)]
        (tmp_path / run / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\nbroken")
    logs = [str(tmp_path / run / "log.jsonl") for run in "ab"]
    assert evaluate.draw_curves(str(tmp_path / "curves.png"), logs) == {
        str(tmp_path / run): {"pets acc1": value} for run, value in (("a", 0.5), ("b", 0.25))}
    picture = Image.open(tmp_path / "curves.png")
    assert picture.size == (2 * 420, 330 + 2 * 16) and dark(picture, 0).mean() > 0.9 and dark(picture, 420).mean() > 0.9
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--curves", *logs])
    evaluate.main()
    printed = capsys.readouterr().out
    assert "50.00 |" in printed and "25.00 |" in printed and "wrote curves.png" in printed
    (tmp_path / "a" / "log.jsonl").write_text("\0\0")
    with pytest.raises(SystemExit, match="^error: [^\n]*a/log.jsonl: no training step in it"):
        evaluate.main()


# -----------------------------------------------------------------------------
# evaluate.py: weights.

def save_small(path, small_clip, **changes):
    model, tokenizer, config = small_clip
    torch.save({"model": {**model.state_dict(), **changes}, "config": vars(config), "merges": tokenizer.merges}, path)
    return str(path)

def test_a_checkpoint_gives_back_the_weights_it_was_saved_with(tmp_path, small_clip):
    model, _, config = evaluate.load(save_small(tmp_path / "ckpt.pt", small_clip))
    assert config == small_clip[2]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), small_clip[0].state_dict().values()))

def gzip_vocab(path):
    symbols = [chr(256 + i) for i in range(320)]  # enough pairs for 48,894 different merges
    path.write_bytes(gzip.compress("\n".join(["#version", *(f"{a} {b}" for a in symbols for b in symbols)]).encode()))
    return str(path)

def test_a_foreign_state_dict_tells_its_size_by_its_shapes(tmp_path):
    config = Config(model="128x1-64x2-32", image_size=48, patch_size=16, context_length=9, vocab_size=49408)
    state = {f"module.{name}": tensor for name, tensor in CLIP(config).state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "foreign.pt")
    model, _, found = evaluate.load(str(tmp_path / "foreign.pt"), gzip_vocab(tmp_path / "vocab.gz"))
    assert (found.model, found.image_size, found.patch_size, found.context_length) == ("128x1-64x2-32", 48, 16, 9)
    assert not found.quick_gelu and model.visual.proj.equal(state["module.visual.proj"])

def write_safetensors(path, tensors):
    """As the format's page describes it: the header's length in 8 bytes, the header in json, the raw tensors."""
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, x in tensors.items():
        raw = x.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b""
        header[name] = dict(dtype={torch.float16: "F16", torch.float32: "F32", torch.int64: "I64"}[x.dtype],
                            shape=list(x.shape), data_offsets=[len(body), len(body) + len(raw)])
        body += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)

def test_weights_are_read_as_they_are_published(tmp_path):
    state = CLIP(Config(model="128x1-64x1-32", image_size=32, context_length=9)).state_dict()
    write_safetensors(tmp_path / "a.safetensors", {name: x.half() if x.ndim > 1 else x for name, x in state.items()})
    torch.save({"state_dict": {f"module._orig_mod.{name}": x for name, x in state.items()}, "epoch": np.float64(3),
                "step": np.int64(7)}, tmp_path / "b.pt")
    for name, tolerance in (("a.safetensors", 1e-2), ("b.pt", 0)):
        model, _, _ = evaluate.load(str(tmp_path / name), gzip_vocab(tmp_path / "vocab.gz"))
        assert all(x.allclose(state[key], atol=tolerance) for key, x in model.state_dict().items())

@pytest.mark.parametrize("name, raw, says", [
    ("a.pt", gzip.compress(b"x" * 999), "compressed: unpack it"), ("a.pt", b"version https://git-lfs.github.com/spec/v1\n",
                                                               "git lfs pull"), ("a.safetensors", b"{}" * 9, "damaged")])
def test_what_is_no_file_of_weights_is_called_what_it_is(tmp_path, name, raw, says):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=f"^[^\n]*{name}: [^\n]*{says}[^\n]*$"):
        evaluate.load(str(tmp_path / name))
    with pytest.raises(ValueError, match="Is a directory"):
        evaluate.load(str(tmp_path))

def test_a_foreign_state_dict_without_vocab_says_what_to_pass(tmp_path, small_clip, capsys):
    torch.save(small_clip[0].state_dict(), tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match="--vocab bpe_simple_vocab_16e6.txt.gz"):
        evaluate.load(str(tmp_path / "foreign.pt"))
    assert "OpenAI trained need --quick-gelu" in capsys.readouterr().err

def test_a_tensor_of_another_shape_is_named_with_both_shapes(tmp_path, small_clip):
    path = save_small(tmp_path / "ckpt.pt", small_clip, **{"visual.proj": torch.zeros(128, 64)})
    with pytest.raises(ValueError, match=r"ckpt.pt: [^\n]*visual.proj[^\n]*\[128, 64\][^\n]*\[128, 128\]"):
        evaluate.load(path)

class Evil:
    """A pickle of it makes a folder when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)

def saved(thing):
    raw = io.BytesIO()
    torch.save(thing, raw)
    return raw.getvalue()

@pytest.mark.parametrize("raw", [b"", b"not a checkpoint", saved({"step": 1})[:300], saved([1, 2]), None,
                                 pickle.dumps({"model": Evil("pwned")}, 2), saved({"model": Evil("pwned")})],
                         ids=["empty", "text", "cut", "list", "missing", "evil pickle", "evil"])
def test_a_damaged_or_dangerous_checkpoint_is_refused_in_one_line_that_names_it(tmp_path, monkeypatch, raw):
    monkeypatch.chdir(tmp_path)
    if raw is not None:
        (tmp_path / "ckpt.pt").write_bytes(raw)
    with pytest.raises(ValueError, match=r"^[^\n]*ckpt.pt: [^\n]+$"):
        evaluate.load("ckpt.pt")
    assert not (tmp_path / "pwned").exists()

def test_quick_gelu_is_known_by_the_keys_of_openais_archive(tmp_path, small_clip):
    openai = {name: torch.tensor(0) for name in ("input_resolution", "context_length", "vocab_size")}
    model, _, config = evaluate.load(save_small(tmp_path / "ckpt.pt", small_clip, **openai))
    assert config.quick_gelu and isinstance(model.transformer.resblocks[0].mlp.gelu, clip_pgs.QuickGELU)


# -----------------------------------------------------------------------------
# evaluate.py: table and main.

def test_the_table_has_an_average_of_several_classification_folders():
    one, two = ({"acc1": a, "acc5": 1.0, "mean_per_class_recall": a} for a in (0.25, 0.5))
    assert "average" not in evaluate.table({"one": one})
    lines = evaluate.table({"one": one, "two": two}).splitlines()
    assert lines[-1].split() == "| average | 37.50 | 100.00 | 37.50 |".split()
    assert len({len(line) for line in lines}) == 1  # aligned

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
