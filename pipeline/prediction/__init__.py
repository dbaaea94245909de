"""Maps of whole scenes, and exported students."""
