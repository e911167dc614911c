"""Peak memory of a process: as a function, and as code for the processes that tests start."""

import inspect


def peak_gib() -> float:
    """Most memory this process has held since it was started."""
    # Not ru_maxrss: a child starts with its parent's value there, which after other tests may be gigabytes.
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 2**20


PEAK_GIB = inspect.getsource(peak_gib)
