"""What quantising cost: the sums, the lines for a terminal, and a page that holds up whatever it is told."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from gptoss_lite.quant.report import (
    GROUPS,
    Report,
    TensorReport,
    lines,
    to_json,
    write_error,
    write_number,
    write_share,
)
from gptoss_lite.quant.report_html import html
from gptoss_lite.quant.report_svg import Pair, Series, bars, by_layer
from gptoss_lite.sizes import format_bytes

MIB = 1 << 20
VOID = {"meta", "br"}
STRANGE = "<b>&\"'</b><script>"


def tensor(
    name: str, layer: int | None, group: str, after: str = "mxfp4", error: float = 0.01
) -> TensorReport:
    """One million weights of bf16, newly in another format unless that is bf16, too."""
    sizes = {"bf16": 2 * MIB, "mxfp4": 4.25 * MIB / 8, "int8 (32, bf16)": 8.5 * MIB / 8}
    lost = (0.0, 0.0, 0.0) if after == "bf16" else (4.0, 4 * error**2, error / 2)
    return TensorReport(name, layer, group, "bf16", after, 2 * MIB, int(sizes[after]), *lost, MIB)


def network(layers: int = 24, attention: str = "int8 (32, bf16)", experts: str = "mxfp4") -> Report:
    """A model of tensors of one size, whose errors grow from layer to layer."""
    tensors = [tensor("model.embed_tokens.weight", None, "embedding", "bf16")]
    for n in range(layers):
        prefix, more = f"model.layers.{n}.", 1 + n / 100
        tensors.append(tensor(f"{prefix}input_layernorm.weight", n, "norms and routers", "bf16"))
        for kind in "qkvo":
            name = f"{prefix}self_attn.{kind}_proj.weight"
            tensors.append(tensor(name, n, "attention", attention, 0.005 * more))
        for kind in ("gate_up", "down"):
            tensors.append(tensor(f"{prefix}mlp.experts.{kind}_proj", n, "experts", experts, 0.1 * more))
    tensors.append(tensor("lm_head.weight", None, "lm_head", "int8 (32, bf16)", 0.004))
    return Report("20b", "20b-small", ("preset balanced",), 83.4, "1.2.3", tuple(tensors))


def calibrated(report: Report) -> Report:
    """The same, where calibration halved the error of outputs, and the values' grew by a quarter."""
    tensors = (
        t
        if t.is_kept
        else replace(
            t, squared_error_plain=t.squared_error / 1.25**2, weighted_error=1.0, weighted_error_plain=4.0
        )
        for t in report.tensors
    )
    return replace(report, tensors=tuple(tensors))


@dataclass
class Page(HTMLParser):
    """What a page has: texts by enclosing tags, tags that do not match, references, and points by series."""

    text: str
    open: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    titles: list[str] = field(default_factory=list)
    tags: set[str] = field(default_factory=set)
    headers_without_scope: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.text)
        self.close()
        self.wrong += self.open

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.references += [name for name, _ in attrs if name in ("src", "href", "srcset", "xlink:href")]
        self.headers_without_scope += tag == "th" and "scope" not in dict(attrs)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["code"]:
            self.names.append(data)
        if self.open[-2:] == ["path", "title"]:
            self.titles.append(data)


REPORTS = {
    "a usual one": network(),
    "one of 36 layers": network(36),
    "a calibrated one": calibrated(network()),
    "one of a single layer": network(1),
    "one that kept all": network(attention="bf16", experts="bf16"),
    "an empty one": Report("a", "b", (), 0.0, "1", ()),
}


def test_totals_by_group_add_up_to_the_total_and_to_the_tensors() -> None:
    report = network()
    document = json.loads(json.dumps(to_json(report), allow_nan=False))
    assert [group["name"] for group in document["groups"]] == list(GROUPS)
    assert len(document["tensors"]) == document["total"]["tensors"] == len(report.tensors)
    for key in ("tensors", "kept", "weights", "bytes_before", "bytes_after"):
        assert sum(group[key] for group in document["groups"]) == document["total"][key], key
    for key in ("weights", "bytes_before", "bytes_after", "kept"):
        assert sum(each[key] for each in document["tensors"]) == document["total"][key], key


def test_a_groups_error_is_the_root_of_summed_squares_over_what_was_not_kept() -> None:
    kept = tensor("a", 0, "experts", "bf16")
    one = replace(tensor("b", 0, "experts"), squared=9.0, squared_error=1.0)
    other = replace(tensor("c", 0, "experts"), squared=7.0, squared_error=3.0)
    report = Report("", "", (), 0.0, "", (kept, one, other))
    (group,) = report.groups()
    assert group.relative_error == pytest.approx(math.sqrt(4 / 16))
    assert (group.tensors, group.kept) == (3, 1)
    assert replace(report, tensors=(kept,)).total.relative_error is None
    exact = replace(one, after="f32", squared=0.0, squared_error=0.0)
    assert replace(report, tensors=(kept, exact)).total.relative_error == 0


