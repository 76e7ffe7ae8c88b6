"""Pieces of logical tensors -> DCP's files -> other pieces.

DCP stores chunks: boxes of logical tensors. A piece is one box, or if it is a range of a flattened matrix, three at
most (`Layout.boxes`), and DCP reads any box from whatever boxes overlap it: that is all there is to resharding.

DCP's planners, writer and reader do the work; who calls them when stands here, in fewer lines than it takes to tell
torch's `save` what to leave out: ranks exchange plans, then write, and reading needs no exchange at all.
"""

import io
import math
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from sandbox.checkpoint.folder import checksum, told
from sandbox.checkpoint.together import Together
from sandbox.checkpoint.watched import Moved, Watched, unheard
from sandbox.errors import CheckpointError
from sandbox.layout import Layout

__all__ = ["Piece", "Stored", "index", "read", "write"]

T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """A local tensor (contiguous, if it is to be read into) and its place. The methods in `__` are DCP's protocol.

    Ranks of one `family` hold a tensor once between them. Another family holds it too, and may have cut it elsewhere:
    the buckets that ZeRO flattens differ from one tensor-parallel rank to the next.
    """

    layout: Layout
    local: Tensor
    family: tuple[int, ...] = ()

    @classmethod
    def empty(cls, layout: Layout, dtype: torch.dtype) -> "Piece":
        """A piece to be read into."""
        return cls(layout, torch.empty(layout.local_shape, dtype=dtype))

    def size(self) -> torch.Size:
        """Shape of the logical tensor."""
        return torch.Size(self.layout.shape)

    def view(self, offset: torch.Size) -> Tensor:
        """The box that begins there."""
        return self._views[offset]

    def __create_write_items__(self, name: str, piece: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                MetadataIndex(name, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offset), torch.Size(size)) for offset, size in self.layout.boxes()]

    @property
    def _views(self) -> dict[torch.Size, Tensor]:
        boxes = list(self.layout.boxes())
        parts = self.local.reshape(-1).split([math.prod(size) for _, size in boxes])
        return {torch.Size(offset): part.view(size) for (offset, size), part in zip(boxes, parts, strict=True)}


class Stored(NamedTuple):
    """A logical tensor in a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its size in full."""
        return math.prod(self.shape) * self.dtype.itemsize


def write(folder: Path, pieces: Mapping[str, Piece], together: Together) -> dict[str, str]:
    """Write the pieces of all ranks to `folder`, each box once -> checksums by file. All ranks call it."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    writer = _Writer(folder, together.moved)
    planner = _SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    writer.set_up_storage_writer(rank == 0, rank=rank)
    planner.set_up_planner(dict(pieces), None, rank == 0)
    families = {name: piece.family for name, piece in pieces.items()}

    def offer() -> SavePlan:
        return replace(writer.prepare_local_plan(planner.create_local_plan()), planner_data=families)

    plans, index = planner.create_global_plan(_once(together(offer)))  # the same on every rank
    plan = planner.finish_plan(writer.prepare_global_plan(plans)[rank])

    def store() -> tuple[list[WriteResult], dict[str, str]]:
        results = writer.write_data(plan, planner).wait()
        return results, {file.name: checksum(file, together.moved) for file in folder.glob(f"__{rank}_*")}

    stored = together(store)

    def finish() -> str:
        if rank:
            return ""
        writer.finish(index, [results for results, _ in stored])
        return checksum(folder / ".metadata")

    sums = {name: digest for _, found in stored for name, digest in found.items()}
    sums[".metadata"], *_ = together(finish)
    return sums


def _once(plans: list[SavePlan]) -> list[SavePlan]:
    """Leave each tensor to one family; of several, they take turns."""
    names = sorted({name for plan in plans for name in plan.planner_data})
    chosen = {}
    for turn, name in enumerate(names):
        families = sorted({plan.planner_data[name] for plan in plans if name in plan.planner_data})
        chosen[name] = families[turn % len(families)]
    return [
        replace(
            plan, items=[item for item in plan.items if plan.planner_data[item.index.fqn] == chosen[item.index.fqn]]
        )
        for plan in plans
    ]


def index(checkpoint: Path) -> dict[str, Stored]:
    """What tensors there are, by name. Raises CheckpointError."""
    found = _guarded(checkpoint, lambda: _Reader(checkpoint).read_metadata().state_dict_metadata)
    return {
        name: Stored(tuple(entry.size), entry.properties.dtype)
        for name, entry in found.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def read(checkpoint: Path, pieces: Mapping[str, Piece], moved: Moved = unheard) -> None:
    """Fill `pieces` from a checkpoint that any world has written. Raises CheckpointError."""

    def fill() -> None:
        reader = _Reader(checkpoint, moved)
        planner = _LoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        found = reader.read_metadata()
        reader.set_up_storage_reader(found, is_coordinator=False)
        planner.set_up_planner(dict(pieces), found)
        plan = planner.create_local_plan()
        if sum(math.prod(item.lengths) for item in plan.items) != sum(p.layout.numel for p in pieces.values()):
            raise ValueError("some elements are nowhere, or twice")
        reader.read_data(plan, planner).wait()

    _guarded(checkpoint, fill)


def _guarded(checkpoint: Path, work: Callable[[], T]) -> T:
    """Whatever a file brings about is the file's fault."""
    try:
        return work()
    except Exception as error:
        raise CheckpointError(f"{checkpoint}: is damaged ({told(error)}).") from None


