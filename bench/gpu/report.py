"""The measurements as tables for people, and what a slow figure is made of."""

from collections.abc import Iterable, Sequence
from typing import Any

from bench.gpu.device import Result
from bench.gpu.timing import network

_TARGETS = {  # tokens per second on an H200: one sequence's decode, a prompt of 2,048 tokens
    ("20b", "decode"): 600.0, ("120b", "decode"): 400.0, ("20b", "prefill"): 10_000.0
}  # fmt: skip


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Set rows out in columns; the first is text, None an empty place."""
    cells = [list(heads), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
    return "\n".join(
        "  ".join(
            f"{cell:<{width}}" if i == 0 else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def facts(found: Result) -> str:
    """Say what was measured on."""
    return "\n".join(f"{name:<22} {value}" for name, value in found.items())


def checks(found: Result) -> str:
    """Count the checks, and show those that failed."""
    lines = [f"{found['passed']} of {found['total']} checks passed in {found['seconds']:.0f} s"]
    lines += [f"  FAILED  {one['name']}: {one['error']}" for one in found["results"] if not one["ok"]]
    if found["not_run"]:
        lines.append(f"  not run for want of time: {len(found['not_run'])}, from {found['not_run'][0]!r} on")
    return "\n".join(lines)


def golden(found: Sequence[Result]) -> str:
    """Show how far each layout of the golden network is from transformers."""
    heads = (
        "layout", "rows", "median", "p90", "far", "greedy wrong", "decode median", "decode worst", "replays",
        "ahead alike", "ok",
    )  # fmt: skip
    return table(
        heads,
        (
            (
                one["layout"], one["rows"], one["median"], one["p90"], one["far_share"],
                f"{one['greedy_wrong']}/{one['greedy_rows']}", one["decode_median"], one["decode_worst"],
                one["decode_replays"], one["runs_ahead_alike"], one["ok"],
            )
            for one in found
        ),
    )  # fmt: skip


def ceilings(found: Result) -> str:
    """Show what the hardware gives."""
    rows = [
        ("read", _tera(found, "read_bytes_per_s"), "TB/s"),
        ("copy, read and written", _tera(found, "copy_bytes_per_s"), "TB/s"),
        ("pinned host to device", _tera(found, "host_to_device_bytes_per_s"), "TB/s"),
        ("fp16 products", _tera(found, "half_flops_per_s"), "TFLOP/s"),
    ]
    text = table(("ceiling", "rate", ""), rows)
    return f"{text}\n{found['half_why_not']}" if "half_why_not" in found else text


def kernels(found: Sequence[Result]) -> str:
    """Show each kernel's time, and its share of the ceiling that it should come near."""
    labels = ("batch", "tokens", "context", "window", "experts", "of")
    return table(
        ("kernel", *labels, "us", "TB/s", "of read", "TFLOP/s", "of fp16"),
        (
            (
                one["kernel"], *(one.get(label) or None for label in labels), float(one["us"]),
                _tera(one, "bytes_per_s"), _percent(one.get("of_read")), _tera(one, "flops_per_s"),
                _percent(one.get("of_half")),
            )
            for one in found
        ),
    )  # fmt: skip


def model(name: str, found: Sequence[Result]) -> str:
    """Show a model's figures, and of one decode step where the time goes."""
    lines = []
    for one in found:
        match one["what"]:
            case "load":
                lines.append(
                    f"loaded in {one['load_seconds']:.1f} s, {one['checkpoint_bytes'] / 2**30:.1f} GiB"
                )
            case "memory":
                used, plan = one["used_bytes"] / 2**30, one["plan_device_bytes"] / 2**30
                lines.append(f"device memory {used:.2f} GiB, planned {plan:.2f} GiB")
            case "skipped":
                lines.append(f"skipped: {one['reason']}")
    heads = (
        "decode",
        "context",
        "tok/s",
        "replay tok/s",
        "step us",
        "replay us",
        "host us",
        "of read",
        "target",
    )
    rows = [
        (
            f"batch {one['batch']}", one["context"], one["tokens_per_s"], one.get("replay_tokens_per_s"),
            one["step_us"], one.get("replay_us"), one["host_us"], _percent(one.get("of_read")),
            _TARGETS.get((name, "decode")) if one["batch"] == 1 else None,
        )
        for one in found if one["what"] == "decode"
    ]  # fmt: skip
    lines.append(table(heads, rows))
    prefills = [
        (
            f"{one['tokens']} tokens", one["step_tokens"], one["seconds"], one["tokens_per_s"],
            _TARGETS.get((name, "prefill")) if one["tokens"] == 2048 else None,
        )
        for one in found if one["what"] == "prefill"
    ]  # fmt: skip
    lines.append(table(("prefill", "a step", "s", "tok/s", "target"), prefills))
    for one in found:
        if one.get("account"):
            lines.append(_account(one))
    return "\n".join(lines)


