from dataclasses import replace

from utils.data.manifest import Manifest
from utils.data.records import Bucket, Entry

ENTRIES = [Entry(f"sample {n}", f"{n}.mp4", Bucket(64, 48, 5), 0, ("latents",), (f"key {n}",), ()) for n in range(3)]


def manifest(entries):
    return Manifest(entries=entries, groups=[], skipped=[], jobs={}, counts={}, empty_text_key="")


def test_the_digest_is_of_the_samples_alone():
    digest = manifest(ENTRIES).digest()
    renamed = [replace(entry, name="other.mp4", media_keys=("another encoder",)) for entry in reversed(ENTRIES)]
    assert manifest(renamed).digest() == digest
    assert manifest(ENTRIES[:2]).digest() != digest
    assert manifest([*ENTRIES, ENTRIES[0]]).digest() != digest
