"""The embedded demo model, and how it was made."""

from pathlib import Path

DEMO_MODEL = Path(__file__).parent / "mixtral"
