"""The commands as people and pipes meet them: what is printed, where, and the exit code."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest
from click.testing import CliRunner, Result

import gptoss_lite as gl
from gptoss_lite.cli.main import COMMANDS, main
from gptoss_lite.cli.printing import Printer, printable
from gptoss_lite.cli.progress import Bar, stream
from gptoss_lite.harmony.messages import Message
from gptoss_lite.stream import GenerationEvent, Usage

COMMAND = [sys.executable, "-c", "from gptoss_lite.cli.main import main; main(prog_name='gptoss-lite')"]
# Python must not be unbuffered: what a failed write leaves in the buffer is the case to be tested.
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
REFERENCE = ["--device", "reference", "--seed", "1", "--max-tokens", "300"]  # no kernels to compile


def run(*arguments: str, stdin: str | bytes = "") -> Result:
    return CliRunner().invoke(main, arguments, input=stdin)


def event(channel: str | None, text: str, **more: Any) -> GenerationEvent:
    return GenerationEvent(channel=channel, text=text, token=1, **more)


def answer(reasoning: str, final: str, reason: str = "stop") -> list[GenerationEvent]:
    usage = Usage(prompt_tokens=4, cached_tokens=0, completion_tokens=2, reasoning_tokens=1, seed=7)
    messages = (
        Message("assistant", (reasoning,), channel="analysis"),
        Message("assistant", (final,), channel="final"),
    )
    last = event("final", "", finish_reason=reason, usage=usage, messages=messages)
    return [event("analysis", reasoning), *([event("final", final)] if final else []), last]


@dataclass
class Script:
    """Stands in for a model: gives out answers and notes what it was asked."""

    answers: list[list[GenerationEvent] | gl.GptOssError] = field(default_factory=list)
    prompts: list[str | None] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)

    def stream(
        self, _model: Any, _tokenizer: Any, prompt: str | None = None, **request: Any
    ) -> Iterator[GenerationEvent]:
        self.prompts.append(prompt)
        self.requests.append(request)
        following = self.answers.pop(0)
        if isinstance(following, gl.GptOssError):
            raise following
        yield from following


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    script = Script()
    model = SimpleNamespace(ops=SimpleNamespace(name="none"))
    monkeypatch.setattr(gl, "load", lambda *_, **__: (model, None))
    monkeypatch.setattr(gl, "stream_generate", script.stream)
    monkeypatch.setattr("gptoss_lite.engine.Engine", lambda *_, **__: object())
    return script


class Terminal:
    """A command on a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "NO_COLOR": ""}
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's `&` has it ignored
        )
        os.close(slave)
        self.text = ""

    def read(self, until: str | None = None, each_second: Callable[[], None] = lambda: None) -> str:
        """Return what is printed from here until a text has come, or until the end."""
        start, deadline = len(self.text), time.monotonic() + 60
        while until is None or until not in self.text[start:]:
            assert time.monotonic() < deadline, f"{until!r} did not come: {self.text[-200:]!r}"
            if not select.select([self._master], [], [], 1)[0]:
                each_second()
                continue
            try:
                data = os.read(self._master, 4096)
            except OSError:  # Linux's way to say that the other end is closed
                data = b""
            if not data:
                assert until is None, f"{until!r} did not come: {self.text[-200:]!r}"
                break
            self.text += data.decode(errors="replace")
        return self.text[start:]

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def finish(self) -> tuple[str, int]:
        """Return what is still printed, and the exit code."""
        return self.read(), self.process.wait(timeout=60)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"{command} [OPTIONS]" in result.output
    assert "-h, --help" in result.output


def test_help_tells_commands_and_exit_codes_at_once() -> None:
    start = time.perf_counter()
    done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - start
    print(f"--help took {seconds:.2f} s, of which 0.5 s are wanted")
    assert all(word in done.stdout for word in [*COMMANDS, "130", "141"])
    assert seconds < 2


