"""The promises of this project, one behaviour a test, in the order of the code.

`pytest -q` runs them in a minute or two on 2 CPU cores, without a GPU, network or data. What they
expect comes from elsewhere: a loop, a closed form, float64, finite differences, a drawn picture.
"""
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
import subprocess
import sys
import tarfile
import time
from collections import Counter
from contextlib import nullcontext, redirect_stderr
from dataclasses import fields
from functools import partial
from itertools import pairwise
from pathlib import Path
from textwrap import indent

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU computes in bf16: nothing would be exactly equal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, PngImagePlugin
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

import clip_pgs
import data
import evaluate
from clip_pgs import CLIP, MASKS, Config, make_mask, patch_similarity, sinkhorn, sobel_edges

torch.set_num_threads(1)  # tiny tensors, and the processes started here use one thread, too
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # Python 3.12: of workers
HERE = Path(__file__).resolve().parent

# -----------------------------------------------------------------------------
# What the tests are made of: a tiny model, numbers, pictures, shards.

clip_pgs.SIZES["tiny"] = (128, 2, 64, 2, 16)

def tiny(**changes):
    """A Config whose images have 4 x 4 patches of 4 x 4 pixels."""
    size = dict(model="tiny", image_size=16, patch_size=4, context_length=24, vocab_size=600)
    return Config(**size | changes)

def roughen(clip):
    """Moves biases and norms: none that is zero or the identity could be forgotten unseen."""
    torch.manual_seed(0)
    for p in clip.parameters():
        if p.ndim == 1:
            p.data += 0.1 * torch.randn_like(p)
    return clip

def random_clip(config):
    torch.manual_seed(0)
    return roughen(CLIP(config))

def seeded(seed=0):
    return torch.Generator().manual_seed(seed)

def rand(*size, seed=0):
    return torch.rand(*size, generator=seeded(seed))

def randn(*size, seed=0):
    return torch.randn(*size, generator=seeded(seed))

def noise_images(B, H=16, W=16):
    return randn(B, 3, H, W)

def random_tokens(B):
    """(B, 24): <start>, between 1 and 22 ids, <end>, zeros."""
    ends = torch.randint(2, 24, (B, 1), generator=seeded())
    tokens = torch.randint(1, 598, (B, 24), generator=seeded())
    tokens[:, 0] = 598
    tokens.scatter_(1, ends, 599)
    return tokens.masked_fill(torch.arange(24) > ends, 0)

def scene(seed):
    """A sky that fades, a meadow with grain, 20 discs and boxes: like a photograph."""
    rng = np.random.default_rng(seed)
    height = np.linspace(0, 1, 224)[:, None, None]
    grain = Image.fromarray(rng.normal(0, 1, (28, 28)).astype(np.float32))
    grain = np.asarray(grain.resize((224, 224), Image.Resampling.BICUBIC))[..., None]
    sky, meadow = rng.uniform(60, 200, (2, 3))
    pixels = np.where(height < 0.6, sky + 50 * height + 2 * grain, meadow + 25 * grain)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for shape in [draw.ellipse, draw.rectangle] * 10:
        x, y, w, h = rng.integers((0, 60, 12, 12), (200, 160, 60, 60)).tolist()
        colour = rng.integers(0, 256, 3).tolist()
        shape((x, y, x + w, y + h), fill=tuple(colour))
    return image

PLAIN = Image.new("RGB", (16, 16), (13, 130, 77))
TWO_COLOURS = PLAIN.copy()
TWO_COLOURS.paste("yellow", (6, 0, 16, 16))
KINDS = [noise_images(1)]  # of images, (1, 3, 16, 16) each
for picture in (PLAIN, TWO_COLOURS, scene(0)):
    KINDS.append(evaluate.preprocess(picture, 16)[None])

def masked(name, images, ratio, **options):
    """make_mask on patches of 4 x 4 pixels; attentive sees a random attention."""
    num_patches = images[0, 0].numel() // 16
    attention = rand(len(images), num_patches, seed=1)
    options = dict(patch_size=4, attention=attention) | options
    return make_mask(name, images, ratio, seeded(), **options)

def encoded(image, format="PNG", **options):
    raw = io.BytesIO()
    image.save(raw, format, **options)
    return raw.getvalue()

def noise_image(seed=0, size=(20, 20), format="PNG"):
    """The bytes of a picture of random pixels."""
    pixels = np.random.default_rng(seed).bytes(3 * math.prod(size))
    return encoded(Image.frombytes("RGB", size, pixels), format)

def broken_disk(*_):
    raise OSError(5, "Input/output error")

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
    """The members of a shard: for each number a picture, unless it is broken, and its caption."""
    for i in numbers:
        picture = b"no picture" if i in broken else noise_image(i)
        yield f"{i:04d}.png", picture
        yield f"{i:04d}.txt", caption_of(i).encode()

def draw_shards(folder, broken=()):
    """Two shards of 20 pairs each."""
    write_shard(folder / "0.tar", pairs(range(20), broken))
    write_shard(folder / "1.tar", pairs(range(20, 40), broken))

def make_folder(path, samples, shards="1", classnames="cat\ndog\nfox", templates="a {c}\nthe {c}.", kind=""):
    """An evaluation folder with one shard of samples, {extension: bytes} each; a text "" gets no file."""
    members = []
    for number, files in enumerate(samples):
        for extension, raw in files.items():
            members.append((f"{number:03d}.{extension}", raw))
    shard = path / "test" / "0.tar"
    shard.parent.mkdir(parents=True)
    write_shard(shard, members)
    texts = {"test/nshards.txt": shards, "classnames.txt": classnames,
             "zeroshot_classification_templates.txt": templates, "dataset_type.txt": kind}
    for name, text in texts.items():
        if text:
            (path / name).write_text(text, encoding="utf-8")
    return str(path)

def labelled(count):
    """Samples of a folder for classification."""
    samples = []
    for i in range(count):
        samples.append({"jpg": noise_image(i, (40, 32), "JPEG"), "cls": str(i % 3).encode()})
    return samples

@pytest.fixture
def pets(tmp_path):
    """A folder for classification; its path."""
    return make_folder(tmp_path / "pets", labelled(3))

# -----------------------------------------------------------------------------
# Config and command line.

def test_help_mentions_every_option(capsys):
    with pytest.raises(SystemExit):
        clip_pgs.parse(["--help"])
    shown = capsys.readouterr().out
    for option in fields(Config):
        assert f"--{option.name.replace('_', '-')}" in shown

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
    _, H, W = image.shape
    pixels = image.double().numpy()
    patches = []
    for y in range(0, H, P):
        for x in range(0, W, P):
            patches.append(pixels[:, y:y + P, x:x + P])
    return patches

def cosines(rows):
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ rows.T

def test_similarity_mixes_the_cosine_of_patches_of_zero_mean_with_that_of_embeddings():
    images = noise_images(2, 8, 20)
    embeddings = randn(2, 10, 5)
    S = patch_similarity(images, 4, embeddings, alpha=0.25)
    for row in (0, 1):
        patches = [(p - p.mean()).ravel() for p in patches_by_loop(images[row], 4)]
        expected = 0.75 * cosines(np.stack(patches)) + 0.25 * cosines(embeddings[row].numpy())
        assert S[row].numpy() == pytest.approx(expected, abs=1e-5)

def test_flat_grey_patches_are_similar_to_each_other_and_not_to_the_others():
    images = noise_images(1)
    images[..., :4] = 1.23  # the first column of patches
    images[..., 12:] = 0.0                                              # the last
    flat = torch.tensor([True, False, False, True] * 4)
    S = patch_similarity(images, 4)[0]
    assert S[flat][:, flat].min() > 0.999
    assert S[flat][:, ~flat].abs().max() < 0.01

@torch.no_grad()
def test_embeddings_are_what_enters_the_first_layer_before_its_norm():
    visual = random_clip(tiny()).visual
    images = noise_images(2)
    keep = torch.tensor([[3, 5], [0, 9]])
    projected = F.conv2d(images, visual.conv1.weight, stride=4).flatten(2).mT
    expected = projected + visual.positional_embedding[1:]
    embeddings = visual.patch_tokens(images)
    assert embeddings.allclose(expected, atol=1e-5)
    assert visual.ln_pre(embeddings).allclose(visual.embed(images)[:, 1:], atol=1e-5)
    kept = expected.take_along_dim(keep[..., None], 1)
    assert visual.patch_tokens(images, keep).allclose(kept, atol=1e-5)

def edges_by_loop(image, P):
    """Sobel by hand on one normalised (3, H, W) image: luminance in float64, borders repeated."""
    std = np.reshape(data.STD, (3, 1, 1))
    mean = np.reshape(data.MEAN, (3, 1, 1))
    colour = image.double().numpy() * std + mean
    luminance = np.tensordot((0.299, 0.587, 0.114), colour, 1)
    luminance = np.pad(luminance, 1, mode="edge")
    around = np.lib.stride_tricks.sliding_window_view(luminance, (3, 3))        # (H, W, 3, 3)
    kernel = np.outer((1, 2, 1), (-1, 0, 1))
    change_x = (around * kernel).sum((2, 3))
    change_y = (around * kernel.T).sum((2, 3))
    magnitude = torch.tensor(np.hypot(change_x, change_y))
    edges = np.array([p.mean() for p in patches_by_loop(magnitude[None], P)])
    edges -= edges.min()
    return edges / max(edges.max(), 1e-9)                               # flat: zeros

@pytest.mark.parametrize("images", [*KINDS, noise_images(1, 8, 20)])
def test_edges_equal_sobel_s_filter_by_hand(images):
    batch = torch.cat([images, 3 * images])  # each image has its own scale
    edges = sobel_edges(batch, 4)
    assert edges[0].numpy() == pytest.approx(edges_by_loop(images[0], 4), abs=1e-5)

def alternating_sinkhorn(S):
    """Rows and columns normalised in turns, in float64, until nothing moves."""
    plan = (S.double() / 0.05).exp()
    before = torch.zeros(1)
    while (plan - before).abs().max() > 1e-11:
        before = plan
        plan = plan / plan.sum(2, keepdim=True)
        plan = plan / plan.sum(1, keepdim=True)
    return plan

VECTORS = F.normalize(randn(8, 4), dim=1)
REPEATED = VECTORS[[0] * 7 + [1] * 3 + [2, 3, 4, 5, 6, 7]]  # one of them seven times, one three times

