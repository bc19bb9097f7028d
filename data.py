"""Everything between shards on disk and a batch in memory: tar shards, images, captions, tokens.

    python data.py pack captions.tsv OUT     make shards of a list of `image path <TAB> caption`
    python data.py demo OUT                  draw the demo data set

The file follows a sample: its place in a shard, its turn, its pixels, its token ids, its batch; then writing.
"""
import argparse
import glob
import gzip
import heapq
import html
import io
import json
import math
import os
import re
import signal
import tarfile
import unicodedata
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from itertools import chain, groupby, pairwise

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter, ImageOps
from tqdm import tqdm

IMAGE_EXTENSIONS = ("webp", "png", "jpg", "jpeg")  # of two images of a sample, CLIP_benchmark takes the first
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training pixels in [0, 1], RGB
STD = (0.26862954, 0.26130258, 0.27577711)

# -----------------------------------------------------------------------------
# Files and messages.

@contextmanager
def write_whole(path, part=".part"):
    """A binary file to write, which gets its name when it is whole and on disk. OSError if it can't be."""
    try:
        with open(path + part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + part, path)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError if the disk is full
        cause = getattr(error, "strerror", None) or "is the disk full?"
        raise OSError(f"{path}: could not be written ({cause}); one from before is untouched") from None
    finally:
        if os.path.exists(path + part):
            os.remove(path + part)

def what_it_is(path, otherwise="not a tar"):
    """What a file that should be something else seems to be, by its first bytes."""
    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):  # gzip, bzip2, xz, zstd
        return "compressed: unpack it first"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer: run `git lfs pull`"
    return otherwise if head else f"empty file, {otherwise}"

# What to say to a user whose error matches a pattern.
HINTS = {"KeyboardInterrupt": "interrupted",
         "OutOfMemoryError": "out of GPU memory; half the --batch-size, twice the --accum: the same update",
         "shared memory": "too little shared memory: pass --workers 0, or give docker a larger --shm-size",
         r"worker \(pid|process pool": "a worker was killed, maybe for lack of memory: pass fewer --workers"}

def message(error):
    """The line of an error that a user gets to see; "" for what is no user's mistake."""
    for pattern, hint in HINTS.items():
        if re.search(pattern, repr(error)):
            return hint
    if getattr(error, "filename", None):
        return f"{error.filename}: {error.strerror}"
    return str(error) if isinstance(error, (ValueError, OSError)) else ""

# -----------------------------------------------------------------------------
# Shards. A tar is a chain of headers, each followed by its file: reading the headers alone tells where every
# image and caption lies. With that index, any sample is one read away, and an epoch is a permutation.

def expand(patterns):
    """Shards by path, glob or range, such as '{00000..01242}.tar', in order. ValueError if one is missing."""
    paths = []
    for path in patterns:
        if os.path.isdir(path):
            raise ValueError(f"--data {path}: a folder; name its shards, such as '{path.rstrip('/')}/*.tar'")
        found = [path] if os.path.exists(path) else sorted(glob.glob(path))
        braces = re.search(r"\{(\d+)\.\.(\d+)\}", path)
        if braces:
            numbers = range(int(braces[1]), int(braces[2]) + 1)
            found = expand(path.replace(braces[0], str(n).zfill(len(braces[1])), 1) for n in numbers)
        if not found:
            why = "the pattern matches no file" if glob.has_magic(path) else "no such file"
            raise ValueError(f"--data {path}: {'an empty range' if braces else why}")
        paths += found
    return list(dict.fromkeys(paths))  # a shard named twice is read once

def tar_samples(path):
    """([(key, {extension: (offset, size)})], fault or ""): a tar's samples in its order, up to its fault.
    A key ends at the first dot of a file name. A key that comes again is another sample, as in webdataset."""
    samples, start, key, fault, length = defaultdict(dict), 0, None, "", os.path.getsize(path)
    try:
        with tarfile.open(path, "r:") as tar:
            for member in iter(tar.next, None):
                tar.members = []  # else tarfile keeps them all
                if not member.offset < tar.offset <= length:  # where the next header would be
                    raise ValueError("end of data")
                stem, dot, extension = member.name.rpartition("/")[2].partition(".")
                if not stem or not dot or not member.isfile():
                    continue  # a hidden file, such as macOS puts beside others; a README, folder or link
                last, key = key, member.name.removesuffix(dot + extension)
                files, extension = samples[start, key], extension.lower()
                second = key != last and extension in IMAGE_EXTENSIONS and {*files} & {*IMAGE_EXTENSIONS}
                if extension in files or second:  # names start again: what follows is of no sample so far
                    start += 1
                samples[start, key][extension] = member.offset_data, member.size
            rest = os.pread(tar.fileobj.fileno(), 1 << 24, tar.offset)
        # tarfile ends without a word at anything that is no header. Only zeros may follow the last file.
        if not rest or len(rest) % 512:
            fault = f"truncated, the tar breaks off at byte {length}"
        elif rest.strip(b"\0"):
            fault = f"more than zeros after the end, byte {tar.offset}: a damaged header, or two tars in one"
        elif not samples:
            fault = "a tar without files"
    except OSError:
        raise  # the disk's fault
    except Exception as error:  # tarfile's own errors, and whatever else a damaged header provokes
        fault = "truncated" if "end of data" in str(error) else what_it_is(path)
    return [(key, files) for (_, key), files in samples.items()], f"{path}: {fault}" if fault else ""

