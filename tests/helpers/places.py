"""Where the checkout lies, whichever folder a test is in."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
SHARED = ROOT.parent / "shared"  # real images; only some checkouts have it beside them
