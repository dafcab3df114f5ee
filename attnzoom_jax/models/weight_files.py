"""Arrays out of files of weights: .safetensors, .npz, and .pth or .pt without torch.

What `torch.save` writes is a pickle, that is, a small program: reading one as Python does runs
whatever its author chose. The reader here knows the few globals that stand for tensors, their
storages and ordered dictionaries, all as stand-ins of its own; every other one is refused by name
when it is looked up, which is before it could be called. What comes out of the pickle is numbers,
text, containers, and descriptions of tensors, whose sizes are checked against the bytes that the
file has before an array is made.

Two layouts are known: the zip archive (torch 1.6 and later) with `<folder>/data.pkl` and one member
`<folder>/data/<key>` per storage; and the older one, a row of pickles (magic number, version,
system, data, keys of the storages) followed by the storages.
"""

import io
import pathlib
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

# Where training scripts keep the weights, beside the optimiser and the like.
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "params")

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
SAFETENSORS_TYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def read_weights(path: str) -> dict[str, np.ndarray]:
    """The named arrays of a file of weights; nothing in the file is run.

    Args:
        path: a .safetensors, .npz, .pth, .pt or .th file. A checkpoint that holds the weights in
            one of its entries ("state_dict", "model", ...) is understood; its other entries are
            left out.

    Returns:
        {name: array}, names, layouts and types as in the file, in its order.

    Raises:
        ValueError: no such file, another kind of file, a file that is cut off or damaged, one that
            needs more than tensors and plain containers (the first such global is named), or one
            without any array.
    """
    file = pathlib.Path(path)
    readers: dict[str, Callable[[pathlib.Path], dict[str, np.ndarray]]] = {
        ".safetensors": _read_safetensors,
        ".npz": _read_npz,
        **dict.fromkeys((".pth", ".pt", ".th"), _read_torch),
    }
    if file.suffix not in readers:
        raise ValueError(f"weights {path}: expected a file ending in {', '.join(readers)}")
    if not file.is_file():
        raise ValueError(f"weights {path}: there is no such file")
    try:
        arrays = readers[file.suffix](file)
    except _RefusedError as error:
        raise ValueError(f"weights {path}: {error}") from None
    except Exception as error:
        # What a broken file makes the parsers raise is theirs to choose; the file is what is wrong.
        raise ValueError(
            f"weights {path}: the file is cut off or damaged, or not what its ending says "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); fetch it again"
        ) from error
    if not arrays:
        raise ValueError(f"weights {path}: the file holds no named arrays")
    return arrays


class _RefusedError(Exception):
    """What is wrong with the file, in words for the user."""


def _read_safetensors(file: pathlib.Path) -> dict[str, np.ndarray]:
    arrays = {}
    for name, tensor in safetensors.deserialize(file.read_bytes()):
        if tensor["dtype"] not in SAFETENSORS_TYPES:
            raise _RefusedError(
                f"{name} is of type {tensor['dtype']}; expected one of "
                f"{', '.join(SAFETENSORS_TYPES)}"
            )
        values = np.frombuffer(tensor["data"], SAFETENSORS_TYPES[tensor["dtype"]])
        arrays[name] = values.reshape(tensor["shape"])
    return arrays


def _read_npz(file: pathlib.Path) -> dict[str, np.ndarray]:
    with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


# ---- torch


class _Storage(NamedTuple):
    """A row of numbers in the file."""

    dtype: Any
    key: str
    size: int


class _Tensor(NamedTuple):
    """A view of a storage: what torch's `as_strided` would take."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Dict(dict):
    """An ordered dictionary; what a pickle would set on the object itself is dropped."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class _Call:
    """A stand-in for one of torch's functions; without slots, so that no pickle changes it."""

    __slots__ = ()


class _RebuildTensor(_Call):
    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
        if not isinstance(storage, _Storage):
            raise _RefusedError("a tensor without a storage of its own")
        return _Tensor(storage, offset, tuple(shape), tuple(strides))


class _RebuildParameter(_Call):
    __slots__ = ()

    def __call__(self, tensor: Any, *_: Any) -> Any:
        return tensor


class _Size(_Call):
    __slots__ = ()

    def __call__(self, sizes: Any = ()) -> tuple[Any, ...]:
        return tuple(sizes)


GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Dict,
    ("torch", "Size"): _Size(),
    ("torch._utils", "_rebuild_tensor"): _RebuildTensor(),
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
}


