"""cbn.torch.SyncBatchNorm: what every rank checks, in processes over gloo, against one process with PyTorch's module on the whole batch.

    python tests/test_torch_sync.py 3 [check_whole ...]
"""

import copy
import datetime
import inspect
import io
import os
import pickle
import re
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import ranks
from ranks import raised

torch = pytest.importorskip("torch", reason="the modules are PyTorch's")
import torch.utils.checkpoint
from torch import distributed, nn
from torch.nn import functional as F

import cbn.torch

WAIT = datetime.timedelta(seconds=60)
TESTS = os.path.dirname(os.path.abspath(__file__))
ACTIVATIONS = {None: lambda y: y, "relu": F.relu, ("clip", -0.5, 0.75): lambda y: F.hardtanh(y, -0.5, 0.75), "silu": F.silu}


@pytest.mark.parametrize("size", [2, 3])
def test_over_gloo(size):
    """Processes that wait for ever are killed, and the test fails."""
    command, environment = [sys.executable, "test_torch_sync.py", str(size)], os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=TESTS, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


def close(actual, expected, tolerance=1e-12):
    """Relative to the largest."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    if expected.numel():
        assert (actual - expected).abs().max() <= tolerance * max(1, expected.abs().max().item()), (actual, expected)


def same_on_all(*tensors):
    """Whether they have the same bits on all ranks."""
    return ranks.same_on_all(cbn.torch.Gloo(), *(tensor.detach().numpy() for tensor in tensors))


def total(tensor):
    """The sum over all ranks."""
    tensor = tensor.detach().clone()
    distributed.all_reduce(tensor)
    return tensor


def pair(channels, dtype=torch.float64, **options):
    """A synchronized module and PyTorch's plain one, in one state, which isn't the initial one, and the same on all ranks."""
    whole = nn.BatchNorm1d(channels, dtype=dtype, **options)
    for tensor in whole.state_dict().values():
        tensor.uniform_(0.5, 1.5) if tensor.is_floating_point() else tensor.fill_(2)
    module = cbn.torch.SyncBatchNorm(channels, dtype=dtype, **options)
    module.load_state_dict(whole.state_dict())
    return module, whole


def normalized(whole, x):
    """By BatchNorm1d, of any shape (N, C, ...)."""
    return whole(x.reshape(len(x), x.shape[1], x[0, 0].numel())).reshape(x.shape)


def states_agree(module, whole, tolerance=1e-12):
    assert list(module.state_dict()) == list(whole.state_dict())
    for name, value in whole.state_dict().items():
        close(module.state_dict()[name], value, tolerance)
    assert same_on_all(*module.state_dict().values())


def check_whole(rank, size):
    """Drawn cases."""
    rng = np.random.default_rng(7)
    for _ in range(60):
        n, channels = rng.integers(2, 12), int(rng.integers(1, 40))
        shape = [n, channels, *rng.integers(1, 6, rng.integers(0, 5))]
        x, dy, residual = torch.from_numpy(rng.standard_normal((3, *shape)))
        if len(shape) == 4 and rng.random() < 0.5:
            x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
        inputs = [x, residual] if rng.random() < 0.4 else [x]
        activation = list(ACTIVATIONS)[rng.integers(len(ACTIVATIONS))]
        module, whole = pair(channels, momentum=[0.1, None, 1.0][rng.integers(3)], affine=rng.random() < 0.8, bias=rng.random() < 0.8,
                             track_running_stats=rng.random() < 0.8)
        module.activation = activation
        part = ranks.part_of(cbn.torch.Gloo(), rng, n)
        of_whole, of_part = ([t[i].clone().requires_grad_() for t in inputs] for i in (slice(None), part))
        y = normalized(whole, of_whole[0])
        y = ACTIVATIONS[activation](sum(of_whole[1:], y))
        own = module(*of_part)
        close(own, y[part])
        y.backward(dy), own.backward(dy[part])
        for actual, expected in zip(of_part, of_whole, strict=True):
            close(actual.grad, expected.grad[part])
        for actual, expected in zip(module.parameters(), whole.parameters(), strict=True):
            close(total(actual.grad), expected.grad)
        states_agree(module, whole)


def check_gradients_are_this_ranks(rank, size):
    """Of weight and bias, as DistributedDataParallel wants them."""
    module, _ = pair(3)
    x = torch.full((2, 3, 2), float(rank), dtype=torch.float64)
    x[0] += 1
    module(x).backward(torch.full_like(x, rank + 1))
    close(module.bias.grad, torch.full((3,), 4.0 * (rank + 1), dtype=torch.float64))
    assert not same_on_all(module.weight.grad)


def check_types(rank, size):
    rng = np.random.default_rng(8)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 4e-2)):
        for state in (torch.float32, dtype):
            x, dy = torch.randn(2, 9, 5, 4, 3).to(dtype)
            module, whole = pair(5, state)
            part = ranks.part_of(cbn.torch.Gloo(), rng, 9)
            own, all_ = x[part].clone().requires_grad_(), x.float().requires_grad_()
            whole.float()
            y, expected = module(own), normalized(whole, all_)
            y.backward(dy[part]), expected.backward(dy.float())
            close(y, expected[part].to(dtype), tolerance)
            close(own.grad, all_.grad[part].to(dtype), 4 * tolerance)
            close(total(module.weight.grad.float()), whole.weight.grad, 8 * tolerance)
            close(module.running_var.float(), whole.running_var, tolerance)
            assert module.weight.grad.dtype == state and same_on_all(module.running_mean.float(), module.running_var.float())


def check_one_rank_has_all(rank, size):
    """Its results are the plain module's to the bit; those of the others are empty. Strides of 0, too."""
    x, dy = torch.randn(2, 6, 7, 9)
    for owner in range(size):
        plain = cbn.torch.BatchNorm1d(7)
        module = cbn.torch.SyncBatchNorm(7)
        i = slice(None) if rank == owner else slice(0)
        own, all_ = x[i].clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = module(own), plain(all_)
        assert torch.equal(y, expected[i])
        y.backward(dy[i]), expected.backward(dy)
        assert torch.equal(own.grad, all_.grad[i]) and torch.equal(total(module.weight.grad), plain.weight.grad)
        assert all(map(torch.equal, module.state_dict().values(), plain.state_dict().values()))
    module(x[:, :1].expand(x.shape)[i]).sum().backward()


