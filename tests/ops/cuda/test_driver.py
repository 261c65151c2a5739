"""The host side of the CUDA operators over a stand-in for the driver: images, launches, memory, and what goes wrong."""

import ctypes
import subprocess
import sys
import threading

import numpy as np
import onnxruntime
import pytest
from close import assert_close
from fake_driver import LARGE_SHARED_BYTES, THREADS_OF_TEST_KERNEL, address, aligned, has_driver
from harness_calls import AttentionCall
from onnx import TensorProto, helper

from act_export.ops.library import library_info

# Calls one function of the harness in a process of its own; argument: paths of libraries.
ALONE = """
import ctypes, sys
libraries = [ctypes.CDLL(path) for path in sys.argv[1:]]
error = ctypes.create_string_buffer(1024)
target = ctypes.create_string_buffer(16)
print(libraries[-1].ActCudaFind(0, b"test.plain", target, error), error.value.decode())
"""
POINTER = 0x7F00_1234_5670


def launch(driver, kernel="test.plain", grid=(2, 3, 4), device=0, stream=None):
    blocks = (ctypes.c_uint * 3)(*grid)
    values = (ctypes.c_void_p(POINTER), ctypes.c_int32(-7), ctypes.c_int64(-(2**40)), ctypes.c_float(0.5))
    driver.call("ActCudaLaunch", device, kernel.encode(), blocks, ctypes.c_void_p(stream), *values)


def target_on(driver, kernel, major, minor):
    """Which image a device takes."""
    with driver.recording() as launches:
        launch(driver, kernel, device=driver.add_device(major, minor))
    return launches[0].target


