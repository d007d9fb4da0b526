"""What is measured: the batch normalization layers of five networks, and images on their way into one, as cells of one call each."""

import os
from collections import Counter
from dataclasses import dataclass
from itertools import product
from math import prod

OPS = ("inference", "training", "backward")
FUSED = tuple(f"{op}+{after}" for after in ("relu", "add+relu") for op in OPS)  # with the residual's addition and the ReLU that follow
IMAGES = "normalize_images"
EVERY_OP = (*OPS, *FUSED, IMAGES)
LAYOUTS = ("first", "last")
OUTPUTS = ("given", "allocated")
EPS = 1e-5


@dataclass(frozen=True)
class Cell:
    """One call: an operation on the float32 array of one layer, with a number of threads, into a given output or a new one.

    For normalize_images, layer and layout are the output's; its input are uint8 images (N, H, W, C).
    """

    network: str
    layer: tuple  # (C, *spatial)
    count: int  # how often the layer occurs in the network
    batch: int
    op: str
    layout: str
    threads: int
    output: str

    @property
    def kind(self):
        """The operation without what follows it."""
        return self.op.partition("+")[0]

    @property
    def add(self):
        """Whether a residual is added, of which backward has the gradient, too."""
        return "+add" in self.op

    @property
    def relu(self):
        return "+relu" in self.op

    @property
    def channels(self):
        return self.layer[0]

    @property
    def spatial(self):
        """Elements of one channel of one sample."""
        return prod(self.layer[1:])

    @property
    def shape(self):
        """The array as it lies in memory: (N, C, *spatial) or (N, *spatial, C)."""
        return (self.batch, *self.layer) if self.layout == "first" else (self.batch, *self.layer[1:], self.channels)

    @property
    def axis(self):
        return 1 if self.layout == "first" else -1

    @property
    def rows(self):
        """Whether the array is a table of rows of C values; (N, C) is, in either layout."""
        return self.layout == "last" or self.spatial == 1

    @property
    def arrays(self):
        """The least number of float32 arrays of the cell's shape that must cross the memory bus."""
        if self.op == IMAGES:
            return 1.25
        return (3 + 2 * self.add) if self.kind == "backward" else 2 + self.add

    @property
    def array_bytes(self):
        return 4 * self.batch * prod(self.layer)

    @property
    def array(self):
        return "x".join(map(str, (self.batch, *self.layer)))

    @property
    def name(self):
        return f"{self.network} {self.op} {self.array} channels {self.layout}, {self.threads} threads, output {self.output}"


def resnet50():
    """ResNet-50 on 224x224 images, the stride in the 3x3 convolution: 53 layers (He et al. 2015; torchvision's resnet50)."""
    layers = Counter({(64, 112, 112): 1})
    size_in = 56
    for width, blocks, size in ((64, 3, 56), (128, 4, 28), (256, 6, 14), (512, 3, 7)):
        for block in range(blocks):
            layers[width, size_in, size_in] += 1
            layers[width, size, size] += 1
            layers[4 * width, size, size] += 1 + (block == 0)  # the first block has a projection shortcut
            size_in = size
    return layers


def mobilenetv2():
    """MobileNetV2 on 224x224 images: 52 layers (Sandler et al. 2018, table 2)."""
    layers = Counter({(32, 112, 112): 1})
    channels, size = 32, 112
    for expansion, width, blocks, stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ):  # fmt: skip
        for block in range(blocks):
            hidden = expansion * channels
            if expansion > 1:
                layers[hidden, size, size] += 1
            size //= stride if block == 0 else 1
            layers[hidden, size, size] += 1
            layers[width, size, size] += 1
            channels = width
    layers[1280, 7, 7] += 1
    return layers


def mlp():
    """Layers of a multilayer perceptron: arrays of shape (N, C)."""
    return Counter({(512,): 1, (1024,): 1, (2048,): 1, (4096,): 1})


def conv1d():
    """M5, a network for four seconds of raw audio at 8 kHz (Dai et al. 2016)."""
    return Counter({(128, 8000): 1, (128, 2000): 1, (256, 500): 1, (512, 125): 1})


def conv3d():
    """R3D-18 on clips of 16 frames of 112x112: 20 layers (Tran et al. 2018; torchvision's r3d_18)."""
    return Counter({(64, 16, 56, 56): 5, (128, 8, 28, 28): 5, (256, 4, 14, 14): 5, (512, 2, 7, 7): 5})


def images():
    """What most classifiers of images are given."""
    return Counter({(3, 224, 224): 1})


# The layers of each network, and the batch sizes measured unless others are asked for.
NETWORKS = {
    "resnet50": (resnet50, (1, 8, 32)),
    "mobilenetv2": (mobilenetv2, (1, 8, 32)),
    "mlp": (mlp, (32, 256, 1024)),
    "conv1d": (conv1d, (1, 8, 32)),
    "conv3d": (conv3d, (1, 8)),
    "images": (images, (1, 32)),
}

# One of early, wide images, one of the middle, one of late, tiny images, one of rows, and images themselves.
QUICK = {("resnet50", (64, 56, 56)), ("resnet50", (256, 14, 14)), ("resnet50", (2048, 7, 7)), ("mlp", (1024,)), ("images", (3, 224, 224))}
QUICK_BATCHES = {"resnet50": (1, 8), "mlp": (256,), "images": (1, 32)}
QUICK_FUSED = (8, (64, 56, 56)), FUSED[3:]


def cores():
    """The number of cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def cells(networks, batches, ops, layouts, threads, outputs, sizes, quick):
    """The cells asked for; batches is None for each network's own, ops for the usual ones, sizes the least and the largest array in MB."""
    chosen = []
    for network in networks:
        layers, own_batches = NETWORKS[network]
        if quick:
            own_batches = QUICK_BATCHES.get(network, ())
        for batch, (layer, count) in product(batches or own_batches, layers().items()):
            if quick and (network, layer) not in QUICK:
                continue
            usual = (*OPS, *(QUICK_FUSED[1] if (batch, layer) == QUICK_FUSED[0] else ()), IMAGES) if quick else OPS
            for layout, op, number, output in product(layouts, ops or usual, threads, outputs):
                if (op == IMAGES) != (network == "images"):
                    continue
                cell = Cell(network, layer, count, batch, op, layout, number, output)
                if not sizes[0] <= cell.array_bytes / 1e6 <= sizes[1]:
                    continue
                if len(layer) == 1 and layout == "last":
                    continue  # (N, C) is the same array in both layouts
                if batch * cell.spatial == 1 and cell.kind in ("training", "backward"):
                    continue  # one value a channel has no variance
                chosen.append(cell)
    return chosen
