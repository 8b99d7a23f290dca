"""SOURCE arguments become items in a fixed order; archives and lists of all kinds are read."""

import gzip
import io
import tarfile
from pathlib import Path

import pytest
from bulk_files import jpeg, write_tar

from perception_rt.bulk.contents import Contents, image_of
from perception_rt.bulk.listing import Item, Listing
from perception_rt.bulk.sources import Sources
from perception_rt.errors import InputError


def names(*paths: object, **more: object) -> list[str]:
    return [item.source for item in Sources(paths=tuple(map(str, paths)), **more).items()]


def relative(folder: Path, found: list[str]) -> list[str]:
    return [Path(name).relative_to(folder).as_posix() for name in found]


def test_a_folder_is_walked_by_name(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "b/10.jpg", "a.webp", "c.mp4", ".hidden/x.jpg", "b.txt", "z.gif"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert relative(tmp_path, names(tmp_path)) == ["a.webp", "b/10.jpg", "b/2.PNG", "c.mp4"]
    assert relative(tmp_path, names(tmp_path, formats=("gif",)))[-1] == "z.gif"
    items = list(Sources(paths=(str(tmp_path),)).items())
    assert [item.kind for item in items] == ["image", "image", "image", "video"]


def test_globs_and_files(tmp_path: Path) -> None:
    for name in ("a1.jpg", "a2.jpg", "b.jpg", "[c].jpg", "noending"):
        (tmp_path / name).write_bytes(b"x")
    assert relative(tmp_path, names(tmp_path / "a*.jpg")) == ["a1.jpg", "a2.jpg"]
    # A file that exists is no pattern.
    assert relative(tmp_path, names(tmp_path / "[c].jpg")) == ["[c].jpg"]
    assert relative(tmp_path, names(tmp_path / "noending")) == ["noending"]
    (tmp_path / "d" / "e").mkdir(parents=True)
    (tmp_path / "d" / "e" / "1.jpg").write_bytes(b"x")
    assert relative(tmp_path, names(tmp_path / "d" / "**" / "*.jpg")) == ["d/e/1.jpg"]


def test_lists_of_paths(tmp_path: Path) -> None:
    list_file = tmp_path / "list"
    list_file.write_bytes(b"one.jpg\r\n\nwith space.png\nclip.mp4")
    found = list(Sources(lists=(str(list_file), io.BytesIO(b"two.jpg\n"))).items())
    assert [item.source for item in found] == ["one.jpg", "with space.png", "clip.mp4", "two.jpg"]
    assert found[2].kind == "video"
    with pytest.raises(InputError, match="line 1 of standard input is not a path"):
        list(Sources(lists=(io.BytesIO(b"x" * 100_000),)).items())
    with pytest.raises(InputError, match="list 'absent' cannot be read: No such file"):
        list(Sources(lists=("absent",)).items())


def test_texts(tmp_path: Path) -> None:
    plain, lines = tmp_path / "t.txt", tmp_path / "t.jsonl"
    plain.write_bytes(b"\xef\xbb\xbfa dog\n\n  \nzwei H\xc3\xbcte\r\nlast")
    lines.write_text('{"text": "a"}\n"b"\n{"caption": "c", "en": "d"}\n{"x": 1}\nno\n')
    sources = Sources(paths=(str(plain), str(lines)))
    items = list(sources.items())
    assert [item.source.rpartition("#")[2] for item in items] == ["1", "4", "5", *"12345"]
    with Contents() as contents:
        assert [contents.text(item) for item in items[:6]] == [
            "a dog", "zwei H\u00fcte", "last", "a", "b", "c"
        ]  # fmt: skip
        with pytest.raises(InputError, match="neither a string nor an object with 'text or cap"):
            contents.text(items[6])
        with pytest.raises(InputError, match="not JSON"):
            contents.text(items[7])
    with Contents("en") as contents:
        assert contents.text(items[5]) == "d"


def test_a_long_line_is_one_item_and_refused_when_read(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_bytes(b"a\n" + b"x" * 300_000 + b"\nb")
    items = list(Sources(paths=(str(file),)).items())
    assert [item.size for item in items] == [2, 300_001, 1]
    with Contents() as contents:
        assert contents.text(items[2]) == "b"
        with pytest.raises(InputError, match="300001 bytes; the limit is 65536"):
            contents.text(items[1])


def test_tars_are_read_in_place(tmp_path: Path) -> None:
    tar = tmp_path / "shard.tar"
    write_tar(tar, {"1.jpg": b"one", "1.txt": b"t", "../2.PNG": b"two", "d/3.webp": b"3" * 1500})
    items = list(Sources(paths=(str(tar),)).items())
    assert [item.source for item in items] == [f"{tar}#1.jpg", f"{tar}#../2.PNG", f"{tar}#d/3.webp"]
    with Contents() as contents:
        assert [contents.image(item) for item in items] == [b"one", b"two", b"3" * 1500]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["shard.tar"]
    assert image_of(f"{tar}#../2.PNG") == b"two"
    assert image_of(f"{tar}#absent.png") is None


def test_gzipped_tars_are_read_in_any_order(tmp_path: Path) -> None:
    tar, packed = tmp_path / "s.tar", tmp_path / "s.tar.gz"
    write_tar(tar, {f"d/{i}.jpg": bytes([i]) * 70_000 for i in range(5)})
    packed.write_bytes(gzip.compress(tar.read_bytes()))
    items = list(Sources(paths=(str(packed),)).items())
    assert [item.source for item in items] == [f"{packed}#d/{i}.jpg" for i in range(5)]
    with Contents() as contents:
        for i in (0, 3, 1, 4, 4):
            assert contents.image(items[i]) == bytes([i]) * 70_000
    assert image_of(f"{packed}#d/2.jpg") == bytes([2]) * 70_000
    data = packed.read_bytes()
    packed.write_bytes(data[:12] + bytes(9) + data[21:])
    with Contents() as contents, pytest.raises(InputError, match="is damaged"):
        contents.image(items[0])
    for damaged in (data[:-40], data[:12] + bytes(9) + data[21:], b"no gzip", b""):
        packed.write_bytes(damaged)
        with pytest.raises(InputError, match=r"s.tar.gz' is damaged, or not a tar"):
            names(packed)


def test_hidden_members_of_tars_are_left_out(tmp_path: Path) -> None:
    tar = tmp_path / "s.tar"
    write_tar(tar, {"./a.jpg": b"a", "._a.jpg": b"mac", "d/.b.jpg": b"b", ".c/d.jpg": b"d"})
    assert names(tar) == [f"{tar}#./a.jpg"]


@pytest.mark.parametrize("name", ["a.jpg", "a.mp4", "a.parquet", "a.tar", "a.tar.xz", "a.txt"])
def test_a_folder_may_have_the_ending_of_a_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "1.jpg").write_bytes(b"x")
    assert relative(tmp_path, names(tmp_path / name)) == [f"{name}/1.jpg"]


def damaged_tars() -> dict[str, bytes]:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for index in range(3):
            info = tarfile.TarInfo(f"{index}.jpg")
            info.size = 600
            tar.addfile(info, io.BytesIO(bytes(600)))
    good = buffer.getvalue()
    negative = tarfile.TarInfo("0.jpg")
    header = bytearray(negative.tobuf())
    header[124:136] = b"\xff" * 10 + (65536 - 1024).to_bytes(2, "big")  # a size of -1024
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    long_name = tarfile.TarInfo("././@LongLink")
    long_name.type, long_name.size = tarfile.GNUTYPE_LONGNAME, 2**40
    pax = tarfile.TarInfo("p")
    pax.type, pax.size = tarfile.XHDTYPE, 512
    return {
        "cut in a member": good[:3000],
        "cut in a header": good[:1736],
        "damaged header": good[:1536] + b"\xff" * 512 + good[2048:],
        "no tar": b"\xff" * 4096,
        "negative size": bytes(header) * 4,
        "huge name": long_name.tobuf() + bytes(4096),
        "nested headers": (pax.tobuf() + b"9 a=1234\n".ljust(512, b"\0")) * 3000,
    }


@pytest.mark.parametrize("kind", damaged_tars())
def test_damaged_tars_are_refused(tmp_path: Path, kind: str) -> None:
    tar = tmp_path / "x.tar"
    tar.write_bytes(damaged_tars()[kind])
    with pytest.raises(InputError, match=r"damaged, or not a tar"):
        names(tar)


def test_links_in_tars_are_ignored(tmp_path: Path) -> None:
    tar = tmp_path / "x.tar"
    with tarfile.open(tar, "w") as file:
        link = tarfile.TarInfo("passwd.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    with pytest.raises(InputError, match="has no image"):
        names(tar)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.jpg", "does not exist"),
        ("*.jpg", "matches no file"),
        ("x.tar.xz", "compressed: give the .tar file itself"),
        ("empty", "has no image or video"),
        ("empty.txt", "has no text"),
        ("empty.tar", "damaged, or not a tar"),
    ],
)
def test_useless_sources_are_one_error(tmp_path: Path, name: str, message: str) -> None:
    for file in ("x.tar.xz", "empty.txt", "empty.tar"):
        (tmp_path / file).write_bytes(b"")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=message) as error:
        names(tmp_path / name)
    assert name.lstrip("*") in str(error.value)


