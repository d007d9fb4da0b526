"""Tables and a plot of what race.py has measured; from a file that it has written: python report.py FILE.json [--plot FILE]."""

import argparse
import json
from collections import defaultdict
from statistics import geometric_mean, median

from contenders import CONTENDERS, PEERS, contestants
from workloads import EVERY_OP, LAYOUTS, NETWORKS, Cell

STYLES = dict(zip(CONTENDERS, ("C3", "C1", "C2", "C0", "C4", "C5", "C8", "C6", "C7", "k--"), strict=True))
LOST = 0.95  # best peer / cbn: what is clearly beyond the noise


class Result:
    """A cell and its times."""

    def __init__(self, measured):
        self.cell = Cell(**{**measured["cell"], "layer": tuple(measured["cell"]["layer"])})
        self.seconds = measured["seconds"]
        self.disturbed = measured["disturbed"]
        self.cannot = measured["cannot"]
        self.spoiled = [name for name, turns in self.disturbed.items() if 2 * turns > len(self.seconds[name])]
        peers = [name for name in PEERS if name in self.seconds and name not in self.spoiled]
        self.best = min(peers, key=self.time) if peers else None

    def time(self, name):
        return median(self.seconds[name])

    @property
    def counts(self):
        """Whether other processes left most of cbn's turns alone."""
        return "cbn" not in self.spoiled

    def ratio(self, name):
        """The contender's time / cbn's, round by round, the median of it; None if there is none, or other processes spoiled it."""
        if name not in self.seconds or name in self.spoiled:
            return None
        return median(a / b for a, b in zip(self.seconds[name], self.seconds["cbn"], strict=True))

    @property
    def best_ratio(self):
        return self.best and self.ratio(self.best)

    def speed(self, name):
        """GB/s, if the contender moved no more than it must."""
        return self.cell.arrays * self.cell.array_bytes / self.time(name) / 1e9


def table(heading, rows):
    """Columns aligned, the first to the left."""
    columns = []
    for i, column in enumerate(zip(heading, *rows, strict=True)):
        width = max(map(len, column))
        columns.append([text.rjust(width) if i else text.ljust(width) for text in column])
    return "\n".join("  ".join(row).rstrip() for row in zip(*columns, strict=True))


def number(value, digits=2):
    """-: the contender has no time."""
    return "-" if value is None else f"{value:.{digits}f}"


def grouped(results, *attributes):
    groups = defaultdict(list)
    for result in results:
        groups[tuple(getattr(result.cell, a) for a in attributes)].append(result)
    return groups


def title(network, op, layout, threads, output):
    output = "output given" if output == "given" else "output allocated"
    return f"{network}, {op}, channels {layout}, {threads} thread{'s' * (threads > 1)}, {output}"


def cell_tables(results, names, also):
    for group, members in grouped(results, "network", "op", "layout", "threads", "output").items():
        others = [name for name in names if name in (*contestants(members[0].cell.op), *also) and name not in ("cbn", "wall")]
        rows = []
        for r in members:
            best = "-" if r.best is None else f"{r.best_ratio:.2f} {r.best:<11}"
            rows.append(
                [r.cell.array + " *" * (not r.counts), str(r.cell.count), f"{r.cell.array_bytes / 1e6:.1f}", f"{r.time('cbn') * 1e6:.1f}", f"{r.speed('cbn'):.0f}"]
                + [number(r.ratio("wall")), best, *(number(r.ratio(name)) for name in others)]
            )
        heading = ["array (N, C, ...)", "layers", "MB", "cbn us", "GB/s", "wall/cbn", "best peer/cbn", *others]
        yield f"{title(*group)}\n{table(heading, rows)}"


def totals(results, names):
    """Milliseconds of all layers of a network, for the networks of which every layer has been measured."""
    rows = []
    for (network, batch, layout, threads, output), members in grouped(results, "network", "batch", "layout", "threads", "output").items():
        sums = {}
        layers = NETWORKS[network][0]()
        for op in EVERY_OP:
            of_op = [r for r in members if r.cell.op == op]
            if {r.cell.layer for r in of_op if r.counts} == set(layers):
                able = [name for name in names if all(name in r.seconds for r in of_op)]
                sums[op] = {name: sum(r.cell.count * r.time(name) for r in of_op) for name in able}
        if "training" in sums and "backward" in sums:
            forward, backward = sums["training"], sums["backward"]
            sums["training + backward"] = {name: forward[name] + backward[name] for name in names if name in forward and name in backward}
        for what, sums_of in sums.items():
            peers = [name for name in PEERS if name in sums_of]
            best = min(peers, key=sums_of.get) if peers else None
            speedup = f"{sums_of[best] / sums_of['cbn']:.2f} {best:<11}" if best else "-"
            label = f"{network} x {batch}, {what}, {layout}, {threads}, {output}"
            rows.append([label, *(f"{sums_of[n] * 1e3:.4g}" if n in sums_of else "-" for n in names), speedup])
    if not rows:
        return "Whole networks: no network has been measured with all its layers."
    heading = ["network x batch, operation, channels, threads, output", *names, "best peer/cbn"]
    return f"Whole networks, the sum over all their layers, milliseconds\n{table(heading, rows)}"


