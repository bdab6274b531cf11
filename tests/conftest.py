"""Here so that pytest puts this folder on the path (helpers such as `support` are imported by name)."""

import os

# Before anything imports the hub's client: a test that asks the hub by mistake fails at once instead of retrying.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