INDEX = np.dtype([("shard", "i4"), ("image", "i8"), ("image_size", "i8"),
                  ("text", "i8"), ("text_size", "i8"), ("json", "?")])

def index_shard(path, number):
    """(rows of INDEX, [(cause, name)] of what is no sample, fault or "") of shard `number`."""
    (samples, fault), rows, lost = tar_samples(path), [], []
    for key, files in samples:
        image = next(filter(None, map(files.get, IMAGE_EXTENSIONS)), None)
        text = files.get("txt") or files.get("json")
        pictures = [name for name in files if name.rpartition(".")[2] in IMAGE_EXTENSIONS]
        if image and text:
            rows.append((number, *image, *text, "txt" not in files))
            # x.seg.png beside x.jpg is no sample; with x.seg.txt beside it, it was meant to be one.
            texts = {name.rpartition(".")[0] for name in files if name.endswith((".txt", ".json"))}
            pictures = [name for name in pictures if name.rpartition(".")[0] in texts]
        elif not pictures:
            lost.append(("no image", key))
        dots = " (a key ends at the first dot of the file name)"
        lost += [("no caption" + dots * ("." in name), f"{key}.{name}") for name in pictures]
    if fault:
        fault += f"; usable pairs: {len(rows)}"
    elif not rows:
        fault = f"{path}: no image with a caption inside; expected pairs such as 0001.jpg, 0001.txt"
    return np.array(rows, INDEX), lost, fault

def ignore_signals(*_):
    """For helper processes: a signal to stop is for the training loop, which still needs its batch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Slurm sends it to all processes of a job

def build_index(shards, max_bad=0.1, folder="", workers=0, progress=False):
    """(N,) INDEX rows, one per image with a caption, in the shards' order; and a list of warnings. ValueError
    if more than the share max_bad of the shards is broken or of the samples incomplete, OSError if a disk
    fails. `folder` keeps index.npy for the next start and other ranks, which share its pages in memory."""
    # A file's ctime changes with its content and with its permissions.
    stamp = [[path, os.stat(path).st_size, os.stat(path).st_ctime_ns] for path in shards]
    index, paths = None, [os.path.join(folder, name) for name in ("index.npy", "index.json")]
    with suppress(Exception), open(paths[1]) as file:  # not there yet, or damaged: it is only a copy
        stored, faults, lost = json.load(file)
        if folder and stored == stamp:
            index = np.load(paths[0], mmap_mode="r")
    if index is None:
        jobs = index_shard, shards, range(len(shards))
        with ProcessPoolExecutor(max(1, workers), initializer=ignore_signals) as pool:
            results = pool.map(*jobs, chunksize=4) if workers else map(*jobs)
            bar = tqdm(results, "reading shards", len(shards), leave=False, disable=not progress, delay=1)
            parts, missing, faults = zip(*bar)
        index, faults, lost = np.concatenate(parts), list(filter(None, faults)), {}
        for cause, name in chain(*missing):  # {cause: [how many, the first]}
            lost.setdefault(cause, [0, name])[0] += 1
        if folder:  # each machine of a run may write it: parts have names of their own
            with write_whole(paths[0], f".{os.urandom(4).hex()}.part") as file:
                np.save(file, index)
            with write_whole(paths[1], f".{os.urandom(4).hex()}.part") as file:
                file.write(json.dumps([stamp, faults, lost]).encode())
    if len(faults) > max_bad * len(shards):
        raise ValueError("\n".join(faults))
    num_lost = sum(n for n, _ in lost.values())
    causes = "; ".join(f"{n} with {cause}, such as {name}" for cause, (n, name) in lost.items())
    remark = f"{num_lost} of {num_lost + len(index)} samples passed over: {causes}"
    if num_lost > max_bad * (num_lost + len(index)):
        raise ValueError(f"--data: {remark}; that is more than --max-bad {max_bad}")
    return index, faults + ([remark] if lost else [])

WINDOW = 10_000  # samples, about one img2dataset shard: mixes neighbours, yet reads few shards at a time

def epoch_order(index, seed, epoch):
    """(N,) sample numbers, by seed and epoch alone: shards in random order, samples moved within WINDOW."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(index["shard"].max() + 1)[index["shard"]].argsort(kind="stable")  # shards' turns
    return order[(np.arange(len(order)) + rng.uniform(0, WINDOW, len(order))).argsort(kind="stable")]

