"""The report page: whole in itself, no names, the worst picture first, and what it shows is what was measured."""

from __future__ import annotations

import base64
import html.parser
import io
import re

import numpy as np
import pytest
from PIL import Image

from .conftest import write_rows
from .test_command import report_of


class Parser(html.parser.HTMLParser):
    """Collects tags and sources, and refuses a tag that is closed out of turn."""

    void = {"meta", "img", "rect", "path", "br"}

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.tags = [], [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "data", "srcset")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def page(evaluate, pictures, tmp_path):
    report = report_of(
        evaluate, pictures, tmp_path / "r.json", "--html", tmp_path / "r.html", "--probe", "label", "--gallery", "2",
        "--baseline", "jpeg", "--baseline", "jpeg2000", "--baseline", "pca",
    )  # fmt: skip
    return report, (tmp_path / "r.html").read_text()


def test_the_page_is_whole_in_itself_and_shows_what_was_measured(page):
    report, text = page
    parser = Parser()
    parser.feed(text)
    assert parser.open == [] and not {"script", "link", "iframe", "object"} & parser.tags
    assert parser.sources and all(source.startswith("data:image/") for source in parser.sources)
    assert not re.search(r"https?://|url\(|@import", text)
    for model in report["models"]:
        assert f"{model['overall']['psnr']:.2f}" in text and f"{model['overall']['ssim']:.3f}" in text
        assert model["name"] in text and f"{model['bytes_mean']:.0f}" in text
    assert [model["name"] for model in report["models"]] == ["tiny", "jpeg", "jpeg2000", "pca"]
    assert report["protocol"]["images_sha256"] in text and "Probe: label" in text
    assert len(re.findall("codebook [0-9]+:", text)) == report["models"][0]["codebook"]["codebooks"]


def test_the_page_holds_no_name_and_no_label(page, pictures):
    _, text = page
    assert ".png" not in text and str(pictures) not in text
    assert "left<" not in text and "p0" not in re.sub('base64,[^"]*', "", text)


def test_the_worst_picture_of_a_modality_comes_first(evaluate, tmp_path):
    """One is flat and comes back well; one is noise and does not."""
    folder = write_rows(tmp_path / "in", [{"modality": "us"} for _ in range(2)])
    Image.fromarray(np.full((256, 256), 90, np.uint8)).save(folder / "000.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 2, (256, 256), np.uint8) * 255).save(folder / "001.png")
    bundled = ("--model", "tiny")  # random weights may lose a flat picture more than noise
    report_of(evaluate, folder, tmp_path / "r.json", "--html", tmp_path / "r.html", "--gallery", "1", *bundled)
    shown = re.findall('base64,([^"]*)', (tmp_path / "r.html").read_text())
    first = np.asarray(Image.open(io.BytesIO(base64.b64decode(shown[0]))).convert("L"))
    assert len(shown) == 3 and first.std() > 100
    report_of(evaluate, folder, tmp_path / "r.json", "--html", tmp_path / "r.html", "--gallery", "0", *bundled)
    assert "base64" not in (tmp_path / "r.html").read_text()