@pytest.mark.parametrize("S", [patch_similarity(KINDS[3], 4), (REPEATED @ REPEATED.T)[None]])
def test_sinkhorn_equals_the_plain_alternating_one_run_to_convergence(S):
    assert sinkhorn(S).double().allclose(alternating_sinkhorn(S), atol=1e-5, rtol=0)

def test_the_balanced_similarity_is_and_ranks_as_the_log_of_the_transport_plan():
    x = F.normalize(randn(4, 40, 8), dim=-1)
    S = x @ x.mT                                                        # up to 0.016 from balanced
    expected = 1 + 0.05 * alternating_sinkhorn(S).log()
    balanced = clip_pgs.balance(S)
    assert balanced.double().allclose(expected, atol=2e-4, rtol=0)
    assert balanced.argsort(-1).equal(expected.argsort(-1))

@pytest.mark.parametrize("low, high", [(0.5, 0.5), (0.25, 0.75)])
def test_the_highest_priority_goes_and_the_count_stays_within_the_range(low, high):
    priority = rand(4, 20)
    count = [2, 8, 13, 19]
    keep, valid = clip_pgs.remove(priority, (low, high), torch.tensor(count))
    for row in range(4):
        stays = 20 - min(max(count[row], round(20 * low)), round(20 * high))
        lowest = priority[row].argsort()[:stays]
        assert sorted(keep[row, :stays].tolist()) == sorted(lowest.tolist())
        if low < high:
            assert valid[row].tolist() == [True] * stays + [False] * (15 - stays)

@pytest.mark.parametrize("mask", MASKS[1:])
@pytest.mark.parametrize("ratio, size, kept", [(0.3, (16, 16), 11), (0.75, (12, 16), 3), (0.99, (4, 12), 1)])
def test_one_ratio_removes_exactly_that_share_of_every_image(mask, ratio, size, kept):
    keep, valid = masked(mask, noise_images(3, *size), (ratio,))
    assert keep.shape == (3, kept)
    assert valid is None

def test_random_keeps_every_patch_equally_often():
    keep, _ = masked("random", noise_images(2000), (0.25,))
    share = keep.flatten().bincount() / 2000
    assert (share - 0.75).abs().max() < 0.06

def test_a_mask_that_counts_nothing_refuses_a_range():
    with pytest.raises(ValueError, match="--ratio 0.3 0.5: --mask center takes one share"):
        masked("center", noise_images(1), (0.3, 0.5))

def test_center_keeps_each_cell_as_often_as_a_plain_simulation():
    keep, _ = masked("center", noise_images(4000, 24, 24), (0.5,))
    share = keep.flatten().bincount(minlength=36) / 4000
    axis = torch.linspace(-1, 1, 6)
    square = axis[:, None] ** 2 + axis ** 2
    density = (-square / 0.4).exp() / (0.4 * math.pi)                   # 0.80 in the middle
    order = (rand(4000, 36, seed=1) + density.flatten()).argsort(1)
    expected = order[:, 18:].flatten().bincount(minlength=36) / 4000
    assert (share - expected).abs().max() < 0.05

def sums_of_blocks(x):
    """(B, 196) -> (B, 49): of each block of 2x2 patches."""
    return x.view(-1, 7, 2, 7, 2).sum((2, 4)).flatten(1)

@pytest.mark.parametrize("ratio, kept", [(0.5, [4] * 24 + [2]), (0.3, [4] * 34 + [1])])
def test_attentive_keeps_the_blocks_with_the_highest_attention_and_splits_at_most_one(ratio, kept):
    attention = rand(20, 196)
    images = torch.zeros(20, 3, 224, 224)
    keep, _ = make_mask("attentive", images, (ratio,), seeded(1), attention=attention)
    of_block = sums_of_blocks(torch.zeros(20, 196).scatter(1, keep, 1))
    best_first = sums_of_blocks(attention).argsort(1, descending=True)
    expected = kept + [0] * (49 - len(kept))
    assert of_block.take_along_dim(best_first, 1).tolist() == [expected] * 20

def test_attentive_ranks_single_patches_where_the_grid_is_odd():
    attention = rand(3, 15)
    keep, _ = masked("attentive", noise_images(3, 12, 20), (0.4,), attention=attention)
    assert keep.equal(attention.argsort(1, descending=True)[:, :9])

def test_attentive_with_a_range_removes_blocks_that_get_less_than_an_even_share():
    attention = torch.tensor([[4.0, 4, 1, 1] * 2 + [1] * 8])  # one block of four is above the mean
    keep, valid = masked("attentive", noise_images(1), (0.0, 0.9), attention=attention)
    assert sorted(keep[valid].tolist()) == [0, 1, 4, 5]

@pytest.fixture(scope="module")
def scenes():
    """What make_mask gets of 60 scenes and a new ViT-B-16."""
    torch.manual_seed(0)
    images = torch.stack([evaluate.preprocess(scene(i), 224) for i in range(60)])
    embeddings = CLIP(Config()).visual.patch_tokens(images).detach()
    noise = rand(60, 2, 196)
    return dict(images=images, ratio=(0.5,), noise=noise, alpha=0.5, embeddings=embeddings)

def removed(mask, given, **changes):
    """(B, 196) bool: which patches of the scenes are gone."""
    keep, valid = make_mask(mask, **given | changes)
    if valid is None:
        valid = torch.ones_like(keep)
    kept = torch.zeros(len(keep), 196).scatter(1, keep, valid.float())
    return kept == 0

def mean_difference(gone, other):
    """How many patches of an image are gone here and not there, mean over the images."""
    return (gone & ~other).sum(1).double().mean()

@pytest.fixture
def scores(monkeypatch):
    """A list of what pgs_score returns, to which each call adds its own."""
    seen = []
    pgs_score = clip_pgs.pgs_score

    def listening(*given):
        seen.append(pgs_score(*given))
        return seen[-1]
    monkeypatch.setattr(clip_pgs, "pgs_score", listening)
    return seen

@pytest.mark.parametrize("mask", ["cluster", "pgs"])
def test_all_similar_patches_go_or_all_that_go_are_similar(scenes, scores, mask):
    gone = removed(mask, scenes, alpha=0)
    similar = scores[0] > 0.5
    few = (similar <= gone).all(1)  # all similar patches are removed
    many = (gone <= similar).all(1)  # all removed patches are similar
    assert (few | many).all()
    assert few.any() and many.any()                                     # the scenes show both

@pytest.mark.parametrize("mask", ["cluster", "pgs"])
def test_a_range_removes_as_many_as_are_similar(scenes, scores, mask):
    gone = removed(mask, scenes, ratio=(0.3, 0.5))
    similar = scores[0] > 0.5
    assert gone.sum(1).equal(similar.sum(1).clamp(59, 98))

@pytest.mark.parametrize("mask", ["cluster", "pgs"])
def test_of_two_similar_patches_the_second_half_of_the_noise_chooses(scenes, mask):
    flipped = scenes["noise"].clone()
    flipped[:, 1] = 1 - flipped[:, 1]  # same candidates, same similar patches
    gone = removed(mask, scenes, alpha=0)
    other = removed(mask, scenes, alpha=0, noise=flipped)
    assert mean_difference(gone, other) > 20

@pytest.mark.parametrize("transport", [True, False])
def test_pgs_scores_by_the_nearest_candidate(scenes, scores, transport):
    images = scenes["images"][:3]
    noise = scenes["noise"][:3]
    make_mask("pgs", images, (0.5,), noise=noise, transport=transport)
    expected = patch_similarity(images)
    if transport:
        expected = 1 + 0.05 * sinkhorn(expected).log()
    for row in range(3):
        flatness = noise[row, 0].numpy() - edges_by_loop(images[row], 16)
        candidates = np.argsort(-flatness)[:10]                         # 5 % of 196 patches: ten
        assert scores[0][row].allclose(expected[row, candidates].amax(0), atol=1e-4)

def test_cluster_scores_by_the_nearest_anchor(scenes, scores):
    make_mask("cluster", **scenes | dict(alpha=0))
    S = patch_similarity(scenes["images"])
    for row in range(3):
        anchors = scenes["noise"][row, 0].argsort(descending=True)[:6]  # 3 % of 196 patches: six
        assert scores[0][row].equal(S[row, anchors].amax(0))

@pytest.mark.parametrize("mask, least", [("cluster", 34), ("pgs", 24)])
def test_two_draws_of_a_mask_differ(scenes, mask, least):
    first = removed(mask, scenes, alpha=0)
    second = removed(mask, scenes, alpha=0, noise=rand(60, 2, 196, seed=1))
    assert mean_difference(first, second) > least

@pytest.mark.parametrize("mask, switch, least", [
    ("pgs", dict(edges=False), 5), ("pgs", dict(transport=False), 1.5), ("pgs", dict(embeddings=None), 2.5),
    ("cluster", dict(embeddings=None), 2.5)])
def test_every_switch_changes_the_mask_of_a_picture(scenes, mask, switch, least):
    difference = mean_difference(removed(mask, scenes), removed(mask, scenes, **switch))
    assert least < difference < 50

@pytest.mark.parametrize("mask", MASKS)
def test_a_mask_does_not_depend_on_the_other_images_in_the_batch(mask):
    images = torch.cat(KINDS)
    noise = rand(4, 2, 16)
    embeddings = rand(4, 16, 8, seed=1)
    attention = rand(4, 16, seed=2)
    ratio = (0.3, 0.7) if mask in clip_pgs.COUNTING else (0.5,)

    def mask_of(rows):
        return make_mask(mask, images[rows], ratio, patch_size=4, noise=noise[rows], alpha=0.3,
                         embeddings=embeddings[rows], attention=attention[rows])
    keep, valid = mask_of([0, 1, 2, 3])
    for row in range(4):
        keep_alone, valid_alone = mask_of([row])
        assert keep[row].equal(keep_alone[0])
        assert valid is None or valid[row].equal(valid_alone[0])

def test_a_mask_is_the_same_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        inside, _ = masked("pgs", noise_images(50), (0.5,))
    outside, _ = masked("pgs", noise_images(50), (0.5,))
    assert inside.equal(outside)

def test_the_mask_that_the_readme_adds_works_as_written():
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    source = (HERE / "clip_pgs.py").read_text(encoding="utf-8")
    found = re.search(r'^    (MASKS = .*"bright"\))\n\n((?:    .*\n)+)', readme, re.M)
    branch = indent(found[2], "    ")                                   # into the body of make_mask
    source = re.sub(r"^MASKS = .*$", found[1], source, flags=re.M)
    source = re.sub('(?=^ *if name == "cluster":)', branch, source, flags=re.M)
    mine = {"__name__": "clip_pgs"}
    exec(source, mine)
    keep, _ = mine["make_mask"]("bright", noise_images(2), (0.5,), patch_size=4)
    brightness = clip_pgs.patchify(noise_images(2), 4).mean(-1)
    assert keep.equal(brightness.argsort(1)[:, :8])

