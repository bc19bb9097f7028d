"""Everything between shards on disk and a batch in memory: tar shards, images, captions, tokens.

    python data.py pack captions.tsv OUT     make shards of a list of `image path <TAB> caption`
    python data.py demo OUT                  draw the demo data set
    python data.py bench SHARDS              how many images a core reads, decodes, augments and tokenises a second

The file follows one sample: where it lies in which shard, when it is read, its bytes to pixels, its caption to token
ids, the batch; and last the shards that we write ourselves, the demo's among them.
"""
import argparse
import gc
import glob
import gzip
import heapq
import html
import io
import itertools
import json
import math
import os
import re
import secrets
import shutil
import signal
import struct
import sys
import tarfile
import time
import unicodedata
import zlib
from collections import Counter, defaultdict
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training pixels in [0, 1], RGB; all CLIP weights expect them
STD = (0.26862954, 0.26130258, 0.27577711)


@contextmanager
def appearing(path, part=".part"):
    """A binary file to write, which gets its name only when it is whole and on disk; OSError if it can't be."""
    try:
        with open(path + part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + part, path)
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        os.fsync(folder)  # the new name, too, has to reach the disk
        os.close(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's word for a disk that fills up while it writes
        cause = getattr(error, "strerror", None) or "is the disk full?"
        raise OSError(f"{path}: could not be written ({cause}); one from before, if any, is untouched") from None
    finally:
        if os.path.exists(path + part):
            os.remove(path + part)


# -----------------------------------------------------------------------------
# Shards. A tar is a chain of 512-byte headers, each followed by its file: reading the headers alone tells where
# every image and caption lies. With that index, any sample is one read away and an epoch is a permutation of it.


def expand(patterns):
    """The shard paths that paths, globs and brace ranges such as 'cc12m/{00000..01242}.tar' stand for, in order.

    Raises ValueError for a pattern that matches nothing or a path that is not there.
    """
    paths = []
    for pattern in patterns:
        for path in _braces(pattern):
            if os.path.isdir(path):
                raise ValueError(f"--data {path}: a folder; name the shards in it, such as '{path.rstrip('/')}/*.tar'")
            found = [path] if os.path.exists(path) else sorted(glob.glob(path))
            if not found:
                why = "the pattern matches no file" if glob.has_magic(path) else "no such file"
                raise ValueError(f"--data {path}: {why}")
            paths += found
    return list(dict.fromkeys(paths))  # a shard named twice is read once


def _braces(pattern):
    """'a{00..02}.tar' -> a00.tar, a01.tar, a02.tar; numbers keep their width. Several ranges multiply."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not found:
        return [pattern]
    first, last = found.groups()
    if int(first) > int(last):
        raise ValueError(f"--data {pattern}: the range {found.group()} is empty")
    numbers = (str(n).zfill(len(first)) for n in range(int(first), int(last) + 1))
    heads = (pattern[:found.start()] + number for number in numbers)
    return [path for head in heads for path in _braces(head + pattern[found.end():])]


HEADER = struct.Struct("100s 24x 12s 20x c 100x 6s 82x 155s 12x")  # name, size, kind, magic, prefix; POSIX.1


def tar_members(path):
    """Yields (name, offset, size) of each plain file in a tar; links, devices and folders are passed over.

    Raises ValueError that names the shard where the tar ends too early or something else than a header stands;
    what was yielded before that is whole. Names are only ever used as labels, never as paths on disk.
    """
    total = os.path.getsize(path)
    if total == 0:
        raise ValueError(f"{path}: empty file, not a tar")
    offset, long_name, page, at, end = 0, None, b"", 0, -1  # end: of the last header within the page
    with open(path, "rb", buffering=0) as file:
        while offset + 512 <= total:
            # A data set has tens of millions of headers; reading each by itself would take most of the time. A page
            # nearly always holds a caption's header and the next image's; where headers are close, several are read.
            if offset > end:
                page, at = os.pread(file.fileno(), 65536 if offset < end + 4096 else 4096, offset), offset
                end = at + len(page) - 512
                if end < at:  # the file has shrunk meanwhile
                    break
            name, size, kind, magic, prefix = HEADER.unpack_from(page, offset - at)
            if magic[:5] != b"ustar":
                if not any(page[offset - at:offset - at + 512]):
                    return
                raise ValueError(f"{path}: not a tar (no header at byte {offset})")
            digits = size.strip(b" \0")
            if digits.strip(b"01234567"):  # int() would take a sign: a negative size sends us in circles
                raise ValueError(f"{path}: not a tar (a header without a size, or with one of 8 GiB and more)")
            size = int(digits or b"0", 8)
            start, offset = offset + 512, offset + 512 + (size + 511) // 512 * 512
            if start + size > total:
                break
            if kind in b"0\0":
                name = name.partition(b"\0")[0]
                if magic == b"ustar\0" and prefix[0]:
                    name = prefix.partition(b"\0")[0] + b"/" + name
                yield (long_name or name).decode("utf-8", "replace"), start, size
            long_name = None
            if kind in b"Lx":  # the next member's name is longer than a header holds (GNU's way, POSIX's way)
                text = os.pread(file.fileno(), size, start)
                found = re.search(rb"\d+ path=([^\n]*)\n", text) if kind == b"x" else None
                long_name = text.rstrip(b"\0") if kind == b"L" else found[1] if found else None
    raise ValueError(f"{path}: truncated, the tar breaks off at byte {total}")


def tar_samples(path, samples=None):
    """{key: {extension: (offset, size)}}: the samples of a tar, in its order.

    As in webdataset, the key is what stands before the first dot of the file name. `samples`: a dict to fill, for
    a caller who wants what came before an error. Raises ValueError for a broken tar or one without members.
    """
    samples = {} if samples is None else samples
    for name, offset, size in tar_members(path):
        folder, slash, base = name.rpartition("/")
        key, _, extension = base.partition(".")
        samples.setdefault(folder + slash + key, {})[extension.lower()] = offset, size
    if not samples:
        raise ValueError(f"{path}: a tar without members")
    return samples


INDEX = np.dtype([("shard", "i4"), ("image", "i8"), ("image_size", "i8"),
                  ("text", "i8"), ("text_size", "i8"), ("json", "?")])


def index_shard(path):
    """(rows of INDEX, causes of what is missing, the shard's fault or "") of one shard.

    The fault is an OSError if the shard could not be read: returned, because one raised in a worker would bring the
    worker's traceback along as its text.
    """
    samples, rows, incomplete, fault = {}, [], Counter(), ""
    try:
        tar_samples(path, samples)
        if not any(ext in files for files in samples.values() for ext in IMAGE_EXTENSIONS):
            raise ValueError(f"{path}: no image with a caption inside; expected pairs such as 0001.jpg, 0001.txt")
    except ValueError as error:
        fault = f"{error}; {len(samples)} samples stand before that" if samples else str(error)
    except OSError as error:
        fault = OSError(f"{path}: {error.strerror}")
    for files in samples.values():
        image = next(filter(None, map(files.get, IMAGE_EXTENSIONS)), None)
        text = files.get("txt") or files.get("json")
        if image and text:
            rows.append((0, *image, *text, "txt" not in files))
        else:
            incomplete["no caption" if image else "no image"] += 1
    return np.array(rows, INDEX), incomplete, fault


def ignore_signals(worker):
    """For helper processes: signals to stop are the training loop's to answer, which still needs its batch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # schedulers such as Slurm's send it to every process of a job


def start_scanner(worker):
    """For the processes that scan."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process alone answers a Ctrl-C
    gc.disable()  # would take a quarter of their time and find nothing


def scan(shards, workers=0, progress=False):
    """(N,) array of INDEX rows, Counter of what is missing, list of faults: those of all shards, in their order.

    OSError if a shard cannot be read: the disk's fault, not the shard's, and not to be remembered.
    """
    parts, incomplete, faults = [np.empty(0, INDEX)], Counter(), []
    scans = torch.utils.data.DataLoader(shards, batch_size=None, num_workers=workers, collate_fn=index_shard,
                                        worker_init_fn=start_scanner)  # a parallel map, without tensors
    bar = tqdm(scans, "reading shard indexes", leave=False, disable=not progress or None)
    for number, (rows, missing, fault) in enumerate(bar):
        if isinstance(fault, OSError):
            raise fault
        rows["shard"] = number
        parts.append(rows)
        incomplete += missing
        faults += [fault] * bool(fault)
    return np.concatenate(parts), incomplete, faults


def cached_scan(shards, cache, workers, progress):
    """What `scan` returns, from the file `cache` if these very shards were scanned before; else it is made."""
    stats = map(os.stat, shards)  # ctime changes with the content and with the permissions
    stamp = json.dumps([(path, stat.st_size, stat.st_ctime_ns) for path, stat in zip(shards, stats)])
    try:
        with np.load(cache) as stored:
            if stored["stamp"] == stamp:
                return stored["index"], *json.loads(stored["found"].item())
    except Exception:  # not there yet, or damaged: it is only a copy
        pass
    index, *found = scan(shards, workers, progress)
    with appearing(cache, f".{secrets.token_hex(4)}.part") as file:  # each machine of a run writes one
        np.savez(file, index=index, stamp=stamp, found=json.dumps(found))
    return index, *found


def build_index(shards, max_bad=0.1, cache="", workers=0, progress=False):
    """(N,) array of INDEX rows, one for each image with a caption, in the shards' order; and a list of warnings.

    A broken shard gives what stands before its fault, and a warning. ValueError with all of them if more than the
    share `max_bad` of the shards is broken or of the samples incomplete. workers: processes that scan; cache: file
    that keeps what they found, for the next start and for other ranks.
    """
    index, incomplete, faults = (cached_scan(shards, cache, workers, progress) if cache else
                                 scan(shards, workers, progress))
    if len(faults) > max_bad * len(shards):
        raise ValueError("\n".join(faults))
    lost = sum(incomplete.values())
    causes = ", ".join(f"{n} {cause}" for cause, n in incomplete.items())
    if lost > max_bad * (lost + len(index)):
        raise ValueError(f"--data: {lost} of {lost + len(index)} samples are not usable ({causes})")
    return index, faults + [f"{lost} samples passed over: {causes}"] * bool(lost)


WINDOW = 10_000  # samples, about one img2dataset shard: mixes neighbours, yet reads few shards at a time


def epoch_order(index, seed, epoch):
    """(N,) sample numbers in the order in which this epoch reads them, from seed and epoch alone.

    Shards are shuffled, then every sample moves by up to WINDOW places: a disk sees nearly sequential reads.
    """
    rng = np.random.default_rng([seed, epoch])
    place = rng.permutation(index["shard"].max() + 1)[index["shard"]]     # (N,) the shard's turn
    order = place.argsort(kind="stable")
    return order[(np.arange(len(order)) + rng.uniform(0, WINDOW, len(order))).argsort(kind="stable")]


@lru_cache(maxsize=64)
def _open(path):
    return open(path, "rb", buffering=0)


def read_bytes(path, offset, size):
    """`size` bytes of a file from `offset` on. Its handle stays open: an epoch comes back to it at once."""
    return os.pread(_open(path).fileno(), size, offset)


# -----------------------------------------------------------------------------
# Images: bytes to pixels.

MAX_PIXELS = 2 ** 26  # 67 million; a larger picture in a small file is an attack on memory, not a photograph


@contextmanager
def decoding():
    """Whatever Pillow's decoders raise (OSError, SyntaxError, struct.error ...) leaves as a ValueError."""
    try:
        yield
    except Exception as error:
        raise ValueError(re.sub(r" <_io.*>", "", str(error)) or type(error).__name__) from None


def open_image(raw):
    """The picture in `raw` bytes, of which only the header has been read; to be used within `decoding`."""
    image = Image.open(io.BytesIO(raw), formats=("JPEG", "PNG", "WEBP"))
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels, more than {MAX_PIXELS}")
    return image


def decode_image(raw):
    """The picture in `raw` bytes, loaded, in its own mode. ValueError with the cause if it does not decode whole."""
    with decoding():
        image = open_image(raw)
        image.load()
        return image


def random_resized_crop(image, size, scale, rng):
    """A random part of a PIL image, `scale` (low, high) of its area, sides 3:4 to 4:3: (3, size, size) uint8, RGB.

    The augmentation of Inception (Szegedy et al. 2015), with the defaults that torchvision gave it. A JPEG that is
    not loaded yet is decoded no larger than the crop needs.
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
            break
    else:  # a very long picture: the largest crop of an allowed shape, from its middle
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - w) // 2, (height - h) // 2
    box = np.array([left, top, left + w, top + h])

    # A JPEG stores cosine transforms. Its decoder can leave out the higher half of them or more, and give a picture of
    # a half, quarter or eighth of the size in less time. The resize still has to shrink that to two thirds or less; on
    # photographs, the error that is left is that of saving the JPEG once more at quality 90.
    enough = 1.5 * size / min(w, h)
    if enough <= 0.5 and image.draft(None, (int(width * enough), int(height * enough))):
        box = (box / round(width / image.width)).round().astype(int)
    left, top, right, bottom = box
    pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))[top:bottom, left:right]  # (h, w, 3)
    # torch's resize is Pillow's, but for rounding, at a fifth of its time.
    pixels = torch.from_numpy(pixels).permute(2, 0, 1)[None]                                           # (1, 3, h, w)
    return F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)[0]


def normalize(images):
    """(..., 3, H, W) uint8 -> float32 on the same device, with the mean and deviation of CLIP's training pixels.

    The operations and their order are open_clip's, so that the result is equal to the last bit.
    """
    # non_blocking: the CPU does not wait until the six numbers have arrived on a GPU.
    mean, std = (torch.tensor(x).view(3, 1, 1).to(images.device, non_blocking=True) for x in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def denormalize(images):
    """(B, 3, H, W) float, as for the model -> (B, H, W, 3) uint8 NumPy array, as for pictures."""
    mean, std = (images.new_tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    return ((images * std + mean).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


# -----------------------------------------------------------------------------
# Tokenizer: byte-level BPE (Sennrich et al. 2016) in the dialect of CLIP. A word is its bytes, the last one marked
# with </w>; merges join the pair of symbols that was most frequent in training, in the order they were learned.

# CLIP's printable stand-in for each byte: itself if it shows on a screen (! to ~, ¡ to ¬, ® to ÿ), else the next
# letter from U+0100.
BYTES = {byte: chr(byte) for byte in (*range(33, 127), *range(161, 173), *range(174, 256))}
BYTES |= {byte: chr(256 + n) for n, byte in enumerate(byte for byte in range(256) if byte not in BYTES)}


@lru_cache
def _word_pattern():
    # CLIP's pattern is written with \p{L} and \p{N}, which Python's re lacks. \w is letters, all numbers and _,
    # \d only the decimal digits: the other numbers (such as ² or ½) have to be listed.
    others = "".join(c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) in ("Nl", "No"))
    return re.compile(rf"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_{others}]+|[\d{others}]|(?:[^\s\w]|_)+", re.IGNORECASE)


MAX_CHARACTERS = 2000  # far more than a context of 77 tokens holds; merging a word takes the square of its length


def split_words(text):
    """The words of a caption, each a string of byte symbols: lower case, HTML unescaped, white space folded."""
    text = " ".join(html.unescape(html.unescape(text)).split()).lower()[:MAX_CHARACTERS]
    return ["".join(BYTES[byte] for byte in word.encode("utf-8", "replace")) for word in _word_pattern().findall(text)]


def learn_merges(captions, num_merges):
    """Up to `num_merges` BPE merges of an iterable of captions, one 'a b' a line, most frequent pair first.

    Ends early when no pair occurs twice. A heap finds the next pair and an index the words that hold it, so that a
    merge costs only the words it changes.
    """
    counts = Counter(word for caption in captions for word in split_words(caption))
    words = [([*word[:-1], word[-1] + "</w>"], count) for word, count in counts.items()]
    pair_count, holders = Counter(), defaultdict(set)
    for number, (symbols, count) in enumerate(words):
        for pair in itertools.pairwise(symbols):
            pair_count[pair] += count
            holders[pair].add(number)

    heap = [(-count, pair) for pair, count in pair_count.items()]
    heapq.heapify(heap)
    merges = []
    while heap and len(merges) < num_merges:
        count, pair = heapq.heappop(heap)
        if -count != pair_count[pair]:  # counted before another merge took some: back with the count of today
            if pair_count[pair] > 0:
                heapq.heappush(heap, (-pair_count[pair], pair))
            continue
        if -count < 2:
            break
        merges.append(" ".join(pair))
        joined, grown = "".join(pair), set()
        for number in holders.pop(pair):
            symbols, times = words[number]
            for old in itertools.pairwise(symbols):
                pair_count[old] -= times
            symbols[:] = _merge(symbols, pair)
            for new in itertools.pairwise(symbols):
                pair_count[new] += times
                if joined in new:  # the other pairs are as they were
                    holders[new].add(number)
                    grown.add(new)
        for new in grown:
            heapq.heappush(heap, (-pair_count[new], new))
    return "\n".join(merges)


def _merge(symbols, pair):
    merged, i = [], 0
    while i < len(symbols):
        joined = i + 1 < len(symbols) and (symbols[i], symbols[i + 1]) == pair
        merged.append(symbols[i] + symbols[i + 1] if joined else symbols[i])
        i += 2 if joined else 1
    return merged


class Tokenizer:
    """Captions to token ids. Vocabulary: 256 bytes, 256 bytes that end a word, the merges, <start>, <end>."""

    def __init__(self, merges, context_length=77):
        self.merges, self.context_length = merges, context_length
        pairs = [tuple(line.split()) for line in merges.splitlines()]
        symbols = [*BYTES.values(), *(symbol + "</w>" for symbol in BYTES.values()), *map("".join, pairs)]
        self.rank = {pair: rank for rank, pair in enumerate(pairs)}
        self.ids = {symbol: number for number, symbol in enumerate(symbols)}
        self.start, self.end = len(symbols), len(symbols) + 1
        self.vocab_size = len(symbols) + 2

    @classmethod
    def from_file(cls, path, context_length=77):
        """CLIP's own vocabulary, bpe_simple_vocab_16e6.txt.gz. ValueError if the file is something else."""
        try:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                lines = file.read().splitlines()
            # The first line is a version. CLIP uses only as many merges as make 49,408 with bytes and specials.
            merges = lines[1:49408 - 512 - 2 + 1]
            if not merges or any(len(line.split()) != 2 for line in merges):
                raise ValueError("not a list of two symbols a line")
        except (OSError, EOFError, zlib.error, ValueError) as error:
            raise ValueError(f"--vocab {path}: {error}; expected CLIP's bpe_simple_vocab_16e6.txt.gz") from None
        return cls("\n".join(merges), context_length)

    @lru_cache(200_000)  # web captions never stop bringing new words
    def _word(self, word):
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            best = min(itertools.pairwise(symbols), key=lambda pair: self.rank.get(pair, math.inf))
            if best not in self.rank:
                break
            symbols = _merge(symbols, best)
        return [self.ids[symbol] for symbol in symbols]

    def encode(self, captions):
        """(N, T) int64: <start>, the caption, <end>, zeros. A longer caption is cut before its <end>."""
        tokens = torch.zeros(len(captions), self.context_length, dtype=torch.int64)
        for row, caption in zip(tokens, captions):
            ids = [number for word in split_words(caption) for number in self._word(word)]
            ids = [self.start, *ids[:self.context_length - 2], self.end]
            row[:len(ids)] = torch.tensor(ids)
        return tokens


# -----------------------------------------------------------------------------
# Batches. Each is made whole by one worker, from sample numbers that were fixed before the epoch began: neither the
# number of workers nor their timing can change what the model sees.


class Batches(torch.utils.data.Dataset):
    """Batch b of this rank: images (B, 3, H, W) uint8, tokens (B, T) int64, real (B,) bool, lost.

    order: (steps, B) sample numbers. A sample that does not decode leaves a black image that is not `real`, and its
    (row, cause) in the list `lost`.
    """

    def __init__(self, shards, index, order, tokenizer, image_size, scale, seed):
        self.shards, self.index, self.order, self.tokenizer = shards, index, order, tokenizer
        self.image_size, self.scale, self.seed = image_size, scale, seed

    def __getitem__(self, number):
        samples, size = self.order[number], self.image_size
        images = torch.zeros(len(samples), 3, size, size, dtype=torch.uint8)
        captions, lost = [""] * len(samples), []
        for i, sample in enumerate(samples):
            row = self.index[sample]
            shard = self.shards[row["shard"]]
            try:
                captions[i] = read_caption(shard, row)
                raw = read_bytes(shard, row["image"], row["image_size"])
                # Seeded by the sample, so that its crop depends neither on its worker nor on its batch.
                rng = np.random.default_rng([*self.seed, sample])
                with decoding():
                    images[i] = random_resized_crop(open_image(raw), size, self.scale, rng)
            except (ValueError, OSError) as error:
                lost.append((i, str(error)))
        real = torch.ones(len(samples), dtype=torch.bool)
        real[[i for i, _ in lost]] = False
        return images, self.tokenizer.encode(captions), real, lost


def sample_names(shards, index, samples):
    """'shard: member' of each sample number, for messages."""
    names = []
    for row in index[samples]:
        header = read_bytes(shards[row["shard"]], row["image"] - 512, 100)  # begins with the member's name
        names.append(f"{shards[row['shard']]}: " + header.split(b"\0")[0].decode("utf-8", "replace"))
    return names


def read_caption(shard, row):
    """The caption of an INDEX row. ValueError if it is empty, not UTF-8, or its json holds none."""
    raw = read_bytes(shard, row["text"], row["text_size"])
    try:
        caption = raw.decode("utf-8")
        if row["json"]:
            caption = json.loads(caption)["caption"]
    except UnicodeDecodeError:
        raise ValueError("caption is not UTF-8") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError("no caption in the json") from None
    if not isinstance(caption, str) or not caption.strip():
        raise ValueError("empty caption")
    return caption


def sample_captions(shards, index, limit=100_000):
    """Up to `limit` captions, evenly spread over the index: what the tokenizer learns its merges from."""
    for row in index[::max(1, math.ceil(len(index) / limit))]:
        try:
            yield read_caption(shards[row["shard"]], row)
        except ValueError:
            continue  # counted where it is trained on


# -----------------------------------------------------------------------------
# Writing shards.


def write_tar(path, samples):
    """Writes (key, {extension: bytes}) pairs to a tar."""
    with appearing(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, files in samples:
            for extension, raw in files.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(raw)
                tar.addfile(member, io.BytesIO(raw))


def write_shards(folder, samples, shard_size=1000, name="{:05d}.tar"):
    """Writes {extension: bytes} samples as folder/00000.tar, ...; keys count on across shards. Returns how many."""
    os.makedirs(folder, exist_ok=True)
    shard = -1
    for shard, part in itertools.groupby(enumerate(samples), key=lambda numbered: numbered[0] // shard_size):
        write_tar(os.path.join(folder, name.format(shard)), ((f"{number:09d}", files) for number, files in part))
    return shard + 1


def read_caption_list(path):
    """Yields {extension: bytes} for each line `image path <TAB> caption`; paths are relative to the list's folder.

    ValueError with the line's number for a malformed line, a missing file, or one that is no known image.
    """
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig").rstrip("\r\n")  # -sig: some editors put a mark before the first line
            except UnicodeDecodeError:
                raise ValueError(f"{path}, line {number}: not UTF-8") from None
            image, tab, caption = line.partition("\t")
            if not tab or not image or not caption.strip():
                raise ValueError(f"{path}, line {number}: expected `image path <TAB> caption`, got {line!r:.80}")
            extension = image.rpartition(".")[2].lower()
            if extension not in IMAGE_EXTENSIONS:
                raise ValueError(f"{path}, line {number}: {image}: not one of {', '.join(IMAGE_EXTENSIONS)}")
            try:
                with open(os.path.join(os.path.dirname(path), image), "rb") as image_file:
                    yield {extension: image_file.read(), "txt": caption.encode("utf-8")}
            except OSError as error:
                raise ValueError(f"{path}, line {number}: {image}: {error.strerror}") from None


# -----------------------------------------------------------------------------
# Demo data. Scenes of one or two coloured shapes on a muted background, drawn rather than downloaded: the
# background repeats itself and can be masked, the objects cannot. Scene i of a split depends on nothing else.

SCENE_SIZE = 64                       # pixels, both sides
SPLITS = {"train": 20_000, "seen": 1_000, "unseen": 500, "retrieval": 500}

COLOURS = {"red": (255, 60, 50), "yellow": (255, 235, 40), "green": (50, 220, 70), "cyan": (60, 235, 245),
           "blue": (70, 120, 255), "purple": (180, 80, 255), "pink": (255, 140, 210), "white": (250, 250, 250)}


def polar(radii, turns):
    """Points at these radii and angles (in turns), as complex numbers: to rotate is then to multiply."""
    return np.asarray(radii) * np.exp(2j * np.pi * np.asarray(turns))


def of_area_one(outline):
    """The outline scaled to enclose an area of 1 (shoelace formula), so that sizes mean the same for all."""
    return outline / math.sqrt(abs((outline.conj() * np.roll(outline, -1)).imag.sum()) / 2)


TURNS = np.linspace(0, 1, 48)         # a closed circle, in turns
CROSS_CORNER, CROSS_ARM = 0.3 * (1 + 1j), 1 + 0.3j
SHAPES = {name: of_area_one(outline) for name, outline in {
    "circle": polar(1, TURNS),
    "square": polar(1, np.array([1, 3, 5, 7]) / 8),
    "triangle": polar(1, np.array([0, 1, 2]) / 3 - 1/4),                # - 1/4: a tip points up
    "star": polar([1, 0.42] * 5, np.arange(10) / 10 - 1/4),
    "cross": np.ravel([1j ** k * np.array([CROSS_CORNER.conjugate(), CROSS_ARM.conjugate(), CROSS_ARM])
                       for k in range(4)]),
    "bar": np.array([3 + 1j, -3 + 1j, -3 - 1j, 3 - 1j]),
    "ring": np.concatenate([polar(1, TURNS), polar(0.6, -TURNS)]),      # out along the rim, back along the hole
    "crescent": np.concatenate([polar(1, 0.1 + 0.8 * TURNS), polar(0.72, 0.86 - 0.72 * TURNS) + 0.35]),
}.items()}

# Each colour and each shape misses one partner, the same one always: these pairs are never in a training scene.
UNSEEN = list(zip(COLOURS, SHAPES))
PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES]   # the classes, in label order
SEEN = [pair for pair in PAIRS if pair not in UNSEEN]

# A small ViT takes far longer to learn shape than colour. Large, bright, nearly upright objects on a dark and calm
# background, and captions that often say no more than what is there, bring shape within minutes on a CPU.
SIZES = {"small": (0.18, 0.24), "large": (0.30, 0.40)}                  # share of the picture
PAIR_SCALE = 0.6                                                        # the same, when there are two objects
MARGIN = 2                                                              # pixels between objects, at the border
MAX_TURN = 1/24                                                         # of a full turn, either way

RELATIONS = {"left of": ("left of", "to the left of"), "right of": ("right of", "to the right of"),
             "above": ("above", "over"), "below": ("below", "under")}
BACKGROUNDS = {"plain": ("a plain background", "a flat background"),
               "gradient": ("a gradient", "a smooth gradient"),
               "noise": ("noise", "a noisy background"),
               "stripes": ("stripes", "a striped background"),
               "blobs": ("soft blobs", "a background of soft blobs")}

# x, y: the objects, r: where x is, seen from y, b: the background.
ONE = ("{x}", "there is {x}", "a picture of {x}", "an image of {x}", "a drawing of {x}", "this is {x}", "I see {x}",
       "here is {x}", "just {x}", "{x} on {b}", "there is {x} on {b}", "{x} in front of {b}", "on {b} there is {x}")
FULL = ("{x} {r} {y} on {b}", "there is {x} {r} {y} on {b}", "on {b} {x} is {r} {y}", "{b} with {x} {r} {y}",
        "a picture of {x} {r} {y} on {b}", "{x} {r} {y} in front of {b}")
TWO = FULL + ("{x} {r} {y}", "{x} is {r} {y}", "a picture of {x} {r} {y}", "there is {x} {r} {y}", "{x} and {y}")

# For the evaluation folders: "red circle", ... and the training wording that leaves the background out.
CLASSNAMES = [" ".join(pair) for pair in PAIRS]
TEMPLATES = [template.format(x="a {c}") for template in ONE if "{b}" not in template]


def pick(rng, options):
    """One of the options, uniformly (rng.choice does the same, many times slower)."""
    return options[rng.integers(len(options))]


Y, X = np.mgrid[-1:1:SCENE_SIZE * 1j, -1:1:SCENE_SIZE * 1j].astype(np.float32)


def draw_background(rng, kind):
    """An RGB image: two muted colours, mixed as the kind says."""
    angle, phase = rng.uniform(0, 2 * np.pi, 2)
    ramp = X * np.float32(math.cos(angle)) + Y * np.float32(math.sin(angle))    # rises by 1 in half a picture
    if kind == "plain":
        mix = np.full_like(X, rng.random())
    elif kind == "gradient":
        mix = 0.5 + 0.35 * ramp
    elif kind == "noise":
        mix = rng.random(X.shape, dtype=np.float32)
    elif kind == "stripes":
        mix = np.clip(0.5 + np.sin(ramp * np.float32(rng.uniform(10, 24)) + np.float32(phase)), 0, 1)
    elif kind == "blobs":
        mix = np.asarray(Image.fromarray(rng.random((5, 5), dtype=np.float32)).resize(X.shape, Image.BICUBIC))

    dark = rng.uniform(15, 60) + rng.uniform(-12, 12, 3)
    light = dark + rng.uniform(15, 30) + rng.uniform(-8, 8, 3)
    pixels = dark.astype(np.float32) + mix[..., None] * (light - dark).astype(np.float32)      # (H, W, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def place_objects(rng, shapes, sizes):
    """Outlines in pixels, one (points, 2) array a shape, and where the first is, seen from the last.

    Two objects share no column (left of, right of) or no row (above, below): they never overlap, and the
    relation is true of every point of theirs. It names the longer of the two ways between their centres.
    """
    outlines = []
    for shape, size in zip(shapes, sizes):
        area = rng.uniform(*SIZES[size]) * SCENE_SIZE ** 2 * (PAIR_SCALE if len(shapes) == 2 else 1)
        outline = SHAPES[shape] * polar(math.sqrt(area), rng.uniform(-MAX_TURN, MAX_TURN))
        outline = np.stack([outline.real, outline.imag], axis=1)
        outlines.append(outline - outline.min(axis=0))                    # the bounding box starts at 0, 0
    extents = np.array([outline.max(axis=0) for outline in outlines])     # (objects, 2) width, height

    scale = min(1, (SCENE_SIZE - 2 * MARGIN) / extents.max())
    while True:
        boxes = extents * scale
        corners = MARGIN + rng.random(boxes.shape) * (SCENE_SIZE - 2 * MARGIN - boxes)
        way = (corners + boxes / 2)[0] - (corners + boxes / 2)[-1]        # (2,) from the last centre to the first
        axis = int(abs(way[1]) > abs(way[0]))
        if len(shapes) == 1 or abs(way[axis]) >= boxes[:, axis].sum() / 2 + MARGIN:
            break
        scale *= 0.995      # no room yet: both shrink alike, so that the larger object stays the larger one

    relation = (("left of", "right of"), ("above", "below"))[axis][int(way[axis] > 0)]
    return [outline * scale + corner for outline, corner in zip(outlines, corners)], relation


def draw_scene(rng, pairs=None, full=False):
    """(64x64 RGB image, caption) of these one or two (colour, shape) pairs; by default of SEEN ones, by chance.

    full: the caption leaves nothing out (sizes, relation, background); for two objects only.
    """
    if pairs is None:
        first, step = rng.integers(len(SEEN)), rng.integers(1, len(SEEN))
        pairs = [SEEN[first], SEEN[(first + step) % len(SEEN)]][:pick(rng, (1, 1, 1, 1, 2))]
    sizes = [pick(rng, tuple(SIZES)) for _ in pairs]
    outlines, relation = place_objects(rng, [shape for _, shape in pairs], sizes)
    kind = pick(rng, tuple(BACKGROUNDS))

    image = draw_background(rng, kind)
    for (colour, _), outline in zip(pairs, outlines):
        mask = Image.new("L", (2 * SCENE_SIZE, 2 * SCENE_SIZE))    # drawn at twice the size for smooth edges
        points = (2 * outline).ravel().tolist()
        ImageDraw.Draw(mask).polygon(points, fill=255)
        ImageDraw.Draw(mask).line(points, fill=255, width=3)  # over the seam where a ring's two contours meet
        shade = np.clip(COLOURS[colour] + rng.integers(-12, 13, 3), 0, 255)
        image.paste(tuple(shade.tolist()), mask=mask.reduce(2))

    names = [f"a {size} {colour} {shape}" if full or rng.random() < 0.5 else f"a {colour} {shape}"
             for size, (colour, shape) in zip(sizes, pairs)]
    template = pick(rng, FULL if full else ONE if len(pairs) == 1 else TWO)
    return image, template.format(x=names[0], y=names[-1], r=pick(rng, RELATIONS[relation]),
                                  b=pick(rng, BACKGROUNDS[kind]))


def demo_sample(split, index):
    """(JPEG bytes, caption) for the splits train and retrieval, (JPEG bytes, label) for seen and unseen."""
    # The split is part of the seed, so no two splits share a random stream and no test scene is a training scene.
    rng = np.random.default_rng([0, list(SPLITS).index(split), index])
    pairs, label = None, None
    if split in ("seen", "unseen"):
        pairs = [SEEN[index % len(SEEN)] if split == "seen" else UNSEEN[index % len(UNSEEN)]]
        label = PAIRS.index(pairs[0])
    elif split == "retrieval":
        pairs = [SEEN[i] for i in rng.permutation(len(SEEN))[:2]]

    image, caption = draw_scene(rng, pairs, full=split == "retrieval")
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=90)
    return jpeg.getvalue(), caption if label is None else label


def make_demo(folder):
    """Draws the demo data: train/ as shards, the rest as evaluation folders. Does nothing if they are there already."""
    if os.path.isdir(folder):
        return
    part = folder + ".part"
    shutil.rmtree(part, ignore_errors=True)
    for split in SPLITS:
        evaluation, kind = split != "train", "cls" if split in ("seen", "unseen") else "txt"
        scenes = (demo_sample(split, i) for i in tqdm(range(SPLITS[split]), f"drawing demo/{split}", unit=" scenes"))
        samples = ({"jpg": jpeg, kind: str(text).encode()} for jpeg, text in scenes)
        target = os.path.join(part, split, "test" if evaluation else "")
        num_shards = write_shards(target, samples, 1000, "{}.tar" if evaluation else "{:05d}.tar")
        texts = {"dataset_type.txt": ["retrieval"]} if kind == "txt" else {
            "classnames.txt": CLASSNAMES, "zeroshot_classification_templates.txt": TEMPLATES}
        for name, lines in (texts | {"test/nshards.txt": [num_shards]}).items() if evaluation else ():
            with open(os.path.join(part, split, name), "w") as file:
                file.writelines(f"{line}\n" for line in lines)
    os.replace(part, folder)  # under its name only when whole


# -----------------------------------------------------------------------------
# Bench and main.


def bench(shards, image_size, limit=512, passes=3):
    """Prints a Markdown table of how many images one core reads, decodes, augments and tokenises a second."""
    torch.set_num_threads(1)
    index, _ = build_index(shards)
    rows = index[::max(1, math.ceil(len(index) / limit))]
    captions = list(sample_captions(shards, index))
    start = time.perf_counter()
    merges = learn_merges(captions, 49408 - 514)
    print(f"learned {merges.count(chr(10)) + 1} merges from {len(captions)} captions in "
          f"{time.perf_counter() - start:.1f} s, {len(rows)} samples timed, at {image_size} pixels")

    order, rng, seconds = np.arange(len(rows))[None], np.random.default_rng(0), defaultdict(list)
    for _ in range(1 + passes):
        tokenizer, spent = Tokenizer(merges), Counter()  # one that has no word in its cache
        for row in rows:
            start = time.perf_counter()
            raw = read_bytes(shards[row["shard"]], row["image"], row["image_size"])
            try:
                caption = read_caption(shards[row["shard"]], row)
                read = time.perf_counter()
                image = decode_image(raw)
            except ValueError:  # training will report it
                continue
            decoded = time.perf_counter()
            random_resized_crop(image, image_size, (0.9, 1.0), rng)
            augmented = time.perf_counter()
            tokenizer.encode([caption])
            spent += Counter(read=read - start, decode=decoded - read, augment=augmented - decoded,
                             tokenise=time.perf_counter() - augmented)
        start = time.perf_counter()
        Batches(shards, rows, order, Tokenizer(merges), image_size, (0.9, 1.0), (0, 0))[0]
        for stage, time_spent in (spent | {"together": time.perf_counter() - start}).items():
            seconds[stage].append(time_spent)
    print("| stage | images/s a core | ms an image |\n|---|--:|--:|")
    for stage, times in seconds.items():
        middle = np.median(times[1:]) / len(rows)  # the first pass may have met a cold disk
        print(f"| {stage} | {1 / middle:.0f} | {1000 * middle:.3f} |")


def message(error):
    """The line that a user gets to see of an error: of the system's, the file and the cause."""
    named = getattr(error, "filename", None)
    return f"{named}: {error.strerror}" if named else str(error)


def main():
    """The commands `pack`, `demo` and `bench`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    pack = commands.add_parser("pack", help="make shards of a list of `image path <TAB> caption`")
    pack.add_argument("captions", help="text file, a sample a line; image paths are relative to its folder")
    pack.add_argument("out", help="folder for 00000.tar, 00001.tar, ...")
    pack.add_argument("--shard-size", type=int, default=10_000, help="samples a shard (default: 10000)")
    demo = commands.add_parser("demo", help="draw the demo data set")
    demo.add_argument("out", help="folder to make")
    benched = commands.add_parser("bench", help="time reading, decoding, augmenting and tokenising on one core")
    benched.add_argument("shards", nargs="+", help="paths, globs or brace ranges")
    benched.add_argument("--image-size", type=int, default=224, help="side of a crop, pixels (default: 224)")
    options = parser.parse_args()
    try:
        if options.command == "bench":
            if options.image_size < 1:
                raise ValueError(f"--image-size {options.image_size}: must be at least 1")
            bench(expand(options.shards), options.image_size)
        elif options.command == "demo":
            make_demo(options.out)
        elif options.shard_size < 1:
            raise ValueError(f"--shard-size {options.shard_size}: must be at least 1")
        elif glob.glob(os.path.join(glob.escape(options.out), "*.tar")):
            raise ValueError(f"{options.out}: holds shards already; name another folder")
        else:
            samples = tqdm(read_caption_list(options.captions), "packing", unit=" samples")
            print(f"wrote {write_shards(options.out, samples, options.shard_size)} shards to {options.out}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {message(error)}")


if __name__ == "__main__":
    main()
