"""A saved state in memory, between a device's own classes and the stream."""

from __future__ import annotations

from typing import Any

Tree = dict[str, Any]
"""Field name → int, bool, bytes, str, Tree, list of Trees; subsection name → Tree."""

Json = dict[str, Any]
"""What describes a tree in a stream, to be encoded; msgspec.Raw in it is already."""
