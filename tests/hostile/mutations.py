"""Mutations of adapter files, with a reader and a writer that use nothing of the library.

A `Draft` is a safetensors file before it is written, in which every field may be false. The `MUTATIONS` change
drafts, so that the written file can still get a correct checksum. The `DAMAGES` change the bytes of a file.
`campaign` loads the files and judges the results.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np

NUMPY_OF = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "?",
}
NAMES = {
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
FOREIGN = ("F8_E4M3", "F8_E5M2", "C64", "F4", "f32", "", "F128", "complex", None, 5)
FLOATS = ("F64", "F32", "F16", "BF16")
TABLES = ("config", "layers", "modules_to_save", "writer")


# ---- files, without the library ------------------------------------------------------------------------


@dataclass(frozen=True)
class Raw:
    """JSON text that is written unchanged, and may be invalid."""

    text: str


@dataclass(frozen=True)
class Pairs:
    """A JSON object as pairs, in which names may repeat."""

    pairs: list[tuple[Any, Any]]


@dataclass
class Tensor:
    """A tensor as the header describes it, truthfully or not.

    Attributes
    ----------
    dtype, shape, offsets : any
        Values written to the header. Offsets of None mean the true ones.
    data : bytes
        Bytes of the tensor.
    """

    dtype: Any
    shape: Any
    data: bytes
    offsets: Any = None

    def array(self) -> np.ndarray:
        """Return the values as an array; bfloat16 is widened to float32."""
        if self.dtype == "BF16":
            bits = np.frombuffer(self.data, "<u2").astype("<u4") << 16
            return bits.view("<f4").reshape(self.shape)
        return np.frombuffer(self.data, NUMPY_OF[self.dtype]).reshape(self.shape)

    def set(self, array: np.ndarray, dtype: str | None = None) -> None:
        """Replace the values by those of an array, stored in `dtype` or in the tensor's own dtype."""
        self.dtype = dtype or self.dtype
        self.shape = list(array.shape)
        with np.errstate(all="ignore"):
            if self.dtype == "BF16":
                self.data = (array.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
            else:
                self.data = array.astype(NUMPY_OF[self.dtype]).tobytes()


@dataclass
class Draft:
    """A file before it is written: its tensors in order, and its metadata with the tables decoded from JSON."""

    tensors: list[tuple[str, Tensor]]
    metadata: dict[str, Any]
    extra: list[tuple[Any, Any]] = field(default_factory=list)
    """Further entries of the header."""
    extra_first: bool = False

    def tensor(self, rng: np.random.Generator, *names: str) -> Tensor:
        """Return a random tensor, if possible one whose last name component is in `names`."""
        last = [tensor for name, tensor in self.tensors if name.rpartition(".")[2] in names]
        every = last or [tensor for _, tensor in self.tensors]
        return every[rng.integers(len(every))] if every else Tensor("F32", [0], b"")


def encode(value: Any) -> str:
    """Return the JSON text of a value that may contain `Raw` and `Pairs`."""
    if isinstance(value, Raw):
        return value.text
    try:
        return json.dumps(value)
    except TypeError:
        pass
    if isinstance(value, list | tuple):
        return f"[{','.join(map(encode, value))}]"
    pairs = value.pairs if isinstance(value, Pairs) else value.items()
    return "{" + ",".join(f"{encode(name)}:{encode(item)}" for name, item in pairs) + "}"


CHECKSUM = f"sha256:{64 * '0'}"


def written(draft: Draft, *, checksum: bool = True) -> bytes:
    """Return the bytes of a file, with a correct checksum unless a mutation has replaced it."""
    draft.metadata = {
        name: CHECKSUM if name == "checksum" and checksum and str(value).startswith("sha256:") else value
        for name, value in draft.metadata.items()
    }
    content = _written(draft)
    # If no JSON reader accepts the header, there is no correct checksum.
    with contextlib.suppress(ValueError, TypeError, LookupError, AttributeError, RecursionError):
        content = content.replace(CHECKSUM.encode(), checksum_of(content).encode(), 1)
    return content


def _written(draft: Draft) -> bytes:
    """Return the bytes of a file; names in its header may repeat, which a dictionary could not express."""
    metadata = {
        name: encode(value) if name in TABLES and not isinstance(value, Raw) else value
        for name, value in draft.metadata.items()
    }
    entries: list[tuple[Any, Any]] = [("__metadata__", metadata)]
    start = 0
    for name, tensor in draft.tensors:
        end = start + len(tensor.data)
        offsets = [start, end] if tensor.offsets is None else tensor.offsets
        entries.append((name, {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}))
        start = end
    entries = [*draft.extra, *entries] if draft.extra_first else [*entries, *draft.extra]
    once = dict(entries) if all(isinstance(name, str) for name, _ in entries) else {}
    header = encode(once if len(once) == len(entries) else Pairs(entries)).encode(errors="surrogatepass")
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + b"".join(tensor.data for _, tensor in draft.tensors)


def taken_apart(content: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and metadata of a well-formed file."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    metadata = header.pop("__metadata__")
    data = content[8 + length :]
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        tensors[name] = Tensor(entry["dtype"], entry["shape"], data[start:end])
    return tensors, metadata


def checksum_of(content: bytes) -> str:
    """Return the correct checksum of a file."""
    tensors, metadata = taken_apart(content)
    metadata = {name: value for name, value in metadata.items() if name != "checksum"}
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, NAMES[tensor.dtype], tensor.shape]).encode())
        digest.update(tensor.data)
    return f"sha256:{digest.hexdigest()}"


