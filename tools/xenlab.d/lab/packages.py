"""Debian's own packages, downloaded and unpacked into the cache; nothing is installed on the machine.

A private apt root is used, with the machine's own sources but an empty status, so that the packages come with all
their libraries and what is installed on the machine plays no part. Only Debian 12's releases are let in: its QEMU is
7.2, and a PVH guest dies under QEMU 10 (docs/xenlab.md, Pitfalls).
"""

import os
import re
import shutil
import subprocess

from .errors import LabError

WANTED = [
    "xen-hypervisor-4.17-amd64",
    "xen-utils-4.17",
    "xenstore-utils",
    "linux-image-amd64",
    "busybox-static",
    "socat",
    "strace",
    "python3-minimal",
    "qemu-system-x86",
]
RELEASES = ["bookworm", "bookworm-updates", "bookworm-security"]
QEMU_VERSION = "1:7.2+"


def fetch(cache, say):
    """Makes sure that the packages are unpacked in the cache; does nothing if they are."""
    if (cache.debian / "packages.txt").exists():
        return
    for tool in ["apt-get", "dpkg-deb"]:
        if not shutil.which(tool):
            raise LabError(f"{tool} is missing: the lab is made of Debian's packages and needs Debian or its kin")
    options = prepare_apt(cache)
    say("fetching the lists of packages")
    apt(options, "update", check=False)
    chosen = choose(options)
    say(f"downloading {len(chosen)} packages")
    apt(options, "--download-only", "--yes", "install", *WANTED)
    unpack(cache, chosen, say)


def prepare_apt(cache):
    """Lays out the private apt root; returns the options that make apt use it."""
    for folder in ["lists/partial", "archives/partial"]:
        (cache.apt / folder).mkdir(parents=True, exist_ok=True)
    (cache.apt / "status").write_text("")
    pins = [f"Package: *\nPin: release n={release}\nPin-Priority: 990\n" for release in RELEASES]
    (cache.apt / "preferences").write_text("\n".join(pins))
    settings = {
        "Dir::State": cache.apt,
        "Dir::State::lists": cache.apt / "lists",
        "Dir::State::status": cache.apt / "status",
        "Dir::Cache": cache.apt,
        "Dir::Cache::archives": cache.apt / "archives",
        "Dir::Etc::preferences": cache.apt / "preferences",
        "Dir::Etc::preferencesparts": "/dev/null",
        "APT::Sandbox::User": "root",
        "APT::Install-Recommends": "false",
        "APT::Architecture": "amd64",
    }
    return [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]


def apt(options, *arguments, check=True):
    """Runs apt-get on the private root and returns what it printed."""
    environment = dict(os.environ, LC_ALL="C", DEBIAN_FRONTEND="noninteractive")
    done = subprocess.run(
        ["apt-get", "-q", *options, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment,
    )
    if check and done.returncode != 0:
        why = [line for line in done.stderr.splitlines() if line.startswith("E:")] or ["no message"]
        raise LabError(
            f"apt-get {arguments[-1]} failed: {why[0]}; the machine's apt sources have to have Debian 12 (bookworm)"
        )
    return done.stdout


def choose(options):
    """The archive names of all packages that are needed; checks that QEMU is the one that works."""
    plan = apt(options, "--simulate", "install", *WANTED)
    chosen = re.findall(r"^Inst (\S+) (?:\[.*?\] )?\((\S+) .*?\[(\w+)\]\)", plan, re.MULTILINE)
    versions = {name: version for name, version, _ in chosen}
    qemu = versions.get("qemu-system-x86", "none")
    if not qemu.startswith(QEMU_VERSION):
        raise LabError(f"apt offers qemu-system-x86 {qemu}, but 7.2 is needed: add Debian 12 to the apt sources")
    return [f"{name}_{version.replace(':', '%3a')}_{arch}.deb" for name, version, arch in chosen]


def unpack(cache, archives, say):
    """Unpacks the archives; the folder appears whole or not at all."""
    say(f"unpacking {len(archives)} packages")
    partial = cache.folder / "debian.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for archive in archives:
        path = cache.apt / "archives" / archive
        if not path.exists():
            raise LabError(f"{archive} has not been downloaded: delete {cache.apt} and call fetch again")
        subprocess.run(["dpkg-deb", "-x", path, partial], check=True)
    (partial / "packages.txt").write_text("".join(f"{archive}\n" for archive in sorted(archives)))
    shutil.rmtree(cache.debian, ignore_errors=True)
    partial.rename(cache.debian)
