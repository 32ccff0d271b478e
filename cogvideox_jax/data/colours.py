"""Brings the colours of decoded frames to sRGB in 8 bits: HDR, wide gamuts, transparency.

HDR is converted by one fixed rule, so equal frames give equal bytes whatever stands beside them:

1. The signal becomes light on a display: PQ by its own definition (SMPTE ST 2084), HLG by its
   inverse OETF and a gamma of 1.2 on each channel (BT.2100 for a display of 1000 cd/m²; on each
   channel as SDR's chain of camera and display does, and as FFmpeg's zscale does).
2. 203 cd/m² is white (BT.2408's reference white), so what was graded for SDR looks as it did.
3. The primaries become BT.709's; what lies outside is clipped.
4. The signal in sRGB is kept up to KNEE; a smooth curve brings the highlights above it, up to PEAK,
   to white. Ours: BT.2390's curve would darken white itself to four fifths.
"""

import functools

import av
import numpy as np
from av.video.reformatter import Colorspace, Interpolation
from jaxtyping import Float32, UInt8, UInt16
from PIL import Image

# How colours are converted: the same bytes on every machine.
EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
# What transparent pictures lie on, in sRGB: white, as in browsers.
BACKGROUND = (255, 255, 255)

SDR, HLG, PQ = "sdr", "hlg", "pq"  # The transfers that are told apart.
WHITE, PEAK = 203.0, 1000.0  # cd/m².
KNEE = 0.95  # A fraction of the sRGB signal.

DOLBY_VISION_5 = (
  "Dolby Vision profile 5, whose colours only Dolby's decoders know; convert it to SDR or HDR10"
)
# FFmpeg's numbers for what a file names.
_HDR = {16: PQ, 18: HLG}
_UNTAGGED, _ICTCP, _IPT = 2, 14, 15
_BT2020, _P3 = 9, 12
# Linear RGB of these primaries -> linear RGB of BT.709's (from their chromaticities; white is D65).
_TO_BT709 = {
  _BT2020: (
    (1.660491, -0.587641, -0.072850),
    (-0.124550, 1.132900, -0.008349),
    (-0.018151, -0.100579, 1.118730),
  ),
  _P3: (
    (1.224940, -0.224940, 0.0),
    (-0.042057, 1.042057, 0.0),
    (-0.019638, -0.078636, 1.098274),
  ),
}
_BAND = 2**18  # Pixels converted at once, so that large frames cost little memory.


def transfer_of(frame: av.VideoFrame) -> str:
  """Returns SDR, HLG or PQ: what the frame is tagged as."""
  return transfer_named(frame.color_trc)


def transfer_named(number: int) -> str:
  """Returns SDR, HLG or PQ for the number of a transfer (ITU-T H.273)."""
  return _HDR.get(number, SDR)


def is_wide(primaries: int) -> bool:
  """Returns whether the number of primaries (ITU-T H.273) names others than BT.709's."""
  return primaries in _TO_BT709


def to_srgb_of_8_bits(
  pixels: UInt8[np.ndarray, "H W 3"], primaries: int, transfer: int
) -> UInt8[np.ndarray, "H W 3"]:
  """Returns a picture as sRGB. Its colours are named by the numbers of ITU-T H.273."""
  named = transfer_named(transfer)
  if named != SDR and primaries == _UNTAGGED:
    primaries = _BT2020
  return _to_srgb(pixels, named, primaries)


def unreadable(frame: av.VideoFrame) -> str:
  """Returns why the frame's colours cannot be converted; empty if they can."""
  if frame.colorspace == _IPT:
    return DOLBY_VISION_5
  return "its colours are ICtCp, which is not supported" if frame.colorspace == _ICTCP else ""


def is_costly(frame: av.VideoFrame) -> bool:
  """Returns whether a frame's light has to be computed: HDR and wide gamuts."""
  return transfer_of(frame) != SDR or is_wide(frame.color_primaries)


