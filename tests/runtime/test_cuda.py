"""What is missing for a GPU is named with what to do; the driver is a stand-in of the same calling convention."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace

import onnxruntime
import pytest
from compiled import compile_file
from typer.testing import CliRunner

from act_export.commands.main import app
from act_export.errors import SessionError
from act_export.ops.library import LibraryInfo
from act_export.runtime import Session, cuda, cuda_driver
from act_export.runtime.cuda_driver import CudaDriver, CudaDriverError
from act_export.runtime.device import Device

PROVIDERS = ["CUDAExecutionProvider", "CPUExecutionProvider"]


@pytest.fixture(scope="module")
def driver_library() -> Path:
    return compile_file("fake_driver.so", Path(__file__).parent / "csrc" / "fake_driver.cc", "-shared", "-fPIC")


@pytest.fixture
def driver(driver_library, monkeypatch):
    """A machine with a driver and one GPU."""
    monkeypatch.setattr(cuda_driver, "LIBRARY", str(driver_library))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def gpu_package(driver, monkeypatch):
    """And with ONNX Runtime's GPU package, whose sessions use the GPU where `made` says so."""
    made = SimpleNamespace(providers=["CPUExecutionProvider"], options={}, error=None)
    real = onnxruntime.InferenceSession

    def session(path, options, providers, **more):
        made.asked, made.options = providers, more
        if made.error is not None:
            raise made.error
        inner = real(path, options, providers=["CPUExecutionProvider"])
        monkeypatch.setattr(inner, "get_providers", lambda: made.providers, raising=False)
        return inner

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: PROVIDERS)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(onnxruntime, "cuda_version", "13.0")
    monkeypatch.setattr(onnxruntime, "set_default_logger_severity", lambda _: None)
    monkeypatch.setattr(cuda, "library_info", lambda: LibraryInfo(Path("libact_ops.so"), ("sm_90",)))
    return made


@pytest.mark.parametrize(
    ("text", "expected"), [("cpu", Device()), ("cuda", Device("cuda", 0)), ("cuda:3", Device("cuda", 3))]
)
def test_devices(text, expected) -> None:
    assert Device.parse(text) == expected
    assert Device.parse(str(expected)) == expected


@pytest.mark.parametrize("text", ["gpu", "cuda:", "cuda:-1", "cuda:x", "CUDA", "", "cpu:0", "cuda:1 "])
def test_what_is_no_device(tiny_file, text) -> None:
    with pytest.raises(SessionError, match=r"pass cpu, cuda or cuda:N"):
        Session.open(tiny_file, device=text)


@pytest.mark.parametrize("command", [["generate", "FILE", "hello"], ["bench", "FILE"], ["eval", "FILE", "--data", "x"]])
def test_commands_pass_the_device_on(tiny_file, command) -> None:
    arguments = [str(tiny_file) if word == "FILE" else word for word in command]
    result = CliRunner().invoke(app, [*arguments, "--device", "gpu"])
    assert result.exit_code == 2
    assert "device is 'gpu'; pass cpu, cuda or cuda:N" in result.stderr


def test_the_cpu_package(tiny_file) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this is the GPU package")
    with pytest.raises(SessionError, match=r"built without CUDA: pip uninstall .*'act-export\[gpu\]'"):
        Session.open(tiny_file, device="cuda")


def test_no_driver(tiny_file, gpu_package, monkeypatch) -> None:
    monkeypatch.setattr(cuda_driver, "LIBRARY", "libcuda-that-is-not-there.so.1")
    with pytest.raises(SessionError, match=r"no NVIDIA driver that can be used: libcuda-that-is-not-there\.so\.1"):
        Session.open(tiny_file, device="cuda")


