"""Write requirements.lock: the versions of constraints.txt, each with the hashes of its files (`make lock`).

torch is left out, and what only its CUDA build brings: which of its builds fits is each machine's to say, and their
files differ. Everything else is held by its hash:

    pip install torch==2.13.0                      # from the index that fits
    pip install --require-hashes --no-deps -r requirements.lock
    pip install --no-deps .
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEADER = """\
# The versions of constraints.txt with the hashes of their files; made by `make lock`; without torch, see .ci/lock.py.
#   pip install --require-hashes --no-deps -r requirements.lock
"""


def main() -> None:
    """Resolve, hash and write."""
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    wanted = {name(pin) for pin in pins} - {"torch"}
    with tempfile.TemporaryDirectory() as folder:
        source, lock = Path(folder, "in.txt"), Path(folder, "out.txt")
        source.write_text("\n".join(pin for pin in pins if name(pin) in wanted) + "\n")
        options = "--quiet --generate-hashes --strip-extras --no-header --no-annotate --no-emit-index-url"
        options += " --no-emit-find-links --unsafe-package torch --unsafe-package triton --unsafe-package setuptools"
        command = [sys.executable, "-m", "piptools", "compile", *options.split(), "-o", str(lock), str(source)]
        subprocess.run(command, check=True)
        entries = re.split(r"\n(?=\S)", lock.read_text())
    kept = sorted(entry.rstrip() for entry in entries if "--hash=" in entry and name(entry) in wanted)
    missing = wanted - {name(entry) for entry in kept}
    if missing:
        sys.exit(f"No hashes for {', '.join(sorted(missing))}")
    (ROOT / "requirements.lock").write_text(HEADER + "\n".join(kept) + "\n")


def name(requirement: str) -> str:
    """`PyYAML==6.0.3` -> `pyyaml`, as PEP 503 compares names."""
    return re.sub(r"[-_.]+", "-", re.split(r"[=\s;\[]", requirement)[0]).lower()


if __name__ == "__main__":
    main()
