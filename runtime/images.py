"""Pictures: reading, the exact preprocessing of the model, writing.

Contract: a picture is uint8 [H, W, 3] RGB, upright. Resizes of pictures are Pillow's antialiased bicubic (reference
semantics §11.5, §12); resizes of tensors are not, see `runtime.resize`. An unusable file raises MediaError.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from runtime.errors import MediaError
from runtime.files import check_output, published, writing

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
MAX_PIXELS = 100_000_000
VIDEO_SUFFIXES = frozenset(
    [".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".flv", ".wmv", ".3gp", ".ogv"]
)
_LIMIT = f"at most {MAX_PIXELS // 10**6} megapixels are read, shrink it"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class _NotAPicture(MediaError):
    """The file is readable, but no picture."""


def load_image(path: Path | str) -> np.ndarray:
    """Read a picture as uint8 [H, W, 3] RGB: EXIF orientation applied, transparency over white.

    Raises:
        MediaError: missing, empty, not a picture, a video, damaged, or more than `MAX_PIXELS` pixels.
    """
    with _open(Path(path)) as picture:
        return _upright_rgb(picture)


def is_picture(path: Path | str) -> bool:
    """Whether the file is a picture by content; a picture that moves is not. MediaError if it cannot be read at all."""
    try:
        with _open(Path(path)) as picture:
            return getattr(picture, "n_frames", 1) == 1
    except _NotAPicture:
        return False


def picture_metadata(path: Path | str) -> dict[str, str]:
    """Text that a picture file carries: the chunks of a PNG, the comment of a GIF. MediaError as for `load_image`."""
    with _open(Path(path)) as picture:
        picture.load()  # text may stand behind the pixels
        texts = {
            key: value.decode("utf-8", "replace") if isinstance(value, bytes) else value
            for key, value in picture.info.items()
        }
        return {key: str(value) for key, value in texts.items() if isinstance(key, str) and isinstance(value, str)}


@contextmanager
def _open(path: Path) -> Iterator[Image.Image]:
    """Open a picture file; every way it can be unusable, also while it is read, ends in MediaError."""
    if not path.exists():
        raise MediaError(f"{path}: no such file")
    if not path.is_file():
        raise MediaError(f"{path}: is not a file; name a picture file")
    try:
        if path.stat().st_size == 0:
            raise MediaError(f"{path}: is empty; give a PNG, JPEG or WebP picture")
        with Image.open(path) as opened:
            width, height = opened.size
            if width * height > MAX_PIXELS:
                raise MediaError(f"{path}: {width}x{height} is too large; {_LIMIT}")
            yield opened
    except UnidentifiedImageError as error:
        if path.suffix.lower() in VIDEO_SUFFIXES:
            raise _NotAPicture(f"{path}: is a video, not a picture; pass it to `ask` or `reconstruct`") from error
        raise _NotAPicture(f"{path}: is not a picture this program can read; give a PNG, JPEG or WebP file") from error
    except Image.DecompressionBombError as error:
        raise MediaError(f"{path}: is too large; {_LIMIT}") from error
    except (OSError, SyntaxError, ValueError, struct.error, EOFError) as error:  # what Pillow's decoders raise
        raise MediaError(f"{path}: is damaged or cannot be read ({error}); save it again as PNG") from error


def _upright_rgb(picture: Image.Image) -> np.ndarray:
    upright = ImageOps.exif_transpose(picture)
    if upright.mode in ("I", "I;16", "I;16B", "I;16L"):  # Pillow clips 16 bits to 8 instead of scaling
        upright = Image.fromarray((np.asarray(upright).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if upright.has_transparency_data:
        layer = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return np.asarray(upright.convert("RGB"))


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize uint8 [H, W, 3] to `size` (width, height), stretching; same size is returned untouched."""
    if image.shape[1::-1] == tuple(size):
        return image
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def tokenizer_pixels(image: np.ndarray, side: int) -> np.ndarray:
    """uint8 [H, W, 3] -> normalised float32 [3, side, side] for the visual tokenizer (reference semantics §11.5)."""
    pixels = resize_image(image, (side, side)).astype(np.float32) / np.float32(255)
    return np.ascontiguousarray(((pixels - MEAN) / STD).transpose(2, 0, 1))


def to_signed(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] -> float32 [3, H, W] in [-1, 1]."""
    pixels = image.astype(np.float32) / np.float32(255)
    return np.ascontiguousarray((pixels * 2 - 1).transpose(2, 0, 1))


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """float [..., 3, H, W] in [-1, 1] -> uint8 [..., H, W, 3]; clamped, rounded half to even (§8.1)."""
    scaled = np.clip(frames.astype(np.float32, copy=False) / 2 + np.float32(0.5), 0, 1) * np.float32(255)
    return np.moveaxis(np.rint(scaled).astype(np.uint8), -3, -1)


def save_image(path: Path | str, image: np.ndarray, metadata: Mapping[str, str], force: bool) -> None:
    """Write uint8 [H, W, 3] to `path`; a PNG carries `metadata` in text chunks, other types carry none.

    Raises:
        UsageError: unknown suffix, folder missing or not writable, or the file exists and not `force`.
    """
    path = Path(path)
    check_output(path, SUFFIXES, force)
    options: dict[str, object] = {}
    if path.suffix.lower() == ".png":
        text = PngImagePlugin.PngInfo()
        for key, value in metadata.items():
            text.add_itxt(key, value)
        options["pnginfo"] = text
    else:
        options["quality"] = 95
    with published(path) as staging, writing(path):
        Image.fromarray(image).save(staging, **options)  # type: ignore[arg-type]