def check_nothing_at_all(rank, size):
    """A batch that is empty on all ranks leaves the running statistics; one value a channel in all is an error on all."""
    module, whole = pair(3)
    x = torch.empty(0, 3, 4, dtype=torch.float64, requires_grad=True)
    module(x).sum().backward()
    assert x.grad.shape == x.shape and torch.equal(module.running_var, whole.running_var)
    kind, text = raised(lambda: module(torch.ones(int(rank == 0), 3, dtype=torch.float64)))
    assert kind is ValueError and "more than 1 value per channel" in text


def check_mistakes(rank, size):
    """What is wrong on one rank is raised on all, and has changed nothing; the next call is as ever."""
    x = torch.randn(4, 3, 5)
    for wrong in range(size):
        module, _ = pair(3, torch.float32)
        y = module(x.clone().requires_grad_())
        y.sum().backward(retain_graph=rank != wrong)
        before = copy.deepcopy(module.state_dict())
        for bad, residual, kind, says in [
            (torch.ones(3), None, ValueError, "expected at least 2D input (got 1D input)"),
            (torch.ones(4, 5, 2), None, ValueError, "input: expected 3 channels, got 5 [input has shape (4, 5, 2)]"),
            (torch.ones(4, 0), None, ValueError, "SyncBatchNorm number of input channels should be non-zero"),
            (x.to(torch.complex64), None, TypeError, "x: expected"),
            (x, x[:1], ValueError, "residual: expected shape (4, 3, 5), that of x, got (1, 3, 5)"),
            ([[1.0]], None, RuntimeError, "'list' object has no attribute 'dim'"),
        ]:
            got, text = raised(lambda: module(bad, residual) if rank == wrong else module(x))       # noqa: B023
            assert got is kind and text.startswith(f"rank {wrong} of {size}: ") and says in text, (got, text)
        got, text = raised(lambda: y.sum().backward(retain_graph=True))     # noqa: B023
        assert got is RuntimeError and text.startswith(f"rank {wrong} of {size}: ") and "a second time" in text, (got, text)
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
        got, text = raised(lambda: module(x) if rank == wrong else y.sum().backward())      # noqa: B023
        assert got is ValueError and f"a forward call on rank {wrong}" in text, (got, text)
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
        close(module(x), F.batch_norm(x, None, None, module.weight, module.bias, True), 1e-5)


