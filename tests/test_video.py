"""Videos and contact sheets: what is written can be read, in the right place, or not at all."""

import numpy as np
import pytest
from PIL import Image

from mila_jax.errors import UserError
from mila_jax.evaluate.quality import psnr
from mila_jax.evaluate.video import contact_sheet, read_video, six_view_picture, write_png, write_six_views, write_view
from mila_jax.views import VIEWS, view_index

COLOURS = {name: (40 * i + 20, 230 - 35 * i, 90 + 20 * i) for i, name in enumerate(VIEWS)}


def coloured(frames=4, height=32, width=48):
    """[t, 6, H, W, 3]: each camera its own colour, with a bright bar that moves over time."""
    video = np.empty((frames, 6, height, width, 3), np.uint8)
    for name, colour in COLOURS.items():
        video[:, view_index(name)] = colour
    for t in range(frames):
        video[t, :, :4, 8 * t : 8 * t + 8] = 255
    return video


def test_six_views_lie_as_the_car_sees_them(tmp_path):
    path = tmp_path / "new" / "six.mp4"
    assert write_six_views(path, coloured(), fps=12, scale=2, labels=False) == 4
    video, fps = read_video(path)
    assert video.shape == (4, 2 * 64, 3 * 96, 3) and fps == 12
    layout = [["CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT"], ["CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT"]]
    for r, row in enumerate(layout):
        for c, name in enumerate(row):
            centre = video[:, 64 * r + 30 : 64 * r + 34, 96 * c + 40 : 96 * c + 56].reshape(-1, 3).mean(0)
            np.testing.assert_allclose(centre, COLOURS[name], atol=6)
    for t in range(4):  # the frames are in order
        assert video[t, 2, 16 * t + 8].min() > 200
    assert [p.name for p in path.parent.iterdir()] == ["six.mp4"]


def test_streams_from_an_iterator_and_fills_odd_sizes(tmp_path):
    frames = np.tile(np.linspace(0, 255, 33).astype(np.uint8)[None, :, None, None], (3, 1, 47, 3))
    write_view(tmp_path / "one.mp4", iter(frames), fps=2.5)
    video, fps = read_video(tmp_path / "one.mp4")
    assert video.shape == (3, 34, 48, 3) and fps == 2.5
    assert psnr(frames, video[:, :33, :47]).min() > 35


def test_equal_frames_give_equal_files(tmp_path):
    """Whatever memory held before. Noise in enlarged pixels, 45 macroblocks wide: with the encoder's macroblock tree, files differed here."""
    r = np.random.default_rng(0)
    frames = [six_view_picture(r.integers(0, 255, (6, 32, 48, 3), dtype=np.uint8), 5) for _ in range(12)]
    files, used = set(), []
    for number in range(8):
        used = used[-6:] + [r.integers(0, 255, r.integers(1_000, 3_000_000)).astype(np.uint8) for _ in range(5)]
        write_view(tmp_path / f"{number}.mp4", (frame.copy() for frame in frames), fps=12)
        files.add((tmp_path / f"{number}.mp4").read_bytes())
    assert len(files) == 1


def test_labels_change_only_the_corner():
    views = coloured(1, 96, 160)[0]
    plain, labelled = six_view_picture(views), six_view_picture(views, labels=True)
    rows, columns = np.nonzero((plain != labelled).any(-1))
    assert len(rows) and (rows % 96).max() < 24 and (columns % 160).max() < 110


def test_failing_frames_leave_the_old_file(tmp_path):
    path = tmp_path / "v.mp4"
    write_view(path, coloured()[:, 0], fps=12)
    before = path.read_bytes()

    def frames():
        yield coloured()[0, 0]
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_view(path, frames(), fps=12)
    with pytest.raises(UserError, match="no frames"):
        write_view(path, [], fps=12)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["v.mp4"]


def test_unwritable_and_unreadable_paths_are_named(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    for write in (lambda p: write_view(p, coloured()[:, 0], fps=12), lambda p: write_png(p, coloured()[0, 0])):
        with pytest.raises(UserError, match=r"file/out.*cannot be written"):
            write(blocker / "out.mp4")
    for path in (blocker, tmp_path / "absent.mp4"):
        with pytest.raises(UserError, match=f"{path.name}: not a readable video"):
            read_video(path)


def test_a_colon_in_a_path_is_no_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_view("run:1/x.mp4", coloured()[:, 0], fps=12)
    assert len(read_video("run:1/x.mp4")[0]) == 4 and [p.name for p in (tmp_path / "run:1").iterdir()] == ["x.mp4"]


def test_contact_sheet_shows_each_time(tmp_path):
    path = tmp_path / "sheet.png"
    video = coloured()
    sheet = contact_sheet(path, video[[0, 2, 3]], [0.0, 0.5, 1.25], scale=1, title="six views")
    np.testing.assert_array_equal(np.asarray(Image.open(path)), sheet)
    height, width = 64, 144
    assert sheet.shape[1] == 2 * width + 3 * 8
    for index, frame in enumerate([0, 2, 3]):
        x, y = 8 + (index % 2) * (width + 8), 26 + (index // 2) * (height + 18 + 8) + 18
        np.testing.assert_array_equal(sheet[y : y + height, x : x + width], six_view_picture(video[frame]))
        assert sheet[y - 18 : y, x : x + width].min() < 100  # the time is written above it
    with pytest.raises(ValueError, match="3 frames and 2 times"):
        contact_sheet(path, video[:3], [0, 1])