def draft_of(content: bytes) -> Draft:
    """Return a draft of a valid file."""
    tensors, metadata = taken_apart(content)
    tables = {name: json.loads(metadata[name]) for name in TABLES}
    ordered = sorted(tensors.items(), key=lambda item: -len(item[1].data) if item[1].dtype != "BOOL" else 0)
    return Draft(ordered, {**metadata, **tables})


# ---- mutations -----------------------------------------------------------------------------------------


Mutation = Callable[[Draft, np.random.Generator], None]
MUTATIONS: dict[str, Mutation] = {}
DAMAGES: dict[str, Callable[[bytes, np.random.Generator], bytes]] = {}


def mutation(name: str) -> Callable[[Mutation], Mutation]:
    """Register a function that changes a draft."""

    def register(function: Mutation) -> Mutation:
        MUTATIONS[name] = function
        return function

    return register


def pick(rng: np.random.Generator, choices: Sequence[Any]) -> Any:
    """Return a random element of a sequence, without converting it to a NumPy type."""
    return choices[int(rng.integers(len(choices)))]


# fmt: off
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 2.5, -0.0, 10**18, 2**63, 2**64, -(2**63), float("nan"),
    float("inf"),
    -float("inf"), 1e-320, 1e308, Raw("1e400"), Raw("-1e400"), Raw("9" * 4000), Raw("9" * 5000),
    "", " ", "query",
    "NaN", "12", "x" * 10_000, "\ud800", "\u0000", "\u202e", "é" * 300, "\U0001d518" * 100, [],
    [[]], [None], [""], {}, {"": 0},
    {"target": 1, "end_step": 2}, [1, "a", None], ["query"] * 500, Raw("[" * 900 + "]" * 900),
    Raw("[" * 100_000), Raw('{"a":' * 5000), Raw("[" + "[]," * 20_000 + "[]]"), Raw("01"),
    Raw("tru"), Raw(""),
)
# fmt: on


def odd_value(rng: np.random.Generator) -> Any:
    """Return a JSON value that is wrong almost everywhere."""
    return deepcopy(pick(rng, ODD_VALUES))


def odd_name(rng: np.random.Generator, name: str = "query") -> Any:
    """Return a name that no module has."""
    return pick(
        rng,
        (
            "", ".", "..", "/", "../../etc/passwd", "/etc/passwd", "~", "a/b", ".query", "query.", "a..b",
            f"{name}.",
            f".{name}", f"..{name}", f"{name}\u0000", name.upper(), f"{name} ", "__metadata__",
            "__class__", "é", "\ud800",
            "\udfff", "\u202egnp", "\x1b[2J", "C", "M.C", "\U0001d518" * 1000, "x" * 5000, "encoder",
            "encoder.0", "head", "head.weight", "." * 20_000, "a." * 10_000,
            "encoder.0.query.C", "%s%n", "{}", "\n", Raw('"\\ud800"'), Raw('"a" :1, "b"'), Raw("null"),
            Raw("1"),
        ),
    )  # fmt: skip


