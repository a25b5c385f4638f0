"""What is booted: the hypervisor, the kernel as an ELF file, and the initramfs of dom0 and of the guest."""

import gzip
import lzma
import re
import shutil
import struct
import subprocess
import os

from .cache import OWN_FILES, REPOSITORY
from .cpio import Cpio
from .errors import LabError

XEN_BIN = "usr/lib/xen-4.17/bin"
XEN_PYTHON = "usr/lib/xen-4.17/lib/python"
PYTHON = "usr/lib/python3.11"

DOM0_PROGRAMS = [
    *[f"{XEN_BIN}/{name}" for name in ("xl", "xenstored", "xenconsoled", "xen-init-dom0", "libxl-save-helper")],
    f"{XEN_BIN}/xentop",
    "usr/bin/xenstore",
    "usr/bin/socat",
    "usr/bin/strace",
    "usr/bin/python3.11",
]
# Not linked by anything, but loaded by pthread_cancel, which xl calls.
DOM0_LIBRARIES = ["lib/x86_64-linux-gnu/libgcc_s.so.1"]
# Large parts of Python's library that nothing in dom0 asks for.
PYTHON_LEFT_OUT = ("ensurepip", "idlelib", "lib2to3", "tkinter", "pydoc_data", "test", "distutils", "__pycache__")
DOM0_MODULES = [
    "xen-privcmd",
    "xen-evtchn",
    "xen-gntdev",
    "xen-gntalloc",
    "xenfs",
    "virtio_pci",
    "virtio_net",
    "9p",
    "9pnet_virtio",
]
DOM0_FOLDERS = [
    *("proc", "sys", "dev", "run", "tmp", "root", "lab", "bin", "sbin", "etc/xen"),
    *("var/lib/xen", "var/lock", "var/log/xen/console", "usr/bin", "usr/sbin"),
]
STATIC_TARGET = "x86_64-unknown-linux-gnu"


def build(cache, say):
    """Makes all images anew; takes a few seconds beside the compilation of the guest's program."""
    cache.images.mkdir(parents=True, exist_ok=True)
    guest_program = build_static("lab-guest", say)
    say("building the images")
    kernel = one(cache.debian / "boot", "vmlinuz-*")
    elf = kernel_elf(kernel.read_bytes())
    (cache.images / "vmlinux").write_bytes(elf)
    (cache.images / "vmlinux.gz").write_bytes(gzip.compress(elf, 1, mtime=0))
    hypervisor = one(cache.debian / "boot", "xen-4.17-amd64.gz")
    (cache.images / "xen").write_bytes(gzip.decompress(hypervisor.read_bytes()))
    guest_image(guest_program).save(cache.images / "guest.cpio")
    dom0_image(cache).save(cache.images / "dom0.cpio")


def is_built(cache):
    """Whether the images are there; dom0's is written last."""
    return (cache.images / "dom0.cpio").exists()


def one(folder, pattern):
    """The file of this pattern; there must be one."""
    found = sorted(folder.glob(pattern))
    if not found:
        raise LabError(f"{folder}/{pattern} is missing: delete {folder.parent} and call `tools/xenlab fetch` again")
    return found[-1]


def build_static(binary, say):
    """Compiles a program of this package so that it runs in a dom0 or guest without any library; returns its path."""
    if not shutil.which("cargo"):
        raise LabError("cargo is missing: install a Rust toolchain")
    say(f"compiling {binary}, static")
    folder = REPOSITORY / "target" / "static"
    settings = {"RUSTFLAGS": "-C target-feature=+crt-static", "CARGO_PROFILE_RELEASE_STRIP": "debuginfo"}
    command = ["cargo", "build", "--release", "--quiet", "--target", STATIC_TARGET, "--target-dir", folder]
    done = subprocess.run([*command, "--bin", binary], cwd=REPOSITORY, env=dict(os.environ, **settings), stdout=2)
    if done.returncode != 0:
        raise LabError(f"{binary} does not compile: see above")
    return folder / STATIC_TARGET / "release" / binary


