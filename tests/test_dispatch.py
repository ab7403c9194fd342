"""Choice of backends: order, reasons, orders by call, context and environment, self-checks."""

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from musiclm_fast import _dispatch, _extension, info
from musiclm_fast._dispatch import Backend, BackendError, Dispatcher, use_backend
from musiclm_fast.ops import _triton_target, attention, contrastive_loss, spectrogram

CPU = torch.device("cpu")


@pytest.fixture
def toy(request):
    fast = Backend("fast", lambda x: (x > 0, "x is not above 0"), lambda x: f"fast {x}")
    slow = Backend("slow", lambda x: (True, ""), lambda x: f"slow {x}")
    missing = Backend("missing", lambda x: (True, ""), str, available=lambda: (False, "not built"))
    yield Dispatcher("toy", [missing, fast, slow])
    del _dispatch._dispatchers["toy"]


def test_first_backend_that_supports_the_call(toy):
    assert toy.select(None, CPU, x=1).name == "fast"
    assert toy.select(None, CPU, x=-1).name == "slow"


def test_a_named_backend_never_falls_back(toy):
    with pytest.raises(BackendError, match="'fast' cannot run this call: x is not above 0"):
        toy.select("fast", CPU, x=-1)
    with pytest.raises(BackendError, match="'missing' cannot run this call: not built"):
        toy.select("missing", CPU, x=1)
    with pytest.raises(ValueError, match="expected one of missing, fast, slow"):
        toy.select("other", CPU, x=1)
    with use_backend(toy="slow"):
        assert toy.select(None, CPU, x=1).name == "slow"
    with use_backend("fast"), pytest.raises(BackendError, match="not above 0"):
        toy.select(None, CPU, x=-1)
    assert toy.select(None, CPU, x=1).name == "fast"


def test_unknown_orders(toy):
    with pytest.raises(ValueError, match="op: got 'nope'"), use_backend(nope="torch"):
        pass
    with pytest.raises(ValueError, match="backend of toy: got 'torch'"), use_backend(toy="torch"):
        pass


@pytest.mark.skipif(not _extension.load(), reason=_extension.why_missing())
@pytest.mark.parametrize("op", ["attention", "contrastive", "spectrogram"])
def test_torch_func_takes_the_torch_backend(op):
    x = torch.nn.functional.normalize(torch.randn(1, 1, 3, 40), dim=-1)
    run = {
        "attention": lambda x, **named: attention(x, x, x, **named),
        "contrastive": lambda x, **named: contrastive_loss(
            x[0], x[0], torch.ones(1), check_values=False, **named
        ),
        "spectrogram": lambda x, **named: spectrogram(
            x[0, 0], n_fft=16, hop_length=4, check_finite=False, **named
        ),
    }[op]

    def loss(x, **named):
        return run(x, **named).square().sum()

    expected = torch.autograd.grad(loss(x.requires_grad_(), backend="torch"), x)[0]
    assert torch.equal(torch.func.grad(loss)(x.detach()), expected)
    with pytest.raises(BackendError, match=r"torch\.func"):
        torch.func.grad(lambda x: loss(x, backend="cpp"))(x.detach())


X = torch.zeros(2)


@contextlib.contextmanager
def checked(check):
    """Selects between a backend with that self-check and one without."""
    first = Backend("kernel", lambda x: (True, ""), torch.neg, self_check=check)
    dispatcher = Dispatcher("checked", [first, Backend("plain", lambda x: (True, ""), torch.neg)])
    try:
        yield lambda x=X, device=CPU, backend=None: dispatcher.select(backend, device, x=x).name
    finally:
        del _dispatch._dispatchers["checked"]


def warned(call, *args):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call(*args)
    return result, [str(w.message) for w in caught]


def test_a_wrong_number_is_final_and_warns_once():
    calls = []

    def check(device, dtype):
        calls.append((device, dtype))
        return "wrong numbers"

    with checked(check) as select:
        words = "on cpu in torch.float32 .* its kernel kernel: its self-check failed: wrong num"
        with pytest.warns(RuntimeWarning, match=words):
            assert select() == "plain"
        assert [warned(select) for _ in range(200)] == 200 * [("plain", [])]
        assert calls == [(CPU, torch.float32)]
        assert select(backend="kernel") == "kernel"  # an order is an order


