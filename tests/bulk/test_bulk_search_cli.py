"""`perception-rt search`, `perception-rt index`, and the page of the images found."""

import io
import json
import re
import shutil
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from bulk_files import jpeg, write_photos, write_tar
from PIL import Image

import perception_rt as prt
from perception_rt import demo
from perception_rt.bulk.html_page import THUMBNAIL_SIDE, write_page
from perception_rt.bulk.search import Hit
from perception_rt.cli import main
from perception_rt.demo import package_paths
from perception_rt.package.reader import read_manifest

PACKAGE = str(package_paths()["demo:pe"])


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main(list(map(str, arguments)))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with twelve photos, and a `.npy` result of these and of two texts."""
    folder = tmp_path_factory.mktemp("embedded")
    write_photos(folder / "photos", 12)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        arguments = ["photos", "--text", "a red three", "a dog", "--out", "rows.npy"]
        assert main(["embed", PACKAGE, *arguments, "--threads", "1"]) == 0
    return folder


@pytest.fixture
def rows(embedded: Path, tmp_path: Path, monkeypatch) -> Path:
    """The result, in the working folder."""
    shutil.copytree(embedded, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Path("rows.npy")


def test_a_text_finds_what_the_embedder_says(rows: Path, engine: prt.Embedder, capsys) -> None:
    status, printed, _ = run(capsys, "search", rows, "--package", PACKAGE, "a red 3", "-k", "4")
    assert status == 0
    scores = np.load(rows) @ engine.embed_texts(["a red 3"])[0]
    order = np.argsort(-scores)[:4]
    names = rows.with_suffix(".ids.txt").read_text().splitlines()
    assert printed.splitlines() == [
        f"{rank:>3}  {scores[n]:.4f}  {names[n]}" for rank, n in enumerate(order, 1)
    ]


def test_an_image_finds_itself(rows: Path, capsys) -> None:
    status, printed, _ = run(
        capsys, "search", rows, "--image", "photos/00007.jpg", "--package", PACKAGE, "--json"
    )
    found = json.loads(printed)
    assert status == 0 and found["hits"][0]["source"] == str(Path("photos/00007.jpg"))
    assert found["hits"][0]["score"] == pytest.approx(1, abs=1e-5)
    assert (found["text"], found["method"], found["rows"]) == (None, "exact", 14)
    assert len(found["hits"]) == 14


def test_index_and_approximate_search(rows: Path, capsys) -> None:
    pytest.importorskip("usearch")
    query = ("search", rows, "a dog", "--package", PACKAGE, "--json", "-k", "3")
    status, _, error = run(capsys, *query, "--approximate")
    assert status == 2 and "has no index: build it by perception-rt index rows.npy" in error
    assert run(capsys, "index", rows, "--threads", "1")[1].startswith("rows.npy.usearch: 14 rows, ")
    report = json.loads(run(capsys, "index", rows, "--queries", rows, "--json")[1])
    assert report["recall"] == 1 and report["queries"] == 14 and report["k"] == 10
    close = json.loads(run(capsys, *query, "--approximate")[1])
    true = json.loads(run(capsys, *query)[1])
    assert (close["method"], true["method"]) == ("approximate", "exact")
    assert close["hits"] == true["hits"]


def test_many_rows_use_the_index_if_there_is_one(rows: Path, capsys, monkeypatch) -> None:
    pytest.importorskip("usearch")
    monkeypatch.setattr("perception_rt.bulk.search.MAX_EXACT_ROWS", 13)
    query = ("search", rows, "a dog", "--package", PACKAGE, "--json")
    status, printed, hint = run(capsys, *query)
    assert status == 0 and json.loads(printed)["method"] == "exact"
    assert hint.splitlines()[-1] == "perception-rt index rows.npy would make this faster"
    assert run(capsys, "index", rows)[0] == 0
    assert json.loads(run(capsys, *query)[1])["method"] == "approximate"
    assert json.loads(run(capsys, *query, "--exact")[1])["method"] == "exact"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--package", "demo:plm"], r"embedded by sha256:\w+ \('PE-Demo'\), not by sha256:"),
        (["--package", "demo:pe"], "nothing to search for: give TEXT, --image or both"),
        (["x", "--package", "demo:pe", "-k", "0"], "k must be"),
        (["x", "--package", "demo:pe", "--html", "page.txt"], "--html must end in .html"),
        (["x", "--package", "demo:pe", "--html", "no/page.html"], "its folder is missing"),
        (["--package", "demo:pe", "--image", "no.jpg"], "'no.jpg'"),
    ],
)
def test_unusable_arguments(rows: Path, arguments, message: str, capsys) -> None:
    status, printed, error = run(capsys, "search", rows, *arguments)
    assert (status, printed) == (2, "")
    lines = [line for line in error.splitlines() if " s  " not in line]
    assert len(lines) == 1 and re.search(message, lines[0]), error


def test_a_package_is_found_by_its_id(rows: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    named = run(capsys, "search", rows, "x", "--package", "demo:pe")
    assert run(capsys, "search", rows, "x")[:2] == named[:2]
    # Neither a demo nor in the cache of a hub, and then there.
    monkeypatch.setattr(demo, "package_paths", dict)
    status, printed, error = run(capsys, "search", rows, "x")
    assert (status, printed) == (2, "")
    assert re.search(r"give --package: 'rows.npy' was embedded by sha256:\w+ \(PE-Demo\)", error)
    cached = tmp_path / "cache" / "perception_rt" / "hub" / read_manifest(PACKAGE).id.split(":")[1]
    shutil.copytree(PACKAGE, cached)
    assert run(capsys, "search", rows, "x")[:2] == named[:2]


def test_absent_result(capsys, tmp_path: Path) -> None:
    for command in (["search", tmp_path / "no.npy", "x"], ["index", tmp_path / "no.npy"]):
        status, _, error = run(capsys, *command)
        assert status == 2 and "does not exist" in error


# The page


class Page(HTMLParser):
    """Elements of a page, by tag."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attributes) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str, attribute: str) -> list[str]:
        return [
            given[attribute] for name, given in self.elements if name == tag and attribute in given
        ]


