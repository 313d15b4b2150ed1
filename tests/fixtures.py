"""Where the golden data lie: the folder named by GPTOSS_LITE_FIXTURES, by default the copy in tests/data."""

import os
from pathlib import Path

FIXTURES = Path(os.environ.get("GPTOSS_LITE_FIXTURES", Path(__file__).parent / "data"))
LAYOUTS = sorted(path.parent for path in FIXTURES.glob("checkpoints/*/*/config.json"))
assert LAYOUTS, f"no checkpoints under {FIXTURES}: set GPTOSS_LITE_FIXTURES to a folder that has them"
