"""System files: their sections, how they are read, and how they become clients and links."""
