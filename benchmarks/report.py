"""Results as a table and as a picture: medians, ratios of each round, and their middle half."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LABELS = {
    "execute": "execute `pass`, request to idle",
    "input": "`input()` round trip",
    "complete": "completion",
    "comm": "1 KiB comm round trip",
    "prints": "10,000 print calls in a cell",
    "forked": "500 print calls in a forked child",
    "text1": "1 MiB of text output",
    "text8": "8 MiB of text output",
    "to_kernel": "32 MiB comm buffer to the kernel",
    "from_kernel": "32 MiB comm buffer from the kernel",
    "spawn": "spawn to first reply",
    "client": "a further client, to first reply (200 certificates)",
    "subscribers1": "iopub, 8 MiB to 1 subscriber",
    "subscribers4": "iopub, 8 MiB to 4 subscribers",
    "subscribers16": "iopub, 8 MiB to 16 subscribers",
    "memory_start": "resident memory at start",
    "memory_client": "resident memory per further client",
    "memory_churn": "resident memory after 1,000 clients came and went",
}
CONTENDERS = {
    "stock": "stock, plaintext (default install)",
    "stock-orjson": "stock, plaintext, with orjson",
    "stock-curve": "stock, CURVE, with orjson",
    "curve": "this kernel",
    "curve-unsigned": "this kernel, unsigned",
    "curve-any": "this kernel, `any`",
    "bare": "a bare CURVE pair",
}
# The measures that are another value of a sample than its seconds.
VALUES = {
    "memory_start": ("spawn", "memory_start"),
    "memory_client": ("spawn", "memory_client"),
    "memory_churn": ("churn", "after"),
}


@dataclass(frozen=True)
class Goal:
    """That the median ratio of *contender* to *base* be at most *limit*."""

    measure: str
    base: str
    limit: float
    contender: str = "curve"


GOALS = [
    Goal("execute", "stock", 1.00),
    Goal("execute", "stock-orjson", 1.02),
    Goal("execute", "stock-orjson", 0.97, "curve-unsigned"),
    *(Goal(name, "stock", 1.00) for name in ("input", "complete", "comm", "prints")),
    *(Goal(name, "stock-orjson", 1.03) for name in ("input", "complete", "comm", "prints")),
    Goal("forked", "stock", 1.00),
    *(Goal(name, "stock", 0.60) for name in ("text1", "text8")),
    *(Goal(name, "stock-orjson", 1.05) for name in ("text1", "text8")),
    *(Goal(name, "stock-curve", 1.00) for name in ("to_kernel", "from_kernel")),
    *(Goal(name, "bare", 1.25) for name in ("to_kernel", "from_kernel")),
    Goal("spawn", "stock", 1.00),
    Goal("spawn", "stock-orjson", 1.02),
    Goal("client", "stock-curve", 1.10),
    Goal("memory_start", "stock", 1.03),
]


def values(results: dict[str, Any], measure: str, contender: str) -> list[float]:
    measured, value = VALUES.get(measure, (measure, "seconds"))
    samples = results["samples"].get(measured, {}).get(contender, [])
    return [one[value] for one in samples if value in one]


def ratios(results: dict[str, Any], measure: str, contender: str, base: str) -> list[float]:
    pairs = zip(values(results, measure, contender), values(results, measure, base), strict=False)
    return [one / other for one, other in pairs if other > 0]


def quartiles(numbers: list[float]) -> tuple[float, float, float]:
    if len(numbers) < 2:
        return numbers[0], numbers[0], numbers[0]
    low, middle, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return low, middle, high


def _rows(results: dict[str, Any]) -> list[str]:
    return [name for name in LABELS if values(results, name, "curve")]


def _contenders(results: dict[str, Any], measure: str) -> list[str]:
    return [name for name in CONTENDERS if values(results, measure, name)]


def _quantity(measure: str, value: float) -> str:
    if measure in VALUES:
        return f"{value / 2**20:.1f} MiB" if abs(value) >= 2**20 else f"{value / 2**10:.0f} KiB"
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1000:.0f} ms" if value >= 0.1 else f"{value * 1000:.3g} ms"


def _ratio(numbers: list[float]) -> str:
    low, middle, high = quartiles(numbers)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    rule = [" --- ", *(" ---: " for _ in head[1:])]
    lines = ["|" + "|".join(rule) + "|"]
    return "\n".join(
        ["| " + " | ".join(head) + " |", *lines, *("| " + " | ".join(r) + " |" for r in rows)]
    )


def _growths(results: dict[str, Any]) -> list[list[str]]:
    rows = []
    for contender in _contenders(results, "memory_churn"):
        [sizes] = results["samples"]["churn"][contender]
        whole, late = sizes["after"] - sizes["before"], sizes["after"] - sizes["half"]
        rows.append([CONTENDERS[contender], f"{whole / 2**10:+.0f} KiB", f"{late / 2**10:+.0f} KiB"])
    return rows


def verdicts(results: dict[str, Any]) -> list[tuple[Goal, list[float], bool]]:
    found = []
    for goal in GOALS:
        if numbers := ratios(results, goal.measure, goal.contender, goal.base):
            found.append((goal, numbers, round(quartiles(numbers)[1], 2) <= goal.limit))
    return found


def subscriber_costs(results: dict[str, Any]) -> dict[str, list[float]]:
    """What one of 4 and of 16 subscribers costs, as a ratio to a single one."""
    single = values(results, "subscribers1", "curve")
    return {
        f"subscribers{number}": [
            many / number / one
            for many, one in zip(values(results, f"subscribers{number}", "curve"), single, strict=False)
        ]
        for number in (4, 16)
        if single and values(results, f"subscribers{number}", "curve")
    }


def all_met(results: dict[str, Any]) -> bool:
    costs = [quartiles(one)[1] for one in subscriber_costs(results).values()]
    return all(met for *_, met in verdicts(results)) and all(cost <= 1 for cost in costs)


def table(results: dict[str, Any]) -> str:
    rounds, seconds = results["rounds"], results["seconds"]
    versions = results["versions"]["curve"]
    parts = [
        f"{rounds} rounds, {results['rounds_of_a_process']} with each process of a contender, in "
        f"{seconds // 60} min {seconds % 60} s on {results['cores']} cores: "
        + ", ".join(
            f"{name} {versions[name]}" for name in ("python", "ipykernel", "jupyter_client", "libzmq")
        )
        + ". Ratios are of the same round; in brackets their middle half."
    ]
    goals = [
        [
            LABELS[goal.measure],
            CONTENDERS[goal.contender],
            CONTENDERS[goal.base],
            _ratio(numbers),
            f"{goal.limit:.2f}",
            "met" if met else "**missed**",
        ]
        for goal, numbers, met in verdicts(results)
    ]
    for name, numbers in subscriber_costs(results).items():
        met = "met" if quartiles(numbers)[1] <= 1 else "**missed**"
        row = [
            f"{LABELS[name]}, each",
            CONTENDERS["curve"],
            "1 subscriber",
            _ratio(numbers),
            "1.00",
            met,
        ]
        goals.append(row)
    if goals:
        parts.append(_markdown(["measure", "contender", "against", "ratio", "goal", ""], goals))
    medians = [
        [
            LABELS[name],
            *(
                _quantity(name, statistics.median(found))
                if (found := values(results, name, one))
                else ""
                for one in CONTENDERS
            ),
        ]
        for name in _rows(results)
    ]
    parts.append("Medians:\n\n" + _markdown(["", *CONTENDERS.values()], medians))
    against = [
        [
            LABELS[name],
            *(
                _ratio(found) if (found := ratios(results, name, one, base)) else ""
                for base in ("stock", "stock-orjson")
                for one in ("stock-curve", "curve", "curve-unsigned", "curve-any")
            ),
        ]
        for name in _rows(results)
    ]
    head = [
        f"{CONTENDERS[one]} / {base}"
        for base in ("stock", "stock with orjson")
        for one in ("stock-curve", "curve", "curve-unsigned", "curve-any")
    ]
    parts.append("Ratios to stock in plaintext:\n\n" + _markdown(["", *head], against))
    cpu = [
        [
            LABELS[name],
            *(
                _quantity(name, statistics.mean(one["cpu"] for one in samples))
                if (samples := results["samples"][name].get(contender))
                else ""
                for contender in CONTENDERS
            ),
        ]
        for name in _rows(results)
        if name not in VALUES
    ]
    parts.append(
        "CPU time of the kernel process, means:\n\n" + _markdown(["", *CONTENDERS.values()], cpu)
    )
    if growths := _growths(results):
        number = results["clients_that_came_and_went"]
        head = [f"{number} clients came and went", "growth", "in the second half"]
        parts.append("Growth of resident memory:\n\n" + _markdown(head, growths))
    return "\n\n".join(parts) + "\n"


def comparison(results: dict[str, Any], earlier: dict[str, Any]) -> str:
    """Whether the middle halves of two runs overlap: of each ratio with a goal, then of the others."""

    def row(what: str, numbers: list[float], before: list[float]) -> list[str]:
        # As they are shown: what is measured once in a run has no spread.
        low, _, high = (round(one, 2) for one in quartiles(numbers))
        low_before, _, high_before = (round(one, 2) for one in quartiles(before))
        agree = "yes" if low <= high_before and low_before <= high else "**no**"
        return [what, _ratio(before), _ratio(numbers), agree]

    with_goal = {(goal.measure, goal.contender, goal.base): None for goal in GOALS}
    others = {(name, "curve", "stock"): None for name in _rows(results)}
    rows = [
        row(f"{LABELS[name]}, {CONTENDERS[contender]} / {CONTENDERS[base]}", numbers, before)
        for name, contender, base in with_goal | others
        if (numbers := ratios(results, name, contender, base))
        and (before := ratios(earlier, name, contender, base))
    ]
    costs_before = subscriber_costs(earlier)
    rows += [
        row(f"{LABELS[name]}, each, {CONTENDERS['curve']} / 1 subscriber", numbers, costs_before[name])
        for name, numbers in subscriber_costs(results).items()
        if name in costs_before
    ]
    return _markdown(["", "earlier run", "this run", "they overlap"], rows)


def picture(results: dict[str, Any], path: Path) -> None:
    """Draw each contender's ratio to the default stock install, with the middle half as a bar."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "curve_kernel", "font.family": "DejaVu Sans", "font.size": 9})
    from matplotlib import pyplot

    rows = [name for name in _rows(results) if ratios(results, name, "curve", "stock")]
    if not rows:
        return
    shown = {
        "stock-orjson": ("#9a9a9a", "o"),
        "stock-curve": ("#e08214", "s"),
        "curve": ("#2166ac", "D"),
        "curve-unsigned": ("#67a9cf", "^"),
    }
    figure, axes = pyplot.subplots(figsize=(8.5, 0.42 * len(rows) + 1.6), layout="constrained")
    for index, (name, (color, marker)) in enumerate(shown.items()):
        for row, measure in enumerate(rows):
            if numbers := ratios(results, measure, name, "stock"):
                low, middle, high = quartiles(numbers)
                y = row + (index - 1.5) * 0.19
                axes.plot([low, high], [y, y], color=color, linewidth=2, alpha=0.5)
                label = CONTENDERS[name] if row == 0 else None
                axes.plot(middle, y, marker, color=color, markersize=4.5, linestyle="none", label=label)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    ticks = [0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.45), max(high, 1.3))
    axes.set_yticks(range(len(rows)), [LABELS[name].replace("`", "") for name in rows])
    axes.invert_yaxis()
    axes.grid(axis="x", linewidth=0.4, alpha=0.6)
    axes.set_xlabel(
        "stock as pip installs it, plaintext = 1; less is better; bars: middle half of all rounds"
    )
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
