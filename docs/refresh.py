"""Rewrites what is generated in the documents: docs/passes.md, and the demo's output in README.md.

python docs/refresh.py           # docs/passes.md, at once
python docs/refresh.py --demo    # and the demo, which compiles: about a minute on a machine that is idle
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from page import fill

from effopt.commands.passes import as_markdown
from effopt.plugins.manager import build_registry

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
START, END = "<!-- demo: written by docs/refresh.py -->", "<!-- end of demo -->"
COMMAND = "import sys; sys.argv[0] = 'effopt'; from effopt.cli import main; sys.exit(main())"


def passes() -> None:
    registry = build_registry()
    if registry.faults:
        raise SystemExit("\n".join(registry.faults))
    (ROOT / "docs" / "passes.md").write_text(as_markdown(registry), encoding="utf-8")


def demo() -> None:
    page = ROOT / "effopt_report.html"
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "demo"], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    shown = done.stdout.decode().replace(str(page), page.name)
    text = "\n".join(line.rstrip() for line in shown.splitlines())
    fill(README, START, f"```text\n{text}\n```", END)


if __name__ == "__main__":
    passes()
    if "--demo" in sys.argv:
        demo()
