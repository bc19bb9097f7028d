"""Everything between shards on disk and a batch in memory: tar shards, images, captions, tokens.

    python data.py pack captions.tsv OUT     make shards of a list of `image path <TAB> caption`
    python data.py demo OUT                  draw the demo data set

The file follows a sample: its place in a shard, its turn, its pixels, its token ids, its batch; then writing.
Who is in a hurry reads tar_samples, epoch_order, random_box, crops, Tokenizer.encode and Batches.
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
import sys
import tarfile
import tempfile
import time
import unicodedata
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter, ImageOps, PngImagePlugin
from tqdm import tqdm

IMAGE_EXTENSIONS = ("webp", "png", "jpg", "jpeg")  # of two images of a sample, CLIP_benchmark takes the first
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training pixels in [0, 1], RGB
STD = (0.26862954, 0.26130258, 0.27577711)

# -----------------------------------------------------------------------------
# Files and messages. Nothing about CLIP here: skip it.

@contextmanager
def write_whole(path, suffix=".part"):
    """A binary file to write, which gets its name when it is whole and on disk; else OSError."""
    target = os.path.realpath(path)  # a link stays one
    part = target + suffix
    if os.path.exists(target) and not os.path.isfile(target):
        raise OSError(f"{path}: not a plain file, so it can't be replaced")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError if the disk is full
        said = " ".join(str(error).split())  # torch may say it in several lines
        cause = getattr(error, "strerror", None) or f"is the disk full? torch says: {said:.200}"
        raise OSError(f"{path}: could not be written ({cause}); one from before is untouched") from None
    finally:
        if os.path.exists(part):
            os.remove(part)

@contextmanager
def make_whole(folder):
    """A new folder to fill, which gets its name when it is whole. FileExistsError if another process
    was first."""
    folder = os.path.abspath(folder)
    parent, name = os.path.split(folder)
    os.makedirs(parent, exist_ok=True)
    # In a folder of another name each time: two processes may make the same one.
    with tempfile.TemporaryDirectory(prefix=f"{name}.", suffix=".part", dir=parent) as ours:
        part = f"{ours}/{name}"
        os.mkdir(part)
        yield part
        try:
            os.rename(part, folder)
        except OSError:
            raise FileExistsError(f"{folder}: is there already; name another folder") from None

# What to say to a user whose error matches a pattern.
HINTS = {
    "KeyboardInterrupt": "interrupted",
    "shared memory": "too little shared memory: pass --workers 0, or give docker a larger --shm-size",
    r"worker \(pid|process pool": "a worker was killed, maybe for lack of memory: pass fewer --workers"}

def message(error):
    """The line of an error that a user gets to see; "" for a bug, which deserves its traceback."""
    if isinstance(error, torch.OutOfMemoryError):
        memory = torch.cuda.get_device_properties().total_memory / 2 ** 30
        return (f"out of GPU memory, {memory:.0f} GiB; half the --batch-size and twice the --accum make the "
                "same update in about 4/3 of the time")
    for pattern, hint in HINTS.items():
        if re.search(pattern, repr(error)):
            return hint
    if getattr(error, "filename", None):
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, (ValueError, OSError)):
        return str(error)
    return ""

# A request to stop, or a warning that the job's time ends, as schedulers send them.
STOP_SIGNALS = []
for name in "SIGINT SIGTERM SIGQUIT SIGHUP SIGUSR1 SIGUSR2 SIGXCPU SIGALRM SIGPWR".split():
    if hasattr(signal, name):  # Windows has but the first two
        STOP_SIGNALS.append(getattr(signal, name))

def ignore_signals(*_):
    """For helper processes: a signal to stop is for the training loop, which still needs its batch."""
    for number in STOP_SIGNALS:  # Slurm sends them to all processes of a job
        signal.signal(number, signal.SIG_IGN)

def hear_signals(handler):
    """Calls handler(number, frame) when a signal asks this process to stop."""
    for number in STOP_SIGNALS:
        by_nohup = number.name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN
        if not by_nohup:  # it has said to ignore a closed terminal
            signal.signal(number, handler)

class Unread:
    """A stream whose reader may be gone (`| head`), or that was closed: what cannot be written is
    dropped, and the work goes on."""
    def __init__(self, stream):
        self.stream = stream
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text):
        """Writes what the encoding knows; names in a tar need not be text."""
        with suppress(OSError, ValueError, AttributeError):
            self.stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))

    def flush(self):
        """As a file's."""
        with suppress(OSError, ValueError, AttributeError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)

# -----------------------------------------------------------------------------
# What is in a tar: tarfile tells where each file begins. The rest is about damaged tars: skip it.

def what_it_is(path, otherwise="not a tar"):
    """What a file that should be something else seems to be, by its first bytes."""
    with open(path, "rb") as file:
        head = file.read(64)
    if not head:
        return f"empty file, {otherwise}"
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):  # gzip, bzip2, xz, zstd
        return "compressed: unpack it first"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer: run `git lfs pull`"
    return otherwise

def tar_members(path):
    """Yields (name, offset, size) of each file in a tar. ValueError where the tar is damaged."""
    length = os.path.getsize(path)
    try:
        with tarfile.open(path, "r:") as tar:
            members = iter(tar.next, None) if tar.firstmember else ()  # Python 3.10 fails in an empty tar
            for member in members:
                tar.members = []  # else tarfile keeps them all
                if not member.offset < tar.offset <= length:
                    raise EOFError  # the next header has to lie further on, and inside the file
                if member.isfile():  # and neither a folder nor a link
                    yield member.name, member.offset_data, member.size
            tar.fileobj.seek(tar.offset)
            rest = tar.fileobj.read(1 << 24)
    except OSError as error:
        raise OSError(f"{path}: {error.strerror}") from None  # the disk's fault
    except EOFError:
        raise ValueError("truncated") from None
    except Exception:  # tarfile's own errors, and whatever else a damaged header provokes
        raise ValueError(what_it_is(path)) from None
    # tarfile ends without a word at anything that is no header. Only zeros may follow the files.
    if not rest or len(rest) % 512:
        raise ValueError(f"truncated, the tar breaks off at byte {length}")
    if rest.strip(b"\0"):
        raise ValueError(f"more than zeros after the end, byte {tar.offset}: "
                         "a damaged header, or two tars in one")

