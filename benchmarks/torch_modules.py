"""A training step (forward and backward) of PyTorch's batch normalization modules against cbn.torch's, over the layers of ResNet-50.

Each has a process of its own, as idle threads of one OpenMP runtime spin beside those of the other; they take turns, and a layer's time is the
median over its turns. The sums are over all 53 layers: python benchmarks/torch_modules.py --batch 8 32
"""

import argparse
import multiprocessing
import os
import statistics

from worker import measure, settle
from workloads import LAYOUTS, cores, resnet50

CONTENDERS = ("torch.nn", "cbn.torch")


def work(contender, threads, relu, requests):
    """Answer each (shape, layout) with the seconds that a step takes, until there is None."""
    import torch

    import cbn.torch

    torch.set_num_threads(threads)
    cbn.set_num_threads(threads)
    while (cell := requests.recv()) is not None:
        shape, layout, seconds = cell
        memory_format = torch.channels_last if layout == "last" else torch.contiguous_format
        x, dy = (torch.randn(shape).contiguous(memory_format=memory_format) for _ in range(2))
        x.requires_grad_()
        module = torch.nn.BatchNorm2d(shape[1])
        network = torch.nn.Sequential(module, torch.nn.ReLU(inplace=True)) if relu else module
        if contender == "cbn.torch":
            cbn.torch.convert(network)
        inputs = x, module.weight, module.bias

        def step(network=network, inputs=inputs, dy=dy):
            torch.autograd.grad(network(inputs[0]), inputs, dy)

        step()
        median, _ = measure(step, 1, seconds)
        settle()
        requests.send(median)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[32])
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.2, help="of a turn")
    parser.add_argument("--relu", action="store_true", help="with the ReLU after it, which cbn.torch takes over")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    context, pipes = multiprocessing.get_context("spawn"), []
    for contender in CONTENDERS:
        ours, theirs = context.Pipe()
        context.Process(target=work, args=(contender, options.threads, options.relu, theirs), daemon=True).start()
        pipes.append(ours)
    print(f"{options.threads} threads, milliseconds of a training step over the 53 layers{' and their ReLUs' if options.relu else ''}")
    names = "".join(f"{contender:>11}" for contender in CONTENDERS)
    print(f"batch  channels{names}   ratio   layers where cbn.torch is slower")
    for batch in options.batch:
        for layout in LAYOUTS:
            sums, slower = [0.0, 0.0], []
            for layer, count in resnet50().items():
                turns = [[], []]
                for _ in range(options.rounds):
                    for pipe, seconds in zip(pipes, turns, strict=True):
                        pipe.send(((batch, *layer), layout, options.seconds))
                        seconds.append(pipe.recv())
                medians = [statistics.median(seconds) for seconds in turns]
                sums = [total + count * median for total, median in zip(sums, medians, strict=True)]
                if medians[1] > medians[0]:
                    slower.append("x".join(map(str, layer)) + f" ({medians[1] / medians[0]:.2f})")
            milliseconds = "".join(f"{1e3 * total:11.1f}" for total in sums)
            print(f"{batch:5}  {layout:8}{milliseconds}{sums[0] / sums[1]:8.2f}   {', '.join(slower)}", flush=True)
    for pipe in pipes:
        pipe.send(None)


if __name__ == "__main__":
    main()
