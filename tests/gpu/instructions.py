"""Instructions for each coordinate of the kernels that most gradients take, counted in the machine code.

python tests/gpu/instructions.py [cuobjdump] compiles for sm_90 what 4 bits fitted have, words of 3 to 5 bits, with
these numbers put in as constants, and left out what they do not need: norms beyond 2^-80 to 2^80, targets that hold a
sum already, and divisions by an even number. All that stands before the first cold block counts once, and what a loop
over payloads holds as often as there are payloads. These are static counts, not times.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile

from hvd_qgenx.backends.cuda import nvrtc

COORDINATES = 32  # of a lane
PAYLOADS = 3
CONSTANTS = {
    "book.depth": "5", "book.shortest": "3", "is_plain(r.norm)": "true", "job.num_payloads": "3",
    "todo & ADD": "0", "job.inverse > 0.0": "true",
}  # fmt: skip
#: Of the report beside the bytes: how often each index was drawn, and the two sums.
BYTES_ALONE = {
    "double error = squares_of<false>(v, group, room.carry);": "double error = 0.0;",
    "counts.recent += words[0] + words[1];": "",
    "count_few(own, group.lane, counts);": "",
}


def machine_code(cuobjdump: str, changes: dict[str, str]) -> dict[str, list[tuple[int, str]]]:
    """Addresses and instructions of each kernel, of the source with these texts changed."""
    original = nvrtc.source()
    changed = {name: text.decode() for name, text in original.items()}
    for old, new in changes.items():
        assert any(old in text for text in changed.values()), old
        changed = {name: text.replace(old, new) for name, text in changed.items()}
    nvrtc.source = lambda: {name: text.encode() for name, text in changed.items()}  # type: ignore[assignment]
    try:
        code = nvrtc.compile_for("sm_90")["CUBIN"]
    finally:
        nvrtc.source = lambda: original  # type: ignore[assignment]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        text = subprocess.run([cuobjdump, "-sass", file.name], check=True, capture_output=True, text=True).stdout
    pattern = r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\d+ )?([^;]*);"
    return {
        part.split()[0]: [(int(at, 16), name) for at, name in re.findall(pattern, part) if not name.startswith("NOP")]
        for part in text.split("Function : ")[1:]
    }


def count(code: list[tuple[int, str]], turns: int = 1) -> float:
    """Instructions for each coordinate before the first cold block; the longest loop counts ``turns`` times."""
    cold = [at for at, name in code if "WARPSYNC.COLLECTIVE" in name]
    end = min(cold) if cold else code[-1][0]
    hot = [(at, name) for at, name in code if at < end]
    jumps = [(int(to[1], 16), at) for at, name in hot if (to := re.search(r"BRA .*?0x([0-9a-f]+)", name))]
    longest = max((sum(start <= at <= stop for at, _ in hot) for start, stop in jumps if start < stop), default=0)
    return (len(hot) + (turns - 1) * longest) / COORDINATES


def counts(cuobjdump: str, changes: dict[str, str] | None = None) -> dict[str, float]:
    """Instructions for each coordinate of the frequent kernels; of the mean of three payloads in all."""
    code = machine_code(cuobjdump, CONSTANTS | (changes or {}))
    turns = {"encode_few": 1, "encode_uniform": 1, "decode_few": PAYLOADS}
    return {kernel: count(code[kernel], number) for kernel, number in turns.items()}


def main() -> None:
    cuobjdump = sys.argv[1] if len(sys.argv) > 1 else "cuobjdump"
    whole, alone = counts(cuobjdump), counts(cuobjdump, BYTES_ALONE)
    for kernel in ("encode_few", "encode_uniform"):
        print(f"{kernel}: {whole[kernel]:.0f}; its bytes alone {alone[kernel]:.0f}")
    print(f"decode_few of {PAYLOADS}: {whole['decode_few']:.0f}")


if __name__ == "__main__":
    main()