def test_parquet_columns(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = tmp_path / "x.parquet"
    images = [jpeg(i) for i in range(40)]
    table = arrow.table({
        "image": [{"bytes": data, "path": None} for data in images],
        "raw": [None, *images[1:]],
        "path": ["a.jpg", None, *["b.jpg"] * 38],
        "n": list(range(40)),
    })  # fmt: skip
    parquet.write_table(table, file, row_group_size=7)
    (tmp_path / "a.jpg").write_bytes(images[0])

    for column in (None, "raw"):
        items = list(Sources(paths=(str(file),), column=column).items())
        assert len(items) == 40 and items[39].source == f"{file}#39"
        with Contents(column) as contents:
            for row in (30, 31, 39, 2, 3):  # forward, and back
                assert contents.image(items[row]) == images[row]
    with Contents("raw") as contents, pytest.raises(InputError, match=r"row 0 of .* has no image"):
        contents.image(items[0])
    items = list(Sources(paths=(str(file),), column="path").items())
    assert items[0] == Item("image", str(tmp_path / "a.jpg")) and items[1].form == "missing"
    assert image_of(f"{file}#3") == images[3]
    with pytest.raises(InputError, match=r"column 'n' of .* has neither bytes nor paths"):
        names(file, column="n")
    with pytest.raises(InputError, match="has no column 'z'; name one by --column: image, raw"):
        names(file, column="z")
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(InputError, match="damaged, or not a Parquet file"):
        names(file)


def test_parquet_columns_of_other_types(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file, images = tmp_path / "x.parquet", [jpeg(0), None, jpeg(1), jpeg(0)]
    raw = arrow.array(images, arrow.binary())
    paths = arrow.array(["a.jpg", None, "b.mp4", "a.jpg"])
    bytes_or_path = [{"bytes": jpeg(0), "path": "z"}, None, {"bytes": None, "path": "a.jpg"}, {}]
    table = arrow.table({
        "dictionary": raw.dictionary_encode(),
        "large": raw.cast(arrow.large_binary()),
        "view": raw.cast(arrow.binary_view()),
        "names": paths.dictionary_encode(),
        "views": paths.cast(arrow.string_view()),
        "mixed": arrow.array(bytes_or_path),
        "files": arrow.array([None if name is None else {"bytes": None, "path": name}
                              for name in paths.to_pylist()]),
    })  # fmt: skip
    parquet.write_table(table, file)

    def read(column: str) -> list[object]:
        found: list[object] = []
        with Contents(column) as contents:
            for item in Sources(paths=(str(file),), column=column).items():
                try:
                    found.append(contents.image(item))
                except InputError:
                    found.append(None)
        return found

    for column in ("dictionary", "large", "view"):
        assert read(column) == images
    whole = [str(tmp_path / "a.jpg"), None, str(tmp_path / "b.mp4"), str(tmp_path / "a.jpg")]
    for column in ("names", "views", "files"):
        assert read(column) == whole
    assert read("mixed") == [jpeg(0), None, str(tmp_path / "a.jpg"), None]
    items = Sources(paths=(str(file),), column="names").items()
    assert [item.kind for item in items] == ["image", "image", "video", "image"]


def test_a_listing_reads_any_part_and_has_a_digest(tmp_path: Path) -> None:
    items = [Item("image", f"{i}\n\udcff", "span", "p", i, 2 * i) for i in range(1000)]
    with Listing(items, tmp_path) as listing, Listing(items) as again:
        assert listing.digest == again.digest
        assert listing.read(250, 600) == items[250:600]
        assert listing.read(990, 2000) == items[990:] and listing.read(5, 5) == []
        assert list(tmp_path.iterdir()) == []
    with Listing(items[::-1]) as other:
        assert other.digest != listing.digest


def test_text_sources_are_no_images(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a\n")
    assert image_of("a dog") is None and image_of("a\0b") is None
    assert image_of(f"{tmp_path / 't.txt'}#1") is None