def hits(*sources: str) -> list[Hit]:
    return [Hit(row=n, id=n, source=s, score=1 - n / 10) for n, s in enumerate(sources)]


def test_page_of_a_search(rows: Path, capsys) -> None:
    status, printed, _ = run(
        capsys, "search", rows, "a <b>dog</b>", "--image", "photos/00003.jpg", "--package", PACKAGE,
        "-k", "14", "--html", "page.html",
    )  # fmt: skip
    assert status == 0 and len(printed.splitlines()) == 14
    page = Page(Path("page.html"))
    assert len(page.all("img", "src")) == 13  # the query and twelve photos; not the texts
    assert {tag for tag, _ in page.elements} == {
        "html", "head", "meta", "title", "style", "body", "h1", "img", "p", "ol", "li", "a",
        "span", "small",
    }  # fmt: skip
    assert "a <b>dog</b>" in page.text and "14 of 14 rows of rows.npy, PE-Demo, exact" in page.text
    for link in page.all("a", "href"):
        assert link.startswith("./photos/") and Path(link).is_file()
    assert "http://" not in Path("page.html").read_text() and "https:" not in page.text


def test_hostile_sources_are_only_text(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = 'javascript:alert("1")&<img src=x onerror=alert(2)>#?.jpg'
    Path(name).write_bytes(jpeg(1))
    nested = tmp_path / "pages"
    nested.mkdir()
    shown = write_page(
        nested / "page.html",
        hits(name, "</ol><script>alert(3)</script>", "https://example.org/x.jpg", "a\0b", "\udcff"),
        text="</title><script>alert(4)</script>",
    )
    assert shown == 1
    page = Page(nested / "page.html")
    assert not {"script", "iframe"} & {tag for tag, _ in page.elements}
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.all("img", "src"))
    assert not any("onerror" in given for _, given in page.elements)
    (link,) = page.all("a", "href")
    assert link.startswith("./../javascript%3Aalert")
    assert (nested / unquote(link)).resolve() == tmp_path / name
    assert page.text.count("no picture") == 4
    assert "default-src 'none'" in page.all("meta", "content")[0]


def test_pictures_are_small_copies_without_metadata(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    exif = Image.Exif()
    exif[0x010E] = "SECRET"
    exif[0x0112] = 6  # turned
    Image.new("RGB", (1000, 500), "red").save("large.jpg", exif=exif, comment=b"SECRET")
    Path("broken.jpg").write_bytes(jpeg(1)[:200])
    Path("clip.mp4").write_bytes(b"video")
    write_tar(Path("shard.tar"), {"a.jpg": jpeg(2)})
    found = hits("large.jpg", "broken.jpg", "clip.mp4", "shard.tar#a.jpg", "gone.jpg")
    assert write_page("page.html", found, text="x") == 3
    page = Page(Path("page.html"))
    large, small = [b64decode(s.partition(",")[2]) for s in page.all("img", "src")]
    assert Image.open(io.BytesIO(large)).size == (THUMBNAIL_SIDE // 2, THUMBNAIL_SIDE)
    assert b"SECRET" not in large
    assert Image.open(io.BytesIO(small)).size == (48, 40)
    assert page.all("video", "src") == ["./clip.mp4"]
    assert not list(tmp_path.glob("*.tmp"))