def test_a_self_check_runs_once_for_each_device_and_dtype(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    calls = []

    def check(device, dtype):
        calls.append((str(device), dtype))

    with checked(check) as select:
        for _ in range(2):
            assert select() == select(X.half()) == "kernel"
            for device in ("cuda", "cuda:0", "cuda:1"):
                assert select(device=torch.device(device)) == "kernel"
    assert calls == [
        ("cpu", torch.float32), ("cpu", torch.float16),
        ("cuda:0", torch.float32), ("cuda:1", torch.float32),
    ]  # fmt: skip


def test_what_is_no_wrong_number_is_tried_again_at_growing_gaps():
    tries, names, said = [], [], []

    def check(device, dtype):
        tries.append(len(names) + 1)
        if len(tries) < 4:
            raise torch.OutOfMemoryError("1 GiB" if len(tries) < 3 else "2 GiB")

    with checked(check) as select:
        for _ in range(1002):
            name, text = warned(select)
            names.append(name)
            said += text
    assert tries == [1, 10, 100, 1000]
    assert names == 999 * ["plain"] + 3 * ["kernel"]
    assert len(said) == 2  # once for each error
    for text, size in zip(said, "12"):
        words = "could not run and is tried again later (OutOfMemoryError:"
        assert f"kernel: its self-check {words} {size} GiB)" in text


def test_no_self_check_is_tried_again_in_a_backward_pass():
    """Activation checkpointing runs the forward again there, and needs the same kernel."""
    calls = []

    def check(device, dtype):
        calls.append(dtype)
        raise RuntimeError("no compiler")

    with checked(check) as select, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(9):
            select()
        x = X.clone().requires_grad_()
        y = x.clone()
        inside = []
        y.register_hook(lambda grad: inside.append(select()))
        y.sum().backward()
        assert inside == ["plain"] and len(calls) == 1
        select()
    assert len(calls) == 2


def test_an_interrupted_self_check_is_no_result():
    results = iter([KeyboardInterrupt(), "wrong"])

    def check(device, dtype):
        result = next(results)
        if isinstance(result, BaseException):
            raise result
        return result

    with checked(check) as select:
        with pytest.raises(KeyboardInterrupt):
            select()
        with pytest.warns(RuntimeWarning, match="failed: wrong"):
            assert select() == "plain"


def test_nothing_is_checked_while_a_graph_is_captured(monkeypatch):
    capturing = False
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    calls = []

    def check(device, dtype):
        calls.append(dtype)

    cuda = torch.device("cuda:0")
    with checked(check) as select:
        capturing = True
        name, said = warned(select, X, cuda)
        assert name == "plain"
        assert len(said) == 1
        assert "no self-check runs during a graph's capture; run the op once before it" in said[0]
        assert warned(select, X, cuda) == ("plain", [])
        assert select(device=cuda, backend="kernel") == "kernel"
        assert not calls
        assert select() == "kernel"  # on the CPU no graph is captured
        capturing = False
        assert select(X, cuda) == "kernel"
        capturing = True
        assert select(X, cuda) == "kernel"
    assert len(calls) == 2


def test_one_thread_checks_and_the_others_wait():
    threads = 8
    barrier = threading.Barrier(threads)
    calls, names = [], []

    def check(device, dtype):
        calls.append(dtype)
        assert select() == "kernel"  # the check calls the op, which needs no result yet
        time.sleep(0.2)
        return "wrong"

    def one():
        barrier.wait()
        names.append(select())

    def all_at_once():
        started = [threading.Thread(target=one, daemon=True) for _ in range(threads)]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join(timeout=30)

    with checked(check) as select:
        _, said = warned(all_at_once)
    assert len(calls) == len(said) == 1
    assert names == threads * ["plain"]


@pytest.mark.parametrize("problem", [None, "wrong"])
def test_torch_compile_checks_while_it_traces_one_graph(problem):
    calls = []

    def check(device, dtype):
        calls.append(dtype)
        return problem

    def function(x):
        return x + 1 if select(x, x.device) == "kernel" else x - 1

    torch.compiler.reset()  # the other case's code is this one's
    with checked(check) as select:
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        for x in (X, X.half()):
            result, said = warned(compiled, x)
            assert torch.equal(result, torch.full_like(x, 1 if problem is None else -1))
            assert len(said) == (problem is not None)
            assert warned(compiled, x)[1] == []
    assert calls == [torch.float32, torch.float16]


@pytest.mark.parametrize(
    ("value", "ok"), [("torch", True), ("attention=torch", True), ("attention=nope", False)]
)
def test_environment(value, ok):
    code = (
        "import musiclm_fast.ops as o, torch;"
        "q = torch.randn(1, 1, 2, 4); o.attention(q, q, q);"
        "from musiclm_fast import _dispatch; print(_dispatch._forced['attention'])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MUSICLM_FAST_BACKEND": value},
        capture_output=True,
        text=True,
    )
    assert (run.returncode == 0) is ok
    if ok:
        assert run.stdout.strip() == "torch"
    else:
        assert "MUSICLM_FAST_BACKEND='attention=nope'" in run.stderr