def check_differences(rank, size):
    """What differs between ranks is an error on all that says who has what."""
    x, last = torch.randn(4, 3, 5), size - 1
    for name, value in (("eps", 1e-3), ("momentum", None), ("activation", "relu")):
        module, _ = pair(3, torch.float32)
        usual = getattr(module, name)
        if rank == last:
            setattr(module, name, value)
        got, text = raised(lambda: module(x))       # noqa: B023
        assert got is ValueError and f"{name}={usual} on rank" in text and text.endswith(f"{name}={value} on rank {last}"), text
    module, _ = pair(3, torch.float32)
    got, text = raised(lambda: module(x.double() if rank == last else x))
    assert got is ValueError and text.endswith(f"input of torch.float64 on rank {last}"), text
    got, text = raised(lambda: module(x, x if rank == last else None))
    assert got is ValueError and text.endswith(f"residual=a tensor on rank {last}"), text
    got, text = raised(lambda: cbn.torch.SyncBatchNorm(3 + rank)(torch.ones(2, 3 + rank)))
    assert got is ValueError and text.startswith("num_features: expected the same on all ranks"), text


def check_second_derivatives(rank, size):
    module, _ = pair(3)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    for loss in (lambda y: y.sum(), lambda y: y.square().sum()):
        gradient, = torch.autograd.grad(loss(module(x)), x, create_graph=True)
        kind, text = raised(lambda: gradient.square().sum().backward())     # noqa: B023
        assert kind is RuntimeError and "double backward" in text, text


def check_without_others(rank, size):
    """In eval mode, and in process groups of one rank, a rank's calls are its own."""
    x = torch.randn(4 + rank, 3, 5, dtype=torch.float64)
    module, whole = pair(3)
    alone, _ = pair(3, track_running_stats=False)
    if rank == 0:
        close(module.eval()(x), whole.eval()(x))
        close(alone.eval()(x), F.batch_norm(x, None, None, alone.weight, alone.bias, True))
    groups = [distributed.new_group([i]) for i in range(size)]
    module, whole = pair(3)
    module.process_group = groups[rank]
    if rank == 0:
        close(module(x), whole(x))
    if rank == 1:       # of groups[0], it is no member
        module.process_group = groups[0]
        close(module(x), whole(x))


def check_process_groups(rank, size):
    """One of two ranks, in another order of use than the world's; and a new one for the same module."""
    group = distributed.new_group([0, size - 1])
    x = torch.randn(2 * size, 3, dtype=torch.float64)
    module, whole = pair(3)
    module.process_group = group
    if rank in (0, size - 1):
        both = torch.cat([x[:2], x[-2:]])
        close(module(x[2 * rank : 2 * rank + 2]), whole(both)[: 2] if rank == 0 else whole(both)[2:])
        close(module.running_var, whole.running_var)
    module, whole = pair(3)
    module.process_group = group
    if rank in (0, size - 1):
        module(x)
    module.process_group = None
    module.load_state_dict(whole.state_dict())
    module(x[2 * rank : 2 * rank + 2]), whole(x)
    states_agree(module, whole)


