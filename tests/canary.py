"""A test that fails must be seen to fail where streamgauge is loaded, or no green run means much.

Run by itself, without pytest: a plugin that keeps tests from being run would keep a test of this
from being run too.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

TEST = """
from pathlib import Path

from streamgauge.errors import NotApplicable


def test_runs():
    Path(__file__).with_name("ran").touch()


def test_fails():
    assert False


def test_raises_what_laws_raise():
    raise NotApplicable("a reason of its own")
"""


def main() -> None:
    """Exit with a sentence where pytest says anything else than one passed, two failed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "test_canary.py"
        path.write_text(TEST)
        command = [sys.executable, "-m", "pytest", "-p", "streamgauge.plugin", "-q", str(path)]
        done = subprocess.run(
            [*command, "-p", "no:cacheprovider"],
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            check=False,
        )
        ran = path.with_name("ran").exists()
    if done.returncode != 1 or "2 failed, 1 passed" not in done.stdout or not ran:
        sys.exit(f"canary: tests are not run as they are where the plugin is loaded\n{done.stdout}")


if __name__ == "__main__":
    main()