def test_a_driver_that_lacks_a_function(monkeypatch) -> None:
    monkeypatch.setattr(cuda_driver, "LIBRARY", None)  # the program itself
    with pytest.raises(CudaDriverError, match="cuInit"):
        CudaDriver()


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FAKE_CUDA_INIT", "100", "sees no GPU with CUDA_VISIBLE_DEVICES='7'; make one visible"),
        ("FAKE_CUDA_COUNT", "0", "sees no GPU with CUDA_VISIBLE_DEVICES='7'"),
        ("FAKE_CUDA_INIT", "999", r"cuInit gives CUDA_ERROR_UNKNOWN \(999\)"),
        ("FAKE_CUDA_INIT", "12345", r"cuInit gives an error it has no name for \(12345\)"),
        ("FAKE_CUDA_VERSION", "12080", r"supports CUDA 12\.8, but ONNX Runtime .* needs CUDA 13\.0: update the driver"),
    ],
)
def test_a_driver_that_does_not_serve(tiny_file, gpu_package, monkeypatch, variable, value, message) -> None:
    monkeypatch.setenv(variable, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(SessionError, match=message):
        Session.open(tiny_file, device="cuda")


def test_a_gpu_that_is_not_there(tiny_file, gpu_package, monkeypatch) -> None:
    with pytest.raises(SessionError, match="there is no GPU 1: there is 1 GPU, cuda:0"):
        Session.open(tiny_file, device="cuda:1")
    monkeypatch.setenv("FAKE_CUDA_COUNT", "2")
    with pytest.raises(SessionError, match="there is no GPU 2: there are 2 GPUs"):
        Session.open(tiny_file, device="cuda:2")


def test_a_library_without_cuda_kernels(tiny_file, gpu_package, monkeypatch) -> None:
    monkeypatch.setattr(cuda, "library_info", lambda: LibraryInfo(Path("libact_ops.so"), ()))
    with pytest.raises(SessionError, match=r"no CUDA kernels.*--portable"):
        Session.open(tiny_file, device="cuda")
    gpu_package.providers = PROVIDERS
    Session.open(tiny_file, device="cuda", native=False).close()


def test_a_session_that_fell_back_to_the_cpu(tiny_file, gpu_package, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(onnxruntime, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(SessionError, match=r"can't use the GPU: .*libonnxruntime_providers_shared\.so: cannot open"):
        Session.open(tiny_file, device="cuda")


def test_a_session_that_fell_back_for_a_reason_of_its_own(tiny_file, gpu_package, monkeypatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", loading_all_of("libonnxruntime_providers", ctypes.CDLL))
    with pytest.raises(SessionError, match="the reason on standard error"):
        Session.open(tiny_file, device="cuda")


def loading_all_of(name, load):
    return lambda path, *more, **options: None if name in str(path) else load(path, *more, **options)


def test_an_error_of_onnxruntime_is_passed_on(tiny_file, gpu_package) -> None:
    gpu_package.error = RuntimeError("compute capability 7.5; run the portable functions: --portable")
    with pytest.raises(SessionError, match=r"ONNX Runtime can't load .*compute capability 7\.5; run the portable"):
        Session.open(tiny_file, device="cuda")
    assert gpu_package.options == {"enable_fallback": 0}


def test_a_session_on_a_gpu(tiny_file, gpu_package) -> None:
    gpu_package.providers = PROVIDERS
    with Session.open(tiny_file, device="cuda") as session:
        assert session.device == Device("cuda", 0)
    (name, options), second = gpu_package.asked
    assert (name, second) == tuple(PROVIDERS)
    assert (options["device_id"], options["use_tf32"]) == ("0", "0")


def test_libraries_are_looked_for_in_silence(tiny_file, gpu_package, monkeypatch, capsys) -> None:
    gpu_package.providers = PROVIDERS
    asked = []
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: asked.append(print("Failed to load libcublas")))
    Session.open(tiny_file, device="cuda").close()
    assert len(asked) == 1
    assert capsys.readouterr().out == ""


def test_an_onnxruntime_that_can_not_look_for_libraries(tiny_file, gpu_package, monkeypatch) -> None:
    gpu_package.providers = PROVIDERS
    monkeypatch.delattr(onnxruntime, "preload_dlls")
    monkeypatch.delattr(onnxruntime, "cuda_version")
    Session.open(tiny_file, device="cuda").close()


def test_a_described_gpu(driver, monkeypatch, tmp_path) -> None:
    record = tmp_path / "version"
    record.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Wed Aug 27\nGCC version: gcc 12.2.0\n"
    )
    monkeypatch.setattr(cuda_driver, "_DRIVER_RECORD", record)
    found = CudaDriver().describe(0)
    assert (found.name, found.capability, found.memory_bytes) == ("Stand-in 0", "9.0", 80 * 10**9)
    assert (found.driver, found.cuda) == ("580.65.06", "13.0")
    monkeypatch.setattr(cuda_driver, "_DRIVER_RECORD", tmp_path / "none")
    assert CudaDriver().describe(0).driver == ""


def test_free_memory_leaves_no_context_behind(driver) -> None:
    asked = CudaDriver()
    for _ in range(2):
        assert asked.free_bytes(0) == 79 * 10**9
    assert asked._library.cuDevicePrimaryCtxRelease_v2(40) != 0  # nothing is retained any more
