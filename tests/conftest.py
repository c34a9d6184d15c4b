"""Models in tests are tiny: a second thread only waits for the first, and for long beside other programs."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, after this
