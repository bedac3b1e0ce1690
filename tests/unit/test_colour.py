"""HDR and wide gamuts: every step beside plain formulas in float64, and files that are tagged so."""

from fractions import Fraction

import av
import numpy as np
import pytest

from utils.data.colour import FULL, Colours, colours_of, ordinary
from utils.data.media import decode_clip, probe

BT2020_TO_BT709 = np.array(  # BT.2087, annex 2 (there to four digits)
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
)


def pq_to_nits(code):
    power = code ** (32 / 2523)
    return 10000 * (max(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)) ** (16384 / 2610)


def nits_to_pq(nits):
    power = (nits / 10000) ** (2610 / 16384)
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** (2523 / 32)


def hlg_to_scene(code):
    return code**2 / 3 if code <= 0.5 else (np.exp((code - 0.55991073) / 0.17883277) + 0.28466892) / 12


def rolled_off(nits):
    """BT.2390-10, 5.4.1, from 1000 to 203 cd/m2, black at 0."""
    brightest = nits_to_pq(1000)
    e1, most = min(nits_to_pq(nits) / brightest, 1), nits_to_pq(203) / brightest
    start = 1.5 * most - 0.5
    if e1 < start:
        return nits
    t = (e1 - start) / (1 - start)
    e2 = (2 * t**3 - 3 * t**2 + 1) * start + (t**3 - 2 * t**2 + t) * (1 - start) + (-2 * t**3 + 3 * t**2) * most
    return pq_to_nits(e2 * brightest)


def reference(code, name):
    """One pixel, its code of 0 to 1 -> 0 to 255."""
    if name == "hlg":
        scene = np.array([hlg_to_scene(channel) for channel in code])
        nits = 1000 * (scene @ [0.2627, 0.6780, 0.0593]) ** 0.2 * scene
    else:
        nits = np.array([min(pq_to_nits(channel), 1000) for channel in code])
    nits = np.maximum(BT2020_TO_BT709 @ nits, 0)
    if nits.max() > 0:
        nits *= rolled_off(nits.max()) / nits.max()
    return 255 * (np.minimum(nits, 203) / 203) ** (1 / 2.4)


def shown(codes, name, gamut="BT.2020"):
    """`ordinary` of codes of 0 to 1, [N, 3] -> [N, 3]."""
    planes = np.round(np.asarray(codes).T * FULL).astype(np.uint16)[:, None]
    return ordinary(planes, Colours(name, gamut))[:, 0].T.astype(int)


@pytest.mark.parametrize("name", ["pq", "hlg"])
def test_hdr_is_what_the_formulas_say(name):
    codes = np.random.default_rng(0).random((500, 3))
    codes[0], codes[1], codes[2] = 0, 1, (1, 0, 0)
    apart = np.abs(shown(codes, name) - [reference(code, name) for code in codes])
    assert apart.max() < 1.5  # the reference is not rounded, and its matrix has four digits


def test_whites_and_peaks():
    # BT.2408, table 1: reference white, 203 cd/m2, is at 58 % of PQ and 75 % of HLG.
    assert shown([[0.5807] * 3], "pq").tolist() == shown([[0.75] * 3], "hlg").tolist() == [[230] * 3]
    assert shown([[0.7518] * 3, [1.0] * 3], "pq").tolist() == [[255] * 3] * 2  # 1000 cd/m2 and all above
    assert shown([[1.0] * 3, [0.0] * 3], "hlg").tolist() == [[255] * 3, [0] * 3]
    assert pq_to_nits(0.4946) == pytest.approx(88, abs=1)  # as far as that the roll-off changes nothing
    dark = shown([[0.4940] * 3], "pq")[0, 0]
    assert dark == round(255 * (pq_to_nits(0.4940) / 203) ** (1 / 2.4))


def test_grey_stays_grey_and_brighter_is_brighter():
    ramp = np.linspace(0, 1, 1000)[:, None].repeat(3, 1)
    for name in ("pq", "hlg", "wide"):
        levels = shown(ramp, name)
        assert np.ptp(levels, axis=1).max() <= 1 and (np.diff(levels[:, 1]) >= 0).all()


def test_wide_gamuts():
    # Display P3's (200, 100, 50) in gamma 2.4 -> BT.709, by the matrix of BT.709's and P3's primaries
    light = (np.array([200, 100, 50]) / 255) ** 2.4
    matrix = [[1.22494, -0.22494, 0], [-0.04206, 1.04206, 0], [-0.01964, -0.07864, 1.09827]]
    expected = 255 * np.clip(matrix @ light, 0, 1) ** (1 / 2.4)
    assert np.abs(shown([np.array([200, 100, 50]) / 255], "wide", "P3")[0] - expected).max() < 1
    assert shown([[1, 1, 1], [0, 0, 0], [0.5, 0.5, 0.5]], "wide").tolist() == [[255] * 3, [0] * 3, [128] * 3]


@pytest.mark.parametrize(
    ("transfer", "primaries", "expected"),
    [
        (16, 9, Colours("pq", "BT.2020")),
        (18, 9, Colours("hlg", "BT.2020")),
        (16, 2, Colours("pq", "BT.2020")),  # untagged primaries
        (16, 12, Colours("pq", "P3")),
        (16, 1, Colours("pq", "BT.709")),
        (1, 9, Colours("wide", "BT.2020")),
        (14, 9, Colours("wide", "BT.2020")),
        (13, 12, Colours("wide", "P3")),
        (1, 1, None),
        (2, 2, None),  # untagged
        (6, 6, None),
        (13, 1, None),
        (8, 9, None),  # linear light
    ],
)
def test_what_tags_ask_for(transfer, primaries, expected):
    assert colours_of(transfer, primaries) == expected


@pytest.mark.parametrize(("transfer", "name"), [(16, "pq"), (18, "hlg")])
def test_files_that_are_tagged(tmp_path, transfer, name):
    path, luma = tmp_path / "a.mkv", 64 + round(876 * 0.6)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=16)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p10le"
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace, context.color_range = transfer, 9, 9, 1
        frame = av.VideoFrame(64, 48, "yuv420p10le")
        for plane, value in zip(frame.planes, (luma, 512, 512), strict=True):
            plane.update(np.full(plane.buffer_size // 2, value, "<u2"))
        frame.colorspace, frame.color_range = 9, 1
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert probe(path).special == name
    pixels = decode_clip(path, True, Fraction(0), Fraction(16), 1, 48, 48)
    expected = round(reference([(luma - 64) / 876] * 3, name)[0])
    assert np.abs(pixels.astype(int) - expected).max() <= 1
