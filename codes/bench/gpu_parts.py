"""A file in parts that are small enough to be fetched, and what joins them again."""

from pathlib import Path

from spacte.files import sha256


def cut(path: Path, folder: Path, size: int) -> None:
    """Cut a file into parts of at most `size` bytes, <name>.part-000, ..., beside which lies <name>.sha256.

    The folder's join.sh joins all files that were cut into it, and checks the results.
    """
    with open(path, "rb") as file:
        for number, part in enumerate(iter(lambda: file.read(size), b"")):
            (folder / f"{path.name}.part-{number:03}").write_bytes(part)
    (folder / f"{path.name}.sha256").write_text(f"{sha256(path)}  {path.name}\n")
    names = sorted(one.name.removesuffix(".sha256") for one in folder.glob("*.sha256"))
    lines = [f"cat {name}.part-* > {name}; sha256sum -c {name}.sha256\n" for name in names]
    (folder / "join.sh").write_text("".join(lines))