def alone(*libraries):
    command = [sys.executable, "-c", ALONE, *map(str, libraries)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_a_launch_arrives_as_it_was_made(driver):
    with driver.recording() as launches:
        launch(driver, stream=0x5000)
    (found,) = launches
    assert (found.kernel, found.target) == ("test.plain", "sm_90")
    assert (found.grid, found.threads, found.shared_bytes) == ((2, 3, 4), THREADS_OF_TEST_KERNEL, 0)
    assert found.stream == 0x5000
    assert found.arguments == (POINTER, -7, -(2**40), 0.5)


@pytest.mark.parametrize("grid", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_an_empty_grid_is_left_out(driver, grid):
    with driver.recording() as launches:
        launch(driver, grid=grid)
    assert launches == []


def test_a_grid_beyond_the_limits_is_an_error(driver):
    with pytest.raises(RuntimeError, match=r"launching kernel test.plain on a grid of 1 x 65536 x 1 .*INVALID_VALUE"):
        launch(driver, grid=(1, 65536, 1))


def test_other_arguments_than_the_kernel_takes(driver):
    with pytest.raises(RuntimeError, match=r"kernel select takes parameters p+i+, not pilf"):
        launch(driver, "select")


@pytest.mark.parametrize(
    ("capability", "target"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_80"),
        ((8, 9), "sm_80"),
        ((9, 0), "sm_90"),
        ((9, 1), "ptx"),
        ((10, 0), "sm_100"),
        ((10, 3), "ptx"),
        ((12, 0), "ptx"),
    ],
)
def test_each_gpu_takes_the_best_image(driver, capability, target):
    assert target_on(driver, "test.plain", *capability) == target


def test_older_gpus_are_refused(driver):
    device = driver.add_device(7, 5)
    with pytest.raises(
        RuntimeError, match=r"Stand-in, compute capability 7\.5\).* need 8\.0 or newer: run the portable"
    ):
        launch(driver, device=device)


def test_a_gpu_that_is_not_there(driver):
    with pytest.raises(RuntimeError, match=r"finding GPU 99 failed: CUDA_ERROR_INVALID_DEVICE"):
        launch(driver, device=99)


def test_missing_kernels(driver):
    with pytest.raises(
        RuntimeError, match=r"no CUDA kernel test\.none for the GPU \(Stand-in, compute capability 9\.0\)"
    ):
        launch(driver, "test.none")
    with pytest.raises(RuntimeError, match=r"no CUDA kernel test\.newest"):
        launch(driver, "test.newest")  # sm_100 only


def test_much_shared_memory_is_asked_for(driver):
    with driver.recording() as launches:
        launch(driver, "test.large")
    assert launches[0].shared_bytes == LARGE_SHARED_BYTES


def test_more_shared_memory_than_the_gpu_has(driver):
    device = driver.add_device(8, 6, shared_bytes=101_376)
    with pytest.raises(RuntimeError, match=r"test\.large \(sm_80\).* needs 102400 bytes of shared memory.* are 101376"):
        launch(driver, "test.large", device=device)


def test_a_kernel_is_loaded_once_for_each_gpu(driver):
    device = driver.add_device(9, 0)
    launch(driver, device=device)
    before = driver.library.FakeCudaLoads()
    threads = [threading.Thread(target=launch, args=(driver, "test.large", (1, 1, 1), device)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    launch(driver, device=device)
    assert driver.library.FakeCudaLoads() == before + 1


def test_which_image_was_loaded_is_told(driver):
    assert driver.find("test.plain") == "sm_90"
    assert driver.find("test.plain", driver.add_device(8, 6)) == "sm_80"
    assert driver.find("test.plain", driver.add_device(12, 0)) == "ptx"


def test_an_image_that_loads_but_has_no_code(driver):
    """A driver that loads lazily finds it out late: not in a launch, and PTX is taken, with the reason told."""
    assert driver.find("test.damaged") == "ptx"
    expected = "loading the code of kernel test.damaged (sm_90) on the GPU (Stand-in, compute capability 9.0) failed: "
    assert driver.refused().startswith(expected + "CUDA_ERROR_INVALID_IMAGE")
    with driver.recording() as launches:
        launch(driver, "test.damaged")
    assert launches[0].target == "ptx"


def test_each_gpu_has_its_own_number_of_multiprocessors(driver):
    counts = []
    for multiprocessors in (108, 132):
        device = driver.add_device(9, 0, multiprocessors=multiprocessors)
        count = ctypes.c_int()
        driver.call("ActCudaMultiprocessors", device, ctypes.byref(count))
        counts.append(count.value)
    assert counts == [108, 132]


def call_of_one_token(sequence=1):
    """A call of the operator, and the arrays behind it; of more tokens only to be launched."""
    rng, total = np.random.default_rng(0), 3 + sequence
    draw = lambda *shape: aligned(rng.standard_normal(shape, np.float32))  # noqa: E731
    arrays = {
        "query": draw(1, sequence, 2, 64),
        "key": draw(1, sequence, 1, 64),
        "value": draw(1, sequence, 1, 64),
        "past_key": draw(1, 1, 3, 64),
        "past_value": draw(1, 1, 3, 64),
        "past_sink_scores": aligned(np.ones((1, 1, 3), np.float32)),
        "attention_mask": aligned(np.ones((1, total), np.int64)),
        "output": aligned(np.full((1, sequence, 2, 64), np.nan, np.float32)),
        "present_key": aligned(np.full((1, 1, total, 64), np.nan, np.float32)),
        "present_value": aligned(np.full((1, 1, total, 64), np.nan, np.float32)),
        "present_sink_scores": aligned(np.full((1, 1, total), np.nan, np.float32)),
        "calibrated_heads": np.array([1], np.int32),
        "calibration": aligned(np.array([[[0.0, 1.0, 9.0]]], np.float32)),
    }
    call = AttentionCall(batch=1, sequence=sequence, total=total, past_capacity=3, present_capacity=total)
    call.num_heads, call.kv_num_heads, call.head_size = 2, 1, 64
    call.value_head_size, call.scale, call.sliding_window, call.calibrations, call.calibrated_count = 64, 0.1, -1, 1, 1
    for name, array in arrays.items():
        setattr(call, name, address(array))
    return call, arrays


def attention_of(arrays):
    """The attention map (2, 4), keys and values (1, 1, 4, 64), and the plain output (2, 64)."""
    keys = np.concatenate([arrays["past_key"], arrays["key"].swapaxes(1, 2)], axis=2)
    values = np.concatenate([arrays["past_value"], arrays["value"].swapaxes(1, 2)], axis=2)
    weights = np.exp(0.1 * arrays["query"][0, 0] @ keys[0, 0].T)
    weights /= weights.sum(axis=1, keepdims=True)
    return weights, keys, values, weights @ values[0, 0]


def test_a_call_runs_in_the_interpreter(driver):
    call, arrays = call_of_one_token()
    driver.attention("float32", call)
    weights, keys, values, output = attention_of(arrays)
    np.testing.assert_array_equal(arrays["present_key"], keys)
    np.testing.assert_array_equal(arrays["present_value"], values)
    assert_close(arrays["output"][0, 0], output, 1e-5)
    assert_close(arrays["present_sink_scores"][0, 0], weights[1] + [1, 1, 1, 0], 1e-5)


def test_a_call_without_memory_frees_what_it_has(driver):
    call, _ = call_of_one_token()
    for allocations in range(4):  # three of the node, one of the call
        driver.library.FakeCudaFailAllocations(allocations)
        with pytest.raises(RuntimeError, match=r"allocating \d+ bytes.* failed: CUDA_ERROR_OUT_OF_MEMORY"):
            driver.attention("float32", call)


@pytest.mark.parametrize("sequence", [1, 17])
def test_calls_in_two_streams_at_once(driver, sequence):
    """Each has memory of its own, from its first launch to its last, and launches in its own stream."""
    both = threading.Barrier(2, timeout=60)
    streams = (0x5000, 0x6000)

    def one(stream):
        call, arrays = call_of_one_token(sequence)
        driver.attention("float32", call, stream=stream)
        del arrays

    driver.before_launch = both.wait
    try:
        with driver.recording(interpret=False) as launches:
            threads = [threading.Thread(target=one, args=(stream,)) for stream in streams]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        driver.before_launch = lambda: None
    used = [frozenset().union(*(found.scratch for found in launches if found.stream == stream)) for stream in streams]
    assert [sum(found.stream == stream for found in launches) for stream in streams] == [len(launches) // 2] * 2
    assert len(launches) == {1: 6, 17: 10}[sequence]
    assert all(len(memory) == 1 and 0 not in memory for memory in used)  # one allocation, which is there
    assert used[0] != used[1]


def test_memory_of_the_stream_where_the_allocator_knows_it(libraries):
    """ONNX Runtime's allocators need not have the function."""
    allocates_by = ctypes.CDLL(str(libraries.harness)).ActAllocatesBy
    allocates_by.restype = ctypes.c_char_p
    assert allocates_by(True, True, False) == b"AllocOnStream"
    assert allocates_by(True, False, False) == allocates_by(False, True, False) == b"Alloc"
    assert allocates_by(True, True, True) == allocates_by(False, False, True) == b"null"


def test_memory_of_a_call_is_the_callers(driver):
    """Calls of a node that allocate nothing give what others give; too little memory is refused."""
    call, arrays = call_of_one_token()
    driver.attention("float32", call)
    expected = arrays["output"].copy()
    node, memory = driver.create("float32", call), aligned(np.full(1 << 16, 0xFF, np.uint8))
    before = driver.library.FakeCudaLiveAllocations()
    for _ in range(2):
        arrays["output"][...] = np.nan
        with driver.recording() as launches:
            driver.run(node, call, 0x5000, address(memory), memory.nbytes)
        np.testing.assert_array_equal(arrays["output"], expected)
    assert {found.stream for found in launches} == {0x5000}
    assert driver.library.FakeCudaLiveAllocations() == before
    with pytest.raises(RuntimeError, match=r"the call needs \d+ bytes, not 256"):
        driver.run(node, call, 0x5000, address(memory), 256)
    driver.destroy(node)


def test_a_launch_that_fails_is_an_error(driver):
    call, arrays = call_of_one_token()
    call.query = arrays["query"].ctypes.data + 4
    with pytest.raises(RuntimeError, match=r"launching kernel .* failed: CUDA_ERROR_LAUNCH_FAILED") as raised:
        driver.attention("float32", call)
    assert "query is at" in str(raised.value.__cause__)


def test_without_a_driver(libraries):
    if has_driver():
        pytest.skip("this machine has a driver")
    assert "no CUDA driver: libcuda.so.1 can't be loaded" in alone(libraries.harness)


def test_an_old_driver(libraries):
    expected = "1 the CUDA driver, of CUDA 11.8, has no cuLibraryLoadData: update it to one of CUDA 12.0 or newer"
    assert alone(libraries.old_driver, libraries.harness) == expected


def test_the_library_tells_its_targets(libraries):
    assert library_info(libraries.act_ops).cuda == ("sm_80", "sm_90", "sm_100", "ptx")


def test_a_library_that_tells_nothing_has_no_kernels(libraries):
    assert library_info(libraries.harness).cuda == ()


def test_a_damaged_library(libraries, tmp_path):
    content = libraries.act_ops.read_bytes()
    header = libraries.act_ops.parent.with_name("kernels.bin").read_bytes()[:24]
    assert content.count(header) == 1
    damaged = tmp_path / "libact_ops.so"
    damaged.write_bytes(content.replace(header, header[:16] + bytes(8)))
    with pytest.raises(ValueError, match="is damaged: its CUDA kernels can't be read"):
        library_info(damaged)


def test_a_session_on_the_cpu_takes_the_kernels_of_the_cpu(libraries):
    node = helper.make_node(
        "Attention",
        ["query", "key", "value", "past_key", "past_value", "attention_mask"],
        ["output", "present_key", "present_value"],
        domain="act",
        num_heads=2,
        kv_num_heads=1,
        scale=0.1,
    )
    _, arrays = call_of_one_token()
    shapes = {"query": (1, 1, 128), "key": (1, 1, 64), "value": (1, 1, 64)}
    feeds = {name: arrays[name].reshape(shapes.get(name, arrays[name].shape)) for name in node.input}
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in feeds.items()
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("act", 1)]
    model = helper.make_model(
        helper.make_graph([node], "one_node", inputs, outputs), opset_imports=opsets, ir_version=10
    )
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(libraries.act_ops))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    output, *_ = session.run(None, feeds)
    assert_close(output.reshape(2, 64), attention_of(arrays)[-1], 1e-5)