open_shard = lru_cache(maxsize=64)(open)  # files stay open: the next samples come from the same shard

def read_bytes(path, offset, size):
    """`size` bytes of a file from `offset` on. OSError that names the file if it can't be read that far."""
    try:
        raw = os.pread(open_shard(path, "rb", buffering=0).fileno(), size, offset)
    except OSError as error:
        raise OSError(f"{path}: {error.strerror}") from None
    if len(raw) < size:
        raise OSError(f"{path}: ends before byte {offset + size}, but was longer when its index was made")
    return raw

# -----------------------------------------------------------------------------
# Images: bytes to pixels.

MAX_PIXELS = 2 ** 26  # 67 million; a larger picture in a small file is an attack on memory, not a photograph
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit, which warns first
Image.init()  # fills Image.OPEN
FORMATS = [name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF") if name in Image.OPEN]

@contextmanager
def open_image(raw):
    """In a `with`: the picture in `raw` bytes, not yet decoded. ValueError with the cause if that fails."""
    try:
        image = Image.open(io.BytesIO(raw), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels, more than {MAX_PIXELS}")
        yield image
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error ...
        raise ValueError(re.sub(r" <_io.*>", "", str(error)) or type(error).__name__) from None

def eight_bits(image):
    """A grey picture of more than 8 bits (modes I;16, I, F) with its upper 8 bits; any other as it is."""
    if image.mode[0] not in "IF":
        return image
    grey = np.asarray(image).astype(np.float64)
    scale = 256 if image.mode[1:] or grey.max() > 255 else 1
    return Image.fromarray((grey / scale).clip(0, 255).astype(np.uint8))

def upright(image):
    """A photograph as its orientation tag says it was held; a damaged tag says nothing."""
    with suppress(Exception):
        return image if image.getexif().get(0x0112, 1) == 1 else ImageOps.exif_transpose(image)
    return image

def to_rgb(image):
    """RGB as people see the picture: transparent parts lie on white."""
    image = eight_bits(image)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")

def random_box(width, height, scale, rng):
    """(left, top, right, bottom) of a random part of a picture: `scale` of its area, sides 3:4 to 4:3.
    The augmentation of Inception (Szegedy et al. 2015), with the defaults that torchvision gave it."""
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
            break
    else:  # a very long picture: the largest part of an allowed shape, from its middle
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - w) // 2, (height - h) // 2
    return np.array([left, top, left + w, top + h])

def crops(image, boxes, size):
    """The parts `boxes` (n, 4) of a PIL image: (n, 3, size, size) uint8, RGB."""
    # A JPEG not yet loaded decodes sooner to a half, quarter or eighth of its size. Where the resize shrinks
    # that to two thirds or less, photographs lose no more by it than by being saved again at quality 90.
    width, enough = image.width, 1.5 * size / (boxes[:, 2:] - boxes[:, :2]).min()
    if enough <= 0.5 and image.draft(None, (int(width * enough), int(image.height * enough))):
        boxes = (boxes / round(width / image.width)).round().astype(int)
    pixels = torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)[None]                  # (1, 3, H, W)
    # The same as Pillow's resize up to rounding, five times as fast.
    parts = [pixels[..., top:bottom, left:right] for left, top, right, bottom in boxes]
    return torch.cat([F.interpolate(part, (size, size), mode="bicubic", antialias=True) for part in parts])

# A-CLIP's strengths; None: the hue.
JITTER = (ImageEnhance.Brightness, 0.4), (ImageEnhance.Contrast, 0.4), (ImageEnhance.Color, 0.2), (None, 0.1)

def augment(view, rng):
    """A view (3, H, W) uint8 in other colours, greys, blurred or solarised, with A-CLIP's probabilities."""
    image = Image.fromarray(view.permute(1, 2, 0).numpy())
    for number in rng.permutation(4) if rng.random() < 0.8 else ():
        enhancer, strength = JITTER[number]
        change = rng.uniform(-strength, strength)
        if enhancer:
            image = enhancer(image).enhance(1 + change)
        else:
            turn = Image.new("HSV", image.size, (round(255 * change) % 256, 0, 0))
            image = ImageChops.add_modulo(image.convert("HSV"), turn).convert("RGB")
    if rng.random() < 0.2:
        image = image.convert("L").convert("RGB")
    if rng.random() < 0.1:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2)))
    if rng.random() < 0.2:
        image = ImageOps.solarize(image, 128)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)