def _account(one: Result) -> str:
    rows = [
        (f"  {part['kernel']}", part["times"], part["us"], part["total_us"], _percent(part["share"]))
        for part in one["account"]
    ]
    if one["what"] == "decode":
        title = f"one step, batch {one['batch']}, context {one['context']}"
        whole = f", replayed {one['replay_us']:,.0f} us" if "replay_us" in one else ""
    else:
        title = f"a prompt of {one['tokens']} tokens in steps of {one['step_tokens']}"
        whole = f", in all {1e6 * one['seconds']:,.0f} us"
    title = f"\n{title}: kernels alone {one['kernels_us']:,.0f} us{whole}"
    return f"{title}\n{table(('  kernel', 'times', 'us', 'in all', 'share'), rows)}"


def add_shares(measured: Sequence[Result], found: Result) -> None:
    """Put kernels beside the ceilings that were measured in the same run."""
    for one in measured:
        if found.get("read_bytes_per_s") and "bytes_per_s" in one:
            one["of_read"] = one["bytes_per_s"] / found["read_bytes_per_s"]
        if found.get("half_flops_per_s") and "flops_per_s" in one:
            one["of_half"] = one["flops_per_s"] / found["half_flops_per_s"]


def add_accounts(
    name: str, measured: Sequence[Result], kernels_found: Sequence[Result], found: Result
) -> None:
    """Put a model's figures beside its kernels' own times, and decode beside what it must read."""
    for one in measured:
        if one["what"] == "decode" and found.get("read_bytes_per_s"):
            one["of_read"] = one["bytes_per_step"] / (one["step_us"] / 1e6) / found["read_bytes_per_s"]
        parts = account(name, kernels_found, one)
        if parts:
            one["account"] = parts
            one["kernels_us"] = sum(part["total_us"] for part in parts)


def account(name: str, found: Sequence[Result], of: Result) -> list[Result]:
    """List the kernels of a decode step or a prompt with their times alone; empty where one was not timed.

    The experts' products are those timed with the first number of experts: with several tokens, a network of
    more experts reads more of them. Attention of a prompt's later steps is timed as that of the first.
    """
    config = network(name)
    experts = {"experts": config.num_local_experts}
    full, sliding = (config.layer_types.count(f"{kind}_attention") for kind in ("full", "sliding"))
    layers = full + sliding
    whole, window = {"window": 0}, {"window": config.sliding_window}
    wanted: list[tuple[str, int, Result]]
    if of["what"] == "decode":
        size, context = {"batch": of["batch"]}, of["context"]
        wanted = [
            ("embed", 1, {}), ("qkv_decode", layers, {}), ("attention_decode", full, whole),
            ("attention_decode", sliding, window), ("out_proj_decode", layers, {}),
            ("route", layers, experts), *([("group", layers, {})] if of["batch"] > 1 else []),
            ("gate_up_decode", layers, {}), ("down_decode", layers, {}), ("lm_head_decode", 1, {}),
            ("finish", 1, {}),
        ]  # fmt: skip
    elif of["what"] == "prefill" and of["tokens"] % of["step_tokens"] == 0:
        size, context = {"tokens": of["step_tokens"]}, 0
        each = layers * (of["tokens"] // of["step_tokens"])
        wanted = [
            ("rms_norm", each, {}), ("linear", each, {"of": "qkv"}), ("rotate_append", each, {}),
            ("attention_prefill", each * full // layers, whole),
            ("attention_prefill", each * sliding // layers, window),
            ("linear", each, {"of": "out"}), ("route", each, experts), ("group", each, {}),
            ("moe_gate_up_prefill", each, {}), ("moe_down_prefill", each, {}), ("combine", each, {}),
        ]  # fmt: skip
    else:
        return []
    parts: list[Result] = []
    for kernel, times, labels in wanted:
        labels = labels | size | {"kernel": kernel}
        fitting = [one for one in found if all(one.get(key) == value for key, value in labels.items())]
        if not fitting:
            return []
        nearest = min(fitting, key=lambda one: abs(one.get("context", 0) - context))
        title = f"{kernel}, sliding" if labels.get("window") else kernel
        part = {"kernel": title, "times": times, "us": nearest["us"], "total_us": times * nearest["us"]}
        parts.append(part)
    total = sum(part["total_us"] for part in parts)
    return [part | {"share": part["total_us"] / total} for part in parts]


def _tera(found: Result, name: str) -> float | None:
    value = found.get(name)
    return None if value is None else value / 1e12


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.0f}%"
