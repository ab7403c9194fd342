"""Choice of backends: order, reasons, orders by call, context and environment, self-checks."""

import os
import subprocess
import sys

import pytest
import torch

from musiclm_fast import _dispatch, info
from musiclm_fast._dispatch import Backend, BackendError, Dispatcher, use_backend

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


def test_a_failed_self_check_warns_once_and_falls_back():
    calls = []

    def check(device):
        calls.append(device)
        return "wrong numbers"

    bad = Backend("bad", lambda x: (True, ""), str, self_check=check)
    good = Backend("good", lambda x: (True, ""), str)
    dispatcher = Dispatcher("checked", [bad, good])
    try:
        with pytest.warns(RuntimeWarning, match="bad kernel, whose self-check failed: wrong"):
            assert dispatcher.select(None, CPU, x=1).name == "good"
        assert dispatcher.select(None, CPU, x=1).name == "good"
        assert len(calls) == 1
        assert dispatcher.select("bad", CPU, x=1).name == "bad"  # an order is an order
    finally:
        del _dispatch._dispatchers["checked"]


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
