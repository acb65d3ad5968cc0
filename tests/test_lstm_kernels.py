"""The kernels of the LSTM's step on a GPU, without one: interpreted on the CPU, and compiled for devices that are not there."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from metarobust.meta_optimizers import LSTMOptimizer

pytest.importorskip("triton", reason="needs Triton, which comes with PyTorch on Linux")
from metarobust.meta_optimizers import _lstm_fused, _lstm_kernels

FLOATS = {"basis_1", "basis_2", "log_initial_rate", "first", "slow", "second", "lr", "output_scale"}
INTEGERS = {"tensors", "blocks", "coordinates"}
ADDRESSES = {"addresses", "owner", "begin", "sizes", "rows", "roles", "first_block"}
SIZES = {"UNITS": 8, "UNITS_UP": 8, "LAYERS": 1, "INPUTS": 22, "GATES": 32, "GATES_UP": 32, "DYNAMIC": 13, "CHUNK": 1024}


def test_interpreted_they_take_the_steps_of_the_differentiable_rule() -> None:
    script = Path(__file__).with_name("lstm_kernels_interpreted.py")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    cases = json.loads(done.stdout)
    assert len(cases) == 3
    for case, differences in cases.items():
        assert differences.pop("moved") > 0.1, case
        assert {"parameters", "hidden", "cell", "moment_g", "moment_g_slow", "moment_g_squared"} <= differences.keys(), case
        for name, difference in differences.items():
            assert difference < 5e-6, f"{case}: {name}"


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset")
@pytest.mark.parametrize("two_streams", [True, False])
@pytest.mark.parametrize("kernel", ["squares_kernel", "tensors_kernel", "step_kernel"])
def test_they_compile_for_a_gpu_that_is_not_there(kernel: str, two_streams: bool) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(_lstm_kernels, kernel)
    constants = {
        name: value for name, value in (SIZES | {"TWO": two_streams, "BLOCK": 128}).items() if name in function.arg_names
    }
    kinds = {name: "fp32" if name in FLOATS else "i32" if name in INTEGERS else "*i64" for name in FLOATS | INTEGERS | ADDRESSES}
    signature = {name: "constexpr" if name in constants else kinds.get(name, "*fp32") for name in function.arg_names}
    if "constexprs" in inspect.signature(ASTSource).parameters:
        places = {(function.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(fn=function, signature=signature, constexprs=places)
    else:  # Triton 3.2
        signature = {name: kind for name, kind in signature.items() if kind != "constexpr"}
        source = ASTSource(fn=function, signature=signature, constants=constants)  # type: ignore[call-arg]
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32))
    assert len(compiled.asm["cubin"]) > 1000


def test_where_they_cannot_run_a_warning_says_so_once_and_the_other_step_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_lstm_fused, "_TRIED", {})
    rule = LSTMOptimizer()
    with pytest.warns(UserWarning, match=r"the fused step of the LSTM rule cannot run on cpu .*; a step of many kernels"):
        assert not _lstm_fused.runs(rule)
    assert not _lstm_fused.runs(rule)


def test_plans_cover_every_coordinate_once_and_no_block_crosses_a_tensor() -> None:
    from metarobust.meta_optimizers._layout import layout_of

    sizes = [300, 0, 1, 128, 129]
    layout = layout_of(tuple(torch.Size([size]) for size in sizes), False)
    plan = _lstm_fused.plan_of(layout, torch.device("cpu"), 128)
    covered = torch.zeros(sum(sizes), dtype=torch.int64)
    for owner, begin in zip(plan.owner.tolist(), plan.begin.tolist(), strict=True):
        first = int(plan.rows[owner]) + begin
        covered[first : first + min(128, sizes[owner] - begin)] += 1
    assert (covered == 1).all()
    assert plan.first_block.tolist() == [0, 3, 3, 4, 5, 7]


def test_without_triton_the_other_step_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    from metarobust import meta_optimizers
    from metarobust.meta_optimizers import _lstm

    monkeypatch.delattr(meta_optimizers, "_lstm_fused", raising=False)
    monkeypatch.setitem(sys.modules, "metarobust.meta_optimizers._lstm_fused", None)
    _lstm._fused.cache_clear()
    try:
        assert _lstm._fused() is None
        assert not LSTMOptimizer()._fuses([torch.zeros(2, 2)])
    finally:
        _lstm._fused.cache_clear()
