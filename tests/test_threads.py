"""The same results from run to run, for any number of threads, from several Python threads and in forked workers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from child import run_python
from samples import DIFFERENTIABLE, SAMPLES, results, with_gradients

pytestmark = pytest.mark.slow

# Large enough for many groups of row blocks, strips and chunks.
LARGE = {"pixel_propagate": (23, 19), "region_masks": (19, 23), "connected_components": (130, 150)}


def computed(sample, backend, seed, size=None):
    torch.manual_seed(seed)
    op, make = SAMPLES[sample]
    if size is None:
        size = (11, 13) if backend.interpreted else LARGE.get(op, (51, 43))
    call, arguments = make(size, device=backend.device, backend=backend.name)
    return with_gradients(call, arguments) if sample in DIFFERENTIABLE else results(call(*arguments))


def assert_identical(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def test_any_number_of_threads(backend, sample):
    expected = computed(sample, backend, 0)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        actual = computed(sample, backend, 0)
        if backend.exact:
            assert_identical(actual, expected)
        else:
            for a, b in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, b)


def test_run_to_run(backend, sample):
    torch.set_num_threads(2)
    size = (4, 6) if backend.interpreted or backend.name == "reference" else None
    expected = computed(sample, backend, 1, size)
    for _ in range(29):
        assert_identical(computed(sample, backend, 1, size), expected)


def test_several_python_threads(backend, sample):
    torch.set_num_threads(2)
    _, make = SAMPLES[sample]
    size = (7, 6) if backend.interpreted else (17, 13)
    # Triton's interpreter keeps its state in globals: there it is another thread, not several.
    workers, count, rounds = (1, 2, 1) if backend.interpreted else (4, 4, 3)
    inputs = [make(size, device=backend.device, backend=backend.name) for _ in range(count)]
    run = with_gradients if sample in DIFFERENTIABLE else lambda call, arguments: results(call(*arguments))
    expected = [run(*x) for x in inputs]
    with ThreadPoolExecutor(workers) as pool:
        for _ in range(rounds):
            for actual, wanted in zip(pool.map(lambda x: run(*x), inputs), expected, strict=True):
                for a, b in zip(actual, wanted, strict=True):
                    tolerance = 0 if backend.exact else 1e-5
                    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_different_ops_at_once():
    """Two Python threads call all ops in different orders."""
    torch.set_num_threads(2)
    calls = [make(LARGE.get(op, (23, 19))) for op, make in SAMPLES.values()]
    expected = [results(call(*arguments)) for call, arguments in calls]

    def go_over(order):
        for i in order:
            call, arguments = calls[i]
            assert_identical(results(call(*arguments)), expected[i])
        return len(order)

    forwards = list(range(len(calls))) * 5
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(go_over, (forwards, forwards[::-1]))) == [len(forwards)] * 2


@pytest.mark.parametrize("threads", [1, 2])
def test_workers_of_a_data_loader(threads):
    """Forked workers can call the ops after their parent has, with one thread or with more."""
    out = run_python(
        """
        import sys
        import torch
        from torch.utils.data import DataLoader
        from corrmatch import ops

        torch.set_num_threads(int(sys.argv[1]))
        images = torch.randint(3, (6, 70, 90), generator=torch.Generator().manual_seed(0))
        logits = torch.randn(6, 5, 9, 9, generator=torch.Generator().manual_seed(0))
        expected = ops.connected_components(images), ops.pseudo_label(logits, size=(33, 33))[1]
        maps = torch.randn(3, 2, 5, 33, 33, requires_grad=True)
        ops.pixel_propagate(*maps).sum().backward()

        class Images(torch.utils.data.Dataset):
            def __len__(self):
                return 6
            def __getitem__(self, i):
                z = ops.pixel_propagate(logits[:1], logits[:1], logits[:1])
                return ops.connected_components(images[i]), ops.pseudo_label(logits[i:i + 1], size=(33, 33))[1][0], z

        loader = DataLoader(Images(), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=120)
        found = [torch.cat(x) for x in zip(*loader)]
        assert all(torch.equal(a, b) for a, b in zip(found, expected))
        print("same")
    """,
        str(threads),
    )
    assert out.strip() == "same"


@pytest.mark.parametrize("before", ["nothing", "ops", "torch", "both"])
def test_forked_process(before):
    """After any work on several threads and a fork, calls on several threads end, also in a child's child."""
    out = run_python(
        """
        import os
        import signal
        import sys
        import torch
        from corrmatch import ops

        torch.set_num_threads(2)
        image = torch.ones(1, 300, 300, dtype=torch.uint8)
        maps = [torch.ones(1, 5, 40, 41, requires_grad=i == 0) for i in range(3)]

        def compute():
            labels, z = ops.connected_components(image), ops.pixel_propagate(*maps)
            torch.autograd.grad(z, maps[0], maps[1])
            several = len(os.listdir("/proc/self/task")) > 1
            print(labels[0, 9, 9].item(), round(z[0, 0, 3, 4].item(), 3), several, flush=True)

        def fork(then):
            child = os.fork()
            if child == 0:
                signal.alarm(60)  # ends it where it hangs
                then()
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0

        def twice():
            compute()
            fork(compute)

        if sys.argv[1] in ("torch", "both"):
            torch.randn(500, 500) @ torch.randn(500, 500)
            torch.ones(1000, 1000).exp()
        if sys.argv[1] in ("ops", "both"):
            ops.pixel_propagate(*maps)
        fork(twice)
        compute()
    """,
        before,
    )
    assert out.splitlines() == ["1 1.0 True"] * 3


def test_no_result_depends_on_fresh_memory(monkeypatch):
    """The C library fills the memory that malloc returns with huge floats. Results are the same."""
    code = """
        import torch
        from corrmatch import _C
        from samples import DIFFERENTIABLE, SAMPLES, results, with_gradients

        torch.set_num_threads(1)
        for isa in _C.cpu.isas():
            _C.cpu.select_isa(isa)
            for name, (op, make) in SAMPLES.items():
                for size in ((3, 5), (9, 14)):
                    torch.manual_seed(7)
                    call, arguments = make(size)
                    run = with_gradients if name in DIFFERENTIABLE else lambda call, x: results(call(*x))
                    for x in run(call, arguments):
                        print(isa, name, size, x.double().sum().item(), x.double().square().sum().item())
    """
    monkeypatch.delenv("MALLOC_PERTURB_", raising=False)
    expected = run_python(code)
    assert "nan" not in expected
    assert expected.count("\n") > 50
    monkeypatch.setenv("MALLOC_PERTURB_", str(0x80))  # fills with its complement, 0x7f
    assert run_python(code) == expected
