from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from lmkv_ray.tiers.format import PAGE, ChunkHeader, Label, file_bytes, parse_path

labels = st.builds(
    Label,
    key=st.binary(min_size=16, max_size=16),
    space=st.integers(0, 2**64 - 1),
    nbytes=st.integers(1, 2**63),
)
headers = st.builds(
    ChunkHeader,
    label=labels,
    overhead=st.integers(0, 64),
    checksum=st.integers(0, 2**64 - 1),
    nonce=st.binary(min_size=12, max_size=12),
)
suites = st.sampled_from(["plain1", "aes1-0123456789abcdef"])


@given(headers)
def test_a_header_says_what_it_was_given(header: ChunkHeader) -> None:
    page = header.pack()
    assert len(page) == PAGE
    assert ChunkHeader.unpack(page) == header


@given(headers, st.integers(0, PAGE * 8 - 1))
def test_any_flipped_bit_is_noticed(header: ChunkHeader, bit: int) -> None:
    page = bytearray(header.pack())
    page[bit // 8] ^= 1 << bit % 8
    assert ChunkHeader.unpack(bytes(page)) is None


@given(headers, st.integers(0, PAGE - 1))
def test_a_torn_header_is_noticed(header: ChunkHeader, at: int) -> None:
    other = replace(header, checksum=header.checksum ^ 1).pack()
    torn = header.pack()[:at] + other[at:]
    assert ChunkHeader.unpack(torn) in (None, header, ChunkHeader.unpack(other))
    assert ChunkHeader.unpack(header.pack()[:at]) is None


@given(st.binary(max_size=2 * PAGE))
def test_garbage_is_no_header(page: bytes) -> None:
    assert ChunkHeader.unpack(page) is None


@given(labels, suites)
def test_a_name_says_the_label(label: Label, suite: str) -> None:
    path = label.path(suite)
    assert path.startswith(label.key.hex()[:2] + "/")
    assert parse_path(path) == (label, suite)


@given(st.text(alphabet="0123456789abcdefABCDEF-.pl", max_size=80))
def test_other_names_are_not_ours(name: str) -> None:
    assert parse_path(f"00/{name}") is None


def test_one_chunk_has_one_name() -> None:
    path = Label(bytes(16), 1, 0xAB).path("plain1")
    assert parse_path(path) is not None
    for other in ("-0ab.", "-AB.", "-0."):
        assert parse_path(path.replace("-ab.", other)) is None
    assert parse_path(path.replace("00/", "01/")) is None


@given(st.integers(1, 2**40), st.integers(0, 64))
def test_files_are_whole_pages(nbytes: int, overhead: int) -> None:
    size = file_bytes(nbytes, overhead)
    assert size % PAGE == 0
    assert 0 <= size - PAGE - nbytes - overhead < PAGE


def test_the_format_does_not_change_by_accident() -> None:
    header = ChunkHeader(Label(bytes(range(16)), 0x1122, 0x3344), 16, 0x5566, b"n" * 12, 0x7788)
    expected = (
        b"lmkvdisk" + b"\2\0\0\0" + b"\x10\0\0\0" + bytes(range(16)) + b"\x22\x11" + bytes(6)
        + b"\x44\x33" + bytes(6) + b"\x66\x55" + bytes(6) + b"n" * 12
        + bytes(4) + b"\x88\x77" + bytes(6)
    )  # fmt: skip
    page = header.pack()
    assert page.startswith(expected)
    assert not any(page[len(expected) : -8])
    assert page[-8:].hex() == "176264046163fc5c"
