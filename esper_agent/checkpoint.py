"""Checkpoints of a whole run, and files that a crash cannot leave half written.

A checkpoint is a nested structure of dicts, lists, tuples, strings, numbers, None, NumPy arrays and
tensors. The arrays are in `<name>.safetensors`. `<name>.json` has the structure, and the checksums
of both. Nothing is pickled. This module knows nothing of the algorithm.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Value = TypeVar("Value")

FORMAT_VERSION = 1
"""Version of the checkpoints that this module writes and reads."""
TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
"""Data types of NumPy and torch by their name in a safetensors file."""
NAMES = {name: key for key, name in TYPES.items()}
TEMPORARY = ".tmp"
"""Suffix of files that are being written."""


@runtime_checkable
class Stateful(Protocol):
    """Object that returns and restores its state, such as a generator of torch."""

    def get_state(self) -> Any:
        """Return a nested structure that `save_checkpoint` takes."""

    def set_state(self, state: Any) -> object:
        """Continue from the result of `get_state`."""


class CheckpointError(ValueError):
    """A checkpoint is damaged, of another format version or of another environment."""

    def __init__(self, path: Path, expected: str, actual: str) -> None:
        super().__init__(
            f"checkpoint {path}: expected {expected}, got {actual}; delete this checkpoint, or "
            "copy it again from where it is intact"
        )


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was loaded."""

    path: Path
    """Its JSON file."""
    step: int
    state: Any


# ------------------------------------------------------------------ write


def save_checkpoint(
    directory: Path, step: int, state: Any, identity: dict[str, Any], keep: int = 3
) -> Path:
    """Write a checkpoint so that it exists as a whole or not at all, and remove older ones.

    Args:
        directory: Folder of the checkpoints; its parent must exist.
        step: Steps done; a later checkpoint has a larger step.
        state: Nested structure to save.
        identity: Description of the environment, JSON-able; loading compares it.
        keep: Number of checkpoints that stay, this one included.

    Returns:
        The JSON file.

    Raises:
        OSError: If it cannot be written. Older checkpoints are left as they were.
        TypeError: If the structure contains an object of another type.
    """
    arrays: dict[str, Array] = {}
    tree = _encode(state, "state", arrays)
    directory.mkdir(exist_ok=True)
    path = directory / f"step-{step:012d}.json"
    checksum, num_bytes = write_file(path.with_suffix(".safetensors"), _serialize(arrays))
    content = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "identity": identity,
        "arrays": {"sha256": checksum, "bytes": num_bytes},
        "state": tree,
    }
    text = _canonical(content)
    write_file(path, [_canonical({"sha256": _checksum(text), "content": content}).encode()])
    _prune(directory, step, keep)
    return path


def write_file(path: Path, chunks: Iterable[Buffer]) -> tuple[str, int]:
    """Write a file so that after a crash at any moment the old or the new content is there.

    Args:
        path: File to write or replace.
        chunks: Content, in parts.

    Returns:
        SHA-256 and size [bytes] of the content.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    digest, num_bytes = hashlib.sha256(), 0
    try:
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            for chunk in chunks:
                view = memoryview(chunk)
                digest.update(view)
                num_bytes += len(view)
                while view:
                    view = view[os.write(file, view) :]
            os.fsync(file)
        finally:
            os.close(file)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    # The name of a file is stored in its folder.
    _sync_folder(path.parent)
    return digest.hexdigest(), num_bytes


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON by `write_file`; NaN and infinity raise `ValueError`."""
    write_file(path, [json.dumps(value, indent=1, allow_nan=False).encode()])


Array = npt.NDArray[Any] | Tensor
Buffer = bytes | memoryview


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return  # Windows cannot open a folder.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(directory: Path, step: int, keep: int) -> None:
    """Remove checkpoints that are not among the last `keep`, and what interrupted writes left."""
    steps = {_step_of(path): path for path in directory.glob("step-*.json")}
    kept = {steps[s].stem for s in sorted(s for s in steps if s <= step)[-keep:]}
    # JSON first, so that no interruption leaves it without its arrays.
    for pattern in ("*.json", "*.safetensors", f"*{TEMPORARY}"):
        for path in directory.glob(pattern):
            if path.name.split(".")[0] not in kept:
                with contextlib.suppress(OSError):
                    path.unlink()