def kernel_elf(image):
    """The kernel proper out of a bzImage. Where it lies is in the boot protocol's header (Linux,
    Documentation/arch/x86/boot.rst). xz is unpacked here because the toolstack in dom0 is slow at it."""
    if image[0x202:0x206] != b"HdrS":
        setup_magic = image[0x202:0x206]
        raise LabError(f"the kernel is no bzImage: its header is {setup_magic!r}")
    setup_sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    begin = (setup_sectors + 1) * 512 + offset
    payload = image[begin : begin + length]
    if not payload.startswith(b"\xfd7zXZ\0"):
        raise LabError("the kernel is not packed with xz, as Debian 12's is")
    return lzma.LZMADecompressor().decompress(payload)


def guest_image(program):
    """The guest's initramfs: one program."""
    image = Cpio()
    image.console()
    for folder in ("proc", "sys"):
        image.folder(folder)
    image.file(program, "init")
    return image


def dom0_image(cache):
    """dom0's initramfs: the toolstack with its libraries, busybox, Python, modules and the lab's own scripts."""
    image = Cpio()
    image.console()
    root = cache.debian
    image.file(root / "bin/busybox", "bin/busybox")
    for program in DOM0_PROGRAMS:
        image.file(root / program, program)
    for source in library_closure(root, [*DOM0_PROGRAMS, *python_extensions(root)]) + DOM0_LIBRARIES:
        image.file(root / source, source)
    image.link("lib64", "lib/x86_64-linux-gnu")
    image.link("usr/bin/python3", "python3.11")
    add_python(image, root)
    add_modules(image, root)
    for folder in DOM0_FOLDERS:
        image.folder(folder)
    image.file(root / "etc/xen/xl.conf", "etc/xen/xl.conf")
    image.text("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n")
    image.text("etc/group", "root:x:0:\n")
    for script in sorted((OWN_FILES / "dom0").iterdir()):
        image.file(script, "init" if script.name == "init" else f"usr/sbin/{script.name}")
    for name in ("vmlinux.gz", "guest.cpio"):
        image.file(cache.images / name, f"guest/{name}")
    return image


def python_extensions(root):
    """Python's compiled modules."""
    return [str(path.relative_to(root)) for path in sorted((root / PYTHON / "lib-dynload").glob("*.so"))]


def add_python(image, root):
    """Python's library, and Xen's verifier of migration streams."""
    for folder in (root / PYTHON, root / XEN_PYTHON):
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not set(PYTHON_LEFT_OUT) & set(path.relative_to(root).parts):
                image.file(path, str(path.relative_to(root)))
    image.file(root / XEN_BIN / "verify-stream-v2", f"{XEN_BIN}/verify-stream-v2")


def library_closure(root, programs):
    """The libraries that the programs need, resolved among the unpacked packages by their own loader."""
    needed = set()
    for program in programs:
        listing = subprocess.run([*loader(root), "--list", root / program], capture_output=True, text=True)
        for line in listing.stdout.splitlines():
            path = line.split("=>")[-1].split(" (")[0].strip()
            if "not found" in line:
                raise LabError(f"{program} lacks a library: {line.strip()}")
            if path.startswith(str(root)):
                needed.add(os.path.relpath(path, root))
    needed.add("lib/x86_64-linux-gnu/ld-linux-x86-64.so.2")
    return sorted(needed)


def loader(root):
    """The command that runs a program of the unpacked packages with their libraries, not the machine's."""
    places = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu/nss"]
    path = ":".join(str(root / place) for place in places)
    return [root / "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2", "--library-path", path]


def add_modules(image, root):
    """The modules that dom0 loads, and a list of them in the order in which they can be."""
    folder = one(root / "lib/modules", "*")
    files = {path.stem.replace("-", "_"): path for path in folder.rglob("*.ko")}
    ordered = []

    def place(name):
        if name in ordered:
            return
        depends = re.search(rb"\0depends=([^\0]*)\0", files[name].read_bytes())
        for other in depends.group(1).decode().split(",") if depends else []:
            if other:
                place(other.replace("-", "_"))
        ordered.append(name)

    for name in DOM0_MODULES:
        name = name.replace("-", "_")
        if name not in files:
            raise LabError(f"the kernel has no module {name}: is it Debian 12's?")
        place(name)
    for name in ordered:
        image.file(files[name], f"lib/modules/{name}.ko")
    image.text("lib/modules/in-order", "".join(f"{name}\n" for name in ordered))