def rgb(frame: av.VideoFrame, size: tuple[int, int] | None = None) -> UInt8[np.ndarray, "H W 3"]:
  """Returns a frame as sRGB, as it is stored: neither turned nor stretched.

  Args:
    size: (height, width) to reduce it to; None keeps the frame's.
  """
  transfer, primaries = transfer_of(frame), frame.color_primaries
  if transfer != SDR and primaries == _UNTAGGED:
    primaries = _BT2020
  wide = is_costly(frame)
  transparent = any(component.is_alpha for component in frame.format.components)
  height, width = size or (frame.height, frame.width)
  pixels = frame.to_ndarray(
    format="rgb48le" if wide else "rgba" if transparent else "rgb24",
    width=width,
    height=height,
    src_colorspace=_matrix(frame, transfer),
    interpolation=EXACT | Interpolation.FULL_CHR_H_INT,
    threads=1,
  )
  if wide:
    return _to_srgb(pixels, transfer, primaries)
  return np.asarray(opaque(Image.fromarray(pixels))) if transparent else pixels


def opaque(image: Image.Image) -> Image.Image:
  """Returns an RGBA picture as RGB, laid on BACKGROUND."""
  below = Image.new("RGB", image.size, BACKGROUND)
  below.paste(image, mask=image.getchannel("A"))
  return below


def _matrix(frame: av.VideoFrame, transfer: str) -> Colorspace | None:
  """Returns the matrix of a frame that names none, as players choose it; else None."""
  if frame.colorspace != _UNTAGGED:
    return None
  if transfer != SDR:
    return Colorspace.BT2020
  return Colorspace.ITU709 if frame.width >= 1280 or frame.height > 576 else None


def _to_srgb(
  pixels: UInt16[np.ndarray, "H W 3"] | UInt8[np.ndarray, "H W 3"], transfer: str, primaries: int
) -> UInt8[np.ndarray, "H W 3"]:
  to_light = _light(transfer)[:: 257 if pixels.dtype == np.uint8 else 1]
  peak = PEAK / WHITE if transfer != SDR else 1.0
  from_light = _signal(peak)
  matrix = np.array(_TO_BT709.get(primaries, np.eye(3)), np.float32)
  result = np.empty(pixels.shape, np.uint8)
  rows = max(1, _BAND // pixels.shape[1])
  for top in range(0, len(pixels), rows):
    light = to_light[pixels[top : top + rows]]
    red, green, blue = np.moveaxis(light, -1, 0)
    for channel, (of_red, of_green, of_blue) in enumerate(matrix):
      mixed = red * of_red + green * of_green + blue * of_blue  # No BLAS: its bits vary.
      index = np.sqrt(np.clip(mixed * np.float32(1 / peak), 0, 1)) * 65535 + 0.5
      result[top : top + rows, :, channel] = from_light[index.astype(np.uint16)]
  return result


@functools.cache
def _light(transfer: str) -> Float32[np.ndarray, "65536"]:
  """Returns the light that each signal of 16 bits stands for; 1 is white."""
  signal = np.linspace(0, 1, 65536)
  if transfer == PQ:
    root = signal ** (32 / 2523)
    ratio = np.maximum(root - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * root)
    return (10_000 / WHITE * ratio ** (16384 / 2610)).astype(np.float32)
  if transfer == HLG:
    scene = np.where(
      signal <= 0.5,
      signal**2 / 3,
      (np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12,
    )
    return (1000 / WHITE * scene**1.2).astype(np.float32)
  low = signal / 12.92
  return np.where(signal <= 0.04045, low, ((signal + 0.055) / 1.055) ** 2.4).astype(np.float32)


@functools.cache
def _signal(peak: float) -> UInt8[np.ndarray, "65536"]:
  """Returns the sRGB signal for light of (index / 65535)² of `peak`, in 8 bits."""
  signal = _srgb(np.linspace(0, 1, 65536) ** 2 * peak)
  if peak > 1:
    span = _srgb(np.array(peak)) - KNEE
    slope = span / (1 - KNEE)  # So that the curve goes on as the line below it ends.
    part = np.maximum(signal - KNEE, 0) / span
    signal = np.minimum(signal, KNEE) + (1 - KNEE) * slope * part / (1 + (slope - 1) * part)
  return np.round(255 * signal).astype(np.uint8)


def _srgb(light: np.ndarray) -> np.ndarray:
  return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
