"""For every test: one intra-op thread, since several threads on busy cores wait for each other."""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

from hypothesis import settings  # noqa: E402 - after the threads are limited

settings.register_profile("esper", deadline=None)  # a busy machine is no failure
settings.load_profile("esper")