# -----------------------------------------------------------------------------
# Shards. A tar is a chain of headers, each followed by its file: reading the headers alone tells
# where every image and caption lies. With that index, any sample is one read away, and an epoch is
# a permutation.

def expand(patterns):
    """Shards by path, glob or range, '{00000..01242}.tar', in order. ValueError if one is missing."""
    paths = []
    for path in patterns:
        if os.path.isdir(path):
            raise ValueError(f"--data {path}: a folder; name its shards, such as '{path.rstrip('/')}/*.tar'")
        braces = re.search(r"\{(\d+)\.\.(\d+)\}", path)
        if os.path.exists(path):
            found = [path]
        elif braces:
            first, last = braces.groups()
            numbers = range(int(first), int(last) + 1)
            found = expand(path.replace(braces[0], str(n).zfill(len(first)), 1) for n in numbers)
        else:
            folder, name = os.path.split(path)
            plain = path.replace("[", "[[]")  # of 'set [v2]/*.tar' the brackets mean themselves
            mixed = os.path.join(folder.replace("[", "[[]"), name)
            found = sorted(glob.glob(plain) or glob.glob(mixed) or glob.glob(path))
        if not found:
            raise ValueError(f"--data {path}: no such file")
        paths += found
    return list(dict.fromkeys(paths))  # a shard named twice is read once

def tar_samples(path):
    """([(key, {extension: (offset, size)})], fault or ""): a tar's samples in its order, up to its
    fault. A key ends at the first dot of a file name. A key that comes again with a file that its
    sample has begins another sample, as in webdataset."""
    samples = []
    files_of = {}  # of the samples that may still grow, by key
    last_key = None
    try:
        for path_inside, offset, size in tar_members(path):
            folder, slash, name = path_inside.rpartition("/")
            stem, dot, extension = name.partition(".")
            if not stem or not dot:
                continue  # a hidden file, such as macOS puts beside others; a README
            key = folder + slash + stem
            extension = extension.lower()
            files = files_of.get(key, ())
            # Of 0.jpg 0.txt 1.jpg 1.txt 0.png 0.txt, two tars in one, the png is no part of the first 0.
            second = extension in IMAGE_EXTENSIONS and any(other in files for other in IMAGE_EXTENSIONS)
            if extension in files or (second and key != last_key):
                files_of = {}  # names start again: what follows is of no sample so far
            if key not in files_of:
                files_of[key] = {}
                samples.append((key, files_of[key]))
            files_of[key][extension] = (offset, size)
            last_key = key
        if not samples:
            raise ValueError("a tar without samples")
    except ValueError as error:
        return samples, f"{path}: {error}"
    return samples, ""

INDEX = np.dtype([("shard", "i4"), ("image", "i8"), ("image_size", "i8"),
                  ("text", "i8"), ("text_size", "i8"), ("json", "?")])

def index_shard(path, number):
    """(rows of INDEX, [(cause, name)] of what is no sample, fault or "") of shard `number`."""
    rows = []
    lost = []
    samples, fault = tar_samples(path)
    for key, files in samples:
        images = [files[extension] for extension in IMAGE_EXTENSIONS if extension in files]
        text = files.get("txt") or files.get("json")
        if images and text:
            rows.append((number, *images[0], *text, "txt" not in files))
            continue
        pictures = [name for name in files if name.rpartition(".")[2] in IMAGE_EXTENSIONS]
        for name in pictures:
            cause = "no caption"
            if "." in name:  # photo.1.jpg and photo.2.jpg are one sample `photo`, without a jpg
                cause += " (a key ends at the first dot of the file name)"
            lost.append((cause, f"{key}.{name}"))
        if not pictures:
            lost.append(("no image", key))
    if fault:
        fault += f"; usable pairs: {len(rows)}"
    elif not rows:
        fault = f"{path}: no image with a caption inside; expected pairs such as 0001.jpg, 0001.txt"
    return np.array(rows, INDEX), lost, fault

def scan(shards, workers, progress):
    """(index, faults, {cause: [how many samples are lost, the first one's name]}) of all shards."""
    with ProcessPoolExecutor(max(1, workers), initializer=ignore_signals) as pool:
        over_all = pool.map if workers else map
        results = over_all(index_shard, shards, range(len(shards)))
        bar = tqdm(results, "reading shards", len(shards), leave=False, disable=not progress, delay=1)
        rows, lost_of_shards, faults = zip(*bar)
    lost = {}
    for lost_here in lost_of_shards:
        for cause, name in lost_here:
            lost.setdefault(cause, [0, name])
            lost[cause][0] += 1
    return np.concatenate(rows), [fault for fault in faults if fault], lost

def kept_scan(path, stamp):
    """What `scan` found at an earlier start, or None. Ranks share the pages of the .npy in memory."""
    with suppress(Exception):  # not there yet, or damaged: it is only a copy
        with open(f"{path}.json") as file:
            kept_stamp, faults, lost = json.load(file)
        if kept_stamp == stamp:
            return np.load(f"{path}.npy", mmap_mode="r"), faults, lost
    return None

