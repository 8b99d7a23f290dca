import os
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from perception_rt.checkpoint.readers import open_reader
from perception_rt.errors import CheckpointError


class Hostile:
    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


def refusal(path):
    with pytest.raises(CheckpointError) as caught:
        open_reader(path)
    message = str(caught.value)
    assert path.name in message
    assert "\n" not in message
    assert len(message) < 200
    return message


def test_code_in_a_pt_does_not_run(tmp_path):
    witness = tmp_path / "witness"
    path = tmp_path / "evil.pt"
    torch.save({"a": torch.zeros(2), "b": Hostile(witness)}, path)
    torch.load(path, weights_only=False)
    assert witness.exists()  # the file is as hostile as it should be
    witness.unlink()
    assert "weights-only loading refused it" in refusal(path)
    assert not witness.exists()


def test_truncated_pt(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"a": torch.zeros(1000)}, path)
    content = path.read_bytes()
    for size in (0, 10, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        assert "weights-only loading refused it" in refusal(path)


def test_damaged_pt(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"a": torch.zeros(4)}, path)
    content = path.read_bytes()
    at = content.index(b"FloatStorage")
    path.write_bytes(content[:at] + b"\xff" * 8 + content[at + 8 :])
    assert "weights-only loading refused it" in refusal(path)


def test_a_storage_that_claims_more_than_the_file_has(tmp_path):
    path = tmp_path / "a.pt"
    tensor = torch.zeros(4)
    torch.save({"a": tensor}, path)
    with zipfile.ZipFile(path) as archive:
        records = {entry: archive.read(entry) for entry in archive.namelist()}
    (name,) = (entry for entry in records if entry.endswith("data.pkl"))
    # The element counts of the storage and of the tensor: K\x04 is the pickled integer 4.
    records[name] = records[name].replace(b"K\x04", b"J\x00\x00\x00\x40")
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in records.items():
            archive.writestr(entry, data)
    assert "weights-only loading refused it" in refusal(path)


def test_old_format_that_is_truncated_or_claims_more_than_it_has(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"a": torch.zeros(1000)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert torch.equal(open_reader(path).read("a"), torch.zeros(1000))
    for size in (1, 10, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        assert "weights-only loading refused it" in refusal(path)
    thousand = b"M\xe8\x03"  # the pickled integer 1000, of the storage and of the tensor
    assert content.count(thousand) == 2
    path.write_bytes(content.replace(thousand, b"J\x00\x00\x00\x40"))
    assert "weights-only loading refused it" in refusal(path)


def test_compressed_pt(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"a": torch.zeros(4)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {entry: archive.read(entry) for entry in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, data in records.items():
            archive.writestr(entry, data)
    assert "compressed records" in refusal(path)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: torch.eye(4).to_sparse(), "not dense"),
        (lambda: torch.eye(4).to_sparse_csr(), "not dense"),
        (lambda: torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8), "quantised"),
        (lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), "nested"),
        (lambda: torch.zeros(2, dtype=torch.complex64), "dtype complex64"),
        (lambda: torch.zeros(2, dtype=torch.int64), "dtype int64"),
        (lambda: torch.zeros(2).to(torch.float8_e4m3fn), "dtype float8_e4m3fn"),
        (lambda: torch.zeros(2, device="meta"), "without data"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_pt_tensors_that_are_no_weights(tmp_path, make, word):
    path = tmp_path / "a.pt"
    torch.save({"a": make(), "b": torch.zeros(2)}, path)
    headers = open_reader(path).headers
    assert headers["a"].unusable == word
    assert headers["b"].unusable is None


@pytest.mark.parametrize("content", [[1], torch.zeros(2), {"a": 3}, {3: torch.zeros(2)}])
def test_pt_without_a_dictionary_of_tensors(tmp_path, content):
    path = tmp_path / "a.pt"
    torch.save(content, path)
    assert "must hold a dictionary of tensors" in refusal(path)


def test_damaged_safetensors(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(1000)}, path)
    content = path.read_bytes()
    for broken in (b"", content[:50], content[:-1], b"\xff" * 8 + content[8:], content + b"x"):
        path.write_bytes(broken)
        assert "damaged, or not a safetensors file" in refusal(path)


def test_safetensors_of_integers(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(2, dtype=torch.int8)}, path)
    assert open_reader(path).headers["a"].unusable == "dtype I8"


def test_what_is_not_a_weights_file(tmp_path):
    assert "no weights file at" in refusal(tmp_path / "none.pt")
    other = tmp_path / "a.onnx"
    other.write_text("x")
    assert "is not a weights file" in refusal(other)
