"""Run the certify step of a recipe, as a Ray job or by hand.

python jobs/certify.py jobs/recipes/routing.yaml
ray job submit --working-dir . -- python jobs/certify.py jobs/recipes/routing.yaml
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "platform"))

from journeyman.cli import main

if __name__ == "__main__":
    sys.exit(main(["certify", *sys.argv[1:]]))
