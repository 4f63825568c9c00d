"""A deployment: configuration, launching and supervising its processes, and the command line.

The only room that knows Ray, and the only one that reads files or the environment for configuration. Everything below
gets frozen specs (`worker.spec`, `router.spec`) and never imports this package.
"""
