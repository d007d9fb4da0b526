"""What goes wrong around a call: refused memory, Ctrl-C and other signals, an interpreter that ends while threads compute, new processes."""

import os
import pathlib
import platform
import shutil
import subprocess
import sys
import sysconfig

import pytest
from interpreter import output, python

linux = pytest.mark.skipif(sys.platform != "linux", reason="what the system does is Linux'")
posix = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")

# A malloc that fails when it is told to, of the thread that tells, and counts: `left` calls from now.
FAILING_MALLOC = """
#include <errno.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
static __thread long left = -1;
static __thread int failed;
void fail_after(long calls) { left = calls; failed = 0; }
int has_failed(void) { left = -1; return failed; }
static int fails(void)
{
    if (left < 0 || left-- > 0)
        return 0;
    errno = ENOMEM;
    return failed = 1;
}
void *malloc(size_t size) { return fails() ? NULL : __libc_malloc(size); }
void *calloc(size_t count, size_t size) { return fails() ? NULL : __libc_calloc(count, size); }
void *realloc(void *block, size_t size) { return fails() ? NULL : __libc_realloc(block, size); }
void *mmap(void *at, size_t size, int access, int flags, int file, off_t start)
{
    return fails() ? MAP_FAILED : (void *)syscall(SYS_mmap, at, size, access, flags, file, start);
}
"""


@pytest.fixture(scope="module")
def failing_malloc(tmp_path_factory):
    compiler = shutil.which("cc")
    if compiler is None or platform.libc_ver()[0] != "glibc":
        pytest.skip("needs a C compiler and glibc")
    folder = tmp_path_factory.mktemp("malloc")
    (folder / "malloc.c").write_text(FAILING_MALLOC)
    subprocess.run([compiler, "-shared", "-fPIC", "-ftls-model=initial-exec", "malloc.c", "-o", "malloc.so"], cwd=folder, check=True)
    return str(folder / "malloc.so")


# `sweep` makes each allocation of a call fail in turn, the first, the second, ... until there are no more. A call that fails raises, and leaves
# what it was to change as it was or, where Python fails to return what is done, as a call that doesn't fail: nothing in between.
SWEEP = """
import ctypes
malloc = ctypes.CDLL(None)
malloc.fail_after.argtypes = [ctypes.c_long]
def sweep(call, state, reset):
    count = 0
    reset()
    before = state()
    right = [np.array(a) for a in call()]
    after = state()
    while True:
        reset()
        cbn.empty_cache()
        try:
            malloc.fail_after(count)
            results = call()
            failed = malloc.has_failed()
        except (MemoryError, SystemError) as error:     # NumPy's own functions may fail without saying how: a SystemError
            assert malloc.has_failed() and (isinstance(error, MemoryError) or "without" in str(error)), error
            assert state() in (before, after), count
        else:
            assert state() == after and all(map(np.array_equal, results, right))
            if not failed:
                return count
        count += 1
cbn.set_num_threads(THREADS)
cbn.threads.set_grain(1)
rng = np.random.default_rng(61)
for shape in ((4, 33, 9, 11), (8, 64, 32, 32)):         # the second's outputs are of the kind whose memory is kept
    for dtype in ("=f4", ">f4"):
        x, dy, out = rng.standard_normal((3, *shape)).astype(dtype)
        mean, var = rng.uniform(1, 2, (2, shape[1])).astype(dtype)
"""
LAYERS = """
        for policy in ("propagate", "skip", "raise"):
            layer = cbn.BatchNorm2d(shape[1], momentum=None, on_nonfinite=policy)
            layer.running_mean = mean
            start = layer.state_dict()
            def state():
                return [a.tobytes() for a in layer.state_dict().values()]
            assert sweep(lambda: (layer(x),), state, lambda: layer.load_state_dict(start)) > 0
            assert sweep(lambda: (layer.backward(dy, retain=True), layer.weight_grad, layer.bias_grad), state, lambda: None) > 0
print("right")
"""
FUNCTIONS = """
        def state():
            return out.tobytes()
        def reset():
            out[...] = 7
        stats = cbn.batch_stats(x)
        for call in (
            lambda: (cbn.batch_norm(x, mean, var, out=out),),
            lambda: (cbn.batch_norm(x, mean, var, activation="relu", residual=dy),),
            lambda: cbn.batch_norm_train(x, mean, var, out=out)[:1],
            lambda: cbn.batch_norm_backward(dy, x, stats, activation="relu", out=out),
            lambda: cbn.batch_stats(x),
        ):
            assert sweep(call, state, reset) > 0
print("right")
"""


