"""Writes an initramfs: a cpio archive in the "newc" format, uncompressed."""

import os
import pathlib
import stat

ALIGNMENT = 4


class Cpio:
    """An archive that is being made; folders on the way to an entry are added with it."""

    def __init__(self):
        self.parts = []
        self.names = set()

    def add(self, name, mode, content=b"", device=(0, 0)):
        """One entry; a name that is there already is left as it is."""
        name = name.strip("/")
        if name in self.names:
            return
        parent = os.path.dirname(name)
        if parent:
            self.add(parent, stat.S_IFDIR | 0o755)
        self.names.add(name)
        self.write(name, mode, content, device)

    def write(self, name, mode, content, device=(0, 0)):
        """The entry's header, name and content, each aligned."""
        encoded = name.encode() + b"\0"
        # inode, mode, uid, gid, links, mtime, size, device of the file, device it is, length of the name, checksum
        fields = [len(self.names), mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(encoded), 0]
        header = b"070701" + b"".join(b"%08x" % field for field in fields)
        for part in (header + encoded, content):
            self.parts.append(part + b"\0" * (-len(part) % ALIGNMENT))

    def text(self, name, content, mode=0o644):
        """A file with this text."""
        self.add(name, stat.S_IFREG | mode, content.encode())

    def folder(self, name):
        """An empty folder."""
        self.add(name, stat.S_IFDIR | 0o755)

    def link(self, name, target):
        """A symbolic link."""
        self.add(name, stat.S_IFLNK | 0o777, target.encode())

    def console(self):
        """/dev/console, which the kernel opens for init before anything is mounted."""
        self.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))

    def file(self, source, name=None):
        """A file of the machine, followed if it is a link, with its mode; under its own name or another."""
        source = pathlib.Path(source)
        mode = stat.S_IMODE(source.stat().st_mode)
        self.add(name or str(source), stat.S_IFREG | mode, source.read_bytes())

    def save(self, path):
        """Writes the archive whole or not at all."""
        self.write("TRAILER!!!", 0, b"")
        partial = path.with_suffix(".partial")
        with open(partial, "wb") as file:
            file.writelines(self.parts)
        partial.rename(path)