def text_of(name: Any) -> str:
    """Return a name as text, so that it can be the key of a dictionary."""
    return name.text if isinstance(name, Raw) else name


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path to every value within JSON, as a tuple of names and indices."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield (*above, name)
        yield from places(item, (*above, name))


def holder_of(draft: Draft, rng: np.random.Generator) -> tuple[Any, Any]:
    """Return a random dictionary or list within the tables, and one of its names or indices."""
    ways = [way for way in places({name: draft.metadata.get(name) for name in TABLES}) if len(way) > 1]
    if not ways:
        return draft.metadata, "config"
    *above, last = pick(rng, ways)
    holder: Any = draft.metadata
    for name in above:
        holder = holder[name]
    return holder, last


@mutation("nothing at all")
def _nothing(draft: Draft, rng: np.random.Generator) -> None:
    pass


@mutation("tensor: a bit flipped")
def _flip(draft: Draft, rng: np.random.Generator) -> None:
    tensor = draft.tensor(rng)
    data = bytearray(tensor.data)
    if data:
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        tensor.data = bytes(data)


@mutation("tensor: NaN or infinity")
def _nan(draft: Draft, rng: np.random.Generator) -> None:
    _put(draft.tensor(rng, "M", "A", "B", "C", "weight", "bias"), rng, (np.nan, np.inf, -np.inf))


@mutation("tensor: huge or tiny numbers")
def _huge(draft: Draft, rng: np.random.Generator) -> None:
    _put(
        draft.tensor(rng, "M", "A", "B", "C", "weight"),
        rng,
        (1e300, -1e300, 1.7e308, 3.4e38, 65504.0, 7e4, 1e-320, 1e-45, -0.0),
    )


def _put(tensor: Tensor, rng: np.random.Generator, values: Sequence[float]) -> None:
    if tensor.dtype in FLOATS and tensor.data:
        array = tensor.array().astype("f8")
        array.reshape(-1)[rng.integers(array.size, size=int(rng.integers(1, 4)))] = pick(rng, values)
        tensor.set(array)


@mutation("tensor: dtype named wrong")
def _misnamed(draft: Draft, rng: np.random.Generator) -> None:
    draft.tensor(rng).dtype = pick(rng, [*NUMPY_OF, "BF16", *FOREIGN])


@mutation("tensor: converted to another dtype")
def _converted(draft: Draft, rng: np.random.Generator) -> None:
    tensor = draft.tensor(rng)
    if tensor.dtype in NAMES:
        tensor.set(tensor.array(), pick(rng, list(NAMES)))


@mutation("tensor: bytes taken for another dtype")
def _reinterpreted(draft: Draft, rng: np.random.Generator) -> None:
    tensor = draft.tensor(rng)
    widths = (
        ("F64", "I64", "U64"),
        ("F32", "I32", "U32"),
        ("F16", "BF16", "I16", "U16"),
        ("U8", "I8", "BOOL"),
    )
    tensor.dtype = pick(rng, next((codes for codes in widths if tensor.dtype in codes), widths[0]))


@mutation("tensor: giant or odd shape")
def _giant(draft: Draft, rng: np.random.Generator) -> None:
    tensor = draft.tensor(rng)
    lengths = (2**31, 2**32, 2**62, 2**63, 2**64 - 1, 2**64, 10**30, -1, 0, 1.5, "4", None, True, [3])
    shape = list(tensor.shape)
    where = pick(rng, ("one", "all", "more", "zeros", "ones", "value", "none"))
    if where == "one" and shape:
        shape[rng.integers(len(shape))] = pick(rng, lengths)
    elif where == "all":
        shape = [pick(rng, lengths) for _ in shape]
    elif where == "more":
        shape = [*shape, pick(rng, lengths)]
    elif where == "zeros":
        shape, tensor.data = [2**40, 0, 2**40], b""
    elif where == "ones":
        shape = [1] * int(rng.integers(1, 200)) + shape
    tensor.shape = pick(rng, ({}, "2, 3", None, 7)) if where == "value" else [] if where == "none" else shape


@mutation("tensor: reshaped, transposed or emptied")
def _reshaped(draft: Draft, rng: np.random.Generator) -> None:
    tensor = draft.tensor(rng)
    array = tensor.array()
    tensor.set(
        pick(
            rng,
            (array.T, array.reshape(-1), array[None], array[:0], array[..., :0], array[..., :-1],
            array[:-1], array[1:],
             np.concatenate([array, array]), np.zeros((0, 3)), np.zeros((1, 0)), np.zeros(())),
        )
    )  # fmt: skip