def normalize(images):
    """(..., 3, H, W) uint8 -> float32 on the same device, normalised as by open_clip, to the last bit."""
    # non_blocking: the CPU does not wait until these few numbers have reached the GPU.
    mean, std = (torch.tensor(x).view(3, 1, 1).to(images.device, non_blocking=True) for x in (MEAN, STD))
    return (images.float() / 255 - mean) / std

# -----------------------------------------------------------------------------
# Words. Byte-level BPE (Sennrich et al. 2016) in the dialect of CLIP: a word is its bytes, the last marked
# with </w>; merges join the pair of symbols that was most frequent in training, in the order learned.

# CLIP's printable stand-in for each byte: itself if it shows (! to ~, ¡ to ¬, ® to ÿ), else U+0100 and on.
BYTES = {byte: chr(byte) for byte in (*range(33, 127), *range(161, 173), *range(174, 256))}
BYTES |= {byte: chr(256 + n) for n, byte in enumerate(byte for byte in range(256) if byte not in BYTES)}

# What CLIP's ftfy.fix_text replaces, except mojibake: controls and byte order marks go, Latin-1 controls are
# read as Windows-1252, quotes become straight, ligatures letters, full and half width letters plain ones.
GONE = *range(9), 11, *range(14, 32), 127, 0xFEFF, *range(0x206A, 0x2070), *range(0xFFF9, 0xFFFD)
PLAIN = *map(ord, "ĲĳŉǄǅǆǇǈǉǊǋǌǱǲǳﬀﬁﬂﬃﬄﬆ"), 0x3000, *range(0xFF01, 0xFFF0)
FIXES = dict.fromkeys(GONE) | {code: unicodedata.normalize("NFKC", chr(code)) for code in PLAIN}
FIXES |= {byte: bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in range(128, 160)}
FIXES |= dict.fromkeys([0x2BC, *range(0x2018, 0x201C)], "'") | dict.fromkeys(range(0x201C, 0x2020), '"')
FIXES[ord("ﬅ")] = "ſt"  # NFKC says st

# CLIP's pattern says \p{L} and \p{N}, which Python's re lacks. \w is letters, all numbers and _; \d is only
# the decimal digits, so other numbers (² or ½) are listed. [a-z] is for speed; ſ is another case of s.
NUMBERS = "".join(c for c in map(chr, range(0x20000)) if unicodedata.category(c) in ("Nl", "No"))
WORD = re.compile(rf"'(?:[sſtmd]|re|ve|ll)|(?:[a-z]|[^\W\d_{NUMBERS}])+|[\d{NUMBERS}]|(?:[^\s\w]|_)+")
MAX_CHARACTERS = 2000  # far more than 77 tokens hold; merging takes the square of a word's length

def split_words(text):
    """The words of a caption, each a string of byte symbols; the text is fixed, unescaped, in lower case."""
    before = None
    while before != text:  # a replacement can make room for another one
        before = text
        text = text if "<" in text else html.unescape(text)
        text = re.sub(r"\x1b\[[\d;]*[a-zA-Z]", "", text)  # a terminal's colours
        text = unicodedata.normalize("NFC", text.translate(FIXES))
    text = " ".join(html.unescape(html.unescape(text)).split()).lower()[:MAX_CHARACTERS]
    return ["".join(map(BYTES.get, word.encode("utf-8", "replace"))) for word in WORD.findall(text)]

def learn_merges(captions, num_merges, progress=False):
    """Up to `num_merges` BPE merges, 'a b' a line: always the most frequent pair, none that occurs once."""
    captions = tqdm(captions, "reading captions", delay=2, leave=False, disable=not progress)
    counts = Counter(word for caption in captions for word in split_words(caption))
    # A word is " c  a  t</w> ": each symbol has spaces of its own, so that split and replace find its pairs.
    words, times = [f" {'  '.join(word)}</w> " for word in counts], list(counts.values())
    pair_count, holders = Counter(), defaultdict(set)  # of a pair: how often it occurs, numbers of its words
    for number, word in enumerate(words):
        for pair in pairwise(word.split()):
            pair_count[pair] += times[number]
            holders[pair].add(number)
    heap, merges = sorted((-count, pair) for pair, count in pair_count.items()), []  # a sorted list is a heap
    for _ in tqdm(range(num_merges), "learning merges", delay=2, leave=False, disable=not progress):
        count, pair = heapq.heappop(heap) if heap else (0, None)
        while -count != pair_count[pair]:  # an old count: put the pair back with its present one
            count, pair = heapq.heappushpop(heap, (-pair_count[pair], pair))
        if -count < 2:
            break
        merges.append(" ".join(pair))
        joined, grown = "".join(pair), set()
        for number in holders.pop(pair):
            pieces, n = words[number].split(" %s  %s " % pair), times[number]
            words[number] = f" {joined} ".join(pieces)
            # Pairs change at a piece's ends alone. (first, last), which may be no pair, goes and comes back.
            for place, piece in enumerate(pieces):
                ends = piece.split(None, 1)[:1] + piece.rsplit(None, 1)[-1:]
                for change, left, right in (-n, pair[1], pair[0]), (n, joined, joined):
                    for near in pairwise([left] * (place > 0) + ends + [right] * (place < len(pieces) - 1)):
                        pair_count[near] += change
                        if joined in near:
                            holders[near].add(number)
                            grown.add(near)
        for new in grown:
            heapq.heappush(heap, (-pair_count[new], new))
    return "\n".join(merges)