def build_index(shards, max_bad=0.1, folder="", workers=0, progress=False):
    """(N,) INDEX rows, one per image with a caption, in the shards' order; and a list of warnings.
    ValueError if more than the share max_bad of the shards is broken or of the samples incomplete,
    OSError if a disk fails. `folder` keeps the index for the next start and for other ranks."""
    # Is a kept index still true? A file's ctime changes with its content and with its permissions.
    stamp = [[path, os.stat(path).st_ctime_ns] for path in shards]
    # Machines with shards on disks of their own may share the folder: each has an index of its own there.
    path = f"{folder}/index-{zlib.crc32(json.dumps(stamp).encode()):08x}"
    kept = kept_scan(path, stamp) if folder else None
    index, faults, lost = kept or scan(shards, workers, progress)
    if folder and not kept:
        suffix = f".{os.urandom(4).hex()}.part"  # two machines may write at the same time
        with write_whole(f"{path}.npy", suffix) as file:
            np.save(file, index)
        with write_whole(f"{path}.json", suffix) as file:
            file.write(json.dumps([stamp, faults, lost]).encode())
    if len(faults) > max_bad * len(shards):
        raise ValueError("\n".join(faults))
    if not lost:
        return index, faults
    num_lost = sum(count for count, _ in lost.values())
    num_samples = num_lost + len(index)
    causes = "; ".join(f"{count} with {cause}, such as {name}" for cause, (count, name) in lost.items())
    remark = f"{num_lost} of {num_samples} samples passed over: {causes}"
    if num_lost > max_bad * num_samples:
        raise ValueError(f"--data: {remark}; that is more than --max-bad {max_bad}")
    return index, faults + [remark]

# How far a sample may fall back: about one shard of img2dataset. That mixes neighbours, and yet few
# shards are read at a time.
WINDOW = 10_000

def epoch_order(index, seed, epoch):
    """(N,) sample numbers, by seed and epoch alone: a random order that reads shard after shard."""
    rng = np.random.default_rng([seed, epoch])
    turns = rng.permutation(index["shard"].max() + 1)                    # each shard's turn
    order = turns[index["shard"]].argsort(kind="stable")                 # (N,) shard after shard
    places = np.arange(len(order)) + rng.uniform(0, WINDOW, len(order))  # all fall back a bit
    return order[places.argsort(kind="stable")]

# Files stay open, for the next samples come from the same shards. Of more than 64, Python closes
# the one that was not asked for longest, as nobody holds it any more: so no thread may share this
# with another.
open_shard = lru_cache(maxsize=64)(open)

def read_bytes(path, offset, size, again=True):
    """`size` bytes of a file from `offset` on. OSError, which names the file, if that fails twice."""
    try:
        # pread, not seek and read: workers inherit open files, and with them one position for all.
        raw = os.pread(open_shard(path, "rb", buffering=0).fileno(), size, offset)
    except OSError as error:
        if again:  # a network disk may have been away for a moment; files opened before then stay unreadable
            open_shard.cache_clear()
            time.sleep(10)
            return read_bytes(path, offset, size, again=False)
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

def pass_over(png, position, length):
    """Reads a chunk of a PNG for its checksum alone."""
    return png.fp.read(length)

# Texts and colour profiles do not change the pixels of a PNG. Yet Pillow unpacks them all, and refuses
# the picture if they are large.
for kind in ("tEXt", "zTXt", "iTXt", "iCCP"):
    setattr(PngImagePlugin.PngStream, f"chunk_{kind}", pass_over)

@contextmanager
def pillow_errors():
    """Turns what Pillow raises at damaged bytes (OSError, SyntaxError, ...) into a ValueError."""
    try:
        yield
    except Exception as error:
        cause = re.sub(r" <_io.*>", "", str(error))  # an address in memory: causes are to be counted
        raise ValueError(cause or type(error).__name__) from None

