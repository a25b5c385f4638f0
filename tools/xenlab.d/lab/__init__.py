"""The Xen lab: emulated hosts with a real Xen and a Debian dom0, for trying live migration.

`cli` is the command line. Below it: `packages` and `images` make what is booted; `lab`, `network`, `host` and `process`
boot it and end it; `jobs` runs commands in a dom0; `guest`, `clock` and `migration` work on the guest; `trials` and
`compare` are the two commands that do many migrations. Python's standard library only.
"""
