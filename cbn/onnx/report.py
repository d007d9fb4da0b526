"""What folding did to each batch normalization of a model, and why it left the others."""

from dataclasses import dataclass, field

MOST_CHANNELS = 8       # that a line of the printed report names


@dataclass
class Node:
    """One BatchNormalization of the model.

    name : its name, or that of its output where it has none.
    into : the node that took it over and whether that is before it or after it, or None.
    reason : why it was left, or None.
    change : the largest |scale - 1|, where scale = weight / sqrt(running_var + epsilon); None where these are unknown.
    quiet : the channels with next to no variance, running_var < epsilon: epsilon decides their scale.
    activation : what follows, in the words of cbn's `activation=`, or None.
    """

    name: str
    into: str | None = None
    reason: str | None = None
    change: float | None = None
    quiet: list[int] = field(default_factory=list)
    activation: str | tuple | None = None

    def __str__(self):
        text = f"{self.name}: " + (f"folded into {self.into}" if self.into else f"left: {self.reason}")
        if self.change is not None:
            text += f"; |scale - 1| <= {self.change:.3g}"
        if self.quiet:
            shown = ", ".join(map(str, self.quiet[:MOST_CHANNELS])) + ", ..." * (len(self.quiet) > MOST_CHANNELS)
            text += f"; next to no variance in {len(self.quiet)} channels: {shown}"
        return text + (f"; followed by {self.activation}" if self.activation else "")


@dataclass
class Report:
    """nodes : a Node for each BatchNormalization.
    copies : a line for each weight that got a copy, as a node that was not folded, or folded otherwise, uses it too.
    difference : the largest of all outputs' largest difference, divided by the output's largest value; None where not compared.
    compared : by what it was compared, or why it was not.
    """

    nodes: list[Node]
    copies: list[str]
    difference: float | None = None
    compared: str = "not compared"

    @property
    def folded(self):
        return [node for node in self.nodes if node.into]

    @property
    def left(self):
        return [node for node in self.nodes if not node.into]

    def __str__(self):
        difference = "" if self.difference is None else f"outputs differ by {self.difference:.2g} of their largest value, "
        return "\n".join([f"{len(self.folded)} of {len(self.nodes)} batch normalizations folded; {difference}{self.compared}",
                          *(f"  {node}" for node in self.nodes), *(f"  {line}" for line in self.copies)])