class _SavePlanner(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return cast(Piece, self.state_dict[index.fqn]).view(index.offset)


class _LoadPlanner(DefaultLoadPlanner):
    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return cast(Piece, self.state_dict[index.fqn]).view(index.offset)


class _Files(FileSystem):
    """DCP's way to the disk, on which bytes are counted."""

    def __init__(self, moved: Moved) -> None:
        self.moved = moved

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        file = Watched(Path(path), mode, self.moved)
        with BufferedWriter(file) if "w" in mode else BufferedReader(file) as stream:
            yield stream


class _Writer(FileSystemWriter):
    def __init__(self, folder: Path, moved: Moved) -> None:
        super().__init__(folder)
        self.fs = _Files(moved)

    def storage_meta(self) -> None:  # it would tell where on this machine the checkpoint was written
        return None


class _Reader(FileSystemReader):
    """Reads the index, a pickle, without running what it says; the tensors are read so by torch itself."""

    def __init__(self, folder: Path, moved: Moved = unheard) -> None:
        super().__init__(folder)
        self.fs = _Files(moved)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        found = _Unpickler((Path(self.path) / ".metadata").read_bytes()).load()
        if not isinstance(found, Metadata):
            raise pickle.UnpicklingError("it is no index")
        files = {entry.name for entry in Path(self.path).iterdir()}
        if outside := {info.relative_path for info in found.storage_data.values()} - files:
            raise pickle.UnpicklingError(f"it names {min(outside)}, which is not there")
        return found


class _Unpickler(pickle._Unpickler):
    """Makes only what an index of tensors consists of. DCP itself would unpickle anything.

    The unpickler in C would also make room, tens of gigabytes of it, for a memo as large as four bytes say; this one's
    memo is a dict.
    """

    dispatch: ClassVar = {code: do for code, do in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]}

    def __init__(self, index: bytes) -> None:
        super().__init__(io.BytesIO(index))  # of which no read gets more than there is

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if (module, name) in _INDEX:
            return _INDEX[module, name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no index needs")


def _member(kind: Any, name: str) -> Any:
    """A member of the one enumeration in an index, as Python 3.11.0 to 3.11.3 ask for it."""
    if kind is metadata._MEM_FORMAT_ENCODING:
        return metadata._MEM_FORMAT_ENCODING[name]
    raise pickle.UnpicklingError(f"it asks for {name} of {kind!r}, which no index needs")


_INDEX: dict[tuple[str, str], Any] = {
    **{
        (metadata.__name__, name): getattr(metadata, name)
        for name in (
            "ChunkStorageMetadata", "Metadata", "MetadataIndex", "TensorProperties", "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    },
    ("builtins", "getattr"): _member,
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
}  # fmt: skip
"""Not `BytesStorageMetadata`: of what is stored as bytes, DCP's reader runs the pickle."""
