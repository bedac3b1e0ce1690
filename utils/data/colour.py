"""Brings the colours of HDR and wide-gamut video to ordinary ones: BT.709 primaries, gamma 2.4, 8 bits."""

from functools import cache
from typing import NamedTuple

import numpy as np

# Code points of ITU-T H.273, as FFmpeg has them.
_PQ, _HLG = 16, 18
_LOGARITHMIC_OR_LINEAR = frozenset([8, 9, 10, 17])  # no display shows them as they are, and nobody tags them by mistake
_GAMUTS = {9: "BT.2020", 11: "P3", 12: "P3"}

WHITE_NITS = 203.0  # cd/m2 of a white page in HDR, which ordinary white becomes: BT.2408, table 1
FULL = 255 * 256  # libswscale makes 16 bits of RGB by eight more bits behind the first eight: white is 0xff00
PEAK_NITS = 1000.0  # cd/m2 that are still told from brighter: the peak of HLG, and of most HDR10 masters
_GAMMA = 2.4  # of an ordinary display: BT.1886

# x, y of red, green and blue: BT.2020 table 3, SMPTE RP 431-2, BT.709 table 1; the white of all three is D65.
_PRIMARIES = {
    "BT.2020": ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    "P3": ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
    "BT.709": ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
}
_D65 = (0.3127, 0.3290)


class Colours(NamedTuple):
    """What the numbers of a picture stand for."""

    name: str  # "pq", "hlg" or "wide": what the recipe of a clip says of it
    gamut: str  # whose primaries


def colours_of(transfer: int, primaries: int) -> Colours | None:
    """What must be done to pictures with these tags (H.273 code points); None where they are ordinary, or untagged."""
    gamut = _GAMUTS.get(primaries)
    if transfer in (_PQ, _HLG):  # nobody codes these with other primaries without a tag
        told = gamut or ("BT.709" if primaries == 1 else "BT.2020")
        return Colours("pq" if transfer == _PQ else "hlg", told)
    return Colours("wide", gamut) if gamut and transfer not in _LOGARITHMIC_OR_LINEAR else None


def ordinary(rgb: np.ndarray, colours: Colours) -> np.ndarray:
    """Red, green and blue as the file codes them, uint16 [3, h, w], white or the brightest being `FULL` -> the same
    picture in ordinary colours, uint8.

    Light is made linear by the file's transfer (BT.2100 tables 4 and 5; HLG for a display of 1000 cd/m2) with white at
    203 cd/m2, and brought to BT.709 by its primaries; what this gamut lacks is clipped. Highlights are rolled off by
    the EETF of BT.2390-10, 5.4.1, from 1000 to 203 cd/m2, by the largest of red, green and blue, which keeps the hue.
    Darker than 88 cd/m2 nothing is changed.
    """
    linear = _linear(colours.name)[rgb]  # [3, h, w], float32
    if colours.name == "hlg":
        red, green, blue = linear
        luminance = np.float32(0.2627) * red + np.float32(0.6780) * green + np.float32(0.0593) * blue
        linear *= _ootf()[_index(luminance)]
    if colours.gamut != "BT.709":
        linear = _times(_to_bt709(colours.gamut), linear)
    np.maximum(linear, 0, out=linear)
    if colours.name != "wide":
        linear *= _roll_off()[_index(linear.max(axis=0) / np.float32(_BRIGHTEST))]
    return _coded()[_index(linear)]


# --- tables -----------------------------------------------------------------------------------------------------------

_STEPS = 65535
_BRIGHTEST = 2 * PEAK_NITS / WHITE_NITS  # of one channel in BT.709, white being 1: full BT.2020 red comes to 1.7 peaks


def _index(light: np.ndarray) -> np.ndarray:
    """Place of `light`, 0 to 1, in a table whose entries stand for squares, closer where it is dark; clips above 1."""
    place = np.sqrt(light)
    place *= np.float32(_STEPS)
    place += np.float32(0.5)
    return np.minimum(place, np.float32(_STEPS), out=place).astype(np.uint16)


def _squares() -> np.ndarray:
    return np.linspace(0, 1, _STEPS + 1) ** 2


def _times(matrix: np.ndarray, rgb: np.ndarray) -> np.ndarray:
    """`matrix` [3, 3] times each pixel, written out: a BLAS may round another way on another machine."""
    red, green, blue = rgb
    return np.stack([row[0] * red + row[1] * green + row[2] * blue for row in matrix])


@cache
def _linear(name: str) -> np.ndarray:
    """Light by 16-bit code, float32 [65536]: 1 is white, and for HLG the brightest of the scene."""
    code = np.minimum(np.arange(2**16) / FULL, 1)
    if name == "pq":
        return (np.minimum(_pq_nits(code), PEAK_NITS) / WHITE_NITS).astype(np.float32)
    if name == "hlg":
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        return np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12).astype(np.float32)
    return (code**_GAMMA).astype(np.float32)


@cache
def _ootf() -> np.ndarray:
    """Factor that makes light of an HLG scene light of the display, by the luminance in the scene, float32."""
    return (PEAK_NITS / WHITE_NITS * _squares() ** 0.2).astype(np.float32)


@cache
def _roll_off() -> np.ndarray:
    """Factor by which light of a given brightness, in parts of `_BRIGHTEST`, is dimmed, float32."""
    light = np.maximum(_squares() * _BRIGHTEST, 1e-9)
    return (_rolled_off(np.minimum(light * WHITE_NITS, PEAK_NITS)) / WHITE_NITS / light).astype(np.float32)


def _rolled_off(nits: np.ndarray) -> np.ndarray:
    """BT.2390-10, 5.4.1, steps 1 to 3 with a black level of 0: `PEAK_NITS` becomes `WHITE_NITS`."""
    peak = _pq_code(PEAK_NITS)
    told, most = _pq_code(nits) / peak, _pq_code(WHITE_NITS) / peak
    knee = 1.5 * most - 0.5
    t = np.maximum(told - knee, 0) / (1 - knee)
    bent = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * most
    return np.where(told < knee, nits, _pq_nits(bent * peak))


_M1, _M2, _C1, _C2, _C3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128  # BT.2100, table 4


def _pq_nits(code: np.ndarray) -> np.ndarray:
    root = code ** (1 / _M2)
    return 10000 * (np.maximum(root - _C1, 0) / (_C2 - _C3 * root)) ** (1 / _M1)


def _pq_code(nits: np.ndarray | float) -> np.ndarray:
    power = (np.asarray(nits) / 10000) ** _M1
    return ((_C1 + _C2 * power) / (1 + _C3 * power)) ** _M2


@cache
def _coded() -> np.ndarray:
    """What an ordinary display is given for light of 0 to 1, uint8."""
    return np.round(255 * _squares() ** (1 / _GAMMA)).astype(np.uint8)


@cache
def _to_bt709(gamut: str) -> np.ndarray:
    """Linear light with the primaries of `gamut` -> with those of BT.709, float32 [3, 3]."""
    return (np.linalg.inv(_to_xyz("BT.709")) @ _to_xyz(gamut)).astype(np.float32)


def _to_xyz(gamut: str) -> np.ndarray:
    """CIE XYZ of linear light, [3, 3], by SMPTE RP 177."""
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in (*_PRIMARIES[gamut], _D65)]).T
    primaries, white = columns[:, :3], columns[:, 3]
    return primaries * np.linalg.solve(primaries, white)
