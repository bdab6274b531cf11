"""One thread for every test: on a busy machine, threads that wait for each other make tiny models 70 times slower."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # subprocesses too

import torch  # noqa: E402  after the setting that it reads

torch.set_num_threads(1)
