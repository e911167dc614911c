"""Peak memory of a process, as code for the processes that tests start."""

# Not ru_maxrss: a child starts with its parent's value there, which after other tests may be gigabytes.
PEAK_GIB = """
def peak_gib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 2**20
"""