def test_version_is_the_packages() -> None:
    assert run("--version").output == f"gptoss-lite, version {gl.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["nonsense"], 2, "No such command 'nonsense'"),
        (["generate", "a", "--nonsense"], 2, "No such option"),
        (["generate", "a", "--device", "abacus"], 2, "'abacus' is not one of"),
        (["generate", "a", "--device", "cuda:one"], 2, "'cuda:one' is not one of"),
        (["generate", "a", "--device-memory", "8 apples"], 2, "'8 apples' is no size of memory"),
        (["generate", "a", "--cache-tokens", "0"], 2, "x>=1"),
        (["generate", "a", "--threads", "0"], 2, "x>=1"),
        (["generate", "a", "--max-tokens", "0"], 2, "x>=1"),
        (["generate", "a", "--reasoning", "deep"], 2, "'deep' is not one of"),
        (["generate", "a", "--date", "yesterday"], 2, "does not match the format"),
        (["generate", "a", "--temperature", "-1"], 2, "temperature is -1.0"),
        (["generate", "a", "--temperature", "nan"], 2, "temperature is nan"),
        (["generate", "a", "--logit-bias", "the=1"], 2, "'the=1' is not a token id"),
        (["generate", "a", "--raw", "--reasoning", "low"], 2, "--raw is no chat"),
        (["generate", "a", "--logprobs", "1"], 2, "printed by --json"),
        (["generate", "\udcff"], 2, "not UTF-8 at character 0"),
        (["generate", "a", "--stop", "b\udcff"], 2, "not UTF-8 at character 1"),
        (["generate", ""], 1, "the prompt is empty"),
        (["generate", "-"], 1, "the prompt is empty"),
        (["generate", "a", "--model", "/no/such/folder"], 1, "/no/such/folder"),
        (["chat", "--model", "/no/such/folder"], 1, "/no/such/folder"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(arguments: list[str], code: int, text: str) -> None:
    result = run(*arguments)
    assert result.exit_code == code
    assert result.stdout == ""
    assert text in result.stderr.splitlines()[-1]
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    assert code == 2 or result.stderr.count("\n") == 1


def test_standard_input_that_is_not_utf8_is_an_error_that_names_the_byte() -> None:
    result = run("generate", stdin=b"caf\xe9 au lait")
    assert result.exit_code == 1
    assert result.stderr == "Error: standard input is not UTF-8: byte 0xe9 at position 3\n"


def test_a_bug_keeps_its_traceback(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gl, "load", lambda *_, **__: 1 / 0)
    assert isinstance(run("generate", "a").exception, ZeroDivisionError)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (gl.CheckpointError("x: damaged"), 1, "Error: x: damaged\n"),
        (MemoryError(), 1, "Error: out of memory\n"),
        (PermissionError(13, "Permission denied", "x.json"), 1, "Error: x.json: Permission denied\n"),
        (KeyboardInterrupt(), 130, "\n"),
    ],
)
def test_an_error_becomes_a_line_and_a_code(
    script: Script, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, text: str
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(gl, "load", load)
    result = run("generate", "a")
    assert (result.exit_code, result.stderr) == (code, text)


@pytest.mark.parametrize("arguments", [["Hello"], [], ["-"]])
def test_a_pipe_gets_the_answer_alone(script: Script, arguments: list[str]) -> None:
    script.answers = [answer("Think.", "Hi!")]
    result = run("generate", *arguments, stdin="Hello\n")
    assert (result.stdout, result.stderr) == ("Hi!\n", "")
    assert script.requests[0]["messages"] == [{"role": "user", "content": "Hello"}]


def test_an_answer_that_ends_its_own_line_gets_no_second_line_end(script: Script) -> None:
    script.answers = [answer("", "Hi!\n")]
    assert run("generate", "a").stdout == "Hi!\n"


def test_a_tool_call_is_no_answer(script: Script) -> None:
    script.answers = [[event("commentary", "{}", recipient="functions.f"), *answer("", "Hi!")]]
    assert run("generate", "a").stdout == "Hi!\n"


def test_reasoning_that_uses_up_the_tokens_is_told(script: Script) -> None:
    script.answers = [answer("Think", "", reason="length")]
    result = run("generate", "a")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == "Note: the token limit was reached before the answer.\n"


def test_options_reach_the_library(script: Script) -> None:
    script.answers = [answer("", "")]
    sampling = ["--temperature", "0.5", "--top-k", "3", "--seed", "9", "--logit-bias", "5=-inf"]
    chat = ["--reasoning", "high", "--instructions", "Be brief.", "--date", "2025-08-05"]
    result = run("generate", "a", *sampling, *chat, "--max-tokens", "8", "--stop", "x", "--stop", "y")
    assert result.exit_code == 0, result.output
    request = script.requests[0]
    assert request["sampling"] == gl.SamplingParams(
        temperature=0.5, top_k=3, seed=9, logit_bias={5: float("-inf")}
    )
    assert (request["reasoning_effort"], request["instructions"]) == ("high", "Be brief.")
    assert (str(request["date"]), request["max_tokens"], request["stop"]) == ("2025-08-05", 8, ("x", "y"))


def test_raw_is_a_plain_completion(script: Script) -> None:
    script.answers = [[event(None, " upon", finish_reason="length", usage=answer("", "")[-1].usage)]]
    assert run("generate", "Once", "--raw").stdout == " upon\n"
    assert script.prompts == ["Once"]
    assert script.requests[0]["messages"] is None


def test_verbose_tells_figures_on_standard_error(script: Script) -> None:
    script.answers = [answer("", "Hi!")]
    result = run("generate", "a", "--verbose")
    assert result.stdout == "Hi!\n"
    names = [line.split(":")[0] for line in result.stderr.splitlines()]
    assert names == ["device", "load", "first token", "prompt", "generation", "peak memory", "seed"]


def test_control_characters_are_made_visible() -> None:
    assert printable("a\x1b[31m\x07\x9b\x7f\tb\r\nc\x00") == "a\u241b[31m\u2407\ufffd\u2421\tb\nc\u2400"


def test_a_terminal_gets_reasoning_dimmed_and_no_raw_control_characters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    printer = Printer()
    for each in answer("Think\x1b]0;title\x07", "Hi\x1b[2J!"):
        printer.show(each)
    printer.finish()
    assert capsys.readouterr().out == "\x1b[2mThink\u241b]0;title\u2407\x1b[0m\n\nHi\u241b[2J!\n"


def test_chat_keeps_the_conversation_and_forgets_it_on_reset(script: Script) -> None:
    script.answers = [answer("r1", "Hi!"), answer("r2", "Bye!"), answer("r3", "Oh!")]
    result = run("chat", stdin="Hello\n\nGo\n/reset\n/reasoning low\nWho?\n/exit\nunread\n")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Hi!\nBye!\nOh!\n", "")
    assert [len(request["messages"]) for request in script.requests] == [1, 4, 1]
    assert script.requests[1]["messages"][1:3] == list(answer("r1", "Hi!")[-1].messages or ())
    assert script.requests[0]["engine"] is script.requests[2]["engine"]
    assert "reasoning_effort" not in script.requests[1]
    assert script.requests[2]["reasoning_effort"] == "low"


@pytest.mark.parametrize(
    "line", ["/nonsense", "/reasoning deep", "/save", "/save /no/such/folder/file", "/save /", "caf\udce9"]
)
def test_chat_survives_a_wrong_line(script: Script, line: str) -> None:
    script.answers = [answer("", "Hi!")]
    result = run("chat", stdin=f"{line}\nHello\n".encode(errors="surrogateescape"))
    assert (result.exit_code, result.stdout) == (0, "Hi!\n")
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1


def test_chat_goes_on_after_a_full_context(script: Script) -> None:
    script.answers = [gl.RequestError("the prompt has 9 tokens"), answer("", "Hi!")]
    result = run("chat", stdin="Long\nShort\n")
    assert (result.stdout, result.stderr) == ("Hi!\n", "Error: the prompt has 9 tokens\n")
    assert script.requests[1]["messages"] == [{"role": "user", "content": "Short"}]


def test_chat_saves_the_conversation_whole(script: Script, tmp_path: Path) -> None:
    script.answers = [answer("Think.", "Grüezi!")]
    saved = tmp_path / "saved file.jsonl"
    assert run("chat", stdin=f"Hello\n/save {saved}\n").exit_code == 0
    assert [json.loads(line) for line in saved.read_text().splitlines()] == [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "channel": "analysis", "content": "Think."},
        {"role": "assistant", "channel": "final", "content": "Grüezi!"},
    ]
    assert list(tmp_path.iterdir()) == [saved]