@mutation("tensor: left out")
def _left_out(draft: Draft, rng: np.random.Generator) -> None:
    if draft.tensors:
        del draft.tensors[rng.integers(len(draft.tensors))]


@mutation("tensor: more of them")
def _more(draft: Draft, rng: np.random.Generator) -> None:
    name, tensor = pick(rng, draft.tensors)
    path, _, last = name.rpartition(".")
    new = f"{path}.{pick(rng, ['A', 'B', 'M', 'C', 'weight', 'num_batches_tracked', last])}"
    draft.tensors.append((pick(rng, (new, odd_name(rng))), Tensor(tensor.dtype, tensor.shape, tensor.data)))


@mutation("tensor: renamed")
def _renamed(draft: Draft, rng: np.random.Generator) -> None:
    index = int(rng.integers(len(draft.tensors)))
    name, tensor = draft.tensors[index]
    path, _, last = name.rpartition(".")
    draft.tensors[index] = (
        pick(rng, (odd_name(rng), f"{path}.{last.lower()}", f"{path}/{last}", f"../{name}")),
        tensor,
    )


@mutation("tensor: two of one name")
def _repeated(draft: Draft, rng: np.random.Generator) -> None:
    name, tensor = pick(rng, draft.tensors)
    other = Tensor(tensor.dtype, tensor.shape, bytes(len(tensor.data)))
    if rng.integers(2):
        draft.tensors.append((name, other))
    else:
        total = sum(len(tensor.data) for _, tensor in draft.tensors)
        offsets = pick(rng, ([0, len(tensor.data)], [total, total]))
        draft.extra_first = bool(rng.integers(2))
        draft.extra.append((name, {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}))


@mutation("tensor: two exchanged")
def _exchanged(draft: Draft, rng: np.random.Generator) -> None:
    one, other = pick(rng, draft.tensors)[1], pick(rng, draft.tensors)[1]
    one.data, other.data = other.data, one.data
    if rng.integers(2):
        one.dtype, one.shape, other.dtype, other.shape = other.dtype, other.shape, one.dtype, one.shape


@mutation("tensor: offsets that overlap, leave holes or lie")
def _offsets(draft: Draft, rng: np.random.Generator) -> None:
    total = sum(len(tensor.data) for _, tensor in draft.tensors)
    tensor = draft.tensor(rng)
    size = len(tensor.data)
    tensor.offsets = pick(
        rng,
        ([0, size], [total - size, total], [total, total + size], [size, 0], [-size, 0], [0, total],
        [2**63, 2**63 + size],
         [2**64 - 1, 2**64 - 1 + size], [0.0, float(size)], [0], [0, size, size], "0", None, [True, size],
         [0, 2**64]),
    )  # fmt: skip
    if tensor.offsets is None:
        tensor.offsets = Raw("null")


@mutation("labels: other numbers")
def _labels(draft: Draft, rng: np.random.Generator) -> None:
    tensor = draft.tensor(rng, "labels")
    _integers(tensor, rng)


@mutation("ranks: other numbers")
def _ranks(draft: Draft, rng: np.random.Generator) -> None:
    tensor = draft.tensor(rng, "ranks")
    _integers(tensor, rng)


def _integers(tensor: Tensor, rng: np.random.Generator) -> None:
    """Permute or change integers of a tensor, or widen it to hold numbers that its dtype could not."""
    array = tensor.array().copy().reshape(-1)
    if array.size < 1 or tensor.dtype in FLOATS:
        return
    where = int(rng.integers(array.size))
    kind = pick(rng, ("shuffle", "zero", "one", "any", "wide", "move"))
    if kind == "shuffle":
        tensor.set(rng.permutation(array))
    elif kind == "wide":
        wide = array.astype("<u8")
        wide[where] = pick(rng, (2**64 - 1, 2**64 - 2, 2**63, 2**63 - 1, 2**32, 255, 256, 1))
        tensor.set(wide, "U64")
    elif kind == "move" and array.size > 1:
        # The sum of the numbers stays, so that checks of the sum of the ranks pass.
        take, give = rng.choice(array.size, 2, replace=False)
        moved = array.astype("i8")
        moved[take] -= 1
        moved[give] += 1
        tensor.set(np.maximum(moved, 0))
    else:
        array[where] = {"zero": 0, "one": 1}.get(kind, rng.integers(0, 128))
        tensor.set(array)


