"""Writes a kernel's file together with its launches, found as the toolkit finds them: in the preprocessed source."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

HEAD = """#include "{kernel}"
#include <cstdio>
#include <cstring>
#include "emu/host.h"
extern "C" int emu_launch(const char*, int, int, uint64_t, const uint64_t*, int, char*, uint64_t);
template <typename T>
static uint64_t word(T value) {{ uint64_t w = 0; std::memcpy(&w, &value, sizeof(T)); return w; }}
"""
LAUNCH = """EMU_KERNEL({name})
extern "C" uint32_t aclrtlaunch_{name}(uint32_t blocks, void*{parameters}) {{
  const uint64_t words[] = {{{words}}};
  char text[2000];
  if (emu_launch("{name}", AscendC::{kind}, int(blocks), 7, words, {count}, text, sizeof(text)) == 0) return 0;
  std::fprintf(stderr, "%s\\n", text);
  return 1;
}}
"""


def main(compiler: str, include: str, kernel: str, target: str) -> None:
    command = [compiler, "-std=c++17", "-E", "-P", f"-I{include}", kernel]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kinds = re.findall(r"declare_kernel_type\(AscendC::(KERNEL_TYPE_\w+)", text)
    kernels = re.findall(r'extern "C"\s+void (\w+)\(([^)]*)\)', text)
    parts = [HEAD.format(kernel=kernel)]
    for (name, given), kind in zip(kernels, kinds, strict=True):
        types = [re.sub(r"\s+", " ", parameter).strip().rpartition(" ")[0] for parameter in given.split(",")]
        types = ["void*" if "*" in kind_ or kind_ == "GM_ADDR" else kind_ for kind_ in types]
        parameters = "".join(f", {kind_} a{i}" for i, kind_ in enumerate(types))
        words = ", ".join(f"word(a{i})" for i in range(len(types)))
        parts.append(LAUNCH.format(name=name, parameters=parameters, words=words, count=len(types), kind=kind))
    Path(target).write_text("".join(parts))


if __name__ == "__main__":
    main(*sys.argv[1:])
