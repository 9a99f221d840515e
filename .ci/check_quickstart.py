"""Did the quickstart leave what it says, and learn?   python .ci/check_quickstart.py LOG

LOG is what the run printed: at its end, where a checkpoint, the metrics and two pictures are.
"""

import csv
import re
import sys
from pathlib import Path

PRINTED = ("checkpoint", "metrics log", "loss picture", "schedule picture")

log = Path(sys.argv[1]).read_text()
found = {what: re.findall(rf"^{what} +(\S+)$", log, flags=re.MULTILINE) for what in PRINTED}
missing = [what for what, paths in found.items() if not paths or not all(Path(path).is_file() for path in paths)]
if missing:
    sys.exit(f"printed or not, these are not there: {', '.join(missing)}")

with open(found["metrics log"][0], newline="") as file:
    losses = [float(row["train_loss"]) for row in csv.DictReader(file) if row.get("train_loss")]
if len(losses) < 2 or losses[-1] >= losses[0] - 0.5:
    sys.exit(f"the training loss should fall by 0.5 at least, it went {losses[:1]} to {losses[-1:]}")