class Tokenizer:
    """Captions to token ids. Vocabulary: 256 bytes, 256 bytes that end a word, the merges, <start>, <end>."""
    def __init__(self, merges, context_length=77):
        self.merges, self.context_length = merges, context_length
        pairs = [tuple(line.split()) for line in merges.splitlines()]
        symbols = [*BYTES.values(), *(symbol + "</w>" for symbol in BYTES.values()), *map("".join, pairs)]
        self.rank = {pair: rank for rank, pair in enumerate(pairs)}
        self.ids = {symbol: number for number, symbol in enumerate(symbols)}
        self.start, self.end, self.vocab_size = len(symbols), len(symbols) + 1, len(symbols) + 2

    @classmethod
    def from_file(cls, path, context_length=77):
        """CLIP's own vocabulary, bpe_simple_vocab_16e6.txt.gz. ValueError if the file is something else."""
        try:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                # A line of version, then the merges: CLIP takes as many as make 49,408 ids with the others.
                merges = file.read().splitlines()[1:49408 - 512 - 2 + 1]
            if not merges or any(len(line.split()) != 2 for line in merges):
                raise ValueError("not a list of two symbols a line")
        except Exception as error:  # OSError, EOFError, zlib.error ...
            raise ValueError(f"--vocab {path}: {error}; not CLIP's bpe_simple_vocab_16e6.txt.gz") from None
        return cls("\n".join(merges), context_length)

    @lru_cache(200_000)  # web captions never stop bringing new words
    def word_ids(self, word):
        """The ids of a word of byte symbols: of its pairs, the one learned first is merged, over and over."""
        word = f" {'  '.join(word)}</w> "
        while True:
            symbols = word.split()
            pair = min(pairwise(symbols), key=lambda pair: self.rank.get(pair, math.inf), default=None)
            if pair not in self.rank:
                return [self.ids[symbol] for symbol in symbols]
            word = word.replace(" %s  %s " % pair, " %s%s " % pair)

    def encode(self, captions):
        """(N, T) int64 of str or lists of words: <start>, ids, <end>, zeros; cut before <end> if too long."""
        tokens = torch.zeros(len(captions), self.context_length, dtype=torch.int64)
        for row, caption in zip(tokens, captions):
            words = split_words(caption) if isinstance(caption, str) else caption
            ids = [number for word in words for number in self.word_ids(word)]
            ids = [self.start, *ids[:self.context_length - 2], self.end]
            row[:len(ids)] = torch.tensor(ids)
        return tokens

def word_chances(captions, threshold=1e-6, least=5):
    """{word: its chance to go first, max(0, 1 - sqrt(threshold / its share of all words))}, after CLIPF
    (Liang and Larson, WACV 2026). Words that occur less than `least` times are left out: they go first."""
    counts = Counter(word for caption in captions for word in split_words(caption))
    total = counts.total()
    return {word: max(0.0, 1 - math.sqrt(threshold * total / n)) for word, n in counts.items() if n >= least}

# -----------------------------------------------------------------------------
# Batches. Each is made whole by one worker, from sample numbers that were fixed before the epoch began:
# neither the number of workers nor their timing can change what the model sees.

