"""The HTML report is one well-formed file that fetches nothing."""

import base64
import html.parser
import io

import numpy as np
import pytest
from PIL import Image

from mila_jax.errors import UserError
from mila_jax.evaluate.report import Report, curve_svg
from mila_jax.evaluate.video import read_video, write_view

VOID = {"meta", "img", "br", "hr", "input", "link"}


class Checker(html.parser.HTMLParser):
    """Collects tags and text; fails on tags that do not nest."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def parse(path):
    checker = Checker()
    checker.feed(path.read_text())
    checker.close()
    assert not checker.open
    return checker


@pytest.fixture
def page(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3), np.uint8)
    write_view(tmp_path / "v.mp4", frames, fps=12)
    report = Report("A <title> & more")
    report.add_heading("Loss & <b>")
    report.add_text("First paragraph.\n\nSecond with <script>alert('x')</script>.")
    report.add_table([{"name": "a<b", "PSNR (dB)": 26.12345}, {"name": "c", "PSNR (dB)": 7}], caption="numbers")
    report.add_table([("x", 1)])
    report.add_image(frames[0], 'a "picture"')
    report.add_video(tmp_path / "v.mp4", "moving")
    report.add_curve({"loss": [(i, 2.0 / (i + 1)) for i in range(20)], "val <1>": [(0, 1.0), (19, 0.5)]}, "curve", log_y=True)
    report.add_code("width: 96\nname: '<tiny>'", "config")
    path = report.write(tmp_path / "out" / "report.html")
    return path, frames, tmp_path / "v.mp4"


def test_is_well_formed_and_escaped(page):
    checker = parse(page[0])
    text = "".join(checker.text)
    assert "A <title> & more" in text and "Loss & <b>" in text and "a<b" in text and "'<tiny>'" in text and "val <1>" in text
    assert "26.12" in text and "26.123" not in text
    assert not checker.all("script") and not checker.all("b")
    assert len(checker.all("p")) == 2
    assert len(checker.all("table")) == 2 and len(checker.all("th")) == 2 and len(checker.all("td")) == 6


def test_fetches_nothing(page):
    for _, attributes in parse(page[0]).tags:
        for key in ("src", "href", "poster", "data"):
            assert attributes.get(key, "data:").startswith("data:")
    assert "http" not in page[0].read_text() and "url(" not in page[0].read_text() and "@import" not in page[0].read_text()


def test_pictures_and_videos_come_out_as_they_went_in(page, tmp_path):
    path, frames, source = page
    checker = parse(path)
    (image,), (video,) = checker.all("img"), checker.all("video")
    kind, data = image["src"].split(",", 1)
    assert kind == "data:image/png;base64" and image["alt"] == 'a "picture"'
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), frames[0])
    assert {"controls", "loop", "muted", "playsinline"} <= set(video)
    (tmp_path / "back.mp4").write_bytes(base64.b64decode(video["src"].removeprefix("data:video/mp4;base64,")))
    np.testing.assert_array_equal(read_video(tmp_path / "back.mp4")[0], read_video(source)[0])


def points_of(svg):
    checker = Checker()
    checker.feed(svg)
    return [[tuple(map(float, p.split(","))) for p in line["points"].split()] for line in checker.all("polyline")], checker


def test_curves_are_drawn_to_scale():
    (line,), checker = points_of(curve_svg({"a": [(0, 1), (10, 100), (20, 10000)]}, log_y=True, width=720, height=300))
    (x0, y0), (x1, y1), (x2, y2) = line
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert y0 == pytest.approx(300 - 32) and x0 == 64 and x2 == 720 - 12
    assert {"1", "100", "1e+04", "0", "10", "20", "a"} <= set(checker.text)
    (line,), _ = points_of(curve_svg({"a": [(0, 0), (1, 1), (2, float("nan")), (2, 4)]}))
    assert len(line) == 3 and line[0][1] - line[1][1] == pytest.approx((line[0][1] - line[2][1]) / 4, abs=0.2)


def test_curves_without_points_or_range():
    with pytest.raises(ValueError, match="no finite points"):
        curve_svg({"a": [(0, float("nan"))], "b": []})
    _, checker = points_of(curve_svg({"one": [(5, 2.0)], "flat": [(5, 2.0), (5, 2.0)]}))
    assert len(checker.all("circle")) == 1
    _, checker = points_of(curve_svg({"tiny": [(0, 1.0), (1, 1.0 + 1e-9)]}))
    assert len(checker.all("line")) > 4


def test_missing_files_and_places_are_named(tmp_path):
    report = Report("r")
    with pytest.raises(UserError, match=r"absent\.mp4: cannot be read"):
        report.add_video(tmp_path / "absent.mp4")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match=r"text\.png: neither a PNG nor a JPEG"):
        report.add_image(tmp_path / "text.png")
    with pytest.raises(UserError, match="cannot be written"):
        report.write(tmp_path / "text.png" / "report.html")


def test_paths_of_pictures_are_taken_whole(tmp_path):
    Image.fromarray(np.full((8, 8, 3), 9, np.uint8)).save(tmp_path / "p.jpg")
    report = Report("r")
    report.add_image(str(tmp_path / "p.jpg"))
    (image,) = parse(report.write(tmp_path / "r.html")).all("img")
    assert base64.b64decode(image["src"].removeprefix("data:image/jpeg;base64,")) == (tmp_path / "p.jpg").read_bytes()
