import msgspec
from hypothesis import given
from hypothesis import strategies as st

from lmkv_ray.keys import Namespace, chunk_key, key_array, key_list

NAMESPACE = Namespace(
    model="m",
    weights="w",
    dtype="bfloat16",
    cache_dtype="auto",
    layout="l",
    block_tokens=16,
    chunk_tokens=256,
    hash_algorithm="sha256",
    parallel="tp1 pp1",
    engine="vllm 0.32",
)


def test_every_field_of_a_namespace_changes_its_digest() -> None:
    digests = {NAMESPACE.digest()}
    for field in msgspec.structs.fields(Namespace):
        value = getattr(NAMESPACE, field.name)
        other = value | {"x": "y"} if isinstance(value, dict) else value + type(value)("1")
        digests.add(msgspec.structs.replace(NAMESPACE, **{field.name: other}).digest())
    assert len(digests) == 1 + len(msgspec.structs.fields(Namespace))


def test_digest_is_stable_across_releases() -> None:
    # Chunks on disk and in other processes are named by it: change `format` when this changes.
    assert NAMESPACE.digest().hex() == "24cbc03a96175fc3f019d0ce332db885"


def test_namespace_hash_and_group_all_change_a_key() -> None:
    keys = {
        chunk_key(namespace, block_hash, group)
        for namespace in (b"n" * 16, b"m" * 16)
        for block_hash in (b"a" * 32, b"b" * 32)
        for group in (0, 1)
    }
    assert len(keys) == 8
    assert all(len(key) == 16 for key in keys)


@given(st.lists(st.binary(min_size=8, max_size=32)))
def test_keys_survive_the_array_form(hashes: list[bytes]) -> None:
    names = [chunk_key(b"n" * 16, block_hash) for block_hash in hashes]
    keys = key_array(names)
    assert keys.shape == (len(hashes), 2)
    assert key_list(keys) == names
    assert (key_array(keys.tobytes()) == keys).all()
