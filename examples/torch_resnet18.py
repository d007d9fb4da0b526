"""A ResNet-18 in PyTorch, trained on handwritten digits with PyTorch's batch normalization, with cbn's in its place, and with cbn's taking over
the addition and the ReLU after it.

All three start from the same weights and see the same batches, so their losses are the same, but for rounding. Training makes it grow, in
float32 up to visible digits within ten steps; `--dtype float64` shows that there is nothing else.
"""

import argparse
from time import perf_counter

import torch
from torch import nn
from torch.nn import functional as F

import cbn.torch

WIDTHS = (64, 128, 256, 512)
PIXELS = 32  # on a side, what digits of 8x8 are enlarged to
BATCH = 32


class Block(nn.Module):
    """Two convolutions and what goes past them: He et al. 2015."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        projection = (nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)) if stride > 1 else ()
        self.shortcut = nn.Sequential(*projection)

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class FusedBlock(Block):
    """The same block, of which cbn's normalizations do everything but the convolutions."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        cbn.torch.convert(self)
        self.norm1.activation = self.norm2.activation = "relu"

    def forward(self, x):
        y = self.norm1(self.conv1(x))
        return self.norm2(self.conv2(y), residual=self.shortcut(x))


def resnet18(block=Block, classes=10):
    """Of images (N, 1, H, W)."""
    layers = [nn.Conv2d(1, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for i, outputs in enumerate(WIDTHS):
        layers += [block(inputs, outputs, 2 if i else 1), block(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


KINDS = {
    "torch.nn": lambda: resnet18(),
    "cbn.torch, converted": lambda: cbn.torch.convert(resnet18()),
    "cbn.torch, fused": lambda: cbn.torch.convert(resnet18(FusedBlock)),
}


def train(kind, x, labels, steps, rate=0.001, dtype=torch.float32):
    """The network and the loss of each step, on batches that follow one another in x."""
    torch.manual_seed(0)
    network = KINDS[kind]().to(dtype)
    optimizer = torch.optim.SGD(network.parameters(), rate, momentum=0.9)
    losses = []
    for step in range(steps):
        batch = torch.arange(step * BATCH, (step + 1) * BATCH) % len(x)
        loss = F.cross_entropy(network(x[batch].to(dtype)), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return network, losses


def digits():
    """Images (N, 1, PIXELS, PIXELS) of mean 0 and variance 1, and their labels, in random order."""
    from sklearn.datasets import load_digits

    images, labels = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    images = F.interpolate(images.reshape(-1, 1, 8, 8).float(), size=PIXELS, mode="bilinear")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return ((images - images.mean()) / images.std())[order], labels[order]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    options = parser.parse_args()
    steps = options.steps
    x, labels = digits()
    shown = sorted({0, 1, min(9, steps - 1), steps // 2, steps - 1})
    print(f"{'loss at step':22}" + "".join(f"{step + 1:>12}" for step in shown) + "    seconds")
    for kind in KINDS:
        begin = perf_counter()
        losses = train(kind, x, labels, steps, dtype=getattr(torch, options.dtype))[1]
        print(f"{kind:22}" + "".join(f"{losses[step]:12.7f}" for step in shown) + f"{perf_counter() - begin:11.1f}")


if __name__ == "__main__":
    main()