@mutation("active: bytes that are no booleans")
def _active(draft: Draft, rng: np.random.Generator) -> None:
    tensor = draft.tensor(rng, "active")
    tensor.data = bytes(rng.integers(0, pick(rng, (2, 2, 256)), len(tensor.data), dtype=np.uint8))


@mutation("C: numbers in the padding")
def _padding(draft: Draft, rng: np.random.Generator) -> None:
    tensor = draft.tensor(rng, "C")
    if tensor.dtype in FLOATS:
        array = tensor.array().astype("f8")
        tensor.set(np.where(array == 0, pick(rng, (1.0, 1e6, 1e30, np.nan)), array))


@mutation("A, B or M: of other columns")
def _columns(draft: Draft, rng: np.random.Generator) -> None:
    tensor = draft.tensor(rng, "A", "B", "M")
    if tensor.dtype in FLOATS and tensor.data:
        array = tensor.array().astype("f8")
        tensor.set(
            pick(rng, (array * 100, array * 0, array[..., :1] + 0 * array, rng.standard_normal(array.shape)))
        )


@mutation("a layer of very many directions")
def _directions(draft: Draft, rng: np.random.Generator) -> None:
    found = dict(draft.tensors)
    for name, tensor in found.items():
        path = name.rpartition(".")[0]
        ranks = found.get(f"{path}.ranks")
        if name.endswith(".M") and ranks is not None and tensor.dtype in FLOATS and tensor.data:
            q = pick(rng, (11, 255, 3000))
            tensor.set(np.ones((tensor.array().shape[0], q)))
            new = np.zeros(ranks.array().shape, dtype="u8")
            new.reshape(-1)[0] = q
            ranks.set(new, "U16")
            if rng.integers(2) and (C := found.get(f"{path}.C")) is not None and C.dtype in FLOATS:
                # Limit the columns, since the layer may have been blown up by an earlier mutation.
                C.set(np.ones((q, min(C.array().shape[-1], 1000))))
            return


@mutation("a layer of very many subspaces")
def _subspaces(draft: Draft, rng: np.random.Generator) -> None:
    K = pick(rng, (11, 300, 70_000))
    found = dict(draft.tensors)
    path = pick(rng, [name.rpartition(".")[0] for name in found if name.endswith(".ranks")] or [""])
    if (ranks := found.get(f"{path}.ranks")) is not None and ranks.data:
        new = np.zeros(K, dtype="u1")
        new[: ranks.array().size] = ranks.array().reshape(-1).astype("u1")[:K]
        ranks.set(new, "U8")
    if (active := found.get(f"{path}.active")) is not None:
        active.set(np.ones(K, dtype="?"), "BOOL")


@mutation("a large tensor besides")
def _inflated(draft: Draft, rng: np.random.Generator) -> None:
    path = pick(rng, draft.tensors)[0].rpartition(".")[0]
    last = pick(rng, ("extra", "C", "M", "labels", "ranks", "active", "weight"))
    code = pick(rng, ("U8", "F16", "BF16", "F64", "BOOL"))
    shape = pick(rng, ([1, 2**18], [2**18, 1], [2**18]))
    data = bytes(2**18 * {"U8": 1, "BOOL": 1, "F64": 8}.get(code, 2))
    draft.tensors = [(name, old) for name, old in draft.tensors if name != f"{path}.{last}"]
    draft.tensors.append((f"{path}.{last}", Tensor(code, shape, data)))