def open_image(raw):
    """The picture in `raw` bytes, not yet decoded. ValueError with the cause if it cannot be opened."""
    with pillow_errors():
        image = Image.open(io.BytesIO(raw), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels, more than {MAX_PIXELS}")
    return image

def eight_bits(image):
    """A picture, decoded; of a grey one of more than 8 bits (modes I;16, I, F) the upper 8, unless all
    its values fit into 8. ValueError if it does not decode."""
    with pillow_errors():
        image.load()
    if not image.mode.startswith(("I", "F")):
        return image
    grey = np.array(image, np.float64)
    if image.mode.startswith("I;16") or grey.max() > 255:
        grey /= 256
    return Image.fromarray(grey.clip(0, 255).astype(np.uint8))

def upright(image):
    """A photograph as its orientation tag says it was held; a damaged tag says nothing."""
    with suppress(Exception):
        if image.getexif().get(0x0112, 1) != 1:
            return ImageOps.exif_transpose(image)
    return image

def to_rgb(image):
    """RGB as people see the picture: transparent parts lie on white."""
    image = eight_bits(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")

def random_box(width, height, scale, rng):
    """(left, top, right, bottom) of a random part: `scale` of the area, sides 3:4 to 4:3.

    The augmentation of Inception (Szegedy et al. 2015), with the defaults that torchvision gave it."""
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w = round(math.sqrt(area * aspect))
        h = round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left = rng.integers(0, width - w + 1)
            top = rng.integers(0, height - h + 1)
            return np.array([left, top, left + w, top + h])
    # A very long picture: the largest part of an allowed shape, from its middle.
    w = min(width, round(height * 4 / 3))
    h = min(height, round(width * 4 / 3))
    left = (width - w) // 2
    top = (height - h) // 2
    return np.array([left, top, left + w, top + h])

def crops(image, boxes, size):
    """The parts `boxes` (n, 4) of a PIL image: (n, 3, size, size) uint8, RGB."""
    # Draft mode: a JPEG decodes sooner to a half, a quarter or an eighth of its size. Where the
    # resize shrinks that to two thirds or less, photographs lose no more by it than by being saved
    # again at quality 90.
    width = image.width
    shortest = (boxes[:, 2:] - boxes[:, :2]).min()
    enough = 1.5 * size / shortest
    if enough <= 0.5 and image.draft(None, (int(width * enough), int(image.height * enough))):
        boxes = (boxes / round(width / image.width)).round().astype(int)
    pixels = torch.from_numpy(np.array(to_rgb(image)))        # (H, W, 3)
    pixels = pixels.permute(2, 0, 1)[None]                    # (1, 3, H, W)
    resized = []
    for left, top, right, bottom in boxes:
        crop = pixels[..., top:bottom, left:right]
        # The same as Pillow's resize up to rounding, five times as fast.
        resized.append(F.interpolate(crop, (size, size), mode="bicubic", antialias=True))
    return torch.cat(resized)

def random_crop(image, config, rng):
    """What plain training sees of a photograph: a random part of it, (3, S, S) uint8."""
    box = random_box(*image.size, config.scale, rng)
    return crops(image, box[None], config.image_size)[0]

def normalize(images):
    """(..., 3, H, W) uint8 -> float32 on the same device, as open_clip does it, to the last bit."""
    # non_blocking: the CPU does not wait until these few numbers have reached the GPU.
    mean, std = torch.tensor([MEAN, STD])[..., None, None].to(images.device, non_blocking=True)
    return (images.float() / 255 - mean) / std

# -----------------------------------------------------------------------------
# Two views, for --views 2 (SLIP, A-CLIP). Skip it: plain training never comes here.

# A-CLIP's strengths; None: the hue.
JITTER = ((ImageEnhance.Brightness, 0.4), (ImageEnhance.Contrast, 0.4),
          (ImageEnhance.Color, 0.2), (None, 0.1))

def jitter(image, rng):
    """Other brightness, contrast, saturation and hue, one after the other in random order."""
    for number in rng.permutation(4):
        enhancer, strength = JITTER[number]
        change = rng.uniform(-strength, strength)
        if enhancer:
            image = enhancer(image).enhance(1 + change)
        else:
            turn = Image.new("HSV", image.size, (round(255 * change) % 256, 0, 0))
            image = ImageChops.add_modulo(image.convert("HSV"), turn).convert("RGB")
    return image

def augment(view, rng):
    """A view (3, H, W) uint8 in other colours, grey, blurred or solarised, as often as in A-CLIP."""
    image = Image.fromarray(view.permute(1, 2, 0).numpy())
    if rng.random() < 0.8:
        image = jitter(image, rng)
    if rng.random() < 0.2:
        image = image.convert("L").convert("RGB")
    if rng.random() < 0.1:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2)))
    if rng.random() < 0.2:
        image = ImageOps.solarize(image, 128)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)

def two_views(image, config, rng):
    """pixels (3, 3, S, S) uint8: two augmented views and, as it is, the part around both; boxes
    (2, 4): where in that part the views lie (left, top, right, bottom in [0, 1])."""
    boxes = np.stack([random_box(*image.size, config.scale, rng) for _ in range(2)])  # (2, 4)
    corner = boxes[:, :2].min(0)
    opposite = boxes[:, 2:].max(0)
    pixels = crops(image, np.vstack([boxes, [*corner, *opposite]]), config.image_size)
    for view in pixels[:2]:
        view.copy_(augment(view, rng))
    boxes = (boxes.reshape(2, 2, 2) - corner) / (opposite - corner)  # views, corners, x and y
    return pixels, torch.from_numpy(boxes).flatten(1).float()

# -----------------------------------------------------------------------------
# Words: read Tokenizer.encode, skip the rest. Byte-level BPE (Sennrich et al. 2016) in the dialect
# of CLIP: a word is its bytes, the last marked with </w>; merges join the pair of symbols that was
# most frequent in training, in the order learned.

# CLIP's printable stand-in for each byte: itself if it shows (! to ~, ¡ to ¬, ® to ÿ), else one of
# the characters from U+0100 on.
BYTES = {byte: chr(byte) for byte in [*range(33, 127), *range(161, 173), *range(174, 256)]}
for byte in range(256):
    if byte not in BYTES:
        BYTES[byte] = chr(256 + len(BYTES) - 188)  # 188 of them show

# CLIP first repairs a caption by ftfy.fix_text. We do what that does, except for one thing: it also
# guesses which text was once decoded wrongly ("mojibake"). Code of a character -> what replaces it:
FIXES = {}
for code in [*range(9), 11, *range(14, 32), 127, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)]:
    FIXES[code] = None  # control characters go, and other marks that nobody sees
for code in range(128, 160):  # a control in Latin-1, but a letter or a quote in Windows-1252
    FIXES[code] = bytes([code]).decode("cp1252", "ignore") or chr(code)
for code in [*map(ord, "ĲĳŉǄǅǆǇǈǉǊǋǌǱǲǳﬀﬁﬂﬃﬄﬆ"), 0x3000, *range(0xFF01, 0xFFF0)]:
    # Two letters in one become two, letters of another width (of Chinese fonts) become plain.
    FIXES[code] = unicodedata.normalize("NFKC", chr(code))
FIXES[ord("ﬅ")] = "ſt"  # NFKC says st
FIXES |= str.maketrans("ʼ‘’‚‛“”„‟", "'''''" + '""""')

# CLIP's pattern says \p{L} and \p{N}, which Python's re lacks. \w is letters, all numbers and _;
# \d is only the decimal digits, so other numbers (² or ½) are listed. [a-z] is for speed; ſ is
# another case of s.
NUMBERS = "".join(c for c in map(chr, range(0x20000)) if unicodedata.category(c) in ("Nl", "No"))
WORD = re.compile("|".join([
    r"'(?:[sſtmd]|re|ve|ll)",          # it's, don't, we're
    rf"(?:[a-z]|[^\W\d_{NUMBERS}])+",  # letters
    rf"[\d{NUMBERS}]",                 # a single digit
    r"(?:[^\s\w]|_)+"]))               # what is left, but no space