def test_bits_are_for_each_weight_and_unknown_where_one_tensor_is_not_counted() -> None:
    report = Report("", "", (), 0.0, "", (tensor("a", 0, "experts"), tensor("b", 1, "experts", "bf16")))
    assert (report.total.bits_before, report.total.bits_after) == (16.0, (4.25 + 16) / 2)
    uncounted = replace(report, tensors=(report.tensors[0], replace(report.tensors[1], weights=0)))
    assert uncounted.total.bits_after is None


def test_formats_of_a_group_are_told_by_bytes() -> None:
    group = Report("", "", (), 0.0, "", (tensor("a", 0, "experts"), tensor("b", 1, "experts", "bf16"))).total
    assert (group.before, group.after) == (("bf16",), ("bf16", "mxfp4"))


def test_the_worst_are_those_of_largest_relative_error_and_none_that_was_exact() -> None:
    exact = tensor("exact", 0, "experts", error=0.0)
    small, large = tensor("small", 0, "experts", error=0.01), tensor("large", 0, "experts", error=0.2)
    huge = replace(tensor("long", 0, "experts", error=0.1), squared=1e9, squared_error=1e6)
    report = Report("", "", (), 0.0, "", (exact, small, huge, large))
    assert [worst.name for worst in report.worst(20)] == ["large", "long", "small"]
    assert len(report.worst(2)) == 2


def test_lines_show_each_group_the_total_and_the_five_worst() -> None:
    shown = lines(network())
    table, worst = shown[: shown.index("")], shown[shown.index("") + 2 :]
    assert [line.split("  ")[0] for line in table] == ["group", *GROUPS, "in all"]
    assert re.search(r"bf16 +-> +mxfp4 +96\.0 MiB +-> +25\.5 MiB +4\.25 +11\.2 %$", table[3])
    assert table[1].endswith("kept")
    assert len(worst) == 5 and worst[0].split() == [
        "model.layers.23.mlp.experts.gate_up_proj", "mxfp4", "12.3", "%",
    ]  # fmt: skip
    assert all(line == line.rstrip() for line in shown)


def test_lines_and_json_tell_what_calibration_bought() -> None:
    report = calibrated(network())
    assert [line.split() for line in lines(report)[-7:]] == [
        [kind, "-50", "%"] for kind in ("q", "k", "v", "o", "gate_up", "down", "lm_head")
    ]
    first = to_json(report)["calibration"][0]
    expected = {"outputs": 0.5, "lowest": 0.5, "highest": 0.5, "values": 1.25}
    assert first == pytest.approx({"kind": "q", "tensors": 24} | expected)
    assert to_json(network())["calibration"] == []


@pytest.mark.parametrize("which", REPORTS)
def test_a_page_is_well_formed_and_asks_for_nothing(which: str) -> None:
    page = Page(html(REPORTS[which]))
    assert not page.wrong
    assert not page.references and "script" not in page.tags and "link" not in page.tags
    assert not re.search(r"://|@import|url\(", page.text)
    assert not page.headers_without_scope
    assert "nan" not in page.text and "inf" not in re.findall(r"[\w.]+", page.text)


@pytest.mark.parametrize("layers", [1, 24, 36])
def test_each_series_has_one_point_a_layer(layers: int) -> None:
    titles = Page(html(network(layers))).titles
    for kind in ("q", "k", "v", "o", "gate_up", "down"):
        places = [title.split(":")[0] for title in titles if title.startswith(f"{kind}, ")]
        assert places == [f"{kind}, layer {n}" for n in range(layers)]
    assert f"q, layer {layers - 1}: {write_error(0.005 * (1 + (layers - 1) / 100))}" in titles


def test_every_tensor_is_named_on_the_page() -> None:
    report = network()
    names = Page(html(report)).names
    assert names[20:] == [each.name for each in report.tensors]
    assert names[:20] == [each.name for each in report.worst(20)]


def test_what_strangers_files_say_is_shown_as_text() -> None:
    report = network(1)
    tensors = tuple(
        replace(t, name=t.name + STRANGE, before=STRANGE, after=STRANGE + "2") for t in report.tensors
    )
    told = Report(STRANGE, STRANGE + "\udcff", (STRANGE,), 1.0, STRANGE, tensors)
    page = Page(html(told))
    page.text.encode()  # a file's name may hold what is no UTF-8
    assert not page.wrong and not {"b", "script"} & page.tags
    assert "".join(page.names[-len(tensors) :]) == "".join(t.name for t in tensors)
    assert "&lt;b&gt;&amp;&quot;" in page.text
    assert any(STRANGE in title for title in page.titles)


def test_what_was_kept_is_shown_as_kept_and_not_plotted() -> None:
    page = Page(html(network(attention="bf16", experts="bf16")))
    assert not page.titles
    assert page.text.count(">kept</td>") == 4 + (len(network().tensors) - 1)
    assert "Error by layer" not in page.text
    kept_all = replace(network(), tensors=tuple(t for t in network().tensors if t.is_kept))
    assert "every tensor was kept" in html(kept_all) and "No tensor lost anything" in html(kept_all)


