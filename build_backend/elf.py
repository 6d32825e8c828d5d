"""What a 64-bit ELF shared object needs and leaves undefined; readelf may not be installed."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

SHT_DYNAMIC, SHT_DYNSYM, SHT_VERNEED = 6, 11, 0x6FFFFFFE
SHT_VERSYM = 0x6FFFFFFF
DT_NEEDED = 1
STB_WEAK = 2


@dataclass(frozen=True)
class Elf:
    needed: list[str]  # DT_NEEDED: libraries loaded with it
    undefined: list[str]  # undefined symbols that are neither weak nor bound to a library's version
    versions: list[str]  # symbol versions asked of libraries, e.g. GLIBC_2.17
    defined: list[str]  # symbols it exports


def read_elf(path: Path) -> Elf:
    data = path.read_bytes()
    if data[:4] != b"\x7fELF" or data[4] != 2 or data[5] != 1:
        raise ValueError(f"{path}: not a 64-bit little-endian ELF file")
    offset, = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    # name, type, flags, address, offset, size, link, info, alignment, entry size
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, offset + i * size) for i in range(count)]

    def text(table: int, at: int) -> str:
        start = sections[table][4] + at
        return data[start : data.index(b"\0", start)].decode()

    needed, versions = [], []
    undefined, defined = [], []
    versym = next((s for s in sections if s[1] == SHT_VERSYM), None)
    for _, kind, _, _, start, length, link, info, _, _ in sections:
        if kind == SHT_DYNAMIC:
            for at in range(start, start + length, 16):
                tag, value = struct.unpack_from("<QQ", data, at)
                if tag == DT_NEEDED:
                    needed.append(text(link, value))
        elif kind == SHT_VERNEED:
            at = start
            for _ in range(info):
                _, n, _, aux, following = struct.unpack_from("<HHIII", data, at)
                entry = at + aux
                for _ in range(n):
                    _, _, _, name, step = struct.unpack_from("<IHHII", data, entry)
                    versions.append(text(link, name))
                    entry += step
                at += following
        elif kind == SHT_DYNSYM:
            for i in range(1, length // 24):
                name, flags, _, home, _, _ = struct.unpack_from("<IBBHQQ", data, start + 24 * i)
                if home != 0:
                    defined.append(text(link, name))
                    continue
                version = struct.unpack_from("<H", data, versym[4] + 2 * i)[0] & 0x7FFF if versym else 0
                if flags >> 4 != STB_WEAK and version < 2:
                    undefined.append(text(link, name))
    return Elf(needed, undefined, sorted(set(versions)), defined)
