"""What is raised for the user's own mistakes."""

from __future__ import annotations


class OptionError(ValueError):
    """An option or argument that the user has to change; raised at the call, not swallowed as a fallback."""
