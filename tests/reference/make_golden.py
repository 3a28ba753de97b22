"""Write tests/golden/<case>.npz for every case of `cases.py`, with the reference interpreter.

    .venv-reference/bin/python tests/reference/make_golden.py [case ...]

Deterministic: the same versions of torch and transformers on the same kind of CPU give the same
bytes. The files are part of the repository, so that the default tests need no torch.
"""

import argparse
import pathlib
import subprocess
import sys

from cases import CASES, DENSE

HERE = pathlib.Path(__file__).resolve().parent
GOLDEN = HERE.parent / "golden"
ALL_CASES = CASES | DENSE
MAX_TOTAL_BYTES = 4_300_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help="default: all")
    names = parser.parse_args().cases or list(ALL_CASES)
    if unknown := sorted(set(names) - set(ALL_CASES)):
        parser.error(f"no case {', '.join(unknown)}; there are {', '.join(ALL_CASES)}")
    GOLDEN.mkdir(exist_ok=True)
    for name in names:
        out = GOLDEN / f"{name}.npz"
        command = [sys.executable, str(HERE / "hf_reference.py"), "run", "--case", name]
        subprocess.run([*command, "--out", str(out)], check=True)
        print(f"{out.stat().st_size:8d} bytes  {name}: {ALL_CASES[name].why}")
    total = sum(file.stat().st_size for file in GOLDEN.glob("*.npz"))
    print(f"{total:8d} bytes in all")
    if total > MAX_TOTAL_BYTES:
        raise SystemExit(f"golden files hold {total} bytes, above {MAX_TOTAL_BYTES}: shrink a case")


if __name__ == "__main__":
    main()
