"""The GGUF header reader, against files written by the gguf package, whole, cut and corrupted."""

import random
import struct

import gguf
import numpy as np
import pytest

from moe_peft.io.gguf_file import read_gguf_header, read_gguf_metadata

Q8 = gguf.GGMLQuantizationType.Q8_0


@pytest.fixture
def gguf_path(tmp_path):
    """A small file with every kind of value."""
    path = tmp_path / "all.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("a.u8", 200)
    writer.add_int8("a.i8", -100)
    writer.add_uint16("a.u16", 60000)
    writer.add_int16("a.i16", -30000)
    writer.add_uint32("a.u32", 4_000_000_000)
    writer.add_int32("a.i32", -2_000_000_000)
    writer.add_uint64("a.u64", 2**63 + 1)
    writer.add_int64("a.i64", -(2**62))
    writer.add_float32("a.f32", 0.5)
    writer.add_float64("a.f64", 1e-300)
    writer.add_bool("a.yes", True)
    writer.add_bool("a.no", False)
    writer.add_string("a.string", "ſtrange ✓")
    writer.add_string("a.empty", "")
    writer.add_array("a.strings", ["<s>", "Ġthe", "日本"])
    writer.add_array("a.ints", [1, 2, 3])
    writer.add_array("a.floats", [0.5, -1.0])
    writer.add_array("a.bools", [True, False])
    values = np.random.default_rng(0).standard_normal((6, 64), dtype=np.float32)
    writer.add_tensor("plain", values)
    writer.add_tensor("vector", values[0, :7].copy())
    writer.add_tensor("quantized", gguf.quants.quantize(values, Q8), raw_dtype=Q8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_header_says_what_the_gguf_package_reads(gguf_path):
    reader = gguf.GGUFReader(gguf_path)
    header = read_gguf_header(gguf_path)
    expected = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert header.metadata == expected
    assert read_gguf_metadata(gguf_path) == expected
    assert {key: type(value) for key, value in header.metadata.items()} == {
        key: type(value) for key, value in expected.items()
    }
    assert list(header.tensors) == ["plain", "vector", "quantized"]
    for tensor in reader.tensors:
        ours = header.tensors[tensor.name]
        assert ours.type_name == tensor.tensor_type.name
        assert ours.shape == tuple(reversed(tensor.shape.tolist()))
        assert (ours.offset, ours.num_bytes) == (tensor.data_offset, tensor.n_bytes)


def test_every_cut_is_one_clear_error(gguf_path, tmp_path):
    whole = gguf_path.read_bytes()
    last = read_gguf_header(gguf_path).tensors["quantized"]
    needed = last.offset + last.num_bytes
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 700, 7), *range(700, needed, 101), needed - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.gguf (is truncated or corrupted|is not a GGUF file)"):
            read_gguf_header(cut)


def test_corrupted_bytes_never_escape_as_another_error(gguf_path, tmp_path):
    whole = bytearray(gguf_path.read_bytes())
    header_end = read_gguf_header(gguf_path).tensors["plain"].offset
    generator = random.Random(0)
    broken = tmp_path / "broken.gguf"
    num_refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(generator.randint(1, 4)):
            damaged[generator.randrange(4, header_end)] = generator.choice((0, 1, 0x7F, 0xFF, generator.randrange(256)))
        broken.write_bytes(damaged)
        try:
            read_gguf_header(broken)
        except ValueError as error:
            num_refused += 1
            assert "broken.gguf" in str(error)
    assert num_refused > 100  # otherwise the damage missed


def test_not_a_gguf_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.gguf"):
        read_gguf_metadata(tmp_path / "no.gguf")
    with pytest.raises(ValueError, match="is not a file"):
        read_gguf_metadata(tmp_path)
    text = tmp_path / "text.gguf"
    text.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="does not begin with GGUF"):
        read_gguf_metadata(text)


@pytest.mark.parametrize(
    ("version", "message"), [(1, "GGUF version 1; it must be one of 2, 3"), (3 << 24, "big-endian"), (9, "version 9")]
)
def test_versions(tmp_path, version, message):
    path = tmp_path / "v.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", version, 0, 0))
    with pytest.raises(ValueError, match=message):
        read_gguf_metadata(path)


def _string(text):
    return struct.pack("<Q", len(text)) + text.encode()


@pytest.mark.parametrize(
    ("num_tensors", "num_pairs", "body", "message"),
    [
        (0, 2, 2 * (_string("k") + struct.pack("<IB", 0, 7)), "'k' stands twice"),
        (0, 1, _string("k") + struct.pack("<I", 99), "unknown value type 99"),
        (0, 1, struct.pack("<Q", 2) + b"\xff\xfe", "not UTF-8"),
        (0, 1, _string("k") + struct.pack("<IIQ", 9, 4, 1 << 60), "would end at byte"),
        (0, 1, _string("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9, "unknown value type 9"),
        (0, 1, _string("general.alignment") + struct.pack("<II", 4, 0), "general.alignment=0"),
        (1, 0, _string("t") + struct.pack("<I", 77), "77 dimensions"),
        (1, 0, _string("t") + struct.pack("<IQIQ", 1, 8, 250, 0), "type number 250"),
        (1, 0, _string("t") + struct.pack("<IQIQ", 1, 8, 8, 0), "not a multiple of Q8_0's 32"),
        (2, 0, 2 * (_string("t") + struct.pack("<IQIQ", 1, 0, 0, 0)), "'t' stands twice"),
    ],
)
def test_headers_that_contradict_themselves(tmp_path, num_tensors, num_pairs, body, message):
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_pairs) + body + bytes(64))
    with pytest.raises(ValueError, match=message):
        read_gguf_header(path)
