import sys
from pathlib import Path

# Worker processes import the checks by name.
sys.path.insert(0, str(Path(__file__).parent))