MAX_CHARACTERS = 2000  # far more than 77 tokens hold; merging takes the square of a word's length

def split_words(text):
    """The words of a caption, repaired and in lower case: each a string of byte symbols."""
    before = None
    while text != before:  # a replacement can make room for another one
        before = text
        if "<" not in text:  # else it may be HTML, in which &lt; means something else, says ftfy
            text = html.unescape(text)
        text = re.sub(r"\x1b\[[\d;]*[a-zA-Z]", "", text)  # a terminal's colours
        text = text.translate(FIXES)
        text = unicodedata.normalize("NFC", text)
    text = html.unescape(html.unescape(text))
    text = " ".join(text.split()).lower()
    words = []
    for word in WORD.findall(text[:MAX_CHARACTERS]):
        raw = word.encode("utf-8", "replace")
        words.append("".join([BYTES[byte] for byte in raw]))
    return words

def count_words(captions):
    """How often each word occurs, a Counter."""
    counts = Counter()
    for caption in captions:
        counts.update(split_words(caption))
    return counts

def symbols_of(word):
    """A word before any merge: a list of byte symbols, the last with the mark of the end."""
    return [*word[:-1], word[-1] + "</w>"]

def merge(symbols, pair):
    """The list with each such pair of neighbours joined to one symbol."""
    left, right = pair
    joined = left + right
    merged = []
    for symbol in symbols:
        if symbol == right and merged and merged[-1] == left:
            merged[-1] = joined
        else:
            merged.append(symbol)
    return merged

def most_frequent(heap, pair_count):
    """Takes the most frequent pair off a heap of (-count, pair); None if that is empty."""
    while heap:  # a count there may be an old one, too high: then the pair goes back with its new count
        count, pair = heapq.heappop(heap)
        if -count == pair_count[pair]:
            return pair
        heapq.heappush(heap, (-pair_count[pair], pair))
    return None

def learn_merges(captions, num_merges, progress=False):
    """Up to `num_merges` merges, 'a b' a line: always the most frequent pair, none that occurs once."""
    quiet = dict(delay=2, leave=False, disable=not progress)
    counts = count_words(tqdm(captions, "reading captions", **quiet))
    words = [symbols_of(word) for word in counts]
    times = list(counts.values())
    # The plain algorithm counts all pairs anew after each merge: that would take days. But a merge
    # changes only the words that hold its pair. So we remember which these are, take their pairs
    # out of the counts before it, and put them back in after it.
    pair_count = Counter()
    holders = defaultdict(set)  # pair -> numbers of the words that hold it, or held it once
    for number, word in enumerate(words):
        for pair in pairwise(word):
            pair_count[pair] += times[number]
            holders[pair].add(number)
    # Nor do we search all pairs for the largest count, it is on top of a heap. Counts that fall are
    # put right when they come up there, counts that grow at once. Of equal counts, the pair that is
    # first in the alphabet wins.
    heap = [(-count, pair) for pair, count in pair_count.items()]
    heapq.heapify(heap)
    merges = []
    for _ in tqdm(range(num_merges), "learning merges", **quiet):
        pair = most_frequent(heap, pair_count)
        if pair is None or pair_count[pair] < 2:
            break
        merges.append(" ".join(pair))
        joined = "".join(pair)
        grown = set()
        for number in holders.pop(pair):
            merged = merge(words[number], pair)
            if len(merged) == len(words[number]):
                continue  # an earlier merge took the pair out of this word
            for near in pairwise(words[number]):
                pair_count[near] -= times[number]
            words[number] = merged
            for near in pairwise(merged):
                pair_count[near] += times[number]
                if joined in near:
                    holders[near].add(number)
                    grown.add(near)
        for near in grown:
            heapq.heappush(heap, (-pair_count[near], near))
    return "\n".join(merges)

class Tokenizer:
    """Captions to token ids: 256 bytes, 256 bytes that end a word, the merges, <start>, <end>."""
    def __init__(self, merges, context_length=77):
        self.merges = merges
        self.context_length = context_length
        pairs = [tuple(line.split()) for line in merges.splitlines()]
        symbols = list(BYTES.values())
        symbols += [symbol + "</w>" for symbol in symbols]
        symbols += ["".join(pair) for pair in pairs]
        self.rank = {pair: rank for rank, pair in enumerate(pairs)}
        self.ids = {symbol: number for number, symbol in enumerate(symbols)}
        self.start = len(symbols)
        self.end = len(symbols) + 1
        self.vocab_size = len(symbols) + 2

    @classmethod
    def from_file(cls, path, context_length=77):
        """CLIP's own, bpe_simple_vocab_16e6.txt.gz. ValueError if the file is something else."""
        try:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                lines = file.read().splitlines()
            merges = lines[1:48895]  # after a line of version; CLIP takes only so many: 49,408 ids
            if not merges or any(len(line.split()) != 2 for line in merges):
                raise ValueError("not a list of two symbols a line")
        except Exception as error:  # OSError, EOFError, zlib.error ...
            raise ValueError(f"--vocab {path}: {error}; not CLIP's bpe_simple_vocab_16e6.txt.gz") from None
        return cls("\n".join(merges), context_length)

    @lru_cache(200_000)  # web captions never stop bringing new words
    def word_ids(self, word):
        """The ids of a word: of its pairs, the one that was learned first is merged, over and over."""
        symbols = symbols_of(word)
        while len(symbols) > 1:
            pair = min(pairwise(symbols), key=lambda pair: self.rank.get(pair, math.inf))
            if pair not in self.rank:
                break
            symbols = merge(symbols, pair)
        return [self.ids[symbol] for symbol in symbols]

    def encode(self, captions):
        """(N, T) int64 of str or lists of words: <start>, ids, <end>, zeros; too long ones are cut."""
        tokens = torch.zeros(len(captions), self.context_length, dtype=torch.int64)
        for row, caption in zip(tokens, captions):
            words = split_words(caption) if isinstance(caption, str) else caption
            ids = []
            for word in words:
                ids += self.word_ids(word)
            ids = [self.start, *ids[:self.context_length - 2], self.end]
            row[:len(ids)] = torch.tensor(ids)
        return tokens

