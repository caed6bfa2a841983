"""The ``fxgraft`` command. May import everything; nothing imports it."""