@mutation("a whole layer blown up")
def _blown_up(draft: Draft, rng: np.random.Generator) -> None:
    # The tensors are consistent with each other but not with the model: 2^17 outputs in as many subspaces, or in one.
    path = (
        pick(rng, list(draft.metadata["layers"]) or ["x"])
        if isinstance(draft.metadata["layers"], dict)
        else "x"
    )
    n = 2**17
    K = pick(rng, (1, 255, n))
    draft.tensors = [(name, old) for name, old in draft.tensors if not name.startswith(f"{path}.")]
    code, labels = ("U8", np.zeros(n)) if n > K else ("U32", np.arange(n))
    ranks = np.zeros(K)
    ranks[0] = 1
    for name, array, dtype in (
        ("M", np.ones((1, 1)), "F16"),
        ("C", np.ones((1, n)), "F16"),
        ("labels", labels, code),
        ("ranks", ranks, "U8"),
        ("active", np.ones(K), "BOOL"),
    ):
        tensor = Tensor(dtype, [], b"")
        tensor.set(array)
        draft.tensors.append((f"{path}.{name}", tensor))
    if isinstance(draft.metadata["layers"], dict):
        draft.metadata["layers"][path] = {"shape": [1, n], "norm": 1.0, "projections": [0.0] * 4}


@mutation("metadata: a value of another type or size")
def _value(draft: Draft, rng: np.random.Generator) -> None:
    holder, last = holder_of(draft, rng)
    holder[last] = odd_value(rng)


# fmt: off
SETTINGS: tuple[tuple[str, Any], ...] = (
    ("rank", 10**18), ("rank", 1), ("rank", Raw("1" + 4000 * "0")), ("subspaces", 10**18), ("subspace_rank",
    10**18), ("seed", Raw("1" + 3000 * "0")),
    ("seed", -1), ("basis", "per_subspace"), ("basis", "own"), ("include_bias", True),
    ("factor_dtype", "float16"),
    ("factor_dtype", "bfloat16"), ("factor_dtype", "float64"), ("factor_dtype", "int8"),
    ("segmentation", "ksubspaces"),
    ("segmentation", "random"), ("segmentation_dimension", 3), ("modules_to_save", ["head"]),
    ("modules_to_save", "head"),
    ("targets", r"(a+)+$"), ("targets", r"(?i)[" + "\\x00-\\uffff" * 400 + "]"), ("targets",
    "(" * 5000), ("targets", "["),
    ("targets", "a{99999999999999999999}"), ("targets", "[[a]"), ("targets", "(a|a)*b"),
    ("targets", "x" * 100_000),
    ("targets", ["x" * 100_000]), ("targets", []), ("targets", {}), ("budget", {"target": 10**300,
    "end_step": 10**301}),
    ("budget", {"target": 1, "end_step": 2, "power": float("nan")}), ("budget", {"target": 1,
    "end_step": 2, "power": Raw("1" + 400 * "0")}),
    ("budget", []), ("__class__", "os.system"), ("trust_remote_code", True),
)
# fmt: on


@mutation("config: a setting that lies")
def _setting(draft: Draft, rng: np.random.Generator) -> None:
    config = draft.metadata["config"]
    if not isinstance(config, dict):
        return
    name, value = pick(rng, SETTINGS)
    config[name] = deepcopy(value)


@mutation("metadata: a key left out, added, repeated or renamed")
def _keys(draft: Draft, rng: np.random.Generator) -> None:
    holder, last = holder_of(draft, rng)
    if not isinstance(holder, dict):
        return
    kind = pick(rng, ("left out", "added", "renamed", "repeated", "top"))
    if kind == "added":
        holder[text_of(odd_name(rng))] = odd_value(rng)
    elif kind == "renamed":
        holder[text_of(odd_name(rng))] = holder.pop(last)
    elif kind == "left out":
        del holder[last]
    elif kind == "top":
        del draft.metadata[pick(rng, list(draft.metadata))]
        for name in TABLES:
            draft.metadata.setdefault(name, Raw("1"))
    else:
        table = pick(rng, TABLES)
        if isinstance(draft.metadata[table], dict) and draft.metadata[table]:
            items = list(draft.metadata[table].items())
            name = pick(rng, items)[0]
            draft.metadata[table] = Raw(encode(encode(Pairs([*items, (name, pick(rng, items)[1])]))))


@mutation("metadata: an entry that is no text, or no JSON")
def _entry(draft: Draft, rng: np.random.Generator) -> None:
    name = pick(rng, [*TABLES, "format", "format_version", "checksum"])
    value = odd_value(rng)
    # A Raw is written into the header itself, any other value into the text of the metadata entry.
    draft.metadata[name] = Raw(encode(value)) if rng.integers(2) else value
    for table in TABLES:
        draft.metadata.setdefault(table, Raw("1"))


