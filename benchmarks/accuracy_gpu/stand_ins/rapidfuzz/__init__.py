"""Stands in for rapidfuzz on a GPU machine without a package index. memfit uses it for the hints of its errors only."""

from __future__ import annotations

from rapidfuzz import fuzz, process

__all__ = ["fuzz", "process"]
