"""The server: compress and restore over HTTP, a proxy in front of an OpenAI-shaped API, and a page to look at.

    guard     size, content type, host, log        every request goes through it
    lanes     one queue for each model             compression runs there, and ends in time
    app       the routes                           forms says what they take
    proxy     /v1/chat/completions, /v1/models     shorter messages out, the answer back as it comes

`fewer serve` starts it; `fewer.serve.app.create_app(Settings(...))` is the ASGI application for other servers.
"""