@mutation("fingerprint: numbers that lie")
def _fingerprint(draft: Draft, rng: np.random.Generator) -> None:
    layers = draft.metadata["layers"]
    if not isinstance(layers, dict) or not layers:
        return
    base = layers[pick(rng, list(layers))]
    if not isinstance(base, dict):
        return
    numbers = (float("nan"), float("inf"), -1.0, 0.0, 1e308, 1e-300, "1", True, 10**400, None)
    kind = pick(rng, ("norm", "projection", "projections", "shape", "negative"))
    if kind == "norm":
        base["norm"] = pick(rng, numbers[:-2])
    elif kind == "projection" and isinstance(base.get("projections"), list) and base["projections"]:
        base["projections"][rng.integers(len(base["projections"]))] = pick(rng, numbers[:-2])
    elif kind == "projections":
        base["projections"] = pick(rng, ([], [float("nan")] * 4, [0.0], [0.0] * 10_000, "0000", {}, None))
    elif kind == "negative" and isinstance(base.get("norm"), float):
        base["norm"] = -base["norm"] * pick(rng, (1.0, 1e6))
    else:
        base["shape"] = pick(
            rng,
            (
                [10, 12],
                [12.0, 10.0],
                [12, 10, 1],
                [12],
                ["12", "10"],
                [2**40, 2**40],
                [0, 0],
                [-12, -10],
                "ab",
                [True, 10],
            ),
        )


@mutation("paths: a layer renamed with its tensors")
def _path(draft: Draft, rng: np.random.Generator) -> None:
    layers = draft.metadata["layers"]
    if not isinstance(layers, dict) or not layers:
        return
    old = pick(rng, list(layers))
    new = odd_name(rng, old)
    if isinstance(new, Raw) or new in layers:
        return
    layers[new] = layers.pop(old)
    draft.tensors = [
        (new + name[len(old) :] if new else name[len(old) + 1 :], tensor)
        if name.startswith(f"{old}.")
        else (name, tensor)
        for name, tensor in draft.tensors
    ]


@mutation("paths: layers and saved modules that clash")
def _clash(draft: Draft, rng: np.random.Generator) -> None:
    layers, saved = draft.metadata["layers"], draft.metadata["modules_to_save"]
    if not isinstance(layers, dict) or not isinstance(saved, dict) or not layers:
        return
    path = pick(rng, [*layers, "head"])
    place = pick(rng, (path, path, path.rpartition(".")[0], "", f"{path}.C", "encoder", "head"))
    weight = Tensor("F64", [10, 12], np.ones(120).tobytes())
    bias = Tensor("F64", [10], np.ones(10).tobytes())
    kind = pick(rng, ("weight", "weight", "C", "odd", "empty", "text", "twice"))
    if kind == "weight":
        saved[place] = ["bias", "weight"]
        prefix = f"{place}." if place else ""
        draft.tensors += [(f"{prefix}bias", bias), (f"{prefix}weight", weight)]
    elif kind == "C":
        saved[place] = [pick(rng, ("C", "M", "labels"))]
    elif kind == "odd":
        saved[place] = [5]
        draft.tensors.append((f"{place}.5" if place else "5", bias))
    else:
        saved[place] = {"empty": [], "text": "weight", "twice": ["weight", "weight"]}[kind]


# fmt: off
DEEP = (
    "[" * 100_000, "[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900,
    "[" + "[]," * 50_000 + "1]", '"' + "\U0001d518" * 60_000 + '"',
    '"' + "x" * 200_000 + '"', "[" + "1," * 90_000 + "1]", "9" * 5000,
    '{"dtype":"U8","shape":[0],"data_offsets":[0,0],"x":{}}',
    '{"dtype":"U8","shape":[' + "0," * 60_000 + '0],"data_offsets":[0,0]}',
)
# fmt: on


@mutation("header: deep, wide or long JSON")
def _deep(draft: Draft, rng: np.random.Generator) -> None:
    value = pick(rng, DEEP)
    if rng.integers(2):
        draft.extra_first = bool(rng.integers(2))
        draft.extra.append((pick(rng, ("extra", "__metadata__", "a" * 1000)), Raw(value)))
    else:
        draft.metadata[pick(rng, (*TABLES, "extra"))] = Raw(
            json.dumps(value, ensure_ascii=bool(rng.integers(2)))
        )