def test_demo_answers_and_a_seed_fixes_it() -> None:
    arguments = "generate", "Hello", "--seed", "1", "--max-tokens", "300"
    first, second = run(*arguments), run(*arguments)
    assert first.exit_code == 0, first.output
    assert first.stdout.strip()
    assert first.stdout == second.stdout


def test_json_is_one_object_per_line_and_then_the_usage() -> None:
    result = run("generate", "Hello", "--seed", "1", "--max-tokens", "5", "--json", "--logprobs", "2")
    assert result.exit_code == 0, result.output
    *events, usage = map(json.loads, result.stdout.splitlines())
    assert len(events) >= 5
    assert {"channel", "text", "token", "logprob", "finish_reason"} <= events[0].keys()
    assert all(len(line["top_logprobs"]) == 2 and line["logprob"] <= 0 for line in events[:5])
    assert events[-1]["finish_reason"] == "length"
    assert usage["usage"]["completion_tokens"] == 5
    assert usage["usage"]["seed"] == 1


def test_chat_computes_only_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    usages = []
    stream = gl.stream_generate

    def watched(*arguments: Any, **request: Any) -> Iterator[GenerationEvent]:
        for each in stream(*arguments, **request):
            usages.append(each.usage)
            yield each

    monkeypatch.setattr(gl, "stream_generate", watched)
    result = run("chat", "--seed", "1", "--max-tokens", "60", stdin="Hello\nAnd then?\n")
    assert (result.exit_code, result.stderr.count("Error")) == (0, 0), result.output
    first, second = [usage for usage in usages if usage]
    assert first.cached_tokens == 0
    assert second.cached_tokens >= first.prompt_tokens // 16 * 16 > 0


def test_a_terminal_shows_reasoning_dimmed_and_then_the_answer() -> None:
    arguments = ["generate", "Hello", *REFERENCE]
    with Terminal(*arguments) as terminal:
        terminal.read(until="\x1b[2m")
        text, code = terminal.finish()
    _, _, final = text.replace("\r\n", "\n").rpartition("\x1b[0m")
    assert code == 0
    assert final.startswith("\n\n")
    assert final.strip() == run(*arguments).stdout.strip()


def test_interrupt_ends_generate_with_130_and_a_clean_terminal() -> None:
    with Terminal("generate", "Hello", *REFERENCE) as terminal:
        terminal.read(until="\x1b[2m")
        terminal.interrupt()
        rest, code = terminal.finish()
    assert code == 130
    assert rest.endswith("\r\n")
    assert "Traceback" not in rest


def test_interrupt_stops_an_answer_and_not_the_chat() -> None:
    with Terminal("chat", *REFERENCE) as terminal:
        terminal.read(until="> ")
        terminal.type("Tell me a story about the sea.\n")
        terminal.read(until="\x1b[2m")
        terminal.interrupt()
        terminal.read(until="> ")
        terminal.interrupt()
        # Between showing its prompt and waiting for a key, input() is deaf to a signal: try again.
        terminal.read(until="Leave with /exit or Ctrl-D.\r\n> ", each_second=terminal.interrupt)
        terminal.type("\x04")
        _, code = terminal.finish()
    assert code == 0
    assert "Traceback" not in terminal.text


def test_a_closed_pipe_ends_quietly() -> None:
    command = [*COMMAND, "generate", "Once", "--raw", *REFERENCE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=BUFFERED) as process:
        assert process.stdout and process.stderr
        process.stdout.read(1)
        process.stdout.close()
        assert process.wait(timeout=60) == 141
        assert process.stderr.read() == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told_in_one_line() -> None:
    command = [*COMMAND, "generate", "Once", "--raw", *REFERENCE]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=BUFFERED, text=True)
    assert (done.returncode, done.stderr) == (1, "Error: No space left on device\n")


def test_a_bar_appears_after_a_second_and_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    shown.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr("gptoss_lite.cli.progress.PATIENCE", 0.05)
    with Bar("Quick") as bar:
        bar.advance(1, 2)
    assert shown.getvalue() == ""
    with Bar("Slow") as bar:
        bar.advance(3, 7)
        deadline = time.monotonic() + 10
        while "Slow" not in shown.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
        bar.close()
        text = shown.getvalue()
        bar.advance(4, 7)
    assert "Slow" in text and "3/7" in text
    assert shown.getvalue() == text


def test_interrupt_stops_a_prompt_that_is_being_read(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted = threading.Event()

    def reading(*_: Any, prompt_progress: Any, **__: Any) -> Iterator[GenerationEvent]:
        prompt_progress(1, 3)
        interrupted.set()
        prompt_progress(2, 3)
        yield event("final", "never")

    monkeypatch.setattr(gl, "stream_generate", reading)
    assert list(stream((None, None), "x", interrupted=interrupted)) == []  # type: ignore[arg-type]


def test_save_follows_links_and_leaves_alone_what_is_no_file(script: Script, tmp_path: Path) -> None:
    target, link, fifo = tmp_path / "target", tmp_path / "link", tmp_path / "fifo"
    target.write_text("old")
    link.symlink_to(target)
    os.mkfifo(fifo)
    script.answers = [answer("r", "Hi!")]
    lines = "Hello", f"/save {link}", f"/save {fifo}", "/save a\0b", "/save", "/reasoning much", "/exit"
    result = run("chat", stdin="\n".join(lines))
    assert link.is_symlink() and "Hi!" in target.read_text()
    assert fifo.is_fifo()
    assert result.exit_code == 0
    assert len(result.stderr.splitlines()) == 4
    for text in ("not a file", "null byte", "/save takes", "/reasoning takes"):
        assert text in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "link", "target"]


def test_an_error_is_one_short_line_whatever_names_are_in_it(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise gl.CheckpointError("tensor \x1b]0;owned\x07\nError: fake" + "x" * 5000)

    monkeypatch.setattr(gl, "load", load)
    result = run("generate", "Hi")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "\x1b" not in result.stderr and "\x07" not in result.stderr
    assert len(result.stderr) < 700


def test_an_empty_stop_is_a_usage_error(script: Script) -> None:
    assert run("generate", "Hi", "--stop=").exit_code == 2


def test_a_closed_standard_error_does_not_matter() -> None:
    arguments = ["generate", "--raw", "Once", "--max-tokens", "3", *REFERENCE[:4]]
    shell = ["sh", "-c", 'exec "$@" 2>&-', "sh"]
    done = subprocess.run([*shell, *COMMAND, *arguments], stdout=subprocess.PIPE, timeout=60)
    assert done.returncode == 0
    assert done.stdout


@pytest.mark.usefixtures("needs_compiler")
def test_the_cuda_path_answers_with_a_bound_on_its_memory() -> None:
    options = (
        "--device",
        "emulated",
        "--device-memory",
        "700MB",
        "--cache-tokens",
        "512",
        "--max-tokens",
        "4",
    )
    result = run("generate", "Hello", *options, "--seed", "1", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["usage"]["completion_tokens"] == 4


@pytest.mark.usefixtures("needs_compiler")
def test_what_does_not_fit_a_device_is_told_with_what_would() -> None:
    result = run("generate", "Hello", "--device", "emulated", "--device-memory", "650MB")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: the model needs")
    assert "--cache-tokens" in result.stderr
    assert result.stderr.count("\n") == 1
