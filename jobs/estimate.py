"""Price the labeling of a recipe from a sample, on the nodes that would do it, as a Ray job.

python jobs/estimate.py jobs/recipes/routing.yaml
ray job submit --working-dir . -- python jobs/estimate.py jobs/recipes/routing.yaml
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "platform"))

from journeyman.cli import main

if __name__ == "__main__":
    sys.exit(main(["label", "--prepare", "--estimate", *sys.argv[1:]]))