@mutation("header: very many tensors")
def _many(draft: Draft, rng: np.random.Generator) -> None:
    total = sum(len(tensor.data) for _, tensor in draft.tensors)
    empty = {"dtype": "U8", "shape": [0], "data_offsets": [total, total]}
    draft.extra += [(f"t{number}", empty) for number in range(pick(rng, (50, 50, 1000)))]


def damage(name: str) -> Callable[..., Any]:
    """Register a function that changes bytes."""

    def register(function: Callable[[bytes, np.random.Generator], bytes]) -> Any:
        DAMAGES[name] = function
        return function

    return register


@damage("bytes: bits flipped anywhere")
def _bits(content: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(content)
    length = min(8 + int.from_bytes(content[:8], "little"), len(content))
    for _ in range(int(rng.integers(1, 9))):
        # Half of the flips are limited to the header, which would otherwise be hit rarely.
        changed[rng.integers(pick(rng, (length, len(content))))] ^= 1 << rng.integers(8)
    return bytes(changed)


@damage("bytes: truncated")
def _truncated(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: pick(rng, (rng.integers(len(content)), rng.integers(20), len(content) - 1))]


@damage("bytes: some inserted, removed or appended")
def _inserted(content: bytes, rng: np.random.Generator) -> bytes:
    where, size = int(rng.integers(len(content))), int(rng.integers(1, 65))
    noise = bytes(rng.integers(0, 256, size, dtype=np.uint8))
    return pick(
        rng,
        (content[:where] + noise + content[where:], content[:where] + content[where + size :],
        content + noise,
         content[:where] + noise + content[where + size :], content + content,
         content[:where] + bytes(len(content) - where)),
    )  # fmt: skip


@damage("bytes: header length that lies")
def _length(content: bytes, rng: np.random.Generator) -> bytes:
    length = int.from_bytes(content[:8], "little")
    lie = pick(
        rng,
        (
            0,
            1,
            2,
            length - 1,
            length + 1,
            length - 8,
            length + 8,
            len(content),
            2**31,
            2**63,
            2**64 - 1,
            10**8 + 1,
        ),
    )
    return max(0, lie).to_bytes(8, "little") + content[8:]


@damage("bytes: header of invalid UTF-8 or JSON")
def _header(content: bytes, rng: np.random.Generator) -> bytes:
    length = int.from_bytes(content[:8], "little")
    where = 8 + int(rng.integers(max(1, length)))
    return (
        content[:where]
        + bytes([pick(rng, (0x80, 0xC0, 0xFF, 0xED, 0, 0x22, 0x5C, 0x7B, 0x7D))])
        + content[where + 1 :]
    )


@damage("bytes: no adapter at all")
def _noise(content: bytes, rng: np.random.Generator) -> bytes:
    other = Draft(
        [("a", Tensor("F32", [2], bytes(8)))], {name: Raw('"1"') for name in TABLES} | {"format": "pt"}
    )
    noise = bytes(rng.integers(0, 256, int(rng.integers(0, 3000)), dtype=np.uint8))
    return pick(
        rng,
        (b"", noise, b"\0" * 5000, b"PK\x03\x04" + noise, b"\x80\x04" + noise, written(other), b"{}" * 500),
    )


def mutated(
    valid: bytes, other: bytes, rng: np.random.Generator, kinds: Sequence[str] = ()
) -> tuple[str, bytes]:
    """Return the name of the first mutation, and a valid file after mutations of these kinds, or of any."""
    names = kinds or [*MUTATIONS, *DAMAGES]
    count = int(rng.choice([1, 2, 4], p=[0.7, 0.2, 0.1]))
    chosen = [pick(rng, names) for _ in range(count)]
    draft = draft_of(valid)
    for name in chosen:
        if name in MUTATIONS:
            # A mutation may fail on a draft that an earlier one has changed.
            unfit = contextlib.suppress(ValueError, TypeError, LookupError, AttributeError, OverflowError)
            with unfit, np.errstate(all="ignore"):
                MUTATIONS[name](draft, rng)
    content = written(draft, checksum=bool(rng.integers(20)))
    for name in chosen:
        if name in DAMAGES and content:
            with contextlib.suppress(ValueError):
                content = DAMAGES[name](content, rng)
    if not kinds and not rng.integers(200):
        cut = int(rng.integers(len(content) + 1))
        return "bytes: two files spliced", content[:cut] + other[cut:]
    return chosen[0], content
