"""An HTTP server for packages, with OpenAI's routes. Needs the extra `serve`.

`server.serve` runs it; `app.make_app` builds the Starlette application alone.
"""