class Batches(torch.utils.data.Dataset):
    """Batch b of this rank: images (V, B, 3, H, W) uint8, boxes (V, B, 4), tokens (B, T), decoded (B,) bool,
    lost, fault. order: (steps, B) sample numbers; V: --views. `whole` adds to images the part around all
    views, in which they are the boxes (left, top, right, bottom in [0, 1]). The first `masked` batches have
    shorter captions. What does not decode is black, its cause in `lost`. fault: the disk's message, or ""."""
    def __init__(self, config, shards, index, order, tokenizer, epoch, whole=False, chances=None, masked=0):
        self.config, self.shards, self.index, self.order, self.epoch = config, shards, index, order, epoch
        self.tokenizer, self.whole, self.chances, self.masked = tokenizer, whole, chances, masked

    def __getitem__(self, number):
        config, samples, lost, fault = self.config, self.order[number], [], ""
        V, B, size = config.views, len(samples), config.image_size
        images = torch.zeros(V + bool(self.whole), B, 3, size, size, dtype=torch.uint8)
        boxes, decoded, words = torch.zeros(V, B, 4), torch.ones(B, dtype=torch.bool), [[] for _ in samples]
        for i, sample in enumerate(samples):
            row = self.index[sample]
            shard = self.shards[row["shard"]]
            # Seeded by the sample, so that its crops depend neither on its worker nor on its batch.
            rng = np.random.default_rng([config.seed, self.epoch, sample])
            try:
                texts, raw = captions(shard, row), read_bytes(shard, row["image"], row["image_size"])
                words[i] = split_words(texts[rng.integers(len(texts))]) if texts else []
                if not words[i]:
                    raise ValueError("empty caption")
                with open_image(raw) as image:
                    image = upright(image)
                    found = np.stack([random_box(*image.size, config.scale, rng) for _ in range(V)])
                    low, high = found[:, :2].min(0), found[:, 2:].max(0)  # corners of the part around them
                    images[:, i] = crops(image, np.vstack([found, [*low, *high]])[:len(images)], size)
                boxes[:, i] = torch.from_numpy((found - np.tile(low, 2)) / np.tile(high - low, 2))
                for view in images[:V, i] if V > 1 else ():
                    view.copy_(augment(view, rng))
                if config.text_tokens and number < self.masked:
                    words[i] = self.shorten(words[i], rng)
            except OSError as error:
                fault = message(error)
            except ValueError as error:
                decoded[i] = False
                lost.append(str(error))
        batch = images, boxes, self.tokenizer.encode(words), decoded
        # A worker without room in shared memory fails here; in the thread that sends, it would hang forever.
        for x in batch if torch.utils.data.get_worker_info() else ():
            x.share_memory_()
        return *batch, lost, fault

    def shorten(self, words, rng):
        """The words with the highest `noise - chance`, in order, of text_tokens tokens at most (CLIPF)."""
        score = rng.random(len(words)) - [self.chances.get(word, 1.0) for word in words]
        order = score.argsort()[::-1]
        sizes = np.array([len(self.tokenizer.word_ids(words[i])) for i in order])
        kept = sorted(order[sizes.cumsum() <= self.config.text_tokens])
        # The first word may be longer than that, in scripts without spaces: then its beginning stays.
        return [words[i] for i in kept] or [words[order[0]][:self.config.text_tokens]]

def captions(shard, row):
    """A list of str, maybe empty: lines of a row's .txt, or its json's "caption". ValueError if damaged."""
    raw = read_bytes(shard, row["text"], row["text_size"])
    try:  # -sig: some editors put a mark before the first line
        found = json.loads(raw)["caption"] if row["json"] else raw.decode("utf-8-sig")
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError("no UTF-8 json with a caption" if row["json"] else "caption is not UTF-8") from None
    lines = found.split("\n") if isinstance(found, str) else found if isinstance(found, list) else []
    return [line for line in lines if isinstance(line, str) and line.strip()]

def sample_captions(shards, index, limit=100_000):
    """The captions of up to `limit` samples, evenly spread: what the tokenizer learns its merges from."""
    for row in index[::max(1, math.ceil(len(index) / limit))]:
        with suppress(ValueError):  # such a sample is counted where it is trained on
            yield from captions(shards[row["shard"]], row)

# -----------------------------------------------------------------------------
# Writing shards.

