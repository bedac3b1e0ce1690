"""Which mask belongs to which file, from folders, indexes and archives, and what is told where one does not fit."""

import io
import json
import shutil
import tarfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.helpers.media import write_image, write_video
from tests.unit.test_precache import Settings
from utils.data.masks import MaskJob, Strides
from utils.data.records import Bucket, Clip
from utils.data.scan import Scan, scan_directory
from utils.data.stat_index import StatIndex

WHITE = (255, 255, 255)


@pytest.fixture
def folder(tmp_path):
    """Three videos and a picture, masks of two of them beside, in a folder of their own."""
    data, masks = tmp_path / "data", tmp_path / "masks"
    for path in (data, masks, masks / "sub"):
        path.mkdir()
    for name in ("a", "b", "c"):
        write_video(data / f"{name}.mp4", 12)
    write_image(data / "still.png")
    for name in "a.png", "still.jpg":
        write_image(masks / name, colour=WHITE)
    write_video(masks / "b.mkv", 12)
    return data


def scan(path: Path, progress=None, **settings) -> Scan:
    index = StatIndex(path.parent / "index.jsonl")
    chosen = Settings(path=path, default_caption="x", **settings)
    return scan_directory(chosen, workers=0, index=index, archives=path.parent / "archives", progress=progress)


def masks_of(found: Scan, root: Path) -> dict[str, str]:
    return {m.path.name: m.mask.path.relative_to(root).as_posix() if m.mask else "" for m in found.media}


def reasons(found: Scan) -> dict[str, str]:
    assert all(item.bad for item in found.skipped)
    return {item.path.name: item.reason for item in found.skipped}


def test_a_folder_of_masks(folder, tmp_path):
    found = scan(folder, mask_path=tmp_path / "masks")
    wanted = {"a.mp4": "masks/a.png", "b.mp4": "masks/b.mkv", "c.mp4": "", "still.png": "masks/still.jpg"}
    assert masks_of(found, tmp_path) == wanted and not found.skipped
    of_b = next(file.mask for file in found.media if file.path.name == "b.mp4")
    assert (of_b.is_video, of_b.frames, of_b.fps, float(of_b.duration)) == (True, 12, 16, 0.75)
    assert found.notices == [
        f"{folder}: 1 of 4 files has no mask in {tmp_path / 'masks'}: such are trained whole; default_mask_file gives "
        "them one"
    ]
    assert [file.mask for file in scan(folder).media] == [None] * 4 and not scan(folder).notices


class Labels:
    def __init__(self):
        self.told = []

    def start(self, total, label):
        self.told.append((label, total))

    def advance(self, n, name): ...

    def done(self): ...


def test_masks_are_told_from_the_files_that_they_mask(folder, tmp_path):
    labels = Labels()
    scan(folder, progress=labels, mask_path=tmp_path / "masks")
    assert labels.told == [("reading media files", 4), ("reading masks", 3)]


def test_whether_the_clock_of_a_mask_starts_late(folder, tmp_path):
    """Numbers of frames that the header of an AVI starts from, and its packets do not."""
    write_video(tmp_path / "masks" / "c.avi", 12)
    clocks = {m.path.name: m.mask.clock for m in scan(folder, mask_path=tmp_path / "masks").media}
    assert clocks == {"a.mp4": False, "b.mp4": False, "c.mp4": True, "still.png": False}
    clip = Clip(next(iter(scan(folder, mask_path=tmp_path / "masks").media)), Bucket(64, 48, 9), *3 * [Fraction(0)])
    for clock in (False, True):
        job = MaskJob.of("key", clip, (0, 0, 64, 48), Strides(4, 8))
        job = job._replace(file=job.file._replace(clock=clock))
        assert MaskJob.of_row(json.loads(json.dumps(job.row()))) == job


def test_a_mask_for_those_that_have_none(folder, tmp_path):
    default = write_image(tmp_path / "default.png", colour=WHITE)
    found = scan(folder, mask_path=tmp_path / "masks", default_mask_file=default)
    assert masks_of(found, tmp_path)["c.mp4"] == "default.png" and not found.notices
    alone = scan(folder, default_mask_file=default)
    assert set(masks_of(alone, tmp_path).values()) == {"default.png"} and not alone.notices


@pytest.mark.parametrize("recursive", [False, True])
def test_masks_among_the_media_are_no_media(folder, tmp_path, recursive):
    shutil.move(tmp_path / "masks", folder / "masks")
    found = scan(folder, mask_path=folder / "masks", recursive=recursive)
    assert [file.path.name for file in found.media] == ["a.mp4", "b.mp4", "c.mp4", "still.png"]
    assert masks_of(found, folder)["a.mp4"] == "masks/a.png" and not found.skipped
    if recursive:
        assert len(scan(folder, recursive=True).media) == 7, "without the key they are"


def test_sub_folders_are_mirrored(folder, tmp_path):
    (folder / "sub").mkdir()
    write_video(folder / "sub" / "a.mp4", 12)
    write_image(tmp_path / "masks" / "sub" / "a.webp", colour=WHITE)
    write_image(tmp_path / "masks" / "sub" / "nobody.png", colour=WHITE)
    found = scan(folder, mask_path=tmp_path / "masks", recursive=True)
    pairs = {m.path.relative_to(folder).as_posix(): m.mask and m.mask.path.name for m in found.media}
    assert pairs["a.mp4"] == "a.png" and pairs["sub/a.mp4"] == "a.webp"
    assert f"{folder}: 1 mask has no clip of that name: sub/nobody.png" in found.notices
    (tmp_path / "masks" / "sub").rename(tmp_path / "elsewhere")
    (tmp_path / "masks" / "sub").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "masks")
    (tmp_path / "masks" / "itself").symlink_to(tmp_path / "masks" / "itself")
    assert scan(folder, mask_path=tmp_path / "masks", recursive=True) == found, "links are followed, as among the media"


