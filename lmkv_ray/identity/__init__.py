"""What an engine's files and configuration are, by content.

``canonical``: a value as a text that is equal in every process. ``changes``: files that are not
what they were. ``digests``: files, every byte of them. ``memory``: what was read before.
``files``: which files a model is made of.
"""

from lmkv_ray.identity.canonical import canonical
from lmkv_ray.identity.changes import changed_since
from lmkv_ray.identity.digests import FileDigests, StoppedError, blob_of
from lmkv_ray.identity.files import ModelFiles, code_files, find_directory, processor_files
from lmkv_ray.identity.memory import DigestMemory

__all__ = [
    "DigestMemory",
    "FileDigests",
    "ModelFiles",
    "StoppedError",
    "blob_of",
    "canonical",
    "changed_since",
    "code_files",
    "find_directory",
    "processor_files",
]