@linux
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("calls", [LAYERS, FUNCTIONS], ids=["layers", "functions"])
def test_each_allocation_refused(calls, threads, failing_malloc, monkeypatch):
    code = SWEEP.replace("THREADS", str(threads)) + calls
    if not sysconfig.get_config_var("Py_GIL_DISABLED"):     # which has an allocator of its own
        monkeypatch.setenv("PYTHONMALLOC", "malloc")
    assert output(code, LD_PRELOAD=failing_malloc) == "right"


@linux
def test_no_room_for_the_output():
    """MemoryError, nothing changed; and once there is room, the call is right."""
    assert output("""
import resource
x = np.random.default_rng(62).standard_normal((64, 64, 64, 64)).astype(np.float32)
layer, other = cbn.BatchNorm2d(64), cbn.BatchNorm2d(64)
expected = other(x)
layer(x[:2])
before, mean, var = layer.state_dict(), np.zeros(64), np.ones(64)
limits = resource.getrlimit(resource.RLIMIT_AS)
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
strided = x[:, :, ::2]          # which needs memory for copies
for room in (0, x.nbytes // 4, x.nbytes // 2, x.nbytes - 1):
    resource.setrlimit(resource.RLIMIT_AS, (used + room, limits[1]))
    for call in (
        lambda: layer(x),
        lambda: layer.eval()(x),
        lambda: cbn.batch_norm(x, mean, var),
        lambda: cbn.batch_norm_train(x),
        lambda: cbn.batch_norm_backward(x, x, (mean, var)),
    ):
        try:
            call()
            print("no MemoryError with", room)
        except MemoryError:
            pass
        layer.train()
    resource.setrlimit(resource.RLIMIT_AS, limits)
    assert all(np.array_equal(a, before[name]) for name, a in layer.state_dict().items())
    assert np.array_equal(cbn.batch_norm_train(x)[0], expected)
    cbn.empty_cache()
print("right")
""") == "right"


INTERRUPTED = """
import os, signal, sys, threading
cbn.set_num_threads(2)
xs = np.random.default_rng(63).standard_normal((3, 16, 64, 48, 48)).astype(np.float32)
layer = cbn.BatchNorm2d(64, momentum=1.0, on_nonfinite="POLICY")
def state():
    return [a.tobytes() for a in list(layer.state_dict().values())[:4]]
whole, ys = [], []
for x in xs:
    ys.append(layer(x))
    whole.append(state())
layer.reset_running_stats()
layer(xs[0])
def train():                    # the batches in turn, so that their number tells which was the last
    while True:
        layer(xs[int(layer.num_batches_tracked) % 3])
def is_whole(state, count):
    return state == whole[(count - 1) % 3]
rng = np.random.default_rng(64)
"""


@posix
@pytest.mark.parametrize("policy", ["propagate", "skip", "raise"])
def test_interrupted_calls(policy):
    """Ctrl-C at any time during training: the last batch is in the mean, the variance and the count, or in none of them."""
    assert output(INTERRUPTED.replace("POLICY", policy) + """
for i in range(100):
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-4, 1e-2))
        train()
    except KeyboardInterrupt:
        pass
    count = int(layer.num_batches_tracked)
    assert is_whole(state(), count), i
    assert np.array_equal(layer(xs[count % 3]), ys[count % 3])
    assert np.array_equal(layer.backward(xs[0]), cbn.batch_norm_backward(xs[0], xs[count % 3], cbn.batch_stats(xs[count % 3])).x)
print("right")
""") == "right"