# -----------------------------------------------------------------------------
# Model and teacher.

def test_vit_b_16_has_open_clip_s_names_and_number_of_parameters():
    block = ["attn.in_proj_weight", "attn.in_proj_bias"]
    for layer in ("ln_1", "ln_2", "attn.out_proj", "mlp.c_fc", "mlp.c_proj"):
        block += [f"{layer}.weight", f"{layer}.bias"]
    blocks = [f"transformer.resblocks.{i}.{name}" for i in range(12) for name in block]
    visual = ("class_embedding positional_embedding proj conv1.weight ln_pre.weight ln_pre.bias "
              "ln_post.weight ln_post.bias").split()
    text = ("positional_embedding text_projection logit_scale token_embedding.weight ln_final.weight "
            "ln_final.bias").split()
    names = text + blocks + [f"visual.{name}" for name in visual + blocks]
    with torch.device("meta"):
        parameters = CLIP(Config()).state_dict()
    assert sorted(parameters) == sorted(names)
    assert sum(p.numel() for p in parameters.values()) == 149_620_737

@pytest.mark.parametrize("quick, gelu", [(False, F.gelu), (True, lambda x: x / (1 + (-1.702 * x).exp()))])
def test_a_block_equals_pytorch_s_own_transformer_layer_also_a_causal_one(quick, gelu):
    block = random_clip(tiny(quick_gelu=quick)).visual.transformer.resblocks[0]
    layer = torch.nn.TransformerEncoderLayer(128, 2, 512, 0.0, gelu, batch_first=True, norm_first=True)
    ours = []
    for module in (block.attn, block.mlp, block.ln_1, block.ln_2):      # in the layer's order
        ours += module.parameters()
    layer.load_state_dict(dict(zip(layer.state_dict(), ours)))
    x = randn(2, 5, 128)
    later = torch.nn.Transformer.generate_square_subsequent_mask(5)
    assert block(x).allclose(layer(x), atol=1e-5)
    assert block(x, causal=True).allclose(layer(x, later), atol=1e-5)

def test_removed_patches_and_padded_slots_change_neither_the_features_nor_the_gradients():
    clip = random_clip(tiny())
    images = noise_images(8).requires_grad_()
    order, weight = rand(2, 8, 16)
    keep = order.argsort(1)[:, :12]
    valid = torch.arange(12) < 12 * rand(8, 1, seed=1)                  # between 1 and 12 of 12
    alone = [clip.encode_image(images[[i]], keep[i, valid[i]][None]) for i in range(8)]
    alone = torch.cat(alone)
    padded = clip.encode_image(images, keep, valid)
    assert padded.allclose(alone, atol=1e-5)
    leaves = [images, *clip.visual.parameters()]
    expected = torch.autograd.grad((alone * weight).sum(), leaves)
    gradients = torch.autograd.grad((padded * weight).sum(), leaves)
    for ours, theirs in zip(gradients, expected):
        assert ours.allclose(theirs, atol=1e-4)
    seen = torch.zeros(8, 16).scatter(1, keep, valid.float()).bool()
    assert clip_pgs.patchify(gradients[0], 4).any(2).equal(seen)

def test_two_threads_give_the_same_gradients_every_time():
    clip = random_clip(tiny())
    keep = rand(500, 16).argsort(1)[:, :8]
    gradients = []
    torch.set_num_threads(2)
    for _ in range(5):
        loss = clip.encode_image(noise_images(500), keep).square().sum()
        gradients += torch.autograd.grad(loss, clip.visual.positional_embedding)
    torch.set_num_threads(1)
    for other in gradients[1:]:
        assert other.equal(gradients[0])

def test_a_caption_s_feature_is_the_causal_transformer_s_last_output_for_it_alone():
    clip = random_clip(tiny())
    tokens = random_tokens(20)
    features = clip.encode_text(tokens)
    for row in range(20):
        ids = tokens[row, :tokens[row].argmax() + 1]
        x = clip.token_embedding(ids) + clip.positional_embedding[:len(ids)]
        x = clip.transformer(x[None], causal=True)[0, -1]
        assert features[row].allclose(clip.ln_final(x) @ clip.text_projection, atol=1e-5)

@pytest.mark.parametrize("size, side", [(0, 16), (8, 8)])
def test_class_attention_is_the_class_token_s_row_of_pytorch_s_maps_stretched_over_the_patches(size, side):
    clip = random_clip(tiny())
    seen = F.interpolate(noise_images(3), (side, side), mode="bilinear", antialias=True)
    x = clip.visual.embed(seen)
    rows = []
    for block in clip.visual.transformer.resblocks:
        theirs = torch.nn.MultiheadAttention(128, 2, batch_first=True)
        theirs.load_state_dict(block.attn.state_dict())
        y = block.ln_1(x)
        _, weights = theirs(y, y, y)                                    # mean over the heads
        rows.append(weights[:, 0, 1:])
        x = block(x)
    rows = torch.stack(rows).mean(0).view(3, 1, side // 4, side // 4)
    expected = F.interpolate(rows, (4, 4), mode="bilinear").flatten(1)
    attention, class_token = clip_pgs.class_attention(clip.visual, noise_images(3), size)
    assert attention.allclose(expected, atol=1e-6)
    assert (class_token @ clip.visual.proj).allclose(clip.encode_image(seen), atol=1e-5)

@pytest.mark.parametrize("progress, share", [(0, 0.004), (0.5, 0.002), (1, 0)])
def test_the_ema_takes_a_share_of_the_model_that_falls_to_zero_by_a_cosine(progress, share):
    ema = torch.nn.Linear(2, 3)
    model = torch.nn.Linear(2, 3)
    expected = (1 - share) * ema.weight + share * model.weight
    clip_pgs.update_ema(ema, model, progress)
    assert ema.weight.allclose(expected, atol=1e-7)

# -----------------------------------------------------------------------------
# Losses, optimizer, schedule.

def two_features():
    a, b = randn(2, 6, 4).double()
    return a.requires_grad_(), b.requires_grad_()

def test_the_loss_is_the_cross_entropy_of_rows_and_columns_of_the_decoded_pairs_alone():
    images, texts = two_features()
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    decoded = torch.tensor([True, False, True, True, False, True])
    cosine = F.cosine_similarity(images[decoded][:, None], texts[decoded], dim=-1)
    scores = (9 * cosine).exp()
    own = scores.diagonal()
    expected = -(own / scores.sum(0) * own / scores.sum(1)).log().mean() / 2
    assert clip_pgs.clip_loss(images, texts, scale, decoded).allclose(expected, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(clip_pgs.clip_loss, (images, texts, scale, decoded))

def test_nt_xent_asks_for_the_other_view_among_all_others():
    a, b = two_features()
    z = torch.cat([a, b])
    scores = (F.cosine_similarity(z[:, None], z, dim=-1) / 0.1).exp()
    scores.fill_diagonal_(0)
    other_view = np.roll(range(12), 6)
    expected = -(scores[range(12), other_view] / scores.sum(1)).log().mean()
    assert clip_pgs.nt_xent(a, b).allclose(expected, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(clip_pgs.nt_xent, (a, b))

def test_byol_is_the_mean_of_2_minus_2_cosines_and_teaches_one_side_only():
    a, b = two_features()
    cosines = (a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1)
    loss = clip_pgs.byol(a, b)
    loss.backward()
    assert loss.allclose(2 - 2 * cosines.mean())
    assert a.grad.abs().sum() > 0
    assert b.grad is None

def test_only_matrices_decay():
    decay, rest = clip_pgs.make_optimizer(tiny(weight_decay=0.2), CLIP(tiny())).param_groups
    assert decay["weight_decay"] == 0.2
    assert {p.ndim for p in decay["params"]} == {2, 4}
    assert {p.ndim for p in rest["params"]} == {0, 1}

def test_the_learning_rate_rises_in_a_line_and_falls_in_a_cosine_to_zero():
    config = Config(lr=2.0, warmup=10)
    rates = [clip_pgs.learning_rate(config, step, 110) for step in (0, 4, 9, 10, 35, 60, 85, 110)]
    cosine = [1 + math.cos(math.pi * share) for share in (0, 0.25, 0.5, 0.75, 1)]
    assert rates == pytest.approx([0.2, 1.0, 2.0, *cosine], abs=1e-12)

def test_the_warm_up_takes_at_most_a_fifth_of_the_run():
    rates = [clip_pgs.learning_rate(Config(lr=1.0), step, 10) for step in (0, 1, 2)]
    assert rates == [0.5, 1.0, 1.0]

def test_the_noise_of_masks_follows_from_seed_and_step():
    def noise(seed, step):
        return clip_pgs.step_noise(tiny(seed=seed), step, 4, "cpu")
    assert not noise(0, 1).equal(noise(0, 2))
    assert not noise(0, 1).equal(noise(1, 1))

# -----------------------------------------------------------------------------
# One step: plain, in many passes, with two views, on one rank or two.

RANGE = dict(mask="pgs", ratio=(0.25, 0.75))
FULL = dict(mask="attentive", views=2, contrast=("simclr", "byol"))     # A-CLIP

def eight_pairs(views=1):
    """This rank's part of 8 pairs, one of them not decoded; with two views, images come three times:
    both views and the whole around them."""
    rank, world_size = clip_pgs.ranks()
    part = torch.arange(8).chunk(world_size)[rank]
    shape = (8, 3, 16, 16) if views == 1 else (8, 3, 3, 16, 16)
    images = (256 * rand(*shape)).byte()
    boxes = torch.tensor([[[0.0, 0.0, 1.0, 0.7], [0.2, 0.1, 1.0, 1.0]]] * 8)
    return data.Batch(images[part], random_tokens(8)[part], part != 5, boxes[part], [], "")

def step_of(config, heads):
    """The function that makes a step, as a run chooses it."""
    if config.views == 2:
        return partial(clip_pgs.two_view_step, heads=heads)
    return clip_pgs.train_step if config.accum == 1 else clip_pgs.train_step_in_passes

def one_step(config, step=None, batch=None, noise=None):
    """The numbers and the gradients (P,) of a step."""
    clip, model, optimizer, ema, heads = clip_pgs.build(config, {}, "cpu")
    roughen(clip)
    optimizer.zero_grad = lambda: None  # we want to see the gradients
    step = step or step_of(config, heads)
    if batch is None:
        batch = eight_pairs(config.views)
        noise = clip_pgs.step_noise(config, 3, 8 * config.views, "cpu")
    found, _, _ = step(config, clip, model, optimizer, batch, noise, 0.5, ema)
    numbers = {name: float(number) for name, number in found.items()}
    gradients = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
    return numbers, torch.cat(gradients)

@pytest.mark.parametrize("changes", [dict(mask="pgs"), RANGE, FULL], ids=str)
def test_many_small_passes_make_the_loss_and_gradients_of_one_large_batch(changes):
    whole, expected = one_step(tiny(**changes))
    passes, gradients = one_step(tiny(**changes, accum=4))
    assert passes == pytest.approx(whole, abs=1e-5)
    assert gradients.allclose(expected, atol=1e-5)

@pytest.mark.parametrize("changes", [dict(mask="none"), dict(mask="attentive"), RANGE], ids=str)
def test_many_passes_with_one_pass_give_the_plain_step_s_gradients_to_the_last_digit(changes):
    plain, expected = one_step(tiny(**changes))
    passes, gradients = one_step(tiny(**changes), clip_pgs.train_step_in_passes)
    assert passes == plain
    assert gradients.equal(expected)

@pytest.mark.parametrize("mask", MASKS)
def test_two_equal_views_give_the_plain_step_s_loss_and_gradients(mask):
    batch = eight_pairs()
    noise = rand(8, 2, 16)
    plain, expected = one_step(tiny(mask=mask), batch=batch, noise=noise)
    views = batch._replace(images=batch.images[:, None].expand(8, 3, 3, 16, 16),
                           boxes=torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(8, 2, 4))
    twice = noise.repeat_interleave(2, 0)
    numbers, gradients = one_step(tiny(mask=mask, views=2), batch=views, noise=twice)
    assert numbers == pytest.approx(plain, abs=1e-6)
    assert (gradients - expected).norm() < 1e-6 * expected.norm()

@pytest.mark.parametrize("changes", [RANGE | dict(views=2), FULL], ids=["pgs", "A-CLIP"])
def test_the_order_of_the_two_views_does_not_matter(changes):
    batch = eight_pairs(views=2)
    noise = rand(16, 2, 16)
    numbers, expected = one_step(tiny(**changes), batch=batch, noise=noise)
    swapped = batch._replace(images=batch.images[:, [1, 0, 2]], boxes=batch.boxes[:, [1, 0]])
    noise = noise.view(8, 2, 2, 16).flip(1).flatten(0, 1)
    others, gradients = one_step(tiny(**changes), batch=swapped, noise=noise)
    assert others == pytest.approx(numbers, abs=1e-5)
    assert (gradients - expected).norm() < 1e-5 * expected.norm()

def test_embeddings_count_as_much_as_the_run_has_progressed():
    visual = random_clip(tiny()).visual
    images = torch.stack([evaluate.preprocess(scene(i), 16) for i in range(8)])
    noise = rand(8, 2, 16)
    for progress in (0.2, 0.8):
        keep, _ = clip_pgs.choose_patches(tiny(), visual, None, images, noise, progress)
        expected, _ = make_mask("pgs", images, (0.5,), patch_size=4, noise=noise, alpha=progress,
                                embeddings=visual.patch_tokens(images))
        assert keep.equal(expected)

def test_grad_clip_limits_the_norm_of_the_gradient_and_counts_what_it_was():
    _, expected = one_step(tiny())
    numbers, gradients = one_step(tiny(grad_clip=0.01))
    norm = expected.double().norm()
    assert numbers["grad_norm"] == pytest.approx(norm.item())
    assert gradients.allclose(0.01 * expected / norm, atol=1e-6)

def test_logit_scale_never_exceeds_100():
    clip = CLIP(tiny())
    clip.logit_scale.data.fill_(9.0)
    clip_pgs.update(tiny(), clip, clip_pgs.make_optimizer(tiny(), clip), None, 0.5)
    assert clip.logit_scale.exp().item() == pytest.approx(100)

CARD = torch.device("lazy", 0)
aten = torch.ops.aten

class PlayedCard(FakeTensorMode):
    """Plays a GPU. Tensors on CARD have a shape and a type but no values, those on the CPU are real,
    and to mix the two is an error, as on a GPU. `waits` lists what the CPU waits for: values that it
    reads back, which are ones here, and copies that block. "lazy" is the one device without values
    whose backward pass torch runs without a driver."""
    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self.waits = []

    def __deepcopy__(self, memo):  # a module is copied with its tensors, and they stay on this card
        return self

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if kwargs.get("device") != CARD and not any(isinstance(x, FakeTensor) for x in tensors):
            return func(*args, **kwargs)                                # all of it is on the CPU
        if func is aten._local_scalar_dense.default:
            self.waits.append(func)
            return 1
        if func is aten._to_copy.default:
            target = kwargs.get("device") or args[0].device
            if target != args[0].device and not kwargs.get("non_blocking"):
                self.waits.append(func)
            if target.type == "cpu":
                return torch.ones(args[0].shape, dtype=args[0].dtype)
            if not isinstance(args[0], FakeTensor):
                args = [self.from_tensor(args[0])]
        if func is aten.nonzero.default:
            self.waits.append(func)
            with self:
                return args[0].new_empty(args[0].numel(), args[0].ndim, dtype=torch.int64)
        if func is aten.index.Tensor:
            places = args[1][-1]
            if not isinstance(places, FakeTensor):
                self.waits.append(func)
            elif places.dtype == torch.bool:
                with self:
                    return args[0][places.nonzero()[:, 0]]
        return super().__torch_dispatch__(func, types, args, kwargs)

@pytest.mark.parametrize("waits, changes", [(0, dict(mask=mask)) for mask in MASKS] + [
    (0, dict(accum=2, grad_clip=1.0)), (1, RANGE), (4, RANGE | dict(accum=2, edges=False)),
    (0, dict(mask="attentive", views=2, ema_size=8)), (1, RANGE | dict(views=2)),
    (1, FULL | dict(contrast=("simclr",))), (2, FULL), (2, FULL | dict(accum=2))], ids=str)
def test_a_step_on_a_gpu_mixes_no_devices_and_waits_as_it_says(monkeypatch, tmp_path, waits, changes):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it does not know CARD
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, lr, **_: torch.optim.SGD(groups, lr))
    config = tiny(**changes)
    batch = eight_pairs(config.views)
    with PlayedCard() as card:
        clip, model, optimizer, ema, heads = clip_pgs.build(config, {}, CARD)
        noise = torch.rand(8 * config.views, 2, 16, device=CARD)
        step = step_of(config, heads)
        card.waits.clear()
        _, keep, valid = step(config, clip, model, optimizer, batch, noise, 0.5, ema)
        assert len(card.waits) == waits, card.waits
        images = eight_pairs().images
        evaluate.draw_masks(tmp_path / "masks.png", images, keep, valid, 4)
        image_features = clip.encode_image(data.normalize(images.to(CARD)))
        text_features = clip.encode_text(batch.tokens)
        evaluate.retrieval_metrics(image_features, text_features, torch.arange(8, device=CARD))

@pytest.mark.parametrize("changes", [RANGE, FULL], ids=str)
def test_a_step_in_bf16_is_near_the_same_in_fp32(changes):
    fp32, expected = one_step(tiny(**changes))
    bf16, gradients = one_step(tiny(**changes, precision="bf16"))
    assert bf16["loss"] != fp32["loss"]
    assert bf16["loss"] == pytest.approx(fp32["loss"], rel=0.02)
    assert F.cosine_similarity(gradients, expected, dim=0) > 0.98

def test_attention_cut_by_a_box_of_whole_patches_is_a_slice():
    attention = rand(2, 64)
    boxes = torch.tensor([[0.25, 0.5, 0.75, 1.0]] * 2)
    expected = attention.view(2, 8, 8)[:, 4:, 2:6].flatten(1)
    assert clip_pgs.cut_attention(attention, boxes, 4).allclose(expected, atol=1e-6)

def views_of(folder, image):
    """Two views and the whole around them, (3, 3, 32, 32), and where they lie in it, (2, 4)."""
    members = [("0.png", encoded(image)), ("0.txt", b"coordinates")]
    config = tiny(image_size=32, scale=(0.3, 0.5), views=2)
    batch = batches(folder, members, [[0]], config)[0]
    return batch.images[0], batch.boxes[0]

def test_boxes_say_where_the_views_lie_in_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "augment", lambda view, rng: view)
    x, y = np.meshgrid(np.arange(256), np.arange(256))
    pixels = np.stack([x, y, 0 * x], axis=2)                            # a colour says where it was
    images, boxes = views_of(tmp_path, Image.fromarray(pixels.astype(np.uint8)))
    images = images[:, :2].double().flatten(2)                          # (3, 2, pixels): x and y
    low = images[2].amin(1, keepdim=True)
    high = images[2].amax(1, keepdim=True)
    views = (images[:2] - low) / (high - low)                           # in the whole, from 0 to 1
    corners = torch.cat([views.amin(2), views.amax(2)], dim=1)          # (2, 4) left, top, right, bottom
    assert (boxes - corners).abs().max() < 0.03

def test_the_views_are_augmented_and_the_whole_around_them_is_not(tmp_path, monkeypatch):
    augmented, _ = views_of(tmp_path, scene(0))
    monkeypatch.setattr(data, "augment", lambda view, rng: view)
    plain, _ = views_of(tmp_path, scene(0))
    same = [one.equal(other) for one, other in zip(augmented, plain)]
    assert same == [False, False, True]

STEPS_OF_TWO = [RANGE, RANGE | dict(accum=2), FULL, FULL | dict(accum=2)]

def work_of_a_rank(rank, folder):
    """What two processes do for the tests below; leaves its results in the folder."""
    os.environ["LOCAL_RANK"] = str(rank)  # rank 1 reads the index that rank 0 has made
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    steps = {}
    for changes in STEPS_OF_TWO:
        steps[str(changes)] = one_step(tiny(**changes))
    more = ("--batch-size", 2, "--accum", 2, "--resume", f"{folder}/one/epoch_1.pt", "--out", f"{folder}/two")
    config, state = clip_pgs.parse(options(folder, *more))
    clip_pgs.train(config, state, torch.device("cpu"))
    metrics = evaluate.evaluate(*SMALL_CLIP, f"{folder}/retrieval", workers=1)
    # A picture of rank 1 is broken: both hear of it.
    with pytest.raises(ValueError, match="001.jpg does not decode"):
        evaluate.evaluate(*SMALL_CLIP, f"{folder}/broken", workers=1)
    # Rank 1 alone lacks the folder: both hear of it.
    with pytest.raises(ValueError, match="gone: no such folder"):
        evaluate.evaluate(*SMALL_CLIP, f"{folder}/{('retrieval', 'gone')[rank]}", workers=1)
    torch.save((steps, metrics), f"{folder}/rank_{rank}.pt")
    os._exit(0)  # as main does

@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """A folder with the work of one process (`one`) and of two: gradients, runs, metrics."""
    folder = tmp_path_factory.mktemp("two_ranks")
    draw_shards(folder)
    val = make_folder(folder / "val", labelled(7))
    samples = []
    for i in range(16):
        captions = f"{i} a\n{i} b"[:3 + i]  # one of the first two, two of the others
        samples.append({"jpg": noise_image(i), "txt": captions.encode()})
    make_folder(folder / "retrieval", samples, kind="retrieval")
    samples[1]["jpg"] = b"no picture"
    make_folder(folder / "broken", samples[:2], kind="retrieval")
    command(*options(folder, "--out", folder / "one", "--keep-epochs", "--val", val))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(work_of_a_rank, (str(folder),), nprocs=2)
    return folder

@pytest.mark.parametrize("changes", STEPS_OF_TWO, ids=str)
def test_two_ranks_give_the_loss_and_gradients_of_one_with_both_batches(two_ranks, changes):
    one, expected = one_step(tiny(**changes | dict(accum=1)))
    for rank in (0, 1):
        steps, _ = torch.load(two_ranks / f"rank_{rank}.pt")
        numbers, gradients = steps[str(changes)]
        assert numbers["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert gradients.allclose(expected, atol=1e-5)

def test_a_run_of_one_rank_goes_on_with_two_and_with_its_folders(two_ranks):
    one = read_log(two_ranks / "one")[5:]
    two = read_log(two_ranks / "two")
    assert len(two) == len(one)
    for ours, theirs in zip(two, one):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours.get("eval") == theirs.get("eval")
    assert "eval" in one[-1]

# -----------------------------------------------------------------------------
# The run, and pictures of masks.

SMALL = "--model tiny --image-size 16 --patch-size 4 --batch-size 8 --workers 0".split()

def options(folder, *more):
    """The command line of a tiny run: 5 steps an epoch, 10 in all."""
    short = "--context-length 12 --vocab-size 600 --epochs 2".split()
    return ["--data", f"{folder}/*.tar", *SMALL, *short, *map(str, more)]

def read_log(folder):
    """The records of a log without the speed, which differs from run to run."""
    records = []
    for line in (folder / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        record.pop("images_per_s", None)
        records.append(record)
    return records

def outcome(module, arguments):
    """Exit status and errors of `python module.py arguments`, in this process, which keeps its
    command line and its signals."""
    errors = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(errors):
        patch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        patch.setattr(signal, "signal", lambda *_: None)
        try:
            status = module.main() or 0
        except SystemExit as stopped:  # Python would print its line
            errors.write(f"{stopped.code}\n")
            status = 1
    return status, errors.getvalue()

def command(*arguments, module=clip_pgs, fails=""):
    """`python clip_pgs.py arguments`: must work, or end in an error line with the pattern `fails`."""
    status, errors = outcome(module, arguments)
    print(errors, file=sys.stderr, end="")
    if fails:
        assert status == 1
        assert re.search(rf"error: [^\n]*{fails}[^\n]*\n$", errors), errors
    else:
        assert status == 0, errors

@pytest.fixture
def out(tmp_path):
    """Where `train` writes."""
    return tmp_path / "out"

@pytest.fixture
def train(tmp_path):
    """train(options, out=folder, fails=pattern): a tiny run on 40 pairs; returns its log."""
    draw_shards(tmp_path)

    def run(*more, out="out", fails=""):
        command(*options(tmp_path, "--out", tmp_path / out, *more), fails=fails)
        if not fails:
            return read_log(tmp_path / out)
    return run

def test_a_run_leaves_a_log_a_checkpoint_and_pictures(train, out):
    log = train()
    assert [record["step"] for record in log] == list(range(1, 11))
    assert [record["epoch"] for record in log] == [1] * 5 + [2] * 5
    assert log[0].keys() == {"step", "epoch", "loss", "lr", "logit_scale", "kept"}
    assert (out / "log.jsonl").read_text().count('"images_per_s": ') == 10
    files = " ".join(sorted(os.listdir(out)))
    assert re.sub(r"-\w{8}", "", files) == ".lock ckpt.pt curves.png index.json index.npy log.jsonl masks.png"
    assert torch.load(out / "ckpt.pt")["step"] == 10

def test_a_run_says_what_it_does_and_what_to_do_next(train, capsys):
    train()
    printed = capsys.readouterr().out
    assert "8 of 16 patches removed" in printed
    assert "python evaluate.py" in printed.splitlines()[-1]

def test_the_same_seed_gives_the_same_losses_to_the_last_digit_with_any_number_of_workers(train):
    first = train("--seed", 1)
    assert train("--seed", 1, "--workers", 2, out="again") == first
    assert train("--seed", 2, out="other") != first

@pytest.mark.parametrize("more", ["--text-tokens 4", "--mask attentive --views 2 --contrast simclr byol"])
def test_a_run_goes_on_from_an_epoch_s_end_as_if_it_had_never_stopped(train, tmp_path, out, more):
    whole = train(*more.split(), "--keep-epochs", "--workers", 1, "--ratio", 0.3, 0.5)
    command("--resume", out / "epoch_1.pt", "--workers", 0, "--out", tmp_path / "rest")
    assert read_log(tmp_path / "rest") == whole[5:]

def test_a_run_killed_before_its_evaluation_makes_up_for_it_and_drops_damaged_lines(train, out, pets, capsys):
    whole = train("--val", pets, pets)
    assert "eval" in whole[-1]
    log = out / "log.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join([*lines[:-1], "\0\0\0", "", "{}", '{"step": null}']))
    assert train("--resume") == whole
    assert "4 damaged lines" in capsys.readouterr().out
    assert train("--resume") == whole  # nothing is left to do but to evaluate

def test_an_evaluation_in_the_middle_of_an_epoch_stays_in_the_log(train, pets):
    train("--val", pets, "--steps", 3)
    log = train("--steps", 6, "--resume")
    assert [record["step"] for record in log if "eval" in record] == [3, 5, 6]

def test_the_teachers_of_a_run_follow_what_it_trains(train, out):
    train("--steps", 1, *"--mask attentive --views 2 --contrast byol".split())
    state = torch.load(out / "ckpt.pt")
    _, _, _, ema, heads = clip_pgs.build(Config(**state["config"]), {}, "cpu")      # as they began
    assert not state["ema"]["proj"].equal(ema.proj)
    assert not state["heads"]["teacher.0.weight"].equal(heads.teacher[0].weight)

def test_training_learns_its_pairs_by_heart(train):
    log = train("--epochs", 20, "--lr", 0.003, "--mask", "none", "--scale", 1, 1)
    assert np.mean([record["loss"] for record in log[-5:]]) < 1         # chance: log(8) = 2.1

@pytest.mark.parametrize("more, whole", [("--unmasked-epochs 0.6", 3), ("--unmasked-epochs 9 --steps 5", 2)])
def test_the_last_epochs_can_see_whole_images_but_no_more_than_half_of_the_run(train, more, whole):
    kept = [record["kept"] for record in train(*more.split())]
    assert kept == [0.5] * (len(kept) - whole) + [1.0] * whole

def test_a_loss_that_is_not_finite_stops_the_run_and_no_checkpoint_holds_it(train, out):
    train("--lr", 1e30, "--save-every", 1, fails="step 2: the loss is nan")
    assert torch.load(out / "ckpt.pt")["step"] == 1

@pytest.mark.parametrize("more, says", [
    ("--batch-size 4", "--resume .*had 8 images per step.*now there are 4"),
    ("--image-size 32", "--image-size 32: the run that goes on has 16, which cannot change")])
def test_resuming_needs_the_same_images_per_step_and_size_of_the_model(train, more, says):
    train("--steps", 3)
    train(*more.split(), "--resume", fails=says)

def test_resuming_needs_the_same_samples(train, tmp_path):
    train("--steps", 3)
    write_shard(tmp_path / "1.tar", pairs(range(20, 36)))  # one in ten is gone: another order
    train("--resume", fails="--resume .*had 40 samples, now there are 36")

def test_a_run_may_go_on_with_another_mask_in_more_passes_for_more_steps(train):
    train("--steps", 3)
    log = train("--steps", 5, "--batch-size", 4, "--accum", 2, "--mask", "attentive", "--resume")
    assert len(log) == 5

def test_broken_samples_are_skipped_and_counted(train, tmp_path, capsys):
    draw_shards(tmp_path, broken=(7, 33))
    train("--epochs", 1)
    printed = capsys.readouterr().out
    assert printed.count("2 of 40 samples skipped") == 1
    assert printed.count("  2  cannot identify image file") == 1

def test_a_run_that_stopped_amid_an_epoch_goes_on_past_as_many_broken_samples(train, tmp_path):
    draw_shards(tmp_path, broken=(7, 33))
    train("--max-bad", 0.05, "--steps", 1)
    assert len(train("--max-bad", 0.05, "--steps", 5, "--resume")) == 5

@pytest.mark.parametrize("broken, most, says, steps", [
    (20, 0.1, "20 of 40 samples skipped[^$]*20  cannot identify image[^$]*--max-bad 0.1", 4),
    (40, 1, "8 of 8 samples skipped[^$]*8  cannot identify image[^$]*a batch without a pair", 0),
    (40, "1 --views 2 --contrast simclr", "8 of 8 samples skipped[^$]*a batch without a pair", 0)])
def test_too_many_broken_samples_stop_a_run_before_its_checkpoint(
        train, tmp_path, out, broken, most, says, steps):
    draw_shards(tmp_path, broken=range(broken))
    train("--max-bad", *str(most).split(), fails=says)
    assert not (out / "ckpt.pt").exists()
    assert len(read_log(out)) == steps

def test_a_fresh_start_never_overwrites_a_run(train, tmp_path, out):
    train("--steps", 3, "--mask", "random")
    before = (out / "ckpt.pt").read_bytes()
    holds = r"holds a run \(mask random, step 3\).*--resume.*--out"
    train(fails=holds)
    train("--steps", 1, out="other")
    train("--resume", tmp_path / "other" / "ckpt.pt", fails=holds)
    assert (out / "ckpt.pt").read_bytes() == before

def test_a_fresh_start_never_overwrites_weights_that_are_no_run_s(train, tmp_path):
    torch.save({"config": {}}, tmp_path / "ckpt.pt")
    train(out=".", fails="--out .*: holds a ckpt.pt; ")

def test_a_second_process_in_the_same_folder_notices_the_first(train, tmp_path, out):
    train("--steps", 3, "--model", "demo")
    with open(out / ".lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        second = started(tmp_path, "--out", out, "--resume")
        _, errors = second.communicate(timeout=60)
    assert second.returncode == 1
    assert "another process trains there" in errors
    assert "Traceback" not in errors

def test_a_disk_without_locks_is_named_and_does_not_end_the_training(train, monkeypatch, capsys):
    monkeypatch.setattr(fcntl, "lockf", broken_disk)
    train("--steps", 1)
    assert "its disk cannot lock files" in capsys.readouterr().out

def test_a_run_at_its_end_that_goes_on_in_another_folder_has_its_checkpoint_there(train, tmp_path, out):
    train("--steps", 2)
    train("--steps", 2, "--resume", out / "ckpt.pt", out="other")
    assert torch.load(tmp_path / "other" / "ckpt.pt")["step"] == 2

def test_a_folder_that_fails_is_named_and_does_not_end_the_training(tmp_path, pets, capsys):
    draw_shards(tmp_path)
    bad = make_folder(tmp_path / "bad", [*labelled(1), dict(jpg=b"no picture", cls=b"1")])
    status, _ = outcome(clip_pgs, options(tmp_path, "--out", tmp_path, "--val", bad, pets))
    assert status == 1
    assert len(read_log(tmp_path)) == 10 + 2                            # steps and evaluations
    printed = capsys.readouterr().out
    assert f"| {bad}" in printed
    assert "001.jpg does not decode" in printed
    assert "wrote" in printed

def test_init_starts_from_weights_with_a_new_optimizer_and_another_image_size(train, tmp_path, out):
    train("--steps", 3)
    train("--init", out / "ckpt.pt", "--image-size", 32, "--lr", 0, "--steps", 2, out="fine")
    old = torch.load(out / "ckpt.pt")
    new = torch.load(tmp_path / "fine" / "ckpt.pt")
    assert new["step"] == 2
    assert new["merges"] == old["merges"]
    name = "visual.positional_embedding"
    grid = old["model"].pop(name)[1:].T.view(1, -1, 4, 4)
    grid = F.interpolate(grid, (8, 8), mode="bicubic", antialias=True)
    assert new["model"][name][1:].equal(grid.flatten(2)[0].T)
    for name, x in old["model"].items():
        assert new["model"][name].equal(x)

def test_slurm_tasks_without_torchrun_are_told_to_use_it(train, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "8")
    train(fails="SLURM_NTASKS.*torchrun")

ONE_THREAD = dict(cwd=HERE, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True)
LONG = ("--epochs", 6, "--save-every", 3, "--mask", "attentive", "--workers", 1)        # 30 steps

def started(folder, *more, stdout=subprocess.DEVNULL):
    """`python clip_pgs.py` in another process, which the demo model keeps busy for some seconds."""
    arguments = options(folder, "--model", "demo", "--out", folder / "out", *more)
    return subprocess.Popen([sys.executable, "clip_pgs.py", *arguments],
                            stderr=subprocess.PIPE, stdout=stdout, **ONE_THREAD)

@pytest.mark.parametrize("number, status, says", [
    (signal.SIGKILL, -9, ""),
    (signal.SIGUSR1, 1, "stopped after step {} of 30; go on with --resume {}/ckpt.pt\n")])
def test_a_run_ended_by_a_signal_goes_on_as_if_it_had_never_stopped(
        train, tmp_path, out, number, status, says):
    whole = train("--model", "demo", *LONG, out="whole")
    log = out / "log.jsonl"
    process = started(tmp_path, *LONG)
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 7):
        time.sleep(0.002)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    steps = log.read_text().count("\n")
    assert steps < 30
    assert process.returncode == status
    assert errors.endswith(says.format(steps, out))
    assert "Traceback" not in errors or number == signal.SIGKILL  # whose worker may miss its parent
    command("--resume", "--out", out)
    assert read_log(out) == whole

def test_a_request_to_stop_is_heard_from_schedulers_and_closed_terminals(monkeypatch):
    heard = set()
    monkeypatch.setattr(signal, "signal", lambda number, _: heard.add(number.name))
    data.hear_signals(print)
    assert heard >= {"SIGINT", "SIGTERM", "SIGQUIT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"}
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_IGN)  # by nohup, and by sh's `&`
    heard.clear()
    data.hear_signals(print)
    assert "SIGINT" in heard and "SIGHUP" not in heard

def test_training_goes_on_when_nobody_reads_its_output(train, tmp_path, out):
    whole = train("--model", "demo", out="whole")
    process = started(tmp_path, stdout=subprocess.PIPE)
    process.stdout.close()                                              # as `| head -1` does
    process.stderr.close()
    assert process.wait(timeout=60) == 0 and read_log(out) == whole

def test_weights_that_are_not_finite_are_not_kept(train, out, monkeypatch):
    train("--steps", 2)
    before = (out / "ckpt.pt").read_bytes()
    update = clip_pgs.update

    def diverge(config, clip, *more):
        update(config, clip, *more)
        with torch.no_grad():
            clip.text_projection[0] = math.nan
    monkeypatch.setattr(clip_pgs, "update", diverge)
    train("--steps", 3, "--resume", fails="step 3: the weights are not finite")
    assert (out / "ckpt.pt").read_bytes() == before

def test_a_disk_that_does_not_take_the_log_is_named_with_it(train, monkeypatch):
    log = io.StringIO()
    log.name = "out/log.jsonl"
    log.write = broken_disk
    monkeypatch.setattr(clip_pgs, "open_log", lambda *_: log)
    train(fails="out/log.jsonl: Input/output error")

def test_resuming_a_run_that_is_longer_is_refused_and_leaves_its_log(train, out):
    before = train("--steps", 4)
    train("--steps", 2, "--resume", fails="step 4 is done, 2 were asked for")
    assert read_log(out) == before

def test_a_resumed_run_says_what_differs(train, tmp_path, capsys):
    train("--steps", 3)
    train("--steps", 5, "--lr", 0.1, "--resume")
    printed = capsys.readouterr().out
    assert "going on after step 3" in printed and "--lr 0.1 (was 0.001)" in printed
    train("--steps", 5, "--resume", out="new")
    assert f"no checkpoint in {tmp_path}/new: a new run" in capsys.readouterr().out

@pytest.mark.parametrize("more", ["--init x.pt", "--vocab x.gz", "--vocab-size 520", "--contrast byol"])
def test_what_cannot_take_effect_on_a_resumed_run_is_refused(train, more):
    train("--steps", 2)
    option = more.split()[0]
    train(*more.split(), "--steps", 4, "--resume", fails=f"{option} .*: the run that goes on has .*, which")

def test_epochs_cannot_take_effect_on_a_run_that_counts_steps(train):
    train("--steps", 2)
    train("--epochs", 9, "--resume", fails="--epochs 9: the run's --steps decides; pass --steps 0")

def test_a_resumed_run_takes_a_new_weight_decay(train, out):
    train("--steps", 2)
    train("--steps", 3, "--weight-decay", 0.7, "--resume")
    groups = torch.load(out / "ckpt.pt")["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.7, 0.0]

def test_ranks_with_other_checkpoints_or_folders_are_refused(pets, tmp_path, monkeypatch):
    given = []

    def gather(everyone, mine):  # rank 0 gives what was given first
        given.append(mine)
        everyone[:] = [given[0], mine]
    monkeypatch.setattr(clip_pgs, "ranks", lambda: (0, 2))
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)

    def agree(state=(), val=pets):
        clip_pgs.check_ranks_agree(tiny(val=(val,)), dict(state), np.zeros(3, data.INDEX), "")
    agree()
    with pytest.raises(ValueError, match="steps done: 21 on rank 1, 0 on rank 0; all machines need the same"):
        agree({"step": 21})
    with pytest.raises(ValueError, match="checksum of the weights"):
        agree({"model": {"w": torch.ones(2)}})
    with pytest.raises(ValueError, match="checksum of --val"):
        agree(val=make_folder(tmp_path / "other", labelled(4)))

@pytest.mark.parametrize("more", [
    "--unmasked-epochs 1",
    "--ratio 0.25 0.75",
    "--mask attentive --views 2 --contrast simclr byol --unmasked-epochs 1"])
def test_a_rehearsal_changes_nothing(train, monkeypatch, more):
    """The step that needs most memory, which a small card is to refuse at once, not at the end."""
    whole = train(*more.split())
    take_step = clip_pgs.take_step
    rehearsed = []
    no_update = torch.optim.SGD.step  # with a learning rate of 0
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: rehearsed.append(no_update(self)))

    def rehearse_and_take_step(run, batch):
        clip_pgs.rehearse(run, batch)
        return take_step(run, batch)
    monkeypatch.setattr(clip_pgs, "take_step", rehearse_and_take_step)
    assert train(*more.split(), out="again") == whole
    assert len(rehearsed) == 10

def test_a_rank_that_fails_alone_brings_the_run_down_with_its_message(tmp_path):
    draw_shards(tmp_path)
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node 2 clip_pgs.py".split()
    arguments = options(tmp_path, "--model", "demo", *LONG, "--out", tmp_path)

    def allow_small_files_only():  # rank 0's checkpoint is larger; rank 1 writes none and goes on
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    run = subprocess.run([sys.executable, *torchrun, *arguments], preexec_fn=allow_small_files_only,
                         timeout=60, capture_output=True, **ONE_THREAD)
    assert run.returncode == 1
    assert f"error: {tmp_path}/ckpt.pt: " in run.stderr

@pytest.mark.parametrize("name, value", [("LOCAL_WORLD_SIZE", "2"), ("LOCAL_RANK", "1")])
def test_each_of_too_many_processes_for_the_gpus_says_so(monkeypatch, name, value):
    """Rank 0 knows it from torchrun's LOCAL_WORLD_SIZE: it would wait for the others until torchrun
    kills it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv(name, value)
    command("--model", "demo", fails="--nproc_per_node 2: [^\n]*GPUs here: 1")

@pytest.mark.parametrize("arguments, says", [
    ("--data a.tar", "a.tar: no such file"), ("--data {3..1}.tar", "tar: no such file"),
    ("--data .", "a folder"), ("--batch-size 9", "9 images per step, but only 8 samples"),
    ("--val nowhere", "nowhere: no such folder"), ("--val demo/seen", "demo/seen: no such folder"),
    ("--resume good.tar", "good.tar: refused"),
    ("--vocab good.tar", "--vocab good.tar: [^\n]*not CLIP"), ("--vocab three.gz", "--vocab three.gz: "),
    ("--show-masks good.tar", "good.tar: cannot identify image file")])
def test_bad_input_ends_in_one_clear_line_and_exit_status_1(tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    write_shard("good.tar", pairs(range(8)))
    (tmp_path / "three.gz").write_bytes(gzip.compress(b"version\nthree words here\n"))
    command("--data", "good.tar", *SMALL, *arguments.split(), fails=says)

@pytest.mark.parametrize("encoder", ["new", "--resume", "--init"])
def test_masks_are_shown_of_photographs_of_any_mode_also_by_a_trained_encoder(train, tmp_path, out, encoder):
    photos = [tmp_path / "palette.png", tmp_path / "cmyk.jpg"]
    scene(0).convert("P").save(photos[0])
    scene(0).convert("CMYK").save(photos[1])
    more = SMALL
    if encoder != "new":
        train("--mask", "attentive", "--steps", 2)
        more = (encoder, out / "ckpt.pt")
    command("--show-masks", *photos, *more, "--out", tmp_path / "shown")
    # Two rows of photograph, edges, attention and five masks, a line of text below each.
    assert Image.open(tmp_path / "shown" / "masks.png").size == ((len(MASKS) + 2) * 176, 2 * 191)

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
    ("truncated, the", 4, WHOLE[:8192]),
    ("more than zeros", 2, WHOLE[:4096] + bytes(512) + WHOLE[4608:]),
    ("damaged header", 2, WHOLE[:4096] + b"?" * 512 + WHOLE[4608:]),
    ("two tars in one", 4, WHOLE + WHOLE),
    ("a tar without samples", 0, bytes(10240)),
    ("empty file, not a tar", 0, b""),
    ("not a tar", 0, b"hello " * 500),
    ("git lfs pull", 0, LFS),
    ("compressed: unpack it", 0, gzip.compress(WHOLE)),
], ids=range(10))
def test_a_damaged_tar_is_named_with_its_fault_and_gives_what_stands_before_it(tmp_path, says, complete, raw):
    path = tmp_path / "0.tar"
    path.write_bytes(raw)
    samples, fault = data.tar_samples(str(path))
    assert fault.startswith(f"{path}: ") and says in fault
    assert [key for key, files in samples if len(files) == 2] == [*"0123"[:complete]]

def test_a_disk_that_fails_while_a_tar_is_read_is_an_error_that_names_it(tmp_path, monkeypatch):
    path = write_shard(tmp_path / "0.tar", pairs([0]))
    monkeypatch.setattr(tarfile.TarFile, "next", broken_disk)
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

    kept, = tmp_path.glob("index-*.npy")
    np.save(kept, index[1:])  # other than the shards: it is read
    assert captions_now() == ([caption_of(i) for i in (1, 2, 3)], True)
    kept.write_bytes(b"damaged")
    assert captions_now() == ([caption_of(i) for i in (0, 1, 2, 3)], False)
    write_shard(shards[0], pairs([7]))
    assert captions_now() == ([caption_of(i) for i in (7, 2, 3)], False)
    assert len([*tmp_path.glob("index-*.npy")]) == 2  # the first may be another machine's

def test_an_epoch_shuffles_all_samples_and_yet_reads_its_shards_nearly_one_after_the_other(monkeypatch):
    monkeypatch.setattr(data, "WINDOW", 10)
    index = np.zeros(5000, data.INDEX)
    index["shard"] = np.arange(5000) // 100
    order = data.epoch_order(index, seed=3, epoch=2)
    assert sorted(order.tolist()) == list(range(5000))
    assert (np.diff(order) != 1).mean() > 0.5
    assert (order != data.epoch_order(index, 3, 1)).any()
    shards = index["shard"][order].reshape(50, 100)
    middles = shards[:, 10:90]  # the ends mix with their neighbours
    assert (middles == middles[:, :1]).all()
    assert (np.diff(middles[:, 0]) < 0).any()  # and the shards come in any order

@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_images_of_the_known_formats_decode(format):
    with data.open_image(encoded(Image.new("RGB", (30, 20), "red"), format)) as image:
        assert data.to_rgb(image).getpixel((29, 19))[0] > 250

@pytest.mark.parametrize("says, raw", [
    ("truncated", encoded(scene(0), "JPEG")[:-300]),
    ("cannot identify", encoded(scene(0), "EPS")),
    ("9000x9000 pixels", encoded(Image.new("1", (9000, 9000)))),
], ids=["cut", "EPS", "bomb"])
def test_what_is_no_whole_picture_of_a_known_format_is_a_value_error(says, raw):
    with pytest.raises(ValueError, match=f"^[^\n]*{says}[^\n]*$") as error, data.open_image(raw) as image:
        data.to_rgb(image)
    assert " at 0x" not in str(error.value)  # no address: causes can be counted

def test_a_bug_while_a_picture_is_open_is_not_taken_for_a_damaged_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "upright", None)  # a call of it is a TypeError
    with pytest.raises(TypeError):
        batches(tmp_path)[0]

def test_the_pixels_of_a_png_do_not_depend_on_its_texts_and_profiles():
    info = PngImagePlugin.PngInfo()                                     # each is more than Pillow accepts
    info.add_text("a", "x" * 65 * 2 ** 20)
    info.add_text("b", "x" * 3 * 2 ** 20, zip=True)
    info.add_itxt("c", "x" * 3 * 2 ** 20, zip=True)
    image = Image.open(io.BytesIO(noise_image()))
    raw = encoded(image, pnginfo=info, icc_profile=bytes(3 * 2 ** 20))
    with data.open_image(raw) as again:
        assert data.to_rgb(again).tobytes() == image.tobytes()

@pytest.mark.parametrize("dtype, scale", [("uint16", 257), ("float32", 257), ("int32", 1)])
def test_greys_of_more_than_8_bits_keep_their_upper_8(dtype, scale):
    grey = np.arange(256).reshape(16, 16)
    image = Image.fromarray((grey * scale).astype(dtype))  # of mode I;16, I or F
    assert (np.asarray(data.to_rgb(image)) == grey[..., None]).all()
    assert (evaluate.resize_and_crop(image, 16).numpy() == grey).all()

@pytest.mark.parametrize("palette", [False, True])
def test_transparent_parts_lie_on_white_in_training(palette):
    image = Image.new("RGBA", (2, 1))                                   # transparent black, then black
    image.putpixel((1, 0), (0, 0, 0, 255))
    if palette:
        image = image.quantize(2)
    with data.open_image(encoded(image)) as image:
        seen = data.crops(image, np.array([[0, 0, 2, 1]]), 2)
    assert (seen == torch.tensor([255, 0])).all()

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

def test_a_sample_has_the_same_crop_in_any_batch_and_another_in_another_epoch(tmp_path):
    first = batches(tmp_path, order=((0, 1, 2),))[0].images
    assert batches(tmp_path, order=((3, 2), (2, 0)))[1].images.equal(first[[2, 0]])
    assert not batches(tmp_path, order=((0, 1, 2),), epoch=1)[0].images.equal(first)

def test_a_disk_that_fails_is_a_fault_and_not_a_lost_sample(tmp_path, monkeypatch):
    made = batches(tmp_path)
    monkeypatch.setattr(os, "pread", broken_disk)
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
    assert made[0].lost == []
    assert made[0].fault == f"{tmp_path}/0.tar: Input/output error"

def test_a_disk_that_was_away_for_a_moment_is_read_again(tmp_path, monkeypatch):
    made = batches(tmp_path)
    whole = made[0]
    pread = os.pread

    def come_back(seconds):
        monkeypatch.setattr(os, "pread", pread)
    monkeypatch.setattr(os, "pread", broken_disk)
    monkeypatch.setattr(data.time, "sleep", come_back)
    assert made[0].fault == ""
    assert made[0].images.equal(whole.images)

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
    ("txt", b"\xff"), ("txt", b"\0\1")], ids=range(6))
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
    pack(tmp_path, "0.x.PNG\tnew\n", fails="is there already")
    pack(tmp_path / "out", "\n", fails="list.tsv: no line in it")
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
    ("0.png\t\udce4", "utf-8"),
    ("gone.png\tx", "No such file"),
    ("list.tsv\tx", "not one of webp")])
def test_a_bad_line_of_the_list_is_named_by_its_number_before_work_starts(tmp_path, monkeypatch, line, says):
    (tmp_path / "0.png").write_bytes(noise_image())
    monkeypatch.setattr(data, "write_shards", None)
    pack(tmp_path, f"0.png\tfine\n{line}\n0.png\tfine\n", fails=f"list.tsv, line 2: .*{says}")
    assert sorted(os.listdir(tmp_path)) == ["0.png", "list.tsv"]

def test_where_the_disk_fails_pack_ends_in_one_line_and_no_file_is_left_half_written(tmp_path, monkeypatch):
    (tmp_path / "0.png").write_bytes(noise_image())
    monkeypatch.setattr(os, "fsync", broken_disk)
    pack(tmp_path, "0.png\tfine\n", fails=r"00000.tar: could not be written \(Input")
    with pytest.raises(OSError), data.write_whole(str(tmp_path / "0.png")) as file:
        file.write(b"another")
    with pytest.raises(OSError, match="not a plain file"), data.write_whole(tmp_path):
        pass
    assert sorted(os.listdir(tmp_path)) == ["0.png", "list.tsv"]
    assert (tmp_path / "0.png").read_bytes() == noise_image()

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

def test_a_folder_called_demo_without_demo_data_is_named(tmp_path):
    command("demo", tmp_path, module=data, fails="is there already, but without demo data")

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
    assert not os.path.exists(f"{demo}/seen/classnames.txt")

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
    ("line 2 is blank", {"templates": "a {c}\n\nthe {c}"}), ("line 1 is blank", {"classnames": "\n"}),
    ("expected retrieval or", {"kind": "captions"})])
def test_a_broken_folder_is_named_with_what_is_wrong(tmp_path, message, broken):
    folder = make_folder(tmp_path / "f", labelled(3), **broken)
    with pytest.raises(ValueError, match=f"^{folder}[^\n]*{re.escape(message)}"):
        evaluate.read_folder(folder)

def test_evaluation_reads_equal_keys_byte_order_marks_and_u_fffd(tmp_path):
    folder = make_folder(tmp_path / "f", [], shards="\ufeff1", kind="\ufeffretrieval")
    marked = [("9.png", b""), ("9.txt", "\ufeffwhat\ufffd".encode())]
    members = [*pairs([0, 1]), *marked, *pairs([0])]
    write_shard(f"{folder}/test/0.tar", members)
    Path(f"{folder}/test/._0.tar").touch()                              # macOS's
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
    names = ["cat", "dog", "", "owl"]
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
    expected = {"acc1": np.mean(hits), "mean_per_class_recall": recall}
    assert metrics == pytest.approx(expected)

def test_acc5_counts_a_true_class_among_the_five_best_of_six():
    scores = torch.arange(6.0).repeat(3, 1)                             # class 0 is the worst of all
    metrics = evaluate.classification_metrics(scores, torch.tensor([0, 1, 5]))
    assert metrics["acc5"] == pytest.approx(2 / 3)

def test_a_folder_without_acc5_does_not_count_in_its_average():
    table = evaluate.table({"few": {"acc1": 0.5}, "many": {"acc1": 0.7, "acc5": 0.9}})
    assert table.splitlines()[-1].split() == ["|", "average", "|", "60.00", "|", "90.00", "|"]

def test_retrieval_finds_an_image_if_fewer_than_k_are_nearer_and_a_caption_if_any_of_its_own_is_found():
    owner = torch.arange(30).repeat_interleave(torch.arange(30) % 7 + 1)
    images = F.normalize(randn(30, 8), dim=-1)
    noise = randn(len(owner), 8, seed=1)
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
    x = randn(9000, 4)                        # three pieces
    y = torch.arange(9000) % 3
    weights = evaluate.fit_logistic(x, y, torch.zeros(3, 5).double(), C=2e-3).requires_grad_()
    logits = x.double() @ weights[:, :4].T + weights[:, 4]
    penalty = weights[:, :4].square().sum() / 2
    loss = 2e-3 * F.cross_entropy(logits, y, reduction="sum") + penalty # scikit-learn's objective
    assert torch.autograd.grad(loss, weights)[0].abs().max() < 2e-4

def test_a_linear_probe_learns_what_is_linear():
    features = F.normalize(randn(300, 6), dim=-1)
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
        evaluate.collect(SMALL_CLIP[0], features, 3)

def test_removed_patches_are_grey_and_slots_that_are_not_valid_hold_removed_ones():
    images = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    keep = torch.tensor([[3, 0], [1, 2]])                               # of a batch, of which we show one
    seen = evaluate.hide_removed(images, keep, torch.tensor([[True, False], [True, True]]), 2)
    expected = torch.full((4, 4), 128)
    expected[2:, 2:] = 0
    assert seen[0, 0].equal(expected.byte())

@pytest.mark.parametrize("patch_size", [2, 16])
def test_a_frame_around_a_patch_shows_at_any_size(patch_size):
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    framed = evaluate.frame_patches(image, torch.tensor([1]), patch_size)
    assert framed[1, 0, patch_size] == 255 and framed[1, 0, patch_size - 1] == 0

def test_of_paths_as_many_last_parts_are_shown_as_tell_them_apart():
    assert evaluate.tell_apart(["x/val/", "y/test", "y/test"]) == {"x/val/": "val", "y/test": "test"}
    assert evaluate.tell_apart(["a/x/val", "b/x/val"]) == {"a/x/val": "a/x/val", "b/x/val": "b/x/val"}

def test_curves_show_losses_and_metrics_of_several_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for run, top in {"a": 1.0, "b": 0.5}.items():
        os.mkdir(run)
        lines = []
        for i in range(101):
            results = {"pets": {"acc1": top * i / 100}}
            lines.append(json.dumps({"step": i, "epoch": i, "loss": 5 - top * i / 50, "eval": results}))
        Path(run, "log.jsonl").write_text("\n".join(lines))
    command("--curves", "a/log.jsonl", "b/log.jsonl", module=evaluate)
    assert "| a |    100.00 |" in capsys.readouterr().out
    pixels = np.asarray(Image.open("curves.png")).astype(int)
    for left in (51, 471):                                              # coloured curves across both panels
        colour = np.ptp(pixels[41:290, left:left + 349], axis=-1)
        assert (colour > 120).any(0).mean() > 0.9
    (tmp_path / "empty.jsonl").write_text("\0\0")
    command("--curves", "empty.jsonl", module=evaluate, fails="empty.jsonl: no training step in it")

def test_curves_tell_the_folders_of_several_runs_apart(tmp_path):
    for run in ("a", "b"):
        record = {"step": 1, "epoch": 1, "loss": 2, "eval": {f"{run}/val": {"acc1": 0.5}}}
        (tmp_path / run).write_text(json.dumps(record))
    last = evaluate.draw_curves(tmp_path / "curves.png", [f"{tmp_path}/a", f"{tmp_path}/b"])
    assert last == {"a": {"a/val acc1": 0.5}, "b": {"b/val acc1": 0.5}}

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

def test_safetensors_of_many_types_are_read_and_one_that_is_not_is_named(tmp_path):
    x = torch.tensor([-1.5, 0.0, 448.0])
    tensors = {"a": x.to(torch.float8_e4m3fn), "b": x > 0, "c": x.to(torch.bfloat16), "d": x.int(),
               "empty": torch.zeros(0, 3), "one": torch.tensor(2.5)}
    types = {"a": "F8_E4M3", "b": "BOOL", "c": "BF16", "d": "I32"}
    (tmp_path / "a.bin").write_bytes(safetensors(tensors, **types))
    read = evaluate.read_checkpoint(f"{tmp_path}/a.bin")
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
        wrapped["logit_bias"] = torch.tensor(-10.0)
        torch.save({"state_dict": wrapped, "lr": np.float64(3), "n": np.int64(7)}, tmp_path / name)
    else:
        sizes = dict.fromkeys(["input_resolution", "context_length", "vocab_size"], torch.tensor(0))
        torch.save(state | sizes, tmp_path / name)
    path = str(tmp_path / name)
    with pytest.raises(ValueError, match="--vocab bpe_simple_vocab_16e6.txt.gz"):
        evaluate.load(path)
    assert ("LAION-400M's ViT-B-32 need --quick-gelu" in capsys.readouterr().err) == (name != "openai.pt")
    model, _, found = evaluate.load(path, write_vocabulary(tmp_path / "vocab.gz"))
    config.quick_gelu = name == "openai.pt"
    assert found == config
    for key, x in model.state_dict().items():
        assert x.allclose(state[key], 0, 1e-3)

class Evil:
    def __reduce__(self):  # a pickle of it makes a folder when it is loaded
        return os.mkdir, ("pwned",)

@pytest.mark.parametrize("name, says, content", [
    ("epoch-3-of-10.pt", "damaged", b"PK\3\4" * 99), ("a.pt", "git lfs pull", LFS),
    ("a.pt", "could run code", pickle.dumps(Evil(), 2)), ("a.pt", "could run code", {"model": Evil()}),
    ("a.pt", "it holds a list", [1, 2]), ("a.pt", "not a CLIP", {"n": 1}),
    ("a.safetensors", "damaged", b"{}" * 9), (".", "Is a directory", None),
    ("model.safetensors.index.json", "weights in several files", b"{}"),
    ("model-00001-of-00002.safetensors", "weights in several files", safetensors({}))], ids=range(10))
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
    """evaluation(options): evaluate.py on a checkpoint of SMALL_CLIP, what it writes to x.json. Its
    model has sizes for a name, as of weights made elsewhere: another process knows no tiny."""
    model, _, config = SMALL_CLIP
    options = vars(config) | {"model": clip_pgs.SIZES["tiny"]}
    checkpoint = {"model": model.state_dict(), "config": options, "merges": ""}
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
    average = 50 * sum(metrics["acc1"] for metrics in results.values())
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"{folders[0]} | acc1: ")
    assert printed[-1].split()[1:4] == ["average", "|", f"{average:.2f}"]
    assert sorted(os.listdir(tmp_path / "pictures")) == ["a__val.png", "b__val.png"]

def test_a_folder_that_fails_is_a_row_and_the_exit_status_is_1(evaluation, tmp_path, capsys):
    bad = make_folder(tmp_path / "bad", [{"jpg": b"no picture", "cls": b"0"}])
    status, _ = outcome(evaluate, [tmp_path / "ckpt.pt", "--data", bad])
    assert status == 1
    assert f"{bad} | failed: {bad}/test/0.tar: " in capsys.readouterr().out

@pytest.mark.parametrize("more, says", [
    ("--probe", "pets/train/nshards.txt: missing"),
    ("--json gone/x.json", "gone/x.json: could not be written .No such file"),
    ("--pictures ckpt.pt", "ckpt.pt: File exists"),
    ("--sugarcrepe . --images .", "replace_obj.json: No such file")])
def test_what_is_missing_is_refused_before_the_first_folder(
        evaluation, pets, tmp_path, monkeypatch, capsys, more, says):
    monkeypatch.chdir(tmp_path)
    evaluation("--data", pets, "--pictures", "mistakes", *more.split(), fails=says)
    assert capsys.readouterr().out == "" and not os.path.exists("mistakes/pets.png")

def test_once_a_stop_is_requested_no_other_folder_is_begun(pets):
    requests = []
    assert len(evaluate.evaluate_all(*SMALL_CLIP, [pets], requests=requests)) == 1
    requests.append(signal.SIGTERM)
    assert evaluate.evaluate_all(*SMALL_CLIP, [pets], requests=requests) == {}

def test_under_torchrun_the_first_process_works_and_says_that_one_is_enough(
        evaluation, pets, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "acc1" in evaluation("--data", pets)[pets]
    assert "call python evaluate.py" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    evaluation("--data", pets)
    assert capsys.readouterr() == ("", "")

def test_evaluation_works_with_its_output_closed_and_without_fcntl_and_pread(evaluation, pets, tmp_path):
    program = """import os, runpy, sys
sys.modules["fcntl"] = None
del os.pread
os.close(1)
os.close(2)
runpy.run_path("evaluate.py", run_name="__main__")"""
    path = tmp_path / "x.json"
    arguments = [tmp_path / "ckpt.pt", "--data", pets, "--json", path]
    assert subprocess.run([sys.executable, "-c", program, *arguments], cwd=HERE).returncode == 0
    assert "acc1" in json.loads(path.read_text())[pets]