def test_info_names_every_op_and_backend():
    text = info.render(info.collect())
    for op, dispatcher in _dispatch.dispatchers().items():
        assert f"  {op}\n" in text
        for name in dispatcher.names():
            assert f"    {name} " in text


def test_info_check_says_that_nothing_here_has_a_self_check(monkeypatch, capsys):
    monkeypatch.setattr(_triton_target, "INTERPRET", False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert info.main(["--check"]) == 0
    assert capsys.readouterr().out == "no kernel with a self-check runs on this machine's devices\n"


def test_info_check_runs_every_self_check_on_every_device(monkeypatch, capsys):
    problems = {torch.float32: None, torch.float16: "wrong numbers", torch.bfloat16: OSError("cc")}

    def check(device, dtype):
        if isinstance(problems[dtype], Exception):
            raise problems[dtype]
        return problems[dtype]

    def dtypes(device):
        return tuple(problems) if device.type == "cuda" else ()

    kernel = Backend("kernel", lambda x: (True, ""), str, self_check=check, check_dtypes=dtypes)
    missing = replace(kernel, name="missing", available=lambda: (False, "not built"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(_dispatch, "_dispatchers", {})
    Dispatcher("toy", [missing, kernel])
    assert info.main(["--check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    for device in ("cuda:0", "cuda:1"):
        found = [re.sub(r" +", " ", line) for line in lines if device in line]
        assert found == [
            f"toy missing {device} not available: not built",
            f"toy kernel {device} float32 0.0 s passed",
            f"toy kernel {device} float16 0.0 s wrong numbers",
            f"toy kernel {device} bfloat16 0.0 s OSError: cc",
        ]
    assert len(lines) == 8
    problems.update(dict.fromkeys(problems))
    assert info.main(["--check"]) == 0


@pytest.mark.skipif(not _triton_target.available()[0], reason="triton is not installed")
def test_info_check_in_the_interpreter():
    run = subprocess.run(
        [sys.executable, "-m", "musiclm_fast.info", "--check"],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert [re.sub(r" +[\d.]+ s +", " ", line) for line in lines] == [
        f"{op:<18}triton  cpu     {dtype} passed"
        for op in ("attention", "contrastive", "geglu_norm", "hyper_connection")
        for dtype in ("float32", "float16")
    ]


def test_a_library_without_cuda_kernels_warns_at_the_first_call_on_cuda(monkeypatch):
    """There the spectrogram's wav lies on a GPU; the call itself needs none."""
    status = _extension.ExtensionStatus(True, facts={"cuda_archs": []})
    monkeypatch.setattr(_extension, "_status", status)
    monkeypatch.setattr(_extension, "_warned", set())
    with FakeTensorMode():
        wav, window = torch.empty(2, 400, device="cuda"), torch.empty(64, device="cuda")
    rest = dict.fromkeys(("mel", "stretch_rate")) | {"power": 2.0}

    def select():
        dispatcher = _dispatch.dispatchers()["spectrogram"]
        return dispatcher.select(None, wav.device, wav=wav, n_fft=64, window=window, **rest).name

    name, said = warned(select)
    assert name == "torch"
    assert len(said) == 1
    assert (
        "built without CUDA kernels; to build it with nvcc and MUSICLM_FAST_CUDA=1: `pip" in said[0]
    )
    assert warned(select) == ("torch", [])
