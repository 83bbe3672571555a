"""Write memfit/catalog/deepspeed_keys.json from the installed DeepSpeed; --check only compares."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from memfit.catalog.deepspeed_keys import FILE
from memfit.engine.deepspeed_keys import installed_keys

PATH = Path(__file__).parents[1] / "memfit" / "catalog" / FILE


def main() -> int:
    """0 when the file is as the installed DeepSpeed says."""
    text = json.dumps(installed_keys().to_json(), indent=1, sort_keys=True) + "\n"
    if "--check" in sys.argv[1:]:
        same = PATH.is_file() and PATH.read_text(encoding="utf-8") == text
        print(f"{PATH.name}: {'up to date' if same else 'differs; run tools/deepspeed_keys.py'}")
        return 0 if same else 1
    PATH.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