def test_the_case_of_a_suffix_is_nothing_and_that_of_a_name_is_told(folder, tmp_path):
    masks = tmp_path / "capitals"
    masks.mkdir()
    for name in ("a.PNG", "B.png", "nobody.Png"):
        write_image(tmp_path / "mask.png", colour=WHITE).rename(masks / name)
    found = scan(folder, mask_path=masks)
    assert masks_of(found, tmp_path)["a.mp4"] == "capitals/a.PNG" and masks_of(found, tmp_path)["b.mp4"] == ""
    told = "the mask B.png is not taken for b.mp4, whose name has other capitals; rename one of them"
    assert f"{folder}: {told}" in found.notices
    assert f"{folder}: 1 mask has no clip of that name: nobody.Png" in found.notices


def test_masks_of_an_archive_lie_in_a_folder(folder, tmp_path):
    with tarfile.open(tmp_path / "clips.tar", "w") as archive:
        for name, source in (("a.mp4", "a.mp4"), ("sub/a.mp4", "b.mp4")):
            content = (folder / source).read_bytes()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    write_image(tmp_path / "masks" / "sub" / "a.png", colour=WHITE)
    found = scan(tmp_path / "clips.tar", mask_path=tmp_path / "masks")
    assert [m.mask.path.relative_to(tmp_path).as_posix() for m in found.media] == ["masks/a.png", "masks/sub/a.png"]


def test_an_index_names_masks_or_takes_them_from_the_folder(folder, tmp_path):
    write_image(folder / "own.png", colour=WHITE)
    index = folder / "index.csv"
    index.write_text("path,caption,mask_path\na.mp4,x,own.png\nb.mp4,x,\nc.mp4,x,gone.png\n")
    found = scan(index)
    assert masks_of(found, folder) == {"a.mp4": "own.png", "b.mp4": ""}
    assert reasons(found)["c.mp4"] == (
        f"line 4 of index.csv: its mask_path is 'gone.png', and no such file is there, seen from {folder}"
    )
    assert any("1 of 2 files has no mask" in notice for notice in found.notices)
    both = scan(index, mask_path=tmp_path / "masks")
    assert [file.mask.path.name for file in both.media] == ["own.png", "b.mkv"]
    (folder / "index.jsonl").write_text('{"path": "a.mp4", "mask_path": 3}')
    assert "its mask_path is 3" in reasons(scan(folder / "index.jsonl"))["a.mp4"]


def test_masks_that_do_not_fit_are_named(folder, tmp_path):
    masks = tmp_path / "masks"
    write_image(masks / "a.png", (64, 47), WHITE)
    (masks / "still.jpg").unlink()
    write_video(masks / "still.mp4", 3)
    (masks / "b.mkv").write_bytes(b"no video")
    write_image(masks / "c.png", (65, 49), WHITE)  # half a percent off
    found = scan(folder, mask_path=masks)
    assert masks_of(found, tmp_path) == {"c.mp4": "masks/c.png"}
    told = reasons(found)
    assert told["a.mp4"] == (
        f"its mask {masks / 'a.png'} is 64x47, and the file itself 64x48: make one of the same shape, of any resolution"
    )
    assert told["still.png"] == f"its mask {masks / 'still.mp4'} is a video, and this is an image"
    assert told["b.mp4"].startswith(f"its mask {masks / 'b.mkv'} cannot be used: FFmpeg cannot make sense of it")
    write_image(masks / "c.tif", colour=WHITE)
    assert reasons(scan(folder, mask_path=masks))["c.mp4"] == f"has 2 masks in {masks}: c.png, c.tif; keep one of them"


def test_a_video_with_transparency_is_no_mask(folder, tmp_path):
    """Videos are laid on white, images as masks on black: what is clear must not be trained by mistake."""
    (tmp_path / "masks" / "a.png").unlink()
    matte = tmp_path / "masks" / "a.mov"
    with av.open(str(matte), "w") as container:
        stream = container.add_stream("png", rate=16)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgba"
        for _ in range(12):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 4), 255, np.uint8), "rgba")))
        container.mux(stream.encode(None))
    frames = [Image.new("RGBA", (64, 48), (255, 255, 255, 16 * i)) for i in range(12)]
    animated = tmp_path / "masks" / "c.webp"
    frames[0].save(animated, save_all=True, append_images=frames[1:], duration=62)
    plain = [frame.convert("RGB") for frame in frames]
    (tmp_path / "masks" / "b.mkv").unlink()
    plain[0].save(
        tmp_path / "masks" / "b.webp", save_all=True, append_images=plain[1:], duration=[62 + i for i in range(12)]
    )
    told = reasons(scan(folder, mask_path=tmp_path / "masks"))
    assert told == {
        name: f"its mask {mask} is a video with transparency; save it in black and white alone"
        for name, mask in {"a.mp4": matte, "c.mp4": animated}.items()
    }


def test_a_folder_that_cannot_hold_masks(folder, tmp_path):
    with pytest.raises(ValueError, match=r"mask_path = '.*data' is the folder of the clips; put the masks into one"):
        scan(folder, mask_path=folder)
    with pytest.raises(ValueError, match=r"mask_path = '.*a\.png' is not a folder; name the folder that holds the"):
        scan(folder, mask_path=tmp_path / "masks" / "a.png")