def test_what_lost_nothing_is_told_as_exact_and_not_plotted() -> None:
    report = network(4)
    tensors = tuple(
        replace(t, squared_error=0.0) if t.kind in ("down", "lm_head") else t for t in report.tensors
    )
    page = Page(html(replace(report, tensors=tensors)))
    assert "Exact in every layer: down." in page.text and ">exact</td>" in page.text
    assert not any(title.startswith("down") for title in page.titles)


def test_an_empty_report_has_a_page_and_lines() -> None:
    empty = REPORTS["an empty one"]
    assert "There were no tensors" in html(empty)
    assert [line.split()[:2] for line in lines(empty)] == [["group", "format"], ["in", "all"]]
    assert to_json(empty)["groups"] == [] and to_json(empty)["total"]["bytes_before"] == 0


def heights(plot: str) -> list[float]:
    return [float(y) for y in re.findall(r'class="point" transform="translate\([\d.]+ ([\d.]+)\)', plot)]


def ticks(plot: str) -> list[str]:
    return re.findall(r'text-anchor="end">([^<]+)<', plot)


def test_a_wide_range_is_plotted_by_its_logarithm_with_zeros_below() -> None:
    plot = by_layer("e", [Series("a", 0, ((0, 0.1), (1, 1.0), (2, 10.0), (3, 0.0)))], str)
    assert "logarithmic" in plot and ticks(plot)[0] == "0.1" and ticks(plot)[-1] == "0"
    low, middle, high, zero = heights(plot)
    assert low - middle == pytest.approx(middle - high, abs=0.2)
    assert zero > low


def test_a_narrow_range_is_plotted_linearly_within_its_ticks() -> None:
    plot = by_layer("e", [Series("a", 0, ((0, 10.0), (1, 11.0), (2, 12.0)))], str)
    assert "logarithmic" not in plot
    first, second, third = heights(plot)
    assert first - second == pytest.approx(second - third, abs=0.2)
    assert float(ticks(plot)[0]) <= 10 and float(ticks(plot)[-1]) >= 12


@pytest.mark.parametrize(
    "values", [(1e-9,), (3.0, 3.0), (0.123, 123.0), (1e-12, 1e3), (0.0, 7.0), (99.9, 100.1), (1e-3, 2.4e-3)]
)
def test_points_lie_between_the_first_tick_and_the_last_and_ticks_are_few(values: tuple[float, ...]) -> None:
    plot = by_layer("e", [Series("a", 0, tuple(enumerate(values)))], str)
    rules = [float(y) for y in re.findall(r'class="rule" d="M\d+ ([\d.]+)H', plot)]
    assert 3 <= len(rules) <= 10
    assert all(min(rules) - 0.1 <= y <= max(rules) + 0.1 for y in heights(plot))
    assert len(set(ticks(plot))) == len(ticks(plot))


@pytest.mark.parametrize("layers", [1, 2, 24, 36, 200])
def test_numbers_of_layers_keep_apart(layers: int) -> None:
    plot = by_layer("e", [Series("a", 0, tuple((n, 1.0) for n in range(layers)))], str)
    places = [float(x) for x in re.findall(r'<text x="([\d.]+)" y="\d+" text-anchor="middle">\d', plot)]
    assert places and all(b - a >= 26 for a, b in pairwise(places))


def test_a_line_is_broken_where_a_layer_is_missing() -> None:
    plot = by_layer("e", [Series("a", 0, ((0, 1.0), (1, 1.1), (3, 1.2), (4, 1.1)))], str)
    (path,) = re.findall(r'class="line" d="([^"]+)"', plot)
    assert re.sub(r"[\d. ]", "", path) == "MLML"


def test_bars_are_as_long_as_their_values_and_have_room_for_their_notes() -> None:
    plot = bars("bytes", [Pair("a", (100.0, 25.0), ("100 B", "25 B")), Pair("b", (0.0, 0.0), ("0 B", "0 B"))])
    widths = [float(width) for width in re.findall(r'width="([\d.]+)"', plot)]
    assert widths[0] == pytest.approx(4 * widths[1], abs=0.5) and widths[2:] == [1.0, 1.0]
    assert max(float(x) for x in re.findall(r'<text x="([\d.]+)"', plot)) < 900 - 150


@pytest.mark.parametrize(
    ("nbytes", "shown"),
    [(0, "0 B"), (512, "512 B"), (1536, "1.5 KiB"), (35 * MIB, "35.0 MiB"), (12.8 * 2**30, "12.8 GiB")],
)
def test_sizes_of_any_magnitude_are_written_in_a_fitting_unit(nbytes: float, shown: str) -> None:
    assert format_bytes(nbytes) == shown


def test_figures_are_written_with_the_digits_that_matter() -> None:
    assert [write_number(x) for x in (0.00123, 0.06, 0.123, 1.234, 12.34, 1234.5)] == [
        "0.0012", "0.060", "0.12", "1.23", "12.3", "1,234",
    ]  # fmt: skip
    assert [write_error(x) for x in (None, 0.0, 0.00534)] == ["kept", "exact", "0.53 %"]
    assert [write_share(x) for x in (0.71, 1.0, 1.2)] == ["-29 %", "+0 %", "+20 %"]