def summary(results):
    rows = []
    for key, members in {**grouped(results, "op", "layout", "threads", "output"), ("all", "", "", ""): results}.items():
        walls = [r.ratio("wall") for r in members if r.counts and r.ratio("wall")]
        contested = [r for r in members if r.counts and r.best]
        if not contested:
            continue
        ratios = [r.best_ratio for r in contested]
        worst = min(contested, key=lambda r: r.best_ratio)
        rows.append(
            [", ".join(map(str, filter(None, key))), str(len(contested)), number(geometric_mean(walls) if walls else None)]
            + [number(geometric_mean(ratios)), str(sum(r < 1 for r in ratios)), str(sum(r < LOST for r in ratios))]
            + [f"{worst.best_ratio:.2f} {worst.best} {worst.cell.network} {worst.cell.array}"]
        )
    heading = ["operation, channels, threads, output", "cells", "wall/cbn", "best peer/cbn", "faster peer", f"below {LOST}", "worst cell"]
    return f"Summary: geometric means of the cells' ratios, and the number of cells in which a peer is faster\n{table(heading, rows)}"


def beside(results, name):
    """Of another installation of cbn: means of its time / this one's, and the worst cell."""
    rows = []
    for key, members in {**grouped(results, "op", "layout", "threads", "output"), ("all", "", "", ""): results}.items():
        compared = [r for r in members if r.counts and r.ratio(name)]
        if compared:
            ratios = [r.ratio(name) for r in compared]
            worst = min(compared, key=lambda r: r.ratio(name))
            rows.append([", ".join(map(str, filter(None, key))), str(len(compared)), number(geometric_mean(ratios)), number(max(ratios)),
                         str(sum(ratio < LOST for ratio in ratios)), f"{min(ratios):.2f} {worst.cell.network} {worst.cell.array}"])  # fmt: skip
    heading = ["operation, channels, threads, output", "cells", f"{name}/cbn", "most", f"below {LOST}", "worst cell"]
    return f"Beside {name}: geometric means of its time / cbn's\n{table(heading, rows)}"


def spoiled(result):
    """The cells whose times mean nothing, as other processes disturbed most of cbn's turns."""
    return [r.cell.name for r in map(Result, result["cells"]) if not r.counts]


def text(result):
    """All tables."""
    results = [Result(measured) for measured in result["cells"]]
    also = [name for name in result.get("also", ()) if name in result["versions"]]
    names = [name for name in CONTENDERS if name in result["versions"]] + also
    machine = result["machine"]
    caches = ", ".join(f"{name} {size}" for name, size in machine["caches"].items())
    versions = [f"{name}: {version}" for name, version in result["versions"].items()]
    parts = ["\n".join([result["command"], f"{machine['cpu']}, {machine['cores']} cores; {caches}", *versions])]
    parts += cell_tables(results, names, also)
    reasons = defaultdict(list)
    for name, reason in [(name, reason) for r in results for name, reason in r.cannot.items()] + list(result["missing"].items()):
        if reason not in reasons[name]:
            reasons[name].append(reason)
    traffic = ", ".join(f"{op} {arrays:g}" for op, arrays in {r.cell.op: r.cell.arrays for r in results}.items()) + " arrays"
    legend = [
        "Columns of contenders: their time / cbn's time, above 1 where cbn is faster. The best peer is the fastest of these:",
        f"{', '.join(PEERS)}. GB/s: of the least traffic in cbn's time, {traffic}.",
        "wall: a loop that does nothing but this traffic.",
    ]
    parts.append("\n".join(legend + [f"- of {name}: {'; '.join(texts)}" for name, texts in reasons.items()]))
    turns = {name: sum(len(r.seconds.get(name, ())) for r in results) for name in names}
    shares = [f"{n} {sum(r.disturbed.get(n, 0) for r in results) / turns[n]:.0%}" for n in names if turns[n]]
    parts.append(f"Turns in which threads had to wait for a core: {', '.join(shares)}")
    if marked := spoiled(result):
        parts.append("* Other processes disturbed most of cbn's turns; left out of all means:\n" + "\n".join(marked))
    parts += [totals(results, names), summary(results), *(beside(results, name) for name in also)] if results else []
    return "\n\n".join(parts)


def plot(result, file):
    """Speed over size, one panel for each operation and layout, of the most threads."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    results = [Result(measured) for measured in result["cells"]]
    if not results:
        return
    threads = max(r.cell.threads for r in results)
    output = "given" if any(r.cell.output == "given" for r in results) else "allocated"
    results = [r for r in results if r.cell.threads == threads and r.cell.output == output]
    of_any = lambda values, a: [v for v in values if any(getattr(r.cell, a) == v for r in results)]
    ops, layouts = of_any(EVERY_OP, "op"), of_any(LAYOUTS, "layout")
    figure, axes = pyplot.subplots(
        len(ops), len(layouts), figsize=(6 * len(layouts), 0.6 + 3.6 * len(ops)), squeeze=False, layout="constrained"
    )
    for i, op in enumerate(ops):
        for j, layout in enumerate(layouts):
            panel = axes[i][j]
            members = sorted((r for r in results if r.cell.op == op and r.cell.layout == layout), key=lambda r: r.cell.array_bytes)
            for name, style in STYLES.items():
                points = [(r.cell.array_bytes / 1e6, r.speed(name)) for r in members if name in r.seconds]
                if points:
                    panel.plot(*zip(*points, strict=True), style, marker=".", label=name, linewidth=2.4 if name == "cbn" else 1)
            panel.set(title=f"{op}, channels {layout}", xscale="log", yscale="log", xlabel="MB an array", ylabel="GB/s of the least traffic")
            panel.grid(alpha=0.3)
            for axis in (panel.xaxis, panel.yaxis):
                axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter("{x:g}")
                axis.set_minor_locator(ticker.NullLocator())
    handles = {label: handle for panel in axes.flat for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    figure.suptitle(f"{result['machine']['cpu']}, {threads} threads, float32, output {output}", fontsize="medium")
    figure.savefig(file, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("--plot", metavar="FILE")
    chosen = parser.parse_args()
    with open(chosen.file) as file:
        result = json.load(file)
    print(text(result))
    if chosen.plot:
        plot(result, chosen.plot)


if __name__ == "__main__":
    main()
