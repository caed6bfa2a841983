"""An HTTP server with OpenAI's interface over an engine.

``startup`` makes a server of a compiled model, ``app`` has the routes, ``service`` what happens
to a request, ``worker`` the thread that the engine runs in, ``server`` the process: signals and
draining. May import everything but ``fxgraft.cli`` and ``fxgraft.api``; needs the extra ``serve``.
"""