# -----------------------------------------------------------------------------
# Captions of a shard, and how often their words occur.

def read_captions(shard, row):
    """A list of str, maybe empty: lines of a .txt or the "caption" of a .json; else ValueError."""
    raw = read_bytes(shard, row["text"], row["text_size"])
    try:
        found = raw.decode("utf-8-sig")  # -sig: some editors put a mark before the first line
        if row["json"]:
            found = json.loads(found)["caption"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError("caption is not UTF-8, or a json without one") from None
    if isinstance(found, str):
        found = found.split("\n")
    if not isinstance(found, list):
        return []
    return [line for line in found if isinstance(line, str) and line.strip()]

def sample_captions(shards, index, limit=100_000):
    """The captions of up to `limit` samples, evenly spread: merges are learned from these."""
    step = max(1, math.ceil(len(index) / limit))
    for row in index[::step]:
        with suppress(ValueError):  # such a sample is counted where it is trained on
            yield from read_captions(shards[row["shard"]], row)

def word_chances(captions, threshold=1e-6, least=5):
    """{word: its chance to be dropped first}, max(0, 1 - sqrt(threshold / its share of all words)).

    After CLIPF (Liang and Larson, WACV 2026), for --text-tokens. Words that occur less than `least`
    times are left out: they are dropped before all others."""
    counts = count_words(captions)
    total = counts.total()
    chances = {}
    for word, count in counts.items():
        if count >= least:
            chances[word] = max(0.0, 1 - math.sqrt(threshold * total / count))
    return chances

# -----------------------------------------------------------------------------
# Batches. Each is made whole by one worker, from sample numbers that were fixed before the epoch
# began: neither the number of workers nor their timing can change what the model sees.

class Batch(NamedTuple):
    """What a rank gets for one step. With --views 2, images are (B, 3, 3, H, W), see two_views."""
    images: torch.Tensor   # (B, 3, H, W) uint8, black where `decoded` is False
    tokens: torch.Tensor   # (B, T) int64
    decoded: torch.Tensor  # (B,) bool; False, too, if a sample has no caption
    boxes: torch.Tensor    # (B, 2, 4) with --views 2, else None
    lost: list             # why samples did not decode, a str each
    fault: str             # what the disk said when it failed: the run has to stop; else ""

def shared(batch):
    """The batch, which its worker may now send: in shared memory, if there is a worker."""
    if torch.utils.data.get_worker_info():
        # Without room in shared memory, this fails here; the thread that sends would hang forever.
        for field in batch:
            if isinstance(field, torch.Tensor):
                field.share_memory_()
    return batch

@dataclass
class Batches:
    """batches[number] is a Batch: this rank's images of one step."""
    config: object
    shards: list           # their paths
    index: np.ndarray      # (N,) of INDEX
    order: np.ndarray      # (steps, B) numbers of samples in the index
    tokenizer: object
    epoch: int
    chances: dict = None   # {word: its chance to be dropped}, for --text-tokens
    num_masked: int = 0    # only before this batch

    def __getitem__(self, number):
        if self.config.views == 1:
            batch = self.load(number, random_crop)
            return shared(batch._replace(images=torch.stack(batch.images)))
        batch = self.load(number, two_views)
        images, boxes = zip(*batch.images)
        return shared(batch._replace(images=torch.stack(images), boxes=torch.stack(boxes)))

    def load(self, number, see):
        """A Batch whose images are a list: what see(image, config, rng) makes of each, or of a black
        one."""
        config = self.config
        samples = self.order[number]
        black = see(Image.new("RGB", (1, 1)), config, np.random.default_rng(0))
        images = [black] * len(samples)
        words = [[]] * len(samples)
        decoded = torch.ones(len(samples), dtype=torch.bool)
        lost = []
        fault = ""
        for i, sample in enumerate(samples):
            row = self.index[sample]
            shard = self.shards[row["shard"]]
            # Seeded by the sample, so that its crop depends neither on its worker nor on its batch.
            rng = np.random.default_rng([config.seed, self.epoch, sample])
            try:
                captions = read_captions(shard, row)
                raw = read_bytes(shard, row["image"], row["image_size"])
                if captions:
                    words[i] = split_words(captions[rng.integers(len(captions))])
                if not words[i]:
                    raise ValueError("empty caption")
                with open_image(raw) as image:
                    images[i] = see(upright(image), config, rng)
                if config.text_tokens and number < self.num_masked:
                    words[i] = self.shorten(words[i], rng)
            except OSError as error:
                fault = message(error)
            except ValueError as error:  # its words may stay: the loss leaves out the pair
                decoded[i] = False
                lost.append(str(error))
        return Batch(images, self.tokenizer.encode(words), decoded, None, lost, fault)

    def shorten(self, words, rng):
        """The words with the highest `noise - chance`, in order, that fit --text-tokens (CLIPF)."""
        score = rng.random(len(words)) - [self.chances.get(word, 1.0) for word in words]
        order = score.argsort()[::-1]
        sizes = np.array([len(self.tokenizer.word_ids(words[i])) for i in order])
        kept = order[sizes.cumsum() <= self.config.text_tokens]
        if len(kept) == 0:  # the first is too long, in a script without spaces: keep its beginning
            return [words[order[0]][:self.config.text_tokens]]
        return [words[i] for i in sorted(kept)]

# -----------------------------------------------------------------------------
# Writing shards. Training never does: skip it.

def write_shards(folder, samples, shard_size=1000, name="{:05d}.tar"):
    """Writes {extension: bytes} samples as folder/00000.tar, ...; keys count on. Returns how many
    shards."""
    os.makedirs(folder, exist_ok=True)
    num_shards = 0
    for shard, numbered in groupby(enumerate(samples), lambda pair: pair[0] // shard_size):
        with write_whole(f"{folder}/{name.format(shard)}") as file, tarfile.open(None, "w", file) as tar:
            for number, files in numbered:
                for extension, raw in files.items():
                    member = tarfile.TarInfo(f"{number:09d}.{extension}")
                    member.size = len(raw)
                    tar.addfile(member, io.BytesIO(raw))
        num_shards += 1
    return num_shards

def list_lines(path):
    """Yields (image path, caption) of a list's lines that are not blank. ValueError that names a
    bad line."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                image, _, caption = line.decode("utf-8-sig").rstrip("\r\n").partition("\t")
                if not image or not caption.strip():
                    raise ValueError(f"expected `image path <TAB> caption` in UTF-8, got {line!r:.80}")
                if image.rpartition(".")[2].lower() not in IMAGE_EXTENSIONS:
                    raise ValueError(f"{image}: not one of {', '.join(IMAGE_EXTENSIONS)}")
                image = os.path.join(os.path.dirname(path), image)
                open(image, "rb").close()
            except (OSError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: {message(error)}") from None
            yield image, caption

def list_samples(lines):
    """Yields {extension: bytes} for lines (image path, caption); of one image, those that follow each
    other are one sample. ValueError if an image cannot be read."""
    for image, same in groupby(lines, lambda line: line[0]):
        captions = [caption for _, caption in same]
        try:
            with open(image, "rb") as file:
                raw = file.read()
        except OSError as error:
            raise ValueError(f"{image}: {error.strerror}") from None
        extension = image.rpartition(".")[2].lower()
        yield {extension: raw, "txt": "\n".join(captions).encode()}

def pack(path, folder):
    """Makes shards of a text file of lines `image path <TAB> caption`, paths relative to its folder,
    in a new folder; returns how many. ValueError for a bad line."""
    if os.path.exists(os.path.abspath(folder)):
        raise ValueError(f"{folder}: is there already; name a new folder")
    # All lines first: a bad one is to be found before hours of work, not after.
    lines = list(tqdm(list_lines(path), "checking", unit=" lines"))
    if not lines:
        raise ValueError(f"{path}: no line in it")
    with make_whole(folder) as part:
        return write_shards(part, tqdm(list_samples(lines), "packing", unit=" samples"), 10_000)

# -----------------------------------------------------------------------------
# Demo data: scenes of one or two coloured shapes, drawn rather than downloaded. As in photographs,
# the background repeats itself and the objects have detail inside, so there is something for a
# mask to find. Nothing else depends on how they are drawn: skip it.

SCENE_SIZE = 48  # pixels, both sides
SPLITS = {"train": 20_000, "seen": 1_000, "unseen": 500, "retrieval": 500}
COLOURS = {"red": (255, 60, 50), "yellow": (255, 235, 40), "green": (50, 220, 70), "cyan": (60, 235, 245),
           "blue": (70, 120, 255), "purple": (180, 80, 255), "pink": (255, 140, 210), "white": (250,) * 3}
SHAPES = ("circle", "square", "triangle", "star", "cross", "bar", "ring", "crescent")
RADII = (("small", 0.24, 0.29), ("large", 0.32, 0.38))  # share of the picture; less if there are two objects

# Each colour and each shape misses one partner, always the same: these pairs are in no training
# scene.
PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES]  # the classes, in label order
UNSEEN = list(zip(COLOURS, SHAPES))
SEEN = [pair for pair in PAIRS if pair not in UNSEEN]

# Captions; most are short: a small model learns shape late. x, y: objects; r: relation; b:
# background.
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
CLASSES = {"classnames.txt": [" ".join(pair) for pair in PAIRS],  # beside the shards: {text file: its lines}
           "zeroshot_classification_templates.txt": [text.format(x="a {c}") for text in ALONE]}
FILES = {"seen": CLASSES, "unseen": CLASSES, "retrieval": {"dataset_type.txt": ["retrieval"]}}

# A shape has corners, (angles in degrees, distances from the center), or is a disc and perhaps a
# hole in it, (shift to the right, radius).
CROSS_ANGLES = [-17, 17, 45, 73, 107, 135, 163, 197, 225, 253, 287, 315]
OUTLINES = {"square": ([45, 135, 225, 315], 1), "triangle": ([-90, 30, 150], 1),
            "star": (np.arange(-90, 270, 36), [1, 0.42] * 5), "bar": ([-17, 17, 163, 197], 1),
            "cross": (CROSS_ANGLES, [1, 1, 0.42] * 4)}
DISCS = {"circle": [(0, 1)], "ring": [(0, 1), (0, 0.55)], "crescent": [(0, 1), (0.5, 0.75)]}

def pick(rng, options):
    """One of the options, uniformly (rng.choice does the same, many times slower)."""
    return options[rng.integers(len(options))]

def draw_background(rng, kind):
    """(H, W, 3) float: two dark colours, mixed as the kind says."""
    ticks = np.linspace(-1, 1, SCENE_SIZE, dtype=np.float32)
    X, Y = np.meshgrid(ticks, ticks)
    mix = np.full_like(X, rng.random())
    angle = rng.uniform(0, 2 * np.pi)
    if kind == "gradient":
        mix = 0.5 + 0.35 * (X * np.cos(angle) + Y * np.sin(angle))
    elif kind == "blobs":
        noise = Image.fromarray(rng.random((5, 5), np.float32))
        mix = np.asarray(noise.resize(X.shape, Image.BICUBIC))
    dark = rng.uniform(15, 60) + rng.uniform(-12, 12, 3)
    lighter_by = rng.uniform(15, 30) + rng.uniform(-8, 8, 3)
    return dark + mix[..., None] * lighter_by

def draw_shape(shape, center, r, turn):
    """(H, W, 1) in [0, 1]: how much of each pixel a shape covers; its center, radius, turn in
    degrees."""
    mask = Image.new("L", (2 * SCENE_SIZE, 2 * SCENE_SIZE))  # drawn at twice the size for smooth edges
    draw = ImageDraw.Draw(mask)
    center = 2 * center
    r = 2 * r
    if shape in OUTLINES:
        angles, distances = OUTLINES[shape]
        angles = np.radians(np.add(angles, turn))
        x = center[0] + r * np.multiply(distances, np.cos(angles))
        y = center[1] + r * np.multiply(distances, np.sin(angles))
        draw.polygon(list(zip(x, y)), fill=255)
    else:
        fill = 255
        for shift, radius in DISCS[shape]:
            draw.circle(center + (shift * r, 0), radius * r, fill)
            fill = 0  # the second disc is a hole
    return np.asarray(mask.reduce(2), np.float32)[..., None] / 255

def pick_objects(rng, split, index):
    """The one or two (colour, shape) pairs of a scene."""
    if split == "retrieval":
        return [SEEN[i] for i in rng.permutation(len(SEEN))[:2]]
    if split != "train":
        classes = SEEN if split == "seen" else UNSEEN
        return [classes[index % len(classes)]]
    first = rng.integers(len(SEEN))
    second = first + rng.integers(1, len(SEEN))
    objects = [SEEN[first], SEEN[second % len(SEEN)]]
    return objects[:pick(rng, (1, 1, 1, 1, 2))]  # one in five scenes keeps both

def demo_sample(split, index):
    """{extension: bytes} of scene `index`: jpg, and txt for train and retrieval, cls for seen and
    unseen."""
    # The split is part of the seed: no two splits share a random stream, and no test scene is a
    # training one.
    rng = np.random.default_rng([0, list(SPLITS).index(split), index])
    full = split == "retrieval"  # two objects, and a caption that leaves nothing out
    objects = pick_objects(rng, split, index)
    kind, backgrounds = pick(rng, BACKGROUNDS)
    axis, side, relations = pick(rng, RELATIONS)
    pixels = draw_background(rng, kind)
    names = []
    S = SCENE_SIZE
    for colour, shape in objects:
        size, least, most = pick(rng, RADII)
        r = S * rng.uniform(least, most)
        if len(objects) == 2:
            r *= 0.62
        room = S / 2 - r - 1              # how far the center may be from the middle
        center = rng.uniform(-room, room, 2)
        if len(objects) == 2:             # in a half of its own: at least r from the middle line
            center[axis] = side * rng.uniform(min(r, room), room)
            side = -side
        cover = draw_shape(shape, center + S / 2, r, rng.uniform(-15, 15))
        grain = rng.uniform(-60, 60, (S, S, 1)) + rng.uniform(-15, 15, (S, S, 3))
        pixels = pixels + cover * (COLOURS[colour] + grain - pixels)
        name = f"{colour} {shape}"
        if full or rng.random() < 0.5:
            name = f"{size} {name}"
        names.append(f"a {name}")
    if full:
        template = pick(rng, FULL)
    elif len(objects) == 2:
        template = pick(rng, TWO)
    else:
        template = pick(rng, ONE)
    caption = template.format(x=names[0], y=names[-1], r=pick(rng, relations), b=pick(rng, backgrounds))
    jpeg = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(jpeg, "JPEG", quality=90)
    if split in ("seen", "unseen"):
        label = PAIRS.index(objects[0])
        return {"jpg": jpeg.getvalue(), "cls": str(label).encode()}
    return {"jpg": jpeg.getvalue(), "txt": caption.encode()}

def draw_split(split, folder):
    """A split as shards, train, or as a folder of CLIP_benchmark, the others."""
    bar = tqdm(range(SPLITS[split]), f"drawing demo/{split}", unit=" scenes")
    samples = (demo_sample(split, index) for index in bar)
    if split == "train":
        write_shards(folder, samples)
        return
    num_shards = write_shards(f"{folder}/test", samples, name="{}.tar")
    for name, lines in {"test/nshards.txt": [num_shards], **FILES[split]}.items():
        with write_whole(f"{folder}/{name}") as file:
            file.writelines(f"{line}\n".encode() for line in lines)

def make_demo(folder):
    """Draws the demo data. Nothing if they are there, or another process made them meanwhile."""
    if os.path.isdir(f"{folder}/train"):
        return
    if os.path.exists(folder):
        raise ValueError(f"{folder}: is there already, but without demo data; rename it")
    with suppress(FileExistsError), make_whole(folder) as part:
        for split in SPLITS:
            draw_split(split, f"{part}/{split}")

# -----------------------------------------------------------------------------
# The commands.

def main():
    """The commands `pack` and `demo`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("pack", help="make shards of a list of `image path <TAB> caption`")
    command.add_argument("captions", help="text file, a sample per line; paths are relative to its folder")
    command.add_argument("out", help="new folder for 00000.tar, 00001.tar, ...")
    command = commands.add_parser("demo", help="draw the demo data set")
    command.add_argument("out", help="folder to make")
    options = parser.parse_args()
    hear_signals(signal.default_int_handler)  # as Ctrl-C: what is half done is removed
    try:
        if options.command == "demo":
            make_demo(options.out)
            print(f"{options.out} holds the demo data")
            return
        num_shards = pack(options.captions, options.out)
        print(f"wrote {num_shards} shards to {options.out}")
    except (ValueError, OSError, KeyboardInterrupt) as error:
        raise SystemExit(f"error: {message(error)}")

if __name__ == "__main__":
    sys.stdout = Unread(sys.stdout)
    sys.stderr = Unread(sys.stderr)
    main()