def write_shards(folder, samples, shard_size=1000, name="{:05d}.tar"):
    """Writes {extension: bytes} samples as folder/00000.tar, ...; keys count on. Returns how many shards."""
    os.makedirs(folder, exist_ok=True)
    shard = -1
    for shard, part in groupby(enumerate(samples), key=lambda numbered: numbered[0] // shard_size):
        with write_whole(f"{folder}/{name.format(shard)}") as file, tarfile.open(None, "w", file) as tar:
            for number, files in part:
                for extension, raw in files.items():
                    member = tarfile.TarInfo(f"{number:09d}.{extension}")
                    member.size = len(raw)
                    tar.addfile(member, io.BytesIO(raw))
    return shard + 1

def list_samples(path):
    """Yields {extension: bytes} for a text file of lines `image path <TAB> caption`, paths relative to its
    folder. Lines of one image that follow each other are one sample. ValueError that names a bad line."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        numbered = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        for image, lines in groupby(numbered, key=lambda line: line[1].partition("\t")[0]):
            texts = []
            try:
                for number, line in lines:
                    texts.append(line.partition("\t")[2].rstrip("\r\n"))
                    if not image or not texts[-1].strip() or re.search("[\udc80-\udcff]", line):  # not UTF-8
                        raise ValueError(f"expected `image path <TAB> caption` in UTF-8, got {line!r:.80}")
                extension = image.rpartition(".")[2].lower()
                if extension not in IMAGE_EXTENSIONS:
                    raise ValueError(f"{image}: not one of {', '.join(IMAGE_EXTENSIONS)}")
                with open(os.path.join(os.path.dirname(path), image), "rb") as picture:
                    yield {extension: picture.read(), "txt": "\n".join(texts).encode()}
            except (OSError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: {message(error)}") from None

# -----------------------------------------------------------------------------
# Demo data: scenes of one or two coloured shapes, drawn rather than downloaded. As in photographs, the
# background repeats itself and the objects have detail inside, so there is something for a mask to find.

SCENE_SIZE = 48  # pixels, both sides
SPLITS = {"train": 20_000, "seen": 1_000, "unseen": 500, "retrieval": 500}
COLOURS = {"red": (255, 60, 50), "yellow": (255, 235, 40), "green": (50, 220, 70), "cyan": (60, 235, 245),
           "blue": (70, 120, 255), "purple": (180, 80, 255), "pink": (255, 140, 210), "white": (250,) * 3}
SHAPES = ("circle", "square", "triangle", "star", "cross", "bar", "ring", "crescent")
RADII = ("small", 0.24, 0.29), ("large", 0.32, 0.38)  # share of the picture; less if there are two objects

# Each colour and each shape misses one partner, always the same: these pairs are in no training scene.
PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES]  # the classes, in label order
UNSEEN = list(zip(COLOURS, SHAPES))
SEEN = [pair for pair in PAIRS if pair not in UNSEEN]

# Captions; most are short: a small model learns shape late. x, y: objects; r: relation; b: background.
RELATIONS = ((0, -1, ("left of", "to the left of")), (0, 1, ("right of", "to the right of")),
             (1, -1, ("above", "over")), (1, 1, ("below", "under")))  # axis, side of x, words
BACKGROUNDS = (("plain", ("a plain background", "a flat background")), ("blobs", ("soft blobs", "blobs")),
               ("gradient", ("a gradient", "a smooth gradient")))
ALONE = ("{x}", "there is {x}", "a picture of {x}", "an image of {x}", "a drawing of {x}", "this is {x}",
         "I see {x}", "here is {x}", "just {x}")
ONE = (*ALONE, "{x} on {b}", "there is {x} on {b}", "{x} in front of {b}", "on {b} there is {x}")
FULL = ("{x} {r} {y} on {b}", "there is {x} {r} {y} on {b}", "on {b} {x} is {r} {y}", "{b} with {x} {r} {y}",
        "a picture of {x} {r} {y} on {b}", "{x} {r} {y} in front of {b}")
TWO = (*FULL, "{x} {r} {y}", "{x} is {r} {y}", "a picture of {x} {r} {y}", "{x} and {y}")
CLASSES = {"classnames.txt": list(map(" ".join, PAIRS)),  # beside the shards: {text file: its lines}
           "zeroshot_classification_templates.txt": [text.format(x="a {c}") for text in ALONE]}
FILES = {"seen": CLASSES, "unseen": CLASSES, "retrieval": {"dataset_type.txt": ["retrieval"]}}

# Shapes have corners (angles in degrees, distances from the center), or are a disc and perhaps a hole in it.
OUTLINES = {"square": (np.arange(4) * 90 + 45, 1), "triangle": (np.arange(3) * 120 - 90, 1),
            "star": (np.arange(10) * 36 - 90, [1, 0.42] * 5), "bar": ([-17, 17, 163, 197], 1),
            "cross": (np.add.outer(np.arange(4) * 90, [-17, 17, 45]).ravel(), [1, 1, 0.42] * 4)}
DISCS = {"circle": [(0, 1)], "ring": [(0, 1), (0, 0.55)], "crescent": [(0, 1), (0.5, 0.75)]}  # shift, radius

def pick(rng, options):
    """One of the options, uniformly (rng.choice does the same, many times slower)."""
    return options[rng.integers(len(options))]

def draw_background(rng, kind):
    """(H, W, 3) float: two dark colours, mixed as the kind says."""
    Y, X = np.mgrid[-1:1:SCENE_SIZE * 1j, -1:1:SCENE_SIZE * 1j].astype(np.float32)
    mix, angle = np.full_like(X, rng.random()), rng.uniform(0, 2 * np.pi)
    if kind == "gradient":
        mix = 0.5 + 0.35 * (X * np.cos(angle) + Y * np.sin(angle))
    elif kind == "blobs":
        mix = np.asarray(Image.fromarray(rng.random((5, 5), np.float32)).resize(X.shape, Image.BICUBIC))
    dark = rng.uniform(15, 60) + rng.uniform(-12, 12, 3)
    return dark + mix[..., None] * (rng.uniform(15, 30) + rng.uniform(-8, 8, 3))

def draw_shape(shape, x, y, r, turn):
    """(H, W, 1) in [0, 1]: how much of each pixel a shape covers; its center, radius, turn in degrees."""
    mask = Image.new("L", (2 * SCENE_SIZE, 2 * SCENE_SIZE))  # drawn at twice the size for smooth edges
    draw, x, y, r = ImageDraw.Draw(mask), 2 * x, 2 * y, 2 * r
    if shape in OUTLINES:
        angles, radii = OUTLINES[shape]
        points = r * np.multiply(radii, np.exp(1j * np.radians(np.add(angles, turn)))) + x + 1j * y
        draw.polygon(points.view(float).tolist(), fill=255)  # x, y, x, y, ...
    for (shift, radius), fill in zip(DISCS.get(shape, ()), (255, 0)):
        draw.circle((x + shift * r, y), radius * r, fill)
    return np.asarray(mask.reduce(2), np.float32)[..., None] / 255

def demo_sample(split, index):
    """{extension: bytes} of scene `index`: jpg, and txt for train and retrieval, cls for seen and unseen."""
    # The split is part of the seed: no two splits share a random stream, and no test scene is a training one.
    rng = np.random.default_rng([0, list(SPLITS).index(split), index])
    full = split == "retrieval"  # two objects, and a caption that leaves nothing out
    classes = {"seen": SEEN, "unseen": UNSEEN}.get(split)
    if classes:
        pairs = [classes[index % len(classes)]]
    elif full:
        pairs = [SEEN[i] for i in rng.permutation(len(SEEN))[:2]]
    else:
        first, step = rng.integers(len(SEEN)), rng.integers(1, len(SEEN))
        pairs = [SEEN[first], SEEN[(first + step) % len(SEEN)]][:pick(rng, (1, 1, 1, 1, 2))]
    (kind, backgrounds), (axis, side, relations) = pick(rng, BACKGROUNDS), pick(rng, RELATIONS)
    pixels, names, S = draw_background(rng, kind), [], SCENE_SIZE
    for (colour, shape), side in zip(pairs, (side, -side)):
        size, least, most = pick(rng, RADII)
        r = S * rng.uniform(least, most) * (0.62 if len(pairs) == 2 else 1)
        room = S / 2 - r - 1              # how far the center may be from the middle
        center = rng.uniform(-room, room, 2)
        if len(pairs) == 2:               # in a half of its own: at least r from the middle line
            center[axis] = side * rng.uniform(min(r, room), room)
        cover = draw_shape(shape, *(center + S / 2), r, rng.uniform(-15, 15))
        grain = rng.uniform(-60, 60, (S, S, 1)) + rng.uniform(-15, 15, (S, S, 3))
        pixels = pixels + cover * (COLOURS[colour] + grain - pixels)
        names.append(f"a {size} {colour} {shape}" if full or rng.random() < 0.5 else f"a {colour} {shape}")
    template = pick(rng, FULL if full else (ONE, TWO)[len(pairs) - 1])
    caption = template.format(x=names[0], y=names[-1], r=pick(rng, relations), b=pick(rng, backgrounds))
    jpeg = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(jpeg, "JPEG", quality=90)
    extension, text = ("cls", str(PAIRS.index(pairs[0]))) if classes else ("txt", caption)
    return {"jpg": jpeg.getvalue(), extension: text.encode()}

def make_demo(folder):
    """Draws the demo data: train/ as shards, the rest as CLIP_benchmark's folders. Nothing if it is there."""
    if os.path.isdir(folder):
        return
    for split, number in SPLITS.items():
        target, bar = f"{folder}.part/{split}", tqdm(range(number), f"drawing demo/{split}", unit=" scenes")
        samples = (demo_sample(split, i) for i in bar)
        if split == "train":
            write_shards(target, samples)
            continue
        shards = write_shards(f"{target}/test", samples, name="{}.tar")
        for name, lines in {"test/nshards.txt": [shards], **FILES[split]}.items():
            with open(f"{target}/{name}", "w") as file:
                file.writelines(f"{line}\n" for line in lines)
    os.replace(folder + ".part", folder)  # under its name only when whole

def main():
    """The commands `pack` and `demo`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    pack = commands.add_parser("pack", help="make shards of a list of `image path <TAB> caption`")
    pack.add_argument("captions", help="text file, a sample per line; image paths are relative to its folder")
    pack.add_argument("out", help="folder for 00000.tar, 00001.tar, ...")
    commands.add_parser("demo", help="draw the demo data set").add_argument("out", help="folder to make")
    options = parser.parse_args()
    try:
        if options.command == "demo":
            make_demo(options.out)
        elif glob.glob(os.path.join(glob.escape(options.out), "*.tar")):
            raise ValueError(f"{options.out}: holds shards already; name another folder")
        else:
            samples = tqdm(list_samples(options.captions), "packing", unit=" samples")
            print(f"wrote {write_shards(options.out, samples, 10_000)} shards to {options.out}")
    except (ValueError, OSError, KeyboardInterrupt) as error:
        raise SystemExit(f"error: {message(error)}")

if __name__ == "__main__":
    main()
