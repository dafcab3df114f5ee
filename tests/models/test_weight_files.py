"""Files of weights: what was written is read, and nothing in a file is ever run."""

import io
import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from attnzoom_jax.models.weight_files import LEGACY_MAGIC, read_weights

STORAGE_NAMES = {"float32": "Float", "float16": "Half", "bfloat16": "BFloat16", "int64": "Long"}
REBUILD = ("torch._utils", "_rebuild_tensor_v2")


# ---- what torch.save writes, written by hand


def bare(value):
    """The opcodes that push a value of plain Python."""
    return pickle.dumps(value, 2)[2:-1]


def name_of(module, name):
    return f"c{module}\n{name}\n".encode()


def opcodes_of_storage(array, key, *, legacy=False):
    kind = name_of("torch", STORAGE_NAMES[array.dtype.name] + "Storage")
    rest = bare(None) if legacy else b""
    fields = bare("storage") + kind + bare(key) + bare("cpu") + bare(array.size)
    return b"(" + fields + rest + b"tQ"


def opcodes_of_tensor(array, key, *, shape=None, strides=None, offset=0, legacy=False):
    shape = array.shape if shape is None else shape
    strides = [s // array.itemsize for s in array.strides] if strides is None else strides
    storage = opcodes_of_storage(array, key, legacy=legacy)
    hooks = name_of("collections", "OrderedDict") + b")R"
    numbers = bare(offset) + bare(tuple(shape)) + bare(tuple(strides))
    return name_of(*REBUILD) + b"(" + storage + numbers + bare(False) + hooks + b"tR"


def opcodes_of_dict(items):
    content = b"".join(bare(name) + opcodes for name, opcodes in items.items())
    metadata = b"}" + bare("_metadata") + b"}sb"  # torch sets it on the dictionary
    return name_of("collections", "OrderedDict") + b")R(" + content + b"u" + metadata


def write_zip(path, opcodes, storages, *, order="little"):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + opcodes + b".")
        archive.writestr("archive/byteorder", order)
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", "3\n")


def write_torch(path, arrays, *, legacy=False, wrap=lambda opcodes: opcodes, order="little"):
    tensors = {
        name: opcodes_of_tensor(array, str(i), legacy=legacy)
        for i, (name, array) in enumerate(arrays.items())
    }
    opcodes = wrap(opcodes_of_dict(tensors))
    datas = {str(i): array.tobytes() for i, array in enumerate(arrays.values())}
    if not legacy:
        write_zip(path, opcodes, datas, order=order)
        return
    parts = [pickle.dumps(part, 2) for part in (LEGACY_MAGIC, 1001, {"little_endian": True})]
    parts += [b"\x80\x02" + opcodes + b".", pickle.dumps(list(datas), 2)]
    for data, array in zip(datas.values(), arrays.values(), strict=True):
        parts += [np.int64(array.size).tobytes(), data]
    path.write_bytes(b"".join(parts))


def in_checkpoint(opcodes):
    """{"epoch": 90, "optimizer": {...}, "state_dict": ...}"""
    rest = bare("epoch") + bare(90) + bare("optimizer") + bare({"lr": 0.1, "groups": [1, (2,)]})
    return b"}(" + rest + bare("state_dict") + opcodes + b"u"


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "conv1.weight": rng.normal(size=(4, 3, 2, 2)).astype(np.float32),
        "bn1.bias": rng.normal(size=4).astype(np.float16),
        "bn1.weight": rng.normal(size=4).astype(ml_dtypes.bfloat16),
        "bn1.num_batches_tracked": np.array(7),
        "empty": np.zeros((0, 3), np.float32),
    }


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


# ---- reading


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrap", [lambda opcodes: opcodes, in_checkpoint])
def test_torch_file(tmp_path, arrays, legacy, wrap):
    path = tmp_path / "weights.pth"
    write_torch(path, arrays, legacy=legacy, wrap=wrap)
    assert_same(read_weights(str(path)), arrays)