class _Unpickler(pickle.Unpickler):
    """Builds containers and descriptions of tensors, and refuses all else."""

    def __init__(self, file: Any) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a global, or a refusal that names it."""
        if module == "torch" and name in STORAGES:
            return name
        if (module, name) not in GLOBALS:
            raise _RefusedError(
                f"refused, as it needs the Python global {module}.{name}, and only tensors in "
                "plain containers are read; save model.state_dict() alone, or as .safetensors"
            )
        return GLOBALS[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        """The storage that the pickle refers to."""
        match pid:
            case ("storage", str(kind), str(key), _, int(size), *rest) if kind in STORAGES:
                if any(item is not None for item in rest):
                    raise _RefusedError("a storage that is part of another one is not read")
                storage = _Storage(np.dtype(STORAGES[kind]), key, size)
                return self.storages.setdefault(key, storage)
        raise _RefusedError(f"a reference that is not to a storage of numbers: {str(pid)[:100]}")


def _read_torch(file: pathlib.Path) -> dict[str, np.ndarray]:
    with file.open("rb") as stream:
        start = stream.read(4)
        stream.seek(0)
        if start == b"PK\x03\x04":
            with zipfile.ZipFile(stream) as archive:
                return _read_torch_zip(archive)
        return _read_torch_legacy(stream)


def _read_torch_zip(archive: zipfile.ZipFile) -> dict[str, np.ndarray]:
    names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(names) != 1:
        raise _RefusedError("the zip archive has no data.pkl: it is not one of torch.save")
    folder = names[0].removesuffix("data.pkl")
    unpickler = _Unpickler(io.BytesIO(archive.read(names[0])))
    named = _named_tensors(unpickler.load())
    order = "<"
    if f"{folder}byteorder" in archive.namelist():
        order = {b"little": "<", b"big": ">"}[archive.read(f"{folder}byteorder")]

    def load(storage: _Storage) -> np.ndarray:
        return _numbers(archive.read(f"{folder}data/{storage.key}"), storage, order)

    return _to_arrays(named, load)


def _read_torch_legacy(stream: Any) -> dict[str, np.ndarray]:
    if _Unpickler(stream).load() != LEGACY_MAGIC:
        raise _RefusedError("the file is not one of torch.save")
    _Unpickler(stream).load()  # version of the format
    system = _Unpickler(stream).load()
    unpickler = _Unpickler(stream)
    named = _named_tensors(unpickler.load())
    order = "<" if system.get("little_endian", True) else ">"
    numbers = {}
    for key in _Unpickler(stream).load():
        storage = unpickler.storages[key]
        (size,) = struct.unpack(order + "q", stream.read(8))
        if size != storage.size:
            raise _RefusedError(f"a storage of {size} numbers where {storage.size} should be")
        numbers[key] = _numbers(stream.read(size * storage.dtype.itemsize), storage, order)
    return _to_arrays(named, lambda storage: numbers[storage.key])


def _numbers(data: bytes, storage: _Storage, order: str) -> np.ndarray:
    """The numbers of a storage, in the byte order of this machine."""
    if len(data) != storage.size * storage.dtype.itemsize:
        raise _RefusedError(
            f"the file is cut off or damaged: {len(data)} bytes where {storage.size} numbers of "
            f"type {storage.dtype} should be; fetch it again"
        )
    values = np.frombuffer(data, storage.dtype)
    is_native = (order == "<") == (sys.byteorder == "little")
    return values if is_native else values.byteswap()


def _named_tensors(content: Any) -> dict[str, _Tensor]:
    """The tensors of a state dict, or of the entry of a checkpoint that holds one."""
    if not isinstance(content, dict):
        raise _RefusedError(f"holds a {type(content).__name__}; expected a dict of tensors by name")
    for name in WRAPPERS:
        inner = content.get(name)
        if isinstance(inner, dict) and any(isinstance(v, _Tensor) for v in inner.values()):
            content = inner
            break
    return {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, _Tensor)
    }


def _to_arrays(
    named: Mapping[str, _Tensor], load: Callable[[_Storage], np.ndarray]
) -> dict[str, np.ndarray]:
    return {name: _view(name, tensor, load(tensor.storage)) for name, tensor in named.items()}


def _view(name: str, tensor: _Tensor, values: np.ndarray) -> np.ndarray:
    """A tensor as a contiguous array, after a check that it stays inside its storage."""
    sizes = (tensor.offset, *tensor.shape, *tensor.strides)
    is_sound = (
        all(type(size) is int and size >= 0 for size in sizes)
        and len(tensor.shape) == len(tensor.strides)
        # A view that repeats numbers could be of any size.
        and _product(tensor.shape) <= values.size
        and tensor.offset + _reach(tensor) <= values.size
    )
    if not is_sound:
        raise _RefusedError(f"{name} does not fit its storage: {tensor}")
    strides = [stride * values.itemsize for stride in tensor.strides]
    view = np.lib.stride_tricks.as_strided(values[tensor.offset :], tensor.shape, strides)
    return np.array(view)


def _product(sizes: tuple[int, ...]) -> int:
    product = 1  # in Python's integers, which do not overflow
    for size in sizes:
        product *= size
    return product


def _reach(tensor: _Tensor) -> int:
    """One past the last number that the tensor touches, counted from its first."""
    if 0 in tensor.shape:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