def check_copies(rank, size):
    """They take part as well, whichever way they were made."""
    x = torch.randn(2 * size, 3, dtype=torch.float64)
    module, whole = pair(3)
    module(x[:2]), whole(torch.cat([x[:2]] * size))
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)):
        expected = copy.deepcopy(whole)
        close(other(x[2 * rank : 2 * rank + 2]), expected(x)[2 * rank : 2 * rank + 2])
        states_agree(other, expected)


def network(seed=5):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(20, 8),
        nn.BatchNorm1d(8), nn.SiLU(), nn.Linear(8, 3),
    ).double()  # fmt: skip


def synchronized():
    return cbn.torch.convert(nn.SyncBatchNorm.convert_sync_batchnorm(network()))


def check_data_parallel(rank, size):
    """Three steps of DistributedDataParallel: the same parameters on all ranks, and those of one process with whole batches."""
    torch.manual_seed(17)
    batches = torch.randn(3, 4 * size, 2, 6, 6, dtype=torch.float64)
    whole, ddp = network(), nn.parallel.DistributedDataParallel(synchronized(), bucket_cap_mb=1e-4)      # a message for each layer, or nearly
    norms = [module for module in ddp.modules() if isinstance(module, cbn.torch.SyncBatchNorm)]
    assert [norm.activation for norm in norms] == ["relu", None, "silu"]
    optimizers = [torch.optim.SGD(net.parameters(), 0.1, momentum=0.9) for net in (whole, ddp)]
    mine = slice(4 * rank, 4 * rank + 4)
    for x in batches:
        for net, part, optimizer in zip((whole, ddp), (x, x[mine]), optimizers, strict=True):
            optimizer.zero_grad()
            net(part).square().mean().backward()
            optimizer.step()
    states_agree(ddp.module, whole)
    assert not torch.equal(whole[0].weight, network()[0].weight)
    close(ddp.eval()(x), whole.eval()(x))


def check_checkpoints(rank, size):
    """torch.utils.checkpoint makes the calls anew, in the middle of backward."""
    torch.manual_seed(18)
    x = torch.randn(4 * size, 2, 6, 6, dtype=torch.float64)[4 * rank : 4 * rank + 4]
    results = []
    for through in (lambda net: net(x), lambda net: torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False)):
        net = synchronized()
        through(net).square().sum().backward()
        results.append([parameter.grad for parameter in net.parameters()])
    assert all(map(torch.equal, *results))


def check_compiled(rank, size):
    """The graph breaks where other ranks take part, and there is no whole one."""
    torch.manual_seed(19)
    x = torch.randn(4 * size, 2, 6, 6, dtype=torch.float64)[4 * rank : 4 * rank + 4]
    results = []
    for compiled in (False, True):
        net = synchronized()
        y = (torch.compile(net, backend="eager") if compiled else net)(x)
        y.square().sum().backward()
        results.append([y, *(parameter.grad for parameter in net.parameters())])
    assert all(map(torch.equal, *results))
    torch.compiler.reset()      # of what it has found out about breaks
    kind, text = raised(lambda: torch.compile(synchronized(), backend="eager", fullgraph=True)(x))
    assert "`SyncBatchNorm._forward_together` should not be traced" in text, (kind, text)
    compiled = torch.compile(synchronized().eval(), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), synchronized().eval()(x))


CHECKS = [check for name, check in sorted(globals().items()) if name.startswith("check_")]