def test_torch_file_of_the_other_byte_order(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    storages = {"0": array.astype(">f4").tobytes()}
    opcodes = opcodes_of_dict({"w": opcodes_of_tensor(array, "0")})
    write_zip(tmp_path / "w.pt", opcodes, storages, order="big")
    np.testing.assert_array_equal(read_weights(str(tmp_path / "w.pt"))["w"], array)


def test_tensors_may_share_a_storage_and_be_strided(tmp_path):
    array = np.arange(12, dtype=np.float32)
    tensors = {
        "transposed": opcodes_of_tensor(array, "0", shape=(4, 3), strides=(1, 4)),
        "part": opcodes_of_tensor(array, "0", shape=(2,), strides=(3,), offset=5),
        "scalar": opcodes_of_tensor(array, "0", shape=(), strides=(), offset=11),
    }
    write_zip(tmp_path / "w.pth", opcodes_of_dict(tensors), {"0": array.tobytes()})
    found = read_weights(str(tmp_path / "w.pth"))
    np.testing.assert_array_equal(found["transposed"], array.reshape(3, 4).T)
    np.testing.assert_array_equal(found["part"], [5, 8])
    assert found["scalar"] == 11


def test_safetensors_and_npz(tmp_path, arrays):
    safetensors.numpy.save_file(
        {name: array for name, array in arrays.items() if array.dtype != ml_dtypes.bfloat16},
        tmp_path / "w.safetensors",
    )
    del arrays["bn1.weight"]
    assert_same(read_weights(str(tmp_path / "w.safetensors")), arrays)
    np.savez(tmp_path / "w.npz", **arrays)
    assert_same(read_weights(str(tmp_path / "w.npz")), arrays)


def test_safetensors_of_bfloat16(tmp_path):
    header = b'{"w":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'
    values = np.array([1.5, -3], ml_dtypes.bfloat16)
    content = len(header).to_bytes(8, "little") + header + values.tobytes()
    (tmp_path / "w.safetensors").write_bytes(content)
    assert_same(read_weights(str(tmp_path / "w.safetensors")), {"w": values})


@pytest.mark.parametrize("legacy", [False, True])
def test_what_torch_saves(tmp_path, legacy):
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).half()
    state = module.state_dict()
    state["parameter"] = torch.nn.Parameter(torch.randn(2, 3).T)
    state["bfloat"] = torch.randn(3).bfloat16()
    path = tmp_path / "w.pth"
    content = {"epoch": 1, "state_dict": state, "size": torch.Size([1, 2])}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    found = read_weights(str(path))
    assert set(found) == set(state)
    for name, tensor in state.items():
        np.testing.assert_array_equal(
            found[name].astype(np.float64), tensor.detach().double().numpy()
        )


# ---- refusing


class Malicious:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def pickles_that_call(marker):
    """{global: pickles that would make the file `marker`, in different ways}."""
    command = f"touch {marker}"
    system = f"{os.system.__module__}.system"
    line = f"open({str(marker)!r}, 'w').close()"
    return [
        (system, pickle.dumps(Malicious(os.system, command), 2)),
        (system, pickle.dumps({"state_dict": {"w": Malicious(os.system, command)}}, 4)),
        ("builtins.eval", pickle.dumps([Malicious(eval, line)], 4)),
        ("builtins.exec", pickle.dumps(Malicious(exec, line), 5)),
        ("os.system", f"(S'{command}'\nios\nsystem\n.".encode()),
        ("builtins.getattr", pickle.dumps(Malicious(getattr, [], "append"), 4)),
        ("torch.load", name_of("torch", "load") + b"(" + bare(str(marker)) + b"tR."),
        ("torch._utils.os.system", b"\x80\x04\x8c\x0ctorch._utils\x8c\x09os.system\x93."),
        ("collections.OrderedDict.clear", name_of("collections", "OrderedDict.clear") + b"."),
    ]


@pytest.mark.parametrize("number", range(9))
@pytest.mark.parametrize("legacy", [False, True])
def test_any_other_global_is_refused_by_name_and_not_called(tmp_path, number, legacy):
    marker = tmp_path / "marker"
    name, program = pickles_that_call(marker)[number]
    path = tmp_path / "w.pth"
    if legacy:
        parts = [pickle.dumps(part, 2) for part in (LEGACY_MAGIC, 1001, {"little_endian": True})]
        path.write_bytes(b"".join([*parts, program]))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", program)
    with pytest.raises(ValueError, match=f"refused.*global {name},") as error:
        read_weights(str(path))
    assert "\n" not in str(error.value)
    assert not marker.exists()


def test_the_programs_would_have_run(tmp_path):
    marker = tmp_path / "marker"
    for _, program in pickles_that_call(marker)[:5]:
        pickle.loads(program)
        marker.unlink()


