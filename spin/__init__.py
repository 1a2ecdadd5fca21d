"""What the stages share. From the ground up: files, recipe, sampling, run, model, data, checks,
bench, report. Each part uses only those before it, and none imports a stage."""

import os

# A stage reports a problem in one line of its own. Without this, libraries would report it several
# times before. They read these variables when they are imported; a user's own values are kept.
for _library in ("HF_HUB", "DATASETS", "TRANSFORMERS"):
    os.environ.setdefault(f"{_library}_VERBOSITY", "error")
