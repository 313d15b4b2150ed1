"""quantize, convert and inspect as people meet them: what is printed, what is written, what is refused."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gptoss_lite.checkpoint import open_checkpoint
from gptoss_lite.cli.main import main
from gptoss_lite.quant.formats import MXFP4, Int8
from tests.conftest import DATA
from tests.test_conversion import DEMO, Interrupted, assert_same

BF16 = DATA / "demo" / "bf16"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def done(*arguments: str | Path) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: str | Path, code: int = 1) -> str:
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    if code == 1:
        assert result.stderr.startswith("Error: ")
        assert result.stderr.count("\n") == 1
    return result.stderr


# quantize


def test_quantize_tells_what_it_cost_and_the_result_answers(tmp_path: Path) -> None:
    text = done("quantize", BF16, tmp_path / "q", "--preset", "balanced")
    assert f"Wrote {tmp_path / 'q'} in " in text
    rows = {line.split("  ")[0]: line for line in text.splitlines()}
    assert "bf16    ->  mxfp4, bf16" in rows["experts"]
    assert "bf16    ->  int8 (32, bf16)" in rows["lm_head"]
    assert "kept" in rows["embedding"]
    assert "Largest errors:" in text
    shutil.copy(DEMO / "tokenizer.json", tmp_path / "q")
    assert len(done("generate", "--model", tmp_path / "q", "--raw", "--max-tokens", "30", "It was")) > 30
    assert open_checkpoint(tmp_path / "q").layout == "gptoss-lite"


def test_quantize_json_is_one_document_with_plan_and_report(tmp_path: Path) -> None:
    document = json.loads(done("quantize", BF16, tmp_path / "q", "--json"))
    assert document["target"] == "hf"
    assert document["bytes"] == sum(path.stat().st_size for path in (tmp_path / "q").iterdir())
    assert document["seconds"] > 0
    report = document["report"]
    assert report["total"]["bytes_after"] < 0.6 * report["total"]["bytes_before"]
    experts = next(group for group in report["groups"] if group["name"] == "experts")
    assert 0.05 < experts["relative_error"] < 0.2
    assert {tensor["name"] for tensor in report["tensors"]} == set(open_checkpoint(BF16).names())


def test_the_report_is_one_page_with_every_tensor(tmp_path: Path) -> None:
    done("quantize", BF16, tmp_path / "q", "--preset", "small", "--report", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    HTMLParser().feed(page)
    assert "<svg" in page
    assert "http" not in page.replace("http-equiv", "")
    for name in open_checkpoint(BF16).names():
        assert name in page


def test_a_dry_run_writes_nothing_and_tells_what_would_fit_where(tmp_path: Path) -> None:
    text = done("quantize", BF16, tmp_path / "q", "--preset", "smallest", "--dry-run")
    assert list(tmp_path.iterdir()) == []
    assert "attention" in text and "mxfp4, bf16" in text
    assert "  from 8 GB: 131,072 tokens of context" in text
    assert text.count("tokens of context") == 1
    document = json.loads(
        done("quantize", BF16, tmp_path / "q", "--preset", "smallest", "--dry-run", "--json")
    )
    assert list(tmp_path.iterdir()) == []
    done("quantize", BF16, tmp_path / "q", "--preset", "smallest")
    assert document["bytes"] == sum(path.stat().st_size for path in (tmp_path / "q").iterdir())
    after = {group["name"]: group["nbytes"] for group in document["after"]}
    assert sum(after.values()) == open_checkpoint(tmp_path / "q").nbytes


def test_options_name_formats_by_group_and_by_tensor(tmp_path: Path) -> None:
    done(
        "quantize", BF16, tmp_path / "q", "--attention", "int8", "--group-size", "row", "--scales", "float16",
        "--tensor", "*.o_proj.weight=int8:64:e8m0", "--tensor", "*.layers.2.mlp.experts.*_proj=keep",
        "--lm-head", "mxfp4",
    )  # fmt: skip
    weights = open_checkpoint(tmp_path / "q").weights
    assert weights["model.layers.1.self_attn.q_proj.weight"].format == Int8(None, "float16")
    assert weights["model.layers.1.self_attn.o_proj.weight"].format == Int8(64, "e8m0")
    assert weights["model.layers.1.mlp.experts.down_proj"].format == MXFP4()
    assert weights["model.layers.2.mlp.experts.down_proj"].format is None
    assert weights["lm_head.weight"].format == MXFP4()
    assert weights["model.embed_tokens.weight"].format is None


def test_mxfp4_is_kept_unless_an_option_names_it(tmp_path: Path) -> None:
    done("quantize", "demo", tmp_path / "kept")
    assert_same(DEMO, tmp_path / "kept")
    text = done("quantize", "demo", tmp_path / "int8", "--experts", "int8")
    assert "mxfp4, bf16  ->  int8 (32, e8m0), bf16" in text
    assert "exact" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--group-size", "96", "--attention", "int8"),
            "o_proj.weight has 512 columns, which groups of 96 do not",
        ),
        (("--tensor", "*.mlp.router.weight=int8"), "routers, norms, sinks and biases are never quantised"),
        (("--tensor", "*.mlp.nothing=int8"), "'*.mlp.nothing' matches no weight of this model"),
        (("--tensor", "*.q_proj.weight=int8"), "they are one matrix, give them one format"),
        (("--calibrate", "no-such-text"), "no-such-text cannot be read"),
    ],
)
def test_what_quantize_cannot_do_is_told_in_a_line(
    tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    assert message in refused("quantize", "demo", tmp_path / "q", *options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--group-size", "48", "--attention", "int8"),
            "group_size is 48: give a multiple of 32, or a whole row",
        ),
        (("--tensor", "lm_head.weight=int4"), "'lm_head.weight=int4' is no format for a weight"),
        (("--tensor", "lm_head.weight=int8:many"), "'many' is no group of columns"),
        (("--calibrate-tokens", "1024"), "give --calibrate, too"),
        (("--report", "r.html", "--dry-run"), "--dry-run cannot"),
        (("--preset", "tiny"), "'tiny' is not one of 'experts', 'balanced', 'small', 'smallest'"),
        (("--group-size", "wide"), "'wide' is neither a number of columns nor row"),
        (("--router", "int8"), "No such option"),
        (("--experts", "int4"), "'int4' is not one of"),
        (("--shard-size", "big"), "'big' is no size"),
        (("--workers", "0"), "0 is not in the range"),
    ],
)
def test_wrong_options_are_told_as_such(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    assert message in refused("quantize", "demo", tmp_path / "q", *options, code=2)


def test_a_report_that_cannot_be_written_is_known_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "mine.html").write_text("dear")
    for page, message in (
        (tmp_path / "no" / "r.html", "r.html cannot be written: No such file or directory"),
        (tmp_path / "mine.html", "mine.html exists already"),
        (tmp_path, "exists already"),
    ):
        assert message in refused("quantize", BF16, tmp_path / "q", "--report", page, code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.html"]
    assert (tmp_path / "mine.html").read_text() == "dear"


def test_what_is_there_already_is_told_to_people_and_programs(tmp_path: Path) -> None:
    done("quantize", BF16, tmp_path / "q")
    result = run("quantize", BF16, tmp_path / "q", "--report", tmp_path / "report.html")
    assert result.exit_code == 1
    assert "is there already" in result.stderr
    assert "no report: what it cost is only known when it is written" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["q"]
    again = run("quantize", BF16, tmp_path / "q", "--json")
    assert again.exit_code == 0
    document = json.loads(again.stdout)
    assert (document["seconds"], document["report"]) == (None, None)
    done("convert", "demo", tmp_path / "c", "--to", "hf")
    assert (
        json.loads(run("convert", "demo", tmp_path / "c", "--to", "hf", "--json").stdout)["seconds"] is None
    )


def test_quantising_what_is_quantised_is_noted(tmp_path: Path) -> None:
    result = run("quantize", "demo", tmp_path / "q", "--dry-run")
    assert "Note: nothing is to be quantised" in result.stderr
    assert "Note" not in run("quantize", BF16, tmp_path / "q", "--dry-run").stderr


def test_quantize_calibrates_on_a_text_and_says_what_that_bought(tmp_path: Path) -> None:
    source = tmp_path / "s"
    shutil.copytree(BF16, source)
    shutil.copy(DEMO / "tokenizer.json", source)
    options = ("--calibrate", DATA / "demo" / "heldout.txt", "--calibrate-tokens", "1024")
    text = done("quantize", source, tmp_path / "q", *options, "--report", tmp_path / "report.html")
    assert "Error of outputs against rounding without calibration:" in text
    assert "alibrat" in (tmp_path / "report.html").read_text()


def test_what_is_no_part_of_the_network_is_named_when_it_is_left_out(tmp_path: Path) -> None:
    import safetensors.numpy

    shutil.copytree(BF16, tmp_path / "s")
    tensors = safetensors.numpy.load_file(BF16 / "model.safetensors")
    extra = {"score.weight": tensors["model.norm.weight"], "scorf.bias": tensors["model.norm.weight"]}
    safetensors.numpy.save_file(tensors | extra, tmp_path / "s" / "model.safetensors")
    result = run("convert", tmp_path / "s", tmp_path / "d", "--to", "hf")
    assert result.exit_code == 0
    assert result.stderr == "Note: left out, for the network does not ask for it: score.weight and 1 more.\n"


def test_the_choices_of_the_commands_are_those_of_the_library() -> None:
    from gptoss_lite.cli import convert, quantize
    from gptoss_lite.conversion.forms import TARGETS
    from gptoss_lite.quant.policy import GROUPS, PRESETS

    assert convert.TARGETS == TARGETS
    parameters = {parameter.name: parameter for parameter in quantize.quantize.params}
    assert list(parameters["preset"].type.choices) == list(PRESETS)  # type: ignore[attr-defined]
    assert parameters.keys() >= GROUPS.keys()


# convert


def test_convert_says_what_it_wrote_and_how_fast(tmp_path: Path) -> None:
    text = done("convert", "demo", tmp_path / "demo.gguf", "--to", "gguf")
    assert text.startswith(f"Wrote {tmp_path / 'demo.gguf'}: 6.8 MiB in ")
    assert_same(DEMO, tmp_path / "demo.gguf")
    result = run("convert", "demo", tmp_path / "demo.gguf", "--to", "gguf")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "is there already" in result.stderr


def test_ctrl_c_says_what_is_kept_and_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        Interrupted(patch, 40, KeyboardInterrupt())
        result = run("convert", "demo", tmp_path / "d", "--to", "hf")
    assert (result.exit_code, result.stdout) == (130, "")
    assert f"What is done is kept in {tmp_path / 'd'}.partial: repeat the command to go on." in result.stderr
    assert done("convert", "demo", tmp_path / "d", "--to", "hf").startswith("Wrote ")


def test_convert_can_cut_files_and_tell_its_plan_as_json(tmp_path: Path) -> None:
    document = json.loads(
        done("convert", "demo", tmp_path / "d", "--to", "hf", "--shard-size", "1MB", "--json")
    )
    assert len(document["files"]) > 3
    assert sorted(document["files"]) == sorted(path.name for path in (tmp_path / "d").glob("*.safetensors"))
    dry = json.loads(done("convert", "demo", tmp_path / "e", "--to", "original", "--dry-run", "--json"))
    assert (dry["target"], dry["source_layout"]) == ("original", "mxfp4")
    assert not (tmp_path / "e").exists()


def test_what_convert_cannot_do_is_told_in_a_line(tmp_path: Path) -> None:
    assert "Missing option '--to'" in refused("convert", "demo", tmp_path / "x", code=2)
    assert "'onnx' is not one of" in refused("convert", "demo", tmp_path / "x", "--to", "onnx", code=2)
    done("quantize", "demo", tmp_path / "q", "--attention", "int8")
    text = refused("convert", tmp_path / "q", tmp_path / "x", "--to", "original")
    assert "--to original would lose model.layers.0.self_attn.q_proj.weight: original/ has no int8" in text
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    text = refused("convert", tmp_path / "foreign", tmp_path / "x", "--to", "gguf")
    assert "model_type is 'llama': must be 'gpt_oss'" in text
    (tmp_path / "short.gguf").write_bytes(b"GGUF\3\0\0\0")
    assert "short.gguf is truncated" in refused(
        "convert", tmp_path / "short.gguf", tmp_path / "x", "--to", "hf"
    )
    assert "is the source itself" in refused("convert", tmp_path / "q", tmp_path / "q", "--to", "hf")
    assert not (tmp_path / "x").exists()


# inspect


def test_inspect_shows_layout_groups_and_memory() -> None:
    text = done("inspect", "demo")
    assert "layout:     mxfp4" in text
    assert "4 layers, hidden size 192, 8 experts, 4 of them for each token" in text
    assert "keys and values of 131072 tokens" in text
    rows = {line.split("  ")[0]: line.split() for line in text.partition("On a GPU")[0].splitlines()}
    assert rows["experts"][1:5] == ["16", "3,557,376", "mxfp4,", "bf16"]
    assert rows["in all"][2:4] == ["71", "6,026,240"]


def test_inspect_lists_tensors_and_checks_them(tmp_path: Path) -> None:
    text = done("inspect", "demo", "--tensors", "--checksums")
    assert "model.layers.3.mlp.experts.down_proj" in text
    assert "All 71 tensors are sound; 71 have a checksum, which is right." in text
    document: dict[str, Any] = json.loads(done("inspect", "demo", "--tensors", "--json"))
    assert document["tensors"]["lm_head.weight"] == {
        "format": "bf16",
        "shape": [4096, 192],
        "nbytes": 1572864,
    }
    assert document["nbytes"] == sum(tensor["nbytes"] for tensor in document["tensors"].values())
    assert document["config"]["num_local_experts"] == 8
    shutil.copytree(DEMO, tmp_path / "d")
    raw = bytearray((tmp_path / "d" / "model.safetensors").read_bytes())
    raw[-5] ^= 1
    (tmp_path / "d" / "model.safetensors").write_bytes(raw)
    assert "is damaged: its checksum is" in refused("inspect", tmp_path / "d", "--checksums")


def test_inspect_plans_for_a_given_gpu(tmp_path: Path) -> None:
    text = done("inspect", "demo", "--device-memory", "1GB", "--context", "4096")
    assert "On that GPU:" in text
    assert "keys and values of 4096 tokens" in text
    document = json.loads(done("inspect", "demo", "--device-memory", "500MB", "--json"))
    assert document["plan"]["fits"] is False
    result = run("inspect", "demo", "--device-memory", "500MB")
    assert result.exit_code == 1
    assert "Error: the model needs" in result.stderr
    assert "experts" in result.stdout


@pytest.mark.parametrize("command", [("inspect",), ("convert", "--to", "hf"), ("quantize",)])
def test_a_source_that_is_not_there_is_told_in_a_line(tmp_path: Path, command: tuple[str, ...]) -> None:
    name, *options = command
    destination = [tmp_path / "x"] if name != "inspect" else []
    assert "no-such-thing" in refused(name, tmp_path / "no-such-thing", *destination, *options)