@posix
def test_handlers_that_save_a_layer():
    """In the middle of a call that trains it: they neither wait for ever, nor see it half changed."""
    assert output(INTERRUPTED.replace("POLICY", "propagate") + """
saved = []
def save(*_):
    saved.append((state(), int(layer.num_batches_tracked)))
    if len(saved) == 100:
        raise KeyboardInterrupt
    signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-4, 1e-2))
signal.signal(signal.SIGALRM, save)
signal.setitimer(signal.ITIMER_REAL, 1e-3)
try:
    train()
except KeyboardInterrupt:
    print(all(is_whole(*s) for s in saved))
""") == "True"


@posix
@pytest.mark.parametrize("threads", [1, 2])
def test_interrupts_wait_for_one_call(threads):
    """SIGINT while a call computes: it ends with that call, and no other begins."""
    assert output(f"""
import signal, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)    # also where tests run in the background, which ignores it
cbn.set_num_threads({threads})
x = np.random.default_rng(65).standard_normal((64, 64, 56, 56)).astype(np.float32)
out, expected = np.empty_like(x), cbn.batch_norm_train(x)[0]
begun, late = 0, 0
def interrupt():
    global seen
    time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)
    seen = begun
for _ in range(20):
    killing = threading.Thread(target=interrupt)
    killing.start()
    try:
        while True:
            begun += 1
            cbn.batch_norm_train(x, out=out)
    except KeyboardInterrupt:
        killing.join()
        late = max(late, begun - seen)
    assert np.array_equal(cbn.batch_norm_train(x, out=out)[0], expected)
print(late <= 1)        # 1: where the signal came between two calls
""") == "True"


@pytest.mark.parametrize("end", ["", "sys.exit(0)", "os._exit(0)", "raise SystemExit"])
@pytest.mark.parametrize("shape", ["(2, 8)", "(2, 64, 16, 16)", "(32, 64, 64, 64)"])
def test_interpreters_that_end_while_threads_compute(shape, end):
    code = f"""
import sys, threading, time
cbn.set_num_threads(2)
cbn.threads.set_grain(1)
x = np.ones({shape}, np.float32)
layer = cbn.BatchNorm(x.shape[1])
count = 0
def compute():
    global count
    while True:
        layer(x)
        layer.backward(x, retain=True)
        cbn.batch_norm(x, layer.running_mean, layer.running_var)
        count += 1
for _ in range(4):
    threading.Thread(target=compute, daemon=True).start()
while count < 4:
    time.sleep(0.001)
{end}
"""
    for _ in range(5):
        done = python(code, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_pools_of_processes(method, tmp_path):
    """Functions and layers, in training and in eval mode, are sent to other processes and work there."""
    (tmp_path / "pool.py").write_text(f"""
import multiprocessing, pathlib, sys
sys.path.insert(0, {str(pathlib.Path(__import__("cbn").__file__).parents[1])!r})
import numpy as np, cbn
if __name__ == "__main__":
    if {method!r} not in multiprocessing.get_all_start_methods():
        print("True")
        sys.exit()
    cbn.set_num_threads(2)
    xs = list(np.random.default_rng(66).standard_normal((6, 8, 16, 32, 32)).astype(np.float32))
    layer = cbn.BatchNorm2d(16)
    layer(xs[0])
    trained = [cbn.batch_norm_train(x)[0] for x in xs]
    with multiprocessing.get_context({method!r}).Pool(2) as pool:
        same = [np.array_equal(a, b[0]) for a, b in zip(trained, pool.map(cbn.batch_norm_train, xs), strict=True)]
        same += map(np.array_equal, trained, pool.map(layer, xs))
        layer.eval()
        same += map(np.array_equal, map(layer, xs), pool.map(layer, xs))
    print(all(same))
""")
    done = subprocess.run([sys.executable, tmp_path / "pool.py"], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr
