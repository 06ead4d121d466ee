"""The border of the command-line programs, as a shell sees it."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]


def end(body: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    imports = "from tools._border import run\nfrom ii_dist.config import errors\n"
    code = f"{imports}def main(arguments):\n {body}\nrun(main)"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("error", "code"), [("ConfigError", 2), ("DataError", 3), ("CheckpointError", 4), ("ClusterError", 5)]
)
def test_what_a_user_can_mend_is_one_line_and_a_code(error: str, code: int) -> None:
    ended = end(f"raise errors.{error}('x.index: broken; make it again')")
    assert (ended.returncode, ended.stderr, ended.stdout) == (code, "error: x.index: broken; make it again\n", "")


def test_a_code_and_the_arguments_pass_through() -> None:
    ended = end("print(arguments); return 75", "a", "b")
    assert (ended.returncode, ended.stdout) == (75, "['a', 'b']\n")


def test_a_bug_keeps_its_traceback() -> None:
    ended = end("raise ZeroDivisionError")
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr


def test_an_interrupt_is_130() -> None:
    assert end("raise KeyboardInterrupt").returncode == 130


def test_a_reader_that_goes_away_is_no_error() -> None:
    body = "[print('x' * 100) for _ in range(100000)]; return 0"
    code = f"from tools._border import run\ndef main(_):\n {body}\nrun(main)"
    writer = subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert writer.stdout
    assert writer.stderr
    writer.stdout.readline()
    writer.stdout.close()
    assert writer.wait(20) == 0
    assert writer.stderr.read() == ""
    writer.stderr.close()
