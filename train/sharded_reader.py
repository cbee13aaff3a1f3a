"""DCP's reader without its pickle: `.metadata` is one, and a pickle can name any function to call.

Only the plain records that metadata consist of are made; a checkpoint with anything else in it, or
with pickled objects among its tensors, is refused.
"""

import pickle
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from mnemic.train.errors import UserError

_METADATA = "torch.distributed.checkpoint.metadata"
_RECORDS = {
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    # BytesStorageMetadata is not among these: DCP would unpickle what it stands for.
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
}


class SafeReader(FileSystemReader):
    """Reads tensors, and nothing that could do something. `UserError` from `read_metadata` for a
    checkpoint that holds more.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        del args, kwargs  # one file for all ranks is what `save_parts` writes
        path = self.fs.concat_path(self.path, ".metadata")
        try:
            with self.fs.create_stream(path, "rb") as stream:
                metadata = _Records(stream).load()
            if not isinstance(metadata, Metadata):
                raise pickle.UnpicklingError(f"a {type(metadata).__name__} where metadata belong")
        except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}: is not the metadata of a checkpoint ({error}); take another checkpoint"
            ) from error
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Records(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) in _RECORDS:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")