def run(rank, size, path, names):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method="file://" + path, rank=rank, world_size=size, timeout=WAIT)
    module = cbn.torch.SyncBatchNorm(3)
    module(torch.randn(2, 3))
    distributed.destroy_process_group()
    distributed.init_process_group("gloo", init_method="file://" + path + "-again", rank=rank, world_size=size, timeout=WAIT)
    module(torch.randn(2, 3))       # of other processes, as far as it knows
    for check in CHECKS:
        if not names or check.__name__ in names:
            torch.manual_seed(9)        # all ranks draw the same
            check(rank, size)
            distributed.barrier()
    distributed.destroy_process_group()


def test_alone():
    """Without torch.distributed it is the plain module, for inputs of any shape (N, C, ...)."""
    for shape in ((6, 5), (3, 5, 7), (4, 5, 6, 3), (2, 5, 3, 4, 6), (2, 5, 2, 3, 2, 2)):
        module, plain = cbn.torch.SyncBatchNorm(5, activation="relu"), cbn.torch.BatchNorm1d(5, activation="relu")
        x = torch.randn(shape)
        for training in (True, False):
            own, other = (x.clone().requires_grad_() for _ in range(2))
            y, expected = module.train(training)(own), normalized(plain.train(training), other)
            dy = torch.randn(shape)
            y.backward(dy), expected.backward(dy)
            torch.testing.assert_close(y, expected)
            torch.testing.assert_close(own.grad, other.grad)
            torch.testing.assert_close(module.state_dict(), plain.state_dict())
    compiled = torch.compile(module.train(), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), normalized(plain.train(), x))


def test_constructor_and_state_of_pytorchs_module():
    theirs, ours = (list(inspect.signature(cls.__init__).parameters.values()) for cls in (nn.SyncBatchNorm, cbn.torch._SyncBatchNorm))
    assert [(p.name, p.default) for p in ours[:-1]] == [(p.name, p.default) for p in theirs if p.kind == p.POSITIONAL_OR_KEYWORD]
    for arguments in ((3,), (3, 1e-3, None, False, False), (3, 1e-3, 0.2, True, True, None, "cpu", torch.float64)):
        options = {"bias": len(arguments) < 8}
        theirs, ours = nn.SyncBatchNorm(*arguments, **options), cbn.torch.SyncBatchNorm(*arguments, **options)
        assert repr(ours) == repr(theirs) and list(ours.state_dict()) == list(theirs.state_dict())
        for tensor in theirs.state_dict().values():
            tensor.uniform_(0.5, 1.5) if tensor.is_floating_point() else tensor.fill_(2)
        ours.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
        x = torch.randn(4, 3, dtype=torch.float32 if options["bias"] else torch.float64)
        torch.testing.assert_close(ours(x), theirs(x))
        nn.SyncBatchNorm(*arguments, **options).load_state_dict(ours.state_dict())
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_errors_have_the_same_words():
    for shape in ((3,), (2, 0), (2, 5), (1, 3)):
        with pytest.raises((ValueError, RuntimeError)) as error:
            nn.SyncBatchNorm(3)(torch.ones(shape))
        with pytest.raises(ValueError, match="^" + re.escape(str(error.value).replace("torch.Size([", "(").replace("])", ")"))):
            cbn.torch.SyncBatchNorm(3)(torch.ones(shape))


def test_convert():
    """PyTorch's modules become cbn's and stay what they are, with what follows."""
    net = nn.Sequential(nn.SyncBatchNorm(3), nn.ReLU(), nn.BatchNorm1d(3))
    norm, names = net[0], list(net.state_dict())
    cbn.torch.convert(net)
    assert net[0] is norm and type(norm) is cbn.torch.SyncBatchNorm and norm.activation == "relu" and list(net.state_dict()) == names
    assert repr(norm).startswith("SyncBatchNorm(3, ") and norm.process_group is None and norm._group is None
    assert type(net[2]) is cbn.torch.BatchNorm1d
    net(torch.randn(4, 3)).sum().backward()


def main(size, *names):
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run, (int(size), os.path.join(folder, "meeting"), names), int(size))


if __name__ == "__main__":
    main(*sys.argv[1:])