def test_a_program_before_the_magic_number_is_refused(tmp_path):
    (tmp_path / "w.pth").write_bytes(pickle.dumps(Malicious(os.system, "true"), 2))
    with pytest.raises(ValueError, match=r"refused.*\.system"):
        read_weights(str(tmp_path / "w.pth"))


def test_npz_with_objects_is_refused(tmp_path):
    np.savez(tmp_path / "w.npz", w=np.array([Malicious(os.system, "true")], object))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        read_weights(str(tmp_path / "w.npz"))


def test_a_pickle_cannot_change_the_reader(tmp_path, arrays):
    """BUILD sets attributes on whatever stands on the stack."""
    for module, name in (REBUILD, ("torch", "Size"), ("collections", "OrderedDict")):
        slots = bare((None, {"__call__": "x", "__defaults__": (1,), "__class__": 1}))
        program = name_of(module, name) + slots + b"b."
        with zipfile.ZipFile(tmp_path / "bad.pth", "w") as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02" + program)
        with pytest.raises(ValueError, match="damaged"):
            read_weights(str(tmp_path / "bad.pth"))
    write_torch(tmp_path / "w.pth", arrays)
    assert_same(read_weights(str(tmp_path / "w.pth")), arrays)


@pytest.mark.parametrize(
    "view",
    [
        {"shape": (5,), "strides": (1,)},
        {"shape": (2, 2), "strides": (4, 1)},
        {"shape": (4,), "strides": (1,), "offset": 1},
        {"shape": (4,), "strides": (-1,), "offset": 3},
        {"shape": (2,), "strides": (1,), "offset": -1},
        {"shape": (10**12,), "strides": (0,)},
        {"shape": (2,), "strides": (1, 1)},
        {"shape": ("2",), "strides": (1,)},
    ],
)
def test_a_tensor_outside_of_its_storage_is_refused(tmp_path, view):
    array = np.arange(4, dtype=np.float32)
    opcodes = opcodes_of_dict({"w": opcodes_of_tensor(array, "0", **view)})
    write_zip(tmp_path / "w.pth", opcodes, {"0": array.tobytes()})
    with pytest.raises(ValueError, match="w does not fit its storage"):
        read_weights(str(tmp_path / "w.pth"))


# ---- broken files


@pytest.mark.parametrize("suffix", [".pth", ".legacy.pth", ".safetensors", ".npz"])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.3, 0.7, 0.99])
def test_a_file_that_is_cut_off_is_one_clear_line(tmp_path, suffix, kept):
    arrays = {"a": np.ones((30, 30), np.float32), "b": np.ones(50, np.float32)}
    path = tmp_path / f"w{suffix}"
    if suffix.endswith(".pth"):
        write_torch(path, arrays, legacy="legacy" in suffix)
    elif suffix == ".npz":
        np.savez(path, **arrays)
    else:
        safetensors.numpy.save_file(arrays, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match="cut off or damaged") as error:
        read_weights(str(path))
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_a_storage_of_another_size_is_damage(tmp_path):
    array = np.arange(4, dtype=np.float32)
    opcodes = opcodes_of_dict({"w": opcodes_of_tensor(array, "0")})
    write_zip(tmp_path / "w.pth", opcodes, {"0": array.tobytes()[:-1]})
    with pytest.raises(ValueError, match="cut off or damaged: 15 bytes where 4 numbers"):
        read_weights(str(tmp_path / "w.pth"))


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="there is no such file"):
        read_weights(str(tmp_path / "w.pth"))
    (tmp_path / "w.h5").touch()
    with pytest.raises(ValueError, match=r"ending in \.safetensors, \.npz, \.pth"):
        read_weights(str(tmp_path / "w.h5"))
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("readme", "")
    with pytest.raises(ValueError, match=r"no data\.pkl"):
        read_weights(str(tmp_path / "w.pth"))
    write_zip(tmp_path / "w.pth", bare({"epoch": 3}), {})
    with pytest.raises(ValueError, match="no named arrays"):
        read_weights(str(tmp_path / "w.pth"))
    write_zip(tmp_path / "w.pth", bare([1, 2]), {})
    with pytest.raises(ValueError, match="holds a list; expected a dict"):
        read_weights(str(tmp_path / "w.pth"))
    stream = io.BytesIO()
    np.savez(stream)
    (tmp_path / "w.npz").write_bytes(stream.getvalue())
    with pytest.raises(ValueError, match="no named arrays"):
        read_weights(str(tmp_path / "w.npz"))