def _encode(value: Any, name: str, arrays: dict[str, Array]) -> Any:
    """Return JSON for a nested structure, and collect its arrays.

    A dict of one key that starts with "$" stands for something that JSON does not have.
    """
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if isinstance(value, float) and not isinstance(value, np.generic):
        return value if math.isfinite(value) else {"$float": str(value)}
    if isinstance(value, (np.ndarray, np.generic, Tensor)):
        kind = "$array" if isinstance(value, np.ndarray) else "$scalar"
        kind = "$tensor" if isinstance(value, Tensor) else kind
        arrays[name] = value if isinstance(value, Tensor) else np.asarray(value)
        if _type_of(arrays[name]) not in NAMES:
            raise TypeError(f"{name}: cannot save an array of type {arrays[name].dtype}")
        return {kind: name}
    if isinstance(value, dict):
        pairs = [(key, _encode(item, f"{name}/{key}", arrays)) for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return dict(pairs)
        return {"$dict": [[_encode(key, name, arrays), item] for key, item in pairs]}
    if isinstance(value, (list, tuple)):
        items = [_encode(item, f"{name}/{i}", arrays) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    raise TypeError(f"{name}: cannot save {type(value).__name__} in a checkpoint")


def _type_of(array: Array) -> str:
    return str(array.dtype).removeprefix("torch.")


def _serialize(arrays: dict[str, Array]) -> Iterator[Buffer]:
    """Yield the parts of a safetensors file; only one array at a time is copied, if any."""
    header, end = {}, 0
    # Large types first, so that every array starts at a multiple of its item size.
    names = sorted(arrays, key=lambda name: (-_item_size(arrays[name]), name))
    for name in names:
        array = arrays[name]
        size = _item_size(array) * math.prod(array.shape)
        header[name] = {
            "dtype": NAMES[_type_of(array)],
            "shape": list(array.shape),
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield _bytes_of(arrays[name])


def _item_size(array: Array) -> int:
    return array.element_size() if isinstance(array, Tensor) else array.itemsize


def _bytes_of(array: Array) -> memoryview:
    """Return the memory of an array, or of a contiguous copy on the CPU."""
    if isinstance(array, Tensor):
        array = array.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _canonical(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# ------------------------------------------------------------------ read


def load_latest_checkpoint(directory: Path, identity: dict[str, Any]) -> Checkpoint | None:
    """Load the last checkpoint; one that cannot be used is skipped with a warning.

    Args:
        directory: Folder of the checkpoints.
        identity: Description of the environment that the state is for.

    Returns:
        The checkpoint; None if there is none.

    Raises:
        CheckpointError: If there are checkpoints, but none can be used.
    """
    paths = sorted(directory.glob("step-*.json"), key=_step_of)
    for path in reversed(paths):
        try:
            return load_checkpoint(path, identity)
        except CheckpointError as error:
            if path == paths[0]:
                raise
            warnings.warn(f"{error}. The checkpoint before it is used.", stacklevel=2)
    return None


def load_checkpoint(path: Path, identity: dict[str, Any]) -> Checkpoint:
    """Load a checkpoint, given its JSON file; needs the memory of its arrays once.

    Raises:
        CheckpointError: If it is damaged, of another version or of another environment.
    """
    content = _read_json(path)
    _check_identity(path, _canonical_copy(identity), content["identity"])
    file, described = path.with_suffix(".safetensors"), content["arrays"]
    try:
        size = file.stat().st_size
        if size != described["bytes"]:
            raise CheckpointError(file, f"{described['bytes']} bytes", f"{size}")
        with file.open("rb") as stream:
            checksum = hashlib.file_digest(stream, "sha256").hexdigest()
            if checksum != described["sha256"]:
                raise CheckpointError(file, f"SHA-256 {described['sha256']}", checksum)
            stream.seek(0)
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
            start = stream.tell()
            # Every tensor is read into its own memory, so nothing is held twice.
            state = _decode(content["state"], lambda n, kind: _read(stream, start, header[n], kind))
    except OSError as error:
        raise CheckpointError(file, "a readable file", f"{error.strerror}") from error
    return Checkpoint(path, content["step"], state)


def _step_of(path: Path) -> int:
    digits = path.stem.removeprefix("step-")
    return int(digits) if digits.isdecimal() else -1


def _read_json(path: Path) -> dict[str, Any]:
    """Read and check the JSON file of a checkpoint."""

    def fail(expected: str, actual: str) -> NoReturn:
        raise CheckpointError(path, expected, actual)

    try:
        text = path.read_bytes().decode()
        value = json.loads(text)
    except OSError as error:
        fail("a readable file", f"{error.strerror}")
    except ValueError as error:
        fail("JSON", f"{error}")
    content = value.get("content") if isinstance(value, dict) else None
    if not isinstance(content, dict):
        fail("a checkpoint", "other JSON")
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        fail(f"format version {FORMAT_VERSION}", repr(version))
    checksum = _checksum(_canonical(content))
    if text != _canonical({"sha256": checksum, "content": content}):
        fail(f"SHA-256 {value.get('sha256')}", checksum)
    return content


def _canonical_copy(value: Any) -> Any:
    return json.loads(_canonical(value))


def _check_identity(path: Path, expected: dict[str, Any], actual: dict[str, Any]) -> None:
    names = sorted(expected.keys() | actual.keys())
    differing = [name for name in names if expected.get(name) != actual.get(name)]
    if differing:
        shown = [", ".join(f"{n}={v.get(n)!r}" for n in differing) for v in (expected, actual)]
        raise CheckpointError(path, f"an environment with {shown[0]}", shown[1])


def _decode(tree: Any, read: Callable[[str, str], Any]) -> Any:
    """Return the nested structure of which `_encode` returned the JSON."""
    if isinstance(tree, list):
        return [_decode(item, read) for item in tree]
    if not isinstance(tree, dict):
        return tree
    kind = next(iter(tree), "")
    if not kind.startswith("$"):
        return {key: _decode(item, read) for key, item in tree.items()}
    value = tree[kind]
    if kind == "$float":
        return float(value)
    if kind == "$tuple":
        return tuple(_decode(item, read) for item in value)
    if kind == "$dict":
        return {_decode(key, read): _decode(item, read) for key, item in value}
    return read(value, kind)


def _read(stream: Any, start: int, described: dict[str, Any], kind: str) -> Any:
    """Read one array from a safetensors file."""
    name, shape = TYPES[described["dtype"]], described["shape"]
    array: Any = np.empty(shape, name) if kind != "$tensor" else None
    if array is None:
        array = torch.empty(shape, dtype=getattr(torch, name))
    stream.seek(start + described["data_offsets"][0])
    stream.readinto(_bytes_of(array))
    return array[()] if kind == "$scalar" else array


# ------------------------------------------------------------------ objects


def capture(value: Any) -> Any:
    """Return the state of an object as a nested structure that `save_checkpoint` takes.

    Args:
        value: An object with `get_state` and `set_state`, such as a generator; a network or
            optimizer of torch; a dataclass of those and of values; or a value, which is returned as
            it is.
    """
    if isinstance(value, Stateful):
        return value.get_state()
    if isinstance(value, (nn.Module, torch.optim.Optimizer)):
        return value.state_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: capture(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return value


def restore(value: Value, saved: Any) -> Value:
    """Write a state that `capture` returned into an object, and return the object or value."""
    if isinstance(value, Stateful):
        value.set_state(saved)
    elif isinstance(value, (nn.Module, torch.optim.Optimizer)):
        value.load_state_dict(saved)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for f in dataclasses.fields(value):
            setattr(value, f.name, restore(getattr(value, f.name), saved[f.name]))
    elif isinstance(value, Tensor):
        return saved.to(value.device)  # type: ignore[no-any-return]
    elif isinstance(value, tuple):
        return tuple(restore(*pair) for pair in zip(value, saved, strict=True))  # type: ignore[return-value]
    else:
        return saved  # type: ignore[no-any-return]
    return value


def is_finite(network: nn.Module) -> bool:
    """Return True if all weights are finite."""
    return all(bool(weight.isfinite().all()) for weight in network.state_dict().values())
